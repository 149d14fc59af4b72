"""Engines built for real: TensorRT-RTX compiles without a GPU, so every graph, precision and profile is tried here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
from conftest import Finished
from tiny import KINDS, TEXT, pair, spec_of

from hst_trt.builder.build import export_bundle
from hst_trt.builder.engine import Cancelled, EngineJob, build_engine, load_timing_cache, save_timing_cache
from hst_trt.builder.estimate import estimate_from_manifest, estimate_from_models
from hst_trt.builder.profiles import engine_profiles
from hst_trt.bundle import Bundle, GraphEntry, ProfileEntry, TensorEntry
from hst_trt.errors import BuildError
from hst_trt.export.exporter import _graph_entry
from hst_trt.export.glue import glue_graphs
from hst_trt.export.transformer import transformer_graph
from hst_trt.export.weights import WeightStore
from hst_trt.plan import token_buckets
from hst_trt.recipe import Defaults, Limits, ModelSource, Recipe, load_recipe, load_target
from hst_trt.tensor_names import LARGE, SMALL

trt = pytest.importorskip("tensorrt_rtx", reason='needs TensorRT-RTX: pip install "hst_trt[rtx]"')

Hst = Callable[..., Finished]
PRECISIONS = ("float32", "float16", "bfloat16")
SIDE = 128  # pixels: 8 x 8 tokens
RECIPE = Recipe(
    name="tiny",
    large=ModelSource(source="large"),
    small=ModelSource(source="small"),
    max_sequence_length=TEXT[1],
    limits=Limits(max_side=SIDE, max_images=2),
    defaults=Defaults(num_inference_steps=4, guidance_scale=3.0, height=SIDE, width=SIDE),
)
TARGET = load_target("a100").model_copy(update={"backend": "tensorrt-rtx"})


@dataclass(frozen=True)
class Graph:
    """An ONNX file, what it declares, and the profiles of its engine."""

    name: str
    file: Path
    entry: GraphEntry
    profiles: tuple[ProfileEntry, ...]

    def job(self, sm: int = 80, **changes: object) -> EngineJob:
        values = {
            "name": self.name, "backend": "tensorrt-rtx", "graph": self.entry, "onnx": self.file, "profiles": self.profiles,
            "sms": (sm,), "gpu": None, "output": self.file.with_suffix(".engine"),
        } | changes  # fmt: skip
        return EngineJob.model_validate(values)


@pytest.fixture
def integrate(tmp_path: Path) -> Graph:
    """The smallest graph there is: one product and one sum."""
    file = tmp_path / "integrate.onnx"
    entry = _graph_entry(glue_graphs()["integrate"].save(file), file, [], tmp_path, 0.0)
    return Graph("integrate", file, entry, (ProfileEntry(axes={"B": (1, 1, 4), "N": (1, 64, 144), "C": (64, 64, 64)}),))


def transformers(folder: Path, kind: str, precision: str, **settings: object) -> list[Graph]:
    """The two transformers of a tiny pair."""
    models = dict(zip((LARGE, SMALL), pair(kind), strict=True))
    spec = spec_of(*models.values())
    graphs = []
    for name, model in models.items():
        model.save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        file = folder / name / "model.onnx"
        cached = name == LARGE
        tokens = (SIDE // spec.token_side) ** 2
        if cached:
            settings["cache_rows"] = (spec.text_length, tokens)
        builder = transformer_graph(
            config, WeightStore(folder / name), precision, cached=cached, **(settings if cached else {})
        )
        entry = _graph_entry(builder.save(file), file, [], folder, 0.0)
        graphs.append(Graph(name, file, entry, engine_profiles(name, entry.axes, spec, RECIPE, TARGET)))
    return graphs


def assert_builds(graph: Graph, sm: int) -> None:
    built = build_engine(graph.job(sm))
    assert graph.file.with_suffix(".engine").stat().st_size > 10_000
    assert built.read_back == "network", "no GPU is used"
    assert built.activation_bytes is None


# -- every graph ---------------------------------------------------------------------------------------------------------
QUICK = {("sd35-large", "float16", 89), ("sd35-medium", "bfloat16", 80), ("sd3", "float32", 80)}
MATRIX = [(kind, precision, sm) for kind in KINDS for precision in PRECISIONS for sm in (80, 89)]


@pytest.mark.parametrize(
    ("kind", "precision", "sm"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX]
)
def test_transformers_of_every_kind_build_with_all_buckets(tmp_path: Path, kind: str, precision: str, sm: int) -> None:
    large, small = transformers(tmp_path, kind, precision)
    assert len(large.profiles) == len(token_buckets(64)) + 1
    for graph in (large, small):
        assert_builds(graph, sm)


def test_a_large_model_with_float32_blocks_builds(tmp_path: Path) -> None:
    large, _ = transformers(tmp_path, "sd35-medium", "bfloat16", float32_blocks=(1,))
    assert_builds(replace(large, profiles=large.profiles[-2:]), 80)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_graph_of_the_demo_pair_builds_in_every_precision_for_two_kinds_of_gpu(tmp_path: Path, precision: str) -> None:
    target = TARGET.model_copy(update={"precision": precision})
    bundle = export_bundle(load_recipe("demo"), target, tmp_path / "demo.hstb").bundle
    for name, entry in bundle.manifest.graphs.items():
        profiles = engine_profiles(name, entry.axes, bundle.spec, load_recipe("demo"), target)
        for sm in (80, 89):
            assert_builds(Graph(name, bundle.path / entry.path, entry, profiles), sm)


def test_the_demo_pair_becomes_a_complete_bundle_without_a_gpu_that_says_whose_engines_it_has(hst: Hst, tmp_path: Path) -> None:
    command = ["build", "--gpu", "a100", "--backend", "tensorrt-rtx", "--pair", "demo", "--output", tmp_path]
    result = hst(*command)
    assert result.code == 0, result.err
    final = tmp_path / "demo-a100-tensorrt-rtx.hstb"
    assert result.out.strip() == str(final)
    assert f"18 engines of tensorrt-rtx {trt.__version__} for SM80" in result.err
    bundle = Bundle.open(final)
    manifest = bundle.manifest
    assert manifest.state == "complete"
    assert manifest.engines.keys() == manifest.graphs.keys()
    assert (manifest.target.backend, manifest.target.backend_version) == ("tensorrt-rtx", trt.__version__)
    assert manifest.target.sms == (80,)
    tokens = (manifest.defaults.height // bundle.spec.token_side) ** 2
    pinned = [profile.axes["M"][0] for profile in manifest.engines["large"].profiles[:-1]]
    assert pinned == list(token_buckets(tokens, manifest.bucket_ratios))
    shown = hst("inspect", final).out
    assert f"tensorrt-rtx {trt.__version__} for SM80" in shown
    assert "tensorrt-rtx engine" in shown
    assert hst("verify", final).code == 0

    # What was said beforehand is near what came out.
    recipe = load_recipe("demo")
    said = estimate_from_manifest(manifest, bundle.spec, recipe, TARGET).engines
    before = estimate_from_models(recipe, TARGET)
    assert before is not None
    assert before.engines.keys() == said.keys()
    built = sum(manifest.files[engine.path].bytes for engine in manifest.engines.values())
    for estimate in (said, before.engines):
        assert 0.5 < sum(engine.engine_bytes for engine in estimate.values()) / built < 2
    past = [tensor for tensor in manifest.graphs["large"].inputs if tensor.name.startswith("past_")]
    rows, heads, length, width = 2, *past[0].shape[1:]
    assert before.cache_bytes == len(past) * rows * heads * length * width * 2

    unchanged = hst(*command, "--explain")
    assert unchanged.code == 0
    assert "not built: nothing it was made from has changed" in unchanged.err


# -- what TensorRT refuses -----------------------------------------------------------------------------------------------
def refused(job: EngineJob) -> BuildError:
    with pytest.raises(BuildError) as caught:
        build_engine(job)
    assert job.name in caught.value.problem
    return caught.value


def test_a_build_without_a_profile_fails_with_tensorrts_own_words(integrate: Graph) -> None:
    assert "no optimization profile has been defined" in (refused(integrate.job(profiles=())).found or "")


def test_an_unknown_operator_is_named_with_its_node(integrate: Graph) -> None:
    model = onnx.load(integrate.file)
    model.graph.node[0].op_type = "NotAnOperator"
    onnx.save(model, integrate.file)
    error = refused(integrate.job())
    assert "cannot parse" in error.problem
    assert "'Split_1' (NotAnOperator)" in (error.found or "")


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_truncated_graph_fails(integrate: Graph, keep: float) -> None:
    content = integrate.file.read_bytes()
    integrate.file.write_bytes(content[: int(keep * len(content))])
    assert refused(integrate.job()).found


def test_weights_that_are_cut_short_are_named(tmp_path: Path) -> None:
    graph = transformers(tmp_path, "sd3", "float32")[1]
    weights = graph.file.with_name("diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "Failed to import initializer" in (refused(graph.job()).found or "")


def test_a_profile_that_contradicts_its_graph_fails_though_tensorrt_only_warns(tmp_path: Path) -> None:
    large, _ = transformers(tmp_path, "sd3", "bfloat16")
    axes = large.profiles[-1].axes | {"M": (1, 64, 65), "N": (1, 64, 65)}  # more tokens than the cache has rows
    assert "self-consistent" in (refused(large.job(profiles=[ProfileEntry(axes=axes)])).found or "")


def changed(entries: tuple[TensorEntry, ...], index: int, **changes: object) -> tuple[TensorEntry, ...]:
    return tuple(tensor.model_copy(update=changes) if i == index else tensor for i, tensor in enumerate(entries))


@pytest.mark.parametrize(
    ("side", "change", "found"),
    [
        ("inputs", {"dtype": "float16"}, "latents: float32 instead of float16"),
        ("outputs", {"dtype": "bfloat16"}, "next_latents: float32 instead of bfloat16"),
        ("outputs", {"shape": ("B", "N")}, "next_latents: [-1, -1, -1] instead of ['B', 'N']"),
        ("outputs", {"name": "latents_after"}, "latents_after: missing; next_latents: unexpected"),
    ],
)
def test_inputs_and_outputs_that_are_not_the_manifests_fail_the_build(
    integrate: Graph, side: str, change: dict[str, object], found: str
) -> None:
    entry = integrate.entry.model_copy(update={side: changed(getattr(integrate.entry, side), 0, **change)})
    error = refused(integrate.job(graph=entry))
    assert "not what its graph has" in error.problem
    assert error.found == found
    assert not integrate.file.with_suffix(".engine").exists()


def test_half_precision_without_a_fused_attention_kernel_fails_instead_of_being_slow(tmp_path: Path) -> None:
    large, _ = transformers(tmp_path, "sd3", "bfloat16")
    assert "b16" in (refused(large.job(sm=75, profiles=large.profiles[-1:])).found or "")


# -- progress and the timing cache -------------------------------------------------------------------------------------------
def test_progress_goes_up_and_a_build_that_is_told_to_stop_stops(tmp_path: Path) -> None:
    graph = transformers(tmp_path, "sd3", "bfloat16")[1]
    seen: list[tuple[str, float]] = []
    build_engine(graph.job(), lambda phase, done: seen.append((phase, done)) or True)
    assert len({phase for phase, _ in seen}) > 5
    inside = [done for _, done in seen if 0 < done < 1]
    assert len(inside) > 10
    assert inside == sorted(inside)
    graph.file.with_suffix(".engine").unlink()
    steps = iter(range(100_000))
    with pytest.raises(Cancelled):
        build_engine(graph.job(), lambda phase, done: next(steps) < 20)
    assert next(steps) < 30
    assert not graph.file.with_suffix(".engine").exists()


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops.*:DeprecationWarning")
def test_a_timing_cache_is_kept_from_build_to_build(tmp_path: Path) -> None:
    """TensorRT-RTX takes and gives one as TensorRT does, though it times nothing."""
    config = trt.Builder(trt.Logger()).create_builder_config()
    file = tmp_path / "new" / "x.timing"
    load_timing_cache(config, file)
    save_timing_cache(config, file)
    assert file.stat().st_size > 0
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    load_timing_cache(config, file)
