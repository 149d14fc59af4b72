"""Buffers by name, calls on them by name, and *segments*: what is enqueued between two moments at which the host looks.

Where a backend can replay what it enqueued, verbs are not executed one by one. They are gathered until the host wants to
read, write or measure, and then run as one segment, which is replayed as one graph when the same verbs come again. A
segment's key is the list of its verbs with their arguments, so nothing that decides what is enqueued can be left out of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from .runtime.engine import Backend, PreparedCall

__all__ = ["Binding", "NamedBuffers", "verb"]

Binding = str | tuple[str, tuple[int, ...]]
"""A buffer's name, or its name and the shape of a view of its first elements."""

_Arguments = ParamSpec("_Arguments")
_Owner = TypeVar("_Owner", bound="NamedBuffers")


def verb(method: Callable[Concatenate[_Owner, _Arguments], None]) -> Callable[Concatenate[_Owner, _Arguments], None]:
    """Makes a method part of a segment.

    It may only enqueue work on the object's buffers, the same for equal arguments, which are hashable and given by position.
    """

    @wraps(method)
    def gathered(owner: _Owner, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        assert not kwargs, "a verb's arguments are part of a key, by position"
        owner._gather(method, args)

    return gathered


class NamedBuffers:
    """Owns buffers and the calls that were prepared on them. Not for use by two threads at once.

    Args:
        backend: makes the buffers and runs the engines.
        layout: shape and dtype of each buffer.
        record: replay segments where the backend can. Without it, and where it cannot, verbs run at once and each call is
            timed.
    """

    def __init__(self, backend: Backend, layout: Mapping[str, tuple[tuple[int, ...], str]], *, record: bool) -> None:
        self.backend = backend
        self._recorder = backend.recorder() if record else None
        self._gathered: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._running = False
        self._prepared: dict[tuple[Any, ...], PreparedCall] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, Any, Any]] = []
        self._buffers: dict[str, Any] = {}
        self._make(layout)

    # -- time --------------------------------------------------------------------------------------------------------
    def mark(self) -> Any:
        """The moment when every verb so far is done, for `elapsed`. Ends the segment; does not wait."""
        self._flush()
        return self.backend.mark()

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two marks. Waits until `end` is reached."""
        return self.backend.elapsed(start, end)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time inside each engine, by name; empty where segments are replayed. Waits for the device."""
        for name, start, end in self._spans:
            self._seconds[name] += self.backend.elapsed(start, end)
        self._spans.clear()
        return self._seconds

    def _start_anew(self) -> None:
        """Forgets times, and verbs that were not run because something went wrong."""
        self._gathered.clear()
        self._seconds.clear()
        self._spans.clear()

    # -- segments ----------------------------------------------------------------------------------------------------
    def _gather(self, method: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._recorder is None or self._running:  # a verb that is used by a verb is part of it
            method(self, *args)
        else:
            self._gathered.append((method, args))

    def _flush(self) -> None:
        """Runs what was gathered."""
        if not self._gathered or self._recorder is None:
            return
        segment, self._gathered = tuple(self._gathered), []
        self._recorder.run(segment, partial(self._run, segment))

    def _run(self, segment: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...]) -> None:
        self._running = True
        try:
            for method, args in segment:
                method(self, *args)
        finally:
            self._running = False

    # -- buffers and calls -------------------------------------------------------------------------------------------
    def _make(self, layout: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """Makes buffers, all of them or none."""
        made: dict[str, Any] = {}
        try:
            for name, (shape, dtype) in layout.items():
                made[name] = self.backend.empty(shape, dtype)
        except BaseException:
            made.clear()  # the traceback would keep them
            raise
        self._buffers |= made

    def _call(self, name: str, **bindings: Binding) -> None:
        """Executes an engine on buffers, preparing the call on first use."""
        key = (name, *bindings.values())
        call = self._prepared.get(key)
        if call is None:
            buffers = {slot: self._buffer(binding) for slot, binding in bindings.items()}
            call = self._prepared[key] = self.backend.engine(name).prepare(buffers)
        if self._recorder is not None:
            call.execute()
            return
        start = self.backend.mark()
        call.execute()
        self._spans.append((name, start, self.backend.mark()))

    def _buffer(self, binding: Binding) -> Any:
        if isinstance(binding, str):
            return self._buffers[binding]
        name, shape = binding
        return self.backend.view(self._buffers[name], shape)

    def _copy(self, source: str, target: str) -> None:
        self.backend.copy(self._buffers[source], self._buffers[target])

    def _write(self, name: str, values: np.ndarray | np.generic) -> None:
        self._flush()
        self.backend.write(self._buffers[name], np.asarray(values))

    def _read(self, name: str) -> np.ndarray:
        self._flush()
        return self.backend.read(self._buffers[name])
