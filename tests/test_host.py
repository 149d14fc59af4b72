"""The C++ host beside Python: the same bundle and the same request give the same plan, the same masks, the same picture."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host import API_VERSION, CMAKE, HostBundle, HostError, HostPipeline, Library, Raw, onnxruntime_library
from PIL import Image

from hst_trt.errors import HstError
from hst_trt.noise import torch_randn
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule, Stage
from hst_trt.schedule import FlowMatchEuler, Sampling

SCHEDULES = ("hybrid", "large", "small", "t-stitch", "srdiffusion", "ras")
STAGES = list(Stage)
BY_THRESHOLD = -1
_MASK = {
    "mask_ratio": "ratio",
    "mask_threshold": "threshold",
    "mask_decay": "decay",
    "mask_drift": "drift",
    "mask_starvation": "starvation",
}


@pytest.fixture(scope="module")
def tiny_pipelines(library: Library, tiny_bundle: Path) -> tuple[HostPipeline, HybridStitchPipeline]:
    return HostPipeline(HostBundle(library, tiny_bundle)), HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def demo_pipelines(library: Library, demo_bundle: Path) -> tuple[HostPipeline, HybridStitchPipeline]:
    return HostPipeline(HostBundle(library, demo_bundle)), HybridStitchPipeline.from_bundle(demo_bundle, threads=1)


def in_python(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the C interface as Python's."""
    given = {name: value for name, value in settings.items() if name not in _MASK and name != "seeds"}
    if rule := {_MASK[name]: value for name, value in settings.items() if name in _MASK}:
        given["mask"] = MaskRule(**rule)
    if seeds := settings.get("seeds"):
        given["seed"] = seeds[0] if len(seeds) == 1 else seeds
    if "images_per_prompt" in given:
        given["num_images_per_prompt"] = given.pop("images_per_prompt")
    if "negative_prompts" in given:
        texts = given.pop("negative_prompts")
        given["negative_prompt"] = texts[0] if len(texts) == 1 else texts
    return given


def steps_of(plan: Any) -> list[tuple[int, int, bool, bool]]:
    return [
        (STAGES.index(s.stage), BY_THRESHOLD if s.large_tokens is None else s.large_tokens, s.small, s.redraw)
        for s in plan.steps
    ]


def assert_equal_runs(pipelines: tuple[HostPipeline, HybridStitchPipeline], prompts: list[str], **settings: Any) -> None:
    host, python = pipelines
    ours = host(prompts, keep_masks=1, **settings)
    theirs = python(prompts, keep_masks=True, **in_python(settings))
    assert [tokens for _, tokens, _, _ in ours.steps] == [record.tokens for record in theirs.stats.records]
    assert [(stage, small, redraw) for stage, _, small, redraw in ours.steps] == [
        (STAGES.index(r.step.stage), r.step.small, r.step.redraw) for r in theirs.stats.records
    ]
    assert ours.masks.keys() == theirs.masks.keys()
    for t, mask in ours.masks.items():
        np.testing.assert_array_equal(mask, theirs.masks[t])
    difference = np.abs(ours.images.astype(int) - np.stack([np.asarray(image) for image in theirs.images]).astype(int))
    assert difference.max() <= 1
    assert ours.seeds == theirs.seeds


# -- pictures ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_picture_of_the_demo_pair_is_pythons(demo_pipelines: Any, schedule: str) -> None:
    assert_equal_runs(demo_pipelines, ["a red apple on a blue background"], schedule=schedule, seeds=[7], num_inference_steps=5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", ["euler", "ab2", "dpmpp-2m"])
def test_every_schedule_and_solver_draws_pythons_pictures(tiny_pipelines: Any, schedule: str, solver: str) -> None:
    spacing = "linspace" if solver == "euler" else "trailing"
    prompts = ["a penguin on the sea", "two cats"]
    settings = dict(schedule=schedule, solver=solver, timestep_spacing=spacing, seeds=[3, 2**63 + 5], height=96, width=64)
    assert_equal_runs(tiny_pipelines, prompts, num_inference_steps=7, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(guidance_scale=1.0, seeds=[1]),
        dict(guidance_scale=4.5, negative_prompts=["blue"], seeds=[1], images_per_prompt=2),
        dict(stages=(2, 5, 3), num_inference_steps=10, mask_ratio=0.5, correction=0.9, seeds=[2], height=128, width=96),
        dict(stages=(0, 8, 2), num_inference_steps=10, mask_ratio=0.2, refresh_every=3, mask_starvation=0.3, seeds=[3]),
        dict(stages=(2, 6, 0), num_inference_steps=8, mask_threshold=1.2, mask_drift=0.5, seeds=[4], height=128, width=128),
        dict(schedule="srdiffusion", adaptive=True, num_inference_steps=12, seeds=[5]),
        dict(schedule="hybrid", adaptive=True, num_inference_steps=12, shift=5.0, seeds=[6], mask_decay=0.5),
        dict(schedule="srdiffusion", correction=0.8, num_inference_steps=6, seeds=[7]),
        dict(schedule="ras", num_inference_steps=9, refresh_every=0, seeds=[8], height=128, width=128),
        dict(schedule="large", num_inference_steps=1, seeds=[0]),
    ],
    ids=str,
)
def test_every_argument_does_what_it_does_in_python(tiny_pipelines: Any, settings: dict[str, Any]) -> None:
    assert_equal_runs(tiny_pipelines, ["a green tree", "a dog on the moon"], **settings)


