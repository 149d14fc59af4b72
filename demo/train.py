"""Trains the two demo transformers by flow matching on precomputed latents, first the large one, then the small one.

SD3's recipe: x_t = (1 - t) x + t n, the network predicts v = n - x and is fed t * 1000, t is logit-normal. The large
transformer and the text encoders learn together; the small one sees those encoders frozen, as the two must share them.
Matrices inside the blocks learn by Muon, which on so few steps is worth about half the training; the rest by AdamW.
Time is the budget, not steps: the learning rate follows the clock, and a run that stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from demo.scenes import SIZE, Sprites, draw_scene
from demo.text import POOLED_WIDTH, T5_WIDTH, TextEncoders, Tokenizers
from demo.vae import LATENT_CHANNELS, encode, to_model_space

HELD_OUT = 512


@dataclass(frozen=True)
class Shape:
    """What differs between the two transformers."""

    layers: int
    heads: int
    dual_attention_layers: tuple[int, ...] = ()


SHAPES = {"large": Shape(layers=4, heads=3), "small": Shape(layers=3, heads=2, dual_attention_layers=(0, 1))}
"""The small one has dual attention in its first blocks, as SD3.5-Medium has."""


def make_transformer(shape: Shape) -> SD3Transformer2DModel:
    """The position table is 24x24, so that sizes up to 384 px and non-square ones have positions of their own."""
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
        pos_embed_max_size=24,
        dual_attention_layers=shape.dual_attention_layers,
        qk_norm="rms_norm",
    )


def make_data(sprites: Sprites, vae: AutoencoderKL, count: int, seed: int = 5) -> dict[str, torch.Tensor]:
    """`latents` `[count, 16, 16, 16]` float16 and token `ids` `[count, 3, TOKENS]` int16."""
    rng = np.random.default_rng(seed)
    tokenizers = Tokenizers.make()
    latents, ids = [], []
    for _ in range(0, count, 64):
        scenes = [draw_scene(rng, sprites) for _ in range(64)]
        latents.append(encode(vae, to_model_space(np.stack([scene.pixels for scene in scenes]))).half())
        ids.append(tokenizers.ids([scene.caption for scene in scenes]).short())
    return {"latents": torch.cat(latents)[:count].contiguous(), "ids": torch.cat(ids)[:count].contiguous()}


@dataclass(frozen=True)
class Batch:
    """`noisy` and `velocity` `[B, 16, 16, 16]`, token `ids` `[B, 3, TOKENS]`, `timestep` `[B]` in 0..1000."""

    noisy: torch.Tensor
    velocity: torch.Tensor
    ids: torch.Tensor
    timestep: torch.Tensor


def make_batch(latents: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> Batch:
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(latents), generator=generator) + 0.3)
    at = t[:, None, None, None]
    return Batch(noisy=(1 - at) * latents + at * noise, velocity=noise - latents, ids=ids, timestep=t * 1000)


def batches(data: dict[str, torch.Tensor], size: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches; 10 % of the captions are empty, which is what guidance subtracts."""
    generator = torch.Generator().manual_seed(seed)
    empty = Tokenizers.make().ids([""])
    while True:
        for rows in torch.randperm(len(data["ids"]) - HELD_OUT, generator=generator).split(size):
            if len(rows) == size:
                dropped = torch.rand(size, generator=generator)[:, None, None] < 0.1
                ids = torch.where(dropped, empty, data["ids"][rows].long())
                yield make_batch(data["latents"][rows].float(), ids, generator)


def flow_loss(transformer: Callable[..., tuple[torch.Tensor]], text: TextEncoders, batch: Batch) -> torch.Tensor:
    states, pooled = text(batch.ids)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = transformer(batch.noisy, states, pooled, batch.timestep, return_dict=False)[0]
    return F.mse_loss(velocity.float(), batch.velocity)


class Drawer(nn.Module):
    """A transformer and the text encoders it listens to: what one run holds twice, live and averaged."""

    def __init__(self, transformer: SD3Transformer2DModel, text: TextEncoders) -> None:
        super().__init__()
        self.transformer = transformer
        self.text = text


