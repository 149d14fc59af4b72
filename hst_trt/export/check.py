"""The checks that every export runs: structure of each graph, and its numbers against the torch modules.

Numbers are checked on a float32 *twin*: the true configuration and the true weights, but only the first, one dual-attention
and the last block of a transformer and two layers of a text encoder. So a check takes seconds and little memory whatever
the model's size, and bf16 graphs, whose products ONNX Runtime has no CPU kernels for, are covered by the same builder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from diffusers import SD3Transformer2DModel

from ..errors import BuildError, IntegrityError, NumericsError
from ..models.glue import REFERENCE
from ..models.sd3 import TokenTransformer
from ..schedule import MAX_STEPS
from ..spec import TransformerSpec
from .graph import GraphBuilder, Precision
from .text import clip_text_graph, t5_encoder_graph
from .transformer import transformer_graph
from .vae import vae_decoder_graph
from .weights import WeightStore

__all__ = ["check_clip", "check_glue", "check_structure", "check_t5", "check_transformer", "check_vae", "glue_sample"]

TOLERANCE = 1e-4  # of the largest value; tiny models stay under 2e-5, real weights have larger activations
_GRIDS = ((4, 4), (3, 5), (6, 2))  # token rows and columns; two are not square


def check_structure(path: Path, precision: Precision) -> None:
    """The graph is valid ONNX, its types agree throughout, and every axis we declare as symbolic is.

    Raises:
        BuildError: what is wrong with which graph.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(_without_external_data(model))
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as exc:  # onnx raises errors of its C++ side under several names
        raise BuildError(f"the graph {path.name} in {path.parent} is not valid", found=str(exc)) from exc
    for value in [*inferred.graph.input, *inferred.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.dim_param and not dim.dim_value:
                raise BuildError(f"{path}: an axis of {value.name} has neither a name nor a size")
    if not any(dim.dim_param for value in inferred.graph.input for dim in value.type.tensor_type.shape.dim):
        raise BuildError(f"{path}: no input has a symbolic axis, so the graph would serve one size only")
    float_types = {"float32": {1}, "float16": {1, 10}, "bfloat16": {1, 16}}[precision]
    for value in inferred.graph.value_info:
        kind = value.type.tensor_type.elem_type
        if kind in (1, 10, 11, 16) and kind not in float_types:
            raise BuildError(f"{path}: {value.name} has ONNX type {kind}, but the graph's precision is {precision}")


def _without_external_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose external weights are inputs: the checker refuses external data in hard-linked files, which ours may be."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = [tensor for tensor in copy.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in stored:
        copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        copy.graph.initializer.remove(tensor)
    return copy


def check_transformer(folder: Path, config: dict[str, Any], *, cached: bool, static: bool = False) -> float:
    """The twin in ONNX Runtime against torch: three sizes, full calls on a cache of NaN, then masked ones on a stale cache.

    Full calls are compared with diffusers' own forward, masked ones with `hst_trt.models.sd3.TokenTransformer`; each side
    keeps a cache of its own.

    Args:
        folder: where the weights are and the twin graph may be written for a moment.
        static: check the flavour whose cache has a static length.

    Returns:
        The largest error relative to the largest value.
    """
    from ..models.sd3 import unpatchify

    model, layers = _twin(folder, config)
    module = TokenTransformer(model, cached)
    spec = TransformerSpec.from_config(config)
    text, rows, worst = 6, 2, 0.0
    most = max(h * w for h, w in _GRIDS) + 3
    cache_rows = (text, most) if static else None
    graph = transformer_graph(config, WeightStore(folder), "float32", cached=cached, cache_rows=cache_rows, layers=layers)
    rng = np.random.default_rng(0)

    def empty_cache(image_rows: int) -> dict[str, np.ndarray]:
        lengths = [text + image_rows] * 2 * len(layers) + [image_rows] * 2 * len(module.dual)
        shapes = zip(module.cache_names, lengths, strict=False)  # without a cache there are no names
        return {name: np.full((rows, spec.heads, length, spec.head_dim), np.nan, np.float32) for name, length in shapes}

    with _session(graph, folder) as run, torch.no_grad():
        for h, w in _GRIDS:
            n = h * w
            inputs = {
                "hidden_tokens": _normal(rng, rows, n, spec.token_channels),
                "pos_ids": np.tile(spec.position_ids(h, w), (rows, 1)),
                "timestep": np.array([900.0, 250.5], np.float32),
                "encoder_hidden_states": _normal(rng, rows, text, spec.text_width),
                "pooled_projections": _normal(rng, rows, spec.pooled_width),
            }
            slots = {"token_slots": np.arange(n)} if static and cached else {}
            ours = empty_cache(most if static else n)
            theirs = {name: torch.from_numpy(values) for name, values in empty_cache(n).items()}
            for count in (n, n // 2, 3) if cached else (n,):
                tokens = {name: np.ascontiguousarray(inputs[name][:, :count]) for name in ("hidden_tokens", "pos_ids")}
                feeds = inputs | tokens
                velocity, ours = _split(run(feeds | slots | ours))
                expected = module(**{name: torch.from_numpy(values) for name, values in feeds.items()}, **theirs)["velocity"]
                worst = max(worst, _error(velocity, expected.numpy()))
                if count == n:
                    latents = unpatchify(torch.from_numpy(inputs["hidden_tokens"]), h, w, config["patch_size"])
                    rest = {k: torch.from_numpy(v) for k, v in inputs.items() if k not in tokens}
                    full = unpatchify(torch.from_numpy(velocity), h, w, config["patch_size"])
                    worst = max(worst, _error(full.numpy(), model(latents, **rest).sample.numpy()))
                inputs["hidden_tokens"] = inputs["hidden_tokens"] + np.float32(0.1)  # so that the cache is really stale
    return _accept(worst, "the transformer's graph", folder)


def _twin(folder: Path, config: dict[str, Any]) -> tuple[SD3Transformer2DModel, list[int]]:
    """The true model's first, one dual-attention and last block as a model of their own, and their numbers."""
    dual = list(config.get("dual_attention_layers") or ())
    layers = sorted({0, *dual[-1:], config["num_layers"] - 1})
    twin = {k: v for k, v in config.items() if not k.startswith("_")} | {
        "num_layers": len(layers),
        "dual_attention_layers": tuple(i for i, layer in enumerate(layers) if layer in dual),
    }
    with torch.device("meta"):
        model = SD3Transformer2DModel(**twin)
    weights = WeightStore(folder)
    names = {key: _twin_key(key, layers) for key in weights}
    try:
        model.load_state_dict({name: _tensor(weights, key) for key, name in names.items() if name}, assign=True)
    except RuntimeError as exc:
        raise IntegrityError(
            f"the weights in {folder} do not belong to its config.json", found=str(exc).splitlines()[-1].strip()
        ) from exc
    return model.eval().requires_grad_(False), layers


def check_clip(folder: Path, config: dict[str, Any], length: int) -> float:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = config | {"num_hidden_layers": min(2, config["num_hidden_layers"])}
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config)).float()
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (3, length))
    ids[:, -1] = config["vocab_size"] - 1 if config["eos_token_id"] == 2 else config["eos_token_id"]

    def reference(tokens: torch.Tensor) -> list[torch.Tensor]:
        out = model(tokens, output_hidden_states=True)
        return [out.hidden_states[-2], out.text_embeds]

    return _check_text(folder, clip_text_graph(config, WeightStore(folder), "float32", length), model, reference, ids)


