"""The loop against a second one, written straight from docs/method.md: no workspace, no slots, no row moves, torch only.

The reference keeps keys and values in token order, gathers whole caches for every call, and ranks with a sort.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import pair, random_text, spec_of, torch_backend
from torch import Tensor

from hst_trt.denoise import denoise
from hst_trt.models.sd3 import TokenTransformer, patchify
from hst_trt.noise import torch_randn
from hst_trt.plan import AdaptiveSwitch, MaskRule, PlanRequest, Stage, StitchPlan, make_plan, token_buckets
from hst_trt.schedule import FlowMatchEuler, Sampling, StepTable
from hst_trt.workspace import RequestShape, Workspace

H, W, STEPS = 6, 10, 10
N = H * W
TEXT = 9

Past = tuple[Tensor, Tensor, int]  # of a token: latents and velocity when it was last computed, and the step that was


class Reference:
    """One unbatched, guided image."""

    def __init__(self, large, small, text: dict[str, np.ndarray], table: StepTable, guidance: float, plan: StitchPlan) -> None:
        self.large, self.small = TokenTransformer(large, cached=True), TokenTransformer(small, cached=False)
        self.text = {name: torch.from_numpy(values) for name, values in text.items()}
        self.table, self.guidance, self.plan = table, guidance, plan
        self.spec = spec_of(large, small)
        self.cache: dict[str, Tensor] = {}

    def velocity(self, module: TokenTransformer, x: Tensor, t: int, tokens: list[int]) -> Tensor:
        """v = v_u + w (v_c - v_u) of the given tokens; the large model's cache is gathered, used and put back."""
        spec = self.spec.large if module is self.large else self.spec.small
        rows = torch.tensor(spec.position_ids(H, W))[tokens].expand(2, -1)
        past = {}
        if module is self.large:
            rest = [n for n in range(N) if n not in set(tokens)]
            for name in module.cache_names:
                text = TEXT if int(name.split("_")[-1]) < spec.layers else 0
                full = self.cache.setdefault(name, torch.full((2, spec.heads, text + N, spec.head_dim), math.nan))
                past[name] = full[:, :, [*range(text), *(text + n for n in tokens + rest)]]
        timestep = torch.full((2,), float(self.table.timesteps[t]))
        out = module(x[:, tokens].expand(2, -1, -1), rows, timestep, **self.text, **past)
        for name, value in past.items():
            text = value.shape[2] - N
            self.cache[name][:, :, :text] = value[:, :, :text]
            self.cache[name][:, :, [text + n for n in tokens]] = value[:, :, text : text + len(tokens)]
        unconditional, conditional = out["velocity"].chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    @torch.no_grad()
    def run(self, x: Tensor) -> tuple[Tensor, list[int]]:
        plan, rule = self.plan, self.plan.mask or MaskRule()
        everything = list(range(N))
        difference, scores, age = torch.zeros_like(x), torch.zeros(N), torch.zeros(N)
        sketch = last_sketch = last_velocity = torch.zeros_like(x)
        mask: list[int] = []
        counts = []
        past: list[Past] = []
        for t, step in enumerate(plan.steps):
            tokens = everything if step.large_tokens == N else mask if step.large_tokens != 0 else []
            counts.append(len(tokens))
            if step.small:
                sketch = self.velocity(self.small, x, t, everything)
            elif step.redraw or 0 < len(tokens) < N:
                sketch = last_velocity
            faded = plan.correction * difference
            compares = len(tokens) < N or step.small or step.redraw
            velocity = sketch + faded
            if tokens:
                refined = self.velocity(self.large, x, t, tokens)
                velocity = velocity.clone()
                velocity[:, tokens] = refined
                if compares:
                    faded = faded.clone()
                    faded[:, tokens] = refined - sketch[:, tokens]
            if compares and (tokens or plan.correction):
                difference = faded
            if step.redraw:
                fresh = set(tokens)
                moved = rule.drift * (sketch - last_sketch).abs().mean(-1)[0]
                carried = rule.decay * scores + moved
                now = difference.abs().mean(-1)[0]
                scores = torch.tensor([float(now[n]) if n in fresh else float(carried[n]) for n in range(N)])
                age = torch.tensor([0.0 if n in fresh else float(age[n]) + 1 for n in range(N)])
                grid = scores.reshape(1, 1, H, W)
                sums = F.conv2d(grid, torch.ones(1, 1, 3, 3), padding=1)
                around = F.conv2d(torch.ones(1, 1, H, W), torch.ones(1, 1, 3, 3), padding=1)
                smooth = (sums / around).flatten()
                priority = smooth + rule.starvation * smooth.mean() * age
                ranked = sorted(range(N), key=lambda n: (-float(priority[n]), n))
                count = plan.steps[t + 1].large_tokens
                if count is None:
                    median = float(priority[ranked[N // 2]])
                    exceeding = sum(float(p) > rule.threshold * median for p in priority)
                    count = next(b for b in plan.request.buckets if b >= exceeding)
                mask = sorted(ranked[:count]) if count < N else everything
            drawn = set(everything) if step.small else set(tokens)
            now = [past[n] if n not in drawn else (x[0, n], velocity[0, n], t) for n in everything]
            x, past = self.step(x, velocity, t, past), now
            last_velocity, last_sketch = velocity, sketch
        return x, counts

    def step(self, x: Tensor, v: Tensor, t: int, past: list[Past]) -> Tensor:
        """The solver's formula as its paper has it, token by token: each has a last velocity of its own age."""
        return torch.stack([self.token_step(x[0, n], v[0, n], t, past[n] if past else None) for n in range(N)])[None]

    def token_step(self, x: Tensor, v: Tensor, t: int, past: Past | None) -> Tensor:
        sigma, then = (float(s) for s in self.table.sigmas[t : t + 2])
        if self.plan.sampling.solver == "ab2" and past:  # the velocity goes on in a straight line of the time before the shift
            return x + (then - sigma) * v + self.share(t, past[2]) * (v - past[1])
        last = float(self.table.sigmas[t - 1]) if past else math.nan
        if self.plan.sampling.solver == "dpmpp-2m" and past and last < 1 and then > 0:
            now_h, last_h = (math.log((1 - b) / b) - math.log((1 - a) / a) for a, b in ((sigma, then), (last, sigma)))
            clean, last_clean = x - sigma * v, past[0] - float(self.table.sigmas[past[2]]) * past[1]
            ahead = clean + now_h / last_h / 2 * (clean - last_clean) / (t - past[2])
            return then / sigma * x - (1 - then) * math.expm1(-now_h) * ahead
        return x + (then - sigma) * v

    @functools.cache  # noqa: B019
    def share(self, t: int, last: int) -> float:
        """The integral over step t of how far the line through steps `last` and t has gone on beyond t."""
        time = lambda s: s / (3 - 2 * s)
        before, sigma, then = (float(self.table.sigmas[k]) for k in (last, t, t + 1))
        nodes = np.linspace(sigma, then, 20001)
        return float(np.trapezoid((time(nodes) - time(sigma)) / (time(sigma) - time(before)), nodes))


def request(schedule: str = "hybrid", **settings: object) -> PlanRequest:
    return PlanRequest(schedule, STEPS, N, token_buckets(N), **settings)


def start(images: int = 1) -> np.ndarray:
    return patchify(torch.from_numpy(torch_randn(11, (images, 4, 2 * H, 2 * W)))).numpy()


def workspace(models, plan: StitchPlan, images: int = 1) -> Workspace:
    ws = Workspace(torch_backend(*models), spec_of(*models), RequestShape(images, True, H, W))
    text = random_text(2 * images, ws.spec)
    ws.begin(start(images), text, FlowMatchEuler(3.0).table(STEPS, plan.sampling), 3.0, plan.mask, plan.correction)
    return ws


@pytest.mark.parametrize("kind", ["sd35-large", "sd35-medium"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(stages=(2, 6, 2)),
        dict(stages=(0, 7, 3), correction=0.8),
        dict(stages=(2, 7, 1), refresh_every=3, mask=MaskRule(ratio=0.4, decay=0.7, drift=0.4)),
        dict(stages=(1, 8, 1), refresh_every=0, mask=MaskRule(ratio=0.2, starvation=0.4)),
        dict(stages=(2, 6, 2), mask=MaskRule(threshold=1.3, starvation=0.1)),
        dict(stages=(3, 0, 7), correction=0.9),
        dict(schedule="ras", stages=(3, 7, 0), mask=MaskRule(ratio=0.3, starvation=0.2)),
        dict(schedule="t-stitch", stages=(4, 0, 6)),
        dict(schedule="srdiffusion", stages=(4, 0, 6)),
        dict(schedule="ras", stages=(4, 6, 0), refresh_every=2, sampling=Sampling("ab2", "trailing")),
        dict(stages=(2, 6, 2), sampling=Sampling("ab2")),
        dict(stages=(2, 6, 2), correction=0.9, sampling=Sampling("dpmpp-2m")),
        dict(schedule="large", sampling=Sampling("dpmpp-2m")),
    ],
    ids=[
        "hybrid", "no-large-stage", "refresh-and-drift", "starvation", "threshold", "split", "ras", "t-stitch", "srdiffusion",
        "ras-ab2", "ab2", "dpmpp-2m", "large-dpmpp-2m",
    ],
)  # fmt: skip
def test_every_schedule_computes_what_the_method_says(kind: str, settings: dict) -> None:
    models = pair(kind)
    plan = make_plan(request(**settings))
    ws = workspace(models, plan)
    records = denoise(ws, plan)
    text = random_text(2, ws.spec)
    expected, counts = Reference(*models, text, ws.table, 3.0, plan).run(torch.from_numpy(start()))
    assert [record.tokens for record in records] == counts
    error = np.abs(ws.latents - expected.numpy()).max() / expected.abs().max()
    assert error < 1e-5


def test_a_low_threshold_masks_everything_and_a_high_one_the_smallest_bucket() -> None:
    models = pair("sd35-large")
    counts = {}
    for threshold in (1e-6, 1e6):
        plan = make_plan(request(stages=(2, 6, 2), mask=MaskRule(threshold=threshold)))
        counts[threshold] = [record.tokens for record in denoise(workspace(models, plan), plan)][2:8]
    assert counts[1e-6] == [N] * 6
    assert counts[1e6] == [token_buckets(N)[0]] * 6


def test_an_adaptive_switch_is_asked_in_the_large_stage_only() -> None:
    """With a tolerance that always fires where the change shrinks, the stage ends early and hybrid steps follow, once."""
    models = pair("sd35-large")
    plan = make_plan(request(stages=(5, 4, 1), refresh_every=2, switch=AdaptiveSwitch(tolerance=10.0, earliest=0.1)))
    records = denoise(workspace(models, plan), plan)
    stages = [record.step.stage for record in records]
    large = stages.count(Stage.LARGE)
    assert large < 5, "it never fired"
    assert stages == [Stage.LARGE] * large + [Stage.HYBRID] * 4 + [Stage.SMALL] * (STEPS - large - 4)
    fixed = make_plan(dataclasses.replace(plan.request, stages=(large, 4, STEPS - large - 4), switch=None))
    ws, again = workspace(models, plan), workspace(models, fixed)
    denoise(ws, plan)
    denoise(again, fixed)
    np.testing.assert_array_equal(ws.latents, again.latents)


def test_a_workspace_serves_one_request_after_another_without_a_trace() -> None:
    models = pair("sd35-medium")
    first, other = make_plan(request(stages=(2, 6, 2))), make_plan(request(stages=(0, 6, 4), correction=0.9))
    ws = workspace(models, first)
    denoise(ws, first)
    expected = ws.latents
    for plan in (other, first):
        text = random_text(2, ws.spec)
        ws.begin(start(), text, FlowMatchEuler(3.0).table(STEPS, plan.sampling), 3.0, plan.mask, plan.correction)
        denoise(ws, plan)
    np.testing.assert_array_equal(ws.latents, expected)


def test_every_masked_step_is_recorded_with_as_many_tokens_as_its_bucket() -> None:
    models = pair("sd35-large")
    plan = make_plan(request(stages=(2, 6, 2)))
    records = denoise(workspace(models, plan, images=2), plan, keep_masks=True)
    for record in records:
        assert (record.mask is not None) == (0 < record.tokens < N)
        if record.mask is not None:
            assert record.mask.shape == (2, H, W)
            assert (record.mask.sum((1, 2)) == record.tokens).all()


def random_masks(models, seed: int | None, images: int = 1, **settings: object) -> dict[int, np.ndarray]:
    plan = make_plan(request(stages=(2, 7, 1), mask=MaskRule(random_seed=seed), **settings))
    records = denoise(workspace(models, plan, images), plan, keep_masks=True)
    return {t: record.mask for t, record in enumerate(records) if record.mask is not None}


def test_a_random_mask_is_the_same_for_the_same_seed_and_another_for_each_step_and_seed() -> None:
    models = pair("sd35-large")
    first, again, other, scored = (random_masks(models, seed) for seed in (4, 4, 5, None))
    assert first.keys() == scored.keys() == set(range(2, 9))
    for t, mask in first.items():
        assert mask.sum() == scored[t].sum()
        np.testing.assert_array_equal(mask, again[t])
        assert (mask != other[t]).any()
        assert (mask != scored[t]).any()
    assert len({mask.tobytes() for mask in first.values()}) == len(first)


def test_an_images_random_mask_does_not_depend_on_the_images_after_it() -> None:
    models = pair("sd35-large")
    alone, batch = random_masks(models, 4), random_masks(models, 4, images=2)
    for t, mask in alone.items():
        np.testing.assert_array_equal(mask[0], batch[t][0])
        assert (batch[t][0] != batch[t][1]).any()


def test_a_random_mask_makes_the_same_calls_as_the_real_one() -> None:
    """So that it can stand as a control at equal cost."""
    models = pair("sd35-large")
    calls = []
    for seed in (None, 4):
        plan = make_plan(request(stages=(2, 7, 1), refresh_every=3, mask=MaskRule(random_seed=seed)))
        ws = workspace(models, plan)
        counted = [record.tokens for record in denoise(ws, plan)]
        calls.append((counted, sorted(ws.seconds)))
    assert calls[0] == calls[1]
