"""The C++ host beside Python: the same requests to both in turn, pictures written, and both as whole processes of one step.

Requests go to `hst-trt-serve-lines` with one worker and to a pipeline of this process, every other round in the other order, so
that a noisy machine does not decide. Needs `make host`. Writes benchmarks/results/host.json.

    python benchmarks/host_beside_python.py [--rounds 40] [--starts 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from about import machine
from PIL import Image

from hst_trt.bench import Sample
from hst_trt.builder.build import build_bundle
from hst_trt.compare.measures import mean_interval
from hst_trt.compare.store import write_json
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.recipe import load_recipe, load_target

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "host.json"
HOST = ROOT / "build" / "out" / "host"
BUNDLE = ROOT / "build" / "out" / "planner_check" / "demo-cpu.hstb"
PROMPT = "a red apple on a blue background"
REQUESTS: Mapping[str, dict[str, Any]] = {
    "large, 20 steps": {"schedule": "large", "num_inference_steps": 20},
    "hybrid, 20 steps": {"schedule": "hybrid", "num_inference_steps": 20},
}
PYTHON, CPP = "Python", "C++"


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(systems: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Sample]:
    """Seconds by system; two rounds of warming up are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(-2, rounds):
        for name in list(systems)[:: 1 if number % 2 else -1]:
            spent = seconds_of(lambda name=name, number=number: systems[name](number + 2))
            if number >= 0:
                taken[name].append(spent)
    return {name: Sample(tuple(values)) for name, values in taken.items()}


def figures(samples: Mapping[str, Sample]) -> dict[str, Any]:
    ratio = samples[CPP].over(samples[PYTHON])
    logs = np.log(ratio.values)
    low, high = np.exp(mean_interval(logs))
    over = {"value": round(float(np.exp(logs.mean())), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
    return {name: sample.to_dict(5) for name, sample in samples.items()} | {"over_python": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--starts", type=int, default=15, help="rounds of whole processes")
    parser.add_argument("--threads", type=int, default=1, help="of a call")
    arguments = parser.parse_args()
    bundle = build_bundle(load_recipe("demo"), load_target("cpu"), BUNDLE).bundle.path
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    environment = os.environ | {"HST_ONNXRUNTIME": str(library)}
    threads = str(arguments.threads)
    pipeline = HybridStitchPipeline.from_bundle(bundle, threads=arguments.threads)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        served = subprocess.Popen(
            [str(HOST / "hst-trt-serve-lines"), str(bundle), "--threads", threads],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        assert served.stdin is not None
        assert served.stdout is not None
        pictures = {name: Path(folder) / f"{name}.png" for name in (PYTHON, CPP)}

        def ask(settings: Mapping[str, Any], seed: int) -> None:
            line = {"prompt": PROMPT, "output": str(pictures[CPP]), "seed": seed, **settings}
            served.stdin.write(json.dumps(line) + "\n")
            served.stdin.flush()
            answer = json.loads(served.stdout.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["message"])

        for name, settings in REQUESTS.items():
            samples = in_turn(
                {
                    PYTHON: lambda seed, settings=settings: (
                        pipeline(PROMPT, seed=seed, **settings).images[0].save(pictures[PYTHON])
                    ),
                    CPP: lambda seed, settings=settings: ask(settings, seed),
                },
                arguments.rounds,
            )
            mine, theirs = (np.asarray(Image.open(picture), np.int16) for picture in pictures.values())
            rows[name] = figures(samples) | {"largest_difference": int(np.abs(mine - theirs).max())}
            print(name, rows[name], flush=True)
        served.stdin.close()
        served.wait()

        one = ["--num-inference-steps", "1", "--seed", "7", "--threads", threads]
        python = [sys.executable, "-c", "from hst_trt.cli.main import main; main()", "run", "--bundle", str(bundle)]
        commands = {
            PYTHON: [*python, "--prompt", PROMPT, "--output-dir", folder, *one],
            CPP: [str(HOST / "hst-trt-host"), str(bundle), PROMPT, str(pictures[CPP]), *one],
        }
        samples = in_turn(
            {
                name: lambda seed, command=command: subprocess.run(command, capture_output=True, check=True, env=environment)
                for name, command in commands.items()
            },
            arguments.starts,
        )
        rows["whole process, one step"] = figures(samples)
        print("whole process", rows["whole process, one step"], flush=True)
    write_json(OUT, {"machine": machine(arguments.threads), "rows": rows})


if __name__ == "__main__":
    main()
