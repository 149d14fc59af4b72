"""The repository for Triton Inference Server, and its model: with Triton's objects written here, and in a real server."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from triton_proto import as_dict, parsed
from triton_server import DATATYPES, Triton, environment, triton

from hst_trt import HybridStitchPipeline
from hst_trt.builder.detect import Gpu
from hst_trt.bundle import Bundle
from hst_trt.bundle.staging import locked
from hst_trt.errors import IncompatibleError, IntegrityError, MissingError, NumericsError, RequestError, ResourceError
from hst_trt.integrations import triton_model
from hst_trt.integrations.triton import Serving, config_of, export_repository

NUMPY = {"INT32": np.int32, "UINT64": np.uint64, "FP64": np.float64}


# -- the repository ------------------------------------------------------------------------------------------------------
def relabelled(bundle: Path, copy: Path, **target: Any) -> Path:
    """A copy of a bundle that says it is for another machine."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"] |= target
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_a_repository_holds_the_model_its_bundle_and_nothing_from_outside(tiny_bundle: Path, tmp_path: Path) -> None:
    made = export_repository([tiny_bundle], tmp_path / "repo")
    model = made.path / "tiny"
    assert made.bundles == {"default": tiny_bundle.name}
    assert {path.name for path in made.path.iterdir()} == {"tiny", "hst_trt.json"}
    assert {path.name for path in (model / "1").iterdir()} == {"model.py", tiny_bundle.name}
    assert not any(path.is_symlink() for path in made.path.rglob("*"))
    assert Bundle.open(model / "1" / tiny_bundle.name).manifest == Bundle.open(tiny_bundle).manifest
    assert (model / "1" / "model.py").read_text() == Path(triton_model.__file__).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"repo", ".repo.lock"}


