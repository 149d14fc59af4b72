"""Which plans are compared: settings of equal cost, found by arithmetic on measured call costs.

The hybrid is to be 1.83x faster than the large model, the figure of the paper. What it costs is the budget of its rivals,
which get the first whole step at or above it: they may cost a little more than the hybrid, not less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from demo.errors import DemoError
from hst_trt.cost import CallCosts
from hst_trt.plan import MaskRule, Schedule, StitchPlan

TARGET = 1.83
TOLERANCE = 0.025
"""How far a hybrid's predicted speed-up may be from the target: half a hybrid step of 20 steps."""

SLACK = 0.01
"""By how much a rival may fall short of the budget before it gets another step: timing is no better than that."""

RATIOS = (0.2, 0.3, 0.4)
CORRECTIONS = (0.0, 0.9)


@dataclass(frozen=True)
class Row:
    """One way to draw: arguments of `HybridStitchPipeline`, but for prompt and seed."""

    schedule: Schedule
    steps: int
    stages: tuple[int, int, int] | None = None
    ratio: float | None = None
    correction: float = 0.0
    random_mask: bool = False

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """`seed` is also that of a random mask: each picture gets masks of its own."""
        mask = MaskRule() if self.ratio is None else MaskRule(self.ratio, random_seed=seed if self.random_mask else None)
        return {
            "schedule": self.schedule,
            "num_inference_steps": self.steps,
            "stages": self.stages,
            "mask": mask,
            "correction": self.correction,
        }

    def __str__(self) -> str:
        parts = [f"{self.schedule}, {self.steps} steps"]
        parts += [f"stages {self.stages}"] if self.stages else []
        parts += [f"mask {self.ratio:.0%}{' at random' if self.random_mask else ''}"] if self.ratio else []
        parts += [f"correction {self.correction}"] if self.correction else []
        return ", ".join(parts)


PlanOf = Callable[[Row], StitchPlan]


def hybrids(plan_of: PlanOf, costs: CallCosts, steps: int, target: float = TARGET) -> list[Row]:
    """For every large stage, mask ratio and correction the hybrid stage that comes nearest to the target.

    At least two hybrid steps, or no mask would ever be redrawn.

    Raises:
        DemoError: none comes near enough.
    """
    found: list[Row] = []
    for ratio in RATIOS:
        for correction in CORRECTIONS:
            for large in range(1, steps - 1):
                options = [
                    Row("hybrid", steps, (large, hybrid, steps - large - hybrid), ratio, correction)
                    for hybrid in range(2, steps - large + 1)
                ]
                nearest = min(options, key=lambda row: abs(steps / plan_of(row).cost(costs) - target))
                if abs(steps / plan_of(nearest).cost(costs) / target - 1) <= TOLERANCE:
                    found.append(nearest)
    if not found:
        least = Row("hybrid", steps, (1, 2, steps - 3), RATIOS[0])
        raise DemoError(
            f"no hybrid of {steps} steps is {target}x faster than the large model here: a small call costs {costs.small():.2f} "
            f"of a large one, and the least hybrid reaches {steps / plan_of(least).cost(costs):.2f}x"
        )
    return found


def splits(plan_of: PlanOf, costs: CallCosts, steps: int, budget: float) -> list[Row]:
    """Large, then small: with and without correction, switched at the first step whose cost reaches the budget."""
    rows = []
    for correction in CORRECTIONS:
        options = [Row("srdiffusion", steps, (large, 0, steps - large), None, correction) for large in range(steps)]
        rows.append(next(row for row in options if plan_of(row).cost(costs) >= budget * (1 - SLACK)))
    return rows


def fewer(budget: float) -> Row:
    """The large model alone with as many steps as the budget buys: what one can do without any tool."""
    return Row("large", math.ceil(budget * (1 - SLACK)))


def longer(rival: Row) -> Row:
    """A split or large-only row with one large step more, in a small one's place if it has any."""
    if rival.stages is None:
        return replace(rival, steps=rival.steps + 1)
    large, hybrid, small = rival.stages
    if small == 0:
        raise DemoError(f"{rival} is still faster than the hybrid: is this machine busy with something else?")
    return replace(rival, stages=(large + 1, hybrid, small - 1))


def randomised(hybrid: Row) -> Row:
    """The control of a hybrid: the same plan, its masks drawn at random."""
    return replace(hybrid, random_mask=True)
