"""The command line: exit codes, messages that say what to do, clean streams, and nothing lost by a Ctrl-C or a rerun."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished, recipe_text
from PIL import Image

from hst_trt.bundle import Bundle
from hst_trt.cli.main import _COMMANDS

Hst = Callable[..., Finished]
SCRIPT = Path(sys.executable).with_name("hst-trt")
ANSI = re.compile(r"\x1b\[|\r")


@pytest.fixture
def run(hst: Hst, tiny_bundle: Path) -> Hst:
    """`hst-trt run` on the tiny bundle, pictures going to ``outputs``."""
    return lambda *arguments: hst("run", "--bundle", tiny_bundle, *arguments)


def failed(result: Finished, code: int, *fragments: str) -> None:
    """It ended with this code, said all of these things on stderr and nothing on stdout."""
    assert (result.code, result.out) == (code, ""), result.err
    for fragment in fragments:
        assert fragment in result.err


# -- help and usage ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [[], *([name] for name in _COMMANDS)], ids=lambda c: c[0] if c else "hst-trt")
def test_every_command_explains_itself(hst: Hst, command: list[str]) -> None:
    result = hst(*command, "--help")
    assert result.code == 0
    assert "Usage: hst-trt" in result.out
    assert result.err == ""
    assert not ANSI.search(result.out)
    assert hst(*command, "-h").out == result.out


def test_the_help_lists_every_command_with_a_line(hst: Hst) -> None:
    out = hst("--help").out
    for name, (_, text) in _COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["no-such-command"], "no-such-command"),
        (["run", "--no-such-option"], "--no-such-option"),
        (["run", "--prompt", "x", "--num-inference-steps", "many"], "'many' is not a valid integer"),
        (["run", "--prompt", "x", "--guidance-scale", "high"], "'high' is not a valid float"),
        (["run", "--prompt", "x", "--schedule", "fastest"], "'fastest' is not one of 'hybrid', 'large'"),
        (["run", "--prompt", "x", "--threads", "-1"], "-1 is not in the range"),
        (["run"], "--prompts-file"),
        (["run", "--prompt", "x", "--prompts-file", "y"], "--prompts-file"),
        (["plan", "extra"], "extra"),
    ],
)
def test_a_wrong_call_is_a_usage_error(hst: Hst, arguments: list[str], fragment: str) -> None:
    failed(hst(*arguments), 2, fragment)


# -- requests that cannot be drawn ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ("--height 100", ["height 100 is not a multiple of 16", "use 96 or 112"]),
        ("--width 0", ["width 0", "use 16"]),
        ("--height 208", ["beyond this bundle's limit", "192"]),
        ("--num-inference-steps 0", ["num_inference_steps 0", "20 to 50"]),
        ("--num-inference-steps -1", ["num_inference_steps -1"]),
        ("--num-inference-steps 10000", ["num_inference_steps 10000 is outside 1 .. 1000"]),
        ("--mask-ratio 0", ["mask ratio 0.0 is outside (0, 1]"]),
        ("--mask-ratio 1.5", ["mask ratio 1.5 is outside (0, 1]"]),
        ("--mask-ratio nan", ["mask ratio nan"]),
        ("--mask-ratio 0.2 --mask-threshold 2", ["give one of them"]),
        ("--mask-threshold 0", ["mask threshold 0.0"]),
        ("--mask-decay 2", ["mask decay 2.0"]),
        ("--stages 1,1,1", ["stages 1,1,1 do not make 4 steps", "three numbers"]),
        ("--stages 1,2", ["--stages '1,2' is not three whole numbers", "--stages 3,9,16"]),
        ("--stages a,b,c", ["--stages 'a,b,c'"]),
        ("--stages -1,2,3", ["stages -1,2,3 do not make 4 steps"]),
        ("--stages 2,1,1 --schedule t-stitch", ["has no hybrid stage"]),
        ("--refresh-every -1", ["refresh_every -1"]),
        ("--correction nan", ["correction nan"]),
        ("--adaptive --schedule small", ["use hybrid or srdiffusion"]),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_schedule_that_cannot_be_run_exits_with_2(
    hst: Hst, tiny_bundle: Path, command: str, options: str, fragments: list[str]
) -> None:
    prompt = ["--prompt", "x"] if command == "run" else []
    failed(hst(command, "--bundle", tiny_bundle, *prompt, *options.split()), 2, *fragments)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ("--guidance-scale nan", ["guidance_scale nan", "3 to 7 is usual"]),
        ("--guidance-scale inf", ["guidance_scale inf"]),
        ("--guidance-scale -1", ["guidance_scale -1.0"]),
        ("--seed -1", ["seed -1 is outside 0 .. 2**64-1"]),
        ("--seed 18446744073709551616", ["outside 0 .. 2**64-1"]),
        ("--num-images-per-prompt 0", ["num_images_per_prompt 0"]),
        ("--num-images-per-prompt 5", ["5 images at once", "its limit is 4", "ask for fewer"]),
    ],
)
def test_a_picture_that_cannot_be_drawn_exits_with_2_and_leaves_no_file(run: Hst, options: str, fragments: list[str]) -> None:
    failed(run("--prompt", "x", *options.split()), 2, *fragments)
    assert not list(Path("outputs").iterdir())


def test_a_prompt_in_another_encoding_is_refused(run: Hst) -> None:
    failed(run("--prompt", os.fsdecode(b"caf\xe9")), 2, "not valid Unicode", "UTF-8")


def test_an_empty_prompt_and_an_over_long_one_are_drawn_with_a_warning_on_stderr(run: Hst) -> None:
    empty = run("--prompt", "", "--json")
    assert empty.code == 0
    assert "WARNING: a prompt is empty" in empty.err
    long = run("--prompt", "apple and house " * 20 + "penguin", "--json")
    assert long.code == 0
    assert "this part was cut off" in long.err
    assert "penguin" in long.err
    for result in (empty, long):
        assert json.loads(result.out)["schema"] == "hst_trt.run/1"


@pytest.mark.parametrize(
    "content", [None, "", "\n  \n# only a comment\n", b"\xff\xfe\x00\x01"], ids=["missing", "empty", "comments", "binary"]
)
def test_a_prompts_file_without_prompts_is_refused(run: Hst, content: str | bytes | None) -> None:
    if content is not None:
        Path("prompts.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    result = run("--prompts-file", "prompts.txt")
    readable = isinstance(content, str)
    failed(result, 2 if readable else 4, "prompts.txt", "write one prompt a line" if readable else "cannot be read")


def test_a_prompts_file_is_drawn_line_by_line(run: Hst) -> None:
    Path("prompts.txt").write_text("a red apple\n\n# not this\n  a blue house  \n", encoding="utf-8")
    result = json.loads(run("--prompts-file", "prompts.txt", "--seed", 5, "--json").out)
    assert [r["prompt"] for r in result["results"]] == ["a red apple", "a blue house"]
    assert [r["images"] for r in result["results"]] == [["outputs/hst_5_000.png"], ["outputs/hst_5_001.png"]]


def test_weights_that_are_not_numbers_exit_with_7_and_draw_nothing(bundle_copy: Path, hst: Hst) -> None:
    name = "graphs/small/diffusion_pytorch_model.safetensors"
    content = bytearray((bundle_copy / name).read_bytes())
    content[-40_000:] = b"\x00\x7e" * 20_000  # float16 NaN
    (bundle_copy / name).write_bytes(content)
    table = json.loads((bundle_copy / "manifest.json").read_text())
    table["files"][name]["sha256"] = hashlib.sha256(content).hexdigest()
    (bundle_copy / "manifest.json").write_text(json.dumps(table))
    failed(hst("run", "--bundle", bundle_copy, "--prompt", "x"), 7, "not finite", "hst-trt verify")
    assert not list(Path("outputs").iterdir())


# -- streams ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "schema"),
    [
        ("doctor", "hst_trt.doctor/1"),
        ("inspect BUNDLE", "hst_trt.inspect/1"),
        ("verify BUNDLE", "hst_trt.verify/1"),
        ("plan --bundle BUNDLE --adaptive", "hst_trt.plan/1"),
        ("run --bundle BUNDLE --prompt x --save-masks", "hst_trt.run/1"),
        ("build --gpu cpu --pair RECIPE --output FOLDER", "hst_trt.build/1"),
        ("build --gpu cpu --pair RECIPE --output FOLDER --dry-run", "hst_trt.build_plan/1"),
    ],
)
def test_json_output_is_one_object_with_a_schema_and_nothing_else(
    hst: Hst, tiny_bundle: Path, tiny_recipe: Path, arguments: str, schema: str
) -> None:
    words = {"BUNDLE": tiny_bundle, "RECIPE": tiny_recipe, "FOLDER": tiny_bundle.parent}
    result = hst(*(words.get(word, word) for word in arguments.split()), "--json")
    assert result.code == 0, result.err
    assert not ANSI.search(result.out + result.err)
    table = json.loads(result.out)
    assert next(iter(table)) == "schema"
    assert table["schema"] == schema


def test_results_go_to_stdout_and_nothing_but_messages_to_stderr_without_bars_or_colours(
    run: Hst, hst: Hst, tiny_bundle: Path
) -> None:
    drawn = run("--prompt", "[red] a castle", "--seed", 7, "--save-masks")
    assert drawn.out.splitlines()[-2:] == ["outputs/hst_7_000.png", "outputs/hst_7_000_masks.png"]
    assert "[red] a castle" in drawn.out  # not taken for markup
    assert "large model's compute saved" in drawn.out
    results = [
        drawn,
        hst("verify", tiny_bundle),
        hst("inspect", tiny_bundle),
        hst("plan", "--bundle", tiny_bundle),
        hst("doctor"),
    ]
    for result in results:
        assert (result.code, result.err) == (0, "")
        assert result.out.strip()
        assert not ANSI.search(result.out)


def test_verbose_shows_where_an_error_came_from_and_plain_does_not(hst: Hst, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [str(SCRIPT), "inspect", "/no/such.hstb"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    verbose = subprocess.run([command[0], "-v", *command[1:]], capture_output=True, text=True, check=False)
    assert plain.returncode == verbose.returncode == 4
    assert "Traceback" not in plain.stderr
    assert "Traceback" in verbose.stderr
    assert "find_bundle" in verbose.stderr


@pytest.mark.parametrize("target", ["/dev/full", "closed pipe"])
def test_a_stdout_that_takes_nothing_is_no_traceback(tiny_bundle: Path, target: str) -> None:
    if target == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(target, os.O_WRONLY)
    command = [str(SCRIPT), "inspect", str(tiny_bundle), "--json"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert result.returncode == (5 if target == "/dev/full" else 1)  # click's own answer to a reader that is gone


# -- pictures ---------------------------------------------------------------------------------------------------------
def test_a_picture_says_how_it_was_drawn(run: Hst, tiny_bundle: Path) -> None:
    prompt = "a red äpple 🍎, [big] (very:1.2)"
    result = run(
        "--prompt", prompt, "--negative-prompt", "blue", "--seed", 7, "--stages", "1,2,1", "--correction", 0.5, "--json"
    )
    (path,) = json.loads(result.out)["results"][0]["images"]
    with Image.open(path) as image:
        assert image.size == (64, 64)
        lines, settings = image.text["parameters"].splitlines(), json.loads(image.text["hst_trt"])
    assert lines[:2] == [prompt, "Negative prompt: blue"]
    assert lines[2].startswith("Steps: 4, Sampler: Euler, CFG scale: 3.0, Seed: 7, Size: 64x64, Model: tiny-cpu")
    assert settings["prompt"] == prompt
    assert settings["plan"]["stages"] == [1, 2, 1]
    assert settings["stages_run"] == {"large": 1, "hybrid": 2, "small": 1}
    assert (settings["seed"], settings["plan"]["correction"], settings["plan"]["mask"]["ratio"]) == (7, 0.5, 0.3)
    assert settings["fingerprint"] == Bundle.open(tiny_bundle).manifest.fingerprint


def test_masks_are_saved_as_a_picture_with_a_tile_for_each_masked_step(run: Hst) -> None:
    result = run("--prompt", "x", "--seed", 7, "--num-inference-steps", 12, "--stages", "2,7,3", "--save-masks", "--json")
    masks = json.loads(result.out)["results"][0]["masks"]
    with Image.open(masks) as sheet:
        assert sheet.width == 6 * (160 + 8) + 8  # six columns, and the seventh tile in a second row
        assert sheet.height == 2 * (160 + 16 + 8) + 8
        assert np.asarray(sheet).std() > 0
    large = run("--prompt", "x", "--schedule", "large", "--save-masks")
    assert large.code == 0
    assert "no masks" in large.err


def test_files_are_never_overwritten_unless_it_is_asked_for(run: Hst) -> None:
    command = ["--prompt", "a red apple", "--seed", 7, "--save-masks"]
    assert run(*command).out.splitlines()[-2:] == ["outputs/hst_7_000.png", "outputs/hst_7_000_masks.png"]
    mine = {"hst_7_000.png": b"mine", "hst_7_001.png": b"mine too", "hst_7_002_masks.png": b"and this"}
    for name, content in mine.items():
        (Path("outputs") / name).write_bytes(content)
    paths = run(*command, "--num-images-per-prompt", 2).out.splitlines()[-3:]
    assert paths == ["outputs/hst_7_002.png", "outputs/hst_7_003.png", "outputs/hst_7_002_masks_001.png"]
    for name, content in mine.items():
        assert (Path("outputs") / name).read_bytes() == content
    assert run(*command, "--overwrite").out.splitlines()[-2:] == ["outputs/hst_7_000.png", "outputs/hst_7_000_masks.png"]
    with Image.open("outputs/hst_7_000.png") as image:
        assert image.size == (64, 64)
    assert (Path("outputs") / "hst_7_001.png").read_bytes() == b"mine too"
    assert not list(Path("outputs").glob(".*"))


def test_a_full_disk_keeps_the_picture_that_was_to_be_overwritten(run: Hst, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--prompt", "a red apple", "--seed", 7).code == 0
    before = Path("outputs/hst_7_000.png").read_bytes()
    Path("outputs/.hst_7_000.png.part").symlink_to("/dev/full")
    failed(run("--prompt", "a blue apple", "--seed", 7, "--overwrite"), 5, "full", "free some space")
    assert Path("outputs/hst_7_000.png").read_bytes() == before
    Path("outputs/.hst_7_001.png.part").symlink_to("/dev/full")
    failed(run("--prompt", "a blue apple", "--seed", 7), 5, "outputs")
    assert [p.name for p in Path("outputs").iterdir()] == ["hst_7_000.png"]
    assert run("--prompt", "a blue apple", "--seed", 7, "--overwrite").code == 0
    assert Path("outputs/hst_7_000.png").read_bytes() != before


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    run: Hst, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a-file").write_text("mine")
    monkeypatch.setattr("hst_trt.pipeline.HybridStitchPipeline.from_bundle", lambda *_, **__: pytest.fail("loaded"))
    failed(run("--prompt", "x", "--output-dir", place), 2, place)
    assert Path("a-file").read_text() == "mine"


def test_a_read_only_output_folder_is_told_before_anything_is_loaded(run: Hst, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hst_trt.pipeline.HybridStitchPipeline.from_bundle", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # these tests may run as root, whom nothing is forbidden
    failed(run("--prompt", "x"), 2, "outputs", "Permission denied", "--output-dir")


# -- recipes, targets and models ----------------------------------------------------------------------------------------
def test_an_unknown_target_or_recipe_is_missing_and_the_known_ones_are_named(hst: Hst) -> None:
    failed(hst("build", "--gpu", "z9000"), 4, "z9000", "a100, cpu, h100, h200, rtx")
    failed(hst("build", "--gpu", "cpu", "--pair", "no-such-pair"), 4, "no-such-pair", "demo, sd35, sd35-sd3", ".toml")
    failed(hst("build", "--gpu", "cpu", "--pair", "no-such-pair.toml"), 4, "no-such-pair.toml")
    assert not Path("home").exists()


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("name = [broken", ["not valid TOML"]),
        ("\ufeff\x00", ["not valid TOML"]),
        ("", ["not a valid recipe", "name: Field required"]),
        (recipe_text("pair").replace("sequence", "sekuence"), ["max_sekuence_length: Extra inputs are not permitted"]),
        (recipe_text("pair").replace('"tiny"', '"../tiny"'), ["name: String should match"]),
        (
            recipe_text("pair").replace("max_images = 4", "max_images = 0"),
            ["limits.max_images: Input should be greater than 0"],
        ),
        (recipe_text("pair").replace("= 16", "= 100000"), ["max_sequence_length"]),
    ],
    ids=["syntax", "bytes", "empty", "misspelt", "name-is-a-path", "limit", "length"],
)
def test_a_broken_recipe_names_the_file_and_what_is_wrong(hst: Hst, content: str, fragments: list[str]) -> None:
    Path("mine.toml").write_text(content, encoding="utf-8")
    failed(hst("build", "--gpu", "cpu", "--pair", "mine.toml"), 2, "mine.toml", *fragments)


def test_a_recipe_of_directories_that_are_not_there_is_missing(hst: Hst) -> None:
    Path("mine.toml").write_text(recipe_text("./no-such-model"), encoding="utf-8")
    failed(hst("export", "--gpu", "cpu", "--pair", "mine.toml"), 4, "no-such-model", "correct the `source`")
    assert not list(Path.cwd().glob("home/**/*.hstb"))


def test_a_model_that_is_not_here_exits_with_4_and_how_to_get_it(hst: Hst) -> None:
    began = time.monotonic()
    result = hst("build", "--gpu", "h100")
    failed(
        result,
        4,
        "stabilityai/stable-diffusion-3.5-large",
        "hf auth login",
        "hf download stabilityai/stable-diffusion-3.5-large",
    )
    assert "sd35 for h100" in result.err  # which pair was chosen
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("component", ["transformer", "transformer_small", "vae", "text_encoder"])
def test_a_model_with_only_pickle_weights_is_refused_and_the_pickle_is_named_and_never_opened(
    pair_copy: Path, hst: Hst, component: str
) -> None:
    for file in (pair_copy / component).glob("*.safetensors"):
        file.unlink()
    trap = pair_copy.parent / "opened"
    name = "pytorch_model.bin"
    code = f"import pathlib; pathlib.Path({str(trap)!r}).touch()"
    (pair_copy / component / name).write_bytes(b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.")
    result = hst("export", "--gpu", "cpu", "--pair", pair_copy.with_name("tiny.toml"))
    failed(result, 4, f"{component} has no safetensors weights", name, "save_pretrained")
    assert not trap.exists()


@pytest.mark.parametrize("damage", ["cut", "header", "not-json", "no-offsets", "list", "empty"])
def test_a_damaged_weight_file_is_an_integrity_error(pair_copy: Path, hst: Hst, damage: str) -> None:
    file = pair_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    headers = {"not-json": b"{....", "no-offsets": b'{"a": {"shape": [1]}}', "list": b"[1, 2]"}
    if damage == "cut":
        content = content[:-1000]
    elif damage == "header":
        content = b"\xff" * 8 + content[8:]
    elif damage == "empty":
        content = b""
    else:
        content = len(headers[damage]).to_bytes(8, "little") + headers[damage]
    file.write_bytes(content)
    failed(hst("export", "--gpu", "cpu", "--pair", pair_copy.with_name("tiny.toml")), 6, str(file.name), "again")


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_pair_that_cannot_be_stitched_exits_with_3_and_every_difference(tiny_pair: Path, pair_copy: Path, hst: Hst) -> None:
    change_json(
        pair_copy / "transformer_small" / "config.json", in_channels=4, joint_attention_dim=4096, pooled_projection_dim=8
    )
    change_json(pair_copy / "scheduler" / "scheduler_config.json", shift=7.5)
    change_json(pair_copy / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.25)
    Path("two.toml").write_text(recipe_text(tiny_pair, pair_copy), encoding="utf-8")
    result = hst("build", "--gpu", "cpu", "--pair", "two.toml")
    failed(
        result, 3, "cannot be stitched", "latent channels 16 (large) and 4 (small)", "text width 128 (large) and 4096 (small)",
        "pooled text width 128 (large) and 8 (small)", "(large) and 7.5 (small)", "VAE scaling_factor",
        "and 0.5 (small)", "VAE shift_factor", "choose two models of one family",
    )  # fmt: skip
    assert not Path("home").exists()


def test_a_pair_whose_vaes_have_the_same_config_but_other_weights_cannot_be_stitched(
    tiny_pair: Path, pair_copy: Path, hst: Hst
) -> None:
    file = pair_copy / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    begin, end = (8 + int.from_bytes(content[:8], "little") + o for o in header["decoder.conv_in.weight"]["data_offsets"])
    content[begin:end] = (np.frombuffer(content[begin:end], np.float16) + np.float16(0.5)).tobytes()
    file.write_bytes(content)
    Path("two.toml").write_text(recipe_text(tiny_pair, pair_copy), encoding="utf-8")
    failed(hst("build", "--gpu", "cpu", "--pair", "two.toml"), 3, "cannot be stitched", "VAE weights (decoder.conv_in.weight)")


def test_a_model_of_another_family_or_scheduler_exits_with_3(pair_copy: Path, hst: Hst) -> None:
    command = ["build", "--gpu", "cpu", "--pair", pair_copy.with_name("tiny.toml")]
    change_json(pair_copy / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    failed(hst(*command), 3, "use_karras_sigmas", "FlowMatchEulerDiscreteScheduler")
    change_json(pair_copy / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    failed(hst(*command), 3, "not of the SD3 family", "FluxTransformer2DModel")


# -- a GPU target where there is no GPU --------------------------------------------------------------------------------------
@pytest.mark.parametrize("pair", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_a_gpu_build_without_tensorrt_keeps_the_graphs_and_names_the_command_that_finishes_it(
    hst: Hst, tiny_recipe: Path, tmp_path: Path, pair: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("hst_trt.builder.toolchain.detect_gpus", list)
    output = tmp_path / "my bundles"
    command = ["build", "--gpu", "h100", "--pair", tiny_recipe if pair == "tiny" else "demo", "--output", output]
    first = hst(*command)
    failed(first, 4, "tensorrt", "cannot be built here: tensorrt is not installed", 'pip install "hst_trt[tensorrt]"')
    final = output / f"{pair}-h100.hstb"
    assert Bundle.open(final).manifest.state == "graphs"
    assert str(final) in first.err
    named = re.search(r"`(hst-trt build [^`]*)`", first.err)
    assert named is not None
    assert shlex.split(named[1]) == ["hst-trt", *map(str, command)]

    monkeypatch.setattr("hst_trt.builder.build.add_graphs", lambda *_, **__: pytest.fail("exported again"))
    stamp = (final / "manifest.json").stat().st_mtime_ns
    second = hst(*shlex.split(named[1])[1:])
    assert (second.code, second.err) == (4, first.err)
    assert (final / "manifest.json").stat().st_mtime_ns == stamp


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------
def interrupt_when(pattern: str, command: list[object], folder: Path) -> tuple[int, str]:
    """Starts the console script on a terminal, sends SIGINT once its stderr shows the pattern, and waits for the end."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [SCRIPT, *map(str, command)], stdout=subprocess.PIPE, stderr=theirs, cwd=folder, env=environment, text=True
    )
    os.close(theirs)
    seen, sent = "", False
    try:
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            seen += chunk.decode(errors="replace")
            if not sent and re.search(pattern, seen):
                process.send_signal(signal.SIGINT)
                sent = True
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
    assert sent, f"{pattern!r} never came: {seen[-500:]}"
    assert out == ""
    assert "Traceback" not in seen
    assert "interrupted; what was finished is kept" in seen
    return process.returncode, seen


