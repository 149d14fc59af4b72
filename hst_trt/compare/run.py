"""Draws the same prompts and seeds by every schedule, and measures how far each is from the large model.

Two distances are taken of every picture: to the *converged* large model, which took so many steps that more would change
nothing, and to the large model with as many steps and the same sampling. The first is what a user sees; the second is what
stitching alone does. Everything is paired: the same prompts, noise and machine, the schedules in turn.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bench import Sample
from ..errors import MissingError, RequestError
from ..pipeline import HybridStitchPipeline
from ..plan import Schedule, StitchPlan
from ..schedule import AS_DIFFUSERS, Sampling
from .gallery import Case, Gallery
from .measures import Kid, interval, mean_interval, psnr, ssim, wilson
from .perceptual import Fid, Perceptual, perceptual
from .rows import NamedSchedule
from .store import digest

if TYPE_CHECKING:
    from .features import Features

__all__ = ["CONVERGED_SAMPLING", "CONVERGED_STEPS", "Compared", "Comparison", "Figure", "compare"]

CONVERGED_STEPS = 80
CONVERGED_SAMPLING = Sampling("ab2", "trailing")
"""What comes nearest to no step length at all with so many steps."""

LEAST_PROMPTS = 2
CONVERGED = "converged"
LEAST_FOR_KID = 10
"""Pictures, drawn and real, below which KID says nothing, and its resamples would hold one picture many times."""

LEAST_FOR_FID = 50
"""Pictures, drawn and real, below which FID is little but its bias. It is biased above, too, as far as thousands."""

CHUNK = 16
"""Prompts whose pictures are measured at once."""

EQUAL = 100.0
"""The PSNR in dB that equal pictures are given, so that means exist."""

Judge = Callable[[Sequence[Case], np.ndarray], np.ndarray]
"""From cases and their pictures [N, H, W, 3] uint8 to what is right, [N] bool."""


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def mean(cls, values: np.ndarray) -> Figure:
        return cls(float(values.mean()), *mean_interval(values))

    def to_dict(self) -> dict[str, float]:
        return {"value": round(self.value, 5), "low": round(self.low, 5), "high": round(self.high, 5)}


@dataclass(frozen=True)
class Compared:
    """One schedule's figures.

    Attributes:
        plan: what it does.
        loop_seconds, total_seconds: of every picture.
        speedup: of the loop over the baseline's, picture by picture.
        to_converged, to_same_steps: by measure, of every picture; empty for the row that is the reference itself.
        clip: CLIP score of pictures and prompts.
        fid: without an interval, see `Fid`.
    """

    row: NamedSchedule
    plan: StitchPlan
    loop_seconds: Sample
    total_seconds: Sample
    speedup: Sample
    to_converged: Mapping[str, np.ndarray]
    to_same_steps: Mapping[str, np.ndarray]
    kid: Figure | None = None
    clip: Figure | None = None
    fid: float | None = None
    right: Figure | None = None


@dataclass(frozen=True)
class Comparison:
    """All schedules, the baseline first.

    Attributes:
        reference: the converged large model, which distances are taken to.
        measures: of `Compared.to_converged`, the first one the one that plots show.
        notes: what was left out, and why.
        gallery: the pictures, by the rows' names and "converged".
    """

    cases: Sequence[Case]
    rows: tuple[Compared, ...]
    reference: NamedSchedule
    measures: tuple[str, ...]
    notes: tuple[str, ...]
    gallery: Gallery


def compare(
    pipeline: HybridStitchPipeline,
    cases: Sequence[Case],
    rows: Sequence[NamedSchedule],
    folder: Path,
    *,
    baseline_steps: int | None = None,
    converged_steps: int = CONVERGED_STEPS,
    size: Mapping[str, int | None] | None = None,
    real: np.ndarray | None = None,
    judge: Judge | None = None,
    same_steps: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Draws what is missing in `folder`, and measures.

    Args:
        cases: prompts; their numbers are the seeds.
        rows: schedules by different names.
        folder: keeps the pictures, so that a stopped comparison goes on where it was; those of other prompts, schedules or
            bundles are not used.
        baseline_steps: of the large-only row that speed-ups are over; the bundle's default if left out.
        converged_steps: of the large-only row that distances are to.
        size: `height` and `width` in pixels.
        real: real pictures [M, H, W, 3] uint8 for KID and FID.
        judge: says which pictures are right.
        same_steps: whether to take the second distance; the runs that it is to take time.

    Raises:
        RequestError: fewer than two prompts, names that are taken, or a reference that is not the longest run.
    """
    if len(cases) < LEAST_PROMPTS:
        raise RequestError(
            f"{len(cases)} prompts are too few to compare schedules on", fix="give 2 or more; intervals are tight from 100 on"
        )
    steps = pipeline.bundle.manifest.defaults.num_inference_steps if baseline_steps is None else baseline_steps
    baseline = _large("large", steps)
    rows = [baseline, *(row for row in rows if row != baseline)]
    if len({row.name for row in rows} | {CONVERGED}) <= len(rows):
        raise RequestError(
            "schedules need names of their own",
            found=", ".join(row.name for row in rows),
            fix=f"{baseline.name!r} is the baseline, {CONVERGED!r} the reference",
        )
    shape = {key: value for key, value in (size or {}).items() if value is not None}
    plans = {row.name: pipeline.plan(**row.arguments(), **shape) for row in rows}
    longest = max(len(plan.steps) for plan in plans.values())
    if converged_steps <= longest:
        raise RequestError(
            f"a reference of {converged_steps} steps is no reference for a schedule of {longest}",
            fix=f"take at least twice as many, {2 * longest}",
        )
    drawn = {row.name: row for row in rows}
    twins = {}
    for name, plan in plans.items() if same_steps else ():
        twin = _large(f"large, {len(plan.steps)} steps, {_described(plan.sampling)}", len(plan.steps), plan.sampling)
        wanted = pipeline.plan(**twin.arguments(), **shape)
        twins[name] = next((other for other, made in plans.items() if made == wanted), twin.name)
        if twins[name] == twin.name:
            drawn[twin.name] = twin
    reference = drawn[CONVERGED] = _large(CONVERGED, converged_steps, CONVERGED_SAMPLING)

    gallery = Gallery(folder / f"pictures-{_key(pipeline, drawn, shape)}", {n: _Sized(r, shape) for n, r in drawn.items()})
    gallery.draw(pipeline, cases, say)
    features, notes = _features()
    fewest = 0 if real is None else min(len(real), len(cases))
    for name, least in (("KID", LEAST_FOR_KID), ("FID", LEAST_FOR_FID)):
        if real is not None and fewest < least:
            notes += (f"no {name}: it takes {least} prompts and real pictures, there are {len(cases)} and {len(real)}",)
    others, lacking = perceptual(fid=fewest >= LEAST_FOR_FID)
    notes += lacking
    pairs = [(name, other) for name in plans for other in {CONVERGED, twins.get(name, CONVERGED)}]
    seen = _look(gallery, cases, pairs, features, others, judge)
    kid = fid = None
    if real is not None and features is not None and fewest >= LEAST_FOR_KID:
        kid = Kid(_by_chunks(lambda pictures: features(pictures)[0], real))
    if real is not None and others.inception is not None:
        fid = Fid(_by_chunks(others.inception, real))

    def compared(row: NamedSchedule) -> Compared:
        name = row.name
        pooled, hits, clip = seen.pooled.get(name), seen.right.get(name), seen.clip.get(name)
        return Compared(
            row=row,
            plan=plans[name],
            loop_seconds=seen.loop[name],
            total_seconds=seen.total[name],
            speedup=seen.loop[baseline.name].over(seen.loop[name]),
            to_converged=seen.distances[name, CONVERGED],
            to_same_steps={} if twins.get(name, name) == name else seen.distances[name, twins[name]],
            kid=None if kid is None or pooled is None else Figure(kid(pooled), *interval(kid.resampled(pooled))),
            clip=None if clip is None else Figure.mean(clip),
            fid=None if fid is None else fid(seen.inception[name]),
            right=None if hits is None else Figure(float(hits.mean()), *wilson(int(hits.sum()), len(hits))),
        )

    say(f"measured {len(rows)} schedules on {len(cases)} prompts")
    measures = tuple(seen.distances[baseline.name, CONVERGED])
    return Comparison(cases, tuple(map(compared, rows)), reference, measures, notes, gallery)


