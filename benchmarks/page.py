"""Writes docs/results.md and its figures from what the benchmarks left in benchmarks/results/. Nothing is measured here.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hst_trt.compare.run import Figure
from hst_trt.plots import frontier_figure, save_figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
AIM_GAIN, AIM_RIVAL, AIM_SPEED, AIM_FIT, AIM_HOST = 1.2, 1.05, 0.05, 0.99, 1.03
PLANNED = (
    "asked",
    "options",
    "PSNR over the nearest baseline as fast, dB",
    "that baseline",
    "times as fast as the large model alone at equal PSNR",
    "and as it is run by diffusers",
)
SHOWN_FROM = 1.2
"""Speed-up from which the plot shows rows: the baseline itself and what is slower say nothing of the frontier."""


def span(figure: Mapping[str, float] | None, digits: int = 2, scale: float = 1.0) -> str:
    """A value with its interval."""
    if figure is None:
        return "-"
    value, low, high = (f"{scale * figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(line)} |" for line in lines), ""]


def machine(content: Mapping[str, Any]) -> str:
    about = content["machine"]
    return (
        f"{about['cpu']}, {about.get('threads', 1)} thread{'s' if about.get('threads', 1) != 1 else ''} a call, {about['date']}"
    )


def frontier(content: Mapping[str, Any]) -> list[str]:
    rows = {row["name"]: row for row in content["rows"]}
    lines = [
        "## Frontier\n",
        f"{content['prompts']} held-out prompts, each with a seed of its own, by every row in turn; {machine(content)}.",
        "Speed-ups are of the denoising loop, picture by picture over 28 large steps as diffusers takes them; medians.",
        f"PSNR, SSIM and feature distance are to the converged large model: `{content['reference']}`.",
        "KID x 1000 is to 500 real scenes of other prompts; right: pictures that show all that was asked for and nothing else.",
        "In brackets 95 % intervals over prompts. `best` in a name: `--solver ab2 --timestep-spacing trailing --shift 4`.\n",
        "![speed against distance](images/frontier.png)\n",
    ]
    body = []
    for family, names in content["families"].items():
        for name in names:
            row = rows[name]
            far = row["to_converged"]
            body.append(
                [
                    family if name == names[0] else "",
                    name,
                    f"{row['speedup']['median']:.2f}x",
                    span(far["psnr"]),
                    f"{far['ssim']['value']:.3f}",
                    f"{far['feature distance']['value']:.4f}" if "feature distance" in far else "-",
                    span(row["kid"], 1, 1000),
                    span(row["right"], 1, 100),
                ]
            )
    base = rows["large"]
    far = base["to_converged"]
    first = ["baseline", "large, 28 steps", "1.00x", span(far["psnr"]), f"{far['ssim']['value']:.3f}"]
    first += [f"{far['feature distance']['value']:.4f}", span(base["kid"], 1, 1000), span(base["right"], 1, 100)]
    lines += table(("", "schedule", "speed-up", "PSNR, dB", "SSIM", "features", "KID x 1000", "right, %"), [first, *body])
    lines += ["What the planner chose, as options of `hst-trt run`:\n"]
    lines += table(
        PLANNED,
        [
            [
                f"{asked}x",
                f"`{rows[name]['options']}`",
                span(content["over_best_baseline"].get(name)),
                content["over_best_baseline"].get(name, {}).get("baseline", "-"),
                span(content["gain"].get(name), 3),
                over_diffusers(rows, content, name),
            ]
            for asked, name in content["planned"].items()
        ],
    )
    over, gain = content["over_best_baseline"], content["gain"]
    held = {
        "nearer by PSNR than the nearest baseline as fast (to 2 %), the interval of the paired difference above 0": [
            asked for asked, name in content["planned"].items() if name in over and over[name]["low"] > 0
        ],
        "nearer than that baseline by feature distance": [
            asked for asked, name in content["planned"].items() if name in over and features(rows, name, over[name]["baseline"])
        ],
        f"{AIM_GAIN - 1:.0%} faster than the large model alone at equal PSNR (the aim)": [
            asked for asked, name in content["planned"].items() if name in gain and gain[name]["low"] >= AIM_GAIN
        ],
    }
    lines += [f"- {claim}: {', '.join(f'{asked}x' for asked in which) or 'none'}" for claim, which in held.items()]
    lines += [""]
    return lines


def features(rows: Mapping[str, Any], name: str, other: str) -> bool:
    """Whether a row is nearer than another by feature distance."""
    mine, theirs = (rows[one]["to_converged"]["feature distance"]["value"] for one in (name, other))
    return bool(mine < theirs)


def over_diffusers(rows: Mapping[str, Any], content: Mapping[str, Any], name: str) -> str:
    """How much faster a row is than fewer steps of diffusers' own sampling with the same mean PSNR, read off between them."""
    family = next(names for family, names in content["families"].items() if family.endswith("as diffusers runs it"))
    curve = sorted((rows[one]["to_converged"]["psnr"]["value"], rows[one]["speedup"]["median"]) for one in [*family, "large"])
    levels, speeds = zip(*curve, strict=True)
    mine = rows[name]["to_converged"]["psnr"]["value"]
    if mine > levels[-1]:
        return f"more than {rows[name]['speedup']['median']:.2f}: nearer than 28 of those steps"
    return f"{rows[name]['speedup']['median'] / np.exp(np.interp(mine, levels, np.log(speeds))):.2f}"


