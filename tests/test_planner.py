"""The planner: its space of schedules, the model of distances, calibrations in the bundle, and choices for a budget."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Finished

from hst_trt.bundle import Bundle, CalibratedEntry, CalibrationEntry, DistanceEntry, save_calibration
from hst_trt.compare.features import Features
from hst_trt.compare.rows import Prompt
from hst_trt.errors import MissingError, RequestError
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.planner.calibrate import NEAR, Calibrator, Panel, calibrate
from hst_trt.planner.choose import SLACK, Budget, Distance, best_known, choose, frontier
from hst_trt.planner.model import DistanceModel
from hst_trt.planner.space import CORRECTIONS, LEAST_STEPS, REFRESHES, Point, Space, point_of
from hst_trt.schedule import FlowMatchEuler, Sampling

SPACE = Space(20, (0.1, 0.2, 0.3, 0.4, 0.5, 0.75), 3.0)
PROMPTS = [Prompt(i, text) for i, text in enumerate(["a red apple", "a cat", "a castle in the night sky", "a car"])]


def sigmas_of(point: Point) -> np.ndarray:
    return FlowMatchEuler(3.0).table(point.steps, Sampling(point.solver, "trailing", point.shift)).sigmas


def points(count: int, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    return list(dict.fromkeys(SPACE.random(rng) for _ in range(count)))


# -- the space -----------------------------------------------------------------------------------------------------------
def test_points_that_do_the_same_are_the_same_and_every_point_is_a_plan(demo_bundle: Path) -> None:
    pipeline = HybridStitchPipeline.from_bundle(demo_bundle)
    made = {}
    short = Point((4, 1, 0), "ab2", ratio=0.3, ras=True)
    for point in [*points(300), *SPACE.large_only(), *SPACE.neighbours(short)]:
        assert SPACE.tidied(point) == point
        assert LEAST_STEPS <= point.steps <= 20
        plan = pipeline.plan(**point.settings)
        assert len(plan.steps) == point.steps
        assert made.setdefault(repr(plan), point) == point
    stages = {tuple(count > 0 for count in point.stages) for point in points(300)}
    assert len(stages) >= 6, "large, small, and all mixtures are drawn"


def test_a_refresh_is_every_so_manyth_hybrid_step(demo_bundle: Path) -> None:
    pipeline = HybridStitchPipeline.from_bundle(demo_bundle)
    for every in REFRESHES[1:]:
        for point in (Point((2, 9, 1), ratio=0.3, refresh=every), Point((3, 9, 0), ratio=0.3, refresh=every, ras=True)):
            assert SPACE.tidied(point) == point
            plan = pipeline.plan(**point.settings)
            full = [t for t, step in enumerate(plan.steps) if step.large_tokens == plan.num_tokens]
            large = point.stages[0]
            assert full == [*range(large), *(large + k for k in range(9) if (k + 1) % every == 0)]
            assert plan.uses_small is not point.ras


def test_neighbours_are_one_change_away_and_lead_back() -> None:
    for point in points(40):
        near = SPACE.neighbours(point)
        assert point not in near
        assert len(set(near)) == len(near) > 4
        for other in near:
            assert SPACE.tidied(other) == other
            assert abs(other.steps - point.steps) <= 1
            assert (
                other.ras != point.ras
                or not other.stages[1]
                or max(abs(a - b) for a, b in zip(other.stages, point.stages, strict=True)) <= 1
            )
    inside = Point((3, 6, 3), "ab2", 4.0, 0.3, 0.9, 2)
    assert all(inside in SPACE.neighbours(other) for other in SPACE.neighbours(inside) if not other.ras)


# -- the model -----------------------------------------------------------------------------------------------------------
def true_distance(point: Point) -> float:
    """A world in which small velocities are wrong by so much, masks and correction help, and kept velocities grow wrong."""
    sigmas, (large, hybrid, _) = sigmas_of(point), point.stages
    way = -np.diff(sigmas)
    wrong = np.where(np.arange(point.steps) < large, 0.0, 1.0)
    wrong[large : large + hybrid] = 0.6 * (1 - point.ratio)
    if not large and hybrid:
        wrong[0] = 0.0
    if point.ras:
        wrong[large:] = 20 * way[large:] * (1 - point.ratio)
    if point.refresh:
        wrong[large + point.refresh - 1 : large + hybrid : point.refresh] = 0.0
    helped = 0.7 if point.correction >= 0.9 else 1.0
    discrete = 2.0 / point.steps ** (1.0 if point.solver == "euler" else 1.5)
    return float(np.hypot(discrete, 0.5 * helped * (way * wrong * (0.4 + sigmas[1:])).sum()))


def test_the_model_learns_distances_from_few_schedules() -> None:
    every = [point for point in points(500) if not point.large_only]
    known = SPACE.large_only() + every[:150]
    model = DistanceModel({point: true_distance(point) for point in known}, sigmas_of)
    wanted = np.log([true_distance(point) for point in every[150:]])
    assert np.std(wanted) > 0.5
    assert np.abs(model(every[150:]) - wanted).mean() < 0.06
    assert model.error < 0.06


# -- calibrating ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle without the calibration that it ships with."""
    copy = tmp_path / "demo.hstb"
    shutil.copytree(demo_bundle, copy)
    table = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(table | {"calibrations": []}))
    return copy


