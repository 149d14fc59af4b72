"""The two ends of the loop: prompts to text features, and denoised tokens to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .runtime.engine import Backend
from .spec import PairSpec
from .tensor_names import TEXT_ENCODERS, VAE_DECODER

__all__ = ["decode_latents", "encode_prompts", "patchify", "unpatchify"]

Tokenize = Callable[[Sequence[str]], np.ndarray]


def encode_prompts(
    backend: Backend, spec: PairSpec, tokenizers: Sequence[Tokenize], prompts: Sequence[str], rows: Sequence[int]
) -> dict[str, np.ndarray]:
    """Text features of prompts, repeated as the transformers' rows need them.

    Args:
        tokenizers: one for each text encoder; two where the pair has no T5.
        prompts: the different prompts, each encoded once.
        rows: the prompt of each transformer row.

    Returns:
        encoder_hidden_states [len(rows), T, J] and pooled_projections [len(rows), P], float32.
    """
    count = len(prompts)
    joined: dict[str, object] = {"prompt_index": _filled(backend, np.asarray(rows, np.int64))}
    for number, (name, tokenize) in enumerate(zip(TEXT_ENCODERS, tokenizers, strict=False), start=1):
        ids = tokenize(prompts)
        engine = backend.engine(name)
        widths = engine.output_widths
        hidden = backend.empty((count, ids.shape[1], widths["hidden_states"]), "float32")
        bindings = {"input_ids": _filled(backend, ids), "hidden_states": hidden}
        joined[f"hidden_{number}"] = hidden
        if "text_embeds" in widths:
            bindings["text_embeds"] = joined[f"embeds_{number}"] = backend.empty((count, widths["text_embeds"]), "float32")
        engine.prepare(bindings).execute()
    outputs = {
        "encoder_hidden_states": backend.empty((len(rows), spec.text_length, spec.large.text_width), "float32"),
        "pooled_projections": backend.empty((len(rows), spec.large.pooled_width), "float32"),
    }
    backend.engine("join_text").prepare(joined | outputs).execute()
    return {name: backend.read(buffer) for name, buffer in outputs.items()}


def decode_latents(backend: Backend, spec: PairSpec, tokens: np.ndarray, h: int, w: int) -> np.ndarray:
    """Pixels [images, H, W, 3] uint8 of denoised tokens [images, h*w, C]; one image at a time, to bound the memory."""
    side = spec.token_side
    latent = backend.empty((1, h, w, tokens.shape[-1]), "float32")
    image = backend.empty((1, h * side, w * side, 3), "uint8")
    call = backend.engine(VAE_DECODER).prepare({"latent_tokens": latent, "image": image})
    pixels = []
    for one in tokens:
        backend.write(latent, one.reshape(1, h, w, -1))
        call.execute()
        pixels.append(backend.read(image)[0])
    return np.stack(pixels)


def patchify(latents: np.ndarray, patch: int) -> np.ndarray:
    """Latents [B, C, h*p, w*p] to tokens [B, h*w, C*p*p], each token's values in (C, p, p) order."""
    b, c, height, width = latents.shape
    grid = latents.reshape(b, c, height // patch, patch, width // patch, patch)
    return np.ascontiguousarray(grid.transpose(0, 2, 4, 1, 3, 5)).reshape(b, -1, c * patch * patch)


def unpatchify(tokens: np.ndarray, h: int, w: int, patch: int) -> np.ndarray:
    """The inverse of `patchify`."""
    grid = tokens.reshape(len(tokens), h, w, -1, patch, patch)
    return np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2, 5)).reshape(len(tokens), -1, h * patch, w * patch)


def _filled(backend: Backend, values: np.ndarray) -> object:
    buffer = backend.empty(values.shape, str(values.dtype))
    backend.write(buffer, values)
    return buffer
