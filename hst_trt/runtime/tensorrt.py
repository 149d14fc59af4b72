"""The TensorRT backend: engines of a bundle on one GPU, for TensorRT and TensorRT-RTX alike.

Everything is enqueued on one stream. Engines are native code, so the very bytes that were hashed are deserialised, and code
in them that would run on the host is refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..bundle import Bundle, FileEntry
from ..errors import IncompatibleError, IntegrityError, ResourceError
from ..machine import Machine
from .cuda import CudaDevice, Event, Memory, out_of_memory
from .device_buffer import DeviceBuffer, host_dtype
from .graphs import GraphCache, GraphCounters
from .row_move import RowMove, cache_table, kernel_source
from .rtx_cache import RtxCache
from .staging import Staging
from .trt_engine import Arena, ErrorLog, TensorRTEngine, says_out_of_memory

__all__ = ["TensorRTBackend"]

log = logging.getLogger(__name__)
_CHUNK = 16 * 2**20


class TensorRTBackend:
    """Runs the engines of a bundle; a `hst_trt.runtime.engine.Backend`. Not for use by two threads at once.

    Args:
        bundle: complete, for TensorRT or TensorRT-RTX.
        device: the GPU; opening it has shown that there is a driver.
        trt: the module that the bundle's engines are of.

    Raises:
        IncompatibleError: the engines are for another GPU or another version of TensorRT.

    Attributes:
        device: the GPU; its `waits` counts how often the host waited for it.
        graphs: what was recorded and replayed.
    """

    def __init__(self, bundle: Bundle, device: CudaDevice, trt: ModuleType) -> None:
        _check_fits(bundle, device, trt)
        self.device = device
        self.machine = Machine(device.name)
        self.graphs = GraphCounters()
        self._bundle, self._trt = bundle, trt
        self._errors = ErrorLog()
        self._logger = _logger(trt, self._errors)  # TensorRT's objects use it as long as they live
        self._runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = False
        self._configure = partial(_configure, trt, RtxCache(trt, device)) if hasattr(trt, "IRuntimeCache") else _as_it_is
        self._staging = Staging(device)
        self._recorders: weakref.WeakSet[GraphCache] = weakref.WeakSet()
        self._arena = Arena(device, partial(_forget_recordings, self._recorders))
        self._engines: dict[str, TensorRTEngine] = {}
        self._move_kernel = device.kernel(kernel_source(), "move_rows")  # here, where it is said early if it cannot be made
        self._moves: weakref.WeakKeyDictionary[Memory, tuple[RowMove, DeviceBuffer]] = weakref.WeakKeyDictionary()

    # -- engines -------------------------------------------------------------------------------------------------------
    def engine(self, name: str) -> TensorRTEngine:
        if name not in self._engines:
            self.device.activate()
            self._engines[name] = self._load(name)
        return self._engines[name]

    def release(self, names: Iterable[str]) -> None:
        self.device.synchronize()
        for name in names:
            self._engines.pop(name, None)
        self._arena.fit()

    def recorder(self) -> GraphCache:
        recorder = GraphCache(self.device.capture, self.graphs)
        self._recorders.add(recorder)
        return recorder

    def _load(self, name: str) -> TensorRTEngine:
        manifest = self._bundle.manifest
        entry = manifest.engines[name]
        content = _read_checked(self._bundle.path, entry.path, manifest.files[entry.path])
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            found = self._errors.take()
            if says_out_of_memory(found):
                raise out_of_memory(f"the engine {name}", len(content), *self.device.memory())
            raise IncompatibleError(
                f"TensorRT cannot load the engine {name}",
                found=found,
                fix="build the bundle again on this machine: `hst-trt build --force`",
            )
        graph = manifest.graphs[name]
        return TensorRTEngine(name, graph, entry, engine, self._trt, self.device, self._arena, self._errors, self._configure)

    def memory(self) -> tuple[int, int]:
        self.device.activate()
        return self.device.memory()

    # -- buffers -------------------------------------------------------------------------------------------------------
    def empty(self, shape: Sequence[int], dtype: str) -> DeviceBuffer:
        self.device.activate()
        size = int(np.prod(shape, dtype=np.int64)) * host_dtype(dtype).itemsize
        return DeviceBuffer(tuple(shape), dtype, self.device.allocate(size, f"a buffer of shape {tuple(shape)}"))

    def view(self, buffer: DeviceBuffer, shape: Sequence[int]) -> DeviceBuffer:
        return DeviceBuffer(tuple(shape), buffer.dtype, buffer.memory)

    def write(self, buffer: DeviceBuffer, values: np.ndarray) -> None:
        self.device.activate()
        dtype = host_dtype(buffer.dtype)
        if values.size == 1 and not values.any():
            self.device.fill(buffer.address, 0, buffer.nbytes)
        else:
            assert buffer.dtype != "bfloat16" or values.dtype == dtype, "only the bits of bfloat16 values can be written"
            array = np.ascontiguousarray(np.broadcast_to(values.astype(dtype, copy=False), buffer.shape))
            self._staging.write(array, buffer.address)

    def read(self, buffer: DeviceBuffer) -> np.ndarray:
        self.device.activate()
        return self._staging.read(buffer.address, buffer.nbytes).view(host_dtype(buffer.dtype)).reshape(buffer.shape)

    def copy(self, source: DeviceBuffer, target: DeviceBuffer) -> None:
        for offset in range(0, target.nbytes, source.nbytes):
            self.device.copy(source.address, target.address + offset, source.nbytes)

    def move_rows(self, caches: Sequence[DeviceBuffer], partner: DeviceBuffer, first: int, text_rows: Sequence[int]) -> None:
        owner = caches[0].memory
        if owner not in self._moves:
            self._moves[owner] = self._row_move(caches, text_rows)
        move, _ = self._moves[owner]
        images, slots = partner.shape
        move.enqueue(partner.address, images, slots, first)

    def _row_move(self, caches: Sequence[DeviceBuffer], text_rows: Sequence[int]) -> tuple[RowMove, DeviceBuffer]:
        """The kernel for these tensors, and its table, which lives as long as the first of them."""
        shapes = [cache.shape for cache in caches]
        rows = cache_table([cache.address for cache in caches], shapes, text_rows)
        table = self.empty(rows.shape, "int64")
        self.write(table, rows)
        item_bytes = host_dtype(caches[0].dtype).itemsize
        return RowMove(self.device, self._move_kernel, table.address, shapes, item_bytes), table

    # -- time ----------------------------------------------------------------------------------------------------------
    def mark(self) -> Event:
        return self.device.record()

    def elapsed(self, start: Event, end: Event) -> float:
        return self.device.seconds(start, end)


# Not methods: what keeps them would keep the backend, and with it the engines' memory.
def _forget_recordings(recorders: Iterable[GraphCache]) -> None:
    for recorder in recorders:
        recorder.clear()


def _configure(trt: ModuleType, cache: RtxCache, config: Any) -> None:
    """Settings that TensorRT-RTX has: it must not record graphs within ours, nor exchange kernels after they are recorded."""
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    cache.attach(config)


def _as_it_is(config: Any) -> None:
    """TensorRT has no such settings."""


def _check_fits(bundle: Bundle, device: CudaDevice, trt: ModuleType) -> None:
    target = bundle.manifest.target
    if device.sm not in target.sms:
        raise IncompatibleError(
            f"the engines of {bundle.path} are for another GPU",
            found=f"{device.name} has compute capability {device.sm / 10}, they are for "
            + ", ".join(str(sm / 10) for sm in target.sms),
            fix="build a bundle for this one: `hst-trt build --gpu auto`",
        )
    if trt.__version__ != target.backend_version:
        raise IncompatibleError(
            f"the engines of {bundle.path} were built by another {target.backend}",
            found=f"{trt.__version__} is installed, they are of {target.backend_version}",
            fix=f"install {target.backend_version}, or build them again: `hst-trt build --gpu {target.name} --force`",
        )


def _read_checked(folder: Path, name: str, entry: FileEntry) -> bytearray:
    """The file's bytes, hashed while they are read; what is returned is what was hashed.

    Raises:
        IntegrityError: it is missing, or not what the manifest says.
        ResourceError: there is not enough memory on the host.
    """
    fix = "run `hst-trt build --force` again"
    digest = hashlib.sha256()
    try:
        with (folder / name).open("rb") as stream, ThreadPoolExecutor(max_workers=1) as hasher:
            size = os.fstat(stream.fileno()).st_size
            if size != entry.bytes:
                raise IntegrityError(
                    f"{folder}: {name} is not the file that was built",
                    found=f"{size} bytes instead of {entry.bytes}",
                    fix=fix,
                )
            content = bytearray(size)
            view = memoryview(content)
            for start in range(0, size, _CHUNK):
                piece = view[start : start + _CHUNK]
                filled = 0
                while filled < len(piece) and (count := stream.readinto(piece[filled:])):
                    filled += count
                hasher.submit(digest.update, piece)
    except OSError as exc:
        raise IntegrityError(f"{folder}: {name} is missing or cannot be read", found=exc.strerror, fix=fix) from exc
    except MemoryError as exc:
        raise ResourceError(
            f"{name} has {entry.bytes / 2**20:.0f} MiB, and the host has not so much memory free",
            fix="end what else uses memory",
        ) from exc
    if digest.hexdigest() != entry.sha256:
        raise IntegrityError(f"{folder}: {name} is not the file that was built", found=f"sha256 {digest.hexdigest()}", fix=fix)
    return content


def _logger(trt: ModuleType, errors: ErrorLog) -> Any:
    """A TensorRT logger: errors are kept for the exception that follows, the rest goes to our own log."""

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.add(message)
            elif severity == trt.ILogger.WARNING:
                log.info("%s", message)
            else:
                log.debug("%s", message)

    return Logger()
