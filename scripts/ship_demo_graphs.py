"""Puts the demo pair's exported graphs into the package, where `hst-trt build` takes them from without torch.

Run after the pair's weights or the exporter have changed (``make demo-graphs``); a test compares what is there with a fresh
export. The weights are not copied: they already ship in the pair's own directory. Calibrations come from a bundle that is
given (``make demo-calibration``), or stay as they are, if they are of the same graphs and weights.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from hst_trt.builder.build import export_bundle
from hst_trt.bundle import MANIFEST, Manifest
from hst_trt.recipe import load_recipe, load_target

SHIPPED = Path(__file__).resolve().parent.parent / "hst_trt" / "data" / "demo.hstb"


def main() -> None:
    sources = [Path(argument) for argument in sys.argv[1:]] or [SHIPPED]
    known = [Manifest.model_validate_json((source / MANIFEST).read_bytes()) for source in sources]
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(load_recipe("demo"), load_target("cpu"), Path(folder) / "demo-cpu.hstb").bundle
        shutil.rmtree(SHIPPED, ignore_errors=True)
        shutil.copytree(bundle.path, SHIPPED, ignore=shutil.ignore_patterns("*.safetensors"))
    print(f"{len(bundle.manifest.graphs)} graphs in {SHIPPED}", file=sys.stderr)
    same = [manifest for manifest in known if manifest.fingerprint == bundle.manifest.fingerprint and manifest.calibrations]
    if not same:
        print("no calibration of these graphs and weights: run `make demo-calibration`", file=sys.stderr)
        return
    made = bundle.manifest.model_copy(update={"calibrations": same[0].calibrations})
    (SHIPPED / MANIFEST).write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(f"calibrated for {', '.join(f'{c.width}x{c.height}' for c in made.calibrations)}", file=sys.stderr)


if __name__ == "__main__":
    main()
