"""The demo VAE: diffusers' AutoencoderKL with a PCA encoder that is computed, and a decoder that is trained.

An encoder trained with its decoder would cost most of the time budget. PCA of 8x8 patches, whitened in part, is known
at once and gives the transformers smooth, decorrelated latents; so it is written into the convolutions of a real
AutoencoderKL, and only the decoder learns, on latents with noise added so that it forgives what a transformer leaves
behind.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from demo.scenes import SIZE, Scene, Sprites, draw_scene

CHANNELS = (16, 32, 64, 96)
CROP = 128
DECODER_STEPS, DECODER_RATE = 3000, 3e-3
LATENT_CHANNELS = 16
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609
"""SD3's own constants: the encoder is built to need them, so code that forgets one of the two shows it."""


def make_vae() -> AutoencoderKL:
    """A randomly initialised VAE: latents 8x smaller, 16 channels, no quant convolutions, as in SD3."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )


def to_model_space(pixels: np.ndarray) -> torch.Tensor:
    """`[B, H, W, 3]` uint8 to `[B, 3, H, W]` in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def write_pca_encoder(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Sets the encoder's weights so that its mode is a PCA of 8x8 patches of `pictures` `[B, 3, H, W]`.

    Three stride-2 convolutions of 2x2 blocks carry it: 3 -> 12 exactly, 12 x 4 -> 32 principal components, 32 x 4 ->
    16. The residual branches are silenced. Components are divided by std**0.6, which keeps the strong ones stronger
    than whitening would (they matter most to the eye), then by a common factor to unit rms.

    The last GroupNorm and SiLU would spoil a linear map. Each component therefore enters twice, with both signs, in a
    group otherwise filled by large constants: the constants fix the group's variance, SiLU(z + c') - SiLU(-z + c') = z.
    """
    encoder = vae.encoder
    for module in encoder.modules():
        if module.__class__.__name__ == "ResnetBlock2D":
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    for attention in encoder.mid_block.attentions:
        attention.to_out[0].weight.zero_()
        attention.to_out[0].bias.zero_()

    _set_identity(encoder.conv_in, 3, tap=1)
    blocks = encoder.down_blocks
    _set_block_map(blocks[0].downsamplers[0].conv, torch.eye(12))
    _set_identity(blocks[1].resnets[0].conv_shortcut, 12)

    quarter = F.pixel_unshuffle(F.pixel_unshuffle(pictures, 2), 2)
    _, basis, _ = _principal(quarter, 32, centred=False)
    _set_block_map(blocks[1].downsamplers[0].conv, basis.T)
    _set_identity(blocks[2].resnets[0].conv_shortcut, 32)

    eighth = F.pixel_unshuffle(torch.einsum("bchw,ck->bkhw", quarter, basis), 2)
    mean, basis, std = _principal(eighth, LATENT_CHANNELS, centred=True)
    scale = std**0.6
    scale *= (std / scale).square().mean().sqrt()
    rows = (basis / scale).T
    last = blocks[2].downsamplers[0].conv
    _set_block_map(last, rows / SCALING_FACTOR)
    last.bias[:LATENT_CHANNELS] = SHIFT_FACTOR - rows @ mean / SCALING_FACTOR

    groups, constant = 8, 64.0
    group = CHANNELS[-1] // groups
    shortcut = blocks[3].resnets[0].conv_shortcut
    for layer in (shortcut, encoder.conv_out, encoder.conv_norm_out):
        layer.weight.zero_()
        layer.bias.zero_()
    for k in range(LATENT_CHANNELS):
        positive = (k // 2) * group + 2 * (k % 2)
        for channel, sign in ((positive, 1.0), (positive + 1, -1.0)):
            shortcut.weight[channel, k, 0, 0] = sign
            encoder.conv_out.weight[k, channel, 1, 1] = sign
    signs = torch.tensor([0.0] * 4 + [-1.0, 1.0] * ((group - 4) // 2)).repeat(groups)
    encoder.mid_block.resnets[-1].conv2.bias.copy_(signs * constant)
    encoder.conv_norm_out.weight.fill_(constant * ((group - 4) / group) ** 0.5)
    encoder.conv_out.bias[LATENT_CHANNELS:] = -20  # log-variance: the posterior is a point


def _set_identity(conv: torch.nn.Conv2d, channels: int, tap: int = 0) -> None:
    conv.weight.zero_()
    conv.bias.zero_()
    for i in range(channels):
        conv.weight[i, i, tap, tap] = 1


def _set_block_map(conv: torch.nn.Conv2d, matrix: torch.Tensor) -> None:
    """Makes a stride-2 3x3 convolution (padded right and below) map 2x2 blocks by `matrix` `[out, in * 4]`."""
    conv.weight.zero_()
    conv.bias.zero_()
    out, flat = matrix.shape
    conv.weight[:out, : flat // 4, :2, :2] = matrix.reshape(out, flat // 4, 2, 2)


def _principal(features: torch.Tensor, count: int, *, centred: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean `[C]`, the `count` strongest directions `[C, count]` and their standard deviations of `[B, C, H, W]`."""
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.mean(0) if centred else torch.zeros(rows.shape[1])
    rows = (rows - mean).double()
    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    return mean, directions.flip(1)[:, :count].float(), variances.flip(0)[:count].sqrt().float()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """`[B, 3, H, W]` to the latents `[B, 16, H/8, W/8]` that the transformers work on (about unit rms)."""
    return (vae.encode(pictures).latent_dist.mode() - SHIFT_FACTOR) * SCALING_FACTOR


class PatchMap:
    """What a PCA encoder amounts to, an affine map of 8x8 patches: `encode` a hundred times faster, and its inverse."""

    def __init__(self, vae: AutoencoderKL) -> None:
        down = vae.encoder.down_blocks
        first, second = down[1].downsamplers[0].conv, down[2].downsamplers[0].conv
        self._quarter = first.weight.detach()[:32, :12, :2, :2]
        self._eighth = second.weight.detach()[:LATENT_CHANNELS, :32, :2, :2] * SCALING_FACTOR
        self._bias = (second.bias.detach()[:LATENT_CHANNELS] - SHIFT_FACTOR) * SCALING_FACTOR
        units = torch.eye(192).view(192, 3, 8, 8)
        self._inverse = torch.linalg.pinv((self.encode(units) - self.encode(0 * units)).flatten(1).T)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """As `encode`, for the VAE this was made of."""
        quarter = F.conv2d(F.pixel_unshuffle(pictures, 2), self._quarter, stride=2)
        return F.conv2d(quarter, self._eighth, self._bias, stride=2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The least-squares inverse, `[B, 3, 8 h, 8 w]`: blocky, but there before a decoder is trained."""
        patches = torch.einsum("bchw,pc->bphw", latents - self._bias[:, None, None], self._inverse)
        return F.pixel_shuffle(patches, 8)


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode`, approximately; not clamped."""
    return vae.decode(latents / SCALING_FACTOR + SHIFT_FACTOR).sample


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over pictures, in dB; both in -1..1."""
    return float((-10 * ((pictures.clamp(-1, 1) - reference) / 2).square().mean((1, 2, 3)).log10()).mean())


def make_encoder(work: Path, sprites: Sprites) -> AutoencoderKL:
    """The VAE of `work/vae`, written there with its encoder, and a decoder that knows nothing, if it is not yet."""
    torch.manual_seed(0)
    vae = make_vae()
    weights = work / "vae" / "diffusion_pytorch_model.safetensors"
    if weights.exists():
        vae.load_state_dict(load_file(weights))
        return vae
    rng = np.random.default_rng(3)
    write_pca_encoder(vae, to_model_space(np.stack([draw_scene(rng, sprites).pixels for _ in range(384)])))
    vae.save_pretrained(work / "vae.part")
    (work / "vae.part").rename(work / "vae")
    return vae


def _crop(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """A `CROP` x `CROP` window that lies on a sprite: plain background has little to teach."""
    placed = scene.objects[rng.integers(len(scene.objects))]
    corner = [int(np.clip(at + rng.integers(placed.edge) - CROP // 2, 0, SIZE - CROP)) for at in (placed.top, placed.left)]
    return scene.pixels[corner[0] : corner[0] + CROP, corner[1] : corner[1] + CROP]


def train_decoder(work: Path, sprites: Sprites) -> None:
    """`DECODER_STEPS` steps, kept in `work/decoder.pt` on the way, the result in `work/vae`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = make_encoder(work, sprites)
    encoder = PatchMap(vae)
    decoder = vae.decoder.to(device, memory_format=torch.channels_last)
    held_out_rng = np.random.default_rng(999)
    held_out = to_model_space(np.stack([draw_scene(held_out_rng, sprites).pixels for _ in range(32)]))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=DECODER_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint, step = work / "decoder.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"decoder: goes on at step {step} of {DECODER_STEPS}", flush=True)
    saved = time.monotonic()
    while step < DECODER_STEPS:
        rng = np.random.default_rng((1, step))
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            done = step / DECODER_STEPS
            group["lr"] = DECODER_RATE * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        # Whole scenes now and then: the attention in the middle must see the number of positions it will meet.
        scenes = [draw_scene(rng, sprites) for _ in range(2 if step % 6 == 5 else 8)]
        pictures = to_model_space(np.stack([s.pixels if len(scenes) == 2 else _crop(rng, s) for s in scenes]))
        latents = encoder.encode(pictures)
        noise = torch.rand(len(scenes), 1, 1, 1) * 0.3 * (torch.rand(len(scenes), 1, 1, 1) < 0.7)
        latents = latents + noise * torch.randn_like(latents)
        pictures = pictures.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            drawn = decode(vae, latents.to(device)).float()
        edges = sum((drawn.diff(dim=d) - pictures.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = (drawn - pictures).abs().mean() + (drawn - pictures).square().mean() + 0.5 * edges
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - saved > 45 or step == DECODER_STEPS:
            saved = time.monotonic()
            part = checkpoint.with_suffix(".part")
            torch.save({"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, part)
            part.replace(checkpoint)
            with torch.no_grad():
                latents = encoder.encode(held_out)
                figures = {
                    name: round(psnr(torch.cat([decode(vae, z.to(device)).cpu() for z in noisy.split(4)]), held_out), 2)
                    for name, noisy in (("clean", latents), ("noise 0.2", latents + 0.2 * torch.randn_like(latents)))
                }
            line = {"step": step, "loss": round(loss.item(), 4), "psnr": figures}
            with checkpoint.with_suffix(".jsonl").open("a") as metrics:
                metrics.write(json.dumps(line) + "\n")
            print(f"decoder: {json.dumps(line)} of {DECODER_STEPS}", flush=True)
    vae.decoder.to("cpu", memory_format=torch.contiguous_format)
    vae.save_pretrained(work / "vae")
