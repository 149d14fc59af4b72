"""Stitch plans: what happens at each denoising step, decided before the first one wherever that is possible.

Every schedule is a plan of the same loop (`hst_trt.denoise`), so schedules differ only in their list of steps:

    hybrid       large alone, then both (large on the mask only), then small alone      HybridStitch
    large        the large model alone
    small        the small model alone
    t-stitch     small first, then large                                               T-Stitch
    srdiffusion  large first, then small, switched at a fixed or an adaptive step       SRDiffusion
    ras          large alone, on the mask only after the first steps; unmasked tokens   RAS-like
                 keep their last velocity

Plans are values: two schedules that do the same thing give equal plans.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

from .cost import CallCosts, MeasuredCosts
from .errors import RequestError
from .schedule import AS_DIFFUSERS, Sampling

__all__ = [
    "BUCKET_RATIOS",
    "AdaptiveSwitch",
    "MaskRule",
    "PlanRequest",
    "Schedule",
    "Stage",
    "Step",
    "StitchPlan",
    "bucket_for",
    "is_number",
    "make_plan",
    "token_buckets",
    "whole_number",
]

Schedule = Literal["hybrid", "large", "small", "t-stitch", "srdiffusion", "ras"]
BUCKET_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


def is_number(value: Any) -> bool:
    """Whether a caller's value is a finite number."""
    return isinstance(value, Real) and math.isfinite(value)


def whole_number(name: str, value: Any) -> int:
    """A caller's value as an int; numpy's integers are taken, 2.0 and "2" are not.

    Raises:
        RequestError: it is something else.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise RequestError(f"{name} {value!r} is not a whole number") from None


class Stage(enum.StrEnum):
    LARGE = "large"
    HYBRID = "hybrid"
    SMALL = "small"


@dataclass(frozen=True)
class Step:
    """One denoising step.

    Attributes:
        stage: for reports only; what is done is said by the rest.
        large_tokens: image tokens the large model computes: 0, a bucket, or all. None: a threshold mask decides.
        small: whether the small model computes all tokens. Where neither it nor a full large call gives the unmasked
            tokens a velocity, they keep their last one.
        redraw: whether the mask of the next step is drawn from this step's predictions.
    """

    stage: Stage
    large_tokens: int | None
    small: bool = False
    redraw: bool = False

    def has_mask(self, tokens: int, num_tokens: int) -> bool:
        """Whether it draws a mask or uses one, `tokens` of `num_tokens` being the large model's; its glue does more then."""
        return self.redraw or 0 < tokens < num_tokens


@dataclass(frozen=True)
class MaskRule:
    """How tokens are chosen for the large model.

    Attributes:
        ratio: share of the image tokens, rounded up to a bucket.
        threshold: tau; if given, tokens whose score exceeds tau times the median are chosen, and the count is rounded up
            to a bucket with the next-ranked tokens.
        decay: factor a step on the last known score of a token outside the mask.
        drift: beta, weight of the small model's own change |v_S(t) - v_S(t-1)| in the score outside the mask.
        starvation: score a token gains for each step outside the mask, in units of the mean score. Positive means that
            a token left out long enough returns.
        random_seed: if given, a control: every mask is drawn at random from this seed and the step's index, whatever the
            scores. They are computed all the same, so that the control costs what the real mask costs.
    """

    ratio: float = 0.3
    threshold: float | None = None
    decay: float = 0.9
    drift: float = 0.0
    starvation: float = 0.0
    random_seed: int | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.ratio) and 0 < self.ratio <= 1):
            raise RequestError(f"mask ratio {self.ratio!r} is outside (0, 1]", fix="0.2 to 0.5 is usual, 1 is no mask")
        if self.threshold is not None and not (is_number(self.threshold) and self.threshold > 0):
            raise RequestError(f"mask threshold {self.threshold!r} is not a positive number", fix="2 is a good start")
        for name in ("decay", "drift", "starvation"):
            value = getattr(self, name)
            most = 1 if name == "decay" else 100  # far beyond use; without a bound, priorities could overflow
            if not (is_number(value) and 0 <= value <= most):
                raise RequestError(f"mask {name} {value!r} is outside [0, {most}]")
        if self.random_seed is not None:
            if whole_number("mask random_seed", self.random_seed) < 0:
                raise RequestError(f"mask random_seed {self.random_seed} is negative")
            if self.threshold is not None:
                raise RequestError("a random mask has no scores that could exceed a threshold", fix="give a ratio instead")


