"""Which shapes each engine is prepared for: pinned profiles for the calls that are expected, and a range for all others.

A pinned profile (least = best = greatest) lets TensorRT choose kernels and memory for one shape. The large model has one for
each token bucket of each expected request, the small one and the VAE one for each request. The last profile of an engine is
a range that takes everything within the recipe's limits; a host uses the first profile that takes its shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..bundle import GraphEntry, ProfileEntry
from ..errors import BuildError, RequestError
from ..plan import token_buckets
from ..recipe import Recipe, Target
from ..spec import PairSpec
from ..tensor_names import LARGE, SMALL, TEXT_ENCODERS, VAE_DECODER

__all__ = ["Range", "engine_profiles", "input_shapes"]

Range = tuple[int, int, int]  # least, best and greatest length of an axis


def engine_profiles(name: str, axes: Iterable[str], spec: PairSpec, recipe: Recipe, target: Target) -> tuple[ProfileEntry, ...]:
    """The profiles of a graph's engine, the range last.

    Args:
        name: the graph's.
        axes: the symbolic axes of its inputs, which the profiles give lengths.
        recipe: its resolutions are pinned, its limits bound the range, and its guidance decides the rows of an image.
        target: its numbers of images and its bucket ratios are pinned.

    Raises:
        RequestError: a resolution that the pair cannot draw.
        BuildError: an axis that nothing gives a length.
    """
    axes = tuple(axes)
    profiles: list[ProfileEntry] = []
    for sizes in _expected(name, spec, recipe, target):
        lengths = _lengths(name, sizes, spec)
        unknown = [axis for axis in axes if axis not in lengths]
        if unknown:
            raise BuildError(f"the graph {name} has an axis that no profile gives a length", found=", ".join(unknown))
        profile = ProfileEntry(axes={axis: lengths[axis] for axis in axes})
        if profile not in profiles:  # two sizes with as many tokens are one to a transformer
            profiles.append(profile)
    return tuple(profiles)


def input_shapes(graph: GraphEntry, profile: ProfileEntry) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """For each input of a graph its least, best and greatest shape.

    Raises:
        BuildError: the profile lacks an axis, or its lengths are not in order.
    """
    for axis, (least, best, greatest) in profile.axes.items():
        if not 1 <= least <= best <= greatest:
            raise BuildError(f"a profile wants lengths of the axis {axis} that are not in order", found=str(profile.axes[axis]))
    missing = set(graph.axes) - profile.axes.keys()
    if missing:
        raise BuildError("a profile does not give every axis a length", found=f"none for {', '.join(sorted(missing))}")
    return {
        tensor.name: tuple(
            tuple(profile.axes[axis][which] if isinstance(axis, str) else axis for axis in tensor.shape) for which in range(3)
        )
        for tensor in graph.inputs
    }


# -- the calls that are expected ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Sizes:
    """Of one call, or of a range of calls."""

    images: Range
    rows: Range  # of the transformers: two an image with guidance
    h: Range  # token rows
    w: Range  # token columns
    computed: Range  # tokens that are computed

    @property
    def tokens(self) -> Range:
        return tuple(h * w for h, w in zip(self.h, self.w, strict=True))  # type: ignore[return-value]


def _expected(name: str, spec: PairSpec, recipe: Recipe, target: Target) -> Iterator[_Sizes]:
    rows_of = 2 if recipe.defaults.guidance_scale > 1 else 1
    most = recipe.limits.max_images
    grids = [_grid(spec, recipe, size) for size in recipe.pinned_resolutions]
    if name in (LARGE, SMALL, VAE_DECODER):
        for h, w in grids:
            for images in (count for count in target.images if count <= most):
                for computed in token_buckets(h * w, target.bucket_ratios) if name == LARGE else (h * w,):
                    yield _Sizes(*((n, n, n) for n in (images, rows_of * images, h, w, computed)))
    h, w = grids[0]
    images, side = min(target.images[0], most), _longest(spec, recipe) // spec.token_side
    yield _Sizes(
        images=(1, images, most),
        rows=(1, rows_of * images, 2 * most),
        h=(1, h, side),
        w=(1, w, side),
        computed=(1, h * w, side * side),
    )


def _grid(spec: PairSpec, recipe: Recipe, size: tuple[int, int]) -> tuple[int, int]:
    longest = _longest(spec, recipe)
    if any(side % spec.token_side or not 0 < side <= longest for side in size):
        raise RequestError(
            f"the recipe {recipe.name} names a resolution that the pair cannot draw",
            found=f"height {size[0]}, width {size[1]}",
            fix=f"give multiples of {spec.token_side} up to {longest}",
        )
    return spec.grid(*size)


def _longest(spec: PairSpec, recipe: Recipe) -> int:
    return min(recipe.limits.max_side, spec.max_side)


def _lengths(name: str, sizes: _Sizes, spec: PairSpec) -> Mapping[str, Range]:
    """The lengths of the axes that graphs name; ``B`` counts rows in the transformers and images in the glue."""
    text, channels = spec.text_length, spec.large.token_channels
    if name in (LARGE, SMALL):
        return {"B": sizes.rows, "M": sizes.computed, "N": sizes.tokens, "T": (text, text, text)}
    if name == VAE_DECODER:  # images are decoded one after another, to bound the memory
        return {"images": (1, 1, 1), "token_rows": sizes.h, "token_columns": sizes.w}
    if name in TEXT_ENCODERS:
        return {"prompts": sizes.rows}  # different ones: at most one a row
    # `guide` is only called with guidance, and cuts its rows into two halves.
    rows = (2, max(2, sizes.rows[1]), sizes.rows[2]) if name == "guide" else sizes.rows
    tokens = {"M": sizes.computed, "N": sizes.tokens, "h": sizes.h, "w": sizes.w, "C": (channels, channels, channels)}
    return {"B": sizes.images, "R": rows, "P": sizes.rows} | tokens
