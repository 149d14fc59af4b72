"""The two ends of the loop: prompts to text features, and denoised tokens to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .runtime.engine import Backend, Engine, PreparedCall
from .spec import PairSpec
from .tensor_names import TEXT_ENCODERS, VAE_DECODER

__all__ = ["Decoder", "Encoder", "decode_latents", "encode_prompts", "patchify", "unpatchify"]

Tokenize = Callable[[Sequence[str]], np.ndarray]


class Encoder:
    """The text encoders bound for a number of different prompts and of transformer rows.

    Args:
        encoders: how many there are: two where the pair has no T5.
        prompts: different prompts, each encoded once.
        rows: transformer rows, each of one prompt.
    """

    def __init__(self, backend: Backend, spec: PairSpec, encoders: int, prompts: int, rows: int) -> None:
        self._backend = backend
        self._ids: list[Any] = []
        self._index = backend.empty((rows,), "int64")
        self._calls: list[PreparedCall] = []
        joined: dict[str, Any] = {"prompt_index": self._index}
        for number, name in enumerate(TEXT_ENCODERS[:encoders], start=1):
            engine = backend.engine(name)
            length = _static(engine, "input_ids")
            ids = backend.empty((prompts, length), "int64")
            hidden = backend.empty((prompts, length, _static(engine, "hidden_states")), "float32")
            bindings = {"input_ids": ids, "hidden_states": hidden}
            joined[f"hidden_{number}"] = hidden
            if "text_embeds" in engine.output_names:
                embeds = backend.empty((prompts, _static(engine, "text_embeds")), "float32")
                bindings["text_embeds"] = joined[f"embeds_{number}"] = embeds
            self._ids.append(ids)
            self._calls.append(engine.prepare(bindings))
        self._outputs = {
            "encoder_hidden_states": backend.empty((rows, spec.text_length, spec.large.text_width), "float32"),
            "pooled_projections": backend.empty((rows, spec.large.pooled_width), "float32"),
        }
        self._calls.append(backend.engine("join_text").prepare(joined | self._outputs))

    def __call__(self, ids: Sequence[np.ndarray], rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Text features, repeated as the transformers' rows need them.

        Args:
            ids: for each encoder the tokens of the different prompts, [prompts, length] int64.
            rows: the prompt of each transformer row.

        Returns:
            encoder_hidden_states [rows, T, J] and pooled_projections [rows, P], float32.
        """
        self._backend.write(self._index, np.asarray(rows, np.int64))
        for buffer, values in zip(self._ids, ids, strict=True):
            self._backend.write(buffer, values)
        for call in self._calls:
            call.execute()
        return {name: self._backend.read(buffer) for name, buffer in self._outputs.items()}


def encode_prompts(
    backend: Backend, spec: PairSpec, tokenizers: Sequence[Tokenize], prompts: Sequence[str], rows: Sequence[int]
) -> dict[str, np.ndarray]:
    """Text features of different prompts; see `Encoder`."""
    encoder = Encoder(backend, spec, len(tokenizers), len(prompts), len(rows))
    return encoder([tokenize(prompts) for tokenize in tokenizers], rows)


class Decoder:
    """The VAE decoder bound for images of h x w tokens; one image at a time, to bound the memory."""

    def __init__(self, backend: Backend, spec: PairSpec, h: int, w: int) -> None:
        self._backend, self._shape, side = backend, (1, h, w, spec.large.token_channels), spec.token_side
        self._latent = backend.empty(self._shape, "float32")
        self._image = backend.empty((1, h * side, w * side, 3), "uint8")
        self._call = backend.engine(VAE_DECODER).prepare({"latent_tokens": self._latent, "image": self._image})

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Pixels [images, H, W, 3] uint8 of denoised tokens [images, h*w, C]."""
        pixels = []
        for one in tokens:
            self._backend.write(self._latent, one.reshape(self._shape))
            self._call.execute()
            pixels.append(self._backend.read(self._image)[0])
        return np.stack(pixels)


def decode_latents(backend: Backend, spec: PairSpec, tokens: np.ndarray, h: int, w: int) -> np.ndarray:
    """Pixels [images, H, W, 3] uint8 of denoised tokens [images, h*w, C]."""
    return Decoder(backend, spec, h, w)(tokens)


def patchify(latents: np.ndarray, patch: int) -> np.ndarray:
    """Latents [B, C, h*p, w*p] to tokens [B, h*w, C*p*p], each token's values in (C, p, p) order."""
    b, c, height, width = latents.shape
    grid = latents.reshape(b, c, height // patch, patch, width // patch, patch)
    return np.ascontiguousarray(grid.transpose(0, 2, 4, 1, 3, 5)).reshape(b, -1, c * patch * patch)


def unpatchify(tokens: np.ndarray, h: int, w: int, patch: int) -> np.ndarray:
    """The inverse of `patchify`."""
    grid = tokens.reshape(len(tokens), h, w, -1, patch, patch)
    return np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2, 5)).reshape(len(tokens), -1, h * patch, w * patch)


def _static(engine: Engine, tensor: str) -> int:
    """The length of a tensor's last axis, which its engine fixes."""
    length = engine.tensors[tensor].shape[-1]
    assert isinstance(length, int)
    return length
