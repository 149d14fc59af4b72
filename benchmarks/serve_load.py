"""What serving costs: the same requests to a pipeline of this process, one by one, and to servers, eight at a time.

Rounds are interleaved, every other one in the other order, and ratios are formed within a round, so that a noisy machine does
not decide. Each server has the threads that the pipeline has; clients and servers share the machine, and servers encode
pictures as PNG, which the pipeline does not. Systems wait idle while others are timed. Writes a JSON file and a Markdown
table, benchmarks/results/serve_load.*.

    python benchmarks/serve_load.py [--rounds 7] [--requests 64] [--concurrency 8] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from about import machine

from hst_trt.bench import Sample
from hst_trt.builder.build import build_bundle
from hst_trt.compare.store import write_json
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.recipe import load_recipe, load_target

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "serve_load.json"
PROMPTS = (
    "a red apple on a blue background",
    "a cat on a green background",
    "two dogs on a yellow background",
    "a house and a tree",
)
SERVERS: Mapping[str, Sequence[str]] = {"server, one by one": ("--max-batch", "1"), "server, batches": ()}
PIPELINE, SECONDS = "pipeline", 600.0

Request = dict[str, Any]
System = Callable[[Sequence[Request]], list[float]]
"""Draws requests and returns the seconds that each took."""


@contextlib.contextmanager
def served(bundle: Path, threads: int, options: Sequence[str]) -> Iterator[str]:
    """The address of a server of its own process."""
    command = [sys.executable, "-c", "from hst_trt.cli.main import main; main()", "serve", str(bundle), "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--threads", str(threads), *options], stderr=log)
        try:
            until = time.monotonic() + SECONDS
            while not (ready := re.search(r"is ready on (http://\S+)", _read(log))):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(_read(log))
                time.sleep(0.1)
            yield ready[1]
        finally:
            process.terminate()
            process.wait(SECONDS)


def _read(log: Any) -> str:
    log.seek(0)
    return log.read()


def over_http(client: httpx.Client, pool: ThreadPoolExecutor) -> System:
    def ask(request: Request) -> float:
        start = time.perf_counter()
        client.post("/v1/images/generations", json=request).raise_for_status()
        return time.perf_counter() - start

    return lambda requests: list(pool.map(ask, requests))


def by_itself(pipeline: HybridStitchPipeline) -> System:
    def draw(request: Request) -> float:
        start = time.perf_counter()
        pipeline(**request)
        return time.perf_counter() - start

    return lambda requests: [draw(request) for request in requests]


def in_turn(systems: Mapping[str, System], requests: Sequence[Request], rounds: int) -> dict[str, Any]:
    """Seconds of whole rounds and of each request, by system; a round of warming up is not counted."""
    whole: dict[str, list[float]] = {name: [] for name in systems}
    each: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(-1, rounds):
        for name in list(systems)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            spent = systems[name](requests[:8] if number < 0 else requests)
            if number >= 0:
                whole[name].append(time.perf_counter() - start)
                each[name] += spent
                print(f"round {number}: {name} {whole[name][-1]:.2f} s", flush=True)
    samples = {name: Sample(tuple(values)) for name, values in whole.items()}
    return {
        name: {
            "seconds": sample.to_dict(4),
            "requests_per_second": round(len(requests) / sample.median, 3),
            "of_pipeline": samples[PIPELINE].over(sample).to_dict(4),
            **{f"p{share}": round(float(np.percentile(each[name], share)), 4) for share in (50, 95)},
        }
        for name, sample in samples.items()
    }


def table(about: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    lines = [
        "# Serving beside the bare pipeline",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
        "Medians of interleaved rounds with their quartiles; throughput over the pipeline's is formed round by round.",
        "Seconds of a request are from its sending to its answer, so with others waiting they hold the queue too.",
        "",
        "| | requests/s | over the pipeline (quartiles) | a request, p50 s | p95 s |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratio = row["of_pipeline"]
        spread = f"{ratio['median']:.3f} ({ratio['q25']:.3f} to {ratio['q75']:.3f})"
        lines.append(f"| {name} | {row['requests_per_second']:.3f} | {spread} | {row['p50']:.3f} | {row['p95']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of a call")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    requests = [{"prompt": PROMPTS[k % len(PROMPTS)], "seed": k} for k in range(arguments.requests)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as open_things:
        bundle = build_bundle(load_recipe("demo"), load_target("cpu"), Path(folder) / "demo-cpu.hstb").bundle
        systems: dict[str, System] = {
            PIPELINE: by_itself(HybridStitchPipeline.from_bundle(bundle.path, threads=arguments.threads))
        }
        pool = open_things.enter_context(ThreadPoolExecutor(arguments.concurrency))
        for name, options in SERVERS.items():
            url = open_things.enter_context(served(bundle.path, arguments.threads, options))
            client = httpx.Client(base_url=url, timeout=SECONDS, trust_env=False)
            systems[name] = over_http(open_things.enter_context(client), pool)
        rows = in_turn(systems, requests, arguments.rounds)
    about = machine(arguments.threads, "fastapi", "uvicorn") | {
        "bundle": "demo pair on the CPU, its defaults",
        "requests": f"{arguments.requests} a round, {arguments.concurrency} at a time",
    }
    write_json(arguments.out, {"machine": about, "rows": rows})
    text = table(about, rows)
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
