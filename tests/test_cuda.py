"""The CUDA layer as far as it goes without a GPU: its errors, its calls' arguments, and its one kernel."""

from __future__ import annotations

import ctypes
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDevice, host_kernel

from hst_trt.errors import BuildError, HstError, IncompatibleError, MissingError, ResourceError
from hst_trt.runtime import cuda
from hst_trt.runtime.cuda import CudaDevice, compile_kernel
from hst_trt.runtime.graphs import CaptureError
from hst_trt.runtime.ort import HostBuffer, OnnxRuntimeBackend
from hst_trt.runtime.row_move import RowMove, cache_table, kernel_source

cudart: Any = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
HAS_GPU = not int(cudart.cudaGetDeviceCount()[0])


def bindings(monkeypatch: pytest.MonkeyPatch, **calls: Any) -> None:
    """cuda.bindings.runtime with some of its functions replaced."""
    changed = SimpleNamespace(**{name: getattr(cudart, name) for name in dir(cudart) if name.startswith("cuda")} | calls)
    monkeypatch.setattr(cuda, "_bindings", lambda name: changed)


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_driver_or_a_gpu_the_error_says_so_before_anything_is_touched() -> None:
    with pytest.raises(MissingError) as caught:
        CudaDevice()
    assert caught.value.exit_code == 4
    assert "no NVIDIA GPU" in str(caught.value)
    assert "hst-trt build --gpu cpu" in str(caught.value)


def test_a_driver_that_is_too_old_is_incompatible_and_both_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = cudart.cudaError_t
    bindings(
        monkeypatch,
        cudaGetDeviceCount=lambda: (error.cudaErrorInsufficientDriver, None),
        cudaDriverGetVersion=lambda: (error.cudaSuccess, 12020),
        cudaRuntimeGetVersion=lambda: (error.cudaSuccess, 13040),
    )
    with pytest.raises(IncompatibleError, match=r"12\.2.*13\.4") as caught:
        CudaDevice()
    assert caught.value.exit_code == 3


def test_a_gpu_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings(monkeypatch, cudaGetDeviceCount=lambda: (cudart.cudaError_t.cudaSuccess, 2))
    with pytest.raises(MissingError, match="GPU number 2"):
        CudaDevice(2)


def test_a_full_gpu_says_what_was_asked_and_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    error = cudart.cudaError_t
    bindings(
        monkeypatch,
        cudaMalloc=lambda size: (error.cudaErrorMemoryAllocation, None),
        cudaMemGetInfo=lambda: (error.cudaSuccess, 3 * 2**20, 80 * 2**30),
        cudaGetLastError=lambda: (error.cudaErrorMemoryAllocation,),
    )
    with pytest.raises(ResourceError, match=r"the cache needs 500 MiB[^0-9]*3\.00 MiB of 81920 MiB") as caught:
        without_gpu().allocate(500 * 2**20, "the cache")
    assert caught.value.exit_code == 5
    assert "--low-vram" in str(caught.value)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingError, match="cuda-python is not installed") as caught:
        CudaDevice()
    assert "pip install" in str(caught.value)


# -- calls -------------------------------------------------------------------------------------------------------------
def without_gpu() -> CudaDevice:
    """A device that was never opened."""
    device = object.__new__(CudaDevice)
    device._cudart = cuda._bindings("runtime")
    device.ordinal, device.stream, device.capturing, device.waits = 0, 0, False, 0
    device._unfreed, device._retired = [], []
    return device


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: it would be written to")
def test_every_call_is_one_that_the_bindings_take() -> None:
    """Without a driver a call of the right form returns an error code, which is translated; a wrong one raises TypeError."""
    device, host, event = without_gpu(), np.zeros(4, np.uint8), SimpleNamespace(handle=0)
    calls: dict[str, tuple[Any, ...]] = {
        "activate": (), "memory": (), "allocate": (16, "a buffer"), "pinned": (16,), "fill": (256, 0, 16),
        "copy": (256, 512, 16), "upload": (host, 256), "download": (256, host), "synchronize": (), "record": (),
        "seconds": (event, event), "launch_graph": (0,),
    }  # fmt: skip
    for name, arguments in calls.items():
        with pytest.raises(HstError):
            getattr(device, name)(*arguments)
    with pytest.raises(CaptureError):
        device.capture(lambda: None)
    device.free(256)
    device.free_pinned(256)
    device.destroy_event(cudart.cudaEvent_t(0))
    device.retire_graph(cudart.cudaGraphExec_t(0))
    untested = {"kernel", "launch"}  # of the driver's library, which is not there
    public = {name for name, _ in inspect.getmembers(CudaDevice, inspect.isfunction) if not name.startswith("_")}
    assert public == {*calls, *untested, "capture", "free", "free_pinned", "destroy_event", "retire_graph"}


