"""Part 2: engines are built and run, and what they compute is what float32 computes on the CPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hst_trt.builder.build import build_bundle
from hst_trt.builder.detect import detect_target
from hst_trt.builder.tensorrt import EngineProgress
from hst_trt.errors import NumericsError
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.recipe import Recipe, Target, load_recipe, load_target
from hst_trt.validate import TOLERANCES, Parity, error_of, validate

from .journal import Journal, Skip
from .settings import ROOT, Settings
from .subjects import Subject, begin, make_a_plan, masked_tokens

__all__ = ["built", "gpu_tests", "onnxruntime", "psnr", "subject_of", "target_for", "tensorrt", "tensorrt_rtx", "torch_parity"]

LEAST_PSNR = {"float32": 60.0, "float16": 40.0, "bfloat16": 30.0}
"""dB between a picture and the CPU's in float32 of the same seed, drawn by one model alone. With both transformers in torch
on a CPU, three prompts gave 90, 60 and 46 dB at least; two different pictures have about 10."""

_EXACT = {"float32": 1e-4, "bfloat16": 3e-2}  # largest error of a masked call beside the full call in the same precision
_PROMPT = "a red apple on a blue background"


# -- engines of bundles --------------------------------------------------------------------------------------------------
def tensorrt(journal: Journal, settings: Settings) -> None:
    accept_bundles(journal, settings, "tensorrt")


def tensorrt_rtx(journal: Journal, settings: Settings) -> None:
    accept_bundles(journal, settings, "tensorrt-rtx")


def onnxruntime(journal: Journal, settings: Settings) -> None:
    accept_bundles(journal, settings, "onnxruntime")


def accept_bundles(journal: Journal, settings: Settings, backend: str) -> None:
    """Builds bundles, and compares every engine with the float32 twin of its graph and whole pictures with the CPU's.

    The tiny pair of random weights comes first, because it is quick; then the demo pair, which draws something.
    """
    for precision in ["bfloat16", "float32"] if backend != "onnxruntime" else ["float32"]:
        for pair in ("tiny", "demo"):
            label = f"{pair} {precision}"
            bundle = None
            with journal.check(f"{label}: builds"):
                bundle = built(journal, settings, pair, backend, precision)
            if bundle is None:
                continue
            with journal.check(f"{label}: every engine and bucket equals its graph in float32"):
                compare_engines(journal, label, bundle)
            if pair == "demo":
                with journal.check(f"{label}: pictures equal those of the CPU"):
                    compare_pictures(journal, label, settings, bundle, precision)


def target_for(backend: str, precision: str) -> Target:
    """The target of the GPU that is here, or of the CPU, with another backend and precision than its own."""
    if backend == "onnxruntime":
        return load_target("cpu")
    return load_target(detect_target()).model_copy(update={"backend": backend, "precision": precision})


def built(journal: Journal, settings: Settings, pair: str, backend: str, precision: str) -> Path:
    """The bundle of the "tiny" or the "demo" pair, built if no earlier part of this run has done so."""
    recipe = load_recipe("demo") if pair == "demo" else _tiny_recipe(settings)
    return build(journal, settings, recipe, target_for(backend, precision))


def build(journal: Journal, settings: Settings, recipe: Recipe, target: Target) -> Path:
    label = f"{recipe.name}-{target.name}-{target.backend}-{target.precision}"
    engines: dict[str, str] = {}

    def on_engine(progress: EngineProgress) -> None:
        if engines.get(progress.name) != progress.state:
            engines[progress.name] = progress.state
            journal.fact(f"build {label} progress", f"{progress.name} {progress.state}, {progress.number} of {progress.of}")

    outcome = build_bundle(recipe, target, settings.work / f"{label}.hstb", on_engine=on_engine)
    manifest = outcome.bundle.manifest
    journal.fact(
        f"build {label}",
        {
            "backend": f"{manifest.target.backend} {manifest.target.backend_version}".strip(),
            "made": outcome.made,
            "engines": {
                name: {
                    "seconds": engine.seconds,
                    "bytes": manifest.files[engine.path].bytes,
                    "profiles": len(engine.profiles),
                    "activation_bytes": engine.activation_bytes,
                }
                for name, engine in manifest.engines.items()
            },
        },
    )
    return outcome.bundle.path


def _tiny_recipe(settings: Settings) -> Recipe:
    import torch

    from .pairs import recipe_of, tiny_shape, write_pair

    folder = settings.work / "tiny"
    return recipe_of(tiny_shape(), folder) if folder.is_dir() else write_pair(tiny_shape(), folder, "cpu", torch.float16)


def compare_engines(journal: Journal, label: str, bundle: Path) -> None:
    worst: dict[str, Parity] = {}
    shapes: Counter[str] = Counter()

    def on_call(parity: Parity) -> None:
        name = parity.engine
        shapes[name] += 1
        if name not in worst or parity.excess > worst[name].excess:
            worst[name] = parity
        journal.fact(
            f"parity {label}",
            {
                engine: {"shapes": shapes[engine], "worst_error": _number(p.error), "allowed": p.tolerance, "at": p.shape}
                for engine, p in worst.items()
            },
        )

    validate(bundle, on_call=on_call)
    departed = [parity for parity in worst.values() if not parity.holds]
    if departed:
        most = max(departed, key=lambda parity: parity.excess)
        raise NumericsError(
            f"{len(departed)} of {len(worst)} engines depart, most of all {most.engine}",
            found=f"error {most.error:.2g} at {most.shape}, allowed {most.tolerance:g}",
            fix="`hst-trt validate` on that bundle says where it departs first",
        )


def compare_pictures(journal: Journal, label: str, settings: Settings, bundle: Path, precision: str) -> None:
    """Only pictures of one model decide: a stitched one may differ more where a token's score was a near tie."""
    reference = build_bundle(load_recipe("demo"), load_target("cpu"), settings.work / "demo-reference.hstb").bundle.path
    pipelines = [HybridStitchPipeline.from_bundle(path) for path in (bundle, reference)]
    found = {}
    for schedule in ("large", "hybrid", "small"):
        ours, theirs = (np.asarray(draw(_PROMPT, seed=7, schedule=schedule).images[0]) for draw in pipelines)
        difference = int(np.abs(ours.astype(int) - theirs.astype(int)).max())
        found[schedule] = {"psnr_db": _number(psnr(ours, theirs)), "largest_difference": difference}
        journal.fact(f"pictures {label}", found)
    for schedule in ("large", "small"):
        decibel = found[schedule]["psnr_db"]
        if decibel is not None and decibel < LEAST_PSNR[precision]:
            raise NumericsError(
                f"the picture of the {schedule} model is not the CPU's",
                found=f"{decibel:.1f} dB, at least {LEAST_PSNR[precision]:g} are expected in {precision}",
            )


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """dB between two pictures of uint8; infinite where they are equal."""
    error = float(np.square(ours.astype(np.float64) - theirs).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _number(value: float) -> float | None:
    """JSON has no infinity: nothing stands for it."""
    return value if math.isfinite(value) else None


# -- torch ---------------------------------------------------------------------------------------------------------------
def torch_parity(journal: Journal, settings: Settings) -> None:
    """Both transformers of the tiny and the demo pair, full and masked at every bucket, against float32 on the CPU."""
    import torch
    from diffusers import SD3Transformer2DModel

    from .pairs import DEMO_PAIR, make_transformer, tiny_shape
    from .torch_subjects import need_gpu

    need_gpu(settings)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tiny = tiny_shape()
    random = {
        role: make_transformer({**tiny.shared, **own}, "cpu", torch.float32, seed)
        for role, own, seed in (("large", tiny.large, 3), ("small", tiny.small, 4))
    }
    demo = {
        role: SD3Transformer2DModel.from_pretrained(DEMO_PAIR / folder, dtype=torch.float32).eval().requires_grad_(False)
        for role, folder in (("large", "transformer"), ("small", "transformer_small"))
    }
    size = load_recipe("demo").defaults
    for pair, models, grid in (("tiny", random, tiny.grid), ("demo", demo, tiny.spec.grid(size.height, size.width))):
        reference = subject_of(models, "float32", "cpu", grid)
        for precision in ("float32", "bfloat16"):
            subject = subject_of(models, precision, settings.torch_device, grid)
            with journal.check(f"{pair} {precision}: every call equals float32 on the CPU"):
                compare_with_cpu(journal, f"{pair} {precision}", subject, reference, precision)
            with journal.check(f"{pair} {precision}: masked calls are exact on a cache that held no number"):
                check_exactness(journal, f"{pair} {precision}", subject, precision)


def compare_with_cpu(journal: Journal, label: str, subject: Subject, reference: Subject, precision: str) -> None:
    """Each call of `subject` beside the reference's, which computes in float32 on the CPU."""
    expected, found = velocities(reference), velocities(subject)
    errors = {name: _number(error_of(found[name], theirs)) for name, theirs in expected.items()}
    journal.fact(f"torch parity {label}", {"allowed": TOLERANCES[precision], "errors": errors})
    departed = [name for name, error in errors.items() if error is None or error > TOLERANCES[precision]]
    if departed:
        raise NumericsError(f"{len(departed)} of {len(errors)} calls depart", found=", ".join(departed))


def velocities(subject: Subject) -> dict[str, np.ndarray]:
    """What each call gives, by name. Masked calls read a cache that is a step older than their tokens, as in a request.

    Guidance would amplify errors: a scale of 1 gives the velocity with the prompt alone.
    """
    ws = subject.workspace()
    begin(ws, make_a_plan(subject, "hybrid", 4, stages=(1, 2, 1)), guidance_scale=1.0)
    ws.advance()
    found = {}
    ws.large()
    found["large"] = ws._read("velocity")
    ws.small()
    found["small"] = ws._read("sketch")
    ws.latents = ws.latents + np.float32(0.1)
    ws.advance()
    for count in subject.buckets[:-1]:
        masked_tokens(ws, count)
        ws.large_masked(count)
        found[f"large, {count} tokens"] = _active(ws, "refined", count)
    return found


def check_exactness(journal: Journal, label: str, subject: Subject, precision: str) -> None:
    """A full call on a cache of NaN gives numbers, and then a masked call the full call's, whatever its tokens."""
    ws = subject.workspace()
    begin(ws, make_a_plan(subject, "large", 4), guidance_scale=1.0)
    ws.advance()
    for cache in ws._cache_of("large"):
        ws._write(cache, np.float32(np.nan))
    ws.large()
    full = ws._read("velocity")
    errors = {}
    for count in subject.buckets[:-1]:
        masked_tokens(ws, count)
        ws.large_masked(count)
        index = _active(ws, "active", count)[..., None]
        errors[f"{count} tokens"] = _number(error_of(_active(ws, "refined", count), np.take_along_axis(full, index, 1)))
    allowed = _EXACT[precision]
    journal.fact(f"exactness {label}", {"allowed": allowed, "errors": errors})
    departed = [name for name, error in errors.items() if error is None or error > allowed]
    if departed:
        raise NumericsError("masked calls are not the full call on their tokens", found=", ".join(departed))


def _active(ws: Any, name: str, count: int) -> np.ndarray:
    """The first `count` tokens of each image in a buffer that holds as many."""
    images = ws.shape.images
    flat = ws._read(name).reshape(-1)
    each = flat.size // (images * ws.shape.tokens)
    return flat[: images * count * each].reshape((images, count, each) if each > 1 else (images, count))


def subject_of(models: Mapping[str, Any], precision: str, device: str, grid: tuple[int, int]) -> Subject:
    """A copy of a pair's transformers, by role, on a device and in a precision, behind the torch backend."""
    import copy

    import torch

    from hst_trt.spec import PairSpec, TransformerSpec

    from .pairs import tiny_shape
    from .torch_subjects import torch_subject

    tiny = tiny_shape()
    spec = PairSpec(
        large=TransformerSpec.from_config(models["large"].config),
        small=TransformerSpec.from_config(models["small"].config),
        latent_channels=models["large"].config.in_channels,
        patch_size=models["large"].config.patch_size,
        vae_scale=8,
        clip_length=tiny.clip_length,
        t5_length=tiny.t5_length,
    )
    # The base class's: diffusers' own warns of layers to be kept in float32, although there are none.
    moved = {r: torch.nn.Module.to(copy.deepcopy(m), device, getattr(torch, precision)) for r, m in models.items()}
    return torch_subject(f"torch {precision}", moved, spec, grid, device)


# -- the project's own tests ---------------------------------------------------------------------------------------------
def gpu_tests(journal: Journal, settings: Settings) -> None:
    """The tests that need a GPU, the exactness tests among them, as the test suite runs them."""
    marked = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    run_tests(journal, settings, marked, ["-m", "gpu"])


def run_tests(journal: Journal, settings: Settings, files: Sequence[Path], selection: Sequence[str] = ()) -> None:
    """Runs pytest in a process of its own and notes each test's outcome."""
    report = settings.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *selection, *map(str, files)]
    with journal.check("pytest runs"):
        if not files:
            raise Skip("there is no test that needs a GPU")
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"})
        if process.returncode not in (0, 1) or not report.is_file():
            raise RuntimeError(f"pytest ended with {process.returncode}: {process.stdout.strip()[-400:]}")
        outcomes, reasons = read_tests(report)
        journal.fact("tests", {"outcomes": dict(Counter(outcomes.values())), "skipped_because": reasons})
        failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
        if failed:
            raise NumericsError(f"{len(failed)} of {len(outcomes)} tests failed", found=", ".join(failed[:8]))
        if set(outcomes.values()) == {"skipped"}:
            raise Skip("; ".join(reasons) or "all tests are skipped")


def read_tests(report: Path) -> tuple[dict[str, str], list[str]]:
    """The outcome of each test of a JUnit report ("passed", "failed" or "skipped"), and why tests were skipped."""
    outcomes, reasons = {}, set()
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        skipped = case.find("skipped")
        if skipped is not None:
            reasons.add(skipped.get("message") or "no reason given")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcomes[name] = "failed" if failed else "passed" if skipped is None else "skipped"
    return outcomes, sorted(reasons)
