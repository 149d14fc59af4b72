"""The training set: scenes as latents at both resolutions, with token ids, in chunks that are made once.

A chunk is drawn from a seed of its own, so the set is the same whether it was made in one go or in ten.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.scenes import Sprites, draw_scene
from demo.text import Tokenizers
from demo.vae import PatchMap, to_model_space

SEED = 5
CHUNK = 1000
CHUNKS = 24
HELD_OUT = 512
"""Scenes at the end of the set that no transformer trains on."""


@dataclass(frozen=True)
class Scenes:
    """`latents[edge]` `[N, 16, edge, edge]` float16 for the edges 16 and 32; `ids` `[N, 3, TOKENS]` int16; captions."""

    latents: dict[int, torch.Tensor]
    ids: torch.Tensor
    captions: list[str]


def make_data(work: Path, sprites: Sprites, vae: AutoencoderKL) -> None:
    """Draws the chunks that are missing below `work/data`, 1000 scenes in some ten seconds each."""
    folder = work / "data"
    folder.mkdir(exist_ok=True)
    encoder, tokenizers = PatchMap(vae), Tokenizers.make()
    for index in range(CHUNKS):
        target = folder / f"{index:03d}.safetensors"
        if target.exists():
            continue
        rng = np.random.default_rng((SEED, index))
        scenes = [draw_scene(rng, sprites) for _ in range(CHUNK)]
        parts = []
        for start in range(0, CHUNK, 100):
            pictures = to_model_space(np.stack([scene.pixels for scene in scenes[start : start + 100]]))
            parts.append([encoder.encode(p).half().contiguous() for p in (F.avg_pool2d(pictures, 2), pictures)])
        captions = [scene.caption for scene in scenes]
        tensors = {f"latents{part[0].shape[-1]}": torch.cat(part) for part in zip(*parts, strict=True)}
        tensors["ids"] = tokenizers.ids(captions).short()
        partial = target.with_suffix(".part")
        save_file(tensors, partial, {"captions": json.dumps(captions)})
        partial.replace(target)
        print(f"scenes {(index + 1) * CHUNK} of {CHUNKS * CHUNK}", flush=True)


def load_data(work: Path) -> Scenes:
    """All chunks, about 1 GB."""
    files = [work / "data" / f"{index:03d}.safetensors" for index in range(CHUNKS)]
    chunks = [load_file(file) for file in files]
    return Scenes(
        latents={edge: torch.cat([chunk[f"latents{edge}"] for chunk in chunks]) for edge in (16, 32)},
        ids=torch.cat([chunk["ids"] for chunk in chunks]),
        captions=[caption for file in files for caption in load_captions(file)],
    )


def load_captions(chunk: Path) -> list[str]:
    with safe_open(chunk, "pt") as opened:
        captions: list[str] = json.loads(opened.metadata()["captions"])
    return captions
