"""Start noise that equals torch's for the same seed, without torch.

So that a picture can be compared one to one with diffusers': ``torch.randn(..., generator=torch.Generator("cpu")
.manual_seed(seed))`` is a Mersenne Twister (MT19937) seeded with the low 32 bits of the seed, whose draws become uniform
numbers of 24 bits and then, in blocks of 16, normal ones by Box and Muller's transform (G. E. P. Box, M. E. Muller, "A Note
on the Generation of Random Normal Deviates", 1958): the first 8 of a block give the radius, the last 8 the angle. Equal to
torch within a few 1e-7: torch's vector code rounds log and cos differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import RequestError

__all__ = ["start_noise", "torch_randn"]

_BLOCK = 16


def start_noise(seeds: int | Sequence[int], shape: tuple[int, int, int, int]) -> np.ndarray:
    """Noise of `shape` [B, C, H, W] in float32.

    One seed is one generator for the whole batch; a sequence gives every image its own, as a list of generators does in
    diffusers.

    Raises:
        RequestError: a seed is outside 0 .. 2**64-1, or there are not as many seeds as images.
    """
    if isinstance(seeds, (int, np.integer)):
        return torch_randn(int(seeds), shape)
    if len(seeds) != shape[0]:
        raise RequestError(
            f"{len(seeds)} seeds were given for {shape[0]} images",
            fix="give one seed for the whole request, or one for each image",
        )
    return np.concatenate([torch_randn(int(seed), (1, *shape[1:])) for seed in seeds])


def torch_randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 normal numbers as ``torch.randn`` draws them on a CPU; at least 16, since torch treats fewer differently."""
    if not 0 <= seed < 2**64:
        raise RequestError(f"seed {seed} is outside 0 .. 2**64-1")
    size = int(np.prod(shape))
    if size < _BLOCK:
        raise ValueError(f"shape {shape} has fewer than {_BLOCK} elements")
    twister = np.random.MT19937()
    twister.state = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)  # type: ignore[assignment]
    tail = _BLOCK if size % _BLOCK else 0  # torch redraws the last 16 numbers if the size is not a multiple of 16
    uniform = (twister.random_raw(size + tail) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
    values = np.empty(size, np.float32)
    whole = size - size % _BLOCK
    values[:whole] = _box_muller(uniform[:whole])
    if tail:
        values[-_BLOCK:] = _box_muller(uniform[size:])
    return values.reshape(shape)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """The functions are taken in float64 and rounded, so that every machine has the same bits, and the C++ host too: numpy's
    float32 ones differ from processor to processor."""
    u, v = uniform.reshape(-1, 2, _BLOCK // 2).swapaxes(0, 1)
    log = np.log((np.float32(1.0) - u).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2.0) * log)
    angle = (np.float32(2.0 * np.pi) * v).astype(np.float64)
    return np.stack([radius * f(angle).astype(np.float32) for f in (np.cos, np.sin)], axis=1).reshape(-1)
