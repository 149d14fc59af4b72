"""The C interface of the C++ host by ctypes, as a host in any language would use it, and its build for the tests."""

from __future__ import annotations

import ctypes as c
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "hst_trt" / "csrc"
API_VERSION = (1 << 16) + 1
RGB, LATENTS = 1, 2
GO_ON, CANCEL, STOP = 0, 1, 2


CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
"""The `dev` extra brings one, for machines that have none or an old one."""


def build_host(preset: str = "release") -> Path:
    """The folder with the host as a preset builds it; made as `make host` does, once, whatever number of processes ask.

    HST_TRT_TEST_HOST names another folder in place of the release's, built before.
    """
    if preset == "release" and (built := os.environ.get("HST_TRT_TEST_HOST")):
        return Path(built)
    compiler = shutil.which("clang++" if preset == "fuzz" else "c++")
    missing = [
        what for what, found in (("CMake", CMAKE), ("Clang" if preset == "fuzz" else "a C++ compiler", compiler)) if not found
    ]
    if missing:
        pytest.skip(f"building the C++ host needs {' and '.join(missing)}")
    folder = ROOT / "build" / "out" / ("host" if preset == "release" else f"host-{preset}")
    # Clang links no sanitizer into shared libraries, so the doubles of TensorRT cannot be built with it
    targets = ["--target", "hst-trt-fuzz-manifest", "hst-trt-fuzz-tokenizer"] if preset == "fuzz" else []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".test-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [CMAKE, "-S", str(SOURCES), "--preset", preset, "-B", str(folder)],
            [CMAKE, "--build", str(folder), *targets, "--parallel", str(os.cpu_count() or 1)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def onnxruntime_library() -> Path:
    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


class Raw(c.Structure):
    """hst_request."""

    _fields_ = [
        ("struct_size", c.c_uint32), ("api_version", c.c_uint32),
        ("prompts", c.POINTER(c.c_char_p)), ("prompt_count", c.c_size_t),
        ("negative_prompts", c.POINTER(c.c_char_p)), ("negative_prompt_count", c.c_size_t),
        ("images_per_prompt", c.c_int32), ("height", c.c_int32), ("width", c.c_int32), ("num_inference_steps", c.c_int32),
        ("guidance_scale", c.c_double), ("seeds", c.POINTER(c.c_uint64)), ("seed_count", c.c_size_t),
        ("latents", c.POINTER(c.c_float)), ("latent_count", c.c_size_t),
        ("schedule", c.c_char_p), ("solver", c.c_char_p), ("timestep_spacing", c.c_char_p), ("shift", c.c_double),
        ("has_stages", c.c_int32), ("stages", c.c_int32 * 3), ("refresh_every", c.c_int32), ("correction", c.c_double),
        ("adaptive", c.c_int32), ("mask_ratio", c.c_double), ("mask_threshold", c.c_double), ("mask_decay", c.c_double),
        ("mask_drift", c.c_double), ("mask_starvation", c.c_double), ("keep_masks", c.c_int32),
        ("progress", c.c_void_p), ("progress_context", c.c_void_p),
        ("outputs", c.c_int32), ("has_mask_seed", c.c_int32), ("mask_seed", c.c_uint64),
        ("on_step_end", c.c_void_p), ("on_step_end_context", c.c_void_p),
    ]  # fmt: skip


class Params(c.Structure):
    """hst_pipeline_params."""

    _fields_ = [
        ("struct_size", c.c_uint32), ("api_version", c.c_uint32), ("threads", c.c_int32), ("device", c.c_int32),
        ("low_memory", c.c_int32), ("onnxruntime", c.c_char_p),
    ]  # fmt: skip


class OpenParams(c.Structure):
    """hst_open_params."""

    _fields_ = [
        ("struct_size", c.c_uint32),
        ("api_version", c.c_uint32),
        ("on_hash", c.c_void_p),
        ("on_hash_context", c.c_void_p),
    ]


class RawStep(c.Structure):
    """hst_step."""

    _fields_ = [
        ("stage", c.c_int32),
        ("large_tokens", c.c_int32),
        ("small", c.c_int32),
        ("redraw", c.c_int32),
        ("seconds", c.c_double),
    ]


class Times(c.Structure):
    """hst_times."""

    _fields_ = [("text", c.c_double), ("denoise", c.c_double), ("vae", c.c_double)]


class Event(c.Structure):
    """hst_step_event."""

    _fields_ = [
        ("struct_size", c.c_uint32), ("step", c.c_int32), ("steps", c.c_int32), ("timestep", c.c_double), ("done", RawStep),
        ("loop", c.c_void_p), ("latent_count", c.c_size_t),
    ]  # fmt: skip


class StageStats(c.Structure):
    """hst_stage_stats."""

    _fields_ = [
        ("steps", c.c_int64), ("large_calls", c.c_int64), ("large_tokens", c.c_int64), ("small_calls", c.c_int64),
        ("seconds", c.c_double),
    ]  # fmt: skip


class Stats(c.Structure):
    """hst_stats."""

    _fields_ = [
        ("num_tokens", c.c_int64), ("large_tokens", c.c_int64), ("stages", StageStats * 3), ("large_compute", c.c_double),
        ("large_compute_saved", c.c_double), ("cost", c.c_double), ("modelled_speedup", c.c_double), ("overhead", c.c_double),
    ]  # fmt: skip


PROGRESS = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_int32, c.c_int32)
STEP_END = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.POINTER(Event))
ON_HASH = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_uint64, c.c_uint64)


