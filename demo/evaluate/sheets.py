"""The two pictures: held-out prompts by four rows, and the loss curves. Drawn with Pillow, which the package has anyway."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS, CELL, GAP = 8, 160, 6
MARGIN, LABEL, LETTERS = 62, 52, 26
"""Pixels beside the rows and above a band of prompts, and letters of a prompt's line."""

Colour = tuple[int, int, int]
CURVES: dict[str, Colour] = {"large": (200, 70, 40), "small": (40, 100, 190)}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 460, 64, 24, 24, 48


def sample_sheet(prompts: Sequence[str], rows: Mapping[str, Sequence[np.ndarray]]) -> Image.Image:
    """Bands of `COLUMNS` prompts: the words, and below them one line of pictures [H, W, 3] uint8 for every row."""
    font = ImageFont.load_default(12)
    band = LABEL + len(rows) * (CELL + GAP)
    sheet = Image.new("RGB", (MARGIN + COLUMNS * (CELL + GAP), -(-len(prompts) // COLUMNS) * band), "white")
    pen = ImageDraw.Draw(sheet)
    for index, prompt in enumerate(prompts):
        left, top = MARGIN + index % COLUMNS * (CELL + GAP), index // COLUMNS * band
        pen.multiline_text((left, top + 5), textwrap.fill(prompt, LETTERS), fill="black", font=font, spacing=1)
        for line, (name, pictures) in enumerate(rows.items()):
            height = top + LABEL + line * (CELL + GAP)
            picture = Image.fromarray(pictures[index]).resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, height))
            if index % COLUMNS == 0:
                pen.text((6, height + CELL // 2 - 8), name, fill="black", font=font)
    return sheet


def loss_sheet(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Image.Image:
    """Flow-matching loss over images seen, both axes' numbers written: faint while training, strong on held-out scenes.

    Args:
        logs: by transformer the lines of its metrics file: `images`, `edge`, `loss`, and `held_out` or None.
    """
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    values = [line["loss"] for log in logs.values() for line in log]
    values += [line["held_out"] for log in logs.values() for line in log if line["held_out"]]
    low, high = math.log(0.95 * min(values)), math.log(min(max(values), 6 * min(values)))
    most = max(line["images"] for log in logs.values() for line in log)

    def at(images: float, loss: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * images / most
        height = (math.log(loss) - low) / (high - low)
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(height, 1.0)

    for tick in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0):
        if low <= math.log(tick) <= high:
            y = at(0, tick)[1]
            pen.line((LEFT, y, WIDTH - RIGHT, y), fill=(225, 225, 225))
            pen.text((LEFT - 8, y), f"{tick:g}", fill="black", font=font, anchor="rm")
    step = next((step for step in (1, 2, 5, 10, 20, 50) if most <= 8000 * step), 100)
    for thousands in range(0, most // 1000 + 1, step):
        x = at(1000 * thousands, math.exp(low))[0]
        pen.text((x, HEIGHT - BOTTOM + 6), f"{thousands}k", fill="black", font=font, anchor="ma")
    pen.text((WIDTH // 2, HEIGHT - 18), "scenes seen", fill="black", font=font, anchor="ma")
    title = "flow-matching loss (thin: in training; thick: held-out scenes; a break: from half-size to whole scenes)"
    pen.text((LEFT, 4), title, fill="black", font=font)
    for index, (name, log) in enumerate(logs.items()):
        colour = CURVES[name]
        faint: Colour = (_pale(colour[0]), _pale(colour[1]), _pale(colour[2]))
        for edge in sorted({line["edge"] for line in log}):
            stage = [line for line in log if line["edge"] == edge]
            pen.line([at(line["images"], line["loss"]) for line in stage], fill=faint)
            held_out = [at(line["images"], line["held_out"]) for line in stage if line["held_out"]]
            pen.line(held_out, fill=colour, width=3)
        pen.text((WIDTH - RIGHT - 60, TOP + 8 + 18 * index), name, fill=colour, font=font)
    return sheet


def _pale(channel: int) -> int:
    return (channel + 2 * 255) // 3
