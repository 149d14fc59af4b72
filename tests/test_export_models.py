"""Exports of whole models: the true configurations of SD3.5 and SD3, sharded and bf16 weights, T5 absent, and the checks."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny import randomise, transformer

import hst_trt
from hst_trt.builder.build import build_bundle, export_bundle, shipped_demo
from hst_trt.bundle import Bundle
from hst_trt.errors import IncompatibleError, IntegrityError, MissingError, NumericsError, RequestError
from hst_trt.export.check import check_structure, check_transformer
from hst_trt.export.sources import PairFolders, check_stitchable, resolve_pair
from hst_trt.export.transformer import transformer_graph
from hst_trt.export.weights import WeightStore
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.recipe import Defaults, Limits, ModelSource, Recipe, load_recipe, load_target
from hst_trt.tensor_names import GLUE

DEMO = Path(hst_trt.__file__).parent / "data" / "demo_pair"
COMMON = dict(
    sample_size=128, patch_size=2, in_channels=16, attention_head_dim=64, joint_attention_dim=4096,
    pooled_projection_dim=2048, out_channels=16,
)  # fmt: skip
TRUE_CONFIGS = {
    "sd35-large": dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
    ),
    "sd35-medium": dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    ),
    "sd3-medium": dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192, qk_norm=None
    ),
}  # fmt: skip


def sparse_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bf16 with the right header and nothing but holes behind it: 16 GB that take no disk."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)


@pytest.mark.parametrize("kind", list(TRUE_CONFIGS))
@pytest.mark.parametrize("cached", [True, False])
def test_the_graph_of_a_true_configuration_is_written_by_reference(tmp_path: Path, kind: str, cached: bool) -> None:
    config = COMMON | TRUE_CONFIGS[kind]
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    sparse_weights(tmp_path / "diffusion_pytorch_model.safetensors", {k: tuple(v.shape) for k, v in model.state_dict().items()})
    path = tmp_path / "model.onnx"
    graph = transformer_graph(config, WeightStore(tmp_path), "bfloat16", cached=cached).save(path)
    assert path.stat().st_size < 16 * 2**20, "weights belong outside the graph"
    check_structure(path, "bfloat16")
    stored = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    unread = f"transformer_blocks.{config['num_layers'] - 1}.attn."  # the last block's text has no queries
    left_out = {key for key in model.state_dict() if key.startswith((unread + "add_q_proj", unread + "norm_added_q"))}
    assert stored.keys() == model.state_dict().keys() - left_out - {"pos_embed.pos_embed"}
    layers, dual = config["num_layers"], len(config.get("dual_attention_layers", ()))
    past = [value for value in graph.graph.input if value.name.startswith("past_")]
    assert len(past) == (2 * (layers + dual) if cached else 0)
    assert len(graph.graph.output) == 1 + len(past)


def test_a_static_cache_is_sliced_to_the_tokens_of_the_request(tmp_path: Path) -> None:
    """TensorRT's KV-cache layer wants a static length: the flavour with cache_rows agrees with the one without."""
    import onnxruntime as ort

    model = transformer()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    h, w, text, most = 3, 5, 9, 64
    n = h * w
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    feeds = dict(
        hidden_tokens=normal(1, n, 16), pos_ids=np.arange(n)[None], timestep=np.array([500.0], np.float32),
        encoder_hidden_states=normal(1, text, 24), pooled_projections=normal(1, 20),
    )  # fmt: skip
    velocities = []
    for rows in (None, (text, most)):
        path = tmp_path / f"model_{rows is None}.onnx"
        transformer_graph(config, WeightStore(tmp_path), cached=True, cache_rows=rows).save(path)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        length = text + (n if rows is None else most)
        past = {f"past_{k}_{i}": np.full((1, 2, length, 16), np.nan, np.float32) for i in range(3) for k in "kv"}
        slots = {} if rows is None else {"token_slots": np.arange(n)}
        velocities.append(session.run(["velocity"], feeds | past | slots)[0])
    np.testing.assert_allclose(velocities[1], velocities[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cache_rows", [None, (9, 64)])
def test_a_block_in_float32_holds_activations_that_float16_does_not(tmp_path: Path, cache_rows: tuple[int, int] | None) -> None:
    import onnxruntime as ort

    model = transformer(dual_attention_layers=(1,))
    wide, narrow = model.transformer_blocks[1].ff.net[0].proj, model.transformer_blocks[1].ff.net[2]
    wide.weight.data *= 1e5  # products beyond 65504, brought back by the next layer
    narrow.weight.data /= 1e5
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    feeds = dict(
        hidden_tokens=normal(1, 15, 16), pos_ids=np.arange(15)[None], timestep=np.array([500.0], np.float32),
        encoder_hidden_states=normal(1, 9, 24), pooled_projections=normal(1, 20),
    )  # fmt: skip
    if cache_rows is not None:
        feeds["token_slots"] = np.arange(15)

    def velocity(precision: str, blocks: tuple[int, ...]) -> np.ndarray:
        path = tmp_path / f"{precision}_{len(blocks)}.onnx"
        graph = transformer_graph(
            config, WeightStore(tmp_path), precision, cached=True, cache_rows=cache_rows, float32_blocks=blocks
        )
        past = [value for value in graph.save(path).graph.input if value.name.startswith("past_")]
        assert len(past) == 8
        check_structure(path, precision)
        lengths = [
            dim.dim_value or {"B": 1, "T+N": 24, "N": 15}[dim.dim_param] for v in past for dim in v.type.tensor_type.shape.dim
        ]
        shapes = np.reshape(lengths, (-1, 4))
        cache = {value.name: np.zeros(shape, precision) for value, shape in zip(past, shapes, strict=True)}
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(["velocity"], feeds | cache)[0]

    exact = velocity("float32", ())
    assert not np.isfinite(velocity("float16", ())).all()
    np.testing.assert_allclose(velocity("float16", (1,)), exact, rtol=0, atol=0.02 * np.abs(exact).max())
    assert np.array_equal(velocity("float32", (1,)), exact)


def test_a_float32_block_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(RequestError, match=r"does not have: \[3\]") as caught:
        transformer_graph(config, WeightStore(tmp_path), "bfloat16", cached=True, float32_blocks=(1, 3))
    assert caught.value.found == "3 blocks, numbered from 0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_half_precision_checkpoints_pass_the_export_check(tmp_path: Path, dtype: torch.dtype) -> None:
    model = transformer(dual_attention_layers=(0, 1)).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(WeightStore(tmp_path).files) > 2
    assert check_transformer(tmp_path, json.loads((tmp_path / "config.json").read_text()), cached=True) < 1e-5


def test_a_position_table_that_is_not_separable_is_kept_whole(tmp_path: Path) -> None:
    model = transformer()
    randomise(model.pos_embed, 3)
    model.pos_embed.pos_embed = torch.randn_like(model.pos_embed.pos_embed)
    model.save_pretrained(tmp_path)
    assert check_transformer(tmp_path, json.loads((tmp_path / "config.json").read_text()), cached=False) < 1e-5


def test_the_export_check_notices_a_wrong_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer().save_pretrained(tmp_path)
    monkeypatch.setattr("hst_trt.export.transformer._EPS", 1e-2)
    with pytest.raises(NumericsError, match="departs from torch"):
        check_transformer(tmp_path, json.loads((tmp_path / "config.json").read_text()), cached=True)
    assert not (tmp_path / "twin.onnx").exists()


def test_a_missing_tensor_or_shard_is_named(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path, max_shard_size="20KB")
    store = WeightStore(tmp_path)
    with pytest.raises(IntegrityError, match=r"no\.such\.tensor"):
        store["no.such.tensor"]
    store.files[1].unlink()
    with pytest.raises(MissingError, match=store.files[1].name):
        WeightStore(tmp_path)


# -- whole pairs -------------------------------------------------------------------------------------------------------
def recipe_for(large: Path, small: Path | None = None, **settings: object) -> Recipe:
    return Recipe.model_validate(
        dict(
            name="test",
            large=ModelSource(source=str(large)),
            small=ModelSource(source=str(small or large), component="transformer" if small else "transformer_small"),
            max_sequence_length=16,
            limits=Limits(max_side=192, max_images=4),
            defaults=Defaults(num_inference_steps=4, guidance_scale=3.0, height=64, width=64),
        )
        | settings
    )


def pair_directory(folder: Path, **small: object) -> Path:
    """The demo pair's surroundings with tiny random transformers: quick to export."""
    shutil.copytree(DEMO, folder)
    for name, settings in (("transformer", dict(layers=2)), ("transformer_small", dict(layers=2, heads=1) | small)):
        shutil.rmtree(folder / name)
        model = transformer(
            **dict(in_channels=16, out_channels=16, joint_attention_dim=128, pooled_projection_dim=128) | settings
        )
        model.save_pretrained(folder / name)
    return folder


def test_a_pair_without_t5_is_fed_zeros_as_diffusers_does(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    folder = pair_directory(tmp_path / "pair")
    bundle = build_bundle(recipe_for(folder, t5=False), load_target("cpu"), tmp_path / "test-cpu.hstb").bundle
    assert len(bundle.manifest.tokenizers) == 2
    assert "text_encoder_3" not in bundle.manifest.graphs
    image = HybridStitchPipeline.from_bundle(bundle.path)("a cat", seed=1, schedule="large").images[0]
    reference = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        "a cat", height=64, width=64, num_inference_steps=4, guidance_scale=3.0, max_sequence_length=16,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_models_are_taken_from_the_hubs_cache_at_their_revision_and_partial_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--pair" / "snapshots" / revision
    pair_directory(snapshot)
    source = ModelSource(source="someone/pair", revision=revision)
    small = source.model_copy(update={"component": "transformer_small"})
    recipe = recipe_for(snapshot).model_copy(update={"large": source, "small": small})
    assert resolve_pair(recipe).root == snapshot
    for missing in ("vae", "text_encoder_3"):
        (snapshot / missing).rename(tmp_path / missing)
        with pytest.raises(MissingError, match="only in part in the local cache") as caught:
            resolve_pair(recipe)
        assert f"hf download someone/pair --revision {revision}" in str(caught.value)
        (tmp_path / missing).rename(snapshot / missing)
    other = recipe.model_copy(update={"small": recipe.small.model_copy(update={"revision": "f" * 40})})
    with pytest.raises(MissingError, match="someone/pair is not in the local cache"):
        resolve_pair(other)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_graphs_for_gpus_are_exported_and_checked_without_one(tmp_path: Path, precision: str) -> None:
    target = load_target("h100").model_copy(update={"precision": precision})
    folder = pair_directory(tmp_path / "pair")
    bundle = export_bundle(recipe_for(folder), target, tmp_path / "test-h100.hstb").bundle
    assert bundle.manifest.state == "graphs"
    cache = [t for t in bundle.manifest.graphs["large"].inputs if t.name.startswith("past_")]
    assert {t.dtype for t in cache} == {precision}
    assert {t.shape[2] for t in cache} == {16 + 16 + 12 * 12}, "text rows and the largest image's"
    assert {t.dtype for g in bundle.manifest.graphs.values() for t in g.inputs if not t.name.startswith("past_")} <= {
        "float32",
        "int64",
    }


def test_two_directories_with_one_vae_make_a_pair(tmp_path: Path) -> None:
    large, small = pair_directory(tmp_path / "large"), pair_directory(tmp_path / "small")
    bundle = build_bundle(recipe_for(large, small), load_target("cpu"), tmp_path / "test-cpu.hstb").bundle
    assert bundle.manifest.models["small"].source == str(small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(in_channels=8, out_channels=8), ["latent channels 16 (large) and 8 (small)", "velocity channels"]),
        (dict(joint_attention_dim=64), ["text width 128 (large) and 64 (small)"]),
        (dict(pooled_projection_dim=64), ["pooled text width"]),
    ],
    ids=["channels", "text", "pooled"],
)
def test_transformers_that_do_not_fit_are_refused_with_what_differs(tmp_path: Path, change: dict, words: list[str]) -> None:
    folder = pair_directory(tmp_path / "pair", **change)
    folders = PairFolders(folder, folder / "transformer", folder, folder / "transformer_small")
    with pytest.raises(IncompatibleError) as caught:
        check_stitchable(folders)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("what", ["scaling_factor", "shift", "weights"])
def test_surroundings_that_do_not_fit_are_refused_with_what_differs(tmp_path: Path, what: str) -> None:
    large, small = pair_directory(tmp_path / "large"), pair_directory(tmp_path / "small")
    if what == "weights":
        from safetensors.torch import load_file, save_file

        file = small / "vae" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        state["decoder.conv_in.weight"] += 0.5
        save_file(state, file)
    else:
        file = small / ("vae/config.json" if what == "scaling_factor" else "scheduler/scheduler_config.json")
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {what: 9.5}))
    folders = PairFolders(large, large / "transformer", small, small / "transformer")
    with pytest.raises(IncompatibleError, match="cannot be stitched") as caught:
        check_stitchable(folders)
    assert {"scaling_factor": "VAE scaling_factor", "shift": "sigma shift", "weights": "VAE weights"}[what] in str(caught.value)


