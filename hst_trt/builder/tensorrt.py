"""Finishing a bundle for a GPU, which this version cannot: it keeps the graphs and says how to go on."""

from __future__ import annotations

import shlex
from typing import NoReturn

from ..bundle import Bundle
from ..errors import MissingError
from ..recipe import Target

__all__ = ["finish"]

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


def finish(bundle: Bundle, target: Target, pair: str) -> NoReturn:
    """Building engines comes with a later version; until then the graphs wait in the bundle.

    Args:
        bundle: the graphs.
        target: the GPU.
        pair: the recipe as the user gave it, a name or a path.

    Raises:
        MissingError: always, with what is missing and the command that goes on.
    """
    extra = _EXTRAS[target.backend]
    command = shlex.join(["hst-trt", "build", "--gpu", target.name, "--pair", pair, "--output", str(bundle.path.parent)])
    raise MissingError(
        f"{target.name} needs {target.backend} engines, which this version of hst_trt does not build yet",
        found=f"the graphs are exported and checked, and wait in {bundle.path}",
        fix=f'with a version that builds them, on a machine with that GPU: pip install "hst_trt[{extra}]", copy the bundle '
        f"there if it is another machine, then `{command}`; to draw without a GPU: `hst-trt build --gpu cpu`",
    )
