"""Finishing a bundle for a GPU: checks that TensorRT and the GPU are here, and says how to go on where they are not."""

from __future__ import annotations

import importlib.util
import shlex
from typing import NoReturn

from ..bundle import Bundle
from ..errors import MissingError
from ..recipe import Target

__all__ = ["finish"]

_MODULES = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}


def finish(bundle: Bundle, target: Target, pair: str) -> NoReturn:
    """Building engines comes with a later version; until then the graphs wait in the bundle.

    Args:
        bundle: the graphs.
        target: the GPU.
        pair: the recipe as the user gave it, a name or a path.

    Raises:
        MissingError: always, with what is missing and the command that goes on.
    """
    module, extra = _MODULES[target.backend]
    command = shlex.join(["hst-trt", "build", "--gpu", target.name, "--pair", pair, "--output", str(bundle.path.parent)])
    kept = f"the graphs are exported and checked, and wait in {bundle.path}"
    if importlib.util.find_spec(module) is None:
        raise MissingError(
            f"the engines for {target.name} need {target.backend}, which is not installed here",
            found=kept,
            fix=f'on the machine with the GPU: pip install "hst_trt[{extra}]", copy the bundle there if it is another '
            f"one, then `{command}`",
        )
    raise MissingError(
        f"this version of hst_trt does not build {target.backend} engines yet",
        found=kept,
        fix=f"upgrade hst_trt, then `{command}` goes on from there",
    )
