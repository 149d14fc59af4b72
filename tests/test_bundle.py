"""Bundles under attack: damage is found before anything is loaded, and no crash, full disk or rival build loses a bundle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import Finished

import hst_trt.bundle.staging
from hst_trt.backends import runs_here
from hst_trt.builder.build import build_bundle, export_bundle
from hst_trt.builder.detect import Gpu
from hst_trt.bundle import Bundle, Staging, hash_file, newest_bundle
from hst_trt.errors import HstError, IncompatibleError, IntegrityError, MissingError, ResourceError
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.recipe import load_recipe, load_target

Hst = Callable[..., Finished]

ONE_OF_EACH_KIND = [
    "graphs/large/model.onnx",
    "graphs/glue/integrate.onnx",
    "graphs/small/diffusion_pytorch_model.safetensors",
    "tokenizers/tokenizer_2.json",
    "scheduler.json",
]


def flip_one_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def manifest(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text())


def rewrite(bundle: Path, **changes: Any) -> None:
    (bundle / "manifest.json").write_text(json.dumps(manifest(bundle) | changes))


def draw(bundle: Path) -> np.ndarray:
    return HybridStitchPipeline.from_bundle(bundle)("a red apple", seed=3, output_type="np").images


def refused(error: type[HstError], bundle: Path) -> str:
    """What opening the bundle says when it is refused."""
    with pytest.raises(error) as caught:
        Bundle.open(bundle)
    assert caught.value.fix, "an error has to say what to do"
    return str(caught.value)


# -- damage -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_one_changed_byte_is_refused_by_every_reader_before_anything_is_loaded(
    bundle_copy: Path, hst: Hst, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_allowed(*_: object, **__: object) -> None:
        pytest.fail("something of a damaged bundle was loaded")

    monkeypatch.setattr(onnxruntime, "InferenceSession", not_allowed)
    monkeypatch.setattr("hst_trt.tokenizer.Tokenizer", not_allowed)
    flip_one_byte(bundle_copy / name)

    message = refused(IntegrityError, bundle_copy)
    assert name in message
    assert "build --force" in message
    with pytest.raises(IntegrityError, match=name):
        HybridStitchPipeline.from_bundle(bundle_copy)
    for command in (
        ["verify", bundle_copy],
        ["verify", bundle_copy, "--json"],
        ["run", "--bundle", bundle_copy, "--prompt", "x"],
    ):
        result = hst(*command)
        assert (result.code, result.out) == (6, "")
        assert name in result.err
        assert "to do: run `hst-trt build --force` again" in result.err
    assert not list(Path("outputs").glob("*"))


def test_inspecting_reads_the_manifest_only_so_it_shows_a_damaged_bundle(bundle_copy: Path, hst: Hst) -> None:
    flip_one_byte(bundle_copy / "scheduler.json")
    assert hst("inspect", bundle_copy).code == 0


@pytest.mark.parametrize("change", ["longer", "shorter", "gone", "a folder"])
def test_a_file_of_another_size_or_kind_is_refused(bundle_copy: Path, hst: Hst, change: str) -> None:
    file = bundle_copy / "graphs" / "large" / "model.onnx"
    content = file.read_bytes()
    file.unlink()
    if change == "a folder":
        file.mkdir()
    elif change != "gone":
        file.write_bytes(content + b"\0" if change == "longer" else content[:-1])
    message = refused(IntegrityError, bundle_copy)
    assert "graphs/large/model.onnx" in message
    assert "build --force" in message
    assert hst("verify", bundle_copy).code == 6


@pytest.mark.parametrize(
    "content",
    [None, b"", b'{"schema_version": 1, "na', b"[1, 2]", b"7", b"null", b"{}", b"\xff\xfe\x00", b"[" * 200_000],
    ids=["no-manifest", "empty", "truncated", "list", "number", "null", "empty-object", "not-utf8", "nested-too-deep"],
)
def test_a_half_written_bundle_is_refused(bundle_copy: Path, hst: Hst, content: bytes | None) -> None:
    file = bundle_copy / "manifest.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    message = refused(IntegrityError, bundle_copy)
    assert "manifest" in message
    assert "hst-trt build" in message
    assert hst("run", "--bundle", bundle_copy, "--prompt", "x").code == 6


@pytest.mark.parametrize("command", ["inspect", "verify", "plan", "run"])
def test_a_missing_bundle_exits_with_4_and_the_command_that_makes_one(hst: Hst, command: str, tmp_path: Path) -> None:
    where = ["--bundle"] if command in ("plan", "run") else []
    result = hst(command, *where, tmp_path / "no-such.hstb", *(["--prompt", "x"] if command == "run" else []))
    assert (result.code, result.out) == (4, "")
    assert "no-such.hstb" in result.err
    assert "hst-trt build" in result.err


def test_a_bundle_of_a_newer_schema_exits_with_3_and_says_to_upgrade(bundle_copy: Path, hst: Hst) -> None:
    rewrite(bundle_copy, schema_version=hst_trt.bundle.SCHEMA_VERSION + 1, something_new={"of": "then"})
    message = refused(IncompatibleError, bundle_copy)
    assert "newer" in message
    assert "upgrade" in message
    for command in (["verify", bundle_copy], ["inspect", bundle_copy], ["run", "--bundle", bundle_copy, "--prompt", "x"]):
        assert hst(*command).code == 3


@pytest.mark.parametrize("version", ["1", "2", 1.0, 2.5, True, 0, -1, None, [1]])
def test_a_schema_version_that_is_no_version_is_refused(bundle_copy: Path, version: object) -> None:
    rewrite(bundle_copy, schema_version=version)
    assert "schema_version" in refused(IntegrityError, bundle_copy)


# -- paths ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "graphs/../../secret",
        "/etc/passwd",
        "..",
        "",
        ".",
        "graphs\\..\\secret",
        "scheduler.json\0",
        "//etc/passwd",
    ],
)
def test_a_path_outside_the_bundle_is_refused(bundle_copy: Path, hst: Hst, name: str) -> None:
    secret = bundle_copy.parent / "secret"
    secret.write_text("{}")
    table = manifest(bundle_copy)
    entry = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    rewrite(bundle_copy, files=table["files"] | {name: entry}, scheduler=name)
    refused(IntegrityError, bundle_copy)
    with pytest.raises(IntegrityError):  # also where hashes are left out
        Bundle.open(bundle_copy, check_hashes=False)
    assert hst("verify", bundle_copy).code == 6
    assert hst("plan", "--bundle", bundle_copy).code == 6


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_that_leads_outside_the_bundle_is_refused_even_to_the_right_bytes(
    bundle_copy: Path, tmp_path: Path, link: str
) -> None:
    inside = bundle_copy / "tokenizers" / ("tokenizer.json" if link == "file" else "")
    outside = tmp_path / "elsewhere"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert "outside" in refused(IntegrityError, bundle_copy)


@pytest.mark.parametrize("reference", ["scheduler", "tokenizer", "graph", "weights"])
def test_a_file_that_is_used_but_not_listed_is_refused(bundle_copy: Path, reference: str) -> None:
    table = manifest(bundle_copy)
    name = {
        "scheduler": "scheduler.json",
        "tokenizer": "tokenizers/tokenizer.json",
        "graph": "graphs/large/model.onnx",
        "weights": "graphs/large/diffusion_pytorch_model.safetensors",
    }[reference]
    del table["files"][name]
    rewrite(bundle_copy, files=table["files"])
    assert name in refused(IntegrityError, bundle_copy)


@pytest.mark.parametrize(
    "change",
    [
        {"models": {}},
        {"tokenizers": []},
        {"files": []},
        {"limits": {"max_side": -1, "max_images": 4}},
        {"state": "nearly"},
        {"unknown": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_that_says_impossible_things_is_refused(bundle_copy: Path, change: dict[str, Any]) -> None:
    rewrite(bundle_copy, **change)
    refused(IntegrityError, bundle_copy)


def test_a_manifest_whose_models_lack_a_number_is_refused(bundle_copy: Path, hst: Hst) -> None:
    table = manifest(bundle_copy)
    del table["models"]["large"]["config"]["num_layers"]
    rewrite(bundle_copy, models=table["models"])
    assert "num_layers" in refused(IntegrityError, bundle_copy)
    assert hst("plan", "--bundle", bundle_copy).code == 6


# -- builds that do not end -----------------------------------------------------------------------------------------------
class Stop:
    """Interrupts an export before it makes its n-th part, and remembers what was made and what was taken over."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.parts: dict[str, bool] = {}

    def __call__(self, name: str, made: bool) -> None:
        if len(self.parts) == self.at:
            raise KeyboardInterrupt
        self.parts[name] = made

    @property
    def made(self) -> set[str]:
        return {name for name, made in self.parts.items() if made}


