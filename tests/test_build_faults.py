"""Builds of engines that do not end well: killed, interrupted, out of disk, on the wrong machine. Nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Finished
from test_build_engines import TARGET, Graph, integrate, transformers
from test_cli import interrupt_when

from hst_trt.builder import worker
from hst_trt.builder.build import build_bundle
from hst_trt.builder.detect import Gpu
from hst_trt.builder.engine import EngineJob, _aim
from hst_trt.builder.tensorrt import EngineProgress
from hst_trt.builder.toolchain import find_toolchain
from hst_trt.builder.worker import build_in_child
from hst_trt.bundle import Bundle
from hst_trt.errors import BuildError, IncompatibleError, IntegrityError, ResourceError
from hst_trt.recipe import load_recipe, load_target

trt = pytest.importorskip("tensorrt_rtx", reason='needs TensorRT-RTX: pip install "hst_trt[rtx]"')

Hst = Callable[..., Finished]
__all__ = ["integrate"]  # a fixture


def manifest(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text())


def rewrite(bundle: Path, **changes: Any) -> None:
    (bundle / "manifest.json").write_text(json.dumps(manifest(bundle) | changes))


@pytest.fixture
def built(tiny_rtx_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle of engines, which a test may change."""
    return Path(shutil.copytree(tiny_rtx_bundle, tmp_path / tiny_rtx_bundle.name))


@pytest.fixture
def waiting(built: Path) -> Path:
    """The same without engines: its graphs wait for them."""
    table = manifest(built)
    files = {name: entry for name, entry in table["files"].items() if not name.startswith("engines/")}
    parts = {name: part for name, part in table["parts"].items() if not name.endswith(".engine")}
    shutil.rmtree(built / "engines")
    rewrite(built, state="graphs", engines={}, files=files, parts=parts)
    return built


def command(recipe: Path, final: Path, *more: object) -> list[object]:
    return ["build", "--gpu", "a100", "--backend", "tensorrt-rtx", "--pair", recipe, "--output", final.parent, *more]


