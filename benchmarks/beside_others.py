"""hst_trt beside other people's systems: the same pair, prompts, seeds, steps, threads and machine, in one run.

Each system is a process of its own (`beside_worker.py`) that draws when it is told to, so only one works at a time. A round
draws one prompt with every system, in a new order, and ratios are formed within it: a machine that is slow for a while is
slow for all. Every picture is compared with large-only's. Writes a JSON file, and a Markdown page beside it.

    python3.11 -m venv build/out/optimum && build/out/optimum/bin/python -m pip install -r benchmarks/optimum.txt
    python benchmarks/beside_others.py [--threads 1] [--rounds 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from about import machine
from beside_worker import EAGER, LARGE, OPTIMUM, PLANNED, SYSTEMS
from PIL import Image

from hst_trt.bench import Sample
from hst_trt.builder.build import build_bundle
from hst_trt.cli.options import prompts_of
from hst_trt.compare.measures import mean_interval, psnr
from hst_trt.compare.run import Figure
from hst_trt.errors import HstError
from hst_trt.recipe import load_recipe, load_target

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "out"
ENVIRONMENT = "python3.11 -m venv build/out/optimum && build/out/optimum/bin/python -m pip install -r benchmarks/optimum.txt"
STEPS, SPEEDUP, WARMUP = 28, 1.83, 3
TIMES = ("seconds", "loop_seconds", "cpu_seconds")
SAME = 1
"""By how many of 255 levels a pixel may differ in pictures that are the same: what rounding makes of it."""

TARGETS = ((LARGE, EAGER, 1.1), (LARGE, OPTIMUM, 1.0), (PLANNED, EAGER, 2.0))
"""A system of ours, another, and how many times as fast as it ours should be, from prompt to picture."""

Rounds = dict[str, list[dict[str, Any]]]
"""By system and round: its `TIMES`, and the picture [H, W, 3] uint8."""


class NotMeasuredError(HstError):
    """One system cannot be measured; the others can."""


class Worker:
    """A process that draws with one system. Owns it: close it.

    Args:
        command: what to start; it keeps to the protocol of `beside_worker.py`. Its first answer is kept as `about`.
        log: where its messages go.

    Raises:
        NotMeasuredError: there is no such Python, or the system cannot be set up.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        self.name, self.log = name, log
        if not Path(command[0]).is_file():
            found = f"no {os.path.relpath(command[0], ROOT)}"
            raise NotMeasuredError(f"{name} has no environment", found=found, fix=f"run `{ENVIRONMENT}`")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(OUT / "beside_others" / "inductor")
        with log.open("w") as messages:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, text=True, env=environment)
        self.about = self._answer()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Has a picture drawn.

        Raises:
            NotMeasuredError: it failed; the worker is of no more use.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its last line, if there is one, says why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with exit code {self.process.wait()}"}
        if "error" not in answer:
            return answer
        self.close()
        fix = f"read its messages in {os.path.relpath(self.log, ROOT)}"
        raise NotMeasuredError(f"{self.name} failed", found=answer["error"], fix=fix)


def measure(
    workers: Mapping[str, Worker], prompts: Sequence[str], rounds: int, png: Path
) -> tuple[Rounds, dict[str, NotMeasuredError]]:
    """What each system did, and why others failed. A prompt's seed is its number, from 1.

    Raises:
        NotMeasuredError: large-only failed, to which all others are compared.
    """
    shuffle = random.Random(0).shuffle
    drawn: Rounds = {name: [] for name in workers}
    failed = {}
    for number in range(-WARMUP, rounds):
        order = list(drawn)
        shuffle(order)
        index = number % len(prompts)
        for name in order:
            try:
                answer = workers[name].ask({"prompt": prompts[index], "seed": index + 1, "png": str(png)})
            except NotMeasuredError as exc:
                if name == LARGE:
                    raise
                failed[name] = exc
                del drawn[name]
                continue
            if number >= 0:
                drawn[name].append(answer | {"picture": np.asarray(Image.open(png))})
    return drawn, failed


def sample(rounds: Sequence[Mapping[str, Any]], kind: str) -> Sample:
    return Sample(tuple(one[kind] for one in rounds))


def summary(drawn: Rounds) -> dict[str, Any]:
    """Times and pictures of every system; how many times as fast ours are as others; the targets."""
    baseline = np.concatenate([one["picture"] for one in drawn[LARGE]])
    systems: dict[str, Any] = {}
    ratios: dict[str, Any] = {LARGE: {}, PLANNED: {}}
    for name, rounds in drawn.items():
        pictures = np.concatenate([one["picture"] for one in rounds])
        away = int(np.abs(pictures.astype(int) - baseline).max())
        systems[name] = {kind: sample(rounds, kind).to_dict() for kind in TIMES}
        systems[name] |= {"largest_difference": away, "same_pictures": away <= SAME}
        systems[name]["psnr"] = round(float(psnr(pictures[None], baseline[None])[0]), 1) if away else None
        for ours in drawn.keys() & {LARGE, PLANNED} - {name}:
            for kind in TIMES[:2]:
                logs = np.log(sample(rounds, kind).over(sample(drawn[ours], kind)).values)
                figure = Figure(*np.exp([logs.mean(), *mean_interval(logs)]).tolist())
                ratios[ours].setdefault(name, {})[kind] = figure.to_dict()
    targets = []
    for ours, other, least in TARGETS:
        figure = ratios[ours].get(other, {}).get("seconds")
        if figure is None:
            verdict = "not measured"
        elif not systems[other]["same_pictures"]:
            verdict = f"not comparable: {other} draws other pictures"
        elif figure["low"] < least <= figure["high"]:
            verdict = "open: it lies within the interval"
        else:
            verdict = "reached" if figure["low"] >= least else "missed"
        targets.append({"ours": ours, "other": other, "at_least": least, "verdict": verdict})
    return {"systems": systems, "ratios": ratios, "targets": targets}


