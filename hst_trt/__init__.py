"""hst_trt deploys HybridStitch, a large and a small diffusion transformer stitched into one, as compiled engines.

``from hst_trt import HybridStitchPipeline`` is the Python API; ``hst-trt`` is the command line. Importing this package loads
neither torch nor a runtime.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime 1.32 sends usage data from Linux unless told not to

__version__ = "0.1.0"
__all__ = ["HybridStitchPipeline", "MaskRule", "__version__"]

if TYPE_CHECKING:
    from .pipeline import HybridStitchPipeline
    from .plan import MaskRule


def __getattr__(name: str) -> Any:
    if name == "HybridStitchPipeline":
        from .pipeline import HybridStitchPipeline

        return HybridStitchPipeline
    if name == "MaskRule":
        from .plan import MaskRule

        return MaskRule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
