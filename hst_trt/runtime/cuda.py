"""A thin, typed layer over cuda.bindings: one device, one stream, and errors that say what to do.

Everything is enqueued on one stream of our own, so nothing needs to be ordered by hand, and the stream can be captured.
cuda.bindings imports without a driver; `CudaDevice` asks for one before anything else of a GPU is touched, because making a
TensorRT runtime without a driver ends the process.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import BuildError, HstError, IncompatibleError, MissingError, ResourceError
from .graphs import CaptureError

__all__ = ["CudaDevice", "Event", "Graph", "Kernel", "Memory", "Pinned", "compile_kernel", "out_of_memory"]

_INSTALL = 'pip install "hst_trt[tensorrt]"'


class Memory:
    """Bytes on the device, freed with the object."""

    def __init__(self, device: CudaDevice, address: int, size: int) -> None:
        self._device, self.address, self.size = device, address, size

    def __del__(self) -> None:
        self._device.free(self.address)


class Pinned:
    """Host memory that does not move, freed with the object: `bytes` is it as uint8 [size]."""

    def __init__(self, device: CudaDevice, address: int, size: int) -> None:
        self._device, self._address = device, address
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def __del__(self) -> None:
        self._device.free_pinned(self._address)


class Event:
    """A point in the stream."""

    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self._device, self.handle = device, handle

    def __del__(self) -> None:
        self._device.destroy_event(self.handle)


class Graph:
    """A recorded CUDA graph, ready to be launched; a `hst_trt.runtime.graphs.Recording`."""

    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self._device, self.handle = device, handle

    def launch(self) -> None:
        self._device.launch_graph(self.handle)

    def __del__(self) -> None:
        self._device.retire_graph(self.handle)


class Kernel:
    """A loaded kernel; `handle` is the driver's."""

    def __init__(self, handle: Any, module: Any) -> None:
        self.handle, self._module = handle, module


