"""``hst-trt bench``: what calls and whole runs of a bundle take on this machine."""

from __future__ import annotations

from typing import Any

import click

from ..errors import RequestError
from .console import bars, print_json, tables
from .options import BUNDLE, find_bundle, plan_arguments, schedule_options, size_options

__all__ = ["bench"]


@click.command()
@BUNDLE
@schedule_options
@size_options
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; off at 1 and below.")
@click.option("--rounds", type=int, default=15, show_default=True, help="Interleaved rounds of calls.")
@click.option("--run-rounds", type=int, default=5, show_default=True, help="Interleaved rounds of whole runs; 0 for none.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of a call; 0 takes one per physical core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def bench(
    bundle: str | None,
    guidance_scale: float | None,
    rounds: int,
    run_rounds: int,
    threads: int,
    as_json: bool,
    **schedule: Any,
) -> None:
    """Time calls (large full and masked, small, text, VAE) and whole runs (large, small, and --schedule).

    Calls and schedules take turns within a round; figures are medians, ratios are formed round by round.
    """
    if rounds < 3 or run_rounds < 0:
        raise RequestError("--rounds must be 3 or more and --run-rounds 0 or more", fix="15 and 5 are the defaults")
    arguments = plan_arguments(schedule)

    from ..bench import bench_calls, bench_runs
    from ..pipeline import HybridStitchPipeline
    from ..workspace import RequestShape

    with bars(quiet=as_json) as progress:
        task = progress.add_task("bench", total=2, note="calls")
        pipeline = HybridStitchPipeline.from_bundle(find_bundle(bundle), threads=threads)
        plan = pipeline.plan(**arguments)
        scale = pipeline.bundle.manifest.defaults.guidance_scale if guidance_scale is None else guidance_scale
        h, w = pipeline.grid(arguments["height"], arguments["width"])
        calls = bench_calls(pipeline, plan, RequestShape(1, scale > 1, h, w), rounds)
        progress.update(task, completed=1, note="whole runs")
        runs = None
        if run_rounds:
            size = {key: arguments.pop(key) for key in ("height", "width")}
            steps = arguments["num_inference_steps"]
            plans = {name: {"schedule": name, "num_inference_steps": steps} for name in ("large", "small")}
            plans[arguments["schedule"]] = arguments
            runs = bench_runs(pipeline, plans, calls.costs(), run_rounds, guidance_scale=scale, **size)
        progress.update(task, completed=2, note="")
    if as_json:
        content = {
            "bundle": str(pipeline.bundle.path),
            "threads": threads,
            **calls.to_dict(),
            **(runs.to_dict() if runs else {}),
        }
        print_json("hst_trt.bench/1", content)
        return
    from rich.table import Table

    table = Table("call", "ms", "quartiles", "of a full call", "cost model", "over model", title=f"{calls.num_tokens} tokens")
    for name, row in calls.to_dict()["calls"].items():
        s, of_full = row["seconds"], row["of_full"]["median"]
        spread = f"{1e3 * s['q25']:.2f} .. {1e3 * s['q75']:.2f}"
        model = [f"{row['cost_model']:.3f}", f"{row['over_model']:.3f}"] if "cost_model" in row else ["", ""]
        table.add_row(name, f"{1e3 * s['median']:.2f}", spread, f"{of_full:.3f}", *model)
    tables.print(table)
    if runs is None:
        return
    columns = ("schedule", "loop ms", "quartiles", "faster", "expected", "share", "run ms", "outside")
    table = Table(*columns, title=f"{len(plan.steps)} steps")
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
            f"{row['overhead']['median']:.1%}" if row["overhead"] else "",
        )
    tables.print(table)
    tables.print(
        "faster: speed-up of the loop over large; expected: from the calls above; share: of expected;\n"
        "outside: the loop's time outside the transformers, of the whole run"
    )
