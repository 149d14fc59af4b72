"""Times calls and whole runs, in interleaved rounds, so that a machine that is slow for a while is slow for all of them.

Every figure is a median with its quartiles, and every comparison is a ratio formed within a round before the median is
taken.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import modelled_costs
from .bundle import CostsEntry
from .codec import Decoder, Encoder
from .cost import CallCosts, CallSeconds, MeasuredCosts
from .denoise import StepRecord, denoise
from .machine import peak_resident_bytes
from .pipeline import HybridStitchPipeline
from .plan import MaskRule, PlanRequest, StitchPlan, make_plan
from .stats import RunStats
from .tensor_names import LARGE, SMALL
from .workspace import RequestShape, Workspace

__all__ = [
    "FULL",
    "GLUE_STEP",
    "TEXT",
    "VAE",
    "CallBench",
    "LinearFit",
    "MemoryUsed",
    "RunBench",
    "RunDetails",
    "Sample",
    "StepTime",
    "bench_calls",
    "bench_runs",
    "costs_entry",
    "draw_plots",
    "memory_used",
    "straight_line",
]

FULL, TEXT, VAE, GLUE_STEP = "large full", "text", "vae", "glue, a masked step"
"""Names of what is timed beside masked calls and `SMALL`.

The glue is what a hybrid step takes outside the two transformers: all its other graphs (advance, pack, guide, blend, score,
select, integrate), copies, the row move, and the host between them. It is taken from a loop of three hybrid steps with the
default mask, of which the second is masked and draws the next mask, so it has everything that a step can have; steps of one
model have less. Where steps are replayed as graphs it is an upper bound, since calls are enqueued one by one to be timed.
"""


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The lower one, the median, the upper one."""
        low, middle, high = np.percentile(self.values, (25, 50, 75))
        return float(low), float(middle), float(high)

    def over(self, other: Sample) -> Sample:
        """The ratios round by round."""
        return Sample(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def to_dict(self, digits: int = 6) -> dict[str, Any]:
        low, middle, high = self.quartiles
        return {
            "median": round(middle, digits),
            "q25": round(low, digits),
            "q75": round(high, digits),
            "rounds": len(self.values),
        }


# -- calls ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LinearFit:
    """Least squares: seconds = at_zero + each * count; r2 is the share of variance explained."""

    at_zero: float
    each: float
    r2: float


def straight_line(counts: Sequence[int], seconds: Sequence[float]) -> LinearFit:
    each, at_zero = np.polyfit(counts, seconds, 1)
    rest = np.array(seconds) - (at_zero + each * np.array(counts))
    return LinearFit(float(at_zero), float(each), float(1 - rest.var() / np.var(seconds)))


@dataclass(frozen=True)
class CallBench:
    """Seconds of each call; `tokens` are the buckets, the last one the full call."""

    num_tokens: int
    tokens: tuple[int, ...]
    seconds: Mapping[str, Sample]
    modelled: CallCosts

    def ratio(self, name: str) -> Sample:
        return self.seconds[name].over(self.seconds[FULL])

    def large_seconds(self) -> dict[int, Sample]:
        """Of a large call, by the image tokens that it computes."""
        return {count: self.seconds[FULL if count == self.num_tokens else _masked(count)] for count in self.tokens}

    def costs(self) -> MeasuredCosts:
        masked = {count: self.ratio(_masked(count)).median for count in self.tokens[:-1]}
        full, step, text, vae = (self.seconds[name].median for name in (FULL, GLUE_STEP, TEXT, VAE))
        return MeasuredCosts(
            {**masked, self.num_tokens: 1.0}, self.ratio(SMALL).median, seconds=CallSeconds(full, step, text, vae)
        )

    def fit(self) -> LinearFit | None:
        """How well a straight line over the tokens describes large calls; None for fewer than three buckets."""
        if len(self.tokens) < 3:
            return None
        return straight_line(self.tokens, [sample.median for sample in self.large_seconds().values()])

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
        fit = self.fit()
        return {"num_tokens": self.num_tokens, "calls": rows, "large_fit": None if fit is None else dataclasses.asdict(fit)}


def bench_calls(
    pipeline: HybridStitchPipeline, plan: StitchPlan, shape: RequestShape, rounds: int, warmup: int = 2
) -> CallBench:
    """Times full, masked and small calls, the text encoders, the VAE decoder and the glue of a step.

    Transformer calls are seconds inside the engines. Text is wall time from prompts to features (two prompts with guidance),
    VAE from latents to pixels of all images, with buffers that are there already. For the glue see `GLUE_STEP`.

    Args:
        plan: any plan of the request shape; its buckets are timed.
    """
    spec, backend, tokenizers = pipeline.spec, pipeline.backend, pipeline.tokenizers
    ws = Workspace(backend, spec, shape, record=False)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((shape.images, shape.tokens, spec.large.token_channels)).astype(np.float32)
    prompts = ["", "a red apple"] if shape.guided else ["a red apple"]
    index = [row * len(prompts) // shape.rows for row in range(shape.rows)]  # negatives first
    encoder = Encoder(backend, spec, len(tokenizers), len(prompts), shape.rows)
    decoder = Decoder(backend, spec, shape.h, shape.w)

    def encode() -> dict[str, np.ndarray]:
        return encoder([tokenize(prompts) for tokenize in tokenizers], index)

    text = encode()

    def begin(loop: StitchPlan) -> None:
        table = pipeline.scheduler.table(len(loop.steps), loop.sampling)
        ws.begin(noise, text, table, 3.0, loop.mask, loop.correction)

    assert plan.request is not None
    buckets, hybrid = plan.request.buckets, _three_hybrid_steps(plan.request)
    begin(hybrid)
    ws.advance()

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

    def glue() -> float:
        inside: list[float] = []  # the transformers, up to the end of each step

        def on_step_end(t: int, record: StepRecord) -> bool:
            inside.append(ws.seconds[LARGE] + ws.seconds[SMALL])
            return True

        begin(hybrid)
        records = denoise(ws, hybrid, on_step_end=on_step_end)
        return records[1].seconds - (inside[1] - inside[0])

    calls: dict[str, Callable[[], float]] = {FULL: lambda: engine_time(LARGE, ws.large)}
    calls |= {_masked(count): masked(count) for count in buckets[:-1]}
    calls[SMALL] = lambda: engine_time(SMALL, ws.small)
    calls[TEXT] = lambda: _wall(encode)
    calls[VAE] = lambda: _wall(lambda: decoder(noise))
    calls[GLUE_STEP] = glue
    seconds = _interleaved(calls, rounds, warmup)
    return CallBench(shape.tokens, buckets, seconds, modelled_costs(pipeline.bundle, shape))


def _three_hybrid_steps(request: PlanRequest) -> StitchPlan:
    """A full call, a masked one that draws the next mask, and a masked one; all full where a picture has one bucket only."""
    changes: dict[str, Any] = {"schedule": "hybrid", "num_steps": 3, "stages": (0, 3, 0), "mask": MaskRule()}
    changes |= {"refresh_every": 0, "correction": 0.0, "switch": None}
    return make_plan(replace(request, **changes))


def costs_entry(pipeline: HybridStitchPipeline, shape: RequestShape, calls: CallBench) -> CostsEntry:
    """What was measured, in the form in which a bundle keeps it."""
    machine, target, side = pipeline.backend.machine, pipeline.bundle.manifest.target, pipeline.spec.token_side
    on_cpu = target.backend == "onnxruntime"  # engines run with the version that built them, and with no other
    return CostsEntry(
        machine=machine.name,
        threads=machine.threads,
        backend_version=importlib.metadata.version("onnxruntime") if on_cpu else target.backend_version,
        images=shape.images,
        guided=shape.guided,
        height=side * shape.h,
        width=side * shape.w,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        large_seconds={count: sample.median for count, sample in calls.large_seconds().items()},
        small_seconds=calls.seconds[SMALL].median,
        text_seconds=calls.seconds[TEXT].median,
        vae_seconds=calls.seconds[VAE].median,
        step_seconds=calls.seconds[GLUE_STEP].median,
    )


@dataclass(frozen=True)
class MemoryUsed:
    """Bytes.

    Attributes:
        peak_resident_bytes: the most that this process had in RAM so far.
        gpu_used_bytes: what is in use on the GPU now, by whomever; None without one. A pipeline keeps what it took there, so
            after its last run this is the peak, save what an engine needs while it is loaded.
    """

    peak_resident_bytes: int
    gpu_used_bytes: int | None


def memory_used(pipeline: HybridStitchPipeline) -> MemoryUsed:
    memory = pipeline.backend.memory()
    return MemoryUsed(peak_resident_bytes(), None if memory is None else memory[1] - memory[0])


# -- whole runs ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StepTime:
    """One step of a schedule: `large_tokens` that the large model computed, and whether the small one ran."""

    stage: str
    large_tokens: int
    small: bool
    seconds: Sample


@dataclass(frozen=True)
class RunDetails:
    """Where the time of a schedule's runs went.

    Attributes:
        cpu: seconds that all threads of this process spent on a CPU during a run.
        parts: seconds by part, which add up to a run: text, large, small, glue (the loop's rest), VAE and other (what surrounds
            these); where steps are replayed as graphs "loop" is in the place of large, small and glue.
        steps: in order.
    """

    cpu: Sample
    parts: Mapping[str, Sample]
    steps: tuple[StepTime, ...]

    def to_dict(self) -> dict[str, Any]:
        breakdown = {name: sample.to_dict() for name, sample in self.parts.items()}
        return {"cpu_seconds": self.cpu.to_dict(), "breakdown": breakdown}

    def step_rows(self) -> list[dict[str, Any]]:
        return [vars(step) | {"seconds": step.seconds.to_dict()} for step in self.steps]


@dataclass(frozen=True)
class RunBench:
    """Seconds of whole runs by schedule: the loop alone and everything, and the loop's share outside the transformers."""

    loop: Mapping[str, Sample]
    total: Mapping[str, Sample]
    overhead: Mapping[str, Sample] | None  # share of the whole run; None where engines are not timed within one
    predicted: Mapping[str, float]  # speed-up of the loop over large-only, from measured call costs
    details: Mapping[str, RunDetails] = field(default_factory=dict)

    def cpu_over_wall(self, name: str) -> Sample:
        return self.details[name].cpu.over(self.total[name])

    def cpu_share(self) -> float:
        """CPU time of all runs over their wall time: on average so many CPUs were at work."""
        cpu = sum(sum(details.cpu.values) for details in self.details.values())
        return cpu / sum(sum(sample.values) for sample in self.total.values())

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
            if name in self.details:
                rows[name] |= {"cpu_over_wall": self.cpu_over_wall(name).to_dict(4)} | self.details[name].to_dict()
        return {"runs": rows}


@dataclass(frozen=True)
class _Run:
    """One run: its report, and seconds of wall and of CPU time from prompt to picture."""

    stats: RunStats
    wall: float
    cpu: float


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
    records: dict[str, list[_Run]] = {name: [] for name in plans}

    def draw(name: str) -> Callable[[], float]:
        def run() -> float:
            start, start_cpu = time.perf_counter(), time.process_time()
            stats = pipeline("a red apple on a blue background", seed=7, **plans[name], **request).stats
            wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            records[name].append(_Run(stats, wall, cpu))
            return wall

        return run

    total = _interleaved({name: draw(name) for name in plans}, rounds, warmup)
    counted = {name: runs[warmup:] for name, runs in records.items()}
    cost = {name: replace(runs[0].stats, costs=costs).cost for name, runs in counted.items()}
    timed = all(run.stats.overhead is not None for runs in counted.values() for run in runs)
    return RunBench(
        loop={name: _sample(runs, lambda run: run.stats.seconds["denoise"]) for name, runs in counted.items()},
        total=total,
        overhead={name: _sample(runs, _outside) for name, runs in counted.items()} if timed else None,
        predicted={name: cost["large"] / cost[name] for name in counted},
        details={name: _details(runs) for name, runs in counted.items()},
    )


def _sample(runs: list[_Run], value: Callable[[_Run], float]) -> Sample:
    return Sample(tuple(value(run) for run in runs))


def _outside(run: _Run) -> float:
    """The loop's time outside the transformers, as a share of the whole run."""
    assert run.stats.overhead is not None
    return run.stats.overhead * run.stats.seconds["denoise"] / run.wall


def _parts(run: _Run) -> dict[str, float]:
    stats = run.stats
    text, loop, vae = (stats.seconds[name] for name in ("text", "denoise", "vae"))
    middle = {"loop": loop}
    if stats.engine_seconds:
        large, small = (stats.engine_seconds.get(name, 0.0) for name in (LARGE, SMALL))
        middle = {"large": large, "small": small, "glue": loop - large - small}
    return {"text": text, **middle, "VAE": vae, "other": run.wall - text - loop - vae}


def _details(runs: list[_Run]) -> RunDetails:
    parts = [_parts(run) for run in runs]
    steps = [
        StepTime(
            record.step.stage.value,
            record.tokens,
            record.step.small,
            Sample(tuple(run.stats.records[t].seconds for run in runs)),
        )
        for t, record in enumerate(runs[0].stats.records)
    ]
    by_part = {name: Sample(tuple(each[name] for each in parts)) for name in parts[0]}
    return RunDetails(_sample(runs, lambda run: run.cpu), by_part, tuple(steps))


def draw_plots(folder: Path, calls: CallBench, runs: RunBench | None, name: str) -> list[Path]:
    """Writes latency.png, and of whole runs steps.png and breakdown.png; needs matplotlib.

    Args:
        name: the schedule whose steps are shown.
    """
    from .plots import breakdown_figure, latency_figure, save_figure, steps_figure

    large, fit = calls.large_seconds(), calls.fit()
    figures = {
        "latency": latency_figure(
            calls.tokens,
            [sample.quartiles for sample in large.values()],
            [calls.modelled.large(count) * large[calls.num_tokens].median for count in calls.tokens],
            calls.seconds[SMALL].median,
            None if fit is None else (fit.at_zero, fit.each, fit.r2),
            f"Large calls, {calls.num_tokens} image tokens in all",
        )
    }
    if runs is not None:
        steps = runs.details[name].steps
        stages, seconds = [step.stage for step in steps], [step.seconds.quartiles for step in steps]
        figures["steps"] = steps_figure(stages, seconds, f"Each step of a {name} run")
        parts = {run: {part: s.median for part, s in details.parts.items()} for run, details in runs.details.items()}
        figures["breakdown"] = breakdown_figure(parts)
    return [save_figure(figure, folder / f"{stem}.png") for stem, figure in figures.items()]


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
