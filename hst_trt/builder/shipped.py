"""The demo pair's graphs, which ship with the package, so that its bundle for a CPU is a copy and takes no exporter."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..bundle import Bundle, Manifest, PartEntry, Staging, link_or_copy
from ..recipe import Recipe, Target, load_recipe
from ..tensor_names import LARGE, SMALL, VAE_DECODER
from . import onnxruntime
from .graphs import now, recipe_hash

__all__ = ["install_shipped", "is_shipped", "shipped_demo", "shipped_hash", "with_known_calibrations"]

_DATA = Path(__file__).resolve().parent.parent / "data"
_SHIPPED = _DATA / "demo.hstb"
_COMPONENTS = {LARGE: "transformer", SMALL: "transformer_small", VAE_DECODER: "vae"}


def shipped_demo() -> Path | None:
    """The folder with the demo pair's exported graphs (its weights lie in the pair's own directory)."""
    return _SHIPPED if (_SHIPPED / "manifest.json").is_file() else None


def is_shipped(recipe: Recipe, target: Target) -> bool:
    """Whether a build is of the very recipe whose graphs ship: a recipe of the user's own may have the same name."""
    if target.backend != "onnxruntime" or shipped_demo() is None:
        return False
    return recipe_hash(recipe, target) == recipe_hash(load_recipe("demo"), target)


def with_known_calibrations(manifest: Manifest, existing: Bundle | None) -> Manifest:
    """The manifest with the calibrations of a bundle of the very same files: that which is replaced, or that which ships."""
    known = [existing.manifest] if existing is not None else []
    if shipped_demo() is not None:
        known.append(_shipped_manifest())
    for other in known:
        if other.calibrations and other.files == manifest.files:
            return manifest.model_copy(update={"calibrations": other.calibrations})
    return manifest


def _shipped_manifest() -> Manifest:
    return Manifest.model_validate_json((_SHIPPED / "manifest.json").read_bytes())


def shipped_hash() -> str:
    return hashlib.sha256((_SHIPPED / "manifest.json").read_bytes()).hexdigest()


def install_shipped(final: Path) -> Bundle:
    manifest = _shipped_manifest()
    with Staging.open(final) as staging:
        staging.clear()
        for name in manifest.files:
            source = _SHIPPED / name
            if not source.is_file():  # weights: graphs/COMPONENT/FILE
                component = Path(name).parts[1]
                source = _DATA / "demo_pair" / _COMPONENTS.get(component, component) / Path(name).name
            link_or_copy(source, staging.path / name)
        parts = {"shipped": PartEntry(inputs=shipped_hash(), files=tuple(manifest.files))}
        update = {"name": final.stem, "created": now(), "parts": parts}
        return staging.commit(onnxruntime.completed(manifest.model_copy(update=update)))
