"""From a recipe and a target to a bundle: graphs first, then what the target's backend makes of them.

The graphs come from an earlier `export` (possibly on another machine), from the package itself for the demo pair on a CPU,
or from an export that is run now. They are committed as a bundle of their own before a backend starts, so a build that
cannot be finished here, for want of a GPU or of TensorRT, loses nothing: the folder can be carried to the machine that can.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..bundle import (
    SCHEMA_VERSION,
    Bundle,
    Manifest,
    PartEntry,
    Staging,
    TargetEntry,
    fingerprint,
    link_or_copy,
    recover,
)
from ..errors import HstError, MissingError
from ..plan import BUCKET_RATIOS
from ..recipe import Recipe, Target, load_recipe
from ..tensor_names import LARGE, SMALL, VAE_DECODER
from . import onnxruntime, tensorrt

if TYPE_CHECKING:
    from ..export.exporter import PairExporter

__all__ = ["BuildOutcome", "build_bundle", "export_bundle", "shipped_demo"]

_DATA = Path(__file__).resolve().parent.parent / "data"
_SHIPPED = _DATA / "demo.hstb"
_COMPONENTS = {LARGE: "transformer", SMALL: "transformer_small", VAE_DECODER: "vae"}

OnPart = Callable[[str, bool], None]


@dataclass(frozen=True)
class BuildOutcome:
    """The bundle, and why it was made or left as it was."""

    bundle: Bundle
    made: bool
    reasons: tuple[str, ...]


def export_bundle(
    recipe: Recipe, target: Target, final: Path, *, force: bool = False, on_part: OnPart = lambda name, made: None
) -> BuildOutcome:
    """Exports the graphs of a pair into the bundle at `final`. For a CPU that is all there is to build; for a GPU the bundle
    is left in the state "graphs".

    Raises:
        MissingError: a model or one of the packages torch, diffusers, transformers, onnx is not there.
        HstError: the pair does not fit, a check failed, or the disk is full.
    """
    exporter = _exporter(recipe, target)
    existing, trouble = _look(final, target)
    return _export(exporter, final, existing, trouble, force, on_part)


def build_bundle(
    recipe: Recipe, target: Target, final: Path, *, force: bool = False, on_part: OnPart = lambda name, made: None
) -> BuildOutcome:
    """Builds a complete bundle at `final`.

    Raises:
        MissingError: the target's GPU or TensorRT is not here; the graphs are kept in the bundle, and the error names the
            command that finishes it.
    """
    existing, trouble = _look(final, target)
    if _is_shipped(recipe, target) and (existing is None or "shipped" in existing.manifest.parts):
        shipped = {"shipped": _shipped_hash()}
        reasons = _reasons(existing, trouble, shipped, force)
        if existing is not None and not reasons:
            return _unchanged(existing)
        return BuildOutcome(_install_shipped(final), made=True, reasons=reasons)
    if existing is not None and not force and not _changes_seen_from_here(existing, recipe, target):
        if existing.manifest.state == "graphs":
            tensorrt.finish(existing, target, recipe.given_as)
        return _unchanged(existing)
    outcome = _export(_exporter(recipe, target), final, existing, trouble, force, on_part)
    if outcome.bundle.manifest.state == "graphs":
        tensorrt.finish(outcome.bundle, target, recipe.given_as)
    return outcome


def _export(
    exporter: PairExporter, final: Path, existing: Bundle | None, trouble: str, force: bool, on_part: OnPart
) -> BuildOutcome:
    recipe, target = exporter.recipe, exporter.target
    inputs = exporter.inputs | {"recipe": _recipe_hash(recipe)}
    reasons = _reasons(existing, trouble, inputs, force)
    if existing is not None and not reasons:
        return _unchanged(existing)
    with Staging.open(final) as staging:
        if force:
            staging.clear()
        elif existing is not None:
            staging.adopt(existing, inputs)
        exported = exporter.run(staging, on_part)
        files = staging.files(exported.parts)
        entry = _target_entry(target)
        parts = {name: PartEntry(inputs=digest, files=tuple(staging.files([name]))) for name, digest in exporter.inputs.items()}
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=final.stem,
            created_by=f"hst_trt {__version__}",
            created=_now(),
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
            bucket_ratios=BUCKET_RATIOS,
            files=files,
            parts=parts | {"recipe": PartEntry(inputs=inputs["recipe"])},
            fingerprint=fingerprint(files, entry),
        )
        if target.backend == "onnxruntime":
            manifest = onnxruntime.completed(manifest)
        return BuildOutcome(staging.commit(manifest), made=True, reasons=reasons)


def _exporter(recipe: Recipe, target: Target, *, download: bool = True) -> PairExporter:
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


# -- the demo pair's graphs, which ship with the package -------------------------------------------------------------------
def shipped_demo() -> Path | None:
    """The folder with the demo pair's exported graphs (its weights lie in the pair's own directory)."""
    return _SHIPPED if (_SHIPPED / "manifest.json").is_file() else None


def _is_shipped(recipe: Recipe, target: Target) -> bool:
    """Whether a build is of the very recipe whose graphs ship: a recipe of the user's own may have the same name."""
    if target.backend != "onnxruntime" or shipped_demo() is None:
        return False
    return _recipe_hash(recipe) == _recipe_hash(load_recipe("demo"))


