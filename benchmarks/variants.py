"""Ways to stitch that the package does not have, or has only one of, each beside the large model alone at equal cost.

A step is one letter: L the full large model; l its conditional half, with the last guidance difference kept; s the small
model and the last known v_L - v_S; k the same with its conditional half only; S the small model as it is; m and n: s and k
with the large model on a mask; h: the large model on a mask, the rest keeping its last velocity (`ras`); r: the same,
the rest going on in a straight line through its last two.
Two distances, each over the large model's alone at equal cost: of latents, and of features of the pictures (their root).
Masked calls are read off full ones, so their keys and values are never stale: a bound from above on what they are worth.
Costs are the cost model's; conditional halves count half. Writes benchmarks/results/variants.json.

    python benchmarks/variants.py [--prompts 16] [--threads 1]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from about import machine
from scipy.ndimage import uniform_filter

from hst_trt.arguments import start_latents
from hst_trt.builder.build import build_bundle
from hst_trt.cli.options import prompts_of
from hst_trt.codec import Decoder, Encoder, patchify
from hst_trt.compare.features import Features
from hst_trt.compare.measures import interval, weighted_means
from hst_trt.compare.store import write_json
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import bucket_for, token_buckets
from hst_trt.recipe import load_recipe, load_target
from hst_trt.schedule import Sampling, StepTable
from hst_trt.tensor_names import LARGE, SMALL
from hst_trt.workspace import RequestShape, Workspace

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "variants.json"
BUNDLE = ROOT / "build" / "out" / "planner_check" / "demo-cpu.hstb"
SAMPLING = Sampling("ab2", "trailing", 4.0)
CONVERGED = (120, Sampling("ab2", "trailing"))
SMALL_KIND = {"s": 1.0, "m": 1.0, "k": 0.5, "n": 0.5}
"""The share of a small call that a letter takes."""


@dataclass(frozen=True)
class Variant:
    """`steps`: letters. ratio: of masks, or one for each masked step. fade: of v_L - v_S a step. onward: how much of its
    change since the call before is added on, with r how much of the velocity's. score: what ranks tokens. smooth: side of
    the mean it is smoothed by. feather: whether the blend fades over the tokens beside the mask. decay: of scores outside
    the mask. aged: whether the solver knows for how long velocities were kept."""

    about: str
    steps: str
    ratio: float | tuple[float, ...] = 0.3
    fade: float = 1.0
    onward: float = 0.0
    score: str = "difference"
    smooth: int = 3
    feather: bool = False
    decay: float = 0.9
    aged: bool = True
    sampling: Sampling = SAMPLING


HYBRID, RAS = "LLLLLLmmmmLL", "LLLLLLhLhLhL"
VARIANTS = (
    Variant("correction", "LLLLLLssLssL"),
    Variant("correction, faded by 0.7", "LLLLLLssLssL", fade=0.7),
    Variant("correction, going on as it changed", "LLLLLLssLssL", onward=1.0),
    Variant("correction, going on half as much", "LLLLLLssLssL", onward=0.5),
    Variant("no correction", "LLLLLLSSLSSL"),
    Variant("large keyframes, a small step between", "LLLLLLsLsLsL"),
    Variant("large keyframes, a small conditional half between", "LLLLLLkLkLkL"),
    Variant("small model late", "LLLLLLLLLsss"),
    Variant("small model at the last step", "LLLLLLLLLLLs"),
    Variant("small conditional half at the last step", "LLLLLLLLLLLk"),
    Variant("small conditional half, late", "LLLLLLLLLkkk"),
    Variant("large conditional half in turn", "LLLLLLlLlLlL"),
    Variant("large conditional half, late", "LLLLLLLLllll"),
    Variant("hybrid", HYBRID),
    Variant("hybrid, small conditional half", HYBRID.replace("m", "n")),
    Variant("hybrid, small conditional half, 40 %", HYBRID.replace("m", "n"), ratio=0.4),
    Variant("hybrid, small conditional half, 10 steps", "LLLLnnnnnL"),
    Variant("hybrid, shrinking mask", HYBRID, ratio=(0.5, 0.3, 0.2, 0.2)),
    Variant("hybrid, growing mask", HYBRID, ratio=(0.2, 0.2, 0.3, 0.5)),
    Variant("hybrid, no smoothing", HYBRID, smooth=1),
    Variant("hybrid, 5x5 smoothing", HYBRID, smooth=5),
    Variant("hybrid, feathered", HYBRID, feather=True),
    Variant("hybrid, scores do not fade", HYBRID, decay=1.0),
    Variant("hybrid, scores fade fast", HYBRID, decay=0.5),
    Variant("hybrid, score: spread of latents in a token", HYBRID, score="latents"),
    Variant("hybrid, score: change of the small velocity", HYBRID, score="drift"),
    Variant("hybrid, score: at random", HYBRID, score="random"),
    Variant("hybrid, score: the difference of this very step (not knowable)", HYBRID, score="oracle"),
    Variant("hybrid, in turn with full steps", "LLLLLLmLmLmL"),
    Variant("ras, in turn with full steps", RAS),
    Variant("ras, 40 %", RAS, ratio=0.4),
    Variant("ras, 20 %", RAS, ratio=0.2),
    Variant("ras, 10 %", RAS, ratio=0.1),
    Variant("ras, two masked of three", "LLLLLLhhLhhL"),
    Variant("ras, one masked of three", "LLLLLLhLLhLL"),
    Variant("ras, never full again", "LLLLLLhhhhhh"),
    Variant("ras, early", "LLLhLhLhLhLL"),
    Variant("ras, 10 steps", "LLLLhLhLhL"),
    Variant("ras, 16 steps", "LLLLLLLhLhLhLhLL"),
    Variant("ras, the rest goes on in a straight line", RAS.replace("h", "r"), onward=1.0),
    Variant("ras, straight line, two masked of three", "LLLLLLrrLrrL", onward=1.0),
    Variant("ras, half a straight line", RAS.replace("h", "r"), onward=0.5),
    Variant("ras, half a straight line, two masked of three", "LLLLLLrrLrrL", onward=0.5),
    Variant("ras, kept velocities taken for new ones", RAS, aged=False),
    Variant("ras, two masked of three, kept velocities taken for new ones", "LLLLLLhhLhhL", aged=False),
    Variant("ras, 10 steps, two of three, 40 %, kept velocities taken for new ones", "LLLLhhLhhL", ratio=0.4, aged=False),
    Variant("ras, 10 steps, full again at the last only", "LLLLhhhhhL"),
    Variant("ras, 9 steps, two of three, 40 %", "LLLhhLhhL", ratio=0.4),
    Variant("ras, 10 steps, two of three, 40 %", "LLLLhhLhhL", ratio=0.4),
    Variant("ras, 10 steps, masked last", "LLLLhhLhhh", ratio=0.4),
    Variant("ras, 12 steps, masked last", "LLLLLLhLhLhh"),
    Variant("ras, score: the change of this very step (not knowable)", RAS, score="oracle"),
    Variant("small model as second step", "LsLLLLLLLLLL"),
    Variant("small model as second and third step", "LssLLLLLLLLL"),
    Variant("hybrid as second step", "LmLLLLLLLLLL"),
    Variant("hybrid as second and third step", "LmmLLLLLLLLL"),
    Variant("ras as third step", "LLhLLLLLLLLL"),
    Variant("ras, score: at random", RAS, score="random"),
    Variant("ras, score: spread of latents in a token", RAS, score="latents"),
    Variant("ras, no smoothing", RAS, smooth=1),
    Variant("ras, feathered", RAS, feather=True),
)


class Lab:
    """All prompts in one batch, calls by hand."""

    def __init__(self, pipeline: HybridStitchPipeline, prompts: list[str]) -> None:
        self.count = len(prompts)
        h, w = pipeline.grid()
        side, channels = pipeline.spec.patch_size, pipeline.spec.latent_channels
        rows = [""] * self.count + prompts
        index = [0] * self.count + list(range(1, 1 + self.count))
        encoder = Encoder(pipeline.backend, pipeline.spec, len(pipeline.tokenizers), 1 + self.count, len(rows))
        self.text = encoder([tokenize(["", *prompts]) for tokenize in pipeline.tokenizers], index)
        noise = [start_latents(seed, None, None, (1, channels, h * side, w * side))[1] for seed in range(self.count)]
        self.noise = patchify(np.concatenate(noise), side)
        self.ws = Workspace(pipeline.backend, pipeline.spec, RequestShape(self.count, True, h, w), record=False)
        self.guidance = pipeline.bundle.manifest.defaults.guidance_scale
        self.costs = pipeline.costs(RequestShape(1, True, h, w))
        self.grid, self.tokens = (h, w), h * w
        self.buckets = token_buckets(h * w, pipeline.bundle.manifest.bucket_ratios)
        self.scheduler = pipeline.scheduler

    def call(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The unconditional and the conditional velocity, each [prompts, N, C]."""
        self.ws.large() if name == LARGE else self.ws.small_alone()
        unconditional, conditional = np.split(self.ws._read("row_velocity"), 2)
        return unconditional, conditional

    def guided(self, name: str) -> np.ndarray:
        unconditional, conditional = self.call(name)
        return unconditional + self.guidance * (conditional - unconditional)

    def begin(self, steps: int, sampling: Sampling) -> StepTable:
        table = self.scheduler.table(steps, sampling)
        self.ws.begin(self.noise, self.text, table, self.guidance, None, 0.0)
        return table

    def integrate(self, velocity: np.ndarray, *, aged: bool = True) -> None:
        self.ws._write("velocity", velocity.astype(np.float32))
        self.ws.integrate()
        if aged:
            self.ws.remember()

    def large_alone(self, steps: int, sampling: Sampling) -> np.ndarray:
        self.begin(steps, sampling)
        for _ in range(steps):
            self.ws.advance()
            self.ws.large()
            self.ws.integrate()
        return self.ws.latents


