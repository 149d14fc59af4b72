"""The classifier: which of the objects a picture shows, and in what order from left to right.

A small convolutional network gives every object a logit in every cell of an 8x8 map. An object counts as shown where its
highest logit is above 0. In training a present object must be seen in the cell where it stands and an absent one nowhere,
so the network cannot pass by the picture's overall colours; and spoiled objects (`demo.evaluate.spoil`) count as absent.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from demo.evaluate.heldout import NAMES
from demo.evaluate.lessons import CELLS, Lessons

BATCH, RATE = 64, 3e-3
STEPS, ROUNDS = 2500, 3
"""Steps of a round of training, and how many rounds there are at most: about four minutes each on two cores."""

SAVE_EVERY = 40.0
"""Seconds between checkpoints."""

REQUIRED, ENOUGH = 0.98, 0.985
"""Share of held-out real scenes whose objects it must name exactly before its word counts, and the share of scenes kept for
this purpose at which training ends."""


class Classifier(nn.Module):
    """`[B, 3, 128, 128]` in -1..1 to logits `[B, objects, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, stride in ((32, 2), (64, 2), (128, 2), (128, 1), (192, 2), (192, 1), (192, 1)):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        self.features = nn.Sequential(*layers)
        self.logits = nn.Conv2d(before, len(NAMES), 1)
        nn.init.constant_(self.logits.bias, -3.0)  # most objects are absent from most pictures

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.logits(self.features(pictures))


def seen(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """From logits `[B, objects, 8, 8]`: which objects are shown, and how far to the right, both `[B, objects]`."""
    present = logits.amax((2, 3)) > 0
    weight = logits.sigmoid().sum(2)
    columns = (weight * torch.arange(CELLS)).sum(2) / weight.sum(2)
    return present.numpy(), columns.numpy()


@torch.no_grad()
def look(classifier: Classifier, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`seen` of pictures [N, EDGE, EDGE, 3] uint8, some at a time."""
    batches = [seen(classifier(model_space(batch))) for batch in np.array_split(pictures, -(-len(pictures) // 64))]
    present, columns = zip(*batches, strict=True)
    return np.concatenate(present), np.concatenate(columns)


def model_space(pictures: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def loss_of(logits: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of present objects in their cell and of absent ones in their most suspicious cell, a picture's sum.

    Args:
        logits: `[B, objects, 8, 8]`.
        cells: `[B, objects]`, -1 for absent.
    """
    flat = logits.flatten(2)
    there = flat.gather(2, cells.clamp(min=0)[..., None])[..., 0]
    present = cells >= 0
    return (F.softplus(-there) * present + F.softplus(flat.amax(2)) * ~present).sum() / len(logits)


def augment(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Colour jitter, some pictures in grey, a little noise: the outline has to count, not the shade alone."""
    count = len(pictures)

    def uniform(low: float, high: float, channels: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    grey = pictures.mean(1, keepdim=True)
    colour = uniform(0.4, 1.4) * (uniform(0, 1) > 0.15)
    jittered = (grey + colour * (pictures - grey)) * uniform(0.75, 1.25) * uniform(0.85, 1.15, 3) + uniform(-0.2, 0.2)
    return jittered + uniform(0, 0.08) * torch.randn(pictures.shape, generator=generator)


def taught(checkpoint: Path, lessons: Lessons, check: Lessons) -> Classifier:
    """Trained in rounds until it names the objects of enough of the scenes of `check`; kept in `checkpoint`."""
    for number in range(1, ROUNDS + 1):
        classifier = trained(checkpoint, lessons, number * STEPS)
        present, _ = look(classifier, check.pictures)
        share = (present == (check.cells >= 0)).all(1).mean()
        print(f"classifier: names all objects and no others in {share:.1%} of {len(present)} other scenes", flush=True)
        if share >= ENOUGH:
            break
    return classifier


def trained(checkpoint: Path, lessons: Lessons, steps: int) -> Classifier:
    """With `steps` steps behind it, at least: goes on from `checkpoint`, where the result is kept too."""
    torch.manual_seed(0)
    classifier = Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=0.02)
    step = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    saved = time.monotonic()
    while step < steps:
        rng, generator = np.random.default_rng((0, step)), torch.Generator().manual_seed(step)
        rows = rng.integers(len(lessons.pictures), size=BATCH)
        pictures = augment(model_space(lessons.pictures[rows]), generator).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 100, 1.0, 1.5 * (1 - step / steps) + 0.01)
        with torch.autocast("cpu", torch.bfloat16):
            logits = classifier(pictures)
        loss = loss_of(logits.float(), torch.from_numpy(lessons.cells[rows]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if time.monotonic() - saved > SAVE_EVERY or step == steps:
            saved = time.monotonic()
            part = checkpoint.with_suffix(".part")
            torch.save({"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, part)
            part.replace(checkpoint)
            print(f"classifier: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    return classifier.eval()
