"""Which backend runs a bundle, and whether it can run here: asked in this order, so that the first answer is the useful one.

What the manifest alone can tell comes first, then whether there is a GPU and a driver, then whether the right TensorRT is
installed. Only then is anything of TensorRT touched: without a driver, making its runtime would end the process.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

from .bundle import Bundle, FileEntry, Manifest, verify_files
from .errors import IncompatibleError
from .machine import Machine, cpu
from .runtime.engine import Backend
from .tensor_names import GLUE
from .tensorrt_module import is_installed, tensorrt_module

__all__ = ["machine_here", "open_backend", "open_bundle", "runs_here"]


def open_bundle(path: str | os.PathLike[str], on_hash: Callable[[int, int], None] | None = None) -> Bundle:
    """Opens a bundle to run it, and hashes what is read by path. Engines are hashed when they are loaded.

    Args:
        path: the folder.
        on_hash: called with (bytes checked, bytes in all).

    Raises:
        HstError: it is missing, damaged, unfinished, or for another kind of machine.
    """
    bundle = Bundle.open(path, check_hashes=False)
    _check_kind(bundle)
    verify_files(bundle.path, _read_by_path(bundle.manifest), on_hash)
    _ = bundle.scheduler  # refused here rather than in the middle of a request
    return bundle


def open_backend(bundle: Bundle, *, device: int = 0, threads: int = 0) -> Backend:
    """The backend that a bundle is for.

    Args:
        device: which GPU, for bundles of engines.
        threads: of a call, for bundles for the CPU; 0 takes one per physical core.

    Raises:
        MissingError: there is no such GPU, no driver, no cuda-python or no TensorRT.
        IncompatibleError: the driver is too old, or the engines are for another GPU or another version of TensorRT.
    """
    target = bundle.manifest.target
    if target.backend == "onnxruntime":
        from .runtime.ort import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle.graph_paths(), threads)
    from .runtime.cuda import CudaDevice
    from .runtime.tensorrt import TensorRTBackend

    gpu = CudaDevice(device)
    return TensorRTBackend(bundle, gpu, tensorrt_module(target.backend))


def runs_here(manifest: Manifest, device: int = 0) -> bool:
    """Whether a bundle can be expected to run on this machine, as far as can be told without loading anything."""
    target = manifest.target
    if _lacks_glue(manifest) or manifest.state != "complete":
        return False
    if target.backend == "onnxruntime":
        return True
    from .builder.detect import detect_gpus

    if (target.os, target.arch) != _machine() or not is_installed(target.backend):
        return False
    gpus = detect_gpus()
    return device < len(gpus) and gpus[device].sm in target.sms


def machine_here(manifest: Manifest, *, device: int = 0, threads: int = 0) -> Machine | None:
    """What `open_backend` would run a bundle on, as far as can be told without loading anything; None without such a GPU."""
    if manifest.target.backend == "onnxruntime":
        return cpu(threads)
    from .builder.detect import detect_gpus

    gpus = detect_gpus()
    return Machine(gpus[device].name) if device < len(gpus) else None


def _check_kind(bundle: Bundle) -> None:
    manifest, target = bundle.manifest, bundle.manifest.target
    if missing := _lacks_glue(manifest):
        raise IncompatibleError(
            f"{bundle.path} was made by an older hst_trt",
            found=f"{manifest.created_by}; it lacks the graphs {', '.join(missing)}",
            fix=f"build it again: `hst-trt build --gpu {target.name}`",
        )
    if manifest.state != "complete":
        raise IncompatibleError(
            f"{bundle.path} holds graphs only, it was not built for {target.name} yet",
            fix=f"run `hst-trt build --gpu {target.name}` for the same pair; for a CPU, `hst-trt build --gpu cpu`",
        )
    if target.backend != "onnxruntime" and (target.os, target.arch) != _machine():
        raise IncompatibleError(
            f"the engines of {bundle.path} are for another system",
            found=f"{target.os} on {target.arch}, this is {' on '.join(_machine())}",
            fix="build them on a machine like this one: `hst-trt build`",
        )


def _lacks_glue(manifest: Manifest) -> list[str]:
    return sorted(set(GLUE) - manifest.graphs.keys())


def _machine() -> tuple[str, str]:
    return platform.system().lower(), platform.machine()


def _read_by_path(manifest: Manifest) -> dict[str, FileEntry]:
    """The files that a run reads: all of them for ONNX Runtime, without graphs, weights and engines for TensorRT."""
    if manifest.target.backend == "onnxruntime":
        return manifest.files
    others = {engine.path for engine in manifest.engines.values()}
    for graph in manifest.graphs.values():
        others |= {graph.path, *graph.weights}
    return {name: entry for name, entry in manifest.files.items() if name not in others}
