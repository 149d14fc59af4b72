"""Writes pictures: PNG files that say how they were drawn, and the picture of the masks over the steps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from .bundle import translated_disk_errors
from .errors import RequestError
from .plan import StitchPlan

__all__ = ["ImageWriter", "mask_picture"]


class ImageWriter:
    """Writes ``hst_{seed}_{index:03d}.png`` into a folder, never over a file that is there unless `overwrite` is set."""

    def __init__(self, folder: Path, *, overwrite: bool = False) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._written: set[Path] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise RequestError(
                f"the output folder {folder} cannot be made", found=exc.strerror, fix="give another --output-dir"
            ) from exc

    def save(self, images: Sequence[Image.Image], seed: int, settings: Mapping[str, Any]) -> list[Path]:
        """Saves images; their settings go into the PNG as `parameters` text and as JSON under ``hst_trt``."""
        return [self._write(f"hst_{seed}", image, dict(settings, image=i)) for i, image in enumerate(images)]

    def beside(self, path: Path, suffix: str, image: Image.Image) -> Path:
        """Saves a companion of an image, ``NAME_{suffix}.png``."""
        target = path.with_name(f"{path.stem}_{suffix}.png")
        with translated_disk_errors(self.folder):
            image.save(target)
        return target

    def _write(self, stem: str, image: Image.Image, settings: dict[str, Any]) -> Path:
        info = PngInfo()
        info.add_text("parameters", _parameters(settings, image))
        info.add_itxt("hst_trt", json.dumps(settings))
        index = 0
        while True:
            path = self.folder / f"{stem}_{index:03d}.png"
            index += 1
            if path in self._written:
                continue
            try:
                with translated_disk_errors(self.folder), path.open("wb" if self.overwrite else "xb") as stream:
                    image.save(stream, "PNG", pnginfo=info)
            except FileExistsError:
                continue
            except BaseException:
                path.unlink(missing_ok=True)  # half a picture is worse than none
                raise
            self._written.add(path)
            os.utime(path)
            return path


def _parameters(settings: Mapping[str, Any], image: Image.Image) -> str:
    """The text that image browsers know from AUTOMATIC1111's web UI."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(
        f"Steps: {settings['steps']}, Sampler: Euler, CFG scale: {settings['guidance_scale']}, Seed: {settings['seed']}, "
        f"Size: {image.width}x{image.height}, Model: {settings['model']}, Schedule: {settings['schedule']}"
    )
    return "\n".join(lines)


def mask_picture(image: Image.Image, masks: Mapping[int, np.ndarray], plan: StitchPlan, tile: int = 160) -> Image.Image:
    """One tile a masked step: the finished picture, dark and grey where the small model worked alone.

    Args:
        image: the picture.
        masks: by step, [images, h, w] bool; the first image's are drawn.
        plan: for the caption.
    """
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    bright = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    dark = Image.blend(bright.convert("L").convert("RGB"), Image.new("RGB", size, (16, 18, 28)), 0.72)
    columns = min(6, len(masks))
    rows = -(-len(masks) // columns)
    gap, caption = 8, 16
    width, height = columns * (size[0] + gap) + gap, rows * (size[1] + caption + gap) + gap
    sheet = Image.new("RGB", (width, height), (24, 26, 32))
    draw = ImageDraw.Draw(sheet)
    for number, (step, mask) in enumerate(sorted(masks.items())):
        x, y = gap + number % columns * (size[0] + gap), gap + number // columns * (size[1] + caption + gap)
        stencil = Image.fromarray(mask[0].astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        sheet.paste(Image.composite(bright, dark, stencil), (x, y))
        text = f"step {step + 1}/{len(plan.steps)}: {int(mask[0].sum())} of {mask[0].size}"
        draw.text((x, y + size[1] + 2), text, fill=(200, 204, 214))
    return sheet