def test_memory_that_is_freed_while_a_graph_is_recorded_is_freed_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    success, order = cudart.cudaError_t.cudaSuccess, []
    bindings(
        monkeypatch,
        cudaStreamBeginCapture=lambda *_: (success,),
        cudaStreamEndCapture=lambda _: (order.append("end"), (success, 7))[1],
        cudaGraphInstantiate=lambda *_: (success, 8),
        cudaGraphDestroy=lambda graph: (order.append(f"destroy {graph}"), (success,))[1],
        cudaFree=lambda address: (order.append(f"free {address}"), (success,))[1],
    )
    device = without_gpu()
    device.capture(lambda: device.free(42))
    assert order == ["end", "destroy 7", "free 42"]


def test_a_failure_while_a_graph_is_recorded_ends_the_recording_and_frees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    success, destroyed = cudart.cudaError_t.cudaSuccess, []
    bindings(
        monkeypatch,
        cudaStreamBeginCapture=lambda *_: (success,),
        cudaStreamEndCapture=lambda _: (success, 7),
        cudaGraphDestroy=lambda graph: (destroyed.append(graph), (success,))[1],
    )

    def fail() -> None:
        raise BuildError("the engine could not run", found="not while a stream is captured")

    device = without_gpu()
    with pytest.raises(CaptureError, match="not while a stream is captured"):
        device.capture(fail)
    assert destroyed == [7]
    assert not device.capturing


def test_the_double_has_the_methods_of_the_real_device() -> None:
    own = {"free_pinned", "destroy_event"}  # of objects that the double has doubles of
    for name, method in inspect.getmembers(CudaDevice, inspect.isfunction):
        if not name.startswith("_") and name not in own:
            assert (
                inspect.signature(method).parameters.keys() == inspect.signature(getattr(FakeDevice, name)).parameters.keys()
            ), name


# -- the row move ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sm", [80, 89, 90])
def test_the_kernel_compiles_for_each_gpu(sm: int) -> None:
    try:
        image = compile_kernel(kernel_source(), sm)
    except MissingError as exc:
        pytest.skip(exc.problem)
    assert b"move_rows" in image


@pytest.mark.parametrize("dtype", ["float32", "uint16"])  # bfloat16 and float16 are moved as their bits
@pytest.mark.parametrize(("before", "after"), [(16, 16), (16, 24), (24, 16), (8, 40), (40, 8)])
def test_the_kernel_moves_rows_as_numpy_does_and_as_a_full_gather_does(dtype: str, before: int, after: int) -> None:
    """Tensors of two lengths, with and without text rows; the mask stays, grows and shrinks; each image has its own."""
    rng = np.random.default_rng(before * 100 + after)
    n, images, rows, heads, text = 48, 2, 4, 3, 5
    lengths, text_rows = (text + n + 7, n + 7, text + n), (text, 0, text)
    caches = [rng.integers(0, 2**15, (rows, heads, length, 16)).astype(dtype) for length in lengths]
    partner = np.tile(np.arange(n), (images, 1))
    for image in range(images):  # as many enter as leave
        leaving, entering = rng.permutation(after)[:5], after + rng.permutation(n - after)[:5]
        partner[image, entering], partner[image, leaving] = leaving, entering
    gathered = []
    for cache, offset in zip(caches, text_rows, strict=True):
        slots = np.arange(cache.shape[2])
        whole = np.stack(
            [np.concatenate([slots[:offset], offset + partner[r % images], slots[offset + n :]]) for r in range(rows)]
        )
        gathered.append(np.take_along_axis(cache, whole[:, None, :, None], 2))
    by_numpy = [cache.copy() for cache in caches]
    OnnxRuntimeBackend({}).move_rows([HostBuffer.of(c) for c in by_numpy], HostBuffer.of(partner), after, text_rows)

    table = cache_table([cache.ctypes.data for cache in caches], [cache.shape for cache in caches], text_rows)
    device = FakeDevice()
    kernel = host_kernel(kernel_source(), "move_rows")
    move = RowMove(device, kernel, table.ctypes.data, [cache.shape for cache in caches], np.dtype(dtype).itemsize)
    move.enqueue(partner.ctypes.data, images, n, after)
    device.synchronize()
    for cache, theirs, full, offset in zip(caches, by_numpy, gathered, text_rows, strict=True):
        np.testing.assert_array_equal(cache, theirs)
        rows_kept = slice(offset + after, offset + n)  # the next call rewrites the others
        np.testing.assert_array_equal(cache[:, :, rows_kept], full[:, :, rows_kept])


def test_the_kernels_table_is_three_numbers_for_each_tensor() -> None:
    table = cache_table([256, 512], [(2, 3, 10, 16), (2, 3, 8, 16)], [2, 0])
    np.testing.assert_array_equal(table, [[256, 10, 2], [512, 8, 0]])
    assert table.dtype == np.int64
    assert ctypes.sizeof(ctypes.c_longlong) == table.itemsize
