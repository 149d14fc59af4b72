"""Requests of the server before anything is drawn: each field, what contradicts itself, and what no field may hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason='needs the server: pip install "hst_trt[serve]"')
from conftest import Finished
from PIL import Image
from serving import pixels_of, serving

from hst_trt.backends import open_bundle
from hst_trt.bundle import Bundle
from hst_trt.errors import RequestError
from hst_trt.plan import MaskRule, Schedule
from hst_trt.server.answers import error_body
from hst_trt.server.drawing import Drawer
from hst_trt.server.request import Extensions, FieldError, ImageRequest, Limits, read_request

GOOD: list[tuple[str, list[Any]]] = [
    ("prompt", ["a cat", " ", "猫", "a\0b", "a\nb"]),
    ("model", [None, "tiny-cpu"]),
    ("n", [None, 1, 4]),
    ("size", [None, "auto", "64x64", "128x64", "192x192"]),
    ("response_format", [None, "b64_json", "url"]),
    ("output_format", [None, "png", "jpeg", "webp"]),
    ("stream", [None, True, False]),
    ("negative_prompt", [None, "", "a dog"]),
    ("num_inference_steps", [None, 1, 100]),
    ("guidance_scale", [None, 0, 1, 4.5, 100]),
    ("seed", [None, 0, 1, 2**53 + 1, 2**63, 2**64 - 1]),
    ("schedule", [None, *get_args(Schedule)]),
    ("stages", [None, [1, 1, 2], [0, 0, 4]]),
    ("mask_ratio", [None, 0.1, 0.5, 1, 1e-300]),
    ("details", [None, True, False]),
]
BAD: list[tuple[str, list[Any]]] = [
    ("prompt", [None, "", 1, ["a cat"], "x" * 4001, "a \ud800 cat"]),
    ("model", ["sd35", "", 1, "tiny-cpu\n", "../tiny-cpu"]),
    ("n", [0, -1, 5, 1.0, 1.5, True, "1", 10**9, 10**4000]),
    (
        "size",
        [
            "", "0x0", "256X256", "513x77", "64x", "x64", "64x64x64", "064x64", "64x64\n", " 64x64", "-64x64", "64.0x64",
            "64×64", "large", "208x64", "64x208", "99999x99999", "9" * 10_000 + "x64", "٦٤x٦٤", 64, [64, 64],
        ],
    ),
    ("response_format", ["B64_JSON", "", 1, "path"]),
    ("output_format", ["gif", "PNG", "", 1]),
    ("stream", [0, 1, "true", "yes"]),
    ("negative_prompt", [1, ["a"], "x" * 4001, "\udfff"]),
    ("num_inference_steps", [0, -1, 101, 1001, 4.0, True, "4", 10**9, 10**4000]),
    ("guidance_scale", [-1, -1e-9, 100.1, float("nan"), float("inf"), "3", True, 10**400]),
    ("seed", [-1, 2**64, 1.0, "7", True, [7], 10**4000]),
    ("schedule", ["Hybrid", "", "adaptive", 1]),
    ("stages", [[], [1, 1], [1, 1, 1, 1], [1, 1, 1], [-1, 1, 4], [1.0, 1, 2], ["1", 1, 2], "1,1,2", [10**4000, 1, 1], {}]),
    ("mask_ratio", [0, -0.5, 1.01, float("nan"), "0.5", True]),
    ("speedup", [0, -1, 1001, float("inf"), "2", True, 1.5]),  # the last is refused because nothing was calibrated
    ("details", [0, 1, "true", {}]),
    ("nvext", [1, [], "x", {"nvext": {}}, {"prompt": "a"}, {"size": "64x64"}]),
]  # fmt: skip


def each(table: list[tuple[str, list[Any]]]) -> list[Any]:
    return [pytest.param(field, value, id=f"{field}-{ascii(value)[:24]}") for field, values in table for value in values]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def drawer(bundle: Bundle) -> Drawer:
    return Drawer(bundle, None, Limits())


@pytest.mark.parametrize(("field", "value"), each(GOOD))
def test_a_good_field_is_taken_at_top_level_and_inside_nvext(drawer: Drawer, field: str, value: Any) -> None:
    drawing = drawer(read_request({"prompt": "a cat", field: value}))
    assert drawing.images == (value if field == "n" and value else 1)
    if field in Extensions.model_fields:
        inside = drawer(read_request({"prompt": "a cat", "nvext": {field: value}}))
        assert inside.batch_key == drawing.batch_key
        if value is not None:
            assert inside == drawing or field != "seed"
            with pytest.raises(FieldError, match="twice") as refused:
                read_request({"prompt": "a cat", field: value, "nvext": {field: value}})
            assert refused.value.field == field


@pytest.mark.parametrize(("field", "value"), each(BAD))
def test_a_bad_field_is_refused_by_name_and_in_short(drawer: Drawer, field: str, value: Any) -> None:
    places: list[dict[str, Any]] = [{field: value}, {"nvext": {field: value}}]
    for place in places if field in Extensions.model_fields else places[:1]:
        with pytest.raises(RequestError) as refused:
            drawer(read_request({"prompt": "a cat", **place}))
        assert field in str(refused.value) or field == getattr(refused.value, "field", None)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "field", ["promt", "quality", "user", "num_images_per_prompt", "__class__", "model_config", "", "x" * 60_000]
)
def test_a_field_that_does_not_exist_is_refused_by_name(field: str) -> None:
    for fields in ({field: 1}, {"nvext": {field: 1}}):
        with pytest.raises(FieldError, match="is not a field of a request") as refused:
            read_request({"prompt": "a cat", **fields})
        assert field[:60] in str(refused.value)
        assert len(str(refused.value)) < 600


def test_what_is_left_out_is_the_bundles_own(drawer: Drawer, bundle: Bundle) -> None:
    drawing, defaults = drawer(read_request({"prompt": "a cat"})), bundle.manifest.defaults
    assert (drawing.height, drawing.width) == (defaults.height, defaults.width)
    assert len(drawing.plan.steps) == defaults.num_inference_steps
    assert drawing.guidance_scale == defaults.guidance_scale
    seeds = {drawer(read_request({"prompt": "a cat"})).seed for _ in range(8)}
    assert len(seeds) > 1


def test_a_size_is_width_by_height(drawer: Drawer) -> None:
    drawing = drawer(read_request({"prompt": "a cat", "size": "128x64"}))
    assert (drawing.width, drawing.height) == (128, 64)


@pytest.mark.parametrize(
    "other", [{"schedule": "large"}, {"num_inference_steps": 4}, {"stages": [1, 1, 2]}, {"mask_ratio": 0.5}]
)
def test_a_speed_up_and_a_schedule_are_refused_together(drawer: Drawer, other: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=f"{next(iter(other))} says what the schedule is"):
        drawer(read_request({"prompt": "a cat", "speedup": 1.5, "nvext": other}))


def test_steps_are_limited_however_they_are_asked_for(drawer: Drawer) -> None:
    for fields in (
        {"num_inference_steps": 101},
        {"num_inference_steps": 101, "stages": [101, 0, 0]},
        {"stages": [101, 0, 0]},
        {"stages": [10_000, 10_000, 10_000], "num_inference_steps": 10_000},
    ):
        with pytest.raises(RequestError):
            drawer(read_request({"prompt": "a cat", **fields}))


def test_requests_that_differ_in_words_and_seeds_only_are_drawn_together(drawer: Drawer) -> None:
    def key(**fields: Any) -> Any:
        return drawer(read_request({"prompt": "a cat", **fields})).batch_key

    assert key() == key(prompt="a dog", seed=3, negative_prompt="x", n=2, details=True, output_format="jpeg")
    assert key() == key(schedule="hybrid", num_inference_steps=4, guidance_scale=3, size="64x64")
    for different in (
        {"guidance_scale": 4},
        {"num_inference_steps": 5},
        {"size": "64x128"},
        {"schedule": "large"},
        {"mask_ratio": 0.9},
    ):
        assert key() != key(**different), different


FIELDS = list(ImageRequest.model_fields)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["auto", "64x64", "hybrid", "png"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON | st.fixed_dictionaries({"prompt": st.text()}, optional={field: JSON for field in FIELDS if field != "prompt"}))
def test_a_request_of_any_json_is_read_or_refused_with_its_field(value: Any) -> None:
    try:
        request = read_request(value)
    except FieldError as error:
        json.dumps(error_body(error), ensure_ascii=False).encode()  # as it is sent
        return
    assert request.nvext is None
    assert isinstance(request.prompt, str)


@settings(max_examples=100, deadline=None)
@given(fields=st.fixed_dictionaries({"prompt": st.just("a cat")}, optional={f: st.sampled_from(v) for f, v in GOOD[1:]}))
def test_good_fields_together_are_drawn_or_refused(drawer: Drawer, fields: dict[str, Any]) -> None:
    try:
        drawing = drawer(read_request(fields))
    except RequestError:
        return
    assert len(drawing.plan.steps) <= 100
    ratio = fields.get("mask_ratio")
    assert ratio is None or drawing.settings["mask"] == MaskRule(ratio=ratio)


def test_a_picture_is_the_one_of_the_command_line(tiny_bundle: Path, hst: Callable[..., Finished], tmp_path: Path) -> None:
    with serving(tiny_bundle) as server:
        for seed, fields, options in (
            (0, {}, ()),
            (2**64 - 1, {"nvext": {"schedule": "large", "guidance_scale": 1}}, ("--schedule", "large", "--guidance-scale", 1)),
        ):
            answer = server.ask(prompt="a red cat", seed=seed, **fields).json()
            folder = tmp_path / str(seed)
            done = hst(
                "run", "--bundle", tiny_bundle, "--prompt", "a red cat", "--seed", seed, "--output-dir", folder, *options
            )
            assert done.code == 0, done.err
            (file,) = folder.glob("*.png")
            assert answer["data"][0]["seed"] == seed
            assert np.array_equal(pixels_of(answer["data"][0]), np.asarray(Image.open(file), np.int16))
