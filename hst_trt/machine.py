"""What computes, by the name that measured costs go by, and how much memory this process took."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "cpu", "cpu_model", "peak_resident_bytes"]


@dataclass(frozen=True)
class Machine:
    """What makes the calls of a bundle. Costs that were measured on an equal one are taken to hold.

    Attributes:
        name: the CPU's, or the GPU's.
        threads: of a call on a CPU, 0 for one per physical core; 0 for a GPU.
    """

    name: str
    threads: int = 0


def cpu(threads: int = 0) -> Machine:
    """The CPU. Its name says how many CPUs there are: they decide what 0 threads mean, and virtual machines give many different
    processors one name."""
    return Machine(f"{cpu_model()}, {os.cpu_count()} CPUs", threads)


def cpu_model() -> str:
    """The processor's own name, or if it tells none that of its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_resident_bytes() -> int:
    """The most memory that this process had in RAM at any time.

    From Linux's own count: `getrusage` gives a process that was started by a larger one the peak of that one.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
