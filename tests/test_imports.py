"""What is imported when: the runtime goes without torch and the exporters' libraries, and nothing needs a GPU to import."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import hst_trt

PACKAGE = Path(hst_trt.__file__).parent
EXPORT_ONLY = {
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "safetensors",
    "ml_dtypes",
    "huggingface_hub",
    "accelerate",
    "scipy",
}
# Reports the top-level modules that a piece of code has loaded, whatever it prints or however it exits.
REPORT = """
import atexit, json, sys
from pathlib import Path
def report(file=Path(sys.argv.pop())):
    file.write_text(json.dumps(sorted({name.split(".")[0] for name, module in sys.modules.items() if module})))
atexit.register(report)
"""
COMMAND_LINE = """
from hst_trt.cli.main import main
sys.argv[0] = "hst-trt"
main()
"""


def loaded_by(code: str, tmp_path: Path, *arguments: object) -> set[str]:
    """The top-level modules that a fresh interpreter has after running `code`, which has to end with exit code 0."""
    report = tmp_path / "modules.json"
    command = [sys.executable, "-c", REPORT + code, *map(str, arguments), str(report)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(report.read_text()))


def modules() -> list[str]:
    return sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "hst_trt."))


def test_importing_the_package_loads_no_runtime_and_no_exporter(tmp_path: Path) -> None:
    loaded = loaded_by("import hst_trt", tmp_path)
    assert "hst_trt" in loaded
    assert not loaded & (EXPORT_ONLY | {"onnxruntime"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["build", "--help"]], ids=" ".join)
def test_help_loads_neither_a_runtime_nor_an_exporter(tmp_path: Path, arguments: list[str]) -> None:
    loaded = loaded_by(COMMAND_LINE, tmp_path, *arguments)
    assert "click" in loaded
    assert not loaded & (EXPORT_ONLY | {"onnxruntime"})


@pytest.mark.parametrize("command", ["inspect", "verify", "plan"])
def test_looking_at_a_bundle_loads_no_exporter(demo_bundle: Path, tmp_path: Path, command: str) -> None:
    where = ["--bundle"] if command == "plan" else []
    assert not loaded_by(COMMAND_LINE, tmp_path, command, *where, demo_bundle) & EXPORT_ONLY


def test_a_whole_run_loads_no_torch_and_none_of_the_exporters_libraries(demo_bundle: Path, tmp_path: Path) -> None:
    options = ["--prompt", "a red apple", "--num-inference-steps", "4", "--seed", "1", "--save-masks", "--correction", "0.9"]
    loaded = loaded_by(COMMAND_LINE, tmp_path, "run", "--bundle", demo_bundle, *options)
    assert (tmp_path / "outputs" / "hst_1_000.png").is_file()
    assert "onnxruntime" in loaded
    assert not loaded & (EXPORT_ONLY | {"cuda", "tensorrt", "tensorrt_rtx"})


def test_a_run_leaves_nothing_of_others_in_the_users_home(demo_bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime's telemetry would keep an identifier there."""
    kept = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    code = "from hst_trt.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", "--bundle", str(demo_bundle), "--prompt", "x", "--num-inference-steps", "1"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=kept | {"HOME": str(tmp_path)}, check=False
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs", ".cache"}
    assert {path.name for path in tmp_path.glob(".cache/*")} <= {"hst_trt"}


def test_the_runtime_imports_neither_diffusers_nor_onnx(tmp_path: Path) -> None:
    names = [name for name in modules() if name.startswith("hst_trt.runtime")]
    assert "hst_trt.runtime.torch_eager" in names
    loaded = loaded_by("\n".join(f"import {name}" for name in names), tmp_path)
    assert not loaded & {"diffusers", "transformers", "onnx", "huggingface_hub"}
    without_torch = [name for name in names if not name.endswith("torch_eager")]
    assert not loaded_by("\n".join(f"import {name}" for name in without_torch), tmp_path) & EXPORT_ONLY


NO_GPU = "".join(f"sys.modules[{name!r}] = None\n" for name in ("tensorrt", "tensorrt_rtx", "cuda", "cupy", "pycuda", "triton"))


def test_every_module_imports_without_a_gpu_and_its_libraries(tmp_path: Path) -> None:
    names = modules()
    assert {"hst_trt.pipeline", "hst_trt.export.exporter", "hst_trt.builder.tensorrt", "hst_trt.models.sd3"} <= set(names)
    code = "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n" + NO_GPU + "\n".join(f"import {name}" for name in names)
    loaded = loaded_by(code + "\nimport torch; assert not torch.cuda.is_initialized()", tmp_path)
    assert not loaded & {"tensorrt", "tensorrt_rtx", "cuda"}


def test_exporting_imports_no_tensorrt(tmp_path: Path) -> None:
    sources = [PACKAGE / "export", PACKAGE / "models"]
    for file in (file for folder in sources for file in folder.rglob("*.py")):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not line.strip().startswith(("import tensorrt", "from tensorrt")), file


@pytest.mark.parametrize("number_of_modules", [len(modules())])
def test_the_walk_over_the_modules_sees_them_all(number_of_modules: int) -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" and "data" not in file.parts]
    packages = [file for file in PACKAGE.rglob("__init__.py") if file.parent != PACKAGE and "data" not in file.parts]
    assert number_of_modules == len(files) + len(packages)
