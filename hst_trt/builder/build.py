"""From a recipe and a target to a bundle: graphs first, then what the target's backend makes of them.

The graphs come from an earlier `export` (possibly on another machine), from the package itself for the demo pair on a CPU,
or from an export that is run now. They are committed as a bundle of their own before a backend starts, so a build that
cannot be finished here, for want of a GPU or of TensorRT, loses nothing: the folder can be carried to the machine that can.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..bundle import (
    SCHEMA_VERSION,
    Bundle,
    Manifest,
    Staging,
    TargetEntry,
    fingerprint,
    link_or_copy,
    translated_disk_errors,
)
from ..errors import HstError, MissingError
from ..plan import BUCKET_RATIOS
from ..recipe import Recipe, Target
from ..tensor_names import LARGE, SMALL, VAE_DECODER
from . import onnxruntime, tensorrt

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
    try:
        import diffusers  # noqa: F401  (each is needed by the checks; better to say so before anything is written)
        import onnx  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as exc:
        raise MissingError(
            f"exporting needs the package {exc.name!r}, which is not installed",
            fix='pip install "hst_trt[export]" -c constraints.txt',
        ) from exc
    from ..export.exporter import PairExporter

    exporter = PairExporter(recipe, target)
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
    backend = onnxruntime if target.backend == "onnxruntime" else tensorrt
    existing = None if force else _open_if_sound(final, target)
    if existing is not None and existing.manifest.state == "graphs":
        return BuildOutcome(
            backend.finish(existing, target), made=True, reasons=("its graphs were there, its engines were not",)
        )
    if recipe.name == "demo" and target.backend == "onnxruntime" and shipped_demo() is not None:
        if existing is not None and not (reasons := _differences(final, _shipped_inputs())):
            return BuildOutcome(existing, made=False, reasons=("nothing it was made from has changed",))
        reasons = ("--force was given",) if force else _differences(final, _shipped_inputs())
        return BuildOutcome(backend.finish(_install_shipped(final), target), made=True, reasons=reasons)
    outcome = export_bundle(recipe, target, final, force=force, on_part=on_part)
    if not outcome.made and outcome.bundle.manifest.state == "complete":
        return outcome
    return BuildOutcome(backend.finish(outcome.bundle, target), made=True, reasons=outcome.reasons)


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
