"""Looks at drawn pictures and at real scenes with the same eyes, and says how far those can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from demo.evaluate import heldout
from demo.evaluate.classifier import REQUIRED, Classifier, look
from demo.evaluate.figures import Figures, share_figure, wanted
from demo.evaluate.heldout import Case
from demo.evaluate.lessons import FEW, TEST_SEED, RoundTrip, make_lessons
from demo.evaluate.measure import Measured, measure, right
from demo.evaluate.spoil import WAYS
from demo.scenes import Sprites
from hst_trt.compare.features import Features
from hst_trt.compare.gallery import Gallery


class Judge:
    """Classifier and features, with the folder that keeps what they saw."""

    def __init__(self, folder: Path, classifier: Classifier, network: Features, sprites: Sprites, decode: RoundTrip) -> None:
        self._folder, self._classifier, self._network = folder, classifier, network
        self._sprites, self._decode = sprites, decode

    def rows(self, gallery: Gallery, cases: Sequence[Case]) -> dict[str, Measured]:
        """The drawn pictures, their fidelity to the large model's."""

        def pictures(part: slice) -> dict[str, np.ndarray]:
            print(f"measuring prompts {part.start + 1} to {part.stop}", flush=True)
            drawn = [gallery[case].pictures for case in cases[part]]
            return {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}

        return measure(self._folder / "rows", len(cases), pictures, self._classifier, self._network, "large")

    def anchors(self, cases: Sequence[Case]) -> dict[str, Measured]:
        """The scenes that the prompts describe, as they are and through the VAE: what a perfect transformer would get."""

        def pictures(part: slice) -> dict[str, np.ndarray]:
            whole = heldout.pictures(cases[part], self._sprites)
            return {"scene": whole, "decoded": self._decode(whole, np.zeros(1))}

        return measure(self._folder / "anchors", len(cases), pictures, self._classifier, self._network)

    def scenes(self, cases: Sequence[Case]) -> Measured:
        """Real scenes of other prompts, for KID."""

        def pictures(part: slice) -> dict[str, np.ndarray]:
            return {"scene": heldout.pictures(cases[part], self._sprites)}

        return measure(self._folder / "real", len(cases), pictures, self._classifier, self._network)["scene"]

    def spoiled(self, lessons: Path) -> Figures:
        """For each way to spoil, the share of objects that are still taken for whole."""
        test = make_lessons(lessons, self._sprites, self._decode, TEST_SEED, FEW, spoiled=1.0)
        present, _ = look(self._classifier, test.pictures)
        ways = {way: present[test.ways == index] for index, way in enumerate(WAYS)}
        return {way: share_figure(taken, "objects") for way, taken in ways.items() if len(taken)}


def fitness(scenes: Sequence[tuple[Measured, Sequence[Case]]], decoded: tuple[Measured, Sequence[Case]]) -> Figures:
    """Whether the classifier is right where the truth is known: on real scenes, sharp ones and decoded ones."""
    sharp = share_figure(np.concatenate([right(measured, wanted(cases)) for measured, cases in scenes]), "prompts")
    soft = share_figure(right(decoded[0], wanted(decoded[1])), "prompts")
    return {"fit": min(sharp["value"], soft["value"]) >= REQUIRED, "required": REQUIRED, "scenes": sharp, "decoded": soft}
