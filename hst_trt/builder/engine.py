"""Builds one engine, in the process that it is called in: parse, aim, compile, read back.

TensorRT and TensorRT-RTX have the same classes, so all of it works on either module. It says why something failed only in its
log, so the log's errors are kept and put into the exception. `hst_trt.builder.worker` runs this in a process of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel

from ..bundle import GraphEntry, ProfileEntry, TensorEntry
from ..errors import BuildError, HstError, ResourceError
from ..tensorrt_module import TensorRTBackendName, tensorrt_module
from .profiles import input_shapes

__all__ = ["BuiltEngine", "Cancelled", "EngineJob", "OnStep", "attentions", "build_engine"]

OnStep = Callable[[str, float], bool]  # what TensorRT does, and about what share is done; False cancels the build

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
_LONGEST_PHASE = "Computing profile costs"  # what both TensorRTs call compiling, or timing, the kernels of every profile
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "memory allocation")


class EngineJob(BaseModel, frozen=True, extra="forbid"):
    """One engine to build.

    Attributes:
        graph: what the manifest says of the graph; the engine's inputs and outputs have to be as it says.
        onnx: the graph's file, its weights beside it.
        sms: compute capabilities that it shall run on. TensorRT builds for the GPU that is here, TensorRT-RTX for any.
        gpu: the UUID of the GPU that is here and can load the engine, if one is.
        output: where the engine is written.
        timing_cache: kept from build to build; None for TensorRT-RTX, which times nothing.
    """

    name: str
    backend: TensorRTBackendName
    graph: GraphEntry
    onnx: Path
    profiles: tuple[ProfileEntry, ...]
    sms: tuple[int, ...]
    gpu: str | None
    output: Path
    timing_cache: Path | None = None


class BuiltEngine(BaseModel, frozen=True, extra="forbid"):
    """What is known of an engine once it is built."""

    read_back: Literal["network", "engine"]
    activation_bytes: int | None
    seconds: float


class Cancelled(Exception):
    """The build was cancelled through `OnStep`."""


def build_engine(job: EngineJob, on_step: OnStep = lambda phase, done: True) -> BuiltEngine:
    """Builds an engine and writes it to `job.output`.

    Raises:
        BuildError: TensorRT refuses the graph or a profile, or an input or output is not what the manifest says.
        ResourceError: it says that it is out of memory.
        OSError: the engine cannot be written.
        Cancelled: `on_step` said so.
    """
    started = time.monotonic()
    trt = tensorrt_module(job.backend)
    log = _make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, job, log)
    _compare(job, _network_tensors(network))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names for inspectors; it costs no bytes
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is asked for where half precision is not enough
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # the runtime allocates, and calls can be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if job.backend == "tensorrt-rtx":
        _aim(trt, config, job.sms)
    for profile in job.profiles:
        _add_profile(builder, config, job, profile, log)
    config.progress_monitor = monitor = _make_monitor(trt, on_step)
    if job.timing_cache is not None:
        load_timing_cache(config, job.timing_cache)

    plan = builder.build_serialized_network(network, config)
    if monitor.cancelled:
        raise Cancelled
    if plan is None:
        raise _failed(f"TensorRT could not build the engine {job.name}", log)
    inconsistent = [line for line in log.warnings if "not self-consistent" in line]  # such an engine fails when it is run
    if inconsistent:
        raise BuildError(f"a profile of the engine {job.name} contradicts its graph", found="\n".join(inconsistent))
    with job.output.open("wb") as stream:
        stream.write(memoryview(plan))
    if job.timing_cache is not None:
        save_timing_cache(config, job.timing_cache)
    del plan
    activation_bytes = None
    if job.gpu is not None:
        engine = _load(trt, job, log)
        _compare(job, _engine_tensors(engine))
        _compare_profiles(job, engine)
        activation_bytes = int(engine.device_memory_size_v2)
    return BuiltEngine(
        read_back="network" if job.gpu is None else "engine",
        activation_bytes=activation_bytes,
        seconds=round(time.monotonic() - started, 2),
    )


# -- the log -----------------------------------------------------------------------------------------------------------------
def _make_log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        """Everything but the verbose lines goes to stderr; errors and warnings are kept, too."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.VERBOSE:
                return
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            with suppress(OSError):  # a full disk must not raise into TensorRT's C++
                sys.stderr.write(f"[{severity.name}] {message}\n")

    return Log()


def _failed(problem: str, log: Any) -> HstError:
    """The error for what TensorRT logged."""
    lines = "\n".join(log.errors[:8]) or "TensorRT gave no reason"
    if any(words in lines.lower() for words in _OUT_OF_MEMORY):
        return ResourceError(problem, found=lines, fix="end what else uses the memory, or build on a machine with more")
    return BuildError(problem, found=lines)


