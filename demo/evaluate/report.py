"""Writes the figures down: a JSON file with everything, and the model card's section with what a reader wants to know."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from demo.errors import DemoError
from hst_trt.machine import cpu_model

BEGIN, END = "<!-- figures: made by make demo-eval -->", "<!-- end of figures -->"

TITLES = {
    "scene": "the prompts' own scenes",
    "decoded": "the same through the VAE",
    "large": "large alone",
    "hybrid": "hybrid",
    "split": "large, then small",
    "random": "hybrid, random mask",
    "fewer": "large alone, fewer steps",
    "small": "small alone",
}
MEASURES = {"right": "prompts right", "psnr": "PSNR", "ssim": "SSIM", "feature distance": "feature distance", "kid": "KID"}
SCALES = {"right": (100, 1), "psnr": (1, 2), "ssim": (1, 3), "feature distance": (1, 4), "kid": (1000, 1)}
"""What a measure is multiplied by in print, and its digits."""

FIDELITY = ("PSNR, dB", "SSIM", "feature distance")
LESS_IS_BETTER = ("feature distance", "kid")


def machine() -> dict[str, Any]:
    """Date, processor and versions, as the other results of `benchmarks/` have them."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "os": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in ("hst_trt", "onnxruntime", "numpy", "torch")},
    }


def replaced(card: str, section: str) -> str:
    """The card with the section between its markers, which are added at its end if it has none.

    Raises:
        DemoError: only one of the markers is there.
    """
    block = f"{BEGIN}\n{section.strip()}\n{END}"
    if BEGIN not in card and END not in card:
        return f"{card.rstrip()}\n\n## Figures\n\n{block}\n"
    before, begun, rest = card.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise DemoError(f"the model card has not both of its markers, {BEGIN} before {END}: put them back")
    return before + block + after