def _large(name: str, steps: int, sampling: Sampling = AS_DIFFUSERS) -> NamedSchedule:
    schedule: Schedule = "large"
    return NamedSchedule(name, {"schedule": schedule, "num_inference_steps": steps, **dataclasses.asdict(sampling)})


def _described(sampling: Sampling) -> str:
    return ", ".join(str(value) for value in dataclasses.astuple(sampling) if value is not None)


@dataclass(frozen=True)
class _Sized:
    row: NamedSchedule
    size: Mapping[str, int]

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        return {**self.row.arguments(seed), **self.size}


def _key(pipeline: HybridStitchPipeline, rows: Mapping[str, NamedSchedule], shape: Mapping[str, int]) -> str:
    """Of all that decides a picture but prompt and seed."""
    settings = (f"{name}: {sorted(row.settings.items(), key=str)}" for name, row in rows.items())
    return digest(pipeline.bundle.manifest.fingerprint, str(sorted(shape.items())), *settings)


def _features() -> tuple[Features | None, tuple[str, ...]]:
    """The network, or a note why there is none."""
    try:
        from .features import Features
    except ModuleNotFoundError as exc:
        return None, (f'no feature distance and no KID: {exc.name} is not installed; pip install "hst_trt[eval]"',)
    try:
        return Features(), ()
    except MissingError as exc:
        return None, (f"no feature distance and no KID: {exc.problem}; {exc.fix}",)


