"""Recordings of what a body of calls enqueues, kept by key: the same for our own CUDA graphs and for torch's.

A body runs plainly the first time, which prepares and warms up whatever it touches, is recorded the second time, and is
replayed from then on. What cannot be recorded keeps running plainly: slower, with the same result.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["CAPACITY", "CaptureError", "GraphCache", "GraphCounters", "Recording"]

log = logging.getLogger(__name__)
CAPACITY = 64  # recordings of one request shape; a plan needs 4 to 6, a threshold mask two more for each bucket


class CaptureError(Exception):
    """A body could not be recorded; nothing of it was executed."""


class Recording(Protocol):
    """What was recorded. It is freed with the object."""

    def launch(self) -> None:
        """Enqueues it all. Does not wait."""
        ...


@dataclass
class GraphCounters:
    """What a backend's caches did: `plain` counts bodies that ran as they are, `fallen_back` keys that never will otherwise."""

    plain: int = 0
    recorded: int = 0
    replayed: int = 0
    evicted: int = 0
    fallen_back: int = 0


class GraphCache:
    """A `hst_trt.runtime.engine.Recorder`.

    Args:
        capture: records a body without executing it, or raises `CaptureError`.
        counters: where to count; caches of one backend share them, and with them the one warning.
        capacity: how many recordings are kept; the one used longest ago goes first.
    """

    def __init__(
        self, capture: Callable[[Callable[[], None]], Recording], counters: GraphCounters, capacity: int = CAPACITY
    ) -> None:
        self._capture, self._counters, self._capacity = capture, counters, capacity
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._warm: set[Hashable] = set()
        self._refused: set[Hashable] = set()

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        recording = self._recordings.get(key) or self._record(key, body)
        if recording is None:
            body()
            self._warm.add(key)
            self._counters.plain += 1
            return
        self._recordings.move_to_end(key)
        recording.launch()
        self._counters.replayed += 1

    def clear(self) -> None:
        """Drops all recordings, because an address in them is no longer valid. Bodies stay warm: they are recorded anew."""
        self._recordings.clear()

    def _record(self, key: Hashable, body: Callable[[], None]) -> Recording | None:
        if key not in self._warm or key in self._refused:
            return None
        try:
            recording = self._capture(body)
        except CaptureError as exc:
            self._refused.add(key)
            if not self._counters.fallen_back:
                log.warning("calls are enqueued one by one, which is slower: a CUDA graph could not be captured (%s)", exc)
            self._counters.fallen_back += 1
            return None
        self._counters.recorded += 1
        self._recordings[key] = recording
        if len(self._recordings) > self._capacity:
            self._recordings.popitem(last=False)
            self._counters.evicted += 1
        return recording