def test_a_repository_of_ours_is_replaced_and_no_other_folder_is(tiny_bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    repository.mkdir()
    export_repository([tiny_bundle], repository, model="before")
    export_repository([tiny_bundle], repository, model="after")
    assert {path.name for path in repository.iterdir()} == {"after", "hst_trt.json"}
    (tmp_path / "others" / "resnet").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(repository)
    for name in ("others", "file", "link"):
        with pytest.raises(RequestError, match="did not write it"):
            export_repository([tiny_bundle], tmp_path / name)
    assert (tmp_path / "others" / "resnet").is_dir()
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_that_fails_leaves_the_old_repository(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repo"
    export_repository([tiny_bundle], repository, model="before")
    full = OSError(28, "No space left on device")

    def fill(*_: object) -> None:
        raise full

    with monkeypatch.context() as patched:
        patched.setattr("hst_trt.integrations.triton.link_or_copy", fill)
        with pytest.raises(ResourceError, match="full"):
            export_repository([tiny_bundle], repository, model="after")
    assert (repository / "before").is_dir()
    with locked(repository, "", ""), pytest.raises(ResourceError):
        export_repository([tiny_bundle], repository, model="after")
    repository.rename(tmp_path / ".repo.old")  # as a crash between the two renames leaves it
    with pytest.raises(RequestError):
        export_repository([tiny_bundle], repository, model="no; name")
    export_repository([tiny_bundle], repository, model="after")
    assert {path.name for path in tmp_path.iterdir()} == {"repo", ".repo.lock"}


def test_bundles_that_cannot_stand_beside_each_other_are_refused(
    tiny_bundle: Path, bundle_copy: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repo"
    with pytest.raises(RequestError, match="both for the CPU"):
        export_repository([tiny_bundle, bundle_copy], repository)
    with pytest.raises(RequestError, match="two bundles are called"):
        export_repository([tiny_bundle, tiny_bundle], repository)
    with pytest.raises(IncompatibleError, match="different pairs"):
        export_repository([tiny_bundle, demo_bundle], repository)
    h100, gh200 = (relabelled(tiny_bundle, tmp_path / f"{name}.hstb", sms=[90]) for name in ("h100", "gh200"))
    with pytest.raises(RequestError, match=r"h100\.hstb and gh200\.hstb are both for compute capability 9\.0"):
        export_repository([h100, gh200], repository)
    next(bundle_copy.glob("tokenizers/*")).write_bytes(b"damaged")
    with pytest.raises(IntegrityError):
        export_repository([bundle_copy], repository)
    for serving in (dict(instances=0), dict(max_batch=0), dict(queue=-1), dict(timeout=float("nan")), dict(threads=-1)):
        with pytest.raises(RequestError):
            Serving(**serving)
    with pytest.raises(RequestError, match="more than these bundles draw"):
        export_repository([tiny_bundle], repository, serving=Serving(max_batch=5))
    assert not repository.exists()


def test_each_compute_capability_gets_its_bundle_and_the_rest_the_one_for_the_cpu(tiny_bundle: Path, tmp_path: Path) -> None:
    bundles = [
        relabelled(tiny_bundle, tmp_path / 'h "100".hstb', sms=[90]),
        relabelled(tiny_bundle, tmp_path / "rtx.hstb", sms=[86, 89, 120]),
    ]
    made = export_repository([tiny_bundle, *bundles], tmp_path / "repo")
    config = parsed((made.path / "tiny" / "config.pbtxt").read_text())
    assert dict(config.cc_model_filenames) == {
        "9.0": 'h "100".hstb', "8.6": "rtx.hstb", "8.9": "rtx.hstb", "12.0": "rtx.hstb"
    }  # fmt: skip
    assert config.default_model_filename == ""  # of the python backend it would be the Python file
    as_json = as_dict(config)
    for sm, name in ((90, 'h "100".hstb'), (89, "rtx.hstb"), (120, "rtx.hstb"), (80, "tiny-cpu.hstb"), (None, "tiny-cpu.hstb")):
        assert triton_model.bundle_for(as_json, sm) == name
    made = export_repository(bundles, tmp_path / "repo")
    alone = as_dict(parsed((made.path / "tiny" / "config.pbtxt").read_text()))
    for sm, what in ((80, "compute capability 8.0"), (None, "the CPU")):
        with pytest.raises(IncompatibleError, match=what):
            triton_model.bundle_for(alone, sm)


@pytest.mark.parametrize("name", ['a "quoted" \\ name', "Žluť 色 😀", "two\nlines\t\x7f", "\\x41 \\"])
def test_the_configuration_keeps_every_character_of_a_name(name: str) -> None:
    config = parsed(config_of("m", {"9.0": name, "default": name}, Serving(max_batch=2)))
    assert config.cc_model_filenames["9.0"] == name
    assert config.parameters["default_bundle"].string_value == name


def test_the_configuration_says_how_the_model_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    serving = Serving(instances=2, threads=1, max_batch=3, queue=5, timeout=1.5)
    made = export_repository([tiny_bundle], tmp_path / "repo", serving=serving, model="mine")
    config = as_dict(parsed((made.path / "mine" / "config.pbtxt").read_text()))
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("mine", "python", 3)
    assert config["instance_group"] == [{"kind": "KIND_CPU", "count": 2}]
    assert config["dynamic_batching"]["default_queue_policy"] == {
        "default_timeout_microseconds": 1500000, "allow_timeout_override": True, "max_queue_size": 5
    }  # fmt: skip
    unlimited = parsed(config_of("m", {"default": "b"}, Serving(max_batch=1, queue=0, timeout=0)))
    assert unlimited.HasField("dynamic_batching")
    assert not unlimited.dynamic_batching.HasField("default_queue_policy")
    assert [entry["name"] for entry in config["input"] if not entry.get("optional")] == ["prompt"]
    types = {entry["name"]: entry["data_type"].removeprefix("TYPE_") for entry in config["input"]}
    assert types == {name: DATATYPES.get(name, "STRING") for name in types}
    warm_up = config["model_warmup"][0]["inputs"]["prompt"]["input_data_file"]
    data = (made.path / "mine" / "warmup" / warm_up).read_bytes()
    assert int.from_bytes(data[:4], "little") == len(data) - 4 > 0


def test_the_command_writes_what_the_library_does(hst: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    done = hst("export-triton", tiny_bundle, tmp_path / "repo", "--max-batch", 2, "--name", "drawer", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["schema"] == "hst_trt.export_triton/1"
    assert (answer["model"], answer["bundles"]) == ("drawer", {"default": tiny_bundle.name})
    assert "max_batch_size: 2" in (tmp_path / "repo" / "drawer" / "config.pbtxt").read_text()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    refused = hst("export-triton", tiny_bundle, tmp_path / "taken")
    assert refused.code == 2
    assert "did not write it" in refused.err


# -- the model, with Triton's objects as the python backend documents them ------------------------------------------------
class FakeTensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.dtype in (np.object_, np.uint8, np.uint64, np.int32, np.float64)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class FakeError:
    INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED = "INVALID_ARG", "UNAVAILABLE", "INTERNAL", "CANCELLED"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class FakeResponse:
    def __init__(self, output_tensors: list[FakeTensor], error: FakeError | None = None) -> None:
        self.outputs, self.error = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}, error


class FakeRequest:
    """One of Triton's: text arrives as bytes, and each input has a row of the batch."""

    def __init__(self, outputs: tuple[str, ...] = ("image", "png", "seed", "stats"), **fields: Any) -> None:
        self._outputs, self.asked, self.cancel_at = outputs, 0, None
        self._inputs = []
        for name, value in fields.items():
            values = value if isinstance(value, list) else [value]
            if name in DATATYPES:
                self._inputs.append(FakeTensor(name, np.array([values], NUMPY[DATATYPES[name]])))
            else:
                encoded = [one.encode() if isinstance(one, str) else one for one in values]
                self._inputs.append(FakeTensor(name, np.array([encoded], np.object_)))

    def inputs(self) -> list[FakeTensor]:
        return self._inputs

    def requested_output_names(self) -> tuple[str, ...]:
        return self._outputs

    def is_cancelled(self) -> bool:
        self.asked += 1
        return self.cancel_at is not None and self.asked >= self.cancel_at


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> HybridStitchPipeline:
    return HybridStitchPipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The model of an exported repository, initialised as Triton does it."""
    made = export_repository([tiny_bundle], tmp_path_factory.mktemp("triton") / "repo")
    with pytest.MonkeyPatch.context() as patched:
        yield initialised(made.path / "tiny", patched)


def initialised(
    folder: Path, patched: pytest.MonkeyPatch, kind: str = "CPU", device: int = 0, gpus: tuple[int, ...] = ()
) -> Any:
    utils = ModuleType("triton_python_backend_utils")
    vars(utils).update(Tensor=FakeTensor, InferenceResponse=FakeResponse, TritonError=FakeError)
    patched.setitem(sys.modules, utils.__name__, utils)
    module = _module(folder / "1" / "model.py")
    patched.setattr(module, "detect_gpus", lambda: [Gpu("a GPU", sm, 80_000, "570", "GPU-0") for sm in gpus])
    model = module.TritonPythonModel()
    config = as_dict(parsed((folder / "config.pbtxt").read_text()))
    model.initialize(
        {
            "model_config": json.dumps(config), "model_instance_kind": kind, "model_instance_device_id": str(device),
            "model_repository": str(folder), "model_version": "1", "model_name": folder.name,
        }
    )  # fmt: skip
    return model


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_instance_opens_the_bundle_of_its_own_gpu(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundles say that they are for GPUs, but are the CPU's, so that they open here."""
    bundles = [relabelled(tiny_bundle, tmp_path / f"sm{sm}.hstb", sms=[sm]) for sm in (80, 90)]
    folder = export_repository([tiny_bundle, *bundles], tmp_path / "repo").path / "tiny"
    for kind, device, name in (("GPU", 0, "sm90"), ("GPU", 1, "sm80"), ("GPU", 2, "tiny-cpu"), ("CPU", 0, "tiny-cpu")):
        model = initialised(folder, monkeypatch, kind, device, gpus=(90, 80, 75))
        assert model._pipeline.bundle.path == folder / "1" / f"{name}.hstb"
    with pytest.raises(MissingError, match="does not list GPU 3"):
        initialised(folder, monkeypatch, "GPU", 3, gpus=(90, 80, 75))


def pictures(pipeline: HybridStitchPipeline, **arguments: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipeline(**arguments).images])


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        (dict(prompt="a dog", seed=3), {}),
        (dict(prompt="a dog", seed=2**64 - 1, num_inference_steps=3), {}),
        (dict(prompt="a dog", seed=3, n=2, negative_prompt="a cat", guidance_scale=4.2), {}),
        (dict(prompt='a "dög" \\ 色', seed=3, schedule="large"), {}),
        (dict(prompt="a dog", seed=3, stages=[1, 3, 2], num_inference_steps=6, mask_ratio=0.3), {}),
        (dict(prompt="a dog", seed=3, size="128x64"), dict(height=64, width=128)),
    ],
)
def test_a_picture_is_the_pipelines_own(
    model: Any, pipeline: HybridStitchPipeline, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    (answer,) = model.execute([FakeRequest(**fields)])
    arguments = {name: value for name, value in fields.items() if name not in ("n", "size")} | arguments
    if "stages" in arguments:
        arguments["stages"] = tuple(arguments["stages"])
    expected = pictures(pipeline, num_images_per_prompt=fields.get("n", 1), **arguments)
    assert answer.error is None
    np.testing.assert_array_equal(answer.outputs["image"], expected[None])
    decoded = [np.asarray(Image.open(io.BytesIO(png))) for png in answer.outputs["png"][0]]
    np.testing.assert_array_equal(decoded, expected)
    assert answer.outputs["seed"].tolist() == [[fields["seed"]]]
    stats = json.loads(answer.outputs["stats"][0, 0])
    assert (stats["steps"], stats["batch"]) == (fields.get("num_inference_steps", 4), fields.get("n", 1))


def test_a_request_without_a_seed_says_which_one_it_was_drawn_with(model: Any, pipeline: HybridStitchPipeline) -> None:
    first, second = (model.execute([FakeRequest(prompt="a dog")])[0].outputs for _ in range(2))
    assert first["seed"] != second["seed"]
    np.testing.assert_array_equal(first["image"][0], pictures(pipeline, prompt="a dog", seed=int(first["seed"][0, 0])))


def test_only_the_outputs_that_were_asked_for_are_made(model: Any) -> None:
    (answer,) = model.execute([FakeRequest(("seed",), prompt="a dog", seed=1)])
    assert answer.outputs.keys() == {"seed"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(prompt="a dog", schedule="hybridd"), "schedule"),
        (dict(prompt="a dog", num_inference_steps=0), "num_inference_steps"),
        (dict(prompt="a dog", num_inference_steps=10**6), "num_inference_steps"),
        (dict(prompt="a dog", size="10x10"), "not a multiple of 16"),
        (dict(prompt="a dog", size="4096x4096"), "limit"),
        (dict(prompt="a dog", n=100), "100"),
        (dict(prompt="a dog", mask_ratio=1.5), "mask_ratio"),
        (dict(prompt="a dog", guidance_scale=float("nan")), "guidance_scale"),
        (dict(prompt="a dog", speedup=2.0), "speedup|calibrat"),
        (dict(prompt=b"a \xff dog"), "UTF-8"),
        (dict(prompt=""), "prompt"),
        (dict(prompt="x" * 100_000), "prompt"),
        (dict(prompt="a dog", stages=[1, 2, 3]), "stages"),
    ],
)
def test_a_bad_request_gets_its_own_error_and_the_others_their_pictures(
    model: Any, pipeline: HybridStitchPipeline, fields: dict[str, Any], words: str
) -> None:
    good = FakeRequest(prompt="a dog", seed=3)
    first, bad, last = model.execute([good, FakeRequest(**fields), good])
    assert bad.error.code == FakeError.INVALID_ARG
    assert bad.outputs == {}
    assert re.search(words, bad.error.message)
    expected = pictures(pipeline, prompt="a dog", seed=3)
    for answer in (first, last):
        np.testing.assert_allclose(answer.outputs["image"][0].astype(int), expected, atol=1)


