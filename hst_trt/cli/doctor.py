"""``hst-trt doctor``: what this machine has, and what each missing thing would be for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import click

from .. import __version__
from ..bundle import SUFFIX, Bundle, bundles_folder
from ..disk import free_bytes
from ..errors import HstError
from .console import print_json, tables

__all__ = ["doctor"]

_PACKAGES = {  # distribution -> (what it is for, how to get it)
    "onnxruntime": ("runs bundles on the CPU", "pip install hst_trt"),
    "tokenizers": ("reads prompts", "pip install hst_trt"),
    "torch": ("export", 'pip install "hst_trt[export]"'),
    "diffusers": ("export", 'pip install "hst_trt[export]"'),
    "transformers": ("export", 'pip install "hst_trt[export]"'),
    "onnx": ("export", 'pip install "hst_trt[export]"'),
    "tensorrt-cu13": ("engines for h100, h200, a100, on that GPU", 'pip install "hst_trt[tensorrt]"'),
    "tensorrt-rtx-cu13": ("engines for rtx, on any machine; others with --backend", 'pip install "hst_trt[rtx]"'),
    "cuda-python": ("runs engines", 'pip install "hst_trt[tensorrt]" or "hst_trt[rtx]"'),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor(as_json: bool) -> None:
    """Say what this machine has: GPU, TensorRT, packages, bundles."""
    from ..builder.detect import detect_gpus, detect_target

    gpus = detect_gpus()
    try:
        target = detect_target()
    except HstError as exc:
        target = f"none ({exc.problem})"
    folder = bundles_folder()
    packages = {name: _version(name) for name in _PACKAGES}
    bundles = [_describe(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    free = free_bytes(folder)
    if as_json:
        print_json(
            "hst_trt.doctor/1",
            {
                "version": __version__, "python": platform.python_version(), "os": platform.platform(), "cpus": os.cpu_count(),
                "gpus": [vars(gpu) for gpu in gpus], "target": target, "packages": packages, "bundles_folder": str(folder),
                "bundles": bundles, "disk_free_bytes": free,
            },
        )  # fmt: skip
        return
    from rich.table import Table

    tables.print(f"hst_trt {__version__} · Python {platform.python_version()} · {platform.platform()} · {os.cpu_count()} CPUs")
    tables.print(
        "\n".join(f"GPU {g.name}, sm_{g.sm}, {g.memory_mib} MiB, driver {g.driver}" for g in gpus) or "no NVIDIA GPU or driver"
    )
    tables.print(f"--gpu auto means {target}")
    table = Table("package", "version", "for", "to get it")
    for name, (purpose, command) in _PACKAGES.items():
        table.add_row(name, packages[name] or "-", purpose, "" if packages[name] else command)
    tables.print(table)
    tables.print(f"bundles in {folder} ({free / 2**30:.1f} GiB free):")
    for bundle in bundles:
        tables.print(f"  {bundle['name']}: {bundle['status']}")
    if not bundles:
        tables.print("  none yet; `hst-trt run` makes the demo bundle by itself")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe(path: Path) -> dict[str, str]:
    name = path.name
    try:
        manifest = Bundle.open(path, check_hashes=False).manifest
    except HstError as exc:
        return {"name": name, "status": f"not usable: {exc.problem}"}
    return {"name": name, "status": f"{manifest.recipe} for {manifest.target.name}, {manifest.state}"}
