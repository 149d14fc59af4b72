"""What a pair of models is, as far as running it needs to know: plain numbers, read once from the models' configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["MAX_COUNT", "MAX_IMAGES", "MAX_SIDE", "PairSpec", "TransformerSpec"]

# The bundle format's upper ends: with them no number of elements or bytes that a reader multiplies together passes 63 bits.
MAX_COUNT = 65536  # layers, heads, widths, lengths
MAX_SIDE = 16384  # pixels
MAX_IMAGES = 1024

_COUNTS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "in_channels",
    "patch_size",
    "pos_embed_max_size",
)


@dataclass(frozen=True)
class TransformerSpec:
    """The numbers of a transformer's ``config.json`` that decide its shapes and what a call costs."""

    layers: int
    heads: int
    head_dim: int
    dual_layers: int
    text_width: int
    pooled_width: int
    token_channels: int
    table_side: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TransformerSpec:
        """Reads the ``config.json`` of a transformer.

        Raises:
            KeyError, ValueError: a number is missing, or is none.
        """
        for key in _COUNTS:
            if not _is_whole(config[key]) or not 1 <= config[key] <= MAX_COUNT:
                raise ValueError(f"{key} is {config[key]!r}, not a whole number from 1 to {MAX_COUNT}")
        if config["num_attention_heads"] * config["attention_head_dim"] > MAX_COUNT:
            raise ValueError(f"num_attention_heads of attention_head_dim are more than {MAX_COUNT}")
        dual = config.get("dual_attention_layers")
        dual = () if dual is None else dual
        if not isinstance(dual, (list, tuple)) or not all(map(_is_whole, dual)):
            raise ValueError("dual_attention_layers are not an array of whole numbers")
        return cls(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            dual_layers=len(dual),
            text_width=config["joint_attention_dim"],
            pooled_width=config["pooled_projection_dim"],
            token_channels=config["in_channels"] * config["patch_size"] ** 2,
            table_side=config["pos_embed_max_size"],
        )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def position_ids(self, h: int, w: int) -> np.ndarray:
        """Rows of the position table for a centred crop of h x w tokens, as diffusers crops it; [h*w] int64."""
        top, left = (self.table_side - h) // 2, (self.table_side - w) // 2
        return ((np.arange(h)[:, None] + top) * self.table_side + np.arange(w) + left).reshape(-1).astype(np.int64)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class PairSpec:
    """Two transformers that share everything around them."""

    large: TransformerSpec
    small: TransformerSpec
    latent_channels: int
    patch_size: int
    vae_scale: int  # pixels of an image side per latent
    clip_length: int
    t5_length: int

    @property
    def text_length(self) -> int:
        return self.clip_length + self.t5_length

    @property
    def token_side(self) -> int:
        """Pixels of an image side per token."""
        return self.vae_scale * self.patch_size

    @property
    def max_side(self) -> int:
        """Pixels of the largest side that both position tables hold."""
        return min(self.large.table_side, self.small.table_side) * self.token_side

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of an image."""
        return height // self.token_side, width // self.token_side
