"""What only a GPU can show: the CUDA layer itself, replay against plain execution, and real engines.

The exactness tests run there too, as their ``torch-cuda`` variants. Everything here skips with its reason where there is no
GPU, so what has never run is not taken for tested.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import pair, random_text, spec_of, torch_backend

from hst_trt.denoise import denoise
from hst_trt.errors import MissingError, ResourceError
from hst_trt.models.sd3 import patchify
from hst_trt.noise import torch_randn
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule, PlanRequest, StitchPlan, make_plan, token_buckets
from hst_trt.runtime.cuda import CudaDevice, compile_kernel
from hst_trt.runtime.ort import HostBuffer, OnnxRuntimeBackend
from hst_trt.runtime.row_move import RowMove, cache_table, kernel_source
from hst_trt.runtime.staging import Staging
from hst_trt.runtime.tensorrt import TensorRTBackend
from hst_trt.runtime.torch_eager import TorchBackend
from hst_trt.schedule import FlowMatchEuler
from hst_trt.workspace import RequestShape, Workspace

pytestmark = pytest.mark.gpu

H, W, STEPS = 6, 10, 8
N = H * W
PLANS = {
    "hybrid": dict(stages=(2, 5, 1)),
    "correction": dict(stages=(0, 6, 2), correction=0.9),
    "refresh": dict(stages=(2, 5, 1), refresh_every=2, mask=MaskRule(ratio=0.4, drift=0.3, starvation=0.2)),
    "threshold": dict(stages=(2, 5, 1), mask=MaskRule(threshold=1.2)),
    "ras": dict(schedule="ras", stages=(3, 5, 0)),
    "t-stitch": dict(schedule="t-stitch", stages=(4, 0, 4)),
}


# -- the CUDA layer ----------------------------------------------------------------------------------------------------
def or_skip(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except MissingError as exc:
        pytest.skip(f"{exc.problem}: {exc.found}")


@pytest.fixture
def device() -> CudaDevice:
    return or_skip(CudaDevice)


def test_bytes_go_to_the_device_and_back_also_through_a_replayed_graph(device: CudaDevice) -> None:
    staging = Staging(device)
    source, target = (device.allocate(1024, "a buffer") for _ in range(2))
    values = np.arange(256, dtype=np.int32)
    staging.write(values, source.address)
    device.fill(target.address, 0, 1024)
    graph = device.capture(lambda: device.copy(source.address, target.address, 1024))
    assert not staging.read(target.address, 1024).any(), "what is recorded is not executed"
    for factor in (1, 2):
        staging.write(values * factor, source.address)
        graph.launch()
        np.testing.assert_array_equal(staging.read(target.address, 1024).view(np.int32), values * factor)


def test_time_between_two_marks_is_positive_and_waits_once(device: CudaDevice) -> None:
    buffer = device.allocate(2**28, "a buffer")
    start = device.record()
    for byte in range(20):
        device.fill(buffer.address, byte, 2**28)
    end = device.record()
    before = device.waits
    assert 1e-4 < device.seconds(start, end) < 10
    assert device.seconds(start, end) > 0
    assert device.waits - before <= 1


def test_more_memory_than_there_is_is_refused_and_less_still_given(device: CudaDevice) -> None:
    _, total = device.memory()
    with pytest.raises(ResourceError, match="MiB"):
        device.allocate(2 * total, "everything twice")
    assert device.allocate(2**20, "a little").address % 256 == 0


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_the_row_move_kernel_does_what_numpy_does(device: CudaDevice, dtype: str) -> None:
    rng = np.random.default_rng(0)
    n, images, rows, heads, text, first = 96, 2, 4, 5, 7, 40
    shapes, text_rows = [(rows, heads, text + n, 64), (rows, heads, n + 3, 64)], [text, 0]
    caches = [rng.integers(0, 2**15, shape).astype(dtype) for shape in shapes]
    partner = np.tile(np.arange(n), (images, 1))
    for image in range(images):
        leaving, entering = rng.permutation(first)[:9], first + rng.permutation(n - first)[:9]
        partner[image, entering], partner[image, leaving] = leaving, entering
    staging = Staging(device)
    there = [device.allocate(cache.nbytes, "a cache") for cache in caches]
    for cache, memory in zip(caches, there, strict=True):
        staging.write(cache, memory.address)
    table = cache_table([memory.address for memory in there], shapes, text_rows)
    table_there, partner_there = device.allocate(table.nbytes, "a table"), device.allocate(partner.nbytes, "partners")
    staging.write(table, table_there.address)
    staging.write(partner, partner_there.address)
    kernel = or_skip(lambda: device.kernel(kernel_source(), "move_rows"))
    move = RowMove(device, kernel, table_there.address, shapes, np.dtype(dtype).itemsize)
    move.enqueue(partner_there.address, images, n, first)
    OnnxRuntimeBackend({}).move_rows([HostBuffer.of(c) for c in caches], HostBuffer.of(partner), first, text_rows)
    for cache, memory in zip(caches, there, strict=True):
        moved = staging.read(memory.address, cache.nbytes).view(dtype).reshape(cache.shape)
        np.testing.assert_array_equal(moved, cache)


def test_a_kernels_arguments_are_passed_by_value(device: CudaDevice) -> None:
    source = 'extern "C" __global__ void store(int* to, int value, long long factor) { *to = value * (int)factor; }'
    memory = device.allocate(4, "a number")
    arguments = [(memory.address, ctypes.c_void_p), (7, ctypes.c_int), (-6, ctypes.c_longlong)]
    device.launch(or_skip(lambda: device.kernel(source, "store")), (1, 1, 1), 1, arguments)
    assert Staging(device).read(memory.address, 4).view(np.int32)[0] == -42


# -- torch: the loop's logic where there is no TensorRT ------------------------------------------------------------------
def needs_torch_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a torch that can use it")


def plan_of(settings: dict[str, Any]) -> StitchPlan:
    return make_plan(
        PlanRequest(**{"schedule": "hybrid", "num_steps": STEPS, "num_tokens": N, "buckets": token_buckets(N)} | settings)
    )


def begin(ws: Workspace, plan: StitchPlan, seed: int = 1) -> None:
    noise = patchify(torch.from_numpy(torch_randn(seed, (2, 4, 2 * H, 2 * W)))).numpy()
    ws.begin(noise, random_text(4, ws.spec), FlowMatchEuler(3.0).table(len(plan.steps)), 3.0, plan.mask, plan.correction)


@pytest.mark.parametrize("name", list(PLANS))
def test_replayed_steps_equal_plain_ones_bit_for_bit(name: str) -> None:
    needs_torch_cuda()
    models, plan = pair("sd35-medium"), plan_of(PLANS[name])
    backend = torch_backend(*models, device="cuda")
    spec, shape = spec_of(*models), RequestShape(2, True, H, W)
    plain = Workspace(backend, spec, shape, record=False)
    begin(plain, plan)
    denoise(plain, plan)
    assert plain.seconds["large"] > 0
    ws = Workspace(backend, spec, shape)
    for number in range(3):
        begin(ws, plan)
        denoise(ws, plan)
        np.testing.assert_array_equal(ws.latents, plain.latents, err_msg=f"request {number}")
    assert backend.graphs.fallen_back == 0
    assert backend.graphs.replayed >= 2 * STEPS
    begin(ws, plan, seed=2)
    begin(plain, plan, seed=2)
    denoise(ws, plan)
    denoise(plain, plan)
    np.testing.assert_array_equal(ws.latents, plain.latents, err_msg="another seed")


def test_a_replayed_loop_makes_torch_wait_for_nothing() -> None:
    needs_torch_cuda()
    models, plan = pair("sd35-large"), plan_of(PLANS["hybrid"])
    ws = Workspace(torch_backend(*models, device="cuda"), spec_of(*models), RequestShape(2, True, H, W))
    for mode in ("default", "default", "error"):
        begin(ws, plan)
        torch.cuda.set_sync_debug_mode(mode)  # "error": torch raises where an operation of its own would wait
        try:
            denoise(ws, plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(ws.latents).all()


def test_a_body_that_cannot_be_captured_runs_plainly_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    needs_torch_cuda()
    backend = TorchBackend({}, device="cuda")
    recorder = backend.recorder()
    assert recorder is not None
    buffer, one = backend.empty((4,), "float32"), backend.empty((4,), "float32")
    backend.write(one, np.float32(1.0))

    def body() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while a stream is captured")
        with torch.cuda.stream(backend._stream):
            buffer.add_(one)

    before = torch.cuda.current_stream()
    for _ in range(3):
        recorder.run("refused", body)
    np.testing.assert_array_equal(backend.read(buffer), 3)
    assert backend.graphs.fallen_back == 1
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == before


# -- engines -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def engines(request: pytest.FixtureRequest, tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair built in bfloat16 for the GPU that is here."""
    gpu = or_skip(CudaDevice)
    or_skip(lambda: compile_kernel(kernel_source(), gpu.sm))
    if importlib.util.find_spec(request.param.replace("-", "_")) is None:
        pytest.skip(f"{request.param} is not installed")
    from hst_trt.builder.build import build_bundle
    from hst_trt.recipe import load_recipe, load_target

    name = "rtx" if request.param == "tensorrt-rtx" else "h100"
    if request.param == "tensorrt-rtx" and gpu.sm not in load_target("rtx").sms:
        pytest.skip(f"TensorRT-RTX has no target for compute capability {gpu.sm / 10}")
    target = load_target(name).model_copy(update={"sms": (gpu.sm,)})
    recipe = load_recipe(str(tiny_pair.with_name("tiny.toml")))
    return build_bundle(recipe, target, tmp_path_factory.mktemp("engines") / f"tiny-{name}.hstb").bundle.path


