"""Is the planner right? What it promises is measured, and what it chose stands against schedules at random.

For each asked speed-up over 28 large steps: the measured one, in interleaved rounds; and the distance to the converged large
model on held-out prompts, beside that of 50 schedules of the planner's own space, drawn at random among those whose predicted
cost is within 2 % of the choice's. Writes benchmarks/results/planner_check.json; what was measured is kept in build/out, so the
same command goes on where it was stopped.

    python benchmarks/planner_check.py [--prompts 16] [--threads 1] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from about import machine

from hst_trt.bench import Sample
from hst_trt.builder.build import build_bundle
from hst_trt.cli.options import prompts_of
from hst_trt.compare.features import Features
from hst_trt.compare.measures import interval, weighted_means
from hst_trt.compare.rows import Prompt
from hst_trt.compare.store import read_json, write_json
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.planner.calibrate import Calibrator, Panel
from hst_trt.planner.choose import Budget, calibration_of, choose
from hst_trt.planner.space import Point
from hst_trt.recipe import load_recipe, load_target

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "planner_check.json"
WORK = ROOT / "build" / "out" / "planner_check"
ASKED = (1.5, 1.83, 2.5, 3.5)
RIVALS, SAME_COST = 50, 0.02


def rivals(calibrator: Calibrator, chosen: Point, seed: int) -> list[Point]:
    """Schedules at random that cost as much; no seed is chosen, it is the index of the question."""
    rng, wanted = np.random.default_rng(seed), calibrator.speedup(chosen)
    found: dict[Point, None] = {}
    while len(found) < RIVALS:
        point = calibrator.space.random(rng)
        if point != chosen and abs(calibrator.speedup(point) / wanted - 1) <= SAME_COST:
            found[point] = None
    return list(found)


def measured_speedup(pipeline: HybridStitchPipeline, point: Point, baseline_steps: int, rounds: int) -> Sample:
    """Of the loop, round by round."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(-2, rounds):
        for planned in (number % 2 == 0, number % 2 == 1):
            settings = point.settings if planned else {"schedule": "large", "num_inference_steps": baseline_steps}
            output = pipeline("a red apple on a blue background", seed=number + 2, **settings)
            if number >= 0:
                times[planned].append(output.stats.seconds["denoise"])
    return Sample(tuple(times[False])).over(Sample(tuple(times[True])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of a call")
    parser.add_argument("--rounds", type=int, default=15, help="of timing; 0 leaves it as it was")
    arguments = parser.parse_args()
    bundle = build_bundle(load_recipe("demo"), load_target("cpu"), WORK / "demo-cpu.hstb").bundle
    pipeline = HybridStitchPipeline.from_bundle(bundle.path, threads=arguments.threads)
    prompts = prompts_of(ROOT / "benchmarks" / "prompts" / "heldout.txt")[: arguments.prompts]
    calibration = calibration_of(bundle, None, None)
    panel = Panel(pipeline, [Prompt(i, text) for i, text in enumerate(prompts)], calibration, Features())
    calibrator = Calibrator(pipeline, panel, panel, calibration)
    kept = WORK / f"distances-{bundle.manifest.fingerprint[:12]}-{len(prompts)}.json"
    known: dict[str, list[list[float]]] = read_json(kept, {})
    before = read_json(OUT, {"asked": {}})["asked"]

    def distances(point: Point) -> np.ndarray:
        """What the planner minimises, of the prompts as they are and of every resample."""
        if repr(point) not in known:
            known[repr(point)] = panel.distances(point).tolist()
            write_json(kept, known)
        latents, features = (weighted_means(np.array(values)) for values in known[repr(point)])
        return np.sqrt(latents * features)

    asked: dict[str, Any] = {}
    for number, speedup in enumerate(ASKED):
        choice = choose(bundle, Budget(speedup=speedup), None)
        mine = distances(choice.best.point)
        others = {point: distances(point) for point in rivals(calibrator, choice.best.point, number)}
        best = min(others, key=lambda point: others[point][0])
        ratios = mine / others[best]
        low, high = interval(ratios[1:])
        asked[f"{speedup:g}"] = {
            "options": choice.best.options,
            "predicted": round(choice.best.speedup, 4),
            "distance": round(float(mine[0]), 5),
            "best_rival": {"point": str(best.settings), "distance": round(float(others[best][0]), 5)},
            "over_best_rival": {"value": round(float(ratios[0]), 4), "low": round(low, 4), "high": round(high, 4)},
            "rivals_nearer": sum(bool(other[0] < mine[0]) for other in others.values()),
            "rivals": len(others),
        }
        if arguments.rounds:
            sample = measured_speedup(pipeline, choice.best.point, calibration.baseline_steps, arguments.rounds)
            asked[f"{speedup:g}"]["measured"] = sample.to_dict(4)
        elif before.get(f"{speedup:g}", {}).get("options") == choice.best.options:
            asked[f"{speedup:g}"]["measured"] = before[f"{speedup:g}"].get("measured")
        print(speedup, json.dumps(asked[f"{speedup:g}"]), flush=True)
    write_json(
        OUT,
        {
            "machine": machine(arguments.threads),
            "prompts": len(prompts),
            "fingerprint": bundle.manifest.fingerprint,
            "asked": asked,
        },
    )


if __name__ == "__main__":
    main()
