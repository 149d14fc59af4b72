"""What calls cost in units of a full large call: by a model, from FLOPs and the weights that a call reads, or as measured.

The model counts matrix products only (linear layers, QK^T, PV; one multiply-add = 2 FLOP). Checked against torch's FLOP counter
on the real module classes in the tests. A call also reads every weight once, however few tokens it computes; what that takes
on a machine is `FLOPS_PER_WEIGHT_BYTE`. Measured costs (`hst_trt.bench`) take the model's place, and know seconds too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from .spec import TransformerSpec

__all__ = [
    "FLOPS_PER_WEIGHT_BYTE",
    "GLUE_FLOPS",
    "CallCosts",
    "CallSeconds",
    "MeasuredCosts",
    "ModelledCosts",
    "call_flops",
    "call_weights",
]

FLOPS_PER_WEIGHT_BYTE = {"onnxruntime": 12.0}
"""By backend: FLOPs that it would do in the time that reading one byte of weights adds to a call. ONNX Runtime's on a CPU was
chosen by an earlier run of benchmarks/cost_model.py, on all its pairs; benchmarks/results/cpu_cost_model.md is a later run. On
a GPU reading overlaps with computing, but for the modulation layers; what remains was never measured, and counts as nothing."""

GLUE_FLOPS = {"onnxruntime": 1.6e8}
"""By backend: FLOPs that it would do in the time of the glue of a step with a mask (`hst_trt.plan.Step.has_mask`). ONNX
Runtime's on a CPU is that of the demo pair, where it is 5 % of a full call; beside large models it is next to nothing."""


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
    def glue(self) -> float: ...


@dataclass(frozen=True)
class ModelledCosts:
    """Costs by FLOPs, and by the weights that a call reads.

    Args:
        rows: transformer rows of a call, which share one reading of the weights; with guidance two an image.
        flops_per_weight: FLOPs that the machine would do in the time it takes to read a weight.
        glue_flops: FLOPs that it would do in the time of the glue of a step with a mask.
    """

    large_spec: TransformerSpec
    small_spec: TransformerSpec
    num_tokens: int
    text_length: int
    rows: int = 2
    flops_per_weight: float = 0.0
    glue_flops: float = 0.0

    @property
    def source(self) -> str:
        return "cost model (FLOPs and weights read)" if self.flops_per_weight else "cost model (FLOPs)"

    def large(self, tokens: int) -> float:
        return self._work(self.large_spec, tokens) / self._work(self.large_spec, self.num_tokens)

    def small(self) -> float:
        return self._work(self.small_spec, self.num_tokens) / self._work(self.large_spec, self.num_tokens)

    def glue(self) -> float:
        return self.glue_flops / self._work(self.large_spec, self.num_tokens)

    def _work(self, spec: TransformerSpec, tokens: int) -> float:
        flops = self.rows * call_flops(spec, tokens, self.num_tokens, self.text_length)
        return flops + self.flops_per_weight * call_weights(spec)


@dataclass(frozen=True)
class CallSeconds:
    """Seconds of what a request is made of, medians on one machine for one request shape.

    Attributes:
        full: a full large call.
        step: of a step with a mask, what it takes outside the two transformers: glue and host.
        text: the text encoders.
        vae: the VAE decoder, all images.
    """

    full: float
    step: float
    text: float
    vae: float


@dataclass(frozen=True)
class MeasuredCosts:
    """Call costs from a benchmark, in units of a full large call; a `CallCosts`.

    Attributes:
        by_tokens: of a large call, for each bucket and the full call.
        small_cost: of a small call.
        seconds: what `glue` and `hst_trt.plan.StitchPlan.latency` need; None where only calls were measured: glue is 0 then.
    """

    by_tokens: Mapping[int, float]
    small_cost: float
    source: str = "measured calls"
    seconds: CallSeconds | None = None

    def large(self, tokens: int) -> float:
        return self.by_tokens[tokens]

    def small(self) -> float:
        return self.small_cost

    def glue(self) -> float:
        return self.seconds.step / self.seconds.full if self.seconds else 0.0
