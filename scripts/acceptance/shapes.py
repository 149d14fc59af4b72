"""Part 4: what calls and whole loops take at the true shapes of SD3.5 Large and Medium, 1024 x 1024, with guidance.

The weights are random, so nothing is said of pictures. Our runtime's calls take turns with diffusers' own modules, eager and
compiled, in the same rounds.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hst_trt.builder.build import plan_build
from hst_trt.builder.estimate import host_memory
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import BUCKET_RATIOS, token_buckets
from hst_trt.tensor_names import LARGE, SMALL

from .baselines import allow_many_compilations, diffusers_calls, measure_ends, measure_matrix_product
from .device import nvidia_smi
from .engines import build, target_for
from .journal import Journal, Skip
from .loops import RATIO, loops_of, time_loops
from .pairs import SD35, PairShape, make_transformer, recipe_of, tiny_shape, write_pair
from .roofline import guided_flops
from .settings import Settings
from .subjects import Subject, bundle_subject, call_name, seconds_of, transformer_calls
from .timing import Calls, interleave
from .torch_subjects import CompiledTransformer, Pair, need_gpu, torch_subject

__all__ = ["measure_engines", "measure_torch", "onnxruntime", "tensorrt", "tensorrt_rtx"]

_STAGES = {28: (3, 9, 16), 50: (5, 17, 28)}
_REHEARSED_STAGES = {4: (1, 2, 1)}
_CALL_ROUNDS, _LOOP_ROUNDS, _REHEARSED_ROUNDS = 15, 7, 2
_WARMUP = 3  # a call runs plainly, is recorded, and is replayed
_ENOUGH_TO_COMPILE_ALL, _ENOUGH_TO_BUILD_ALL = 900.0, 2400.0  # seconds; each bucket takes its time


# -- whose calls and loops -----------------------------------------------------------------------------------------------
def measure_torch(journal: Journal, settings: Settings) -> None:
    """The torch backend, with torch's own kernels and with compiled blocks; both are replayed as CUDA graphs."""
    need_gpu(settings)
    shape = _shape(settings)
    with journal.check("matrix product"):
        measure_matrix_product(journal, settings, _rounds(settings, _CALL_ROUNDS))
    models = _transformers(journal, settings, shape)
    subject = partial(torch_subject, models=models, spec=shape.spec, grid=shape.grid, device=settings.torch_device)
    few, all_buckets = (RATIO, 1.0), BUCKET_RATIOS
    subjects = [subject("torch + graphs", ratios=few if settings.rehearse else all_buckets)]
    allow_many_compilations()
    with journal.check("blocks compile"):
        start = time.monotonic()
        make = partial(CompiledTransformer, backend=settings.compiler)
        ratios = all_buckets if journal.remaining > _ENOUGH_TO_COMPILE_ALL else few
        compiled = subject("torch compiled + graphs", make=make, ratios=few if settings.rehearse else ratios)
        transformer_calls(compiled, compiled.workspace())  # makes every call once
        journal.fact("seconds to compile blocks", round(time.monotonic() - start, 1))
        subjects.insert(0, compiled)
    measure(journal, settings, subjects, _others(journal, settings, models, shape))
    with journal.check("text encoders and VAE"):
        measure_ends(journal, settings, shape, _rounds(settings, _CALL_ROUNDS))


def tensorrt(journal: Journal, settings: Settings) -> None:
    measure_engines(journal, settings, "tensorrt")


def tensorrt_rtx(journal: Journal, settings: Settings) -> None:
    measure_engines(journal, settings, "tensorrt-rtx")


def onnxruntime(journal: Journal, settings: Settings) -> None:
    measure_engines(journal, settings, "onnxruntime")


def measure_engines(journal: Journal, settings: Settings, backend: str) -> None:
    """Engines of the true shapes, built from graphs whose weights are written once."""
    need_gpu(settings)  # the weights are drawn there, and diffusers' modules run beside
    shape, path = _shape(settings), None
    with journal.check("engines of the true shapes build"):
        path = _build_engines(journal, settings, shape, backend)
    if path is None:
        return
    models = _transformers(journal, settings, shape)
    allow_many_compilations()
    subject = bundle_subject(backend, HybridStitchPipeline.from_bundle(path))
    measure(journal, settings, [subject], _others(journal, settings, models, shape))


def _others(journal: Journal, settings: Settings, models: Pair, shape: PairShape) -> Calls:
    """Diffusers' calls; none if they cannot be made, which is no reason not to measure ours."""
    with journal.check("diffusers' own modules"):
        return diffusers_calls(journal, settings, models, shape)
    return {}


def _shape(settings: Settings) -> PairShape:
    return tiny_shape() if settings.rehearse else SD35


def _rounds(settings: Settings, rounds: int) -> int:
    return _REHEARSED_ROUNDS if settings.rehearse else rounds