class Run:
    """One transformer in training: weights, their moving average, optimizers and clock, kept in one file."""

    def __init__(self, name: str, folder: Path, minutes: float) -> None:
        self.path = folder / f"{name}.pt"
        self.minutes = minutes
        self.learns_text = name == "large"
        torch.manual_seed(len(name))
        self.live = Drawer(make_transformer(SHAPES[name]), TextEncoders(Tokenizers.make()))
        self.average = copy.deepcopy(self.live).requires_grad_(False)
        if not self.learns_text:
            for text in (self.live.text, self.average.text):
                text.load_state_dict(load_average(folder / "large.pt", "text"))
                text.requires_grad_(False)
        blocks = [p for p in self.live.transformer.transformer_blocks.parameters() if p.ndim == 2]
        known = set(map(id, blocks))
        others = [p for p in self.live.parameters() if p.requires_grad and id(p) not in known]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(blocks, lr=0.01, weight_decay=0.01, adjust_lr_fn="original"), 0.01),
            (torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99)), 2e-3),
        ]
        self.step = 0
        self.seconds = 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.live.load_state_dict(state["live"])
            self.average.load_state_dict(state["average"])
            for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"{name}: goes on at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    @property
    def done(self) -> float:
        return self.seconds / (60 * self.minutes)

    def set_rates(self) -> None:
        """100 steps of warm-up, then constant, then linear to nothing over the last 45 % of the time."""
        share = min(1.0, (self.step + 1) / 100) * min(1.0, max(0.01, (1 - self.done) / 0.45))
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share

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
    average = torch.load(checkpoint, weights_only=True)["average"]
    return {key.removeprefix(f"{part}."): value for key, value in average.items() if key.startswith(f"{part}.")}


@torch.no_grad()
def held_out_loss(run: Run, data: dict[str, torch.Tensor]) -> float:
    """Loss of the averaged weights on scenes never trained on, the same noise every time."""
    batch = make_batch(data["latents"][-HELD_OUT:].float(), data["ids"][-HELD_OUT:].long(), torch.Generator().manual_seed(0))
    return flow_loss(run.average.transformer, run.average.text, batch).item()


def train(run: Run, data: dict[str, torch.Tensor], batch_size: int, save_every: float = 120.0) -> None:
    transformer = torch.compile(run.live.transformer)
    losses: list[float] = []
    saved = run.seconds
    stream = batches(data, batch_size, seed=run.step)
    flow_loss(transformer, run.live.text, next(stream)).backward()  # compiles; not counted as training
    for optimizer, _ in run.optimizers:
        optimizer.zero_grad()
    tick = time.monotonic()
    while run.done < 1:
        run.set_rates()
        loss = flow_loss(transformer, run.live.text, next(stream))
        loss.backward()
        for optimizer, _ in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        run.update_average()
        losses.append(loss.item())
        tick, last = time.monotonic(), tick
        run.seconds += tick - last
        if run.seconds - saved > save_every or run.done >= 1:
            saved = run.seconds
            run.save()
            print(
                f"{run.seconds / 60:5.1f} min  step {run.step}  images {run.step * batch_size}  "
                f"loss {np.mean(losses):.4f}  held out {held_out_loss(run, data):.4f}",
                flush=True,
            )
            losses.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("data", *SHAPES))
    parser.add_argument("--out", type=Path, default=Path("build/out/demo"), help="work folder; holds vae/ from demo.vae")
    parser.add_argument("--sprites", type=Path, help="for data: the assets/ folder of @lobehub/fluent-emoji-3d")
    parser.add_argument("--scenes", type=int, default=24_000, help="for data")
    parser.add_argument("--minutes", type=float, default=45.0, help="training time; compiling comes on top")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data_file = arguments.out / "data.safetensors"
    if arguments.what == "data":
        if arguments.sprites is None:
            parser.error("data needs --sprites")
        vae = AutoencoderKL.from_pretrained(arguments.out / "vae")
        save_file(make_data(Sprites(arguments.sprites), vae, arguments.scenes), data_file)
        return
    run = Run(arguments.what, arguments.out, arguments.minutes)
    train(run, load_file(data_file), arguments.batch_size)


if __name__ == "__main__":
    main()
