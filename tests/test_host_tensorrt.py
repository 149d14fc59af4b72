"""The TensorRT backend of the C++ host, on doubles of CUDA and TensorRT that run the exported graphs.

Pictures, recordings, memory, refusals. Without a GPU this is all that can be shown; what the doubles (in
`hst_trt/csrc/tests/fake_gpu`) check is said in their files."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_bundle import PINNED, finish, pipeline, rewrite
from fake_cuda import FakeDevice
from host import LATENTS, RGB, SOURCES, HostBundle, HostError, HostPipeline, Library
from host_doubles import Doubles, watched

from hst_trt.bundle import Bundle
from hst_trt.errors import HstError
from hst_trt.noise import torch_randn
from hst_trt.plan import token_buckets

HEIGHT, WIDTH = 16 * PINNED[0], 16 * PINNED[1]
TARGETS = {"tensorrt": ("tensorrt", "11.99.0.1"), "rtx": ("tensorrt-rtx", "1.99.0.1")}  # of the doubles
SCHEDULES: dict[str, dict[str, Any]] = {
    "hybrid": dict(stages=(2, 3, 1)),
    "hybrid-from-the-first-step": dict(stages=(0, 4, 2), correction=0.9),
    "refresh-and-drift": dict(stages=(1, 5, 0), refresh_every=2, mask_ratio=0.4, mask_drift=0.3, mask_starvation=0.2),
    "threshold": dict(stages=(2, 3, 1), mask_threshold=1.2),
    "random-masks": dict(stages=(1, 4, 1), has_mask_seed=1, mask_seed=5),
    "correction": dict(stages=(2, 0, 4), correction=0.9),
    "large": dict(schedule="large"),
    "small": dict(schedule="small"),
    "t-stitch": dict(schedule="t-stitch"),
    "srdiffusion": dict(schedule="srdiffusion"),
    "adaptive": dict(schedule="hybrid", adaptive=1),
    "ras": dict(schedule="ras"),
    "unguided": dict(stages=(2, 3, 1), guidance_scale=1.0),
    "dpmpp-2m": dict(stages=(2, 3, 1), solver="dpmpp-2m", timestep_spacing="trailing"),
}
PROMPT = ["a red apple"]
REQUEST: dict[str, Any] = dict(seeds=[3], height=HEIGHT, width=WIDTH, num_inference_steps=6)
MASKED = dict(stages=(1, 2, 1), num_inference_steps=4)


@pytest.fixture(scope="session")
def cpu(built: Path, tiny_bundle: Path) -> HostPipeline:
    return HostPipeline(HostBundle(Library(built / "libhst_trt.so"), tiny_bundle))


@pytest.fixture
def engines(engine_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """A bundle for the doubles of one kind; `extra` is what its engine files say."""

    def make(kind: str = "tensorrt", **extra: Any) -> Path:
        copy = Path(shutil.copytree(engine_bundle, tmp_path / f"{kind}.hstb"))
        if extra:
            finish(Bundle.open(copy), **extra)
        backend, version = TARGETS[kind]
        rewrite(copy, target=manifest(copy)["target"] | {"backend": backend, "backend_version": version})
        return copy

    return make


@pytest.fixture
def start(built: Path, tmp_path: Path) -> Iterator[Callable[..., Doubles]]:
    """Starts hosts on doubles; at the end all have given back what they took, and end well."""
    started: list[Doubles] = []

    def begin(kind: str = "tensorrt", **arguments: Any) -> Doubles:
        started.append(Doubles(built, kind, tmp_path / "cache", **arguments))
        return started[-1]

    yield begin
    for host in started:
        assert host.end() == 0


@pytest.fixture
def gpu(start: Callable[..., Doubles], engines: Callable[..., Path]) -> Iterator[Doubles]:
    host = start()
    host.open(engines())
    yield host
    host.close()
    assert host.live() == {}


def manifest(bundle: Path) -> Any:
    return json.loads((bundle / "manifest.json").read_text())


def draw(pipe: Any, prompts: list[str] = PROMPT, **arguments: Any) -> Any:
    call = pipe.draw if isinstance(pipe, Doubles) else pipe
    return call(prompts, **REQUEST | arguments)


def counts(host: Doubles, *names: str, **arguments: Any) -> tuple[int, ...]:
    """How much the counters rose while a picture was drawn."""
    host.set(**dict.fromkeys(names, 0))
    draw(host, **arguments)
    return tuple(host.get(*names).values())


def refused(call: Callable[[], Any]) -> tuple[int, str]:
    with pytest.raises(HostError) as error:
        call()
    return error.value.code, str(error.value)


def failure(call: Callable[[], Any]) -> HostError | None:
    try:
        call()
    except HostError as error:
        return error
    return None


# -- pictures ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(TARGETS))
def test_every_schedule_draws_what_onnx_runtime_draws_plain_recorded_and_replayed(
    kind: str, cpu: HostPipeline, start: Callable[..., Doubles], engines: Callable[..., Path]
) -> None:
    host = start(kind)
    host.open(engines(kind))
    for settings in SCHEDULES.values():
        expected = draw(cpu, keep_masks=1, **settings)
        for keep in (0, 0, 0, 1):
            ours = draw(host, keep_masks=keep, **settings)
            assert np.abs(ours.images.astype(int) - expected.images.astype(int)).max() <= 1
            assert ours.steps == expected.steps
        assert ours.masks.keys() == expected.masks.keys()
        for step, mask in expected.masks.items():
            np.testing.assert_array_equal(ours.masks[step], mask)
        assert ours.warnings == []
    host.close()
    assert host.live() == {}


def test_any_order_of_sizes_batches_and_schedules_gives_what_each_gives_alone(cpu: HostPipeline, gpu: Doubles) -> None:
    rng = np.random.default_rng(1)
    for _ in range(14):
        height, width = (int(side) for side in rng.choice([(96, 128), (64, 80), (144, 64)]))
        settings = dict(SCHEDULES[str(rng.choice(list(SCHEDULES)))], height=height, width=width, seeds=[int(rng.integers(9))])
        prompts = ["a red apple", "two cats"][: int(rng.integers(1, 3))]
        ours, theirs = draw(gpu, prompts, **settings), draw(cpu, prompts, **settings)
        assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1


def test_latents_that_are_not_finite_are_refused_and_the_next_picture_is_fine(cpu: HostPipeline, gpu: Doubles) -> None:
    noise = np.full((1, 16, HEIGHT // 8, WIDTH // 8), np.inf, np.float32)
    for _ in range(3):
        code, text = refused(lambda: draw(gpu, seeds=[], latents=noise))
        assert (code, text.splitlines()[0]) == (7, "the denoised latents are not finite, so there is no picture to decode")
    np.testing.assert_array_equal(draw(gpu).images, draw(cpu).images)


def test_a_cancelled_run_leaves_the_pipeline_usable(cpu: HostPipeline, gpu: Doubles) -> None:
    for _ in range(3):
        assert refused(lambda: draw(gpu, cancel_after=2))[0] == 130
        np.testing.assert_array_equal(draw(gpu).images, draw(cpu).images)


def test_a_callback_reads_and_replaces_latents_as_on_a_cpu(cpu: HostPipeline, gpu: Doubles) -> None:
    fields = REQUEST | dict(stages=(2, 3, 1), outputs=RGB + LATENTS)
    replaced = {2: torch_randn(9, (1, 16, HEIGHT // 8, WIDTH // 8))}
    expected, theirs, measured = watched(cpu, PROMPT, replaced, **fields)
    assert min(measured) > 0
    for _ in range(4):
        drawn, ours, seconds = gpu.watched(PROMPT, replaced, **fields)
        assert np.abs(drawn.images.astype(int) - expected.images.astype(int)).max() <= 1
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(drawn.latents, expected.latents, rtol=1e-4, atol=1e-4)
        assert np.isnan(seconds).all(), "nothing is waited for"
    assert gpu.get("launches")["launches"] > 0
    plain = draw(gpu, stages=(2, 3, 1)).images
    np.testing.assert_array_equal(plain, draw(cpu, stages=(2, 3, 1)).images)
    assert (plain != drawn.images).any()


def test_figures_are_those_of_the_run_and_engines_are_not_timed(cpu: HostPipeline, gpu: Doubles) -> None:
    theirs = draw(cpu, **MASKED).stats
    for _ in range(3):
        ours = draw(gpu, **MASKED)
        for mine, other in zip(ours.stats.stages, theirs.stages, strict=True):
            assert (mine.steps, mine.large_tokens, mine.small_calls) == (other.steps, other.large_tokens, other.small_calls)
            assert mine.seconds > 0
        assert ours.engine_seconds == {}
        assert np.isnan(ours.stats.overhead)
        assert ours.cost_source == "cost model (FLOPs)"


def test_costs_that_were_measured_on_this_gpu_take_the_models_place(
    start: Callable[..., Doubles], engines: Callable[..., Path]
) -> None:
    bundle = engines()
    buckets = token_buckets(PINNED[0] * PINNED[1], manifest(bundle)["bucket_ratios"])
    entry = dict(
        machine="Fake GPU", backend_version="1", date="2026-01-02", threads=0, images=1, guided=True, height=HEIGHT,
        width=WIDTH, large_seconds={str(tokens): float(tokens) for tokens in buckets}, small_seconds=4.0, text_seconds=1.0,
        vae_seconds=1.0, step_seconds=1.0,
    )  # fmt: skip
    rewrite(bundle, costs=[entry | {"machine": "another"}, entry])
    host = start()
    host.open(bundle)
    drawn = draw(host, schedule="small")
    assert drawn.cost_source == "measured on Fake GPU, 2026-01-02"
    assert drawn.stats.cost == pytest.approx(6 * 4 / buckets[-1])
    host.close()


# -- recordings ----------------------------------------------------------------------------------------------------------
def test_a_step_is_one_launch_and_nothing_is_uploaded_or_waited_for_within_the_loop(gpu: Doubles) -> None:
    few, many = dict(num_inference_steps=8, stages=(2, 4, 2)), dict(num_inference_steps=16, stages=(4, 8, 4))
    for _ in range(3):
        for settings in (few, many):
            draw(gpu, **settings)
    names = ("launches", "recorded", "enqueued", "waits", "event_waits", "uploads", "allocated")
    launches, *rest = counts(gpu, *names, **few)
    assert launches == 8 + 1, "a step each, and the check of the end"
    more, *same = counts(gpu, *names, **many)
    assert more == 16 + 1
    marks = 2 * 8  # of steps: only these are enqueued by themselves
    assert [n - marks * (i == 1) for i, n in enumerate(same)] == rest, "eight steps more cost no wait and no upload"
    assert same[0] == 0, "nothing is recorded anew"
    assert same[5] == 0, "and nothing allocated"


def test_a_threshold_mask_waits_once_for_each_masked_step_that_draws_one(gpu: Doubles) -> None:
    fixed, threshold = dict(stages=(2, 3, 1)), dict(stages=(2, 3, 1), mask_threshold=1.2)
    for _ in range(3):
        draw(gpu, **fixed)
        draw(gpu, **threshold)
    (waits,) = counts(gpu, "waits", **fixed)
    assert counts(gpu, "waits", **threshold) == (waits + 3,)


def test_recordings_serve_other_seeds_prompts_and_step_counts(gpu: Doubles) -> None:
    for _ in range(2):
        draw(gpu, stages=(2, 3, 1))
    others = (dict(seeds=[8]), dict(prompts=["a cat"]), dict(num_inference_steps=9, stages=(3, 4, 2)), dict(guidance_scale=5.0))
    for other in others:
        recorded, runs = counts(gpu, "recorded", "moves", **dict(stages=(2, 3, 1)) | other)
        assert (recorded, runs) == (0, 0)


def test_weights_are_loaded_once_and_buffers_made_once_for_a_shape(gpu: Doubles) -> None:
    draw(gpu)
    before = gpu.get("deserialised", "live.engine", "live.memory")
    assert before["deserialised"] == before["live.engine"]
    for schedule in ("large", "hybrid", "ras"):
        draw(gpu, schedule=schedule)
    after = gpu.get("deserialised", "live.engine", "live.memory")
    assert after["deserialised"] - before["deserialised"] <= 1, "count or change or correct may be new"
    assert after["live.engine"] == after["deserialised"]
    fixed = gpu.get("live.memory", "live.execution_context")
    for schedule in ("large", "hybrid", "ras"):
        draw(gpu, schedule=schedule)
    assert gpu.get("live.memory", "live.execution_context") == fixed


@pytest.mark.parametrize(
    ("kind", "extra"), [("tensorrt", {"breaks": True}), ("rtx", {"capturable": False}), ("rtx", {"breaks": True})]
)
def test_what_cannot_be_recorded_runs_plainly_draws_the_same_and_is_said(
    kind: str, extra: dict[str, bool], cpu: HostPipeline, start: Callable[..., Doubles], engines: Callable[..., Path]
) -> None:
    host = start(kind)
    host.open(engines(kind, **extra))
    expected = draw(cpu, **MASKED).images
    warnings = []
    for _ in range(4):
        drawn = draw(host, **MASKED)
        np.testing.assert_array_equal(drawn.images, expected)
        warnings.append(drawn.warnings)
    assert host.get("launches")["launches"] == 0
    why = "TensorRT says that this context cannot be captured" if "capturable" in extra else "an operation is not permitted"
    assert warnings[0] == []
    (said,) = warnings[1]
    assert said.startswith("calls are enqueued one by one, which is slower: a CUDA graph could not be captured (")
    assert why in said
    assert warnings[1:] == [[said]] * 3
    host.close()
    assert host.live() == {}


def test_a_driver_that_captures_nothing_is_no_error(gpu: Doubles, cpu: HostPipeline) -> None:
    gpu.set(captures=0)
    for _ in range(3):
        drawn = draw(gpu, **MASKED)
        np.testing.assert_array_equal(drawn.images, draw(cpu, **MASKED).images)
    assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in drawn.warnings[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("64", "aaaa"), "aAAA 1 1 3 0 0"),
        (("64", "abaabb"), "abAABB 2 2 4 0 0"),
        (("2", "abcabcbcaa"), "abcABCBCAA 3 4 7 2 0"),
        (("64", "abababab", "ab"), "abababab 8 0 0 0 2 not a"),
        (("64", "aaa-aa"), "aAAAA 1 2 4 0 0"),
    ],
    ids=["plain-recorded-replayed", "a-recording-each", "the-oldest-is-evicted", "refused", "cleared"],
)
def test_the_cache_of_recordings_does_what_pythons_does(built: Path, arguments: tuple[str, ...], expected: str) -> None:
    done = subprocess.run([built / "hst-trt-probe", "graphs", *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


# -- memory --------------------------------------------------------------------------------------------------------------
def test_low_memory_frees_what_a_request_no_longer_needs(
    cpu: HostPipeline, start: Callable[..., Doubles], engines: Callable[..., Path]
) -> None:
    host = start()
    host.open(engines(), low_memory=True)
    for _ in range(2):
        np.testing.assert_array_equal(draw(host, **MASKED).images, draw(cpu, **MASKED).images)
        assert host.get("live.recording", "live.memory")["live.recording"] == 0
        engines_left = host.get("live.engine")["live.engine"]
    assert engines_left < len(manifest(engines("rtx"))["engines"]) - 5, "neither the encoders nor the transformers nor the VAE"
    host.close()
    assert host.live() == {}


def test_memory_that_runs_out_says_what_was_asked_and_what_is_free_and_a_smaller_picture_still_works(
    cpu: HostPipeline, gpu: Doubles
) -> None:
    draw(gpu, height=64, width=64)
    everything = gpu.get("memory")["memory"]
    used = gpu.get("used")["used"]
    for left in range(0, 2**22, 2**17):  # from nothing free to enough
        gpu.set(memory=used + left)
        error = failure(lambda: draw(gpu, height=192, width=192, schedule="large"))
        if error is None:
            break
        assert error.code == 5
        problem, found, fix = str(error).splitlines()
        assert " of GPU memory, which are not free" in problem
        assert found.startswith("found: ")
        assert found.endswith("MiB are free")
        assert fix.startswith("to do: ask for fewer images at once")
        gpu.set(memory=everything)
        np.testing.assert_array_equal(draw(gpu, height=64, width=64).images, draw(cpu, height=64, width=64).images)
    assert left > 0
    gpu.set(memory=everything)


def test_weights_that_do_not_fit_are_code_5_too(start: Callable[..., Doubles], engines: Callable[..., Path]) -> None:
    host = start()
    host.open(engines(weight_bytes=2**40))
    code, text = refused(lambda: draw(host))
    assert code == 5
    assert text.startswith("the engine text_encoder needs ")
    host.close()
    assert host.live() == {}


@pytest.mark.parametrize(("kind", "stride"), [("tensorrt", 97), pytest.param("rtx", 5, marks=pytest.mark.slow)])
def test_whichever_call_fails_is_an_error_and_nothing_is_left_behind(
    kind: str, stride: int, cpu: HostPipeline, start: Callable[..., Doubles], engines: Callable[..., Path]
) -> None:
    host, bundle, expected = start(kind), engines(kind), draw(cpu, **MASKED).images
    never = 10**9
    host.set(fail_at=never)
    host.open(bundle)
    for _ in range(2):
        draw(host, **MASKED)
    host.close()
    calls = never - host.get("fail_at")["fail_at"]
    assert calls > 500
    for nth in range(1, calls, stride):
        host.set(fail_at=nth)
        if failure(lambda: host.open(bundle)):
            assert host.live() == {}, nth
            continue
        for _ in range(2):
            error = failure(lambda: draw(host, **MASKED))
            assert error is None or error.code in (3, 5, 8), nth
        host.set(fail_at=0)
        np.testing.assert_array_equal(draw(host, **MASKED).images, expected)
        host.close()
        assert host.live() == {}, nth


def test_kernels_that_tensorrt_rtx_compiled_are_kept_for_the_next_process(
    start: Callable[..., Doubles], engines: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = engines("rtx")
    for taken in (0, 1):
        host = start("rtx")
        host.open(bundle)
        draw(host, **MASKED)
        assert host.get("caches_taken")["caches_taken"] == taken
        host.close()
        assert host.live() == {}
        (kept,) = (tmp_path / "cache" / "hst_trt").iterdir()
        assert (kept.name, kept.read_bytes()) == ("tensorrt-rtx-1.99.0.1-sm90.cache", b"compiled")


# -- refusals ------------------------------------------------------------------------------------------------------------
def damage(bundle: Path, change: Callable[[bytes], bytes]) -> None:
    path = bundle / manifest(bundle)["engines"]["text_encoder"]["path"]
    path.write_bytes(change(path.read_bytes()))


def other_profiles(bundle: Path) -> None:
    described = manifest(bundle)["engines"]
    described["text_encoder"]["profiles"] *= 2
    rewrite(bundle, engines=described)


def renamed_output(bundle: Path) -> None:
    described = manifest(bundle)["graphs"]
    described["text_encoder"]["outputs"][0]["name"] = "other"
    rewrite(bundle, graphs=described)


BAD: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "truncated": (lambda b: damage(b, lambda content: content[:-1]), 6, "is not the file that was built"),
    "changed": (lambda b: damage(b, lambda content: content[:-1] + b"!"), 6, "is not the file that was built"),
    "missing": (lambda b: (b / "engines" / "text_encoder.engine").unlink(), 6, "is missing or cannot be read"),
    "foreign": (
        lambda b: finish(Bundle.open(b), change=lambda ranges: ranges, version="10.0"),
        3,
        "cannot load the engine text_encoder",
    ),
    "profiles": (other_profiles, 6, "the engine text_encoder is not the one its manifest describes"),
    "sm": (lambda b: rewrite(b, target=manifest(b)["target"] | {"sms": [80, 89]}), 3, "are for another GPU"),
    "version": (
        lambda b: rewrite(b, target=manifest(b)["target"] | {"backend_version": "10.0"}),
        3,
        "were built by another tensorrt",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_an_engine_that_does_not_fit_is_refused_as_python_refuses_it(
    name: str, start: Callable[..., Doubles], engine_bundle: Path, tmp_path: Path
) -> None:
    change, code, words = BAD[name]
    bundle = Path(shutil.copytree(engine_bundle, tmp_path / "bad.hstb"))
    change(bundle)
    with pytest.raises(HstError) as theirs:
        pipeline(bundle, FakeDevice())("a red apple", height=HEIGHT, width=WIDTH)
    if manifest(bundle)["target"]["backend_version"] == "11.4.0":  # of Python's double
        rewrite(bundle, target=manifest(bundle)["target"] | {"backend_version": TARGETS["tensorrt"][1]})
    host = start()

    def ours() -> None:
        host.open(bundle)
        draw(host)

    found, text = refused(ours)
    assert found == theirs.value.exit_code == code
    assert words in text
    assert words in theirs.value.problem


def test_a_renamed_tensor_is_refused(start: Callable[..., Doubles], engines: Callable[..., Path]) -> None:
    bundle, host = engines(), start()
    renamed_output(bundle)
    host.open(bundle)
    code, text = refused(lambda: draw(host))
    assert (code, text.splitlines()[:2]) == (
        6,
        ["the engine text_encoder is not the one its manifest describes", "found: hidden_states, other"],
    )


def test_shapes_without_a_profile_are_refused(start: Callable[..., Doubles], engine_bundle: Path, tmp_path: Path) -> None:
    bundle, host = Path(shutil.copytree(engine_bundle, tmp_path / "pinned.hstb")), start()
    finish(Bundle.open(bundle), change=lambda ranges: ranges[:1])
    rewrite(bundle, target=manifest(bundle)["target"] | {"backend_version": TARGETS["tensorrt"][1]})
    host.open(bundle)
    code, text = refused(lambda: draw(host, height=64, width=64))
    assert code == 3
    assert "has no profile for " in text


def test_a_bundle_of_the_other_backend_is_refused(
    built: Path, start: Callable[..., Doubles], engines: Callable[..., Path]
) -> None:
    bundle, host = engines("rtx"), start("tensorrt")
    code, text = refused(lambda: host.open(bundle))
    assert (code, text.splitlines()[1]) == (4, "found: it has tensorrt, the bundle is for tensorrt-rtx")
    plain = Library(built / "libhst_trt.so")
    code, text = refused(lambda: HostPipeline(HostBundle(plain, bundle)))
    assert (code, text.splitlines()[:2]) == (
        4,
        ["this library was built without the backend of the bundle", "found: tensorrt-rtx"],
    )


def test_what_is_wrong_with_the_driver_is_said(
    start: Callable[..., Doubles], engines: Callable[..., Path], tmp_path: Path
) -> None:
    bundle, host = engines(), start()
    host.set(gpus=0)
    code, text = refused(lambda: host.open(bundle))
    assert (code, text.splitlines()[:2]) == (
        4,
        ["there is no NVIDIA GPU to run on", "found: there is a driver, but it shows no GPU"],
    )
    host.set(gpus=2)
    assert refused(lambda: host.open(bundle, device=2)) == (
        4,
        "there is no GPU number 2\nfound: 2 GPU(s), numbered from 0\nto do: give another device",
    )
    code = "int cuDriverGetVersion(int *version) { *version = 11010; return 0; }"
    old = tmp_path / "old"
    old.mkdir()
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-Wl,-soname,libcuda.so.1", "-o", old / "libcuda.so.1", "-"]
    subprocess.run(command, input=code, text=True, check=True)
    assert refused(lambda: start(driver=old).open(bundle)) == (
        3,
        "the NVIDIA driver is too old\nfound: it knows CUDA 11.1, and has no cuInit\nto do: update the driver",
    )


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_engines_of_tensorrt_rtx_are_verified_and_refused_without_a_driver(
    start: Callable[..., Doubles], tiny_rtx_bundle: Path, tmp_path: Path
) -> None:
    host = start("rtx", driver=tmp_path)
    code, text = refused(lambda: host.open(tiny_rtx_bundle))
    problem, found, fix = text.splitlines()
    assert (code, problem) == (4, "there is no NVIDIA GPU to run on")
    assert found.startswith("found: no NVIDIA driver: libcuda.so.1: ")
    assert "`hst-trt build --gpu cpu`" in fix
    damaged = Path(shutil.copytree(tiny_rtx_bundle, tmp_path / "damaged.hstb"))
    with (damaged / "tokenizers" / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert refused(lambda: host.open(damaged))[0] == 6


def test_the_library_of_another_version_is_refused_before_anything_of_it_runs(
    start: Callable[..., Doubles], engines: Callable[..., Path]
) -> None:
    """Of TensorRT-RTX itself: it is opened and asked, which needs no GPU."""
    libraries = pytest.importorskip("tensorrt_rtx_libs", reason='needs TensorRT-RTX: pip install "hst_trt[rtx]"')
    real = Path(libraries.__path__[0]) / "libtensorrt_rtx.so.1"
    host = start("rtx", HST_TENSORRT=str(real))
    code, text = refused(lambda: host.open(engines("rtx")))
    assert code == 3
    assert text.startswith("this library was built for another version of TensorRT-RTX\nfound: ")
    version = pytest.importorskip("tensorrt_rtx").__version__
    assert f"is {version}, the headers were those of 1.99" in text


@pytest.mark.parametrize(
    ("library", "code", "words"),
    [("/nowhere.so", 4, "could not be opened"), ("libm.so.6", 3, "is not TensorRT")],
    ids=["missing", "something else"],
)
def test_a_library_that_is_not_tensorrt_is_refused(
    library: str, code: int, words: str, start: Callable[..., Doubles], engines: Callable[..., Path]
) -> None:
    found, text = refused(lambda: start(HST_TENSORRT=library).open(engines()))
    assert found == code
    assert words in text.splitlines()[0]
    assert text.splitlines()[2].startswith("to do: install TensorRT, and give the path of its libnvinfer.so.11")


# -- what it is built from ---------------------------------------------------------------------------------------------------
def test_the_kernel_in_the_library_is_the_one_in_row_move_cu() -> None:
    sys.path.insert(0, str(SOURCES.parents[1] / "scripts"))
    from cuda.bindings import nvrtc
    from host_row_move import TARGET, included

    assert TARGET.read_text(encoding="ascii") == included(), (
        f"run scripts/host_row_move.py; NVRTC is {nvrtc.nvrtcVersion()[1:]}, another one may write it otherwise"
    )


@pytest.mark.slow
@pytest.mark.skipif("TENSORRT_ROOT" not in os.environ, reason="needs TensorRT's own headers, under TENSORRT_ROOT")
def test_the_backend_compiles_with_tensorrts_own_headers(tmp_path: Path) -> None:
    for command in (
        ["cmake", "-S", SOURCES, "--preset", "release", "-B", tmp_path],
        ["cmake", "--build", tmp_path, "--target", "hst_trt"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert list(tmp_path.glob("**/tensorrt_backend.cpp.o"))
