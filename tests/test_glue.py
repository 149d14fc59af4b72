"""Glue graphs in ONNX Runtime against the torch functions of the same names."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from hst_trt.export.check import glue_sample
from hst_trt.export.glue import glue_graphs, join_text_graph
from hst_trt.models.glue import REFERENCE


def run(name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(glue_graphs()[name].build().SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("name", [name for name in REFERENCE if name != "join_text"])
@pytest.mark.parametrize(("batch", "h", "w", "active"), [(1, 4, 6, 8), (3, 5, 3, 15), (2, 8, 8, 16)])
def test_each_glue_graph_equals_its_torch_formula(name: str, batch: int, h: int, w: int, active: int) -> None:
    feeds = glue_sample(name, batch, h, w, active, np.random.default_rng(7))
    expected = REFERENCE[name](**{key: torch.from_numpy(np.asarray(value)) for key, value in feeds.items()})
    actual = run(name, feeds)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.numpy().dtype, key
        np.testing.assert_allclose(actual[key], value.numpy(), rtol=2e-6, atol=1e-6, err_msg=f"{name}.{key}")


@pytest.mark.parametrize("has_t5", [True, False])
def test_text_is_joined_as_the_formula_says_with_zeros_where_t5_is_absent(has_t5: bool) -> None:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    feeds = dict(
        prompt_index=np.array([1, 0, 1]), hidden_1=normal(2, 5, 4), embeds_1=normal(2, 3), hidden_2=normal(2, 5, 6),
        embeds_2=normal(2, 7), hidden_3=normal(2, 9, 16) if has_t5 else np.zeros((2, 9, 16), np.float32),
    )  # fmt: skip
    expected = REFERENCE["join_text"](**{key: torch.from_numpy(value) for key, value in feeds.items()})
    if not has_t5:
        del feeds["hidden_3"]
    graph = join_text_graph((4, 6), (3, 7), 16, 5, 9, has_t5).build().SerializeToString()
    actual = ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, feeds)
    for value, reference in zip(actual, expected.values(), strict=True):
        np.testing.assert_array_equal(value, reference.numpy())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_noticed(bad: float) -> None:
    latents = np.ones((1, 6, 8), np.float32)
    assert run("finite", {"latents": latents})["finite"][0] == 1
    latents[0, 3, 2] = bad
    assert run("finite", {"latents": latents})["finite"][0] == 0


def test_ties_are_ranked_by_token_index_and_every_rank_occurs_once() -> None:
    feeds = glue_sample("score", 2, 4, 6, 24, np.random.default_rng(0))
    ranks = run("score", feeds)["ranks"]
    assert [sorted(row) for row in ranks] == [list(range(24))] * 2
    feeds["difference"][:] = 1.0  # every token is fresh and equal
    np.testing.assert_array_equal(run("score", feeds)["ranks"], [list(range(24))] * 2)


def test_a_token_left_out_long_enough_returns_even_if_its_score_is_zero() -> None:
    h = w = 4
    scores, age = np.ones((1, h, w), np.float32), np.zeros((1, h, w), np.float32)
    difference = np.ones((1, 16, 8), np.float32)
    difference[0, 0] = 0
    scores[0, 0, 0] = 0.0
    tokens = np.ones((1, 16, 8), np.float32)
    number = lambda value: np.array([value], np.float32)
    active = np.arange(1, 9)[None]
    for step in range(40):
        out = run(
            "score",
            dict(
                difference=difference, active=active, sketch=tokens, last_sketch=tokens, scores=scores, age=age,
                decay=number(1.0), drift=number(0.0), starvation=number(0.05),
            ),
        )  # fmt: skip
        scores, age = out["next_scores"], out["next_age"]
        active = np.ascontiguousarray(np.argsort(out["ranks"][0])[:8][None])
        if 0 in active:
            assert step > 0, "it had the lowest score: it must not be chosen at once"
            return
    pytest.fail("token 0 starved")


@pytest.mark.parametrize(("before", "after"), [(8, 8), (8, 16), (16, 8), (8, 24), (24, 8)])
def test_the_one_way_row_move_keeps_every_row_that_the_next_call_does_not_recompute(before: int, after: int) -> None:
    """Against a full gather of the cache, with the mask growing and shrinking too."""
    rng = np.random.default_rng(before * 100 + after)
    n, batch = 24, 3
    order = np.stack([rng.permutation(n) for _ in range(batch)])
    cache = np.take_along_axis(rng.standard_normal((batch, n, 4)), order[..., None], 1)  # row of slot s: that token's
    by_token = np.empty_like(cache)
    np.put_along_axis(by_token, order[..., None], cache, 1)
    ranks = np.stack([rng.permutation(n) for _ in range(batch)])
    out = run("select", dict(ranks=ranks, order=order, slots=np.arange(after)))
    for image in range(batch):
        source = out["partner"][image, after:]
        moved = source != np.arange(after, n)
        assert (source[moved] < after).all(), "a moved row must come from an active slot"
        cache[image, after:] = cache[image, source]
        np.testing.assert_array_equal(cache[image, after:], by_token[image, out["next_order"][image, after:]])
        assert set(out["active"][image]) == set(np.flatnonzero(ranks[image] < after))
        assert sorted(out["next_order"][image]) == list(range(n))
