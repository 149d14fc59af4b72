"""The part of a bundle that an export makes: graphs with their weights, tokenizers and scheduler, and what describes them."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..bundle import SCHEMA_VERSION, Bundle, Manifest, PartEntry, Staging, TargetEntry, fingerprint
from ..errors import MissingError
from ..recipe import Recipe, Target
from . import onnxruntime

if TYPE_CHECKING:
    from ..export.exporter import PairExporter

__all__ = ["ENGINE_PART", "OnPart", "add_graphs", "graph_inputs", "graphs_of", "make_exporter", "now", "recipe_hash"]

OnPart = Callable[[str, bool], None]  # a part's name, and whether it is made or taken over
ENGINE_PART = ".engine"  # ends the names of parts that are engines


def make_exporter(recipe: Recipe, target: Target, *, download: bool = True) -> PairExporter:
    """An exporter for the pair, whose models are fetched if need be and if `download` allows it.

    Raises:
        MissingError: one of the packages that exporting needs is not installed, or a model is not there.
    """
    missing = [name for name in ("torch", "diffusers", "transformers", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(
            f"exporting needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            fix='pip install "hst_trt[export]"',
        )
    from ..export.exporter import PairExporter

    return PairExporter(recipe, target, download=download)


def add_graphs(staging: Staging, exporter: PairExporter, existing: Bundle | None, force: bool, on_part: OnPart) -> Manifest:
    """Exports into a staging folder what it lacks.

    Args:
        existing: a bundle whose parts are taken over where they are what they would be again.
        force: take nothing over.

    Returns:
        What describes it: complete for ONNX Runtime, else in the state "graphs".
    """
    recipe, target = exporter.recipe, exporter.target
    inputs = graph_inputs(exporter)
    if force:
        staging.clear()
    elif existing is not None:
        staging.adopt(existing, inputs)
    exported = exporter.run(staging, on_part)
    files = staging.files(exported.parts)
    entry = TargetEntry(
        name=target.name,
        backend=target.backend,
        backend_version="",
        precision=target.precision,
        os=platform.system().lower(),
        arch=platform.machine(),
    )
    parts = {name: PartEntry(inputs=digest, files=tuple(staging.files([name]))) for name, digest in exporter.inputs.items()}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=staging.final.stem,
        created_by=f"hst_trt {__version__}",
        created=now(),
        state="graphs",
        target=entry,
        recipe=recipe.name,
        models=exporter.models(),
        vae_scale=exporter.vae_scale,
        t5_length=recipe.max_sequence_length,
        tokenizers=exported.tokenizers,
        scheduler="scheduler.json",
        graphs=exported.graphs,
        defaults=recipe.defaults,
        limits=recipe.limits,
        bucket_ratios=target.bucket_ratios,
        files=files,
        parts=parts | {"recipe": PartEntry(inputs=inputs["recipe"])},
        fingerprint=fingerprint(files, entry),
    )
    return onnxruntime.completed(manifest) if target.backend == "onnxruntime" else manifest


def graph_inputs(exporter: PairExporter) -> dict[str, str]:
    """For each part that an export makes a hash of what it is made from, and one of what the manifest takes from the recipe."""
    return exporter.inputs | {"recipe": recipe_hash(exporter.recipe, exporter.target)}


def recipe_hash(recipe: Recipe, target: Target) -> str:
    """Of all in a recipe and a target that graphs and manifest depend on; what only engines are tuned for is not in it. Of a
    local directory only the name, since a bundle may be carried to another machine."""
    content = recipe.model_dump(mode="json", exclude={"given_as", "resolutions"})
    for role in ("large", "small"):
        if Path(content[role]["source"]).is_absolute():
            content[role]["source"] = Path(content[role]["source"]).name
    return hashlib.sha256(json.dumps([content, target.bucket_ratios], sort_keys=True).encode()).hexdigest()


def graphs_of(manifest: Manifest) -> Manifest:
    """What a manifest says of the graphs alone. Costs were measured on what a build made of them."""
    engines = {engine.path for engine in manifest.engines.values()}
    files = {name: entry for name, entry in manifest.files.items() if name not in engines}
    parts = {name: part for name, part in manifest.parts.items() if not name.endswith(ENGINE_PART)}
    return manifest.model_copy(update={"state": "graphs", "engines": {}, "files": files, "parts": parts, "costs": ()})


def now() -> str:
    """For a manifest's `created`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