def test_ctrl_c_while_drawing_exits_with_130_and_the_same_command_then_succeeds(
    hst: Hst, tiny_bundle: Path, tmp_path: Path
) -> None:
    command = ["run", "--bundle", tiny_bundle, "--prompt", "x", "--seed", 1, "--num-inference-steps", 900]
    code, seen = interrupt_when(r"steps .*[1-9]\d*/900", [*command, "--height", 192, "--width", 192], tmp_path)
    assert code == 130
    assert "loading" in seen  # a bar for each
    assert not list((tmp_path / "outputs").iterdir())
    assert hst(*command).code == 0


@pytest.mark.parametrize("command", ["build", pytest.param("export", marks=pytest.mark.slow)])
def test_ctrl_c_while_exporting_exits_with_130_and_the_same_command_goes_on_from_there(
    hst: Hst, tiny_recipe: Path, tmp_path: Path, command: str
) -> None:
    words = [command, "--gpu", "cpu", "--pair", tiny_recipe, "--output", tmp_path / "bundles"]
    # Bars are drawn ten times a second, so not every name is seen; and a tiny pair is exported in two seconds, so be early.
    code, _ = interrupt_when("glue|text_encoder", words, tmp_path)
    assert code == 130
    final = tmp_path / "bundles" / "tiny-cpu.hstb"
    assert not final.exists()
    journal = json.loads((final.with_name(f".{final.name}.building") / "journal.json").read_text())
    assert {"tokenizers", "scheduler"} <= journal.keys()
    stamps = {name: entry["files"] for name, entry in journal.items()}
    result = hst(*words)
    assert (result.code, result.out.strip()) == (0, str(final))
    files = Bundle.open(final).manifest.files
    assert all(files[name].sha256 == entry["sha256"] for part in stamps.values() for name, entry in part.items())


