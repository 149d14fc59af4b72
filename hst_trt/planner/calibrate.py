"""Measures many schedules of a pair on a few prompts, where it pays: along the frontier of cost and distance.

First the large model alone at a spread of step counts and a spread of schedules at random; then, round by round, a model of the
distance is learned from all that was measured, and for each of many budgets the schedule is measured next that it expects
most of. What is kept is what was measured, not the model.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..bundle import CalibratedEntry, CalibrationEntry, save_calibration
from ..compare.features import Features
from ..compare.gallery import Case
from ..compare.run import CONVERGED_SAMPLING, CONVERGED_STEPS
from ..compare.store import digest
from ..errors import RequestError
from ..pipeline import HybridStitchPipeline
from ..plan import StitchPlan
from ..workspace import RequestShape
from .choose import Distance, calibration_of
from .model import DistanceModel, fitter
from .space import LEAST_STEPS, Point, Space, point_of

__all__ = ["Calibrator", "calibrate"]

log = logging.getLogger(__name__)

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
    on_measured: Callable[[int, str], None] = lambda done, note: None,
) -> CalibrationEntry:
    """Measures `count` schedules, and writes them into the bundle now and then and at the end.

    What the bundle already has of the same prompts, size and reference is not measured again.

    Args:
        cases: prompts; their numbers are the seeds.
        height, width: pixels; the bundle's default if left out.
        baseline_steps: of the large-only run that speed-ups are over, and the most of any schedule; the bundle's default if
            left out.
        converged_steps: of the large-only run that distances are to.
        on_measured: called with how many are measured, and a line about the last one.

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
    entry = CalibrationEntry(
        height=side * h,
        width=side * w,
        guidance_scale=bundle.manifest.defaults.guidance_scale,
        prompts=len(cases),
        prompts_hash=digest(*(f"{case.number} {case.prompt}" for case in cases)),
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
    calibrator = Calibrator(pipeline, cases, entry, features, known[0].schedules if known else ())

    def save() -> None:
        schedules = tuple(_entry(point, distance) for point, distance in calibrator.measured.items())
        pipeline.bundle = save_calibration(pipeline.bundle, entry.model_copy(update={"schedules": schedules}))

    saved = time.monotonic()
    for point in calibrator.run(count):
        done, distance = len(calibrator.measured), calibrator.measured[point]
        on_measured(done, f"{calibrator.speedup(point):.2f}x, distance {distance.both:.4f}")
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()
    save()
    return calibration_of(pipeline.bundle, height, width)


def _entry(point: Point, distance: Distance) -> CalibratedEntry:
    rounded = {name: round(value, 6) for name, value in dataclasses.asdict(distance).items()}
    return CalibratedEntry(**dataclasses.asdict(point), **rounded)


class Calibrator:
    """Measures points of a pair, on the prompts and for the size of a calibration.

    Args:
        known: what was measured before.
    """

    def __init__(
        self,
        pipeline: HybridStitchPipeline,
        cases: Sequence[Case],
        calibration: CalibrationEntry,
        features: Features,
        known: Sequence[CalibratedEntry] = (),
    ) -> None:
        self._pipeline, self._cases, self._features = pipeline, cases, features
        self._size = {"height": calibration.height, "width": calibration.width}
        self._steps = max(LEAST_STEPS, calibration.baseline_steps)
        ratios = tuple(ratio for ratio in pipeline.bundle.manifest.bucket_ratios if ratio < 1)
        self.space = Space(self._steps, ratios, pipeline.scheduler.shift)
        self.measured = {point_of(entry): Distance(entry.latents, entry.features) for entry in known}
        self._costs = pipeline.costs(RequestShape(1, calibration.guidance_scale > 1, *pipeline.grid(**self._size)))
        self._plans: dict[Point, StitchPlan] = {}
        self._converged_steps = calibration.converged_steps

    @functools.cached_property
    def _converged(self) -> tuple[np.ndarray, list[Tensor]]:
        """The latents and features that distances are to; drawn only if there is something to measure."""
        sampling = dataclasses.asdict(CONVERGED_SAMPLING)
        latents = self._latents({"schedule": "large", "num_inference_steps": self._converged_steps, **sampling})
        return latents, self._seen(latents)

    def run(self, count: int) -> Iterator[Point]:
        """Measures until there are `count` points, or no more to find; gives each one after it was measured."""
        rng = np.random.default_rng(0)
        first = self.space.large_only()
        first += [self.space.random(rng) for _ in range(max(SPREAD, count // 4))]
        while len(self.measured) < count and (points := first or self._promising(rng)):
            for point in points:
                if point not in self.measured and len(self.measured) < count:
                    self.measured[point] = Distance(*self.distances(point).mean(1).tolist())
                    yield point
            first = []

    def distances(self, point: Point) -> np.ndarray:
        """To the converged large model, of latents and of features as `Distance` has them, [2, prompts]."""
        latents = self._latents(point.settings)
        wanted, seen = self._converged
        error: np.ndarray = np.square(latents - wanted).mean((1, 2, 3))
        return np.sqrt(np.stack([error, self._features.distance(self._seen(latents), seen)]))

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

    def _latents(self, settings: Mapping[str, Any]) -> np.ndarray:
        request = {**settings, **self._size}
        drawn = [self._pipeline(case.prompt, seed=case.number, output_type="latent", **request).images for case in self._cases]
        return np.concatenate(drawn)

    def _seen(self, latents: np.ndarray) -> list[Tensor]:
        """Features of the pictures that latents decode to."""
        return self._features(self._pipeline.decode(latents))[1]
