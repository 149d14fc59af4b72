"""The recipe of the demo pair: packages are checked, data repeats, training resumes, and mistakes are told plainly."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training the demo pair needs torch")
pytest.importorskip("diffusers", reason="training the demo pair needs diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # demo/ is a folder of scripts beside the package

from demo import data, make, packages, train, vae  # noqa: E402
from demo.errors import DemoError  # noqa: E402
from demo.scenes import OBJECTS, Sprites, draw_scene  # noqa: E402


@pytest.fixture(scope="module")
def pca_vae(sprites: Sprites) -> vae.AutoencoderKL:
    torch.manual_seed(0)
    made = vae.make_vae()
    rng = np.random.default_rng(3)
    vae.write_pca_encoder(made, vae.to_model_space(np.stack([draw_scene(rng, sprites).pixels for _ in range(16)])))
    return made


# -- packages ---------------------------------------------------------------------------------------------------------
def test_without_npm_the_message_names_the_file_to_put_there_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DemoError, match=r"npm is not installed.*Put lobehub-fluent-emoji-3d-1\.1\.0\.tgz into"):
        packages.fetch(tmp_path)


def test_what_npm_says_when_it_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'network is unreachable' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DemoError, match=r"could not fetch @lobehub/fluent-emoji-3d@1\.1\.0: network is unreachable"):
        packages.fetch(tmp_path / "work")


def test_another_tarball_under_the_right_name_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "npm"
    folder.mkdir()
    with tarfile.open(folder / packages.SPRITES.tarball, "w:gz") as archive:
        archive.add(__file__, "package/assets/1f34e.webp")
    with pytest.raises(DemoError, match=r"is not @lobehub/fluent-emoji-3d@1\.1\.0"):
        packages.fetch(tmp_path)
    assert [file.name for file in folder.iterdir()] == [packages.SPRITES.tarball]


def test_an_object_that_people_call_otherwise_is_refused(tmp_path: Path) -> None:
    names = [{"hexcode": o.codepoint.upper().removesuffix("-FE0F"), "label": o.name, "tags": []} for o in OBJECTS]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(names))
    packages.check_names(file)
    names[0]["label"] = "pear"
    file.write_text(json.dumps(names))
    with pytest.raises(DemoError, match="does not call 1f34e 'apple' but 'pear'"):
        packages.check_names(file)


# -- data -------------------------------------------------------------------------------------------------------------
def test_the_patch_map_is_the_encoder_and_its_inverse_gives_the_picture_back(
    sprites: Sprites, pca_vae: vae.AutoencoderKL
) -> None:
    rng = np.random.default_rng(8)
    pictures = vae.to_model_space(np.stack([draw_scene(rng, sprites).pixels for _ in range(2)]))
    patches = vae.PatchMap(pca_vae)
    latents = vae.encode(pca_vae, pictures)
    assert (patches.encode(pictures) - latents).abs().max() < 1e-2
    assert vae.psnr(patches.decode(latents), pictures) > 25


def test_a_chunk_is_the_same_made_alone_or_after_others(
    tmp_path: Path, sprites: Sprites, pca_vae: vae.AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CHUNK", 3)
    monkeypatch.setattr(data, "CHUNKS", 2)
    data.make_data(tmp_path, sprites, pca_vae)
    whole = data.load_data(tmp_path)
    assert whole.latents[32].shape == (6, 16, 32, 32)
    assert whole.latents[16].shape == (6, 16, 16, 16)
    (tmp_path / "data" / "001.safetensors").unlink()
    data.make_data(tmp_path, sprites, pca_vae)
    again = data.load_data(tmp_path)
    assert again.captions == whole.captions
    assert torch.equal(again.latents[32], whole.latents[32])


# -- training ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> data.Scenes:
    """A run of two steps at each size on noise: the machinery is under test, not the pictures."""
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "HELD_OUT", 4)
    monkeypatch.setattr(train, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    stages = (train.Stage(16, 4, 0.3), train.Stage(32, 4, 0.7))
    for name, shape in list(train.SHAPES.items()):
        monkeypatch.setitem(train.SHAPES, name, train.Shape(2, 1, shape.dual_attention_layers[:1], stages))
    generator = torch.Generator().manual_seed(0)
    latents = {edge: torch.randn(12, 16, edge, edge, generator=generator).half() for edge in (16, 32)}
    return data.Scenes(latents, torch.randint(4, 90, (12, 3, 16), generator=generator).short(), [""] * 12)


def test_a_killed_run_goes_on_from_its_checkpoint_and_the_small_one_keeps_the_text_encoders(
    tmp_path: Path, short: data.Scenes
) -> None:
    class Killed(BaseException):
        pass

    def killed(run: train.Run) -> None:
        raise Killed

    with pytest.raises(Killed):
        train.train(train.Run("large", tmp_path), short, killed)
    resumed = train.Run("large", tmp_path)
    assert 0 < resumed.step < resumed.total_steps
    looked: list[int] = []
    train.train(resumed, short, lambda run: looked.append(run.stage.edge))
    assert resumed.step == resumed.total_steps == 4
    assert resumed.done == 1
    assert looked[-1] == 32
    lines = [json.loads(line) for line in (tmp_path / "large.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == 8
    assert all(np.isfinite(line["loss"]) for line in lines)

    small = train.Run("small", tmp_path)
    before = {key: value.clone() for key, value in small.live.text.state_dict().items()}
    train.train(small, short, lambda run: None)
    assert all(torch.equal(value, before[key]) for key, value in small.live.text.state_dict().items())
    table = train.load_average(tmp_path / "small.pt", "transformer")["pos_embed.pos_embed"]
    assert torch.equal(table, small.positions), "the positions that ship are those of whole scenes"


def test_half_size_scenes_span_the_positions_of_whole_ones() -> None:
    grid = torch.arange(24 * 24).float().view(1, 24 * 24, 1)
    whole = grid.view(24, 24)[4:20, 4:20]
    coarse = train.coarse_positions(grid, 16).view(24, 24)[8:16, 8:16]
    assert torch.equal(coarse, whole[::2, ::2])
    assert torch.equal(train.coarse_positions(grid, 32), grid)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_checkpoint_of_something_else_is_refused_and_kept(tmp_path: Path, short: data.Scenes, content: bytes | None) -> None:
    file = tmp_path / "large.pt"
    if content is None:
        torch.save({"live": {}, "average": {}, "optimizers": [], "step": 3, "seconds": 1.0}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(DemoError, match="is not a checkpoint of this recipe's large transformer"):
        train.Run("large", tmp_path)
    assert file.exists()


# -- the command ------------------------------------------------------------------------------------------------------
def test_a_full_disk_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(sys, "argv", ["make", "--work", str(tmp_path / "work")])
    assert make.main() == 1
    assert "0.1 GB free, the recipe takes 3 GB" in capsys.readouterr().err
