"""What a backend must offer: buffers, and engines that run on them. The loop above knows nothing else of a backend.

A call is *prepared* once for fixed buffers (that fixes every shape and address), then *executed* any number of times; where
a backend can record launches, *capture* turns the prepared call into a graph that later executions replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["Backend", "Buffer", "Engine", "PreparedCall"]


class Buffer(Protocol):
    """Memory of a fixed shape and dtype at a fixed address, owned by the backend that made it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class PreparedCall(Protocol):
    """An engine bound to buffers. The buffers must outlive it; not for use by two threads at once."""

    def execute(self) -> None:
        """Computes the outputs from what the inputs hold now; returns when later reads of the outputs are ordered."""
        ...

    def capture(self) -> None:
        """Records the call for replay where the backend can; elsewhere does nothing."""
        ...


class Engine(Protocol):
    """One loaded graph."""

    @property
    def input_names(self) -> Sequence[str]: ...
    @property
    def output_names(self) -> Sequence[str]: ...
    @property
    def output_widths(self) -> Mapping[str, int]:
        """The length of each output's last axis, where it is static."""
        ...

    def prepare(self, bindings: Mapping[str, Any]) -> PreparedCall:
        """Binds every input and output to a `Buffer`; shapes are theirs.

        An output may be bound to an input's buffer only for ``present_*`` and ``past_*``, which are updated in place.
        """
        ...


class Backend(Protocol):
    """Makes buffers and loads engines. `Buffer` is opaque: only the backend that made one looks inside."""

    def engine(self, name: str) -> Engine:
        """The engine of that name (`hst_trt.tensor_names`), loaded on first use and kept."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> Any: ...
    def view(self, buffer: Any, shape: Sequence[int]) -> Any:
        """The first elements of a contiguous buffer under another shape, sharing its memory."""
        ...

    def write(self, buffer: Any, values: np.ndarray) -> None: ...
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
