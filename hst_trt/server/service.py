"""The queue, and the threads that each own a pipeline.

A pipeline is used by one thread only, so whoever asks for a picture hands over a drawing and waits for a future. A thread
that is free takes the oldest drawing, and with it those of the queue that can be drawn in the same batch: nobody waits for a
batch to fill, and under load batches fill by themselves. A future that is done before its picture (given up, too late) ends
the work at the next step, if no other picture of the batch is still wanted.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from ..backends import machine_here, open_backend, open_bundle
from ..denoise import StepRecord
from ..errors import BusyError, DeadlineError, HstError, NumericsError, RequestError
from ..pipeline import HybridStitchPipeline
from .drawing import Drawer, Drawing, Drawn, OnStep, draw
from .metrics import Metrics, Outcome
from .request import ImageRequest, Limits, read_request

__all__ = ["ImageService", "State", "Ticket"]

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed"]
_CPU_BATCH = 4
_FIRST_GUESS = 5.0
"""Seconds a request is taken to need before one was drawn."""


@dataclass(eq=False)
class Ticket:
    """A place in the queue. `future` gets the pictures; cancelling it, at any time, is how to give up.

    Attributes:
        submitted, started: of `time.monotonic`; `started` is None while it waits.
        alone: whether it is drawn in a batch of its own, because a batch that it was in has failed.
    """

    drawing: Drawing
    deadline: float
    on_step: OnStep | None
    future: Future[Drawn] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    alone: bool = False

    @property
    def batch_key(self) -> Hashable:
        return self if self.alone else self.drawing.batch_key

    @property
    def queued_seconds(self) -> float:
        return (time.monotonic() if self.started is None else self.started) - self.submitted


class _NobodyWaits(Exception):
    """Every future of a batch is done."""


class ImageService:
    """Draws for many askers at once.

    Args:
        path: the bundle.
        workers: pipelines, each with a thread and its own weights.
        device: which GPU, for bundles of engines.
        threads: of a call on the CPU; 0 takes one per physical core, or with several workers shares the CPUs out among them.
        queue: how many requests may wait.
        deadline: seconds a request may take, waiting and drawing.
        max_batch: images that are drawn together; 0 takes 4 on the CPU, where more gain little and all wait for the last, and
            1 for engines, whose graphs are captured anew whenever the batch changes its size.
        limits: of one request.

    Raises:
        HstError: the bundle cannot be opened. Pipelines are loaded by `start`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        workers: int = 1,
        device: int = 0,
        threads: int = 0,
        queue: int = 64,
        deadline: float = 300.0,
        max_batch: int = 0,
        limits: Limits | None = None,
        on_hash: Callable[[int, int], None] | None = None,
    ) -> None:
        self.bundle = open_bundle(path, on_hash)
        self.limits = limits or Limits()
        on_cpu = self.bundle.manifest.target.backend == "onnxruntime"
        if threads == 0 and workers > 1:
            threads = max(1, (os.cpu_count() or 1) // workers)
        self.machine = machine_here(self.bundle.manifest, device=device, threads=threads)
        self.metrics = Metrics(self.bundle.manifest, self.machine)
        self.metrics.watch(lambda: list(self._pipelines.values()))
        self.failure: BaseException | None = None
        self.deadline = deadline
        most = self.bundle.manifest.limits.max_images
        self.max_batch = min(max_batch or (_CPU_BATCH if on_cpu else 1), most)
        self._drawer = Drawer(self.bundle, self.machine, self.limits)
        self._queue_size = queue
        self._open: Callable[[], HybridStitchPipeline] = lambda: HybridStitchPipeline(
            self.bundle, open_backend(self.bundle, device=device, threads=threads)
        )
        self._queue: deque[Ticket] = deque()
        self._running: set[Ticket] = set()
        self._pipelines: dict[int, HybridStitchPipeline] = {}
        self._changed = threading.Condition()  # guards the queue, what runs, and the state
        self._closing = False
        self._seconds_per_request = _FIRST_GUESS
        self._threads = [threading.Thread(target=self._work, args=(i,), name=f"hst-trt-{i}") for i in range(workers)]

    # -- life ------------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Starts the threads, which load and warm up. Returns at once; see `wait_for`."""
        for thread in self._threads:
            thread.start()

    @property
    def state(self) -> State:
        if self.failure is not None:
            return "failed"
        if self._closing:
            return "draining"
        return "ready" if len(self._pipelines) == len(self._threads) else "loading"

    def wait_for(self, *states: State) -> State:
        """Waits until the service is in one of these states, and returns it."""
        with self._changed:
            self._changed.wait_for(lambda: self.state in states)
            return self.state

    def close(self, *, drain: bool = True) -> None:
        """Takes nothing more, and returns when all threads have ended: with `drain` after everything is drawn, without it after
        the steps that are running."""
        with self._changed:
            self._closing = True
            given_up = [] if drain else [*self._queue, *self._running]
            self._changed.notify_all()
        for ticket in given_up:
            ticket.future.cancel()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    # -- what askers call, from any thread -------------------------------------------------------------------------------
    def check(self, fields: object) -> tuple[ImageRequest, Drawing]:
        """A request of decoded JSON, checked whole.

        Raises:
            RequestError: it cannot be drawn.
        """
        try:
            request = read_request(fields)
            return request, self._drawer(request)
        except RequestError:
            self._count("invalid")
            raise

    def submit(self, drawing: Drawing, on_step: OnStep | None = None) -> Ticket:
        """Queues a drawing.

        Args:
            on_step: called after each step, by the thread that draws; it must return at once.

        Raises:
            BusyError: the queue is full, or the service takes nothing more.
        """
        with self._changed:
            if self._closing or self.failure is not None:
                self._count("busy")
                raise BusyError("the server is shutting down", retry_after=1, fix="ask again, or another replica")
            if len(self._queue) >= self._queue_size:
                self._count("busy")
                after = self._seconds_per_request * len(self._queue) / len(self._threads)
                raise BusyError(
                    "the queue is full",
                    retry_after=min(max(1, math.ceil(after)), 60),
                    found=f"{len(self._queue)} requests wait",
                    fix="ask again later",
                )
            ticket = Ticket(drawing, time.monotonic() + self.deadline, on_step)
            ticket.future.add_done_callback(lambda future: self._settled(ticket))
            self._queue.append(ticket)
            self._show_counts()
            self._changed.notify_all()  # one alone might wake somebody who waits for a state
        return ticket

    def position(self, ticket: Ticket) -> int | None:
        """How many wait before it; None if it waits no longer."""
        with self._changed:
            return self._queue.index(ticket) if ticket in self._queue else None

    # -- the threads -----------------------------------------------------------------------------------------------------
    def _work(self, number: int) -> None:
        try:
            while True:
                pipeline = self._load(number)
                if not self._draw_all(pipeline):
                    return
                del pipeline  # in an unknown state after an error nobody expected: the next request gets a new one
        except BaseException as exc:
            log.error("a pipeline could not be loaded, so this server can draw no more: %s", exc)
            with self._changed:
                self.failure = exc
                left, self._queue = list(self._queue), deque()
                self._changed.notify_all()
            for ticket in left:
                _refuse(ticket, exc)

    def _load(self, number: int) -> HybridStitchPipeline:
        start = time.monotonic()
        self._pipelines.pop(number, None)
        pipeline = self._open()
        # a short run of all three stages loads and warms what the defaults use
        pipeline("a cat", seed=0, num_inference_steps=4)
        self.metrics.load.observe(time.monotonic() - start)
        with self._changed:
            self._pipelines[number] = pipeline
            self._changed.notify_all()
        return pipeline

    def _draw_all(self, pipeline: HybridStitchPipeline) -> bool:
        """Draws until there is nothing more to draw (False), or something unexpected happened (True)."""
        while batch := self._take():
            unexpected = self._draw(pipeline, batch)
            with self._changed:
                self._running -= set(batch)
                self._queue.extendleft(ticket for ticket in reversed(batch) if not ticket.future.done())
                self._show_counts()
                self._changed.notify_all()
            if unexpected:
                return True
        return False

    def _take(self) -> list[Ticket]:
        """The oldest ticket and those that are drawn with it; none when the service has drained."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closing)
                self._drop_late()
                batch = _batch(self._queue, self.max_batch)
                for ticket in batch:
                    self._queue.remove(ticket)
                self._running |= set(batch)
                self._show_counts()
                if batch or self._closing:
                    return batch

    def _draw(self, pipeline: HybridStitchPipeline, batch: list[Ticket]) -> bool:
        """Draws a batch and settles its futures, but for a batch of many that fails. Returns whether something unexpected
        happened."""
        started = time.monotonic()
        for ticket in batch:
            ticket.started = started

        def end_step(t: int, steps: int, record: StepRecord) -> None:
            with self._changed:
                self._drop_late()
            if all(ticket.future.done() for ticket in batch):
                raise _NobodyWaits
            for ticket in batch:
                if ticket.on_step is not None:
                    ticket.on_step(t, steps, record)

        try:
            drawn = draw(pipeline, [ticket.drawing for ticket in batch], end_step)
        except _NobodyWaits:
            return False
        except Exception as exc:
            unexpected = not isinstance(exc, HstError)
            if unexpected:
                log.exception("drawing failed; the pipeline is loaded anew")
            if len(batch) > 1:  # whose fault it is shows when each is drawn alone
                for ticket in batch:
                    ticket.alone, ticket.started = True, None
                return unexpected
            if isinstance(exc, NumericsError):
                self.metrics.non_finite.inc()
            _refuse(batch[0], exc)
            return unexpected
        self.metrics.drawn(drawn)
        self._seconds_per_request += 0.2 * ((time.monotonic() - started) / len(batch) - self._seconds_per_request)
        for ticket, result in zip(batch, drawn, strict=True):
            with suppress(InvalidStateError):  # given up in this moment
                ticket.future.set_result(result)
        return False

    def _drop_late(self) -> None:
        now = time.monotonic()
        for ticket in [*self._queue, *self._running]:
            if now > ticket.deadline:
                _refuse(
                    ticket,
                    DeadlineError(
                        f"the request took longer than {self.deadline:g} seconds",
                        found=f"it waited {ticket.queued_seconds:.1f} seconds",
                        fix="ask for fewer steps or images, or ask again later",
                    ),
                )

    def _settled(self, ticket: Ticket) -> None:
        """Counts a ticket whose future is done, and drops it from the queue if it was given up there."""
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._show_counts()
        if ticket.started is not None:
            self.metrics.queue.observe(ticket.queued_seconds)
        if ticket.future.cancelled():
            self._count("cancelled")
        elif (error := ticket.future.exception()) is not None:
            self._count("deadline" if isinstance(error, DeadlineError) else "error")
        else:
            self._count("ok")
            self.metrics.request.labels(ticket.drawing.settings.get("schedule", "hybrid")).observe(
                time.monotonic() - ticket.submitted
            )

    def _show_counts(self) -> None:
        self.metrics.waiting.set(len(self._queue))
        self.metrics.running.set(len(self._running))

    def _count(self, outcome: Outcome) -> None:
        self.metrics.requests.labels(outcome).inc()


def _batch(queue: Iterable[Ticket], most: int) -> list[Ticket]:
    """The oldest ticket, and those of its key behind it, until there are `most` images. It alone may have more."""
    batch: list[Ticket] = []
    images = 0
    for ticket in queue:
        if not batch or (ticket.batch_key == batch[0].batch_key and images + ticket.drawing.images <= most):
            batch.append(ticket)
            images += ticket.drawing.images
    return batch


def _refuse(ticket: Ticket, error: BaseException) -> None:
    with suppress(InvalidStateError):
        ticket.future.set_exception(error)