def page(report: Mapping[str, Any]) -> str:
    lines = ["# Beside other systems, on a CPU", "", *(f"- {key}: {value}" for key, value in report["machine"].items())]
    for name, about in report["about"].items():
        lines.append(f"- {name}: {about['note']}; " + ", ".join(map(" ".join, about["versions"].items())))
    lines += [f"- {name} was not measured: {reason}" for name, reason in report["not_measured"].items()]
    lines += [
        f"\nOne prompt a round with every system, in a new order, each in its own process, after {WARMUP} rounds of warm-up.",
        "All compute in float32; options but the threads are at their defaults. Loop: in diffusers' pipelines, from the start",
        f"noise to the VAE decoder. CPU: of all threads. Pictures are the same where no pixel is more than {SAME}/255 from",
        "large-only's of that prompt and seed. The planner's choice draws others, by less work; fewer steps would make",
        "diffusers faster, too. Ratios are geometric means over rounds, with 95 % intervals.\n",
        "| system | request, ms (quartiles) | loop, ms (quartiles) | CPU, s | pictures beside large-only's |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["systems"].items():
        spreads = [f"{1e3 * s['median']:.0f} ({1e3 * s['q25']:.0f} to {1e3 * s['q75']:.0f})" for s in map(row.get, TIMES[:2])]
        beside = f"PSNR {row['psnr']} dB, at most {row['largest_difference']}/255" if row["psnr"] else "equal"
        kind = "same" if row["same_pictures"] else "others"
        lines.append(f"| {name} | {' | '.join(spreads)} | {row['cpu_seconds']['median']:.2f} | {kind}: {beside} |")
    lines += ["", "| | as fast as | request | loop |", "|---|---|---|---|"]
    for ours, others in report["ratios"].items():
        for other, row in others.items():
            cells = [f"{f['value']:.3f} ({f['low']:.3f} to {f['high']:.3f})" for f in map(row.get, TIMES[:2])]
            lines.append(f"| {ours} | {other} | {' | '.join(cells)} |")
    lines += ["", "| target, of the request | as fast as | at least | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in report["targets"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    siblings = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    cores = len({file.read_text() for file in siblings}) or os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cores, help="of each system; by default one per physical core")
    parser.add_argument("--rounds", type=int, default=60, help="pictures of each system that count")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "beside_others.json")
    arguments = parser.parse_args()
    if min(arguments.threads, arguments.rounds) < 1:
        parser.error("--threads and --rounds are 1 or more")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    folder = OUT / "beside_others"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("demo")
    bundle = build_bundle(recipe, load_target("cpu"), folder / "demo-cpu.hstb").bundle
    request = recipe.defaults.model_dump(include={"guidance_scale", "height", "width"})
    request |= {"negative_prompt": "", "max_sequence_length": bundle.spec.t5_length}
    job = {"threads": arguments.threads, "steps": STEPS, "speedup": SPEEDUP, "request": request}
    places = {"bundle": str(bundle.path), "pair": str(ROOT / "hst_trt" / "data" / "demo_pair")}
    pythons = dict.fromkeys(SYSTEMS, sys.executable) | {OPTIMUM: str(OUT / "optimum" / "bin" / "python")}
    script = str(ROOT / "benchmarks" / "beside_worker.py")
    workers: dict[str, Worker] = {}
    failed: dict[str, NotMeasuredError] = {}
    try:
        for number, (name, python) in enumerate(pythons.items()):
            command = [python, script, name, json.dumps(job | places)]
            try:
                workers[name] = Worker(name, command, arguments.threads, folder / f"worker_{number}.log")
            except NotMeasuredError as exc:
                failed[name] = exc
                print(exc, file=sys.stderr)
        if LARGE in failed:
            raise failed[LARGE]
        prompts = prompts_of(ROOT / "benchmarks" / "prompts" / "heldout.txt")
        drawn, failed_later = measure(workers, prompts, arguments.rounds, folder / "picture.png")
    finally:
        for worker in workers.values():
            worker.close()
    report = {
        "machine": machine(arguments.threads) | {"rounds": arguments.rounds, **job},
        "about": {name: worker.about for name, worker in workers.items()},
    }
    report["not_measured"] = {
        name: "; ".join(filter(None, str(exc).splitlines())) for name, exc in (failed | failed_later).items()
    }
    report |= summary(drawn)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    arguments.json.with_suffix(".md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    try:
        main()
    except HstError as exc:
        sys.exit(str(exc))
