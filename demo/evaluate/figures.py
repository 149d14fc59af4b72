"""Turns what was measured into the figures that are reported, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from demo.evaluate.choose import Choice
from demo.evaluate.heldout import NAMES, Case
from demo.evaluate.measure import FIDELITY, Measured, in_order, right
from hst_trt.bench import Sample
from hst_trt.compare.gallery import Drawn
from hst_trt.compare.measures import Kid, interval, mean_interval, wilson

Figures = dict[str, Any]

PAIRS = (("hybrid", "split"), ("hybrid", "random"), ("hybrid", "fewer"), ("hybrid", "small"), ("large", "small"))
"""Rows whose differences are reported, with the same prompts and noise in both."""

POINTS, KID_SHARE = 0.15, 0.6
"""What the pair is meant to reach: so much more of the large model's two-object prompts right than of the small one's, and
so much at most of its KID."""


def summary(
    choice: Choice,
    drawn: Sequence[Drawn],
    rows: Mapping[str, Measured],
    anchors: Mapping[str, Measured],
    real: Measured,
    cases: Sequence[Case],
) -> Figures:
    """Everything about the pictures of `cases`: by anchor and by row, the differences of rows, and the pair's targets.

    Args:
        anchors: what a perfect model would have drawn.
        real: scenes of other prompts, KID's reference.
    """
    kid, speeds = Kid(real.features), speed_figures(drawn)
    plans = {
        name: {"plan": str(row), "predicted_speedup": choice.record["predicted"][name]} for name, row in choice.rows.items()
    }
    return {
        "anchors": {name: row_figures(measured, cases, kid) for name, measured in anchors.items()},
        "rows": {name: plans[name] | speeds[name] | row_figures(rows[name], cases, kid) for name in choice.rows},
        "differences": differences(rows, cases, kid),
        "targets": targets(rows, cases, kid),
    }


def accuracy(measured: Measured, cases: Sequence[Case]) -> Figures:
    """Shares of prompts that are right, in all and by the number of objects, and of those with several objects in order."""
    hits = right(measured, wanted(cases))
    counts = np.array([len(case.names) for case in cases])
    figures = {"all": share_figure(hits, "prompts")}
    figures |= {str(count): share_figure(hits[counts == count], "prompts") for count in sorted(set(counts.tolist()))}
    if (several := hits & (counts > 1)).any():
        orders = [[NAMES.index(name) for name in case.names] for case in cases]
        figures["in order, where right"] = share_figure(in_order(measured, orders)[several], "prompts")
    return figures


def wanted(cases: Sequence[Case]) -> np.ndarray:
    """[cases, objects] bool."""
    return np.stack([case.present() for case in cases])


def row_figures(measured: Measured, cases: Sequence[Case], kid: Kid) -> Figures:
    return {
        "right": accuracy(measured, cases),
        "kid": _figure(kid(measured.features), interval(kid.resampled(measured.features))),
        **{key: _mean(measured.fidelity[key]) for key in FIDELITY if key in measured.fidelity},
    }


def speed_figures(drawn: Sequence[Drawn]) -> Figures:
    """How much faster than the large model each row was, prompt by prompt, for the loop and for everything."""
    figures: Figures = {name: {} for name in drawn[0].loop}
    for key in ("loop", "total"):
        samples = {name: Sample(tuple(getattr(one, key)[name] for one in drawn)) for name in figures}
        for name, sample in samples.items():
            figures[name][f"{key}_seconds"] = sample.to_dict(4)
            figures[name][f"{key}_speedup"] = samples["large"].over(sample).to_dict(4)
    return figures


def differences(rows: Mapping[str, Measured], cases: Sequence[Case], kid: Kid) -> Figures:
    """First row less second, prompt by prompt; below 0 is better for KID and feature distance."""
    counts = np.array([len(case.names) for case in cases])
    figures: Figures = {}
    for first, second in PAIRS:
        a, b = rows[first], rows[second]
        gain = right(a, wanted(cases)).astype(float) - right(b, wanted(cases))
        entry = {"right": _mean(gain)}
        entry |= {f"right, {n} objects": _mean(gain[counts == n]) for n in sorted(set(counts.tolist())) if n > 1}
        for key in FIDELITY:
            if key in a.fidelity and key in b.fidelity:
                entry[key] = _mean(a.fidelity[key] - b.fidelity[key])
        gap = kid.resampled(a.features) - kid.resampled(b.features)
        entry["kid"] = _figure(kid(a.features) - kid(b.features), interval(gap))
        figures[f"{first} - {second}"] = entry
    return figures


def targets(rows: Mapping[str, Measured], cases: Sequence[Case], kid: Kid) -> Figures:
    """How the large model compares with the small one, beside what the pair is meant to reach."""
    two = np.array([len(case.names) == 2 for case in cases])
    large, small = rows["large"], rows["small"]
    gain = right(large, wanted(cases)).astype(float) - right(small, wanted(cases))
    points = _mean(gain[two])
    share = kid(large.features) / kid(small.features)
    spread = interval(kid.resampled(large.features) / kid.resampled(small.features))
    return {
        "two-object points": points | {"target": POINTS, "met": points["value"] >= POINTS},
        "kid share": _figure(share, spread) | {"target": KID_SHARE, "met": share <= KID_SHARE},
    }


def share_figure(hits: np.ndarray, what: str) -> Figures:
    """The share of hits [n] bool, its interval, and n under the name `what`."""
    return _figure(hits.mean(), wilson(int(hits.sum()), len(hits))) | {what: len(hits)}


def _mean(values: np.ndarray) -> Figures:
    return _figure(values.mean(), mean_interval(values))


def _figure(value: float, spread: tuple[float, float]) -> Figures:
    return {"value": round(float(value), 5), "low": round(spread[0], 5), "high": round(spread[1], 5)}
