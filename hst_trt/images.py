"""Pictures in files: PNGs that say how they were drawn, the picture of the masks over the steps, and real pictures to read."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .disk import translated_disk_errors
from .errors import MissingError, RequestError
from .plan import StitchPlan
from .schedule import Solver

__all__ = ["ImageWriter", "mask_picture", "read_pictures"]

_SAMPLERS: Mapping[Solver, str] = {"euler": "Euler", "ab2": "Adams-Bashforth 2", "dpmpp-2m": "DPM++ 2M"}
"""As image browsers know them."""


class ImageWriter:
    """Writes ``hst_{seed}_{index:03d}.png`` into a folder, never over a file that is there unless `overwrite` is set.

    Raises:
        RequestError: the folder cannot be made or written; known before anything is drawn, where the system tells.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._written: set[Path] = set()
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def save(self, images: Sequence[Image.Image], seed: int, settings: Mapping[str, Any]) -> list[Path]:
        """Saves images; their settings go into the PNG as `parameters` text and as JSON under ``hst_trt``."""
        paths = []
        for i, image in enumerate(images):
            info, described = PngInfo(), dict(settings, image=i)
            info.add_text("parameters", _parameters(described, image))
            info.add_itxt("hst_trt", json.dumps(described))
            paths.append(self._write((f"hst_{seed}_{index:03d}.png" for index in itertools.count()), image, info))
        return paths

    def beside(self, path: Path, suffix: str, image: Image.Image) -> Path:
        """Saves a companion of an image, ``NAME_{suffix}.png``."""
        names = (f"{path.stem}_{suffix}{f'_{index:03d}' if index else ''}.png" for index in itertools.count())
        return self._write(names, image, None)

    def _write(self, names: Iterator[str], image: Image.Image, info: PngInfo | None) -> Path:
        """Writes under the first free name: beside its place first, so that an older picture is replaced by a whole one."""
        content = io.BytesIO()
        image.save(content, "PNG", pnginfo=info)
        with self._writing():
            path = next(path for name in names if self._claim(path := self.folder / name))
            part = path.with_name(f".{path.name}.part")
            try:
                part.write_bytes(content.getbuffer())
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                if not self.overwrite:
                    path.unlink(missing_ok=True)  # the empty file of our claim
                raise
        self._written.add(path)
        return path

    def _claim(self, path: Path) -> bool:
        """Whether this name is ours to write; an empty file holds it against other processes."""
        if path in self._written:
            return False
        if not self.overwrite:
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                return False
        return True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with translated_disk_errors(self.folder):
                yield
        except OSError as exc:
            raise RequestError(
                f"the output folder {self.folder} cannot be written", found=exc.strerror, fix="give another --output-dir"
            ) from exc


def _parameters(settings: Mapping[str, Any], image: Image.Image) -> str:
    """The text that image browsers know from AUTOMATIC1111's web UI."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    sampler = _SAMPLERS[settings["plan"]["sampling"]["solver"]]
    lines.append(
        f"Steps: {settings['steps']}, Sampler: {sampler}, CFG scale: {settings['guidance_scale']}, Seed: {settings['seed']}, "
        f"Size: {image.width}x{image.height}, Model: {settings['model']}, Schedule: {settings['plan']['schedule']}"
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


def read_pictures(folder: Path, size: tuple[int, int]) -> np.ndarray:
    """The pictures of a folder, by name, cut and scaled to `size` (width, height): [N, H, W, 3] uint8.

    Raises:
        MissingError: there are fewer than two; RequestError: a file that is no picture.
    """
    pictures = []
    for file in sorted(file for file in folder.glob("*") if file.is_file()):
        try:
            with Image.open(file) as image:
                pictures.append(np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)))
        except (UnidentifiedImageError, OSError) as exc:
            raise RequestError(f"{file} is not a picture", found=str(exc), fix="leave only pictures in that folder") from exc
    if len(pictures) < 2:
        raise MissingError(
            f"the folder {folder} has too few pictures", found=str(len(pictures)), fix="give a folder of real pictures"
        )
    return np.stack(pictures)
