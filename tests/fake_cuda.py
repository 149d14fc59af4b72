"""Doubles of a GPU and of TensorRT on host memory, strict where a real one would corrupt memory in silence.

`FakeDevice` stands for `hst_trt.runtime.cuda.CudaDevice`: what is enqueued is executed only when somebody waits, in order;
capturing records what is enqueued; fresh and freed memory is full of NaN; every access is checked against what is allocated
when it is executed. The row-move kernel is the real source, compiled as plain C++.

`FakeTensorRT` stands for the module: its engines run a bundle's ONNX graphs in ONNX Runtime on the very addresses that were
bound, within their profiles, and scribble over all activation memory that they are given.
"""

from __future__ import annotations

import ctypes
import enum
import json
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from hst_trt.runtime.cuda import Memory, out_of_memory
from hst_trt.runtime.graphs import CaptureError

POISON = 0xFF  # NaN as a float of any width, -1 as an integer


class FakeEvent:
    def __init__(self) -> None:
        self.reached: float | None = None


class FakePinned:
    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, POISON, np.uint8)


class FakeGraph:
    """A recording; launching it enqueues what was recorded."""

    def __init__(self, device: FakeDevice, operations: list[Callable[[], None]]) -> None:
        self._device, self.operations = device, operations

    def launch(self) -> None:
        self._device.launch_graph(self)


class FakeDevice:
    """A GPU on host memory.

    Args:
        memory: bytes that there are.
        sm: compute capability, 90 for 9.0.
        captures: whether capturing works.

    Attributes:
        waits: how often the host waited for the device. launches: graphs. enqueued: single operations.
    """

    stream = 0x57EA

    def __init__(self, memory: int = 2**30, sm: int = 90, captures: bool = True) -> None:
        self.ordinal, self.name, self.sm, self.captures = 0, "Fake GPU", sm, captures
        self.waits = self.launches = self.enqueued = 0
        self.capturing = False
        self.most_used = 0
        self._memory, self._used = memory, 0
        self._allocated: dict[int, tuple[ctypes.Array[ctypes.c_char], int]] = {}
        self._queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] = []
        self._unfreed: list[int] = []

    def activate(self) -> None:
        pass

    # -- memory ------------------------------------------------------------------------------------------------------
    def memory(self) -> tuple[int, int]:
        return self._memory - self._used, self._memory

    def allocate(self, size: int, what: str) -> Memory:
        assert not self.capturing, "an allocation would spoil the capture"
        if self._used + size > self._memory:
            raise out_of_memory(what, size, *self.memory())
        block = ctypes.create_string_buffer(bytes([POISON]) * (size + 256), size + 256)
        address = ctypes.addressof(block) + -ctypes.addressof(block) % 256
        self._allocated[address] = block, size
        self._used += size
        self.most_used = max(self.most_used, self._used)
        return Memory(self, address, size)

    def free(self, address: int) -> None:
        if self.capturing:  # it would spoil the capture; whenever Python collects garbage, it may be asked for
            self._unfreed.append(address)
            return
        self._drain()  # as cudaFree does
        _, size = self._allocated.pop(address)
        ctypes.memset(address, POISON, size)
        self._used -= size

    def pinned(self, size: int) -> FakePinned:
        return FakePinned(size)

    def check(self, address: int, size: int) -> None:
        """That these bytes are within one allocation that is there now."""
        for start, (_, length) in self._allocated.items():
            if start <= address and address + size <= start + length:
                return
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def fill(self, address: int, byte: int, size: int) -> None:
        def operation() -> None:
            self.check(address, size)
            ctypes.memset(address, byte, size)

        self.enqueue(operation)

    def copy(self, source: int, target: int, size: int) -> None:
        def operation() -> None:
            self.check(source, size)
            self.check(target, size)
            assert source + size <= target or target + size <= source, "source and target overlap"
            ctypes.memmove(target, source, size)

        self.enqueue(operation)

    def upload(self, source: np.ndarray, target: int) -> None:
        def operation() -> None:
            self.check(target, source.nbytes)
            ctypes.memmove(target, source.ctypes.data, source.nbytes)

        assert not self.capturing, "what the host writes would be recorded once and for all"
        self.enqueue(operation)

    def download(self, source: int, target: np.ndarray) -> None:
        def operation() -> None:
            self.check(source, target.nbytes)
            ctypes.memmove(target.ctypes.data, source, target.nbytes)

        self.enqueue(operation)

    # -- time --------------------------------------------------------------------------------------------------------
    def synchronize(self) -> None:
        assert not self.capturing, "waiting would spoil the capture"
        self.waits += 1
        self._drain()

    def record(self) -> FakeEvent:
        event = FakeEvent()

        def operation() -> None:
            event.reached = time.perf_counter()

        self.enqueue(operation)
        return event

    def seconds(self, start: FakeEvent, end: FakeEvent) -> float:
        if end.reached is None:
            self.waits += 1
            while end.reached is None:
                self._queue.pop(0)()
        assert start.reached is not None
        assert end.reached is not None
        return end.reached - start.reached

    # -- graphs ------------------------------------------------------------------------------------------------------
    def capture(self, body: Callable[[], None]) -> FakeGraph:
        self.capturing, self._recording = True, []
        try:
            body()
        finally:
            self.capturing = False
            while self._unfreed:
                self.free(self._unfreed.pop())
        if not self.captures:
            raise CaptureError("this device captures nothing")
        recorded, self._recording = self._recording, []
        return FakeGraph(self, recorded)

    def launch_graph(self, handle: FakeGraph) -> None:
        assert not self.capturing
        self.launches += 1
        self._queue.extend(handle.operations)

    def retire_graph(self, handle: Any) -> None:
        pass

    # -- kernels -----------------------------------------------------------------------------------------------------
    def kernel(self, source: str, name: str) -> Any:
        return host_kernel(source, name)

    def launch(self, kernel: Any, grid: tuple[int, int, int], block: int, arguments: Sequence[tuple[int, Any]]) -> None:
        values = [kind(value) for value, kind in arguments]
        self.enqueue(lambda: kernel(*grid, block, *values))

    # -- the queue ---------------------------------------------------------------------------------------------------
    def enqueue(self, operation: Callable[[], None]) -> None:
        if self.capturing:
            self._recording.append(operation)
        else:
            self.enqueued += 1
            self._queue.append(operation)

    def _drain(self) -> None:
        queue, self._queue = self._queue, []
        for operation in queue:
            operation()


