"""What if masked calls took the text stream's keys and values from the cache, and did not compute it?

The schedules are real runs of `ras` in torch, masked calls with the cache as it is; once as they are, once with the text stream
left out of masked calls, which then compute the image stream alone. Costs are the cost model's without the text's products.
Writes benchmarks/results/text_cache.json.

    python benchmarks/text_cache.py [--prompts 16]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from about import machine
from diffusers import SD3Transformer2DModel
from torch import Tensor
from variants import BUNDLE, SAMPLING, Distances, Lab

from hst_trt.builder.build import build_bundle
from hst_trt.cli.options import prompts_of
from hst_trt.compare.measures import interval
from hst_trt.compare.store import write_json
from hst_trt.cost import ModelledCosts, _linear_layers, call_flops, call_weights
from hst_trt.denoise import denoise
from hst_trt.export.glue import glue_graphs
from hst_trt.models.glue import REFERENCE
from hst_trt.models.sd3 import TokenTransformer
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule, StitchPlan
from hst_trt.recipe import load_recipe, load_target
from hst_trt.runtime.torch_eager import TorchBackend, TorchEngine
from hst_trt.workspace import RequestShape, Workspace

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "text_cache.json"
PAIR = ROOT / "hst_trt" / "data" / "demo_pair"
SCHEDULES = ((10, (4, 6, 0), 2), (10, (4, 6, 0), 3), (12, (6, 6, 0), 2))
"""Steps, stages and refresh."""


class TextFromCache(TokenTransformer):
    """Masked calls leave the text stream alone: its keys and values are those of the last full call."""

    def _block(
        self, index: int, block: Any, x: Tensor, context: Tensor, condition: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        keys, values = past[f"past_k_{index}"], past[f"past_v_{index}"]
        text, computed = context.shape[1], x.shape[1]
        if text + computed == keys.shape[2]:
            return super()._block(index, block, x, context, condition, past)
        assert not self.dual, "the demo pair has no second attention"
        normed, gate, shift_ff, scale_ff, gate_ff = block.norm1(x, emb=condition)
        attn = block.attn
        keys[:, :, text : text + computed] = self._heads(normed, attn.to_k, attn.norm_k)
        values[:, :, text : text + computed] = self._heads(normed, attn.to_v)
        x = x + gate[:, None] * attn.to_out[0](self._attend(self._heads(normed, attn.to_q, attn.norm_q), keys, values))
        x = x + gate_ff[:, None] * block.ff(block.norm2(x) * (1 + scale_ff[:, None]) + shift_ff[:, None])
        return x, context


def workspace(lab: Lab, large: type[TokenTransformer]) -> Workspace:
    engines = {
        name: TorchEngine(REFERENCE[name], tuple(graph.input_names), tuple(graph.output_names))
        for name, graph in glue_graphs().items()
    }
    models = {name: SD3Transformer2DModel.from_pretrained(PAIR / folder).eval() for name, folder in FOLDERS.items()}
    for name, module in (
        ("large", large(models["large"], cached=True)),
        ("small", TokenTransformer(models["small"], cached=False)),
    ):
        engines[name] = TorchEngine(module, module.input_names, module.output_names)
    return Workspace(TorchBackend(engines), lab.ws.spec, RequestShape(lab.count, True, *lab.grid), record=False)


FOLDERS = {"large": "transformer", "small": "transformer_small"}


def cost(plan: StitchPlan, costs: ModelledCosts, *, text: bool) -> float:
    """In large calls; `text`: whether masked calls compute the text stream."""
    spec, n, length = costs.large_spec, costs.num_tokens, costs.text_length
    whole = costs._work(spec, n)

    def masked(tokens: int) -> float:
        if text:
            return costs.large(tokens)
        (_, _), (_, of_text), _ = _linear_layers(spec, tokens, length)
        queries = 4 * spec.width * (n + length) * length * (spec.layers - 1)
        flops = call_flops(spec, tokens, n, length) - 2 * length * of_text - queries
        return (costs.rows * flops + costs.flops_per_weight * (call_weights(spec) - of_text)) / whole

    return sum(1.0 if step.large_tokens == n else masked(plan.tokens_of(step)) for step in plan.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    arguments = parser.parse_args()
    bundle = build_bundle(load_recipe("demo"), load_target("cpu"), BUNDLE).bundle
    pipeline = HybridStitchPipeline.from_bundle(bundle.path)
    lab = Lab(pipeline, prompts_of(ROOT / "benchmarks" / "prompts" / "calibration.txt")[: arguments.prompts])
    distances = Distances(lab)
    rows: list[dict[str, Any]] = []
    spaces = {True: workspace(lab, TokenTransformer), False: workspace(lab, TextFromCache)}
    for steps, stages, every in SCHEDULES:
        for ratio in (0.3, 0.5):
            plan = pipeline.plan(
                schedule="ras", num_inference_steps=steps, stages=stages, refresh_every=every, mask=MaskRule(ratio=ratio),
                solver=SAMPLING.solver, timestep_spacing=SAMPLING.timestep_spacing, shift=SAMPLING.shift,
            )  # fmt: skip
            far: dict[bool, np.ndarray] = {}
            for text, ws in spaces.items():
                table = lab.scheduler.table(steps, plan.sampling)
                ws.begin(lab.noise, lab.text, table, lab.guidance, plan.mask, plan.correction)
                with torch.no_grad():
                    denoise(ws, plan)
                far[text] = distances(ws.latents)
            ratios = far[False] / far[True]
            row: dict[str, Any] = {"steps": steps, "stages": stages, "refresh": every, "ratio": ratio}
            row["cost"] = round(cost(plan, lab.costs, text=True), 3)
            row["cost_without_text"] = round(cost(plan, lab.costs, text=False), 3)
            for name, computed, over in zip(("latents", "features"), far[True], ratios, strict=True):
                low, high = interval(over[1:])
                row[name] = round(float(computed[0]), 5)
                row[f"{name}_over"] = {"value": round(float(over[0]), 4), "low": round(low, 4), "high": round(high, 4)}
            rows.append(row)
            print(row, flush=True)
    write_json(OUT, {"machine": machine(0), "prompts": lab.count, "rows": rows})


if __name__ == "__main__":
    main()
