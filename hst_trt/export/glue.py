"""The glue graphs: the functions of `hst_trt.models.glue`, node by node, with the same names of inputs and outputs.

They are graphs so that every backend and every host runs the same arithmetic. The number of active tokens reaches them as
the *shape* of an input, never as a value, so no engine needs shape tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..schedule import MAX_STEPS
from .graph import GraphBuilder

__all__ = ["glue_graphs", "join_text_graph"]

_TOKENS = ["B", "N", "C"]
_GRID = ["B", "h", "w"]


def glue_graphs() -> dict[str, GraphBuilder]:
    """All glue graphs that depend on no model, by name (`hst_trt.tensor_names.GLUE` without join_text)."""
    return {make.__name__.removeprefix("_"): make(GraphBuilder(make.__name__.removeprefix("_"))) for make in _MAKERS}


def join_text_graph(
    clip_widths: tuple[int, int],
    pooled_widths: tuple[int, int],
    text_width: int,
    clip_length: int,
    t5_length: int,
    has_t5: bool,
) -> GraphBuilder:
    """Joins the text encoders' outputs; without a third encoder its tokens are zeros, as in diffusers."""
    g = GraphBuilder("join_text")
    index = g.input("prompt_index", "int64", ["R"])
    features, pooled = [], []
    for i, (width, pooled_width) in enumerate(zip(clip_widths, pooled_widths, strict=True), start=1):
        features.append(g.input(f"hidden_{i}", "float32", ["P", clip_length, width]))
        pooled.append(g.input(f"embeds_{i}", "float32", ["P", pooled_width]))
    clip = g.op("Concat", *features, axis=-1)
    if text_width > sum(clip_widths):
        clip = g.op("Pad", clip, g.ints(0, 0, 0, 0, 0, text_width - sum(clip_widths)))
    if has_t5:
        t5 = g.input("hidden_3", "float32", ["P", t5_length, text_width])
    else:
        shape = g.op("Concat", g.op("Shape", clip, start=0, end=1), g.ints(t5_length, text_width), axis=0)
        t5 = g.op("Expand", g.scalar(0.0), shape)
    joined = g.op("Concat", clip, t5, axis=1)
    g.output(
        g.op("Gather", joined, index, axis=0),
        "encoder_hidden_states",
        "float32",
        ["R", clip_length + t5_length, text_width],
    )
    g.output(
        g.op("Gather", g.op("Concat", *pooled, axis=-1), index, axis=0),
        "pooled_projections",
        "float32",
        ["R", sum(pooled_widths)],
    )
    return g


def _advance(g: GraphBuilder) -> GraphBuilder:
    timesteps = g.input("timesteps", "float32", [MAX_STEPS])
    coefficients = g.input("coefficients", "float32", [MAX_STEPS, 5])
    step = g.input("step", "int64", [1])
    row_index = g.input("row_index", "int64", ["R"])
    g.output(g.op("Expand", g.op("Gather", timesteps, step, axis=0), g.op("Shape", row_index)), "timestep", "float32", ["R"])
    g.output(g.op("Squeeze", g.op("Gather", coefficients, step, axis=0), g.ints(0)), "weights", "float32", [5])
    g.output(g.op("Add", step, g.ints(1)), "next_step", "int64", [1])
    return g


def _pack(g: GraphBuilder) -> GraphBuilder:
    latents = g.input("latents", "float32", _TOKENS)
    token_ids = g.input("token_ids", "int64", ["B", "M"])
    row_index = g.input("row_index", "int64", ["R"])
    pos_table = g.input("pos_table", "int64", ["N"])
    ids = g.op("Gather", token_ids, row_index, axis=0)
    rows = g.op("Gather", latents, row_index, axis=0)
    g.output(_take(g, rows, ids), "hidden_tokens", "float32", ["R", "M", "C"])
    g.output(g.op("Gather", pos_table, ids, axis=0), "pos_ids", "int64", ["R", "M"])
    return g


def _guide(g: GraphBuilder) -> GraphBuilder:
    velocity = g.input("row_velocity", "float32", ["R", "M", "C"])
    scale = g.input("guidance_scale", "float32", [1])
    halves: list[str] = g.op("Split", velocity, outputs=2, axis=0, num_outputs=2)
    unconditional, conditional = halves
    guided = g.op("Add", unconditional, g.op("Mul", scale, g.op("Sub", conditional, unconditional)))
    g.output(guided, "velocity", "float32", ["B", "M", "C"])
    return g


def _blend(g: GraphBuilder) -> GraphBuilder:
    sketch = g.input("sketch", "float32", _TOKENS)
    refined = g.input("refined", "float32", ["B", "M", "C"])
    active = g.input("active", "int64", ["B", "M"])
    difference = g.input("difference", "float32", _TOKENS)
    decay = g.input("decay", "float32", [1])
    faded = g.op("Mul", decay, difference)
    index = g.op("Expand", g.op("Unsqueeze", active, g.ints(2)), g.op("Shape", refined))
    velocity = g.op("ScatterElements", g.op("Add", sketch, faded), index, refined, axis=1)
    fresh = g.op("Sub", refined, g.op("GatherElements", sketch, index, axis=1))
    g.output(velocity, "velocity", "float32", _TOKENS)
    g.output(g.op("ScatterElements", faded, index, fresh, axis=1), "next_difference", "float32", _TOKENS)
    return g


