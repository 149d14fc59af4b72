"""Whether Triton costs throughput: pictures a second through a real server beside the bare pipeline, in interleaved rounds.

Run `make triton` first. Prints the median ratio and its quartiles, and the time of a picture in which the model draws nothing;
on a machine with other work the spread says how far to trust them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from hst_trt import HybridStitchPipeline
from hst_trt.integrations.triton import Serving, export_repository

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from triton_server import Triton, triton


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("engines/demo-cpu.hstb"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=16, help="a round")
    parser.add_argument("--clients", type=int, default=4, help="each asks again when it has its answer")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    pipe = HybridStitchPipeline.from_bundle(options.bundle, threads=1)
    fields = dict(prompt="a red apple on a blue background", num_inference_steps=options.steps)
    seeds = range(options.requests)
    idle: defaultdict[str, list[float]] = defaultdict(list)

    def bare() -> None:
        for seed in seeds:
            pipe(**fields, seed=seed)

    def bare_batches() -> None:
        for seed in seeds[::4]:
            pipe(**fields, seed=list(seeds[seed : seed + 4]), num_images_per_prompt=len(seeds[seed : seed + 4]))

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, ThreadPoolExecutor(options.clients) as pool:
        runs: dict[str, Callable[[], None]] = {"bare, one by one": bare, "bare, batches of 4": bare_batches}
        unlimited = {"queue": 0, "timeout": 0.0}
        for most, limits in ((1, {}), (4, {}), (1, unlimited)):
            name = f"Triton, {'no limits' if limits else 'limited queue'}, batches of up to {most}"
            work = Path(folder) / f"{len(runs)}"
            serving = Serving(threads=1, max_batch=most, **limits)
            made = export_repository([options.bundle], work / "repo", serving=serving)
            server = stack.enter_context(triton(made.path, work))

            def through(server: Triton = server, name: str = name) -> None:
                start = time.perf_counter()
                answers = list(pool.map(lambda seed: server.ask(**fields, seed=seed, outputs=("image", "stats")), seeds))
                whole = time.perf_counter() - start
                stats = [json.loads(answer["stats"][0]) for _, answer in answers]
                drawing = sum(sum(one["seconds"].values()) / one["batch"] for one in stats)
                idle[name].append((whole - drawing) / len(stats))

            runs[name] = through
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds + 1):  # the first warms up
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if number:
                    seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        ratios = [base / one for base, one in zip(seconds["bare, one by one"], taken, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = options.requests / statistics.median(taken)
        print(f"{name}: {rate:.2f} pictures/s, {middle:.3f} of the bare pipeline's ({low:.3f} to {high:.3f})")
        if name in idle:
            low, middle, high = (1000 * one for one in statistics.quantiles(idle[name], n=4))
            print(f"  {middle:.0f} ms a picture without drawing ({low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
