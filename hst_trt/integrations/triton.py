"""Writes a model repository for Triton Inference Server: one model that draws whole pictures, with all it needs inside.

Triton's own backends would run one engine each and leave the loop to an ensemble, which has no steps of a request's own. So
the model is one of the python backend and owns the loop; Triton gives it the queue, the batches, the instances and HTTP.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..bundle import Bundle
from ..bundle.staging import link_or_copy, locked, put_back, put_in_place
from ..disk import translated_disk_errors
from ..errors import IncompatibleError, RequestError

__all__ = ["DEFAULT_BUNDLE", "THREADS", "Repository", "Serving", "config_of", "export_repository"]

DEFAULT_BUNDLE, THREADS = "default_bundle", "threads"
"""Parameters of the model's configuration, which `hst_trt/integrations/triton_model.py` reads."""

_MARK = "hst_trt.json"
_VERSION = "1"
_WARM_UP = ("a lighthouse on a cliff", "warm_up_prompt")
_FIX = ("give another folder", "wait for it, then export again")
_INPUTS = (  # name, type, dimensions without the batch's; the fields of `hst_trt.server.request.ImageRequest`
    ("prompt", "TYPE_STRING", 1),
    ("negative_prompt", "TYPE_STRING", 1),
    ("num_inference_steps", "TYPE_INT32", 1),
    ("guidance_scale", "TYPE_FP64", 1),  # in FP32 a share of 0.3 would be more than 0.3, and rounded up to the next bucket
    ("seed", "TYPE_UINT64", 1),
    ("schedule", "TYPE_STRING", 1),
    ("stages", "TYPE_INT32", 3),
    ("mask_ratio", "TYPE_FP64", 1),
    ("speedup", "TYPE_FP64", 1),
    ("size", "TYPE_STRING", 1),
    ("n", "TYPE_INT32", 1),
)
_OUTPUTS = (
    ("image", "TYPE_UINT8", [-1, -1, -1, 3]),
    ("png", "TYPE_STRING", [-1]),
    ("seed", "TYPE_UINT64", [1]),
    ("stats", "TYPE_STRING", [1]),
)


@dataclass(frozen=True)
class Serving:
    """How Triton is to serve the model.

    Attributes:
        instances: of the model, each a process with a pipeline of its own; for each GPU, if there are bundles of engines.
        threads: of a call on the CPU; 0 takes one per physical core, which several instances would share.
        max_batch: requests that Triton hands over together, and images that are drawn together; if left out 4 for the CPU
            and 1 for engines, most of which are tuned for one image.
        queue: requests that may wait; more are refused. 0 for any number.
        timeout: seconds that a request may wait, unless it says less itself; 0 for any time.

    Raises:
        RequestError: a value that Triton could not take.
    """

    instances: int = 1
    threads: int = 0
    max_batch: int | None = None
    queue: int = 64
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (("instances", 1), ("threads", 0), ("max_batch", 1), ("queue", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise RequestError(f"{name.replace('_', ' ')} {value} is too few", fix=f"use {least} or more")
        if not (math.isfinite(self.timeout) and 0 <= self.timeout <= 86400):
            raise RequestError(f"timeout {self.timeout} is not a number of seconds up to a day", fix="0 is for any time")


@dataclass(frozen=True)
class Repository:
    """What was written. bundles: by compute capability, "9.0"; the one for everything else under "default"."""

    path: Path
    model: str
    bundles: dict[str, str]


def export_repository(
    bundles: Sequence[Path],
    repository: Path,
    *,
    model: str | None = None,
    serving: Serving = Serving(),
    on_hash: Callable[[int, int], None] | None = None,
) -> Repository:
    """Writes a repository with one model, in the place of an older one of ours; a reader sees the old one or the new one.

    Files of 256 MiB and more are hard links to those of the bundles where the file system has them, others are copies.

    Args:
        bundles: of one pair of models, at most one for each compute capability and one for the CPU.
        model: its name; the pair's if left out.
        on_hash: called with (bytes checked, bytes in all), bundle by bundle.

    Raises:
        RequestError: bundles that cannot stand beside each other, a name that Triton refuses, or a folder that is not ours.
        HstError: a bundle is missing, damaged or unfinished; the disk is full.
    """
    opened = [Bundle.open(path, progress=on_hash) for path in bundles]
    _check_together(opened)
    largest = min(bundle.manifest.limits.max_images for bundle in opened)
    if serving.max_batch is None:
        serving = replace(serving, max_batch=1 if any(bundle.manifest.engines for bundle in opened) else min(4, largest))
    assert serving.max_batch is not None
    if serving.max_batch > largest:
        raise RequestError(
            f"batches of {serving.max_batch} are more than these bundles draw", found=f"their limit is {largest}"
        )
    model = opened[0].manifest.recipe if model is None else model
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", model):
        raise RequestError(f"{model!r} cannot be a model's name in Triton", fix="use letters, digits, - and _")
    chosen = _by_capability(opened)
    repository = repository.absolute()
    with translated_disk_errors(repository.parent, "export again"), locked(repository, *_FIX):
        put_back(repository)
        _check_ours(repository)
        staged = repository.parent / f".{repository.name}.building"
        shutil.rmtree(staged, ignore_errors=True)
        _write(staged, opened, model, config_of(model, chosen, serving))
        put_in_place(staged, repository)
    return Repository(repository, model, chosen)


def _check_together(bundles: Sequence[Bundle]) -> None:
    if not bundles:
        raise RequestError("a repository needs a bundle", fix="name one or several")
    names = [bundle.path.name for bundle in bundles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"two bundles are called {twice[0]}", fix="rename one of the folders")
    first = bundles[0]
    for bundle in bundles:
        if bundle.manifest.state != "complete":
            raise IncompatibleError(
                f"{bundle.path} holds graphs only", fix=f"run `hst-trt build --gpu {bundle.manifest.target.name}` first"
            )
        if _pair(bundle) != _pair(first):
            raise IncompatibleError(
                f"{bundle.path} and {first.path} are of different pairs of models",
                found=f"{bundle.manifest.recipe} and {first.manifest.recipe}",
                fix="export a repository for each",
            )


def _pair(bundle: Bundle) -> object:
    return bundle.manifest.recipe, {name: model.config for name, model in bundle.manifest.models.items()}


def _by_capability(bundles: Sequence[Bundle]) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for bundle in bundles:
        for key in [f"{sm // 10}.{sm % 10}" for sm in bundle.manifest.target.sms] or ["default"]:
            if key in chosen:
                what = "the CPU" if key == "default" else f"compute capability {key}"
                raise RequestError(f"{chosen[key]} and {bundle.path.name} are both for {what}", fix="leave out one of them")
            chosen[key] = bundle.path.name
    return chosen


def _check_ours(repository: Path) -> None:
    """Refuses whatever is not a repository that this module wrote; an empty folder is nobody's."""
    if not repository.exists() and not repository.is_symlink():
        return
    there = [] if not repository.is_dir() else sorted(path.name for path in repository.iterdir())
    if repository.is_symlink() or not repository.is_dir() or (there and _MARK not in there):
        raise RequestError(
            f"{repository} is there, and hst-trt did not write it",
            found=", ".join(there[:4]) or "not a folder",
            fix="give another folder; tritonserver takes --model-repository several times",
        )


def _write(folder: Path, bundles: Sequence[Bundle], model: str, config: str) -> None:
    version = folder / model / _VERSION
    version.mkdir(parents=True)
    for bundle in bundles:
        for file in ["manifest.json", *bundle.manifest.files]:
            link_or_copy(bundle.path / file, version / bundle.path.name / file)
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), version / "model.py")
    prompt, file = _WARM_UP
    (folder / model / "warmup").mkdir()
    (folder / model / "warmup" / file).write_bytes(struct.pack("<I", len(prompt.encode())) + prompt.encode())
    (folder / model / "config.pbtxt").write_text(config, encoding="utf-8")
    made: dict[str, Any] = {"made_by": f"hst_trt {__version__}", "model": model}
    made["bundles"] = {bundle.path.name: bundle.manifest.fingerprint for bundle in bundles}
    (folder / _MARK).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