@pytest.mark.parametrize("name", list(PLANS))
def test_engines_draw_what_the_graphs_draw_on_the_cpu_and_replay_bit_for_bit(
    name: str, engines: Path, tiny_bundle: Path
) -> None:
    settings = {"schedule": "hybrid"} | PLANS[name]
    arguments: dict[str, Any] = dict(prompt="a red apple", seed=3, num_inference_steps=STEPS, output_type="latent", **settings)
    pipe = HybridStitchPipeline.from_bundle(engines)
    assert isinstance(pipe.backend, TensorRTBackend)
    first, *others = (pipe(**arguments) for _ in range(3))
    for other in others:
        np.testing.assert_array_equal(other.images, first.images)
    assert pipe.backend.graphs.fallen_back == 0
    assert pipe.backend.graphs.replayed >= 2 * STEPS
    theirs = HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)(**arguments).images
    distance = np.abs(first.images - theirs).mean() / np.abs(theirs).mean()
    assert distance < 0.1, "bfloat16 against float32, and masks may differ in near-ties"


def test_low_vram_draws_the_same_picture_with_less_memory(engines: Path) -> None:
    arguments: dict[str, Any] = dict(prompt="a red apple", seed=3, num_inference_steps=STEPS, output_type="np")
    usual = HybridStitchPipeline.from_bundle(engines)(**arguments).images
    np.testing.assert_array_equal(HybridStitchPipeline.from_bundle(engines, low_vram=True)(**arguments).images, usual)
