"""The demo VAE: diffusers' AutoencoderKL with a PCA encoder that is computed, and a decoder that is trained.

An encoder trained with its decoder would cost most of the time budget. PCA of 8x8 patches, whitened in part, is known
at once and gives the transformers smooth, decorrelated latents; so it is written into the convolutions of a real
AutoencoderKL, and only the decoder learns, on latents with noise added so that it forgives what a transformer leaves
behind.
"""

from __future__ import annotations

import argparse
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
    """`[B, 3, H, W]` to the latents `[B, 16, H/8, W/8]` that the transformers work on (unit rms)."""
    return (vae.encode(pictures).latent_dist.mode() - SHIFT_FACTOR) * SCALING_FACTOR


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode`, approximately; not clamped."""
    return vae.decode(latents / SCALING_FACTOR + SHIFT_FACTOR).sample


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over pictures, in dB; both in -1..1."""
    return float((-10 * ((pictures.clamp(-1, 1) - reference) / 2).square().mean((1, 2, 3)).log10()).mean())


def _crop(rng: np.random.Generator, scene: Scene, edge: int) -> np.ndarray:
    """An `edge` x `edge` window that lies on a sprite: plain background has little to teach."""
    left, top, size = scene.boxes[rng.integers(len(scene.boxes))]
    corner = [int(np.clip(at + rng.integers(size) - edge // 2, 0, SIZE - edge)) for at in (top, left)]
    return scene.pixels[corner[0] : corner[0] + edge, corner[1] : corner[1] + edge]


def train_decoder(vae: AutoencoderKL, sprites: Sprites, minutes: float, peak: float, seed: int) -> None:
    """Trains the decoder for `minutes` of wall time; prints the PSNR of held-out scenes every half minute."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    decoder = vae.decoder.to(memory_format=torch.channels_last)
    held_out_rng = np.random.default_rng(seed + 999)
    held_out = to_model_space(np.stack([draw_scene(held_out_rng, sprites).pixels for _ in range(32)]))
    held_out_latents = encode(vae, held_out)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    start = time.monotonic()
    reported = step = 0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = peak * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Whole scenes every third step: the attention in the middle must see the number of positions it will meet.
        edge, count = (SIZE, 4) if step % 3 == 2 else (SIZE // 2, 16)
        pictures = to_model_space(np.stack([_crop(rng, draw_scene(rng, sprites), edge) for _ in range(count)]))
        latents = encode(vae, pictures)
        noise = torch.rand(count, 1, 1, 1) * 0.3 * (torch.rand(count, 1, 1, 1) < 0.7)
        drawn = decode(vae, latents + noise * torch.randn_like(latents))
        edges = sum((drawn.diff(dim=d) - pictures.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = (drawn - pictures).abs().mean() + (drawn - pictures).square().mean() + 0.5 * edges
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        if (time.monotonic() - start) // 30 > reported:
            reported = int((time.monotonic() - start) // 30)
            with torch.no_grad():
                clean = psnr(decode(vae, held_out_latents), held_out)
                noisy = psnr(decode(vae, held_out_latents + 0.2 * torch.randn_like(held_out_latents)), held_out)
            print(
                f"{reported * 30:4d} s  step {step}  loss {loss.item():.4f}  PSNR {clean:.2f}  noise 0.2 {noisy:.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sprites", type=Path, required=True, help="the assets/ folder of @lobehub/fluent-emoji-3d")
    parser.add_argument("--out", type=Path, default=Path("build/out/demo"), help="work folder")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1, help="of the decoder's scenes; another one for a second round")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate; 1e-3 suits a second round")
    parser.add_argument("--resume", action="store_true", help="train the decoder in OUT/vae for another round")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sprites = Sprites(arguments.sprites)
    rng = np.random.default_rng(3)
    vae = make_vae()
    pictures = to_model_space(np.stack([draw_scene(rng, sprites).pixels for _ in range(384)]))
    write_pca_encoder(vae, pictures)
    latents = encode(vae, pictures[:64])
    print(f"parameters {sum(p.numel() for p in vae.parameters()):,}  rms {latents.square().mean().sqrt():.3f}", flush=True)
    if arguments.resume:
        vae.load_state_dict(load_file(arguments.out / "vae" / "diffusion_pytorch_model.safetensors"))
    vae.save_pretrained(arguments.out / "vae")
    train_decoder(vae, sprites, arguments.minutes, arguments.rate, arguments.seed)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(arguments.out / "vae")


if __name__ == "__main__":
    main()