class HostError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


Step = tuple[int, int, bool, bool]  # stage, large_tokens, small, redraw


@dataclass(frozen=True)
class Drawn:
    images: np.ndarray  # [images, H, W, 3] uint8; empty if they were not asked for
    latents: np.ndarray | None  # [images, C, H/8, W/8]
    seeds: tuple[int, ...]
    steps: list[Step]
    masks: dict[int, np.ndarray]
    times: dict[str, float]
    stats: Stats
    cost_source: str
    engine_seconds: dict[str, float]
    warnings: list[str]


class Library:
    """Any function of the library, by name; an error it returns is raised."""

    def __init__(self, path: Path) -> None:
        self.raw = c.CDLL(str(path))
        self.raw.hst_error_message.restype = c.c_char_p
        for name in ("bundle_name", "bundle_fingerprint", "result_cost_source", "result_engine", "result_warning"):
            getattr(self.raw, f"hst_{name}").restype = c.c_char_p
        for name in ("rgb", "mask", "seeds", "latents"):
            getattr(self.raw, f"hst_result_{name}").restype = c.c_void_p
        for name in ("images", "steps", "seed_count", "engines", "warnings"):
            getattr(self.raw, f"hst_result_{name}").restype = c.c_size_t
        self.raw.hst_bundle_tokenizers.restype = c.c_size_t
        self.raw.hst_result_times.restype = Times

    def call(self, name: str, *arguments: Any) -> None:
        function = getattr(self.raw, name)
        function.restype = c.c_void_p
        error = c.c_void_p(function(*arguments))
        if error:
            code, message = self.raw.hst_error_code(error), self.raw.hst_error_message(error).decode()
            self.raw.hst_error_free(error)
            raise HostError(code, message)

    def request(self, **fields: Any) -> Raw:
        """A request with its defaults, changed; the arrays stay alive with it."""
        raw = Raw()
        self.call("hst_request_init", c.byref(raw), c.c_uint32(c.sizeof(raw)), c.c_uint32(API_VERSION))
        for name, value in fields.items():
            if name in ("prompts", "negative_prompts"):
                texts = (c.c_char_p * len(value))(*(text if isinstance(text, bytes) else text.encode() for text in value))
                setattr(raw, name, texts)
                setattr(raw, f"{name[:-1]}_count", len(value))
            elif name == "seeds":
                raw.seeds, raw.seed_count = (c.c_uint64 * len(value))(*value), len(value)
            elif name == "latents":
                flat = np.ascontiguousarray(value, np.float32).reshape(-1)
                raw.latents, raw.latent_count = (c.c_float * flat.size)(*flat), flat.size
            elif name == "stages":
                raw.has_stages, raw.stages = 1, (c.c_int32 * 3)(*value)
            else:
                setattr(raw, name, value.encode() if isinstance(value, str) else value)
        return raw


class Loop:
    """What a step callback gets, of a request whose latents have this shape."""

    def __init__(self, library: Library, event: Event, shape: tuple[int, ...]) -> None:
        self._library, self._shape, self.handle = library, shape, c.c_void_p(event.loop)
        self.step, self.steps, self.timestep, self.done = event.step, event.steps, event.timestep, step_of(event.done)
        self.seconds = event.done.seconds

    @property
    def latents(self) -> np.ndarray:
        values = np.empty(self._shape, np.float32)
        self._library.call("hst_loop_latents", self.handle, values.ctypes.data_as(c.c_void_p), c.c_size_t(values.size))
        return values

    @latents.setter
    def latents(self, values: np.ndarray) -> None:
        flat = np.ascontiguousarray(values, np.float32)
        self._library.call("hst_loop_set_latents", self.handle, flat.ctypes.data_as(c.c_void_p), c.c_size_t(flat.size))