def test_given_latents_are_the_start(tiny_pipelines: Any) -> None:
    noise = torch_randn(5, (1, 16, 8, 8))
    host, python = tiny_pipelines
    ours = host(["a cat"], latents=noise, num_inference_steps=3)
    np.testing.assert_array_equal(ours.images[0], np.asarray(python("a cat", latents=noise, num_inference_steps=3).images[0]))
    assert ours.seeds == ()


def test_low_memory_draws_the_same(library: Library, tiny_bundle: Path, tiny_pipelines: Any) -> None:
    frugal = HostPipeline(HostBundle(library, tiny_bundle), low_memory=True)
    for _ in range(2):
        ours = frugal(["a cat"], seeds=[1], num_inference_steps=4).images
        np.testing.assert_array_equal(ours, tiny_pipelines[0](["a cat"], seeds=[1], num_inference_steps=4).images)


def test_four_pipelines_draw_at_once_what_they_draw_alone(library: Library, tiny_bundle: Path) -> None:
    bundle = HostBundle(library, tiny_bundle)
    pipelines = [HostPipeline(bundle) for _ in range(4)]
    alone = [pipelines[0](["a cat"], seeds=[seed], num_inference_steps=6).images for seed in range(4)]
    together: list[Any] = [None] * 4

    def draw(i: int) -> None:
        together[i] = pipelines[i](["a cat"], seeds=[i], num_inference_steps=6).images

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.stack(together), np.stack(alone))


def test_the_program_draws_and_writes_a_png(built: Path, demo_bundle: Path, demo_pipelines: Any, tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    command = [
        built / "hst-trt-host",
        demo_bundle,
        "a red apple",
        file,
        "--seed",
        "9",
        "--num-inference-steps",
        "2",
        "--threads",
        "1",
    ]
    environment = os.environ | {"HST_ONNXRUNTIME": str(onnxruntime_library())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(file)
    expected = demo_pipelines[1]("a red apple", seed=9, num_inference_steps=2).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(expected))


@pytest.mark.parametrize(
    "arguments", [[], ["bundle"], ["b", "p", "o", "--seed"], ["b", "p", "o", "--what", "1"], ["b", "p", "o", "--width", "x"]]
)
def test_the_program_refuses_a_wrong_command_line(built: Path, arguments: list[str]) -> None:
    done = subprocess.run([built / "hst-trt-host", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr


# -- plans, tables, noise ----------------------------------------------------------------------------------------------
def test_plans_are_pythons(library: Library, tiny_bundle: Path) -> None:
    host, python = HostBundle(library, tiny_bundle), HybridStitchPipeline.from_bundle(tiny_bundle)
    chosen = random.Random(1)
    refused = 0
    for _ in range(3000):
        steps = chosen.choice([1, 2, 3, 5, 8, 20, 28, 50, 137])
        settings: dict[str, Any] = dict(
            schedule=chosen.choice(SCHEDULES),
            num_inference_steps=steps,
            height=chosen.choice([16, 64, 96, 192]),
            width=chosen.choice([64, 80, 192]),
            correction=chosen.choice([0.0, 0.0, 0.9, 1.5]),
            adaptive=chosen.random() < 0.2,
        )
        if chosen.random() < 0.6:
            large = chosen.randint(0, steps)
            hybrid = chosen.randint(0, steps - large)
            settings["stages"] = (large, hybrid, steps - large - hybrid + (chosen.random() < 0.1))
        if chosen.random() < 0.7:
            settings["mask_ratio"] = chosen.choice([0.05, 0.1, 0.3, 0.33, 0.5, 0.9, 1.0, chosen.random(), 1.2])
        if chosen.random() < 0.2:
            settings["mask_threshold"] = 2.0
        if chosen.random() < 0.4:
            settings["refresh_every"] = chosen.choice([0, 1, 2, 3, 7, -2])
        try:
            expected: Any = steps_of(python.plan(**in_python(settings)))
        except HstError as exc:
            expected, refused = exc.exit_code, refused + 1
        try:
            found: Any = host.plan(prompts=["a"], **settings)
        except HostError as exc:
            found = exc.code
        assert found == expected, settings
    assert 300 < refused < 2500


def probe(built: Path, *arguments: object) -> np.ndarray:
    done = subprocess.run([built / "hst-trt-probe", *map(str, arguments)], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.float32)


@pytest.mark.parametrize(("seed", "count"), [(0, 16), (7, 16384), (2**40 + 3, 1000), (2**64 - 1, 4097)])
def test_start_noise_has_pythons_bits(built: Path, seed: int, count: int) -> None:
    np.testing.assert_array_equal(probe(built, "noise", seed, count), torch_randn(seed, (count,)))


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 28, 1000])
def test_step_tables_have_pythons_bits(built: Path, steps: int) -> None:
    for solver, spacing, shift in itertools.product(("euler", "ab2", "dpmpp-2m"), ("linspace", "trailing"), (None, 1.0, 5.5)):
        table = FlowMatchEuler(3.0).table(steps, Sampling(solver, spacing, shift))  # type: ignore[arg-type]
        expected = np.concatenate([table.timesteps, table.sigmas, table.coefficients.ravel()])
        found = probe(built, "table", steps, solver, spacing, shift or 0, 3.0)
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)  # a rounding of the last bit at most
        np.testing.assert_array_equal(found[: 2 * steps + 1], expected[: 2 * steps + 1])


