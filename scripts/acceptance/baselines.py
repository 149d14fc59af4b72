"""What our runtime is measured beside: diffusers' own modules on the same weights, and the two ends of a request."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from hst_trt.tensor_names import LARGE, SMALL

from .journal import Journal
from .pairs import PairShape, fill, make_vae
from .settings import Settings
from .timing import interleave

__all__ = ["allow_many_compilations", "diffusers_calls", "measure_ends", "measure_matrix_product"]

Calls = dict[str, Callable[[], float]]


def diffusers_calls(
    journal: Journal, settings: Settings, models: Mapping[str, SD3Transformer2DModel], shape: PairShape
) -> Calls:
    """Calls of diffusers' own forward by name: eager, and with its blocks compiled."""
    calls = {f"diffusers eager: {role}": _forward(settings, models[role], shape) for role in (LARGE, SMALL)}
    with journal.check("diffusers' blocks compile"):
        start = time.monotonic()
        compiled = {}
        for role in (LARGE, SMALL):
            twin = _sharing_weights(models[role])
            for block in twin.transformer_blocks:
                block.compile(dynamic=False, fullgraph=True, backend=settings.compiler)
            compiled[f"diffusers compiled: {role}"] = _forward(settings, twin, shape)
        for call in compiled.values():
            call()
        journal.fact("seconds to compile diffusers' blocks", round(time.monotonic() - start, 1))
        calls |= compiled
    return calls


def allow_many_compilations() -> None:
    """A block is compiled for each number of tokens; torch would give up after eight."""
    torch._dynamo.config.recompile_limit = 64


def _sharing_weights(model: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Another model of the same weights, which are held once."""
    with torch.device("meta"):
        twin = SD3Transformer2DModel.from_config(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def _forward(settings: Settings, model: SD3Transformer2DModel, shape: PairShape) -> Callable[[], float]:
    device, dtype, spec = settings.torch_device, model.dtype, shape.spec
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    inputs = {
        "hidden_states": normal(2, spec.latent_channels, *(side * spec.patch_size for side in shape.grid)),
        "encoder_hidden_states": normal(2, spec.text_length, spec.large.text_width),
        "pooled_projections": normal(2, spec.large.pooled_width),
        "timestep": torch.tensor([500.0, 500.0], device=device),
    }
    return lambda: _seconds(device, lambda: model(**inputs, return_dict=False))


@torch.no_grad()
def _seconds(device: str, work: Callable[[], object]) -> float:
    """Seconds that work takes on the device, enqueued on torch's current stream."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure_matrix_product(journal: Journal, settings: Settings, rounds: int) -> None:
    """A large bfloat16 product on random data: the rate that this very device reaches with torch's own kernels."""
    side = 256 if settings.rehearse else 8192
    a, b = (torch.randn(side, side, device=settings.torch_device, dtype=torch.bfloat16) for _ in range(2))
    name = f"{side} x {side} x {side}"
    interleave(
        journal, "matrix product", {name: lambda: _seconds(settings.torch_device, lambda: a @ b)}, rounds=rounds, warmup=3
    )
    journal.fact("matrix product", {"name": name, "flops": 2 * side**3})


# -- the two ends of a request -------------------------------------------------------------------------------------------
def measure_ends(journal: Journal, settings: Settings, shape: PairShape, rounds: int) -> None:
    """Text encoders and VAE decoder of SD3.5's shapes, torch eager in bfloat16: what a request takes beside its loop."""
    device, dtype = settings.torch_device, torch.bfloat16
    vae = make_vae(shape, device, dtype)
    sides = [side * shape.spec.patch_size for side in shape.grid]
    latents = torch.randn(1, shape.spec.latent_channels, *sides, device=device, dtype=dtype)
    works: dict[str, Callable[[], object]] = {"VAE decoder": lambda: vae.decode(latents, return_dict=False)}
    works |= _text_encoders(settings, shape)
    calls = {name: lambda work=work: _seconds(device, work) for name, work in works.items()}
    interleave(journal, "ends", calls, rounds=rounds, warmup=2)


def _text_encoders(settings: Settings, shape: PairShape) -> dict[str, Callable[[], object]]:
    """Encoders shaped like T5-XXL, CLIP-L and CLIP-G, for a prompt and a negative one; small ones in a rehearsal."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    part = 16 if settings.rehearse else 1
    t5 = T5Config(
        d_model=4096 // part, d_ff=10240 // part, d_kv=64, num_layers=max(1, 24 // part), num_heads=64 // part,
        vocab_size=32128, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    kinds: list[tuple[str, Any, Any, int]] = [("T5-XXL", T5EncoderModel, t5, shape.t5_length)]
    for name, width, layers in (("CLIP-L", 768, 12), ("CLIP-G", 1280, 32)):
        clip = CLIPTextConfig(
            hidden_size=width // part, intermediate_size=4 * width // part, num_hidden_layers=max(1, layers // part),
            num_attention_heads=max(1, width // 64 // part), projection_dim=width // part, max_position_embeddings=77,
            vocab_size=49408,
        )  # fmt: skip
        kinds.append((name, CLIPTextModelWithProjection, clip, 77))
    return {name: _encode(settings.torch_device, model, config, length) for name, model, config, length in kinds}


def _encode(device: str, model: Any, config: Any, length: int) -> Callable[[], object]:
    with torch.device("meta"):
        encoder = model(config)
    encoder = encoder.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    fill(encoder, 1)
    for name, buffer in encoder.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1], device=device)[None])
    ids = torch.randint(0, 400, (2, length), device=device)
    return lambda: encoder(input_ids=ids)