# -- which bundle -----------------------------------------------------------------------------------------------------
def test_a_bundle_is_found_by_path_by_name_and_by_being_the_newest(hst: Hst, tiny_bundle: Path) -> None:
    home = Path("home/bundles")
    shutil.copytree(tiny_bundle, home / "mine.hstb")
    Path("mine").mkdir()  # a folder of that name is not meant
    for name in ("mine", "mine.hstb", home / "mine.hstb", home / "mine"):
        result = hst("plan", "--bundle", name, "--json")
        assert result.code == 0, result.err
        assert Path(json.loads(result.out)["bundle"]).resolve() == (home / "mine.hstb").resolve()
    assert json.loads(hst("plan", "--json").out)["bundle"].endswith("mine.hstb")


def test_doctor_names_damaged_bundles_instead_of_failing(hst: Hst, tiny_bundle: Path) -> None:
    home = Path("home/bundles")
    shutil.copytree(tiny_bundle, home / "good.hstb")
    (home / "bad.hstb").mkdir()
    (home / "worse.hstb").mkdir()
    (home / "worse.hstb" / "manifest.json").write_text("[")
    status = {b["name"]: b["status"] for b in json.loads(hst("doctor", "--json").out)["bundles"]}
    assert status["good.hstb"] == "tiny for cpu, complete"
    assert status["bad.hstb"].startswith("not usable")
    assert status["worse.hstb"].startswith("not usable")
