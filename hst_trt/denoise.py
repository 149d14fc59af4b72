"""The stitched denoising loop.

    stage 1, N1 steps   x += dsigma * v_L(x)
                        at its last step v_S(x) is computed too, and the first mask is drawn
    stage 2, N2 steps   v = v_S(x) outside the mask M, v_L(x) on M, with cached keys and values for the rest
                        x += dsigma * v; M is redrawn; now and then one full large call refreshes everything
    stage 3, N3 steps   x += dsigma * v_S(x)

What a step does is said by its `Step`, so every schedule runs through this one loop. Devices, engines and buffers are the
workspace's business. The loop only says what is to be done: nothing in it waits for a device, except where a threshold mask
or an adaptive switch has to know a number, or a caller asks for masks or latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .plan import Stage, Step, StitchPlan, bucket_for
from .workspace import RequestShape, Workspace

__all__ = ["StepRecord", "denoise"]


@dataclass(frozen=True)
class StepRecord:
    """What a step did: `tokens` that the large model computed, the seconds it took (not a number until the loop has ended,
    because asking would make the host wait), and the mask it used, if kept."""

    step: Step
    tokens: int
    seconds: float = math.nan
    mask: np.ndarray | None = None  # [images, h, w] bool


def denoise(
    ws: Workspace,
    plan: StitchPlan,
    *,
    keep_masks: bool = False,
    replay: Mapping[int, np.ndarray] | None = None,
    on_step_end: Callable[[int, StepRecord], bool] | None = None,
) -> list[StepRecord]:
    """Runs a plan over the request that the workspace holds, whose latents it leaves denoised.

    Args:
        ws: the workspace, begun.
        plan: the steps.
        keep_masks: record each masked step's mask (waits for the device once a step).
        replay: masks [images, h, w] by step index to use instead of drawing them, all with as many tokens in each image
            as the step's bucket: so that two backends can be compared although near-ties in the scores may fall either way.
        on_step_end: called after each step; returning False ends the loop early.
    """
    n, looks_back = plan.num_tokens, plan.looks_back
    records: list[StepRecord] = []
    spans: list[tuple[Any, Any]] = []
    changes: list[float] = []
    drawn = 0  # tokens in the mask that the last redraw left
    for t in range(len(plan.steps)):
        start = ws.mark()
        ws.advance()
        step = plan.steps[t]
        tokens = drawn if step.large_tokens is None else step.large_tokens

        if tokens == n:
            ws.large()
            if plan.switch is not None and step.stage is Stage.LARGE and t > 0:
                changes.append(ws.change())
                if plan.may_switch_after(t + 1) and plan.switch.fires(changes):
                    plan = plan.switched_at(t + 1)
                    step = plan.steps[t]
            if step.small or step.redraw:
                _sketch(ws, step)
                ws.compare_all()
        elif tokens:
            _sketch(ws, step)
            ws.large_masked(tokens)
            ws.blend(tokens)
        elif plan.correction:
            ws.small()
            ws.correct()
        else:
            ws.small_alone()

        mask = ws.active_mask(tokens) if keep_masks and 0 < tokens < n else None
        if step.redraw:
            drawn = _redraw(ws, plan, t + 1, tokens, None if replay is None else replay.get(t + 1))
        ws.integrate()
        if looks_back:
            ws.remember()
        spans.append((start, ws.mark()))
        records.append(StepRecord(step, tokens, mask=mask))
        if on_step_end is not None and not on_step_end(t, records[-1]):
            break
    seconds = [ws.elapsed(*span) for span in reversed(spans)]  # the last one first: whoever waits for it waits once
    return [replace(record, seconds=spent) for record, spent in zip(records, reversed(seconds), strict=True)]


def _sketch(ws: Workspace, step: Step) -> None:
    """What the tokens outside the mask follow: the small model, or where the step has none, their last velocity."""
    if step.small:
        ws.small()
    else:
        ws.keep_last()


def _redraw(ws: Workspace, plan: StitchPlan, t: int, fresh: int, imposed: np.ndarray | None) -> int:
    """Draws the mask of step t from the predictions of the step before, `fresh` of whose tokens the large model computed."""
    ws.score(fresh)
    tokens = plan.steps[t].large_tokens
    if imposed is not None:
        ws.impose(imposed)
        tokens = int(imposed[0].sum()) if tokens is None else tokens
        if (imposed.sum((1, 2)) != tokens).any():
            raise ValueError(f"the mask given for step {t} does not have {tokens} tokens in every image")
    elif plan.mask is not None and plan.mask.random_seed is not None:
        assert tokens is not None
        ws.impose(_random_mask(plan.mask.random_seed, t, ws.shape, tokens))
    elif tokens is None:
        assert plan.request is not None
        tokens = bucket_for(ws.count(), plan.request.buckets)
    if tokens < plan.num_tokens:
        ws.select(tokens)
    return tokens


def _random_mask(seed: int, t: int, shape: RequestShape, tokens: int) -> np.ndarray:
    """[images, h, w] bool with `tokens` tokens in each image; an image's mask does not depend on how many follow it."""
    lots = np.random.default_rng((seed, t)).random((shape.images, shape.tokens))
    mask = np.argsort(np.argsort(lots, axis=1), axis=1) < tokens
    return mask.reshape(shape.images, shape.h, shape.w)
