"""Trains the two demo transformers by flow matching on precomputed latents, first the large one, then the small one.

SD3's recipe: x_t = (1 - t) x + t n, the network predicts v = n - x and is fed t * 1000, t is logit-normal. Each
transformer learns on half-size scenes of 64 tokens first, which are four times cheaper, then on whole ones of 256. The
large transformer and the text encoders learn together; the small one sees those encoders frozen, as the two must share
them. Matrices inside the blocks learn by Muon, which on so few steps is worth about half the training; the rest by AdamW.
"""

from __future__ import annotations

import copy
import json
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import nn

from demo.data import HELD_OUT, Scenes
from demo.errors import DemoError
from demo.scenes import SIZE
from demo.text import POOLED_WIDTH, T5_WIDTH, TOKENS, TextEncoders, Tokenizers
from demo.vae import LATENT_CHANNELS

BATCH = 64
POSITIONS = 24
"""Edge of the position table in tokens: sizes up to 384 px and non-square ones have positions of their own."""

SAVE_EVERY, LOOK_EVERY = 45.0, 300.0
"""Seconds between checkpoints, and between sample sheets."""

LONG_TEXTS = (48, 128, 256)
"""T5 lengths of the odd batches: diffusers pads T5 to 256 tokens unless told otherwise."""


@dataclass(frozen=True)
class Stage:
    """Scenes of `edge` x `edge` latents, how many to see, and the mean of the logit-normal time."""

    edge: int
    images: int
    time_mean: float

    @property
    def tokens(self) -> int:
        return (self.edge // 2) ** 2 + 2 * TOKENS

    @property
    def steps(self) -> int:
        return self.images // BATCH


@dataclass(frozen=True)
class Shape:
    """What differs between the two transformers."""

    layers: int
    heads: int
    dual_attention_layers: tuple[int, ...]
    stages: tuple[Stage, Stage]


SHAPES = {
    "large": Shape(5, 3, (), (Stage(16, 256_000, 0.3), Stage(32, 152_000, 0.7))),
    "small": Shape(3, 2, (0, 1), (Stage(16, 256_000, 0.3), Stage(32, 160_000, 0.7))),
}
"""The small one has dual attention in its first blocks, as SD3.5-Medium has."""


def make_transformer(shape: Shape) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=shape.layers,
        attention_head_dim=64,
        num_attention_heads=shape.heads,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=64 * shape.heads,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=POSITIONS,
        dual_attention_layers=shape.dual_attention_layers,
        qk_norm="rms_norm",
    )


def coarse_positions(table: torch.Tensor, edge: int) -> torch.Tensor:
    """The position table `[1, 24 * 24, width]` whose middle `edge / 2` rows and columns span those of a whole scene.

    So "on the left" is the same place for scenes of both sizes.
    """
    count, whole = edge // 2, SIZE // 16
    step, first, start = whole // count, (POSITIONS - whole) // 2, (POSITIONS - count) // 2
    grid = table.view(POSITIONS, POSITIONS, -1)
    coarse = grid.clone()
    coarse[start : start + count, start : start + count] = grid[first : first + whole : step, first : first + whole : step]
    return coarse.view_as(table)


@dataclass(frozen=True)
class Batch:
    """`noisy` and `velocity` `[B, 16, e, e]`, token `ids` `[B, 3, TOKENS]`, `timestep` `[B]` in 0..1000."""

    noisy: torch.Tensor
    velocity: torch.Tensor
    ids: torch.Tensor
    timestep: torch.Tensor


def make_batch(latents: torch.Tensor, ids: torch.Tensor, time_mean: float, generator: torch.Generator) -> Batch:
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(latents), generator=generator) + time_mean)
    at = t[:, None, None, None]
    return Batch(noisy=(1 - at) * latents + at * noise, velocity=noise - latents, ids=ids, timestep=t * 1000)


