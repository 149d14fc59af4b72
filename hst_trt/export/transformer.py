"""The graph of an SD3-family transformer at token level: one graph serves full and masked calls.

SD3 has no rotary embedding, so attention does not care about the order of its keys, and a call may compute any subset of
the image tokens as long as the keys and values of all tokens are there. The cache keeps its rows in the order
``[text T | active M | inactive N-M]``; a call computes text and active tokens and overwrites the contiguous prefix
``[0, T+M)``. So there are no scatter indices, no attention mask and no padding, and ``M = N`` is the full call.

The torch modules that this graph must agree with are in `hst_trt.models.sd3`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..errors import IncompatibleError, RequestError
from ..tensor_names import past_to_present
from .graph import Dim, GraphBuilder, Precision
from .weights import StoredTensor, WeightStore

__all__ = ["transformer_graph"]

_TIMESTEP_CHANNELS = 256  # fixed in diffusers' CombinedTimestepTextProjEmbeddings
_EPS = 1e-6


def transformer_graph(
    config: dict[str, Any],
    weights: WeightStore,
    precision: Precision = "float32",
    *,
    cached: bool,
    cache_rows: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
    float32_blocks: Collection[int] = (),
) -> GraphBuilder:
    """Builds the graph of a `SD3Transformer2DModel`.

    Args:
        config: the model's ``config.json``.
        weights: the model's stored tensors.
        precision: what the graph computes in; loop state (tokens, velocity, text) is float32 at its boundary, the
            cache is in `precision`.
        cached: whether the graph reads and writes a K/V cache (the large model) or not (the small one).
        cache_rows: None makes the cache exactly ``T+N`` rows long, a symbolic axis. A pair (text rows, most image rows)
            makes it that long, a static axis as TensorRT's KV-cache layer demands; only the first ``T+N`` rows are
            attended to, and the shape of the extra input ``token_slots`` [N] tells N.
        layers: build only these blocks (a *twin* for numeric checks), the last of the model always being the last.
        float32_blocks: blocks that compute in float32 whatever the precision, for those whose activations a half precision
            does not hold. Only the cache and the attention over it stay in `precision`: queries and keys are normed, attention
            gives means of values, and TensorRT has no fused attention for float32.

    Inputs (B rows, M computed tokens, N image tokens, T text tokens, C latent channels, p patch size):
        hidden_tokens [B, M, C*p*p], pos_ids [B, M] int64, timestep [B], encoder_hidden_states [B, T, J],
        pooled_projections [B, P], and if cached past_k_i, past_v_i [B, heads, T+N, head_dim]; those of dual-attention
        blocks come last and have N rows.
    Outputs: velocity [B, M, C*p*p] in the (C, p, p) layout of hidden_tokens, and present_k_i, present_v_i, to be bound
        to the buffers of past_k_i, past_v_i.
    """
    return _Builder(config, weights, precision, cached, cache_rows, layers, float32_blocks).build()


class _Builder:
    def __init__(
        self,
        config: dict[str, Any],
        weights: WeightStore,
        precision: Precision,
        cached: bool,
        cache_rows: tuple[int, int] | None,
        layers: Sequence[int] | None,
        float32_blocks: Collection[int],
    ) -> None:
        self.g = GraphBuilder("transformer", weights, precision)
        self.weights = weights
        self.precision: Precision = precision
        self.heads: int = config["num_attention_heads"]
        self.head_dim: int = config["attention_head_dim"]
        self.width = self.heads * self.head_dim
        self.num_layers: int = config["num_layers"]
        self.layers = list(range(self.num_layers)) if layers is None else list(layers)
        self.dual = [i for i in config.get("dual_attention_layers") or () if i in self.layers]
        self.float32_blocks = frozenset(float32_blocks) if precision != "float32" else frozenset()
        self.config = config
        self.cached = cached
        self.cache_rows = cache_rows
        if config.get("qk_norm") not in (None, "rms_norm"):
            raise IncompatibleError(f"qk_norm {config['qk_norm']!r} is not one SD3 models use (None or 'rms_norm')")
        outside = sorted(block for block in self.float32_blocks if not 0 <= block < self.num_layers)
        if outside:
            raise RequestError(
                f"float32_blocks names blocks that the transformer does not have: {outside}",
                found=f"{self.num_layers} blocks, numbered from 0",
                fix="correct float32_blocks in the recipe",
            )
        if self.layers[-1] != self.num_layers - 1:
            raise ValueError("the last block has no text output and must stay last")

    def build(self) -> GraphBuilder:
        g = self.g
        patch = self.config["patch_size"]
        channels = self.config["in_channels"] * patch * patch
        out_channels = (self.config.get("out_channels") or self.config["in_channels"]) * patch * patch
        tokens = g.input("hidden_tokens", "float32", ["B", "M", channels])
        pos_ids = g.input("pos_ids", "int64", ["B", "M"])
        timestep = g.input("timestep", "float32", ["B"])
        text = g.input("encoder_hidden_states", "float32", ["B", "T", self.config["joint_attention_dim"]])
        pooled = g.input("pooled_projections", "float32", ["B", self.config["pooled_projection_dim"]])
        self.text_length = g.op("Shape", text, start=1, end=2)
        self._declare_cache()

        x = g.op("Add", self._patch_embed(self._enter(tokens)), self._positions(pos_ids))
        condition = g.silu(self._condition(timestep, self._enter(pooled)))
        context = g.linear(self._enter(text), "context_embedder")
        for slot, layer in enumerate(self.layers):
            x, context = self._rounded_block(slot, layer, x, context, condition)

        g.scope("norm_out")
        scale, shift = self._modulation(condition, "norm_out.linear", 2)
        x = self._project_out(self._modulate(x, scale, shift), patch)
        g.scope("")
        g.output(self._leave(x), "velocity", "float32", ["B", "M", out_channels])
        for name, shape in self.cache:
            g.output(past_to_present(name), past_to_present(name), g.precision, shape)
        return g

    def _enter(self, value: str) -> str:
        return value if self.g.precision == "float32" else self.g.cast(value, self.g.precision)

    def _leave(self, value: str) -> str:
        return value if self.g.precision == "float32" else self.g.cast(value, "float32")

    # -- embeddings --------------------------------------------------------------------------------------------------
    def _patch_embed(self, tokens: str) -> str:
        """The patch convolution has stride = kernel, so on patchified tokens it is a linear layer."""
        g = self.g
        kernel = g.op("Reshape", g.weight("pos_embed.proj.weight"), g.ints(self.width, -1))
        y = g.op("MatMul", tokens, g.op("Transpose", kernel, perm=[1, 0]))
        return g.op("Add", y, g.weight("pos_embed.proj.bias"))

    def _positions(self, pos_ids: str) -> str:
        """Rows of the position table. A sine-cosine table is separable, so only its axes are stored (0.9 GB become 5 MB)."""
        g = self.g
        side = self.config["pos_embed_max_size"]
        axes = _separate_positions(self.weights["pos_embed.pos_embed"], side)
        if axes is None:
            table = g.op("Reshape", g.weight("pos_embed.pos_embed"), g.ints(side * side, self.width))
            return g.op("Gather", table, pos_ids, axis=0)
        columns, rows = (self._enter(g.constant(axis.astype(np.float32), name)) for axis, name in zip(axes, _AXES, strict=True))
        size = g.scalar(side, "int64")
        column, row = g.op("Mod", pos_ids, size), g.op("Div", pos_ids, size)
        return g.op("Concat", g.op("Gather", columns, column, axis=0), g.op("Gather", rows, row, axis=0), axis=-1)

    def _condition(self, timestep: str, pooled: str) -> str:
        """The embedding of timestep and pooled text, [B, width]. Sines are taken in float32 whatever the precision."""
        g = self.g
        half = _TIMESTEP_CHANNELS // 2
        frequencies = np.exp(np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half))
        angles = g.op("Mul", g.op("Unsqueeze", timestep, g.ints(1)), g.constant(frequencies[None].astype(np.float32)))
        features = self._enter(g.op("Concat", g.op("Cos", angles), g.op("Sin", angles), axis=1))
        stem = "time_text_embed."
        time = g.linear(g.silu(g.linear(features, stem + "timestep_embedder.linear_1")), stem + "timestep_embedder.linear_2")
        text = g.linear(g.silu(g.linear(pooled, stem + "text_embedder.linear_1")), stem + "text_embedder.linear_2")
        return g.op("Add", time, text)

    # -- one block ---------------------------------------------------------------------------------------------------
    def _rounded_block(self, slot: int, layer: int, x: str, context: str, condition: str) -> tuple[str, str]:
        """A block in the graph's precision, or between casts in float32."""
        if layer not in self.float32_blocks:
            return self._block(slot, layer, x, context, condition)
        g = self.g
        g.scope(f"transformer_blocks.{layer}")
        wide = [g.cast(value, "float32") for value in (x, context, condition)]
        g.precision = "float32"
        x, context = self._block(slot, layer, *wide)
        g.precision = self.precision
        return g.cast(x, g.precision), context if layer == self.num_layers - 1 else g.cast(context, g.precision)

    def _block(self, slot: int, layer: int, x: str, context: str, condition: str) -> tuple[str, str]:
        g = self.g
        stem = f"transformer_blocks.{layer}."
        g.scope(stem.rstrip("."))
        last, dual = layer == self.num_layers - 1, layer in self.dual
        m = self._modulation(condition, stem + "norm1.linear", 9 if dual else 6)
        c = self._modulation(condition, stem + "norm1_context.linear", 2 if last else 6)
        normed = self._norm(x)
        image_in = self._scale_shift(normed, m[1], m[0])
        # The last block's text norm has (scale, shift), all others start with (shift, scale), as in diffusers.
        text_in = self._modulate(context, c[0], c[1]) if last else self._modulate(context, c[1], c[0])
        attn = stem + "attn."
        text_k, text_v = (
            self._heads(text_in, attn + "add_k_proj", attn + "norm_added_k"),
            self._heads(text_in, attn + "add_v_proj"),
        )
        q, k, v = self._qkv(image_in, attn)
        keys = self._update_cache(slot, "k", g.op("Concat", text_k, k, axis=2), self.text_length)
        values = self._update_cache(slot, "v", g.op("Concat", text_v, v, axis=2), self.text_length)
        if last:  # nothing reads its text output, so its text has no queries
            attended, text_attended = self._attend(q, keys, values), ""
        else:
            text_q = self._heads(text_in, attn + "add_q_proj", attn + "norm_added_q")
            joint = self._attend(g.op("Concat", text_q, q, axis=2), keys, values)
            text_attended = g.op("Slice", joint, g.ints(0), self.text_length, g.ints(1))
            attended = g.op("Slice", joint, self.text_length, g.ints(2**62), g.ints(1))
        x = self._gated(x, m[2], g.linear(attended, stem + "attn.to_out.0"))
        if dual:
            q, k, v = self._qkv(self._scale_shift(normed, m[7], m[6]), stem + "attn2.")
            index = len(self.layers) + self.dual.index(layer)
            k, v = self._update_cache(index, "k", k, None), self._update_cache(index, "v", v, None)
            x = self._gated(x, m[8], g.linear(self._attend(q, k, v), stem + "attn2.to_out.0"))
        x = self._gated(x, m[5], self._feed_forward(self._modulate(x, m[4], m[3]), stem + "ff."))
        if not last:
            context = self._gated(context, c[2], g.linear(text_attended, stem + "attn.to_add_out"))
            text_in = self._modulate(context, c[4], c[3])
            context = self._gated(context, c[5], self._feed_forward(text_in, stem + "ff_context."))
        return x, context

    def _modulation(self, condition: str, prefix: str, parts: int) -> list[str]:
        g = self.g
        row = g.op("Unsqueeze", g.linear(condition, prefix), g.ints(1))
        return g.op("Split", row, outputs=parts, axis=2, num_outputs=parts)

    def _norm(self, x: str) -> str:
        ones = self._enter(self.g.constant(np.ones(self.width, np.float32), "layer_norm.ones"))
        return self.g.op("LayerNormalization", x, ones, axis=-1, epsilon=_EPS)

    def _scale_shift(self, x: str, scale: str, shift: str) -> str:
        g = self.g
        return g.op("Add", g.op("Mul", x, g.op("Add", scale, g.scalar(1.0))), shift)

    def _modulate(self, x: str, scale: str, shift: str) -> str:
        return self._scale_shift(self._norm(x), scale, shift)

    def _gated(self, x: str, gate: str, y: str) -> str:
        return self.g.op("Add", x, self.g.op("Mul", gate, y))

    def _feed_forward(self, x: str, prefix: str) -> str:
        g = self.g
        return g.linear(g.op("Gelu", g.linear(x, prefix + "net.0.proj"), approximate="tanh"), prefix + "net.2")

    def _qkv(self, x: str, stem: str) -> tuple[str, str, str]:
        q, k = self._heads(x, stem + "to_q", stem + "norm_q"), self._heads(x, stem + "to_k", stem + "norm_k")
        return q, k, self._heads(x, stem + "to_v")

    def _heads(self, x: str, project: str, norm: str = "") -> str:
        """[B, heads, tokens, head_dim]; SD3 medium has no qk-norm, and then its checkpoint no weight for one."""
        g = self.g
        split = g.op("Reshape", g.linear(x, project), g.ints(0, 0, self.heads, self.head_dim))
        heads = g.op("Transpose", split, perm=[0, 2, 1, 3])
        if not g.has_weight(f"{norm}.weight"):
            return heads
        return g.op("RMSNormalization", heads, g.weight(f"{norm}.weight"), axis=-1, epsilon=_EPS)

    def _attend(self, q: str, k: str, v: str) -> str:
        g = self.g
        attended = g.op("Transpose", g.op("Attention", self._narrow(q), k, v), perm=[0, 2, 1, 3])
        joined = g.op("Reshape", attended, g.ints(0, 0, self.width))
        return joined if g.precision == self.precision else g.cast(joined, g.precision)

    # -- the cache ---------------------------------------------------------------------------------------------------
    def _declare_cache(self) -> None:
        """Declares past_* inputs; K is cached after qk-norm, or masked calls would attend to unnormed keys."""
        self.cache: list[tuple[str, list[Dim]]] = []
        self.image_rows = ""
        if not self.cached:
            return
        for index in range(len(self.layers) + len(self.dual)):
            joint = index < len(self.layers)
            for kind in ("k", "v"):
                name = f"past_{kind}_{index}"
                rows: Dim = "T+N" if joint else "N"
                if self.cache_rows is not None:
                    rows = sum(self.cache_rows) if joint else self.cache_rows[1]
                shape: list[Dim] = ["B", self.heads, rows, self.head_dim]
                self.g.input(name, self.g.precision, shape)
                self.cache.append((name, shape))
        if self.cache_rows is not None:
            self.image_rows = self.g.op("Shape", self.g.input("token_slots", "int64", ["N"]))

    def _update_cache(self, index: int, kind: str, rows: str, text_length: str | None) -> str:
        """Writes `rows` over the cache's prefix and returns all rows that attention may see, in the graph's precision."""
        g, rows = self.g, self._narrow(rows)
        if not self.cached:
            return rows
        past = f"past_{kind}_{index}"
        present = g.op_into(past_to_present(past), "TensorScatter", past, rows, axis=2, mode="linear")
        if self.cache_rows is None:
            return present
        end = self.image_rows if text_length is None else g.op("Add", text_length, self.image_rows)
        return g.op("Slice", present, g.ints(0), end, g.ints(2))

    def _narrow(self, value: str) -> str:
        """A value of a block, which may compute in float32, in the graph's precision."""
        return value if self.g.precision == self.precision else self.g.cast(value, self.precision)

    def _project_out(self, x: str, patch: int) -> str:
        """proj_out gives a patch as (p, q, c); its rows are permuted so that velocity has hidden_tokens' (c, p, q)."""
        g = self.g
        size = g.weight_shape("proj_out.weight")[0]
        rows = np.arange(size, dtype=np.int64).reshape(patch, patch, -1).transpose(2, 0, 1).reshape(-1)
        weight = g.op("Gather", g.weight("proj_out.weight"), g.constant(rows, "proj_out.rows"), axis=0)
        bias = g.op("Gather", g.weight("proj_out.bias"), g.constant(rows, "proj_out.rows"), axis=0)
        return g.op("Add", g.op("MatMul", x, g.op("Transpose", weight, perm=[1, 0])), bias)


_AXES = ("pos_embed.columns", "pos_embed.rows")


def _separate_positions(table: StoredTensor, side: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The table's two axes [side, width/2] (first half: column, second half: row), or None if it is not separable."""
    grid = table.read().reshape(side, side, -1)
    half = grid.shape[-1] // 2
    columns, rows = np.array(grid[0, :, :half]), np.array(grid[:, 0, half:])
    for row in range(side):  # row by row: the whole table of SD3.5 Medium would be 0.9 GB in float32
        if not (np.array_equal(grid[row, :, :half], columns) and (grid[row, :, half:] == rows[row]).all()):
            return None
    return columns, rows
