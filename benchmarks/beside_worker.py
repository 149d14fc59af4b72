"""Draws with one system, for `beside_others.py`: one JSON object a line comes in, one goes out.

A file of its own that imports nothing before it knows the system, since optimum-onnx runs in an environment without hst_trt.
The first answer has versions and a note; then each request {"prompt", "seed", "png"} is answered with seconds, the picture
written to the path `png`. An answer {"error"} is the last one. What libraries print goes to standard error.

    PYTHON benchmarks/beside_worker.py SYSTEM JOB      (JOB: the JSON object that `beside_others.py` makes)
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LARGE, PLANNED = "hst_trt, large only", "hst_trt, planner's choice"
EAGER, COMPILED, OPTIMUM = "diffusers, eager", "diffusers, torch.compile", "optimum-onnx"
PACKAGES = ("hst_trt", "torch", "diffusers", "transformers", "optimum", "optimum-onnx", "onnxruntime", "numpy")

Job = dict[str, Any]
Draw = Callable[[str, int], tuple[Any, float]]
"""From a prompt and a seed to a PIL picture and the seconds of the denoising loop."""


def hst_trt(job: Job, planned: bool) -> tuple[Draw, str]:
    from hst_trt import HybridStitchPipeline
    from hst_trt.planner.choose import Budget, choose

    pipeline = HybridStitchPipeline.from_bundle(job["bundle"], threads=job["threads"])
    schedule, note = {"schedule": "large", "num_inference_steps": job["steps"]}, f"{job['steps']} euler steps"
    if planned:
        choice = choose(pipeline.bundle, Budget(speedup=job["speedup"]), pipeline.backend.machine)
        schedule, best = choice.best.point.settings, choice.best
        note = f"{best.options}; predicted {best.speedup:.2f}x over {choice.calibration.baseline_steps} large steps"

    def draw(prompt: str, seed: int) -> tuple[Any, float]:
        output = pipeline(prompt, seed=seed, **schedule, **job["request"])
        return output.images[0], output.stats.seconds["denoise"]

    return draw, note


def diffusers(job: Job, compiled: bool) -> tuple[Draw, str]:
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(job["pair"], dtype=torch.float32)
    if compiled:
        pipe.transformer.compile()
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return _drawing(pipe, job), "transformer and VAE decoder compiled in the default mode" if compiled else "as it comes"


def optimum_onnx(job: Job) -> tuple[Draw, str]:
    import onnxruntime
    from optimum.onnxruntime import ORTStableDiffusion3Pipeline  # type: ignore[import-not-found]  # not in hst_trt's own

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder) / "pair"
        shutil.copytree(job["pair"], pair)
        # The pair's tokenizers are tokenizer.json alone, which transformers 4 reads into its fast classes only; and it takes
        # extra_special_tokens for a dict.
        for file in [pair / "model_index.json", *pair.glob("tokenizer*/tokenizer_config.json")]:
            text = re.sub(r'"(CLIP|T5)Tokenizer"', r'"\1TokenizerFast"', file.read_text(encoding="utf-8"))
            file.write_text(text.replace('"extra_special_tokens": [],', ""), encoding="utf-8")
        pipe = ORTStableDiffusion3Pipeline.from_pretrained(str(pair), export=True, session_options=options)
    return _drawing(pipe, job), "graphs of its own export"


def _drawing(pipe: Any, job: Job) -> Draw:
    """With a pipeline of diffusers' kind. The loop is what lies between the start noise and the VAE decoder."""
    import torch

    torch.set_num_threads(job["threads"])
    pipe.set_progress_bar_config(disable=True)
    times: dict[str, float] = {}
    prepare_latents, decode = pipe.prepare_latents, pipe.vae.decode

    def prepared(*arguments: Any, **options: Any) -> Any:
        latents = prepare_latents(*arguments, **options)
        times["begin"] = time.perf_counter()
        return latents

    def decoded(*arguments: Any, **options: Any) -> Any:
        times["end"] = time.perf_counter()
        return decode(*arguments, **options)

    pipe.prepare_latents, pipe.vae.decode = prepared, decoded

    def draw(prompt: str, seed: int) -> tuple[Any, float]:
        generator = torch.Generator("cpu").manual_seed(seed)
        output = pipe(prompt, generator=generator, num_inference_steps=job["steps"], **job["request"])
        return output.images[0], times["end"] - times["begin"]

    return draw


SYSTEMS: dict[str, Callable[[Job], tuple[Draw, str]]] = {
    LARGE: partial(hst_trt, planned=False),
    PLANNED: partial(hst_trt, planned=True),
    EAGER: partial(diffusers, compiled=False),
    COMPILED: partial(diffusers, compiled=True),
    OPTIMUM: optimum_onnx,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        draw, note = SYSTEMS[sys.argv[1]](json.loads(sys.argv[2]))
        installed = {package.name: package.version for package in importlib.metadata.distributions()}
        versions = {name: installed[name] for name in PACKAGES if name in installed}
        print(json.dumps({"versions": versions, "note": note}), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            start, start_cpu = time.perf_counter(), time.process_time()
            picture, loop = draw(request["prompt"], request["seed"])
            seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            picture.save(request["png"])
            print(json.dumps({"seconds": seconds, "loop_seconds": loop, "cpu_seconds": cpu}), file=answers)
    except Exception as exc:  # whatever it is, the others go on, and the report says it
        print(json.dumps({"error": f"{type(exc).__name__}: {exc}"}), file=answers)
        raise


if __name__ == "__main__":
    main()
