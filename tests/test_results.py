"""The results page and the arithmetic behind it; the measurements themselves are chores, not tests."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module
    for name in ("page", "frontier", "variants"):
        sys.modules.pop(name, None)


def row(speedup: float, psnr: float, plan: object = None) -> SimpleNamespace:
    noise = np.linspace(-1, 1, 40)
    return SimpleNamespace(
        speedup=SimpleNamespace(median=speedup), to_converged={"psnr": psnr + noise}, plan=plan or object(), row=None
    )


def test_the_page_is_made_from_what_was_measured(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = script("page")
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(page, "DOCS", tmp_path)
    page.main()
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text(), "run `make results`"
    cells, last = 0, ""
    for line in (tmp_path / "results.md").read_text().splitlines():
        if line.startswith("|"):
            cells = cells if last.startswith("|") else line.count("|")
            assert line.count("|") == cells, f"a table's row has other cells than its head: {line}"
        last = line
    assert (tmp_path / "images" / "frontier.png").stat().st_size > 10_000


def test_a_gain_is_read_off_the_large_models_curve(script) -> None:
    frontier = script("frontier")
    rows = {"20": row(1.4, 30.0), "14": row(2.0, 26.0), "7": row(4.0, 20.0), "mine": row(2.4, 26.0), "far": row(9.0, 10.0)}
    found = frontier.gains(rows, ["mine", "far"], ["20", "14", "7"])
    assert found.keys() == {"mine"}, "what lies beyond the curve is not guessed"
    assert found["mine"]["value"] == pytest.approx(2.4 / 2.0, rel=1e-3)
    assert found["mine"]["low"] <= found["mine"]["value"] <= found["mine"]["high"]
    between = row(2.4, 23.0)
    assert frontier.gains(rows | {"mine": between}, ["mine"], ["20", "14", "7"])["mine"]["value"] == pytest.approx(
        2.4 / np.sqrt(8), rel=1e-3
    )


def test_the_rival_is_the_nearest_row_that_is_as_fast_and_another_schedule(script) -> None:
    frontier = script("frontier")
    same = object()
    rows = {
        "mine": row(2.0, 26.0, same),
        "slow": row(1.5, 40.0),
        "same": row(2.0, 26.0, same),
        "a": row(1.97, 25.0),
        "b": row(3.0, 24.0),
    }
    found = frontier.differences(rows, ["mine"], ["slow", "same", "a", "b"])
    assert found["mine"]["baseline"] == "a"
    assert found["mine"]["value"] == pytest.approx(1.0)
    assert frontier.differences(rows, ["mine"], ["slow", "same"]) == {}


def test_every_planned_schedule_and_baseline_is_a_plan(script, demo_bundle: Path) -> None:
    from hst_trt.pipeline import HybridStitchPipeline

    frontier = script("frontier")
    pipeline = HybridStitchPipeline.from_bundle(demo_bundle)
    kinds = frontier.families(pipeline)
    names = {}
    for rows in kinds.values():
        for one in rows:
            plan = pipeline.plan(**one.arguments())
            assert names.setdefault(one.name, plan) == plan, "a name stands for one schedule"
    baselines = {name for family, rows in kinds.items() if family != frontier.PLANNER for name in [one.name for one in rows]}
    assert len(baselines) > 20


def test_measured_machines_and_bundles_are_named() -> None:
    shipped = json.loads((ROOT / "hst_trt" / "data" / "demo.hstb" / "manifest.json").read_text())["fingerprint"]
    for name in ("frontier", "planner_check"):
        content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert content["machine"]["cpu"]
        assert content["machine"]["date"]
        assert content["fingerprint"] == shipped or pytest.fail(f"{name}.json is of other graphs: run `make results`")
