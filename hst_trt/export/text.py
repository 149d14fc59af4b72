"""The text encoders as ONNX graphs: transformers' CLIPTextModelWithProjection and T5EncoderModel, as SD3 calls them.

A prompt is always padded to one length, so that length is static: the causal mask and T5's table of relative positions are
constants of the graph, and only the number of prompts is left to choose at run time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import IncompatibleError
from .graph import GraphBuilder, Precision
from .weights import WeightStore

__all__ = ["clip_text_graph", "t5_encoder_graph"]


def clip_text_graph(
    config: Mapping[str, Any], weights: WeightStore, precision: Precision, text_length: int | None = None
) -> GraphBuilder:
    """CLIPTextModelWithProjection up to what SD3 takes from it.

    ===================  ====================  =======================================================================
    ``input_ids``        [prompts, T] int64    T is `text_length`
    ``hidden_states``    [prompts, T, hidden]  float32, what enters the last layer: diffusers' ``hidden_states[-2]``
    ``text_embeds``      [prompts, projected]  float32, the projected last state of each prompt's end token
    ===================  ====================  =======================================================================

    Args:
        config: the encoder's config.json.
        text_length: defaults to the length of the position table.

    Raises:
        IncompatibleError: the activation, the end token or the length is not one this graph can be written for.
    """
    hidden = config["hidden_size"]
    positions = config["max_position_embeddings"]
    length = positions if text_length is None else text_length
    if not 0 < length <= positions:
        raise IncompatibleError(
            f"a text length of {length} was asked for",
            found=f"{weights.folder} has positions for {positions} tokens",
            fix=f"ask for 1 to {positions} tokens",
        )
    end = config.get("eos_token_id")
    if not isinstance(end, int):
        raise IncompatibleError(
            "a CLIP text encoder needs one end token, since the pooled embedding is taken there",
            found=f"eos_token_id = {end!r} in the config of {weights.folder}",
            fix="set eos_token_id in its config.json to the tokenizer's end token",
        )
    g = GraphBuilder("clip_text", weights, precision)
    # CLIPTextModelWithProjection nests the encoder under text_model, in the SD3 repositories and in what transformers 5
    # saves; encoders flattened as transformers 5 saves a bare CLIPTextModel lack that level.
    root = "text_model." if g.has_weight("text_model.embeddings.token_embedding.weight") else ""
    input_ids = g.input("input_ids", "int64", ["prompts", length])

    def norm(x: str, key: str) -> str:
        scale, bias = g.weight(f"{root}{key}.weight"), g.weight(f"{root}{key}.bias")
        return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=config["layer_norm_eps"])

    def layer(x: str, index: int) -> str:
        at = f"encoder.layers.{index}"
        g.scope(f"{root}{at}")
        normed = norm(x, f"{at}.layer_norm1")
        q, k, v = (g.linear(normed, f"{root}{at}.self_attn.{name}_proj") for name in "qkv")
        heads = config["num_attention_heads"]
        attended = g.op("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads, is_causal=1)
        x = g.op("Add", x, g.linear(attended, f"{root}{at}.self_attn.out_proj"))
        inner = g.linear(norm(x, f"{at}.layer_norm2"), f"{root}{at}.mlp.fc1")
        inner = _activation(g, inner, config["hidden_act"])
        return g.op("Add", x, g.linear(inner, f"{root}{at}.mlp.fc2"))

    g.scope(f"{root}embeddings")
    table = g.op("Slice", g.weight(f"{root}embeddings.position_embedding.weight"), g.ints(0), g.ints(length), g.ints(0))
    x = g.op("Add", g.op("Gather", g.weight(f"{root}embeddings.token_embedding.weight"), input_ids, axis=0), table)
    for index in range(config["num_hidden_layers"] - 1):
        x = layer(x, index)
    g.scope("")
    g.output(g.cast(x, "float32"), "hidden_states", "float32", ["prompts", length, hidden])

    x = layer(x, config["num_hidden_layers"] - 1)
    g.scope("pooled")
    ids = g.cast(input_ids, "int32")
    if end == 2:
        scores = ids  # 2 is a mistake of early configs, so transformers then takes the highest id as the end token
    else:
        scores = g.cast(g.op("Equal", ids, g.scalar(end, "int32")), "int32")
    where = g.op("ArgMax", scores, axis=-1, keepdims=1)  # the first one where several are equal, as torch does on a CPU
    # LayerNorm works token by token, so only the token that is kept goes through the final one.
    pooled = norm(g.op("GatherND", x, where, batch_dims=1), "final_layer_norm")
    embeds = g.cast(g.linear(pooled, "text_projection"), "float32")
    g.scope("")
    g.output(embeds, "text_embeds", "float32", ["prompts", g.weight_shape("text_projection.weight")[0]])
    return g


def t5_encoder_graph(config: Mapping[str, Any], weights: WeightStore, precision: Precision, text_length: int) -> GraphBuilder:
    """T5EncoderModel without an attention mask: SD3 lets the padding tokens be attended to.

    =================  =====================  ===================================
    ``input_ids``      [prompts, T] int64     T is `text_length`
    ``hidden_states``  [prompts, T, d_model]  float32, the ``last_hidden_state``
    =================  =====================  ===================================

    Args:
        config: the encoder's config.json.

    Raises:
        IncompatibleError: float16 was asked for, or an activation that this graph cannot be written for.
    """
    if precision == "float16":
        raise IncompatibleError(
            "T5 was asked for in float16, whose range its activations exceed",
            found=f"the T5 encoder in {weights.folder}",
            fix="build it in bfloat16 or float32",
        )
    gate, _, activation = config["feed_forward_proj"].rpartition("-")
    if gate == "gated" and activation == "gelu":
        activation = "gelu_new"  # T5Config's own rule: only "gated-gelu" means the tanh form
    g = GraphBuilder("t5_encoder", weights, precision)
    embedding = "shared.weight" if g.has_weight("shared.weight") else "encoder.embed_tokens.weight"
    input_ids = g.input("input_ids", "int64", ["prompts", text_length])

    def norm(x: str, prefix: str) -> str:
        # The mean square is taken in float32 (stash_type is FLOAT by default), as T5LayerNorm does.
        return g.op("RMSNormalization", x, g.weight(f"{prefix}.weight"), axis=-1, epsilon=config["layer_norm_epsilon"])

    g.scope("encoder")
    # The first T5 1.1 configs leave the distance out; 128 is T5Config's own default.
    furthest = config.get("relative_attention_max_distance", 128)
    buckets = _relative_position_buckets(text_length, config["relative_attention_num_buckets"], furthest)
    biases = g.weight("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")  # [buckets, heads]
    by_head = g.op("Transpose", g.op("Gather", biases, g.constant(buckets), axis=0), perm=[2, 0, 1])
    bias = g.op("Unsqueeze", by_head, g.ints(0))  # [1, heads, T, T], the same in every block
    x = g.op("Gather", g.weight(embedding), input_ids, axis=0)
    heads = config["num_heads"]
    for index in range(config["num_layers"]):
        at = f"encoder.block.{index}.layer"
        g.scope(f"{at}.0")
        normed = norm(x, f"{at}.0.layer_norm")
        q, k, v = (g.linear(normed, f"{at}.0.SelfAttention.{name}") for name in "qkv")
        attended = g.op("Attention", q, k, v, bias, q_num_heads=heads, kv_num_heads=heads, scale=1.0)
        x = g.op("Add", x, g.linear(attended, f"{at}.0.SelfAttention.o"))

        g.scope(f"{at}.1")
        normed, dense = norm(x, f"{at}.1.layer_norm"), f"{at}.1.DenseReluDense"
        if gate == "gated":
            inner = _activation(g, g.linear(normed, f"{dense}.wi_0"), activation)
            inner = g.op("Mul", inner, g.linear(normed, f"{dense}.wi_1"))
        else:
            inner = _activation(g, g.linear(normed, f"{dense}.wi"), activation)
        x = g.op("Add", x, g.linear(inner, f"{dense}.wo"))
    g.scope("encoder")
    x = g.cast(norm(x, "encoder.final_layer_norm"), "float32")
    g.scope("")
    g.output(x, "hidden_states", "float32", ["prompts", text_length, config["d_model"]])
    return g


def _activation(g: GraphBuilder, x: str, name: str) -> str:
    """An activation by the name transformers has for it (``ACT2FN``)."""
    if name == "gelu":
        return g.op("Gelu", x)
    if name == "gelu_new":
        return g.op("Gelu", x, approximate="tanh")
    if name == "quick_gelu":
        return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.scalar(1.702))))
    if name == "relu":
        return g.op("Relu", x)
    raise IncompatibleError(
        f"a text encoder with the activation {name!r} cannot be exported",
        found=f"{name!r} in its config.json",
        fix="use an encoder with gelu, gelu_new, quick_gelu or relu, as those of the SD3 family have",
    )


def _relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket of each (query, key) pair, [T, T] int64: half for each direction, exact when near and logarithmic when far.

    Computed in float32 as T5Attention does, so that a distance on the edge of a bucket falls on the same side.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    logs = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (logs / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int64)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, np.minimum(far, half - 1))
