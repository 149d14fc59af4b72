"""Measures what the cost model predicts: masked and small calls against full ones, stitched runs against large-only ones.

Call costs are timed on untrained pairs of 256 and 1024 tokens (random weights time like trained ones), whole runs on the
demo pair too. Writes a JSON file and a Markdown table under benchmarks/results/, with the machine and the versions.

    python benchmarks/cost_model.py [--threads 1] [--rounds 25]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from about import machine
from diffusers import SD3Transformer2DModel

from hst_trt.bench import bench_calls, bench_runs
from hst_trt.builder.build import build_bundle
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.recipe import Defaults, Limits, ModelSource, Recipe, load_recipe, load_target
from hst_trt.workspace import RequestShape

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "hst_trt" / "data" / "demo_pair"
RESULTS = ROOT / "benchmarks" / "results"
LARGE = {"num_layers": 8, "num_attention_heads": 6, "caption_projection_dim": 384}
SMALL = {"num_layers": 6, "num_attention_heads": 4, "caption_projection_dim": 256, "dual_attention_layers": (0, 1)}


def untrained_pair(folder: Path) -> Recipe:
    """The demo pair's text encoders and VAE around two wider transformers with random weights."""
    torch.manual_seed(0)
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    for name, shape in (("transformer", LARGE), ("transformer_small", SMALL)):
        shutil.rmtree(folder / name)
        SD3Transformer2DModel(
            sample_size=64, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=128,
            pooled_projection_dim=128, pos_embed_max_size=32, qk_norm="rms_norm", **shape,
        ).save_pretrained(folder / name)  # fmt: skip
    return Recipe(
        name="untrained",
        large=ModelSource(source=str(folder)),
        small=ModelSource(source=str(folder), component="transformer_small"),
        max_sequence_length=16,
        limits=Limits(max_side=512, max_images=4),
        defaults=Defaults(num_inference_steps=20, guidance_scale=3.0, height=512, width=512),
    )


def measure(recipe: Recipe, folder: Path, sides: tuple[int, ...], threads: int, rounds: int, runs: int) -> dict[str, Any]:
    bundle = build_bundle(recipe, load_target("cpu"), folder / f"{recipe.name}-cpu.hstb").bundle
    pipeline = HybridStitchPipeline.from_bundle(bundle.path, threads=threads)
    results = {}
    for side in sides:
        size = {"height": side, "width": side}
        h, w = pipeline.grid(side, side)
        calls = bench_calls(pipeline, pipeline.plan(**size), RequestShape(1, True, h, w), rounds, warmup=3)
        plans = {name: {"schedule": name} for name in ("large", "small", "srdiffusion", "hybrid")}
        results[f"{h * w} tokens"] = calls.to_dict() | bench_runs(pipeline, plans, calls.costs(), runs, **size).to_dict()
    return results


def table(results: dict[str, Any]) -> list[str]:
    lines = []
    for pair, sizes in results.items():
        for size, result in sizes.items():
            lines += [
                f"\n### {pair}, {size}\n",
                "| call | ms (quartiles) | of full | cost model | over model |",
                "|---|---|---|---|---|",
            ]
            for name, row in result["calls"].items():
                s = row["seconds"]
                model = f"{row['cost_model']:.3f} | {row['over_model']:.3f}" if "cost_model" in row else " | "
                spread = f"{1e3 * s['median']:.2f} ({1e3 * s['q25']:.2f} to {1e3 * s['q75']:.2f})"
                lines.append(f"| {name} | {spread} | {row['of_full']['median']:.3f} | {model} |")
            lines += [
                "",
                "| 20 steps | loop ms (quartiles) | speed-up | predicted | of predicted | overhead |",
                "|---|---|---|---|---|---|",
            ]
            for name, row in result["runs"].items():
                s = row["loop_seconds"]
                spread = f"{1e3 * s['median']:.1f} ({1e3 * s['q25']:.1f} to {1e3 * s['q75']:.1f})"
                lines.append(
                    f"| {name} | {spread} | {row['loop_speedup']['median']:.3f} | {row['predicted_speedup']:.3f} | "
                    f"{row['of_predicted']:.3f} | {row['overhead']['median']:.1%} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = (arguments.threads, arguments.rounds, arguments.runs)
        results = {
            "untrained pair": measure(untrained_pair(Path(folder) / "pair"), Path(folder), (256, 512), *settings),
            "demo pair": measure(load_recipe("demo"), Path(folder), (256,), *settings),
        }
    about = machine(arguments.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "cpu_cost_model.json").write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    head = [
        "# Cost model against measurement, ONNX Runtime on a CPU",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
    ]
    head += [
        "",
        "Medians of interleaved rounds; ratios are formed round by round. Overhead: the loop's time outside the two",
        "transformers, of the whole run.",
    ]
    text = "\n".join(head + table(results)) + "\n"
    (RESULTS / "cpu_cost_model.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
