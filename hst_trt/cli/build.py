"""``hst-trt export`` and ``hst-trt build``: from models to a bundle."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

import click

from ..bundle import SUFFIX, Manifest, bundles_folder
from ..disk import free_bytes
from ..errors import RequestError
from ..recipe import PrecisionName, Recipe, Target, departures, load_recipe, load_target, target_names
from ..tensorrt_module import TensorRTBackendName
from .console import bars, messages, print_json, tables

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ..builder.build import BuildPlan
    from ..builder.tensorrt import EngineProgress

__all__ = ["build", "export"]

_HEARTBEAT = 30.0  # seconds between lines where no bar is watched


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option(
                "--gpu",
                default="auto",
                show_default=True,
                metavar="NAME",
                help="Target: auto, " + ", ".join(target_names()) + ".",
            ),
            click.option("--pair", metavar="NAME|RECIPE.toml", help="Pair of models; by default the target's own."),
            click.option(
                "--backend",
                type=click.Choice(get_args(TensorRTBackendName)),
                help="What builds a GPU's engines; by default the target's own.",
            ),
            click.option(
                "--precision",
                type=click.Choice(get_args(PrecisionName)),
                help="What a GPU's graphs compute in; by default the target's own.",
            ),
            click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for bundles."),
            click.option("--force", is_flag=True, help="Build even if nothing has changed."),
            click.option("--explain", is_flag=True, help="Say why something is built, or not."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text."),
        )
    ):
        command = option(command)
    return command


@click.command()
@_common
def export(explain: bool, as_json: bool, force: bool, **choice: Any) -> None:
    """Write the ONNX graphs of a pair, and check each against PyTorch.

    The result is a bundle in the state "graphs"; `hst-trt build` goes on from there, here or on another machine.
    """
    from ..builder.build import export_bundle

    recipe, target, final = _resolve(**choice)
    _announce(recipe, target)
    with _Watch(quiet=as_json) as watch:
        outcome = export_bundle(recipe, target, final, force=force, on_part=watch.part)
    _report(outcome, explain, as_json)


@click.command()
@_common
@click.option("--dry-run", is_flag=True, help="Say what would be built and what that takes, and stop.")
def build(explain: bool, as_json: bool, force: bool, dry_run: bool, **choice: Any) -> None:
    """Build a bundle for a target: graphs, and for a GPU its engines.

    TensorRT builds engines on the GPU that they are for; elsewhere the graphs are kept, with exit code 4. TensorRT-RTX builds
    them without a GPU.

    \b
    hst-trt build --gpu cpu                             the demo pair, ready to run
    hst-trt build --gpu h100                            on an H100: the engines of SD3.5
    hst-trt build --gpu a100 --backend tensorrt-rtx     TensorRT-RTX's engines for an A100, on any machine
    """
    from ..builder.build import build_bundle, plan_build

    recipe, target, final = _resolve(**choice)
    if dry_run:
        _print_plan(recipe, target, final, plan_build(recipe, target, final, force=force), as_json)
        return
    _announce(recipe, target)
    with _Watch(quiet=as_json) as watch:
        outcome = build_bundle(recipe, target, final, force=force, on_part=watch.part, on_engine=watch.engine)
    _report(outcome, explain, as_json)


def _resolve(
    gpu: str, pair: str | None, backend: str | None, precision: str | None, output: Path | None
) -> tuple[Recipe, Target, Path]:
    """The recipe, the target and the bundle's path, whose name says what of the target is not its own."""
    from ..builder.detect import detect_target

    target = load_target(detect_target() if gpu == "auto" else gpu)
    chosen = {key: value for key, value in (("backend", backend), ("precision", precision)) if value is not None}
    if chosen and target.backend == "onnxruntime":
        raise RequestError(
            f"--{next(iter(chosen))} is a choice for GPUs, and the target is {target.name}",
            found=f"{target.name} runs {target.precision} graphs in ONNX Runtime",
            fix="name a GPU with --gpu, or leave the option out",
        )
    target = target.model_copy(update=chosen)
    recipe = load_recipe(pair or target.default_recipe)
    name = "-".join([recipe.name, target.name, *departures(target).values()])
    return recipe, target, (output or bundles_folder()) / f"{name}{SUFFIX}"


def _announce(recipe: Recipe, target: Target) -> None:
    messages.print(f"{recipe.name} for {target.name} ({target.backend}, {target.precision})")