def _correct(g: GraphBuilder) -> GraphBuilder:
    sketch = g.input("sketch", "float32", _TOKENS)
    difference = g.input("difference", "float32", _TOKENS)
    decay = g.input("decay", "float32", [1])
    faded = g.op("Mul", decay, difference)
    g.output(g.op("Add", sketch, faded), "velocity", "float32", _TOKENS)
    g.output(faded, "next_difference", "float32", _TOKENS)
    return g


def _score(g: GraphBuilder) -> GraphBuilder:
    difference = g.input("difference", "float32", _TOKENS)
    active = g.input("active", "int64", ["B", "M"])
    sketch = g.input("sketch", "float32", _TOKENS)
    last_sketch = g.input("last_sketch", "float32", _TOKENS)
    scores = g.input("scores", "float32", _GRID)
    age = g.input("age", "float32", _GRID)
    decay, drift = g.input("decay", "float32", [1]), g.input("drift", "float32", [1])
    starvation = g.input("starvation", "float32", [1])
    grid = g.op("Shape", scores)

    def token_mean(value: str) -> str:
        return g.op("ReduceMean", g.op("Abs", value), g.ints(2), keepdims=0)

    def on_grid(value: str) -> str:
        return g.op("Reshape", value, grid)

    nothing = g.op("Expand", g.scalar(0.0), g.op("Shape", token_mean(difference)))
    ones = g.op("Expand", g.scalar(1.0), g.op("Shape", active))
    chosen = on_grid(g.op("Greater", g.op("ScatterElements", nothing, active, ones, axis=1), g.scalar(0.0)))
    moved = on_grid(token_mean(g.op("Sub", sketch, last_sketch)))
    carried = g.op("Add", g.op("Mul", decay, scores), g.op("Mul", drift, moved))
    next_scores = g.op("Where", chosen, on_grid(token_mean(difference)), carried)
    next_age = g.op("Where", chosen, g.scalar(0.0), g.op("Add", age, g.scalar(1.0)))
    pooled = g.op(
        "AveragePool",
        g.op("Unsqueeze", next_scores, g.ints(1)),
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        count_include_pad=0,
    )
    smooth = g.op("Squeeze", pooled, g.ints(1))
    gain = g.op("Mul", starvation, g.op("ReduceMean", smooth, g.ints(1, 2), keepdims=1))
    g.output(next_scores, "next_scores", "float32", _GRID)
    g.output(next_age, "next_age", "float32", _GRID)
    priority = g.op("Add", smooth, g.op("Mul", gain, next_age))
    g.output(priority, "priority", "float32", _GRID)
    g.output(_ranks(g, priority), "ranks", "int64", ["B", "N"])
    return g


def _ranks(g: GraphBuilder, priority: str) -> str:
    s = g.op("Reshape", priority, g.ints(0, -1))
    other, own = g.op("Unsqueeze", s, g.ints(1)), g.op("Unsqueeze", s, g.ints(2))  # [B, 1, N(j)], [B, N(i), 1]
    index = _positions(g, s)
    before = g.op("Less", g.op("Unsqueeze", index, g.ints(0)), g.op("Unsqueeze", index, g.ints(1)))  # [i, j]: j < i
    tied = g.op("And", g.op("Equal", other, own), before)
    ahead = g.op("Or", g.op("Greater", other, own), tied)
    return g.cast(g.op("ReduceSum", g.cast(ahead, "int32"), g.ints(2), keepdims=0), "int64")


def _select(g: GraphBuilder) -> GraphBuilder:
    ranks = g.input("ranks", "int64", ["B", "N"])
    order = g.input("order", "int64", ["B", "N"])
    slots = g.input("slots", "int64", ["M"])
    count = g.op("Shape", slots)
    slot = g.op("Expand", _positions(g, order), g.op("Shape", order))
    chosen = g.op("Less", g.op("GatherElements", ranks, order, axis=1), count)
    inside = g.op("Less", slot, count)
    leaving = g.op("And", inside, g.op("Not", chosen))
    entering = g.op("And", g.op("Not", inside), chosen)

    one = g.scalar(1, "int64")

    def nth(flags: str) -> str:
        """The place of each set flag among the set ones, from 0."""
        counted = g.op("CumSum", g.cast(flags, "int64"), g.constant(np.array(1, np.int64)))
        return g.op("Sub", counted, one)

    def slots_in_order(flags: str) -> str:
        """The slots whose flag is set, ascending, then all others."""
        held = g.op("ReduceSum", g.cast(flags, "int64"), g.ints(1), keepdims=1)
        place = g.op("Where", flags, nth(flags), g.op("Add", held, nth(g.op("Not", flags))))
        return g.op("ScatterElements", g.op("Sub", slot, slot), place, slot, axis=1)

    def follow(flags: str, others: str) -> str:
        """For each set flag, the slot of the other kind that has the same place."""
        place = g.op("Max", nth(flags), g.scalar(0, "int64"))
        return g.op("GatherElements", slots_in_order(others), place, axis=1)

    source, target = follow(entering, leaving), follow(leaving, entering)
    partner = g.op("Where", entering, source, g.op("Where", leaving, target, slot))
    next_order = g.op("GatherElements", order, partner, axis=1)
    g.output(next_order, "next_order", "int64", ["B", "N"])
    g.output(partner, "partner", "int64", ["B", "N"])
    g.output(g.op("Gather", next_order, slots, axis=1), "active", "int64", ["B", "M"])
    return g