class Distances:
    """To the converged large model, of latents and of features of the pictures."""

    def __init__(self, lab: Lab) -> None:
        self._see, self._decoder = Features(), Decoder(lab.ws.backend, lab.ws.spec, *lab.grid)
        self._converged = lab.large_alone(*CONVERGED)
        self._seen = self._see(self._decoder(self._converged))[1]

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Means over prompts, [2, draws]."""
        of_latents = np.sqrt(np.square(latents - self._converged).mean((1, 2)))
        of_features = np.sqrt(self._see.distance(self._see(self._decoder(latents))[1], self._seen))
        return np.stack([weighted_means(of_latents), weighted_means(of_features)])


class Run:
    """One variant; `cost` in large calls."""

    def __init__(self, lab: Lab, variant: Variant) -> None:
        self.lab, self.variant, self.cost = lab, variant, 0.0
        self.rng = np.random.default_rng(0)
        self.known: list[tuple[float, np.ndarray]] = []  # sigma and v_L - v_S, the last one first
        self.past: list[tuple[float, np.ndarray]] = []  # time before the shift, velocity
        self.scores = np.zeros((lab.count, lab.tokens))
        self.sketch: np.ndarray | None = None
        ratios = variant.ratio if isinstance(variant.ratio, tuple) else (variant.ratio,) * len(variant.steps)
        self.ratios = iter(ratios)

    def __call__(self) -> np.ndarray:
        lab, steps = self.lab, self.variant.steps
        table = lab.begin(len(steps), self.variant.sampling)
        shift = self.variant.sampling.shift or 1.0
        gap: np.ndarray | float = 0.0
        for t, letter in enumerate(steps):
            lab.ws.advance()
            self.sigma = float(table.sigmas[t])
            self.time = self.sigma / (shift - (shift - 1) * self.sigma)
            then = steps[t + 1] if t + 1 < len(steps) else ""
            if letter in "Ll":
                unconditional, conditional = lab.call(LARGE)
                gap = conditional - unconditional if letter == "L" else gap
                velocity = conditional + (lab.guidance - 1) * gap
                self.cost += 1.0 if letter == "L" else 0.5
                self.compare(velocity, then)
            elif letter == "S":
                velocity = lab.guided(SMALL)
                self.cost += lab.costs.small()
            else:
                velocity = self.masked(letter) if letter in "mnrh" else self.follow(letter)
            self.past = [(self.time, velocity), *self.past[:1]]
            lab.integrate(velocity, aged=self.variant.aged)
        return lab.ws.latents

    def small(self, letter: str) -> np.ndarray:
        self.cost += SMALL_KIND[letter] * self.lab.costs.small()
        drawn = self.lab.guided(SMALL) if letter in "sm" else self.lab.call(SMALL)[1]
        self.moved = np.zeros(drawn.shape[:2]) if self.sketch is None else np.abs(drawn - self.sketch).mean(-1)
        self.sketch = drawn
        return drawn

    def compare(self, velocity: np.ndarray, then: str) -> None:
        """After a full large call: what the next step needs to know of the difference to what it will follow."""
        if then in SMALL_KIND:
            difference = velocity - self.small(then)
            self.known = [(self.sigma, difference), *self.known[:1]]
        elif then in ("r", "h"):
            difference = velocity - self.past_velocity(then)
        else:
            return
        self.scores = np.abs(difference).mean(-1)

    def follow(self, letter: str) -> np.ndarray:
        """The small model and the last known difference."""
        sigma, difference = self.known[0]
        faded = self.variant.fade * difference
        if self.variant.onward and len(self.known) == 2:
            before, earlier = self.known[1]
            faded = faded + self.variant.onward * (difference - earlier) * (self.sigma - sigma) / (sigma - before)
        return self.small(letter) + faded

    def past_velocity(self, letter: str) -> np.ndarray:
        if letter == "h" or len(self.past) < 2:
            return self.past[0][1]
        (last, velocity), (earlier, before) = self.past
        return velocity + self.variant.onward * (velocity - before) * (self.time - last) / (last - earlier)

    def masked(self, letter: str) -> np.ndarray:
        lab = self.lab
        rest = self.past_velocity(letter) if letter in "rh" else self.follow(letter)
        count = bucket_for(next(self.ratios) * lab.tokens, lab.buckets)
        exact = lab.guided(LARGE)
        self.cost += lab.costs.large(count)
        fresh = np.abs(exact - rest).mean(-1)
        if letter in "mn":
            assert self.sketch is not None
            fresh = np.abs(exact - self.sketch).mean(-1)
        mask = self.mask(count, fresh)
        self.scores = np.where(mask, fresh, self.variant.decay * self.scores)
        if letter in "mn":
            self.known[0] = (self.sigma, np.where(mask[..., None], exact - self.sketch, self.known[0][1]))
        share = mask.astype(float)
        if self.variant.feather:
            share = np.maximum(share, self.smoothed(share, 3))
        return rest + share[..., None] * (exact - rest)

    def mask(self, count: int, fresh: np.ndarray) -> np.ndarray:
        shape = self.scores.shape
        ranked = {
            "difference": lambda: self.scores,
            "oracle": lambda: fresh,
            "drift": lambda: self.moved,
            "latents": lambda: self.lab.ws.latents.std(-1),
            "random": lambda: self.rng.random(shape),
        }[self.variant.score]()
        mask = np.zeros(shape, bool)
        order = np.argsort(-self.smoothed(ranked, self.variant.smooth), axis=1)
        np.put_along_axis(mask, order[:, :count], True, axis=1)
        return mask

    def smoothed(self, values: np.ndarray, side: int) -> np.ndarray:
        maps = values.reshape(-1, *self.lab.grid)
        return uniform_filter(maps, (0, side, side), mode="nearest").reshape(values.shape)


def foretold(lab: Lab, steps: int) -> list[dict[str, float]]:
    """How much of the large model's change since the step before others tell, step by step of a run of it alone.

    1 - mean square of what is left / mean square of the change; below 0 it is better to take no change at all. `small`: the
    small model's change is taken for it, as stitching with a correction does; `small, scaled`: with the best factor there is;
    `half`: the small model's conditional half; `past`: the large model's own change before, with the best factor.
    """
    table = lab.begin(steps, SAMPLING)
    kept: dict[str, np.ndarray] = {}
    changes: dict[str, np.ndarray] = {}
    rows = []
    for t in range(steps):
        lab.ws.advance()
        unconditional, conditional = lab.call(SMALL)
        now = {
            "half": conditional,
            "small": unconditional + lab.guidance * (conditional - unconditional),
            "large": lab.guided(LARGE),
        }
        last, changes = changes, {name: now[name] - kept[name] for name in kept}
        kept = now
        if last:
            wanted = changes["large"]

            def told(others: np.ndarray, factor: float | None = None, wanted: np.ndarray = wanted) -> float:
                if factor is None:
                    factor = float((wanted * others).sum() / np.square(others).sum())
                return round(float(1 - np.square(wanted - factor * others).sum() / np.square(wanted).sum()), 3)

            rows.append(
                {
                    "step": t + 1,
                    "sigma": round(float(table.sigmas[t]), 3),
                    "change": round(float(np.sqrt(np.square(wanted).mean() / np.square(now["large"]).mean())), 3),
                    "small": told(changes["small"], 1.0),
                    "small, scaled": told(changes["small"]),
                    "half": told(changes["half"], 1.0),
                    "past": told(last["large"]),
                }
            )
        lab.integrate(now["large"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of a call")
    arguments = parser.parse_args()
    bundle = build_bundle(load_recipe("demo"), load_target("cpu"), BUNDLE).bundle
    pipeline = HybridStitchPipeline.from_bundle(bundle.path, threads=arguments.threads)
    lab = Lab(pipeline, prompts_of(ROOT / "benchmarks" / "prompts" / "calibration.txt")[: arguments.prompts])
    distances = Distances(lab)

    counts = (7, 8, 9, 10, 11, 12, 13, 14, 16, 18)
    alone = np.stack([distances(lab.large_alone(n, SAMPLING)) for n in counts])  # [counts, 2, draws]

    def alone_at(cost: float) -> np.ndarray:
        """Of the large model alone at this cost, [2, draws]; logarithms are interpolated between step counts."""
        over = min(max(np.searchsorted(counts, cost), 1), len(counts) - 1)
        share = (cost - counts[over - 1]) / (counts[over] - counts[over - 1])
        return np.exp((1 - share) * np.log(alone[over - 1]) + share * np.log(alone[over]))

    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        run = Run(lab, variant)
        mine = distances(run())
        ratios = mine / alone_at(run.cost)
        row = asdict(variant) | {"cost": round(run.cost, 3), "distance": round(float(mine[0, 0]), 5)}
        for name, ratio in zip(("over_large_alone", "features_over_large_alone"), ratios, strict=True):
            low, high = interval(ratio[1:])
            row[name] = {"value": round(float(ratio[0]), 4), "low": round(low, 4), "high": round(high, 4)}
        rows.append(row)
        print(
            f"{variant.about}: {run.cost:.2f} large calls, {mine[0, 0]:.4f}, {ratios[0, 0]:.3f}, {ratios[1, 0]:.3f}", flush=True
        )
    write_json(
        OUT,
        {
            "machine": machine(arguments.threads),
            "prompts": lab.count,
            "large_alone": {n: round(float(values[0, 0]), 5) for n, values in zip(counts, alone, strict=True)},
            "foretold": foretold(lab, 12),
            "variants": rows,
        },
    )


if __name__ == "__main__":
    main()
