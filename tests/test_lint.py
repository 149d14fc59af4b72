"""Polygraphy's linter over every graph: valid ONNX, every node runs on its own on the values it meets in a request."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest

from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.tensor_names import GLUE, LARGE, SMALL, VAE_DECODER
from hst_trt.validate import Call, tap_calls

NAMES = [*GLUE, LARGE, SMALL, VAE_DECODER, "text_encoder", "text_encoder_2", "text_encoder_3"]


@pytest.fixture(scope="module")
def calls(tiny_bundle: Path) -> dict[str, Call]:
    """The first call of each graph in real requests."""
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    pytest.importorskip("onnx_graphsurgeon", reason="its linter needs onnx-graphsurgeon")
    first: dict[str, Call] = {}
    tap_calls(HybridStitchPipeline.from_bundle(tiny_bundle), lambda call: first.setdefault(call.engine, call))
    assert set(first) == set(NAMES)
    return first


def lint(graph: Path, inputs: dict[str, np.ndarray], folder: Path) -> subprocess.CompletedProcess[str]:
    from polygraphy.json import save_json

    file = folder / "inputs.json"
    save_json([OrderedDict(inputs)], str(file))
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "check", "lint", str(graph), "--load-inputs", str(file)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_passes_polygraphys_linter(calls: dict[str, Call], tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    folder = tiny_bundle / "graphs"
    graph = folder / "glue" / f"{name}.onnx" if name in GLUE else folder / name / "model.onnx"
    result = lint(graph, calls[name].inputs, tmp_path)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "PASSED" in result.stdout


@pytest.mark.slow
def test_the_linter_finds_a_broken_graph(calls: dict[str, Call], tiny_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_bundle / "graphs" / "glue" / "guide.onnx")
    model.graph.node[-1].input[0] = "nothing"
    onnx.save(model, tmp_path / "guide.onnx")
    assert lint(tmp_path / "guide.onnx", calls["guide"].inputs, tmp_path).returncode != 0