def batches(scenes: Scenes, stage: Stage, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches; 10 % of the captions are empty, which is what guidance subtracts."""
    generator = torch.Generator().manual_seed(seed)
    empty = Tokenizers.make().ids([""])
    while True:
        for rows in torch.randperm(len(scenes.ids) - HELD_OUT, generator=generator).split(BATCH):
            if len(rows) == BATCH:
                dropped = torch.rand(BATCH, generator=generator)[:, None, None] < 0.1
                ids = torch.where(dropped, empty, scenes.ids[rows].long())
                yield make_batch(scenes.latents[stage.edge][rows].float(), ids, stage.time_mean, generator)


class Drawer(nn.Module):
    """A transformer and the text encoders it listens to: what one run holds twice, live and averaged."""

    def __init__(self, transformer: SD3Transformer2DModel, text: TextEncoders) -> None:
        super().__init__()
        self.transformer = transformer
        self.text = text


class Run:
    """One transformer in training: weights, their moving average, optimizers and progress, kept in one file."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.path = name, work / f"{name}.pt"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.stages = SHAPES[name].stages
        torch.manual_seed(len(name))
        self.live = Drawer(make_transformer(SHAPES[name]), TextEncoders(Tokenizers.make())).to(self.device)
        self.average = copy.deepcopy(self.live).requires_grad_(False)
        self.positions = self.live.transformer.pos_embed.pos_embed.clone()
        if name == "small":
            for text in (self.live.text, self.average.text):
                text.load_state_dict(load_average(work / "large.pt", "text"))
                text.requires_grad_(False)
        blocks = [p for p in self.live.transformer.transformer_blocks.parameters() if p.ndim == 2]
        known = set(map(id, blocks))
        others = [p for p in self.live.parameters() if p.requires_grad and id(p) not in known]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(blocks, lr=0.01, weight_decay=0.01, adjust_lr_fn="original"), 0.01),
            (torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99)), 2e-3),
        ]
        self.stage = self.stages[0]
        self.step = 0
        self.seconds = 0.0
        if self.path.exists():
            self._restore()

    def _restore(self) -> None:
        try:
            state = torch.load(self.path, weights_only=True, map_location=self.device)
            self.live.load_state_dict(state["live"])
            self.average.load_state_dict(state["average"])
            for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DemoError(
                f"{self.path} is not a checkpoint of this recipe's {self.name} transformer ({reason}): "
                "move it away to train anew, or check out the recipe that wrote it"
            ) from None
        print(f"{self.name}: goes on at step {self.step} of {self.total_steps}, {self.seconds / 60:.1f} min", flush=True)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def due(self) -> Stage:
        """The stage that the next step belongs to."""
        return self.stages[0] if self.step < self.stages[0].steps else self.stages[1]

    @property
    def done(self) -> float:
        """Share of the whole run's tokens that were seen."""
        first, second = self.stages
        early = min(self.step, first.steps)
        seen = early * first.tokens + (self.step - early) * second.tokens
        return seen / (first.steps * first.tokens + second.steps * second.tokens)

    def set_rates(self) -> None:
        """100 steps of warm-up, then constant, then linear to nothing over the last half."""
        share = min(1.0, (self.step + 1) / 100) * min(1.0, max(0.01, (1 - self.done) / 0.5))
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share

    def enter(self, stage: Stage) -> None:
        self.stage = stage
        for drawer in (self.live, self.average):
            drawer.transformer.pos_embed.pos_embed.copy_(coarse_positions(self.positions, stage.edge))

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(0.998, self.step / (self.step + 20))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.live.parameters()), 1 - decay)

    def save(self) -> None:
        state = {
            "live": self.live.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)


