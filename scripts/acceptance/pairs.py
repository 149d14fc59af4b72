"""Pairs of random weights: transformers made where they are needed, and directories that the exporter takes.

Random weights time like trained ones, as long as they are not zeros, which draw less power. They are scaled so that all
values stay finite through a whole request; what they draw means nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed

import hst_trt
from hst_trt.recipe import Defaults, Limits, ModelSource, Recipe, load_recipe
from hst_trt.spec import PairSpec, TransformerSpec

__all__ = ["DEMO_PAIR", "SD35", "PairShape", "fill", "make_transformer", "make_vae", "recipe_of", "tiny_shape", "write_pair"]

DEMO_PAIR = Path(hst_trt.__file__).parent / "data" / "demo_pair"


@dataclass(frozen=True)
class PairShape:
    """All that decides the size of a pair and of a request.

    Attributes:
        large, small: what the two transformers' configs have beside `shared`.
        vae: what the VAE's config has beside the demo pair's; its weights are random.
        text: for each text encoder what its config has beside the demo pair's; empty takes those of the demo pair. Only
            the widths count: a request encodes its text once.
        clip_length, t5_length: tokens of a prompt.
        side: pixels of the image.
    """

    name: str
    shared: Mapping[str, Any]
    large: Mapping[str, Any]
    small: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Mapping[str, Any]]
    clip_length: int
    t5_length: int
    side: int
    guidance_scale: float = 4.5

    @property
    def spec(self) -> PairSpec:
        large, small = (TransformerSpec.from_config({**self.shared, **own}) for own in (self.large, self.small))
        return PairSpec(
            large=large,
            small=small,
            latent_channels=self.shared["in_channels"],
            patch_size=self.shared["patch_size"],
            vae_scale=2 ** (len(self.vae["block_out_channels"]) - 1),
            clip_length=self.clip_length,
            t5_length=self.t5_length,
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.spec.grid(self.side, self.side)


SD35 = PairShape(
    name="sd35-shaped",
    shared={
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
        "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
    },
    large={"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
    small={
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    vae={
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024,
    },
    text={
        name: {"hidden_size": width, "projection_dim": width, "num_attention_heads": width // 64, "max_position_embeddings": 77}
        for name, width in (("text_encoder", 768), ("text_encoder_2", 1280))
    } | {
        "text_encoder_3": {"d_model": 4096},
    },
    clip_length=77,
    t5_length=256,
    side=1024,
)  # fmt: skip


def tiny_shape() -> PairShape:
    """A pair of a few blocks around the demo pair's text encoders, for 64 tokens."""
    text = {name: _demo_config(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    return PairShape(
        name="tiny",
        shared={
            "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
            "joint_attention_dim": text["text_encoder_3"]["d_model"],
            "pooled_projection_dim": sum(text[name]["projection_dim"] for name in ("text_encoder", "text_encoder_2")),
            "qk_norm": "rms_norm",
        },
        large={"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 16},
        small={
            "num_layers": 2, "num_attention_heads": 1, "caption_projection_dim": 64, "pos_embed_max_size": 24,
            "dual_attention_layers": (0,),
        },
        vae={"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128},
        text={},
        clip_length=text["text_encoder"]["max_position_embeddings"],
        t5_length=load_recipe("demo").max_sequence_length,
        side=128,
        guidance_scale=3.0,
    )  # fmt: skip


def _demo_config(component: str) -> dict[str, Any]:
    return json.loads((DEMO_PAIR / component / "config.json").read_text())


def fill(model: torch.nn.Module, seed: int) -> None:
    """Random values of a useful scale for every parameter, drawn where the parameter is."""
    devices = {parameter.device for parameter in model.parameters()}
    generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generators[parameter.device])
            if parameter.ndim >= 2:
                parameter.mul_(1 / math.sqrt(parameter[0].numel()))
            elif "norm" in name and name.endswith("weight"):
                parameter.mul_(0.2).add_(1)
            else:
                parameter.mul_(0.05)


def make_transformer(config: Mapping[str, Any], device: str, dtype: torch.dtype, seed: int) -> SD3Transformer2DModel:
    """A transformer of random weights, made on `device`: never on the host, nor in float32."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    model = torch.nn.Module.to(model, dtype).to_empty(device=device)  # diffusers' own `to` warns of nothing at all
    fill(model, seed)
    side = config["pos_embed_max_size"]
    grid = {"base_size": config["sample_size"] // config["patch_size"], "device": torch.device(device)}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    model.pos_embed.pos_embed.copy_(get_2d_sincos_pos_embed(width, side, **grid)[None])
    return model.eval().requires_grad_(False)


def make_vae(shape: PairShape, device: str, dtype: torch.dtype, seed: int = 5) -> AutoencoderKL:
    config = AutoencoderKL.load_config(DEMO_PAIR / "vae") | dict(shape.vae)
    with torch.device(device):
        vae = AutoencoderKL.from_config(config)
    fill(vae, seed)
    return torch.nn.Module.to(vae, dtype).eval().requires_grad_(False)


def write_pair(shape: PairShape, folder: Path, device: str, dtype: torch.dtype) -> Recipe:
    """Writes a pair of random weights in diffusers' layout, one transformer after the other, and returns its recipe.

    Tokenizers and scheduler are the demo pair's, and so are text encoders that the shape leaves as they are.
    """
    replaced = ["transformer", "transformer_small", "vae", *shape.text]
    shutil.copytree(DEMO_PAIR, folder, ignore=shutil.ignore_patterns(*replaced))
    for name, own, seed in (("transformer", shape.large, 3), ("transformer_small", shape.small, 4)):
        make_transformer({**shape.shared, **own}, device, dtype, seed).save_pretrained(folder / name)
    make_vae(shape, device, dtype).save_pretrained(folder / "vae")
    for name, own in shape.text.items():
        _make_text_encoder(name, own).save_pretrained(folder / name)
    return recipe_of(shape, folder)


def recipe_of(shape: PairShape, folder: Path) -> Recipe:
    """The recipe of a pair that was written into `folder`."""
    return Recipe(
        name=shape.name,
        large=ModelSource(source=str(folder)),
        small=ModelSource(source=str(folder), component="transformer_small"),
        max_sequence_length=shape.t5_length,
        limits=Limits(max_side=shape.side, max_images=1),
        defaults=Defaults(num_inference_steps=28, guidance_scale=shape.guidance_scale, height=shape.side, width=shape.side),
    )


def _make_text_encoder(name: str, own: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    model, config = (T5EncoderModel, T5Config) if name == "text_encoder_3" else (CLIPTextModelWithProjection, CLIPTextConfig)
    encoder = model(config(**(_demo_config(name) | dict(own))))
    fill(encoder, 6)
    return encoder
