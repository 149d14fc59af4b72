"""The ONNX Runtime backend: buffers are numpy arrays, calls are bound once and then run without copies.

The K/V cache is updated in place by binding each ``present_*`` output to the memory of its ``past_*`` input, which ONNX
Runtime's TensorScatter recognises; then only the written rows are touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..errors import BuildError, ResourceError
from ..machine import cpu
from ..tensor_names import GLUE
from .engine import TensorInfo

__all__ = ["HostBuffer", "OnnxRuntimeBackend"]

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8"}


@dataclass(frozen=True)
class HostBuffer:
    """A contiguous array and ONNX Runtime's handle on the same memory."""

    array: np.ndarray
    value: ort.OrtValue

    @classmethod
    def of(cls, array: np.ndarray) -> HostBuffer:
        return cls(array, ort.OrtValue.ortvalue_from_numpy(array))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


class _BoundCall:
    def __init__(self, session: ort.InferenceSession, bindings: Mapping[str, HostBuffer], name: str) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._name = name
        self._buffers = dict(bindings)  # keeps the memory alive as long as the call
        for node in session.get_inputs():
            self._binding.bind_ortvalue_input(node.name, bindings[node.name].value)
        for node in session.get_outputs():
            self._binding.bind_ortvalue_output(node.name, bindings[node.name].value)

    def execute(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except ort.capi.onnxruntime_pybind11_state.RuntimeException as exc:
            raise _translated(exc, self._name) from exc


class OnnxEngine:
    """One session."""

    def __init__(self, name: str, session: ort.InferenceSession) -> None:
        self.name = name
        self._session = session
        self.input_names = tuple(node.name for node in session.get_inputs())
        self.output_names = tuple(node.name for node in session.get_outputs())
        nodes = (*session.get_inputs(), *session.get_outputs())
        self.tensors = {node.name: TensorInfo(_DTYPES.get(node.type, node.type), tuple(node.shape)) for node in nodes}

    def prepare(self, bindings: Mapping[str, HostBuffer]) -> _BoundCall:
        missing = [name for name in (*self.input_names, *self.output_names) if name not in bindings]
        assert not missing, f"{self.name}: nothing is bound to {missing}"
        return _BoundCall(self._session, bindings, self.name)


class OnnxRuntimeBackend:
    """Runs graphs on the CPU.

    Args:
        graphs: the file of each graph, by name.
        threads: threads of each session; 0 lets ONNX Runtime take one per physical core.
    """

    def __init__(self, graphs: Mapping[str, Path], threads: int = 0) -> None:
        self.machine = cpu(threads)
        self._graphs = dict(graphs)
        self._threads = threads
        self._engines: dict[str, OnnxEngine] = {}

    def engine(self, name: str) -> OnnxEngine:
        if name not in self._engines:
            self._engines[name] = OnnxEngine(name, self._session(name))
        return self._engines[name]

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            self._engines.pop(name, None)

    def recorder(self) -> None:
        """ONNX Runtime's CPU provider has nothing to record."""

    def _session(self, name: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1 if name in GLUE else self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Idle workers must not spin: the sessions of a step take turns, and would steal each other's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return ort.InferenceSession(str(self._graphs[name]), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime's exceptions share no base of their own
            raise _translated(exc, name) from exc

    def memory(self) -> None:
        """Buffers are in the host's memory."""

    # -- buffers -----------------------------------------------------------------------------------------------------
    def empty(self, shape: Sequence[int], dtype: str) -> HostBuffer:
        try:
            return HostBuffer.of(np.zeros(shape, dtype))
        except MemoryError as exc:
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            raise ResourceError(
                f"a buffer of shape {tuple(shape)} needs {size / 2**20:.0f} MiB, which are not free",
                fix="ask for fewer images at once or a smaller size",
            ) from exc

    def view(self, buffer: HostBuffer, shape: Sequence[int]) -> HostBuffer:
        return HostBuffer.of(buffer.array.reshape(-1)[: int(np.prod(shape))].reshape(shape))

    def write(self, buffer: HostBuffer, values: np.ndarray) -> None:
        np.copyto(buffer.array, values)

    def read(self, buffer: HostBuffer) -> np.ndarray:
        return buffer.array.copy()

    def copy(self, source: HostBuffer, target: HostBuffer) -> None:
        np.copyto(target.array, source.array)

    def move_rows(
        self,
        caches: Sequence[HostBuffer],
        partner: HostBuffer,
        first: int,
        text_rows: Sequence[int],
    ) -> None:
        images = partner.shape[0]
        for image in range(images):
            target = np.flatnonzero(partner.array[image, first:] != np.arange(first, partner.shape[1])) + first
            leaving = partner.array[image, target]
            for cache, offset in zip(caches, text_rows, strict=True):
                rows = cache.array[image::images]  # the image's negative and positive row, a view
                rows[:, :, target + offset] = rows[:, :, leaving + offset]

    # -- time --------------------------------------------------------------------------------------------------------
    def mark(self) -> float:
        return time.perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        return end - start


def _translated(exc: Exception, name: str) -> Exception:
    text = str(exc).strip()
    if "bad_alloc" in text or "Failed to allocate memory" in text:
        return ResourceError(
            f"the graph {name!r} ran out of memory", found=text, fix="ask for fewer images at once or a smaller size"
        )
    return BuildError(f"ONNX Runtime could not run the graph {name!r}", found=text, fix="run `hst-trt verify` on the bundle")
