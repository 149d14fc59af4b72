"""``hst-trt compare``: the same prompts and seeds by many schedules, beside the converged large model."""

from __future__ import annotations

from pathlib import Path

import click

from .console import bars, messages, print_json, tables
from .options import BUNDLE, DEVICE, PROMPTS, THREADS, find_bundle, prompts_of, schedules_of, size_options

__all__ = ["compare"]


@click.command()
@BUNDLE
@PROMPTS
@click.option(
    "--schedules-file",
    type=click.Path(path_type=Path),
    help="Schedules, one a line: NAME: OPTIONS OF hst-trt run. [default: one of every kind]",
)
@size_options
@click.option("--baseline-steps", type=int, help="Steps of the large-only run that speed-ups are over; the bundle's default.")
@click.option("--converged-steps", type=int, default=80, show_default=True, help="Steps of the run that distances are to.")
@click.option("--real-dir", type=click.Path(path_type=Path), help="Folder of real pictures, for KID and FID.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("compared"),
    show_default=True,
    help="Report and pictures; a stopped comparison goes on where it was.",
)
@DEVICE
@THREADS
@click.option("--json", "as_json", is_flag=True, help="Print the report's JSON object instead of a table.")
def compare(
    bundle: str | None,
    prompts_file: Path | None,
    schedules_file: Path | None,
    height: int | None,
    width: int | None,
    baseline_steps: int | None,
    converged_steps: int,
    real_dir: Path | None,
    output_dir: Path,
    device: int,
    threads: int,
    as_json: bool,
) -> None:
    """Draw the same prompts and seeds by many schedules, and say what each costs and how far it is from the large model.

    Writes report.html and report.json.
    """
    prompts = prompts_of(prompts_file)
    rows = None if schedules_file is None else schedules_of(schedules_file)

    import datetime
    import json

    from ..compare.report import as_dict, as_html, points
    from ..compare.rows import Prompt, usual_schedules
    from ..compare.run import compare as run
    from ..disk import translated_disk_errors
    from ..images import read_pictures
    from ..pipeline import HybridStitchPipeline
    from ..plots import frontier_figure, open_folder, svg

    open_folder(output_dir)  # before pictures are drawn for half an hour
    with bars(quiet=as_json) as progress:
        task = progress.add_task("compare", total=None, note="")
        pipeline = HybridStitchPipeline.from_bundle(find_bundle(bundle, device), device=device, threads=threads)
        grid = pipeline.grid(height, width)
        real = None
        if real_dir is not None:
            side = pipeline.spec.token_side
            real = read_pictures(real_dir, (grid[1] * side, grid[0] * side))
        steps = pipeline.bundle.manifest.defaults.num_inference_steps if baseline_steps is None else baseline_steps
        comparison = run(
            pipeline,
            [Prompt(number, prompt) for number, prompt in enumerate(prompts)],
            usual_schedules(steps) if rows is None else rows,
            output_dir,
            baseline_steps=steps,
            converged_steps=converged_steps,
            size={"height": height, "width": width},
            real=real,
            say=lambda text: progress.update(task, note=text),
        )
        progress.update(task, note="report")
        made = {
            "bundle": str(pipeline.bundle.path),
            "fingerprint": pipeline.bundle.manifest.fingerprint,
            "machine": pipeline.backend.machine.name,
            "threads": pipeline.backend.machine.threads,
            "date": datetime.date.today().isoformat(),
            **as_dict(comparison),
        }
        plot = svg(frontier_figure(points(comparison), "PSNR to the converged large model, dB"))
        page = as_html(comparison, pipeline, f"Schedules of {pipeline.bundle.manifest.name}", plot)
        with translated_disk_errors(output_dir):
            (output_dir / "report.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
            (output_dir / "report.html").write_text(page, encoding="utf-8")
    if as_json:
        print_json("hst_trt.compare/1", made)
        return
    from rich.table import Table

    table = Table(
        "schedule", "speed-up", "PSNR, dB", "interval", "options", title=f"{len(prompts)} prompts, to the converged large model"
    )
    for row in sorted(made["rows"], key=lambda row: row["speedup"]["median"]):
        psnr = row["to_converged"]["psnr"]
        spread = f"{psnr['low']:.2f} .. {psnr['high']:.2f}"
        table.add_row(row["name"], f"{row['speedup']['median']:.2f}x", f"{psnr['value']:.2f}", spread, row["options"])
    tables.print(table)
    for note in comparison.notes:
        messages.print(note)
    click.echo(output_dir / "report.html")
