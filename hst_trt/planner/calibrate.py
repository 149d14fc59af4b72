"""Measures many schedules of a pair on some prompts, where it pays: along the frontier of cost and distance.

First the large model alone at a spread of step counts and a spread of schedules at random; then, round by round, a model of the
distance is learned from all that was measured, and for each of many budgets the schedule is measured next that it expects
most of. What is kept is what was measured, not the model.

The least of many uncertain distances looks nearer than it is. So what comes near being chosen is measured on further prompts
too, until nothing that was not comes near what was.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..bundle import CalibratedEntry, CalibrationEntry, DistanceEntry, save_calibration
from ..compare.features import Features
from ..compare.gallery import Case
from ..compare.run import CONVERGED_SAMPLING, CONVERGED_STEPS
from ..compare.store import digest
from ..errors import RequestError
from ..pipeline import HybridStitchPipeline
from ..plan import StitchPlan
from ..workspace import RequestShape
from .choose import Distance, best_known, calibration_of, measured_in
from .model import DistanceModel, fitter
from .space import LEAST_STEPS, Point, Space

__all__ = ["FIRST_PROMPTS", "Calibrator", "Panel", "calibrate"]

log = logging.getLogger(__name__)

FIRST_PROMPTS = 24
"""The most that every schedule is measured on; the rest are for those that come near being chosen."""

NEAR = 1.03
"""How many times as far as the nearest that is as fast a schedule may be to be measured on all prompts."""

SAVE_EVERY = 30.0
"""Seconds between writes into the bundle."""

SPREAD = 30
"""The fewest schedules at random that a model is fitted to."""

CANDIDATES = 4000
"""Points that a round chooses from, and their neighbours."""

BUDGETS = 24
"""Speed-ups between 1.15 and 4 for each of which a round measures one point."""


def calibrate(
    pipeline: HybridStitchPipeline,
    cases: Sequence[Case],
    count: int,
    *,
    height: int | None = None,
    width: int | None = None,
    baseline_steps: int | None = None,
    converged_steps: int = CONVERGED_STEPS,
    on_measured: Callable[[int, int, str], None] = lambda done, of, note: None,
) -> CalibrationEntry:
    """Measures `count` schedules, and those near the frontier on all prompts; writes them into the bundle now and then and at
    the end.

    What the bundle already has of the same prompts, size and reference is not measured again.

    Args:
        cases: prompts; their numbers are the seeds. Every schedule is measured on the first `FIRST_PROMPTS` of them.
        height, width: pixels; the bundle's default if left out.
        baseline_steps: of the large-only run that speed-ups are over, and the most of any schedule; the bundle's default if
            left out.
        converged_steps: of the large-only run that distances are to.
        on_measured: called with how many measurements there are, of how many so far as is known, and a line about the last one.

    Raises:
        MissingError: SciPy or the feature network is not installed; RequestError: the reference is not the longest run;
        HstError: the bundle cannot be written.
    """
    fitter()
    features = Features()
    bundle, side = pipeline.bundle, pipeline.spec.token_side
    h, w = pipeline.grid(height, width)
    steps = bundle.manifest.defaults.num_inference_steps if baseline_steps is None else baseline_steps
    if converged_steps <= steps:
        raise RequestError(
            f"a reference of {converged_steps} steps is no reference for schedules of up to {steps}", fix=f"take {2 * steps}"
        )
    first, rest = cases[:FIRST_PROMPTS], cases[FIRST_PROMPTS:]
    entry = CalibrationEntry(
        height=side * h,
        width=side * w,
        guidance_scale=bundle.manifest.defaults.guidance_scale,
        prompts=len(first),
        prompts_hash=_hash(first),
        further_prompts=len(rest),
        further_hash=_hash(rest),
        baseline_steps=steps,
        converged_steps=converged_steps,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        schedules=(),
    )
    known = [old for old in bundle.manifest.calibrations if old.same_as(entry)]
    for old in bundle.manifest.calibrations:
        if (old.height, old.width) == (entry.height, entry.width) and old not in known:
            log.warning(
                "this replaces the calibration of %s, %d schedules on other prompts or terms", old.date, len(old.schedules)
            )
    panel, further = (Panel(pipeline, part, entry, features) for part in (first, rest))
    calibrator = Calibrator(pipeline, panel, further, entry)
    for old in known:
        measured, confirmed = measured_in(old)
        calibrator.measured |= measured
        calibrator.confirmed |= confirmed if old.further_hash == entry.further_hash else {}

    def save() -> None:
        pipeline.bundle = save_calibration(pipeline.bundle, entry.model_copy(update={"schedules": calibrator.entries()}))

    saved = time.monotonic()
    for point, distance, left in calibrator.run(count):
        done = len(calibrator.measured) + len(calibrator.confirmed)
        on_measured(done, done + left, f"{calibrator.speedup(point):.2f}x, distance {distance.both:.4f}")
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()
    save()
    return calibration_of(pipeline.bundle, height, width)


def _hash(cases: Sequence[Case]) -> str:
    return digest(*(f"{case.number} {case.prompt}" for case in cases))


class Panel:
    """Prompts, and the converged large model's pictures of them, that schedules' distances are to.

    Args:
        calibration: the size of the pictures, and the reference's steps.
    """

    def __init__(
        self, pipeline: HybridStitchPipeline, cases: Sequence[Case], calibration: CalibrationEntry, features: Features
    ) -> None:
        self.cases = cases
        self._pipeline, self._features = pipeline, features
        self._size = {"height": calibration.height, "width": calibration.width}
        self._converged_steps = calibration.converged_steps

    @functools.cached_property
    def _converged(self) -> tuple[np.ndarray, list[Tensor]]:
        """The latents and features that distances are to; drawn only if there is something to measure."""
        sampling = dataclasses.asdict(CONVERGED_SAMPLING)
        latents = self._latents({"schedule": "large", "num_inference_steps": self._converged_steps, **sampling})
        return latents, self._seen(latents)

    def distances(self, point: Point) -> np.ndarray:
        """To the converged large model, of latents and of features as `Distance` has them, [2, prompts]."""
        latents = self._latents(point.settings)
        wanted, seen = self._converged
        error: np.ndarray = np.square(latents - wanted).mean((1, 2, 3))
        return np.sqrt(np.stack([error, self._features.distance(self._seen(latents), seen)]))

    def _latents(self, settings: Mapping[str, Any]) -> np.ndarray:
        request = {**settings, **self._size}
        drawn = [self._pipeline(case.prompt, seed=case.number, output_type="latent", **request).images for case in self.cases]
        return np.concatenate(drawn)

    def _seen(self, latents: np.ndarray) -> list[Tensor]:
        """Features of the pictures that latents decode to."""
        return self._features(self._pipeline.decode(latents))[1]


class Calibrator:
    """Measures points of a pair, for the size of a calibration.

    Attributes:
        measured: by point, on the first prompts.
        confirmed: by point, on all of them.
    """

    def __init__(self, pipeline: HybridStitchPipeline, first: Panel, rest: Panel, calibration: CalibrationEntry) -> None:
        self._pipeline, self._first, self._rest = pipeline, first, rest
        self._size = {"height": calibration.height, "width": calibration.width}
        self._steps = max(LEAST_STEPS, calibration.baseline_steps)
        ratios = tuple(ratio for ratio in pipeline.bundle.manifest.bucket_ratios if ratio < 1)
        self.space = Space(self._steps, ratios, pipeline.scheduler.shift)
        self.measured: dict[Point, Distance] = {}
        self.confirmed: dict[Point, Distance] = {}
        self._costs = pipeline.costs(RequestShape(1, calibration.guidance_scale > 1, *pipeline.grid(**self._size)))
        self._plans: dict[Point, StitchPlan] = {}

    def run(self, count: int) -> Iterator[tuple[Point, Distance, int]]:
        """Measures until there are `count` points, or no more to find, and then confirms; gives each point after it was
        measured, with its distance and how many are left to be measured as far as is known."""
        rng = np.random.default_rng(0)
        first = self.space.large_only()
        first += [self.space.random(rng) for _ in range(max(SPREAD, count // 4))]
        while len(self.measured) < count and (points := first or self._promising(rng)):
            for point in points:
                if point not in self.measured and len(self.measured) < count:
                    self.measured[point] = Distance(*self._first.distances(point).mean(1).tolist())
                    yield point, self.measured[point], count - len(self.measured)
            first = []
        contenders = self._contenders() if self._rest.cases else []
        while contenders:
            point = contenders[0]
            self.confirmed[point] = self._on_all(point)
            contenders = self._contenders()
            yield point, self.confirmed[point], len(contenders)

    def entries(self) -> tuple[CalibratedEntry, ...]:
        """What was measured, for a bundle."""

        def rounded(distance: Distance) -> dict[str, Any]:
            return {name: round(value, 6) for name, value in dataclasses.asdict(distance).items()}

        return tuple(
            CalibratedEntry(
                **dataclasses.asdict(point),
                **rounded(distance),
                confirmed=DistanceEntry(**rounded(self.confirmed[point])) if point in self.confirmed else None,
            )
            for point, distance in self.measured.items()
        )

    def _on_all(self, point: Point) -> Distance:
        """Of a point that was measured on the first prompts."""
        first, rest = len(self._first.cases), self._rest.distances(point)
        known = dataclasses.astuple(self.measured[point])
        return Distance(*((first * np.array(known) + rest.sum(1)) / (first + len(self._rest.cases))).tolist())

    def _contenders(self) -> list[Point]:
        """The points that are not confirmed and come near the nearest that is as fast, the nearest to it first."""
        known = best_known(self.measured, self.confirmed)
        nearest, over = math.inf, {}
        for point in sorted(known, key=lambda point: (-self.speedup(point), known[point].both)):
            nearest = min(nearest, known[point].both)
            over[point] = known[point].both / nearest
        near = [point for point in over if over[point] <= NEAR and point not in self.confirmed]
        return sorted(near, key=over.__getitem__)

    def _sigmas_of(self, point: Point) -> np.ndarray:
        """[N+1]"""
        sampling = self._plan(point).sampling
        return self._pipeline.scheduler.table(point.steps, sampling).sigmas

    def _plan(self, point: Point) -> StitchPlan:
        if point not in self._plans:
            self._plans[point] = self._pipeline.plan(**point.settings, **self._size)
        return self._plans[point]

    def speedup(self, point: Point) -> float:
        """Of the loop over the baseline, by the costs of calls."""
        return self._steps / self._plan(point).cost(self._costs)

    def _promising(self, rng: np.random.Generator) -> list[Point]:
        """For each of many budgets the point not yet measured that the model expects most of; then any; then none."""
        far = {point: distance.both for point, distance in self.measured.items()}
        model = DistanceModel(far, self._sigmas_of)
        pool = {self.space.random(rng) for _ in range(CANDIDATES // 2)}
        best = sorted(far, key=far.__getitem__)
        frontier = [p for i, p in enumerate(best) if all(self.speedup(p) > self.speedup(q) for q in best[:i])]
        for point in frontier:
            pool.update(self.space.neighbours(point))
        candidates = [point for point in pool if point not in self.measured]
        if not candidates:
            return []
        expected = model(candidates)
        speeds = np.array([self.speedup(point) for point in candidates])
        chosen: dict[Point, None] = {}
        for low in np.geomspace(1.15, 4.0, BUDGETS):
            inside = np.flatnonzero((speeds >= low) & (speeds < 4.0 ** (1 / BUDGETS) * low))
            chosen |= dict.fromkeys(candidates[i] for i in inside[np.argsort(expected[inside])[:1]])
        return list(chosen) or [candidates[i] for i in np.argsort(expected)[:BUDGETS]]