@dataclass(frozen=True)
class _Seen:
    """By row, of every picture: seconds, features [N, 1280], whether it is right, its CLIP score, InceptionV3's features
    [N, 2048]; by pair of rows the measures."""

    loop: Mapping[str, Sample]
    total: Mapping[str, Sample]
    distances: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
    pooled: Mapping[str, np.ndarray]
    right: Mapping[str, np.ndarray]
    clip: Mapping[str, np.ndarray]
    inception: Mapping[str, np.ndarray]


def _look(
    gallery: Gallery,
    cases: Sequence[Case],
    pairs: Sequence[tuple[str, str]],
    features: Features | None,
    others: Perceptual,
    judge: Judge | None,
) -> _Seen:
    """Looks at every picture once, some prompts at a time, so that no more are in memory."""
    loop, total, pooled, right, clip, inception = (defaultdict[str, list[Any]](list) for _ in range(6))
    distances: defaultdict[tuple[str, str], defaultdict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for start in range(0, len(cases), CHUNK):
        part = cases[start : start + CHUNK]
        drawn = [gallery[case] for case in part]
        pictures = {name: np.stack([one.pictures[name] for one in drawn]) for name in drawn[0].pictures}
        maps = {}
        for name, pixels in pictures.items():
            loop[name] += [one.loop[name] for one in drawn]
            total[name] += [one.total[name] for one in drawn]
            if features is not None:
                flat, maps[name] = features(pixels)
                pooled[name].append(flat)
            if judge is not None:
                right[name].append(judge(part, pixels))
        for name in {name for name, _ in pairs}:  # not of what they are compared with: these two take longest
            if others.clip is not None:
                clip[name].append(others.clip(pictures[name], [case.prompt for case in part]))
            if others.inception is not None:
                inception[name].append(others.inception(pictures[name]))
        for name, other in pairs:
            values = distances[name, other]
            values["psnr"].append(np.minimum(psnr(pictures[name], pictures[other]), EQUAL))
            values["ssim"].append(ssim(pictures[name], pictures[other]))
            if features is not None:
                values["feature distance"].append(features.distance(maps[name], maps[other]))
            if others.lpips is not None:
                values["lpips"].append(others.lpips(pictures[name], pictures[other]))
    return _Seen(
        {name: Sample(tuple(values)) for name, values in loop.items()},
        {name: Sample(tuple(values)) for name, values in total.items()},
        {pair: {key: np.concatenate(values) for key, values in by.items()} for pair, by in distances.items()},
        *({name: np.concatenate(values) for name, values in by.items()} for by in (pooled, right, clip, inception)),
    )


def _by_chunks(network: Callable[[np.ndarray], np.ndarray], pictures: np.ndarray) -> np.ndarray:
    return np.concatenate([network(pictures[start : start + CHUNK]) for start in range(0, len(pictures), CHUNK)])