def draw_frontier(content: Mapping[str, Any]) -> None:
    rows = {row["name"]: row for row in content["rows"]}
    kinds = {}
    for family, names in content["families"].items():
        points = [(name, rows[name]["speedup"]["median"], Figure(**rows[name]["to_converged"]["psnr"])) for name in names]
        kinds[family] = sorted((point for point in points if point[1] >= SHOWN_FROM), key=lambda point: point[1])
    joined = [family for family in kinds if family.startswith(("planner", "large"))]
    save_figure(
        frontier_figure(kinds, "PSNR to the converged large model, dB", joined=joined), DOCS / "images" / "frontier.png"
    )


def planner(content: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Planner\n",
        f"What was promised, and what came ({machine(content)}, interleaved rounds); and the choice beside 50 schedules",
        "of its own space, drawn at random among those of the same predicted cost; distance is what the planner minimises, the",
        f"geometric mean of those of latents and of features, on {content['prompts']} held-out prompts.\n",
    ]
    body = []
    for asked, row in content["asked"].items():
        took = row["measured"]
        body.append(
            [
                f"{asked}x",
                f"{row['predicted']:.2f}x",
                f"{took['median']:.3f}x ({took['q25']:.3f} to {took['q75']:.3f})" if took else "-",
                f"{row['distance']:.4f}",
                f"{row['best_rival']['distance']:.4f}",
                span(row["over_best_rival"], 3),
                f"{row['rivals_nearer']} of {row['rivals']}",
            ]
        )
    head = ("asked", "predicted", "measured (quartiles)", "distance", "the best at random", "over it", "at random nearer")
    lines += table(head, body)
    speeds = all(
        row["measured"] and abs(row["measured"]["median"] / float(a) - 1) <= AIM_SPEED for a, row in content["asked"].items()
    )
    rivals = all(row["over_best_rival"]["value"] <= AIM_RIVAL for row in content["asked"].values())
    lines += [
        f"- Aim: measured within {AIM_SPEED:.0%} of what was asked for. {'Reached' if speeds else 'Not reached'}.",
        f"- Aim: not beaten by more than {AIM_RIVAL - 1:.0%} by any at random. {'Reached' if rivals else 'Not reached'}.\n",
    ]
    return lines


def fits(content: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Cost\n",
        "Time over image tokens of a large call, over steps, and over images of a request; medians of",
        f"{content['rounds']} interleaved rounds, straight lines by least squares ({machine(content)}).\n",
        "![fits of time against tokens, steps and images](images/cost_fits.png)\n",
    ]
    body = [
        [name, f"{1e3 * one['fit']['at_zero']:.2f}", f"{1e3 * one['fit']['each']:.3f}", f"{one['fit']['r2']:.4f}"]
        for name, one in content["series"].items()
    ]
    lines += table(("over", "ms at none", "ms for each", "R^2"), body)
    reached = all(one["fit"]["r2"] >= AIM_FIT for one in content["series"].values())
    return [*lines, f"- Aim: R^2 of {AIM_FIT} or more. {'Reached' if reached else 'Not reached'}.\n"]


