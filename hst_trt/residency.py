"""What a pipeline keeps on its device between requests, and what it frees within one."""

from __future__ import annotations

from collections.abc import Iterable

from .codec import Decoder, Encoder
from .runtime.engine import Backend
from .spec import PairSpec
from .tensor_names import LARGE, SMALL, TEXT_ENCODERS, VAE_DECODER
from .workspace import RequestShape, Workspace

__all__ = ["Residency"]


class Residency:
    """Owns the buffers of the last request's shape, which the next one of that shape finds ready.

    Args:
        low_vram: free engines, and the buffers bound to them, as soon as a request no longer needs them.
    """

    def __init__(self, backend: Backend, spec: PairSpec, *, low_vram: bool) -> None:
        self._backend, self._spec, self._low_vram = backend, spec, low_vram
        self._encoder: tuple[tuple[int, ...], Encoder] | None = None
        self._workspace: Workspace | None = None
        self._decoder: tuple[tuple[int, int], Decoder] | None = None

    def encoder(self, encoders: int, prompts: int, rows: int) -> Encoder:
        key = (encoders, prompts, rows)
        if self._encoder is None or self._encoder[0] != key:
            self._encoder = None  # freed before the next is made
            self._encoder = key, Encoder(self._backend, self._spec, *key)
        return self._encoder[1]

    def workspace(self, shape: RequestShape) -> Workspace:
        if self._workspace is None or self._workspace.shape != shape:
            self._workspace = None
            self._workspace = Workspace(self._backend, self._spec, shape)
        return self._workspace

    def decoder(self, h: int, w: int) -> Decoder:
        if self._decoder is None or self._decoder[0] != (h, w):
            self._decoder = None
            self._decoder = (h, w), Decoder(self._backend, self._spec, h, w)
        return self._decoder[1]

    def expect_decoder(self, h: int, w: int) -> None:
        """Makes the decoder ahead of the loop: it works in the same memory, which must not move once steps are recorded."""
        if not self._low_vram:
            self.decoder(h, w)

    def done_with_text(self) -> None:
        if self._low_vram:
            self._encoder = None
        self._free(TEXT_ENCODERS)

    def done_with_loop(self) -> None:
        if self._low_vram:
            self._workspace = None
        self._free((LARGE, SMALL))

    def done_with_decoder(self) -> None:
        if self._low_vram:
            self._decoder = None
        self._free((VAE_DECODER,))

    def drop(self) -> None:
        """Frees all but the engines: after memory ran out, the next request shall find what this one had taken."""
        self._encoder = self._workspace = self._decoder = None
        self._backend.release(())

    def _free(self, engines: Iterable[str]) -> None:
        if self._low_vram:
            self._backend.release(engines)
