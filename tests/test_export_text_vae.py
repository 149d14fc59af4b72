"""The text encoders' and the VAE's graphs against transformers and diffusers, on tiny random models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from hst_trt.errors import IncompatibleError
from hst_trt.export.check import check_clip, check_structure
from hst_trt.export.graph import GraphBuilder, onnx_dtype
from hst_trt.export.text import clip_text_graph, t5_encoder_graph
from hst_trt.export.vae import vae_decoder_graph
from hst_trt.export.weights import WeightStore

TEXT_LENGTH = 12
VOCABULARY = 50
END = 49


# -- tiny models ---------------------------------------------------------------------------------------------------------
def save_clip(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> CLIPTextModelWithProjection:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "projection_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": END,
    }
    torch.manual_seed(0)
    return _save(CLIPTextModelWithProjection(CLIPTextConfig(**(settings | changes))), folder, dtype)


def save_t5(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> T5EncoderModel:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 6,  # heads * d_kv need not be d_model
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
        "feed_forward_proj": "gated-gelu",
    }
    torch.manual_seed(0)
    return _save(T5EncoderModel(T5Config(**(settings | changes))), folder, dtype)


def save_vae(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    torch.manual_seed(0)
    return _save(AutoencoderKL(**(settings | changes)), folder, dtype)


def _save(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Shakes all weights (fresh norms are all ones, fresh biases zero), saves, and gives the model back in float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().to(dtype).save_pretrained(folder)
    return model.float()


# -- running -------------------------------------------------------------------------------------------------------------
def run_graph(graph: GraphBuilder, folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's outputs by name, from a file beside the weights that it refers to."""
    graph.save(folder / "model.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def prompts(count: int, length: int = TEXT_LENGTH, end: int | None = END) -> np.ndarray:
    """Token ids with the end token at a different place in each prompt, and again after it as padding."""
    ids = np.random.default_rng(count).integers(3, VOCABULARY - 1, (count, length))
    if end is not None:
        for row in range(count):
            ids[row, 2 + row :] = end
    return ids


def relative_error(found: np.ndarray, expected: torch.Tensor) -> float:
    reference = expected.double().numpy()
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def shapes(values: Any) -> dict[str, tuple[int, list[int | str]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def clip_reference(model: CLIPTextModelWithProjection, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = model(torch.from_numpy(ids), output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


def assert_clip_agrees(model: CLIPTextModelWithProjection, folder: Path, ids: np.ndarray) -> None:
    graph = clip_text_graph(config_of(folder), WeightStore(folder), "float32", ids.shape[1])
    found = run_graph(graph, folder, {"input_ids": ids})
    hidden_states, text_embeds = clip_reference(model, ids)
    assert relative_error(found["hidden_states"], hidden_states) < 2e-5
    assert relative_error(found["text_embeds"], text_embeds) < 2e-5


def assert_t5_agrees(model: T5EncoderModel, folder: Path, ids: np.ndarray) -> None:
    graph = t5_encoder_graph(config_of(folder), WeightStore(folder), "float32", ids.shape[1])
    found = run_graph(graph, folder, {"input_ids": ids})
    with torch.no_grad():
        expected = model(torch.from_numpy(ids))[0]
    assert relative_error(found["hidden_states"], expected) < 2e-5


def patchify(latents: torch.Tensor, p: int) -> np.ndarray:
    """[B, C, h*p, w*p] -> [B, h, w, C*p*p], index by index as the contract has it."""
    b, c, height, width = latents.shape
    tokens = np.empty((b, height // p, width // p, c * p * p), np.float32)
    for channel in range(c):
        for i in range(p):
            for j in range(p):
                tokens[..., (channel * p + i) * p + j] = latents[:, channel, i::p, j::p].numpy()
    return tokens


def assert_vae_agrees(model: Any, folder: Path, batch: int, rows: int, columns: int, p: int = 2) -> None:
    """Compares with what StableDiffusion3Pipeline does after its loop, to the byte in all but a few places."""
    config = config_of(folder)
    generator = torch.Generator().manual_seed(rows * columns)
    latents = 2 * torch.randn(batch, config["latent_channels"], rows * p, columns * p, generator=generator)
    with torch.no_grad():
        decoded = model.decode(latents / config["scaling_factor"] + (config["shift_factor"] or 0.0)).sample
    assert 0.05 < float((decoded.abs() < 1).float().mean()) < 1  # both inside the range and clamped, or it shows little
    processor = VaeImageProcessor()
    expected = np.stack([np.asarray(image) for image in processor.postprocess(decoded, output_type="pil")])

    graph = vae_decoder_graph(config, WeightStore(folder), "float32", patch_size=p)
    found = run_graph(graph, folder, {"latent_tokens": patchify(latents, p)})["image"]
    assert found.dtype == np.uint8
    assert found.shape == expected.shape == (batch, rows * p * 4, columns * p * 4, 3)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


# -- CLIP ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, END])
def test_clip_gives_the_penultimate_states_and_the_embedding_of_transformers(tmp_path: Path, hidden_act: str, end: int) -> None:
    model = save_clip(tmp_path, hidden_act=hidden_act, eos_token_id=end)
    for count in (1, 3):
        assert_clip_agrees(model, tmp_path, prompts(count))


def test_clip_pools_at_the_first_end_token_even_where_a_higher_id_stands_elsewhere(tmp_path: Path) -> None:
    ids = prompts(3, end=30)
    ids[:, 0] = END
    assert_clip_agrees(save_clip(tmp_path / "named", eos_token_id=30), tmp_path / "named", ids)
    assert_clip_agrees(save_clip(tmp_path / "highest", eos_token_id=2), tmp_path / "highest", ids)


def test_clip_projects_to_another_width_than_its_own(tmp_path: Path) -> None:
    model = save_clip(tmp_path, projection_dim=20)
    assert_clip_agrees(model, tmp_path, prompts(2))
    outputs = shapes(clip_text_graph(config_of(tmp_path), WeightStore(tmp_path), "float32").build().graph.output)
    assert outputs["text_embeds"][1] == ["prompts", 20]


def test_clip_with_one_layer_hands_out_its_embeddings(tmp_path: Path) -> None:
    assert_clip_agrees(save_clip(tmp_path, num_hidden_layers=1), tmp_path, prompts(2))


def test_clip_takes_a_text_length_below_its_position_table(tmp_path: Path) -> None:
    assert_clip_agrees(save_clip(tmp_path), tmp_path, prompts(2, length=7))


def test_clip_is_found_with_and_without_the_text_model_prefix(tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "text_model.embeddings.token_embedding.weight" in tensors
    save_file({key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}, file)
    assert_clip_agrees(model, tmp_path, prompts(2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "mish"}, "mish"),
        ({"eos_token_id": None}, "end token"),
        ({"eos_token_id": [2, 3]}, "end token"),
    ],
)
def test_clip_refuses_a_config_it_cannot_follow(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    save_clip(tmp_path)
    with pytest.raises(IncompatibleError, match=said):
        clip_text_graph(config_of(tmp_path) | changes, WeightStore(tmp_path), "float32")


@pytest.mark.parametrize("length", [0, TEXT_LENGTH + 1])
def test_clip_refuses_a_length_that_it_has_no_positions_for(tmp_path: Path, length: int) -> None:
    save_clip(tmp_path)
    with pytest.raises(IncompatibleError, match=f"text length of {length}"):
        clip_text_graph(config_of(tmp_path), WeightStore(tmp_path), "float32", length)


# -- T5 ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu", "gated-relu", "gelu"])
def test_t5_gives_the_last_states_of_transformers(tmp_path: Path, feed_forward: str) -> None:
    model = save_t5(tmp_path, feed_forward_proj=feed_forward)
    for count in (1, 3):
        assert_t5_agrees(model, tmp_path, prompts(count, end=None))


def test_t5_with_the_real_number_of_buckets_agrees_at_a_length_past_the_last_of_them(tmp_path: Path) -> None:
    model = save_t5(tmp_path, relative_attention_num_buckets=32, relative_attention_max_distance=128)
    assert_t5_agrees(model, tmp_path, prompts(2, length=256, end=None))


def test_t5_is_found_by_its_embedding_under_the_encoder_too(tmp_path: Path) -> None:
    model = save_t5(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, file)
    assert_t5_agrees(model, tmp_path, prompts(2, end=None))


def test_t5_refuses_float16(tmp_path: Path) -> None:
    save_t5(tmp_path)
    with pytest.raises(IncompatibleError, match="bfloat16 or float32"):
        t5_encoder_graph(config_of(tmp_path), WeightStore(tmp_path), "float16", TEXT_LENGTH)


def test_t5_refuses_an_activation_it_does_not_know(tmp_path: Path) -> None:
    save_t5(tmp_path)
    with pytest.raises(IncompatibleError, match="swish"):
        t5_encoder_graph(
            config_of(tmp_path) | {"feed_forward_proj": "gated-swish"}, WeightStore(tmp_path), "float32", TEXT_LENGTH
        )


# -- VAE -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 4, 4), (2, 3, 5), (1, 6, 2)])
def test_vae_makes_the_bytes_of_the_pipeline_at_any_size(tmp_path: Path, batch: int, rows: int, columns: int) -> None:
    assert_vae_agrees(save_vae(tmp_path), tmp_path, batch, rows, columns)


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_add_attention": False},
        {"use_post_quant_conv": True, "use_quant_conv": True},
        {"shift_factor": None, "scaling_factor": 0.5},
        {"latent_channels": 3, "layers_per_block": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_vae_variants_make_the_bytes_of_the_pipeline(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_vae_agrees(save_vae(tmp_path, **changes), tmp_path, 1, 3, 4)


def test_vae_takes_tokens_of_one_latent_each(tmp_path: Path) -> None:
    assert_vae_agrees(save_vae(tmp_path), tmp_path, 2, 4, 6, p=1)


def test_vae_attention_is_found_under_its_old_names(tmp_path: Path) -> None:
    model = save_vae(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in load_file(file).items():
        for new_name, old_name in old.items():
            key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        tensors[key] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, file)
    assert_vae_agrees(model, tmp_path, 1, 3, 4)


def test_vae_configs_of_early_releases_get_the_defaults_of_diffusers(tmp_path: Path) -> None:
    save_vae(tmp_path, scaling_factor=0.18215, shift_factor=None, use_post_quant_conv=True, use_quant_conv=True)
    full = config_of(tmp_path)
    added_later = ("scaling_factor", "shift_factor", "use_post_quant_conv", "mid_block_add_attention")
    early = {key: value for key, value in full.items() if key not in added_later}
    weights = WeightStore(tmp_path)
    assert vae_decoder_graph(early, weights, "float32").build() == vae_decoder_graph(full, weights, "float32").build()


@pytest.mark.parametrize("changes", [{"act_fn": "gelu"}, {"up_block_types": ["AttnUpDecoderBlock2D"] * 3}])
def test_vae_refuses_a_decoder_of_other_blocks(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_vae(tmp_path)
    with pytest.raises(IncompatibleError, match="cannot be exported"):
        vae_decoder_graph(config_of(tmp_path) | changes, WeightStore(tmp_path), "float32")


# -- all three -----------------------------------------------------------------------------------------------------------
def clip_graph(folder: Path, precision: Any) -> GraphBuilder:
    return clip_text_graph(config_of(folder), WeightStore(folder), precision)


def t5_graph(folder: Path, precision: Any) -> GraphBuilder:
    return t5_encoder_graph(config_of(folder), WeightStore(folder), precision, TEXT_LENGTH)


def vae_graph(folder: Path, precision: Any) -> GraphBuilder:
    return vae_decoder_graph(config_of(folder), WeightStore(folder), precision)


Save = Callable[..., Any]
Build = Callable[[Path, Any], GraphBuilder]
COMPONENTS = pytest.mark.parametrize(
    ("save", "build"), [(save_clip, clip_graph), (save_t5, t5_graph), (save_vae, vae_graph)], ids=["clip", "t5", "vae"]
)


def test_weights_stored_in_float16_are_computed_with_in_float32(tmp_path: Path) -> None:
    half = torch.float16
    assert_clip_agrees(save_clip(tmp_path / "clip", half), tmp_path / "clip", prompts(2))
    assert_t5_agrees(save_t5(tmp_path / "t5", half), tmp_path / "t5", prompts(2, end=None))
    assert_vae_agrees(save_vae(tmp_path / "vae", half), tmp_path / "vae", 1, 3, 4)


def test_in_float16_only_the_inside_of_a_graph_is_rounded(tmp_path: Path) -> None:
    """onnxruntime's CPU has float16 (not bfloat16), so the way through a half-precision graph can be run here."""
    save_clip(tmp_path / "clip")
    ids = {"input_ids": prompts(2)}
    exact, half = (run_graph(clip_graph(tmp_path / "clip", p), tmp_path / "clip", ids) for p in ("float32", "float16"))
    for name, values in half.items():
        assert values.dtype == np.float32
        assert 0 < relative_error(values, torch.from_numpy(exact[name])) < 5e-3
    save_vae(tmp_path / "vae")
    tokens = {"latent_tokens": np.random.default_rng(0).standard_normal((1, 3, 5, 16), np.float32)}
    exact, half = (run_graph(vae_graph(tmp_path / "vae", p), tmp_path / "vae", tokens) for p in ("float32", "float16"))
    assert np.abs(exact["image"].astype(int) - half["image"].astype(int)).max() <= 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_axis_that_may_vary_is_symbolic_and_no_other(tmp_path: Path, precision: str) -> None:
    t = TEXT_LENGTH
    int64, float32, uint8 = (onnx_dtype(name) for name in ("int64", "float32", "uint8"))
    save_clip(tmp_path / "clip")
    clip = clip_graph(tmp_path / "clip", precision).build().graph
    assert shapes(clip.input) == {"input_ids": (int64, ["prompts", t])}
    assert shapes(clip.output) == {
        "hidden_states": (float32, ["prompts", t, 32]),
        "text_embeds": (float32, ["prompts", 32]),
    }
    save_t5(tmp_path / "t5")
    t5 = t5_graph(tmp_path / "t5", precision).build().graph
    assert shapes(t5.input) == {"input_ids": (int64, ["prompts", t])}
    assert shapes(t5.output) == {"hidden_states": (float32, ["prompts", t, 32])}
    save_vae(tmp_path / "vae")
    vae = vae_graph(tmp_path / "vae", precision).build().graph
    assert shapes(vae.input) == {"latent_tokens": (float32, ["images", "token_rows", "token_columns", 4 * 2 * 2])}
    assert shapes(vae.output) == {"image": (uint8, ["images", "height", "width", 3])}


@COMPONENTS
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_saved_graph_passes_onnx_checks_beside_its_weights(
    tmp_path: Path, save: Save, build: Build, precision: str
) -> None:
    """Strict inference meets every dtype and shape on the way, so it also shows that a bfloat16 graph is well typed."""
    save(tmp_path)
    model = build(tmp_path, precision).save(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    heavy = [node for node in inferred.graph.node if node.op_type in ("MatMul", "Conv", "Attention")]
    assert heavy
    assert {types[node.output[0]] for node in heavy} == {onnx_dtype(precision)}
    assert all(len(node.output) == 1 for node in heavy)


@COMPONENTS
def test_the_graph_holds_no_weights_itself(tmp_path: Path, save: Save, build: Build) -> None:
    save(tmp_path)
    build(tmp_path, "float32").save(tmp_path / "model.onnx")
    weights = WeightStore(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == weights.files[0].name
            assert not tensor.raw_data
        else:
            assert len(tensor.raw_data) <= 8 * TEXT_LENGTH**2  # T5's table of buckets is the largest constant


def test_the_check_of_an_export_takes_a_half_precision_checkpoint_and_hard_linked_weights(tmp_path: Path) -> None:
    save_clip(tmp_path / "model", torch.bfloat16)
    config = config_of(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    home = tmp_path / "bundle"
    home.mkdir()
    (home / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    for weights in (tmp_path / "model").glob("*.safetensors"):
        os.link(weights, home / weights.name)
    clip_text_graph(config, WeightStore(home), "bfloat16", TEXT_LENGTH).save(home / "model.onnx")
    check_structure(home / "model.onnx", "bfloat16")
    assert check_clip(home, config | {"dtype": "bfloat16"}, TEXT_LENGTH) < 1e-4