def beside(content: Mapping[str, Any]) -> list[str]:
    about = content["machine"]
    lines = [
        "## Beside other systems\n",
        "The same pair, prompts, seeds and machine, one picture of each system in turn",
        f"({about['cpu']}, threads: {about['threads']}, {about['date']}, {about['rounds']} rounds);",
        "all of it is in [beside_others.md](../benchmarks/results/beside_others.md).\n",
    ]
    body = [
        [name, f"{1e3 * row['seconds']['median']:.0f}", "the same" if row["same_pictures"] else f"others, {row['psnr']} dB"]
        for name, row in content["systems"].items()
    ]
    lines += table(("system", "request, ms", "pictures"), body)
    lines += table(
        ("", "as fast as", "at least", "measured", ""),
        [
            [
                t["ours"],
                t["other"],
                f"{t['at_least']}",
                span(content["ratios"][t["ours"]].get(t["other"], {}).get("seconds"), 2),
                t["verdict"],
            ]
            for t in content["targets"]
        ],
    )
    return lines


def variants(content: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Variants\n",
        f"Each beside the large model alone at the same cost (cost model), on {content['prompts']} prompts, all with",
        "`--solver ab2 --timestep-spacing trailing --shift 4`: below 1 is nearer. Masked calls are read off full ones, a bound",
        "from above. Letters: `benchmarks/variants.py`. What was made of it: [experiments](experiments.md).\n",
    ]
    body = [
        [
            row["about"], f"`{row['steps']}`", f"{row['cost']:.2f}", f"{row['distance']:.4f}",
            span(row["over_large_alone"], 3), span(row["features_over_large_alone"], 3),
        ]
        for row in content["variants"]
    ]  # fmt: skip
    head = ("variant", "steps", "large calls", "latents", "over the large model alone", "features over it alone")
    lines += table(head, body)
    lines += [
        "\nWhy the small model does not pay here: how much of the large model's change since the step before is told by the",
        "small one's (as it is, and with the best factor), by its conditional half, and by the large model's own change before",
        "(with the best factor): 1 is all, 0 nothing, below 0 it is better to take no change at all. 12 steps.\n",
    ]
    names = ("step", "sigma", "change", "small", "small, scaled", "half", "past")
    return [*lines, *table(names, [[f"{row[name]:g}" for name in names] for row in content["foretold"]])]


def text(content: Mapping[str, Any]) -> list[str]:
    lines = [
        "\n## Text stream from the cache\n",
        "Masked calls that do not compute the text stream, and take its keys and values from the last full call: real runs of",
        f"`ras` in torch, {content['prompts']} prompts. `over`: distance over that of the same run with the text computed.\n",
    ]
    body = [
        [
            f"{row['steps']}", f"{','.join(map(str, row['stages']))}, {row['refresh']}", f"{row['ratio']:g}",
            f"{row['cost']:.2f}", f"{row['cost_without_text'] / row['cost'] - 1:+.1%}",
            span(row["latents_over"], 3), span(row["features_over"], 3),
        ]
        for row in content["rows"]
    ]  # fmt: skip
    return [
        *lines,
        *table(("steps", "stages, refresh", "ratio", "large calls", "cost", "latents, over", "features, over"), body),
    ]


def host(content: Mapping[str, Any]) -> list[str]:
    rows = content["rows"]
    lines = [
        "\n## C++ host\n",
        f"The same requests to the C++ host and to Python in turn ({machine(content)}), pictures written; the last row is",
        "`hst-trt-host` and `hst-trt run` as whole processes.\n",
    ]
    body = [
        [
            name, f"{row['Python']['median'] * 1000:.0f}", f"{row['C++']['median'] * 1000:.0f}",
            span(row["over_python"], 3), f"{row['largest_difference']}/255" if "largest_difference" in row else "-",
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    *runs, start = rows.values()
    slow = max(row["over_python"]["high"] for row in runs)
    lines += table(("request", "Python, ms", "C++, ms", "C++ over Python", "largest difference of a pixel"), body)
    return [
        *lines,
        f"- Aim: no slower, upper ends at most {AIM_HOST}. {'Reached' if slow <= AIM_HOST else 'Not reached'}.",
        f"- Aim: starts faster. {'Reached' if start['over_python']['high'] < 1 else 'Not reached'}.",
    ]


def main() -> None:
    parts = {
        "frontier": frontier, "planner_check": planner, "beside_others": beside, "cost_fits": fits, "variants": variants,
        "text_cache": text, "host": host,
    }  # fmt: skip
    lines = [
        "# Results\n",
        "Made by `make results` on the demo pair; every figure was measured, by the scripts in `benchmarks/`.\n",
    ]
    for name, part in parts.items():
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        if name == "frontier":
            draw_frontier(content)
        lines += part(content)
    (DOCS / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
