"""Pictures that were asked for by URL, kept for a while under names that cannot be guessed."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict

__all__ = ["PictureStore"]


class PictureStore:
    """Keeps the last files, in memory: at most `most_bytes` of them, each for `seconds`. Any thread may use it."""

    def __init__(self, most_bytes: int = 256 << 20, seconds: float = 3600.0) -> None:
        self._most, self._seconds = most_bytes, seconds
        self._files: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # the oldest first
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, content: bytes, suffix: str) -> str:
        """Keeps a file and returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        with self._lock:
            self._files[name] = time.monotonic() + self._seconds, content
            self._bytes += len(content)
            self._drop_old()
        return name

    def get(self, name: str) -> bytes | None:
        with self._lock:
            self._drop_old()
            file = self._files.get(name)
        return None if file is None else file[1]

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._files:
            until, content = next(iter(self._files.values()))
            if self._bytes <= self._most and now < until:
                return
            self._files.popitem(last=False)
            self._bytes -= len(content)
