"""Prompts to token ids, as transformers' fast tokenizers do it, from the bundle's ``tokenizer.json``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from .errors import IntegrityError

__all__ = ["PromptTokenizer"]

log = logging.getLogger(__name__)


class PromptTokenizer:
    """Pads and truncates every prompt to one length.

    Args:
        content: of a ``tokenizer.json``.
        name: of the tokenizer, for messages.
        length: tokens of every prompt, special tokens included.
        pad_id: what a short prompt is filled up with.
    """

    def __init__(self, content: bytes, name: str, length: int, pad_id: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as exc:  # the library raises bare Exception
            raise IntegrityError(f"{name} is not a tokenizer", found=str(exc), fix="build the bundle again") from exc
        if (special := self._tokenizer.num_special_tokens_to_add(False)) > length:
            found = f"{special} special tokens for {length} in all"
            raise IntegrityError(f"{name} leaves no room for a text", found=found, fix="build the bundle again")
        self.name, self.length = name, length
        self.pad_id = pad_id

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids [prompts, length] int64. What does not fit is cut off, and the log names it."""
        tokenizer = self._tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for prompt in prompts:
            ids = tokenizer.encode(prompt).ids
            if len(ids) > self.length:
                removed = tokenizer.decode(ids[self.length - 1 : -1])
                if suffix := getattr(tokenizer.model, "end_of_word_suffix", None):  # CLIP's; its decoder leaves them in
                    removed = removed.replace(suffix, " ")
                log.warning(
                    "the prompt is too long for the %d tokens of %s; this part was cut off: %r",
                    self.length,
                    self.name,
                    removed.strip(),
                )
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=self.length, pad_id=self.pad_id, pad_token=tokenizer.id_to_token(self.pad_id) or "")
        return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(prompts))], np.int64)
