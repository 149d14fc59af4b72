"""Whole denoising loops: which are timed, in what order, and as many of them as there is time for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hst_trt.cost import MeasuredCosts
from hst_trt.errors import NumericsError
from hst_trt.plan import MaskRule, StitchPlan
from hst_trt.workspace import Workspace

from .aims import ALONE
from .journal import Journal, Skip
from .subjects import Subject, call_name, calls_of, make_a_plan, run_loop, seconds_of
from .timing import interleave

__all__ = ["RATIO", "Loop", "equal_cost_steps", "loops_of", "time_loops"]

RATIO = 0.3  # mask ratio
_LEAST_ROUNDS = 2

Seconds = Callable[[str], float]  # the median of a call, by "SUBJECT: CALL"


@dataclass(frozen=True)
class Loop:
    """A loop to be timed.

    Attributes:
        refresh: how often its hybrid stage has a full large call; empty where it has no such stage.
        alone: only its transformer calls, one after another.
    """

    subject: Subject
    label: str
    plan: StitchPlan
    refresh: str = ""
    alone: bool = False

    @property
    def name(self) -> str:
        return f"{self.subject.name}: {self.label}{ALONE if self.alone else ''}"

    def seconds(self, seconds: Seconds) -> float:
        """What its transformer calls take together."""
        full = seconds(f"{self.subject.name}: {call_name(self.plan.num_tokens)}")
        return full * self.plan.cost(measured_costs(self.subject, seconds))


def loops_of(subject: Subject, steps: int, stages: tuple[int, int, int], seconds: Seconds) -> list[Loop]:
    """Large alone, hybrid without and with one refresh, and SRDiffusion at the cost of the first of them; of two of them
    their transformer calls alone, too."""
    costs, mask, text = measured_costs(subject, seconds), MaskRule(RATIO), ",".join(map(str, stages))
    plain, refreshed = (
        make_a_plan(subject, "hybrid", steps, stages=stages, mask=mask, refresh_every=every)
        for every in (0, stages[1] // 2 + 1)
    )
    large = equal_cost_steps(plain.cost(costs), steps, costs.small())
    split = make_a_plan(subject, "srdiffusion", steps, stages=(large, 0, steps - large))
    only_large = Loop(subject, f"large {steps}", make_a_plan(subject, "large", steps))
    hybrid = Loop(subject, f"hybrid ({text})", plain, "none")
    return [
        only_large,
        hybrid,
        Loop(subject, f"srdiffusion ({large},0,{steps - large})", split),
        replace(hybrid, alone=True),
        Loop(subject, f"hybrid ({text}), refreshed", refreshed, "once, in the middle"),
        replace(only_large, alone=True),
    ]


def measured_costs(subject: Subject, seconds: Seconds) -> MeasuredCosts:
    full = seconds(f"{subject.name}: {call_name(subject.shape.tokens)}")
    by_tokens = {count: seconds(f"{subject.name}: {call_name(count)}") / full for count in subject.buckets}
    return MeasuredCosts(by_tokens, seconds(f"{subject.name}: small") / full)


def equal_cost_steps(cost: float, steps: int, small: float) -> int:
    """How many large steps a large -> small split has that costs nearest to `cost`; costs are in full large calls."""
    return min(range(steps + 1), key=lambda large: abs(large + (steps - large) * small - cost))


def time_loops(
    journal: Journal,
    steps: int,
    loops: Sequence[Loop],
    workspaces: Mapping[str, Workspace],
    calls: Mapping[str, Callable[[], None]],
    seconds: Seconds,
    *,
    share: float,
    rounds: int,
) -> None:
    """Times loops in interleaved rounds; the last ones are left out if they do not fit into a share of what time is left.

    Args:
        workspaces: by subject.
        calls: what enqueues a transformer call, by "SUBJECT: CALL".
        seconds: what such a call takes.
    """
    available = share * journal.remaining
    reserve = journal.remaining - available
    chosen = loops_that_fit(loops, available, seconds)
    left_out = [loop.name for loop in loops if loop not in chosen]
    if left_out:
        journal.fact(f"loops {steps} left out for want of time", left_out)
    if not chosen:
        raise Skip(f"short of time for loops of {steps} steps")

    made: dict[str, list[str]] = {}

    def run(loop: Loop) -> float:
        prefix = f"{loop.subject.name}: "
        if loop.alone:
            return seconds_of(loop.subject, [calls[prefix + name] for name in made[prefix + loop.label]])
        ws = workspaces[loop.subject.name]
        spent, records = run_loop(ws, loop.plan)
        if not ws.is_finite():
            raise NumericsError(f"{loop.name}: the latents are not finite")
        made[loop.name] = calls_of(records, loop.plan.num_tokens)
        of_it = {"steps": steps, "subject": loop.subject.name, "label": loop.label, "refresh": loop.refresh}
        journal.fact(f"loop {loop.name}", of_it | {"calls": Counter(made[loop.name])})
        return spent

    for loop in chosen:  # each segment of a loop runs once, is recorded once, and is replayed from then on
        run(loop)
        if loop.plan.uses_small:  # and some have segments that come only once in a loop
            run(loop)
    runs = {loop.name: lambda loop=loop: run(loop) for loop in chosen}
    interleave(journal, f"loops {steps}", runs, rounds=rounds, warmup=0, reserve=reserve)


def loops_that_fit(loops: Sequence[Loop], available: float, seconds: Seconds) -> list[Loop]:
    """The first ones, as many as can be warmed up and timed a few times in `available` seconds."""
    chosen: list[Loop] = []
    for loop in loops:
        total = 1.1 * sum(each.seconds(seconds) for each in [*chosen, loop])
        if total * (2 + _LEAST_ROUNDS) > available:
            break
        chosen.append(loop)
    return chosen
