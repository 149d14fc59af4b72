"""The Python API: a bundle as a pipeline with diffusers' argument names."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from .arguments import (
    as_latents,
    call_costs,
    check_prompts,
    guidance_scale_of,
    negative_prompts,
    plan_request,
    start_latents,
    token_grid,
)
from .backends import open_backend, open_bundle
from .bundle import Bundle
from .codec import patchify, unpatchify
from .cost import CallCosts
from .denoise import StepRecord, denoise
from .errors import NumericsError, RequestError, ResourceError
from .plan import MaskRule, Schedule, StitchPlan, whole_number
from .residency import Residency
from .runtime.engine import Backend
from .schedule import Solver, TimestepSpacing
from .stats import RunStats
from .tensor_names import GLUE, LARGE, SMALL, TEXT_ENCODERS, VAE_DECODER
from .tokenizer import PromptTokenizer
from .workspace import RequestShape, Workspace

__all__ = ["HybridStitchPipeline", "StitchOutput"]

OutputType = Literal["pil", "np", "latent"]
_CALLBACK_TENSORS = ("latents",)
_OPTIONAL_GLUE = ("blend", "correct", "score", "select", "count", "change")


@dataclass(frozen=True)
class StitchOutput:
    """images: a list of PIL images; float32 [B, H, W, 3] in 0..1 for "np"; latents [B, C, H/8, W/8] for "latent".
    masks: for each step with a mask, [B, h, w] bool, if they were kept."""

    images: Any
    stats: RunStats
    plan: StitchPlan
    seeds: tuple[int, ...]
    masks: dict[int, np.ndarray]


@dataclass(frozen=True)
class _Request:
    """A checked request. `rows`: the prompt of each transformer row; `noise`: [B, C, H/8, W/8]."""

    rows: list[str]
    plan: StitchPlan
    shape: RequestShape
    guidance_scale: float
    seeds: tuple[int, ...]
    noise: np.ndarray
    output_type: OutputType
    keep_masks: bool


class HybridStitchPipeline:
    """Draws images from a bundle. Not for use by two threads at once; make one pipeline a thread.

    Use `from_bundle`; the constructor takes the parts for tests and other backends. A pipeline uses one GPU: for several
    GPUs run a process for each.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, low_vram: bool = False) -> None:
        self.bundle, self.backend, self.low_vram = bundle, backend, low_vram
        self.spec = bundle.spec
        self.scheduler = bundle.scheduler
        self.tokenizers = [
            PromptTokenizer(bundle.read(t.path), PurePosixPath(t.path).stem, t.length, t.pad_id)
            for t in bundle.manifest.tokenizers
        ]
        self._resident = Residency(backend, self.spec, low_vram=low_vram)
        self._interrupt = False

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        *,
        device: int = 0,
        low_vram: bool = False,
        threads: int = 0,
        on_hash: Callable[[int, int], None] | None = None,
    ) -> HybridStitchPipeline:
        """Opens a bundle, checks it, and makes a pipeline; graphs and engines are loaded when they are first used.

        Args:
            path: a folder ``NAME.hstb``.
            device: which GPU, for bundles of engines.
            low_vram: free engines as soon as a request no longer needs them: the text encoders before the transformers,
                the transformers before the VAE decoder. Each request then loads them all again.
            threads: threads of a call on the CPU; 0 takes one per physical core.
            on_hash: called with (bytes checked, bytes in all).

        Raises:
            HstError: the bundle is missing, damaged, unfinished, or not for this machine.
        """
        bundle = open_bundle(path, on_hash)
        return cls(bundle, open_backend(bundle, device=device, threads=threads), low_vram=low_vram)

    # -- what can be asked before a run ----------------------------------------------------------------------------------
    def plan(self, **arguments: Any) -> StitchPlan:
        """The plan of a request; arguments are those of `hst_trt.arguments.plan_request`.

        Raises:
            RequestError: an argument is not usable.
        """
        return plan_request(self.bundle, **arguments)

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Token rows and columns of an image size in pixels, refused if the bundle cannot draw it."""
        return token_grid(self.bundle, height, width)

    def costs(self, shape: RequestShape) -> CallCosts:
        """What the calls of a request cost here: as measured, if the bundle has that, else by the cost model."""
        return call_costs(self.bundle, shape, self.backend.machine)

    def load(self, plan: StitchPlan, on_engine: Callable[[str, int, int], None] = lambda name, done, total: None) -> None:
        """Loads every engine that a plan uses, or with `low_vram` none: each request does.

        `on_engine` gets (name, how many are loaded, how many there are).
        """
        if self.low_vram:
            on_engine("", 0, 0)
            return
        optional = plan.mask or plan.switch or plan.correction
        names = [
            *TEXT_ENCODERS[: len(self.tokenizers)],
            *(n for n in GLUE if n not in _OPTIONAL_GLUE or optional),
        ]
        names += [*_transformers(plan), VAE_DECODER]
        for done, name in enumerate(names):
            on_engine(name, done, len(names))
            self.backend.engine(name)
        on_engine("", len(names), len(names))

    # -- a run -----------------------------------------------------------------------------------------------------------
    def __call__(
        self,
        prompt: str | list[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Any = None,
        latents: np.ndarray | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[[HybridStitchPipeline, int, float, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        schedule: Schedule = "hybrid",
        stages: tuple[int, int, int] | None = None,
        mask_ratio: float | None = None,
        mask: MaskRule | None = None,
        refresh_every: int | None = None,
        correction: float = 0.0,
        adaptive: bool = False,
        solver: Solver = "euler",
        timestep_spacing: TimestepSpacing = "linspace",
        shift: float | None = None,
        keep_masks: bool = False,
        on_step: Callable[[int, StepRecord], None] | None = None,
    ) -> StitchOutput:
        """Draws images.

        Args:
            prompt: one prompt or several; several are drawn in one batch.
            height, width: pixels, multiples of the token side (16 for SD3.5); the bundle's default if left out.
            num_inference_steps, guidance_scale: the bundle's defaults if left out; guidance is on above 1.
            negative_prompt: one for all prompts, or one for each.
            num_images_per_prompt: images drawn for each prompt, in the same batch.
            seed: one for the whole request or one for each image; a random one if neither it, `generator` nor `latents`
                is given. The same seed starts from the same noise as ``torch.Generator("cpu").manual_seed(seed)``.
            generator: a torch.Generator, or a list of them, used as diffusers uses it.
            latents: start noise [B, C, H/8, W/8] instead of a seed.
            output_type: "pil", "np" or "latent".
            callback_on_step_end: called as diffusers does, with (pipeline, step, timestep, tensors); it may return other
                latents, and may set ``pipeline._interrupt = True`` to stop early.
            max_sequence_length: fixed by the bundle; accepted if it says the same.
            schedule, stages, mask, refresh_every, correction, adaptive, solver, timestep_spacing, shift: see `plan`.
                mask_ratio is short for ``mask=MaskRule(ratio=...)``.
            keep_masks: return the mask of every step.
            on_step: called with the step's index and record, for progress bars.

        Raises:
            RequestError: an argument is not usable; a ValueError too.
            NumericsError: the result is not finite.
            ResourceError: memory ran out; the pipeline has freed what this request took, and can take a smaller one.
        """
        prompts = check_prompts(prompt)
        negatives = negative_prompts(negative_prompt, prompts)
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)
        if num_images_per_prompt < 1:
            raise RequestError(f"num_images_per_prompt {num_images_per_prompt} is not positive")
        images = len(prompts) * num_images_per_prompt
        limit = self.bundle.manifest.limits.max_images
        if images > limit:
            raise RequestError(
                f"{images} images at once are more than this bundle draws",
                found=f"its limit is {limit}",
                fix="ask for fewer",
            )
        if output_type not in get_args(OutputType):
            raise RequestError(f"output_type {output_type!r} is unknown", fix=f"use one of {', '.join(get_args(OutputType))}")
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name not in _CALLBACK_TENSORS]:
            raise RequestError(f"callbacks can get {', '.join(_CALLBACK_TENSORS)} only", found=", ".join(unknown))
        if max_sequence_length not in (None, self.spec.t5_length):
            raise RequestError(
                f"max_sequence_length {max_sequence_length} is not this bundle's",
                found=f"it was built for {self.spec.t5_length}",
            )
        scale = guidance_scale_of(self.bundle, guidance_scale)
        if mask_ratio is not None:
            if mask is not None:
                raise RequestError("mask and mask_ratio are two ways to choose the mask", fix="give one of them")
            mask = MaskRule(ratio=mask_ratio)
        plan = self.plan(
            schedule=schedule, num_inference_steps=num_inference_steps, height=height, width=width, stages=stages,
            mask=mask, refresh_every=refresh_every, correction=correction, adaptive=adaptive, solver=solver,
            timestep_spacing=timestep_spacing, shift=shift,
        )  # fmt: skip
        h, w = self.grid(height, width)
        shape = RequestShape(images, scale > 1, h, w)
        side = self.spec.patch_size
        seeds, noise = start_latents(seed, generator, latents, (images, self.spec.latent_channels, h * side, w * side))
        texts = [*negatives, *prompts] if shape.guided else prompts
        rows = [text for text in texts for _ in range(num_images_per_prompt)]
        request = _Request(rows, plan, shape, scale, seeds, noise, output_type, keep_masks)
        self._interrupt = False

        def end_step(ws: Workspace, t: int, record: StepRecord) -> bool:
            if on_step is not None:
                on_step(t, record)
            if callback_on_step_end is not None:
                tensors = {"latents": unpatchify(ws.latents, h, w, side)}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, t, float(ws.table.timesteps[t]), given) or {}
                if "latents" in returned:
                    changed = as_latents(returned["latents"], noise.shape, "the latents that the callback returned")
                    ws.latents = patchify(changed, side)
            return not self._interrupt

        try:
            return self._draw(request, end_step)
        except ResourceError as exc:
            traceback.clear_frames(exc.__traceback__)  # whoever keeps the error must not keep the buffers with it
            self._resident.drop()
            raise

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pixels [B, H, W, 3] uint8 of denoised latents [B, C, H/8, W/8].

        Raises:
            RequestError: another shape.
        """
        channels, scale = self.spec.latent_channels, self.spec.vae_scale
        if latents.ndim != 4 or latents.shape[1] != channels or not len(latents):
            raise RequestError(f"latents of the shape {latents.shape} are no pictures", found=f"[B, {channels}, H/8, W/8] is")
        h, w = self.grid(scale * latents.shape[2], scale * latents.shape[3])
        pixels = self._resident.decoder(h, w)(patchify(latents, self.spec.patch_size))
        self._resident.done_with_decoder()
        return pixels

    def _draw(self, request: _Request, end_step: Callable[[Workspace, int, StepRecord], bool]) -> StitchOutput:
        times, plan, shape = _Stopwatch(), request.plan, request.shape
        with times("text"):
            different = list(dict.fromkeys(request.rows))
            index = [different.index(text) for text in request.rows]
            ids = [tokenize(different) for tokenize in self.tokenizers]
            text = self._resident.encoder(len(ids), len(different), len(index))(ids, index)
        self._resident.done_with_text()
        if request.output_type != "latent":
            self._resident.expect_decoder(shape.h, shape.w)
        for name in _transformers(plan):  # loading is no part of the loop's time
            self.backend.engine(name)
        ws = self._resident.workspace(shape)
        noise = patchify(request.noise, self.spec.patch_size)
        table = self.scheduler.table(len(plan.steps), plan.sampling)
        ws.begin(noise, text, table, request.guidance_scale, plan.mask, plan.correction)
        with times("denoise"):
            records = denoise(ws, plan, keep_masks=request.keep_masks, on_step_end=partial(end_step, ws))
        if not ws.is_finite():
            raise NumericsError(
                "the denoised latents are not finite, so there is no picture to decode",
                fix="lower the guidance scale, or run `hst-trt verify` on the bundle",
            )
        tokens, engine_seconds = ws.latents, dict(ws.seconds)
        del ws  # `done_with_loop` may free it
        self._resident.done_with_loop()
        with times("vae"):
            images = self._images(tokens, shape, request.output_type)
        self._resident.done_with_decoder()
        stats = RunStats(plan.num_tokens, tuple(records), self.costs(shape), times.seconds, engine_seconds)
        masks = {t: record.mask for t, record in enumerate(records) if record.mask is not None}
        return StitchOutput(images, stats, plan, request.seeds, masks)

    def _images(self, tokens: np.ndarray, shape: RequestShape, output_type: OutputType) -> Any:
        if output_type == "latent":
            return unpatchify(tokens, shape.h, shape.w, self.spec.patch_size)
        pixels = self._resident.decoder(shape.h, shape.w)(tokens)
        return pixels.astype(np.float32) / 255 if output_type == "np" else [Image.fromarray(image) for image in pixels]


def _transformers(plan: StitchPlan) -> list[str]:
    """Those that a plan uses, or may use once an adaptive switch has fired."""
    return ([SMALL] if plan.uses_small or plan.switch else []) + ([LARGE] if plan.uses_large else [])


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
