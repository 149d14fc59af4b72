"""The demo's three tokenizers and text encoders: the transformers classes that SD3 uses, small enough to train here.

Two CLIP text towers and a T5 encoder, joined exactly as diffusers' StableDiffusion3Pipeline joins them, so the
directory loads there unchanged. Every caption word is one token; any other text falls back to bytes (CLIP) or characters (T5).
"""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from demo.scenes import CAPTION_WORDS

TOKENS = 16
"""Tokens of each CLIP prompt and of the T5 prompt; a transformer sees 2 * TOKENS in all."""

CLIP_WIDTH, T5_WIDTH = 64, 128
POOLED_WIDTH = 2 * CLIP_WIDTH
_START, _END = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in byte order.

    A byte that is not itself a printable Latin-1 character gets the next free one from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + unprintable.index(byte)) for byte in range(256)]


def _learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one symbol; ties go to the alphabetically first pair."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spelled:
            at = 0
            while at + 1 < len(symbols):
                if (symbols[at], symbols[at + 1]) == best:
                    symbols[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def make_clip_tokenizer(*, pad_token: str = _END) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's layout: 256 bytes, 256 word-final bytes, merges, start, end (the highest id)."""
    symbols = _byte_symbols()
    merges = _learn_merges(CAPTION_WORDS)
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), _START, _END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=pad_token,
        model_max_length=TOKENS,
    )


def make_t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: caption words, also capitalised, then single characters; what is left becomes `<unk>`."""
    words = [f"▁{form}" for word in CAPTION_WORDS for form in (word, word.capitalize())]
    characters = [chr(code) for code in range(ord("¡"), 0x180)]
    singles = [*string.ascii_letters, *string.digits, *string.punctuation, *characters]
    scored = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -6.0}
    scored |= {piece: -2.0 for piece in words} | {piece: -6.0 for piece in singles}
    return T5Tokenizer(vocab=list(scored.items()), extra_ids=0, model_max_length=TOKENS)


def _make_clip(vocabulary: int, activation: str, pad_id: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=CLIP_WIDTH,
            hidden_act=activation,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=pad_id,
        )
    )


@dataclass(frozen=True)
class Tokenizers:
    """In the pipeline's order. As in SD3, the first CLIP pads with its end token and the second with `!`."""

    first: CLIPTokenizer
    second: CLIPTokenizer
    third: T5Tokenizer

    @classmethod
    def make(cls) -> Tokenizers:
        return cls(make_clip_tokenizer(), make_clip_tokenizer(pad_token="!"), make_t5_tokenizer())

    def ids(self, captions: list[str]) -> torch.Tensor:
        """`[B, 3, TOKENS]` int64: one row for each of the three."""
        rows = [
            tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
            for tokenizer in (self.first, self.second, self.third)
        ]
        return torch.stack(rows, dim=1)


class TextEncoders(nn.Module):
    """The three encoders as one module, for training; the pipeline holds them apart."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        super().__init__()
        size = len(tokenizers.first)
        self.first = _make_clip(size, "quick_gelu", int(tokenizers.first.pad_token_id))
        self.second = _make_clip(size, "gelu", int(tokenizers.second.pad_token_id))
        self.third = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizers.third),
                d_model=T5_WIDTH,
                d_kv=32,
                num_heads=4,
                d_ff=256,
                num_layers=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                tie_word_embeddings=False,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        )

    def forward(self, ids: torch.Tensor, t5_length: int = TOKENS, *, no_t5: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """`ids` `[B, 3, TOKENS]` to states `[B, TOKENS + t5_length, 128]` and pooled `[B, 128]`, as `encode_prompt` does.

        The T5 prompt is padded to `t5_length`; without T5 its states are zeros.
        """
        clips = [m(ids[:, i], output_hidden_states=True) for i, m in enumerate((self.first, self.second))]
        clip_states = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        clip_states = F.pad(clip_states, (0, T5_WIDTH - clip_states.shape[-1]))
        if no_t5:
            t5_states = clip_states.new_zeros(len(ids), t5_length, T5_WIDTH)
        else:
            t5_states = self.third(F.pad(ids[:, 2], (0, t5_length - TOKENS)))[0]
        states = torch.cat([clip_states, t5_states], dim=-2)
        return states, torch.cat([clip.text_embeds for clip in clips], dim=-1)