def _transformers(journal: Journal, settings: Settings, shape: PairShape) -> Pair:
    """Both transformers with random weights, on the device."""
    start = time.monotonic()
    models = {
        role: make_transformer({**shape.shared, **own}, settings.torch_device, torch.bfloat16, seed)
        for role, own, seed in ((LARGE, shape.large, 3), (SMALL, shape.small, 4))
    }
    spec, tokens, text = shape.spec, shape.grid[0] * shape.grid[1], shape.spec.text_length
    journal.fact(
        "pair",
        {
            "name": shape.name,
            "tokens": tokens,
            "text_tokens": text,
            "precision": "bfloat16",
            "parameters": {role: sum(p.numel() for p in model.parameters()) for role, model in models.items()},
            "seconds_to_make": round(time.monotonic() - start, 1),
        },
    )
    flops = {call_name(count): guided_flops(spec.large, count, tokens, text) for count in token_buckets(tokens)}
    journal.fact("flops", flops | {"small": guided_flops(spec.small, tokens, tokens, text)})
    return models


# -- engines -------------------------------------------------------------------------------------------------------------
def _build_engines(journal: Journal, settings: Settings, shape: PairShape, backend: str) -> Path:
    target = target_for(backend, "bfloat16")
    if not settings.rehearse and journal.remaining < _ENOUGH_TO_BUILD_ALL:  # these two are the ones that loops use
        target = target.model_copy(update={"bucket_ratios": (RATIO, 1.0)})
    folder = settings.work / f"{shape.name}-pair"
    if not folder.is_dir():
        weights = 2 * sum(_parameters(shape))
        _need(settings, "the weights", disk=weights)
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write_pair(shape, part, settings.torch_device, torch.float16 if settings.rehearse else torch.bfloat16)
        part.rename(folder)
    recipe = recipe_of(shape, folder)
    estimate = plan_build(recipe, target, settings.work / "planned.hstb").estimate
    if estimate is not None:
        engines = estimate.engines.values()
        disk, host, seconds = (
            sum(e.engine_bytes for e in engines),
            max(e.host_bytes for e in engines),
            sum(e.seconds for e in engines),
        )
        journal.fact("estimate of the build", {"disk_bytes": disk, "host_bytes": host, "seconds": seconds})
        _need(settings, "the engines", disk=disk, host=host)
        if journal.remaining < seconds:
            raise Skip(f"short of time: building takes an estimated {seconds:.0f} s, {journal.remaining:.0f} s are left")
    return build(journal, settings, recipe, target)


def _parameters(shape: PairShape) -> list[int]:
    with torch.device("meta"):
        from diffusers import SD3Transformer2DModel

        models = [SD3Transformer2DModel(**shape.shared, **own) for own in (shape.large, shape.small)]
    return [sum(parameter.numel() for parameter in model.parameters()) for model in models]


def _need(settings: Settings, what: str, *, disk: int, host: int = 0) -> None:
    free = shutil.disk_usage(settings.work).free
    if free < 1.1 * disk:
        raise Skip(f"short of disk: {what} need {disk / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free; see --work")
    if host_memory().free < host:
        raise Skip(f"short of memory: {what} need {host / 2**30:.0f} GiB, {host_memory().free / 2**30:.0f} GiB are free")


# -- what is measured ----------------------------------------------------------------------------------------------------
def measure(journal: Journal, settings: Settings, subjects: Sequence[Subject], others: Calls) -> None:
    """Single calls first, then as many whole loops as there is time for, the first subject's before the second's.

    Args:
        others: calls that are not ours, by name, timed in the same rounds.
    """
    workspaces = {subject.name: subject.workspace() for subject in subjects}
    enqueue: dict[str, Callable[[], None]] = {}
    calls: dict[str, Callable[[], float]] = {}
    for name, call in others.items():
        with journal.check(f"call {name}"):
            call()
            calls[name] = call
    for subject in subjects:
        with journal.check(f"calls of {subject.name}"):
            for name, own in transformer_calls(subject, workspaces[subject.name]).items():
                enqueue[f"{subject.name}: {name}"] = own
                calls[f"{subject.name}: {name}"] = partial(seconds_of, subject, [own])
    subjects = [subject for subject in subjects if f"{subject.name}: small" in calls]
    timed: _Kept | None = None
    with journal.check("calls"):
        kept = _Kept(calls)
        rounds = _rounds(settings, _CALL_ROUNDS)
        interleave(journal, "calls", kept.calls, rounds=rounds, warmup=_WARMUP, reserve=0.6 * journal.remaining)
        timed = kept
        journal.fact("nvidia-smi after the calls", nvidia_smi())
    if timed is None:
        return
    stages = _REHEARSED_STAGES if settings.rehearse else _STAGES
    for number, (steps, split) in enumerate(stages.items(), start=1):
        with journal.check(f"loops of {steps} steps"):
            loops = [loop for subject in subjects for loop in loops_of(subject, steps, split, timed.median)]
            rounds, share = _rounds(settings, _LOOP_ROUNDS), 0.9 * number / len(stages)
            time_loops(journal, steps, loops, workspaces, enqueue, timed.median, share=share, rounds=rounds)


class _Kept:
    """Keeps what calls measured, beside the journal, to choose what is worth measuring next."""

    def __init__(self, calls: Calls) -> None:
        self._seconds: dict[str, list[float]] = {name: [] for name in calls}
        self.calls = {name: self._keeping(name, call) for name, call in calls.items()}

    def median(self, name: str) -> float:
        """Of a call's seconds, without those of the rounds that warmed up."""
        return float(np.median(self._seconds[name][_WARMUP:] or self._seconds[name]))

    def _keeping(self, name: str, call: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            self._seconds[name].append(call())
            return self._seconds[name][-1]

        return run
