"""The C++ host as services use it: latents, callbacks, figures, warnings, versions, misuse, the line server, the examples."""

from __future__ import annotations

import ctypes as c
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host import (
    API_VERSION,
    CANCEL,
    CMAKE,
    GO_ON,
    LATENTS,
    RGB,
    ROOT,
    SOURCES,
    STOP,
    HostBundle,
    HostError,
    HostPipeline,
    Library,
    Loop,
    OpenParams,
    Params,
    Raw,
    Stats,
    onnxruntime_library,
)
from PIL import Image

from hst_trt.arguments import call_costs
from hst_trt.backends import open_bundle
from hst_trt.machine import cpu
from hst_trt.noise import torch_randn
from hst_trt.pipeline import HybridStitchPipeline, StitchOutput
from hst_trt.plan import MaskRule, Stage, token_buckets
from hst_trt.stats import RunStats
from hst_trt.workspace import RequestShape

MASKED = dict(stages=(1, 5, 1), num_inference_steps=7)
VERSION_1_0 = 1 << 16
LONG = "a red apple on a blue background, " * 20


@pytest.fixture(scope="module")
def pipelines(library: Library, tiny_bundle: Path) -> tuple[HostPipeline, HybridStitchPipeline]:
    return HostPipeline(HostBundle(library, tiny_bundle)), HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)


def pixels(output: StitchOutput) -> np.ndarray:
    return np.stack([np.asarray(image) for image in output.images])


def assert_same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def environment() -> dict[str, str]:
    return os.environ | {"HST_ONNXRUNTIME": str(onnxruntime_library())}


# -- random masks ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
def test_random_masks_are_pythons(pipelines: Any, seed: int) -> None:
    host, python = pipelines
    shared = dict(MASKED, height=96, width=64)
    ours = host(["a cat", "two dogs"], seeds=[3], keep_masks=1, has_mask_seed=1, mask_seed=seed, mask_ratio=0.5, **shared)
    theirs = python(["a cat", "two dogs"], seed=3, keep_masks=True, mask=MaskRule(ratio=0.5, random_seed=seed), **shared)
    assert ours.masks.keys() == theirs.masks.keys()
    assert len(ours.masks) == 5
    for t, mask in ours.masks.items():
        np.testing.assert_array_equal(mask, theirs.masks[t])
    assert_same_pictures(ours.images, pixels(theirs))


def test_a_random_mask_by_threshold_is_refused(pipelines: Any) -> None:
    with pytest.raises(HostError, match="random mask") as caught:
        pipelines[0](["a cat"], has_mask_seed=1, mask_threshold=2.0)
    assert caught.value.code == 2


