"""TensorRT-RTX's runtime cache: kernels that it compiled on this machine, kept for the next process.

TensorRT-RTX checks by itself that a cache is for this GPU, driver and version, and takes none that is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

from ..disk import user_cache
from .cuda import CudaDevice

__all__ = ["RtxCache"]

log = logging.getLogger(__name__)


class RtxCache:
    """One cache for all contexts of a backend; written to disk when the backend is gone or the process ends."""

    def __init__(self, trt: ModuleType, device: CudaDevice) -> None:
        self._path = user_cache() / f"tensorrt-rtx-{trt.__version__}-sm{device.sm}.cache"
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Makes the contexts of a runtime config use the cache."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                taken = self._cache.deserialize(self._path.read_bytes())
                log.info("%s was %s", self._path, "taken" if taken else "not taken: it is of another GPU, driver or version")
            weakref.finalize(self, _save, self._cache, self._path)
        config.set_runtime_cache(self._cache)


def _save(cache: Any, path: Path) -> None:
    content = cache.serialize()
    if content is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_bytes(bytes(content))
        beside.replace(path)
    except OSError as exc:
        log.warning("compiled kernels could not be kept in %s: %s", path, exc)
