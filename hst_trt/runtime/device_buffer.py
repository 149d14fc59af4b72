"""A buffer in GPU memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .cuda import Memory

__all__ = ["DeviceBuffer", "host_dtype"]


def host_dtype(dtype: str) -> np.dtype:
    """How values of a buffer's dtype are held on the host. NumPy has no bfloat16: its values are held as their bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


@dataclass(frozen=True)
class DeviceBuffer:
    """Contiguous values of one dtype at the start of `memory`, which lives as long as a buffer in it."""

    shape: tuple[int, ...]
    dtype: str
    memory: Memory

    @property
    def address(self) -> int:
        return self.memory.address

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * host_dtype(self.dtype).itemsize
