"""Finds the models of a recipe, in a local directory or the hub's cache, and refuses pairs that cannot be stitched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HstError, IncompatibleError, MissingError
from ..recipe import PACKAGE_PREFIX, ModelSource, Recipe
from .weights import WeightStore

__all__ = ["PairFolders", "check_stitchable", "read_config", "resolve_pair"]

_DATA = Path(__file__).resolve().parent.parent / "data"
_WANTED = ["*.json", "*.txt", "*.model", "*.safetensors"]
_WHOLE_MODEL = ["model_index.json", *(f"*/{name}" for name in _WANTED)]
_UNWANTED = ["*fp16*", "sd3*.safetensors", "text_encoders/*", "*.incl_clips*"]


@dataclass(frozen=True)
class PairFolders:
    """`root` has everything that both share (the large model's directory); `large` and `small` are transformer folders."""

    root: Path
    large: Path
    small_root: Path
    small: Path

    def component(self, name: str) -> Path | None:
        """A component folder of the root, or None where the pipeline goes without it (T5 may be absent)."""
        index = read_config(self.root / "model_index.json")
        entry = index.get(name)
        return self.root / name if entry and entry[0] and (self.root / name).is_dir() else None


def resolve_pair(recipe: Recipe, *, download: bool = True) -> PairFolders:
    """The folders of a recipe's models.

    Raises:
        MissingError: a model is neither in a local directory nor whole in the hub's cache, and cannot be fetched.
    """
    root = small_root = _resolve(recipe.large, _WHOLE_MODEL, download)
    if (recipe.small.source, recipe.small.revision) != (recipe.large.source, recipe.large.revision):
        component = [f"{recipe.small.component}/{name}" for name in _WANTED]
        small_root = _resolve(recipe.small, [*component, "vae/config.json", "scheduler/*.json"], download)
    folders = PairFolders(root, root / recipe.large.component, small_root, small_root / recipe.small.component)
    for folder in (folders.large, folders.small):
        if not (folder / "config.json").is_file():
            raise MissingError(
                f"there is no transformer in {folder}",
                found=", ".join(sorted(p.name for p in folder.parent.glob("*"))) or "no such folder",
                fix="give a directory in diffusers' layout, or set `component` in the recipe",
            )
    return folders


def _resolve(model: ModelSource, patterns: list[str], download: bool) -> Path:
    if model.source.startswith(PACKAGE_PREFIX):
        return _DATA / model.source.removeprefix(PACKAGE_PREFIX)
    local = Path(model.source).expanduser()
    if local.is_dir():
        return local
    if model.source.startswith((".", "/", "~")):
        raise MissingError(f"there is no model directory {model.source}", fix="correct the `source` in the recipe")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as exc:
        raise MissingError(
            f"{model.source} is a hub id, and huggingface_hub is not installed", fix='pip install "hst_trt[export]"'
        ) from exc
    settings: dict[str, Any] = {"revision": model.revision, "allow_patterns": patterns, "ignore_patterns": _UNWANTED}
    found: Path | None = None
    trouble = "an incomplete snapshot"
    for local_only in (True, False) if download else (True,):
        try:
            found = Path(snapshot_download(model.source, local_files_only=local_only, **settings))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
            trouble = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else 'no answer'}"
            continue
        # Offline, the hub's library calls a part of a model the model.
        if _is_complete(found, model.component, whole=patterns is _WHOLE_MODEL):
            return found
    revision = f" --revision {model.revision}" if model.revision else ""
    raise MissingError(
        f"the model {model.source} is {'only in part' if found else 'not'} in the local cache and could not be fetched",
        found=trouble,
        fix=f"accept its licence on the hub, then run `hf auth login` and `hf download {model.source}{revision}`; "
        "or point the recipe's `source` at a local directory",
    )


def _is_complete(root: Path, component: str, *, whole: bool) -> bool:
    """Whether a transformer, and if `whole` all that the model lists, is there: the cache may hold a part of a model."""
    try:
        index = read_config(root / "model_index.json") if whole else {}
        weighty = [name for name in index if name.startswith(("text_encoder", "vae")) and index[name][0]]
        listed = [name for name in index if not name.startswith("_") and index[name][0]]
        return all((root / name).is_dir() for name in listed) and all(
            (root / name / "config.json").is_file() and WeightStore(root / name).files for name in (component, *weighty)
        )
    except (HstError, TypeError, LookupError):
        return False


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise MissingError(f"{path} is not there", fix="give the directory of a complete diffusers model") from exc
    except ValueError as exc:
        raise IncompatibleError(f"{path} is not valid JSON", found=str(exc)) from exc
    if not isinstance(config, dict):
        raise IncompatibleError(f"{path} is not a JSON object")
    return config


# -- can the two be stitched? ------------------------------------------------------------------------------------------
_SHARED_BY_TRANSFORMERS = {
    "in_channels": "latent channels",
    "out_channels": "velocity channels",
    "patch_size": "patch size",
    "joint_attention_dim": "text width",
    "pooled_projection_dim": "pooled text width",
}
_SHARED_BY_VAES = ("latent_channels", "scaling_factor", "shift_factor", "block_out_channels")


def check_stitchable(folders: PairFolders) -> None:
    """Latents and text pass from one model to the other unchanged, so both must mean the same by them.

    Raises:
        IncompatibleError: names everything that differs.
    """
    large, small = read_config(folders.large / "config.json"), read_config(folders.small / "config.json")
    for name, config in (("large", large), ("small", small)):
        if config.get("_class_name") != "SD3Transformer2DModel":
            raise IncompatibleError(
                f"the {name} model is not of the SD3 family",
                found=str(config.get("_class_name")),
                fix="use SD3Transformer2DModel",
            )
    differences = _compare(large, small, _SHARED_BY_TRANSFORMERS)
    if folders.small_root != folders.root:
        differences += _compare_vaes(folders)
        shifts = {
            "shift": "sigma shift",
            "num_train_timesteps": "training timesteps",
        }
        mine, theirs = (root / "scheduler" / "scheduler_config.json" for root in (folders.root, folders.small_root))
        differences += _compare(read_config(mine), read_config(theirs), shifts)
    if differences:
        raise IncompatibleError(
            f"{folders.large} and {folders.small} cannot be stitched: they must share VAE, text and sigma shift",
            found="; ".join(differences),
            fix="choose two models of one family, such as SD3.5 Large and Medium",
        )


def _compare(large: Mapping[str, Any], small: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    return [
        f"{label} {large.get(key)} (large) and {small.get(key)} (small)"
        for key, label in names.items()
        if large.get(key) != small.get(key)
    ]


def _compare_vaes(folders: PairFolders) -> list[str]:
    large, small = folders.root / "vae", folders.small_root / "vae"
    if not (small / "config.json").is_file():
        return []
    differences = _compare(
        read_config(large / "config.json"),
        read_config(small / "config.json"),
        {key: f"VAE {key}" for key in _SHARED_BY_VAES},
    )
    if differences or not list(small.glob("*.safetensors")):
        return differences
    mine, theirs = WeightStore(large), WeightStore(small)
    for key in ("decoder.conv_in.weight", "decoder.conv_out.weight"):  # first and last: a retrained VAE changes both
        if mine[key].shape != theirs[key].shape or not np.allclose(
            mine[key].read().astype(np.float32), theirs[key].read().astype(np.float32), rtol=0.01, atol=1e-3
        ):
            return [f"VAE weights ({key})"]
    return []