# -- kernels as plain C++ ----------------------------------------------------------------------------------------------
_PRELUDE = """
struct uint4 { unsigned x, y, z, w; };
struct Index { int x, y, z; };
static Index threadIdx, blockIdx, blockDim;
#define __global__
"""
_LAUNCHER = """
extern "C" void launch(int gx, int gy, int gz, int block, const CacheTensor* tensors, const long long* partner, int images,
                       int slots, int first, int heads, int units)
{
    blockDim = {block, 1, 1};
    for (int z = 0; z < gz; ++z) for (int y = 0; y < gy; ++y) for (int x = 0; x < gx; ++x)
        for (int t = 0; t < block; ++t) {
            blockIdx = {x, y, z};
            threadIdx = {t, 0, 0};
            move_rows(tensors, partner, images, slots, first, heads, units);
        }
}
"""


@cache
def host_kernel(source: str, name: str) -> Any:
    """The kernel ``move_rows`` as a function of (grid x, y, z, block, arguments); skips where there is no C++ compiler."""
    assert name == "move_rows"
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for the kernel's source")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        command = [compiler, "-x", "c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-o", str(library), "-"]
        subprocess.run(command, input=_PRELUDE + source + _LAUNCHER, text=True, check=True)
        return ctypes.CDLL(str(library)).launch


# -- TensorRT ------------------------------------------------------------------------------------------------------------
class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, INT32, UINT8, BOOL = range(7)


_DTYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(uint8)": (DataType.UINT8, np.uint8),
}


def engine_file(
    graph: Path, profiles: Sequence[Mapping[str, tuple[int, int, int]]], version: str, extra: Mapping[str, Any]
) -> bytes:
    """What `FakeTensorRT` takes for a serialised engine."""
    return json.dumps({"graph": str(graph), "profiles": list(profiles), "version": version} | extra).encode()