def load_average(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    """The averaged weights of `part` (`transformer` or `text`) from a checkpoint."""
    average = torch.load(checkpoint, weights_only=True, map_location="cpu")["average"]
    return {key.removeprefix(f"{part}."): value for key, value in average.items() if key.startswith(f"{part}.")}


class Loss:
    """Flow matching of one run at one stage; the transformer is compiled for the shape that nearly all batches have."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.compiled: Callable[..., tuple[torch.Tensor]] = torch.compile(run.live.transformer, dynamic=False)
        self.generator = torch.Generator().manual_seed(run.step)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Two batches in 32 are odd, so that the pair survives diffusers' defaults: without T5, or with long padding."""
        odd = int(torch.randint(32, (), generator=self.generator))
        length = LONG_TEXTS[int(torch.randint(3, (), generator=self.generator))] if odd == 0 else TOKENS
        transformer = self.run.live.transformer if odd == 0 else self.compiled
        return flow_loss(transformer, self.run.live.text, batch, self.run.device, length, no_t5=odd == 1)


def flow_loss(
    transformer: Callable[..., tuple[torch.Tensor]],
    text: TextEncoders,
    batch: Batch,
    device: torch.device,
    t5_length: int = TOKENS,
    *,
    no_t5: bool = False,
) -> torch.Tensor:
    states, pooled = text(batch.ids.to(device), t5_length, no_t5=no_t5)
    with torch.autocast(device.type, torch.bfloat16):
        velocity = transformer(batch.noisy.to(device), states, pooled, batch.timestep.to(device), return_dict=False)[0]
    return F.mse_loss(velocity.float(), batch.velocity.to(device))


@torch.no_grad()
def held_out_loss(run: Run, scenes: Scenes) -> float:
    """Loss of the averaged weights on scenes never trained on, the same noise every time."""
    stage = run.stage
    losses = []
    for rows in torch.arange(len(scenes.ids) - HELD_OUT, len(scenes.ids)).split(BATCH):
        generator = torch.Generator().manual_seed(int(rows[0]))
        batch = make_batch(scenes.latents[stage.edge][rows].float(), scenes.ids[rows].long(), stage.time_mean, generator)
        losses.append(flow_loss(run.average.transformer, run.average.text, batch, run.device).item())
    return float(np.mean(losses))


def train(run: Run, scenes: Scenes, look: Callable[[Run], None]) -> None:
    """To the end of both stages. `look` is called every few minutes; the metrics go to `NAME.jsonl`, one line a checkpoint."""
    while run.step < run.total_steps:
        run.enter(run.due)
        torch.compiler.reset()
        train_stage(run, scenes, look)
    run.save()


def train_stage(run: Run, scenes: Scenes, look: Callable[[Run], None]) -> None:
    loss_of = Loss(run)
    stream = batches(scenes, run.stage, seed=run.step)
    losses: list[float] = []
    saved = looked = last = time.monotonic()
    ended = False
    while not ended:
        run.set_rates()
        loss = loss_of(next(stream))
        loss.backward()
        for optimizer, _ in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        run.update_average()
        losses.append(loss.item())
        now = time.monotonic()
        run.seconds += now - last
        last = now
        ended = run.step == run.total_steps or run.due is not run.stage
        if now - saved > SAVE_EVERY or ended:
            run.save()
            saved = now
            held_out = held_out_loss(run, scenes) if now - looked > LOOK_EVERY / 3 or ended else None
            report(run, float(np.mean(losses)), held_out)
            losses.clear()
        if now - looked > LOOK_EVERY or ended:
            look(run)
            looked = now


def report(run: Run, loss: float, held_out: float | None) -> None:
    line = {
        "minutes": round(run.seconds / 60, 2),
        "step": run.step,
        "images": run.step * BATCH,
        "edge": run.stage.edge,
        "loss": round(loss, 4),
        "held_out": held_out and round(held_out, 4),
    }
    with run.path.with_suffix(".jsonl").open("a") as metrics:
        metrics.write(json.dumps(line) + "\n")
    left = run.seconds * (1 / run.done - 1) / 60
    print(f"{run.name}: {json.dumps(line)}, about {left:.0f} min left", flush=True)
