"""Timing in interleaved rounds, so that a machine that is slow for a while is slow for all that is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from .journal import Journal

__all__ = ["Calls", "interleave"]

Calls = Mapping[str, Callable[[], float]]  # each makes one measurement and returns its seconds


def interleave(journal: Journal, series: str, calls: Calls, *, rounds: int, warmup: int = 1, reserve: float = 0.0) -> int:
    """Makes every measurement once a round, each written to the journal at once.

    Stops early rather than begin a round that would not leave `reserve` seconds until the part is stopped.

    Returns:
        The rounds that were made, without those that warmed up.
    """
    for number in range(-warmup, rounds):
        start = time.monotonic()
        for name, call in calls.items():
            seconds = call()
            if number >= 0:
                journal.sample(series, name, seconds)
        if number + 1 < rounds and journal.remaining < 1.2 * (time.monotonic() - start) + reserve:
            return max(0, number + 1)
    return rounds