def test_an_sde_sampler_is_refused(tmp_path: Path) -> None:
    folder = pair_directory(tmp_path / "pair")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stochastic_sampling": True}))
    with pytest.raises(IncompatibleError, match="stochastic_sampling"):
        export_bundle(recipe_for(folder), load_target("cpu"), tmp_path / "test-cpu.hstb")
    assert not (tmp_path / "test-cpu.hstb").exists()


# -- what ships --------------------------------------------------------------------------------------------------------
def test_the_shipped_demo_graphs_are_what_an_export_gives_now(tmp_path: Path) -> None:
    shipped = shipped_demo()
    assert shipped is not None, "run `make demo-graphs`"
    fresh = export_bundle(load_recipe("demo"), load_target("cpu"), tmp_path / "demo-cpu.hstb").bundle
    before = json.loads((shipped / "manifest.json").read_text())["files"]
    after = {name: entry.model_dump() for name, entry in fresh.manifest.files.items()}
    assert before == after, "run `make demo-graphs` and commit the result"
    calibrations = json.loads((shipped / "manifest.json").read_text())["calibrations"]
    assert calibrations, "run `make demo-calibration` and commit the result"
    assert [entry.model_dump(mode="json") for entry in fresh.manifest.calibrations] == calibrations


def test_every_graph_of_the_demo_bundle_was_checked_and_has_symbolic_axes(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    assert set(GLUE) <= manifest.graphs.keys()
    for name, graph in manifest.graphs.items():
        assert graph.worst_error is not None, name
        assert graph.worst_error <= (1 if name == "vae_decoder" else 2e-5), name
    axes = {axis for tensor in manifest.graphs["large"].inputs for axis in tensor.shape if isinstance(axis, str)}
    assert axes == {"B", "M", "T", "T+N"}
