"""The model that `hst_trt/integrations/triton.py` puts into a repository as ``model.py``: requests of Triton as pictures.

Triton runs it in a process of its own for each instance, one batch at a time. It imports the installed package and nothing
beside it, so the file means the same wherever it is copied. `triton_python_backend_utils` exists only in that process, which
is why it is imported when an instance starts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hst_trt import HybridStitchPipeline
from hst_trt.builder.detect import detect_gpus
from hst_trt.errors import HstError, IncompatibleError, MissingError, RequestError, ResourceError
from hst_trt.integrations.triton import DEFAULT_BUNDLE, THREADS
from hst_trt.server.answers import encode
from hst_trt.server.drawing import Drawer, Drawing, Drawn, draw
from hst_trt.server.request import FieldError, Limits, read_request

log = logging.getLogger("hst_trt.triton")


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the bundle for this instance's device. See Triton's python backend for `args`.

        Raises:
            HstError: no bundle is for this device, or it is damaged; Triton then marks the model as failed, with the message.
        """
        import triton_python_backend_utils

        self._utils: Any = triton_python_backend_utils
        config = json.loads(args["model_config"])
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        folder = Path(args["model_repository"]) / args["model_version"]
        threads = int(config["parameters"][THREADS]["string_value"])
        bundle = folder / bundle_for(config, None if device is None else capability_of(device))
        self._pipeline = HybridStitchPipeline.from_bundle(bundle, device=device or 0, threads=threads)
        self._drawer = Drawer(self._pipeline.bundle, self._pipeline.backend.machine, Limits())
        self._max_images = max(1, config["max_batch_size"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One answer a request, in their order. What is wrong with one request, or with its pictures, is its own answer."""
        answers: dict[int, Any] = {}
        drawings: dict[int, Drawing] = {}
        for i, request in enumerate(requests):
            try:
                drawings[i] = self._drawer(read_request(fields_of(request)))
            except HstError as exc:
                answers[i] = self._refusal(exc)
        for group in batches(drawings, self._max_images):
            answers |= self._drawn(requests, {i: drawings[i] for i in group})
        return [answers[i] for i in range(len(requests))]

    def _drawn(self, requests: Sequence[Any], drawings: Mapping[int, Drawing]) -> dict[int, Any]:
        """The answers of drawings that go together. If the batch fails each is drawn by itself, so that it fails alone."""

        def stop_if_nobody_waits(*_: object) -> None:
            if all(requests[i].is_cancelled() for i in drawings):
                raise _Cancelled

        try:
            drawn = draw(self._pipeline, list(drawings.values()), stop_if_nobody_waits)
            return {i: self._answer(requests[i], one) for i, one in zip(drawings, drawn, strict=True)}
        except _Cancelled:
            return {i: self._error("the request was cancelled", "CANCELLED") for i in drawings}
        except Exception as exc:
            if len(drawings) == 1:
                return {i: self._refusal(exc) for i in drawings}
            log.warning("a batch of %d requests failed and is drawn one by one", len(drawings), exc_info=True)
        return {i: self._drawn(requests, {i: drawing})[i] for i, drawing in drawings.items()}

    def _answer(self, request: Any, drawn: Drawn) -> Any:
        """Only the outputs that were asked for are made."""
        stats = drawn.stats.to_dict() | {"schedule": drawn.drawing.options, "batch": drawn.batch}
        make: dict[str, Callable[[], np.ndarray]] = {
            "image": lambda: np.stack([np.asarray(image) for image in drawn.images])[None],
            "png": lambda: np.array([[encode(image, "png") for image in drawn.images]], np.object_),
            "seed": lambda: np.array([[drawn.drawing.seed]], np.uint64),
            "stats": lambda: np.array([[json.dumps(stats)]], np.object_),
        }
        names = [name for name in make if name in request.requested_output_names()]
        return self._utils.InferenceResponse([self._utils.Tensor(name, make[name]()) for name in names])

    def _refusal(self, exc: Exception) -> Any:
        if isinstance(exc, FieldError) and exc.field and exc.field not in exc.problem:  # Triton's errors are a text alone
            return self._error(f"{exc.field}: {exc}", "INVALID_ARG")
        if isinstance(exc, RequestError):
            return self._error(str(exc), "INVALID_ARG")
        if isinstance(exc, ResourceError):
            return self._error(str(exc), "UNAVAILABLE")
        log.error("a request could not be drawn", exc_info=exc)  # paths and stacks are for the log
        return self._error("the request could not be drawn; the server's log says why", "INTERNAL")

    def _error(self, message: str, code: str) -> Any:
        error = self._utils.TritonError(message, getattr(self._utils.TritonError, code))
        return self._utils.InferenceResponse([], error)


class _Cancelled(Exception):
    """Nobody waits for the batch any more."""


def capability_of(device: int) -> int:
    """90 for 9.0.

    Raises:
        MissingError: the driver's tool is not here, or does not list the GPU.
    """
    gpus = detect_gpus()
    if device >= len(gpus):
        raise MissingError(
            f"nvidia-smi does not list GPU {device}, whose compute capability decides the bundle",
            found=f"{len(gpus)} GPUs",
            fix="make nvidia-smi available where Triton runs",
        )
    return gpus[device].sm


def bundle_for(config: Mapping[str, Any], sm: int | None) -> str:
    """The folder of the bundle for a compute capability (90 for 9.0), or for the CPU.

    Args:
        config: the model's. Triton itself picks nothing from ``cc_model_filenames`` for a model of the python backend, and
            ``default_model_filename`` names the Python file; so this reads the one, and a parameter in place of the other.
    """
    by_capability = config.get("cc_model_filenames", {})
    capability = None if sm is None else f"{sm // 10}.{sm % 10}"
    default = config["parameters"].get(DEFAULT_BUNDLE, {}).get("string_value")
    name: str | None = by_capability.get(capability, default)
    if name is None:
        raise IncompatibleError(
            f"this repository has no bundle for {'the CPU' if sm is None else f'compute capability {capability}'}",
            found=", ".join(by_capability),
            fix="build one on such a machine, and export the repository again with it",
        )
    return name


def fields_of(request: Any) -> dict[str, Any]:
    """The inputs of a request of Triton as the fields of `ImageRequest`.

    Raises:
        RequestError: several rows, or text that is not UTF-8.
    """
    fields: dict[str, Any] = {}
    for tensor in request.inputs():
        name, array = tensor.name(), tensor.as_numpy()
        if len(array) != 1:
            raise FieldError(
                "a request has one row", field=name, found=f"{len(array)} of {name}",
                fix="send a request for each prompt; Triton puts them into batches, and n asks for several pictures of one",
            )  # fmt: skip
        try:
            values = [one.decode() if isinstance(one, bytes) else one for one in array[0].tolist()]
        except UnicodeDecodeError as exc:
            raise FieldError(f"{name} is not UTF-8", field=name, found=str(exc)) from exc
        fields[name] = values[0] if len(values) == 1 else values
    return fields


def batches(drawings: Mapping[int, Drawing], max_images: int) -> Iterator[list[int]]:
    """Groups that can be drawn together: of equal keys, and of at most `max_images` unless one alone has more."""
    groups: dict[Any, list[int]] = {}
    for i, drawing in drawings.items():
        groups.setdefault(drawing.batch_key, []).append(i)
    for group in groups.values():
        batch: list[int] = []
        for i in group:
            if batch and sum(drawings[j].images for j in [*batch, i]) > max_images:
                yield batch
                batch = []
            batch.append(i)
        yield batch
