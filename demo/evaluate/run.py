"""The whole evaluation, part by part; each part finds what an earlier, stopped run of it left in the work folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import hst_trt
from demo import scenes
from demo.errors import DemoError
from demo.evaluate import classifier, heldout, lessons, measure, plans, report, spoil
from demo.evaluate.choose import Choice, choose
from demo.evaluate.figures import summary
from demo.evaluate.judge import Judge, fitness
from demo.evaluate.publish import CARD, publish
from demo.packages import fetch
from demo.scenes import SIZE, Sprites
from hst_trt import codec, denoise, noise, plan, schedule, workspace
from hst_trt.builder.build import build_bundle
from hst_trt.compare import features, measures
from hst_trt.compare.gallery import Gallery
from hst_trt.compare.store import digest
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.recipe import PACKAGE_PREFIX, Recipe, load_recipe, load_target

NEEDED_BYTES = 1_500_000_000
CHOOSING = 16
"""Prompts that plans are chosen on."""


@dataclass(frozen=True)
class Setting:
    """`work`: the folder that the pair was made in, if it was made here; results of parts are kept below it. `out`: a
    checkout, or a folder to write to instead. `threads`: of a call; 0 for every core."""

    work: Path
    out: Path
    recipe: str = "demo"
    prompts: int = 500
    threads: int = 0


def evaluate(setting: Setting) -> bool:
    """Runs every part and writes the results; returns whether the classifier was fit to judge.

    Raises:
        DemoError, HstError: something outside is missing or wrong; what was done is kept.
    """
    kept = setting.work / "eval"
    kept.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(kept).free
    if free < NEEDED_BYTES:
        raise DemoError(f"{kept} has {free / 1e9:.1f} GB free, {NEEDED_BYTES / 1e9:.1f} are needed: give another --work")
    network = features.Features()  # without it, and without a place in the card, all the rest would be in vain
    report.replaced(CARD.read_text(encoding="utf-8"), "")
    say("about 40 minutes on two idle cores in all; the same command goes on where it was stopped")
    recipe = load_recipe(setting.recipe)
    vae = pair_folder(recipe) / "vae"
    sprites = Sprites(fetch(setting.work))
    pipeline = open_pipeline(recipe, kept, setting.threads)
    known = heldout.training_captions(setting.work, kept, sprites)
    cases = heldout.held_out(sprites, known, 2 * setting.prompts + CHOOSING)
    asked, others, choosing = cases[: setting.prompts], cases[setting.prompts : -CHOOSING], cases[-CHOOSING:]
    say(f"{len(asked)} held-out prompts, the first one: {asked[0].prompt}")

    seer, school, eyes, decode = taught(pipeline, vae, kept, sprites)

    fingerprint = pipeline.bundle.manifest.fingerprint
    choice = choose(pipeline, choosing, kept / f"plans-{_key(fingerprint, plans, *(case.prompt for case in choosing))}")
    for name, row in choice.rows.items():
        say(f"{name}: {row}, {choice.record['predicted'][name]:.2f}x predicted")
    rows_as_text = json.dumps({name: asdict(row) for name, row in choice.rows.items()})
    drawn = _key(fingerprint, rows_as_text, codec, denoise, noise, plan, schedule, workspace)
    gallery = Gallery(kept / f"pictures-{drawn}", choice.rows)
    announce(choice, len(gallery.missing(asked)))
    gallery.draw(pipeline, asked, say)

    looked = _key(drawn, eyes, measure, features, measures, *(case.prompt for case in asked + others))
    judge = Judge(kept / f"measured-{looked}", seer, network, sprites, decode)
    rows, anchors, real = judge.rows(gallery, asked), judge.anchors(asked), judge.scenes(others)
    fit = fitness([(anchors["scene"], asked), (real, others)], (anchors["decoded"], asked))
    if not fit["fit"]:
        real_share, decoded_share = fit["scenes"]["value"], fit["decoded"]["value"]
        say(
            f"WARNING: the classifier names the objects of {real_share:.1%} of real and {decoded_share:.1%} of decoded scenes, "
            f"{fit['required']:.0%} are required: prompt accuracies mean little"
        )
    manifest = pipeline.bundle.manifest
    counts = {"threads": setting.threads, "prompts": len(asked), "real_scenes": len(others)}
    content = {
        "machine": report.machine(),
        "fingerprint": fingerprint,
        "weights": {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".safetensors")},
        "request": manifest.defaults.model_dump() | counts,
        "classifier": fit | {"spoiled": judge.spoiled(school)},
        "choice": choice.record,
        "figures": summary(choice, [gallery[case] for case in asked], rows, anchors, real, asked),
    }
    shipped = recipe.large.source.startswith(PACKAGE_PREFIX)
    publish(setting.work, setting.out, content, asked, rows, gallery, pair_folder(recipe) if shipped else None)
    return bool(fit["fit"])


def taught(
    pipeline: HybridStitchPipeline, vae: Path, kept: Path, sprites: Sprites
) -> tuple[classifier.Classifier, Path, str, lessons.RoundTrip]:
    """The classifier, the folder of its lessons, the name it is kept under, and the decoder that the lessons went through."""
    decode = lessons.round_trip(pipeline, vae)
    school = kept / f"lessons-{_key(*vae.glob('*.safetensors'), scenes, spoil, lessons)}"
    eyes = f"{school.name}-{_key(classifier)}"
    learn = lessons.make_lessons(school, sprites, decode)
    check = lessons.make_lessons(school, sprites, decode, lessons.CHECK_SEED, lessons.FEW, spoiled=0.0)
    return classifier.taught(kept / f"{eyes}.pt", learn, check), school, eyes, decode


def say(text: str) -> None:
    print(text, flush=True)


def pair_folder(recipe: Recipe) -> Path:
    """The directory of a recipe's pair: data of the package, or a local one."""
    source = recipe.large.source
    folder = Path(source)
    if source.startswith(PACKAGE_PREFIX):
        folder = Path(hst_trt.__file__).parent / "data" / source.removeprefix(PACKAGE_PREFIX)
    if not (folder / "vae").is_dir():
        raise DemoError(f"{folder} is no pair with a VAE: make one with `make demo-pair`, or give another --recipe")
    return folder


