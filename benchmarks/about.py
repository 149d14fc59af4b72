"""What a benchmark says of where and when it was run, alike in every file under benchmarks/results/."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from typing import Any

from hst_trt.machine import cpu

__all__ = ["machine"]

PACKAGES = ("hst_trt", "onnxruntime", "torch", "numpy")


def machine(threads: int, *further: str) -> dict[str, Any]:
    """The CPU and how many of them there are, the threads of a call, today, and what runs there.

    Args:
        threads: of a call, 0 for one per physical core.
        further: packages whose versions matter too.
    """
    return {
        "cpu": cpu().name,
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "os": platform.platform(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (*PACKAGES, *further)),
    }