def run_calibration(bundle: Path, count: int, **changes: object) -> tuple[CalibrationEntry, list[str]]:
    said: list[str] = []
    settings = {"height": 64, "width": 64, "baseline_steps": 4, "converged_steps": 6} | changes
    entry = calibrate(
        HybridStitchPipeline.from_bundle(bundle, threads=1), PROMPTS, count,
        on_measured=lambda done, of, text: said.append(text), **settings,
    )  # fmt: skip
    return entry, said


def test_a_calibration_is_written_goes_on_and_is_of_latents_and_features(bundle: Path) -> None:
    entry, said = run_calibration(bundle, 8)
    assert len(entry.schedules) == len(said) == 8
    assert Bundle.open(bundle).manifest.calibrations == (entry,)
    more, said = run_calibration(bundle, 40)
    assert len(said) == 32, "what was measured is not measured again"
    assert more.schedules[:8] == entry.schedules
    assert len({point_of(schedule) for schedule in more.schedules}) == 40
    assert Bundle.open(bundle, check_hashes=True).manifest.calibrations == (more,)

    pipeline = HybridStitchPipeline.from_bundle(bundle, threads=1)

    def latents(**settings: object) -> np.ndarray:
        size = {"height": 64, "width": 64, "output_type": "latent"}
        return np.concatenate([pipeline(p.prompt, seed=p.number, **size, **settings).images for p in PROMPTS])

    def seen(made: np.ndarray) -> list[torch.Tensor]:
        return Features()(pipeline.decode(made))[1]

    wanted = latents(schedule="large", num_inference_steps=6, solver="ab2", timestep_spacing="trailing")
    for schedule in (more.schedules[0], more.schedules[-1]):
        made = latents(**point_of(schedule).settings)
        error = np.sqrt(np.square(made - wanted).mean((1, 2, 3))).mean()
        assert schedule.latents == pytest.approx(float(error), abs=2e-6)
        unlike = np.sqrt(Features.distance(seen(made), seen(wanted))).mean()
        assert schedule.features == pytest.approx(float(unlike), abs=2e-6)
        assert unlike > 0.1


def test_a_space_that_is_measured_out_ends_the_calibration(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Panel, "distances", lambda self, point: np.full((2, 1), 1.0 + len(str(point))))
    entry, said = run_calibration(bundle, 10_000, baseline_steps=LEAST_STEPS)
    space = Space(LEAST_STEPS, tuple(r for r in Bundle.open(bundle).manifest.bucket_ratios if r < 1), 3.0)
    rng = np.random.default_rng(1)
    everything = {space.random(rng) for _ in range(20_000)}
    measured = {point_of(schedule) for schedule in entry.schedules}
    assert len(measured) == len(said)
    assert len(everything & measured) > 0.95 * len(everything)


