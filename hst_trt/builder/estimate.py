"""What a build will take, said before it starts: host memory, disk and time of each engine.

The constants were measured with TensorRT-RTX 1.7.1.116 on 2026-11-23 (docs/hardware.md has the figures): one and two blocks of
SD3.5 Large's true width and the demo pair, bfloat16, 1 to 8 profiles, seconds of one CPU core. They are estimates for that
builder. TensorRT measures kernels on the GPU, which takes longer, and how much longer was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Manifest
from ..errors import HstError
from ..recipe import Recipe, Target
from ..spec import PairSpec, TransformerSpec
from ..tensor_names import GLUE, LARGE, SMALL, TEXT_ENCODERS, VAE_DECODER
from .profiles import engine_profiles

__all__ = [
    "BuildEstimate",
    "EngineEstimate",
    "HostMemory",
    "estimate_from_manifest",
    "estimate_from_models",
    "host_memory",
]

_CODE = 2.2 * 2**20  # bytes of kernels for each block of a transformer and each profile
_OTHER_CODE = 4 * 2**20  # the same for the whole of any other graph with weights
_GLUE_CODE = 2**20
_HOST = 150 * 2**20  # bytes of the building process before it reads weights
_HOST_FOR_WEIGHTS = 3.1  # bytes of host memory at the peak for a byte of weights
_HOST_FOR_CODE = 4
_START_SECONDS = 0.4
_SECONDS_A_GIB = 1.5
_BLOCK_SECONDS = 0.4  # for each block and each profile
_OTHER_SECONDS = 0.5


@dataclass(frozen=True)
class EngineEstimate:
    """Of one engine. Bytes, and seconds of one idle CPU core."""

    name: str
    profiles: int
    weight_bytes: int
    engine_bytes: int
    host_bytes: int
    seconds: float


@dataclass(frozen=True)
class BuildEstimate:
    """Of a bundle's engines. `cache_bytes`: of the large model's keys and values for one image of the pinned calls, exact."""

    engines: dict[str, EngineEstimate]
    cache_bytes: int


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the machine's main memory; `free` is what can be had without swapping."""

    total: int
    free: int


def host_memory() -> HostMemory:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return HostMemory(total, free)


def estimate_from_manifest(manifest: Manifest, spec: PairSpec, recipe: Recipe, target: Target) -> BuildEstimate:
    """Every engine of a bundle whose graphs are exported."""
    stored = {name: sum(manifest.files[file].bytes for file in graph.weights) for name, graph in manifest.graphs.items()}
    return _estimate(stored, {name: graph.axes for name, graph in manifest.graphs.items()}, spec, recipe, target)


def estimate_from_models(recipe: Recipe, target: Target) -> BuildEstimate | None:
    """Every engine of a pair that is not exported yet; None if its models, or what reads them, are not on this machine."""
    try:
        from ..export.sources import read_config, resolve_pair
        from ..export.weights import WeightStore

        folders = resolve_pair(recipe, download=False)
        components = {LARGE: folders.large, SMALL: folders.small}
        for name in (*TEXT_ENCODERS[: 3 if recipe.t5 else 2], "vae"):
            if (folder := folders.component(name)) is not None:
                components[VAE_DECODER if name == "vae" else name] = folder
        configs = {name: read_config(folder / "config.json") for name, folder in components.items()}
        stored = {name: sum(file.stat().st_size for file in WeightStore(folder).files) for name, folder in components.items()}
    except (HstError, ImportError):
        return None
    spec = PairSpec(
        large=TransformerSpec.from_config(configs[LARGE]),
        small=TransformerSpec.from_config(configs[SMALL]),
        latent_channels=configs[LARGE]["in_channels"],
        patch_size=configs[LARGE]["patch_size"],
        vae_scale=2 ** (len(configs[VAE_DECODER]["block_out_channels"]) - 1),
        clip_length=configs[TEXT_ENCODERS[0]]["max_position_embeddings"],
        t5_length=recipe.max_sequence_length,
    )
    axes = {LARGE: ("B", "M", "N"), SMALL: ("B", "M"), VAE_DECODER: ("token_rows", "token_columns")}
    return _estimate(dict.fromkeys(GLUE, 0) | stored, axes, spec, recipe, target)


def _estimate(
    stored: Mapping[str, int], axes: Mapping[str, tuple[str, ...]], spec: PairSpec, recipe: Recipe, target: Target
) -> BuildEstimate:
    """From the bytes of each graph's weights, and those of its axes that differ from profile to profile."""
    engines = {}
    for name, size in stored.items():
        profiles = len(engine_profiles(name, axes.get(name, ()), spec, recipe, target))
        engines[name] = _estimate_engine(name, size, profiles, spec, target)
    side = recipe.limits.max_side // spec.token_side
    large, rows = spec.large, (2 if recipe.defaults.guidance_scale > 1 else 1) * target.images[0]
    cached = large.layers * (spec.text_length + side * side) + large.dual_layers * side * side
    item = 4 if target.precision == "float32" else 2
    return BuildEstimate(engines, 2 * rows * large.width * cached * item)


def _estimate_engine(name: str, stored: int, profiles: int, spec: PairSpec, target: Target) -> EngineEstimate:
    weights = stored * (2 if target.precision == "float32" else 1)  # models are stored in half precision
    code, seconds = (float(_OTHER_CODE), _OTHER_SECONDS) if stored else (float(_GLUE_CODE), 0.0)
    if name in (LARGE, SMALL):
        model = spec.large if name == LARGE else spec.small
        code, seconds = _CODE * model.layers, _BLOCK_SECONDS * model.layers
    return EngineEstimate(
        name=name,
        profiles=profiles,
        weight_bytes=weights,
        engine_bytes=int(weights + profiles * code),
        host_bytes=int(_HOST + _HOST_FOR_WEIGHTS * weights + _HOST_FOR_CODE * profiles * code),
        seconds=round(_START_SECONDS + _SECONDS_A_GIB * weights / 2**30 + profiles * seconds, 1),
    )
