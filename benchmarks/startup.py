"""Measures a newcomer's wait: from the start of the process `hst-trt run` to the end of a one-step picture, and its memory.

A whole process with one denoising step, picture written, is an upper bound of the time to the first step.

    python benchmarks/startup.py [--bundle NAME|PATH] [--runs 7]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COMMAND = (sys.executable, "-c", "from hst_trt.cli.main import main; main()")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="demo-cpu")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    shown = subprocess.run([*COMMAND, "inspect", arguments.bundle, "--json"], capture_output=True, check=True).stdout
    manifest = json.loads(shown)["manifest"]
    weights = sum(entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors"))
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        request = ["run", "--bundle", arguments.bundle, "--prompt", "a red apple", "--num-inference-steps", "1"]
        for _ in range(arguments.runs + 1):
            start = time.perf_counter()
            subprocess.run([*COMMAND, *request, "--output-dir", str(Path(folder))], capture_output=True, check=True)
            seconds.append(time.perf_counter() - start)
    low, middle, high = np.percentile(seconds[1:], (25, 50, 75))  # the first run warms the disk's cache
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    bound = 2 * weights / 2**20 + 300
    print(f"whole process with one step: {middle:.3f} s (quartiles {low:.3f} to {high:.3f}, {arguments.runs} runs)")
    print(f"peak memory: {peak:.0f} MiB; weights {weights / 2**20:.1f} MiB, twice that and 300 MiB: {bound:.0f} MiB")


if __name__ == "__main__":
    main()