def open_pipeline(recipe: Recipe, folder: Path, threads: int) -> HybridStitchPipeline:
    """On the recipe's CPU bundle, which is built in `folder` unless it is there; the demo pair's takes seconds."""
    bundle = build_bundle(recipe, load_target("cpu"), folder / f"{recipe.name}-cpu.hstb").bundle
    size = (bundle.manifest.defaults.height, bundle.manifest.defaults.width)
    if size != (SIZE, SIZE):
        raise DemoError(f"the bundle draws {size[0]}x{size[1]} by default, the scenes are {SIZE}x{SIZE}: correct the recipe")
    return HybridStitchPipeline.from_bundle(bundle.path, threads=threads)


def announce(choice: Choice, prompts: int) -> None:
    """Says how long drawing will take, from the measured calls and a tenth more for what is not a transformer's."""
    calls = choice.record["calls"]
    full, vae = (calls[name]["seconds"]["median"] for name in ("large full", "vae"))
    large_calls = sum(choice.rows["large"].steps / speedup for speedup in choice.record["predicted"].values())
    seconds = prompts * (1.1 * full * large_calls + (vae + 0.05) * len(choice.rows))
    say(f"{prompts} prompts left to draw by {len(choice.rows)} rows: about {seconds / 60:.0f} min")


def _key(*parts: Path | str | ModuleType) -> str:
    """A hash over files, texts, and the sources of modules."""
    return digest(*(Path(str(part.__file__)) if isinstance(part, ModuleType) else part for part in parts))
