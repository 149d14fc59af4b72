"""The cache of recordings: plain, recorded, replayed, evicted, and never a different result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import pytest

from hst_trt.runtime.graphs import CaptureError, GraphCache, GraphCounters


class Recording:
    def __init__(self, effects: list[str], recorded: list[str]) -> None:
        self._effects, self._recorded = effects, recorded

    def launch(self) -> None:
        self._effects.extend(self._recorded)


class Device:
    """Bodies append to `effects`; while a body is recorded, to the recording instead."""

    def __init__(self, captures: bool = True) -> None:
        self.captures = captures
        self.effects: list[str] = []
        self._target = self.effects

    def body(self, name: str) -> Callable[[], None]:
        return lambda: self._target.append(name)

    def capture(self, body: Callable[[], None]) -> Recording:
        if not self.captures:
            raise CaptureError("an operation is not permitted")
        self._target = []
        body()
        recorded, self._target = self._target, self.effects
        return Recording(self.effects, recorded)


def run(cache: GraphCache, device: Device, *keys: Hashable) -> None:
    for key in keys:
        cache.run(key, device.body(str(key)))


def test_a_body_runs_plainly_once_is_recorded_the_second_time_and_replayed_from_then_on() -> None:
    device, counters = Device(), GraphCounters()
    cache = GraphCache(device.capture, counters)
    run(cache, device, "a", "a", "a", "a")
    assert device.effects == ["a"] * 4
    assert counters == GraphCounters(plain=1, recorded=1, replayed=3)


def test_each_key_has_its_own_recording() -> None:
    device, counters = Device(), GraphCounters()
    run(GraphCache(device.capture, counters), device, *"abaabb")
    assert device.effects == list("abaabb")
    assert (counters.recorded, counters.replayed) == (2, 4)


def test_the_recording_used_longest_ago_is_evicted_and_recorded_again_when_it_is_wanted() -> None:
    device, counters = Device(), GraphCounters()
    cache = GraphCache(device.capture, counters, capacity=2)
    run(cache, device, *"abcabc")  # the third recording evicts a's
    assert (counters.recorded, counters.evicted) == (3, 1)
    run(cache, device, *"bc")
    assert counters.recorded == 3, "they were kept"
    run(cache, device, *"aa")
    assert (counters.plain, counters.recorded, counters.evicted) == (3, 4, 2)
    assert device.effects == list("abcabcbcaa")


def test_what_cannot_be_recorded_runs_plainly_with_one_warning_however_many_keys_and_caches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device, counters = Device(captures=False), GraphCounters()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run(GraphCache(device.capture, counters), device, *"abababab")
    assert device.effects == list("abababab" * 2)
    assert counters == GraphCounters(plain=16, fallen_back=4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "an operation is not permitted" in caplog.text


def test_cleared_recordings_are_made_anew_without_running_plainly_again() -> None:
    device, counters = Device(), GraphCounters()
    cache = GraphCache(device.capture, counters)
    run(cache, device, *"aaa")
    cache.clear()
    run(cache, device, *"aa")
    assert device.effects == list("aaaaa")
    assert counters == GraphCounters(plain=1, recorded=2, replayed=4)


def test_a_body_that_fails_is_not_taken_for_warmed_up() -> None:
    device, counters = Device(), GraphCounters()
    cache = GraphCache(device.capture, counters)

    def fail() -> None:
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        cache.run("a", fail)
    run(cache, device, "a")
    assert counters == GraphCounters(plain=1)
