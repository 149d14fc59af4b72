"""``hst-trt validate``: parity of every engine with its graph in float32."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import HstError, NumericsError
from .console import bars, print_json, tables
from .options import BUNDLE, DEVICE, find_bundle

if TYPE_CHECKING:
    from ..validate import Parity

__all__ = ["validate"]


@click.command()
@BUNDLE
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def validate(bundle: str | None, device: int, as_json: bool) -> None:
    """Compare every engine of a bundle with its graph in float32, on the calls of real requests.

    Ends with exit code 7 if one departs by more than its precision allows. Needs the export extra.
    """
    from ..validate import validate as compare_all

    path: Path = find_bundle(bundle, device)
    with bars(quiet=as_json) as progress:
        task = progress.add_task("calls", total=None, note="")
        results = compare_all(path, device=device, on_call=lambda parity: progress.update(task, advance=1, note=parity.engine))
    shapes = Counter(parity.engine for parity in results)
    worst = {parity.engine: parity for parity in sorted(results, key=lambda parity: parity.excess)}
    departed = [parity for parity in worst.values() if not parity.holds]
    if as_json:
        engines = {
            name: {
                "shapes": shapes[name],
                "worst_error": p.error if math.isfinite(p.error) else None,
                "tolerance": p.tolerance,
                "worst_shape": p.shape,
            }
            for name, p in worst.items()
        }
        print_json("hst_trt.validate/1", {"bundle": str(path), "holds": not departed, "engines": engines})
    else:
        from rich.table import Table

        table = Table("engine", "shapes", "worst error", "allowed", title=f"{path.stem}: beside graphs in float32")
        for name in shapes:
            table.add_row(name, str(shapes[name]), f"{worst[name].error:.2g}", f"{worst[name].tolerance:g}")
        tables.print(table)
    if departed:
        most = next(parity for parity in results if parity.call is not None)
        raise NumericsError(
            f"{len(departed)} of {len(worst)} engines depart from their graphs, most of all {most.engine}",
            found=f"error {most.error:.2g}, allowed {most.tolerance:g}, at {most.shape}; {_where(path, most)}",
            fix="build it anew with `hst-trt build --force`; if that does not help, report this",
        )


def _where(path: Path, parity: Parity) -> str:
    """Where in the graph it departs first, for people."""
    from ..bundle import Bundle
    from ..departure import first_departure

    assert parity.call is not None
    try:
        first = first_departure(Bundle.open(path, check_hashes=False), parity.call)
    except HstError as exc:
        return f"where in the graph could not be found out: {exc.problem}"
    return f"first at {first.node} ({first.value}), error {first.error:.2g}" if first else "no single value of its graph does"