@dataclass(frozen=True)
class AdaptiveSwitch:
    """SRDiffusion's rule for leaving the large stage: ``0 < d[t-1] - d[t] < tolerance``, where
    ``d[t] = tanh(mean|v[t] - v[t-1]| / mean|v[t-1]|)``, between two shares of all steps."""

    tolerance: float = 0.01
    earliest: float = 0.1
    latest: float = 0.6

    def bounds(self, num_steps: int) -> tuple[int, int]:
        """The fewest and the most steps of the large stage."""
        first = max(2, math.ceil(self.earliest * num_steps))  # two velocities are needed for one change
        return min(first, num_steps), max(min(first, num_steps), math.floor(self.latest * num_steps))

    def fires(self, changes: Sequence[float]) -> bool:
        return len(changes) >= 2 and 0 < changes[-2] - changes[-1] < self.tolerance


@dataclass(frozen=True)
class PlanRequest:
    """What a user asks for; `make_plan` turns it into steps.

    Attributes:
        num_tokens: image tokens of the request, h * w.
        buckets: token counts that the engines take, ascending, the last one all tokens.
        stages: (N1, N2, N3), steps of the large, hybrid and small stage; None takes the schedule's default.
        refresh_every: every so manyth step of the hybrid stage is a full large call; 0 for none; None for the default (one in
            the middle of more than 8 hybrid steps; for ras every third).
        correction: factor a step on the last known difference v_L - v_S that is added to v_S outside the mask and in
            the small stage; 0 switches it off.
        sampling: where the steps lie, and how one is taken.
    """

    schedule: Schedule
    num_steps: int
    num_tokens: int
    buckets: tuple[int, ...]
    stages: tuple[int, int, int] | None = None
    mask: MaskRule = MaskRule()
    refresh_every: int | None = None
    correction: float = 0.0
    switch: AdaptiveSwitch | None = None
    sampling: Sampling = AS_DIFFUSERS


@dataclass(frozen=True)
class StitchPlan:
    """The steps, and the rules for what only the run itself can decide. Compares by what is done."""

    steps: tuple[Step, ...]
    num_tokens: int
    mask: MaskRule | None = None
    correction: float = 0.0
    switch: AdaptiveSwitch | None = None
    sampling: Sampling = AS_DIFFUSERS
    request: PlanRequest | None = field(default=None, compare=False, repr=False)

    @property
    def stage_lengths(self) -> dict[Stage, int]:
        return {stage: sum(step.stage is stage for step in self.steps) for stage in Stage}

    @property
    def uses_large(self) -> bool:
        return any(step.large_tokens != 0 for step in self.steps)

    @property
    def uses_small(self) -> bool:
        return any(step.small for step in self.steps)

    @property
    def looks_back(self) -> bool:
        """Whether some step needs the predictions of the one before: for the adaptive rule, drift, or tokens of ras."""
        alone = any(step.redraw and not step.small for step in self.steps)
        return self.switch is not None or alone or (self.mask is not None and self.mask.drift > 0)

    def may_switch_after(self, large_steps: int) -> bool:
        """Whether an adaptive switch may end the large stage after so many steps: not too early, and before its planned end."""
        if self.switch is None or self.request is None:
            return False
        earliest, _ = self.switch.bounds(self.request.num_steps)
        return earliest <= large_steps < _stages(self.request)[0]

    def switched_at(self, large_steps: int) -> StitchPlan:
        """The plan that goes on when an adaptive switch ends the large stage after `large_steps` steps."""
        assert self.request is not None
        _, hybrid, _ = _stages(self.request)
        hybrid = min(hybrid, self.request.num_steps - large_steps)
        stages = (large_steps, hybrid, self.request.num_steps - large_steps - hybrid)
        return make_plan(dataclasses.replace(self.request, stages=stages, switch=None))

    def tokens_of(self, step: Step) -> int:
        """Image tokens the large model computes; a threshold's share is taken to be the mask ratio until it is known."""
        if step.large_tokens is not None:
            return step.large_tokens
        assert self.mask is not None
        assert self.request is not None
        return bucket_for(self.mask.ratio * self.num_tokens, self.request.buckets)

    def step_cost(self, step: Step, costs: CallCosts) -> float:
        tokens = self.tokens_of(step)
        calls = (costs.large(tokens) if tokens else 0.0) + (costs.small() if step.small else 0.0)
        return calls + (costs.glue() if step.has_mask(tokens, self.num_tokens) else 0.0)

    def cost(self, costs: CallCosts) -> float:
        """The whole loop in units of one full large call."""
        return sum(self.step_cost(step, costs) for step in self.steps)

    def latency(self, costs: MeasuredCosts) -> float:
        """Seconds from prompt to pixels: text encoders, loop, VAE decoder."""
        seconds = costs.seconds
        assert seconds is not None, "costs without seconds say nothing of time"
        return seconds.text + self.cost(costs) * seconds.full + seconds.vae