# -- graph, target, profiles -------------------------------------------------------------------------------------------------
def _network_flags(trt: ModuleType) -> int:
    """Strongly typed: precision is the graph's. Versions that know no other networks have no flag for it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: ModuleType, network: Any, job: EngineJob, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(job.onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        found = "\n".join(
            (f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else "") + error.desc()
            for error in errors
        )
        raise BuildError(f"TensorRT cannot parse the graph of {job.name}", found=found or "\n".join(log.errors))
    for attention in attentions(trt, network):
        # There is no fused kernel for float32. For half precision a build without one shall fail rather than be slow.
        attention.decomposable = attention.get_input(0).dtype == trt.float32


def attentions(trt: ModuleType, network: Any) -> Iterator[Any]:
    """Every IAttention of a parsed network."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # The bindings give every layer as an ILayer; this is how they let it be seen as what it is.
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def _aim(trt: ModuleType, config: Any, sms: tuple[int, ...]) -> None:
    """TensorRT-RTX takes several compute capabilities; one that it has no name for it builds for only where it runs."""
    named = trt.ComputeCapability.__members__
    chosen = [f"SM{sm}" for sm in sms] if all(f"SM{sm}" in named for sm in sms) else ["CURRENT"]
    config.num_compute_capabilities = len(chosen)
    for index, name in enumerate(chosen):
        config.set_compute_capability(named[name], index)


def _add_profile(builder: Any, config: Any, job: EngineJob, profile: ProfileEntry, log: Any) -> None:
    built = builder.create_optimization_profile()
    for name, (least, best, greatest) in input_shapes(job.graph, profile).items():
        built.set_shape(name, least, best, greatest)
    if config.add_optimization_profile(built) < 0:
        raise _failed(f"TensorRT refuses a profile of the engine {job.name}", log)


# -- progress ----------------------------------------------------------------------------------------------------------------
def _make_monitor(trt: ModuleType, on_step: OnStep) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Phases nest, a step of one being a phase of its own. The share done is that of the longest phase, which comes near
        the end of the outermost one: counted from there, a bar would stand still for nearly all of the time."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._done = 0.0
            self._phases: dict[str, list[int]] = {}  # open ones, from the outermost: [steps done, steps]

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [0, max(1, num_steps)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][0] = step + 1
            share, inwards = 0.0, list(self._phases)
            if _LONGEST_PHASE in self._phases:
                for name in reversed(inwards[inwards.index(_LONGEST_PHASE) :]):
                    steps, total = self._phases[name]
                    share = min(1.0, (steps + share) / total)
            self._done = max(self._done, share)
            self.cancelled = self.cancelled or not on_step(phase_name, self._done)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

    return Monitor()


# -- timing cache ------------------------------------------------------------------------------------------------------------
def load_timing_cache(config: Any, path: Path) -> None:
    """Timings of an earlier build, or an empty cache to fill; TensorRT leaves one of another GPU or version unused."""
    content = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(content), False)


def save_timing_cache(config: Any, path: Path) -> None:
    """Replaces the file as a whole: two builds may end at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
    temporary.replace(path)


# -- reading back ------------------------------------------------------------------------------------------------------------
def _load(trt: ModuleType, job: EngineJob, log: Any) -> Any:
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(job.output.read_bytes())
    if engine is None:
        raise _failed(f"the engine {job.name} was built, but cannot be loaded on this GPU", log)
    return engine


def _network_tensors(network: Any) -> Iterable[tuple[str, bool, str, tuple[int, ...]]]:
    """(name, whether it is an input, dtype, shape with -1 for symbolic axes) of every input and output."""
    for count, get, is_input in (
        (network.num_inputs, network.get_input, True),
        (network.num_outputs, network.get_output, False),
    ):
        for tensor in map(get, range(count)):
            yield tensor.name, is_input, tensor.dtype.name, tuple(tensor.shape)


def _engine_tensors(engine: Any) -> Iterable[tuple[str, bool, str, tuple[int, ...]]]:
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        yield name, is_input, engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name))


def _compare(job: EngineJob, tensors: Iterable[tuple[str, bool, str, tuple[int, ...]]]) -> None:
    """Names, dtypes and shapes against the manifest. A host binds by them, and a wrong dtype would be read as garbage."""
    found = {(name, is_input): (dtype, shape) for name, is_input, dtype, shape in tensors}
    wanted = {(tensor.name, True): tensor for tensor in job.graph.inputs}
    wanted |= {(tensor.name, False): tensor for tensor in job.graph.outputs}
    differences = [
        f"{name}: {'unexpected' if key not in wanted else 'missing'}"
        for key in sorted(found.keys() ^ wanted.keys())
        for name in key[:1]
    ]
    for key in wanted.keys() & found.keys():
        dtype, shape = found[key]
        if _DTYPES.get(dtype) != wanted[key].dtype:
            differences.append(f"{key[0]}: {_DTYPES.get(dtype, dtype)} instead of {wanted[key].dtype}")
        if not _agrees(wanted[key], shape):
            differences.append(f"{key[0]}: {list(shape)} instead of {list(wanted[key].shape)}")
    if differences:
        raise BuildError(
            f"inputs or outputs of the engine {job.name} are not what its graph has", found="; ".join(sorted(differences))
        )


def _agrees(wanted: TensorEntry, shape: tuple[int, ...]) -> bool:
    """A symbolic axis must have stayed one; a static axis may be unknown to TensorRT before it has shapes."""
    return len(wanted.shape) == len(shape) and all(
        have == -1 if isinstance(want, str) else have in (want, -1) for want, have in zip(wanted.shape, shape, strict=True)
    )


def _compare_profiles(job: EngineJob, engine: Any) -> None:
    for index, profile in enumerate(job.profiles):
        for name, shapes in input_shapes(job.graph, profile).items():
            have = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            if have != shapes:
                raise BuildError(f"profile {index} of the engine {job.name} has other shapes of {name}", found=f"{have}")
