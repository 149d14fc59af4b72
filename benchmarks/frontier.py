"""Speed against distance on the demo pair: the planner's schedules beside every baseline, on held-out prompts.

Speed-ups are measured, over 28 large steps as diffusers takes them. Distances are to the converged large model. Each baseline
stands there twice: as it is published, and with what makes few steps good for every schedule (`--solver ab2`, trailing spacing,
a larger shift), so that nothing gains by it alone. Writes benchmarks/results/frontier.json; `--help-out` in a second process
draws from the other end of the list.

    python benchmarks/frontier.py [--work build/out/demo] [--prompts 200] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from about import machine

from demo.evaluate import classifier, heldout, lessons
from demo.evaluate.figures import wanted
from demo.evaluate.run import open_pipeline, pair_folder, say, taught
from demo.packages import fetch
from demo.scenes import Sprites
from hst_trt.compare.measures import interval, mean_interval, weighted_means
from hst_trt.compare.report import as_dict
from hst_trt.compare.rows import NamedSchedule
from hst_trt.compare.run import Compared, compare
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule
from hst_trt.planner.choose import Budget, choose
from hst_trt.planner.space import Point
from hst_trt.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "frontier.json"
STEPS = 28
REAL = 500
"""Real scenes for KID, of other prompts."""

BUDGETS = (1.3, 1.5, 1.83, 2.0, 2.5, 3.0, 3.5, 4.0)
BEST = {"solver": "ab2", "timestep_spacing": "trailing", "shift": 4.0}
BETWEEN = ((9, 5.0), (11, 5.0), (12, 4.0), (17, 4.0))
"""Steps and shift of large-only rows that the calibration has no point for, so that the curve has no gaps."""

PLANNER, ALONE = "planner", "large alone, the best of any solver and shift"


def families(pipeline: HybridStitchPipeline) -> dict[str, list[NamedSchedule]]:
    """The rows by what they stand for. The planner's are in the order of `BUDGETS`; one row may stand for several things."""
    choices = {speedup: choose(pipeline.bundle, Budget(speedup=speedup), None) for speedup in BUDGETS}
    planned = {f"planner, {speedup:g}x": choice.best.point.settings for speedup, choice in choices.items()}
    alone = {choice.large_only.point for choice in choices.values() if choice.large_only is not None}
    alone |= {Point((n, 0, 0), "ab2", shift) for n, shift in BETWEEN}
    counted: dict[str, dict[str, dict[str, Any]]] = {
        PLANNER: planned,
        "large alone, as diffusers runs it": {f"large, {n} steps": {"num_inference_steps": n} for n in (21, 14, 9, 7)},
        ALONE: {
            f"large, {p.steps} steps, {p.solver}, shift {p.shift or 3:g}": dict(p.settings)
            for p in sorted(alone, key=lambda p: p.steps)
        },
        "T-Stitch": {
            "t-stitch, 10 of 28 small": {"num_inference_steps": STEPS, "stages": (18, 0, 10)},
            "t-stitch, 20 of 28 small": {"num_inference_steps": STEPS, "stages": (8, 0, 20)},
            "t-stitch, 3 of 14 small, best": {"num_inference_steps": 14, "stages": (11, 0, 3)} | BEST,
            "t-stitch, 5 of 12 small, best": {"num_inference_steps": 12, "stages": (7, 0, 5)} | BEST,
        },
        "SRDiffusion": {
            "srdiffusion, 14 of 28 small": {"num_inference_steps": STEPS, "stages": (14, 0, 14)},
            "srdiffusion, 22 of 28 small": {"num_inference_steps": STEPS, "stages": (6, 0, 22)},
            "srdiffusion, adaptive": {"num_inference_steps": STEPS, "adaptive": True},
            "srdiffusion, 4 of 14 small, best": {"num_inference_steps": 14, "stages": (10, 0, 4), "correction": 0.9} | BEST,
            "srdiffusion, 4 of 11 small, best": {"num_inference_steps": 11, "stages": (7, 0, 4), "correction": 0.9} | BEST,
        },
        "RAS-like": {
            "ras, 28 steps": {"num_inference_steps": STEPS},
            "ras, 18 steps, best": {"num_inference_steps": 18} | BEST,
            "ras, 14 steps, best": {"num_inference_steps": 14} | BEST,
        },
        "HybridStitch": {
            "hybrid (10,12,6)": {"num_inference_steps": STEPS, "stages": (10, 12, 6), "correction": 0.9},
            "hybrid (3,9,16)": {"num_inference_steps": STEPS, "stages": (3, 9, 16)},
            "hybrid (3,9,16), corrected": {"num_inference_steps": STEPS, "stages": (3, 9, 16), "correction": 0.9},
            "hybrid (3,9,16), random mask": {
                "num_inference_steps": STEPS,
                "stages": (3, 9, 16),
                "mask": MaskRule(random_seed=0),
            },
            "hybrid (7,5,2), best": {"num_inference_steps": 14, "stages": (7, 5, 2), "correction": 0.9} | BEST,
            "hybrid (5,4,2), best": {"num_inference_steps": 11, "stages": (5, 4, 2), "correction": 0.9} | BEST,
        },
        "small alone": {"small, 28 steps": {"num_inference_steps": STEPS}},
    }
    schedules = dict(zip(counted, (None, "large", None, "t-stitch", "srdiffusion", "ras", "hybrid", "small"), strict=True))
    drawn: dict[str, NamedSchedule] = {}

    def once(row: NamedSchedule) -> NamedSchedule:
        """The row that stands for this schedule, which is drawn once under one name."""
        return drawn.setdefault(str(sorted(row.settings.items(), key=str)), row)

    return {
        family: [
            once(NamedSchedule(name, row if (kind := schedules[family]) is None else {"schedule": kind, **row}))
            for name, row in rows.items()
        ]
        for family, rows in counted.items()
    }


