"""Measures of other people, computed by torchmetrics: LPIPS, CLIP score and FID, for figures that can be held against papers.

Their networks are used where packages and weights are on this machine. Weights are looked for before a network is made, since
the libraries would fetch what they lack, gigabytes of it, in the middle of a comparison.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingError

if TYPE_CHECKING:
    import torch

__all__ = ["CLIP", "Fid", "Perceptual", "perceptual"]

CLIP = "openai/clip-vit-base-patch16"
"""The model of CLIP scores; those of other CLIP models lie elsewhere."""


@dataclass(frozen=True)
class Perceptual:
    """Functions of pictures [B, H, W, 3] uint8; None for what is not there.

    Attributes:
        lpips: distance [B] of pictures to others: R. Zhang et al., 2018, with AlexNet.
        clip: 100 times the cosine of pictures and their prompts, not below 0, [B].
        inception: InceptionV3's features [B, 2048] float32, for `Fid`.
    """

    lpips: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    clip: Callable[[np.ndarray, Sequence[str]], np.ndarray] | None = None
    inception: Callable[[np.ndarray], np.ndarray] | None = None


def perceptual(*, fid: bool) -> tuple[Perceptual, tuple[str, ...]]:
    """What is there, and a note on each measure that is not.

    Args:
        fid: whether FID is wanted, too.
    """
    try:
        _load("torchmetrics")
    except MissingError as exc:
        return Perceptual(), (f"no LPIPS, CLIP score or FID: {exc.problem}; {exc.fix}",)
    wanted: list[tuple[str, str, Callable[[], Any]]] = [("lpips", "LPIPS", _lpips), ("clip", "CLIP score", _clip)]
    wanted += [("inception", "FID", _inception)] * fid
    made, notes = {}, []
    for attribute, name, make in wanted:
        try:
            made[attribute] = make()
        except MissingError as exc:
            notes.append(f"no {name}: {exc.problem}; {exc.fix}")
    return Perceptual(**made), tuple(notes)


class Fid:
    """Frechet distances of sets of features to one of real pictures [M, d] (M. Heusel et al., "GANs Trained by a Two
    Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017).

    It is biased: the fewer the pictures, the greater. Resampled pictures are fewer different ones, so that a bootstrap interval
    would lie above the value; there is none.
    """

    def __init__(self, real: np.ndarray) -> None:
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance

        given: Any = torch.nn.Identity()  # features come in place of pictures: each picture is looked at once
        given.num_features = real.shape[1]
        self._metric = FrechetInceptionDistance(given, reset_real_features=False)
        self._metric.update(torch.from_numpy(real).double(), real=True)

    def __call__(self, features: np.ndarray) -> float:
        import torch

        self._metric.reset()
        self._metric.update(torch.from_numpy(features).double(), real=False)
        return float(self._metric.compute())


def _lpips() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    url = _load("torchvision.models").AlexNet_Weights.DEFAULT.url
    _weights(url, "import torchvision; torchvision.models.alexnet(weights='DEFAULT')")
    metric = _load("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
    return lambda a, b: metric(_tensor(a) / 255, _tensor(b) / 255).reshape(-1).numpy()


def _clip() -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    transformers, hub = _load("transformers"), _load("huggingface_hub")

    class Model(transformers.CLIPModel):  # type: ignore[misc, name-defined]
        """Gives tensors, as torchmetrics expects; transformers 5 gives objects that hold them."""

        def get_image_features(self, *args: Any) -> torch.Tensor:
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args: Any) -> torch.Tensor:
            return super().get_text_features(*args).pooler_output

    try:
        folder = hub.snapshot_download(CLIP, local_files_only=True)
        model = Model.from_pretrained(folder, local_files_only=True).requires_grad_(False)
        processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except OSError:
        raise MissingError(f"{CLIP} is not in the Hugging Face cache", fix=f"hf download {CLIP}") from None
    both = model, functools.partial(processor, truncation=True)  # by itself torchmetrics would cut the end token off, too
    score = _load("torchmetrics.functional.multimodal").clip_score  # the mean of what it is given: one picture at a time
    return lambda pictures, prompts: np.array(
        [float(score(picture, prompt, lambda: both)) for picture, prompt in zip(_tensor(pictures), prompts, strict=True)]
    )


def _inception() -> Callable[[np.ndarray], np.ndarray]:
    url = _load("torch_fidelity.feature_extractor_inceptionv3").URL_INCEPTION_V3
    path = _weights(url, "from torchmetrics.image.fid import FrechetInceptionDistance as F; F()")
    network = _load("torchmetrics.image.fid").FrechetInceptionDistance(feature_extractor_weights_path=str(path)).inception
    return lambda pictures: network(_tensor(pictures)).numpy()


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        package = str(exc.name).partition(".")[0]
        raise MissingError(f"{package} is not installed", fix='pip install "hst_trt[perceptual]"') from None
    except (ImportError, RuntimeError) as exc:  # torchvision for CUDA beside torch for the CPU, say
        raise MissingError(f"{name} does not load ({exc})", fix="install the torchvision made for this torch") from None


def _weights(url: str, code: str) -> Path:
    """The file that the library would keep this URL in; `code` is Python that fetches it."""
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.is_file():
        raise MissingError(f"torch's cache has no {path.name}", fix=f'python -c "{code}"')
    return path


def _tensor(pictures: np.ndarray) -> torch.Tensor:
    """[B, H, W, 3] to [B, 3, H, W]."""
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2)