class _Word(str):
    """A name of an enumeration, which stands without quotes."""


def config_of(model: str, bundles: Mapping[str, str], serving: Serving) -> str:
    """``config.pbtxt`` of the model, in protobuf's text format.

    Args:
        bundles: as `Repository` has them.
    """
    engines = {key: name for key, name in bundles.items() if key != "default"}
    parameters = {THREADS: str(serving.threads)}
    if "default" in bundles:
        parameters[DEFAULT_BUNDLE] = bundles["default"]
    kind = "KIND_CPU" if not engines else "KIND_AUTO" if "default" in bundles else "KIND_GPU"
    # Any limit of its queue keeps Triton from handing over the next batch while one is drawn, so none is set in vain.
    policy = None
    if serving.queue or serving.timeout:
        policy = {
            "timeout_action": _Word("REJECT"),
            "default_timeout_microseconds": round(serving.timeout * 1e6),
            "allow_timeout_override": True,
            "max_queue_size": serving.queue,
        }
    _, file = _WARM_UP
    message = {
        "name": model,
        "backend": "python",
        "max_batch_size": serving.max_batch,
        "input": [
            {"name": name, "data_type": _Word(dtype), "dims": [size]} | ({"optional": True} if name != "prompt" else {})
            for name, dtype, size in _INPUTS
        ],
        "output": [{"name": name, "data_type": _Word(dtype), "dims": dims} for name, dtype, dims in _OUTPUTS],
        "dynamic_batching": {} if policy is None else {"default_queue_policy": policy},
        "instance_group": [{"kind": _Word(kind), "count": serving.instances}],
        "cc_model_filenames": [{"key": key, "value": name} for key, name in engines.items()],
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
        "model_warmup": [
            {
                "name": "a whole request",
                "batch_size": 1,
                "count": 2 if engines else 1,  # a GPU records its graphs the second time
                "inputs": [
                    {"key": "prompt", "value": {"data_type": _Word("TYPE_STRING"), "dims": [1], "input_data_file": file}}
                ],
            }
        ],
    }
    return "\n".join(_lines(message)) + "\n"


def _lines(message: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(item, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_literal(item)}"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, _Word):
        return '"' + "".join(_escaped(character) for character in value) + '"'
    return str(value)


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else "".join(f"\\{byte:03o}" for byte in character.encode())
