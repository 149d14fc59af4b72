"""`make demo-pair`: everything from the two npm packages to the directory that ships, on a CPU or a CUDA GPU.

Each part is skipped where its result is already in the work folder, and goes on where it was killed; at most a minute
of training is lost. Remove the work folder to begin anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from demo.assemble import assemble
from demo.data import load_data, make_data
from demo.errors import DemoError, told
from demo.packages import fetch
from demo.preview import Preview
from demo.scenes import Sprites
from demo.train import SHAPES, Run, train
from demo.vae import make_encoder, train_decoder

NEEDED_BYTES = 3_000_000_000


def make(work: Path, target: Path) -> int:
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < NEEDED_BYTES and not (work / "data").exists():
        raise DemoError(
            f"{work} has {free / 1e9:.1f} GB free, the recipe takes {NEEDED_BYTES / 1e9:.0f} GB: give --work another disk"
        )
    sprites = Sprites(fetch(work))
    vae = make_encoder(work, sprites)
    make_data(work, sprites, vae)
    scenes = load_data(work)
    for name in SHAPES:
        run = Run(name, work)
        train(run, scenes, Preview(work, vae))
    del scenes
    train_decoder(work, sprites)
    print(f"{target}: {assemble(work, target):,} bytes", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/out/demo"), help="work folder, 3 GB")
    parser.add_argument("--target", type=Path, default=Path("hst_trt/data/demo_pair"))
    parser.add_argument("--threads", type=int, help="of torch; default: every core")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return told(arguments.work, lambda: make(arguments.work, arguments.target))


if __name__ == "__main__":
    sys.exit(main())
