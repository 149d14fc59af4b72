"""The exactness tests that pin the masked call, in torch and in ONNX Runtime, on three kinds of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import KINDS, ort_backend, pair, random_text, spec_of, torch_backend

from hst_trt.denoise import denoise
from hst_trt.models.sd3 import patchify, unpatchify
from hst_trt.noise import torch_randn
from hst_trt.plan import AdaptiveSwitch, MaskRule, PlanRequest, StitchPlan, make_plan, token_buckets
from hst_trt.schedule import FlowMatchEuler
from hst_trt.workspace import RequestShape, Workspace

H, W = 6, 10
N = H * W


@pytest.fixture(scope="module", params=list(KINDS))
def models(request: pytest.FixtureRequest):
    return pair(request.param)


@pytest.fixture(scope="module", params=["torch", "onnxruntime", pytest.param("torch-cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, models, tmp_path_factory: pytest.TempPathFactory):
    if request.param == "torch":
        return torch_backend(*models)
    if request.param == "torch-cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU and a torch that can use it")
        return torch_backend(*models, device="cuda")
    return ort_backend(tmp_path_factory.mktemp("graphs"), *models)


Open = Callable[..., Workspace]


@pytest.fixture
def begin(backend, models) -> Open:
    """A workspace that holds a request, its large cache filled with NaN."""

    def make(
        images: int = 1,
        guided: bool = False,
        h: int = H,
        w: int = W,
        steps: int = 4,
        seed: int = 3,
        plan: StitchPlan | None = None,
    ) -> Workspace:
        spec = spec_of(*models)
        ws = Workspace(backend, spec, RequestShape(images, guided, h, w))
        for cache in ws._cache_of("large"):
            ws._write(cache, np.float32(np.nan))
        noise = torch_randn(seed, (images, spec.latent_channels, 2 * h, 2 * w))
        ws.begin(
            patchify(torch.from_numpy(noise)).numpy(),
            random_text(ws.shape.rows, spec),
            FlowMatchEuler(3.0).table(steps),
            guidance_scale=4.0,
            mask=plan.mask if plan else None,
            correction=plan.correction if plan else 0.0,
        )
        ws.advance()  # for tests that call the models themselves; those that run a loop start from step 0 too
        ws._write("step", np.int64(0))
        return ws

    return make


def request(schedule: str = "hybrid", steps: int = 8, **settings) -> PlanRequest:
    return PlanRequest(schedule, steps, N, token_buckets(N), **settings)


def run(begin: Open, plan: StitchPlan, **shape) -> np.ndarray:
    ws = begin(steps=len(plan.steps), plan=plan, **shape)
    denoise(ws, plan)
    return ws.latents


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def diffusers_velocity(model, ws: Workspace) -> np.ndarray:
    """What diffusers' own forward gives for the request in `ws`, as tokens (unguided)."""
    latents = unpatchify(torch.from_numpy(ws.latents), ws.shape.h, ws.shape.w)
    with torch.no_grad():
        velocity = model(
            latents,
            torch.from_numpy(ws._read("encoder_hidden_states")),
            torch.from_numpy(ws._read("pooled_projections")),
            torch.from_numpy(ws._read("timestep")),
        ).sample
    return patchify(velocity).numpy()


@pytest.mark.parametrize(("h", "w"), [(6, 10), (8, 8), (3, 7)])
def test_a_full_call_on_a_cache_of_nan_equals_diffusers(begin: Open, models, h: int, w: int) -> None:
    ws = begin(images=2, h=h, w=w)
    ws.large()
    assert distance(ws._read("velocity"), diffusers_velocity(models[0], ws)) < 1e-5


def test_the_small_call_equals_diffusers(begin: Open, models) -> None:
    ws = begin(images=2)
    ws.small()
    assert distance(ws._read("sketch"), diffusers_velocity(models[1], ws)) < 1e-5


@pytest.mark.parametrize("count", [8, 24, 56])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_masked_call_equals_the_full_call_on_its_tokens_in_any_order(begin: Open, count: int, shuffled: bool) -> None:
    """The cache was written at the same x and t, and its rows follow the tokens into any slot order."""
    ws = begin(images=2)
    ws.large()
    full = ws._read("velocity")
    rng = np.random.default_rng(count)
    ranks = np.stack([rng.permutation(N) for _ in range(2)])
    ws.impose((ranks < count).reshape(2, H, W))
    ws.select(count)
    if shuffled:  # the slots of active tokens may be permuted at will: the call rewrites their rows
        active = ws._read("active").reshape(-1)[: 2 * count].reshape(2, count)
        order = ws._read("order")
        for image in range(2):
            active[image] = rng.permutation(active[image])
            order[image, :count] = active[image]
        ws._write("order", order)
        flat = ws._read("active").reshape(-1)
        flat[: 2 * count] = active.reshape(-1)
        ws._write("active", flat.reshape(2, N))
    ws.large_masked(count)
    active = ws._read("active").reshape(-1)[: 2 * count].reshape(2, count)
    refined = ws._read("refined").reshape(-1)[: 2 * count * 16].reshape(2, count, 16)
    assert distance(refined, np.take_along_axis(full, active[..., None], 1)) < 1e-5
    assert set(active[0]) == set(np.flatnonzero(ranks[0] < count))


