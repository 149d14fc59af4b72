"""Writes what ships: the results, the model card in both its places, the sample sheet and the loss curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.evaluate import report, sheets
from demo.evaluate.heldout import NAMES, Case
from demo.evaluate.measure import Measured
from hst_trt.compare.gallery import Gallery
from hst_trt.compare.store import write_bytes, write_json

ROOT = Path(__file__).resolve().parents[2]
CARD = ROOT / "demo" / "notices" / "MODEL_CARD.md"
LOGS = ("large.jsonl", "small.jsonl")
SHEET, SHEET_ROWS = 32, ("large", "hybrid", "split", "small")
"""Prompts of the sample sheet, the first ones; and its rows."""


def publish(
    work: Path,
    out: Path,
    content: Mapping[str, Any],
    cases: Sequence[Case],
    rows: Mapping[str, Measured],
    gallery: Gallery,
    pair: Path | None,
) -> None:
    """Into the checkout `out`; the card into `pair` too, if that ships and lies in this checkout."""
    results, images, logs = out / "benchmarks" / "results", out / "docs" / "images", out / "demo" / "results"
    write_json(results / "demo_eval.json", content)
    write_bytes(results / "demo_eval_prompts.csv", table(cases, rows).encode())
    card = report.replaced(CARD.read_text(encoding="utf-8"), report.section(content)).encode()
    write_bytes(out / CARD.relative_to(ROOT), card)
    if pair is not None and out.resolve() == ROOT:
        write_bytes(pair / CARD.name, card)
    shown = [gallery[case].pictures for case in cases[:SHEET]]
    sheet = sheets.sample_sheet([case.prompt for case in cases[:SHEET]], {row: [p[row] for p in shown] for row in SHEET_ROWS})
    _save(sheet, images / "demo_eval.png")
    for log in LOGS:
        if (work / log).is_file():
            write_bytes(logs / log, (work / log).read_bytes())
    if missing := [log for log in LOGS if not (logs / log).is_file()]:
        print(f"no loss curves: {' and '.join(missing)} are neither in {work} nor in {logs}", flush=True)
        return
    lines = {Path(log).stem: [json.loads(line) for line in (logs / log).read_text().splitlines()] for log in LOGS}
    _save(sheets.loss_sheet(lines), images / "demo_loss.png")


def table(cases: Sequence[Case], rows: Mapping[str, Measured]) -> str:
    """Every prompt with what each row's picture was taken to show, as CSV."""
    lines = [",".join(["seed", "prompt", *rows])]
    for index, case in enumerate(cases):
        seen = [" ".join(np.array(NAMES)[measured.present[index]]) for measured in rows.values()]
        lines.append(",".join([str(case.number), f'"{case.prompt}"', *seen]))
    return "\n".join(lines) + "\n"


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes", flush=True)