def test_a_request_of_two_rows_is_refused_and_says_how_to_ask(model: Any) -> None:
    request = FakeRequest(prompt="a dog")
    request._inputs[0]._array = np.array([[b"a dog"], [b"a cat"]], np.object_)
    (answer,) = model.execute([request])
    assert answer.error.code == FakeError.INVALID_ARG
    assert "a request for each prompt" in answer.error.message


def test_requests_of_equal_plans_are_drawn_together_and_each_keeps_its_picture(
    model: Any, pipeline: HybridStitchPipeline
) -> None:
    """Within one step of 1/255: a batch adds up in another order."""
    requests = [FakeRequest(prompt=f"dog {seed}", seed=seed) for seed in range(5)]
    requests.insert(1, FakeRequest(prompt="a dog", seed=9, num_inference_steps=2))
    answers = model.execute(requests)
    assert [json.loads(answer.outputs["stats"][0, 0])["batch"] for answer in answers] == [4, 1, 4, 4, 4, 1]
    for seed, answer in enumerate(answers[:1] + answers[2:]):
        expected = pictures(pipeline, prompt=f"dog {seed}", seed=seed)
        np.testing.assert_allclose(answer.outputs["image"][0].astype(int), expected, atol=1)


def test_a_batch_counts_pictures(model: Any) -> None:
    answers = model.execute([FakeRequest(prompt="a dog", seed=1, n=n) for n in (3, 1, 2, 4)])
    assert [json.loads(answer.outputs["stats"][0, 0])["batch"] for answer in answers] == [4, 4, 2, 4]


