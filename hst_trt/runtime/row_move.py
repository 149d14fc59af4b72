"""The row move of a mask change on a GPU: one launch of the kernel in ``row_move.cu`` for all cache tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from .cuda import CudaDevice, Kernel

__all__ = ["RowMove", "cache_table", "kernel_source"]

_WARPS = 8  # of a block, a slot each: most slots stay where they are, and their warp is done at once
_UNIT = 16  # bytes that a lane moves at a time


def kernel_source() -> str:
    return files(__package__).joinpath("row_move.cu").read_text(encoding="utf-8")


def cache_table(addresses: Sequence[int], shapes: Sequence[tuple[int, ...]], text_rows: Sequence[int]) -> np.ndarray:
    """The kernel's table of cache tensors: address, rows of a head, rows before slot 0; int64 [tensors, 3]."""
    rows = zip(addresses, (shape[2] for shape in shapes), text_rows, strict=True)
    return np.array(list(rows), np.int64)


class RowMove:
    """The kernel, bound to one set of cache tensors, which must outlive it.

    Args:
        device: where they are.
        kernel: ``move_rows``, compiled for it.
        table: the address of their `cache_table` on the device.
        shapes: [rows, heads, length, head_dim] of each; all but the length are the same for all.
        item_bytes: of an element.
    """

    def __init__(
        self, device: CudaDevice, kernel: Kernel, table: int, shapes: Sequence[tuple[int, ...]], item_bytes: int
    ) -> None:
        self._device, self._kernel, self._table, self._tensors = device, kernel, table, len(shapes)
        self._rows, self._heads, _, head_dim = shapes[0]
        assert head_dim * item_bytes % _UNIT == 0, f"rows of {head_dim * item_bytes} bytes are no multiple of {_UNIT}"
        self._units = head_dim * item_bytes // _UNIT

    def enqueue(self, partner: int, images: int, slots: int, first: int) -> None:
        """Moves the rows of the slots from `first` on; `partner` is the address of [images, slots] int64."""
        grid = (-(-(slots - first) // _WARPS), self._tensors, self._rows)
        pointers = [(self._table, ctypes.c_void_p), (partner, ctypes.c_void_p)]
        numbers = [(value, ctypes.c_int) for value in (images, slots, first, self._heads, self._units)]
        self._device.launch(self._kernel, grid, 32 * _WARPS, [*pointers, *numbers])
