"""What is measured: a backend with its pair, and what the acceptance run does with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hst_trt.codec import patchify
from hst_trt.denoise import StepRecord, denoise
from hst_trt.noise import start_noise
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import BUCKET_RATIOS, PlanRequest, Schedule, StitchPlan, make_plan, token_buckets
from hst_trt.runtime.engine import Backend, PreparedCall
from hst_trt.schedule import FlowMatchEuler
from hst_trt.spec import PairSpec
from hst_trt.tensor_names import LARGE, SMALL
from hst_trt.workspace import RequestShape, Workspace

__all__ = [
    "Subject",
    "begin",
    "bundle_subject",
    "call_name",
    "calls_of",
    "make_a_plan",
    "masked_tokens",
    "run_loop",
    "seconds_of",
    "transformer_calls",
]


@dataclass(frozen=True)
class Subject:
    """A backend that draws with one pair, one image of h x w tokens with guidance.

    Attributes:
        name: what it is, for tables.
        ratios: shares of all tokens that the large model's masked calls take.
        count_waits: gives a function that says how often the host has waited for the device; it gives None, or there is
            none, where nobody counts.
    """

    name: str
    backend: Backend
    spec: PairSpec
    grid: tuple[int, int]
    ratios: tuple[float, ...] = BUCKET_RATIOS
    count_waits: Callable[[], AbstractContextManager[Callable[[], int | None]]] | None = None

    @property
    def shape(self) -> RequestShape:
        return RequestShape(1, True, *self.grid)

    @property
    def buckets(self) -> tuple[int, ...]:
        return token_buckets(self.shape.tokens, self.ratios)

    def workspace(self, *, record: bool = True) -> Workspace:
        return Workspace(self.backend, self.spec, self.shape, record=record)


def bundle_subject(name: str, pipeline: HybridStitchPipeline) -> Subject:
    """A subject of a bundle, at its default size."""
    device = getattr(pipeline.backend, "device", None)

    @contextmanager
    def count_waits() -> Iterator[Callable[[], int]]:
        before = device.waits
        yield lambda: device.waits - before

    return Subject(
        name,
        pipeline.backend,
        pipeline.spec,
        pipeline.grid(),
        pipeline.bundle.manifest.bucket_ratios,
        None if device is None else count_waits,
    )


def make_a_plan(subject: Subject, schedule: Schedule, steps: int, **settings: Any) -> StitchPlan:
    return make_plan(PlanRequest(schedule, steps, subject.shape.tokens, subject.buckets, **settings))


def begin(ws: Workspace, plan: StitchPlan, seed: int = 7, shift: float = 3.0, guidance_scale: float = 4.5) -> None:
    """Writes a request with random text into a workspace."""
    spec, shape, rng = ws.spec, ws.shape, np.random.default_rng(seed)
    latents = (shape.images, spec.latent_channels, shape.h * spec.patch_size, shape.w * spec.patch_size)
    sizes = {
        "encoder_hidden_states": (shape.rows, spec.text_length, spec.large.text_width),
        "pooled_projections": (shape.rows, spec.large.pooled_width),
    }
    text = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    table = FlowMatchEuler(shift).table(len(plan.steps))
    ws.begin(patchify(start_noise(seed, latents), spec.patch_size), text, table, guidance_scale, plan.mask, plan.correction)


def run_loop(
    ws: Workspace,
    plan: StitchPlan,
    on_first_step: Callable[[], None] = lambda: None,
    on_last_step: Callable[[], None] = lambda: None,
) -> tuple[float, list[StepRecord]]:
    """Draws latents; the seconds between the loop's first and last call on the device, and what the steps did.

    Args:
        on_first_step: called before the first step, when the request is written.
        on_last_step: called when the last step is enqueued and nobody has waited for it yet.
    """
    begin(ws, plan)

    def end_step(t: int, record: StepRecord) -> bool:
        if t == len(plan.steps) - 1:
            on_last_step()
        return True

    start = ws.mark()
    on_first_step()
    records = denoise(ws, plan, on_step_end=end_step)
    end = ws.mark()
    return ws.elapsed(start, end), records


def masked_tokens(ws: Workspace, count: int, seed: int = 0) -> None:
    """Makes `count` tokens drawn at random the active ones."""
    lots = np.random.default_rng((seed, count)).permutation(ws.shape.tokens)
    ws.impose((lots < count).reshape(1, ws.shape.h, ws.shape.w).repeat(ws.shape.images, 0))
    ws.select(count)


def transformer_calls(subject: Subject, ws: Workspace) -> dict[str, Callable[[], None]]:
    """The transformer calls of a workspace, each alone: on all tokens, on each bucket, and of the small model.

    Returns:
        By name ("large 4096", "large 1280", "small"), what enqueues a call; where calls can be recorded it is replayed as a
        graph of its own.
    """
    _prepare(subject, ws)
    recorder = subject.backend.recorder()

    def enqueuing(name: str, call: PreparedCall) -> Callable[[], None]:
        return call.execute if recorder is None else partial(recorder.run, name, call.execute)

    prepared = {(key[0], key[1]): call for key, call in ws._prepared.items() if key[0] in (LARGE, SMALL)}
    calls = {}
    for count in reversed(subject.buckets):
        tokens: Any = "all_tokens"
        if count < subject.shape.tokens:
            tokens = ("hidden_tokens", (subject.shape.rows, count, subject.spec.large.token_channels))
        calls[call_name(count)] = enqueuing(call_name(count), prepared[LARGE, tokens])
    calls["small"] = enqueuing("small", prepared[SMALL, "all_tokens"])
    return calls


def seconds_of(subject: Subject, calls: Iterable[Callable[[], None]]) -> float:
    """Seconds from the first to the last of some calls on the device; nobody waits between them."""
    start = subject.backend.mark()
    for call in calls:
        call()
    return subject.backend.elapsed(start, subject.backend.mark())


def _prepare(subject: Subject, ws: Workspace) -> None:
    """Makes every transformer call once, on a request that has begun."""
    begin(ws, make_a_plan(subject, "hybrid", 4, stages=(1, 2, 1)))
    ws.advance()
    ws.large()
    for count in subject.buckets[:-1]:
        masked_tokens(ws, count)
        ws.large_masked(count)
    ws.small_alone()
    ws.mark()


def call_name(tokens: int) -> str:
    """The name of a large call on so many tokens."""
    return f"large {tokens}"


def calls_of(records: Iterable[StepRecord], tokens: int) -> list[str]:
    """The transformer calls that a loop on `tokens` tokens made, by name and in order."""
    made: list[str] = []
    for record in records:
        large, small = [call_name(record.tokens)] * (record.tokens > 0), ["small"] * record.step.small
        made += large + small if record.tokens == tokens else small + large
    return made