# -- text that is none -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("data", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\x80"])
def test_bytes_that_are_no_text_are_refused(library: Library, tiny_bundle: Path, tiny_pipelines: Any, data: bytes) -> None:
    with pytest.raises(HostError, match="valid Unicode") as tokenized:
        HostBundle(library, tiny_bundle).tokenize(0, data)
    with pytest.raises(HostError, match="valid Unicode") as drawn:
        tiny_pipelines[0]([data])
    assert tokenized.value.code == drawn.value.code == 2


# -- what a host may do wrong ------------------------------------------------------------------------------------------
def test_a_host_in_c_links_and_another_major_version_is_refused(built: Path) -> None:
    done = subprocess.run([built / "hst-trt-c-host"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "compiled for another version" in done.stdout


def test_a_missing_onnx_runtime_is_4_and_says_what_to_do(library: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="pip install onnxruntime") as caught:
        HostPipeline(HostBundle(library, tiny_bundle), onnxruntime=tmp_path / "libonnxruntime.so")
    assert caught.value.code == 4


def test_a_library_that_is_not_onnx_runtime_is_3(library: Library, built: Path, tiny_bundle: Path) -> None:
    with pytest.raises(HostError, match="not ONNX Runtime") as caught:
        HostPipeline(HostBundle(library, tiny_bundle), onnxruntime=built / "libhst_trt.so")
    assert caught.value.code == 3


def test_a_cancelled_run_is_an_error_and_the_pipeline_goes_on(tiny_pipelines: Any) -> None:
    host = tiny_pipelines[0]
    before = host(["a cat"], seeds=[1], num_inference_steps=4).images
    seen = []
    with pytest.raises(HostError, match="cancelled after 2 of 4") as caught:
        host(["a cat"], seeds=[1], num_inference_steps=4, progress=lambda done, steps: seen.append((done, steps)) or done == 2)
    assert caught.value.code == 130
    assert seen == [(1, 4), (2, 4)]
    np.testing.assert_array_equal(host(["a cat"], seeds=[1], num_inference_steps=4).images, before)


def test_a_pipeline_that_is_drawing_refuses_a_second_request(tiny_pipelines: Any) -> None:
    host, errors = tiny_pipelines[0], []

    def again(done: int, steps: int) -> int:
        with pytest.raises(HostError) as caught:
            host(["a cat"])
        errors.append(str(caught.value))
        return 0

    host(["a cat"], num_inference_steps=1, progress=again)
    assert "drawing already" in errors[0]


@pytest.mark.parametrize(
    "settings",
    [
        dict(height=65), dict(height=-16), dict(width=4096), dict(num_inference_steps=1001), dict(num_inference_steps=-1),
        dict(guidance_scale=101.0), dict(guidance_scale=float("nan")), dict(schedule="none"), dict(solver="heun"),
        dict(timestep_spacing="even"), dict(shift=-1.0), dict(shift=float("nan")), dict(stages=(1, 1, 1)), dict(correction=2.0),
        dict(correction=float("nan")), dict(mask_ratio=0.0), dict(mask_ratio=float("inf")), dict(mask_threshold=-1.0),
        dict(mask_decay=1.1), dict(mask_starvation=-0.1), dict(images_per_prompt=0), dict(images_per_prompt=2**31 - 1),
        dict(seeds=[1, 2, 3]), dict(negative_prompts=["a", "b"]), dict(latents=np.zeros(7)), dict(schedule="large", adaptive=1),
        dict(schedule="ras", stages=(1, 3, 0)), dict(refresh_every=-2), dict(seeds=[1], latents=np.zeros((1, 16, 8, 8))),
    ],
    ids=str,
)  # fmt: skip
def test_an_argument_that_cannot_be_is_refused(tiny_pipelines: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(HostError) as caught:
        tiny_pipelines[0](["a cat"], **settings)
    assert caught.value.code == 2


def test_null_and_freed_and_foreign_handles_are_refused(library: Library, tiny_bundle: Path) -> None:
    bundle, place, raw = HostBundle(library, tiny_bundle), ctypes.c_void_p(), library.request(prompts=["a"])
    freed = ctypes.c_void_p()
    library.call("hst_bundle_open", str(tiny_bundle).encode(), ctypes.byref(freed))
    library.raw.hst_bundle_free(freed)
    library.raw.hst_bundle_free(freed)
    for arguments in (
        ("hst_bundle_open", None, ctypes.byref(place)),
        ("hst_bundle_open", str(tiny_bundle).encode(), None),
        ("hst_pipeline_create", freed, None, ctypes.byref(place)),
        ("hst_pipeline_create", None, None, ctypes.byref(place)),
        ("hst_generate", bundle.handle, ctypes.byref(raw), ctypes.byref(place)),
        ("hst_generate", None, ctypes.byref(raw), ctypes.byref(place)),
        ("hst_request_init", None, ctypes.c_uint32(ctypes.sizeof(Raw)), ctypes.c_uint32(API_VERSION)),
        ("hst_bundle_plan", bundle.handle, None, None, ctypes.c_size_t(0), ctypes.byref(place)),
        (
            "hst_bundle_tokenize",
            bundle.handle,
            ctypes.c_size_t(9),
            b"a",
            None,
            ctypes.c_size_t(0),
            ctypes.byref(ctypes.c_size_t()),
            None,
        ),
    ):
        with pytest.raises(HostError) as caught:
            library.call(*arguments)
        assert caught.value.code == 2
        assert not place
    with pytest.raises(HostError) as uninitialised:
        library.call(
            "hst_bundle_plan", bundle.handle, ctypes.byref(Raw()), None, ctypes.c_size_t(0), ctypes.byref(ctypes.c_size_t())
        )
    assert uninitialised.value.code == 3
    assert library.raw.hst_result_rgb(freed, ctypes.c_size_t(0)) is None


def test_another_version_is_refused(library: Library) -> None:
    for version, size in ((API_VERSION + (1 << 16), 0), (API_VERSION + 1, 0), (0, 0), (API_VERSION, 8)):
        with pytest.raises(HostError, match="another version") as caught:
            library.call(
                "hst_request_init", ctypes.byref(Raw()), ctypes.c_uint32(ctypes.sizeof(Raw) + size), ctypes.c_uint32(version)
            )
        assert caught.value.code == 3


def test_an_installed_host_is_found_by_cmake(built: Path, tmp_path: Path) -> None:
    subprocess.run([CMAKE, "--install", built, "--prefix", tmp_path / "installed"], check=True, capture_output=True)
    source = tmp_path / "host"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(host LANGUAGES CXX)\nfind_package(hst_trt REQUIRED)\n"
        "add_executable(host host.cpp)\ntarget_link_libraries(host PRIVATE hst_trt::hst_trt)\n"
    )
    (source / "host.cpp").write_text(
        "#include <hst_trt.hpp>\nint main() { return hst_api_version() == HST_API_VERSION ? 0 : 1; }\n"
    )
    options = [f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"]
    subprocess.run([CMAKE, "-S", source, "-B", tmp_path / "b", *options], check=True, capture_output=True)
    subprocess.run([CMAKE, "--build", tmp_path / "b"], check=True, capture_output=True)
    assert subprocess.run([tmp_path / "b" / "host"], check=False).returncode == 0


def test_no_python_is_in_the_process(built: Path) -> None:
    needed = subprocess.run(["ldd", built / "hst-trt-host"], capture_output=True, text=True, check=True).stdout
    assert "python" not in needed.lower().replace(str(Path(sys.prefix)).lower(), "")
