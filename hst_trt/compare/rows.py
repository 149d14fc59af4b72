"""What is compared: schedules by name, and the prompts they all draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import MaskRule

__all__ = ["NamedSchedule", "Prompt", "as_options", "usual_schedules"]


@dataclass(frozen=True)
class Prompt:
    """A text, and the number that is its seed."""

    number: int
    prompt: str


@dataclass(frozen=True)
class NamedSchedule:
    """A way to draw, under a name.

    Attributes:
        settings: arguments of `HybridStitchPipeline.plan`. Those that are left out have their defaults.
    """

    name: str
    settings: Mapping[str, Any]

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Of `HybridStitchPipeline`, for the picture of this seed: where masks are random, each picture has its own."""
        mask = self.settings.get("mask")
        if mask is None or mask.random_seed is None:
            return dict(self.settings)
        return {**self.settings, "mask": dataclasses.replace(mask, random_seed=seed)}

    @property
    def options(self) -> str:
        """What gives the same plan to ``hst-trt run``."""
        return as_options(self.settings)


def as_options(settings: Mapping[str, Any]) -> str:
    """Arguments of `HybridStitchPipeline.plan` as options of the command line; defaults are left out."""
    return " ".join(_options(settings))


def _options(settings: Mapping[str, Any]) -> Iterator[str]:
    yield f"--schedule {settings.get('schedule', 'hybrid')}"
    if (steps := settings.get("num_inference_steps")) is not None:
        yield f"--num-inference-steps {steps}"
    if (stages := settings.get("stages")) is not None:
        yield f"--stages {','.join(map(str, stages))}"
    mask, usual = settings.get("mask") or MaskRule(), MaskRule()
    for field in dataclasses.fields(MaskRule):
        value = getattr(mask, field.name)
        if value != getattr(usual, field.name):
            yield f"--{_MASK[field.name]} {value:g}"
    if (every := settings.get("refresh_every")) is not None:
        yield f"--refresh-every {every}"
    if correction := settings.get("correction", 0.0):
        yield f"--correction {correction:g}"
    if (solver := settings.get("solver", "euler")) != "euler":
        yield f"--solver {solver}"
    if (spacing := settings.get("timestep_spacing", "linspace")) != "linspace":
        yield f"--timestep-spacing {spacing}"
    if (shift := settings.get("shift")) is not None:
        yield f"--shift {shift:g}"
    if settings.get("adaptive"):
        yield "--adaptive"


_MASK = {
    "ratio": "mask-ratio",
    "threshold": "mask-threshold",
    "decay": "mask-decay",
    "drift": "drift",
    "starvation": "starvation",
    "random_seed": "mask-seed",
}


def usual_schedules(steps: int) -> list[NamedSchedule]:
    """One of every kind, for a baseline of `steps` large steps: what one can do without a second model, every way to stitch at
    as many steps, and stitching on top of fewer."""
    fewer = {name: max(1, round(share * steps)) for name, share in (("0.7", 0.7), ("half", 0.5), ("a third", 1 / 3))}
    rows: dict[str, dict[str, Any]] = {}
    rows |= {f"large, {name} of the steps": {"schedule": "large", "num_inference_steps": n} for name, n in fewer.items()}
    half = fewer["half"]
    few = {"solver": "ab2", "timestep_spacing": "trailing"}
    rows |= {f"large, {name}, ab2": {"schedule": "large", "num_inference_steps": n} | few for name, n in fewer.items()}
    for schedule in ("small", "t-stitch", "srdiffusion", "ras", "hybrid"):
        rows[schedule] = {"schedule": schedule, "num_inference_steps": steps}
    rows["srdiffusion, adaptive"] = rows["srdiffusion"] | {"adaptive": True}
    rows["srdiffusion, corrected"] = rows["srdiffusion"] | {"correction": 0.9}
    rows["hybrid, corrected"] = rows["hybrid"] | {"correction": 0.9}
    rows["hybrid, random mask"] = rows["hybrid"] | {"mask": MaskRule(random_seed=0)}
    for schedule in ("hybrid, corrected", "ras"):
        rows[f"{schedule}, half, ab2"] = rows[schedule] | {"num_inference_steps": half} | few
    return [NamedSchedule(name, settings) for name, settings in rows.items()]
