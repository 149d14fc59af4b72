"""From a calibration and the costs of calls to the schedule for a budget, and those that nearly were it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from ..arguments import call_costs, plan_request, token_grid
from ..bundle import Bundle, CalibrationEntry
from ..compare.rows import as_options
from ..cost import CallCosts, MeasuredCosts
from ..errors import MissingError, RequestError
from ..machine import Machine
from ..plan import StitchPlan, is_number
from ..workspace import RequestShape
from .space import Point, point_of

__all__ = ["Budget", "Choice", "Distance", "Option", "best_known", "calibration_of", "choose", "frontier", "measured_in"]

RUNNERS_UP = 4

SLACK = 0.02
"""By how much a schedule may be slower than asked for: steps are whole, so a step more may be within a hair's breadth."""


@dataclass(frozen=True)
class Budget:
    """What one may spend: the loop so many times faster than the baseline's, or so many seconds from prompt to picture."""

    speedup: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.latency is None):
            raise RequestError("a budget is a speed-up or a latency", fix="give one of --speedup and --latency")
        for name, value in (("speed-up", self.speedup), ("latency", self.latency)):
            if value is not None and not (is_number(value) and value > 0):
                raise RequestError(f"the {name} {value!r} is not a positive number")

    def __str__(self) -> str:
        return f"{self.speedup:g}x" if self.latency is None else f"{self.latency:g} s"


@dataclass(frozen=True)
class Distance:
    """To the converged large model, means over prompts: of latents (root mean square), and of what a network sees in the
    pictures (the root of the feature distance of `hst_trt.compare.features`)."""

    latents: float
    features: float

    @property
    def both(self) -> float:
        """What a planner minimises: the geometric mean, so that a tenth less of either counts the same. Latents alone would
        pass over seams, which are small and plain to see; features alone, over tones that are a little off everywhere."""
        return math.sqrt(self.latents * self.features)

    def __str__(self) -> str:
        return f"{self.latents:.4f}, {self.features:.3f}"

    def to_dict(self) -> dict[str, float]:
        return {"distance": round(self.both, 6), "latents": self.latents, "features": self.features}


@dataclass(frozen=True)
class Option:
    """A schedule that was calibrated, and what it is predicted to take.

    Attributes:
        distance: to the converged large model.
        speedup: of the loop over the baseline's.
        seconds: from prompt to picture; None where only the cost model is known.
    """

    point: Point
    distance: Distance
    speedup: float
    seconds: float | None

    @property
    def options(self) -> str:
        """For ``hst-trt run``."""
        return as_options(self.point.settings)


@dataclass(frozen=True)
class Choice:
    """The nearest schedule within the budget, those that follow it, and the nearest of the large model alone."""

    best: Option
    runners_up: tuple[Option, ...]
    large_only: Option | None
    calibration: CalibrationEntry
    costs: CallCosts


def choose(
    bundle: Bundle, budget: Budget, machine: Machine | None, *, height: int | None = None, width: int | None = None
) -> Choice:
    """The schedule of least distance that keeps within a budget.

    Args:
        machine: whose saved costs are used, if the bundle has any.
        height, width: pixels; the bundle's default if left out.

    Raises:
        MissingError: the bundle has no calibration for this size.
        RequestError: nothing that was calibrated is fast enough (it names what is reachable), or a latency is asked for where
            no seconds were measured.
    """
    calibration = calibration_of(bundle, height, width)
    shape = RequestShape(1, calibration.guidance_scale > 1, *token_grid(bundle, height, width))
    costs = call_costs(bundle, shape, machine)
    if budget.latency is not None and not isinstance(costs, MeasuredCosts):
        raise RequestError(
            f"a latency of {budget} needs costs in seconds, and none were measured on this machine",
            fix=f"run `hst-trt bench --bundle {bundle.path} --save-costs`, or ask for a speed-up",
        )
    options = sorted(_options(bundle, calibration, costs), key=lambda option: option.distance.both)
    inside = [option for option in options if _fits(option, budget)]
    if not inside:
        fastest = max(options, key=lambda option: option.speedup)
        seconds = "" if fastest.seconds is None else f", {fastest.seconds:.3g} s"
        raise RequestError(
            f"no schedule of this pair reaches {budget}",
            found=f"the fastest that was calibrated has {fastest.speedup:.2f}x{seconds}",
            fix="ask for less",
        )
    alone = next((option for option in inside if option.point.large_only), None)
    return Choice(inside[0], tuple(inside[1 : 1 + RUNNERS_UP]), alone, calibration, costs)


