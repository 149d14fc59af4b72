"""The schedules a planner chooses from: (steps, solver, stages, mask ratio, correction, refresh).

All are plans of the schedule ``hybrid``, which holds the others: without hybrid and small steps it is the large model alone,
without hybrid steps it is SRDiffusion with a fixed switch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from ..plan import MaskRule
from ..schedule import Solver

__all__ = ["CORRECTIONS", "LEAST_STEPS", "SOLVERS", "Point", "Space"]

CORRECTIONS = (0.0, 0.7, 0.9, 1.0)
SOLVERS: tuple[Solver, ...] = get_args(Solver)
LEAST_STEPS = 3


@dataclass(frozen=True)
class Point:
    """One schedule. What it does not use is at its default, so equal schedules are equal points.

    Attributes:
        stages: large, hybrid and small steps.
        ratio: mask ratio, a bucket's; 0 without hybrid steps.
        correction: 0 where the small model is never alone.
        refresh: whether one full large call stands in the middle of the hybrid steps.
    """

    stages: tuple[int, int, int]
    solver: Solver = "euler"
    ratio: float = 0.0
    correction: float = 0.0
    refresh: bool = False

    @property
    def steps(self) -> int:
        return sum(self.stages)

    @property
    def refresh_after(self) -> int:
        """How many hybrid steps come before the refresh, if there is one: at least half of them, so that it is the only one."""
        return (self.stages[1] + 1) // 2

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `HybridStitchPipeline.plan`."""
        large, hybrid, small = self.stages
        settings: dict[str, Any] = {"num_inference_steps": self.steps, "solver": self.solver}
        if not hybrid and not small:
            return settings | {"schedule": "large"}
        if not hybrid and not large:
            return settings | {"schedule": "small"}
        settings |= {"schedule": "hybrid" if hybrid else "srdiffusion", "stages": self.stages, "correction": self.correction}
        if hybrid:
            settings |= {"mask": MaskRule(ratio=self.ratio), "refresh_every": self.refresh_after if self.refresh else 0}
        return settings


@dataclass(frozen=True)
class Space:
    """The points that may be tried.

    Attributes:
        most_steps: of the loop.
        ratios: mask ratios, those of the bundle's buckets.
    """

    most_steps: int
    ratios: tuple[float, ...]

    def large_only(self, steps: Sequence[int]) -> list[Point]:
        return [Point((n, 0, 0), solver) for n in steps for solver in SOLVERS]

    def random(self, rng: np.random.Generator) -> Point:
        """A point with any step count, more often a small one, and any cut into stages."""
        steps = int(np.exp(rng.uniform(np.log(LEAST_STEPS), np.log(self.most_steps + 1))))
        large, hybrid, small = np.diff([0, *sorted(rng.integers(0, steps + 1, 2)), steps]).tolist()
        return self.tidied(
            Point(
                (large, hybrid, small),
                SOLVERS[rng.integers(len(SOLVERS))],
                float(rng.choice(self.ratios)),
                float(rng.choice(CORRECTIONS)),
                bool(rng.integers(4) == 0),
            )
        )

    def neighbours(self, point: Point) -> list[Point]:
        """The points one change away: a step more, less or of another stage, or another value of anything else."""
        large, hybrid, small = point.stages
        moves = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1)]
        moves += [(-x, -y, -z) for x, y, z in moves]
        found = [dataclasses.replace(point, stages=(large + x, hybrid + y, small + z)) for x, y, z in moves]
        ratio = point.ratio or self.ratios[len(self.ratios) // 2]
        found = [dataclasses.replace(one, ratio=ratio) for one in found]
        found += [dataclasses.replace(point, solver=solver) for solver in SOLVERS]
        found += [dataclasses.replace(point, ratio=other) for other in self.ratios]
        found += [dataclasses.replace(point, correction=other) for other in CORRECTIONS]
        found += [dataclasses.replace(point, refresh=not point.refresh)]
        legal = (one for one in found if min(one.stages) >= 0 and LEAST_STEPS <= one.steps <= self.most_steps)
        return list(dict.fromkeys(tidy for tidy in map(self.tidied, legal) if tidy != point))

    def tidied(self, point: Point) -> Point:
        """The same schedule with what it does not use at its default."""
        large, hybrid, small = point.stages
        if not hybrid and not large:
            point = dataclasses.replace(point, correction=0.0)
        return dataclasses.replace(
            point,
            ratio=point.ratio if hybrid else 0.0,
            correction=point.correction if hybrid or small else 0.0,
            refresh=point.refresh and hybrid > 2,
        )