# -- while it is built -------------------------------------------------------------------------------------------------------
class _Watch(AbstractContextManager["_Watch"]):
    """Shows a build: bars on a terminal, elsewhere a line every half minute of an engine that takes longer."""

    def __init__(self, quiet: bool) -> None:
        self._bars = bars(quiet)
        self._beats = not messages.is_terminal
        self._parts = 0
        self._tasks: dict[str, TaskID] = {}
        self._started = self._beat = 0.0

    def __enter__(self) -> _Watch:
        self._progress = self._bars.__enter__()
        self._graphs = self._progress.add_task("graphs", total=None, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self._progress.update(self._graphs, total=max(self._parts, 1), completed=max(self._parts, 1), note="")
        self._bars.__exit__(kind, value, traceback)

    def part(self, name: str, made: bool) -> None:
        self._progress.update(self._graphs, completed=self._parts, note=name if made else f"{name} (was finished)")
        self._parts += 1

    def engine(self, at: EngineProgress) -> None:
        if "engines" not in self._tasks:
            self._progress.update(self._graphs, total=max(self._parts, 1), completed=max(self._parts, 1), note="")
            self._tasks["engines"] = self._progress.add_task("engines", total=at.of, note="")
        finished = at.state != "building"
        self._progress.update(self._tasks["engines"], completed=at.number - (not finished), note=at.name)
        if at.name not in self._tasks:
            self._tasks[at.name] = self._progress.add_task(at.name, total=100, note="")
            self._started = self._beat = time.monotonic()
        note = "(was finished)" if at.state == "kept" else at.phase
        self._progress.update(self._tasks[at.name], completed=100 if finished else int(100 * at.done), note=note)
        if finished:  # a bar for each engine under way, not for all that ever were
            self._progress.remove_task(self._tasks[at.name])
        elif self._beats and time.monotonic() - self._beat >= _HEARTBEAT:
            self._beat = time.monotonic()
            seconds = self._beat - self._started
            messages.print(f"engine {at.name} ({at.number} of {at.of}): {at.phase}, {100 * at.done:.0f} %, {seconds:.0f} s")


# -- what it came to ---------------------------------------------------------------------------------------------------------
def _report(outcome: Any, explain: bool, as_json: bool) -> None:
    manifest = outcome.bundle.manifest
    if as_json:
        content = {"bundle": str(outcome.bundle.path), "made": outcome.made, "reasons": list(outcome.reasons)}
        described = {"recipe": manifest.recipe, "target": manifest.target.name, "state": manifest.state}
        built = {"backend": manifest.target.backend, "kept": list(outcome.kept), "fingerprint": manifest.fingerprint}
        print_json("hst_trt.build/1", content | described | built)
        return
    if explain:
        for reason in outcome.reasons:
            messages.print(f"{'built' if outcome.made else 'not built'}: {reason}")
        if outcome.kept:
            messages.print(f"not built: engines {', '.join(outcome.kept)}: nothing they were made from has changed")
    messages.print(("made " if outcome.made else "up to date: ") + _content(manifest))
    click.echo(outcome.bundle.path)


def _content(manifest: Manifest) -> str:
    engines = ""
    if manifest.engines:
        target = manifest.target
        sms = ", ".join(f"SM{sm}" for sm in target.sms)
        engines = f", {len(manifest.engines)} engines of {target.backend} {target.backend_version} for {sms}"
    return f"{len(manifest.graphs)} graphs{engines}, state {manifest.state}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _print_plan(recipe: Recipe, target: Target, final: Path, plan: BuildPlan, as_json: bool) -> None:
    """What a build would do. Estimates say what they are of."""
    from ..builder.estimate import host_memory

    engines = plan.estimate.engines if plan.estimate is not None else {}
    building, memory = [engines[name] for name in plan.rebuilt], host_memory()
    totals = {
        "disk_bytes": sum(engine.engine_bytes for engine in building),
        "host_bytes": max((engine.host_bytes for engine in building), default=0),
        "gpu_weight_bytes": sum(engine.engine_bytes for engine in engines.values()),
        "gpu_cache_bytes": plan.estimate.cache_bytes if plan.estimate is not None else 0,
        "seconds": round(sum(engine.seconds for engine in building), 1),
    }
    free = {"disk_free_bytes": free_bytes(final.parent), "host_free_bytes": memory.free}
    if as_json:
        described = {"recipe": recipe.name, "target": target.name, "backend": target.backend, "precision": target.precision}
        made = {"bundle": str(final), "exists": final.exists(), "reasons": list(plan.reasons), "trouble": plan.trouble}
        listed = {"sms": list(plan.tools.sms) if plan.tools else [], "engines": [vars(engine) for engine in building]}
        print_json("hst_trt.build_plan/1", made | described | listed | {"estimate": totals if engines else None} | free)
        return
    from rich.table import Table

    state = "is there" if final.exists() else "would be made"
    tables.print(f"{recipe.name} for {target.name} ({target.backend}, {target.precision}): {final} {state}")
    for reason in plan.reasons or ("nothing: nothing it was made from has changed",):
        tables.print(f"would be built: {reason}")
    if plan.trouble:
        tables.print(f"the engines cannot be built here: {plan.trouble}")
    if target.backend == "onnxruntime":
        return
    if plan.estimate is None:
        tables.print("no estimate: the pair's models, or the packages that read them, are not on this machine")
        return
    if building:
        table = Table("engine", "profiles", "engine MiB", "host memory MiB", "seconds")
        for engine in building:
            mib = (f"{size / 2**20:.0f}" for size in (engine.engine_bytes, engine.host_bytes))
            table.add_row(engine.name, str(engine.profiles), *mib, f"{engine.seconds:.0f}")
        tables.print(table)
        tables.print(
            f"by estimate {totals['disk_bytes'] / 2**30:.2f} GiB of disk ({free['disk_free_bytes'] / 2**30:.1f} free), at most "
            f"{totals['host_bytes'] / 2**30:.2f} GiB of host memory ({memory.free / 2**30:.1f} free), "
            f"{_duration(totals['seconds'])} of one CPU core"
        )
        tables.print(
            "the estimate is from TensorRT-RTX 1.7.1 on a CPU; TensorRT measures kernels on the GPU, which takes longer"
        )
    weights, cache = totals["gpu_weight_bytes"] / 2**30, totals["gpu_cache_bytes"] / 2**30
    tables.print(f"to run: {weights:.2f} GiB of GPU memory for weights, {cache:.2f} GiB for the cache, and activations")
