"""The schedules a planner chooses from: (steps, solver, shift, stages, mask ratio, correction, refresh, ras).

All are plans of the schedules ``hybrid`` and ``ras``, which hold the others: without hybrid and small steps they are the
large model alone, a hybrid without hybrid steps is SRDiffusion with a fixed switch. Steps are spaced evenly down to 0
(``trailing``): the other spacing spends one call on next to nothing, whichever schedule it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from ..bundle import CalibratedEntry
from ..plan import MaskRule
from ..schedule import Solver, TimestepSpacing

__all__ = ["CORRECTIONS", "LEAST_STEPS", "REFRESHES", "SOLVERS", "Point", "Space", "point_of"]

CORRECTIONS = (0.0, 0.7, 0.9, 1.0)
REFRESHES = (0, 2, 3, 4, 6, 8)
SOLVERS: tuple[Solver, ...] = get_args(Solver)
LEAST_STEPS = 3
_SPACING: TimestepSpacing = "trailing"
_TWO = 2  # full steps before tokens can be told by how their velocity changes


@dataclass(frozen=True)
class Point:
    """One schedule. What it does not use is at its default, so equal schedules are equal points.

    Attributes:
        stages: large, hybrid and small steps.
        shift: of sigmas; None for the pair's own.
        ratio: mask ratio, a bucket's; 0 without hybrid steps.
        correction: 0 where the small model is never alone.
        refresh: every so manyth hybrid step is a full large call; 0 for none.
        ras: whether tokens outside the mask keep their last velocity; the small model then draws nothing.
    """

    stages: tuple[int, int, int]
    solver: Solver = "euler"
    shift: float | None = None
    ratio: float = 0.0
    correction: float = 0.0
    refresh: int = 0
    ras: bool = False

    @property
    def steps(self) -> int:
        return sum(self.stages)

    @property
    def large_only(self) -> bool:
        return self.stages[0] == self.steps

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `HybridStitchPipeline.plan`."""
        _, hybrid, small = self.stages
        settings: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "solver": self.solver,
            "timestep_spacing": _SPACING,
            "shift": self.shift,
        }
        if self.large_only:
            return settings | {"schedule": "large"}
        if small == self.steps:
            return settings | {"schedule": "small"}
        schedule = "ras" if self.ras else "hybrid" if hybrid else "srdiffusion"
        settings |= {"schedule": schedule, "stages": self.stages, "correction": self.correction}
        if hybrid:
            settings |= {"mask": MaskRule(ratio=self.ratio), "refresh_every": self.refresh}
        return settings


def point_of(entry: CalibratedEntry) -> Point:
    """The schedule that a bundle's calibration has the distance of."""
    return Point(**entry.model_dump(exclude={"latents", "features", "confirmed"}))


@dataclass(frozen=True)
class Space:
    """The points that may be tried.

    Attributes:
        most_steps: of the loop.
        ratios: mask ratios, those of the bundle's buckets.
        shift: the pair's own.
    """

    most_steps: int
    ratios: tuple[float, ...]
    shift: float

    @property
    def shifts(self) -> tuple[float | None, ...]:
        """The pair's own and two larger ones: few steps want more of them where noise is high."""
        return None, round(self.shift * 4 / 3, 3), round(self.shift * 5 / 3, 3)

    def large_only(self) -> list[Point]:
        """The large model alone, closely enough that step counts between can be told from their neighbours."""
        counts = np.unique(np.round(np.geomspace(LEAST_STEPS, self.most_steps, 12)).astype(int)).tolist()
        return [Point((n, 0, 0), solver, shift) for solver in SOLVERS for shift in self.shifts for n in counts]

    def random(self, rng: np.random.Generator) -> Point:
        """A point with any step count, more often a small one, and any cut into stages."""
        steps = int(np.exp(rng.uniform(np.log(LEAST_STEPS), np.log(self.most_steps + 1))))
        large, hybrid, small = np.diff([0, *sorted(rng.integers(0, steps + 1, 2)), steps]).tolist()
        return self.tidied(
            Point(
                (large, hybrid, small),
                SOLVERS[rng.integers(len(SOLVERS))],
                self.shifts[rng.integers(len(self.shifts))],
                float(rng.choice(self.ratios)),
                float(rng.choice(CORRECTIONS)),
                int(rng.choice(REFRESHES)),
                bool(rng.integers(2)),
            )
        )

    def neighbours(self, point: Point) -> list[Point]:
        """The points one change away: a step more, less or of another stage, or another value of anything else."""
        large, hybrid, small = point.stages
        moves = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1)]
        moves += [(-x, -y, -z) for x, y, z in moves]
        found = [dataclasses.replace(point, stages=(large + x, hybrid + y, small + z)) for x, y, z in moves]
        ratio = point.ratio or self.ratios[len(self.ratios) // 2]
        found = [dataclasses.replace(one, ratio=ratio) for one in [point, *found]]
        found += [dataclasses.replace(one, ras=not point.ras, refresh=2) for one in found]
        found += [dataclasses.replace(point, solver=solver) for solver in SOLVERS]
        found += [dataclasses.replace(point, shift=shift) for shift in self.shifts]
        found += [dataclasses.replace(point, ratio=other) for other in self.ratios]
        found += [dataclasses.replace(point, correction=other) for other in CORRECTIONS]
        found += [dataclasses.replace(point, refresh=every) for every in REFRESHES]
        found += [dataclasses.replace(one, refresh=one.stages[1]) for one in found if one.ras]  # the last step alone
        legal = (one for one in found if min(one.stages) >= 0 and LEAST_STEPS <= one.steps <= self.most_steps)
        return list(dict.fromkeys(tidy for tidy in map(self.tidied, legal) if tidy != point))

    def tidied(self, point: Point) -> Point:
        """The same schedule with what it does not use at its default."""
        large, hybrid, small = point.stages
        if point.ras and hybrid + small and large >= _TWO:
            hybrid = hybrid + small
            refresh = point.refresh if point.refresh <= hybrid else 0
            if refresh == 1:  # no masked step is left
                return self.tidied(dataclasses.replace(point, stages=(large + hybrid, 0, 0)))
            return dataclasses.replace(point, stages=(large, hybrid, 0), correction=0.0, refresh=refresh)
        refresh = point.refresh if point.refresh <= hybrid else 0
        full = (hybrid // refresh if refresh else 0) + (not large)
        if full >= hybrid and hybrid:  # no masked step is left
            large, hybrid, refresh = large + hybrid, 0, 0
        return dataclasses.replace(
            point,
            stages=(large, hybrid, small),
            ratio=point.ratio if hybrid else 0.0,
            correction=point.correction if large + hybrid and hybrid + small else 0.0,
            refresh=refresh,
            ras=False,
        )
