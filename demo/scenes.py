"""Captioned 128x128 scenes for the demo pair: one or two emoji sprites on a plain colour or a simple landscape.

The pair must learn to draw from words in under an hour on two CPU cores, so the world is small on purpose: 24 objects
that differ in colour and outline, 12 backgrounds, and captions whose every word can be seen in the picture. Everything is
drawn from one generator, so a seed is the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128
"""Edge of a scene in pixels."""

SPRITE_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"


@dataclass(frozen=True)
class Object:
    """A thing that can be drawn: its word, its emoji code point, and the colour word it may carry, if any."""

    name: str
    codepoint: str
    colour: str = ""


OBJECTS: tuple[Object, ...] = (
    Object("apple", "1f34e", "red"),
    Object("banana", "1f34c", "yellow"),
    Object("pizza", "1f355"),
    Object("doughnut", "1f369", "brown"),
    Object("strawberry", "1f353", "red"),
    Object("pineapple", "1f34d", "yellow"),
    Object("carrot", "1f955", "orange"),
    Object("cactus", "1f335", "green"),
    Object("tree", "1f333", "green"),
    Object("sunflower", "1f33b", "yellow"),
    Object("mushroom", "1f344", "red"),
    Object("dog", "1f436", "brown"),
    Object("cat", "1f431", "orange"),
    Object("panda", "1f43c"),
    Object("frog", "1f438", "green"),
    Object("penguin", "1f427"),
    Object("fish", "1f420", "blue"),
    Object("octopus", "1f419", "orange"),
    Object("car", "1f697", "red"),
    Object("rocket", "1f680", "white"),
    Object("house", "1f3e0"),
    Object("castle", "1f3f0", "white"),
    Object("heart", "2764-fe0f", "red"),
    Object("star", "2b50", "yellow"),
)

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (242, 242, 242),
    "gray": (130, 135, 140),
    "pink": (245, 160, 190),
    "orange": (240, 140, 40),
    "yellow": (245, 215, 70),
    "green": (70, 165, 80),
    "blue": (60, 110, 215),
    "purple": (140, 80, 190),
}

LANDSCAPES: dict[str, tuple[str, ...]] = {
    "night sky": ("in the night sky", "in the night sky", "at night"),
    "grass field": ("on a grass field", "on a grass field", "in the grass"),
    "sea": ("at sea", "on the sea"),
    "desert": ("in the desert",),
}
"""Each landscape with the ways a caption may say it; a phrase listed twice is used twice as often."""

HORIZONS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "grass field": ((150, 205, 250), (80, 170, 70)),
    "sea": ((190, 225, 250), (30, 100, 180)),
    "desert": ((250, 215, 160), (215, 165, 95)),
}
"""Colours above and below the horizon."""

SIZES = (("", 0.56, 0.64), ("", 0.56, 0.64), ("small", 0.34, 0.4), ("big", 0.76, 0.84))
"""How a caption calls a lone object's size, and the range of its edge in shares of SIZE; half have no word."""

BACKGROUNDS: tuple[str, ...] = (*COLOURS, *LANDSCAPES)

_GRAMMAR = "a an and the there is picture of small big on in at front background field night sky grass sea desert"

CAPTION_WORDS: tuple[str, ...] = tuple(
    sorted({*_GRAMMAR.split(), *COLOURS, *(word for item in OBJECTS for word in (item.name, item.colour) if word)})
)
"""Every word a caption can hold; the tokenizers make each of them one token."""


@dataclass(frozen=True)
class Scene:
    """A picture `[SIZE, SIZE, 3]` uint8, what it shows, and where: boxes are (left, top, edge) in pixels."""

    pixels: np.ndarray
    caption: str
    objects: tuple[str, ...]
    background: str
    boxes: tuple[tuple[int, int, int], ...]


class Sprites:
    """Emoji pictures from an unpacked npm package, resized on first use and kept."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds `CODEPOINT.webp` files (256x256 RGBA), as the package's `assets/` does."""
        missing = [item.codepoint for item in OBJECTS if not (folder / f"{item.codepoint}.webp").is_file()]
        if missing:
            raise FileNotFoundError(
                f"no sprites for {len(missing)} of {len(OBJECTS)} objects in {folder} "
                f"(first missing: {missing[0]}.webp). "
                f"Unpack the npm package that has them: `npm pack {SPRITE_PACKAGE}`, untar it, "
                "and pass --sprites package/assets"
            )
        self._folder = folder
        self._resized: dict[tuple[str, int], Image.Image] = {}

    def get(self, item: Object, edge: int) -> Image.Image:
        key = (item.codepoint, edge)
        if key not in self._resized:
            with Image.open(self._folder / f"{item.codepoint}.webp") as full:
                self._resized[key] = full.convert("RGBA").resize((edge, edge), Image.Resampling.LANCZOS)
        return self._resized[key]