def _shipped_hash() -> str:
    return hashlib.sha256((_SHIPPED / "manifest.json").read_bytes()).hexdigest()


def _install_shipped(final: Path) -> Bundle:
    manifest = Manifest.model_validate_json((_SHIPPED / "manifest.json").read_bytes())
    with Staging.open(final) as staging:
        staging.clear()
        for name in manifest.files:
            source = _SHIPPED / name
            if not source.is_file():  # weights: graphs/COMPONENT/FILE
                component = Path(name).parts[1]
                source = _DATA / "demo_pair" / _COMPONENTS.get(component, component) / Path(name).name
            link_or_copy(source, staging.path / name)
        parts = {"shipped": PartEntry(inputs=_shipped_hash(), files=tuple(manifest.files))}
        update = {"name": final.stem, "created": _now(), "parts": parts}
        return staging.commit(onnxruntime.completed(manifest.model_copy(update=update)))


# -- what changed ----------------------------------------------------------------------------------------------------------
def _look(final: Path, target: Target) -> tuple[Bundle | None, str]:
    """The bundle that is there, or None and why it cannot be taken as it is."""
    recover(final)
    try:
        bundle = Bundle.open(final)
    except MissingError:
        return None, "there is no bundle yet"
    except HstError as exc:
        return None, f"the bundle that is there cannot be used: {exc.problem}"
    if bundle.manifest.target.name != target.name:
        return None, f"the bundle that is there is for {bundle.manifest.target.name}"
    return bundle, ""


def _reasons(existing: Bundle | None, trouble: str, inputs: dict[str, str], force: bool) -> tuple[str, ...]:
    """Why a bundle is to be made; empty if the one that is there is what `inputs` would give."""
    if force:
        return ("--force was given",)
    if existing is None:
        return (trouble,)
    before = {name: part.inputs for name, part in existing.manifest.parts.items()}
    changed = sorted(name for name in before.keys() | inputs.keys() if before.get(name) != inputs.get(name))
    return tuple(f"{name} is made from something else now" for name in changed)


def _changes_seen_from_here(existing: Bundle, recipe: Recipe, target: Target) -> bool:
    """Whether a bundle's models or recipe have changed.

    Graphs that wait for their engines may have been carried here: only their recipe is compared. So are those whose models
    or whose exporter are not on this machine; nothing is downloaded for a comparison.
    """
    recipe_part = existing.manifest.parts.get("recipe")
    if recipe_part is None or recipe_part.inputs != _recipe_hash(recipe):
        return True
    if existing.manifest.state == "graphs":
        return False
    try:
        inputs = _exporter(recipe, target, download=False).inputs | {"recipe": recipe_part.inputs}
    except MissingError:
        return False
    return bool(_reasons(existing, "", inputs, force=False))


def _recipe_hash(recipe: Recipe) -> str:
    """Of all that a recipe says; of a local directory only the name, since a bundle may be carried to another machine."""
    content = recipe.model_dump(mode="json", exclude={"given_as"})
    for role in ("large", "small"):
        if Path(content[role]["source"]).is_absolute():
            content[role]["source"] = Path(content[role]["source"]).name
    return hashlib.sha256(json.dumps([content, BUCKET_RATIOS], sort_keys=True).encode()).hexdigest()


def _unchanged(bundle: Bundle) -> BuildOutcome:
    return BuildOutcome(bundle, made=False, reasons=("nothing it was made from has changed",))


def _target_entry(target: Target) -> TargetEntry:
    return TargetEntry(
        name=target.name,
        backend=target.backend,
        backend_version="",
        precision=target.precision,
        os=platform.system().lower(),
        arch=platform.machine(),
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
