"""What builds a target's engines here: which TensorRT, for which compute capabilities, and on which GPU.

TensorRT measures on the GPU that it builds for, so that one has to be here. TensorRT-RTX compiles without one, for several
compute capabilities at once, but only for those that it has a name for.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from ..errors import IncompatibleError, MissingError
from ..recipe import Target
from ..tensorrt_module import TensorRTBackendName, tensorrt_module
from .detect import Gpu, detect_gpus

__all__ = ["Toolchain", "find_toolchain", "rtx_sms"]

_BFLOAT16_FROM = 80  # the first compute capability that has it


@dataclass(frozen=True)
class Toolchain:
    """`sms`: compute capabilities that the engines will run on; `gpu`: the one of them that is here, if any."""

    backend: TensorRTBackendName
    version: str
    sms: tuple[int, ...]
    gpu: Gpu | None


def find_toolchain(target: Target) -> Toolchain:
    """What builds the engines of a target.

    Raises:
        MissingError: the package is not installed, or the GPU that it needs is not here.
        IncompatibleError: the GPU that is here is another one, the target's compute capabilities cannot be named, or its
            precision is not theirs.
    """
    assert target.backend != "onnxruntime"
    gpus = detect_gpus()
    gpu = next((gpu for gpu in gpus if gpu.sm in target.sms), None)
    if target.backend == "tensorrt" and gpu is None and gpus:
        raise IncompatibleError(
            f"TensorRT builds engines only on the GPU that they are for, and {target.name} is another one",
            found=", ".join(f"{g.name}, compute capability {g.sm / 10}" for g in gpus),
            fix="use --gpu auto, or build on a machine with that GPU",
        )
    trt = tensorrt_module(target.backend)
    if target.backend == "tensorrt":
        if gpu is None:
            raise MissingError("TensorRT builds engines only on the GPU that they are for, and no GPU is here")
        sms: tuple[int, ...] = (gpu.sm,)
    else:
        sms = (gpu.sm,) if gpu is not None else _named_sms(trt, target)
    return Toolchain(target.backend, trt.__version__, _with_precision(sms, target), gpu)


def rtx_sms(trt: ModuleType) -> tuple[int, ...]:
    """The compute capabilities that TensorRT-RTX can build for without a GPU."""
    names = trt.ComputeCapability.__members__
    return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdigit()))


def _named_sms(trt: ModuleType, target: Target) -> tuple[int, ...]:
    named = rtx_sms(trt)
    sms = tuple(sm for sm in target.sms if sm in named)
    if not sms:
        raise IncompatibleError(
            f"TensorRT-RTX has no target for SM{target.sms[0]}, and no {target.name} is here to build on",
            found=f"{target.backend} {trt.__version__}, which can build for SM{', SM'.join(map(str, named))}",
            fix=f"build on a machine with the {target.name}: there TensorRT-RTX builds for the GPU that is here, and TensorRT "
            "(--backend tensorrt) for this one in particular",
        )
    return sms


def _with_precision(sms: tuple[int, ...], target: Target) -> tuple[int, ...]:
    """Those that have kernels for the target's precision; older ones are left out where others remain."""
    fitting = tuple(sm for sm in sms if target.precision != "bfloat16" or sm >= _BFLOAT16_FROM)
    if not fitting:
        raise IncompatibleError(
            f"bfloat16 needs compute capability {_BFLOAT16_FROM / 10} or above",
            found=", ".join(str(sm / 10) for sm in sms),
            fix="build with --precision float16",
        )
    return fitting
