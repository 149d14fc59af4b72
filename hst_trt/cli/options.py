"""Options that several commands share, and how their values become the library's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from ..bundle import MANIFEST, SUFFIX, bundles_folder, newest_bundle
from ..errors import MissingError, RequestError
from ..plan import MaskRule, Schedule
from ..schedule import Solver

__all__ = ["BUNDLE", "find_bundle", "plan_arguments", "schedule_options", "size_options"]

BUNDLE = click.option(
    "--bundle", metavar="NAME|PATH", help="Bundle to use; by default the newest that runs here, else the demo pair's."
)

_SCHEDULE = (
    click.option(
        "--schedule",
        type=click.Choice(get_args(Schedule)),
        default="hybrid",
        show_default=True,
        help="Which model runs when.",
    ),
    click.option("--num-inference-steps", type=int, help="Denoising steps; the bundle's default if left out."),
    click.option("--stages", metavar="N1,N2,N3", help="Large, hybrid and small steps, instead of the default split."),
    click.option("--mask-ratio", type=float, help="Share of tokens the large model works on in hybrid steps. [default: 0.3]"),
    click.option(
        "--mask-threshold",
        type=float,
        help="Choose tokens that score above this many medians, instead of a fixed share.",
    ),
    click.option(
        "--mask-decay", type=float, default=0.9, show_default=True, help="What a score outside the mask keeps a step."
    ),
    click.option(
        "--drift", type=float, default=0.0, show_default=True, help="Weight of the small model's own change in scores."
    ),
    click.option(
        "--starvation",
        type=float,
        default=0.0,
        show_default=True,
        help="Score gained per step outside the mask, in mean scores.",
    ),
    click.option("--refresh-every", type=int, help="A full large call every so many hybrid steps; 0 for none."),
    click.option(
        "--correction",
        type=float,
        default=0.0,
        show_default=True,
        help="Fade of v_L - v_S added where the small model is alone.",
    ),
    click.option(
        "--solver",
        type=click.Choice(get_args(Solver)),
        default="euler",
        show_default=True,
        help="How velocities become the next latents; the others are of second order.",
    ),
    click.option("--adaptive", is_flag=True, help="End the large stage when the velocity settles (SRDiffusion's rule)."),
)
_SIZE = (
    click.option("--height", type=int, help="Pixels; the bundle's default if left out."),
    click.option("--width", type=int, help="Pixels; the bundle's default if left out."),
)


def schedule_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SCHEDULE):
        command = option(command)
    return command


def size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SIZE):
        command = option(command)
    return command


def plan_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The values of `schedule_options` and `size_options` as arguments of `HybridStitchPipeline.plan` and its call."""
    return {
        "schedule": options["schedule"],
        "num_inference_steps": options["num_inference_steps"],
        "height": options["height"],
        "width": options["width"],
        "stages": _parse_stages(options["stages"]),
        "mask": _mask_rule(options),
        "refresh_every": options["refresh_every"],
        "correction": options["correction"],
        "adaptive": options["adaptive"],
        "solver": options["solver"],
    }


def _parse_stages(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        large, hybrid, small = (int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"--stages {text!r} is not three whole numbers", fix="write them as large,hybrid,small: --stages 3,9,16"
        ) from None
    return large, hybrid, small


def _mask_rule(options: dict[str, Any]) -> MaskRule:
    if options["mask_ratio"] is not None and options["mask_threshold"] is not None:
        raise RequestError("--mask-ratio and --mask-threshold are two ways to choose the mask", fix="give one of them")
    ratio = MaskRule.ratio if options["mask_ratio"] is None else options["mask_ratio"]
    return MaskRule(ratio, options["mask_threshold"], options["mask_decay"], options["drift"], options["starvation"])


def find_bundle(name: str | None, device: int = 0) -> Path:
    """The bundle that is meant: a path, a name in the bundles folder, or the newest that runs on `device` or on the CPU; the
    demo's is made if there is none."""
    folder = bundles_folder()
    if name is not None:
        path = Path(name)
        for candidate in (path, Path(name + SUFFIX), folder / name, folder / (name + SUFFIX)):
            if candidate.is_dir() and (candidate.suffix == SUFFIX or (candidate / MANIFEST).is_file()):
                return candidate
        there = ", ".join(sorted(p.stem for p in folder.glob(f"*{SUFFIX}"))) or "no bundles"
        raise MissingError(
            f"there is no bundle {name!r}", found=f"{there} in {folder}", fix="give one of them, a path, or run `hst-trt build`"
        )
    from ..backends import runs_here

    if newest := newest_bundle(folder, lambda manifest: runs_here(manifest, device)):
        return newest
    from ..builder.build import build_bundle
    from ..recipe import load_recipe, load_target

    return build_bundle(load_recipe("demo"), load_target("cpu"), folder / f"demo-cpu{SUFFIX}").bundle.path
