"""``hst-trt plan``: what a schedule would do, and what it would cost."""

from __future__ import annotations

from typing import Any

import click

from .console import print_json, tables
from .options import BUNDLE, find_bundle, plan_arguments, schedule_options, size_options

__all__ = ["plan"]


@click.command()
@BUNDLE
@schedule_options
@size_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def plan(bundle: str | None, as_json: bool, **schedule: Any) -> None:
    """Print a schedule as a table, with its predicted cost. No graph is loaded."""
    from ..arguments import plan_request
    from ..bundle import Bundle

    opened = Bundle.open(find_bundle(bundle), check_hashes=False)
    made, costs = plan_request(opened, **plan_arguments(schedule))
    cost, large_only = made.cost(costs), len(made.steps)
    rows = [
        {
            "step": t,
            "stage": step.stage.value,
            "large_tokens": made.tokens_of(step),
            "small": step.small,
            "redraw_mask": step.redraw,
            "cost": round(made.step_cost(step, costs), 4),
        }
        for t, step in enumerate(made.steps)
    ]
    speedup = large_only / cost
    if as_json:
        stages = {stage.value: count for stage, count in made.stage_lengths.items()}
        print_json(
            "hst_trt.plan/1",
            {
                "bundle": str(opened.path), "num_tokens": made.num_tokens, "stages": stages, "cost": round(cost, 4),
                "speedup": round(speedup, 4), "equal_large_steps": round(cost, 1), "cost_source": costs.source,
                "adaptive": made.switch is not None, "steps": rows,
            },
        )  # fmt: skip
        return
    from rich.table import Table

    table = Table("step", "stage", "large tokens", "small", "redraws mask", "cost")
    for t, step in enumerate(made.steps, start=1):
        tokens = f"{made.tokens_of(step)} of {made.num_tokens}" if made.tokens_of(step) else "-"
        small, redraw = "all" if step.small else "-", "yes" if step.redraw else ""
        table.add_row(str(t), step.stage.value, tokens, small, redraw, f"{made.step_cost(step, costs):.3f}")
    tables.print(table)
    tables.print(
        f"{cost:.2f} large steps' worth of compute for {large_only} steps: {speedup:.2f}x large-only, by {costs.source}\n"
        f"the same compute buys {cost:.1f} plain large-only steps"
    )
    if made.mask is not None and made.mask.threshold is not None:
        tables.print("threshold mask: each step's count is found during the run; the table shows the default share instead")
    if made.switch is not None:
        first, last = made.switch.bounds(large_only)
        tables.print(f"adaptive: the large stage may end after step {first} to {last}; the table shows the latest switch")