def test_other_prompts_or_another_reference_begin_anew(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_calibration(bundle, 5)
    assert not caplog.records
    entry, said = run_calibration(bundle, 5, converged_steps=7)
    assert "replaces the calibration" in caplog.text
    assert len(said) == 5
    assert Bundle.open(bundle).manifest.calibrations == (entry,), "one a size"
    run_calibration(bundle, 3, width=96)
    assert len(Bundle.open(bundle).manifest.calibrations) == 2


def test_it_measures_where_the_frontier_is(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the world of `true_distance`, 250 measurements come within 10 % of the best of the whole space at every budget."""
    pipeline = HybridStitchPipeline.from_bundle(demo_bundle)
    entry = calibration(()).model_copy(update={"baseline_steps": 20})
    monkeypatch.setattr(Panel, "distances", lambda self, point: np.full((2, 1), true_distance(point)))
    panels = [Panel(pipeline, part, entry, Features()) for part in (PROMPTS, [])]
    calibrator = Calibrator(pipeline, *panels, entry)
    assert len(list(calibrator.run(250))) == 250
    everything = [*points(20_000, seed=5), *calibrator.measured]
    speeds = np.array([calibrator.speedup(point) for point in everything])
    truth = np.array([true_distance(point) for point in everything])
    for budget in (1.3, 1.83, 2.5, 3.5):
        found = min(true_distance(point) for point in calibrator.measured if calibrator.speedup(point) >= budget)
        assert found <= 1.1 * truth[speeds >= budget].min()


def test_what_comes_near_being_chosen_is_measured_on_all_prompts(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompts flatter some schedules by up to 20 %, the others do not: none that were flattered is left ahead."""
    few, many = PROMPTS[:1], PROMPTS[1:] * 13

    def distances(panel: Panel, point: Point) -> np.ndarray:
        luck = np.random.default_rng(len(repr(point)) + sum(point.stages) * 7).uniform(0.8, 1.2) if panel.cases is few else 2.0
        return np.full((2, len(panel.cases)), true_distance(point) * luck)

    monkeypatch.setattr(Panel, "distances", distances)
    entry = calibration(()).model_copy(update={"baseline_steps": 20})
    pipeline = HybridStitchPipeline.from_bundle(demo_bundle)
    calibrator = Calibrator(pipeline, *(Panel(pipeline, part, entry, Features()) for part in (few, many)), entry)
    left = [left for *_, left in calibrator.run(150)]
    assert left[:150] == list(range(149, -1, -1))
    assert left[-1] == 0
    assert 10 < len(calibrator.confirmed) == len(left) - 150 < 100
    known = best_known(calibrator.measured, calibrator.confirmed)
    for point, distance in known.items():
        assert 0.8 < distance.both / (2 * true_distance(point)) < 1.45, "looked at as if it had been lucky"
        if point not in calibrator.confirmed:
            faster = [other for other in known if calibrator.speedup(other) >= calibrator.speedup(point)]
            assert distance.both > NEAR * min(known[other].both for other in faster)
    lucky = min(calibrator.measured, key=lambda p: calibrator.measured[p].both / true_distance(p))
    assert calibrator.measured[lucky].both < 0.85 * true_distance(lucky)
    for point, distance in calibrator.confirmed.items():
        expected = (calibrator.measured[point].both + 39 * 2 * true_distance(point)) / 40
        assert distance.latents == distance.features == pytest.approx(expected)
    for made in calibrator.entries():
        assert (made.confirmed is not None) == (point_of(made) in calibrator.confirmed)


def test_further_prompts_are_of_the_file_after_the_first(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hst_trt.planner.calibrate.FIRST_PROMPTS", 2)
    entry, said = run_calibration(bundle, 12)
    confirmed = [schedule for schedule in entry.schedules if schedule.confirmed]
    assert (entry.prompts, entry.further_prompts) == (2, 2)
    assert len(said) == 12 + len(confirmed) > 12
    assert Bundle.open(bundle).manifest.calibrations == (entry,)
    again, said = run_calibration(bundle, 12)
    assert (again, said) == (entry, []), "all of it is kept"

    pipeline = HybridStitchPipeline.from_bundle(bundle, threads=1)
    size = CalibrationEntry.model_copy(entry)
    for schedule in (confirmed[0], confirmed[-1]):
        wanted = Panel(pipeline, PROMPTS, size, Features()).distances(point_of(schedule)).mean(1)
        assert schedule.confirmed is not None
        assert (schedule.confirmed.latents, schedule.confirmed.features) == pytest.approx(tuple(wanted), abs=3e-6)

    monkeypatch.setattr(sys.modules[__name__], "PROMPTS", [*PROMPTS[:3], Prompt(3, "a dog")])
    other, said = run_calibration(bundle, 12)
    assert len(said) == sum(schedule.confirmed is not None for schedule in other.schedules) > 0, (
        "only these are of other prompts"
    )
    assert [point_of(schedule) for schedule in other.schedules] == [point_of(schedule) for schedule in entry.schedules]
    assert other.further_hash != entry.further_hash


def test_a_calibration_without_a_reference_is_refused(bundle: Path) -> None:
    with pytest.raises(RequestError, match="no reference"):
        run_calibration(bundle, 5, converged_steps=4)


# -- choosing ------------------------------------------------------------------------------------------------------------
def calibration(schedules: tuple[CalibratedEntry, ...]) -> CalibrationEntry:
    return CalibrationEntry(
        height=256, width=256, guidance_scale=3.0, prompts=4, prompts_hash="0", further_prompts=0, further_hash="0",
        baseline_steps=20, converged_steps=80,
        date="2026-01-01", schedules=schedules,
    )  # fmt: skip


def entry(stages: tuple[int, int, int], distance: float, **changes: object) -> CalibratedEntry:
    usual = {"solver": "euler", "ratio": 0.3 if stages[1] else 0.0, "correction": 0.0, "refresh": 0}
    usual |= {"shift": None, "ras": False}
    distances = {"latents": distance, "features": distance} | changes
    return CalibratedEntry(stages=stages, **usual | distances)


SCHEDULES = (
    entry((20, 0, 0), 0.1),
    entry((10, 0, 0), 0.3),
    entry((9, 0, 0), 0.35),
    entry((2, 4, 5), 0.25),
    entry((2, 2, 6), 0.4, correction=0.9),
    entry((0, 0, 10), 0.9),
)


@pytest.fixture
def calibrated(bundle: Path) -> Bundle:
    return save_calibration(Bundle.open(bundle), calibration(SCHEDULES))


def test_the_nearest_schedule_within_the_budget_is_chosen(calibrated: Bundle) -> None:
    for asked in (1.0, 1.5, 2.0, 2.2, 3.0):
        choice = choose(calibrated, Budget(speedup=asked), None)
        everything = [choice.best, *choice.runners_up]
        assert all(option.speedup >= asked * (1 - SLACK) for option in everything)
        assert [o.distance.both for o in everything] == sorted(o.distance.both for o in everything)
    assert choose(calibrated, Budget(speedup=1.0), None).best.distance == Distance(0.1, 0.1)
    best = choose(calibrated, Budget(speedup=2.0), None)
    assert best.best.point.stages == (2, 4, 5)
    assert best.large_only is not None
    assert best.large_only.distance == Distance(0.3, 0.3)


def test_schedules_measured_on_few_prompts_stand_beside_those_on_all(calibrated: Bundle) -> None:
    """The other prompts make every distance twice as large; so do they, it is taken, for what was not measured on them."""
    confirmed = {(20, 0, 0): 0.2, (10, 0, 0): 0.6, (9, 0, 0): 0.7}
    schedules = tuple(
        s.model_copy(update={"confirmed": DistanceEntry(latents=far, features=far)}) if (far := confirmed.get(s.stages)) else s
        for s in SCHEDULES
    )
    bundle = save_calibration(calibrated, calibration(schedules))
    choice = choose(bundle, Budget(speedup=2.0), None)
    assert choice.best.point.stages == (2, 4, 5)
    assert choice.best.distance.both == pytest.approx(0.5)
    assert choice.large_only is not None
    assert choice.large_only.distance == Distance(0.6, 0.6)


def test_near_latents_do_not_make_up_for_features_that_are_far(calibrated: Bundle) -> None:
    seams = entry((2, 4, 5), 0.25, features=0.4)
    assert Distance(0.25, 0.4).both == pytest.approx(0.1**0.5)
    bundle = save_calibration(calibrated, calibration(tuple(seams if s.stages == (2, 4, 5) else s for s in SCHEDULES)))
    assert choose(bundle, Budget(speedup=2.0), None).best.point.stages == (10, 0, 0)
    slight = entry((2, 4, 5), 0.25, features=0.35)
    bundle = save_calibration(calibrated, calibration(tuple(slight if s.stages == (2, 4, 5) else s for s in SCHEDULES)))
    assert choose(bundle, Budget(speedup=2.0), None).best.point.stages == (2, 4, 5)


def test_plain_large_steps_are_chosen_where_they_are_nearest(calibrated: Bundle) -> None:
    other = tuple(s for s in SCHEDULES if s.stages != (2, 4, 5))
    bundle = save_calibration(calibrated, calibration(other))
    choice = choose(bundle, Budget(speedup=1.9), None)
    assert choice.best == choice.large_only
    assert choice.best.options == "--schedule large --num-inference-steps 10 --timestep-spacing trailing"


def test_an_unreachable_budget_names_what_is_reachable(calibrated: Bundle) -> None:
    fastest = max(
        o.speedup
        for o in frontier(calibrated, calibrated.manifest.calibrations[0], choose(calibrated, Budget(1.0), None).costs)
    )
    with pytest.raises(RequestError, match="10x") as caught:
        choose(calibrated, Budget(speedup=10), None)
    assert f"{fastest:.2f}x" in str(caught.value.found)


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        ({}, "speed-up or a latency"),
        ({"speedup": 1.0, "latency": 2.0}, "speed-up or a latency"),
        ({"speedup": 0}, "not a positive"),
        ({"speedup": float("nan")}, "not a positive"),
        ({"latency": -1}, "not a positive"),
        ({"speedup": "fast"}, "not a positive"),
    ],
)
def test_a_budget_that_is_none_is_refused(budget: dict, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        Budget(**budget)


def test_a_latency_needs_measured_seconds_and_a_size_its_calibration(calibrated: Bundle, demo_bundle: Path) -> None:
    with pytest.raises(RequestError, match="seconds") as caught:
        choose(calibrated, Budget(latency=1.0), None)
    assert "--save-costs" in str(caught.value.fix)
    with pytest.raises(MissingError, match="no calibration for 64x64") as missing:
        choose(calibrated, Budget(speedup=1.5), None, height=64, width=64)
    assert "256x256" in str(missing.value.found)
    assert "hst-trt calibrate" in str(missing.value.fix)


def test_the_frontier_has_what_nothing_beats(calibrated: Bundle) -> None:
    costs = choose(calibrated, Budget(speedup=1.0), None).costs
    best = frontier(calibrated, calibrated.manifest.calibrations[0], costs)
    assert [o.point.stages for o in best] == [(20, 0, 0), (2, 4, 5), (2, 2, 6), (0, 0, 10)]
    for one, other in itertools.pairwise(best):
        assert one.distance.both < other.distance.both
        assert one.speedup < other.speedup


# -- the commands --------------------------------------------------------------------------------------------------------
def test_plan_and_run_take_a_budget(hst: Callable[..., Finished], calibrated: Bundle) -> None:
    planned = hst("plan", "--bundle", calibrated.path, "--speedup", 2, "--json")
    made = json.loads(planned.out)
    assert made["chosen"]["options"].startswith("--schedule hybrid --num-inference-steps 11 --stages 2,4,5")
    assert len(made["steps"]) == 11
    assert [row["distance"] for row in made["runners_up"]] == [0.3, 0.35, 0.4, 0.9]
    table = hst("plan", "--bundle", calibrated.path, "--speedup", 2).out
    assert "chosen" in table
    assert "runner-up" in table
    drawn = hst("run", "--bundle", calibrated.path, "--speedup", 2, "--prompt", "a cat", "--seed", 1, "--json")
    assert drawn.code == 0, drawn.err
    result = json.loads(drawn.out)["results"][0]
    assert {stage: s["steps"] for stage, s in result["stages"].items()} == {"large": 2, "hybrid": 4, "small": 5}
    assert "2,4,5" in drawn.err


@pytest.mark.parametrize(
    ("arguments", "code", "found"),
    [
        (["--speedup", "2", "--stages", "1,2,3"], 2, "--stages"),
        (["--speedup", "2", "--latency", "1"], 2, "speed-up or a latency"),
        (["--speedup", "100"], 2, "reaches 100x"),
        (["--speedup", "nan"], 2, "not a positive"),
        (["--speedup", "2", "--height", "64", "--width", "64"], 4, "hst-trt calibrate"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_an_error(
    hst: Callable[..., Finished], calibrated: Bundle, arguments: list[str], code: int, found: str
) -> None:
    for command in (["plan"], ["run", "--prompt", "x"]):
        result = hst(*command, "--bundle", calibrated.path, *arguments)
        assert result.code == code
        assert found in result.err


def test_calibrate_prints_the_best(hst: Callable[..., Finished], bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("\n".join(p.prompt for p in PROMPTS))
    size = ["--height", 64, "--width", 64, "--baseline-steps", 4, "--converged-steps", 6]
    command = ["calibrate", "--bundle", bundle, "--prompts-file", prompts, "--schedules", 7, *size]
    result = hst(*command)
    assert result.code == 0, result.err
    assert "--schedule large" in result.out
    made = json.loads(hst(*command, "--json").out)
    assert len(made["schedules"]) == 7
    assert made["frontier"]
    prompts.write_text("a cat\n")
    few = hst(*command)
    assert few.code == 2
    assert "4 or more" in few.err


def test_corrections_and_ratios_are_those_that_calibrations_may_hold() -> None:
    for point in points(200):
        saved = CalibratedEntry(**dataclasses.asdict(point), latents=0.1, features=0.2)
        assert point_of(saved) == point
        assert point.correction in CORRECTIONS


def test_what_is_missing_is_said_before_anything_is_drawn(
    hst: Callable[..., Finished], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("\n".join(p.prompt for p in PROMPTS))

    def drawn(*args: object, **kwargs: object) -> None:
        pytest.fail("a picture was drawn")

    monkeypatch.setattr(HybridStitchPipeline, "__call__", drawn)
    for command, package in (
        ("calibrate", "scipy.optimize"),
        ("calibrate", "efficientnet_lite_pytorch"),
        ("compare", "matplotlib"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            result = hst(command, "--bundle", bundle, "--prompts-file", prompts)
        assert result.code == 4
        assert package.split(".")[0] in result.err