def check_t5(folder: Path, config: dict[str, Any], length: int) -> float:
    from transformers import T5Config, T5EncoderModel

    config = config | {"num_layers": min(2, config["num_layers"])}
    model = T5EncoderModel(T5Config(**config))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, length))

    def reference(tokens: torch.Tensor) -> list[torch.Tensor]:
        return [model(tokens)[0]]

    return _check_text(folder, t5_encoder_graph(config, WeightStore(folder), "float32", length), model, reference, ids)


def _check_text(
    folder: Path,
    graph: GraphBuilder,
    model: torch.nn.Module,
    reference: Callable[[torch.Tensor], list[torch.Tensor]],
    ids: np.ndarray,
) -> float:
    weights = WeightStore(folder)
    own = model.state_dict()
    model.load_state_dict({key: _tensor(weights, key) for key in weights if key in own}, strict=False)
    model.eval()
    worst = 0.0
    with _session(graph, folder) as run, torch.no_grad():
        for batch in (ids, ids[:1]):
            for value, expected in zip(run({"input_ids": batch}).values(), reference(torch.from_numpy(batch)), strict=True):
                worst = max(worst, _error(value, expected.numpy()))
    return _accept(worst, "the text encoder's graph", folder)


def check_vae(folder: Path, config: dict[str, Any], patch: int) -> float:
    """Returns the largest difference of a pixel, in units of 1/255; one is allowed, for values half way between two."""
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    from ..models.sd3 import patchify

    model = AutoencoderKL.from_pretrained(folder, dtype=torch.float32).eval()
    processor = VaeImageProcessor()
    worst = 0.0
    with (
        _session(vae_decoder_graph(config, WeightStore(folder), "float32", patch_size=patch), folder) as run,
        torch.no_grad(),
    ):
        for h, w in _GRIDS:
            latents = torch.from_numpy(_normal(np.random.default_rng(h), 2, config["latent_channels"], h * patch, w * patch))
            tokens = patchify(latents, patch).reshape(2, h, w, -1).numpy()
            scaling, shift = model.config.scaling_factor, model.config.shift_factor or 0.0
            decoded = model.decode(latents / scaling + shift, return_dict=False)[0]
            if not decoded.isfinite().all():
                raise NumericsError(f"the VAE decoder of {folder} gives values that are not finite")
            expected = (processor.postprocess(decoded, output_type="np") * 255).round()
            worst = max(worst, float(np.abs(run({"latent_tokens": tokens})["image"].astype(np.float32) - expected).max()))
    if worst > 1:
        raise NumericsError(f"the VAE decoder's graph of {folder} departs from diffusers", found=f"{worst:.0f}/255 in a pixel")
    return worst


