"""Puts the demo pair's exported graphs into the package, where `hst-trt build` takes them from without torch.

Run after the pair's weights or the exporter have changed (``make demo-graphs``); a test compares what is there with a fresh
export. The weights are not copied: they already ship in the pair's own directory.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from hst_trt.builder.build import export_bundle
from hst_trt.recipe import load_recipe, load_target

SHIPPED = Path(__file__).resolve().parent.parent / "hst_trt" / "data" / "demo.hstb"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(load_recipe("demo"), load_target("cpu"), Path(folder) / "demo-cpu.hstb").bundle
        shutil.rmtree(SHIPPED, ignore_errors=True)
        shutil.copytree(bundle.path, SHIPPED, ignore=shutil.ignore_patterns("*.safetensors"))
    print(f"{len(bundle.manifest.graphs)} graphs in {SHIPPED}", file=sys.stderr)


if __name__ == "__main__":
    main()