class FakeTensorRT:
    """The module `tensorrt`, or with `rtx` the module `tensorrt_rtx`, on a `FakeDevice`."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    DataType = DataType

    def __init__(self, device: FakeDevice, version: str = "11.4.0", rtx: bool = False) -> None:
        self.device, self.__version__ = device, version
        self.deserialised: list[str] = []  # names of graphs, in order
        self._contexts: list[weakref.ref[_Context]] = []
        if rtx:
            self.IRuntimeCache = _RuntimeCache
            self.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
            self.DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])

    @property
    def contexts(self) -> list[_Context]:
        """Those that still are, in the order in which they were made."""
        return [context for made in self._contexts if (context := made()) is not None]

    def Runtime(self, logger: Any) -> _Runtime:
        return _Runtime(self, logger)


class _Runtime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        self.engine_host_code_allowed = True

    def deserialize_cuda_engine(self, content: Any) -> _Engine | None:
        assert self.engine_host_code_allowed is False
        table = json.loads(bytes(content))
        if table["version"] != self._trt.__version__:
            self._logger.log(self._trt.ILogger.ERROR, "The engine plan file is not compatible with this version")
            return None
        free, _ = self._trt.device.memory()
        if table["weight_bytes"] > free:
            self._logger.log(self._trt.ILogger.ERROR, "Requested amount of GPU memory could not be allocated: out of memory")
            return None
        self._trt.deserialised.append(Path(table["graph"]).parent.name + "/" + Path(table["graph"]).stem)
        return _Engine(self._trt, table, self._logger)


class _Engine:
    def __init__(self, trt: FakeTensorRT, table: dict[str, Any], logger: Any) -> None:
        self.trt, self.table, self.logger = trt, table, logger
        self.weights = trt.device.allocate(table["weight_bytes"], "weights")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(table["graph"], options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.nodes = self.inputs | self.outputs
        self.num_io_tensors = len(self.nodes)
        self.num_optimization_profiles = len(table["profiles"])
        self.device_memory_size_v2 = max(self.scratch({axis: r[2] for axis, r in p.items()}) for p in table["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.nodes)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _DTYPES[self.nodes[name].type][0]

    def create_runtime_config(self) -> _Config:
        return _Config()

    def create_execution_context(self, config: _Config) -> _Context:
        assert config.strategy is FakeTensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        context = _Context(self, config)
        self.trt._contexts.append(weakref.ref(context))
        return context

    @staticmethod
    def scratch(axes: Mapping[str, int]) -> int:
        """Activation memory for these lengths: more for more of anything."""
        return 256 * (1 + sum(axes.values()))


class _Config:
    strategy: Any = None
    cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache()

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        self.cache = cache
        return True


class _RuntimeCache:
    content = b"compiled"

    def deserialize(self, blob: bytes) -> bool:
        return blob == self.content

    def serialize(self) -> bytes:
        return self.content


class _Context:
    def __init__(self, engine: _Engine, config: _Config) -> None:
        self.engine, self.config = engine, config
        self.memory: tuple[int, int] | None = None
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        if hasattr(engine.trt, "IRuntimeCache") or "capturable" in engine.table:
            self.is_stream_capturable = self._is_stream_capturable

    def _refuse(self, why: str) -> bool:
        self.engine.logger.log(FakeTensorRT.ILogger.ERROR, why)
        return False

    def _is_stream_capturable(self, stream: int) -> bool:
        assert stream == self.engine.trt.device.stream
        assert not self.engine.trt.device.capturing, "it may do what cannot be recorded"
        return self.engine.table.get("capturable", True)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self.engine.trt.device.stream
        self.profile = index
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        profile = self.engine.table["profiles"][self.profile]
        declared = self.engine.inputs[name].shape
        for axis, length in zip(declared, shape, strict=True):
            least, _, most = profile[axis] if isinstance(axis, str) else (axis, axis, axis)
            if not least <= length <= most:
                return self._refuse(f"{name}: {axis} = {length} is outside [{least}, {most}]")
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(self.engine.inputs.keys() - self.shapes.keys())

    @property
    def axes(self) -> dict[str, int]:
        pairs = [
            pair for name, shape in self.shapes.items() for pair in zip(self.engine.inputs[name].shape, shape, strict=True)
        ]
        axes = {axis: length for axis, length in pairs if isinstance(axis, str)}
        if "token_rows" in axes:  # the VAE's
            axes |= {"height": 16 * axes["token_rows"], "width": 16 * axes["token_columns"]}
        return {"B": axes.get("R", 0) // 2} | axes  # guide's B is half its R

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.axes[axis] if isinstance(axis, str) else axis for axis in self.engine.nodes[name].shape)

    def update_device_memory_size_for_shapes(self) -> int:
        return 0 if self.engine.table.get("answers_zero") else self.engine.scratch(self.axes)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.scratch(self.axes)
        self.memory = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.nodes
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.engine.trt.device.stream
        if self.memory is None or self.addresses.keys() != self.engine.nodes.keys():
            return self._refuse("there is no memory, or not every tensor has an address")
        device, addresses, memory, engine = self.engine.trt.device, dict(self.addresses), self.memory, self.engine
        shapes = {name: self.get_tensor_shape(name) for name in engine.nodes}

        def operation() -> None:
            device.check(*memory)
            ctypes.memset(memory[0], POISON, memory[1])
            binding = engine.session.io_binding()
            for name, node in engine.nodes.items():
                dtype = _DTYPES[node.type][1]
                device.check(addresses[name], int(np.prod(shapes[name])) * np.dtype(dtype).itemsize)
                bind = binding.bind_input if name in engine.inputs else binding.bind_output
                bind(name, "cpu", 0, dtype, list(shapes[name]), addresses[name])
            engine.session.run_with_iobinding(binding)

        device.enqueue(operation)
        return True
