"""`benchmarks/beside_others.py` without the systems it is for: workers that fail, pictures that differ, ratios and verdicts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts beside the package, not part of it

import beside_others  # noqa: E402
from beside_others import NotMeasuredError, Worker, measure, page, summary  # noqa: E402
from beside_worker import COMPILED, EAGER, LARGE, OPTIMUM, PLANNED  # noqa: E402

FAKE = """
import json, sys
from PIL import Image
print(json.dumps({"versions": {}, "note": sys.argv[1]}), flush=True)
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if number == int(sys.argv[2]):
        print("out of luck", file=sys.stderr)
        print(json.dumps({"error": "RuntimeError: out of luck"}), flush=True)
        break
    Image.new("RGB", (4, 4), (request["seed"], 0, 0)).save(request["png"])
    print(json.dumps({"seconds": 1 + number, "loop_seconds": 0.5, "cpu_seconds": 2}), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path):
    """Makes workers that keep to the protocol and paint a picture's seed; they fail at the request of a given number."""
    workers: list[Worker] = []

    def start(name: str, fails_at: int = -1) -> Worker:
        workers.append(Worker(name, [sys.executable, "-c", FAKE, name, str(fails_at)], 1, tmp_path / f"{len(workers)}.log"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def rounds(seconds: list[float], level: int = 0) -> list[dict]:
    picture = np.full((4, 4, 3), level, np.uint8)
    return [{"seconds": s, "loop_seconds": s / 2, "cpu_seconds": s, "picture": picture} for s in seconds]


def test_every_round_draws_its_prompt_with_every_system_and_warm_up_does_not_count(fake, tmp_path: Path) -> None:
    drawn, failed = measure({LARGE: fake(LARGE), EAGER: fake(EAGER)}, ["a", "b"], 3, tmp_path / "picture.png")
    assert not failed
    for done in drawn.values():
        assert [one["picture"][0, 0, 0] for one in done] == [1, 2, 1], "the seed is the prompt's number"
        assert [one["seconds"] for one in done] == [1 + beside_others.WARMUP + n for n in range(3)]


def test_a_system_that_fails_is_left_out_with_its_reason_and_the_others_go_on(fake, tmp_path: Path) -> None:
    workers = {LARGE: fake(LARGE), COMPILED: fake(COMPILED, fails_at=4)}
    drawn, failed = measure(workers, ["a"], 3, tmp_path / "picture.png")
    assert len(drawn[LARGE]) == 3
    assert COMPILED not in drawn
    assert re.search(r"RuntimeError: out of luck\nto do: .*\.log$", str(failed[COMPILED]))
    assert "out of luck" in workers[COMPILED].log.read_text()
    with pytest.raises(NotMeasuredError, match="large only failed"):
        measure({LARGE: fake(LARGE, fails_at=0)}, ["a"], 1, tmp_path / "picture.png")


def test_a_worker_that_ends_without_a_word_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(NotMeasuredError, match="exit code 3"):
        Worker(OPTIMUM, [sys.executable, "-c", "raise SystemExit(3)"], 1, tmp_path / "log")


def test_the_real_worker_answers_with_the_error_of_a_system_that_cannot_be_set_up(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "beside_worker.py"),
        LARGE,
        '{"bundle": "none", "threads": 1, "steps": 1}',
    ]
    with pytest.raises(NotMeasuredError, match="MissingError"):
        Worker(LARGE, command, 1, tmp_path / "log")


def test_without_its_environment_the_message_has_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(NotMeasuredError, match=r"to do: run `python3.11 -m venv .* -r benchmarks/optimum.txt`"):
        Worker(OPTIMUM, [str(tmp_path / "bin" / "python")], 1, tmp_path / "log")


def test_what_both_environments_hold_for_the_run_itself_has_one_version() -> None:
    def pins(file: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / file).read_text(), re.M))

    ours, theirs = pins("constraints.txt"), pins("benchmarks/optimum.txt")
    for package in ("torch", "onnx", "onnxruntime", "numpy"):
        assert theirs[package] == ours[package]


def test_ratios_are_formed_within_rounds_and_targets_are_judged_by_their_intervals() -> None:
    slow = [1.0, 10.0, 1.0, 10.0]  # a machine that is slow in every second round
    drawn = {
        LARGE: rounds(slow),
        PLANNED: rounds([s / 2 for s in slow], level=90),
        EAGER: rounds([s * 1.5 for s in slow], level=1),
        OPTIMUM: rounds([s * f for s, f in zip(slow, (0.8, 1.3, 0.9, 1.2), strict=True)]),
    }
    report = summary(drawn)
    eager = report["ratios"][LARGE][EAGER]["seconds"]
    assert (eager["low"], eager["value"], eager["high"]) == pytest.approx((1.5, 1.5, 1.5))
    assert report["ratios"][PLANNED][EAGER]["loop_seconds"]["value"] == pytest.approx(3)
    assert [row["verdict"] for row in report["targets"]] == ["reached", "open: it lies within the interval", "reached"]
    assert not report["systems"][PLANNED]["same_pictures"]
    assert report["systems"][EAGER]["same_pictures"], "one level of 255 is rounding"
    text = page(report | {"machine": {}, "about": {}, "not_measured": {COMPILED: "no C++ compiler"}})
    assert "| hst_trt, large only | diffusers, eager | 1.500 (1.500 to 1.500) | 1.500 (1.500 to 1.500) |" in text
    assert "diffusers, torch.compile was not measured: no C++ compiler" in text


def test_a_system_that_draws_other_pictures_is_not_taken_for_an_equal() -> None:
    verdicts = [row["verdict"] for row in summary({LARGE: rounds([1, 1]), EAGER: rounds([2, 2], level=2)})["targets"]]
    assert verdicts[0] == "not comparable: diffusers, eager draws other pictures"
    assert verdicts[1:] == ["not measured", "not measured"]
    slower = summary({LARGE: rounds([2, 2]), EAGER: rounds([1, 1])})
    assert slower["targets"][0]["verdict"] == "missed"
