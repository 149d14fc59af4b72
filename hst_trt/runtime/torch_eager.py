"""The torch backend: the reference modules behind the Engine protocol.

It is the plain reference beside the fast paths: same loop, same buffers, torch's arithmetic. Torch and the modules come
from the caller, so nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["TorchBackend", "TorchEngine"]

TorchFunction = Callable[..., dict[str, Tensor]]


class _TorchCall:
    def __init__(self, function: TorchFunction, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self._function, self._inputs, self._outputs = function, inputs, outputs

    @torch.no_grad()
    def execute(self) -> None:
        for name, value in self._function(**self._inputs).items():
            target = self._outputs[name]
            if value.data_ptr() != target.data_ptr():
                target.copy_(value)

    def capture(self) -> None:
        """Eager calls are not recorded."""


@dataclass(frozen=True)
class TorchEngine:
    """A function of named tensors that returns named tensors."""

    function: TorchFunction
    input_names: Sequence[str]
    output_names: Sequence[str]
    output_widths: Mapping[str, int] = field(default_factory=dict)

    def prepare(self, bindings: Mapping[str, Tensor]) -> _TorchCall:
        inputs = {name: bindings[name] for name in self.input_names}
        return _TorchCall(self.function, inputs, {name: bindings[name] for name in self.output_names})


class TorchBackend:
    """Runs torch functions on the CPU."""

    def __init__(self, engines: Mapping[str, TorchEngine]) -> None:
        self._engines = dict(engines)

    def engine(self, name: str) -> TorchEngine:
        return self._engines[name]

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        return torch.zeros(tuple(shape), dtype=getattr(torch, dtype))

    def view(self, buffer: Tensor, shape: Sequence[int]) -> Tensor:
        return buffer.view(-1)[: int(np.prod(shape))].view(tuple(shape))

    def write(self, buffer: Tensor, values: np.ndarray) -> None:
        buffer.copy_(torch.from_numpy(np.array(values)).expand(buffer.shape))

    def read(self, buffer: Tensor) -> np.ndarray:
        return buffer.numpy().copy()

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def move_rows(self, caches: Sequence[Tensor], partner: Tensor, first: int, text_rows: Sequence[int]) -> None:
        source = partner[:, first:].repeat(caches[0].shape[0] // partner.shape[0], 1)  # [R, N - first]
        for cache, offset in zip(caches, text_rows, strict=True):
            index = (source + offset)[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
            cache[:, :, first + offset :] = cache.gather(2, index)
