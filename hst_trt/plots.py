"""Figures of measurements, from plain numbers: what calls take, what each step of a schedule takes, where a run's time goes.

Matplotlib is imported inside functions, since nothing that draws images needs it, and its global state is left alone: figures
are made without pyplot, in a style of their own. Colours are told apart without colour vision and in grey, where hatches help.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .disk import translated_disk_errors
from .errors import MissingError, RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "breakdown_figure",
    "frontier_figure",
    "latency_figure",
    "lines_figure",
    "open_folder",
    "save_figure",
    "steps_figure",
    "svg",
]

Quartiles = tuple[float, float, float]
"""The lower quartile, the median, the upper quartile; seconds."""

_INK, _GREY, _FAINT = "#222222", "#777777", "#DDDDDD"
_LARGE, _MIDDLE, _SMALL = "#0B3C5D", "#D5703A", "#9CCDE8"  # dark, middling and light, in grey too
_STAGES = {"large": (_LARGE, ""), "hybrid": (_MIDDLE, "///"), "small": (_SMALL, "")}
_PARTS = {  # colour and hatch, from left to right
    "text": ("#8A8A8A", ""),
    "large": (_LARGE, ""),
    "small": (_SMALL, ""),
    "loop": (_LARGE, ""),
    "glue": (_MIDDLE, "///"),
    "VAE": ("#F2DE9B", ""),
    "other": ("#FFFFFF", "..."),
}
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 11,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "hst_trt",  # the same figure is the same file
}


def latency_figure(
    tokens: Sequence[int],
    large: Sequence[Quartiles],
    model: Sequence[float],
    small: float,
    fit: tuple[float, float, float] | None = None,
    title: str = "Latency of large calls",
) -> Figure:
    """Time of large calls over the image tokens that they compute.

    Args:
        tokens: the buckets, ascending, the last one the full call.
        large: what a call of each takes.
        model: what the cost model predicts, scaled so that it agrees on the full call; seconds.
        small: median of a small call, seconds.
        fit: of a straight line: seconds at no token, seconds per token, R^2.
    """
    most = max(small, *(high for _, _, high in large))
    scale, unit = _unit(most)
    with _styled() as make:
        figure, axes = make(7.2, 4.6)
        middle, reach = _medians(large, scale)
        axes.errorbar(tokens, middle, reach, fmt="o", ms=7, color=_LARGE, capsize=4, zorder=4, label="measured, with quartiles")
        axes.plot(tokens, [scale * s for s in model], color=_MIDDLE, lw=2.2, ls="--", zorder=3, label="cost model")
        if fit is not None:
            at_zero, per_token, r2 = fit
            ends = [scale * (at_zero + per_token * count) for count in (0, tokens[-1])]
            axes.plot((0, tokens[-1]), ends, color=_GREY, lw=1.3, zorder=2, label=f"straight line, R² = {r2:.4f}")
        axes.axhline(scale * small, color="#5AA5CF", lw=2, ls=":", zorder=2, label="a small call")
        axes.set(xlabel="image tokens that the large model computes", ylabel=unit, title=title)
        axes.set(xlim=(0, 1.04 * tokens[-1]), ylim=(0, 1.12 * scale * most), xticks=_readable_ticks(tokens))
        lines, labels = axes.get_legend_handles_labels()
        first = labels.index("measured, with quartiles")
        order = [first, *(i for i in range(len(labels)) if i != first)]
        axes.legend([lines[i] for i in order], [labels[i] for i in order], loc="upper left")
    return figure


def steps_figure(stages: Sequence[str], seconds: Sequence[Quartiles], title: str = "Time of each step") -> Figure:
    """Time of each step of a schedule, coloured by its stage.

    Args:
        stages: "large", "hybrid" or "small", step by step.
        seconds: what each step takes.
    """
    most = max(high for _, _, high in seconds)
    scale, unit = _unit(most)
    with _styled() as make:
        figure, axes = make(max(6.4, min(12.0, 2.4 + 0.32 * len(stages))), 4.2)
        middle, reach = _medians(seconds, scale)
        steps = np.arange(1, len(stages) + 1)
        for stage, (colour, hatch) in _STAGES.items():
            here = np.array([each == stage for each in stages])
            if here.any():
                label = f"{stage} stage"
                axes.bar(steps[here], middle[here], 0.8, color=colour, hatch=hatch, edgecolor="white", lw=0.6, label=label)
        axes.errorbar(steps, middle, reach, fmt="none", ecolor=_INK, elinewidth=1, capsize=2.5)
        axes.set(xlabel="step", ylabel=unit, title=title)
        axes.set(xlim=(0.4, len(stages) + 0.6), ylim=(0, 1.08 * scale * most))
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=len(_STAGES))
    return figure


def breakdown_figure(runs: Mapping[str, Mapping[str, float]], title: str = "Where the time of a run goes") -> Figure:
    """Time of whole runs by part, one bar a schedule.

    Args:
        runs: by schedule, from top to bottom; each has seconds by part: of "text", "large", "small", "glue", "VAE", "other", or
            "loop" for the middle three where they were not told apart.
    """
    longest = max(sum(parts.values()) for parts in runs.values())
    scale, unit = _unit(longest)
    digits = 0 if scale * longest >= 100 else 1
    with _styled() as make:
        figure, axes = make(8.2, 1.9 + 0.52 * len(runs))
        for part, (colour, hatch) in _PARTS.items():
            starts = {name: sum(parts.get(p, 0.0) for p in _before(part)) for name, parts in runs.items()}
            shown = {name: parts[part] for name, parts in runs.items() if parts.get(part, 0.0) > 0.002 * longest}
            if not shown:
                continue
            left = [scale * starts[name] for name in shown]
            widths = [scale * seconds for seconds in shown.values()]
            edge = _GREY if part == "other" else "white"
            axes.barh(list(shown), widths, 0.7, left, color=colour, hatch=hatch, edgecolor=edge, lw=0.6, label=part)
            for name, start, width in zip(shown, left, widths, strict=True):
                if width > 0.07 * scale * longest:
                    ink = "white" if colour == _LARGE else _INK
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5} if hatch else None
                    at = {"ha": "center", "va": "center", "fontsize": 10}
                    axes.text(start + width / 2, name, f"{width:.{digits}f}", color=ink, bbox=box, **at)  # type: ignore[arg-type]
        for name, parts in runs.items():
            end = scale * sum(parts.values())
            axes.text(end + 0.01 * scale * longest, name, f"{end:.{digits}f}", va="center", fontweight="bold")  # type: ignore[arg-type]
        axes.set(xlabel=unit, title=title, xlim=(0, 1.1 * scale * longest), yticks=range(len(runs)), yticklabels=list(runs))
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=len(_PARTS))
    return figure


def frontier_figure(
    kinds: Mapping[str, Sequence[tuple[str, float, Any]]], measure: str, *, joined: Collection[str] = ()
) -> Figure:
    """Speed against distance, a point a schedule.

    Args:
        kinds: by kind of schedule, its points: a name, the speed-up, and an object with `value`, `low` and `high`.
        measure: what the values are; more is better.
        joined: kinds whose points are joined by a line; if there are any, points are not named.
    """
    looks = (
        ("o", _LARGE),
        ("s", _MIDDLE),
        ("D", "#8A8A8A"),
        ("^", "#5AA5CF"),
        ("v", "#B8912B"),
        ("P", "#5B7F3A"),
        ("X", "#A2466F"),
    )
    with _styled() as make:
        figure, axes = make(9.6, 6.2)
        for (kind, points), (marker, colour) in zip(kinds.items(), looks, strict=False):
            x, y = [speed for _, speed, _ in points], [figure.value for _, _, figure in points]
            reach = [[f.value - f.low for _, _, f in points], [f.high - f.value for _, _, f in points]]
            line = "-" if kind in joined else ""
            axes.errorbar(x, y, reach, fmt=marker + line, ms=7, lw=1.4, color=colour, capsize=3, elinewidth=1, label=kind)
            for number, (name, speed, f) in enumerate(() if joined else points):
                above = number % 2 == 0
                at = {"xytext": (5, 7 if above else -13), "textcoords": "offset points", "fontsize": 8, "color": colour}
                axes.annotate(name, (speed, f.value), **at)  # type: ignore[arg-type]
        axes.set(xlabel="speed-up of the denoising loop", ylabel=measure, title="Speed against distance")
        axes.legend(loc="upper right")
        axes.margins(x=0.12, y=0.1)
    return figure


def lines_figure(panels: Mapping[str, tuple[Mapping[int, Quartiles], Quartiles]]) -> Figure:
    """Times that should grow in a straight line, one panel each.

    Args:
        panels: by title: quartiles by count, and the line that was fitted: seconds at nothing, seconds each, R^2.
    """
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure((3.6 * len(panels), 3.4), layout="constrained")
        for axes, (title, (points, (at_zero, each, r2))) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            counts, quartiles = list(points), list(points.values())
            scale, unit = _unit(max(high for _, _, high in quartiles))
            middle, reach = _medians(quartiles, scale)
            axes.errorbar(counts, middle, reach, fmt="o", ms=6, color=_LARGE, capsize=3)
            ends = (0, max(counts))
            axes.plot(ends, [scale * (at_zero + each * end) for end in ends], color=_MIDDLE, lw=1.6)
            axes.set(xlabel=title, ylabel=unit, title=f"R² = {r2:.4f}", xlim=(0, 1.05 * max(counts)))
            axes.set_ylim(0, 1.1 * scale * max(high for _, _, high in quartiles))
    return figure


def svg(figure: Figure) -> str:
    """A figure as text, to stand inside a page."""
    file = io.StringIO()
    with _matplotlib().rc_context(_STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def open_folder(folder: Path) -> None:
    """Makes the folder that figures go to, and sees that they can be drawn: to be asked before a long measurement.

    Raises:
        MissingError: matplotlib is not installed.
        RequestError: the folder cannot be made.
    """
    _matplotlib()
    try:
        with translated_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise RequestError(f"the folder {folder} cannot be written", found=exc.strerror, fix="give another one") from exc


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure, as what the path's suffix says (.png, .svg), and returns the path.

    Raises:
        RequestError: the file cannot be written.
        ResourceError: the disk is full.
    """
    matplotlib = _matplotlib()
    date = {"Date": None} if path.suffix == ".svg" else {}
    try:
        with translated_disk_errors(path.parent), matplotlib.rc_context(_STYLE):
            figure.savefig(path, dpi=160, metadata=date)
    except OSError as exc:
        raise RequestError(f"{path} cannot be written", found=exc.strerror, fix="give another folder") from exc
    return path


