"""The cost model: FLOPs of a transformer call, and what a plan costs in units of one full call of the large model.

Only matrix products are counted (linear layers, QK^T, PV; one multiply-add = 2 FLOP). Checked against torch's FLOP counter
on the real module classes in the tests. Whoever has measured costs puts them in the model's place (`hst_trt.bench`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .spec import TransformerSpec

__all__ = ["CallCosts", "ModelledCosts", "call_flops"]


def call_flops(spec: TransformerSpec, computed: int, tokens: int, text: int) -> int:
    """FLOPs of one call at batch 1: `computed` of `tokens` image tokens, with `text` text tokens."""
    d, layers = spec.width, spec.layers
    linear = computed * 24 * d * d * layers  # q, k, v, out: 4 d^2, feed-forward: 8 d^2, times 2
    linear += computed * 8 * d * d * spec.dual_layers
    linear += text * (24 * d * d * (layers - 1) + 4 * d * d)  # the last block makes no more of text than keys and values
    modulation = 6 * layers + 3 * spec.dual_layers + 6 * (layers - 1) + 2 + 2  # one row an image; norm_out has 2
    linear += 2 * d * d * modulation
    linear += 2 * computed * 2 * spec.token_channels * d + 2 * text * spec.text_width * d
    linear += 2 * (256 * d + d * d + spec.pooled_width * d + d * d)
    attention = 4 * d * (tokens + text) * ((layers - 1) * (computed + text) + computed)
    return linear + attention + 4 * d * computed * tokens * spec.dual_layers


class CallCosts(Protocol):
    """What calls cost in units of one full large call, for one image size."""

    @property
    def source(self) -> str: ...
    def large(self, tokens: int) -> float: ...
    def small(self) -> float: ...


@dataclass(frozen=True)
class ModelledCosts:
    """Costs by FLOPs."""

    large_spec: TransformerSpec
    small_spec: TransformerSpec
    num_tokens: int
    text_length: int
    source: str = "cost model (FLOPs)"

    def large(self, tokens: int) -> float:
        return self._flops(self.large_spec, tokens) / self._flops(self.large_spec, self.num_tokens)

    def small(self) -> float:
        return self._flops(self.small_spec, self.num_tokens) / self._flops(self.large_spec, self.num_tokens)

    def _flops(self, spec: TransformerSpec, tokens: int) -> int:
        return call_flops(spec, tokens, self.num_tokens, self.text_length)
