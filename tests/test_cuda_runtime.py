"""The TensorRT backend on doubles of CUDA and TensorRT that run the exported graphs: pictures, recordings, memory, refusals."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_bundle import PINNED, VERSION, finish, pipeline, rewrite
from fake_cuda import FakeDevice, FakeTensorRT

from hst_trt.backends import open_bundle
from hst_trt.bench import bench_calls
from hst_trt.bundle import Bundle, ProfileEntry
from hst_trt.errors import HstError, IncompatibleError, IntegrityError, NumericsError, ResourceError
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule
from hst_trt.runtime.graphs import GraphCache
from hst_trt.runtime.tensorrt import TensorRTBackend, _logger
from hst_trt.runtime.trt_engine import ErrorLog, fitting_profile
from hst_trt.workspace import RequestShape

HEIGHT, WIDTH = 16 * PINNED[0], 16 * PINNED[1]
SCHEDULES: dict[str, dict[str, Any]] = {
    "hybrid": dict(stages=(2, 3, 1)),
    "hybrid-from-the-first-step": dict(stages=(0, 4, 2), correction=0.9),
    "refresh-and-drift": dict(stages=(1, 5, 0), refresh_every=2, mask=MaskRule(ratio=0.4, drift=0.3, starvation=0.2)),
    "threshold": dict(stages=(2, 3, 1), mask=MaskRule(threshold=1.2)),
    "random": dict(stages=(2, 3, 1), mask=MaskRule(random_seed=3)),
    "correction": dict(stages=(2, 0, 4), correction=0.9),
    "large": dict(schedule="large"),
    "small": dict(schedule="small"),
    "t-stitch": dict(schedule="t-stitch"),
    "srdiffusion": dict(schedule="srdiffusion"),
    "adaptive": dict(schedule="hybrid", adaptive=True),
    "ras": dict(schedule="ras"),
    "unguided": dict(stages=(2, 3, 1), guidance_scale=1.0),
}
WAITS = ("threshold", "adaptive")  # the host has to know a number


@pytest.fixture(scope="module")
def cpu(tiny_bundle: Path) -> HybridStitchPipeline:
    return HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)


@pytest.fixture
def engines_copy(engine_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(engine_bundle, tmp_path / "copied.hstb"))


def draw(pipe: HybridStitchPipeline, **arguments: Any) -> Any:
    defaults = dict(seed=3, height=HEIGHT, width=WIDTH, num_inference_steps=6, output_type="latent")
    return pipe("a red apple", **defaults | arguments)


def same(ours: Any, theirs: Any) -> bool:
    return bool(np.abs(ours.images - theirs.images).max() <= 1e-5 * np.abs(theirs.images).max())


def backend(pipe: HybridStitchPipeline) -> TensorRTBackend:
    assert isinstance(pipe.backend, TensorRTBackend)
    return pipe.backend


# -- pictures ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_schedule_gives_what_onnx_runtime_gives_plain_recorded_and_replayed(
    name: str, cpu: HybridStitchPipeline, engine_bundle: Path
) -> None:
    expected = draw(cpu, **SCHEDULES[name])
    gpu = pipeline(engine_bundle)
    first, second, third = (draw(gpu, **SCHEDULES[name]) for _ in range(3))
    assert same(first, expected)
    assert [r.tokens for r in first.stats.records] == [r.tokens for r in expected.stats.records]
    np.testing.assert_array_equal(second.images, first.images)
    np.testing.assert_array_equal(third.images, first.images)
    assert backend(gpu).graphs.fallen_back == 0


def test_images_in_a_batch_and_pixels_equal_onnx_runtimes_too(cpu: HybridStitchPipeline, engine_bundle: Path) -> None:
    arguments = dict(seed=[5, 6], num_images_per_prompt=2, height=64, width=144, output_type="np", stages=(1, 4, 1))
    gpu = pipeline(engine_bundle)
    for _ in range(2):
        ours, theirs = draw(gpu, **arguments), draw(cpu, **arguments)
        assert ours.images.shape == (2, 64, 144, 3)
        assert np.abs(ours.images - theirs.images).max() <= 1 / 255


def test_kept_masks_and_a_callbacks_latents_are_onnx_runtimes(cpu: HybridStitchPipeline, engine_bundle: Path) -> None:
    def halve(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] / 2} if step == 2 else {}

    arguments: dict[str, Any] = dict(stages=(2, 3, 1), keep_masks=True, callback_on_step_end=halve)
    gpu, theirs = pipeline(engine_bundle), draw(cpu, **arguments)
    for _ in range(3):
        ours = draw(gpu, **arguments)
        assert same(ours, theirs)
        assert ours.masks.keys() == theirs.masks.keys() == {2, 3, 4}
        for step, mask in theirs.masks.items():
            np.testing.assert_array_equal(ours.masks[step], mask)


def test_any_order_of_requests_gives_what_each_gives_alone(cpu: HybridStitchPipeline, engine_bundle: Path) -> None:
    """Sizes, batches, guidance and schedules in turn: buffers, contexts and recordings of one must not reach another."""
    rng = np.random.default_rng(1)
    gpu = pipeline(engine_bundle)
    for _ in range(14):
        settings = SCHEDULES[str(rng.choice(list(SCHEDULES)))]
        height, width = (int(side) for side in rng.choice([(96, 128), (64, 80), (144, 64)]))
        images = int(rng.integers(1, 3))
        arguments: dict[str, Any] = dict(
            height=height, width=width, num_images_per_prompt=images, keep_masks=bool(rng.integers(2))
        )
        arguments |= dict(seed=int(rng.integers(100)), num_inference_steps=6) | settings
        assert same(draw(gpu, **arguments), draw(cpu, **arguments)), arguments


def test_low_vram_works_on_the_cpu_too(cpu: HybridStitchPipeline, tiny_bundle: Path) -> None:
    pipe = HybridStitchPipeline.from_bundle(tiny_bundle, threads=1, low_vram=True)
    for _ in range(2):
        np.testing.assert_array_equal(draw(pipe, output_type="np").images, draw(cpu, output_type="np").images)


def test_latents_that_are_not_finite_are_no_picture(engine_bundle: Path) -> None:
    latents = np.full((1, 16, 2 * PINNED[0], 2 * PINNED[1]), np.nan, np.float32)
    with pytest.raises(NumericsError) as caught:
        draw(pipeline(engine_bundle), seed=None, latents=latents)
    assert caught.value.exit_code == 7


# -- recordings and waits ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_host_waits_at_the_end_of_the_loop_and_not_in_it(name: str, engine_bundle: Path) -> None:
    device = FakeDevice()
    gpu = pipeline(engine_bundle, device)
    seen: list[int] = []
    ends: list[int] = []

    def on_step(t: int, record: Any) -> None:
        assert np.isnan(record.seconds), "asking for it would wait"
        seen.append(device.waits)

    for _ in range(2):
        seen.clear()
        output = draw(gpu, on_step=on_step, **SCHEDULES[name])
        ends.append(device.waits)
    assert len(seen) == 6
    assert (len(set(seen)) == 1) == (name not in WAITS)
    assert ends[-1] - seen[-1] == 3, "the loop's end, the check for finite values, the latents"
    assert all(record.seconds > 0 for record in output.stats.records)


def test_a_step_is_one_graph_launch_and_nothing_else(engine_bundle: Path) -> None:
    device = FakeDevice()
    gpu = pipeline(engine_bundle, device)
    for _ in range(2):
        draw(gpu, stages=(2, 3, 1))
    counts: list[tuple[int, int]] = []
    draw(gpu, stages=(2, 3, 1), on_step=lambda t, record: counts.append((device.launches, device.enqueued)))
    for before, after in itertools.pairwise(counts):
        assert after[0] - before[0] == 1
        assert after[1] - before[1] == 2, "the two marks that the step's time is taken with"
    assert draw(gpu, stages=(2, 3, 1)).stats.overhead is None, "calls are not timed one by one"


def test_recordings_serve_other_seeds_prompts_scales_and_step_counts(cpu: HybridStitchPipeline, engine_bundle: Path) -> None:
    gpu = pipeline(engine_bundle)
    for _ in range(2):
        draw(gpu, stages=(2, 4, 2), num_inference_steps=8)
    counters = backend(gpu).graphs
    plain, recorded = counters.plain, counters.recorded
    for arguments in (
        dict(seed=9, stages=(2, 4, 2), num_inference_steps=8),
        dict(seed=4, stages=(5, 9, 6), num_inference_steps=20, guidance_scale=5.0, negative_prompt="blue"),
        dict(stages=(3, 5, 1), num_inference_steps=9, mask=MaskRule(decay=0.5, drift=0.2)),
    ):
        last = arguments["stages"] != (3, 5, 1)  # drift looks back, which is one verb more in every step
        assert same(draw(gpu, **arguments), draw(cpu, **arguments))
        assert ((counters.plain, counters.recorded) == (plain, recorded)) == last


def test_each_mask_size_has_recordings_of_its_own(cpu: HybridStitchPipeline, engine_bundle: Path) -> None:
    gpu = pipeline(engine_bundle)
    for ratio in (0.2, 0.5, 0.2, 0.5, 0.75, 0.2):
        arguments: dict[str, Any] = dict(stages=(1, 4, 1), mask=MaskRule(ratio))
        assert same(draw(gpu, **arguments), draw(cpu, **arguments)), ratio


def test_few_recordings_at_a_time_give_the_same_pictures(
    engine_bundle: Path, cpu: HybridStitchPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = pipeline(engine_bundle)
    ours = backend(gpu)
    monkeypatch.setattr(ours, "recorder", lambda: GraphCache(ours.device.capture, ours.graphs, capacity=2))
    for name in ("hybrid", "threshold", "hybrid", "ras"):
        assert same(draw(gpu, **SCHEDULES[name]), draw(cpu, **SCHEDULES[name]))
    assert ours.graphs.evicted > 3


@pytest.mark.parametrize("cause", ["device", "context"])
def test_where_nothing_can_be_captured_calls_are_enqueued_with_one_warning(
    cause: str, engine_bundle: Path, engines_copy: Path, cpu: HybridStitchPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    if cause == "context":
        finish(Bundle.open(engines_copy), capturable=False)
    device = FakeDevice(captures=cause == "context")
    gpu = pipeline(engines_copy, device)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert same(draw(gpu, stages=(2, 3, 1)), draw(cpu, stages=(2, 3, 1)))
    assert len(caplog.records) == 1
    assert "enqueued one by one" in caplog.text
    assert backend(gpu).graphs.fallen_back > 3
    assert device.launches == 0


def test_two_workspaces_side_by_side_do_not_disturb_each_others_recordings(engine_bundle: Path) -> None:
    gpu = pipeline(engine_bundle)
    expected = [draw(gpu, stages=(2, 3, 1)).images for _ in range(3)][-1]
    plan = gpu.plan(height=HEIGHT, width=WIDTH, num_inference_steps=6)
    bench = bench_calls(gpu, plan, RequestShape(1, True, *PINNED), rounds=1, warmup=0)
    assert all(sample.median > 0 for sample in bench.seconds.values())
    np.testing.assert_array_equal(draw(gpu, stages=(2, 3, 1)).images, expected)


# -- memory ----------------------------------------------------------------------------------------------------------------
def test_weights_are_loaded_once_and_contexts_share_one_arena(engine_bundle: Path) -> None:
    device = FakeDevice()
    trt = FakeTensorRT(device)
    opened = Bundle.open(engine_bundle)
    gpu = HybridStitchPipeline(opened, TensorRTBackend(opened, device, trt))
    for name in ("hybrid", "threshold", "large", "t-stitch"):
        draw(gpu, output_type="np", **SCHEDULES[name])
    assert len(trt.deserialised) == len(set(trt.deserialised))
    assert sum(context.engine.table["graph"].endswith("large/model.onnx") for context in trt.contexts) >= 3
    alive = trt.contexts
    assert len({context.memory for context in alive}) == 1
    need = max(context.update_device_memory_size_for_shapes() for context in alive)
    assert alive[0].memory[1] == need, "as large as the largest needs"


def test_a_context_that_does_not_say_what_it_needs_gets_the_most_that_its_engine_may_need(
    engines_copy: Path, cpu: HybridStitchPipeline
) -> None:
    finish(Bundle.open(engines_copy), answers_zero=True)
    assert same(draw(pipeline(engines_copy), stages=(2, 3, 1)), draw(cpu, stages=(2, 3, 1)))


def test_each_bucket_has_a_context_with_its_pinned_profile_and_another_size_the_range(engine_bundle: Path) -> None:
    device = FakeDevice()
    trt = FakeTensorRT(device)
    opened = Bundle.open(engine_bundle)
    gpu = HybridStitchPipeline(opened, TensorRTBackend(opened, device, trt))
    ranges = len(opened.manifest.engines["large"].profiles) - 1

    def profiles_used(**arguments: Any) -> dict[int, int]:
        before = trt.contexts
        draw(gpu, **arguments)
        made = [context for context in trt.contexts if context not in before]
        large = [context for context in made if context.engine.table["graph"].endswith("large/model.onnx")]
        return {context.axes["M"]: context.profile for context in large}

    pinned = profiles_used(stages=(2, 3, 1), mask=MaskRule(ratio=0.5))
    assert pinned.keys() == {24, 48}
    assert all(opened.manifest.engines["large"].profiles[p].axes["M"] == (m, m, m) for m, p in pinned.items())
    other = profiles_used(height=80, width=80, stages=(2, 3, 1))
    assert other == {8: ranges, 25: ranges}
    batch = profiles_used(seed=[1, 2], num_images_per_prompt=2, stages=(2, 3, 1))
    assert set(batch.values()) == {ranges}, "the pinned ones are for one image"


def test_a_full_gpu_ends_the_request_and_leaves_the_pipeline_working(engine_bundle: Path) -> None:
    device = FakeDevice()
    gpu = pipeline(engine_bundle, device)
    expected = draw(gpu, output_type="np").images
    enough = device.most_used
    draw(gpu, output_type="np", num_images_per_prompt=4)
    too_little = (enough + device.most_used) // 2
    engines = json.loads((engine_bundle / "manifest.json").read_text())["engines"]
    weights = {
        name: json.loads((engine_bundle / engine["path"]).read_text())["weight_bytes"] for name, engine in engines.items()
    }

    device = FakeDevice(memory=too_little)
    gpu = pipeline(engine_bundle, device)
    np.testing.assert_array_equal(draw(gpu, output_type="np").images, expected)
    kept: list[HstError] = []
    for _ in range(2):
        with pytest.raises(ResourceError, match="MiB") as caught:
            draw(gpu, output_type="np", num_images_per_prompt=4)
        kept.append(caught.value)  # whoever keeps the error must not keep the memory
        assert caught.value.exit_code == 5
        free, total = device.memory()
        assert total - free == sum(weights[name] for name in backend(gpu)._engines), "nothing but the engines is left"
        np.testing.assert_array_equal(draw(gpu, output_type="np").images, expected)


def test_an_engine_that_does_not_fit_says_so(engine_bundle: Path) -> None:
    with pytest.raises(ResourceError, match=r"the engine .* needs"):
        draw(pipeline(engine_bundle, FakeDevice(memory=2**20 + 2**19)))


def test_low_vram_frees_engines_between_the_parts_of_a_request(engine_bundle: Path) -> None:
    usual, small = FakeDevice(), FakeDevice()
    expected = draw(pipeline(engine_bundle, usual), output_type="np").images
    trt = FakeTensorRT(small)
    opened = Bundle.open(engine_bundle)
    gpu = HybridStitchPipeline(opened, TensorRTBackend(opened, small, trt), low_vram=True)
    gpu.load(gpu.plan())
    assert not trt.deserialised
    for number in (1, 2):
        np.testing.assert_array_equal(draw(gpu, output_type="np").images, expected)
        assert trt.deserialised.count("large/model") == number
    order = list(dict.fromkeys(trt.deserialised))
    assert order.index("text_encoder_2/model") < order.index("large/model") < order.index("vae_decoder/model")
    weights = 2**20
    assert small.most_used <= usual.most_used - 3 * weights


def test_a_pipeline_that_is_gone_has_freed_everything(engine_bundle: Path) -> None:
    device = FakeDevice()
    gpu = pipeline(engine_bundle, device)
    gc.disable()
    try:
        for _ in range(3):
            draw(gpu, output_type="np")
        assert device.memory()[0] < device.memory()[1]
        del gpu
        assert device.memory()[0] == device.memory()[1], "without the garbage collector's help"
    finally:
        gc.enable()


# -- TensorRT-RTX ------------------------------------------------------------------------------------------------------------
def test_rtx_contexts_neither_capture_nor_change_kernels_by_themselves_and_compiled_kernels_are_kept(
    engine_bundle: Path, cpu: HybridStitchPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = FakeDevice()
    trt = FakeTensorRT(device, rtx=True)
    opened = Bundle.open(engine_bundle)
    gpu = HybridStitchPipeline(opened, TensorRTBackend(opened, device, trt))
    for _ in range(2):
        assert same(draw(gpu), draw(cpu))
    for context in trt.contexts:
        assert context.config.cuda_graph_strategy.name == "DISABLED"
        assert context.config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert len({id(context.config.cache) for context in trt.contexts}) == 1
    assert not list(tmp_path.rglob("*.cache"))
    del gpu, context
    (kept,) = tmp_path.rglob("*.cache")
    assert kept.read_bytes() == b"compiled"
    assert f"{VERSION}-sm90" in kept.name


def test_the_doubles_have_no_method_that_the_real_module_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason='needs TensorRT-RTX: pip install "hst_trt[rtx]"')
    ours = {"scratch", "axes", "strategy", "cache", "content"}  # of the doubles themselves
    engine = {"num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"}  # set when one is made
    for double, real, more in (
        (fake_cuda._Runtime, trt.Runtime, {"engine_host_code_allowed"}),
        (fake_cuda._Engine, trt.ICudaEngine, engine),
        (fake_cuda._Context, trt.IExecutionContext, {"is_stream_capturable"}),
        (fake_cuda._Config, trt.IRuntimeConfig, {"cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"}),
        (fake_cuda._RuntimeCache, trt.IRuntimeCache, set()),
    ):
        names = {name for name in vars(double) if not name.startswith("_")} - ours | more
        assert not [name for name in names if not hasattr(real, name)]
    for kind, names in (
        ("ILogger", ("INTERNAL_ERROR", "ERROR", "WARNING")),
        ("ExecutionContextAllocationStrategy", ("USER_MANAGED",)),
        ("CudaGraphStrategy", ("DISABLED",)),
        ("DynamicShapesKernelSpecializationStrategy", ("EAGER",)),
        ("DataType", ("FLOAT", "HALF", "BF16", "INT64", "INT32", "UINT8")),
    ):
        assert all(hasattr(getattr(trt, kind), name) for name in names), kind


def test_what_tensorrt_logs_as_an_error_is_kept_for_the_exception() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason='needs TensorRT-RTX: pip install "hst_trt[rtx]"')
    errors = ErrorLog()
    logger = _logger(trt, errors)
    logger.log(trt.ILogger.INFO, "a fact")
    logger.log(trt.ILogger.ERROR, "a reason")
    logger.log(trt.ILogger.INTERNAL_ERROR, "another")
    assert errors.take() == "a reason; another"
    assert errors.take() == "TensorRT gave no reason"


# -- refusals ----------------------------------------------------------------------------------------------------------------
def refused(error: type[HstError], code: int, call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert caught.value.exit_code == code
    assert caught.value.fix
    return str(caught.value)


def test_engines_of_another_gpu_are_refused(engine_bundle: Path) -> None:
    text = refused(IncompatibleError, 3, lambda: pipeline(engine_bundle, FakeDevice(sm=80)))
    assert "compute capability 8.0" in text
    assert "9.0" in text
    assert "hst-trt build --gpu auto" in text


def test_engines_of_another_tensorrt_are_refused(engine_bundle: Path) -> None:
    text = refused(IncompatibleError, 3, lambda: pipeline(engine_bundle, version="10.15.1"))
    assert "10.15.1 is installed" in text
    assert VERSION in text


def test_engines_of_another_system_are_refused_before_anything_of_a_gpu_is_asked(engines_copy: Path) -> None:
    table = json.loads((engines_copy / "manifest.json").read_text())
    rewrite(engines_copy, target=table["target"] | {"os": "windows"})
    assert "windows" in refused(IncompatibleError, 3, lambda: HybridStitchPipeline.from_bundle(engines_copy))


def test_a_bundle_without_its_engines_is_refused_and_the_build_command_named(engines_copy: Path) -> None:
    rewrite(engines_copy, state="graphs")
    assert "hst-trt build --gpu h100" in refused(IncompatibleError, 3, lambda: open_bundle(engines_copy))


def test_a_bundle_of_an_older_version_is_refused_and_the_missing_graph_named(engines_copy: Path) -> None:
    table = json.loads((engines_copy / "manifest.json").read_text())
    del table["graphs"]["advance"]
    rewrite(engines_copy, graphs=table["graphs"])
    assert "advance" in refused(IncompatibleError, 3, lambda: open_bundle(engines_copy))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_engine_is_never_deserialised(damage: str, engines_copy: Path) -> None:
    path = engines_copy / "engines" / "large.engine"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "truncated" else content.replace(b"graph", b"grapf"))
    device = FakeDevice()
    trt = FakeTensorRT(device)
    gpu = HybridStitchPipeline(
        open_bundle(engines_copy), TensorRTBackend(Bundle.open(engines_copy, check_hashes=False), device, trt)
    )
    text = refused(IntegrityError, 6, lambda: draw(gpu))
    assert "large.engine" in text
    assert "hst-trt build --force" in text
    assert "large/model" not in trt.deserialised


def test_a_run_hashes_neither_graphs_nor_weights_which_it_does_not_read(engines_copy: Path) -> None:
    (engines_copy / "graphs" / "glue" / "pack.onnx").write_bytes(b"")
    hashed: list[tuple[int, int]] = []
    open_bundle(engines_copy, lambda done, total: hashed.append((done, total)))
    assert hashed[-1][0] == hashed[-1][1]
    (engines_copy / "tokenizers" / "tokenizer.json").write_bytes(b"{}")
    refused(IntegrityError, 6, lambda: open_bundle(engines_copy))


def test_an_engine_that_tensorrt_cannot_load_is_refused_with_its_words(engines_copy: Path) -> None:
    finish(Bundle.open(engines_copy), version="11.3.0")
    text = refused(IncompatibleError, 3, lambda: draw(pipeline(engines_copy)))
    assert "not compatible with this version" in text


def test_an_engine_of_another_graph_is_refused(engines_copy: Path) -> None:
    table = json.loads((engines_copy / "manifest.json").read_text())
    engines = table["engines"]
    rewrite(engines_copy, engines=engines | {"small": engines["small"] | {"path": engines["integrate"]["path"]}})
    text = refused(IntegrityError, 6, lambda: draw(pipeline(engines_copy), schedule="small"))
    assert "the engine small is not the one its manifest describes" in text


def test_a_shape_that_no_profile_takes_is_refused_with_the_shape_and_the_profiles(engines_copy: Path) -> None:
    finish(Bundle.open(engines_copy), change=lambda ranges: ranges[:-1] or ranges)  # the pinned ones alone, where there are any
    gpu = pipeline(engines_copy)
    draw(gpu, stages=(2, 3, 1))
    text = refused(IncompatibleError, 3, lambda: draw(gpu, height=80, width=80, schedule="large"))
    assert "the engine large has no profile for B = 2, M = 25" in text
    assert "M = 48" in text
    draw(gpu, stages=(2, 3, 1))


@pytest.mark.parametrize(
    ("axes", "expected"),
    [({"B": 2, "M": 8}, 0), ({"B": 2, "M": 16}, 1), ({"B": 2, "M": 24}, 2), ({"B": 1, "M": 8}, 3), ({"B": 8, "M": 900}, 3)],
)
def test_the_first_profile_that_takes_a_shape_is_chosen(axes: dict[str, int], expected: int) -> None:
    profiles = [
        ProfileEntry(axes={"B": (2, 2, 2), "M": (8, 8, 8)}),
        ProfileEntry(axes={"B": (2, 2, 2), "M": (16, 16, 16)}),
        ProfileEntry(axes={"B": (2, 2, 2), "M": (8, 32, 64)}),
        ProfileEntry(axes={"B": (1, 2, 8), "M": (1, 64, 1024)}),
    ]
    assert fitting_profile("large", profiles, axes) == expected


# -- the command line ------------------------------------------------------------------------------------------------------
def test_run_passes_the_gpu_and_how_to_use_its_memory_on(
    engine_bundle: Path, hst: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, Any] = {}

    def from_bundle(path: Path, **arguments: Any) -> HybridStitchPipeline:
        opened.update(arguments, path=path)
        return pipeline(path, low_vram=arguments["low_vram"])

    monkeypatch.setattr(HybridStitchPipeline, "from_bundle", from_bundle)
    result = hst("run", "--bundle", engine_bundle, "--prompt", "x", "--device", 1, "--low-vram", "--json", "--seed", 1)
    assert result.code == 0, result.err
    assert (opened["path"], opened["device"], opened["low_vram"]) == (engine_bundle, 1, True)
    (drawn,) = json.loads(result.out)["results"]
    assert drawn["overhead"] is None
    assert drawn["engine_seconds"] == {}
    assert sum(stage["seconds"] for stage in drawn["stages"].values()) > 0


def test_run_prints_no_share_outside_the_transformers_where_steps_are_replayed(
    engine_bundle: Path, hst: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HybridStitchPipeline, "from_bundle", lambda path, **_: pipeline(path))
    result = hst("run", "--bundle", engine_bundle, "--prompt", "x", "--seed", 1)
    assert result.code == 0, result.err
    assert "VAE" in result.out
    assert "outside the transformers" not in result.out