def gains(rows: Mapping[str, Compared], planned: Sequence[str], curve: Sequence[str]) -> dict[str, dict[str, float]]:
    """How much faster each planned row is than the large model alone at the same mean PSNR, read off its curve between points;
    with intervals over prompts. Rows beyond the curve's ends are left out."""
    order = sorted(curve, key=lambda name: rows[name].speedup.median, reverse=True)
    speeds = np.log([rows[name].speedup.median for name in order])
    levels = np.stack([weighted_means(rows[name].to_converged["psnr"]) for name in order])  # [curve, draws], the fastest first
    found = {}
    for name in planned:
        mine = weighted_means(rows[name].to_converged["psnr"])
        if not levels[:, 0].min() <= mine[0] <= levels[:, 0].max():
            continue
        at = [np.interp(mine[i], np.maximum.accumulate(levels[:, i]), speeds) for i in range(len(mine))]
        ratio = rows[name].speedup.median / np.exp(at)
        low, high = interval(ratio[1:])
        found[name] = {"value": round(float(ratio[0]), 4), "low": round(low, 4), "high": round(high, 4)}
    return found


def differences(rows: Mapping[str, Compared], planned: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """By planned row: the nearest baseline that is at least as fast (to 2 %), and PSNR over it, paired over prompts."""
    found = {}
    for name in planned:
        mine = rows[name]
        rivals = [
            other
            for other in others
            if rows[other].speedup.median >= 0.98 * mine.speedup.median and rows[other].plan != mine.plan
        ]
        if not rivals:
            continue
        best = max(rivals, key=lambda other: rows[other].to_converged["psnr"].mean())
        over = mine.to_converged["psnr"] - rows[best].to_converged["psnr"]
        low, high = mean_interval(over)
        found[name] = {"baseline": best, "value": round(float(over.mean()), 3), "low": round(low, 3), "high": round(high, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/out/demo"), help="work folder of the demo pair")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="of a call")
    parser.add_argument("--help-out", action="store_true", help="only draw, from the last prompt on")
    arguments = parser.parse_args()
    recipe, kept = load_recipe("demo"), arguments.work / "eval"
    sprites = Sprites(fetch(arguments.work))
    known = heldout.training_captions(arguments.work, kept, sprites)
    cases = heldout.held_out(sprites, known, arguments.prompts + REAL)
    asked, others = cases[: arguments.prompts], cases[arguments.prompts :]
    pipeline = open_pipeline(recipe, kept, arguments.threads)
    kinds = families(pipeline)
    rows = list({row.name: row for family in kinds.values() for row in family}.values())
    seer, *_ = taught(pipeline, pair_folder(recipe) / "vae", kept, sprites)

    def judge(part: Sequence[heldout.Case], pixels: np.ndarray) -> np.ndarray:
        present, _ = classifier.look(seer, lessons.shrunk(pixels))
        right: np.ndarray = (present == wanted(part)).all(1)
        return right

    comparison = compare(
        pipeline, asked[::-1] if arguments.help_out else asked, rows, kept / "frontier",
        baseline_steps=STEPS, real=heldout.pictures(others, sprites), judge=judge, same_steps=False, say=say,
    )  # fmt: skip
    if arguments.help_out:
        return
    made = {one.row.name: one for one in comparison.rows}
    planned = list(dict.fromkeys(row.name for row in kinds[PLANNER]))
    baselines = [row.name for family, rows in kinds.items() if family != PLANNER for row in rows] + ["large"]
    alone = [row.name for row in kinds[ALONE]]
    content = {
        "machine": machine(arguments.threads),
        "fingerprint": pipeline.bundle.manifest.fingerprint,
        "planned": {f"{speedup:g}": row.name for speedup, row in zip(BUDGETS, kinds[PLANNER], strict=True)},
        "families": {family: list(dict.fromkeys(row.name for row in rows)) for family, rows in kinds.items()},
        "gain": gains(made, planned, alone),
        "over_best_baseline": differences(made, planned, baselines),
        **as_dict(comparison),
    }
    OUT.write_text(json.dumps(content, indent=1) + "\n")
    say(f"wrote {OUT}")


if __name__ == "__main__":
    main()