def section(content: Mapping[str, Any]) -> str:
    """The model card's Markdown, from what the JSON file holds."""
    figures, made = content["figures"], content["machine"]
    rows = figures["rows"]
    counts = {n: share["prompts"] for n, share in rows["large"]["right"].items() if n.isdigit()}
    mix = ", ".join(f"{prompts} that name {n}" for n, prompts in counts.items())
    return "\n".join(
        [
            f"Measured by `make demo-eval` on {made['date']}, from the weights with the fingerprint "
            f"`{content['fingerprint'][:12]}`, on {made['cpus']} CPUs ({made['cpu']}): {sum(counts.values())} held-out prompts "
            f"({mix}), one picture each, the same noise for every row. Held out: no caption of the training set, though of the "
            "same words. In brackets 95 % intervals. All figures: `benchmarks/results/demo_eval.json`; what the "
            "classifier saw in each picture: `benchmarks/results/demo_eval_prompts.csv`.",
            "",
            *_warnings(content["classifier"]),
            *_accuracies({**figures["anchors"], **rows}, counts),
            "",
            "Right: the classifier sees every object that the prompt names, and no other one. In order: of the right pictures "
            "with several objects, those that have them from left to right as the caption's scene has. Faster: the denoising "
            "loop against the large model's, measured prompt by prompt in turn.",
            "",
            *_table(("nearness to large alone, same seed", *FIDELITY), _fidelity(rows)),
            "",
            *_table(("difference", "points right", *FIDELITY, "KID x 1000"), _differences(figures["differences"])),
            "",
            *_verdicts(figures["differences"]),
            *_targets(figures["targets"]),
            *_plans(rows, content["choice"]["costs"]),
            *_classifier(content["classifier"]),
            "",
            "Pictures: `docs/images/demo_eval.png`, the first prompts of the set by four rows; `docs/images/demo_loss.png`, "
            "both loss curves (their numbers: `demo/results/`).",
        ]
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def _accuracies(rows: Mapping[str, Any], counts: Iterable[str]) -> list[str]:
    objects = [f"{n} object{'' if n == '1' else 's'}" for n in counts]
    lines = []
    for name, row in rows.items():
        faster = f"{row['loop_speedup']['median']:.2f}x" if "loop_speedup" in row else ""
        shares = [_percent(row["right"].get(key)) for key in ("all", *counts, "in order, where right")]
        lines.append([TITLES[name], faster, *shares, _value(row["kid"], *SCALES["kid"])])
    return _table(("", "faster", "prompts right", *objects, "in order", "KID x 1000"), lines)


def _fidelity(rows: Mapping[str, Any]) -> list[list[str]]:
    keys = ("psnr", "ssim", "feature distance")
    return [[TITLES[name], *(_value(row[key], *SCALES[key]) for key in keys)] for name, row in rows.items() if "psnr" in row]


def _differences(differences: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for pair, entry in differences.items():
        first, second = pair.split(" - ")
        cells = [_value(entry.get(key), *scale, sign=True) for key, scale in SCALES.items()]
        lines.append([f"{TITLES[first]} less {TITLES[second]}", *cells])
    return lines


def _percent(share: Mapping[str, Any] | None) -> str:
    return f"{share['value']:.1%} ({100 * share['low']:.1f} to {100 * share['high']:.1f})" if share else ""


def _value(figure: Mapping[str, Any] | None, scale: float, digits: int, *, sign: bool = False) -> str:
    if figure is None:
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{scale * figure['value']:{form}} ({scale * figure['low']:{form}} to {scale * figure['high']:{form}})"


def _warnings(classifier: Mapping[str, Any]) -> list[str]:
    if classifier["fit"]:
        return []
    return [
        f"**The classifier is not fit to judge**: it names the objects of {classifier['scenes']['value']:.1%} of held-out real "
        f"scenes and {classifier['decoded']['value']:.1%} of decoded ones, and {classifier['required']:.0%} are required. "
        "The columns of right prompts mean little.",
        "",
    ]


def _verdicts(differences: Mapping[str, Any]) -> list[str]:
    """In words, what each difference amounts to: better or worse only where its interval leaves out 0."""
    lines = []
    for pair, entry in differences.items():
        first, second = pair.split(" - ")
        words: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
        for key, name in MEASURES.items():
            if key in entry:
                words[verdict(entry[key], less_is_better=key in LESS_IS_BETTER)].append(name)
        told = "; ".join(f"{word} in {', '.join(names)}" for word, names in words.items() if names)
        lines.append(f"- {TITLES[first]} against {TITLES[second]}: {told}.")
    return lines


def verdict(difference: Mapping[str, Any], *, less_is_better: bool) -> str:
    if difference["low"] <= 0 <= difference["high"]:
        return "not told apart"
    return "better" if (difference["value"] < 0) == less_is_better else "worse"


def _targets(targets: Mapping[str, Any]) -> list[str]:
    points, share = targets["two-object points"], targets["kid share"]
    return [
        f"- Of two-object prompts the large model draws {100 * points['value']:.1f} points more right than the small one "
        f"({100 * points['low']:.1f} to {100 * points['high']:.1f}; the aim was {100 * points['target']:.0f}: "
        f"{'met' if points['met'] else 'not met'}). Its KID is {share['value']:.2f} of the small one's ({share['low']:.2f} to "
        f"{share['high']:.2f}; the aim was {share['target']} at most: {'met' if share['met'] else 'not met'}).",
    ]


def _plans(rows: Mapping[str, Any], costs: Mapping[str, Any]) -> list[str]:
    plans = "; ".join(
        f"{TITLES[name]}: {row['plan']} (predicted {row['predicted_speedup']:.2f}x)" for name, row in rows.items()
    )
    masked = ", ".join(f"{cost:.2f} with {tokens} tokens" for tokens, cost in costs["large"].items())
    return [
        f"- Measured calls: a small one costs {costs['small']:.2f} of a large one, so the small model alone is "
        f"{1 / costs['small']:.2f}x faster, and no plan of as many steps is more; a large one {masked}.",
        f"- Plans: {plans}. What call costs left open was chosen on other prompts, by nearness to the large model.",
    ]


def _classifier(classifier: Mapping[str, Any]) -> list[str]:
    spoiled = ", ".join(f"{way} {_percent(share)}" for way, share in classifier["spoiled"].items())
    scenes, decoded = classifier["scenes"], classifier["decoded"]
    return [
        f"- The classifier names all objects and no others in {_percent(scenes)} of {scenes['prompts']} held-out real scenes, "
        f"and in {_percent(decoded)} of {decoded['prompts']} decoded ones. Spoiled objects that it takes for whole: {spoiled}."
    ]
