"""Times calls and whole runs, in interleaved rounds, so that a machine that is slow for a while is slow for all of them.

Every figure is a median with its quartiles, and every comparison is a ratio formed within a round before the median is
taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .codec import decode_latents, encode_prompts
from .cost import CallCosts
from .pipeline import HybridStitchPipeline
from .plan import StitchPlan
from .tensor_names import LARGE, SMALL
from .workspace import RequestShape, Workspace

__all__ = ["CallBench", "MeasuredCosts", "RunBench", "Sample", "bench_calls", "bench_runs"]

FULL = "large full"


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    def over(self, other: Sample) -> Sample:
        """The ratios round by round."""
        return Sample(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def to_dict(self, digits: int = 6) -> dict[str, Any]:
        low, middle, high = np.percentile(self.values, (25, 50, 75))
        return {
            "median": round(float(middle), digits),
            "q25": round(float(low), digits),
            "q75": round(float(high), digits),
            "rounds": len(self.values),
        }


@dataclass(frozen=True)
class MeasuredCosts:
    """Call costs from a benchmark, in units of a full large call; a `CallCosts`."""

    by_tokens: Mapping[int, float]
    small_cost: float
    source: str = "measured calls"

    def large(self, tokens: int) -> float:
        return self.by_tokens[tokens]

    def small(self) -> float:
        return self.small_cost


@dataclass(frozen=True)
class CallBench:
    """Seconds of each call; `tokens` are the buckets, the last one the full call."""

    num_tokens: int
    tokens: tuple[int, ...]
    seconds: Mapping[str, Sample]
    modelled: CallCosts

    def ratio(self, name: str) -> Sample:
        return self.seconds[name].over(self.seconds[FULL])

    def costs(self) -> MeasuredCosts:
        masked = {count: self.ratio(_masked(count)).median for count in self.tokens[:-1]}
        return MeasuredCosts({**masked, self.num_tokens: 1.0}, self.ratio(SMALL).median)

    def expected(self, name: str) -> float | None:
        """The cost model's ratio to a full large call; None for calls that it does not cover."""
        if name == SMALL:
            return self.modelled.small()
        by_name = {_masked(count): count for count in self.tokens[:-1]} | {FULL: self.num_tokens}
        return self.modelled.large(by_name[name]) if name in by_name else None

    def to_dict(self) -> dict[str, Any]:
        rows = {}
        for name, sample in self.seconds.items():
            expected = self.expected(name)
            row: dict[str, Any] = {"seconds": sample.to_dict(), "of_full": self.ratio(name).to_dict(4)}
            if expected is not None:
                row["cost_model"] = round(expected, 4)
                row["over_model"] = round(self.ratio(name).median / expected, 4)
            rows[name] = row
        return {"num_tokens": self.num_tokens, "calls": rows}


def bench_calls(
    pipeline: HybridStitchPipeline, plan: StitchPlan, shape: RequestShape, rounds: int, warmup: int = 2
) -> CallBench:
    """Times full, masked and small calls, the text encoders and the VAE decoder; seconds inside the engines.

    Args:
        plan: any plan of the request shape; its buckets are timed.
    """
    spec, backend = pipeline.spec, pipeline.backend
    ws = Workspace(backend, spec, shape, record=False)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((shape.images, shape.tokens, spec.large.token_channels)).astype(np.float32)
    text = encode_prompts(backend, spec, pipeline.tokenizers, ["a red apple"], [0] * shape.rows)
    ws.begin(noise, text, pipeline.scheduler.table(1), 3.0, None, 0.0)
    ws.advance()
    assert plan.request is not None
    buckets = plan.request.buckets

    def engine_time(engine: str, call: Callable[[], None]) -> float:
        before = ws.seconds[engine]
        call()
        return ws.seconds[engine] - before

    def masked(count: int) -> Callable[[], float]:
        def run() -> float:
            ws.impose(np.arange(shape.tokens).reshape(1, shape.h, shape.w).repeat(shape.images, 0) < count)
            ws.select(count)
            return engine_time(LARGE, lambda: ws.large_masked(count))

        return run

    calls: dict[str, Callable[[], float]] = {FULL: lambda: engine_time(LARGE, ws.large)}
    calls |= {_masked(count): masked(count) for count in buckets[:-1]}
    calls[SMALL] = lambda: engine_time(SMALL, ws.small)
    calls["text"] = lambda: _wall(lambda: encode_prompts(backend, spec, pipeline.tokenizers, ["a red apple", ""], [0]))
    calls["vae"] = lambda: _wall(lambda: decode_latents(backend, spec, noise[:1], shape.h, shape.w))
    seconds = _interleaved(calls, rounds, warmup)
    return CallBench(shape.tokens, buckets, seconds, pipeline.costs(plan, shape.rows))


