"""Tiny real models: diffusers' own classes with few layers, every parameter randomised so that no path is zero."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from hst_trt.export.glue import glue_graphs
from hst_trt.export.transformer import transformer_graph
from hst_trt.export.weights import WeightStore
from hst_trt.models.glue import REFERENCE
from hst_trt.models.sd3 import TokenTransformer
from hst_trt.runtime.ort import OnnxRuntimeBackend
from hst_trt.runtime.torch_eager import TorchBackend, TorchEngine
from hst_trt.spec import PairSpec, TransformerSpec

TEXT = (4, 5)  # CLIP and T5 tokens
KINDS = {  # the large model of each kind; the small one has dual attention, as SD3.5 Medium
    "sd35-large": dict(qk_norm="rms_norm"),
    "sd35-medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "sd3": dict(qk_norm=None),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Replaces every parameter by random values of a useful scale (diffusers zero-initialises gates and outputs)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            parameter.data = 1 + 0.2 * noise
        elif parameter.ndim >= 2:
            parameter.data = noise / math.sqrt(parameter[0].numel())
        else:
            parameter.data = 0.05 * noise


def transformer(layers: int = 3, heads: int = 2, seed: int = 0, **config: object) -> SD3Transformer2DModel:
    settings = dict(
        sample_size=16, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=heads,
        joint_attention_dim=24, caption_projection_dim=16 * heads, pooled_projection_dim=20, out_channels=4,
        pos_embed_max_size=16, qk_norm="rms_norm",
    ) | config  # fmt: skip
    model = SD3Transformer2DModel(**settings).eval().requires_grad_(False)
    randomise(model, seed)
    return model


def pair(kind: str) -> tuple[SD3Transformer2DModel, SD3Transformer2DModel]:
    return transformer(**KINDS[kind]), transformer(layers=2, heads=1, seed=1, dual_attention_layers=(0,))


def spec_of(large: SD3Transformer2DModel, small: SD3Transformer2DModel) -> PairSpec:
    return PairSpec(
        large=TransformerSpec.from_config(large.config),
        small=TransformerSpec.from_config(small.config),
        latent_channels=large.config.in_channels,
        patch_size=2,
        vae_scale=8,
        clip_length=TEXT[0],
        t5_length=TEXT[1],
    )


GLUE_INPUTS = {name: (tuple(graph.input_names), tuple(graph.output_names)) for name, graph in glue_graphs().items()}


def torch_backend(large: SD3Transformer2DModel, small: SD3Transformer2DModel, device: str = "cpu") -> TorchBackend:
    engines = {name: TorchEngine(REFERENCE[name], *GLUE_INPUTS[name]) for name in GLUE_INPUTS}
    for name, model in (("large", large), ("small", small)):
        there = model if device == "cpu" else copy.deepcopy(model)
        module = TokenTransformer(there, cached=name == "large").to(device)
        engines[name] = TorchEngine(module, module.input_names, module.output_names)
    return TorchBackend(engines, device)


def ort_backend(folder: Path, large: SD3Transformer2DModel, small: SD3Transformer2DModel) -> OnnxRuntimeBackend:
    graphs = {}
    for name, graph in glue_graphs().items():
        graphs[name] = folder / "glue" / f"{name}.onnx"
        graph.save(graphs[name])
    for name, model in (("large", large), ("small", small)):
        model.save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        graphs[name] = folder / name / "model.onnx"
        transformer_graph(config, WeightStore(folder / name), cached=name == "large").save(graphs[name])
    return OnnxRuntimeBackend(graphs, threads=1)


def random_text(rows: int, spec: PairSpec, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "encoder_hidden_states": rng.standard_normal((rows, spec.text_length, spec.large.text_width)).astype(np.float32),
        "pooled_projections": rng.standard_normal((rows, spec.large.pooled_width)).astype(np.float32),
    }