CPU = "cpu"


def outdated(bundle: Path) -> Path:
    """Makes a part of a bundle look as if made from something else: a build makes it anew, and copies the rest."""
    final = bundle.with_name("tiny-cpu.hstb")
    bundle.rename(final)
    parts = manifest(final)["parts"]
    rewrite(final, parts=parts | {"scheduler": parts["scheduler"] | {"inputs": "0"}})
    return final


def staging_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.building")


def test_an_interrupted_export_goes_on_where_it_was_and_gives_the_same_bundle(
    tiny_recipe: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, target, final = load_recipe(str(tiny_recipe)), load_target(CPU), tmp_path / "tiny-cpu.hstb"
    with pytest.raises(KeyboardInterrupt):
        export_bundle(recipe, target, final, on_part=(first := Stop(4)))
    assert len(first.made) == 4
    assert not final.exists()

    # Then it is interrupted at the very end, while everything is synced to disk.
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(hst_trt.bundle.staging, "_sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(recipe, target, final, on_part=(second := Stop()))
    assert second.made == second.parts.keys() - first.made
    assert not final.exists()

    outcome = export_bundle(recipe, target, final, on_part=(third := Stop()))
    assert third.parts.keys() == second.parts.keys()
    assert not third.made
    assert Bundle.open(final).manifest.files == Bundle.open(tiny_bundle).manifest.files
    assert outcome.made
    assert not staging_of(final).exists()
    assert {p.relative_to(final).as_posix() for p in final.rglob("*") if p.is_file()} == {
        "manifest.json",
        *manifest(final)["files"],
    }


def test_a_damaged_bundle_is_built_anew_and_of_an_interrupted_build_only_whole_parts_are_taken_over(
    tiny_recipe: Path, tiny_bundle: Path, bundle_copy: Path
) -> None:
    final = bundle_copy.with_name("tiny-cpu.hstb")
    bundle_copy.rename(final)
    flip_one_byte(final / "graphs" / "glue" / "select.onnx")
    recipe, target = load_recipe(str(tiny_recipe)), load_target(CPU)
    with pytest.raises(KeyboardInterrupt):
        build_bundle(recipe, target, final, on_part=(first := Stop(5)))
    assert {"tokenizers", "scheduler", "glue", "text_encoder"} <= first.made

    cut = staging_of(final) / "graphs" / "glue" / "integrate.onnx"
    cut.write_bytes(cut.read_bytes()[:-3])
    flip_one_byte(staging_of(final) / "tokenizers" / "tokenizer.json")  # its length is right, as after a power cut
    (staging_of(final) / "scheduler.json").unlink()
    outcome = build_bundle(recipe, target, final, on_part=(second := Stop()))
    assert {"glue", "tokenizers", "scheduler"} <= second.made
    assert "text_encoder" not in second.made
    assert outcome.made
    assert "cannot be used" in outcome.reasons[0]
    assert Bundle.open(final).manifest.fingerprint == Bundle.open(tiny_bundle).manifest.fingerprint


def test_a_journal_that_cannot_be_read_starts_anew(tmp_path: Path) -> None:
    final = tmp_path / "x.hstb"
    staging_of(final).mkdir()
    for content in ("{", "[]", '{"glue": 3}', '{"glue": {"inputs": "1"}}', "[" * 200_000):
        (staging_of(final) / "journal.json").write_text(content)
        with Staging.open(final) as staging:
            assert staging.part("glue", 1) is None


def test_an_interrupted_rebuild_leaves_the_old_bundle_usable(bundle_copy: Path, tiny_recipe: Path) -> None:
    final = bundle_copy.with_name("tiny-cpu.hstb")
    bundle_copy.rename(final)
    before = draw(final)
    for stop in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            export_bundle(load_recipe(str(tiny_recipe)), load_target(CPU), final, force=True, on_part=Stop(stop))
        assert np.array_equal(draw(final), before)


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_crash_between_the_two_renames_of_a_commit_loses_nothing(
    bundle_copy: Path, tiny_recipe: Path, hst: Hst, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = draw(bundle_copy)
    final = outdated(bundle_copy)
    renames = 0
    rename = Path.rename

    def crashing(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == crash_at:
            raise KeyboardInterrupt
        return rename(self, target)

    build = ["build", "--gpu", CPU, "--pair", tiny_recipe, "--output", final.parent]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crashing)
        assert hst(*build).code == 130
    assert final.exists() == (crash_at == 1)

    # What is put back, or was staged, is not made again.
    monkeypatch.setattr("hst_trt.export.exporter.check_transformer", lambda *_, **__: pytest.fail("exported again"))
    assert hst(*build).code == 0
    assert np.array_equal(draw(final), before)
    assert not final.with_name(f".{final.name}.old").exists()
    assert not staging_of(final).exists()


def test_a_second_build_of_the_same_bundle_is_told_to_wait(tiny_recipe: Path, hst: Hst, bundle_copy: Path) -> None:
    final = outdated(bundle_copy)
    with Staging.open(final):
        with pytest.raises(ResourceError, match="another build"), Staging.open(final):
            pytest.fail("two builds have the lock")
        result = hst("build", "--gpu", CPU, "--pair", tiny_recipe, "--output", final.parent)
        assert (result.code, result.out) == (5, "")
        assert "another build" in result.err
        assert "wait" in result.err
        with Staging.open(final.with_name("other.hstb")):
            pass  # another bundle in the same folder is free
    assert hst("build", "--gpu", CPU, "--pair", tiny_recipe, "--output", final.parent).code == 0


# -- full disks -----------------------------------------------------------------------------------------------------------
def assert_full_then_fine(hst: Hst, final: Path, recipe: Path, fill: Callable[[], None], free: Callable[[], None]) -> None:
    """A build that meets a full disk ends with 5, keeps the old bundle, and succeeds once there is space."""
    files = {file: hash_file(final / file) for file in manifest(final)["files"]}
    build = ["build", "--gpu", CPU, "--pair", recipe, "--output", final.parent]
    fill()
    try:
        result = hst(*build)
    finally:
        free()
    assert (result.code, result.out) == (5, "")
    assert str(final.parent) in result.err
    assert "run the same command again" in result.err
    assert {file: hash_file(final / file) for file in files} == files
    assert Bundle.open(final).manifest.parts["scheduler"].inputs == "0"
    assert hst(*build).code == 0
    assert Bundle.open(final).manifest.parts["scheduler"].inputs != "0"


def test_a_copy_that_meets_a_full_disk_ends_with_5_and_keeps_the_old_bundle(
    bundle_copy: Path, tiny_recipe: Path, hst: Hst, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile, copies = shutil.copyfile, 0

    def full(source: Path, target: Path) -> object:
        nonlocal copies
        copies += 1
        if copies == 4:
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copyfile(source, target)

    with monkeypatch.context() as patched:
        fill = lambda: patched.setattr(shutil, "copyfile", full)
        assert_full_then_fine(hst, outdated(bundle_copy), tiny_recipe, fill, patched.undo)
    assert copies == 4


def test_a_limit_on_file_sizes_ends_with_5_and_keeps_the_old_bundle(bundle_copy: Path, tiny_recipe: Path, hst: Hst) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    free = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_full_then_fine(hst, outdated(bundle_copy), tiny_recipe, fill, free)


def test_a_disk_that_is_really_full_ends_with_5_and_keeps_the_old_bundle(
    bundle_copy: Path, tiny_recipe: Path, hst: Hst, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in bundle_copy.rglob("*") if file.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        final = disk / "tiny-cpu.hstb"
        shutil.copytree(outdated(bundle_copy), final)
        grow = lambda: subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        assert_full_then_fine(hst, final, tiny_recipe, lambda: None, grow)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_a_part_is_recorded_keeps_the_parts_before_it(
    tiny_recipe: Path, hst: Hst, tmp_path: Path
) -> None:
    final = tmp_path / "tiny-cpu.hstb"
    staging_of(final).mkdir()
    (staging_of(final) / "journal.tmp").symlink_to("/dev/full")  # every write to it fails as on a full disk
    result = hst("export", "--gpu", CPU, "--pair", tiny_recipe, "--output", tmp_path)
    assert (result.code, result.out) == (5, "")
    assert "full" in result.err
    assert "goes on where it stopped" in result.err
    assert not final.exists()
    assert (staging_of(final) / "tokenizers" / "tokenizer.json").is_file()


@pytest.mark.parametrize("place", ["/proc/nowhere", "a-file"])
def test_a_folder_that_cannot_be_written_exits_with_2_and_says_to_give_another(
    tiny_recipe: Path, hst: Hst, tmp_path: Path, place: str
) -> None:
    (tmp_path / "a-file").write_text("")
    result = hst("export", "--gpu", CPU, "--pair", tiny_recipe, "--output", tmp_path / place / "bundles")
    assert (result.code, result.out) == (2, "")
    assert place in result.err
    assert "--output" in result.err


# -- finding ----------------------------------------------------------------------------------------------------------
def test_the_newest_bundle_that_is_whole_and_runs_here_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundles"
    table = manifest(tiny_bundle)

    def put(name: str, day: int, **changes: Any) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text(
            json.dumps(table | {"created": f"2030-01-{day:02}T00:00:00+00:00"} | changes)
        )

    assert newest_bundle(folder, runs_here) is None  # no folder yet
    put("older.hstb", 1)
    put("newer.hstb", 2)
    put("graphs-only.hstb", 3, state="graphs")
    put("for-a-gpu.hstb", 4, target=table["target"] | {"backend": "tensorrt"})
    put("older-glue.hstb", 5, graphs={name: graph for name, graph in table["graphs"].items() if name != "advance"})
    put("newer-schema.hstb", 5, schema_version=99)
    put("impossible.hstb", 6, files=3)
    put(".being-built.hstb.building", 7)
    put("not-a-bundle", 8)
    (folder / "no-manifest.hstb").mkdir()
    (folder / "truncated.hstb").mkdir()
    (folder / "truncated.hstb" / "manifest.json").write_text('{"schema_version": 1')
    (folder / "a-file.hstb").write_text("")
    assert newest_bundle(folder, runs_here) == folder / "newer.hstb"


def test_damage_to_a_bundle_does_not_reach_the_model_it_was_built_from(pair_copy: Path, bundle_copy: Path) -> None:
    ours = bundle_copy / "graphs" / "small" / "diffusion_pytorch_model.safetensors"
    theirs = pair_copy / "transformer_small" / "diffusion_pytorch_model.safetensors"
    assert hash_file(ours) == hash_file(theirs)
    target = bundle_copy / "again.safetensors"
    hst_trt.bundle.link_or_copy(theirs, target)
    flip_one_byte(target)
    assert hash_file(ours) == hash_file(theirs)


# -- rebuilding only what changed -------------------------------------------------------------------------------------------
def test_an_unchanged_pair_is_not_exported_again_and_a_changed_one_is_and_says_why(
    bundle_copy: Path, tiny_recipe: Path, hst: Hst
) -> None:
    final = bundle_copy.with_name("tiny-cpu.hstb")
    bundle_copy.rename(final)
    command = ["export", "--gpu", CPU, "--pair", tiny_recipe, "--output", final.parent, "--explain"]
    stamp = (final / "manifest.json").stat().st_mtime_ns
    result = hst(*command)
    assert result.code == 0
    assert "not built: nothing it was made from has changed" in result.err
    assert (final / "manifest.json").stat().st_mtime_ns == stamp
    parts = manifest(final)["parts"]
    rewrite(final, parts=parts | {"scheduler": parts["scheduler"] | {"inputs": "0"}})
    outcome = export_bundle(load_recipe(str(tiny_recipe)), load_target(CPU), final, on_part=(seen := Stop()))
    assert outcome.reasons == ("scheduler is made from something else now",)
    assert seen.made == {"scheduler"}, "the other parts are taken over"
    damaged = final / "scheduler.json"
    flip_one_byte(damaged)
    with pytest.raises(KeyboardInterrupt):  # it is made anew, rather than taken for unchanged
        export_bundle(load_recipe(str(tiny_recipe)), load_target(CPU), final, on_part=Stop(0))


def test_a_bundle_of_graphs_cannot_be_run_and_says_how_to_finish_it(bundle_copy: Path, hst: Hst) -> None:
    rewrite(bundle_copy, state="graphs")
    with pytest.raises(IncompatibleError, match="`hst-trt build --gpu cpu`"):
        HybridStitchPipeline.from_bundle(bundle_copy)
    assert hst("run", "--bundle", bundle_copy, "--prompt", "x").code == 3


def test_a_bundle_for_a_gpu_is_refused_where_there_is_none(bundle_copy: Path, hst: Hst) -> None:
    if not int(pytest.importorskip("cuda.bindings.runtime").cudaGetDeviceCount()[0]):
        pytest.skip("there is a GPU")
    rewrite(bundle_copy, target=manifest(bundle_copy)["target"] | {"backend": "tensorrt", "name": "h100"})
    result = hst("run", "--bundle", bundle_copy, "--prompt", "x")
    assert result.code == 4
    assert "no NVIDIA GPU" in result.err
    assert "hst-trt build --gpu cpu" in result.err


def test_opening_nothing_at_all_is_a_missing_bundle(tmp_path: Path) -> None:
    (tmp_path / "a-file.hstb").write_text("")
    for path in (tmp_path / "nothing", tmp_path / "a-file.hstb"):
        assert "hst-trt build" in refused(MissingError, path)


def test_a_folder_that_is_no_bundle_is_not_advised_to_be_deleted(tmp_path: Path, hst: Hst) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    for name in ("thesis", tmp_path / "thesis", ".", "/", ""):
        result = hst("run", "--bundle", name, "--prompt", "x")
        assert result.code in (4, 6)
        assert "delete" not in result.err
        assert "hst-trt build" in result.err


def test_a_changed_recipe_is_taken_up_without_exporting_again(bundle_copy: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    final = bundle_copy.with_name("tiny-cpu.hstb")
    bundle_copy.rename(final)
    recipe = load_recipe(str(tiny_recipe))
    more = recipe.model_copy(update={"limits": recipe.limits.model_copy(update={"max_images": 3})})
    outcome = build_bundle(more, load_target(CPU), final, on_part=(seen := Stop()))
    assert outcome.reasons == ("recipe is made from something else now",)
    assert not seen.made
    assert Bundle.open(final).manifest.limits.max_images == 3
    assert not build_bundle(more, load_target(CPU), final).made


def test_a_recipe_of_the_users_own_is_not_mistaken_for_the_shipped_one(tiny_recipe: Path, tmp_path: Path) -> None:
    mine = load_recipe(str(tiny_recipe)).model_copy(update={"name": "demo"})
    with pytest.raises(KeyboardInterrupt):  # it is exported
        build_bundle(mine, load_target(CPU), tmp_path / "demo-cpu.hstb", on_part=Stop(0))


def test_a_bundle_is_usable_where_its_models_and_exporter_are_not(
    bundle_copy: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = bundle_copy.with_name("tiny-cpu.hstb")
    bundle_copy.rename(final)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = build_bundle(load_recipe(str(tiny_recipe)), load_target(CPU), final)
    assert not outcome.made


def test_engines_are_offered_only_where_their_gpu_their_system_and_their_tensorrt_are(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Bundle.open(tiny_bundle, check_hashes=False).manifest
    system = {"os": platform.system().lower(), "arch": platform.machine()}
    target = entry.target.model_copy(update={"backend": "tensorrt", "sms": (90,), **system})

    def offered(gpus: list[Gpu], installed: bool = True, device: int = 0, **changes: Any) -> bool:
        monkeypatch.setattr("hst_trt.builder.detect.detect_gpus", lambda: gpus)
        monkeypatch.setattr("hst_trt.backends.is_installed", lambda backend: installed)
        return runs_here(entry.model_copy(update={"target": target.model_copy(update=changes)}), device)

    hopper, ampere = (Gpu(name, sm, 81920, "590.1", f"GPU-{sm}") for name, sm in (("H100", 90), ("A100", 80)))
    assert offered([hopper])
    assert offered([ampere, hopper], device=1)
    assert not offered([])
    assert not offered([ampere])
    assert not offered([hopper], device=1)
    assert not offered([hopper], installed=False)
    assert not offered([hopper], arch="another")
