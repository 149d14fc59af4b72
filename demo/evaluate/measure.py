"""Looks at every picture once: what the classifier sees in it, its features, and how far it is from the large model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.evaluate.classifier import Classifier, look
from demo.evaluate.lessons import shrunk
from hst_trt.compare.features import Features
from hst_trt.compare.measures import psnr, ssim
from hst_trt.compare.store import read_arrays, write_arrays

CHUNK = 25
"""Cases of a file."""

FIDELITY = ("psnr", "ssim", "feature distance")


@dataclass(frozen=True)
class Measured:
    """Of one row's pictures, in the order of the cases; fidelity is to the row it was compared with, if any.

    present, columns: [cases, objects], see `classifier.seen`. features: [cases, 1280]. fidelity: [cases] by measure.
    """

    present: np.ndarray
    columns: np.ndarray
    features: np.ndarray
    fidelity: dict[str, np.ndarray]


def measure(
    folder: Path,
    count: int,
    pictures: Callable[[slice], Mapping[str, np.ndarray]],
    classifier: Classifier,
    features: Features,
    reference: str | None = None,
) -> dict[str, Measured]:
    """Of all rows of `count` cases; kept in `folder` some cases at a time.

    Args:
        pictures: of a slice of the cases, [cases, H, W, 3] uint8 by row.
        reference: the row that fidelity is measured to.
    """
    files = []
    for start in range(0, count, CHUNK):
        files.append(folder / f"{start:05d}.npz")
        if not files[-1].is_file():
            rows = pictures(slice(start, min(start + CHUNK, count)))
            write_arrays(files[-1], _measured(rows, classifier, features, reference))
    return _by_row(read_arrays(files))


def _measured(
    rows: Mapping[str, np.ndarray], classifier: Classifier, features: Features, reference: str | None
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    maps = {}
    for name, pixels in rows.items():
        arrays[f"{name}/present"], arrays[f"{name}/columns"] = look(classifier, shrunk(pixels))
        arrays[f"{name}/features"], maps[name] = features(pixels)
    for name, pixels in rows.items():
        if reference is not None and name != reference:
            wanted = rows[reference]
            values = (psnr(pixels, wanted), ssim(pixels, wanted), features.distance(maps[name], maps[reference]))
            arrays |= {f"{name}/{key}": value for key, value in zip(FIDELITY, values, strict=True)}
    return arrays


def _by_row(arrays: Mapping[str, np.ndarray]) -> dict[str, Measured]:
    names = dict.fromkeys(key.split("/")[0] for key in arrays)
    return {
        name: Measured(
            arrays[f"{name}/present"],
            arrays[f"{name}/columns"],
            arrays[f"{name}/features"],
            {key: arrays[f"{name}/{key}"] for key in FIDELITY if f"{name}/{key}" in arrays},
        )
        for name in names
    }


def right(measured: Measured, wanted: np.ndarray) -> np.ndarray:
    """Whether a picture shows every object its prompt names and no other one, [cases] bool; `wanted` [cases, objects] bool.

    No other one, because a picture with a bit of everything would otherwise be right for every prompt.
    """
    equal: np.ndarray = (measured.present == wanted).all(1)
    return equal


def in_order(measured: Measured, orders: Sequence[Sequence[int]]) -> np.ndarray:
    """Whether the named objects stand from left to right as they should, [cases] bool; `orders` has their indices."""
    return np.array([bool((np.diff(c[list(order)]) > 0).all()) for c, order in zip(measured.columns, orders, strict=True)])
