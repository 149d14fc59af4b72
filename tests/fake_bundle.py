"""A bundle of `FakeTensorRT` engines for the tiny pair: its graphs as they are exported for TensorRT, in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fake_cuda import FakeDevice, FakeTensorRT, engine_file

from hst_trt.builder.build import export_bundle
from hst_trt.bundle import Bundle, hash_file
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import token_buckets
from hst_trt.recipe import Recipe, Target
from hst_trt.runtime.tensorrt import TensorRTBackend

VERSION = "11.4.0"
TARGET = Target(name="h100", backend="tensorrt", precision="float32", default_recipe="demo", sms=(90,))
PINNED = (6, 8)  # token rows and columns that have pinned profiles
Profile = Mapping[str, tuple[int, int, int]]


def make_engine_bundle(recipe: Recipe, final: Path) -> Path:
    bundle = export_bundle(recipe, TARGET, final).bundle
    finish(bundle, list)
    return bundle.path


def finish(bundle: Bundle, change: Any = list, **extra: Any) -> None:
    """Writes an engine for each graph and completes the manifest.

    Args:
        change: what to do to each graph's profiles.
        extra: more that the engine files say.
    """
    manifest = bundle.manifest
    engines, files = {}, {name: entry.model_dump() for name, entry in manifest.files.items() if not name.startswith("engines/")}
    for name, graph in manifest.graphs.items():
        ranges = change(list(profiles(name, graph.axes, manifest.limits.max_side // 16)))
        path = bundle.path / "engines" / f"{name}.engine"
        path.parent.mkdir(exist_ok=True)
        size = {"weight_bytes": 2**20 if graph.weights else 2**12}
        path.write_bytes(engine_file(bundle.path / graph.path, ranges, VERSION, size | extra))
        entry = f"engines/{path.name}"
        files[entry] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
        engines[name] = {"path": entry, "profiles": [{"axes": axes} for axes in ranges], "read_back": "engine", "seconds": 0}
    target = manifest.target.model_dump() | {"backend_version": VERSION, "sms": list(TARGET.sms)}
    rewrite(bundle.path, engines=engines, files=files, state="complete", target=target)


def profiles(name: str, axes: Sequence[str], side: int) -> Iterator[Profile]:
    """A pinned profile for each bucket of one size and one guided image, and a range."""
    n = PINNED[0] * PINNED[1]
    fixed = {"T": (32, 32, 32)}
    if name == "large":
        for count in token_buckets(n):
            yield {"B": (2, 2, 2), "M": (count,) * 3, "N": (n, n, n)} | fixed
    if name == "small":
        yield {"B": (2, 2, 2), "M": (n, n, n)} | fixed
    yield {axis: (1, n, side * side) for axis in axes} | {axis: fixed[axis] for axis in axes if axis in fixed}


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def pipeline(bundle: Path, device: FakeDevice | None = None, *, low_vram: bool = False, **trt: Any) -> HybridStitchPipeline:
    device = device or FakeDevice()
    opened = Bundle.open(bundle)
    return HybridStitchPipeline(opened, TensorRTBackend(opened, device, FakeTensorRT(device, **trt)), low_vram=low_vram)
