"""Options that several commands share, and how their values become the library's."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from ..bundle import MANIFEST, SUFFIX, bundles_folder, newest_bundle
from ..compare.rows import NamedSchedule
from ..errors import MissingError, RequestError
from ..plan import MaskRule, Schedule
from ..planner.choose import Budget
from ..schedule import Solver, TimestepSpacing

__all__ = [
    "BUNDLE",
    "DEVICE",
    "PROMPTS",
    "THREADS",
    "budget_of",
    "budget_options",
    "find_bundle",
    "plan_arguments",
    "prompts_of",
    "schedule_options",
    "schedules_of",
    "service_options",
    "size_options",
]

BUNDLE = click.option(
    "--bundle", metavar="NAME|PATH", help="Bundle to use; by default the newest that runs here, else the demo pair's."
)
PROMPTS = click.option(
    "--prompts-file",
    type=click.Path(path_type=Path),
    help="Prompts, one a line; the number of a line, from 0, is its seed.",
)

DEVICE = click.option(
    "--device", type=click.IntRange(min=0), default=0, show_default=True, help="Which GPU, for bundles of engines."
)
THREADS = click.option(
    "--threads", type=click.IntRange(min=0), default=0, help="Threads of a call; 0 takes one per physical core."
)

_SERVICE = (
    DEVICE,
    THREADS,
    click.option("--queue", type=click.IntRange(min=1), default=64, show_default=True, help="How many requests may wait."),
    click.option(
        "--deadline",
        type=click.FloatRange(min=0, min_open=True),
        default=300.0,
        show_default=True,
        help="Seconds a request may take, waiting and drawing.",
    ),
    click.option(
        "--max-batch",
        type=click.IntRange(min=0),
        default=0,
        help="Images drawn together, of requests that allow it. [default: 4 on a CPU, 1 on a GPU]",
    ),
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
    click.option("--mask-seed", type=int, help="Draw every mask at random from this seed instead: a control."),
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
    click.option(
        "--timestep-spacing",
        type=click.Choice(get_args(TimestepSpacing)),
        default="linspace",
        show_default=True,
        help="Where steps lie: as diffusers has them, or evenly down to 0, which is better with few.",
    ),
    click.option("--shift", type=float, help="Sigma shift; more puts more steps where noise is high. [default: the pair's]"),
    click.option("--adaptive", is_flag=True, help="End the large stage when the velocity settles (SRDiffusion's rule)."),
)
_SIZE = (
    click.option("--height", type=int, help="Pixels; the bundle's default if left out."),
    click.option("--width", type=int, help="Pixels; the bundle's default if left out."),
)


_BUDGET = (
    click.option("--speedup", type=float, help="Choose the schedule: a loop so many times faster than the baseline's."),
    click.option("--latency", type=float, help="Choose the schedule: so many seconds from prompt to picture."),
)


def budget_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--speedup` and `--latency`, of which `budget_of` makes a budget."""
    for option in reversed(_BUDGET):
        command = option(command)
    return command


def budget_of(speedup: float | None, latency: float | None) -> Budget | None:
    """The budget that a schedule is to be chosen for; None where the options themselves say what the schedule is.

    Raises:
        RequestError: both a budget and a schedule are given.
    """
    if speedup is None and latency is None:
        return None
    context = click.get_current_context()
    names = [option.name for option in _line.params if option.name]
    given = [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if given:
        raise RequestError(
            f"--{given[0].replace('_', '-')} says what the schedule is, and a budget chooses one",
            fix="leave out one of the two",
        )
    return Budget(speedup, latency)


def service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Arguments of `hst_trt.server.service.ImageService`."""
    for option in reversed(_SERVICE):
        command = option(command)
    return command


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
        "timestep_spacing": options["timestep_spacing"],
        "shift": options["shift"],
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
    return MaskRule(
        ratio, options["mask_threshold"], options["mask_decay"], options["drift"], options["starvation"], options["mask_seed"]
    )


@click.command(add_help_option=False)
@schedule_options
def _line(**options: Any) -> None:
    """A schedule in a file of schedules."""


def schedules_of(file: Path) -> list[NamedSchedule]:
    """The schedules of a file: in each line a name, a colon, and the options that one would give to ``hst-trt run``.

    Raises:
        RequestError: a line that is none, or an option that does not exist; MissingError: no such file.
    """
    rows: list[NamedSchedule] = []
    for number, line in enumerate(_lines(file, "schedules"), start=1):
        name, colon, options = line.partition(":")
        if not colon or not name.strip() or name.strip() in {row.name for row in rows}:
            raise RequestError(
                f"{file}: schedule {number} needs a name of its own and a colon before its options",
                found=line,
                fix='write lines like "fewer steps: --schedule large --num-inference-steps 11"',
            )
        try:
            context = _line.make_context(name.strip(), shlex.split(options))
        except (click.ClickException, ValueError) as exc:
            found = exc.format_message() if isinstance(exc, click.ClickException) else str(exc)
            raise RequestError(f"{file}: the options of {name.strip()!r} are not usable", found=found) from exc
        settings = plan_arguments(context.params | {"height": None, "width": None})
        rows.append(NamedSchedule(name.strip(), {key: settings[key] for key in settings.keys() - {"height", "width"}}))
    if not rows:
        raise RequestError(f"the schedules file {file} has no schedules", fix="write one a line: NAME: OPTIONS")
    return rows


def prompts_of(file: Path | None) -> list[str]:
    """The prompts of a file, one a line; empty lines and those that begin with # are none."""
    if file is None:
        raise RequestError("prompts are needed", fix="give --prompts-file, a file with one prompt a line")
    if prompts := _lines(file, "prompts"):
        return prompts
    raise RequestError(f"the prompts file {file} has no prompts", fix="write one prompt a line")


def _lines(file: Path, what: str) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise MissingError(f"the {what} file {file} cannot be read", found=str(exc)) from exc
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


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
