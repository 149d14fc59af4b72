"""What callers of the pipeline pass, checked, and brought into the form that the loop takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .bundle import Bundle, CostsEntry
from .cost import FLOPS_PER_WEIGHT_BYTE, GLUE_FLOPS, CallCosts, CallSeconds, MeasuredCosts, ModelledCosts
from .errors import RequestError
from .machine import Machine
from .noise import start_noise
from .plan import (
    AdaptiveSwitch,
    MaskRule,
    PlanRequest,
    Schedule,
    StitchPlan,
    is_number,
    make_plan,
    token_buckets,
    whole_number,
)
from .schedule import Sampling, Solver, TimestepSpacing
from .workspace import RequestShape

__all__ = [
    "as_latents",
    "call_costs",
    "check_prompts",
    "guidance_scale_of",
    "modelled_costs",
    "negative_prompts",
    "plan_request",
    "start_latents",
    "token_grid",
]

log = logging.getLogger(__name__)


def plan_request(
    bundle: Bundle,
    *,
    schedule: Schedule = "hybrid",
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    stages: tuple[int, int, int] | None = None,
    mask: MaskRule | None = None,
    refresh_every: int | None = None,
    correction: float = 0.0,
    adaptive: bool = False,
    solver: Solver = "euler",
    timestep_spacing: TimestepSpacing = "linspace",
    shift: float | None = None,
) -> StitchPlan:
    """The plan of a request on a bundle.

    See `hst_trt.plan.PlanRequest` and `hst_trt.schedule.Sampling` for the arguments.

    Raises:
        RequestError: an argument is not usable.
    """
    h, w = token_grid(bundle, height, width)
    steps = bundle.manifest.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    steps = whole_number("num_inference_steps", steps)
    if stages is not None and not isinstance(stages, Sequence):
        raise RequestError(f"stages {stages!r} are not three numbers", fix="give (large, hybrid, small) steps")
    bundle.scheduler.table(steps)  # refuses numbers of steps it has no sigmas for
    return make_plan(
        PlanRequest(
            schedule=schedule,
            num_steps=steps,
            num_tokens=h * w,
            buckets=token_buckets(h * w, bundle.manifest.bucket_ratios),
            stages=None if stages is None else tuple(whole_number("stages", count) for count in stages),  # type: ignore[arg-type]
            mask=mask or MaskRule(),
            refresh_every=None if refresh_every is None else whole_number("refresh_every", refresh_every),
            correction=correction,
            switch=AdaptiveSwitch() if adaptive else None,
            sampling=Sampling(solver, timestep_spacing, shift),
        )
    )


def call_costs(bundle: Bundle, shape: RequestShape, machine: Machine | None) -> CallCosts:
    """What the calls of a request cost: as `hst-trt bench --save-costs` measured them, if it did so on this machine and for
    requests of this shape, else by the cost model.

    Args:
        machine: what the bundle runs on; None if that is not known.
    """
    side = bundle.spec.token_side
    if machine is not None:
        key = (machine.name, machine.threads, shape.images, shape.guided, side * shape.h, side * shape.w)
        buckets = token_buckets(shape.tokens, bundle.manifest.bucket_ratios)
        for entry in bundle.manifest.costs:
            if entry.key == key and entry.large_seconds.keys() >= set(buckets):
                return _measured_costs(entry, shape.tokens)
    return modelled_costs(bundle, shape)


def _measured_costs(entry: CostsEntry, num_tokens: int) -> MeasuredCosts:
    full = entry.large_seconds[num_tokens]
    return MeasuredCosts(
        {tokens: seconds / full for tokens, seconds in entry.large_seconds.items()},
        entry.small_seconds / full,
        f"measured on {entry.machine}, {entry.date}",
        CallSeconds(full, entry.step_seconds, entry.text_seconds, entry.vae_seconds),
    )


def modelled_costs(bundle: Bundle, shape: RequestShape) -> ModelledCosts:
    """What the calls of a request cost by the cost model."""
    spec, target = bundle.spec, bundle.manifest.target
    weight = FLOPS_PER_WEIGHT_BYTE.get(target.backend, 0.0) * (4 if target.precision == "float32" else 2)
    glue = GLUE_FLOPS.get(target.backend, 0.0)
    return ModelledCosts(spec.large, spec.small, shape.tokens, spec.text_length, shape.rows, weight, glue)


def token_grid(bundle: Bundle, height: int | None, width: int | None) -> tuple[int, int]:
    """Token rows and columns of an image size in pixels, refused if the bundle cannot draw it."""
    defaults, spec = bundle.manifest.defaults, bundle.spec
    side = spec.token_side
    height, width = defaults.height if height is None else height, defaults.width if width is None else width
    longest = min(bundle.manifest.limits.max_side, spec.max_side) // side * side
    height, width = whole_number("height", height), whole_number("width", width)
    for name, value in (("height", height), ("width", width)):
        if value > longest:
            raise RequestError(
                f"{name} {value} is beyond this bundle's limit", found=f"its longest side is {longest}", fix=f"use {longest}"
            )
        if value < side or value % side:
            below = max(side, value - value % side)
            fitting = " or ".join(str(size) for size in (below, below + side) if size <= longest)
            raise RequestError(f"{name} {value} is not a multiple of {side}", fix=f"use {fitting}")
    return spec.grid(height, width)


def check_prompts(prompt: str | list[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise RequestError(f"`prompt` has to be a str or a list of str, not {type(prompt).__name__}")
    _check_unicode(prompts)
    if any(not p.strip() for p in prompts):
        log.warning("a prompt is empty: its picture will show whatever the models draw without one")
    return prompts


def negative_prompts(negative: str | list[str] | None, prompts: list[str]) -> list[str]:
    """One for each prompt; empty where none is given."""
    if negative is None or isinstance(negative, str):
        _check_unicode([negative or ""])
        return [negative or ""] * len(prompts)
    if not isinstance(negative, list) or not all(isinstance(n, str) for n in negative):
        raise RequestError(f"`negative_prompt` has to be a str or a list of str, not {type(negative).__name__}")
    _check_unicode(negative)
    if len(negative) != len(prompts):
        raise RequestError(
            f"{len(negative)} negative prompts were given for {len(prompts)} prompts",
            fix="give one, or one for each",
        )
    return negative


def guidance_scale_of(bundle: Bundle, scale: float | None) -> float:
    scale = bundle.manifest.defaults.guidance_scale if scale is None else scale
    if not (is_number(scale) and 0 <= scale <= 100):
        raise RequestError(f"guidance_scale {scale!r} is not a number from 0 to 100", fix="3 to 7 is usual; 1 is off")
    return scale


def start_latents(
    seed: int | Sequence[int] | None, generator: Any, latents: np.ndarray | None, shape: tuple[int, int, int, int]
) -> tuple[tuple[int, ...], np.ndarray]:
    """The seeds that were used, if any, and start noise of `shape` [B, C, H/8, W/8], float32."""
    if seed is not None and generator is not None:
        raise RequestError("seed and generator each say what noise to start from", fix="give one of them")
    if latents is not None:
        return (), as_latents(latents, shape, "the given latents")
    if generator is not None:
        from torch import cat, randn  # the caller has torch, or could not have made a generator

        if isinstance(generator, list):
            if len(generator) != shape[0]:
                raise RequestError(f"{len(generator)} generators were given for {shape[0]} images")
            return (), cat([randn((1, *shape[1:]), generator=g) for g in generator]).numpy()
        return (), randn(shape, generator=generator).numpy()
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    if isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, str):
        seeds = tuple(whole_number("seed", one) for one in seed)
        return seeds, start_noise(seeds, shape)
    seed = whole_number("seed", seed)
    return (seed,), start_noise(seed, shape)


def as_latents(values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as exc:
        raise RequestError(f"{what} are not an array of numbers", found=str(exc)) from exc
    if array.shape != shape:
        raise RequestError(f"{what} have the shape {array.shape}", found=f"this request needs {shape}")
    return array


def _check_unicode(texts: Sequence[str]) -> None:
    """Half characters come from bytes of another encoding on the command line; the tokenizers take none."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise RequestError("a prompt is not valid Unicode", found=ascii(text), fix="write it in UTF-8") from exc
