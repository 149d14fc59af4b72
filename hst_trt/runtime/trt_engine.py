"""One TensorRT engine: which profile fits which shapes, its execution contexts, and the memory they share.

There is a context for each set of shapes, because changing the shapes of one would invalidate what was recorded with it; it
lives as long as a prepared call uses it. Contexts never run at the same time, since there is one stream, so all of them work
in one arena of activation memory.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from ..bundle import EngineEntry, GraphEntry, ProfileEntry
from ..errors import BuildError, HstError, IncompatibleError, IntegrityError, ResourceError
from .cuda import CudaDevice, Memory, out_of_memory
from .device_buffer import DeviceBuffer
from .engine import TensorInfo
from .graphs import CaptureError

__all__ = ["Arena", "ErrorLog", "TensorRTEngine", "fitting_profile", "says_out_of_memory"]

_OUT_OF_MEMORY = ("out of memory", "outofmemory", "memory allocation", "memoryallocation")

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of the inputs, in order


class ErrorLog:
    """The last errors that TensorRT logged: it returns None or False and says why only there."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=8)

    def add(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> str:
        text = "; ".join(self._lines)
        self._lines.clear()
        return text or "TensorRT gave no reason"


def failed(name: str, what: str, size: int, log: ErrorLog, device: CudaDevice) -> HstError:
    """The error to raise where the engine `name` could not do `what`; `size`: bytes of memory that it may have wanted."""
    found = log.take()
    if says_out_of_memory(found):
        return out_of_memory(f"the engine {name}", size, *device.memory())
    return BuildError(
        f"the engine {name} could not {what}",
        found=found,
        fix="run `hst-trt verify` on the bundle; if it is whole, report this",
    )


def says_out_of_memory(text: str) -> bool:
    return any(words in text.lower() for words in _OUT_OF_MEMORY)


class Arena:
    """Activation memory that all contexts of a stream share. It grows to what the largest of them needs.

    Args:
        device: where it is.
        on_move: called when it has got another address, which recordings still have in them.
    """

    def __init__(self, device: CudaDevice, on_move: Callable[[], None]) -> None:
        self._device, self._on_move = device, on_move
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._memory: Memory | None = None

    @property
    def size(self) -> int:
        return 0 if self._memory is None else self._memory.size

    def admit(self, context: Context) -> None:
        """Gives a new context its memory.

        Raises:
            ResourceError: the arena would have to grow beyond what is free; it is as large as before.
        """
        self._resize(max(self.size, context.bytes))
        self._contexts.add(context)
        context.use(self._memory)

    def fit(self) -> None:
        """Gives back what no context needs."""
        self._resize(max((context.bytes for context in self._contexts), default=0))

    def _resize(self, size: int) -> None:
        if size == self.size:
            return
        before, self._memory = self.size, None  # freed first: there may not be room for both
        try:
            self._memory = self._allocate(size)
        except ResourceError:
            self._memory = self._allocate(before)
            raise
        finally:
            for context in self._contexts:
                context.use(self._memory)
            self._on_move()

    def _allocate(self, size: int) -> Memory | None:
        return self._device.allocate(size, "the engines' activation memory") if size else None


class Context:
    """An execution context with its profile and shapes set. `bytes`: activation memory that it needs."""

    def __init__(self, context: Any, config: Any, device: CudaDevice, size: int, fail: Callable[[str], HstError]) -> None:
        self.bytes = size
        self._context, self._config, self._device, self._fail = context, config, device, fail
        self._bound: Mapping[str, int] | None = None
        self._capturable = True

    def use(self, memory: Memory | None) -> None:
        if self.bytes:
            assert memory is not None
            self._context.set_device_memory(memory.address, memory.size)

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        context, stream = self._context, self._device.stream
        if addresses is not self._bound:
            for name, address in addresses.items():
                if not context.set_tensor_address(name, address):
                    raise self._fail(f"take the address of {name}")
            self._bound = addresses
        if self._device.capturing and not self._capturable:
            raise CaptureError("TensorRT says that this context cannot be captured")
        if not context.execute_async_v3(stream):
            raise self._fail("run")
        if not self._device.capturing and hasattr(context, "is_stream_capturable"):  # TensorRT-RTX; known after a plain run
            self._capturable = context.is_stream_capturable(stream)


class _Call:
    """A `hst_trt.runtime.engine.PreparedCall`."""

    def __init__(self, context: Context, bindings: Mapping[str, DeviceBuffer]) -> None:
        self._context, self._buffers = context, dict(bindings)  # keeps the memory alive as long as the call
        self._addresses = {name: buffer.address for name, buffer in self._buffers.items()}

    def execute(self) -> None:
        self._context.enqueue(self._addresses)


class TensorRTEngine:
    """A deserialised engine, a `hst_trt.runtime.engine.Engine`; its weights are on the device once, however many contexts.

    Args:
        name: the graph's name.
        graph, entry: what the manifest says of it.
        engine: TensorRT's.
        trt: the module it is of.
        device, arena: where its contexts run and work.
        log: where TensorRT's errors are found.
        configure: settings for a new context's runtime config.
    """

    def __init__(
        self,
        name: str,
        graph: GraphEntry,
        entry: EngineEntry,
        engine: Any,
        trt: ModuleType,
        device: CudaDevice,
        arena: Arena,
        log: ErrorLog,
        configure: Callable[[Any], None],
    ) -> None:
        self.name = name
        self.input_names = tuple(tensor.name for tensor in graph.inputs)
        self.output_names = tuple(tensor.name for tensor in graph.outputs)
        self.tensors = {t.name: TensorInfo(t.dtype, t.shape) for t in (*graph.inputs, *graph.outputs)}
        self._entry, self._engine, self._trt, self._configure = entry, engine, trt, configure
        self._device, self._arena = device, arena
        # Not a method: contexts keep it, and must not keep the engine.
        self._failed = partial(failed, name, size=engine.device_memory_size_v2, log=log, device=device)
        self._contexts: weakref.WeakValueDictionary[Shapes, Context] = weakref.WeakValueDictionary()
        self._check()

    def prepare(self, bindings: Mapping[str, DeviceBuffer]) -> _Call:
        for name in (*self.input_names, *self.output_names):
            assert bindings[name].dtype == self.tensors[name].dtype, f"{self.name}: {name} is {bindings[name].dtype}"
        shapes = tuple((name, bindings[name].shape) for name in self.input_names)
        context = self._contexts.get(shapes)
        if context is None:
            context = self._contexts[shapes] = self._new_context(shapes, bindings)
        return _Call(context, bindings)

    def _check(self) -> None:
        """That the engine is the one the manifest describes: names, dtypes and number of profiles."""
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        found = {name: self._engine.get_tensor_dtype(name) for name in names}
        dtypes = _dtypes(self._trt)
        expected = {name: dtypes[info.dtype] for name, info in self.tensors.items()}
        profiles = self._engine.num_optimization_profiles
        if found != expected or profiles != len(self._entry.profiles):
            differing = sorted(found.items() ^ expected.items(), key=str)
            what = ", ".join(f"{name} {dtype}" for name, dtype in differing) or f"{profiles} profiles"
            raise IntegrityError(
                f"the engine {self.name} is not the one its manifest describes",
                found=what,
                fix="run `hst-trt build --force` again",
            )

    def _new_context(self, shapes: Shapes, bindings: Mapping[str, DeviceBuffer]) -> Context:
        profile = fitting_profile(self.name, self._entry.profiles, self._axes(shapes))
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._configure(config)
        context = self._engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            raise self._failed("make a context")
        for name, shape in shapes:
            if not context.set_input_shape(name, shape):
                raise self._failed(f"take {name} of shape {list(shape)}")
        if missing := context.infer_shapes():
            raise self._failed(f"infer the shape of {', '.join(missing)}")
        for name in self.output_names:
            shape = tuple(context.get_tensor_shape(name))
            assert shape == bindings[name].shape, f"{self.name} gives {name} as {shape}, not {bindings[name].shape}"
        # 0 is an answer for shapes that need nothing and for a question that failed, but a context whose engine may need
        # memory runs with none at all only if its engine never needs any.
        size = context.update_device_memory_size_for_shapes() or self._engine.device_memory_size_v2
        result = Context(context, config, self._device, size, self._failed)
        self._arena.admit(result)
        return result

    def _axes(self, shapes: Shapes) -> dict[str, int]:
        """The length of each symbolic axis."""
        axes: dict[str, int] = {}
        for name, shape in shapes:
            declared = self.tensors[name].shape
            assert len(declared) == len(shape), f"{self.name}: {name} has {len(shape)} axes, not {len(declared)}"
            for axis, length in zip(declared, shape, strict=True):
                expected = axes.setdefault(axis, length) if isinstance(axis, str) else axis
                assert expected == length, f"{self.name}: axis {axis} of {name} is {length}, not {expected}"
        return axes


def fitting_profile(name: str, profiles: Sequence[ProfileEntry], axes: Mapping[str, int]) -> int:
    """The first profile that takes these lengths: pinned ones stand before ranges.

    Raises:
        IncompatibleError: there is none.
    """
    for index, profile in enumerate(profiles):
        if all(profile.axes[axis][0] <= length <= profile.axes[axis][2] for axis, length in axes.items()):
            return index
    raise IncompatibleError(
        f"the engine {name} has no profile for {_lengths(axes)}",
        found="; ".join(_ranges(profile) for profile in profiles),
        fix="ask for a size and a number of images that the bundle was built for, or build one for these: `hst-trt build`",
    )


def _lengths(axes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} = {length}" for axis, length in axes.items())


def _ranges(profile: ProfileEntry) -> str:
    ranges = ((axis, least, most) for axis, (least, _, most) in profile.axes.items())
    return ", ".join(f"{axis} = {least}" if least == most else f"{axis} = {least} .. {most}" for axis, least, most in ranges)


def _dtypes(trt: ModuleType) -> dict[str, Any]:
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "uint8": "UINT8"}
    return {name: getattr(trt.DataType, theirs) for name, theirs in names.items()}
