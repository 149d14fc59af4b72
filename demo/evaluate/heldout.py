"""Prompts and scenes that the pair has not seen: a stream of scenes from a seed of its own, less every known caption.

The words are the training set's; what is new is their combination. Nothing is chosen: the cases are the first of the stream.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo import data, scenes
from demo.scenes import OBJECTS, Scene, Sprites, draw_scene
from hst_trt.compare.store import digest, read_json, write_json

SEED = 71
NAMES = tuple(item.name for item in OBJECTS)


@dataclass(frozen=True)
class Case:
    """A prompt, the objects it names from left to right, and its number in the stream, which is its noise's seed too."""

    number: int
    prompt: str
    names: tuple[str, ...]

    def present(self) -> np.ndarray:
        """[objects] bool."""
        return np.isin(NAMES, self.names)


def scene(number: int, sprites: Sprites) -> Scene:
    """The scene of a case: what a perfect model might draw for its prompt."""
    return draw_scene(np.random.default_rng((SEED, number)), sprites)


def held_out(sprites: Sprites, known: Collection[str], count: int) -> list[Case]:
    """The first `count` scenes whose captions are not `known` and not each other's, capitals aside."""
    seen = {caption.lower() for caption in known}
    cases: list[Case] = []
    number = 0
    while len(cases) < count:
        drawn = scene(number, sprites)
        if drawn.caption.lower() not in seen:
            seen.add(drawn.caption.lower())
            cases.append(Case(number, drawn.caption, drawn.names))
        number += 1
    return cases


def pictures(cases: Sequence[Case], sprites: Sprites) -> np.ndarray:
    """The scenes of cases, [cases, SIZE, SIZE, 3] uint8."""
    return np.stack([scene(case.number, sprites).pixels for case in cases])


def training_captions(work: Path, kept: Path, sprites: Sprites) -> list[str]:
    """Of the whole training set: read from its chunks below `work`, or drawn again where a chunk is not there."""
    captions = []
    folder = kept / f"captions-{digest(Path(scenes.__file__), Path(data.__file__))}"
    for index in range(data.CHUNKS):
        chunk, again = work / "data" / f"{index:03d}.safetensors", folder / f"{index:03d}.json"
        if chunk.is_file():
            captions += data.load_captions(chunk)
            continue
        if not again.is_file():
            rng = np.random.default_rng((data.SEED, index))
            write_json(again, [draw_scene(rng, sprites).caption for _ in range(data.CHUNK)])
            print(f"captions of the training set: {index + 1} of {data.CHUNKS} chunks", flush=True)
        captions += read_json(again)
    return captions
