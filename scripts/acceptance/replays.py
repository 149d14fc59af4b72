"""Part 3: recorded loops do what plain calls do, without a wait, and little beside the transformer calls."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from hst_trt.errors import NumericsError
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule, StitchPlan
from hst_trt.workspace import Workspace

from .engines import built
from .journal import Journal, Skip
from .settings import Settings
from .subjects import Subject, bundle_subject, calls_of, make_a_plan, run_loop, seconds_of, transformer_calls
from .timing import interleave

__all__ = ["onnxruntime", "prove", "prove_on_torch", "tensorrt", "tensorrt_rtx"]

_STAGES = (3, 12, 5)
_REHEARSED_STAGES = (1, 4, 1)


def tensorrt(journal: Journal, settings: Settings) -> None:
    prove_on_bundle(journal, settings, "tensorrt", "bfloat16")


def tensorrt_rtx(journal: Journal, settings: Settings) -> None:
    prove_on_bundle(journal, settings, "tensorrt-rtx", "bfloat16")


def onnxruntime(journal: Journal, settings: Settings) -> None:
    prove_on_bundle(journal, settings, "onnxruntime", "float32")


def prove_on_torch(journal: Journal, settings: Settings) -> None:
    """The tiny pair in bfloat16, on the torch backend."""
    import torch

    from hst_trt.tensor_names import LARGE, SMALL

    from .pairs import make_transformer, tiny_shape
    from .torch_subjects import need_gpu, torch_subject

    need_gpu(settings)
    shape = tiny_shape()
    configs = ((LARGE, shape.large, 3), (SMALL, shape.small, 4))
    device = settings.torch_device
    models = {r: make_transformer({**shape.shared, **own}, device, torch.bfloat16, seed) for r, own, seed in configs}
    prove(journal, settings, torch_subject("torch bfloat16", models, shape.spec, shape.grid, device))


def prove_on_bundle(journal: Journal, settings: Settings, backend: str, precision: str) -> None:
    bundle = None
    with journal.check("the demo pair's bundle is there"):
        bundle = built(journal, settings, "demo", backend, precision)
    if bundle is not None:
        prove(journal, settings, bundle_subject(f"{backend} {precision}", HybridStitchPipeline.from_bundle(bundle)))


def plans_of(subject: Subject, stages: tuple[int, int, int]) -> dict[str, StitchPlan]:
    """By name; those with budget masks and fixed stages never ask the device anything."""
    large, hybrid, small = stages
    steps = sum(stages)
    return {
        "large": make_a_plan(subject, "large", steps),
        "hybrid": make_a_plan(subject, "hybrid", steps, stages=stages, correction=0.9),
        "hybrid, refreshed": make_a_plan(subject, "hybrid", steps, stages=stages, refresh_every=max(1, hybrid // 3)),
        "srdiffusion": make_a_plan(
            subject, "srdiffusion", steps, stages=(large + hybrid // 2, 0, hybrid - hybrid // 2 + small)
        ),
        "threshold": make_a_plan(subject, "hybrid", steps, stages=stages, mask=MaskRule(threshold=1.5)),
    }


def prove(journal: Journal, settings: Settings, subject: Subject) -> None:
    """Every plan replayed beside the same without recording, and the times of both."""
    plain, replayed = subject.workspace(record=False), subject.workspace()
    plans, rounds = plans_of(subject, _REHEARSED_STAGES if settings.rehearse else _STAGES), 2 if settings.rehearse else 15
    for name, plan in plans.items():
        with journal.check(f"{name}: replayed latents are those of plain calls, bit for bit"):
            compare(journal, name, plan, subject, plain, replayed)
    with journal.check("times"):
        time_loops(journal, subject, {name: plans[name] for name in ("large", "hybrid")}, plain, replayed, rounds)


def compare(journal: Journal, name: str, plan: StitchPlan, subject: Subject, plain: Workspace, replayed: Workspace) -> None:
    """Three runs that may record and replay, against one that does not."""
    run_loop(plain, plan)
    expected = plain.latents
    counters = None if subject.backend.recorder() is None else getattr(subject.backend, "graphs", None)
    found: dict[str, Any] = {"steps": len(plan.steps), "finite": bool(np.isfinite(expected).all()), "waits": None}
    differences = []
    for _ in range(3):
        before = dataclasses.asdict(counters) if counters is not None else {}
        found["waits"] = _waits_of(subject, replayed, plan)
        differences.append(float(np.abs(replayed.latents - expected).max()))
        if counters is not None:
            found["graphs"] = {key: value - before[key] for key, value in dataclasses.asdict(counters).items()}
    found["largest_difference"] = max(differences)
    found["asks"] = plan.mask is not None and plan.mask.threshold is not None
    journal.fact(f"replay {name}", found)
    if not found["finite"]:
        raise NumericsError("the latents are not finite")
    if max(differences) > 0:
        raise NumericsError("replayed latents differ from plain ones", found=f"by {max(differences):.3g}")
    if found["waits"] and not found["asks"]:
        raise NumericsError("the host waited for the device inside the loop", found=f"{found['waits']} times")
    if counters is None:
        raise Skip("this backend records nothing; its runs are equal")
    if not found["graphs"]["replayed"] or found["graphs"]["plain"]:
        raise NumericsError("calls that should have been replayed were not", found=str(found["graphs"]))


def _waits_of(subject: Subject, ws: Workspace, plan: StitchPlan) -> int | None:
    """How often the host waited from the loop's first call until its last was enqueued; None if nobody counts."""
    if subject.count_waits is None:
        run_loop(ws, plan)
        return None
    counts: list[int | None] = []
    with subject.count_waits() as waits:
        run_loop(ws, plan, on_first_step=lambda: counts.append(waits()), on_last_step=lambda: counts.append(waits()))
    first, last = counts
    return None if first is None or last is None else last - first


def time_loops(
    journal: Journal, subject: Subject, plans: dict[str, StitchPlan], plain: Workspace, replayed: Workspace, rounds: int
) -> None:
    """Loops with and without recording, and their transformer calls without what is between them, in turns."""
    calls, loops = transformer_calls(subject, replayed), {}
    for name, plan in plans.items():
        _, records = run_loop(replayed, plan)
        made = calls_of(records, plan.num_tokens)
        journal.fact(f"loop {name}", {"steps": len(plan.steps), "calls": Counter(made)})
        loops[f"{name}, plain"] = lambda plan=plan: run_loop(plain, plan)[0]
        loops[f"{name}, replayed"] = lambda plan=plan: run_loop(replayed, plan)[0]
        loops[f"{name}, transformers alone"] = lambda made=made: seconds_of(subject, [calls[call] for call in made])
    interleave(journal, "loops", loops, rounds=rounds, warmup=2)
