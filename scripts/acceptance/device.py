"""Part 1: which GPU, driver and packages are here, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hst_trt import __version__
from hst_trt.errors import MissingError

from .journal import Journal, Skip
from .settings import ROOT, Settings

__all__ = ["PACKAGES", "commit", "look", "nvidia_smi"]

PACKAGES = {  # modules, and what to install where one is missing
    "numpy": "numpy",
    "pydantic": "pydantic",
    "PIL": "pillow",
    "tokenizers": "tokenizers",
    "onnxruntime": "onnxruntime",
    "onnx": "onnx",
    "ml_dtypes": "ml_dtypes",
    "safetensors": "safetensors",
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "cuda.bindings": "cuda-python",
    "tensorrt": "tensorrt-cu13",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "polygraphy": "polygraphy",
    "pytest": "pytest",
    "triton": "triton",
}
_DISTRIBUTIONS = PACKAGES | {"cuda.bindings": "cuda-bindings"}
_SMI = (
    "name", "driver_version", "compute_cap", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "power.limit", "power.max_limit", "power.draw", "temperature.gpu", "ecc.mode.current", "mig.mode.current",
)  # fmt: skip


def look(journal: Journal, settings: Settings) -> None:
    journal.fact("packages", {module: version_of(module) for module in PACKAGES})
    journal.fact("hst_trt", {"version": __version__, "commit": commit()})
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    journal.fact(
        "host",
        {
            "python": platform.python_version(),
            "os": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
            "disk_free_gib": round(shutil.disk_usage(settings.work).free / 2**30, 1),
        },
    )
    journal.fact("nvidia_smi", nvidia_smi())
    with journal.check("packages that every part needs"):
        missing = [name for name in ("numpy", "pydantic", "PIL", "tokenizers", "onnxruntime") if not version_of(name)]
        if missing:
            names = " ".join(PACKAGES[name] for name in missing)
            raise MissingError(f"the package {missing[0]} is not installed", fix=f"pip install {names}")
    with journal.check("a GPU"):
        _gpu(journal, settings)
    with journal.check("CUDA"):
        _cuda(journal, settings)


def _gpu(journal: Journal, settings: Settings) -> None:
    from hst_trt.builder.detect import detect_gpus, detect_target

    gpus = detect_gpus()
    journal.fact("gpus", [{"name": g.name, "sm": g.sm, "memory_mib": g.memory_mib, "driver": g.driver} for g in gpus])
    if settings.rehearse:
        raise Skip("a rehearsal")
    if not gpus:
        raise MissingError(
            "there is no NVIDIA GPU to accept",
            found="no nvidia-smi" if shutil.which("nvidia-smi") is None else "nvidia-smi shows none",
            fix="run this on a machine that has one (in a container: with --gpus all); --rehearse goes through the same "
            "steps on the CPU",
        )
    journal.fact("target", detect_target())


def _cuda(journal: Journal, settings: Settings) -> None:
    """What cuda-python sees, which is what engines are run with."""
    if settings.rehearse or not version_of("cuda.bindings"):
        raise Skip("a rehearsal" if settings.rehearse else "cuda-python is not installed")
    from hst_trt.runtime.cuda import CudaDevice

    device = CudaDevice()
    free, total = device.memory()
    cudart = importlib.import_module("cuda.bindings.runtime")
    versions = {"driver": cudart.cudaDriverGetVersion()[1], "cuda-python": cudart.cudaRuntimeGetVersion()[1]}
    journal.fact(
        "cuda",
        {
            **{name: f"{number // 1000}.{number % 1000 // 10}" for name, number in versions.items()},
            "memory_gib": round(total / 2**30, 1),
            "memory_free_gib": round(free / 2**30, 1),
        },
    )


def version_of(module: str) -> str | None:
    """The version of an installed package, by the name that it is imported by; None if it is not here."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:
        return None
    try:
        return importlib.metadata.version(_DISTRIBUTIONS[module])
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def nvidia_smi() -> dict[str, Any]:
    """What the driver says of the first GPU now, as it words it; fields that it does not know are left out."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    asked = [command, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader", f"--id={first}"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer else []
    return {name: value for name, value in zip(_SMI, values, strict=False) if not value.startswith(("[N/A", "[Not"))}


def commit() -> str:
    """The checkout's commit, with a mark if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name.stdout.strip() + (" with changes" if status.stdout.strip() else "")
