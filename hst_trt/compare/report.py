"""A comparison as one JSON object, and as one HTML page that needs no other file: frontier, figures, pictures with masks."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..images import mask_picture
from ..pipeline import HybridStitchPipeline
from .gallery import Case
from .run import CONVERGED, Compared, Comparison, Figure

__all__ = ["as_dict", "as_html", "points"]

SHOWN = 6
"""Prompts whose pictures the page shows."""

WIDEST = 256
"""Pixels of a shown picture's longer side."""

COLUMNS = {  # of the measures: title, digits
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "feature distance": ("feature distance", 4),
    "lpips": ("LPIPS", 4),
}


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "prompts": len(comparison.cases),
        "reference": comparison.reference.options,
        "measures": list(comparison.measures),
        "notes": list(comparison.notes),
        "rows": [_row(one) for one in comparison.rows],
    }


def _row(one: Compared) -> dict[str, Any]:
    return {
        "name": one.row.name,
        "options": one.row.options,
        "steps": len(one.plan.steps),
        "stages": {stage.value: count for stage, count in one.plan.stage_lengths.items()},
        "loop_seconds": one.loop_seconds.to_dict(4),
        "total_seconds": one.total_seconds.to_dict(4),
        "speedup": one.speedup.to_dict(4),
        "to_converged": _means(one.to_converged),
        "to_same_steps": _means(one.to_same_steps),
        "kid": one.kid and one.kid.to_dict(),
        "clip": one.clip and one.clip.to_dict(),
        "fid": None if one.fid is None else round(one.fid, 3),
        "right": one.right and one.right.to_dict(),
    }


def _means(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {key: Figure.mean(each).to_dict() for key, each in values.items()}


def points(comparison: Comparison) -> dict[str, list[tuple[str, float, Figure]]]:
    """What the frontier's plot shows: by kind of schedule its name, speed-up, and distance in the first measure."""
    kinds: dict[str, list[tuple[str, float, Figure]]] = {}
    for one in sorted(comparison.rows, key=lambda row: row.speedup.median):
        plan = one.plan
        kind = "both models" if plan.uses_large and plan.uses_small else "small alone" if plan.uses_small else "large alone"
        if kind == "large alone" and plan.mask is not None:
            kind = "large alone, masked"
        figure = Figure.mean(one.to_converged[comparison.measures[0]])
        kinds.setdefault(kind, []).append((one.row.name, one.speedup.median, figure))
    return kinds


def as_html(comparison: Comparison, pipeline: HybridStitchPipeline, title: str, frontier: str) -> str:
    """The page.

    Args:
        pipeline: draws the masks of the pictures that are shown.
        frontier: the plot, as SVG.
    """
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in comparison.notes)
    shown = "".join(_pictures(case, comparison, pipeline) for case in comparison.cases[:SHOWN])
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<p>{len(comparison.cases)} prompts, one picture each, the same noise for every schedule. Speed-up: of the denoising loop over
the schedule <i>{html.escape(comparison.rows[0].row.name)}</i>, median of the pictures. Distances: to the large model with
<code>{html.escape(comparison.reference.options)}</code>, and in the last column PSNR to the large model with as many steps and
the same sampling. In brackets 95 % intervals.</p>
{notes}
<figure>{frontier[frontier.index("<svg") :]}</figure>
{_table(comparison)}
<h2>Pictures</h2>
{shown}
</html>
"""


def _table(comparison: Comparison) -> str:
    heads = ["schedule", "speed-up", "seconds", *(COLUMNS[key][0] for key in comparison.measures)]
    last = ("kid", "KID, x 1000"), ("fid", "FID"), ("clip", "CLIP score"), ("right", "right, %")
    there = {key: title for key, title in last if getattr(comparison.rows[0], key) is not None}
    heads += [*there.values(), "PSNR to as many steps"]
    lines = []
    for one in sorted(comparison.rows, key=lambda row: row.speedup.median):
        cells = [f"{one.speedup.median:.2f}x", f"{one.total_seconds.median:.3f}"]
        cells += [_cell(Figure.mean(one.to_converged[key]), COLUMNS[key][1]) for key in comparison.measures]
        made = {"kid": _cell(one.kid, 1, 1000), "clip": _cell(one.clip, 2), "right": _cell(one.right, 1, 100)}
        made["fid"] = "" if one.fid is None else f"{one.fid:.1f}"
        cells += [made[key] for key in there]
        cells += [_cell(Figure.mean(one.to_same_steps["psnr"]), 2) if one.to_same_steps else "the same"]
        name = f"<th>{html.escape(one.row.name)}<br><code>{html.escape(one.row.options)}</code></th>"
        lines.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    titles = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(figure: Figure | None, digits: int, scale: float = 1) -> str:
    if figure is None:
        return ""
    value, low, high = (f"{scale * number:.{digits}f}" for number in (figure.value, figure.low, figure.high))
    return f"{value} <small>({low} to {high})</small>"


def _pictures(case: Case, comparison: Comparison, pipeline: HybridStitchPipeline) -> str:
    """A prompt's pictures by every schedule, and the masks of those that have any."""
    drawn = comparison.gallery[case].pictures
    figures = [_figure(Image.fromarray(drawn[CONVERGED]), "the reference")]
    for one in comparison.rows:
        figures.append(_figure(Image.fromarray(drawn[one.row.name]), one.row.name))
        if one.plan.mask is not None:
            height, width = drawn[one.row.name].shape[:2]
            output = pipeline(
                case.prompt, seed=case.number, height=height, width=width, keep_masks=True, **one.row.arguments(case.number)
            )
            sheet = mask_picture(output.images[0], output.masks, output.plan, tile=64)
            figures.append(_figure(sheet, f"masks of {one.row.name}", wide=True))
    return f"<h3>{html.escape(case.prompt)}</h3><div class=row>{''.join(figures)}</div>"


def _figure(image: Image.Image, caption: str, *, wide: bool = False) -> str:
    if not wide:
        image.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    source = base64.b64encode(file.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #8884; }
tbody th { font-weight: 600; }
code, small { font-size: .8rem; font-weight: 400; opacity: .75; }
figure { margin: 0; }
figure svg { max-width: 100%; height: auto; background: #fff; }
figcaption { font-size: .8rem; max-width: 16rem; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-end; }
"""
