"""What is wanted of an H100, and what of it was met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .roofline import peak_flops

ALONE = ", transformers alone"
"""Ends the name of the time of a loop's transformer calls without what is between them."""

__all__ = [
    "AIMS",
    "ALONE",
    "REFERENCES",
    "Aim",
    "Verdict",
    "by_calls",
    "judge",
    "loop_name",
    "loops_in",
    "outside",
    "ratio",
]

REFERENCES = (  # published, 1024 x 1024, guided
    ("H100, SD3.5 Large, torch eager / torch.compile, bf16", "232 / 149 ms a step"),
    ("H100, SD3.5 Large, vendor TensorRT demo BF16 / FP8, 30 steps", "265 / 187 ms a step (transformer)"),
    ("H100 SXM roofline, one guided large step at 100 % / 60 % of 989 TFLOP/s", "63 / 105 ms"),
    ("A100-80 roofline, same", "200 / 332 ms"),
)

Series = Mapping[str, Sequence[float]]
Jobs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Aim:
    """What is wanted. `measure` finds (what it was measured on, value) in the jobs of a report."""

    name: str
    wanted: str
    unit: str
    holds: Callable[[float], bool]
    measure: Callable[[Jobs], Iterator[tuple[str, float]]]
    only_h100: bool = False


@dataclass(frozen=True)
class Verdict:
    """An aim beside one measurement of it: met, not met, not measured, no aim for this device, or only rehearsed."""

    aim: Aim
    on: str
    value: float | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {"aim": self.aim.name, "wanted": self.aim.wanted, "on": self.on, "measured": self.value, "verdict": self.verdict}


def ratio(series: Series, name: str, of: str) -> list[float]:
    """`of` over `name`, round by round, for the rounds that have both."""
    return [b / a for a, b in zip(series.get(name, ()), series.get(of, ()), strict=False)]


def outside(series: Series, loop: str, alone: str) -> list[float]:
    """The share of a loop's time that its transformer calls alone do not take, round by round."""
    return [1 - calls / whole for calls, whole in zip(series.get(alone, ()), series.get(loop, ()), strict=False)]


def judge(jobs: Jobs, device: str, *, rehearsal: bool = False) -> list[Verdict]:
    """Every aim beside every measurement of it."""
    verdicts = []
    for aim in AIMS:
        found = list(aim.measure(jobs))
        for on, value in found:
            if rehearsal:
                verdict = "rehearsed"
            elif aim.only_h100 and peak_flops(device) != peak_flops("H100"):
                verdict = "no aim for this device"
            else:
                verdict = "met" if aim.holds(value) else "not met"
            verdicts.append(Verdict(aim, on, value, verdict))
        if not any(on.startswith("tensorrt") for on, _ in found):  # the aims are those of engines
            verdicts.append(Verdict(aim, "tensorrt", None, "not measured"))
    return verdicts


# -- measurements in a report --------------------------------------------------------------------------------------------
def loop_name(loop: Mapping[str, Any]) -> str:
    """The name that a loop is timed by, of its fact."""
    return f"{loop['subject']}: {loop['label']}"


def loops_in(job: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The facts of the loops of part 4 that were timed at least once."""
    for key, loop in job["facts"].items():
        if key.startswith("loop ") and job["series"].get(f"loops {loop['steps']}", {}).get(loop_name(loop)):
            yield loop


def by_calls(loop: Mapping[str, Any], calls: Series, tokens: int) -> float | None:
    """The speed-up over as many full large calls that a loop would have if it were its transformer calls alone."""
    prefix = f"{loop['subject']}: "
    needed = [*loop["calls"], f"large {tokens}"]
    if any(not calls.get(prefix + name) for name in needed):
        return None
    medians = {name: float(np.median(calls[prefix + name])) for name in needed}
    inside = sum(count * medians[name] for name, count in loop["calls"].items())
    return loop["steps"] * medians[f"large {tokens}"] / inside


def _loops(jobs: Jobs) -> Iterator[tuple[Mapping[str, Any], Series]]:
    """Each timed loop of part 4: its fact, and the series that it was timed in."""
    for name, job in jobs.items():
        if name.startswith("shapes."):
            for loop in loops_in(job):
                yield loop, job["series"][f"loops {loop['steps']}"]


def _large_steps(jobs: Jobs) -> Iterator[tuple[str, float]]:
    for loop, series in _loops(jobs):
        if loop["label"] == f"large {loop['steps']}":
            yield f"{loop['subject']}, {loop['steps']} steps", 1e3 * float(np.median(series[loop_name(loop)])) / loop["steps"]


def _speedups(jobs: Jobs) -> Iterator[tuple[str, float]]:
    for loop, series in _loops(jobs):
        ratios = ratio(series, loop_name(loop), f"{loop['subject']}: large {loop['steps']}")
        if loop["refresh"] and ratios:
            yield f"{loop['subject']}, {loop['label']}, refresh: {loop['refresh']}", float(np.median(ratios))


def _overheads(jobs: Jobs) -> Iterator[tuple[str, float]]:
    for loop, series in _loops(jobs):
        shares = outside(series, loop_name(loop), loop_name(loop) + ALONE)
        if shares:
            yield loop_name(loop), 100 * float(np.median(shares))


AIMS = (
    Aim("guided large step, bf16", "at most 105 ms", "ms", lambda ms: ms <= 105, _large_steps, only_h100=True),
    Aim("stitched loop at r = 0.3 over large only", "at least 1.75 x", "x", lambda times: times >= 1.75, _speedups),
    Aim("loop time outside the transformers", "at most 1 %", "%", lambda percent: percent <= 1, _overheads),
)
