"""Spoiled sprites: what has an object's colours, and often its outline, but is not that object any more.

They teach the classifier that a blob of the right colours is not the thing. Each way to spoil takes a sprite and another
one of the same size, as RGBA, and returns RGBA; each is strong enough that the word no longer fits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.scenes import OBJECTS, Object, Scene, Sprites, draw_scene

Spoil = Callable[[np.random.Generator, Image.Image, Image.Image], Image.Image]


def blurred(rng: np.random.Generator, sprite: Image.Image, other: Image.Image) -> Image.Image:
    """With a Gaussian of a tenth to a sixth of its edge.

    It is shrunk first and its colours are premultiplied, so that neither a cut edge nor a dark fringe gives it away.
    """
    edge = sprite.width * 3 // 4
    canvas = Image.new("RGBA", sprite.size)
    canvas.paste(sprite.resize((edge, edge)), ((sprite.width - edge) // 2,) * 2)
    return canvas.convert("RGBa").filter(ImageFilter.GaussianBlur(edge * rng.uniform(0.1, 0.17))).convert("RGBA")


def shuffled(rng: np.random.Generator, sprite: Image.Image, other: Image.Image) -> Image.Image:
    """Cut into 3x3 to 5x5 blocks, none of which stays at its place."""
    count = int(rng.integers(3, 6))
    edge = sprite.width // count
    pixels = np.array(sprite)[: count * edge, : count * edge]
    blocks = pixels.reshape(count, edge, count, edge, 4).swapaxes(1, 2).reshape(-1, edge, edge, 4)
    order = rng.permutation(len(blocks))
    moved = np.empty_like(blocks)
    moved[order] = blocks[np.roll(order, 1)]
    rows = moved.reshape(count, count, edge, edge, 4).swapaxes(1, 2).reshape(count * edge, count * edge, 4)
    return Image.fromarray(rows).resize(sprite.size, Image.Resampling.NEAREST)


def noised(rng: np.random.Generator, sprite: Image.Image, other: Image.Image) -> Image.Image:
    """Its outline, filled with noise around the sprite's own colours."""
    cells = int(rng.integers(6, 17))
    colours = _colours(rng, sprite, cells * cells).astype(np.float64) + rng.normal(0, 70, (cells * cells, 3))
    grid = Image.fromarray(colours.clip(0, 255).astype(np.uint8).reshape(cells, cells, 3))
    filled = grid.resize(sprite.size, Image.Resampling.NEAREST).convert("RGBA")
    filled.putalpha(sprite.getchannel("A"))
    return filled


def blended(rng: np.random.Generator, sprite: Image.Image, other: Image.Image) -> Image.Image:
    """Half itself, half the other: neither."""
    return Image.blend(sprite.convert("RGBa"), other.convert("RGBa"), rng.uniform(0.45, 0.55)).convert("RGBA")


def blobs(rng: np.random.Generator, sprite: Image.Image, other: Image.Image) -> Image.Image:
    """Flat ellipses of the sprite's colours where it would be."""
    edge = sprite.width
    canvas = Image.new("RGBA", sprite.size)
    pen = ImageDraw.Draw(canvas)
    for colour in _colours(rng, sprite, int(rng.integers(2, 9))):
        width, height = rng.uniform(0.3, 0.85, 2) * edge
        left, top = rng.uniform(0, edge - width), rng.uniform(0, edge - height)
        pen.ellipse((left, top, left + width, top + height), fill=(*map(int, colour), 255))
    return canvas.convert("RGBa").filter(ImageFilter.GaussianBlur(edge / 60)).convert("RGBA")


def _colours(rng: np.random.Generator, sprite: Image.Image, count: int) -> np.ndarray:
    """Colours of random opaque pixels, [count, 3] uint8."""
    pixels = np.array(sprite).reshape(-1, 4)
    opaque = pixels[pixels[:, 3] > 200, :3]
    picked: np.ndarray = opaque[rng.integers(len(opaque), size=count)]
    return picked


WAYS: dict[str, Spoil] = {way.__name__: way for way in (blurred, shuffled, noised, blended, blobs)}


class SpoiledSprites(Sprites):
    """Stands in for a scene's sprites and spoils a share of what it hands out; `ways` says which objects, and how."""

    def __init__(self, sprites: Sprites, rng: np.random.Generator, share: float) -> None:
        """Opens no folder of its own: `sprites` has the pictures."""
        self._whole, self._rng, self._share = sprites, rng, share
        self.ways: dict[str, str] = {}

    def get(self, item: Object, edge: int) -> Image.Image:
        sprite = self._whole.get(item, edge)
        if self._rng.random() >= self._share:
            return sprite
        others = [candidate for candidate in OBJECTS if candidate != item]
        other = self._whole.get(others[self._rng.integers(len(others))], edge)
        self.ways[item.name] = list(WAYS)[self._rng.integers(len(WAYS))]
        return WAYS[self.ways[item.name]](self._rng, sprite, other)


def draw_spoiled(rng: np.random.Generator, sprites: Sprites, share: float) -> tuple[Scene, dict[str, str]]:
    """A scene, each of whose objects is spoiled with probability `share`, and how each spoiled object was."""
    spoiled = SpoiledSprites(sprites, rng.spawn(1)[0], share)
    return draw_scene(rng, spoiled), spoiled.ways
