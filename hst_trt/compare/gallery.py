"""Draws every case by every row, in turn, so that a machine that is slow for a while is slow for all rows.

A case's pictures lie side by side in one PNG, which carries their times: one file is one case done.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..pipeline import HybridStitchPipeline
from .store import digest, write_bytes

REPORT_EVERY = 20.0
"""Seconds between lines of progress."""


class Case(Protocol):
    """A prompt, and the number that is its seed."""

    @property
    def number(self) -> int: ...
    @property
    def prompt(self) -> str: ...


class Row(Protocol):
    """One way to draw."""

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Of `HybridStitchPipeline`, but for prompt and seed; `seed` is for what is random beside the start noise."""
        ...


@dataclass(frozen=True)
class Drawn:
    """A case's pictures by row, [H, W, 3] uint8, and seconds of the denoising loop and of everything."""

    pictures: dict[str, np.ndarray]
    loop: dict[str, float]
    total: dict[str, float]


class Gallery:
    """The drawn cases in a folder."""

    def __init__(self, folder: Path, rows: Mapping[str, Row]) -> None:
        self._folder, self._rows = folder, dict(rows)

    def __getitem__(self, case: Case) -> Drawn:
        with Image.open(self._file(case)) as strip:
            pixels, times = np.asarray(strip.convert("RGB")), json.loads(strip.info["seconds"])
        pictures = dict(zip(self._rows, np.split(pixels, len(self._rows), axis=1), strict=True))
        loop, total = ({name: times[name][i] for name in self._rows} for i in (0, 1))
        return Drawn(pictures, loop, total)

    def missing(self, cases: Sequence[Case]) -> list[Case]:
        return [case for case in cases if not self._file(case).is_file()]

    def draw(self, pipeline: HybridStitchPipeline, cases: Sequence[Case], say: Callable[[str], None]) -> None:
        """Draws the cases that are not there yet. Call it with all of them: the first row rotates with the case."""
        left = self.missing(cases)
        if not left:
            return
        for name, row in self._rows.items():  # engines are loaded and buffers made before anything is timed
            pipeline("a red apple on a blue background", seed=0, **row.arguments())
            say(f"warmed up {name}")
        began = said = time.monotonic()
        for done, case in enumerate(left, start=1):
            if self.missing([case]):  # another process may be drawing, too
                self._draw(pipeline, case)
            if time.monotonic() - said > REPORT_EVERY or done == len(left):
                said = time.monotonic()
                say(f"prompts: {done} of {len(left)}, about {(said - began) / done * (len(left) - done) / 60:.0f} min left")

    def _draw(self, pipeline: HybridStitchPipeline, case: Case) -> None:
        names = list(self._rows)
        pictures, seconds = {}, {}
        for name in np.roll(names, case.number):
            start = time.perf_counter()
            output = pipeline(case.prompt, seed=case.number, **self._rows[name].arguments(case.number))
            seconds[name] = (output.stats.seconds["denoise"], time.perf_counter() - start)
            pictures[name] = np.asarray(output.images[0])
        info, content = PngInfo(), io.BytesIO()
        info.add_text("seconds", json.dumps(seconds))
        Image.fromarray(np.concatenate([pictures[name] for name in names], axis=1)).save(content, "PNG", pnginfo=info)
        write_bytes(self._file(case), content.getvalue())

    def _file(self, case: Case) -> Path:
        return self._folder / f"{case.number:05d}-{digest(case.prompt)}.png"