@dataclass(frozen=True)
class RunBench:
    """Seconds of whole runs by schedule: the loop alone and everything, and the loop's share outside the transformers."""

    loop: Mapping[str, Sample]
    total: Mapping[str, Sample]
    overhead: Mapping[str, Sample] | None  # share of the whole run; None where engines are not timed within one
    predicted: Mapping[str, float]  # speed-up of the loop over large-only, from measured call costs

    def to_dict(self) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for name, sample in self.loop.items():
            speedup = self.loop["large"].over(sample)
            rows[name] = {
                "loop_seconds": sample.to_dict(),
                "total_seconds": self.total[name].to_dict(),
                "loop_speedup": speedup.to_dict(4),
                "total_speedup": self.total["large"].over(self.total[name]).to_dict(4),
                "predicted_speedup": round(self.predicted[name], 4),
                "of_predicted": round(speedup.median / self.predicted[name], 4),
                "overhead": None if self.overhead is None else self.overhead[name].to_dict(4),
            }
        return {"runs": rows}


def bench_runs(
    pipeline: HybridStitchPipeline,
    plans: Mapping[str, Mapping[str, Any]],
    costs: CallCosts,
    rounds: int,
    warmup: int = 1,
    **request: Any,
) -> RunBench:
    """Draws the same picture by several schedules, in turn.

    Args:
        plans: arguments of `HybridStitchPipeline.plan` by a name of your choice; "large" must be among them.
        costs: call costs, for the predicted speed-up.
        request: size, guidance and the like, the same for all.
    """
    records: dict[str, list[tuple[float, float | None, float]]] = {name: [] for name in plans}

    def draw(name: str) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            stats = pipeline("a red apple on a blue background", seed=7, **plans[name], **request).stats
            wall = time.perf_counter() - start
            loop = stats.seconds["denoise"]
            outside = None if stats.overhead is None else stats.overhead * loop / wall
            records[name].append((loop, outside, replace(stats, costs=costs).cost))
            return wall

        return run

    total = _interleaved({name: draw(name) for name in plans}, rounds, warmup)
    counted = {name: rows[warmup:] for name, rows in records.items()}
    overhead = {name: tuple(share for _, share, _ in rows if share is not None) for name, rows in counted.items()}
    return RunBench(
        loop={name: Sample(tuple(loop for loop, _, _ in rows)) for name, rows in counted.items()},
        total=total,
        overhead={name: Sample(shares) for name, shares in overhead.items()} if all(overhead.values()) else None,
        predicted={name: counted["large"][0][2] / rows[0][2] for name, rows in counted.items()},
    )


def _masked(count: int) -> str:
    return f"large {count} tokens"


def _interleaved(calls: Mapping[str, Callable[[], float]], rounds: int, warmup: int) -> dict[str, Sample]:
    """Each round makes every call once; the first `warmup` rounds do not count."""
    values: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            value = call()
            if number >= warmup:
                values[name].append(value)
    return {name: Sample(tuple(measured)) for name, measured in values.items()}


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
