"""Draws the README's pictures with the demo bundle: the fixed prompts by three schedules, and the masks of one prompt.

Run after the demo pair has changed (``make pictures``). All prompts of docs/demo_prompts.txt are drawn, with one seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # demo/ is a folder of scripts beside the package, not part of it

from demo.sheet import lay_out  # noqa: E402
from hst_trt.builder.build import build_bundle  # noqa: E402
from hst_trt.images import mask_picture  # noqa: E402
from hst_trt.pipeline import HybridStitchPipeline  # noqa: E402
from hst_trt.recipe import load_recipe, load_target  # noqa: E402

SEED = 7
IMAGES = ROOT / "docs" / "images"


def main() -> None:
    bundle = build_bundle(load_recipe("demo"), load_target("cpu"), ROOT / "engines" / "demo-cpu.hstb").bundle
    pipeline = HybridStitchPipeline.from_bundle(bundle.path)
    prompts = (ROOT / "docs" / "demo_prompts.txt").read_text(encoding="utf-8").splitlines()
    rows = {
        name: [pipeline(prompt, seed=SEED, schedule=name).images[0] for prompt in prompts]
        for name in ("large", "hybrid", "small")
    }
    lay_out(prompts, rows).save(IMAGES / "schedules.png", optimize=True)
    output = pipeline(prompts[0], seed=SEED, keep_masks=True)
    mask_picture(output.images[0], output.masks, output.plan).save(IMAGES / "apple_masks.png", optimize=True)
    print(f"{IMAGES}/schedules.png, apple_masks.png")


if __name__ == "__main__":
    main()
