"""The page Scaling: its table against the queue that it is of, and its example against the benchmark that it is from."""

from __future__ import annotations

import heapq
import json
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
BENCHMARK = ROOT / "benchmarks" / "results" / "cpu_cost_model.json"


# -- the queue -------------------------------------------------------------------------------------------------------------
@cache
def in_system(workers: int, load: float) -> np.ndarray:
    """How many requests are in an M/D/c queue, in the long run.

    Seen once in each service time: up to `workers` of them are gone since, and Poisson many have come.
    """
    size = 600
    came = workers * load
    poisson = np.array([math.exp(-came + k * math.log(came) - math.lgamma(k + 1)) for k in range(size)])
    moves = np.zeros((size, size))  # [from, to]
    for now in range(size):
        left = max(now - workers, 0)
        moves[now, left:] = poisson[: size - left]
    moves[:, -1] += 1 - moves.sum(1)
    equations = moves.T - np.eye(size)
    equations[-1] = 1  # shares add up to one
    return np.linalg.solve(equations, np.eye(size)[-1])


def share_within(wait: float, workers: int, load: float) -> float:
    """Share of requests that wait no longer than `wait` service times (G. J. Franx 2001, Operations Research Letters 29)."""
    k = math.floor(wait) + 1
    at_most_wait = np.cumsum(in_system(workers, load))[workers:]
    u = workers * load * (k - wait)
    return sum(
        float(at_most_wait[k * workers - 1 - j]) * math.exp(-u + j * math.log(u) - math.lgamma(j + 1))
        for j in range(k * workers)
    )


def test_the_formula_is_erlangs_for_one_worker() -> None:
    for load, wait in [(0.5, 0.7), (0.6, 2.5), (0.8, 3.2)]:
        erlang = sum((-load * (wait - k)) ** k / math.factorial(k) * math.exp(load * (wait - k)) for k in range(int(wait) + 1))
        assert share_within(wait, 1, load) == pytest.approx((1 - load) * erlang, abs=1e-9)


def test_the_formula_is_what_a_queue_does() -> None:
    """A hundred thousand requests at random, served in turn by the worker that is free first."""
    workers, load = 4, 0.7
    random = np.random.default_rng(0)
    free = [0.0] * workers
    waits = []
    for comes in np.cumsum(random.exponential(1 / (workers * load), 100_000)):
        starts = max(heapq.heappop(free), comes)
        heapq.heappush(free, starts + 1)
        waits.append(starts - comes)
    for wait in (0.2, 0.5, 1.3):
        assert np.mean(np.array(waits) <= wait) == pytest.approx(share_within(wait, workers, load), abs=0.01)


# -- the table -------------------------------------------------------------------------------------------------------------
def table() -> dict[tuple[int, float], float]:
    """The page's loads, by workers and by the p95 in service times."""
    header = re.search(r"^\| workers \|(.*)\|$", PAGE, re.M)
    assert header is not None
    answers = [float(cell.split()[0]) for cell in header[1].split("|")]
    rows = re.findall(r"^\| (\d+) \|((?: 0\.\d\d \|)+)$", PAGE, re.M)
    return {
        (int(c), a): float(cell) for c, cells in rows for a, cell in zip(answers, cells.strip("| ").split("|"), strict=True)
    }


def test_loads_of_the_table_keep_the_promise_and_a_hundredth_more_breaks_it() -> None:
    cells = table()
    assert len(cells) == 16
    for (workers, answer), load in cells.items():
        assert share_within(answer - 1, workers, load) >= 0.95, (workers, answer)
        assert share_within(answer - 1, workers, load + 0.01) < 0.95, (workers, answer)


# -- the example -----------------------------------------------------------------------------------------------------------
def seconds(schedule: str) -> float:
    runs = json.loads(BENCHMARK.read_text())["results"]["demo pair"]["256 tokens"]["runs"]
    return runs[schedule]["total_seconds"]["median"]


EXAMPLE = re.findall(r"^\| `--schedule (\w+)` \|" + 6 * r" ([\d.]+)[^|]*\|" + "$", PAGE, re.M)


def test_the_example_has_both_schedules() -> None:
    assert {row[0] for row in EXAMPLE} == {"hybrid", "large"}


@pytest.mark.parametrize("row", EXAMPLE, ids=lambda row: row[0])
def test_the_example_follows_from_the_benchmark(row: tuple[str, ...]) -> None:
    schedule, (taken, allowed, answer, load, machine, machines) = row[0], map(float, row[1:])
    wanted, workers, promise = 10, 2, 1.0
    assert f"{wanted} images a second" in PAGE
    assert "answered within 1 second" in PAGE
    assert taken == round(seconds(schedule), 3)
    assert allowed == math.floor(10 * promise / taken) / 10
    assert answer == max(a for (c, a) in table() if c == workers and a <= allowed)
    assert load == table()[workers, answer]
    assert machine == pytest.approx(workers * load / taken, abs=0.005)
    assert machines == math.ceil(wanted / machine)