def test_masks_that_move_grow_and_shrink_keep_the_cache_exact(begin: Open) -> None:
    ws = begin()
    ws.large()
    full = ws._read("velocity")
    rng = np.random.default_rng(0)
    for count in (16, 16, 32, 8, 40, 24):
        ws.impose((rng.permutation(N) < count).reshape(1, H, W))
        ws.select(count)
        ws.large_masked(count)
        active = ws._read("active").reshape(-1)[:count]
        refined = ws._read("refined").reshape(-1)[: count * 16].reshape(count, 16)
        assert distance(refined, full[0, active]) < 1e-5


def test_hybrid_without_hybrid_steps_is_srdiffusion_and_runs_bit_equal(begin: Open) -> None:
    hybrid, srdiffusion = make_plan(request(stages=(3, 0, 5))), make_plan(request("srdiffusion", stages=(3, 0, 5)))
    assert hybrid == srdiffusion
    np.testing.assert_array_equal(run(begin, hybrid, guided=True), run(begin, srdiffusion, guided=True))


def test_a_mask_of_everything_without_small_steps_is_the_large_model_alone(begin: Open) -> None:
    plan = make_plan(request(stages=(3, 5, 0), mask=MaskRule(ratio=1.0)))
    assert plan == make_plan(request("large"))
    np.testing.assert_array_equal(run(begin, plan), run(begin, make_plan(request("large"))))


def test_no_large_and_no_hybrid_steps_is_the_small_model_alone(begin: Open) -> None:
    plan = make_plan(request(stages=(0, 0, 8)))
    assert plan == make_plan(request("small"))
    np.testing.assert_array_equal(run(begin, plan), run(begin, make_plan(request("small"))))


@pytest.mark.parametrize(
    "settings",
    [
        dict(stages=(2, 5, 1)),
        dict(stages=(0, 6, 2), correction=0.9),
        dict(stages=(2, 5, 1), refresh_every=2, mask=MaskRule(ratio=0.4, drift=0.3, starvation=0.2)),
        dict(stages=(2, 5, 1), mask=MaskRule(threshold=1.2)),
    ],
    ids=["budget", "correction", "refresh", "threshold"],
)
@pytest.mark.parametrize("guided", [False, True])
def test_two_images_with_different_masks_equal_the_two_images_alone(begin: Open, models, settings, guided: bool) -> None:
    plan = make_plan(request(**settings))
    pair_ws = begin(images=2, guided=guided, steps=8, plan=plan)
    noise, text = pair_ws.latents, random_text(pair_ws.shape.rows, pair_ws.spec)
    records = denoise(pair_ws, plan, keep_masks=True)
    masks = {t: record.mask for t, record in enumerate(records) if record.mask is not None}
    assert masks
    assert any((mask[0] != mask[1]).any() for mask in masks.values())
    together = pair_ws.latents
    for image in range(2):
        alone = begin(images=1, guided=guided, steps=8, plan=plan)
        rows = [image, image + 2] if guided else [image]
        alone.begin(
            noise[image : image + 1],
            {name: values[rows] for name, values in text.items()},
            alone.table,
            4.0,
            plan.mask,
            plan.correction,
        )
        denoise(alone, plan, replay={t: mask[image : image + 1] for t, mask in masks.items()})
        assert distance(alone.latents, together[image : image + 1]) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        dict(stages=(2, 5, 1)),
        dict(stages=(0, 6, 2), correction=0.9),
        dict(stages=(2, 5, 1), refresh_every=2, mask=MaskRule(ratio=0.5, drift=0.5, starvation=0.3)),
        dict(schedule="ras", stages=(3, 5, 0)),
        dict(schedule="t-stitch", stages=(4, 0, 4)),
        dict(stages=(4, 2, 2), switch=AdaptiveSwitch(tolerance=1.0)),
    ],
    ids=["hybrid", "correction", "refresh", "ras", "t-stitch", "adaptive"],
)
def test_onnx_runtime_and_torch_draw_the_same_latents(models, tmp_path: Path, settings) -> None:
    """Stitched loops of both backends, the recorded masks of one fed to the other."""
    plan = make_plan(request(**settings))
    spec = spec_of(*models)
    noise = patchify(torch.from_numpy(torch_randn(1, (2, 4, 2 * H, 2 * W)))).numpy()
    results, masks = [], None
    for backend in (torch_backend(*models), ort_backend(tmp_path, *models)):
        ws = Workspace(backend, spec, RequestShape(2, True, H, W))
        ws.begin(noise, random_text(4, spec), FlowMatchEuler(3.0).table(8), 3.0, plan.mask, plan.correction)
        records = denoise(ws, plan, keep_masks=True, replay=masks)
        masks = masks or {t: record.mask for t, record in enumerate(records) if record.mask is not None}
        results.append(ws.latents)
    assert distance(results[1], results[0]) < 1e-5
