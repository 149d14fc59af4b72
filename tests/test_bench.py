"""What is measured, what is kept of it in the bundle, and who uses it. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_bundle
import numpy as np
import pytest
from fake_cuda import FakeDevice
from PIL import Image
from test_imports import COMMAND_LINE, EXPORT_ONLY, loaded_by

from hst_trt import backends
from hst_trt.arguments import call_costs
from hst_trt.bench import (
    FULL,
    GLUE_STEP,
    TEXT,
    VAE,
    CallBench,
    RunBench,
    RunDetails,
    Sample,
    bench_calls,
    bench_runs,
    costs_entry,
    memory_used,
)
from hst_trt.builder.build import build_bundle
from hst_trt.builder.detect import Gpu
from hst_trt.builder.graphs import graphs_of
from hst_trt.bundle import Bundle, CostsEntry, Staging, hash_file, save_costs
from hst_trt.cost import CallSeconds, MeasuredCosts, ModelledCosts
from hst_trt.errors import IncompatibleError, IntegrityError, ResourceError
from hst_trt.machine import Machine, cpu, peak_resident_bytes
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule, PlanRequest, StitchPlan, make_plan, token_buckets
from hst_trt.plots import breakdown_figure, latency_figure, save_figure, steps_figure
from hst_trt.recipe import load_recipe, load_target
from hst_trt.tensor_names import LARGE, SMALL
from hst_trt.workspace import RequestShape

Hst = Callable[..., Any]
SIDE, TOKENS, STEPS = 128, 64, 5
SIZE = ("--height", SIDE, "--width", SIDE)
SCHEDULE = ("--num-inference-steps", STEPS, "--stages", "1,3,1", *SIZE)
STAGES = ["large", "hybrid", "hybrid", "hybrid", "small"]
TINY = RequestShape(1, True, 4, 4)  # what the tiny pair draws by default: 64 x 64


# -- one measurement of the demo pair, by the command line ---------------------------------------------------------------
@dataclass(frozen=True)
class Measured:
    """What a command printed, the bundle it wrote into, and the figures."""

    result: dict[str, Any]
    bundle: Path
    plots: Path
    err: str


@pytest.fixture(scope="module")
def measured(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("measured")
    bundle, plots = folder / "demo.hstb", folder / "plots"
    shutil.copytree(demo_bundle, bundle)
    where = ["--bundle", bundle, "--plots", plots, "--save-costs", "--json"]
    options = ["--rounds", 3, "--run-rounds", 2, "--threads", 1, *SCHEDULE]
    code = "from hst_trt.cli.main import main; main()"
    command = [sys.executable, "-c", code, "bench", *map(str, where + options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    return Measured(json.loads(done.stdout), bundle, plots, done.stderr)


def test_the_json_object_has_every_key_and_nothing_else(measured: Measured) -> None:
    result = measured.result
    sample = {"median", "q25", "q75", "rounds"}
    assert list(result) == [
        "schema", "bundle", "machine", "threads", "num_tokens", "calls", "large_fit", "runs", "memory", "costs",
    ]  # fmt: skip
    assert result["schema"] == "hst_trt.bench/1"
    assert (result["num_tokens"], result["threads"]) == (TOKENS, 1)
    masked = [f"large {count} tokens" for count in token_buckets(TOKENS)[:-1]]
    assert list(result["calls"]) == [FULL, *masked, SMALL, TEXT, VAE, GLUE_STEP]
    for name, call in result["calls"].items():
        modelled = {"cost_model", "over_model"} if name in (FULL, SMALL, *masked) else set()
        assert set(call) == {"seconds", "of_full"} | modelled
        assert set(call["seconds"]) == set(call["of_full"]) == sample
        assert call["seconds"]["rounds"] == 3
        assert 0 < call["seconds"]["q25"] <= call["seconds"]["median"] <= call["seconds"]["q75"]
    assert result["calls"][FULL]["of_full"] == {"median": 1.0, "q25": 1.0, "q75": 1.0, "rounds": 3}
    assert set(result["large_fit"]) == {"at_zero", "each", "r2"}
    assert set(result["memory"]) == {"peak_resident_bytes", "gpu_used_bytes"}
    assert result["memory"]["gpu_used_bytes"] is None
    assert result["memory"]["peak_resident_bytes"] > sum(f.stat().st_size for f in measured.bundle.rglob("*.safetensors"))
    assert list(result["runs"]) == ["large", "small", "hybrid"]
    for run in result["runs"].values():
        assert set(run) == {
            "loop_seconds", "total_seconds", "loop_speedup", "total_speedup", "predicted_speedup", "of_predicted", "overhead",
            "cpu_seconds", "cpu_over_wall", "breakdown", "steps",
        }  # fmt: skip
        assert list(run["breakdown"]) == ["text", "large", "small", "glue", "VAE", "other"]
        assert run["total_seconds"]["rounds"] == run["cpu_seconds"]["rounds"] == 2
        assert len(run["steps"]) == STEPS
        assert all(set(step) == {"stage", "large_tokens", "small", "seconds"} for step in run["steps"])


def test_each_schedule_is_taken_apart_into_what_its_steps_did(measured: Measured) -> None:
    runs = measured.result["runs"]
    by_name = {name: [(s["stage"], s["large_tokens"], s["small"]) for s in run["steps"]] for name, run in runs.items()}
    assert by_name["large"] == [("large", TOKENS, False)] * STEPS
    assert by_name["small"] == [("small", 0, True)] * STEPS
    assert [stage for stage, _, _ in by_name["hybrid"]] == STAGES
    assert [tokens for _, tokens, _ in by_name["hybrid"]] == [TOKENS, 24, 24, 24, 0]
    assert runs["large"]["breakdown"]["small"]["median"] == runs["small"]["breakdown"]["large"]["median"] == 0
    assert min(runs["hybrid"]["breakdown"][part]["median"] for part in ("text", "large", "small", "glue", "VAE")) > 0


def test_the_saved_costs_are_the_medians_that_were_printed(measured: Measured) -> None:
    (entry,) = Bundle.open(measured.bundle).manifest.costs
    assert json.loads(entry.model_dump_json()) == measured.result["costs"]
    printed = {name: call["seconds"]["median"] for name, call in measured.result["calls"].items()}
    large = {count: printed[FULL if count == TOKENS else f"large {count} tokens"] for count in token_buckets(TOKENS)}
    assert entry.large_seconds == pytest.approx(large, abs=5.1e-7)
    saved = (entry.small_seconds, entry.text_seconds, entry.vae_seconds, entry.step_seconds)
    assert saved == pytest.approx([printed[name] for name in (SMALL, TEXT, VAE, GLUE_STEP)], abs=5.1e-7)
    assert entry.key == (cpu().name, 1, 1, True, SIDE, SIDE)
    assert measured.result["machine"] == entry.machine


def test_saving_costs_touches_the_manifest_only_and_the_bundle_verifies(
    measured: Measured, demo_bundle: Path, hst: Hst
) -> None:
    assert hst("verify", measured.bundle).code == 0
    before, after = (Bundle.open(path).manifest for path in (demo_bundle, measured.bundle))
    assert before.costs == ()
    assert after.model_copy(update={"costs": ()}) == before, "the fingerprint and all other fields"
    files = lambda folder: {f.relative_to(folder): hash_file(f) for f in folder.rglob("*") if f.is_file()}
    changed = {name for name, digest in files(measured.bundle).items() if files(demo_bundle).get(name) != digest}
    assert changed == {Path("manifest.json")}
    assert files(measured.bundle).keys() == files(demo_bundle).keys()


def test_a_plan_is_costed_with_what_was_saved(measured: Measured, hst: Hst) -> None:
    done = hst("plan", "--bundle", measured.bundle, "--threads", 1, *SCHEDULE, "--json")
    plan, costs = json.loads(done.out), measured.result["costs"]
    large = {int(count): seconds / costs["large_seconds"][str(TOKENS)] for count, seconds in costs["large_seconds"].items()}
    small = costs["small_seconds"] / costs["large_seconds"][str(TOKENS)]
    assert plan["cost_source"] == f"measured on {cpu().name}, {costs['date']}"
    glue = costs["step_seconds"] / costs["large_seconds"][str(TOKENS)]
    stitched = [1 + small + glue, *[large[24] + small + glue] * 3, small]
    assert [step["cost"] for step in plan["steps"]] == pytest.approx(stitched, abs=1e-4), (
        "the last large step also needs the small model, which draws the first mask with it; small steps have no mask"
    )
    assert plan["cost"] == pytest.approx(sum(step["cost"] for step in plan["steps"]), abs=1e-3)
    loop = costs["large_seconds"][str(TOKENS)] * (1 + 3 * large[24] + 5 * small) + 4 * costs["step_seconds"]
    assert plan["seconds"] == pytest.approx(costs["text_seconds"] + loop + costs["vae_seconds"], abs=1e-4)
    assert done.err == ""


def test_a_run_is_reported_with_what_was_saved_and_one_of_another_shape_with_the_cost_model(measured: Measured) -> None:
    pipeline = HybridStitchPipeline.from_bundle(measured.bundle, threads=1)
    draw = lambda **change: pipeline("a red apple", seed=1, num_inference_steps=2, height=SIDE, width=SIDE, **change).stats
    assert draw().to_dict()["cost_source"].startswith("measured on ")
    for change in ({"guidance_scale": 1.0}, {"num_images_per_prompt": 2}):
        assert draw(**change).to_dict()["cost_source"].startswith("cost model"), change
    with_two = HybridStitchPipeline.from_bundle(measured.bundle, threads=2)
    assert with_two.costs(RequestShape(1, True, 8, 8)).source.startswith("cost model")


def test_the_figures_show_every_stage_and_every_part(measured: Measured) -> None:
    dark, middling, light, pale = (11, 60, 93), (213, 112, 58), (156, 205, 232), (242, 222, 155)
    for name, colours in {
        "latency": {dark, middling},
        "steps": {dark, middling, light},
        "breakdown": {dark, light, pale},
    }.items():
        assert f"wrote {measured.plots / name}.png" in measured.err
        with Image.open(measured.plots / f"{name}.png") as image:
            assert min(image.size) > 400
            found = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
        assert colours <= found, name


# -- what is timed -------------------------------------------------------------------------------------------------------
class Clockwork:
    """A backend on which an engine takes as many seconds as `costs` says, one if it is not in there, and nothing else any."""

    def __init__(self, backend: Any, costs: Mapping[str, float]) -> None:
        self._backend, self._costs, self.now = backend, costs, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def mark(self) -> float:
        return self.now

    def elapsed(self, start: float, end: float) -> float:
        return end - start

    def engine(self, name: str) -> Any:
        engine, clock = self._backend.engine(name), self

        class Engine:
            def __getattr__(self, attribute: str) -> Any:
                return getattr(engine, attribute)

            def prepare(self, bindings: Any) -> Any:
                call = engine.prepare(bindings)

                class Call:
                    def execute(self) -> None:
                        call.execute()
                        clock.now += clock._costs.get(name, 1.0)

                return Call()

        return Engine()


def test_calls_are_seconds_inside_their_engines_and_the_glue_is_the_rest_of_a_masked_step(tiny_bundle: Path) -> None:
    opened = HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)
    pipeline = HybridStitchPipeline(opened.bundle, Clockwork(opened.backend, {LARGE: 1000.0, SMALL: 500.0}))  # type: ignore[arg-type]
    arguments: list[dict[str, Any]] = [{}, {"schedule": "large"}, {"mask": MaskRule(1.0)}, {"mask": MaskRule(threshold=2.0)}]
    for change in arguments:  # whatever the plan does, what is measured is the same
        calls = bench_calls(pipeline, pipeline.plan(**change), TINY, rounds=2, warmup=0)
        assert calls.tokens == token_buckets(16)
        assert {sample.values for sample in calls.large_seconds().values()} == {(1000.0, 1000.0)}
        assert calls.seconds[SMALL].values == (500.0, 500.0)
        # advance, pack, guide of both models, blend, score, select, integrate
        assert calls.seconds[GLUE_STEP].values == (8.0, 8.0)
        assert calls.costs().seconds == CallSeconds(1000.0, 8.0, calls.seconds[TEXT].median, calls.seconds[VAE].median)


def test_calls_are_set_beside_the_cost_model_even_where_costs_are_saved(bundle_copy: Path) -> None:
    large = dict.fromkeys(token_buckets(16, Bundle.open(bundle_copy).manifest.bucket_ratios), 1.0)
    save_costs(Bundle.open(bundle_copy), entry(large_seconds=large, threads=1))
    pipeline = HybridStitchPipeline.from_bundle(bundle_copy, threads=1)
    assert pipeline.costs(TINY).large(8) == 1.0
    calls = bench_calls(pipeline, pipeline.plan(), TINY, rounds=1, warmup=0)
    assert calls.to_dict()["calls"]["large 8 tokens"]["cost_model"] < 1


def test_the_parts_of_a_run_add_up_to_it_for_any_number_of_schedules(tiny_bundle: Path) -> None:
    pipeline = HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)
    names = ("large", "small", "srdiffusion", "hybrid", "ras")
    plans = {name: {"schedule": name, "num_inference_steps": 4} for name in names}
    costs = MeasuredCosts({count: count / 16 for count in token_buckets(16)}, 0.5)
    runs = bench_runs(pipeline, plans, costs, rounds=2, warmup=1)
    assert list(runs.details) == list(names)
    for name, details in runs.details.items():
        for i, wall in enumerate(runs.total[name].values):
            assert sum(sample.values[i] for sample in details.parts.values()) == pytest.approx(wall)
            steps, loop = sum(step.seconds.values[i] for step in details.steps), runs.loop[name].values[i]
            assert 0 < steps <= loop <= wall
            assert details.cpu.values[i] > 0
        assert runs.predicted[name] == pytest.approx(4 / pipeline.plan(**plans[name]).cost(costs))
    rows = runs.to_dict()["runs"]
    assert rows["small"]["cpu_over_wall"] == runs.details["small"].cpu.over(runs.total["small"]).to_dict(4)


def test_a_busy_machine_is_said_to_be_busy(tiny_bundle: Path, hst: Hst, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = lambda *values: Sample(tuple(values))
    idle = RunDetails(seconds(1.0, 1.0), {}, ())
    runs = RunBench({}, {"large": seconds(4.0, 4.0), "small": seconds(1.0, 1.0)}, None, {}, {"large": idle, "small": idle})
    assert runs.cpu_share() == 0.4
    for share in (0.4, 1.7):
        monkeypatch.setattr(RunBench, "cpu_share", lambda runs, share=share: share)
        done = hst("bench", "--bundle", tiny_bundle, "--rounds", 3, "--run-rounds", 1)
        assert ("busy" in done.err, done.code) == (share < 1, 0)


def test_memory_is_the_peak_of_this_process_and_not_of_what_is_there_now() -> None:
    block = np.ones(2**24)  # 128 MiB
    during = peak_resident_bytes()
    assert during > block.nbytes
    del block
    assert peak_resident_bytes() > during - 2**24, "the kernel counts in batches of pages"


def test_on_a_gpu_its_memory_is_told_and_the_loop_stays_in_one_piece(engine_bundle: Path) -> None:
    device = FakeDevice()
    pipeline = fake_bundle.pipeline(engine_bundle, device)
    calls = bench_calls(pipeline, pipeline.plan(), TINY, rounds=1, warmup=0)
    entry = costs_entry(pipeline, TINY, calls)
    assert (entry.machine, entry.threads, entry.backend_version) == ("Fake GPU", 0, fake_bundle.VERSION)
    free, total = device.memory()
    assert memory_used(pipeline).gpu_used_bytes == total - free > 0
    runs = bench_runs(pipeline, {"large": {"schedule": "large", "num_inference_steps": 2}}, calls.costs(), rounds=1)
    assert runs.overhead is None
    assert list(runs.details["large"].parts) == ["text", "loop", "VAE", "other"]


def test_a_straight_line_is_fitted_through_three_buckets_or_more() -> None:
    def bench(tokens: tuple[int, ...], seconds: Callable[[int], float]) -> CallBench:
        names = {count: FULL if count == tokens[-1] else f"large {count} tokens" for count in tokens}
        return CallBench(
            tokens[-1], tokens, {names[count]: Sample((seconds(count),)) for count in tokens}, MeasuredCosts({}, 1)
        )

    exact = bench((8, 16, 32), lambda count: 2.0 + 0.5 * count).fit()
    assert exact is not None
    assert dataclasses.astuple(exact) == pytest.approx((2.0, 0.5, 1.0))
    bent = bench((8, 16, 32, 64), lambda count: float(count**2)).fit()
    assert bent is not None
    assert 0.8 < bent.r2 < 0.99
    assert bench((8, 16), lambda count: 1.0 * count).fit() is None


def test_measuring_loads_neither_torch_nor_matplotlib(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ["--bundle", tiny_bundle, "--rounds", 3, "--run-rounds", 0]
    loaded = loaded_by(COMMAND_LINE, tmp_path, "bench", *options)
    assert "onnxruntime" in loaded
    assert not loaded & (EXPORT_ONLY | {"matplotlib"})


# -- costs in a bundle ---------------------------------------------------------------------------------------------------
def entry(**changes: Any) -> CostsEntry:
    """Costs of the tiny pair's default request on this machine."""
    values: dict[str, Any] = {"machine": cpu().name, "threads": 0, "images": 1, "guided": True, "height": 64, "width": 64}
    values |= {"backend_version": "1.32.0", "date": "2026-11-23", "large_seconds": {8: 0.25, 16: 0.5}, "small_seconds": 0.125}
    return CostsEntry(**values | {"text_seconds": 0.1, "vae_seconds": 0.3, "step_seconds": 0.01} | changes)


