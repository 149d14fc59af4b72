"""The Python API: a bundle as a pipeline with diffusers' argument names."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from .bundle import Bundle
from .codec import decode_latents, encode_prompts, patchify, unpatchify
from .cost import CallCosts, ModelledCosts
from .denoise import StepRecord, denoise
from .errors import IncompatibleError, NumericsError, RequestError
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
from .runtime.engine import Backend
from .runtime.ort import OnnxRuntimeBackend
from .spec import PairSpec
from .stats import RunStats
from .tensor_names import GLUE, LARGE, SMALL, TEXT_ENCODERS, VAE_DECODER
from .tokenizer import PromptTokenizer
from .workspace import RequestShape, Workspace

__all__ = ["HybridStitchPipeline", "StitchOutput", "plan_request"]

log = logging.getLogger(__name__)
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


class HybridStitchPipeline:
    """Draws images from a bundle. Not for use by two threads at once; make one pipeline a thread.

    Use `from_bundle`; the constructor takes the parts for tests and other backends.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.spec = bundle.spec
        self.scheduler = bundle.scheduler
        self.tokenizers = [PromptTokenizer(bundle.path / t.path, t.length, t.pad_id) for t in bundle.manifest.tokenizers]
        self._workspace: Workspace | None = None
        self._interrupt = False

    @classmethod
    def from_bundle(
        cls, path: str | os.PathLike[str], *, threads: int = 0, on_hash: Callable[[int, int], None] | None = None
    ) -> HybridStitchPipeline:
        """Opens a bundle, checks it, and makes a pipeline; graphs are loaded when they are first used.

        Args:
            path: a folder ``NAME.hstb``.
            threads: threads of a call; 0 takes one per physical core.
            on_hash: called with (bytes checked, bytes in all).

        Raises:
            HstError: the bundle is missing, damaged, unfinished, or not for this machine.
        """
        bundle = Bundle.open(path, progress=on_hash)
        target = bundle.manifest.target
        if bundle.manifest.state != "complete":
            raise IncompatibleError(
                f"{bundle.path} holds graphs only, it was not built for {target.name} yet",
                fix="this version builds engines for no GPU yet; for a CPU, build the same pair with `hst-trt build --gpu cpu`",
            )
        if target.backend != "onnxruntime":
            raise IncompatibleError(
                f"{bundle.path} is for {target.backend}, which this version cannot run",
                found=f"target {target.name}",
                fix="build one for the CPU: `hst-trt build --gpu cpu`",
            )
        return cls(bundle, OnnxRuntimeBackend(bundle.graph_paths(), threads))

    # -- what can be asked before a run ----------------------------------------------------------------------------------
    def plan(self, **arguments: Any) -> StitchPlan:
        """The plan of a request; arguments are those of `plan_request`.

        Raises:
            RequestError: an argument is not usable.
        """
        return plan_request(self.bundle, **arguments)[0]

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Token rows and columns of an image size in pixels, refused if the bundle cannot draw it."""
        return _grid(self.bundle, height, width)

    def costs(self, plan: StitchPlan) -> CallCosts:
        return _costs(self.spec, plan)

    def load(self, plan: StitchPlan, on_engine: Callable[[str, int, int], None] = lambda name, done, total: None) -> None:
        """Loads every engine that a plan uses; `on_engine` gets (name, how many are loaded, how many there are)."""
        optional = plan.mask or plan.switch or plan.correction
        names = [
            *TEXT_ENCODERS[: len(self.tokenizers)],
            *(n for n in GLUE if n not in _OPTIONAL_GLUE or optional),
        ]
        names += [SMALL] if plan.uses_small or plan.switch else []
        names += [LARGE] if plan.uses_large else []
        names.append(VAE_DECODER)
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
            schedule, stages, mask, refresh_every, correction, adaptive: see `plan`. mask_ratio is short for
                ``mask=MaskRule(ratio=...)``.
            keep_masks: return the mask of every step.
            on_step: called with the step's index and record, for progress bars.

        Raises:
            RequestError: an argument is not usable; a ValueError too.
            NumericsError: the result is not finite.
        """
        times = _Stopwatch()
        prompts = self._check_prompts(prompt)
        negatives = self._negatives(negative_prompt, prompts)
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
        scale = self._guidance(guidance_scale)
        if mask_ratio is not None:
            if mask is not None:
                raise RequestError("mask and mask_ratio are two ways to choose the mask", fix="give one of them")
            mask = MaskRule(ratio=mask_ratio)
        plan = self.plan(
            schedule=schedule, num_inference_steps=num_inference_steps, height=height, width=width, stages=stages,
            mask=mask, refresh_every=refresh_every, correction=correction, adaptive=adaptive,
        )  # fmt: skip
        h, w = self.grid(height, width)
        guided = scale > 1
        seeds, noise = self._noise(seed, generator, latents, images, h, w)

        with times("text"):
            text = self._encode(prompts, negatives if guided else None, num_images_per_prompt)
        ws = self._workspace_for(RequestShape(images, guided, h, w))
        table = self.scheduler.table(len(plan.steps))
        ws.begin(patchify(noise, self.spec.patch_size), text, table, scale, plan.mask, plan.correction)
        self._interrupt = False

        def end_step(t: int, record: StepRecord) -> bool:
            if on_step is not None:
                on_step(t, record)
            if callback_on_step_end is not None:
                tensors = {"latents": unpatchify(ws.latents, h, w, self.spec.patch_size)}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, t, float(table.timesteps[t]), given) or {}
                if "latents" in returned:
                    changed = _as_latents(returned["latents"], noise.shape, "the latents that the callback returned")
                    ws.latents = patchify(changed, self.spec.patch_size)
            return not self._interrupt

        with times("denoise"):
            records = denoise(ws, plan, keep_masks=keep_masks, on_step_end=end_step)
        if not ws.is_finite():
            raise NumericsError(
                "the denoised latents are not finite, so there is no picture to decode",
                fix="lower the guidance scale, or run `hst-trt verify` on the bundle",
            )
        tokens = ws.latents
        with times("vae"):
            result = self._output(tokens, h, w, output_type)
        stats = RunStats(plan.num_tokens, tuple(records), self.costs(plan), times.seconds, dict(ws.seconds))
        masks = {t: record.mask for t, record in enumerate(records) if record.mask is not None}
        return StitchOutput(result, stats, plan, seeds, masks)

    # -- checks ------------------------------------------------------------------------------------------------------
    def _check_prompts(self, prompt: str | list[str]) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise RequestError(f"`prompt` has to be a str or a list of str, not {type(prompt).__name__}")
        _check_unicode(prompts)
        if any(not p.strip() for p in prompts):
            log.warning("a prompt is empty: its picture will show whatever the models draw without one")
        return prompts

    def _negatives(self, negative: str | list[str] | None, prompts: list[str]) -> list[str]:
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

    def _guidance(self, scale: float | None) -> float:
        scale = self.bundle.manifest.defaults.guidance_scale if scale is None else scale
        if not (is_number(scale) and 0 <= scale <= 100):
            raise RequestError(f"guidance_scale {scale!r} is not a number from 0 to 100", fix="3 to 7 is usual; 1 is off")
        return scale

    def _noise(
        self, seed: int | Sequence[int] | None, generator: Any, latents: np.ndarray | None, images: int, h: int, w: int
    ) -> tuple[tuple[int, ...], np.ndarray]:
        if seed is not None and generator is not None:
            raise RequestError("seed and generator each say what noise to start from", fix="give one of them")
        shape = (images, self.spec.latent_channels, h * self.spec.patch_size, w * self.spec.patch_size)
        if latents is not None:
            return (), _as_latents(latents, shape, "the given latents")
        if generator is not None:
            from torch import cat, randn  # the caller has torch, or could not have made a generator

            if isinstance(generator, list):
                if len(generator) != images:
                    raise RequestError(f"{len(generator)} generators were given for {images} images")
                return (), cat([randn((1, *shape[1:]), generator=g) for g in generator]).numpy()
            return (), randn(shape, generator=generator).numpy()
        if seed is None:
            seed = int.from_bytes(os.urandom(4), "little")
        if isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, str):
            seeds = tuple(whole_number("seed", one) for one in seed)
            return seeds, start_noise(seeds, shape)
        seed = whole_number("seed", seed)
        return (seed,), start_noise(seed, shape)

    # -- inside ------------------------------------------------------------------------------------------------------
    def _encode(self, prompts: list[str], negatives: list[str] | None, repeats: int) -> dict[str, np.ndarray]:
        rows = [text for text in prompts for _ in range(repeats)]
        if negatives is not None:
            rows = [text for text in negatives for _ in range(repeats)] + rows
        different = list(dict.fromkeys(rows))
        return encode_prompts(self.backend, self.spec, self.tokenizers, different, [different.index(text) for text in rows])

    def _workspace_for(self, shape: RequestShape) -> Workspace:
        """Buffers are kept for the next request of the same shape."""
        if self._workspace is None or self._workspace.shape != shape:
            self._workspace = None  # freed before the next is made
            self._workspace = Workspace(self.backend, self.spec, shape)
        return self._workspace

    def _output(self, tokens: np.ndarray, h: int, w: int, output_type: OutputType) -> Any:
        if output_type == "latent":
            return unpatchify(tokens, h, w, self.spec.patch_size)
        pixels = decode_latents(self.backend, self.spec, tokens, h, w)
        return pixels.astype(np.float32) / 255 if output_type == "np" else [Image.fromarray(image) for image in pixels]


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
) -> tuple[StitchPlan, CallCosts]:
    """The plan of a request on a bundle, and what calls cost there; see `hst_trt.plan.PlanRequest` for the arguments.

    Raises:
        RequestError: an argument is not usable.
    """
    h, w = _grid(bundle, height, width)
    steps = bundle.manifest.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    steps = whole_number("num_inference_steps", steps)
    if stages is not None and not isinstance(stages, Sequence):
        raise RequestError(f"stages {stages!r} are not three numbers", fix="give (large, hybrid, small) steps")
    bundle.scheduler.table(steps)  # refuses numbers of steps it has no sigmas for
    plan = make_plan(
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
        )
    )
    return plan, _costs(bundle.spec, plan)


def _costs(spec: PairSpec, plan: StitchPlan) -> CallCosts:
    return ModelledCosts(spec.large, spec.small, plan.num_tokens, spec.text_length)


def _grid(bundle: Bundle, height: int | None, width: int | None) -> tuple[int, int]:
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


def _check_unicode(texts: Sequence[str]) -> None:
    """Half characters come from bytes of another encoding on the command line; the tokenizers take none."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise RequestError("a prompt is not valid Unicode", found=ascii(text), fix="write it in UTF-8") from exc


def _as_latents(values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as exc:
        raise RequestError(f"{what} are not an array of numbers", found=str(exc)) from exc
    if array.shape != shape:
        raise RequestError(f"{what} have the shape {array.shape}", found=f"this request needs {shape}")
    return array


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
