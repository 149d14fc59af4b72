"""The arithmetic between the models, in torch: the reference that the exported glue graphs must equal.

Loop state is float32 and in token order (row-major over the h x w grid of tokens, N = h * w); the *slots* of the large
model's cache have an order of their own: ``order[s]`` is the token in slot s, the first M slots are the active ones.
B images, R transformer rows (2 B when guided: negative prompts first, else B), C = latent channels * patch area.
Each function takes and returns tensors by the names that the graph's inputs and outputs have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["REFERENCE"]


def join_text(
    prompt_index: Tensor,
    hidden_1: Tensor,
    embeds_1: Tensor,
    hidden_2: Tensor,
    embeds_2: Tensor,
    hidden_3: Tensor,
) -> dict[str, Tensor]:
    """SD3's text: CLIP features side by side, zero-padded to T5's width, followed by T5's tokens; one row per prompt_index."""
    clip = torch.cat([hidden_1, hidden_2], dim=-1)
    clip = F.pad(clip, (0, hidden_3.shape[-1] - clip.shape[-1]))
    return {
        "encoder_hidden_states": torch.cat([clip, hidden_3], dim=1)[prompt_index],
        "pooled_projections": torch.cat([embeds_1, embeds_2], dim=-1)[prompt_index],
    }


def advance(timesteps: Tensor, coefficients: Tensor, step: Tensor, row_index: Tensor) -> dict[str, Tensor]:
    """What a step needs of the request's table: its timestep for every row [R], its solver's coefficients [5], and the index
    after its own."""
    return {
        "timestep": timesteps[step].expand(len(row_index)),
        "weights": coefficients[step][0],
        "next_step": step + 1,
    }


def pack(latents: Tensor, token_ids: Tensor, row_index: Tensor, pos_table: Tensor) -> dict[str, Tensor]:
    """The transformer's inputs for the tokens ``token_ids`` [B, M]; ``row_index`` [R] says which image a row belongs to.

    ``pos_table`` [N] holds each token's row in the model's position table.
    """
    ids = token_ids[row_index]
    rows = latents[row_index]
    return {
        "hidden_tokens": rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[-1])),
        "pos_ids": pos_table[ids],
    }


def guide(row_velocity: Tensor, guidance_scale: Tensor) -> dict[str, Tensor]:
    """Classifier-free guidance, ``v = v_u + w (v_c - v_u)``, on [2B, M, C]."""
    unconditional, conditional = row_velocity.chunk(2)
    return {"velocity": unconditional + guidance_scale * (conditional - unconditional)}


def blend(sketch: Tensor, refined: Tensor, active: Tensor, difference: Tensor, decay: Tensor) -> dict[str, Tensor]:
    """Hard blend: the large model's velocity on the ``active`` [B, M] tokens, elsewhere ``sketch`` [B, N, C].

    ``difference`` is D, each token's last known ``refined - sketch``, faded by ``decay`` a step; it corrects the tokens
    outside the mask (decay 0 switches that off).
    """
    index = active[..., None].expand(-1, -1, sketch.shape[-1])
    faded = decay * difference
    return {
        "velocity": (sketch + faded).scatter(1, index, refined),
        "next_difference": faded.scatter(1, index, refined - sketch.gather(1, index)),
    }


def correct(sketch: Tensor, difference: Tensor, decay: Tensor) -> dict[str, Tensor]:
    """The correction alone, for steps without the large model: ``v = sketch + D``."""
    faded = decay * difference
    return {"velocity": sketch + faded, "next_difference": faded}


