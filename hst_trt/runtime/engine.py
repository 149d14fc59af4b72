"""What a backend must offer: buffers, and engines that run on them. The loop above knows nothing else of a backend.

A call is *prepared* once for fixed buffers, which fixes every shape and address, and then *executed* any number of times.
Where a backend can record what it enqueues, it has a *recorder*, which runs a body of calls once, records it the second
time, and replays the recording from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..machine import Machine

__all__ = ["Backend", "Buffer", "Engine", "PreparedCall", "Recorder", "TensorInfo"]


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of an engine. Axes whose length is free are names; ``bfloat16`` is a dtype too."""

    dtype: str
    shape: tuple[int | str, ...]


class Buffer(Protocol):
    """Memory of a fixed shape and dtype at a fixed address, owned by the backend that made it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class PreparedCall(Protocol):
    """An engine bound to buffers. The buffers must outlive it; not for use by two threads at once."""

    def execute(self) -> None:
        """Computes the outputs from what the inputs hold now; returns when later reads of the outputs are ordered."""
        ...


class Engine(Protocol):
    """One loaded graph."""

    @property
    def input_names(self) -> Sequence[str]: ...
    @property
    def output_names(self) -> Sequence[str]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Inputs and outputs by name. One that is left out is float32 and takes any shape that its formula allows."""
        ...

    def prepare(self, bindings: Mapping[str, Any]) -> PreparedCall:
        """Binds every input and output to a `Buffer`; shapes are theirs.

        An output may be bound to an input's buffer only for ``present_*`` and ``past_*``, which are updated in place.
        """
        ...


class Recorder(Protocol):
    """Runs bodies of calls, and replays what it recorded of them. It keeps what it recorded only as long as it lives."""

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Does what `body` does. `key` must hold everything that decides which calls `body` makes on which buffers: a body
        that was recorded under an equal key is replayed, and not called."""
        ...


class Backend(Protocol):
    """Makes buffers and loads engines. `Buffer` is opaque: only the backend that made one looks inside."""

    @property
    def machine(self) -> Machine:
        """What computes."""
        ...

    def memory(self) -> tuple[int, int] | None:
        """Bytes of the device's own memory that are free and that there are; None where buffers are in the host's."""
        ...

    def engine(self, name: str) -> Engine:
        """The engine of that name (`hst_trt.tensor_names`), loaded on first use and kept."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """Frees those engines that are loaded, and other memory that nothing uses any more.

        Calls prepared from them, and recordings with such calls, must be gone.
        """
        ...

    def recorder(self) -> Recorder | None:
        """A new recorder; None where calls cannot be recorded."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A new buffer; what it holds is undefined."""
        ...

    def view(self, buffer: Any, shape: Sequence[int]) -> Any:
        """The first elements of a contiguous buffer under another shape, sharing its memory."""
        ...

    def write(self, buffer: Any, values: np.ndarray) -> None:
        """Fills a buffer with values that broadcast to its shape."""
        ...

    def read(self, buffer: Any) -> np.ndarray:
        """A copy of the buffer's values; waits for everything that was executed before."""
        ...

    def copy(self, source: Any, target: Any) -> None:
        """Copies a buffer; a target with one axis more in front gets one copy for each of its rows."""
        ...

    def move_rows(self, caches: Sequence[Any], partner: Any, first: int, text_rows: Sequence[int]) -> None:
        """The one-way row move of a mask change, in place.

        Args:
            caches: buffers [R, heads, rows, head_dim]; row r belongs to image r modulo B.
            partner: buffer [B, N] int64, the slot whose row comes to each slot (itself where nothing moves).
            first: slots below this one stay as they are (the next call rewrites them); those read are all below it.
            text_rows: for each cache, how many of its rows stand before slot 0.
        """
        ...

    def mark(self) -> Any:
        """A point in time: when everything that was executed before is done."""
        ...

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another; waits until `end` is reached."""
        ...
