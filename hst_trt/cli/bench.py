"""``hst-trt bench``: what calls and whole runs of a bundle take on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from .console import bars, messages, print_json, tables
from .options import BUNDLE, DEVICE, THREADS, find_bundle, plan_arguments, schedule_options, size_options

if TYPE_CHECKING:
    from ..bench import CallBench, RunBench

__all__ = ["bench"]

_IDLE = 0.9  # CPU time over wall time that runs of one thread have on a CPU at least, if nothing else wants it


@click.command()
@BUNDLE
@schedule_options
@size_options
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; off at 1 and below.")
@click.option("--rounds", type=int, default=15, show_default=True, help="Interleaved rounds of calls.")
@click.option("--run-rounds", type=int, default=5, show_default=True, help="Interleaved rounds of whole runs; 0 for none.")
@DEVICE
@THREADS
@click.option("--save-costs", is_flag=True, help="Write the costs of calls into the bundle, where plan and run find them.")
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also draw figures into this folder: latency, time of each step, breakdown.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def bench(
    bundle: str | None,
    guidance_scale: float | None,
    rounds: int,
    run_rounds: int,
    device: int,
    threads: int,
    save_costs: bool,
    plots: Path | None,
    as_json: bool,
    **schedule: Any,
) -> None:
    """Time calls (large full and masked, small, text, VAE, glue) and whole runs (large, small, and --schedule).

    Calls and schedules take turns within a round; figures are medians, ratios are formed round by round.
    """
    if rounds < 3 or run_rounds < 0:
        raise RequestError("--rounds must be 3 or more and --run-rounds 0 or more", fix="15 and 5 are the defaults")
    arguments = plan_arguments(schedule)
    name = arguments["schedule"]

    from .. import plots as figures
    from ..bench import bench_calls, bench_runs, costs_entry, draw_plots, memory_used
    from ..bundle import save_costs as save
    from ..pipeline import HybridStitchPipeline
    from ..workspace import RequestShape

    if plots is not None:
        figures.open_folder(plots)
    with bars(quiet=as_json) as progress:
        task = progress.add_task("bench", total=2, note="calls")
        pipeline = HybridStitchPipeline.from_bundle(find_bundle(bundle, device), device=device, threads=threads)
        plan = pipeline.plan(**arguments)
        scale = pipeline.bundle.manifest.defaults.guidance_scale if guidance_scale is None else guidance_scale
        shape = RequestShape(1, scale > 1, *pipeline.grid(arguments["height"], arguments["width"]))
        calls = bench_calls(pipeline, plan, shape, rounds)
        progress.update(task, completed=1, note="whole runs")
        runs = None
        if run_rounds:
            size = {key: arguments.pop(key) for key in ("height", "width")}
            steps = arguments["num_inference_steps"]
            plans = {name: {"schedule": name, "num_inference_steps": steps} for name in ("large", "small")}
            plans[name] = arguments
            runs = bench_runs(pipeline, plans, calls.costs(), run_rounds, guidance_scale=scale, **size)
        progress.update(task, completed=2, note="")
    entry, memory = costs_entry(pipeline, shape, calls), memory_used(pipeline)
    if as_json:
        content = {
            "bundle": str(pipeline.bundle.path),
            "machine": entry.machine,
            "threads": threads,
            **calls.to_dict(),
            **(_runs(runs) if runs else {}),
            "memory": vars(memory),
            "costs": entry.model_dump(mode="json"),
        }
        print_json("hst_trt.bench/1", content)
    else:
        _print_calls(calls, entry.machine)
        if runs is not None:
            _print_runs(runs, len(plan.steps))
        gpu = "" if memory.gpu_used_bytes is None else f", in use on the GPU {memory.gpu_used_bytes / 2**20:.0f} MiB"
        tables.print(f"memory: peak of this process {memory.peak_resident_bytes / 2**20:.0f} MiB{gpu}")
    if runs is not None and memory.gpu_used_bytes is None and runs.cpu_share() < _IDLE:
        messages.print(
            f"this machine was busy: the runs had {runs.cpu_share():.2f} of a CPU, and use one or more where they can; "
            "times and costs are those of a busy machine"
        )
    # What was measured is printed by now, so a full disk or a bundle that cannot be written loses nothing.
    if plots is not None:
        for path in draw_plots(plots, calls, runs, name):
            messages.print(f"wrote {path}")
    if save_costs:
        save(pipeline.bundle, entry)
        messages.print(f"costs of one {entry.width}x{entry.height} image saved in {pipeline.bundle.path}")


def _runs(runs: RunBench) -> dict[str, Any]:
    rows = runs.to_dict()["runs"]
    return {"runs": {name: row | {"steps": runs.details[name].step_rows()} for name, row in rows.items()}}


def _print_calls(calls: CallBench, machine: str) -> None:
    from rich.table import Table

    title = f"{calls.num_tokens} tokens on {machine}"
    table = Table("call", "ms", "quartiles", "of a full call", "cost model", "over model", title=title)
    for name, row in calls.to_dict()["calls"].items():
        s, of_full = row["seconds"], row["of_full"]["median"]
        spread = f"{1e3 * s['q25']:.2f} .. {1e3 * s['q75']:.2f}"
        model = [f"{row['cost_model']:.3f}", f"{row['over_model']:.3f}"] if "cost_model" in row else ["", ""]
        table.add_row(name, f"{1e3 * s['median']:.2f}", spread, f"{of_full:.3f}", *model)
    tables.print(table)
    if fit := calls.fit():
        line = f"{1e3 * fit.at_zero:.2f} ms + {1e6 * fit.each:.2f} µs a token"
        tables.print(f"large calls by a straight line: {line}, R² = {fit.r2:.4f}")


def _print_runs(runs: RunBench, steps: int) -> None:
    from rich.table import Table

    columns = ("schedule", "loop ms", "quartiles", "faster", "expected", "share", "run ms", "CPU", "outside")
    table = Table(*columns, title=f"{steps} steps")
    for name, row in runs.to_dict()["runs"].items():
        s = row["loop_seconds"]
        table.add_row(
            name,
            f"{1e3 * s['median']:.1f}",
            f"{1e3 * s['q25']:.1f} .. {1e3 * s['q75']:.1f}",
            f"{row['loop_speedup']['median']:.3f}",
            f"{row['predicted_speedup']:.3f}",
            f"{row['of_predicted']:.3f}",
            f"{1e3 * row['total_seconds']['median']:.1f}",
            f"{row['cpu_over_wall']['median']:.2f}",
            f"{row['overhead']['median']:.1%}" if row["overhead"] else "",
        )
    tables.print(table)
    tables.print(
        "faster: speed-up of the loop over large; expected: from the calls above; share: of expected;\n"
        "CPU: CPU time of all threads over wall time of a run;\n"
        "outside: the loop's time outside the transformers, of the whole run"
    )