# -- latents -----------------------------------------------------------------------------------------------------------
def test_latents_come_out_beside_pictures_or_alone(pipelines: Any) -> None:
    host, python = pipelines
    request = dict(height=96, width=64, **MASKED)
    theirs = python(["a cat", "two dogs"], seed=3, output_type="latent", **request).images
    both = host(["a cat", "two dogs"], seeds=[3], outputs=RGB + LATENTS, **request)
    alone = host(["a cat", "two dogs"], seeds=[3], outputs=LATENTS, **request)
    assert both.latents is not None
    assert both.latents.shape == host.bundle.latent_shape(prompts=["a cat", "two dogs"], height=96, width=64) == theirs.shape
    np.testing.assert_allclose(both.latents, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(alone.latents, both.latents)
    assert both.images.shape == (2, 96, 64, 3)
    assert alone.images.size == 0
    assert alone.times["vae"] == 0 < both.times["vae"]
    assert host(["a cat"], num_inference_steps=1).latents is None


@pytest.mark.parametrize("outputs", [0, 4, -1, 1 << 30])
def test_unknown_outputs_are_refused(pipelines: Any, outputs: int) -> None:
    with pytest.raises(HostError, match="outputs") as caught:
        pipelines[0](["a cat"], outputs=outputs)
    assert caught.value.code == 2


def test_latents_can_be_taken_up_where_another_run_stopped(pipelines: Any) -> None:
    host = pipelines[0]
    first = host(["a cat"], seeds=[1], schedule="large", num_inference_steps=2, outputs=LATENTS)
    assert first.latents is not None
    drawn = host(["a cat"], latents=first.latents, schedule="small", num_inference_steps=2)
    assert drawn.seeds == ()
    assert_same_pictures(
        drawn.images, pixels(pipelines[1]("a cat", latents=first.latents, schedule="small", num_inference_steps=2))
    )


# -- the callback of a step --------------------------------------------------------------------------------------------
def test_the_callback_sees_what_pythons_sees(pipelines: Any) -> None:
    host, python = pipelines
    ours: list[Any] = []
    theirs: list[Any] = []

    def see(loop: Loop) -> int:
        ours.append((loop.step, loop.timestep, loop.latents, loop.done[1]))
        assert loop.seconds > 0
        return GO_ON

    def see_there(_: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        theirs.append((step, timestep, tensors["latents"]))
        return {}

    host(["a cat", "two dogs"], seeds=[3], on_step_end=see, **MASKED)
    output = python(["a cat", "two dogs"], seed=3, callback_on_step_end=see_there, **MASKED)
    assert [(step, timestep) for step, timestep, _, _ in ours] == [(step, timestep) for step, timestep, _ in theirs]
    assert [tokens for _, _, _, tokens in ours] == [record.tokens for record in output.stats.records]
    for (_, _, mine, _), (_, _, other) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_latents_that_the_callback_replaces_count_as_in_python(pipelines: Any) -> None:
    host, python = pipelines
    replacement = torch_randn(9, (1, 16, 8, 8))

    def replace(loop: Loop) -> int:
        if loop.step == 2:
            loop.latents = replacement
            np.testing.assert_array_equal(loop.latents, replacement)
        return GO_ON

    def replace_there(_: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": replacement} if step == 2 else {}

    ours = host(["a cat"], seeds=[1], on_step_end=replace, **MASKED)
    assert_same_pictures(ours.images, pixels(python("a cat", seed=1, callback_on_step_end=replace_there, **MASKED)))
    assert (ours.images != host(["a cat"], seeds=[1], **MASKED).images).any()


def test_a_stopped_run_gives_the_picture_so_far_as_in_python(pipelines: Any) -> None:
    host, python = pipelines

    def stop_there(pipeline: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = step == 2
        return {}

    ours = host(["a cat"], seeds=[1], on_step_end=lambda loop: STOP if loop.step == 2 else GO_ON, **MASKED)
    assert len(ours.steps) == 3
    theirs = python("a cat", seed=1, callback_on_step_end=stop_there, **MASKED)
    assert_same_pictures(ours.images, pixels(theirs))
    assert ours.stats.large_compute_saved == pytest.approx(theirs.stats.large_compute_saved)


@pytest.mark.parametrize("answer", [CANCEL, -1, 77])
def test_a_step_callback_that_cancels_is_an_error(pipelines: Any, answer: int) -> None:
    host = pipelines[0]
    with pytest.raises(HostError, match="cancelled after 1 of 7") as caught:
        host(["a cat"], on_step_end=lambda _: answer, **MASKED)
    assert caught.value.code == 130
    assert host(["a cat"], num_inference_steps=1).images.any()


def test_the_last_step_can_cancel_too(pipelines: Any) -> None:
    with pytest.raises(HostError, match="cancelled after 7 of 7"):
        pipelines[0](["a cat"], on_step_end=lambda loop: CANCEL if loop.step == 6 else GO_ON, **MASKED)


def test_progress_comes_first_and_what_it_cancels_is_not_told_again(pipelines: Any) -> None:
    order: list[str] = []
    with pytest.raises(HostError):
        pipelines[0](
            ["a cat"],
            progress=lambda done, steps: order.append(f"progress {done}") or done == 2,
            on_step_end=lambda loop: order.append(f"end {loop.step}") or GO_ON,
            **MASKED,
        )
    assert order == ["progress 1", "end 0", "progress 2"]


def test_a_loop_is_good_for_its_callback_and_for_the_right_number_of_latents(pipelines: Any) -> None:
    host, kept = pipelines[0], []

    def misuse(loop: Loop) -> int:
        kept.append(loop)
        values = (c.c_float * 3)()
        for name in ("hst_loop_latents", "hst_loop_set_latents"):
            for arguments in (
                (loop.handle, values, c.c_size_t(3)),
                (loop.handle, None, c.c_size_t(1024)),
                (None, values, c.c_size_t(3)),
            ):
                with pytest.raises(HostError) as caught:
                    host.library.call(name, *arguments)
                assert caught.value.code == 2
        return GO_ON

    host(["a cat"], on_step_end=misuse, num_inference_steps=1)
    with pytest.raises(HostError, match="no loop"):
        _ = kept[0].latents


def test_latents_that_are_no_numbers_are_7(pipelines: Any) -> None:
    def spoil(loop: Loop) -> int:
        loop.latents = np.full((1, 16, 8, 8), np.nan)
        return GO_ON

    with pytest.raises(HostError, match="not finite") as caught:
        pipelines[0](["a cat"], on_step_end=spoil, num_inference_steps=1)
    assert caught.value.code == 7


# -- figures and warnings ----------------------------------------------------------------------------------------------
def assert_same_figures(ours: Stats, theirs: RunStats) -> None:
    assert (ours.num_tokens, ours.large_tokens) == (theirs.num_tokens, theirs.large_tokens)
    for mine, stage in zip(ours.stages, Stage, strict=True):
        for name in ("steps", "large_calls", "large_tokens", "small_calls"):
            assert getattr(mine, name) == getattr(theirs.stages[stage], name)
    for name in ("large_compute", "large_compute_saved", "cost", "modelled_speedup"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        dict(MASKED),
        dict(MASKED, guidance_scale=1.0, height=128, width=96),
        dict(schedule="large", num_inference_steps=2),
        dict(schedule="small", num_inference_steps=2),
        dict(schedule="ras", num_inference_steps=6),
        dict(schedule="srdiffusion", adaptive=True, num_inference_steps=10),
    ],
    ids=str,
)
def test_figures_are_pythons(pipelines: Any, settings: dict[str, Any]) -> None:
    host, python = pipelines
    ours, theirs = host(["a cat", "two dogs"], seeds=[1], **settings), python(["a cat", "two dogs"], seed=1, **settings).stats
    assert_same_figures(ours.stats, theirs)
    assert ours.cost_source == theirs.costs.source
    assert ours.engine_seconds.keys() == theirs.engine_seconds.keys()
    assert min(ours.engine_seconds.values()) > 0
    in_loop = [seconds for name, seconds in ours.engine_seconds.items() if name != "finite"]  # which runs after it
    assert sum(in_loop) <= ours.times["denoise"]
    assert 0 < ours.stats.overhead < 1
    assert sum(stage.seconds for stage in ours.stats.stages) <= ours.times["denoise"]


def test_costs_that_were_measured_here_take_the_models_place(library: Library, bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    seconds = {str(tokens): 0.1 + tokens / 16 for tokens in token_buckets(16, manifest["bucket_ratios"])}
    entry = dict(
        machine=cpu(1).name, backend_version="1", threads=1, images=1, guided=True, height=64, width=64, date="2026-01-02",
        large_seconds=seconds, small_seconds=0.25, text_seconds=1.0, vae_seconds=1.0, step_seconds=1.0,
    )  # fmt: skip
    others = [entry | {"threads": 2, "small_seconds": 9.0}, entry | {"machine": "another", "small_seconds": 9.0}]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest | {"costs": [*others, entry]}))
    costs = call_costs(open_bundle(bundle_copy), RequestShape(1, True, 4, 4), cpu(1))
    assert costs.source.endswith("2026-01-02")
    host = HostPipeline(HostBundle(library, bundle_copy), threads=1)
    python = HybridStitchPipeline.from_bundle(bundle_copy, threads=1)
    ours = host(["a cat"], seeds=[1], **MASKED)
    assert ours.cost_source == costs.source
    assert_same_figures(ours.stats, python("a cat", seed=1, **MASKED).stats)
    assert host(["a cat", "a dog"], seeds=[1], **MASKED).cost_source.startswith("cost model")


def test_the_size_of_the_figures_is_checked(pipelines: Any) -> None:
    library, place, stats = pipelines[0].library, c.c_void_p(), Stats()
    raw = library.request(prompts=["a cat"], num_inference_steps=1)
    library.call("hst_generate", pipelines[0].handle, c.byref(raw), c.byref(place))
    try:
        for size, code in ((c.sizeof(stats) + 8, 3), (8, 3), (0, 3)):
            with pytest.raises(HostError) as caught:
                library.call("hst_result_stats", place, c.byref(stats), c.c_uint32(size))
            assert caught.value.code == code
        with pytest.raises(HostError, match="NULL"):
            library.call("hst_result_stats", place, None, c.c_uint32(c.sizeof(stats)))
    finally:
        library.raw.hst_result_free(place)


def test_what_python_warns_of_is_a_warning(pipelines: Any, caplog: pytest.LogCaptureFixture) -> None:
    host, python = pipelines
    prompts = dict(negative_prompts=[LONG], num_inference_steps=1, seeds=[1])
    with caplog.at_level(logging.WARNING):
        python([" ", "a cat"], negative_prompt=LONG, num_inference_steps=1, seed=1)
    ours = host([" ", "a cat"], **prompts).warnings
    assert len(ours) == len(caplog.messages) == 4
    assert ours[0] == caplog.messages[0]
    for mine, other in zip(ours[1:], caplog.messages[1:], strict=True):
        assert mine.split(";")[0] == other.split(";")[0]
        assert "apple on a blue background" in mine
        assert len(mine) < len(LONG) + 100
    assert host(["a cat"], num_inference_steps=1).warnings == []


def test_a_warning_quotes_what_was_cut_in_any_script(pipelines: Any) -> None:
    host = pipelines[0]
    text = "東京の赤いりんご🍎" * 20
    for warning in host([text], num_inference_steps=1).warnings:
        cut = warning.split("'")[1]
        assert text.endswith(cut)
        assert 0 < len(cut) < len(text)


# -- opening -----------------------------------------------------------------------------------------------------------
def test_opening_tells_how_far_it_is(library: Library, tiny_bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    HostBundle(library, tiny_bundle, on_hash=lambda done, total: seen.append((done, total)) or 0)
    total = sum(entry.bytes for entry in open_bundle(tiny_bundle).manifest.files.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert {all_of_it for _, all_of_it in seen} == {total}


def test_opening_can_be_cancelled(library: Library, tiny_bundle: Path) -> None:
    seen: list[int] = []
    with pytest.raises(HostError, match="was cancelled") as caught:
        HostBundle(library, tiny_bundle, on_hash=lambda done, _: seen.append(done) or 1)
    assert caught.value.code == 130
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["graphs/small/diffusion_pytorch_model.safetensors", "graphs/glue/advance.onnx"])
@pytest.mark.parametrize("how", ["replaced", "written", "removed"])
def test_a_bundle_that_changed_after_it_was_opened_is_6(library: Library, bundle_copy: Path, name: str, how: str) -> None:
    pipeline = HostPipeline(HostBundle(library, bundle_copy))
    file = bundle_copy / name
    content = file.read_bytes()
    file.unlink()
    if how != "removed":
        file.write_bytes(content if how == "replaced" else content + b" ")
    for _ in range(2):
        with pytest.raises(HostError, match="changed since the bundle was opened") as caught:
            pipeline(["a cat"], num_inference_steps=4)
        assert caught.value.code == 6


def test_a_pipeline_that_has_loaded_its_graphs_outlives_its_bundles_folder(library: Library, bundle_copy: Path) -> None:
    pipeline = HostPipeline(HostBundle(library, bundle_copy))
    before = pipeline(["a cat"], seeds=[1], **MASKED).images
    shutil.rmtree(bundle_copy)
    np.testing.assert_array_equal(pipeline(["a cat"], seeds=[1], **MASKED).images, before)


# -- versions ----------------------------------------------------------------------------------------------------------
def test_a_host_of_the_first_version_is_served(library: Library, pipelines: Any) -> None:
    host, size = pipelines[0], Raw.outputs.offset
    memory = (c.c_uint8 * c.sizeof(Raw))(*[0xA5] * c.sizeof(Raw))
    raw = Raw.from_buffer(memory)
    library.call("hst_request_init", c.byref(raw), c.c_uint32(size), c.c_uint32(VERSION_1_0))
    assert bytes(memory[size:]) == b"\xa5" * (c.sizeof(Raw) - size)  # nothing is written beyond what that host has
    assert (raw.struct_size, raw.api_version) == (size, VERSION_1_0)
    raw.prompts, raw.prompt_count = (c.c_char_p * 1)(b"a cat"), 1
    raw.seeds, raw.seed_count = (c.c_uint64 * 1)(1), 1
    raw.num_inference_steps = 2
    result = c.c_void_p()
    library.call("hst_generate", host.handle, c.byref(raw), c.byref(result))
    expected = host(["a cat"], seeds=[1], num_inference_steps=2).images
    assert c.string_at(library.raw.hst_result_rgb(result, c.c_size_t(0)), expected.nbytes) == expected.tobytes()
    library.raw.hst_result_free(result)


@pytest.mark.parametrize(
    ("function", "struct"),
    [("hst_request_init", Raw), ("hst_pipeline_params_init", Params), ("hst_open_params_init", OpenParams)],
)
def test_every_struct_has_its_size_checked(library: Library, function: str, struct: type[c.Structure]) -> None:
    raw, size = struct(), c.sizeof(struct)
    for wrong, version in ((0, API_VERSION), (8, API_VERSION), (size - 8, API_VERSION), (size + 8, API_VERSION), (size, 0),
                           (size, API_VERSION + 1), (size, 2 << 16), (2**32 - 1, API_VERSION), (size, 2**32 - 1)):  # fmt: skip
        with pytest.raises(HostError, match="another version") as caught:
            library.call(function, c.byref(raw), c.c_uint32(wrong), c.c_uint32(version))
        assert caught.value.code == 3
        assert bytes(raw) == bytes(size)
    with pytest.raises(HostError, match="NULL"):
        library.call(function, None, c.c_uint32(size), c.c_uint32(API_VERSION))


def test_structs_that_were_not_set_up_are_refused(library: Library, tiny_bundle: Path) -> None:
    bundle, place = HostBundle(library, tiny_bundle), c.c_void_p()
    for fill in (b"\0", b"\xff", b"\x01"):
        for function, struct, before in (
            ("hst_bundle_open_with", OpenParams, str(tiny_bundle).encode()),
            ("hst_pipeline_create", Params, bundle.handle),
        ):
            with pytest.raises(HostError) as caught:
                library.call(function, before, c.byref(struct.from_buffer_copy(fill * c.sizeof(struct))), c.byref(place))
            assert caught.value.code == 3
            assert not place


# -- misuse ------------------------------------------------------------------------------------------------------------
def test_a_pipeline_that_is_freed_in_its_own_callback_ends_its_run(library: Library, tiny_bundle: Path) -> None:
    host = HostPipeline(HostBundle(library, tiny_bundle))

    def free(loop: Loop) -> int:
        library.raw.hst_pipeline_free(host.handle)
        return GO_ON

    expected = HostPipeline(host.bundle)(["a cat"], seeds=[1], num_inference_steps=3).images
    np.testing.assert_array_equal(host(["a cat"], seeds=[1], num_inference_steps=3, on_step_end=free).images, expected)
    with pytest.raises(HostError, match="open pipeline") as caught:
        host(["a cat"])
    assert caught.value.code == 2


def test_handles_freed_by_another_thread_meanwhile_are_refused_or_work(library: Library, tiny_bundle: Path) -> None:
    for _ in range(8):
        host = HostPipeline(HostBundle(library, tiny_bundle))
        started, refused = threading.Event(), ""

        def free(host: HostPipeline = host, started: threading.Event = started) -> None:
            started.wait()
            library.raw.hst_bundle_free(host.bundle.handle)
            library.raw.hst_pipeline_free(host.handle)

        thread = threading.Thread(target=free, daemon=True)  # which a drawing that fails must not leave waiting
        thread.start()
        try:
            host(["a cat"], num_inference_steps=3, progress=lambda done, steps, started=started: started.set() or 0)
        except HostError as error:  # at what is asked of the pipeline after the drawing
            refused = str(error)
        thread.join()
        assert not refused or "a handle is not that of an open pipeline" in refused


def test_an_error_that_was_freed_is_told_apart(library: Library) -> None:
    function = library.raw.hst_bundle_open
    function.restype = c.c_void_p
    error = c.c_void_p(function(None, None))
    assert library.raw.hst_error_code(error) == 2
    library.raw.hst_error_free(error)
    library.raw.hst_error_free(error)
    assert library.raw.hst_error_code(error) == 2
    assert b"freed" in library.raw.hst_error_message(error)
    assert (library.raw.hst_error_code(None), library.raw.hst_error_message(None)) == (0, b"")


def test_a_result_that_was_freed_reads_as_nothing(library: Library, pipelines: Any) -> None:
    raw, result = library.request(prompts=["a cat"], num_inference_steps=1, keep_masks=1), c.c_void_p()
    library.call("hst_generate", pipelines[0].handle, c.byref(raw), c.byref(result))
    zero, shape, seconds = c.c_size_t(0), (c.c_int64 * 4)(1, 1, 1, 1), c.c_double(1)
    assert library.raw.hst_result_rgb(result, c.c_size_t(1)) is None  # past the last
    assert library.raw.hst_result_warning(result, zero) is None
    assert library.raw.hst_result_engine(result, c.c_size_t(99), c.byref(seconds)) is None
    for handle in (pipelines[0].handle, pipelines[0].bundle.handle, None):
        assert library.raw.hst_result_images(handle) == 0
    library.raw.hst_result_free(result)
    library.raw.hst_result_free(result)
    for name in ("images", "height", "width", "seed_count", "steps", "engines", "warnings"):
        assert getattr(library.raw, f"hst_result_{name}")(result) == 0
    assert library.raw.hst_result_rgb(result, zero) is None
    assert library.raw.hst_result_latents(result, shape) is None
    assert list(shape) == [0] * 4
    assert library.raw.hst_result_seeds(result) is None
    assert library.raw.hst_result_mask(result, zero, None, None) is None
    assert library.raw.hst_result_engine(result, zero, c.byref(seconds)) is None
    assert seconds.value == 0
    assert library.raw.hst_result_cost_source(result) == b""
    assert library.raw.hst_result_times(result).text == 0
    for name, arguments in (
        ("step", (zero, c.byref(c.c_double()))),
        ("stats", (c.byref(Stats()), c.c_uint32(c.sizeof(Stats)))),
    ):
        with pytest.raises(HostError, match="open result") as caught:
            library.call(f"hst_result_{name}", result, *arguments)
        assert caught.value.code == 2


HUGE = (2**64 - 1, 2**63, 2**61 + 1, 1 << 40)


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("name", ["prompt_count", "negative_prompt_count", "seed_count", "latent_count"])
def test_a_count_that_cannot_be_is_refused_before_anything_is_read(
    library: Library, pipelines: Any, name: str, count: int
) -> None:
    raw, place = library.request(prompts=["a cat"], negative_prompts=["b"], num_inference_steps=1), c.c_void_p()
    if name == "latent_count":
        raw.latents = (c.c_float * 4)()
    else:
        raw.seeds, raw.seed_count = (c.c_uint64 * 1)(), 1
    setattr(raw, name, count)
    with pytest.raises(HostError) as caught:
        library.call("hst_generate", pipelines[0].handle, c.byref(raw), c.byref(place))
    assert caught.value.code == 2
    assert not place


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: setattr(raw, "prompts", None), lambda raw: setattr(raw, "prompts", (c.c_char_p * 1)(None)),
        lambda raw: setattr(raw, "prompt_count", 0), lambda raw: setattr(raw, "negative_prompt_count", 1),
        lambda raw: setattr(raw, "seed_count", 1), lambda raw: setattr(raw, "latent_count", 1),
        lambda raw: setattr(raw, "schedule", None), lambda raw: setattr(raw, "solver", None),
        lambda raw: setattr(raw, "timestep_spacing", None),
    ],
    ids=range(9),
)  # fmt: skip
def test_null_pointers_in_a_request_are_refused(library: Library, pipelines: Any, change: Callable[[Raw], None]) -> None:
    raw, place = library.request(prompts=["a cat"], num_inference_steps=1), c.c_void_p()
    change(raw)
    with pytest.raises(HostError) as caught:
        library.call("hst_generate", pipelines[0].handle, c.byref(raw), c.byref(place))
    assert caught.value.code == 2
    assert not place


@pytest.mark.parametrize("threads", [-1, 257, 2**31 - 1])
def test_a_number_of_threads_that_cannot_be_is_refused(library: Library, tiny_bundle: Path, threads: int) -> None:
    with pytest.raises(HostError, match="threads") as caught:
        HostPipeline(HostBundle(library, tiny_bundle), threads=threads)
    assert caught.value.code == 2


def test_the_cpp_header_passes_on_exceptions_latents_and_figures(built: Path, tiny_bundle: Path) -> None:
    done = subprocess.run(
        [built / "hst-trt-hpp-host", tiny_bundle], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8


# -- the program that serves lines -------------------------------------------------------------------------------------
def serve(
    built: Path, bundle: Path, lines: list[Any], *options: object, stdout: Any = subprocess.PIPE
) -> tuple[int, dict[int, dict[str, Any]], str]:
    """Exit code, answers by line, messages."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    command = [built / "hst-trt-serve-lines", bundle, *map(str, options)]
    done = subprocess.run(
        command,
        input=text.encode(errors="surrogateescape"),
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
        env=environment(),
    )
    answers = [json.loads(line) for line in (done.stdout or b"").splitlines()]
    assert len({answer["line"] for answer in answers}) == len(answers)
    return done.returncode, {answer["line"]: answer for answer in answers}, done.stderr.decode()


@pytest.mark.parametrize("workers", [2, 4])
def test_equal_seeds_give_equal_bytes_whichever_worker_draws_them(
    built: Path, tiny_bundle: Path, pipelines: Any, tmp_path: Path, workers: int
) -> None:
    settings = dict(num_inference_steps=5, height=96, width=64)
    orders = [
        dict(
            prompt=f"a cat {i % 4}",
            output=str(tmp_path / f"{i}.png"),
            seed=i % 4,
            schedule=("hybrid", "large")[i % 2],
            stages=((1, 2, 2), (5, 0, 0))[i % 2],
            **settings,
        )
        for i in range(20)
    ]
    code, answers, err = serve(built, tiny_bundle, orders, "--workers", workers, "--threads", 1)
    assert code == 0, err
    assert f"{workers} workers" in err
    assert sorted(answers) == list(range(1, 21))
    for i, order in enumerate(orders):
        answer = answers[i + 1]
        assert (answer["output"], answer["seed"], answer["warnings"]) == (order["output"], i % 4, [])
        assert answer["seconds"] > 0
        assert Path(order["output"]).read_bytes() == (tmp_path / f"{i % 4}.png").read_bytes()
    for i in range(4):
        schedule, stages = (("hybrid", (1, 2, 2)), ("large", (5, 0, 0)))[i % 2]
        theirs = pipelines[1](f"a cat {i}", seed=i, schedule=schedule, stages=stages, **settings)
        assert_same_pictures(np.asarray(Image.open(tmp_path / f"{i}.png"))[None], pixels(theirs))


BAD_LINES = {
    "{": "not JSON",
    "not JSON": "not JSON",
    "[1]": "not a JSON object",
    "\udcff": "not JSON",
    '{"prompt": "a"}': "output is not a text",
    '{"output": "a.png"}': "prompt is not a text",
    '{"prompt": 5, "output": "a.png"}': "prompt is not a text",
    '{"prompt": "a\\u0000b", "output": "a.png"}': "NUL",
    '{"prompt": "a", "output": "a\\u0000.png"}': "NUL",
    '{"prompt": "a", "output": "a.png", "surprise": 1}': "unknown field surprise",
    '{"prompt": "a", "output": "a.png", "seed": -1}': "seed is not a whole number",
    '{"prompt": "a", "output": "a.png", "seed": 1.5}': "seed is not a whole number",
    '{"prompt": "a", "output": "a.png", "height": 4294967296}': "height is not a whole number",
    '{"prompt": "a", "output": "a.png", "height": 65}': "height 65 is not a multiple",
    '{"prompt": "a", "output": "a.png", "schedule": 3}': "schedule is not a text",
    '{"prompt": "a", "output": "a.png", "guidance_scale": "x"}': "guidance_scale is not a number",
    '{"prompt": "a", "output": "a.png", "stages": [1, 2]}': "stages are not three numbers",
    '{"prompt": "a", "output": "a.png", "stages": [1, 2, -3]}': "stages is not a whole number",
    '{"prompt": "a", "output": "a.png", "stages": [1, 2, 3], "num_inference_steps": 5}': "do not make 5 steps",
    '{"prompt": "a", "output": "a.png", "schedule": "none"}': "unknown schedule 'none'",
    '{"prompt": "a", "output": "nowhere/a.png"}': "there is no folder nowhere",
    '{"prompt": "a", "output": "' + "x" * 2_000_000 + '"}': "longer than",
}


def test_bad_lines_among_good_ones_are_answered(built: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    good = [dict(prompt="a cat", output=str(tmp_path / f"{i}.png"), seed=1, num_inference_steps=1) for i in range(3)]
    code, answers, err = serve(built, tiny_bundle, [good[0], *BAD_LINES, "", "  \r", good[1], good[2]], "--workers", 3)
    assert code == 0, err
    assert len(answers) == len(BAD_LINES) + 3
    for number, why in enumerate(BAD_LINES.values(), start=2):
        assert answers[number]["error"]["code"] == 2
        assert why in answers[number]["error"]["message"]
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(3)}) == 1


def test_what_cannot_be_written_is_answered(built: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    orders = [dict(prompt="a cat", output=str(path), num_inference_steps=1) for path in ("/dev/full", tmp_path / "folder.png")]
    code, answers, _ = serve(built, tiny_bundle, orders)
    assert code == 0
    assert answers[1]["error"]["code"] == 5
    assert "No space left" in answers[1]["error"]["message"]
    assert answers[2]["error"]["code"] == 2
    assert "directory" in answers[2]["error"]["message"]
    assert Path("/dev/full").exists()


def test_a_picture_that_does_not_fit_on_the_disk_leaves_no_half(built: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    order = json.dumps(dict(prompt="a cat", output=str(tmp_path / "a.png"), num_inference_steps=1))
    limited = f"trap '' XFSZ; ulimit -f 1; exec '{built}/hst-trt-serve-lines' '{tiny_bundle}'"
    done = subprocess.run(["bash", "-c", limited], input=order, capture_output=True, text=True, check=False, env=environment())
    assert json.loads(done.stdout)["error"]["code"] == 5
    assert list(tmp_path.iterdir()) == []


def test_long_prompts_are_answered_with_warnings(built: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    order = dict(prompt=LONG + '"\\\t', output=str(tmp_path / "a.png"), num_inference_steps=1)
    _, answers, _ = serve(built, tiny_bundle, [order])
    assert len(answers[1]["warnings"]) == 3
    assert '"\\\t' in answers[1]["warnings"][0]


def test_no_input_is_no_error(built: Path, tiny_bundle: Path) -> None:
    assert serve(built, tiny_bundle, [])[:2] == (0, {})


def test_answers_that_cannot_be_written_end_the_program(built: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    orders = [dict(prompt="a cat", output=str(tmp_path / f"{i}.png"), num_inference_steps=1) for i in range(50)]
    with Path("/dev/full").open("wb") as full:
        code, _, err = serve(built, tiny_bundle, orders, "--workers", 2, stdout=full)
    assert code == 5
    assert "standard output" in err
    assert len(list(tmp_path.iterdir())) < 10


def test_a_reader_that_goes_away_ends_the_program(built: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    command = [built / "hst-trt-serve-lines", tiny_bundle, "--workers", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment()) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.close()
        process.stdin.write(
            json.dumps(dict(prompt="a", output=str(tmp_path / "a.png"), num_inference_steps=1)).encode() + b"\n"
        )
        process.stdin.flush()
        assert process.wait(timeout=60) == 5  # though its input is still open


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_ends_it_cleanly(built: Path, tiny_bundle: Path, tmp_path: Path, which: signal.Signals) -> None:
    command = [built / "hst-trt-serve-lines", tiny_bundle, "--workers", "3", "--threads", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment()) as process:
        assert process.stdin
        assert process.stdout
        for i in range(40):
            order = dict(prompt="a cat", output=str(tmp_path / f"{i}.png"), seed=i, num_inference_steps=1)
            if i > 0:
                order |= dict(num_inference_steps=1000, height=192, width=192, schedule="large")  # takes a while
            process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()  # and left open
        first = json.loads(process.stdout.readline())
        process.send_signal(which)
        rest = [json.loads(line) for line in process.stdout]
        assert process.wait(timeout=60) == 130
    assert first["line"] == 1
    assert 1 <= len(rest) <= 4  # what was being drawn; the rest was never begun
    assert {answer["error"]["code"] for answer in rest} == {130}
    assert [file.name for file in tmp_path.iterdir()] == ["0.png"]


def test_a_signal_ends_a_program_that_waits_for_lines(built: Path, tiny_bundle: Path) -> None:
    command = [built / "hst-trt-serve-lines", tiny_bundle, "--workers", "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stderr
        assert process.stderr.readline().startswith(b"ready")
        process.terminate()
        assert process.wait(timeout=60) == 130


@pytest.mark.parametrize(
    "arguments",
    [[], ["b", "--workers"], ["b", "--workers", "0"], ["b", "--workers", "x"], ["b", "--what", "1"], ["b", "--threads", "-1"]],
)
def test_the_program_refuses_a_wrong_command_line(built: Path, arguments: list[str]) -> None:
    done = subprocess.run([built / "hst-trt-serve-lines", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Usage" in done.stderr


def test_the_program_says_what_is_missing(built: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert serve(built, tmp_path / "nothing.hstb", [])[0] == 4
    command = [built / "hst-trt-serve-lines", tiny_bundle]
    nowhere = os.environ | {"HST_ONNXRUNTIME": str(tmp_path / "libonnxruntime.so")}
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False, env=nowhere)
    assert done.returncode == 4
    assert "pip install onnxruntime" in done.stderr


# -- examples ----------------------------------------------------------------------------------------------------------
def test_the_host_in_python_draws(tiny_bundle: Path, tmp_path: Path, pipelines: Any) -> None:
    command = [sys.executable, ROOT / "examples" / "python_host.py", tiny_bundle, "a cat", "two dogs"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["0.png", "1.png"]
    assert_same_pictures(np.asarray(Image.open(tmp_path / "1.png"))[None], pixels(pipelines[1]("two dogs", seed=7)))


def test_the_host_in_cpp_is_built_on_the_installed_library_and_draws(
    built: Path, tiny_bundle: Path, tmp_path: Path, pipelines: Any
) -> None:
    subprocess.run([CMAKE, "--install", built, "--prefix", tmp_path / "installed"], check=True, capture_output=True)
    assert (tmp_path / "installed" / "bin" / "hst-trt-serve-lines").is_file()
    source, folder = ROOT / "examples" / "cpp_host", tmp_path / "build"
    options = [f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"]
    subprocess.run([CMAKE, "-S", source, "-B", folder, *options], check=True, capture_output=True)
    subprocess.run([CMAKE, "--build", folder], check=True, capture_output=True)
    picture = tmp_path / "a.ppm"
    with picture.open("wb") as file:
        subprocess.run([folder / "cpp_host", tiny_bundle, "a cat"], check=True, stdout=file, env=environment())
    assert_same_pictures(np.asarray(Image.open(picture))[None], pixels(pipelines[1]("a cat", seed=7)))
    assert subprocess.run([folder / "cpp_host"], capture_output=True, check=False).returncode == 2
    missing = subprocess.run(
        [folder / "cpp_host", tmp_path / "no.hstb", "a"], capture_output=True, check=False, env=environment()
    )
    assert missing.returncode == 4


# -- the page on embedding ---------------------------------------------------------------------------------------------
def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)


@pytest.fixture
def checkout(built: Path, demo_bundle: Path, tmp_path: Path) -> Path:
    """A folder like a checkout after `make demo` and `make host`, in which the page's commands may leave what they like."""
    for name in (".venv", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "demo-cpu.hstb").symlink_to(demo_bundle)
    (tmp_path / "build" / "out").mkdir(parents=True)
    (tmp_path / "build" / "out" / "host").symlink_to(built)
    return tmp_path


def test_every_command_of_the_page_runs(checkout: Path) -> None:
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    assert "make host" in lines
    script = "\n".join(line for line in lines if not line.startswith("make "))
    tools = os.environ | {"PATH": os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])}
    done = subprocess.run(["bash", "-euxc", script], cwd=checkout, capture_output=True, text=True, check=False, env=tools)
    assert done.returncode == 0, done.stderr
    assert {"apple.ppm", "apple.png", "cpp_host", "0.png"} <= {file.name for file in checkout.iterdir()}


