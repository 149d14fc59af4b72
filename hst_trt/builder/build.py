"""From a recipe and a target to a bundle: graphs first, then what the target's backend makes of them.

The graphs come from an earlier `export` (possibly on another machine), from the package itself for the demo pair on a CPU,
or from an export that is run now. They are committed as a bundle of their own before a backend starts, so a build that
cannot be finished here, for want of a GPU or of TensorRT, loses nothing: the folder can be carried to the machine that can.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..bundle import (
    SCHEMA_VERSION,
    Bundle,
    Manifest,
    Staging,
    TargetEntry,
    fingerprint,
    link_or_copy,
    recover,
)
from ..disk import translated_disk_errors
from ..errors import HstError, MissingError
from ..plan import BUCKET_RATIOS
from ..recipe import Recipe, Target
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
    """Exports the graphs of a pair into the bundle at `final`, in the state "graphs".

    Raises:
        MissingError: a model or one of the packages torch, diffusers, transformers, onnx is not there.
        HstError: the pair does not fit, a check failed, or the disk is full.
    """
    exporter = _exporter(recipe, target)
    recover(final)
    reasons = ("--force was given",) if force else _differences(final, exporter.inputs)
    if not reasons:
        return BuildOutcome(Bundle.open(final), made=False, reasons=("nothing it was made from has changed",))
    with translated_disk_errors(final), Staging.open(final) as staging:
        if force:
            staging.clear()
        exported = exporter.run(staging, on_part)
        files = staging.files(exported.parts)
        entry = _target_entry(target, backend_version="")
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
            inputs=exporter.inputs,
            fingerprint=fingerprint(files, entry),
        )
        return BuildOutcome(staging.commit(manifest), made=True, reasons=reasons)


def build_bundle(
    recipe: Recipe, target: Target, final: Path, *, force: bool = False, on_part: OnPart = lambda name, made: None
) -> BuildOutcome:
    """Builds a complete bundle at `final`.

    Raises:
        MissingError: the target's GPU or TensorRT is not here; the graphs are kept in the bundle, and the error names the
            command that finishes it.
    """
    finish = onnxruntime.finish if target.backend == "onnxruntime" else partial(tensorrt.finish, pair=recipe.given_as)
    recover(final)
    existing = None if force else _open_if_sound(final, target)
    shipped = recipe.name == "demo" and target.backend == "onnxruntime" and shipped_demo() is not None
    if shipped and (existing is None or "shipped" in existing.manifest.inputs):
        reasons = ("--force was given",) if force else _differences(final, _shipped_inputs())
        if existing is not None and not reasons:
            return BuildOutcome(existing, made=False, reasons=("nothing it was made from has changed",))
        return BuildOutcome(finish(_install_shipped(final), target), made=True, reasons=reasons)
    if existing is not None and not (reasons := _differences_if_known(recipe, target, final)):
        if existing.manifest.state == "complete":
            return BuildOutcome(existing, made=False, reasons=("nothing it was made from has changed",))
        finished = finish(existing, target)
        return BuildOutcome(finished, made=True, reasons=("its graphs were there, its engines were not",))
    outcome = export_bundle(recipe, target, final, force=force, on_part=on_part)
    return BuildOutcome(finish(outcome.bundle, target), made=True, reasons=outcome.reasons)


def _exporter(recipe: Recipe, target: Target) -> PairExporter:
    """An exporter for the pair.

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

    return PairExporter(recipe, target)


# -- the demo pair's graphs, which ship with the package -------------------------------------------------------------------
def shipped_demo() -> Path | None:
    """The folder with the demo pair's exported graphs (its weights lie in the pair's own directory)."""
    return _SHIPPED if (_SHIPPED / "manifest.json").is_file() else None


def _shipped_inputs() -> dict[str, str]:
    return {"shipped": hashlib.sha256((_SHIPPED / "manifest.json").read_bytes()).hexdigest()}


def _install_shipped(final: Path) -> Bundle:
    manifest = Manifest.model_validate_json((_SHIPPED / "manifest.json").read_bytes())
    with translated_disk_errors(final), Staging.open(final) as staging:
        staging.clear()
        for name in manifest.files:
            source = _SHIPPED / name
            if not source.is_file():  # weights: graphs/COMPONENT/FILE
                component = Path(name).parts[1]
                source = _DATA / "demo_pair" / _COMPONENTS.get(component, component) / Path(name).name
            link_or_copy(source, staging.path / name)
        update = {"name": final.stem, "created": _now(), "inputs": _shipped_inputs()}
        return staging.commit(manifest.model_copy(update=update))


# -- what changed ----------------------------------------------------------------------------------------------------------
def _open_if_sound(final: Path, target: Target) -> Bundle | None:
    """The bundle that is there, unless it is damaged or for another target (then it is built anew)."""
    try:
        bundle = Bundle.open(final)
    except HstError:
        return None
    return bundle if bundle.manifest.target.name == target.name else None


def _differences(final: Path, inputs: dict[str, str]) -> tuple[str, ...]:
    """Why the bundle at `final` is not what `inputs` would give; empty if it is."""
    try:
        before = Bundle.open(final).manifest.inputs
    except MissingError:
        return ("there is no bundle yet",)
    except HstError as exc:
        return (f"the bundle that is there cannot be used: {exc.problem}",)
    parts = sorted(before.keys() | inputs.keys())
    return tuple(f"{part} is made from something else now" for part in parts if before.get(part) != inputs.get(part))


def _differences_if_known(recipe: Recipe, target: Target, final: Path) -> tuple[str, ...]:
    """As `_differences`, for a bundle that may have been carried here: without its models or torch it is taken as it is."""
    try:
        return _differences(final, _exporter(recipe, target).inputs)
    except MissingError:
        return ()


def _target_entry(target: Target, backend_version: str) -> TargetEntry:
    return TargetEntry(
        name=target.name,
        backend=target.backend,
        backend_version=backend_version,
        precision=target.precision,
        os=platform.system().lower(),
        arch=platform.machine(),
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
