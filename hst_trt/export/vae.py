"""The decoder of diffusers' AutoencoderKL as one ONNX graph from latent tokens to image bytes.

The denoising loop works on tokens and a host wants bytes, so unpatchifying, the latents' scale and shift, and the rounding to
bytes are in the graph too: each backend and each host gives the same image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import IncompatibleError
from .graph import GraphBuilder, Precision, onnx_dtype
from .weights import WeightStore

__all__ = ["vae_decoder_graph"]

_EPSILON = 1e-6  # of every norm: Decoder fixes it, no config holds it


def vae_decoder_graph(
    config: Mapping[str, Any],
    weights: WeightStore,
    precision: Precision,
    patch_size: int = 2,
) -> GraphBuilder:
    """The decoder, with what a pipeline does before and after it.

    =================  ==============================  ==============================================================
    ``latent_tokens``  [images, rows, columns, C*p*p]  float32; a token holds its patch as (c, p, q)
    ``image``          [images, H, W, 3] uint8         H and W are p * 2^(up blocks - 1) times the rows and columns
    =================  ==============================  ==============================================================

    Args:
        config: the VAE's config.json; what old configs leave out has the value of AutoencoderKL's own default.
        precision: of the decoder itself; the latents' scale and shift before it and the bytes after it are float32.
        patch_size: p, the side of a token in latents.

    Raises:
        IncompatibleError: the decoder has a block or an activation that this graph cannot be written for.
    """
    unknown = sorted(set(config["up_block_types"]) - {"UpDecoderBlock2D"})
    if unknown or config["act_fn"] not in ("silu", "swish"):
        raise IncompatibleError(
            "this VAE cannot be exported",
            found=f"act_fn {config['act_fn']!r}, up_block_types {list(config['up_block_types'])} in {weights.folder}",
            fix="use an AutoencoderKL of UpDecoderBlock2D blocks with silu, as the SD family has",
        )
    channels, groups = config["latent_channels"], config["norm_num_groups"]
    blocks = len(config["up_block_types"])
    g = GraphBuilder("vae_decoder", weights, precision)
    tokens = g.input("latent_tokens", "float32", ["images", "token_rows", "token_columns", channels * patch_size**2])

    def conv(x: str, key: str) -> str:
        kernel = g.weight_shape(f"{key}.weight")[-1]
        pads = [kernel // 2] * 4
        return g.op("Conv", x, g.weight(f"{key}.weight"), g.weight(f"{key}.bias"), kernel_shape=[kernel] * 2, pads=pads)

    def norm(x: str, key: str) -> str:
        return _group_norm(g, x, key, groups)

    def resnet(x: str, key: str) -> str:
        g.scope(key)
        y = conv(g.silu(norm(x, f"{key}.norm1")), f"{key}.conv1")
        y = conv(g.silu(norm(y, f"{key}.norm2")), f"{key}.conv2")
        shortcut = conv(x, f"{key}.conv_shortcut") if g.has_weight(f"{key}.conv_shortcut.weight") else x
        return g.op("Add", shortcut, y)

    g.scope("latents")
    # DepthToSpace in its CRD order is exactly unpatchify for tokens that hold (c, p, q).
    planes = g.op("Transpose", tokens, perm=[0, 3, 1, 2])
    x = g.cast(g.op("DepthToSpace", planes, blocksize=patch_size, mode="CRD"), "float32")
    # Still in float32: torch, too, keeps these two factors exact, and in bfloat16 they would be off for every latent alike.
    x = g.op("Div", x, g.scalar(config.get("scaling_factor", 0.18215), "float32"))
    x = g.cast(g.op("Add", x, g.scalar(config.get("shift_factor") or 0.0, "float32")), precision)
    if config.get("use_post_quant_conv", True):
        x = conv(x, "post_quant_conv")

    g.scope("decoder")
    x = conv(x, "decoder.conv_in")
    x = resnet(x, "decoder.mid_block.resnets.0")
    if config.get("mid_block_add_attention", True):
        x = _attention(g, x, "decoder.mid_block.attentions.0", groups)
    x = resnet(x, "decoder.mid_block.resnets.1")
    for block in range(blocks):
        key = f"decoder.up_blocks.{block}"
        for index in range(config["layers_per_block"] + 1):
            x = resnet(x, f"{key}.resnets.{index}")
        if block < blocks - 1:
            g.scope(f"{key}.upsamplers.0")
            doubled = g.constant(np.array([1, 1, 2, 2], np.float32))
            # At a factor of two, these modes are torch's "nearest"; onnxruntime has a fast kernel for them.
            rounding, grid = "floor", "asymmetric"
            x = g.op("Resize", x, "", doubled, mode="nearest", nearest_mode=rounding, coordinate_transformation_mode=grid)
            x = conv(x, f"{key}.upsamplers.0.conv")
    g.scope("decoder")
    x = conv(g.silu(norm(x, "decoder.conv_norm_out")), "decoder.conv_out")

    # VaeImageProcessor.denormalize and numpy_to_pil, in float32; Round goes to the even neighbour, as numpy's does.
    g.scope("image")
    half = g.scalar(0.5, "float32")
    x = g.op("Add", g.op("Mul", g.cast(x, "float32"), half), half)
    x = g.op("Clip", x, g.scalar(0.0, "float32"), g.scalar(1.0, "float32"))
    x = g.op("Round", g.op("Mul", g.op("Transpose", x, perm=[0, 2, 3, 1]), g.scalar(255.0, "float32")))
    # TensorRT can only make uint8 as an output itself, so no Identity may follow.
    image = g.op_into("image", "Cast", x, to=onnx_dtype("uint8"))
    g.output(image, "image", "uint8", ["images", "height", "width", config["out_channels"]])
    return g


def _group_norm(g: GraphBuilder, x: str, key: str, groups: int) -> str:
    """torch's GroupNorm of [images, C, height, width]."""
    return g.op(
        "GroupNormalization",
        x,
        g.weight(f"{key}.weight"),
        g.weight(f"{key}.bias"),
        num_groups=groups,
        epsilon=_EPSILON,
    )


def _attention(g: GraphBuilder, x: str, key: str, groups: int) -> str:
    """diffusers' Attention over all positions, with one head as wide as the block.

    Written out, because TensorRT refuses an Attention node that it has no fused kernel for, and it has none for a head of 512,
    as SD3's is (TensorRT-RTX 1.7 builds 256 and refuses 512).
    """
    g.scope(key)
    # Checkpoints from before diffusers 0.13 use the second names; diffusers renames them when it loads.
    old = g.has_weight(f"{key}.query.weight")
    to_q, to_k, to_v, to_out = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
    flat = g.op("Reshape", _group_norm(g, x, f"{key}.group_norm", groups), g.ints(0, 0, -1))
    positions = g.op("Transpose", flat, perm=[0, 2, 1])
    scale = g.scalar(g.weight_shape(f"{key}.group_norm.weight")[0] ** -0.5)
    q = g.op("Mul", g.linear(positions, f"{key}.{to_q}"), scale)
    k = g.op("Transpose", g.linear(positions, f"{key}.{to_k}"), perm=[0, 2, 1])
    weights = g.op("Softmax", g.op("MatMul", q, k), axis=-1)
    attended = g.linear(g.op("MatMul", weights, g.linear(positions, f"{key}.{to_v}")), f"{key}.{to_out}")
    return g.op("Add", g.op("Reshape", g.op("Transpose", attended, perm=[0, 2, 1]), g.op("Shape", x)), x)
