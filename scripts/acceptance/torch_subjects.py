"""Subjects that run on torch: a pair's own modules, as they are or with compiled blocks, behind the Backend protocol."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from hst_trt.export.glue import glue_graphs
from hst_trt.models.glue import REFERENCE
from hst_trt.models.sd3 import TokenTransformer
from hst_trt.plan import BUCKET_RATIOS
from hst_trt.runtime.engine import TensorInfo
from hst_trt.runtime.torch_eager import TorchBackend, TorchEngine
from hst_trt.spec import PairSpec, TransformerSpec
from hst_trt.tensor_names import LARGE, SMALL, past_to_present

from .journal import Skip
from .settings import Settings
from .subjects import Subject

__all__ = ["CompiledTransformer", "count_torch_waits", "need_gpu", "torch_subject"]

Pair = Mapping[str, SD3Transformer2DModel]  # LARGE and SMALL


def need_gpu(settings: Settings) -> None:
    """Ends a part that needs a torch that can use the GPU."""
    if not settings.rehearse and not torch.cuda.is_available():
        raise Skip(f"torch {torch.__version__} cannot use the GPU: install a build of it for this machine's CUDA")


class CompiledTransformer(TokenTransformer):
    """The same arithmetic with each block compiled. A model's blocks are alike, so a few compilations serve all of them."""

    def __init__(self, model: SD3Transformer2DModel, cached: bool, **options: Any) -> None:
        super().__init__(model, cached)
        assert not (cached and self.dual), "a cached block is told from another by its index only"
        self._compiled_block = torch.compile(super()._block, dynamic=False, fullgraph=True, **options)

    def _block(
        self, index: int, block: Any, x: Tensor, context: Tensor, condition: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        own = {f"past_{kind}_0": past[f"past_{kind}_{index}"] for kind in "kv"} if self.cached else {}
        return self._compiled_block(0, block, x, context, condition, own)


def torch_subject(
    name: str,
    models: Pair,
    spec: PairSpec,
    grid: tuple[int, int],
    device: str,
    make: Callable[[SD3Transformer2DModel, bool], TokenTransformer] = TokenTransformer,
    ratios: tuple[float, ...] = BUCKET_RATIOS,
) -> Subject:
    """A subject of a pair whose weights are on `device`; state between the calls is float32 whatever their dtype is."""
    engines = {
        name: TorchEngine(REFERENCE[name], tuple(graph.input_names), tuple(graph.output_names))
        for name, graph in glue_graphs().items()
    }
    for role, config in ((LARGE, spec.large), (SMALL, spec.small)):
        module = make(models[role], role == LARGE).to(device)
        engines[role] = TorchEngine(
            _in_its_precision(module), module.input_names, module.output_names, _cache_tensors(module, config)
        )
    counter = count_torch_waits if torch.device(device).type == "cuda" else None
    return Subject(name, TorchBackend(engines, device), spec, grid, ratios, counter)


def _in_its_precision(module: TokenTransformer) -> Callable[..., dict[str, Tensor]]:
    """Tokens and text come in float32 and the velocity leaves in it, as at the boundary of the exported graphs."""
    dtype = module.model.dtype

    def run(
        hidden_tokens: Tensor,
        pos_ids: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        **past: Tensor,
    ) -> dict[str, Tensor]:
        text, pooled = encoder_hidden_states.to(dtype), pooled_projections.to(dtype)
        outputs = module(hidden_tokens.to(dtype), pos_ids, timestep, text, pooled, **past)
        return outputs | {"velocity": outputs["velocity"].float()}

    return run


def _cache_tensors(module: TokenTransformer, spec: TransformerSpec) -> dict[str, TensorInfo]:
    info = TensorInfo(str(module.model.dtype).removeprefix("torch."), ("B", spec.heads, "T+N", spec.head_dim))
    return {name: info for past in module.cache_names for name in (past, past_to_present(past))}


@contextmanager
def count_torch_waits() -> Iterator[Callable[[], int | None]]:
    """Counts the operations of torch that make the host wait for the GPU. Waiting for an event is not one of them.

    Its function gives None where torch does not tell: that is tried out.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            torch.zeros(1, device="cuda").item()
            tells = len(caught) > 0
            yield lambda: sum("synchronizing" in str(warning.message) for warning in caught) if tells else None
        finally:
            torch.cuda.set_sync_debug_mode("default")