def test_work_stops_within_a_step_once_nobody_waits_and_not_before(model: Any) -> None:
    gone, waiting = FakeRequest(prompt="a dog", seed=1), FakeRequest(prompt="a cat", seed=1)
    gone.cancel_at = 1
    assert [answer.error for answer in model.execute([gone, waiting])] == [None, None]
    alone = FakeRequest(prompt="a dog", num_inference_steps=50)
    alone.cancel_at = 3
    (answer,) = model.execute([alone])
    assert answer.error.code == FakeError.CANCELLED
    assert alone.asked == 3, "it is asked after each step, and the fourth did not begin"
    (after,) = model.execute([FakeRequest(prompt="a dog")])
    assert after.error is None


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NumericsError("values in /secret are not finite"), FakeError.INTERNAL, "log"),
        (ResourceError("out of memory", fix="ask for less"), FakeError.UNAVAILABLE, "out of memory"),
        (RuntimeError("/secret: broken"), FakeError.INTERNAL, "log"),
    ],
)
def test_what_fails_in_a_batch_fails_alone_and_tells_no_path(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, said: str
) -> None:
    names = type(model)._drawn.__globals__
    draw = names["draw"]

    def failing(pipeline: Any, drawings: Any, on_step: Any) -> Any:
        if any(drawing.seed == 13 for drawing in drawings):
            raise error
        return draw(pipeline, drawings, on_step)

    monkeypatch.setitem(names, "draw", failing)
    answers = model.execute([FakeRequest(prompt="a dog", seed=seed) for seed in (12, 13, 14)])
    assert [answer.error and answer.error.code for answer in answers] == [None, code, None]
    assert said in answers[1].error.message
    assert "/secret" not in answers[1].error.message


