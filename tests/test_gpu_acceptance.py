"""The script that proves things on a GPU, proved without one: its parts rehearsed, its faults, its report, its arithmetic."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_bundle import pipeline as fake_pipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # scripts are not part of the package

from acceptance import engines, pairs, replays  # noqa: E402
from acceptance.aims import judge, outside, ratio  # noqa: E402
from acceptance.command import accept  # noqa: E402
from acceptance.jobs import DEVICE, REHEARSAL, WHOLE, Job, Outcome, limit_of_first, missing_packages, outcome_of, run_job  # noqa: E402
from acceptance.journal import Findings, Journal, Skip, read_journal  # noqa: E402
from acceptance.loops import Loop, equal_cost_steps, loops_of, loops_that_fit  # noqa: E402
from acceptance.page import markdown  # noqa: E402
from acceptance.report import Report, file_stem  # noqa: E402
from acceptance.roofline import guided_flops, peak_flops, share_of_peak  # noqa: E402
from acceptance.settings import Settings  # noqa: E402
from acceptance.subjects import bundle_subject, calls_of, make_a_plan, run_loop  # noqa: E402
from acceptance.timing import interleave  # noqa: E402
from acceptance.torch_subjects import CompiledTransformer, torch_subject  # noqa: E402

from hst_trt.errors import MissingError, NumericsError  # noqa: E402
from hst_trt.plan import token_buckets  # noqa: E402
from hst_trt.recipe import load_recipe, load_target  # noqa: E402

SCRIPT = ROOT / "scripts" / "gpu_acceptance.py"
H100 = "NVIDIA H100 80GB HBM3"


def journal_at(path: Path, seconds: float = 600) -> Journal:
    return Journal(path, time.monotonic() + seconds)


# -- the rehearsal -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of all parts at tiny shapes on the CPU, run in this process: a process each would import torch each time."""
    folder = tmp_path_factory.mktemp("rehearsal")
    report = Report(folder / "results", "cpu", rehearsal=True, places=(folder,))
    (folder / "work").mkdir()
    for job in (DEVICE, *REHEARSAL):
        if job.name == "engines.tests":
            continue
        path = report.journal(job.name)
        journal = journal_at(path)
        module, _, function = job.target.partition(":")
        with journal.check(WHOLE):
            getattr(importlib.import_module(module), function)(journal, Settings(folder / "work", rehearse=True))
        journal.end()
        report.put(job.name, outcome_of(read_journal(path), 0, False, "", 1.0, 60.0), read_journal(path), "0123abc")
    return json.loads(report.json.read_text()) | {"page": report.markdown.read_text()}


def test_every_part_of_a_rehearsal_is_ok(rehearsed: dict[str, Any]) -> None:
    for name, job in rehearsed["jobs"].items():
        assert job["status"] == "ok", (name, job["reason"])
    assert next(iter(rehearsed["jobs"])) == "device"
    assert rehearsed["rehearsal"] is True
    assert {aim["verdict"] for aim in rehearsed["aims"]} == {"rehearsed", "not measured"}


