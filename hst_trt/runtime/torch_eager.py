"""The torch backend: the reference modules behind the Engine protocol, on the CPU or on a GPU.

It is the plain reference beside the fast paths: same loop, same buffers, torch's arithmetic. On a GPU it records and replays
steps as the TensorRT backend does, so the loop's logic can be proved where TensorRT cannot be installed. Torch and the
modules come from the caller, so nothing here imports diffusers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..machine import Machine
from .engine import TensorInfo
from .graphs import CaptureError, GraphCache, GraphCounters

__all__ = ["TorchBackend", "TorchEngine"]

TorchFunction = Callable[..., dict[str, Tensor]]


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """Everything is enqueued on one stream, the one that is recorded; on the CPU there is none."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class _TorchCall:
    def __init__(
        self,
        function: TorchFunction,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._function, self._inputs, self._outputs, self._stream = function, inputs, outputs, stream

    @torch.no_grad()
    def execute(self) -> None:
        with _on(self._stream):
            for name, value in self._function(**self._inputs).items():
                target = self._outputs[name]
                if value.data_ptr() != target.data_ptr():
                    target.copy_(value)


@dataclass(frozen=True)
class TorchEngine:
    """A function of named tensors that returns named tensors. The backend sets the stream it runs on."""

    function: TorchFunction
    input_names: Sequence[str]
    output_names: Sequence[str]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None

    def prepare(self, bindings: Mapping[str, Tensor]) -> _TorchCall:
        inputs = {name: bindings[name] for name in self.input_names}
        outputs = {name: bindings[name] for name in self.output_names}
        return _TorchCall(self.function, inputs, outputs, self.stream)


class _TorchGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        with _on(self._stream):
            self._graph.replay()


class TorchBackend:
    """Runs torch functions.

    Args:
        engines: by name. On a GPU their weights must be there already.
        device: where buffers are: ``"cpu"``, or ``"cuda"`` with an ordinal if need be.

    Attributes:
        graphs: what was recorded and replayed.
    """

    def __init__(self, engines: Mapping[str, TorchEngine], device: str = "cpu") -> None:
        self._device = torch.device(device)
        self.machine = Machine(f"torch on {device}")  # by another name: what it takes says nothing of a bundle's engines
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which the weights were put there on
        self._engines = {name: replace(engine, stream=self._stream) for name, engine in engines.items()}
        self.graphs = GraphCounters()
        # All recordings take their temporaries from one pool: only one runs at a time, and none keeps any.
        self._pool = None if self._stream is None else torch.cuda.graph_pool_handle()

    def engine(self, name: str) -> TorchEngine:
        return self._engines[name]

    def release(self, names: Iterable[str]) -> None:
        """Engines are the caller's, and stay."""

    def recorder(self) -> GraphCache | None:
        return None if self._stream is None else GraphCache(self._capture, self.graphs)

    def _capture(self, body: Callable[[], None]) -> _TorchGraph:
        assert self._stream is not None
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                body()
        except RuntimeError as exc:
            torch.cuda.set_stream(before)  # which torch does not go back to if the capture could not be ended
            raise CaptureError(str(exc).splitlines()[0]) from exc
        return _TorchGraph(graph, self._stream)

    def memory(self) -> tuple[int, int] | None:
        return None if self._stream is None else torch.cuda.mem_get_info(self._device)

    # -- buffers -----------------------------------------------------------------------------------------------------
    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        with _on(self._stream):
            return torch.zeros(tuple(shape), dtype=getattr(torch, dtype), device=self._device)

    def view(self, buffer: Tensor, shape: Sequence[int]) -> Tensor:
        return buffer.view(-1)[: int(np.prod(shape))].view(tuple(shape))

    def write(self, buffer: Tensor, values: np.ndarray) -> None:
        with _on(self._stream):
            buffer.copy_(torch.from_numpy(np.array(values)).expand(buffer.shape))

    def read(self, buffer: Tensor) -> np.ndarray:
        with _on(self._stream):
            return buffer.cpu().numpy().copy()

    def copy(self, source: Tensor, target: Tensor) -> None:
        with _on(self._stream):
            target.copy_(source)

    def move_rows(self, caches: Sequence[Tensor], partner: Tensor, first: int, text_rows: Sequence[int]) -> None:
        with _on(self._stream):
            source = partner[:, first:].repeat(caches[0].shape[0] // partner.shape[0], 1)  # [R, N - first]
            for cache, offset in zip(caches, text_rows, strict=True):
                index = (source + offset)[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
                cache[:, :, first + offset : offset + partner.shape[1]] = cache.gather(2, index)

    # -- time --------------------------------------------------------------------------------------------------------
    def mark(self) -> Any:
        """On a GPU an event, on the CPU seconds."""
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        if self._stream is None:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