def test_prompts_are_not_logged(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model.execute([FakeRequest(prompt="a secret " * 200, seed=1), FakeRequest(prompt="a secret", schedule="x")])
    assert "secret" not in caplog.text


# -- a real server -------------------------------------------------------------------------------------------------------
real = pytest.mark.skipif(
    environment() is None, reason="needs a Triton Inference Server: `make triton`, or HST_TRT_TEST_TRITON"
)


@pytest.fixture(scope="module")
def server(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """One instance with a short queue."""
    work = tmp_path_factory.mktemp("triton-server")
    serving = Serving(threads=1, max_batch=4, queue=8, timeout=30)
    made = export_repository([demo_bundle], work / "repo", serving=serving)
    with triton(made.path, work, "--model-control-mode=explicit", "--load-model=demo") as running:
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0, running.log.read_text()[-2000:]


@pytest.fixture(scope="module")
def one_thread(demo_bundle: Path) -> HybridStitchPipeline:
    return HybridStitchPipeline.from_bundle(demo_bundle, threads=1)


LONG = dict(prompt="x", num_inference_steps=60, schedule="large", outputs=("seed",))  # two seconds


@real
@pytest.mark.slow
def test_triton_loads_the_repository_and_knows_every_input(server: Triton) -> None:
    about = server.get("models/demo")
    assert {entry["name"] for entry in about["inputs"]} >= {"prompt", "seed", "num_inference_steps", "stages", "speedup"}
    assert {entry["name"] for entry in about["outputs"]} == {"image", "png", "seed", "stats"}
    config = server.get("models/demo/config")
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 8
    assert config["model_warmup"][0]["inputs"]["prompt"]["input_data_file"] == "warm_up_prompt"


@real
@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 7])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_triton_draws_the_pipelines_own_picture(
    server: Triton, one_thread: HybridStitchPipeline, seed: int, steps: int
) -> None:
    prompt = 'a "dög" \\ 色'
    status, answer = server.ask(prompt=prompt, seed=seed, num_inference_steps=steps, outputs=("image", "seed", "stats", "png"))
    assert status == 200, answer
    expected = pictures(one_thread, prompt=prompt, seed=seed, num_inference_steps=steps)
    np.testing.assert_array_equal(answer["image"], expected[None])
    length = int.from_bytes(answer["png"][:4], "little")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer["png"][4 : 4 + length]))), expected[0])
    assert [int(one) for one in answer["seed"]] == [seed]
    assert json.loads(answer["stats"][0])["steps"] == steps


