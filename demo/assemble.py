"""Writes the demo pair as one directory that StableDiffusion3Pipeline.from_pretrained loads, plus `transformer_small/`.

The layout is save_pretrained's own, in float16 safetensors, because everything downstream (export, parity tests, a
user's notebook) then treats the demo pair like SD3.5.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file

from demo.text import TextEncoders, Tokenizers
from demo.train import SHAPES, load_average, make_transformer
from demo.vae import make_vae

NOTICES = Path(__file__).parent / "notices"
LIMIT_BYTES = 25_000_000
SHIFT = 3.0
"""The scheduler's sigma shift, SD3's own."""


def load_vae(work: Path) -> AutoencoderKL:
    """Built and filled rather than from_pretrained, which would write the work folder's path into the config."""
    vae = make_vae()
    vae.load_state_dict(load_file(work / "vae" / "diffusion_pytorch_model.safetensors"))
    return vae


def load_transformer(work: Path, name: str) -> SD3Transformer2DModel:
    transformer = make_transformer(SHAPES[name])
    transformer.load_state_dict(load_average(work / f"{name}.pt", "transformer"))
    return transformer


def load_text(work: Path, tokenizers: Tokenizers) -> TextEncoders:
    text = TextEncoders(tokenizers)
    text.load_state_dict(load_average(work / "large.pt", "text"))
    return text


def assemble(work: Path, target: Path) -> int:
    """Writes `target` anew from the checkpoints in `work`; returns its size in bytes."""
    torch.manual_seed(0)
    tokenizers = Tokenizers.make()
    text = load_text(work, tokenizers)
    pipeline = StableDiffusion3Pipeline(
        transformer=load_transformer(work, "large"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=load_vae(work),
        text_encoder=text.first,
        tokenizer=tokenizers.first,
        text_encoder_2=text.second,
        tokenizer_2=tokenizers.second,
        text_encoder_3=text.third,
        tokenizer_3=tokenizers.third,
    ).to(torch.float16)
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part)
    load_transformer(work, "small").half().save_pretrained(part / "transformer_small")
    for config in part.glob("text_encoder*/config.json"):
        # Asked for no dtype, diffusers loads its own parts in float32 but transformers obeys this: they must agree.
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for notice in NOTICES.iterdir():
        shutil.copy(notice, part)
    files = [file for file in part.rglob("*") if file.is_file()]
    for file in files:
        file.chmod(0o644)  # safetensors are written for their owner only; these go into a wheel
    size = sum(file.stat().st_size for file in files)
    if size > LIMIT_BYTES:
        raise ValueError(f"{part} has {size:,} bytes, more than the {LIMIT_BYTES:,} the package may carry: shrink a shape")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return size