def score(
    difference: Tensor,
    active: Tensor,
    sketch: Tensor,
    last_sketch: Tensor,
    scores: Tensor,
    age: Tensor,
    decay: Tensor,
    drift: Tensor,
    starvation: Tensor,
) -> dict[str, Tensor]:
    """How much each token is worth to the large model; scores and age are [B, h, w].

    Inside the mask the score is fresh, mean |v_L - v_S| of the token; outside it is the last known one, decayed, plus
    ``drift`` times the small model's own change. The map is smoothed by a 3x3 mean (over the neighbours that exist), and
    a token that was left out for ``age`` steps gains ``starvation * age`` times the mean score. That is its priority, and
    ``ranks`` [B, N] its place among all tokens by it.
    """
    chosen = torch.zeros_like(scores).flatten(1).scatter(1, active, 1.0).view_as(scores) > 0
    fresh = difference.abs().mean(-1).view_as(scores)
    carried = decay * scores + drift * (sketch - last_sketch).abs().mean(-1).view_as(scores)
    next_scores = torch.where(chosen, fresh, carried)
    next_age = torch.where(chosen, torch.zeros_like(age), age + 1)
    smooth = F.avg_pool2d(next_scores[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    gain = starvation * smooth.mean((1, 2), keepdim=True)
    priority = smooth + gain * next_age
    return {"next_scores": next_scores, "next_age": next_age, "priority": priority, "ranks": _ranks(priority)}


def _ranks(priority: Tensor) -> Tensor:
    """Each token's place when sorted by priority [B, h, w], ties by token index: the same in every backend, for any N."""
    s = priority.flatten(1)
    before = torch.ones(s.shape[1], s.shape[1], dtype=torch.bool, device=s.device).tril(-1)  # [i, j]: j < i
    ahead = (s[:, None, :] > s[:, :, None]) | ((s[:, None, :] == s[:, :, None]) & before)
    return ahead.sum(-1)


def select(ranks: Tensor, order: Tensor, slots: Tensor) -> dict[str, Tensor]:
    """The new mask: the ``len(slots)`` best-ranked tokens move into the first slots.

    As many tokens enter as leave, and each entering token changes places with a leaving one: ``partner[s]`` is the slot
    whose token comes to slot s (s itself where nothing moves). So for the cache only rows of leaving tokens need to be
    kept: ``row[s] = row[partner[s]]`` for the slots beyond the active ones, all of which read active slots.
    """
    count = len(slots)
    slot = torch.arange(order.shape[1], device=order.device).expand_as(order)
    chosen = ranks.gather(1, order) < count
    leaving, entering = (slot < count) & ~chosen, (slot >= count) & chosen
    left, entered = _slots_in_order(leaving), _slots_in_order(entering)
    source = left.gather(1, (entering.cumsum(1) - 1).clamp(min=0))
    target = entered.gather(1, (leaving.cumsum(1) - 1).clamp(min=0))
    partner = torch.where(entering, source, torch.where(leaving, target, slot))
    next_order = order.gather(1, partner)
    return {"next_order": next_order, "partner": partner, "active": next_order[:, slots]}


def _slots_in_order(flags: Tensor) -> Tensor:
    """[B, N] int64: the slots whose flag is set, ascending, then all others."""
    others = flags.sum(1, keepdim=True) + (~flags).cumsum(1) - 1
    place = torch.where(flags, flags.cumsum(1) - 1, others)
    slot = torch.arange(flags.shape[1], device=flags.device).expand_as(place)
    return torch.zeros_like(place).scatter(1, place, slot)


def count(priority: Tensor, ranks: Tensor, threshold: Tensor) -> dict[str, Tensor]:
    """Tokens whose priority exceeds ``threshold`` times the median (the lower middle one), per image, [B] int64."""
    s = priority.flatten(1)
    median = (s * (ranks == s.shape[1] // 2)).sum(1, keepdim=True)
    return {"counts": (s > threshold * median).sum(1)}


def change(velocity: Tensor, last_velocity: Tensor) -> dict[str, Tensor]:
    """SRDiffusion's measure of how much the velocity still moves, [1]."""
    return {"change": torch.tanh((velocity - last_velocity).abs().mean() / last_velocity.abs().mean())[None]}


def integrate(
    latents: Tensor, velocity: Tensor, last_velocity: Tensor, history: Tensor, held: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """One step of the solver, ``a x + b v + c h``, and what it remembers, ``d x + e v``; see `hst_trt.schedule.SOLVERS`.

    Solvers take the memory h to be one step old. A token that kept its velocity for ``held`` [B, N] steps (it equals the last
    one in every bit) has an older one: h then becomes what it would have been one step ago, on the straight line from the
    memory to what is remembered now. Otherwise its next step would go ``1 + held`` times as far beyond that line as it should.
    """
    a, b, c, d, e = weights
    now = d * latents + e * velocity
    memory = history + (held / (1 + held))[..., None] * (now - history)
    moved = (velocity - last_velocity).abs().amax(-1) > 0
    return {
        "next_latents": a * latents + b * velocity + c * memory,
        "next_history": torch.where(moved[..., None], now, history),
        "next_held": torch.where(moved, 0.0, held + 1),
    }


def finite(latents: Tensor) -> dict[str, Tensor]:
    """1 where every value is finite, else 0, [1] int32."""
    return {"finite": latents.isfinite().all().to(torch.int32)[None]}


REFERENCE: dict[str, Callable[..., dict[str, Tensor]]] = {
    "join_text": join_text,
    "advance": advance,
    "pack": pack,
    "guide": guide,
    "blend": blend,
    "correct": correct,
    "score": score,
    "select": select,
    "count": count,
    "change": change,
    "integrate": integrate,
    "finite": finite,
}
