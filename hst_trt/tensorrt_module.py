"""TensorRT as a module handle: `tensorrt` and `tensorrt_rtx` have the same classes, so builder and runtime take either."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Literal

from .errors import IncompatibleError, MissingError

__all__ = ["EXTRAS", "TensorRTBackendName", "is_installed", "tensorrt_module"]

TensorRTBackendName = Literal["tensorrt", "tensorrt-rtx"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
"""The extra of this package that installs each backend."""

_OLDEST = {"tensorrt": (10, 15), "tensorrt-rtx": (1, 7)}  # the first parsers that know opset 24's TensorScatter


def is_installed(backend: TensorRTBackendName) -> bool:
    """Whether the module of a backend can be found, without importing it."""
    return importlib.util.find_spec(_MODULES[backend]) is not None


def tensorrt_module(backend: TensorRTBackendName) -> ModuleType:
    """The module of a backend, imported on first use. Nothing of it needs a GPU until a Runtime is made.

    Raises:
        MissingError: it is not installed, or one of its libraries is not.
        IncompatibleError: it is too old to parse the graphs.
    """
    try:
        module = importlib.import_module(_MODULES[backend])
    except (ImportError, OSError) as exc:  # OSError: a shared library is missing
        raise MissingError(
            f"{backend} is not installed",
            found=f"{type(exc).__name__}: {exc}",
            fix=f'pip install "hst_trt[{EXTRAS[backend]}]"',
        ) from exc
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if version < _OLDEST[backend]:
        raise IncompatibleError(
            f"{backend} {module.__version__} cannot parse the graphs",
            found="they use opset 24's TensorScatter",
            fix=f'pip install "hst_trt[{EXTRAS[backend]}]" for {".".join(map(str, _OLDEST[backend]))} or newer',
        )
    return module
