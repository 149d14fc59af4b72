"""What the tests share: the demo pair's bundle, a smaller pair to damage and export again, and the command line in-process."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from host import Library, build_host
from PIL import Image

import hst_trt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # demo/ is a folder of scripts beside the package, not part of it
from demo.scenes import OBJECTS, Sprites

os.environ["COLUMNS"] = "200"  # of the tables that commands print; read once, when the first command is imported

DEMO_PAIR = Path(hst_trt.__file__).parent / "data" / "demo_pair"


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder of the C++ host."""
    return build_host()


@pytest.fixture(scope="session")
def library(built: Path) -> Library:
    return Library(built / "libhst_trt.so")


@contextmanager
def _shared_folder(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder that the processes of pytest-xdist share; one at a time is inside, and the first finds it empty."""
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / ".test-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Sprites:
    """Discs of 40 grey levels in place of the emoji, which come from an npm package."""
    folder = tmp_path_factory.mktemp("sprites")
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    for i, item in enumerate(OBJECTS):
        pixels = np.full((32, 32, 4), 6 * i, np.uint8)
        pixels[..., 3] = np.where(x * x + y * y < 1, 255, 0)
        Image.fromarray(pixels).save(folder / f"{item.codepoint}.webp", lossless=True)
    return Sprites(folder)


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pair built for the CPU. Not to be changed: see `bundle_copy`."""
    from hst_trt.builder.build import build_bundle
    from hst_trt.recipe import load_recipe, load_target

    with _shared_folder(tmp_path_factory, "demo") as folder:
        return build_bundle(load_recipe("demo"), load_target("cpu"), folder / "demo-cpu.hstb").bundle.path


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair's directory with the demo pair's text side, and tiny transformers and a tiny VAE of random weights.

    Beside it lies ``tiny.toml``, its recipe. Not to be changed: see `pair_copy`.
    """
    import torch
    from diffusers import AutoencoderKL
    from tiny import randomise, transformer

    with _shared_folder(tmp_path_factory, "tiny") as folder:
        pair = folder / "pair"
        if (folder / "tiny.toml").is_file():
            return pair
        shutil.copytree(DEMO_PAIR, pair, ignore=shutil.ignore_patterns("transformer*", "vae"))
        shared = dict(in_channels=16, out_channels=16, joint_attention_dim=128, pooled_projection_dim=128)
        large = transformer(layers=2, heads=2, seed=3, **shared)
        small = transformer(layers=1, heads=1, seed=4, dual_attention_layers=(0,), **shared)
        config = AutoencoderKL.load_config(DEMO_PAIR / "vae") | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
        vae = AutoencoderKL.from_config(config)
        randomise(vae, seed=5)
        vae.to(torch.float16).save_pretrained(pair / "vae")
        large.to(torch.float16).save_pretrained(pair / "transformer")
        small.to(torch.float16).save_pretrained(pair / "transformer_small")
        (folder / "tiny.toml").write_text(recipe_text("pair"), encoding="utf-8")
    return pair


def recipe_text(large: object, small: object | None = None, component: str = "transformer_small") -> str:
    """A recipe of local directories."""
    return (
        'name = "tiny"\n'
        f'large = {{ source = "{large}" }}\n'
        f'small = {{ source = "{small or large}", component = "{component}" }}\n'
        "max_sequence_length = 16\n"
        "limits = { max_side = 192, max_images = 4 }\n"
        "defaults = { num_inference_steps = 4, guidance_scale = 3.0, height = 64, width = 64 }\n"
    )


@pytest.fixture
def tiny_recipe(tiny_pair: Path) -> Path:
    return tiny_pair.with_name("tiny.toml")


@pytest.fixture
def pair_copy(tiny_pair: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pair that a test may change; its recipe lies beside it as ``tiny.toml``."""
    copy = tmp_path / "copied-pair"
    shutil.copytree(tiny_pair, copy)
    (tmp_path / "tiny.toml").write_text(recipe_text("copied-pair"), encoding="utf-8")
    return copy


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair built for the CPU: small enough to copy for every test that damages one.

    HST_TRT_TEST_BUNDLE names one that is there already, for runs under a sanitizer, where torch would take minutes.
    """
    if given := os.environ.get("HST_TRT_TEST_BUNDLE"):
        return Path(given)
    from hst_trt.builder.build import build_bundle
    from hst_trt.recipe import load_recipe, load_target

    tiny_pair = request.getfixturevalue("tiny_pair")
    with _shared_folder(tmp_path_factory, "tiny-built") as folder:
        recipe = load_recipe(str(tiny_pair.with_name("tiny.toml")))
        return build_bundle(recipe, load_target("cpu"), folder / "tiny-cpu.hstb").bundle.path


@pytest.fixture(scope="session")
def tiny_rtx_bundle(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair with TensorRT-RTX's engines for an A100, which take no GPU to build. Not to be changed: copy it."""
    pytest.importorskip("tensorrt_rtx", reason='needs TensorRT-RTX: pip install "hst_trt[rtx]"')
    from hst_trt.builder.build import build_bundle
    from hst_trt.recipe import load_recipe, load_target

    with _shared_folder(tmp_path_factory, "tiny-rtx") as folder:
        recipe = load_recipe(str(tiny_pair.with_name("tiny.toml")))
        target = load_target("a100").model_copy(update={"backend": "tensorrt-rtx"})
        return build_bundle(recipe, target, folder / "tiny-a100-tensorrt-rtx.hstb").bundle.path


@pytest.fixture(scope="session")
def engine_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair as a bundle of engines that the doubles of TensorRT and CUDA run. Not to be changed.

    HST_TRT_TEST_ENGINES names one that is there already, as HST_TRT_TEST_BUNDLE does for `tiny_bundle`.
    """
    if given := os.environ.get("HST_TRT_TEST_ENGINES"):
        return Path(given)
    from fake_bundle import make_engine_bundle

    from hst_trt.recipe import load_recipe

    tiny_pair = request.getfixturevalue("tiny_pair")
    with _shared_folder(tmp_path_factory, "tiny-engines") as folder:
        final = folder / "tiny-h100.hstb"
        return final if final.is_dir() else make_engine_bundle(load_recipe(str(tiny_pair.with_name("tiny.toml"))), final)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    copy = tmp_path / "copied.hstb"
    shutil.copytree(tiny_bundle, copy)
    return copy


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def hst(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Finished]:
    """Runs `hst-trt` with arguments in this process, in an empty folder and with no bundles but its own.

    An exception that the console script would show as a traceback fails the test.
    """
    from hst_trt.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HST_TRT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment was read long ago

    def run(*arguments: object) -> Finished:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["hst-trt", *map(str, arguments)])
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
        assert "Traceback" not in err.getvalue()
        return Finished(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    return run
