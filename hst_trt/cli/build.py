"""``hst-trt export`` and ``hst-trt build``: from models to a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..bundle import SUFFIX, bundles_folder
from ..recipe import Recipe, Target, load_recipe, load_target, target_names
from .console import bars, messages, print_json, tables

__all__ = ["build", "export"]


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
def export(gpu: str, pair: str | None, output: Path | None, force: bool, explain: bool, as_json: bool) -> None:
    """Write the ONNX graphs of a pair, and check each against PyTorch.

    The result is a bundle in the state "graphs"; `hst-trt build` goes on from there, here or on another machine.
    """
    from ..builder.build import export_bundle

    _run(export_bundle, gpu, pair, output, force, explain, as_json)


@click.command()
@_common
@click.option("--dry-run", is_flag=True, help="Say what would be built and where, and stop.")
def build(gpu: str, pair: str | None, output: Path | None, force: bool, explain: bool, as_json: bool, dry_run: bool) -> None:
    """Build a bundle for a target. For a GPU, this version stops after the graphs, with exit code 4.

    \b
    hst-trt build --gpu cpu           the demo pair, ready to run
    hst-trt build --gpu h100          exports and keeps the graphs of SD3.5, and says how to go on
    """
    from ..builder.build import build_bundle

    if dry_run:
        recipe, target, final = _resolve(gpu, pair, output)
        if as_json:
            described = {"recipe": recipe.name, "target": target.name, "backend": target.backend, "precision": target.precision}
            print_json("hst_trt.build-plan/1", {"bundle": str(final), "exists": final.exists()} | described)
            return
        state = "is there and would be checked" if final.exists() else "would be made"
        engines = "" if target.backend == "onnxruntime" else ", graphs only: this version builds no engines yet"
        tables.print(f"{recipe.name} for {target.name} ({target.backend}, {target.precision}): {final} {state}{engines}")
        return
    _run(build_bundle, gpu, pair, output, force, explain, as_json)


def _resolve(gpu: str, pair: str | None, output: Path | None) -> tuple[Recipe, Target, Path]:
    from ..builder.detect import detect_target

    target = load_target(detect_target() if gpu == "auto" else gpu)
    recipe = load_recipe(pair or target.default_recipe)
    return recipe, target, (output or bundles_folder()) / f"{recipe.name}-{target.name}{SUFFIX}"


def _run(
    make: Callable[..., Any], gpu: str, pair: str | None, output: Path | None, force: bool, explain: bool, as_json: bool
) -> None:
    recipe, target, final = _resolve(gpu, pair, output)
    messages.print(f"{recipe.name} for {target.name} ({target.backend}, {target.precision})")
    with bars(quiet=as_json) as progress:
        parts = progress.add_task("graphs", total=None, note="")
        count = 0

        def on_part(name: str, made: bool) -> None:
            nonlocal count
            progress.update(parts, completed=count, note=name if made else f"{name} (was finished)")
            count += 1

        outcome = make(recipe, target, final, force=force, on_part=on_part)
        progress.update(parts, total=max(count, 1), completed=max(count, 1), note="")
    manifest = outcome.bundle.manifest
    if as_json:
        content = {"bundle": str(outcome.bundle.path), "made": outcome.made, "reasons": list(outcome.reasons)}
        described = {"recipe": manifest.recipe, "target": manifest.target.name, "state": manifest.state}
        print_json("hst_trt.build/1", content | described | {"fingerprint": manifest.fingerprint})
        return
    if explain:
        for reason in outcome.reasons:
            messages.print(f"{'built' if outcome.made else 'not built'}: {reason}")
    messages.print(("made " if outcome.made else "up to date: ") + f"{len(manifest.graphs)} graphs, state {manifest.state}")
    click.echo(outcome.bundle.path)