class HostBundle:
    def __init__(self, library: Library, path: Path, *, on_hash: Callable[[int, int], int] | None = None) -> None:
        self.library, self.handle, params = library, c.c_void_p(), OpenParams()
        library.call("hst_open_params_init", c.byref(params), c.c_uint32(c.sizeof(params)), c.c_uint32(API_VERSION))
        callback = ON_HASH(lambda _, done, total: on_hash(done, total)) if on_hash else None
        params.on_hash = c.cast(callback, c.c_void_p) if callback else None
        library.call("hst_bundle_open_with", str(path).encode(), c.byref(params), c.byref(self.handle))

    def __del__(self) -> None:
        self.library.raw.hst_bundle_free(self.handle)

    def plan(self, **fields: Any) -> list[Step]:
        raw, count, steps = self.library.request(**fields), c.c_size_t(), (RawStep * 1000)()
        self.library.call("hst_bundle_plan", self.handle, c.byref(raw), steps, c.c_size_t(1000), c.byref(count))
        return [step_of(step) for step in steps[: count.value]]

    def latent_shape(self, **fields: Any) -> tuple[int, ...]:
        raw, shape = self.library.request(**fields), (c.c_int64 * 4)()
        self.library.call("hst_bundle_latent_shape", self.handle, c.byref(raw), shape)
        return tuple(shape)

    def tokenize(self, index: int, text: str | bytes) -> tuple[list[int], int]:
        ids, count, needed = (c.c_int64 * 512)(), c.c_size_t(), c.c_size_t()
        data = text if isinstance(text, bytes) else text.encode()
        self.library.call(
            "hst_bundle_tokenize", self.handle, c.c_size_t(index), data, ids, c.c_size_t(512), c.byref(count), c.byref(needed)
        )
        return ids[: count.value], needed.value


class HostPipeline:
    def __init__(
        self,
        bundle: HostBundle,
        *,
        threads: int = 1,
        device: int = 0,
        low_memory: bool = False,
        onnxruntime: Path | None = None,
    ) -> None:
        self.bundle, self.library, self.handle, params = bundle, bundle.library, c.c_void_p(), Params()
        self.library.call("hst_pipeline_params_init", c.byref(params), c.c_uint32(c.sizeof(params)), c.c_uint32(API_VERSION))
        params.threads, params.device, params.low_memory = threads, device, low_memory
        params.onnxruntime = str(onnxruntime or onnxruntime_library()).encode()
        self.library.call("hst_pipeline_create", bundle.handle, c.byref(params), c.byref(self.handle))

    def __del__(self) -> None:
        self.library.raw.hst_pipeline_free(self.handle)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        progress: Callable[[int, int], int] | None = None,
        on_step_end: Callable[[Loop], int] | None = None,
        **fields: Any,
    ) -> Drawn:
        raw, result, library = self.library.request(prompts=prompts, **fields), c.c_void_p(), self.library
        if progress:
            callback = PROGRESS(lambda _, done, steps: progress(done, steps))
            raw.progress = c.cast(callback, c.c_void_p)
        if on_step_end:
            shape = self.bundle.latent_shape(prompts=prompts, **fields)
            step_end = STEP_END(lambda _, event: on_step_end(Loop(library, event.contents, shape)))
            raw.on_step_end = c.cast(step_end, c.c_void_p)
        library.call("hst_generate", self.handle, c.byref(raw), c.byref(result))
        try:
            return drawn(library, result)
        finally:
            library.raw.hst_result_free(result)


def step_of(raw: RawStep) -> Step:
    return raw.stage, raw.large_tokens, bool(raw.small), bool(raw.redraw)


def drawn(library: Library, result: c.c_void_p) -> Drawn:
    raw = library.raw
    shape = raw.hst_result_height(result), raw.hst_result_width(result), 3
    count, h, w, sides = raw.hst_result_images(result), c.c_int32(), c.c_int32(), (c.c_int64 * 4)()

    def array(address: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(c.string_at(address, int(np.prod(shape))), np.uint8).reshape(shape)

    steps, masks = [], {}
    for t in range(raw.hst_result_steps(result)):
        step = RawStep()
        library.call("hst_result_step", result, c.c_size_t(t), c.byref(step))
        steps.append(step_of(step))
        if mask := raw.hst_result_mask(result, c.c_size_t(t), c.byref(h), c.byref(w)):
            masks[t] = array(mask, (count, h.value, w.value)).astype(bool)
    rgb = [raw.hst_result_rgb(result, c.c_size_t(i)) for i in range(count)]
    images = np.stack([array(one, shape) for one in rgb]) if all(rgb) else np.empty((0, *shape), np.uint8)
    address = raw.hst_result_latents(result, sides)
    latents = np.frombuffer(c.string_at(address, 4 * int(np.prod(sides))), np.float32).reshape(sides) if address else None
    seeds = np.frombuffer(c.string_at(raw.hst_result_seeds(result), 8 * raw.hst_result_seed_count(result)), np.uint64)
    times = raw.hst_result_times(result)
    stats, engines = Stats(), {}
    library.call("hst_result_stats", result, c.byref(stats), c.c_uint32(c.sizeof(stats)))
    for i in range(raw.hst_result_engines(result)):
        seconds = c.c_double()
        name = raw.hst_result_engine(result, c.c_size_t(i), c.byref(seconds)).decode()
        engines[name] = seconds.value
    return Drawn(
        images,
        latents,
        tuple(seeds.tolist()),
        steps,
        masks,
        {name: getattr(times, name) for name, _ in Times._fields_},
        stats,
        raw.hst_result_cost_source(result).decode(),
        engines,
        [raw.hst_result_warning(result, c.c_size_t(i)).decode() for i in range(raw.hst_result_warnings(result))],
    )
