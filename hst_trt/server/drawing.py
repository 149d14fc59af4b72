"""From a request to pictures, without a queue and without HTTP: what a server of any kind needs between the two.

A request is checked whole before anything waits or runs, and everything random in it is fixed then. Requests whose plans are
equal are drawn in one batch: each keeps the noise of its own seed, so its picture does not depend on who was drawn beside it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ..arguments import check_prompts, guidance_scale_of, negative_prompts, plan_request, token_grid
from ..bundle import Bundle
from ..compare.rows import as_options
from ..denoise import StepRecord
from ..errors import MissingError, RequestError
from ..machine import Machine
from ..noise import start_noise
from ..pipeline import HybridStitchPipeline
from ..plan import MaskRule, StitchPlan
from ..planner.choose import Budget, choose
from ..stats import RunStats
from .request import FieldError, ImageRequest, Limits

__all__ = ["Drawer", "Drawing", "Drawn", "draw"]

T = TypeVar("T")
OnStep = Callable[[int, int, StepRecord], None]
"""Called after each step with its index, how many there are, and what it did; what it raises ends the batch."""


@dataclass(frozen=True)
class Drawing:
    """A request that can be drawn: nothing in it is random or to be looked up any more.

    Attributes:
        images: how many, of one start noise of `seed`.
        height, width: pixels.
        settings: arguments of `HybridStitchPipeline` that decide the plan.
        details: whether masks are wanted.
    """

    prompt: str
    negative_prompt: str
    images: int
    seed: int
    height: int
    width: int
    guidance_scale: float
    settings: dict[str, Any]
    plan: StitchPlan
    details: bool

    @property
    def options(self) -> str:
        """What gives the same plan to ``hst-trt run``."""
        return as_options(self.settings)

    @property
    def batch_key(self) -> Hashable:
        """Drawings of equal keys can be drawn in one batch: no request can ask for a mask or a switch by which one image would
        decide how much is computed for another."""
        return self.plan, self.height, self.width, self.guidance_scale


@dataclass(frozen=True)
class Drawn:
    """What came of a drawing.

    Attributes:
        batch: how many images were drawn together, these included.
        stats: of the whole batch.
        masks: by step, [images, h, w] bool; empty unless asked for.
    """

    drawing: Drawing
    images: tuple[Image.Image, ...]
    batch: int
    stats: RunStats
    masks: dict[int, np.ndarray]


class Drawer:
    """Makes drawings of requests to one bundle. Any thread may call it.

    Args:
        machine: what the bundle runs on; it decides by whose saved costs a schedule is chosen for a speed-up.
    """

    def __init__(self, bundle: Bundle, machine: Machine | None, limits: Limits) -> None:
        self.bundle, self.limits = bundle, limits

        def settings_for(speedup: float, height: int, width: int) -> dict[str, Any]:
            return choose(bundle, Budget(speedup), machine, height=height, width=width).best.point.settings

        self._settings_for = lru_cache(maxsize=256)(settings_for)

    def __call__(self, request: ImageRequest) -> Drawing:
        """The drawing of a request.

        Raises:
            RequestError: the bundle cannot draw it, or it says two things at once; a `FieldError` where one field is to blame.
        """
        manifest, side = self.bundle.manifest, self.bundle.spec.token_side
        if request.model not in (None, manifest.name):
            raise FieldError("this server does not have that model", field="model", found=f"it has {manifest.name}")
        h, w = _blaming("size", lambda: token_grid(self.bundle, *request.shape))
        height, width = side * h, side * w
        settings = self._settings(request, height, width)
        plan = self._plan(settings, height, width)
        images = request.n or 1
        self._check_limits(request, images, height * width, len(plan.steps))
        prompts = _blaming("prompt", lambda: check_prompts(request.prompt))
        negatives = _blaming("negative_prompt", lambda: negative_prompts(request.negative_prompt, prompts))
        return Drawing(
            prompt=prompts[0],
            negative_prompt=negatives[0],
            images=images,
            seed=int.from_bytes(os.urandom(4), "little") if request.seed is None else request.seed,
            height=height,
            width=width,
            guidance_scale=guidance_scale_of(self.bundle, request.guidance_scale),
            settings=settings | {"num_inference_steps": len(plan.steps)},
            plan=plan,
            details=bool(request.details),
        )

    def _plan(self, settings: dict[str, Any], height: int, width: int) -> StitchPlan:
        try:
            return plan_request(self.bundle, height=height, width=width, **settings)
        except RequestError as exc:
            first = exc.problem.partition(" ")[0]  # these name their argument first
            raise FieldError(exc.problem, field=first if first in settings else None, found=exc.found, fix=exc.fix) from exc

    def _check_limits(self, request: ImageRequest, images: int, pixels: int, steps: int) -> None:
        """What defaults and the planner decided counts too."""
        amounts = (
            ("prompt", "characters", len(request.prompt), self.limits.prompt_characters),
            ("negative_prompt", "characters", len(request.negative_prompt or ""), self.limits.prompt_characters),
            ("n", "images", images, min(self.limits.images, self.bundle.manifest.limits.max_images)),
            ("size", "pixels", pixels, self.limits.pixels),
            ("num_inference_steps", "steps", steps, self.limits.steps),
        )
        for field, unit, amount, most in amounts:
            if amount > most:
                raise FieldError(f"{amount} {unit} are more than this server takes", field=field, found=f"its limit is {most}")

    def _settings(self, request: ImageRequest, height: int, width: int) -> dict[str, Any]:
        """Those that were given, or those of the schedule that is chosen for a speed-up."""
        given: dict[str, Any] = {
            "schedule": request.schedule,
            "num_inference_steps": request.num_inference_steps,
            "stages": None if request.stages is None else tuple(request.stages),
            "mask_ratio": request.mask_ratio,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        if (speedup := request.speedup) is not None:
            if settings:
                problem = f"{next(iter(settings))} says what the schedule is, and speedup chooses one"
                raise FieldError(problem, field="speedup", fix="leave out one of the two")
            return self._settings_of(speedup, height, width)
        if (ratio := settings.pop("mask_ratio", None)) is not None:
            settings["mask"] = MaskRule(ratio=ratio)
        return settings

    def _settings_of(self, speedup: float, height: int, width: int) -> dict[str, Any]:
        try:
            return _blaming("speedup", lambda: self._settings_for(speedup, height, width))
        except MissingError as exc:  # its advice is the operator's
            problem = f"this model was not calibrated at {width}x{height}, so no schedule can be chosen for a speed-up"
            raise FieldError(problem, field="speedup", fix="leave it out, or ask for another size") from exc


def draw(pipeline: HybridStitchPipeline, drawings: Sequence[Drawing], on_step: OnStep | None = None) -> list[Drawn]:
    """Draws drawings of one `batch_key`, in one batch.

    Raises:
        HstError: as `HybridStitchPipeline` does; and whatever `on_step` raises.
    """
    first, channels, scale = drawings[0], pipeline.spec.latent_channels, pipeline.spec.vae_scale
    size = (channels, first.height // scale, first.width // scale)
    noise = [start_noise(one.seed, (one.images, *size)) for one in drawings]
    with _prompts_kept_out_of_logs():
        output = pipeline(
            [one.prompt for one in drawings for _ in range(one.images)],
            negative_prompt=[one.negative_prompt for one in drawings for _ in range(one.images)],
            height=first.height,
            width=first.width,
            guidance_scale=first.guidance_scale,
            latents=np.concatenate(noise),
            keep_masks=any(one.details for one in drawings),
            on_step=None if on_step is None else lambda t, record: on_step(t, len(first.plan.steps), record),
            **first.settings,
        )
    drawn, start = [], 0
    for one in drawings:
        own = slice(start, start + one.images)
        masks = {step: mask[own] for step, mask in output.masks.items()} if one.details else {}
        drawn.append(Drawn(one, tuple(output.images[own]), len(output.images), output.stats, masks))
        start += one.images
    return drawn


@contextmanager
def _prompts_kept_out_of_logs() -> Iterator[None]:
    """Prompts are their writers' business: what is cut off one is logged at DEBUG only, while it is drawn for somebody else."""
    token = _DRAWS_FOR_OTHERS.set(True)
    try:
        yield
    finally:
        _DRAWS_FOR_OTHERS.reset(token)


def _may_be_logged(record: logging.LogRecord) -> bool:
    return not _DRAWS_FOR_OTHERS.get() or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_DRAWS_FOR_OTHERS = ContextVar("draws_for_others", default=False)
logging.getLogger("hst_trt.tokenizer").addFilter(
    _may_be_logged
)  # whose warnings quote prompts; a pipeline of one's own keeps them


def _blaming(field: str, check: Callable[[], T]) -> T:
    try:
        return check()
    except RequestError as exc:
        raise FieldError(exc.problem, field=field, found=exc.found, fix=exc.fix) from exc
