"""The TensorRT backend of the C++ host, on doubles of CUDA and TensorRT that run the exported graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_bundle import PINNED
from host import HostBundle, HostPipeline, Library, build_host
from host_doubles import Doubles

HEIGHT, WIDTH = 16 * PINNED[0], 16 * PINNED[1]
TARGETS = {"tensorrt": ("tensorrt", "11.4.0.1"), "rtx": ("tensorrt-rtx", "1.7.0.1")}


@pytest.fixture(scope="session")
def built() -> Path:
    return build_host()


@pytest.fixture(scope="session")
def library(built: Path) -> Library:
    return Library(built / "libhst_trt.so")


def copied(engine_bundle, folder, kind):
    copy = Path(shutil.copytree(engine_bundle, folder / f"{kind}.hstb"))
    path = copy / "manifest.json"
    m = json.loads(path.read_text())
    m["target"] |= dict(zip(("backend", "backend_version"), TARGETS[kind]))
    path.write_text(json.dumps(m))
    return copy


@pytest.mark.parametrize("kind", list(TARGETS))
def test_first(kind, built, library, engine_bundle, tiny_bundle, tmp_path):
    d = Doubles(built, kind, tmp_path / "cache")
    d.open(copied(engine_bundle, tmp_path, kind))
    cpu = HostPipeline(HostBundle(library, tiny_bundle))
    kw = dict(seeds=[3], height=HEIGHT, width=WIDTH, num_inference_steps=6, stages=(2, 3, 1))
    a = cpu(["a red apple"], **kw)
    for _ in range(3):
        d.set(waits=0, launches=0, recorded=0, event_waits=0)
        b = d.draw(["a red apple"], **kw)
        print(
            np.abs(a.images.astype(int) - b.images.astype(int)).max(),
            d.get("waits", "launches", "recorded", "event_waits", "uploads", "enqueued", "moves"),
            b.warning,
            b.times,
        )
    print(d.live())
    d.close()
    print(d.live(), d.end())
    assert 0
