"""SD3-family transformers at token level, in torch: diffusers' own modules, called on any subset of the image tokens.

These wrappers are the oracle of the exported graphs and the engines of the torch backend. They hold no weights of their
own: every product is one of the wrapped `SD3Transformer2DModel`'s modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ..tensor_names import cache_names, past_to_present

__all__ = ["TokenTransformer", "patchify", "unpatchify"]


def patchify(latents: Tensor, patch: int = 2) -> Tensor:
    """[B, C, h*p, w*p] to tokens [B, h*w, C*p*p], each token's values in (C, p, p) order."""
    b, c, height, width = latents.shape
    grid = latents.reshape(b, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unpatchify(tokens: Tensor, h: int, w: int, patch: int = 2) -> Tensor:
    """The inverse of `patchify`."""
    grid = tokens.reshape(tokens.shape[0], h, w, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, h * patch, w * patch)


class TokenTransformer(nn.Module):
    """A transformer that computes some image tokens and reads the keys and values of the others from a cache.

    Args:
        model: the diffusers model; used, not copied.
        cached: whether there is a cache; without one a call computes and attends to its own tokens only.

    The cache's rows are ``[text T | slot 0 .. N-1]``; a call with M tokens computes slots 0 .. M-1 and overwrites the
    rows ``[0, T+M)`` in place. See `hst_trt.export.transformer.transformer_graph` for names and shapes.
    """

    def __init__(self, model: SD3Transformer2DModel, cached: bool) -> None:
        super().__init__()
        self.model = model
        self.cached = cached
        config = model.config
        self.heads, self.head_dim = config.num_attention_heads, config.attention_head_dim
        self.dual = [i for i, block in enumerate(model.transformer_blocks) if block.use_dual_attention]
        self.cache_names = cache_names(config.num_layers, len(self.dual)) if cached else []
        patch, channels = config.patch_size, model.out_channels
        rows = torch.arange(patch * patch * channels).reshape(patch, patch, channels)
        self.register_buffer("out_rows", rows.permute(2, 0, 1).reshape(-1), persistent=False)

    @property
    def input_names(self) -> Sequence[str]:
        return [
            "hidden_tokens",
            "pos_ids",
            "timestep",
            "encoder_hidden_states",
            "pooled_projections",
            *self.cache_names,
        ]

    @property
    def output_names(self) -> Sequence[str]:
        return ["velocity", *map(past_to_present, self.cache_names)]

    def forward(
        self,
        hidden_tokens: Tensor,
        pos_ids: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        **past: Tensor,
    ) -> dict[str, Tensor]:
        """One call; `past` are the cache tensors, updated in place and returned as ``present_*``."""
        model = self.model
        kernel = model.pos_embed.proj
        x = F.linear(hidden_tokens, kernel.weight.flatten(1), kernel.bias) + model.pos_embed.pos_embed[0][pos_ids]
        condition = model.time_text_embed(timestep, pooled_projections)
        context = model.context_embedder(encoder_hidden_states)
        for index, block in enumerate(model.transformer_blocks):
            x, context = self._block(index, block, x, context, condition, past)
        x = model.norm_out(x, condition)
        velocity = F.linear(x, model.proj_out.weight[self.out_rows], model.proj_out.bias[self.out_rows])
        return {"velocity": velocity, **{past_to_present(name): past[name] for name in self.cache_names}}

    def _block(
        self, index: int, block: Any, x: Tensor, context: Tensor, condition: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        text = context.shape[1]
        normed, gate, shift_ff, scale_ff, gate_ff, *second = block.norm1(x, emb=condition)
        if block.context_pre_only:
            text_normed = block.norm1_context(context, condition)
        else:
            text_normed, *text_modulation = block.norm1_context(context, emb=condition)
        attn = block.attn
        q, k, v = (
            self._heads(normed, attn.to_q, attn.norm_q),
            self._heads(normed, attn.to_k, attn.norm_k),
            self._heads(normed, attn.to_v),
        )
        text_q = self._heads(text_normed, attn.add_q_proj, attn.norm_added_q)
        text_k = self._heads(text_normed, attn.add_k_proj, attn.norm_added_k)
        text_v = self._heads(text_normed, attn.add_v_proj)
        keys = self._update(past, index, "k", torch.cat([text_k, k], 2))
        values = self._update(past, index, "v", torch.cat([text_v, v], 2))
        joint = self._attend(torch.cat([text_q, q], 2), keys, values)
        x = x + gate[:, None] * attn.to_out[0](joint[:, text:])
        if second:
            second_normed, second_gate = second
            attn2 = block.attn2
            q = self._heads(second_normed, attn2.to_q, attn2.norm_q)
            cache = len(self.model.transformer_blocks) + self.dual.index(index)
            k = self._update(past, cache, "k", self._heads(second_normed, attn2.to_k, attn2.norm_k))
            v = self._update(past, cache, "v", self._heads(second_normed, attn2.to_v))
            x = x + second_gate[:, None] * attn2.to_out[0](self._attend(q, k, v))
        x = x + gate_ff[:, None] * block.ff(block.norm2(x) * (1 + scale_ff[:, None]) + shift_ff[:, None])
        if not block.context_pre_only:
            gate, shift_ff, scale_ff, gate_ff = text_modulation
            context = context + gate[:, None] * attn.to_add_out(joint[:, :text])
            text_in = block.norm2_context(context) * (1 + scale_ff[:, None]) + shift_ff[:, None]
            context = context + gate_ff[:, None] * block.ff_context(text_in)
        return x, context

    def _heads(self, x: Tensor, project: Any, norm: Any = None) -> Tensor:
        y = project(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return y if norm is None else norm(y)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _update(self, past: dict[str, Tensor], index: int, kind: str, rows: Tensor) -> Tensor:
        if not self.cached:
            return rows
        cache = past[f"past_{kind}_{index}"]
        cache[:, :, : rows.shape[2]] = rows
        return cache
