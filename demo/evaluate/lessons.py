"""What the classifier learns from and is tested on: scenes as the pair's decoder draws them, some with spoiled objects.

A generated picture has passed the decoder, so a classifier that has only seen sharp scenes would judge the decoder. Scenes
are encoded, get the noise that a transformer may leave behind, and are decoded by the bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from demo.evaluate.heldout import NAMES
from demo.evaluate.spoil import WAYS, draw_spoiled
from demo.scenes import SIZE, Scene, Sprites
from demo.vae import PatchMap, to_model_space
from hst_trt.codec import decode_latents, patchify
from hst_trt.compare.store import read_arrays, write_arrays
from hst_trt.pipeline import HybridStitchPipeline

EDGE, CELLS = 128, 8
"""Edge of the classifier's picture in pixels, and of its map of cells."""

SEED, CHECK_SEED, TEST_SEED = 72, 73, 74
CHUNK, CHUNKS, FEW = 100, 50, 3
"""Scenes of a chunk, chunks to learn from, and chunks to check or test on."""

SPOILED_SCENES = 0.5
SPOILED_OBJECTS = 0.6
"""Share of scenes that may hold spoiled objects, and the share of objects that are spoiled in them."""

SHARP, NOISY, NOISE = 0.15, 0.6, 0.3
"""Shares of scenes that skip the decoder, and that get noise on their latents; the most noise, in standard deviations."""

RoundTrip = Callable[[np.ndarray, np.ndarray], np.ndarray]


def round_trip(pipeline: HybridStitchPipeline, vae: Path) -> RoundTrip:
    """Pictures [B, SIZE, SIZE, 3] uint8 through the VAE, with noise [B, 16, SIZE/8, SIZE/8] added to their latents.

    The encoder is the one in the folder `vae`, the decoder the bundle's own.
    """
    patches = PatchMap(AutoencoderKL.from_pretrained(vae))
    spec = pipeline.spec
    side = SIZE // spec.token_side

    def decoded(pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        latents = patches.encode(to_model_space(pixels)).numpy() + noise
        return decode_latents(pipeline.backend, spec, patchify(latents.astype(np.float32), spec.patch_size), side, side)

    return decoded


def shrunk(pixels: np.ndarray) -> np.ndarray:
    """Pictures [B, H, W, 3] uint8 as the classifier takes them, [B, EDGE, EDGE, 3] uint8."""
    small = F.interpolate(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), size=(EDGE, EDGE), mode="area")
    return small.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True)
class Lessons:
    """pictures [N, EDGE, EDGE, 3] uint8; cells [N, objects] int16, the cell of an object's middle, or -1 where it is not
    to be seen; ways [N, objects] int8, how it was spoiled, an index into `WAYS`, or -1."""

    pictures: np.ndarray
    cells: np.ndarray
    ways: np.ndarray


def make_lessons(
    folder: Path, sprites: Sprites, decode: RoundTrip, seed: int = SEED, chunks: int = CHUNKS, spoiled: float = SPOILED_SCENES
) -> Lessons:
    """Reads the chunks in `folder`, and draws those that are not there yet."""
    files = [folder / f"{seed}-{index:03d}.npz" for index in range(chunks)]
    for index, file in enumerate(files):
        if not file.is_file():
            write_arrays(file, vars(_draw(np.random.default_rng((seed, index)), sprites, decode, spoiled)))
            print(f"scenes for the classifier: {(index + 1) * CHUNK} of {chunks * CHUNK}", flush=True)
    return Lessons(**read_arrays(files))


def _draw(rng: np.random.Generator, sprites: Sprites, decode: RoundTrip, spoiled: float) -> Lessons:
    pixels, cells, ways = [], [], []
    for _ in range(CHUNK):
        scene, spoils = draw_spoiled(rng, sprites, SPOILED_OBJECTS if rng.random() < spoiled else 0.0)
        pixels.append(scene.pixels)
        cells.append(_cells(scene, spoils))
        ways.append([list(WAYS).index(spoils[name]) if name in spoils else -1 for name in NAMES])
    sharp = rng.random(CHUNK) < SHARP
    level = rng.uniform(0, NOISE, CHUNK) * (rng.random(CHUNK) < NOISY)
    noise = level[:, None, None, None] * rng.standard_normal((CHUNK, 16, SIZE // 8, SIZE // 8), np.float32)
    whole = np.stack(pixels)
    whole[~sharp] = decode(whole[~sharp], noise[~sharp])
    return Lessons(shrunk(whole), np.stack(cells), np.array(ways, np.int8))


def _cells(scene: Scene, spoils: dict[str, str]) -> np.ndarray:
    cells = np.full(len(NAMES), -1, np.int16)
    for placed in scene.objects:
        if placed.item.name not in spoils:
            row, column = ((corner + placed.edge // 2) * CELLS // SIZE for corner in (placed.top, placed.left))
            cells[NAMES.index(placed.item.name)] = row * CELLS + column
    return cells