def test_a_rehearsal_compares_every_call_and_every_bucket(rehearsed: dict[str, Any]) -> None:
    facts = rehearsed["jobs"]["engines.torch"]["facts"]
    demo = load_recipe("demo").defaults
    for pair, tokens in (("tiny", 64), ("demo", demo.height * demo.width // 256)):
        for precision in ("float32", "bfloat16"):
            errors = facts[f"torch parity {pair} {precision}"]["errors"]
            assert list(errors) == ["large", "small", *(f"large, {n} tokens" for n in token_buckets(tokens)[:-1])]
        assert max(facts[f"exactness {pair} float32"]["errors"].values()) < 1e-5
    bundles = rehearsed["jobs"]["engines.onnxruntime"]["facts"]
    assert {engine for engine, row in bundles["parity tiny float32"].items() if row["shapes"] == 6} >= {
        "large",
        "guide",
        "blend",
    }
    assert bundles["pictures demo float32"]["hybrid"] == {"psnr_db": None, "largest_difference": 0}


def test_a_rehearsal_times_calls_and_loops_in_rounds(rehearsed: dict[str, Any]) -> None:
    for name, subject in (("shapes.torch", "torch compiled + graphs"), ("shapes.onnxruntime", "onnxruntime")):
        job = rehearsed["jobs"][name]
        calls, loops = job["series"]["calls"], job["series"]["loops 4"]
        assert {
            "diffusers eager: large",
            "diffusers compiled: small",
            f"{subject}: large 64",
            f"{subject}: small",
        } <= calls.keys()
        assert {len(values) for values in (*calls.values(), *loops.values())} == {2}
        hybrid = f"{subject}: hybrid (1,2,1)"
        assert {f"{subject}: large 4", hybrid, f"{hybrid}, transformers alone", f"{hybrid}, refreshed"} <= loops.keys()
        assert job["facts"][f"loop {hybrid}"]["calls"] == {"large 64": 1, "small": 4, "large 24": 2}
        assert job["facts"][f"loop {hybrid}, refreshed"]["refresh"] == "once, in the middle"
    assert rehearsed["jobs"]["shapes.torch"]["series"]["ends"].keys() == {"VAE decoder", "T5-XXL", "CLIP-L", "CLIP-G"}


def test_the_page_of_a_rehearsal_has_every_table_and_names_no_place(rehearsed: dict[str, Any], tmp_path: Path) -> None:
    page = rehearsed["page"]
    for heading in (
        "Aims",
        "Parts",
        "Parity with float32",
        "Pictures of the demo pair",
        "Replayed loops",
        "True shapes, shapes.torch",
    ):
        assert f"## {heading}" in page
    assert "says nothing of a GPU" in page
    assert "| H100, SD3.5 Large, torch eager / torch.compile, bf16 | 232 / 149 ms a step |" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("| torch compiled + graphs: large 4 |")}
    assert widths == {8}
    for place in (ROOT, tmp_path.parent, Path.home(), Path(sys.prefix)):
        assert str(place) not in page + json.dumps(rehearsed["jobs"])


@pytest.mark.slow
def test_the_whole_script_rehearses_and_a_second_run_adds_its_part(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--rehearse", "--output", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    first = run("--parts", "device,engines,graphs,report")
    assert first.returncode == 0, first.stderr
    second = run("--parts", "shapes")
    assert second.returncode == 0, second.stderr
    (page,) = tmp_path.glob("gpu_rehearsal-cpu_*.md")
    report = json.loads(page.with_suffix(".json").read_text())
    assert report["jobs"].keys() == {DEVICE.name, *(job.name for job in REHEARSAL)}
    assert {job["status"] for job in report["jobs"].values()} == {"ok", "skipped"}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]


# -- without a GPU -------------------------------------------------------------------------------------------------------
def test_without_a_gpu_it_says_what_is_missing_and_ends_with_4(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 4
    assert "there is no NVIDIA GPU to accept" in result.stderr
    assert "found: " in result.stderr
    assert "--rehearse" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--parts", "engines,nonsense"], ["--minutes", "0"]])
def test_arguments_that_mean_nothing_end_with_2(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert "nonsense" in result.stderr or "--minutes" in result.stderr


def test_a_job_whose_package_is_missing_is_skipped_with_the_command_that_installs_it() -> None:
    job = Job("engines.tensorrt", "m:f", 1, ("torch", "diffusers", "cuda.bindings"))
    packages = {"torch": "2.13.0", "diffusers": None, "cuda.bindings": None}
    assert missing_packages(job, packages) == "needs diffusers, cuda.bindings: pip install diffusers cuda-python"
    assert not missing_packages(job, dict.fromkeys(packages, "1"))


# -- parts that go wrong -------------------------------------------------------------------------------------------------
PART = """
import os, time
from hst_trt.errors import BuildError, NumericsError
from acceptance.journal import Skip

def fine(journal, settings):
    with journal.check("one"):
        journal.fact("answer", 42)
    with journal.check("two"):
        raise Skip("not here")

def raises(journal, settings):
    with journal.check("engines equal their graphs"):
        raise NumericsError("an engine departs", found="error 0.5")
    with journal.check("what comes after it"):
        journal.fact("after", True)

def breaks(journal, settings):
    with journal.check("first"):
        journal.fact("found", [1, 2])
    raise ZeroDivisionError("unforeseen")

def hangs(journal, settings):
    for number in range(3):
        journal.sample("calls", "large", 0.1 * (number + 1))
    with journal.check("a build that never ends"):
        time.sleep(600)

def dies(journal, settings):
    journal.sample("calls", "large", 0.5)
    print("the driver took this process down", flush=True)
    os.kill(os.getpid(), 9)

def skips(journal, settings):
    with journal.check("only this"):
        raise Skip("no room")
"""


@pytest.fixture
def part(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """part(name=function ...): runs jobs of the functions above; the exit code, and the report."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "parts_that_go_wrong.py").write_text(PART)

    def run(seconds: float = 900, **functions: str) -> tuple[int, dict[str, Any]]:
        chosen = [Job(f"engines.{name}", f"parts_that_go_wrong:{function}", 1) for name, function in functions.items()]
        code = accept(("engines",), seconds, tmp_path / "out", rehearse=True, jobs=chosen, path=[tmp_path / "made"])
        (path,) = (tmp_path / "out").glob("*.json")
        report = json.loads(path.read_text())
        return code, report | {"page": path.with_suffix(".md").read_text()}

    return run


def test_a_part_that_fails_or_breaks_leaves_the_others_and_what_it_found(part) -> None:
    code, report = part(a="raises", b="breaks", c="fine", d="skips")
    a, b, c, d = (report["jobs"][f"engines.{name}"] for name in "abcd")
    assert code == NumericsError.exit_code
    assert (a["status"], a["facts"]) == ("failed", {"after": True})
    assert a["reason"] == "engines equal their graphs: an engine departs\nfound: error 0.5"
    assert (b["status"], b["facts"]) == ("failed", {"found": [1, 2]})
    assert "ZeroDivisionError: unforeseen (parts_that_go_wrong.py:" in b["reason"]
    assert (c["status"], c["facts"], c["checks"]["two"]["reason"]) == ("ok", {"answer": 42}, "not here")
    assert (d["status"], d["reason"]) == ("skipped", "no room")
    assert "| engines.a | failed |" in report["page"]


def test_a_part_that_hangs_is_stopped_and_one_that_is_killed_is_noticed_with_what_they_had_measured(part, monkeypatch) -> None:
    limits = {"engines.a": 8.0}
    monkeypatch.setattr("acceptance.command.limit_of_first", lambda waiting, seconds: limits.get(waiting[0].name, 300.0))
    started = time.monotonic()
    code, report = part(a="hangs", b="dies", c="fine")
    assert time.monotonic() - started < 200
    a, b, c = (report["jobs"][f"engines.{name}"] for name in "abc")
    assert code == 1
    assert (a["status"], a["reason"]) == ("timed out", "stopped after 8 s during: a build that never ends")
    assert a["series"] == {"calls": {"large": pytest.approx([0.1, 0.2, 0.3])}}
    assert (b["status"], b["series"]) == ("died", {"calls": {"large": [0.5]}})
    assert b["reason"] == "ended with signal SIGKILL; its last words: the driver took this process down"
    assert c["status"] == "ok"


def test_a_child_ends_with_the_run_that_started_it(tmp_path: Path) -> None:
    """Nobody else would end it, and it would go on holding the GPU."""
    (tmp_path / "parts_that_go_wrong.py").write_text(
        PART.replace("time.sleep(600)", "print(os.getpid(), flush=True); time.sleep(600)")
    )
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'scripts')!r}, {str(ROOT)!r}]\n"
        "from pathlib import Path\n"
        "from acceptance.jobs import Job, run_job\n"
        f"here = Path({str(tmp_path)!r})\n"
        "run_job(Job('a.b', 'parts_that_go_wrong:hangs', 1), here / 'journal', here, 600.0, path=[here])\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    journal = tmp_path / "journal"
    while not journal.is_file() or "never ends" not in journal.read_text():
        time.sleep(0.1)
        assert run.poll() is None
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert children
    run.send_signal(signal.SIGKILL)
    run.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in children):
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


def test_what_a_killed_run_has_left_goes_into_the_next_report(tmp_path: Path) -> None:
    before = Report(tmp_path, "cpu", rehearsal=True)
    journal = journal_at(before.journal("shapes.torch"))
    journal.sample("calls", "torch: large 64", 0.2)
    with before.journal("shapes.torch").open("a") as file:
        file.write('{"series": "calls", "na')  # the last line was being written
    assert accept(("report",), 60, tmp_path, rehearse=True) == 0
    (path,) = tmp_path.glob("*.json")
    job = json.loads(path.read_text())["jobs"]["shapes.torch"]
    assert (job["status"], job["series"]) == ("died", {"calls": {"torch: large 64": [0.2]}})
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_interrupted_run_reports_what_it_has_and_ends_with_130(tmp_path: Path, monkeypatch) -> None:
    real = run_job

    def interrupted(job: Job, journal: Path, *arguments: Any, **settings: Any) -> Any:
        if job is DEVICE:
            return real(job, journal, *arguments, **settings)
        journal_at(journal).sample("calls", "large", 0.25)
        raise KeyboardInterrupt

    monkeypatch.setattr("acceptance.command.run_job", interrupted)
    assert accept(("graphs",), 600, tmp_path, rehearse=True) == 130
    (path,) = tmp_path.glob("*.json")
    job = json.loads(path.read_text())["jobs"]["graphs.torch"]
    assert (job["status"], job["series"]) == ("died", {"calls": {"large": [0.25]}})


def test_a_later_run_of_the_day_keeps_the_parts_of_an_earlier_one(tmp_path: Path) -> None:
    done = Outcome("ok", "", 0, 1.0, 60.0)
    Report(tmp_path, H100, rehearsal=False).put("engines.torch", done, Findings(facts={"a": 1}), "aaa")
    Report(tmp_path, H100, rehearsal=False).put("shapes.torch", done, Findings(), "bbb")
    (path,) = tmp_path.glob("*.json")
    jobs_now = json.loads(path.read_text())["jobs"]
    assert [(name, job["commit"]) for name, job in jobs_now.items()] == [("engines.torch", "aaa"), ("shapes.torch", "bbb")]
    assert path.stem == f"gpu_h100-80gb-hbm3_{datetime.date.today().isoformat()}"


def test_a_report_of_one_part_says_which_were_not_run(tmp_path: Path) -> None:
    report = Report(tmp_path, H100, rehearsal=False)
    report.put("engines.torch", Outcome("timed out", "stopped after 9 s during: x | y", 1, 9.0, 9.0), Findings(), "aaa")
    page = report.markdown.read_text()
    assert "Not run: device, graphs, shapes." in page
    assert "stopped after 9 s during: x / y" in page, "a cell holds no bar"
    assert page.count("not measured") == 3


def test_time_that_one_part_leaves_goes_to_those_after_it() -> None:
    waiting = [Job("a.b", "m:f", 1), Job("c.d", "m:f", 3)]
    assert limit_of_first(waiting, 400) == 100
    assert limit_of_first(waiting[1:], 390) == 390
    assert limit_of_first(waiting, 1) == 20, "enough to start"


# -- journals and rounds -------------------------------------------------------------------------------------------------
def test_a_journal_holds_what_was_found_until_now(tmp_path: Path) -> None:
    journal = journal_at(tmp_path / "journal")
    with journal.check("a"):
        journal.fact("x", 1)
    with journal.check("b"):
        raise MissingError("no polygraphy", fix="pip install polygraphy")
    with journal.check("c"):
        raise Skip("later")
    found = read_journal(tmp_path / "journal")
    assert {name: check.state for name, check in found.checks.items()} == {"a": "ok", "b": "failed", "c": "skipped"}
    assert (found.checks["b"].exit_code, found.ended) == (4, False)
    journal.end()
    assert read_journal(tmp_path / "journal").ended
    assert read_journal(tmp_path / "nothing") == Findings()


def test_rounds_are_interleaved_and_none_begins_that_would_not_fit(tmp_path: Path) -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            time.sleep(seconds)
            return float(len(order))

        return run

    journal = journal_at(tmp_path / "journal", 2.0)
    done = interleave(journal, "s", {"a": call("a", 0.1), "b": call("b", 0.1)}, rounds=50, warmup=1)
    assert order[:4] == ["a", "b", "a", "b"]
    series = read_journal(tmp_path / "journal").series["s"]
    assert 0 < len(series["a"]) == len(series["b"]) == done < 10
    assert series["a"][0] == 3, "the first round warms up"


# -- replay, waits and graphs, on doubles of CUDA and TensorRT ---------------------------------------------------------------
def test_replays_of_engines_are_proved_equal_without_a_wait_and_counted(engine_bundle: Path, tmp_path: Path) -> None:
    journal = journal_at(tmp_path / "journal")
    replays.prove(journal, Settings(tmp_path, rehearse=True), bundle_subject("fake", fake_pipeline(engine_bundle)))
    found = read_journal(tmp_path / "journal")
    assert {check.state for check in found.checks.values()} == {"ok"}, found.checks
    for name in ("large", "hybrid", "hybrid, refreshed", "srdiffusion"):
        fact = found.facts[f"replay {name}"]
        assert (fact["waits"], fact["largest_difference"], fact["graphs"]["plain"]) == (0, 0, 0)
        assert fact["graphs"]["replayed"] == fact["steps"] == 6, "a step is one graph"
    assert found.facts["replay threshold"]["waits"] > 0
    assert {len(values) for values in found.series["loops"].values()} == {2}


class _Drifting:
    """A backend whose recordings do something else than what was recorded."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def recorder(self) -> Any:
        backend = self._backend

        class Recorder:
            def run(self, key: Any, body: Callable[[], None]) -> None:
                body()
                if any(method.__name__ == "integrate" for method, _ in key):
                    backend.graphs.replayed += 1
                    for buffer in backend.latents:
                        backend.write(buffer, backend.read(buffer) * np.float32(1.0001))

        return Recorder()


def test_a_replay_that_differs_fails_its_check(demo_bundle: Path, tmp_path: Path) -> None:
    from hst_trt.pipeline import HybridStitchPipeline
    from hst_trt.runtime.graphs import GraphCounters

    pipe = HybridStitchPipeline.from_bundle(demo_bundle, threads=1)
    pipe.backend.graphs, pipe.backend.latents = GraphCounters(), []
    subject = bundle_subject("drifting", pipe)
    drifting = dataclasses.replace(subject, backend=_Drifting(pipe.backend))
    plain, replayed = subject.workspace(record=False), drifting.workspace()
    pipe.backend.latents.append(replayed._buffers["latents"])
    journal = journal_at(tmp_path / "journal")
    with journal.check("large"):
        replays.compare(journal, "large", make_a_plan(subject, "large", 3), drifting, plain, replayed)
    check = read_journal(tmp_path / "journal").checks["large"]
    assert check.state == "failed"
    assert check.reason.startswith("replayed latents differ from plain ones")


def test_the_calls_of_a_loop_are_named_in_the_order_they_are_made() -> None:
    shape, models = tiny_models()
    subject = torch_subject("t", models, shape.spec, shape.grid, "cpu")
    _, records = run_loop(subject.workspace(), make_a_plan(subject, "hybrid", 4, stages=(1, 2, 1)))
    assert calls_of(records, 64) == ["large 64", "small", "small", "large 24", "small", "large 24", "small"]


# -- torch ---------------------------------------------------------------------------------------------------------------
def tiny_models(dtype: torch.dtype = torch.float32, layers: int = 3) -> tuple[pairs.PairShape, dict[str, Any]]:
    tiny = pairs.tiny_shape()
    shape = dataclasses.replace(tiny, large={**tiny.large, "num_layers": layers})
    configs = {"large": shape.large, "small": shape.small}
    return shape, {r: pairs.make_transformer({**shape.shared, **c}, "cpu", dtype, 3) for r, c in configs.items()}


def test_compiled_blocks_give_what_the_blocks_give_and_one_compilation_serves_all_alike() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    shape, models = tiny_models(layers=6)
    counter = CompileCounter()
    plain = torch_subject("plain", models, shape.spec, shape.grid, "cpu", ratios=(1.0,))
    compiled = torch_subject(
        "compiled", models, shape.spec, shape.grid, "cpu", lambda m, c: CompiledTransformer(m, c, backend=counter), (1.0,)
    )
    expected, found = engines.velocities(plain), engines.velocities(compiled)
    for name, theirs in expected.items():
        np.testing.assert_allclose(found[name], theirs, atol=1e-5 * np.abs(theirs).max(), err_msg=name)
    assert counter.frame_count <= 4, "blocks with text output and the last one; of the small model a dual one and the last"


def test_a_call_that_departs_from_the_cpu_is_named(tmp_path: Path, monkeypatch) -> None:
    shape, models = tiny_models()
    reference, subject = (engines.subject_of(models, precision, "cpu", shape.grid) for precision in ("float32", "bfloat16"))
    real = engines.velocities

    def wrong(subject: Any) -> dict[str, np.ndarray]:
        found = real(subject)
        if "bfloat16" in subject.name:
            found["large, 24 tokens"] = found["large, 24 tokens"][:, ::-1]
        return found

    monkeypatch.setattr(engines, "velocities", wrong)
    journal = journal_at(tmp_path / "journal")
    with journal.check("parity"):
        engines.compare_with_cpu(journal, "x", subject, reference, "bfloat16")
    found = read_journal(tmp_path / "journal")
    assert found.checks["parity"].exit_code == 7
    assert found.checks["parity"].reason.endswith("found: large, 24 tokens")
    assert found.facts["torch parity x"]["errors"]["large, 24 tokens"] > 0.5


def test_random_weights_stay_finite_through_many_blocks_in_bfloat16() -> None:
    shape, models = tiny_models(torch.bfloat16, layers=38)
    subject = torch_subject("deep", models, shape.spec, shape.grid, "cpu", ratios=(1.0,))
    ws = subject.workspace()
    run_loop(ws, make_a_plan(subject, "large", 3))
    assert ws.is_finite()
    assert 0.01 < float(np.abs(ws.latents).mean()) < 100


def test_the_pair_of_the_true_shapes_has_sd35s_numbers() -> None:
    spec = pairs.SD35.spec
    assert (spec.large.layers, spec.large.width, spec.small.layers, spec.small.width) == (38, 2432, 24, 1536)
    assert (spec.small.dual_layers, spec.text_length, pairs.SD35.grid, spec.max_side) == (13, 333, (64, 64), 3072)


def test_a_pair_with_wider_text_encoders_is_exported_and_built(tmp_path: Path) -> None:
    """As the pair of the true shapes is: text encoders of its widths, few layers, tokenizers of the demo pair."""
    from hst_trt.builder.build import build_bundle
    from hst_trt.pipeline import HybridStitchPipeline

    tiny = pairs.tiny_shape()
    clip = {"hidden_size": 128, "projection_dim": 96, "max_position_embeddings": 20}
    shape = dataclasses.replace(
        tiny, name="wider", clip_length=20, t5_length=12, side=64, guidance_scale=4.5,
        shared={**tiny.shared, "joint_attention_dim": 256, "pooled_projection_dim": 192},
        text={"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": {"d_model": 256}},
    )  # fmt: skip
    recipe = pairs.write_pair(shape, tmp_path / "pair", "cpu", torch.bfloat16)
    assert recipe == pairs.recipe_of(shape, tmp_path / "pair")
    bundle = build_bundle(recipe, load_target("cpu"), tmp_path / "wider-cpu.hstb").bundle
    assert bundle.spec == shape.spec
    image = HybridStitchPipeline.from_bundle(bundle.path, threads=1)("a red apple", seed=1, num_inference_steps=2).images[0]
    assert image.size == (64, 64)


@pytest.mark.slow
def test_the_engines_of_the_tiny_pair_build_without_a_gpu(tmp_path: Path, monkeypatch) -> None:
    """With TensorRT-RTX, through the functions that build them on a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setattr(engines, "detect_target", lambda: "a100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    journal = journal_at(tmp_path / "journal")
    path = engines.built(journal, Settings(tmp_path), "tiny", "tensorrt-rtx", "bfloat16")
    found = read_journal(tmp_path / "journal").facts["build tiny-a100-tensorrt-rtx-bfloat16"]
    assert found["backend"].startswith("tensorrt-rtx 1.")
    assert found["engines"].keys() == json.loads((path / "manifest.json").read_text())["graphs"].keys()
    assert found["engines"]["large"]["profiles"] == 7


# -- pictures and tests --------------------------------------------------------------------------------------------------
def test_psnr_of_known_pictures() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert engines.psnr(black, black) == float("inf")
    assert engines.psnr(black, black + 255) == pytest.approx(0)
    assert engines.psnr(black, black + 10) == pytest.approx(28.1308, abs=1e-4)  # 20 log10(255 / 10)


def test_pictures_that_differ_too_much_fail(demo_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    manifest = demo_bundle / "manifest.json"
    other = tmp_path / "other.hstb"
    shutil.copytree(demo_bundle, other)
    table = json.loads(manifest.read_text())
    table["defaults"]["guidance_scale"] = 15.0
    (other / "manifest.json").write_text(json.dumps(table))
    journal = journal_at(tmp_path / "journal")
    with journal.check("pictures"):
        engines.compare_pictures(journal, "demo", Settings(tmp_path, rehearse=True), other, "bfloat16")
    found = read_journal(tmp_path / "journal")
    assert found.checks["pictures"].state == "failed"
    assert "the picture of the large model is not the CPU's" in found.checks["pictures"].reason
    assert found.facts["pictures demo"]["large"]["psnr_db"] < 30


def test_the_outcome_of_each_test_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "test_made.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_left_out(): pass\n"
    )
    journal = journal_at(tmp_path / "journal")
    engines.run_tests(journal, Settings(tmp_path), [file])
    found = read_journal(tmp_path / "journal")
    assert found.facts["tests"] == {"outcomes": {"passed": 1, "failed": 1, "skipped": 1}, "skipped_because": ["no GPU"]}
    assert "1 of 3 tests failed" in found.checks["pytest runs"].reason
    assert "test_made::test_bad" in found.checks["pytest runs"].reason


def test_tests_that_are_all_skipped_are_no_success(tmp_path: Path) -> None:
    file = tmp_path / "test_made.py"
    file.write_text("import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_left_out(): pass\n")
    for name, files in (("skipped", [file]), ("none", [])):
        journal = journal_at(tmp_path / name)
        engines.run_tests(journal, Settings(tmp_path), files)
        assert read_journal(tmp_path / name).checks["pytest runs"].state == "skipped"


# -- what is worth measuring ---------------------------------------------------------------------------------------------
def fake_seconds(name: str) -> float:
    """Call times as the cost model has them at r = 0.3 of 1024 x 1024: a full large call takes 100 ms."""
    return {"large 64": 0.1, "small": 0.036}.get(name.partition(": ")[2], 0.036)


@pytest.fixture
def loops() -> list[Loop]:
    shape, models = tiny_models()
    return loops_of(torch_subject("t", models, shape.spec, shape.grid, "cpu"), 28, (3, 9, 16), fake_seconds)


def test_the_loops_are_the_aims_and_their_baselines(loops: list[Loop]) -> None:
    names = [loop.label + (" alone" if loop.alone else "") for loop in loops]
    assert names == [
        "large 28", "hybrid (3,9,16)", "srdiffusion (9,0,19)", "hybrid (3,9,16) alone", "hybrid (3,9,16), refreshed",
        "large 28 alone",
    ]  # fmt: skip
    assert [loop.refresh for loop in loops] == ["", "none", "", "none", "once, in the middle", ""]
    refreshed = loops[4].plan.steps
    assert [t for t, step in enumerate(refreshed) if step.large_tokens == 64] == [0, 1, 2, 7]
    # 3 large + 9 masked + 26 small calls (the last large step has one too): 3 * .1 + 9 * .036 + 26 * .036
    assert loops[1].seconds(fake_seconds) == pytest.approx(0.3 + 35 * 0.036)


def test_only_loops_that_fit_are_timed_the_first_ones_first(loops: list[Loop]) -> None:
    large, hybrid = 2.8, 0.3 + 35 * 0.036
    assert loops_that_fit(loops, 4.4 * large + 0.01, fake_seconds) == loops[:1]
    assert loops_that_fit(loops, 4.4 * (large + hybrid) + 0.01, fake_seconds) == loops[:2]
    assert loops_that_fit(loops, 4.4 * large - 0.01, fake_seconds) == []
    assert loops_that_fit(loops, 1000, fake_seconds) == loops


def test_a_split_of_equal_cost_is_the_nearest_there_is() -> None:
    assert equal_cost_steps(28.0, 28, 0.36) == 28
    assert equal_cost_steps(0.36 * 28, 28, 0.36) == 0
    assert equal_cost_steps(15.6, 28, 0.36) == 9  # 9 + 19 * .36 = 15.84, 8 + 20 * .36 = 15.2


# -- roofline and aims -----------------------------------------------------------------------------------------------------
def test_flops_of_a_guided_call_are_those_of_two_rows_counted_by_hand() -> None:
    """One block of width 64, 4 of 8 image tokens, 3 text tokens; a multiply-add is 2 FLOP."""
    from hst_trt.spec import TransformerSpec

    spec = TransformerSpec(1, 1, 64, 0, text_width=16, pooled_width=8, token_channels=4, table_side=8)
    d, q, n, text = 64, 4, 8, 3
    image = q * (4 * d * d + 8 * d * d)  # q, k, v and out, feed-forward
    words = text * 2 * d * d  # the last block makes keys and values of text
    modulation = (6 + 2 + 2) * d * d  # norm1, norm1_context, norm_out
    ends = q * 4 * d * 2 + text * 16 * d + 256 * d + d * d + 8 * d + d * d  # patches in and out, text, timestep, pooled
    attention = 2 * d * (n + text) * q  # QK^T and PV of the computed tokens; text has no queries in the last block
    assert guided_flops(spec, q, n, text) == 2 * 2 * (image + words + modulation + ends + attention)


def test_the_roofline_of_an_h100_is_63_ms_for_a_full_large_step() -> None:
    flops = guided_flops(pairs.SD35.spec.large, 4096, 4096, 333)
    assert flops == pytest.approx(62.2e12, rel=2e-3)
    assert flops / peak_flops(H100) == pytest.approx(0.0629, abs=1e-4)
    assert share_of_peak(flops, 0.105, H100) == pytest.approx(0.599, abs=2e-3)
    assert share_of_peak(flops, 0.200, "NVIDIA A100-SXM4-80GB") == pytest.approx(0.997, abs=2e-3)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        (H100, 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_peak_is_stated_only_for_the_forms_that_it_is_true_of(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak
    assert (share_of_peak(10**12, 1.0, device) is None) is (peak is None)


def measured(subject: str, large: list[float], hybrid: list[float], alone: list[float]) -> Mapping[str, Any]:
    loop = {"steps": 28, "subject": subject, "calls": {"large 4096": 28}}
    label = "hybrid (3,9,16)"
    return {
        "facts": {
            f"loop {subject}: large 28": loop | {"label": "large 28", "refresh": ""},
            f"loop {subject}: {label}": loop | {"label": label, "refresh": "none"},
            "loops 50 left out for want of time": ["x"],
        },
        "series": {
            "loops 28": {
                f"{subject}: large 28": large,
                f"{subject}: {label}": hybrid,
                f"{subject}: {label}, transformers alone": alone,
            }
        },
    }


def test_the_verdict_on_each_aim_is_that_of_the_medians() -> None:
    job = measured("tensorrt", [2.8, 2.9, 2.7], [1.5, 1.6, 1.5], [1.49, 1.59, 1.48])
    verdicts = {v.aim.name: v for v in judge({"shapes.tensorrt": job}, H100)}
    step, speedup, overhead = verdicts.values()
    assert (step.value, step.verdict) == (pytest.approx(100), "met")
    assert (speedup.value, speedup.verdict) == (pytest.approx(1.8125), "met")  # of 1.867, 1.8125 and 1.8
    assert (overhead.value, overhead.verdict) == (pytest.approx(100 * 0.01 / 1.5), "met")
    slower = measured("tensorrt", [3.0], [1.8], [1.7])
    assert [v.verdict for v in judge({"shapes.tensorrt": slower}, H100)] == ["not met"] * 3


def test_aims_of_engines_are_not_measured_on_torch_and_the_step_is_an_h100s() -> None:
    job = measured("torch + graphs", [5.6], [3.0], [2.99])
    verdicts = [(v.on.partition(",")[0], v.verdict) for v in judge({"shapes.torch": job}, "NVIDIA A100-SXM4-80GB")]
    assert verdicts == [
        ("torch + graphs", "no aim for this device"), ("tensorrt", "not measured"),
        ("torch + graphs", "met"), ("tensorrt", "not measured"),
        ("torch + graphs: hybrid (3", "met"), ("tensorrt", "not measured"),
    ]  # fmt: skip
    assert [v.verdict for v in judge({}, H100)] == ["not measured"] * 3
    assert {v.verdict for v in judge({"shapes.torch": job}, H100, rehearsal=True)} == {"rehearsed", "not measured"}


def test_ratios_and_shares_are_formed_round_by_round_of_whole_rounds() -> None:
    series = {"a": [1.0, 2.0, 4.0], "b": [3.0, 3.0]}  # stopped in the third round
    assert ratio(series, "a", "b") == [3.0, 1.5]
    assert ratio(series, "a", "nothing") == []
    assert outside({"loop": [2.0, 4.0], "calls": [1.0, 3.0]}, "loop", "calls") == [0.5, 0.25]


def test_files_are_named_after_device_and_date() -> None:
    assert file_stem("NVIDIA A100-SXM4-80GB", datetime.date(2026, 1, 2)) == "gpu_a100-sxm4-80gb_2026-01-02"


def test_a_page_is_made_of_a_report_in_which_a_part_was_stopped_anywhere() -> None:
    """Facts and series come one by one, so any of them may be missing."""
    job = dict(measured("tensorrt", [2.8], [], []), status="timed out", reason="", seconds=1.0, limit_seconds=1.0, checks={})
    job["facts"] = {**job["facts"], "pair": {"name": "p", "tokens": 4096, "text_tokens": 333}}
    job["series"] = {**job["series"], "calls": {"tensorrt: large 4096": [0.1], "diffusers eager: large": []}}
    content = {
        "jobs": {"shapes.tensorrt": job},
        "device": H100,
        "rehearsal": False,
        "date": "2026-01-02",
        "aims": [],
        "published": [],
    }
    text = "\n".join(markdown(content))
    assert "| tensorrt: large 28 | - | 2.8 (2.8 to 2.8) | 1 |" in text
    assert "loops 50 left out for want of time: x." in text