def check_glue(graphs: dict[str, Path]) -> float:
    """Each glue graph against its torch formula, at three sizes."""
    worst = 0.0
    for name, path in graphs.items():
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_outputs()]
        for batch, (h, w) in enumerate(_GRIDS, start=1):
            rng = np.random.default_rng(batch)
            active = max(1, h * w // 2)
            feeds = _text_sample(session, rng) if name == "join_text" else glue_sample(name, batch, h, w, active, rng)
            tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
            if name == "join_text" and "hidden_3" not in tensors:  # a pair without T5 gets zeros in its place
                length = session.get_outputs()[0].shape[1] - feeds["hidden_1"].shape[1]
                tensors["hidden_3"] = torch.zeros(2, length, session.get_outputs()[0].shape[2])
            expected = REFERENCE[name](**tensors)
            for key, value in zip(names, session.run(names, feeds), strict=True):
                worst = max(worst, _error(value, expected[key].numpy()))
    return _accept(worst, "a glue graph", next(iter(graphs.values())).parent)


def _text_sample(session: ort.InferenceSession, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs of join_text: two prompts for three rows."""
    shapes = {node.name: [2 if isinstance(axis, str) else axis for axis in node.shape] for node in session.get_inputs()}
    del shapes["prompt_index"]
    return {name: _normal(rng, *shape) for name, shape in shapes.items()} | {"prompt_index": np.array([1, 0, 1])}


def glue_sample(name: str, batch: int, h: int, w: int, active: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs of a glue graph."""
    n, c = h * w, 8

    def tokens(count: int = n, images: int = batch) -> np.ndarray:
        return _normal(rng, images, count, c)

    def grid() -> np.ndarray:
        return np.abs(_normal(rng, batch, h, w))

    def number() -> np.ndarray:
        return rng.uniform(0.1, 0.9, 1).astype(np.float32)

    def orders() -> np.ndarray:
        return np.stack([rng.permutation(n) for _ in range(batch)])

    chosen = np.ascontiguousarray(orders()[:, :active])
    match name:
        case "advance":
            parts = {"timesteps": _normal(rng, MAX_STEPS), "coefficients": _normal(rng, MAX_STEPS, 5)}
            return parts | {"step": rng.integers(MAX_STEPS, size=1), "row_index": np.tile(np.arange(batch), 2)}
        case "pack":
            rows, table = np.tile(np.arange(batch), 2), rng.permutation(3 * n)[:n]
            return {"latents": tokens(), "token_ids": chosen, "row_index": rows, "pos_table": table}
        case "guide":
            return {"row_velocity": tokens(images=2 * batch), "guidance_scale": number() * np.float32(9)}
        case "blend":
            parts = {"sketch": tokens(), "refined": tokens(active), "difference": tokens()}
            return parts | {"active": chosen, "decay": number()}
        case "correct":
            return {"sketch": tokens(), "difference": tokens(), "decay": number()}
        case "score":
            parts = {
                "difference": tokens(),
                "active": chosen,
                "sketch": tokens(),
                "last_sketch": tokens(),
                "scores": grid(),
            }
            return parts | {"age": np.floor(grid() * 4), "decay": number(), "drift": number(), "starvation": number()}
        case "select":
            return {"ranks": orders(), "order": orders(), "slots": np.arange(active)}
        case "count":
            return {"priority": grid(), "ranks": orders(), "threshold": number()}
        case "change":
            return {"velocity": tokens(), "last_velocity": tokens()}
        case "integrate":
            parts = {"latents": tokens(), "velocity": tokens(), "history": tokens(), "weights": _normal(rng, 5)}
            kept = rng.random((batch, n, 1)) < 0.5
            last = np.where(kept, parts["velocity"], tokens())
            return parts | {"last_velocity": last, "held": np.floor(grid() * 2).reshape(batch, n)}
        case _:
            return {"latents": tokens()}


# -- helpers ------------------------------------------------------------------------------------------------------------
@contextmanager
def _session(graph: GraphBuilder, folder: Path) -> Iterator[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Runs a graph that stands beside its weights for as long as the context lasts."""
    path = folder / "twin.onnx"
    try:
        graph.save(path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_outputs()]
        yield lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))
    finally:
        path.unlink(missing_ok=True)


def _twin_key(key: str, layers: list[int]) -> str | None:
    """What a stored key is called in the twin; None for those of blocks that it leaves out."""
    block, _, rest = key.removeprefix("transformer_blocks.").partition(".")
    if not key.startswith("transformer_blocks."):
        return key
    return f"transformer_blocks.{layers.index(int(block))}.{rest}" if int(block) in layers else None


def _tensor(weights: WeightStore, key: str) -> torch.Tensor:
    return torch.from_numpy(weights[key].read().astype(np.float32).reshape(weights[key].shape))


def _split(outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Velocity, and the present cache under its past names."""
    return outputs["velocity"], {k.replace("present_", "past_", 1): v for k, v in outputs.items() if k != "velocity"}


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _error(value: np.ndarray, expected: np.ndarray) -> float:
    if not np.isfinite(expected).all() or not np.isfinite(value).all():
        return float("inf")
    return float(np.abs(value - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def _accept(worst: float, what: str, folder: Path) -> float:
    if not worst <= TOLERANCE:
        raise NumericsError(
            f"{what} in {folder} departs from torch",
            found=f"relative error {worst:.2e}, allowed {TOLERANCE:.0e}",
            fix="please report this with the model's id and revision",
        )
    return worst