@contextmanager
def _styled() -> Iterator[Callable[[float, float], tuple[Figure, Axes]]]:
    """Gives a function that makes an empty figure of so many inches, in our style."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    def make(width: float, height: float) -> tuple[Figure, Axes]:
        figure = Figure((width, height), layout="constrained")
        return figure, figure.subplots()

    with matplotlib.rc_context(_STYLE):
        yield make


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ImportError as exc:
        raise MissingError(
            "figures need matplotlib, which is not installed", found=str(exc), fix="pip install matplotlib"
        ) from exc


def _unit(most: float) -> tuple[float, str]:
    """What seconds are to be multiplied with so that they read well, and the unit they then have."""
    return (1e3, "milliseconds") if most < 10 else (1.0, "seconds")


def _medians(quartiles: Sequence[Quartiles], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Medians [N], and how far the quartiles are below and above them [2, N]."""
    low, middle, high = scale * np.array(quartiles).T
    return middle, np.stack([middle - low, high - middle])


def _before(part: str) -> list[str]:
    """The parts that stand left of one."""
    return list(_PARTS)[: list(_PARTS).index(part)]


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _readable_ticks(tokens: Sequence[int]) -> list[int]:
    """The buckets, without those whose labels would touch the next one's."""
    kept: list[int] = []
    for count in reversed(tokens):
        if not kept or kept[-1] - count > 0.06 * tokens[-1]:
            kept.append(count)
    return [0, *reversed(kept)]