def manifest_bytes(bundle: Path) -> bytes:
    return (bundle / "manifest.json").read_bytes()


def rewrite(bundle: Path, **fields: Any) -> None:
    content = json.loads(manifest_bytes(bundle)) | fields
    (bundle / "manifest.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_new_costs_replace_those_of_the_same_machine_threads_and_request(bundle_copy: Path) -> None:
    first = entry()
    others = [
        entry(**change)
        for change in (
            {"machine": "another"}, {"threads": 1}, {"images": 2}, {"guided": False}, {"height": 128}, {"width": 128},
        )
    ]  # fmt: skip
    bundle = Bundle.open(bundle_copy)
    for costs in (first, *others):
        save_costs(bundle, costs)  # each time opened before the last: what others saved is not lost
    assert Bundle.open(bundle_copy).manifest.costs == (first, *others)
    again = entry(small_seconds=0.2, date="2026-11-24", backend_version="1.33.0")
    (bundle_copy / "manifest.json").chmod(0o640)
    saved = save_costs(bundle, again)
    assert (bundle_copy / "manifest.json").stat().st_mode & 0o777 == 0o640, "who may read it stays"
    assert saved.manifest.costs == (*others, again)
    assert Bundle.open(bundle_copy).manifest == saved.manifest


def test_costs_count_for_the_machine_threads_request_and_buckets_they_were_measured_with(bundle_copy: Path) -> None:
    here, buckets = cpu(), token_buckets(16, Bundle.open(bundle_copy).manifest.bucket_ratios)
    full = {"large_seconds": {count: count / 32 for count in buckets}}
    bundle = save_costs(Bundle.open(bundle_copy), entry(**full))
    costs = call_costs(bundle, TINY, here)
    assert isinstance(costs, MeasuredCosts)
    assert costs.source == f"measured on {here.name}, 2026-11-23"
    assert ([costs.large(count) for count in buckets], costs.small()) == ([count / 16 for count in buckets], 0.25)
    assert costs.glue() == 0.02
    assert costs.seconds == CallSeconds(full=0.5, step=0.01, text=0.1, vae=0.3)
    for shape, machine in (
        (TINY, Machine("another processor")),
        (TINY, Machine(here.name, threads=1)),
        (TINY, None),
        (RequestShape(2, True, 4, 4), here),
        (RequestShape(1, False, 4, 4), here),
        (RequestShape(1, True, 4, 8), here),
        (RequestShape(1, True, 8, 4), here),
    ):
        other = call_costs(bundle, shape, machine)
        assert isinstance(other, ModelledCosts), (shape, machine)
        assert (other.num_tokens, other.rows) == (shape.tokens, shape.rows)
    lacking = save_costs(bundle, entry(large_seconds={16: 0.5}))
    assert isinstance(call_costs(lacking, TINY, here), ModelledCosts), "a bucket that was not measured"


def test_the_seconds_of_a_plan_are_text_every_call_the_glue_of_steps_with_a_mask_and_the_vae() -> None:
    costs = MeasuredCosts({8: 0.25, 16: 1.0}, 0.5, seconds=CallSeconds(full=2.0, step=0.125, text=3.0, vae=7.0))
    request = PlanRequest("hybrid", 6, 16, (8, 16), stages=(2, 3, 1), mask=MaskRule(0.5), refresh_every=0)
    calls, glue = 2 * 1.0 + 3 * 0.25 + 5 * 0.5, 4 * 0.125  # the second large step draws the first mask
    assert make_plan(request).cost(costs) == calls + glue / 2.0
    assert make_plan(request).cost(dataclasses.replace(costs, seconds=None)) == calls
    assert make_plan(request).latency(costs) == 3.0 + 2.0 * calls + glue + 7.0
    empty = StitchPlan((), 16)
    assert empty.latency(costs) == 10.0


def test_a_plan_says_in_one_line_that_other_costs_are_not_used_and_the_command_it_names_mends_that(
    bundle_copy: Path, tmp_path: Path, hst: Hst
) -> None:
    bundle = bundle_copy.rename(tmp_path / "with a space.hstb")
    ask = ("plan", "--bundle", bundle, "--height", 80, "--width", 64, "--json")
    assert hst(*ask).err == "", "nothing was measured anywhere"
    save_costs(Bundle.open(bundle), entry(machine="AMD Phenom, 4 CPUs", threads=3))
    done = hst(*ask)
    (line,) = done.err.splitlines()
    assert "1 guided image of 64x64 on AMD Phenom, 4 CPUs, 3 threads" in line
    assert json.loads(done.out)["cost_source"].startswith("cost model")
    assert json.loads(done.out)["seconds"] is None
    command = shlex.split(line.partition("here: hst-trt ")[2])
    assert hst(*command, "--rounds", 3, "--run-rounds", 0).code == 0
    done = hst(*ask)
    assert (done.err, json.loads(done.out)["cost_source"].split(",")[0]) == ("", f"measured on {cpu().name.split(',')[0]}")
    assert len(Bundle.open(bundle).manifest.costs) == 2


def test_the_machine_of_a_bundle_is_its_gpu_or_the_cpu(
    bundle_copy: Path, engine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu, engines = Bundle.open(bundle_copy).manifest, Bundle.open(engine_bundle, check_hashes=False).manifest
    assert backends.machine_here(on_cpu, threads=3) == Machine(cpu().name, 3)
    assert f"{os.cpu_count()} CPUs" in cpu().name
    gpus = [Gpu(name, 90, 80_000, "600.1", "GPU-0") for name in ("NVIDIA H100", "NVIDIA H200")]
    for found, expected in ((gpus, Machine("NVIDIA H200")), ([], None)):
        monkeypatch.setattr("hst_trt.builder.detect.detect_gpus", lambda found=found: found)
        assert backends.machine_here(engines, device=1, threads=3) == expected


def test_a_manifest_without_costs_opens_and_one_with_impossible_costs_is_refused(bundle_copy: Path) -> None:
    rewrite(bundle_copy, costs=None)
    assert b'"costs"' not in manifest_bytes(bundle_copy)
    assert Bundle.open(bundle_copy).manifest.costs == ()
    good = json.loads(entry().model_dump_json())
    rewrite(bundle_copy, costs=[good])
    assert Bundle.open(bundle_copy).manifest.costs == (entry(),)
    for change in ({"small_seconds": 0}, {"large_seconds": {}}, {"large_seconds": {"0": 1.0}}, {"images": 0}, {"more": 1}):
        rewrite(bundle_copy, costs=[good | change])
        with pytest.raises(IntegrityError, match="not a valid manifest"):
            Bundle.open(bundle_copy)


def test_a_build_with_nothing_to_do_keeps_costs_and_what_is_made_anew_has_none(bundle_copy: Path, tiny_recipe: Path) -> None:
    saved = save_costs(Bundle.open(bundle_copy), entry())
    kept = build_bundle(load_recipe(str(tiny_recipe)), load_target("cpu"), bundle_copy)
    assert (kept.made, kept.bundle.manifest.costs) == (False, (entry(),))
    assert graphs_of(saved.manifest).costs == (), "new engines are built from these"


# -- bundles that cannot be written --------------------------------------------------------------------------------------
@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that nobody can write, whoever this is."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], capture_output=True, check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def bench_and_save(hst: Hst, bundle: Path) -> Any:
    return hst("bench", "--bundle", bundle, "--rounds", 3, "--run-rounds", 0, "--save-costs", "--json")


def assert_refused_but_printed(hst: Hst, bundle: Path, code: int, *words: str) -> None:
    """The command ends with `code`, all it measured is on stdout, and the bundle is as it was."""
    before = manifest_bytes(bundle)
    done = bench_and_save(hst, bundle)
    assert done.code == code, done.err
    assert json.loads(done.out)["costs"]["height"] == 64
    for word in words:
        assert word in done.err
    assert manifest_bytes(bundle) == before
    assert hst("verify", bundle).code == 0


@pytest.mark.parametrize("where", ["the bundle", "around it"])
def test_costs_of_a_bundle_that_cannot_be_written_are_printed_and_exit_with_2(where: str, bundle_copy: Path, hst: Hst) -> None:
    folder = bundle_copy if where == "the bundle" else bundle_copy.parent
    with read_only(folder):
        assert_refused_but_printed(hst, bundle_copy, 2, f"the folder {folder} cannot be written", "copy the bundle")
    assert bench_and_save(hst, bundle_copy).code == 0
    assert len(Bundle.open(bundle_copy).manifest.costs) == 1


def test_costs_that_meet_a_full_disk_are_printed_and_exit_with_5(bundle_copy: Path, hst: Hst) -> None:
    part = bundle_copy / ".manifest.json.part"
    part.symlink_to("/dev/full")  # every write to it fails as on a full disk
    assert_refused_but_printed(hst, bundle_copy, 5, "full", "measure again")
    assert not part.is_symlink(), "nothing half-written stays in the bundle"
    assert bench_and_save(hst, bundle_copy).code == 0


def test_costs_of_a_bundle_that_is_being_built_are_printed_and_exit_with_5(bundle_copy: Path, hst: Hst) -> None:
    with Staging.open(bundle_copy):
        assert_refused_but_printed(hst, bundle_copy, 5, "another build", "wait for it")
        with pytest.raises(ResourceError):
            save_costs(Bundle.open(bundle_copy), entry())
    assert bench_and_save(hst, bundle_copy).code == 0


def test_costs_of_what_was_built_anew_meanwhile_are_not_saved(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    rewrite(bundle_copy, fingerprint="f" * 64)
    before = manifest_bytes(bundle_copy)
    with pytest.raises(IncompatibleError, match="built anew") as caught:
        save_costs(bundle, entry())
    assert caught.value.exit_code == 3
    assert manifest_bytes(bundle_copy) == before


# -- figures -------------------------------------------------------------------------------------------------------------
def test_without_matplotlib_figures_exit_with_4_before_anything_is_measured(
    tiny_bundle: Path, tmp_path: Path, hst: Hst, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = hst("bench", "--bundle", tiny_bundle, "--plots", tmp_path / "plots")
    assert (done.code, done.out) == (4, "")
    assert "pip install matplotlib" in done.err


def test_a_folder_for_figures_that_cannot_be_made_exits_with_2_before_anything_is_measured(
    tiny_bundle: Path, tmp_path: Path, hst: Hst
) -> None:
    (tmp_path / "file").write_text("")
    done = hst("bench", "--bundle", tiny_bundle, "--plots", tmp_path / "file" / "plots")
    assert (done.code, done.out) == (2, "")
    assert str(tmp_path / "file" / "plots") in done.err


def test_figures_say_what_their_axes_are_and_are_the_same_file_each_time(tmp_path: Path) -> None:
    around = lambda middle: (0.9 * middle, middle, 1.2 * middle)

    def draw(folder: Path) -> dict[str, str]:
        folder.mkdir()
        figures = {
            "latency": latency_figure(
                (8, 16, 32), [around(s) for s in (0.1, 0.2, 0.4)], (0.1, 0.2, 0.4), 0.3, (0, 0.0125, 0.99)
            ),
            "steps": steps_figure(STAGES, [around(12.0)] * 5, "Each step"),
            "breakdown": breakdown_figure({"hybrid": {"text": 0.01, "loop": 2.0, "VAE": 0.5, "other": 0.0}}),
        }
        made = {name: save_figure(figure, folder / f"{name}.svg") for name, figure in figures.items()}
        labels = {name: (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) for name, figure in figures.items()}
        assert labels == {
            "latency": ("image tokens that the large model computes", "milliseconds"),
            "steps": ("step", "seconds"),
            "breakdown": ("milliseconds", ""),
        }
        legends = {
            name: [
                text.get_text() for legend in (*figure.legends, figure.axes[0].get_legend()) if legend for text in legend.texts
            ]
            for name, figure in figures.items()
        }
        assert legends["latency"] == ["measured, with quartiles", "cost model", "straight line, R² = 0.9900", "a small call"]
        assert legends["steps"] == ["large stage", "hybrid stage", "small stage"]
        assert legends["breakdown"] == ["text", "loop", "VAE"], "what takes no time is not shown"
        return {name: path.read_text() for name, path in made.items()}

    assert draw(tmp_path / "first") == draw(tmp_path / "second")
