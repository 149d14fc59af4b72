"""A first look at a transformer in training: a few fixed prompts, drawn every few minutes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from demo.text import Tokenizers
from demo.train import Run
from demo.vae import LATENT_CHANNELS, PatchMap

PROMPTS = (
    "a red apple on a blue background",
    "a castle in the night sky",
    "a big pizza on a green background",
    "a penguin on the left on the sea",
    "a dog and a cat on a grass field",
    "a small rocket to the left of a big robot in the desert",
    "a tulip, a banana and a car on a white background",
    "a turtle with an owl on a gradient from blue to pink",
)
STEPS, GUIDANCE, SHIFT = 20, 3.0, 3.0


class Preview:
    """Writes `NAME-samples.png`; pictures are decoded by the encoder's inverse, so they are blocky."""

    def __init__(self, work: Path, vae: AutoencoderKL) -> None:
        self._work, self._patches = work, PatchMap(vae)

    @torch.no_grad()
    def __call__(self, run: Run) -> None:
        device, edge = run.device, run.stage.edge
        ids = Tokenizers.make().ids([*PROMPTS, *[""] * len(PROMPTS)]).to(device)
        states, pooled = run.average.text(ids)
        x = torch.randn(len(PROMPTS), LATENT_CHANNELS, edge, edge, generator=torch.Generator().manual_seed(7)).to(device)
        times = torch.linspace(1, 0, STEPS + 1)
        times = SHIFT * times / (1 + (SHIFT - 1) * times)
        for t, after in pairwise(times):
            with torch.autocast(device.type, torch.bfloat16):
                v = run.average.transformer(torch.cat([x, x]), states, pooled, (t * 1000).expand(len(ids)).to(device)).sample
            told, untold = v.float().chunk(2)
            x = x + (after - t) * (untold + GUIDANCE * (told - untold))
        pictures = self._patches.decode(x.cpu()).clamp(-1, 1).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
        side = pictures.shape[1]
        sheet = Image.new("RGB", (4 * side, -(-len(PROMPTS) // 4) * side))
        for index, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (index % 4 * side, index // 4 * side))
        sheet.save(self._work / f"{run.name}-samples.png")