def draw_scene(rng: np.random.Generator, sprites: Sprites) -> Scene:
    """One object in 70 % of cases, else two side by side. The same generator state gives the same scene."""
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    canvas = Image.fromarray(_background(rng, background)).convert("RGBA")
    count = 1 if rng.random() < 0.7 else 2
    items = [OBJECTS[i] for i in rng.choice(len(OBJECTS), count, replace=False)]
    if count == 1:
        size, low, high = SIZES[rng.integers(len(SIZES))]
        edge = _even(rng.uniform(low, high) * SIZE)
        margin = (SIZE - edge) // 2
        sway = min(margin, SIZE // 8)
        boxes = [(margin + _sway(rng, sway), margin + _sway(rng, sway // 2), edge)]
    else:
        size = ""
        edge = _even(rng.uniform(0.42, 0.47) * SIZE)
        top = (SIZE - edge) // 2
        boxes = [(SIZE * (1 + 2 * i) // 4 - edge // 2 + _sway(rng, 2), top + _sway(rng, 10), edge) for i in range(2)]
    for item, (left, top, edge) in zip(items, boxes, strict=True):
        canvas.alpha_composite(sprites.get(item, edge), (left, top))
    return Scene(
        pixels=np.asarray(canvas.convert("RGB")),
        caption=_caption(rng, items, size, background),
        objects=tuple(item.name for item in items),
        background=background,
        boxes=tuple(boxes),
    )


def _even(value: float) -> int:
    return int(value) // 2 * 2


def _sway(rng: np.random.Generator, reach: int) -> int:
    return int(rng.integers(-reach, reach + 1))


def _background(rng: np.random.Generator, kind: str) -> np.ndarray:
    """`[SIZE, SIZE, 3]` uint8."""
    y = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    x = np.linspace(0, 1, SIZE, dtype=np.float32)[None, :, None]
    if kind in COLOURS:
        slope, angle = rng.uniform(0, 0.15), rng.uniform(0, 2 * np.pi)
        shade = 1 - slope * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
        picture = np.asarray(COLOURS[kind], np.float32) * shade + rng.uniform(-6, 6)
    elif kind == "night sky":
        picture = np.array([12, 16, 50], np.float32) * (1 - y) + np.array([45, 45, 110], np.float32) * y + 0 * x
        for row, column in rng.integers(0, SIZE - 2, (18, 2)):
            picture[row : row + 2, column : column + 2] = rng.uniform(170, 255)
    else:
        above, below = (np.asarray(colour, np.float32) for colour in HORIZONS[kind])
        horizon = rng.uniform(0.52, 0.62) + 0.02 * np.sin(x * rng.uniform(4, 9) + rng.uniform(0, 2 * np.pi))
        land = np.clip((y - horizon) * SIZE / 2, 0, 1)
        picture = above * (1 + 0.12 * y) * (1 - land) + below * (1.1 - 0.25 * y) * land
        if kind == "sea":
            picture = picture + land * 6 * np.sin(40 * y + 3 * np.sin(9 * x))
    clipped: np.ndarray = np.clip(picture, 0, 255)
    return clipped.astype(np.uint8)


def _caption(rng: np.random.Generator, items: Sequence[Object], size: str, background: str) -> str:
    phrases = []
    for item in items:
        colour = item.colour if rng.random() < 0.4 else ""
        words = " ".join(word for word in (size, colour, item.name) if word)
        article = "the" if rng.random() < 0.1 else "an" if words[0] in "aeiou" else "a"
        phrases.append(f"{article} {words}")
    opening = "there is " if rng.random() < 0.08 else "a picture of " if rng.random() < 0.08 else ""
    if background in COLOURS:
        article = "an" if background[0] in "aeiou" else "a"
        place = f"{'on' if rng.random() < 0.85 else 'in front of'} {article} {background} background"
    else:
        place = LANDSCAPES[background][rng.integers(len(LANDSCAPES[background]))]
    caption = f"{opening}{' and '.join(phrases)} {place}"
    if rng.random() < 0.1:
        caption = caption[0].upper() + caption[1:]
    return caption + "." if rng.random() < 0.05 else caption