def _count(g: GraphBuilder) -> GraphBuilder:
    priority = g.input("priority", "float32", _GRID)
    ranks = g.input("ranks", "int64", ["B", "N"])
    threshold = g.input("threshold", "float32", [1])
    s = g.op("Reshape", priority, g.ints(0, -1))
    middle = g.op("Div", g.op("Shape", s, start=1, end=2), g.ints(2))
    at_median = g.op("Where", g.op("Equal", ranks, middle), s, g.scalar(0.0))
    median = g.op("ReduceSum", at_median, g.ints(1), keepdims=1)
    above = g.op("Greater", s, g.op("Mul", threshold, median))
    counts = g.op("ReduceSum", g.cast(above, "int32"), g.ints(1), keepdims=0)
    g.output(g.cast(counts, "int64"), "counts", "int64", ["B"])
    return g


def _change(g: GraphBuilder) -> GraphBuilder:
    velocity = g.input("velocity", "float32", _TOKENS)
    last = g.input("last_velocity", "float32", _TOKENS)

    def mean(value: str) -> str:
        return g.op("ReduceMean", g.op("Abs", value), keepdims=0)

    ratio = g.op("Div", mean(g.op("Sub", velocity, last)), mean(last))
    g.output(g.op("Unsqueeze", g.op("Tanh", ratio), g.ints(0)), "change", "float32", [1])
    return g


def _integrate(g: GraphBuilder) -> GraphBuilder:
    names = ("latents", "velocity", "last_velocity", "history")
    latents, velocity, last, history = (g.input(name, "float32", _TOKENS) for name in names)
    held = g.input("held", "float32", ["B", "N"])
    weights: list[str] = g.op("Split", g.input("weights", "float32", [5]), outputs=5, axis=0, num_outputs=5)
    a, b, c, d, e = weights
    euler = g.op("Add", g.op("Mul", a, latents), g.op("Mul", b, velocity))
    now = g.op("Add", g.op("Mul", d, latents), g.op("Mul", e, velocity))
    longer = g.op("Add", held, g.scalar(1.0))
    share = g.op("Unsqueeze", g.op("Div", held, longer), g.ints(2))
    memory = g.op("Add", history, g.op("Mul", share, g.op("Sub", now, history)))
    farthest = g.op("ReduceMax", g.op("Abs", g.op("Sub", velocity, last)), g.ints(2), keepdims=0)
    moved = g.op("Greater", farthest, g.scalar(0.0))
    g.output(g.op("Add", euler, g.op("Mul", c, memory)), "next_latents", "float32", _TOKENS)
    g.output(g.op("Where", g.op("Unsqueeze", moved, g.ints(2)), now, history), "next_history", "float32", _TOKENS)
    g.output(g.op("Where", moved, g.scalar(0.0), longer), "next_held", "float32", ["B", "N"])
    return g


def _finite(g: GraphBuilder) -> GraphBuilder:
    latents = g.input("latents", "float32", _TOKENS)
    largest = g.scalar(float(np.finfo(np.float32).max))
    held = g.op("LessOrEqual", g.op("Abs", latents), largest)  # false for NaN too
    g.output(g.op("Unsqueeze", g.op("ReduceMin", g.cast(held, "int32"), keepdims=0), g.ints(0)), "finite", "int32", [1])
    return g


_MAKERS: tuple[Callable[[GraphBuilder], GraphBuilder], ...] = (
    _advance,
    _pack,
    _guide,
    _blend,
    _correct,
    _score,
    _select,
    _count,
    _change,
    _integrate,
    _finite,
)


def _positions(g: GraphBuilder, like: str) -> str:
    """0 .. N-1 for a value of shape [B, N]."""
    length = g.op("Squeeze", g.op("Shape", like, start=1, end=2), g.ints(0))
    return g.op("Range", g.scalar(0, "int64"), length, g.scalar(1, "int64"))


def _take(g: GraphBuilder, rows: str, ids: str) -> str:
    """``rows[r, ids[r, m]]`` for rows [R, N, C] and ids [R, M]."""
    return g.op("GatherND", rows, g.op("Unsqueeze", ids, g.ints(2)), batch_dims=1)
