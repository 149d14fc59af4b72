"""Does the time of a run grow as the model says: in a straight line over tokens, steps and images?

Everything in interleaved rounds, medians, fitted by least squares. Writes benchmarks/results/cost_fits.json and
docs/images/cost_fits.png.

    python benchmarks/cost_fits.py [--threads 1] [--rounds 15]
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from about import machine

from hst_trt.bench import LinearFit, Sample, bench_calls, straight_line
from hst_trt.builder.build import build_bundle
from hst_trt.compare.store import write_json
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plots import lines_figure, save_figure
from hst_trt.recipe import load_recipe, load_target
from hst_trt.workspace import RequestShape

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "cost_fits.json"
BUNDLE = ROOT / "build" / "out" / "planner_check" / "demo-cpu.hstb"
FIGURE = ROOT / "docs" / "images" / "cost_fits.png"
STEPS, IMAGES = (4, 8, 12, 16, 20, 24, 28), (1, 2, 3, 4)


def measured(rounds: int, runs: dict[int, dict[str, Any]], pipeline: HybridStitchPipeline) -> dict[int, Sample]:
    """Seconds of the denoising loop by step or image count, in rounds that begin with another run each."""
    times: dict[int, list[float]] = {count: [] for count in runs}
    for number in range(-1, rounds):
        for count in np.roll(list(runs), number).tolist():
            output = pipeline("a red apple on a blue background", seed=0, **runs[count])
            if number >= 0:
                times[count].append(output.stats.seconds["denoise"])
    return {count: Sample(tuple(values)) for count, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of a call")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    bundle = build_bundle(
        load_recipe("demo"), load_target("cpu"), ROOT / "build" / "out" / "planner_check" / "demo-cpu.hstb"
    ).bundle
    pipeline = HybridStitchPipeline.from_bundle(bundle.path, threads=arguments.threads)
    calls = bench_calls(pipeline, pipeline.plan(), RequestShape(1, True, *pipeline.grid()), arguments.rounds, warmup=3)
    few = {"schedule": "hybrid", "num_inference_steps": 6, "stages": (2, 3, 1)}
    series: dict[str, dict[int, Sample]] = {"tokens": calls.large_seconds()}
    for schedule in ("large", "hybrid"):
        runs = {n: {"schedule": schedule, "num_inference_steps": n} | _stages(schedule, n) for n in STEPS}
        series[f"steps, {schedule}"] = measured(arguments.rounds, runs, pipeline)
    series["images, hybrid"] = measured(arguments.rounds, {n: few | {"num_images_per_prompt": n} for n in IMAGES}, pipeline)
    fits: dict[str, LinearFit] = {
        name: straight_line(list(points), [sample.median for sample in points.values()]) for name, points in series.items()
    }
    content = {
        "machine": machine(arguments.threads),
        "rounds": arguments.rounds,
        "series": {
            name: {"fit": dataclasses.asdict(fits[name]), "seconds": {str(count): s.to_dict() for count, s in points.items()}}
            for name, points in series.items()
        },
    }
    write_json(OUT, content)
    panels = {
        name: ({count: sample.quartiles for count, sample in points.items()}, dataclasses.astuple(fits[name]))
        for name, points in series.items()
    }
    save_figure(lines_figure(panels), FIGURE)
    for name, fit in fits.items():
        print(f"{name}: R^2 = {fit.r2:.5f}")


def _stages(schedule: str, steps: int) -> dict[str, Any]:
    """A quarter large, half hybrid, a quarter small, so that steps of each kind grow alike."""
    return {} if schedule == "large" else {"stages": (steps // 4, steps // 2, steps // 4), "refresh_every": 0}


if __name__ == "__main__":
    main()
