"""The cost model: FLOPs of a transformer call, the weights it reads, and what it costs in units of a full large call.

Only matrix products are counted (linear layers, QK^T, PV; one multiply-add = 2 FLOP). Checked against torch's FLOP counter
on the real module classes in the tests. A call also reads every weight once, however few tokens it computes; what that takes
on a machine is `FLOPS_PER_WEIGHT_BYTE`. Whoever has measured costs puts them in the model's place (`hst_trt.bench`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .spec import TransformerSpec

__all__ = ["FLOPS_PER_WEIGHT_BYTE", "CallCosts", "ModelledCosts", "call_flops", "call_weights"]

FLOPS_PER_WEIGHT_BYTE = {"onnxruntime": 12.0}
"""By backend: FLOPs that it would do in the time that reading one byte of weights adds to a call. ONNX Runtime's on a CPU was
chosen on an untrained pair at 256 tokens, and holds on other sizes and pairs (benchmarks/results/cpu_cost_model.md). On a GPU
reading overlaps with computing, but for the modulation layers; what remains was never measured, and counts as nothing."""


def call_flops(spec: TransformerSpec, computed: int, tokens: int, text: int) -> int:
    """FLOPs of one call at batch 1: `computed` of `tokens` image tokens, with `text` text tokens."""
    linear = 2 * sum(rows * weights for rows, weights in _linear_layers(spec, computed, text))
    attention = 4 * spec.width * (tokens + text) * ((spec.layers - 1) * (computed + text) + computed)
    return linear + attention + 4 * spec.width * computed * tokens * spec.dual_layers


def call_weights(spec: TransformerSpec) -> int:
    """How many weights one call reads, those of its linear layers."""
    return sum(weights for _, weights in _linear_layers(spec, 0, 0))


def _linear_layers(spec: TransformerSpec, computed: int, text: int) -> tuple[tuple[int, int], ...]:
    """The linear layers by what they run over: rows of an image, and weights."""
    d, layers = spec.width, spec.layers
    image = 12 * d * d * layers + 4 * d * d * spec.dual_layers + 2 * spec.token_channels * d  # q, k, v, out, feed-forward
    of_text = 12 * d * d * (layers - 1) + 2 * d * d + spec.text_width * d  # the last block takes keys and values only
    modulation = d * d * (6 * layers + 3 * spec.dual_layers + 6 * (layers - 1) + 2 + 2)  # norm_out has 2
    condition = 256 * d + d * d + spec.pooled_width * d + d * d
    return (computed, image), (text, of_text), (1, modulation + condition)


class CallCosts(Protocol):
    """What calls cost in units of one full large call, for one image size."""

    @property
    def source(self) -> str: ...
    def large(self, tokens: int) -> float: ...
    def small(self) -> float: ...


@dataclass(frozen=True)
class ModelledCosts:
    """Costs by FLOPs, and by the weights that a call reads.

    Args:
        rows: transformer rows of a call, which share one reading of the weights; with guidance two an image.
        flops_per_weight: FLOPs that the machine would do in the time it takes to read a weight.
    """

    large_spec: TransformerSpec
    small_spec: TransformerSpec
    num_tokens: int
    text_length: int
    rows: int = 2
    flops_per_weight: float = 0.0

    @property
    def source(self) -> str:
        return "cost model (FLOPs and weights read)" if self.flops_per_weight else "cost model (FLOPs)"

    def large(self, tokens: int) -> float:
        return self._work(self.large_spec, tokens) / self._work(self.large_spec, self.num_tokens)

    def small(self) -> float:
        return self._work(self.small_spec, self.num_tokens) / self._work(self.large_spec, self.num_tokens)

    def _work(self, spec: TransformerSpec, tokens: int) -> float:
        flops = self.rows * call_flops(spec, tokens, self.num_tokens, self.text_length)
        return flops + self.flops_per_weight * call_weights(spec)
