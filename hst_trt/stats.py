"""What a run did: which model computed how much in which stage, and what that saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cost import CallCosts
from .denoise import StepRecord
from .plan import Stage
from .tensor_names import LARGE, SMALL

__all__ = ["RunStats", "StageStats"]


@dataclass(frozen=True)
class StageStats:
    """One stage's share of a run. Tokens are image tokens of one image that the large model computed."""

    steps: int
    large_calls: int
    large_tokens: int
    small_calls: int
    seconds: float


@dataclass(frozen=True)
class RunStats:
    """A run's report. `seconds` has the parts of a run; `engine_seconds` time inside each engine, empty where steps are
    replayed as one graph each."""

    num_tokens: int
    records: tuple[StepRecord, ...]
    costs: CallCosts
    seconds: Mapping[str, float]
    engine_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def stages(self) -> dict[Stage, StageStats]:
        return {stage: self._stage([r for r in self.records if r.step.stage is stage]) for stage in Stage}

    def _stage(self, records: Sequence[StepRecord]) -> StageStats:
        return StageStats(
            steps=len(records),
            large_calls=sum(record.tokens > 0 for record in records),
            large_tokens=sum(record.tokens for record in records),
            small_calls=sum(record.step.small for record in records),
            seconds=sum(record.seconds for record in records),
        )

    @property
    def large_tokens(self) -> int:
        return sum(record.tokens for record in self.records)

    @property
    def large_compute(self) -> float:
        """Cost of all large calls, in full large calls."""
        return sum(self.costs.large(record.tokens) for record in self.records if record.tokens)

    @property
    def large_compute_saved(self) -> float:
        """Share of the large model's compute that the same number of large-only steps would have taken, and this did not."""
        return 1 - self.large_compute / len(self.records) if self.records else 0.0

    @property
    def cost(self) -> float:
        """All calls of both models and the glue of steps with a mask, in full large calls."""
        small = sum(record.step.small for record in self.records)
        masks = sum(record.step.has_mask(record.tokens, self.num_tokens) for record in self.records)
        return self.large_compute + self.costs.small() * small + self.costs.glue() * masks

    @property
    def modelled_speedup(self) -> float:
        """Of the loop, over as many large-only steps, by `costs`."""
        return len(self.records) / self.cost if self.records else 1.0

    @property
    def overhead(self) -> float | None:
        """Share of the loop's time that was spent outside the two transformers; None where engines were not timed."""
        loop = self.seconds.get("denoise", 0.0)
        if not loop or not self.engine_seconds:
            return None
        return 1 - (self.engine_seconds.get(LARGE, 0.0) + self.engine_seconds.get(SMALL, 0.0)) / loop

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_tokens": self.num_tokens,
            "steps": len(self.records),
            "stages": {stage.value: vars(stats) for stage, stats in self.stages.items()},
            "large_tokens": self.large_tokens,
            "large_compute_saved": round(self.large_compute_saved, 4),
            "modelled_speedup": round(self.modelled_speedup, 4),
            "cost_source": self.costs.source,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "engine_seconds": {name: round(value, 4) for name, value in self.engine_seconds.items()},
            "overhead": None if self.overhead is None else round(self.overhead, 4),
        }
