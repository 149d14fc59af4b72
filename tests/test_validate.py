"""Parity of a bundle's engines with the float32 twins of their graphs: what is covered, what is found, and where."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Finished
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from tiny import KINDS, transformer

from hst_trt.bundle import Bundle
from hst_trt.departure import departure, first_departure, marked_engine
from hst_trt.export.float32 import float_values
from hst_trt.export.transformer import transformer_graph
from hst_trt.export.weights import WeightStore
from hst_trt.models.sd3 import TokenTransformer
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import token_buckets
from hst_trt.runtime.ort import OnnxRuntimeBackend
from hst_trt.validate import TOLERANCES, Call, Parity, Twins, compare, error_of, tap_calls, twin_values, validate

Hst = Callable[..., Finished]
ROWS, TEXT, TOKENS = 2, 9, 20


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a default size of 6 x 8 tokens, which have five buckets."""
    copy = tmp_path_factory.mktemp("validate") / "tiny.hstb"
    shutil.copytree(tiny_bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["defaults"] |= {"height": 96, "width": 128}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


# -- what is covered -----------------------------------------------------------------------------------------------------
def test_every_engine_and_every_bucket_of_a_good_bundle_is_compared_and_holds(bundle: Path) -> None:
    seen: list[Parity] = []
    results = validate(bundle, on_call=seen.append)
    assert results == seen
    assert {parity.engine for parity in results} == set(Bundle.open(bundle).manifest.graphs)
    assert all(parity.holds and parity.call is None for parity in results)
    assert max(parity.error for parity in results if parity.engine != "vae_decoder") < 1e-4, "one runtime, float32 both"
    large = [int(re.match(r"velocity \[2, (\d+), 64\]$", p.shape)[1]) for p in results if p.engine == "large"]
    assert sorted(large) == list(token_buckets(48)) == [8, 16, 24, 40, 48]


def test_a_bundle_that_draws_without_guidance_is_compared_with_it_too(bundle: Path) -> None:
    pipeline = HybridStitchPipeline.from_bundle(bundle, threads=1)
    manifest = pipeline.bundle.manifest
    defaults = manifest.defaults.model_copy(update={"guidance_scale": 1.0})
    pipeline.bundle.manifest = manifest.model_copy(update={"defaults": defaults})
    calls: list[Call] = []
    tap_calls(pipeline, calls.append)
    assert {call.engine for call in calls} == set(manifest.graphs)
    assert {len(call.inputs["timestep"]) for call in calls if call.engine == "large"} == {1, 2}


def test_a_call_of_the_large_model_holds_the_rows_of_the_cache_that_it_writes(bundle: Path, tmp_path: Path) -> None:
    """A cache that is written wrongly shows in no velocity: the next call is judged on the cache that it finds."""
    pipeline = HybridStitchPipeline.from_bundle(bundle, threads=1)
    calls: list[Call] = []
    tap_calls(pipeline, calls.append)
    masked = next(call for call in calls if call.engine == "large" and call.inputs["hidden_tokens"].shape[1] == 16)
    text = pipeline.spec.text_length
    assert masked.outputs["present_v_1"].shape == (2, 2, text + 16, 16)
    assert masked.inputs["past_v_1"].shape == (2, 2, text + 48, 16)
    expected = Twins(pipeline.bundle, tmp_path).outputs(masked)
    assert compare(masked, expected, "float32").error < 1e-4
    masked.outputs["present_v_1"][0, 1, text + 3] += 1
    assert not compare(masked, expected, "float32").holds


# -- what is found -------------------------------------------------------------------------------------------------------
class Perturbed(OnnxRuntimeBackend):
    """Runs graphs, and then changes an output of one of them."""

    changed = ("", "")
    change = staticmethod(lambda values: values * 1.5)

    def engine(self, name: str) -> Any:
        engine = super().engine(name)
        return _PerturbedEngine(engine) if name == self.changed[0] else engine


class _PerturbedEngine:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prepare(self, bindings: Mapping[str, Any]) -> Any:
        call, array = self._engine.prepare(bindings), bindings[Perturbed.changed[1]].array

        class Wrong:
            def execute(self) -> None:
                call.execute()
                array[...] = Perturbed.change(array)

        return Wrong()


@pytest.fixture
def perturb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """perturb(engine, output, change): from now on bundles are run by a backend that is wrong there."""

    def choose(engine: str, output: str, change: Callable[[np.ndarray], np.ndarray] = lambda values: values * 1.5) -> None:
        monkeypatch.setattr(Perturbed, "changed", (engine, output))
        monkeypatch.setattr(Perturbed, "change", staticmethod(change))
        monkeypatch.setattr("hst_trt.pipeline.open_backend", lambda bundle, **_: Perturbed(bundle.graph_paths(), threads=1))

    return choose


@pytest.mark.parametrize(
    ("engine", "output"),
    [("small", "velocity"), ("large", "present_k_0"), ("text_encoder_2", "text_embeds")],
)
def test_an_engine_that_is_wrong_is_named_and_the_command_ends_with_7(hst: Hst, bundle: Path, perturb, engine, output) -> None:
    perturb(engine, output)
    result = hst("validate", "--bundle", bundle)
    assert result.code == 7
    assert f"1 of 18 engines depart from their graphs, most of all {engine}" in result.err
    assert "no single value of its graph does" in result.err, "the graph is right, only the backend is not"
    assert re.search(rf"{engine} .*0\.5.*0\.001", result.out)


@pytest.mark.parametrize(("step", "holds"), [(1, True), (8, False)])
def test_pixels_are_judged_in_steps_of_one_255th(step: int, holds: bool) -> None:
    image = np.full((1, 2, 2, 3), 100, np.uint8)
    parity = compare(Call("vae_decoder", {}, {"image": image ^ step}), {"image": image}, "float32")
    assert parity.error == step
    assert parity.holds is holds


def test_as_json_the_figures_of_every_engine_are_one_object_even_where_one_is_not_finite(
    hst: Hst, bundle: Path, perturb
) -> None:
    good = hst("validate", "--bundle", bundle, "--json")
    assert good.code == 0
    report = json.loads(good.out)
    assert report["schema"] == "hst_trt.validate/1"
    assert report["holds"] is True
    assert report["engines"]["large"]["shapes"] == 5
    assert report["engines"]["integrate"]["tolerance"] == TOLERANCES["float32"]

    perturb("correct", "velocity", lambda values: values * np.float32(np.nan))
    bad = hst("validate", "--bundle", bundle, "--json")
    assert bad.code == 7
    report = json.loads(bad.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["holds"] is False
    assert report["engines"]["correct"]["worst_error"] is None
    assert "1 of " in bad.err, "the engines after it are not blamed for what they were given"
    assert report["engines"]["large"]["worst_error"] < 1e-4


def test_only_the_call_that_departs_most_is_kept(bundle: Path, perturb) -> None:
    perturb("large", "velocity")
    kept = [parity for parity in validate(bundle) if parity.call is not None]
    assert len(kept) == 1
    assert kept[0].engine == "large"


def test_glue_is_held_to_float32_whatever_the_precision_of_the_models() -> None:
    call = Call("integrate", {}, {"next_latents": np.array([1.0, 1.01], np.float32)})
    assert not compare(call, {"next_latents": np.array([1.0, 1.0], np.float32)}, "bfloat16").holds
    same = Call("small", {}, {"velocity": call.outputs["next_latents"]})
    assert compare(same, {"velocity": np.array([1.0, 1.0], np.float32)}, "bfloat16").holds


@pytest.mark.parametrize(("gap", "holds"), [(1e-6, True), (0.1, False)])
def test_two_tokens_may_change_ranks_only_where_their_priorities_are_all_but_equal(gap: float, holds: bool) -> None:
    priority = np.array([[[1.0, 0.5, 0.5 + gap, 0.1]]], np.float32)
    call = Call("score", {}, {"priority": priority, "ranks": np.array([[0, 1, 2, 3]])})
    assert compare(call, {"priority": priority, "ranks": np.array([[0, 2, 1, 3]])}, "float32").holds is holds


def test_a_value_that_is_not_finite_is_infinitely_far_wherever_it_is() -> None:
    good, bad = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    assert error_of(bad, good) == error_of(good, bad) == error_of(bad, bad) == float("inf")


# -- twins and departures ------------------------------------------------------------------------------------------------
def export(folder: Path, stored: str, precision: str) -> Path:
    """A tiny transformer with dual attention, stored in half precision, and its graph."""
    transformer(**KINDS["sd35-medium"]).to(getattr(torch, stored)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    graph = transformer_graph(config, WeightStore(folder), precision, cached=True, cache_rows=(TEXT, 32))
    graph.save(folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp(request.param), request.param, request.param).parent


def masked_call(folder: Path, tokens: int) -> dict[str, np.ndarray]:
    """Inputs of a call on `tokens` of TOKENS tokens."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    lengths = {"B": ROWS, "M": tokens, "N": TOKENS, "T": TEXT}
    rng = np.random.default_rng(0)
    inputs = {}
    for value in graph.input:
        shape = [lengths.get(axis.dim_param, axis.dim_value) for axis in value.type.tensor_type.shape.dim]
        inputs[value.name] = rng.standard_normal(shape).astype(np.float32)
    inputs["pos_ids"] = np.tile(np.arange(tokens), (ROWS, 1))
    inputs["token_slots"] = np.arange(TOKENS)
    return inputs


@pytest.mark.parametrize("tokens", [TOKENS, 8])
def test_a_half_precision_graphs_twin_equals_torch_in_float32_on_the_same_weights(exported: Path, tokens: int) -> None:
    inputs = masked_call(exported, tokens)
    model = SD3Transformer2DModel.from_pretrained(exported, dtype=torch.float32)
    module = TokenTransformer(model, cached=True)
    feeds = {name: torch.from_numpy(values.copy()) for name, values in inputs.items() if name != "token_slots"}
    for name in module.cache_names:  # the module has no slack behind the last token
        rows = TOKENS + (TEXT if feeds[name].shape[2] > 32 else 0)
        feeds[name] = feeds[name][:, :, :rows].clone()
    with torch.no_grad():
        expected = module(**feeds)
    names = ["velocity", "present_k_0", "present_v_4"]
    found = twin_values(exported / "model.onnx", inputs, names)
    for name in names:
        theirs = expected[name].numpy()
        ours = found[name][:, :, : theirs.shape[2]] if name != "velocity" else found[name]
        assert error_of(ours, theirs) < 2e-5, name


def test_the_first_departing_node_is_the_one_that_reads_the_changed_weight(exported: Path, tmp_path: Path) -> None:
    weight = "transformer_blocks.1.attn.to_v.weight"
    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    file = changed / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {weight: tensors[weight] * 1.2}, file, metadata={"format": "pt"})
    inputs = masked_call(exported, 8)

    def values_of(home: Path) -> Callable[[Sequence[str]], Mapping[str, np.ndarray]]:
        return lambda names: twin_values(home / "model.onnx", inputs, names)

    values = float_values(exported / "model.onnx")
    found = departure(values, values_of(exported), values_of(changed), 1e-3)
    assert found is not None
    reader = next(n for n in onnx.load(exported / "model.onnx", load_external_data=False).graph.node if n.name == found.node)
    assert f"{weight}.T" in reader.input
    assert found.value == reader.output[0]
    assert found.error > 0.05
    assert departure(values, values_of(exported), values_of(exported), 1e-9) is None


def test_a_graphs_values_are_those_that_its_inputs_decide(exported: Path) -> None:
    values = float_values(exported / "model.onnx")
    names = [value for _, value in values]
    assert "velocity" in names
    assert not [name for name in names if name.startswith("present_") or name.endswith((".weight", ".T", ".bias"))]


def test_a_call_of_a_bundle_for_the_cpu_departs_nowhere(bundle: Path) -> None:
    calls: list[Call] = []
    tap_calls(HybridStitchPipeline.from_bundle(bundle, threads=1), calls.append)
    for engine in ("large", "score"):
        call = next(call for call in calls if call.engine == engine)
        assert first_departure(Bundle.open(bundle), call) is None


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_an_engine_with_chosen_values_as_outputs_is_built_without_a_gpu(tmp_path: Path, precision: str) -> None:
    """With TensorRT-RTX, through polygraphy; running it is what takes a GPU. In float32 attention has to be decomposed."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    graph = export(tmp_path, "bfloat16", precision)
    shapes = {name: values.shape for name, values in masked_call(tmp_path, 8).items()}
    within = [value for node, value in float_values(graph) if node.startswith("transformer_blocks.1.")]
    assert len(within) > 50
    engine = marked_engine(graph, shapes, within, "tensorrt-rtx")()
    assert memoryview(engine).nbytes > 100_000
