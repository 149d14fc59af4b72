"""Measures call costs and settles the plans, once for each bundle and machine.

Where arithmetic leaves a choice (how many of the steps before the small stage are large and how many hybrid, the mask's
ratio, and whether the correction helps), it falls on what comes nearest to the large model on a few prompts that are in no
other set. The split's correction is chosen in the same way, so neither has a setting that the other was denied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.evaluate.heldout import Case
from demo.evaluate.plans import SLACK, Row, fewer, hybrids, longer, randomised, splits
from hst_trt.bench import RunBench, bench_calls, bench_runs
from hst_trt.compare.store import read_json, write_json
from hst_trt.cost import CallCosts
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import StitchPlan
from hst_trt.workspace import RequestShape

CALL_ROUNDS, RUN_ROUNDS = 15, 7


@dataclass(frozen=True)
class Choice:
    """The rows by name, and how they came about: measured calls and runs, and every candidate's distance."""

    rows: dict[str, Row]
    record: dict[str, Any]


def choose(pipeline: HybridStitchPipeline, cases: Sequence[Case], folder: Path) -> Choice:
    """Reads the choice from `folder`, or makes it there, candidate by candidate.

    Args:
        cases: prompts to choose on, in no other set.
    """
    file = folder / "plans.json"
    if (kept := read_json(file)) is None:
        kept = _choose(pipeline, cases, folder)
        write_json(file, kept)
    rows = {name: Row(**row | {"stages": row["stages"] and tuple(row["stages"])}) for name, row in kept["rows"].items()}
    return Choice(rows, kept["record"])


def _choose(pipeline: HybridStitchPipeline, cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    steps = pipeline.bundle.manifest.defaults.num_inference_steps

    def plan_of(row: Row) -> StitchPlan:
        return pipeline.plan(**row.arguments())

    large = Row("large", steps)
    print("measuring calls", flush=True)
    calls = bench_calls(pipeline, plan_of(large), RequestShape(1, True, *pipeline.grid()), CALL_ROUNDS)
    costs = calls.costs()
    rate = _Rate(pipeline, cases, large, folder / "distances.json")
    hybrid = rate.best(hybrids(plan_of, costs, steps))
    budget = plan_of(hybrid).cost(costs)
    rivals = {"split": rate.best(splits(plan_of, costs, steps, budget)), "fewer": fewer(budget)}
    rivals, runs = _matched(pipeline, {"large": large, "hybrid": hybrid}, rivals, costs)
    rows = {
        "large": large,
        "hybrid": hybrid,
        "split": rivals["split"],
        "random": randomised(hybrid),
        "fewer": rivals["fewer"],
        "small": Row("small", steps),
    }
    record = {
        **calls.to_dict(),
        **runs.to_dict(),
        "predicted": {name: round(steps / plan_of(row).cost(costs), 4) for name, row in rows.items()},
        "costs": {"small": costs.small(), "large": {str(count): costs.large(count) for count in calls.tokens}},
        "candidates": rate.distances,
        "candidate_prompts": len(cases),
    }
    return {"rows": {name: asdict(row) for name, row in rows.items()}, "record": record}


def _matched(
    pipeline: HybridStitchPipeline, rows: dict[str, Row], rivals: dict[str, Row], costs: CallCosts
) -> tuple[dict[str, Row], RunBench]:
    """The rivals with so many large steps more that whole runs of theirs take as long as the hybrid's, and those runs.

    Call costs leave out what is between the calls, so only runs, in turn, show whether the budget is met.
    """
    while True:
        print("measuring runs", flush=True)
        runs = bench_runs(pipeline, {name: row.arguments() for name, row in (rows | rivals).items()}, costs, RUN_ROUNDS)
        short = [name for name in rivals if runs.loop["hybrid"].over(runs.loop[name]).median > 1 + SLACK]
        if not short:
            return rivals, runs
        rivals = rivals | {name: longer(rivals[name]) for name in short}


class _Rate:
    """How far a row's latents end from the large model's, root mean square; kept in a file row by row."""

    def __init__(self, pipeline: HybridStitchPipeline, cases: Sequence[Case], large: Row, file: Path) -> None:
        self._pipeline, self._cases, self._file = pipeline, cases, file
        self._wanted = self._latents(large)
        self.distances: dict[str, float] = read_json(file, {})

    def best(self, rows: Sequence[Row]) -> Row:
        return min(rows, key=self._distance)

    def _distance(self, row: Row) -> float:
        if str(row) not in self.distances:
            error = np.square(self._latents(row) - self._wanted).mean((1, 2, 3))
            self.distances[str(row)] = round(float(np.sqrt(error).mean()), 5)
            write_json(self._file, self.distances)
            print(f"{row}: {self.distances[str(row)]:.4f} from the large model's latents", flush=True)
        return self.distances[str(row)]

    def _latents(self, row: Row) -> np.ndarray:
        drawn = [
            self._pipeline(case.prompt, seed=case.number, output_type="latent", **row.arguments()).images
            for case in self._cases
        ]
        return np.concatenate(drawn)