@real
@pytest.mark.slow
def test_triton_answers_a_bad_request_with_400_and_the_librarys_words(server: Triton) -> None:
    status, answer = server.ask(prompt="x", size="10x10")
    assert status == 400
    assert "not a multiple of 16" in answer["error"]
    status, answer = server.ask(prompt="x", schedule="hybridd")
    assert status == 400
    assert "schedule" in answer["error"]
    status, answer = server.ask(seed=3)
    assert status == 400
    assert "prompt" in answer["error"]


@real
@pytest.mark.slow
def test_the_client_of_the_documentation_draws(
    server: Triton, one_thread: HybridStitchPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "triton.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{server.http}"), names)
    expected = pictures(one_thread, prompt="a red apple on a blue background", seed=7)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "apple.png")), expected[0])
    assert names["stats"]["batch"] == 1


@real
@pytest.mark.slow
def test_triton_refuses_what_the_queue_cannot_hold_and_draws_the_rest(server: Triton) -> None:
    with ThreadPoolExecutor(24) as pool:
        first = pool.submit(server.ask, **LONG)
        time.sleep(0.3)
        others = list(pool.map(lambda seed: server.ask(prompt="x", seed=seed), range(20)))
        assert first.result()[0] == 200
    statuses = [status for status, _ in others]
    assert set(statuses) == {200, 503}
    assert 8 <= statuses.count(200) <= 12, "eight wait, and up to four are taken while the others arrive"
    assert all("maximum queue size" in answer["error"] for status, answer in others if status == 503)


@real
@pytest.mark.slow
def test_a_request_that_may_not_wait_so_long_is_refused(server: Triton) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, **LONG)
        time.sleep(0.3)
        status, answer = server.ask(prompt="x", parameters={"timeout": 50_000})  # microseconds
        assert first.result()[0] == 200
    assert (status, answer["error"]) == (503, "Request timeout expired")


