"""Which target this machine is: asks the driver through ``nvidia-smi``, which needs no package of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from ..errors import IncompatibleError
from ..recipe import load_target, target_names

__all__ = ["Gpu", "detect_gpus", "detect_target"]

_QUERY = "name,compute_cap,memory.total,driver_version,uuid"


@dataclass(frozen=True)
class Gpu:
    name: str
    sm: int  # compute capability, 90 for 9.0
    memory_mib: int
    driver: str
    uuid: str


def detect_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that are here and that ``CUDA_VISIBLE_DEVICES`` leaves visible; none if there is no driver."""
    command = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if command is None or visible in ("", "-1"):
        return []
    chosen = [] if visible is None else [f"--id={visible}"]
    try:
        answer = subprocess.run(
            [command, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits", *chosen],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [gpu for line in answer.splitlines() if (gpu := _parse(line)) is not None]


def _parse(line: str) -> Gpu | None:
    parts = [part.strip() for part in line.split(",")]
    try:
        name, capability, memory, driver, uuid = parts
        return Gpu(name, round(float(capability) * 10), int(float(memory)), driver, uuid)
    except ValueError:
        return None


def detect_target() -> str:
    """The target of the first GPU, else ``cpu``.

    Raises:
        IncompatibleError: there is a GPU, but no target for it.
    """
    gpus = detect_gpus()
    if not gpus:
        return "cpu"
    gpu = gpus[0]
    by_name = [name for name in target_names() if name in gpu.name.lower()]
    fitting = [name for name in target_names() if gpu.sm in load_target(name).sms]
    if not fitting:
        raise IncompatibleError(
            f"there is no target for the {gpu.name}",
            found=f"compute capability {gpu.sm / 10}; the targets are {', '.join(target_names())}",
            fix="use --gpu cpu",
        )
    return next((name for name in by_name if name in fitting), fitting[0])