def test_every_piece_of_cpp_on_the_page_runs(checkout: Path) -> None:
    pieces = blocks("cpp")
    source = "#include <hst_trt.hpp>\n#include <iostream>\n"
    source += "".join(f"void piece_{i}() {{\n{piece}}}\n" for i, piece in enumerate(pieces))
    source += "int main() {\n" + "".join(f"  piece_{i}();\n" for i in range(len(pieces))) + "}\n"
    (checkout / "pieces.cpp").write_text(source)
    library = checkout / "build" / "out" / "host"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES / 'include'}", f"-L{library}", f"-Wl,-rpath,{library}"]
    subprocess.run(["c++", *flags, "pieces.cpp", "-lhst_trt", "-o", "pieces"], cwd=checkout, check=True, capture_output=True)
    done = subprocess.run(["./pieces"], cwd=checkout, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert "4 of 4" in done.stdout


def test_the_python_on_the_page_runs(checkout: Path) -> None:
    for piece in blocks("python"):
        subprocess.run([sys.executable, "-c", piece], cwd=checkout, check=True, capture_output=True)
    assert Image.open(checkout / "apple.png").size == (256, 256)


def test_the_page_names_every_error_code_and_every_field_of_a_line() -> None:
    page = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    header = (SOURCES / "include" / "hst_trt.h").read_text(encoding="utf-8")
    codes = dict(re.findall(r"^  (HST_[A-Z]+) = (\d+),? +/\*", header, re.M))
    assert dict(re.findall(r"^\| (\d+) \| `(HST_[A-Z]+)` \|", page, re.M)) == {code: name for name, code in codes.items()}
    order = (SOURCES / "programs" / "order.cpp").read_text(encoding="utf-8")
    fields = set(re.findall(r'^ +\{"(\w+)",', order, re.M))
    assert len(fields) == 14
    assert all(f"`{field}`" in page for field in fields)
