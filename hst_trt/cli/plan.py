"""``hst-trt plan``: what a schedule would do, and what it would cost."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from .console import messages, print_json, tables
from .options import BUNDLE, budget_of, budget_options, find_bundle, plan_arguments, schedule_options, size_options

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..planner.choose import Choice, Option

__all__ = ["plan"]


@click.command()
@BUNDLE
@budget_options
@schedule_options
@size_options
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads that a call would have; for measured costs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def plan(
    bundle: str | None, speedup: float | None, latency: float | None, threads: int, as_json: bool, **schedule: Any
) -> None:
    """Print a schedule as a table, with its predicted cost. No graph is loaded.

    With --speedup or --latency: choose the schedule that keeps within it and stays nearest to the large model, by the bundle's
    calibration (hst-trt calibrate).
    """
    budget = budget_of(speedup, latency)

    from ..arguments import call_costs, plan_request, token_grid
    from ..backends import machine_here
    from ..bundle import Bundle
    from ..cost import MeasuredCosts
    from ..planner.choose import choose
    from ..workspace import RequestShape

    opened, arguments = Bundle.open(find_bundle(bundle), check_hashes=False), plan_arguments(schedule)
    machine, choice = machine_here(opened.manifest, threads=threads), None
    if budget is not None:
        choice = choose(opened, budget, machine, height=arguments["height"], width=arguments["width"])
        arguments |= choice.best.point.settings
    made = plan_request(opened, **arguments)
    guided = opened.manifest.defaults.guidance_scale > 1
    shape = RequestShape(1, guided, *token_grid(opened, arguments["height"], arguments["width"]))
    costs = call_costs(opened, shape, machine)
    measured = isinstance(costs, MeasuredCosts)
    if opened.manifest.costs and not measured:
        messages.print(_not_used(opened, shape.h, shape.w, threads))
    cost, large_only = made.cost(costs), len(made.steps)
    seconds = made.latency(costs) if isinstance(costs, MeasuredCosts) else None
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
                "seconds": seconds and round(seconds, 4), "adaptive": made.switch is not None, "steps": rows,
                **(_chosen(choice) if choice else {}),
            },
        )  # fmt: skip
        return
    from rich.table import Table

    if choice is not None:
        _print_choice(choice, str(budget))
    table = Table("step", "stage", "large tokens", "small", "redraws mask", "cost")
    for t, step in enumerate(made.steps, start=1):
        tokens = f"{made.tokens_of(step)} of {made.num_tokens}" if made.tokens_of(step) else "-"
        small, redraw = "all" if step.small else "-", "yes" if step.redraw else ""
        table.add_row(str(t), step.stage.value, tokens, small, redraw, f"{made.step_cost(step, costs):.3f}")
    tables.print(table)
    tables.print(
        f"{cost:.2f} large steps' worth of compute for {large_only} steps: {speedup:.2f}x large-only; costs: {costs.source}\n"
        f"the same compute buys {cost:.1f} plain large-only steps"
    )
    if seconds is not None:
        tables.print(f"a picture takes about {seconds:.3g} s: text, {large_only} steps, VAE")
    if made.mask is not None and made.mask.threshold is not None:
        tables.print("threshold mask: each step's count is found during the run; the table shows the default share instead")
    if made.switch is not None:
        first, last = made.switch.bounds(large_only)
        tables.print(f"adaptive: the large stage may end after step {first} to {last}; the table shows the latest switch")


def _chosen(choice: Choice) -> dict[str, Any]:
    """For JSON: the schedule that was chosen, and those that nearly were it."""

    def row(option: Option) -> dict[str, Any]:
        return {
            "options": option.options, **option.distance.to_dict(), "speedup": round(option.speedup, 4),
            "seconds": option.seconds and round(option.seconds, 4),
        }  # fmt: skip

    return {
        "chosen": row(choice.best),
        "runners_up": [row(option) for option in choice.runners_up],
        "large_only": choice.large_only and row(choice.large_only),
    }


def _print_choice(choice: Choice, budget: str) -> None:
    from rich.table import Table

    c = choice.calibration
    table = Table("", "speed-up", "seconds", "distance", "options", title=f"nearest to the large model within {budget}")
    rows = [("chosen", choice.best), *(("runner-up", option) for option in choice.runners_up)]
    if choice.large_only is not None and choice.large_only not in (option for _, option in rows):
        rows.append(("large alone", choice.large_only))
    for name, option in rows:
        seconds = "" if option.seconds is None else f"{option.seconds:.3g}"
        table.add_row(name, f"{option.speedup:.2f}x", seconds, str(option.distance), option.options)
    tables.print(table)
    tables.print(
        f"speed-up: of the loop over {c.baseline_steps} large steps, by {choice.costs.source}\n"
        f"distance: to {c.converged_steps} large steps, of latents (root mean square) and of the pictures' features, means of\n"
        f"{c.prompts} prompts ({c.date}); the nearest has the least product of the two"
    )
    if choice.best == choice.large_only:
        tables.print("fewer steps of the large model alone are the best one can do for this: no second model, no mask")
    elif choice.best.point.ras:
        tables.print("the large model alone, on a mask in some steps, is the best one can do for this: no second model")


def _not_used(bundle: Bundle, h: int, w: int, threads: int) -> str:
    """One line about costs that the bundle has and that do not fit."""
    side = bundle.spec.token_side
    there = "; ".join(
        f"{c.images} {'guided' if c.guided else 'unguided'} image{'s' * (c.images > 1)} of {c.width}x{c.height} on {c.machine}"
        + (f", {c.threads} thread{'s' * (c.threads > 1)}" if c.threads else "")
        for c in bundle.manifest.costs
    )
    options = f"--height {side * h} --width {side * w}" + (f" --threads {threads}" if threads else "")
    command = f"hst-trt bench --bundle {shlex.quote(str(bundle.path))} {options} --save-costs"
    return f"costs that were measured for something else are not used ({there}); to measure these here: {command}"
