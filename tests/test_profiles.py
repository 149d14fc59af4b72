"""Which shapes engines are prepared for: every expected call has a profile of its own, and a range takes the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hst_trt.builder.profiles import engine_profiles, input_shapes
from hst_trt.bundle import GraphEntry, ProfileEntry, TensorEntry
from hst_trt.errors import BuildError, RequestError
from hst_trt.plan import BUCKET_RATIOS, token_buckets
from hst_trt.recipe import Defaults, Limits, ModelSource, Recipe, Target
from hst_trt.spec import PairSpec, TransformerSpec
from hst_trt.tensor_names import GLUE, TEXT_ENCODERS

LARGE = TransformerSpec(38, 38, 64, 0, 4096, 2048, 64, 192)
SPEC = PairSpec(LARGE, dataclasses.replace(LARGE, layers=24, heads=24), 16, 2, 8, 77, 256)
RECIPE = Recipe(
    name="pair",
    large=ModelSource(source="a"),
    small=ModelSource(source="b"),
    max_sequence_length=256,
    limits=Limits(max_side=1440, max_images=4),
    defaults=Defaults(num_inference_steps=28, guidance_scale=4.5, height=1024, width=1024),
)
TARGET = Target(name="a100", backend="tensorrt", precision="bfloat16", default_recipe="pair", sms=(80,))
AXES = {
    "large": ("B", "M", "T", "N"),
    "small": ("B", "M", "T"),
    "vae_decoder": ("images", "token_rows", "token_columns"),
} | dict.fromkeys(TEXT_ENCODERS, ("prompts",))
GLUE_AXES = ("B", "R", "P", "M", "N", "C", "h", "w")


def profiles(name: str, recipe: Recipe = RECIPE, target: Target = TARGET) -> list[dict[str, tuple[int, int, int]]]:
    return [profile.axes for profile in engine_profiles(name, AXES.get(name, GLUE_AXES), SPEC, recipe, target)]


def with_(value: Any, **changes: Any) -> Any:
    return value.model_copy(update=changes)


def pinned(axes: dict[str, tuple[int, int, int]]) -> dict[str, int]:
    """The lengths of a profile that has to be pinned."""
    assert all(least == greatest for least, _, greatest in axes.values())
    return {axis: best for axis, (_, best, _) in axes.items()}


def test_the_large_model_has_a_pinned_profile_for_each_bucket_of_a_guided_image_and_a_range_last() -> None:
    *fixed, last = profiles("large")
    assert [pinned(axes) for axes in fixed] == [{"B": 2, "M": m, "T": 333, "N": 4096} for m in token_buckets(4096)]
    assert len(fixed) == len(BUCKET_RATIOS) == 7
    assert last == {"B": (1, 2, 8), "M": (1, 4096, 8100), "T": (333, 333, 333), "N": (1, 4096, 8100)}


def test_the_small_model_and_the_vae_have_one_pinned_profile_for_each_request_and_a_range() -> None:
    fixed, last = profiles("small")
    assert pinned(fixed) == {"B": 2, "M": 4096, "T": 333}
    assert last["M"] == (1, 4096, 8100)
    fixed, last = profiles("vae_decoder")
    assert pinned(fixed) == {"images": 1, "token_rows": 64, "token_columns": 64}
    assert last == {"images": (1, 1, 1), "token_rows": (1, 64, 90), "token_columns": (1, 64, 90)}


@pytest.mark.parametrize("name", [*TEXT_ENCODERS, *GLUE])
def test_text_encoders_and_glue_have_one_range(name: str) -> None:
    (axes,) = profiles(name)
    if name in TEXT_ENCODERS:
        assert axes == {"prompts": (1, 2, 8)}


@pytest.mark.parametrize("name", [*AXES, *GLUE])
def test_the_range_is_in_order_and_its_lengths_fit_each_other(name: str) -> None:
    axes = profiles(name)[-1]
    for which in range(3):
        length = {axis: values[which] for axis, values in axes.items()}
        if {"M", "N"} <= axes.keys():
            assert length["M"] <= length["N"]
        if {"N", "h", "w"} <= axes.keys():
            assert length["N"] == length["h"] * length["w"]
        if {"B", "R"} <= axes.keys():
            assert length["B"] <= length["R"] <= 2 * length["B"]
    assert all(1 <= least <= best <= greatest for least, best, greatest in axes.values())


def test_guide_is_prepared_for_two_rows_at_least_because_it_cuts_them_in_two() -> None:
    assert profiles("guide")[0]["R"] == (2, 2, 8)
    assert profiles("pack")[0]["R"] == (1, 2, 8)


def test_without_guidance_an_image_is_one_row_and_the_range_still_takes_two() -> None:
    recipe = with_(RECIPE, defaults=with_(RECIPE.defaults, guidance_scale=1.0))
    *fixed, last = profiles("large", recipe)
    assert {pinned(axes)["B"] for axes in fixed} == {1}
    assert last["B"] == (1, 1, 8)


def test_batches_resolutions_and_buckets_come_from_target_and_recipe() -> None:
    recipe = with_(RECIPE, resolutions=((512, 768), (1024, 1024)))
    target = with_(TARGET, images=(1, 4, 16), bucket_ratios=(0.3, 1.0))  # 16 images are beyond the recipe's limit
    *fixed, last = profiles("large", recipe, target)
    expected = [(tokens, rows, m) for tokens in (1536, 4096) for rows in (2, 8) for m in token_buckets(tokens, (0.3, 1.0))]
    assert [(axes["N"], axes["B"], axes["M"]) for axes in map(pinned, fixed)] == expected
    assert last["N"] == (1, 1536, 8100), "the first resolution is the one the range is tuned for"
    vae = [pinned(axes) for axes in profiles("vae_decoder", recipe, target)[:-1]]
    assert [(axes["token_rows"], axes["token_columns"]) for axes in vae] == [(32, 48), (64, 64)]


def test_two_sizes_with_as_many_tokens_share_their_profiles() -> None:
    recipe = with_(RECIPE, resolutions=((1024, 512), (512, 1024)))
    assert len(profiles("large", recipe)) == len(BUCKET_RATIOS) + 1
    assert len(profiles("vae_decoder", recipe)) == 3, "to the VAE they differ"


def test_position_tables_bound_the_range_where_the_recipe_allows_more() -> None:
    recipe = with_(RECIPE, limits=Limits(max_side=4096, max_images=4))
    assert profiles("large", recipe)[-1]["N"][2] == 192 * 192


@pytest.mark.parametrize("size", [(1000, 1024), (1024, 1456), (0, 1024), (-16, 1024)])
def test_a_resolution_that_the_pair_cannot_draw_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match=f"height {size[0]}, width {size[1]}") as caught:
        profiles("large", with_(RECIPE, resolutions=(size,)))
    assert "multiples of 16 up to 1440" in str(caught.value)


def test_an_axis_that_nothing_gives_a_length_is_refused() -> None:
    with pytest.raises(BuildError, match="integrate") as caught:
        engine_profiles("integrate", ("B", "Z"), SPEC, RECIPE, TARGET)
    assert caught.value.found == "Z"


GRAPH = GraphEntry(
    path="graphs/glue/x.onnx",
    inputs=(TensorEntry(name="a", dtype="float32", shape=("B", 7, "N")), TensorEntry(name="b", dtype="float32", shape=(1,))),
    outputs=(),
)


def test_a_profile_gives_every_input_its_least_best_and_greatest_shape() -> None:
    shapes = input_shapes(GRAPH, ProfileEntry(axes={"B": (1, 2, 3), "N": (4, 5, 6)}))
    assert shapes == {"a": ((1, 7, 4), (2, 7, 5), (3, 7, 6)), "b": ((1,), (1,), (1,))}


@pytest.mark.parametrize("lengths", [(3, 2, 3), (1, 3, 2), (0, 1, 1)])
def test_lengths_that_are_not_in_order_are_refused(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(BuildError, match="axis N"):
        input_shapes(GRAPH, ProfileEntry(axes={"B": (1, 1, 1), "N": lengths}))


def test_a_profile_without_an_axis_is_refused() -> None:
    with pytest.raises(BuildError, match="every axis") as caught:
        input_shapes(GRAPH, ProfileEntry(axes={"B": (1, 1, 1)}))
    assert caught.value.found == "none for N"
