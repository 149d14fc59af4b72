"""A bundle of `FakeTensorRT` engines for the tiny pair: its graphs as they are exported for TensorRT, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fake_cuda import FakeDevice, FakeTensorRT, engine_file

from hst_trt.builder.build import export_bundle
from hst_trt.builder.profiles import engine_profiles
from hst_trt.bundle import Bundle, hash_file
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.recipe import Recipe, Target
from hst_trt.runtime.tensorrt import TensorRTBackend

VERSION = "11.4.0"
TARGET = Target(name="h100", backend="tensorrt", precision="float32", default_recipe="demo", sms=(90,))
PINNED = (6, 8)  # token rows and columns that have pinned profiles, for one guided image
Ranges = list[dict[str, tuple[int, int, int]]]  # of an engine's profiles


def make_engine_bundle(recipe: Recipe, final: Path) -> Path:
    """Exports the graphs, and gives each an engine with the profiles that a build would give it."""
    bundle = export_bundle(recipe, TARGET, final).bundle
    recipe = recipe.model_copy(update={"resolutions": ((16 * PINNED[0], 16 * PINNED[1]),)})
    graphs = bundle.manifest.graphs.items()
    finish(bundle, {name: _ranges(engine_profiles(name, g.axes, bundle.spec, recipe, TARGET)) for name, g in graphs})
    return bundle.path


def finish(
    bundle: Bundle,
    ranges: Mapping[str, Ranges] | None = None,
    change: Callable[[Ranges], Ranges] = lambda ranges: ranges,
    **extra: Any,
) -> None:
    """Writes an engine for each graph and completes the manifest.

    Args:
        ranges: of each engine's profiles; those that it has, if left out.
        change: what to do to them.
        extra: more that the engine files say.
    """
    manifest = bundle.manifest
    ranges = ranges or {name: _ranges(engine.profiles) for name, engine in manifest.engines.items()}
    engines, files = {}, {name: entry.model_dump() for name, entry in manifest.files.items() if not name.startswith("engines/")}
    for name, graph in manifest.graphs.items():
        path = bundle.path / "engines" / f"{name}.engine"
        path.parent.mkdir(exist_ok=True)
        size = {"weight_bytes": 2**20 if graph.weights else 2**12}
        path.write_bytes(engine_file(bundle.path / graph.path, change(ranges[name]), VERSION, size | extra))
        entry = f"engines/{path.name}"
        files[entry] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
        profiles = [{"axes": axes} for axes in change(ranges[name])]
        engines[name] = {"path": entry, "profiles": profiles, "read_back": "engine", "seconds": 0}
    target = manifest.target.model_dump() | {"backend_version": VERSION, "sms": list(TARGET.sms)}
    rewrite(bundle.path, engines=engines, files=files, state="complete", target=target)


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def pipeline(bundle: Path, device: FakeDevice | None = None, *, low_vram: bool = False, **trt: Any) -> HybridStitchPipeline:
    device = device or FakeDevice()
    opened = Bundle.open(bundle)
    return HybridStitchPipeline(opened, TensorRTBackend(opened, device, FakeTensorRT(device, **trt)), low_vram=low_vram)


def _ranges(profiles: Any) -> Ranges:
    return [dict(profile.axes) for profile in profiles]