# -- the child process -------------------------------------------------------------------------------------------------------
@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that builds were given to."""
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(worker.subprocess, "Popen", Popen)
    return started


def in_child(job: EngineJob, tmp_path: Path, on_progress: Callable[[str, float], None] = lambda phase, done: None) -> Any:
    return build_in_child(job, tmp_path / "logs" / "engine.log", 3 * 2**30, on_progress)


def test_an_engine_is_built_in_a_child_and_what_tensorrt_says_is_in_the_log(integrate: Graph, tmp_path: Path) -> None:
    engine = in_child(integrate.job(), tmp_path)
    assert (engine.read_back, engine.activation_bytes) == ("network", None)
    assert engine.seconds > 0
    assert integrate.file.with_suffix(".engine").stat().st_size > 10_000
    assert "Engine generation completed" in (tmp_path / "logs" / "engine.log").read_text()


def test_a_failure_in_the_child_is_the_same_error_here_and_names_the_log(integrate: Graph, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no optimization profile has been defined") as caught:
        in_child(integrate.job(profiles=()), tmp_path)
    assert str(tmp_path / "logs" / "engine.log") in (caught.value.fix or "")


def test_a_killed_child_is_reported_as_memory_that_ran_out(tmp_path: Path, children: list[subprocess.Popen[bytes]]) -> None:
    graph = transformers(tmp_path, "sd3", "bfloat16")[1]
    with pytest.raises(ResourceError, match=r"engine small was killed") as caught:
        in_child(graph.job(), tmp_path, lambda phase, done: children[-1].kill())
    assert "by estimate it needs 3.0 GiB" in (caught.value.found or "")
    assert "goes on with this engine" in (caught.value.fix or "")


def test_a_child_that_crashes_is_reported_with_its_signal_and_the_end_of_its_log(
    tmp_path: Path, children: list[subprocess.Popen[bytes]]
) -> None:
    graph = transformers(tmp_path, "sd3", "bfloat16")[1]
    with pytest.raises(BuildError, match="SIGSEGV") as caught:
        in_child(graph.job(), tmp_path, lambda phase, done: children[-1].send_signal(signal.SIGSEGV))
    assert "engine.log" in (caught.value.fix or "")


def test_a_child_that_cannot_start_is_reported_with_its_status(
    integrate: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    with pytest.raises(BuildError, match="ended with exit status 1") as caught:
        in_child(integrate.job(), tmp_path)
    assert caught.value.found == "an empty log"


def test_ctrl_c_ends_the_child_before_it_reaches_us(tmp_path: Path, children: list[subprocess.Popen[bytes]]) -> None:
    graph = transformers(tmp_path, "sd3", "bfloat16")[1]

    def interrupt(phase: str, done: float) -> None:
        if phase != "starting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_child(graph.job(), tmp_path, interrupt)
    assert children[-1].poll() is not None
    assert not graph.file.with_suffix(".engine").exists()


@pytest.mark.slow
def test_a_child_whose_parent_is_gone_ends_by_itself(tmp_path: Path) -> None:
    graph = transformers(tmp_path, "sd3", "bfloat16")[0]
    (tmp_path / "job.json").write_text(graph.job().model_dump_json())
    code = (
        "import sys; from pathlib import Path; from hst_trt.builder import worker\n"
        "job = worker.EngineJob.model_validate_json(Path('job.json').read_bytes())\n"
        "worker.build_in_child(job, Path('x.log'), 0, lambda phase, done: print(phase, flush=True))\n"
    )
    with subprocess.Popen([worker.sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        while parent.stdout.readline().strip() == "starting":
            pass
        (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    deadline = time.monotonic() + 120
    while Path("/proc", child).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path("/proc", child).exists()
    assert not graph.file.with_suffix(".engine").exists()


def test_an_engine_that_cannot_be_written_is_a_full_disk_here_too(integrate: Graph, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        in_child(integrate.job(output="/dev/full"), tmp_path)
    assert caught.value.filename == "/dev/full"


# -- whole builds ------------------------------------------------------------------------------------------------------------
def test_a_full_disk_ends_with_5_and_the_same_command_goes_on(hst: Hst, tiny_recipe: Path, waiting: Path) -> None:
    staging = waiting.with_name(f".{waiting.name}.building")
    (staging / "engines").mkdir(parents=True)
    full = staging / "engines" / "pack.engine"
    full.symlink_to("/dev/full")
    result = hst(*command(tiny_recipe, waiting))
    assert (result.code, result.out) == (5, "")
    assert "full" in result.err
    assert manifest(waiting)["state"] == "graphs"
    assert "advance.engine" in json.loads((staging / "journal.json").read_text()), "the one before it is kept"
    full.unlink()
    assert build_some(tiny_recipe, waiting, stop_after="pack") == ["advance: kept", "pack: built"]


def build_some(recipe: Path, final: Path, stop_after: str) -> list[str]:
    """What a build does with each engine, until one is finished."""
    seen: list[str] = []

    def watch(at: EngineProgress) -> None:
        if at.state != "building":
            seen.append(f"{at.name}: {at.state}")
            if at.name == stop_after:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(load_recipe(str(recipe)), TARGET, final, on_engine=watch)
    return seen


def test_ctrl_c_keeps_every_engine_that_is_finished(tiny_recipe: Path, waiting: Path) -> None:
    words = command(tiny_recipe, waiting)
    code, _ = interrupt_when(r"small [^\n]*(Computing|Timing|Determining)", words, waiting.parent)
    assert code == 130
    assert manifest(waiting)["state"] == "graphs"
    staging = waiting.with_name(f".{waiting.name}.building")
    finished = [name for name in json.loads((staging / "journal.json").read_text()) if name.endswith(".engine")]
    assert len(finished) >= 16
    assert "large.engine" not in finished
    assert not any(str(staging).encode() in line for line in command_lines()), "no builder is left behind"
    kept = [f"{name.removesuffix('.engine')}: kept" for name in finished]
    assert build_some(tiny_recipe, waiting, stop_after=finished[-1].removesuffix(".engine")) == kept


def command_lines() -> list[bytes]:
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes())
        except OSError:  # it has ended meanwhile
            continue
    return lines


def test_only_an_engine_that_would_be_another_is_built_again(hst: Hst, tiny_recipe: Path, built: Path) -> None:
    table = manifest(built)
    stale = table["parts"]["integrate.engine"] | {"inputs": "0"}
    rewrite(built, parts=table["parts"] | {"integrate.engine": stale})
    result = hst(*command(tiny_recipe, built, "--explain"))
    assert result.code == 0, result.err
    assert re_lines(result.err, "built: ") == ["engine integrate: the builder has changed"]
    (kept,) = re_lines(result.err, "not built: ")
    assert "large" in kept
    assert "integrate" not in kept
    after = manifest(built)
    assert after["state"] == "complete"
    assert {k: v for k, v in after["files"].items() if k != "engines/integrate.engine"} == {
        k: v for k, v in table["files"].items() if k != "engines/integrate.engine"
    }
    Bundle.open(built)


def re_lines(text: str, prefix: str) -> list[str]:
    return [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backend_version": "1.6.0.9"}, f"it is of tensorrt-rtx 1.6.0.9, and tensorrt-rtx {trt.__version__} is here"),
        ({"sms": [89]}, "it is for SM89 instead of SM80"),
    ],
)
def test_a_dry_run_says_why_engines_of_another_version_or_gpu_would_be_built_again(
    hst: Hst, tiny_recipe: Path, built: Path, change: dict[str, Any], reason: str
) -> None:
    table = manifest(built)
    stale = {name: part | {"inputs": "0"} if name.endswith(".engine") else part for name, part in table["parts"].items()}
    rewrite(built, target=table["target"] | change, parts=stale)
    before = (built / "manifest.json").read_bytes()
    plan = json.loads(hst(*command(tiny_recipe, built, "--dry-run", "--json")).out)
    assert plan["schema"] == "hst_trt.build_plan/1"
    assert f"engine large: {reason}" in plan["reasons"]
    assert len(plan["reasons"]) == len(plan["engines"]) == len(table["graphs"])
    assert 0 < plan["estimate"]["host_bytes"] < plan["host_free_bytes"]
    assert (built / "manifest.json").read_bytes() == before


def test_another_resolution_asks_for_new_profiles_only_where_they_are_pinned(
    hst: Hst, tiny_recipe: Path, built: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.toml"
    text = tiny_recipe.read_text().replace('"pair"', f'"{tiny_recipe.with_name("pair")}"')
    recipe.write_text("resolutions = [[64, 64], [96, 64]]\n" + text)
    plan = json.loads(hst(*command(recipe, built, "--dry-run", "--json")).out)
    assert {reason.removeprefix("engine ") for reason in plan["reasons"]} == {
        f"{name}: its profiles have changed" for name in ("large", "small", "vae_decoder")
    }


def test_one_changed_byte_of_an_engine_exits_with_6(hst: Hst, built: Path) -> None:
    file = built / "engines" / "large.engine"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    failed(hst("verify", built), 6, "engines/large.engine", "build --force")
    with pytest.raises(IntegrityError, match=r"engines/large\.engine"):
        Bundle.open(built)


def test_an_engine_that_the_manifest_does_not_list_is_refused(hst: Hst, built: Path) -> None:
    files = manifest(built)["files"]
    del files["engines/large.engine"]
    rewrite(built, files=files)
    assert hst("inspect", built).code == 6


def test_inspect_shows_each_engine_with_its_profiles(hst: Hst, built: Path) -> None:
    shown = hst("inspect", built).out
    assert f"tensorrt-rtx {trt.__version__} for SM80" in shown
    assert "large: B 2 M 8 T 32 N 16; B 2 M 16 T 32 N 16; B 1..8 M 1..144 T 32 N 1..144" in shown


# -- the wrong machine -------------------------------------------------------------------------------------------------------
def gpus(monkeypatch: pytest.MonkeyPatch, *sms: int) -> None:
    found = [Gpu(f"NVIDIA SM{sm}", sm, 80_000, "580.1", f"GPU-{sm}") for sm in sms]
    monkeypatch.setattr("hst_trt.builder.toolchain.detect_gpus", lambda: found)


def failed(result: Finished, code: int, *words: str) -> None:
    assert (result.code, result.out) == (code, "")
    for word in words:
        assert word in result.err, result.err


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_tensorrt_rtx_without_the_gpu_has_no_target_for_a_hopper_and_says_so_before_it_exports(
    hst: Hst, tiny_recipe: Path, tmp_path: Path, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch)
    words = ["build", "--gpu", gpu, "--backend", "tensorrt-rtx", "--pair", tiny_recipe, "--output", tmp_path / "out"]
    failed(hst(*words), 3, "no target for SM90", "SM80", f"machine with the {gpu}", "--backend tensorrt")
    assert not (tmp_path / "out").exists()
    plan = hst(*words, "--dry-run")
    assert plan.code == 0
    assert "the engines cannot be built here: TensorRT-RTX has no target for SM90" in plan.out


def test_tensorrt_on_another_gpu_exits_with_3_before_it_exports(
    hst: Hst, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 89)
    words = ["build", "--gpu", "h100", "--pair", tiny_recipe, "--output", tmp_path / "out"]
    failed(hst(*words), 3, "NVIDIA SM89, compute capability 8.9", "--gpu auto")
    assert not (tmp_path / "out").exists()


def test_a_tensorrt_rtx_that_is_too_old_exits_with_3(
    hst: Hst, tiny_recipe: Path, waiting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "__version__", "1.6.2.1")
    failed(hst(*command(tiny_recipe, waiting)), 3, "tensorrt-rtx 1.6.2.1", "TensorScatter", 'pip install "hst_trt[rtx]"')
    assert manifest(waiting)["state"] == "graphs"


def test_without_tensorrt_rtx_the_graphs_wait_and_a_complete_bundle_stays(
    hst: Hst, tiny_recipe: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    before = (built / "manifest.json").read_bytes()
    assert hst(*command(tiny_recipe, built)).code == 0, "nothing that can be seen from here has changed"
    failed(hst(*command(tiny_recipe, built, "--force")), 4, "tensorrt-rtx is not installed", "left as it is")
    assert (built / "manifest.json").read_bytes() == before
    Bundle.open(built)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_where_tensorrt_is_missing_rtx_engines_are_offered_if_they_can_be_built_here(
    hst: Hst, tiny_recipe: Path, waiting: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch)
    final = waiting.with_name("tiny-a100.hstb")
    waiting.rename(final)
    rewrite(final, target=manifest(final)["target"] | {"backend": "tensorrt"})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    if backend == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    result = hst("build", "--gpu", "a100", "--pair", tiny_recipe, "--output", final.parent)
    failed(result, 4, "tensorrt is not installed", str(final))
    assert ("add `--backend tensorrt-rtx`" in result.err) == (backend == "tensorrt-rtx")


@pytest.mark.parametrize(
    ("sms", "precision", "expected"),
    [
        ((), "bfloat16", (80, 86, 89, 120, 121)),
        ((), "float16", (75, 80, 86, 89, 120, 121)),
        ((89,), "bfloat16", (89,)),
        ((90,), "bfloat16", (80, 86, 89, 120, 121)),
        ((90, 120), "bfloat16", (120,)),
    ],
)
def test_the_rtx_target_is_the_card_that_is_here_or_all_that_have_the_precision(
    sms: tuple[int, ...], precision: str, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, *sms)
    assert find_toolchain(load_target("rtx").model_copy(update={"precision": precision})).sms == expected


def test_a_card_without_bfloat16_is_told_to_take_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 75)
    with pytest.raises(IncompatibleError, match=r"bfloat16 needs compute capability 8\.0") as caught:
        find_toolchain(load_target("rtx"))
    assert caught.value.fix == "build with --precision float16"


def test_one_engine_takes_every_compute_capability_of_a_target(integrate: Graph, tmp_path: Path) -> None:
    sizes = []
    for sms in ((80,), (80, 86, 89, 120, 121)):
        in_child(integrate.job(sms=sms), tmp_path)
        sizes.append(integrate.file.with_suffix(".engine").stat().st_size)
    assert sizes[1] < 1.01 * sizes[0]


def test_a_gpu_that_tensorrt_rtx_has_no_name_for_is_built_for_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 90)
    tools = find_toolchain(load_target("h100").model_copy(update={"backend": "tensorrt-rtx"}))
    assert tools.sms == (90,)
    config = trt.Builder(trt.Logger()).create_builder_config()
    _aim(trt, config, tools.sms)
    assert [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)] == [trt.ComputeCapability.CURRENT]
    _aim(trt, config, (80, 89))
    chosen = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert chosen == [trt.ComputeCapability.SM80, trt.ComputeCapability.SM89]


@pytest.mark.parametrize("option", [["--backend", "tensorrt-rtx"], ["--precision", "float16"]])
def test_choices_for_gpus_are_refused_for_the_cpu(hst: Hst, option: list[str]) -> None:
    failed(hst("build", "--gpu", "cpu", *option), 2, option[0], "cpu runs float32 graphs in ONNX Runtime")


def test_a_bundle_is_named_after_what_is_not_the_targets_own(hst: Hst, tiny_recipe: Path) -> None:
    def name(*options: str) -> str:
        words = ["build", "--gpu", "rtx", "--pair", tiny_recipe, "--dry-run", "--json", *options]
        return Path(json.loads(hst(*words).out)["bundle"]).name

    assert name() == "tiny-rtx.hstb"
    assert name("--precision", "float16") == "tiny-rtx-float16.hstb"
    assert name("--backend", "tensorrt", "--precision", "float32") == "tiny-rtx-tensorrt-float32.hstb"


def test_visible_gpus_are_those_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hst_trt.builder.detect import detect_gpus

    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\necho "$@" > "$0.said"\necho "NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65, GPU-1234"\necho "[N/A], x"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert detect_gpus() == [Gpu("NVIDIA H100 80GB HBM3", 90, 81559, "580.65", "GPU-1234")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-1234")
    assert len(detect_gpus()) == 1
    assert "--id=1,GPU-1234" in (tmp_path / "nvidia-smi.said").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_gpus() == []


def test_where_no_bar_is_watched_a_long_build_says_every_half_minute_that_it_lives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hst_trt.cli import build as page

    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(page.time, "monotonic", lambda: clock.now)
    with page._Watch(quiet=False) as watch:
        for second in range(95):
            clock.now = 100.0 + second
            watch.engine(EngineProgress("large", 18, 18, "building", "Timing graph nodes", second / 100))
        watch.engine(EngineProgress("large", 18, 18, "built", done=1.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"engine large (18 of 18): Timing graph nodes, {s} %, {s} s" for s in (30, 60, 90)]