def token_buckets(num_tokens: int, ratios: Sequence[float] = BUCKET_RATIOS) -> tuple[int, ...]:
    """Token counts an engine is prepared for: shares of all tokens, rounded up to 64 (to 8 below 640 tokens)."""
    grain = 64 if num_tokens >= 640 else 8
    counts = (math.ceil(math.ceil(round(ratio * num_tokens, 6)) / grain) * grain for ratio in ratios)
    return tuple(sorted({min(count, num_tokens) for count in counts} | {num_tokens}))


def bucket_for(count: float, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `count` tokens."""
    return next((bucket for bucket in buckets if bucket >= round(count, 6)), buckets[-1])


def make_plan(request: PlanRequest) -> StitchPlan:
    """Turns a request into a plan.

    Raises:
        RequestError: stages that do not add up or that the schedule does not have, an unknown schedule, a correction or refresh
            that is out of range.
    """
    if request.schedule not in get_args(Schedule):
        raise RequestError(f"unknown schedule {request.schedule!r}", fix=f"choose one of {', '.join(get_args(Schedule))}")
    if not (is_number(request.correction) and 0 <= request.correction <= 1):
        raise RequestError(f"correction {request.correction!r} is outside [0, 1]", fix="0 is off, 0.9 is a good start")
    if request.refresh_every is not None and request.refresh_every < 0:
        raise RequestError(f"refresh_every {request.refresh_every} is negative", fix="0 means no refresh")
    if request.num_steps < 1:
        raise RequestError(f"num_inference_steps {request.num_steps} is not positive", fix="20 to 50 steps are usual")
    if request.switch is not None and request.schedule not in ("hybrid", "srdiffusion"):
        raise RequestError(
            f"the schedule {request.schedule!r} has no switch that could be adaptive",
            fix="use hybrid or srdiffusion, or leave the adaptive switch out",
        )
    stages = _stages(request)
    if request.switch is not None and stages[0] == request.num_steps:
        raise RequestError(
            "an adaptive switch has no steps to switch to", found=f"{stages[0]} large steps of {request.num_steps}"
        )
    steps = _STEPS[request.schedule](request, stages)
    masked = any(step.large_tokens is None or 0 < step.large_tokens < request.num_tokens for step in steps)
    compared = any(step.small and step.large_tokens != 0 for step in steps)  # only then is v_L - v_S ever known
    corrected = compared and any(step.small and step.stage is not Stage.LARGE for step in steps)
    return StitchPlan(
        steps=steps,
        num_tokens=request.num_tokens,
        mask=request.mask if masked else None,
        correction=request.correction if corrected else 0.0,
        switch=request.switch,
        sampling=request.sampling,
        request=request,
    )


# -- stages of each schedule ------------------------------------------------------------------------------------------
def _stages(request: PlanRequest) -> tuple[int, int, int]:
    n = request.num_steps
    if request.stages is None:
        return _default_stages(request)
    stages = request.stages
    if len(stages) != 3 or min(stages) < 0 or sum(stages) != n:
        raise RequestError(
            f"stages {','.join(map(str, stages))} do not make {n} steps",
            found=f"{len(stages)} numbers that add up to {sum(stages)}",
            fix="give three numbers of large, hybrid and small steps that add up to num_inference_steps",
        )
    allowed = {
        "large": (1, 0, 0),
        "small": (0, 0, 1),
        "t-stitch": (1, 0, 1),
        "srdiffusion": (1, 0, 1),
        "ras": (1, 1, 0),
    }
    for count, may, name in zip(stages, allowed.get(request.schedule, (1, 1, 1)), Stage, strict=True):
        if count and not may:
            raise RequestError(
                f"the schedule {request.schedule!r} has no {name.value} stage, but stages ask for {count} such steps",
                fix="set that number to 0 or choose --schedule hybrid",
            )
    return stages


def _default_stages(request: PlanRequest) -> tuple[int, int, int]:
    n = request.num_steps
    first = min(n, math.ceil(0.1 * n))
    hybrid = min(n - first, round(0.33 * n))
    if request.switch is not None:
        first = request.switch.bounds(n)[1]
        hybrid = min(hybrid, n - first)
    match request.schedule:
        case "large":
            return (n, 0, 0)
        case "small":
            return (0, 0, n)
        case "ras":  # the last step is a full one: after a masked one, the edges of the mask would stay in the picture
            masked = max(0, n - max(2, first))
            masked -= masked % (_every(request) or 1)
            return (n - masked, masked, 0)
        case "hybrid":
            return (first, hybrid, n - first - hybrid)
        case _ if request.switch is not None:
            return (first, 0, n - first)
        case _:  # On SD3.5 a hybrid step at r = 0.3 costs about as much as half a large and half a small step.
            large = min(n, first + math.ceil(hybrid / 2))
            return (large, 0, n - large)


def _large_only(request: PlanRequest, stages: tuple[int, int, int]) -> tuple[Step, ...]:
    return (Step(Stage.LARGE, request.num_tokens),) * stages[0]


def _small_only(request: PlanRequest, stages: tuple[int, int, int]) -> tuple[Step, ...]:
    return (Step(Stage.SMALL, 0, small=True),) * stages[2]


def _t_stitch(request: PlanRequest, stages: tuple[int, int, int]) -> tuple[Step, ...]:
    return _small_only(request, stages) + _large_only(request, stages)


def _ras(request: PlanRequest, stages: tuple[int, int, int]) -> tuple[Step, ...]:
    full, masked, _ = stages
    if masked and full < 2:
        raise RequestError(
            "the ras schedule ranks tokens by how much their velocity changes, which needs two full steps first",
            found=f"{full} full step(s)",
            fix="give stages whose first number is 2 or more",
        )
    return _masked_run(request, full, masked, small=False)


def _hybrid(request: PlanRequest, stages: tuple[int, int, int]) -> tuple[Step, ...]:
    large, hybrid, small = stages
    steps = _masked_run(request, large, hybrid, small=True)
    if request.correction and small and steps:  # the small stage adds the last known v_L - v_S: make sure it is known
        steps = (*steps[:-1], dataclasses.replace(steps[-1], small=True))
    return steps + _small_only(request, stages)


def _masked_run(request: PlanRequest, large: int, masked: int, *, small: bool) -> tuple[Step, ...]:
    """Full large steps, then masked ones; `small` says whether the small model draws the unmasked tokens."""
    n = request.num_tokens
    budget = bucket_for(request.mask.ratio * n, request.buckets) if request.mask.threshold is None else None
    if budget == n:  # a mask of everything is no mask
        return _large_only(request, (large + masked, 0, 0))
    refreshed = _refreshes(masked, _every(request)) | ({0} if masked and not large else set())
    stage = Stage.HYBRID if small else Stage.LARGE
    tokens = [n] * large + [n if k in refreshed else budget for k in range(masked)]
    steps = []
    for t, count in enumerate(tokens):
        redraw = t + 1 < len(tokens) and tokens[t + 1] != n
        needs_small = small and (count != n or redraw or (t >= large and request.correction > 0))
        steps.append(Step(Stage.LARGE if t < large else stage, count, small=needs_small, redraw=redraw))
    return tuple(steps)


def _every(request: PlanRequest) -> int | None:
    return 3 if request.schedule == "ras" and request.refresh_every is None else request.refresh_every


def _refreshes(masked: int, every: int | None) -> set[int]:
    if every is None:
        return {masked // 2} if masked > 8 else set()
    return set(range(every - 1, masked, every)) if every else set()


_STEPS = {
    "hybrid": _hybrid,
    "large": _large_only,
    "small": _small_only,
    "t-stitch": _t_stitch,
    "srdiffusion": _hybrid,
    "ras": _ras,
}
