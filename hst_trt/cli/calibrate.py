"""``hst-trt calibrate``: measures once per pair how far many schedules are from the large model, for `plan --speedup`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import RequestError
from .console import bars, print_json, tables
from .options import BUNDLE, DEVICE, PROMPTS, THREADS, find_bundle, prompts_of, size_options

__all__ = ["calibrate"]

LEAST_PROMPTS = 4


@click.command()
@BUNDLE
@PROMPTS
@click.option("--schedules", "count", type=int, default=300, show_default=True, help="How many schedules to measure.")
@size_options
@click.option("--baseline-steps", type=int, help="Steps of the large-only run that speed-ups are over; the bundle's default.")
@click.option("--converged-steps", type=int, default=80, show_default=True, help="Steps of the run that distances are to.")
@DEVICE
@THREADS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def calibrate(
    bundle: str | None,
    prompts_file: Path | None,
    count: int,
    height: int | None,
    width: int | None,
    baseline_steps: int | None,
    converged_steps: int,
    device: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure how far schedules are from the converged large model, and write it into the bundle.

    Once per pair and size, on any machine: distances do not depend on it. `hst-trt plan --speedup` and `hst-trt run --speedup`
    then choose for the machine they are on. Every schedule is measured on the first 24 prompts, and those that come near being
    chosen on all of them. The same command goes on where an earlier one was stopped; more --schedules add to it.
    """
    prompts = prompts_of(prompts_file)
    if len(prompts) < LEAST_PROMPTS:
        raise RequestError(f"{len(prompts)} prompts say too little of a pair", fix=f"give {LEAST_PROMPTS} or more; 72 are good")
    if count < 1:
        raise RequestError(f"--schedules {count} is not positive", fix="300 is the default")

    from ..compare.rows import Prompt
    from ..pipeline import HybridStitchPipeline
    from ..planner.calibrate import calibrate as run
    from ..planner.choose import frontier
    from ..workspace import RequestShape

    with bars(quiet=as_json) as progress:
        task = progress.add_task("calibrate", total=count, note="the converged large model")
        pipeline = HybridStitchPipeline.from_bundle(find_bundle(bundle, device), device=device, threads=threads)
        entry = run(
            pipeline,
            [Prompt(number, prompt) for number, prompt in enumerate(prompts)],
            count,
            height=height,
            width=width,
            baseline_steps=baseline_steps,
            converged_steps=converged_steps,
            on_measured=lambda done, of, note: progress.update(task, completed=done, total=of, note=note),
        )
    costs = pipeline.costs(RequestShape(1, entry.guidance_scale > 1, *pipeline.grid(height, width)))
    best = frontier(pipeline.bundle, entry, costs)
    if as_json:
        rows = [{"options": o.options, **o.distance.to_dict(), "speedup": round(o.speedup, 4)} for o in best]
        content = {"bundle": str(pipeline.bundle.path), "cost_source": costs.source, "frontier": rows}
        print_json("hst_trt.calibrate/1", content | entry.model_dump(mode="json"))
        return
    from rich.table import Table

    confirmed = sum(schedule.confirmed is not None for schedule in entry.schedules)
    on_all = f", {confirmed} of them {entry.prompts + entry.further_prompts}" if confirmed else ""
    title = f"{len(entry.schedules)} schedules, {entry.prompts} prompts{on_all}: the best"
    table = Table("speed-up", "distance", "options", title=title)
    for row in best:
        table.add_row(f"{row.speedup:.2f}x", str(row.distance), row.options)
    tables.print(table)
    tables.print("to choose one for a budget: hst-trt plan --speedup 1.83")
