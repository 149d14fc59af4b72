"""``hst-trt export-triton``: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click

from ..integrations.triton import Serving, export_repository
from .console import bars, print_json, tables
from .options import THREADS, find_bundle

__all__ = ["export_triton"]


@click.command()
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True)
@click.argument("repository", metavar="REPO", type=click.Path(path_type=Path))
@click.option("--name", help="Of the model in Triton. [default: the pair's]")
@click.option("--instances", type=int, default=1, show_default=True, help="Pipelines side by side; of each GPU, for engines.")
@THREADS
@click.option("--max-batch", type=int, help="Requests drawn together. [default: 4 for the CPU, 1 for engines]")
@click.option(
    "--queue", type=int, default=64, show_default=True, help="Requests that may wait; more are refused. 0 for any number."
)
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds that a request may wait; 0 for any time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def export_triton(
    bundles: tuple[str, ...],
    repository: Path,
    name: str | None,
    instances: int,
    threads: int,
    max_batch: int | None,
    queue: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Write a model repository for Triton Inference Server.

    BUNDLE: paths or names, of one pair of models: one for the CPU, or one for each kind of GPU, or both. REPO: a folder that
    is not there, empty, or was written by this command; then it is replaced.
    """
    serving = Serving(instances, threads, max_batch, queue, timeout)
    with bars(quiet=as_json) as progress:
        task = progress.add_task("hashing", total=None, note="")
        made = export_repository(
            [find_bundle(bundle) for bundle in bundles],
            repository,
            model=name,
            serving=serving,
            on_hash=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        print_json("hst_trt.export_triton/1", {"repository": str(made.path), "model": made.model, "bundles": made.bundles})
        return
    tables.print(made.path)
    for key, bundle in made.bundles.items():
        tables.print(f"{made.model} draws with {bundle} on {'everything else' if key == 'default' else f'GPUs of {key}'}")
