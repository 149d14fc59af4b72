"""``hst-trt run``: prompts to PNG files."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import TaskID

from ..denoise import StepRecord
from ..errors import RequestError
from .console import bars, messages, print_json, tables
from .options import (
    BUNDLE,
    DEVICE,
    THREADS,
    budget_of,
    budget_options,
    find_bundle,
    plan_arguments,
    prompts_of,
    schedule_options,
    size_options,
)

if TYPE_CHECKING:
    from ..pipeline import HybridStitchPipeline, StitchOutput

__all__ = ["run"]


@click.command()
@click.option("--prompt", help="What to draw.")
@click.option(
    "--prompts-file",
    type=click.Path(path_type=Path),
    help="One prompt a line, drawn one after another; # starts a comment.",
)
@BUNDLE
@budget_options
@schedule_options
@size_options
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; off at 1 and below.")
@click.option("--negative-prompt", help="What not to draw.")
@click.option("--seed", type=int, help="Seed of the start noise; random if left out.")
@click.option("--num-images-per-prompt", type=int, default=1, show_default=True, help="Images of each prompt, in one batch.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("outputs"),
    show_default=True,
    help="Where PNG files go.",
)
@click.option("--overwrite", is_flag=True, help="Number files from 000, replacing older ones.")
@click.option("--save-masks", is_flag=True, help="Also lay each step's mask over the first finished picture, in one file.")
@DEVICE
@click.option("--low-vram", is_flag=True, help="Load engines when they are needed and free them after, for every picture.")
@THREADS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def run(
    prompt: str | None,
    prompts_file: Path | None,
    bundle: str | None,
    speedup: float | None,
    latency: float | None,
    guidance_scale: float | None,
    negative_prompt: str | None,
    seed: int | None,
    num_images_per_prompt: int,
    output_dir: Path,
    overwrite: bool,
    save_masks: bool,
    device: int,
    low_vram: bool,
    threads: int,
    as_json: bool,
    **schedule: Any,
) -> None:
    """Draw images.

    \b
    hst-trt run --prompt "a red apple on a blue background"
    hst-trt run --prompt "a penguin on the sea" --seed 7 --schedule hybrid --save-masks
    """
    prompts = _prompts(prompt, prompts_file)
    arguments, budget = plan_arguments(schedule), budget_of(speedup, latency)

    from ..images import ImageWriter, mask_picture
    from ..pipeline import HybridStitchPipeline
    from ..planner.choose import choose

    started = time.perf_counter()
    writer = ImageWriter(output_dir, overwrite=overwrite)
    results = []
    with bars(quiet=as_json) as progress:
        checking = progress.add_task("checking", total=None, note="MiB")
        loading = progress.add_task("loading", total=None, note="")

        def on_hash(done: int, total: int) -> None:
            progress.update(checking, completed=done >> 20, total=total >> 20)

        pipeline = HybridStitchPipeline.from_bundle(
            find_bundle(bundle, device), device=device, low_vram=low_vram, threads=threads, on_hash=on_hash
        )
        if budget is not None:
            best = choose(
                pipeline.bundle, budget, pipeline.backend.machine, height=arguments["height"], width=arguments["width"]
            ).best
            messages.print(f"for {budget}: {best.options} ({best.speedup:.2f}x predicted); `hst-trt plan` says more")
            arguments |= best.point.settings
        plan = pipeline.plan(**arguments)
        pipeline.load(plan, lambda name, done, total: progress.update(loading, completed=done, total=total, note=name))
        loaded = time.perf_counter() - started
        for text in prompts:
            steps = progress.add_task("steps", total=len(plan.steps), note="")

            def on_step(t: int, record: StepRecord, task: TaskID = steps) -> None:
                note = f"{record.step.stage.value}, {record.tokens} large tokens"
                progress.update(task, completed=t + 1, note=note)

            output = pipeline(
                text,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                seed=seed,
                num_images_per_prompt=num_images_per_prompt,
                keep_masks=save_masks,
                on_step=on_step,
                **arguments,
            )
            settings = _settings(pipeline, output, text, negative_prompt, guidance_scale)
            images = writer.save(output.images, output.seeds[0], settings)
            masks = None
            if save_masks and output.masks:
                masks = str(writer.beside(images[0], "masks", mask_picture(output.images[0], output.masks, output.plan)))
            files = {"images": [str(path) for path in images], "masks": masks}
            results.append({"prompt": text, "seed": output.seeds[0], **files, **output.stats.to_dict()})
    if as_json:
        content = {"bundle": str(pipeline.bundle.path), "load_seconds": round(loaded, 4), "results": results}
        print_json("hst_trt.run/1", content)
        return
    for result in results:
        _print_stats(result, loaded)
        if save_masks and result["masks"] is None:
            messages.print("no masks: this plan has no hybrid steps")
        for path in [*result["images"], *filter(None, [result["masks"]])]:
            click.echo(path)


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None and file is not None:
        raise RequestError("--prompt and --prompts-file are two ways to say what to draw", fix="give one of them")
    if prompt is None and file is None:
        raise RequestError(
            "one of --prompt and --prompts-file is needed",
            fix='hst-trt run --prompt "a red apple on a blue background"',
        )
    if prompt is not None:
        return [prompt]
    return prompts_of(file)


def _settings(
    pipeline: HybridStitchPipeline, output: StitchOutput, prompt: str, negative: str | None, guidance: float | None
) -> dict[str, Any]:
    """What is needed to draw the picture again; goes into the PNG."""
    request = output.plan.request
    assert request is not None
    manifest = pipeline.bundle.manifest
    return {
        "prompt": prompt,
        "negative_prompt": negative or "",
        "guidance_scale": manifest.defaults.guidance_scale if guidance is None else guidance,
        "seed": output.seeds[0],
        "steps": len(output.plan.steps),
        "stages_run": {stage.value: stats.steps for stage, stats in output.stats.stages.items()},
        "plan": dataclasses.asdict(request),
        "model": manifest.name,
        "fingerprint": manifest.fingerprint,
    }


def _print_stats(result: dict[str, Any], loaded: float) -> None:
    from rich.table import Table

    n = result["num_tokens"]
    table = Table(
        "stage",
        "steps",
        "large calls",
        "large tokens",
        "small calls",
        "seconds",
        title=result["prompt"],
        title_justify="left",
    )
    for name, stage in result["stages"].items():
        if stage["steps"]:
            share = f"{stage['large_tokens']} of {n * stage['steps']}"
            cells = (name, stage["steps"], stage["large_calls"], share, stage["small_calls"], f"{stage['seconds']:.3f}")
            table.add_row(*map(str, cells))
    tables.print(table)
    seconds, source = result["seconds"], result["cost_source"]
    outside = "" if result["overhead"] is None else f" · outside the transformers {result['overhead']:.1%} of the loop"
    tables.print(
        f"large model's compute saved {result['large_compute_saved']:.0%} · with the small model's, the loop is predicted "
        f"{result['modelled_speedup']:.2f}x as fast as large-only; costs: {source}; `hst-trt bench` measures it\n"
        f"load {loaded:.2f} s · text {seconds['text']:.3f} s · denoise {seconds['denoise']:.3f} s · "
        f"VAE {seconds['vae']:.3f} s{outside}"
    )
