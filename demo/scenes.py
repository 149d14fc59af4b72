"""Captioned 256x256 scenes for the demo pair: one to three emoji sprites on a plain colour, a gradient or a landscape.

The pair must learn to draw from words in about two hours on two CPU cores, so the world is small on purpose: 40 objects
that differ in colour and outline, 8 colours, 8 landscapes, and captions whose every word can be seen in the picture. A
scene is drawn from one generator, so a seed is the data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 256
"""Edge of a scene in pixels."""

MAX_WORDS = 14
"""Of a caption, a comma counted as one: what fits between the start and end tokens of a CLIP prompt of 16. Three things
on a gradient take 15 at the least; their last word reaches T5 alone."""


@dataclass(frozen=True)
class Object:
    """A thing that can be drawn: its word, its emoji code point, and the colour word it may carry, if any."""

    name: str
    codepoint: str
    colour: str = ""


OBJECTS: tuple[Object, ...] = (
    Object("apple", "1f34e", "red"),
    Object("balloon", "1f388", "red"),
    Object("banana", "1f34c", "yellow"),
    Object("boat", "26f5"),
    Object("bus", "1f68c"),
    Object("butterfly", "1f98b", "blue"),
    Object("cactus", "1f335", "green"),
    Object("car", "1f697", "red"),
    Object("carrot", "1f955", "orange"),
    Object("castle", "1f3f0", "white"),
    Object("cat", "1f431", "orange"),
    Object("dog", "1f436", "brown"),
    Object("doughnut", "1f369", "brown"),
    Object("duck", "1f986", "green"),
    Object("fish", "1f420"),
    Object("frog", "1f438", "green"),
    Object("ghost", "1f47b", "white"),
    Object("grapes", "1f347", "purple"),
    Object("guitar", "1f3b8", "red"),
    Object("hamburger", "1f354"),
    Object("heart", "2764-fe0f", "red"),
    Object("house", "1f3e0"),
    Object("lion", "1f981"),
    Object("mushroom", "1f344", "red"),
    Object("octopus", "1f419"),
    Object("owl", "1f989", "brown"),
    Object("panda", "1f43c"),
    Object("penguin", "1f427"),
    Object("pineapple", "1f34d", "yellow"),
    Object("pizza", "1f355"),
    Object("rabbit", "1f430"),
    Object("robot", "1f916"),
    Object("rocket", "1f680", "white"),
    Object("star", "2b50", "yellow"),
    Object("strawberry", "1f353", "red"),
    Object("sunflower", "1f33b", "yellow"),
    Object("tree", "1f333", "green"),
    Object("tulip", "1f337", "pink"),
    Object("turtle", "1f422", "green"),
    Object("watermelon", "1f349", "red"),
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
    "night sky": ("in the night sky", "in the night sky", "at night", "under the stars"),
    "grass field": ("on a grass field", "on a grass field", "in the grass"),
    "sea": ("at sea", "on the sea"),
    "desert": ("in the desert",),
    "snow": ("in the snow",),
    "forest": ("in the forest", "in a forest"),
    "beach": ("on the beach", "at the beach"),
    "sunset": ("at sunset",),
}
"""Each landscape with the ways a caption may say it; a phrase listed twice is used twice as often."""

HORIZONS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "grass field": ((150, 205, 250), (80, 170, 70)),
    "sea": ((190, 225, 250), (30, 100, 180)),
    "desert": ((250, 215, 160), (215, 165, 95)),
    "snow": ((185, 205, 230), (240, 244, 250)),
    "forest": ((150, 195, 160), (75, 110, 55)),
    "beach": ((150, 210, 250), (235, 210, 160)),
    "sunset": ((120, 70, 140), (60, 40, 70)),
}
"""Colours above and below the horizon."""

# Ranges are edges in shares of SIZE.
ALONE = {"": (0.54, 0.64), "small": (0.32, 0.4), "big": (0.76, 0.86)}
PAIRED = {"": (0.4, 0.46), "small": (0.26, 0.32), "big": (0.48, 0.54)}
THREE = (0.29, 0.32)

_OPENINGS = ("there is", "a picture of", "a drawing of", "we see")
_GRAMMAR = (
    "a an and the there is picture drawing of we see small big on in at to from with next left right between front under "
    "background field gradient night sky stars grass sea desert snow forest beach sunset"
)

CAPTION_WORDS: tuple[str, ...] = tuple(
    sorted({*_GRAMMAR.split(), *COLOURS, *(word for item in OBJECTS for word in (item.name, item.colour) if word)})
)
"""Every word a caption can hold; the tokenizers make each of them one token."""


@dataclass(frozen=True)
class Placed:
    """An object in a scene: its size word and its square, left, top and edge in pixels."""

    item: Object
    size: str
    left: int
    top: int
    edge: int


@dataclass(frozen=True)
class Scene:
    """A picture `[SIZE, SIZE, 3]` uint8, its caption, and what it shows; objects stand from left to right."""

    pixels: np.ndarray
    caption: str
    objects: tuple[Placed, ...]
    background: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(placed.item.name for placed in self.objects)


class Sprites:
    """Emoji pictures of an unpacked npm package, resized on first use and kept."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds `CODEPOINT.webp` files (256x256 RGBA), as the package's `assets/` does."""
        missing = [item.codepoint for item in OBJECTS if not (folder / f"{item.codepoint}.webp").is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks the sprites of {len(missing)} of {len(OBJECTS)} objects (first: {missing[0]}.webp): "
                "remove that folder, and the next run unpacks it anew"
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
    """One object in 45 % of cases, two in 40 %, three in 15 %. The same generator state gives the same scene."""
    kind = rng.random()
    backgrounds = list(COLOURS) if kind < 0.45 else ["gradient"] if kind < 0.6 else list(LANDSCAPES)
    background = backgrounds[rng.integers(len(backgrounds))]
    if background == "gradient":
        first, second = rng.choice(list(COLOURS), 2, replace=False)
        background = f"gradient from {first} to {second}"
    canvas = Image.fromarray(_background(rng, background)).convert("RGBA")
    count = int(rng.choice(3, p=(0.45, 0.4, 0.15))) + 1
    items = [OBJECTS[i] for i in rng.choice(len(OBJECTS), count, replace=False)]
    side = ""
    if count == 1:
        size = ("", "", "small", "big")[rng.integers(4)]
        side = ("", "", "left", "right")[rng.integers(4)] if size != "big" else ""
        objects = (_alone(rng, items[0], size, side),)
    elif count == 2:
        sizes = (("", ""), ("", ""), ("small", "big"), ("big", "small"))[rng.integers(4)]
        objects = tuple(
            _beside(rng, item, size, PAIRED[size], i, 2) for i, (item, size) in enumerate(zip(items, sizes, strict=True))
        )
    else:
        objects = tuple(_beside(rng, item, "", THREE, i, 3) for i, item in enumerate(items))
    for placed in objects:
        canvas.alpha_composite(sprites.get(placed.item, placed.edge), (placed.left, placed.top))
    caption = _caption(rng, objects, side, background)
    return Scene(np.asarray(canvas.convert("RGB")), caption, objects, background)


def _alone(rng: np.random.Generator, item: Object, size: str, side: str) -> Placed:
    edge = _edge(rng, ALONE[size])
    margin = (SIZE - edge) // 2
    sway = min(margin, SIZE // 10)
    shift = {"": 0, "left": -1, "right": 1}[side] * (margin * 3 // 4)
    across = _sway(rng, sway if not side else margin // 4)
    return Placed(item, size, margin + shift + across, margin + _sway(rng, min(margin, SIZE // 12)), edge)


def _beside(rng: np.random.Generator, item: Object, size: str, span: tuple[float, float], index: int, count: int) -> Placed:
    edge = _edge(rng, span)
    centre = SIZE * (1 + 2 * index) // (2 * count) + _sway(rng, 4)
    left = int(np.clip(centre - edge // 2, 0, SIZE - edge))
    return Placed(item, size, left, (SIZE - edge) // 2 + _sway(rng, SIZE // 12), edge)


def _edge(rng: np.random.Generator, span: tuple[float, float]) -> int:
    return int(rng.uniform(*span) * SIZE) // 4 * 4


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
    elif kind.startswith("gradient"):
        _, _, first, _, second = kind.split()
        top, bottom = (np.asarray(COLOURS[name], np.float32) for name in (first, second))
        picture = top * (1 - y) + bottom * y + 0 * x
    elif kind == "night sky":
        picture = np.array([12, 16, 50], np.float32) * (1 - y) + np.array([45, 45, 110], np.float32) * y + 0 * x
        for row, column in rng.integers(0, SIZE - 3, (22, 2)):
            picture[row : row + 3, column : column + 3] = rng.uniform(170, 255)
    else:
        picture = _landscape(rng, kind, x, y)
    clipped: np.ndarray = np.clip(picture, 0, 255)
    return clipped.astype(np.uint8)


def _landscape(rng: np.random.Generator, kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    above, below = (np.asarray(colour, np.float32) for colour in HORIZONS[kind])
    height = rng.uniform(0.52, 0.62)
    horizon = height + 0.02 * np.sin(x * rng.uniform(4, 9) + rng.uniform(0, 2 * np.pi))
    land = _step(y - horizon)
    sky = above * (1 + 0.12 * y) + 0 * x
    if kind == "sunset":
        sky = above * (1 - y / 0.6) + np.array([250, 140, 60], np.float32) * (y / 0.6) + 0 * x
        sun = _step(0.1 - np.hypot(x - rng.uniform(0.2, 0.8), y - height + 0.04))
        sky = sky * (1 - sun) + np.array([255, 225, 130], np.float32) * sun
    elif kind == "forest":
        edge = 0.22 - 0.1 * np.abs(((x * 6 + rng.uniform()) % 1) * 2 - 1)
        firs = _step(y - edge - 0.12)
        sky = sky * (1 - firs) + np.array([35, 85, 50], np.float32) * (1.15 - 0.4 * y) * firs
    elif kind == "beach":
        water = _step(y - height + 0.16)
        sky = sky * (1 - water) + np.array([50, 140, 200], np.float32) * water
    picture = sky * (1 - land) + below * (1.1 - 0.25 * y) * land
    if kind == "sea":
        picture = picture + land * 6 * np.sin(40 * y + 3 * np.sin(9 * x))
    elif kind == "snow":
        for row, column in rng.integers(0, SIZE - 4, (40, 2)):
            picture[row : row + 4, column : column + 4] = 252
    landscape: np.ndarray = picture
    return landscape


def _step(distance: np.ndarray) -> np.ndarray:
    """0 to 1 where `distance`, in shares of SIZE, turns positive; two pixels soft."""
    soft: np.ndarray = np.clip(distance * SIZE / 2, 0, 1)
    return soft


def _caption(rng: np.random.Generator, objects: tuple[Placed, ...], side: str, background: str) -> str:
    """In varied words, or in the plainest ones where the variation would not fit."""
    opening = f"{_pick(rng, _OPENINGS)} " if rng.random() < 0.2 else ""
    varied = f"{opening}{_things(rng, objects, side, colours=True)} {_place(rng, background)}"
    plain = f"{_things(rng, objects, side, colours=False)} {_place(rng, background)}"
    caption = varied if _length(varied) <= MAX_WORDS else plain
    if _length(caption) > MAX_WORDS:
        caption = f"{_listed([_thing(rng, placed, colours=False) for placed in objects])} {_place(rng, background)}"
    if rng.random() < 0.1:
        caption = caption[0].upper() + caption[1:]
    return caption


def _length(caption: str) -> int:
    return len(caption.replace(",", " ,").split())


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


def _thing(rng: np.random.Generator, placed: Placed, *, colours: bool) -> str:
    colour = placed.item.colour if colours and rng.random() < 0.35 else ""
    words = " ".join(word for word in (placed.size, colour, placed.item.name) if word)
    if placed.item.name == "grapes":
        return words
    return f"{'the' if rng.random() < 0.08 else 'an' if words[0] in 'aeiou' else 'a'} {words}"


def _listed(things: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(things[:-1]), things[-1])))


def _things(rng: np.random.Generator, objects: tuple[Placed, ...], side: str, *, colours: bool) -> str:
    things = [_thing(rng, placed, colours=colours) for placed in objects]
    way = rng.random()
    if side:
        return f"{things[0]} on the {side}"
    if len(things) == 2 and way < 0.5:
        left, right = things
        ways = (
            f"{left} next to {right}",
            f"{left} to the left of {right}",
            f"{right} to the right of {left}",
            f"{left} with {right}",
        )
        return _pick(rng, ways)
    if len(things) == 3 and way < 0.3:
        return f"{things[1]} between {things[0]} and {things[2]}"
    return _listed(things)


def _place(rng: np.random.Generator, background: str) -> str:
    if background in COLOURS:
        article = "an" if background[0] in "aeiou" else "a"
        return f"{'on' if rng.random() < 0.85 else 'in front of'} {article} {background} background"
    if background in LANDSCAPES:
        return _pick(rng, LANDSCAPES[background])
    return f"on a {background}"