class CudaDevice:
    """One GPU and one stream on it. Not for use by two threads at once.

    Args:
        ordinal: which GPU, as CUDA counts them.

    Raises:
        MissingError: cuda-python, the driver or that GPU is not here.
        IncompatibleError: the driver is too old.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._cudart = _bindings("runtime")
        self.capturing = False  # whether a graph is being recorded: then nothing is executed, and nothing may wait
        self._unfreed: list[int] = []
        self._retired: list[Any] = []
        self.waits = 0  # how often the host waited for the device
        (count,) = self._check(self._cudart.cudaGetDeviceCount())
        if not 0 <= ordinal < count:
            raise MissingError(
                f"there is no GPU number {ordinal}", found=f"{count} GPU(s), numbered from 0", fix="give another --device"
            )
        self.ordinal = ordinal
        self.activate()
        (properties,) = self._check(self._cudart.cudaGetDeviceProperties(ordinal))
        self.name: str = properties.name.decode(errors="replace").rstrip("\0")
        self.sm: int = 10 * properties.major + properties.minor
        (stream,) = self._check(self._cudart.cudaStreamCreateWithFlags(self._cudart.cudaStreamNonBlocking))
        self.stream = int(stream)

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            self._cudart.cudaStreamSynchronize(self.stream)
            for graph in self._retired:
                self._cudart.cudaGraphExecDestroy(graph)
            self._cudart.cudaStreamDestroy(self.stream)

    def activate(self) -> None:
        """Makes this the calling thread's device; CUDA keeps one for each thread."""
        self._check(self._cudart.cudaSetDevice(self.ordinal))

    # -- memory --------------------------------------------------------------------------------------------------------
    def memory(self) -> tuple[int, int]:
        """Bytes that are free and that there are."""
        free, total = self._check(self._cudart.cudaMemGetInfo())
        return free, total

    def allocate(self, size: int, what: str) -> Memory:
        """Device memory, aligned to 256 bytes; what it holds is undefined.

        Raises:
            ResourceError: there is not so much; `what` it was meant for is named.
        """
        error, address = self._cudart.cudaMalloc(max(size, 1))
        if error == self._cudart.cudaError_t.cudaErrorMemoryAllocation:
            self._cudart.cudaGetLastError()  # it is reported here; later calls must not report it again
            raise out_of_memory(what, size, *self.memory())
        self._check((error,))
        return Memory(self, int(address), size)

    def free(self, address: int) -> None:
        """Waits for the device, as cudaFree does; while a graph is captured that would spoil it, so then it is put off."""
        if self.capturing:
            self._unfreed.append(address)
        else:
            self._cudart.cudaFree(address)

    def pinned(self, size: int) -> Pinned:
        """Host memory that the device can read and write by itself."""
        (address,) = self._check(self._cudart.cudaMallocHost(size))
        return Pinned(self, int(address), size)

    def free_pinned(self, address: int) -> None:
        self._cudart.cudaFreeHost(address)

    def fill(self, address: int, byte: int, size: int) -> None:
        self._check(self._cudart.cudaMemsetAsync(address, byte, size, self.stream))

    def copy(self, source: int, target: int, size: int) -> None:
        """From device to device."""
        self._transfer(target, source, size, "cudaMemcpyDeviceToDevice")

    def upload(self, source: np.ndarray, target: int) -> None:
        """From pinned host memory, which must stay as it is until the copy is done."""
        self._transfer(target, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, source: int, target: np.ndarray) -> None:
        """To pinned host memory, where it is after the next `synchronize`."""
        self._transfer(target.ctypes.data, source, target.nbytes, "cudaMemcpyDeviceToHost")

    def _transfer(self, target: int, source: int, size: int, kind: str) -> None:
        direction = getattr(self._cudart.cudaMemcpyKind, kind)
        self._check(self._cudart.cudaMemcpyAsync(target, source, size, direction, self.stream))

    # -- time ----------------------------------------------------------------------------------------------------------
    def synchronize(self) -> None:
        """Waits until everything is done that was enqueued."""
        self.waits += 1
        self._check(self._cudart.cudaStreamSynchronize(self.stream))
        while self._retired:
            self._cudart.cudaGraphExecDestroy(self._retired.pop())

    def record(self) -> Event:
        (handle,) = self._check(self._cudart.cudaEventCreateWithFlags(self._cudart.cudaEventDefault))
        event = Event(self, handle)
        self._check(self._cudart.cudaEventRecord(handle, self.stream))
        return event

    def seconds(self, start: Event, end: Event) -> float:
        """Between two events. Waits for `end` if it is not reached yet."""
        if self._cudart.cudaEventQuery(end.handle)[0] == self._cudart.cudaError_t.cudaErrorNotReady:
            self.waits += 1
            self._check(self._cudart.cudaEventSynchronize(end.handle))
        (milliseconds,) = self._check(self._cudart.cudaEventElapsedTime(start.handle, end.handle))
        return milliseconds / 1e3

    def destroy_event(self, handle: Any) -> None:
        self._cudart.cudaEventDestroy(handle)

    # -- graphs --------------------------------------------------------------------------------------------------------
    def capture(self, body: Callable[[], None]) -> Graph:
        """Records what `body` enqueues, without executing it.

        Raises:
            CaptureError: something in it cannot be recorded, or failed.
        """
        cudart, graph = self._cudart, None
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._check(cudart.cudaStreamBeginCapture(self.stream, mode))
            self.capturing = True
            try:
                body()
            finally:
                error, graph = cudart.cudaStreamEndCapture(self.stream)
                self.capturing = False
            self._check((error,))
            (handle,) = self._check(cudart.cudaGraphInstantiate(graph, 0))
        except HstError as exc:
            cudart.cudaGetLastError()  # it is reported here; later calls must not report it again
            raise CaptureError(": ".join(filter(None, (exc.problem, exc.found)))) from exc
        finally:
            if graph is not None and int(graph):
                cudart.cudaGraphDestroy(graph)
            while self._unfreed:
                self.free(self._unfreed.pop())
        return Graph(self, handle)

    def launch_graph(self, handle: Any) -> None:
        self._check(self._cudart.cudaGraphLaunch(handle, self.stream))

    def retire_graph(self, handle: Any) -> None:
        """Destroys a graph at the next wait: it may still be running."""
        self._retired.append(handle)

    # -- kernels -------------------------------------------------------------------------------------------------------
    def kernel(self, source: str, name: str) -> Kernel:
        """Compiles CUDA C++ for this device and loads the kernel `name` (declared ``extern "C"``).

        Raises:
            MissingError: NVRTC is not installed.
            BuildError: it does not compile or load.
        """
        image = compile_kernel(source, self.sm)
        driver = _bindings("driver")
        (module,) = self._check(driver.cuModuleLoadData(image))
        (handle,) = self._check(driver.cuModuleGetFunction(module, name.encode()))
        return Kernel(handle, module)

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], block: int, arguments: Sequence[tuple[int, Any]]) -> None:
        """Enqueues a kernel with blocks of `block` threads.

        Args:
            arguments: for each, its value and its ctypes type.
        """
        values, types = zip(*arguments, strict=True)
        driver = _bindings("driver")
        self._check(driver.cuLaunchKernel(kernel.handle, *grid, block, 1, 1, 0, self.stream, (values, types), 0))

    # -- errors --------------------------------------------------------------------------------------------------------
    def _check(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a binding returned, without its error code.

        Raises:
            HstError: what the code means.
        """
        error, *values = result
        if int(error):
            raise self._translated(error)
        return tuple(values)

    def _translated(self, error: Any) -> HstError:
        name = error.name
        if name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice"):
            return self._no_gpu(name)
        if name in ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"):
            return ResourceError(
                "CUDA has no memory left, on the GPU or of the host's that it can use directly",
                fix="ask for fewer images at once or a smaller size, or use --low-vram",
            )
        return BuildError(
            "the GPU stopped with an error", found=name, fix="run `hst-trt verify` on the bundle; if it is whole, report this"
        )

    def _no_gpu(self, name: str) -> HstError:
        driver, ours = (
            self._check(call())[0] for call in (self._cudart.cudaDriverGetVersion, self._cudart.cudaRuntimeGetVersion)
        )
        if name == "cudaErrorInsufficientDriver" and driver:
            return IncompatibleError(
                "the NVIDIA driver is too old",
                found=f"it knows CUDA {_version(driver)}, cuda-python is for {_version(ours)}",
                fix=f'update the driver, or pip install "cuda-python<{driver // 1000 + 1}"',
            )
        found = "there is a driver, but it shows no GPU" if driver else "no NVIDIA driver"
        return MissingError(
            "there is no NVIDIA GPU to run on",
            found=found,
            fix="run on a machine that has one (in a container: with --gpus all), or use a bundle for the CPU: "
            "`hst-trt build --gpu cpu`",
        )


def compile_kernel(source: str, sm: int) -> bytes:
    """CUDA C++ as machine code for a compute capability (90 for 9.0); needs no GPU.

    Raises:
        MissingError: NVRTC is not installed.
        BuildError: it does not compile.
    """
    nvrtc = _bindings("nvrtc")
    try:
        status, program = nvrtc.nvrtcCreateProgram(source.encode(), b"hst_trt.cu", 0, None, None)
    except Exception as exc:  # cuda.pathfinder raises several kinds when a library is not there
        raise MissingError(
            "NVRTC, which compiles a small kernel for the GPU, is not installed",
            found=f"{type(exc).__name__}: {str(exc).strip()}",
            fix="pip install nvidia-cuda-nvrtc",
        ) from exc
    if not int(status):
        (status,) = nvrtc.nvrtcCompileProgram(program, 2, [f"--gpu-architecture=sm_{sm}".encode(), b"--std=c++17"])
    if int(status):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        text = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, text)
        raise BuildError(
            f"a kernel does not compile for compute capability {sm / 10}",
            found=text.decode(errors="replace").strip("\0\n") or status.name,
            fix="pip install --upgrade nvidia-cuda-nvrtc",
        )
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    image = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, image)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(image)


def out_of_memory(what: str, size: int, free: int, total: int) -> ResourceError:
    return ResourceError(
        f"{what} needs {_mebibytes(size)} of GPU memory, which are not free",
        found=f"{_mebibytes(free)} of {_mebibytes(total)} are free",
        fix="ask for fewer images at once or a smaller size, use --low-vram, or end what else uses the GPU",
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.{0 if size >= 10 * 2**20 else 2}f} MiB"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _bindings(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except (ImportError, OSError) as exc:
        raise MissingError("cuda-python is not installed", found=f"{type(exc).__name__}: {exc}", fix=_INSTALL) from exc
