"""Pinned host memory that values pass through on their way to the device and back.

A write is enqueued and does not wait, so its values must stay where they are until the copy is done: writes take one piece
of a ring after the other, and only when the ring is full does the host wait.
"""

from __future__ import annotations

import numpy as np

from .cuda import CudaDevice, Pinned

__all__ = ["Staging"]

_RING = 16 * 2**20  # bytes: more than a request of the largest pair writes


class Staging:
    """Owns the pinned memory of one device."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._ring: Pinned | None = None
        self._used = 0
        self._landing: Pinned | None = None

    def write(self, values: np.ndarray, address: int) -> None:
        """Enqueues a copy of contiguous values to the device."""
        if self._ring is None or self._used + values.nbytes > len(self._ring.bytes):
            self._device.synchronize()
            self._used = 0
            if self._ring is None or values.nbytes > len(self._ring.bytes):
                self._ring = self._device.pinned(max(_RING, values.nbytes))
        piece = self._ring.bytes[self._used : self._used + values.nbytes]
        piece[:] = values.reshape(-1).view(np.uint8)
        self._device.upload(piece, address)
        self._used += values.nbytes

    def read(self, address: int, size: int) -> np.ndarray:
        """A copy of `size` bytes of the device, uint8; waits for everything that was enqueued."""
        if self._landing is None or len(self._landing.bytes) < size:
            self._landing = self._device.pinned(size)
        piece = self._landing.bytes[:size]
        self._device.download(address, piece)
        self._device.synchronize()
        self._used = 0
        return piece.copy()