@real
@pytest.mark.slow
def test_sixteen_at_once_all_get_their_pictures(demo_bundle: Path, one_thread: HybridStitchPipeline, tmp_path: Path) -> None:
    """Two instances; batches may differ from single pictures by one step of 1/255."""
    made = export_repository([demo_bundle], tmp_path / "repo", serving=Serving(instances=2, threads=1))
    with triton(made.path, tmp_path) as running, ThreadPoolExecutor(16) as pool:
        asked = [dict(prompt="a dog", seed=i % 4, num_inference_steps=4 + i % 2) for i in range(16)]
        answers = list(pool.map(lambda fields: running.ask(**fields, outputs=("image", "stats")), asked))
        for fields, (status, answer) in zip(asked, answers, strict=True):
            assert status == 200, answer
            np.testing.assert_allclose(answer["image"][0].astype(int), pictures(one_thread, **fields), atol=1)
        counts = running.get("models/demo/stats")["model_stats"][0]
        assert counts["inference_count"] == 16 + 2, "and one warm-up for each instance"


@real
@pytest.mark.slow
def test_a_client_that_cancels_stops_the_work(server: Triton) -> None:
    """By gRPC: Triton does not tell a model that an HTTP connection was closed."""
    home = environment()
    code = """
import sys, time
import numpy as np
import tritonclient.grpc as grpc
client = grpc.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}")
def ask(steps):
    kinds = {"prompt": "BYTES", "size": "BYTES", "num_inference_steps": "INT32"}
    inputs = {name: grpc.InferInput(name, [1, 1], kind) for name, kind in kinds.items()}
    inputs["prompt"].set_data_from_numpy(np.array([["x"]], np.object_))
    inputs["size"].set_data_from_numpy(np.array([["384x384"]], np.object_))
    inputs["num_inference_steps"].set_data_from_numpy(np.array([[steps]], np.int32))
    return list(inputs.values())
answers = []
start = time.monotonic()
call = client.async_infer("demo", ask(100), lambda result, error: answers.append(error))
time.sleep(0.2)
call.cancel()
client.infer("demo", ask(1))
print(time.monotonic() - start, answers[0].status())
"""
    start = time.monotonic()
    server.ask(prompt="x", size="384x384", num_inference_steps=100)
    whole = time.monotonic() - start
    done = subprocess.run(
        [home / "bin" / "python", "-c", code, str(server.grpc)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds, status = done.stdout.split()
    assert status == "StatusCode.CANCELLED"
    assert float(seconds) < whole / 2


@real
@pytest.mark.slow
def test_a_model_that_is_unloaded_ends_its_process_and_can_be_loaded_again(server: Triton) -> None:
    def stubs() -> list[str]:
        found = subprocess.run(
            ["ps", "--ppid", str(server.process.pid), "-o", "args="], capture_output=True, text=True, check=False
        ).stdout
        return [line for line in found.splitlines() if "triton_python_backend_stub" in line]

    assert len(stubs()) == 1
    assert server.post("repository/models/demo/unload") == 200
    deadline = time.monotonic() + 30
    while stubs() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not stubs()
    assert server.ask(prompt="x")[0] in (400, 404, 503)
    assert server.post("repository/models/demo/load") == 200
    assert server.ask(prompt="x", seed=1)[0] == 200


@real
@pytest.mark.slow
def test_sigterm_finishes_what_was_asked(demo_bundle: Path, tmp_path: Path) -> None:
    made = export_repository([demo_bundle], tmp_path / "repo", serving=Serving(threads=1))
    with triton(made.path, tmp_path) as running, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(running.ask, **LONG) for _ in range(3)]
        time.sleep(0.5)
        running.process.send_signal(signal.SIGTERM)
        assert [one.result()[0] for one in asked] == [200] * 3
        assert running.process.wait(60) == 0
