"""Prompts to token ids, as transformers' fast tokenizers do it, from the bundle's ``tokenizer.json``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .errors import IntegrityError

__all__ = ["PromptTokenizer"]

log = logging.getLogger(__name__)


class PromptTokenizer:
    """Pads and truncates every prompt to one length.

    Args:
        path: a ``tokenizer.json``.
        length: tokens of every prompt, special tokens included.
        pad_id: what a short prompt is filled up with.
    """

    def __init__(self, path: Path, length: int, pad_id: int) -> None:
        try:
            self._whole = Tokenizer.from_file(str(path))
            self._cut = Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises bare Exception
            raise IntegrityError(f"{path} is not a tokenizer", found=str(exc), fix="build the bundle again") from exc
        self.name, self.length = path.stem, length
        self._whole.no_truncation()
        self._whole.no_padding()
        self._cut.enable_truncation(length)
        self._cut.enable_padding(length=length, pad_id=pad_id, pad_token=self._cut.id_to_token(pad_id) or "")

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids [prompts, length] int64. What does not fit is cut off, and the log names it."""
        for prompt in prompts:
            ids = self._whole.encode(prompt).ids
            if len(ids) > self.length:
                removed = self._whole.decode(ids[self.length - 1 : -1])
                if suffix := getattr(self._whole.model, "end_of_word_suffix", None):  # CLIP's; its decoder leaves them in
                    removed = removed.replace(suffix, " ")
                log.warning(
                    "the prompt is too long for the %d tokens of %s; this part was cut off: %r",
                    self.length,
                    self.name,
                    removed.strip(),
                )
        return np.array([encoding.ids for encoding in self._cut.encode_batch(list(prompts))], np.int64)
