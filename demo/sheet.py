"""Draws the fixed prompts with both transformers of the demo pair through diffusers' own pipeline, as one labelled PNG.

The sheet is what the pair is judged by, so it uses nothing of hst_trt: a bad picture here is the weights' fault.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image, ImageDraw

from demo.scenes import SIZE
from demo.text import TOKENS

COLUMNS = 8
GAP, LABEL = 6, 46


def draw(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], *, steps: int, guidance: float, seed: int
) -> list[Image.Image]:
    """One picture a prompt, each from the same start noise: drawn alone, as a user would draw it."""
    return [
        pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=TOKENS,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        for prompt in prompts
    ]


def lay_out(prompts: list[str], rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Bands of `COLUMNS` prompts; in each band the prompts, then one line of pictures for every entry of `rows`."""
    cell, band = SIZE + GAP, LABEL + len(rows) * (SIZE + GAP)
    bands = -(-len(prompts) // COLUMNS)
    side = 40
    sheet = Image.new("RGB", (side + COLUMNS * cell, bands * band), "white")
    pen = ImageDraw.Draw(sheet)
    for index, prompt in enumerate(prompts):
        left, top = side + index % COLUMNS * cell, index // COLUMNS * band
        pen.multiline_text((left, top + 4), textwrap.fill(prompt, 21), fill="black", spacing=1)
        for line, (name, pictures) in enumerate(rows.items()):
            height = top + LABEL + line * cell
            sheet.paste(pictures[index], (left, height))
            pen.text((4, height + SIZE // 2), name, fill="black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pair", type=Path, default=Path("hst_trt/data/demo_pair"))
    parser.add_argument("--prompts", type=Path, default=Path("docs/demo_prompts.txt"))
    parser.add_argument("--png", type=Path, default=Path("docs/images/demo_sheet.png"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    pipeline = StableDiffusion3Pipeline.from_pretrained(arguments.pair)
    pipeline.set_progress_bar_config(disable=True)
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines()
    rows = {}
    for name, folder in (("large", "transformer"), ("small", "transformer_small")):
        pipeline.transformer = SD3Transformer2DModel.from_pretrained(arguments.pair / folder)
        rows[name] = draw(pipeline, prompts, steps=arguments.steps, guidance=arguments.guidance, seed=arguments.seed)
    arguments.png.parent.mkdir(parents=True, exist_ok=True)
    lay_out(prompts, rows).save(arguments.png, optimize=True)
    print(f"{arguments.png}: {arguments.png.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