def frontier(bundle: Bundle, calibration: CalibrationEntry, costs: CallCosts) -> list[Option]:
    """The schedules that no other one beats in both speed and distance, the slowest first."""
    best: list[Option] = []
    for option in sorted(_options(bundle, calibration, costs), key=lambda option: (option.distance.both, -option.speedup)):
        if not best or option.speedup > best[-1].speedup:
            best.append(option)
    return best


def calibration_of(bundle: Bundle, height: int | None, width: int | None) -> CalibrationEntry:
    """The bundle's calibration for a size.

    Raises:
        MissingError: it has none.
    """
    h, w = token_grid(bundle, height, width)
    side = bundle.spec.token_side
    for entry in bundle.manifest.calibrations:
        if (entry.height, entry.width) == (side * h, side * w):
            return entry
    there = ", ".join(f"{entry.width}x{entry.height}" for entry in bundle.manifest.calibrations) or "none"
    raise MissingError(
        f"{bundle.path.name} has no calibration for {side * w}x{side * h}, so no schedule can be chosen for a budget",
        found=f"calibrations for {there}",
        fix=f"run `hst-trt calibrate --bundle {bundle.path} --prompts-file FILE --height {side * h} --width {side * w}`",
    )


def measured_in(calibration: CalibrationEntry) -> tuple[dict[Point, Distance], dict[Point, Distance]]:
    """Distances by point: on the first prompts, and on all of them where that was measured."""
    entries = {point_of(entry): entry for entry in calibration.schedules}
    first = {point: Distance(entry.latents, entry.features) for point, entry in entries.items()}
    return first, {p: Distance(e.confirmed.latents, e.confirmed.features) for p, e in entries.items() if e.confirmed}


def best_known(first: Mapping[Point, Distance], confirmed: Mapping[Point, Distance]) -> dict[Point, Distance]:
    """Distances on all prompts: as measured, or else that on the first prompts times what came of the others.

    Those that were confirmed looked near on the first prompts, by luck too; so the factor is a little high. That is as it
    should be for one that was not confirmed and is chosen: it will have been lucky as well.
    """

    def factor(name: str) -> float:
        logs = [math.log(getattr(distance, name) / getattr(first[point], name)) for point, distance in confirmed.items()]
        return math.exp(statistics.fmean(logs)) if logs else 1.0

    latents, features = factor("latents"), factor("features")
    return {p: confirmed.get(p) or Distance(latents * d.latents, features * d.features) for p, d in first.items()}


def _options(bundle: Bundle, calibration: CalibrationEntry, costs: CallCosts) -> list[Option]:
    size = {"height": calibration.height, "width": calibration.width}

    def plan_of(settings: dict[str, object]) -> StitchPlan:
        return plan_request(bundle, **settings, **size)  # type: ignore[arg-type]

    baseline = plan_of({"schedule": "large", "num_inference_steps": calibration.baseline_steps}).cost(costs)
    options = []
    for point, distance in best_known(*measured_in(calibration)).items():
        plan = plan_of(point.settings)
        seconds = plan.latency(costs) if isinstance(costs, MeasuredCosts) and costs.seconds else None
        options.append(Option(point, distance, baseline / plan.cost(costs), seconds))
    return options


def _fits(option: Option, budget: Budget) -> bool:
    if budget.latency is not None:
        return option.seconds is not None and option.seconds <= budget.latency * (1 + SLACK)
    assert budget.speedup is not None
    return option.speedup >= budget.speedup * (1 - SLACK)
