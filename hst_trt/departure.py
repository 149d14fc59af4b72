"""Where an engine leaves its graph: the first value, in the graph's order, that is not what the float32 twin has there.

It is looked for twice, first among the last values of the graph's scopes (a transformer's blocks), then within the first
scope that departs: not even a GPU holds every value of a large model at once. Polygraphy builds the engine anew with the
values in question as outputs, which keeps TensorRT from fusing across them: an engine that departs only because of such a
fusion has no such value, and then that is what is reported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .builder.engine import attentions
from .bundle import Bundle, link_or_copy
from .errors import BuildError, MissingError
from .tensorrt_module import TensorRTBackendName, tensorrt_module
from .validate import Call, error_of, tolerance_of, twin_values

__all__ = ["Departure", "departure", "first_departure", "marked_engine"]

Value = tuple[str, str]  # a node's name and a value that it gives
Values = Callable[[Sequence[str]], Mapping[str, np.ndarray]]  # values of a call, by name


@dataclass(frozen=True)
class Departure:
    """A value's name, the node that gives it, and its error relative to the value's largest."""

    value: str
    node: str
    error: float


def first_departure(bundle: Bundle, call: Call) -> Departure | None:
    """The first value of `call` that departs by more than the bundle's precision allows; None if no single one does.

    Raises:
        MissingError: polygraphy is not installed, or torch, which it is fed with.
        BuildError: the engine that gives the values cannot be built or run.
    """
    from .export.float32 import float_values

    graph, target = bundle.manifest.graphs[call.engine], bundle.manifest.target
    with tempfile.TemporaryDirectory(dir=bundle.path.parent, prefix=".departure.") as folder:
        path = Path(folder) / "model.onnx"
        link_or_copy(bundle.path / graph.path, path)
        for weights in graph.weights:
            link_or_copy(bundle.path / weights, path.with_name(Path(weights).name))

        def expected(names: Sequence[str]) -> Mapping[str, np.ndarray]:
            return twin_values(path, call.inputs, names)

        def found(names: Sequence[str]) -> Mapping[str, np.ndarray]:
            if target.backend == "onnxruntime":
                return twin_values(path, call.inputs, names, optimised=True)
            return _engine_values(path, call, names, target.backend)

        return departure(float_values(path), expected, found, tolerance_of(call.engine, target.precision))


def departure(values: Sequence[Value], expected: Values, found: Values, tolerance: float) -> Departure | None:
    """The first of `values` that departs by more than `tolerance`.

    Args:
        values: in the graph's order.
        expected: what the twin has for names of values.
        found: what the engine has.
    """
    scopes = [list(scope) for _, scope in groupby(values, key=_scope)]
    end = _first([scope[-1] for scope in scopes], expected, found, tolerance)
    if end is None:
        return None
    within = next(scope for scope in scopes if scope[-1] == (end.node, end.value))
    return _first(within, expected, found, tolerance) or end


def _first(values: Sequence[Value], expected: Values, found: Values, tolerance: float) -> Departure | None:
    names = [value for _, value in values]
    theirs, ours = expected(names), found(names)
    for node, value in values:
        error = error_of(ours[value], theirs[value])
        if not error <= tolerance:
            return Departure(value, node, error)
    return None


def _scope(value: Value) -> str:
    """Nodes are named after the part of the model that they belong to, as in ``transformer_blocks.3.MatMul_2``."""
    return value[0].rpartition(".")[0]


# -- an engine's values --------------------------------------------------------------------------------------------------
def marked_engine(
    graph: Path, shapes: Mapping[str, tuple[int, ...]], values: Sequence[str], backend: TensorRTBackendName
) -> Any:
    """Polygraphy's loader of the graph's engine with `values` as outputs beside its own, for inputs of `shapes`. Building it
    takes no GPU with TensorRT-RTX. A process stays with the backend that it asks for first.

    Raises:
        MissingError: polygraphy or the backend is not installed.
    """
    try:
        from polygraphy import config

        config.USE_TENSORRT_RTX = backend == "tensorrt-rtx"  # read when the next module is first imported
        from polygraphy.backend.trt import (
            CreateConfig,
            EngineBytesFromNetwork,
            ModifyNetworkOutputs,
            NetworkFromOnnxPath,
            PostprocessNetwork,
            Profile,
        )
        from polygraphy.logger import G_LOGGER
    except ImportError as exc:
        raise MissingError("finding the first departing value needs polygraphy", fix="pip install polygraphy") from exc
    import onnx

    trt = tensorrt_module(backend)
    G_LOGGER.module_severity = G_LOGGER.ERROR
    profile = Profile()
    for name, shape in shapes.items():
        profile.add(name, min=shape, opt=shape, max=shape)

    def decompose(network: Any) -> None:
        """There may be no fused kernel where a value beside an attention is kept, and there is none in float32."""
        for attention in attentions(trt, network):
            attention.decomposable = True

    own = [output.name for output in onnx.load(graph, load_external_data=False).graph.output]
    network = PostprocessNetwork(NetworkFromOnnxPath(str(graph), strongly_typed=True), decompose)
    return EngineBytesFromNetwork(
        ModifyNetworkOutputs(network, outputs=[*own, *(name for name in values if name not in own)]),
        CreateConfig(profiles=[profile]),
    )


def _engine_values(graph: Path, call: Call, names: Sequence[str], backend: TensorRTBackendName) -> dict[str, np.ndarray]:
    loader = marked_engine(graph, {name: values.shape for name, values in call.inputs.items()}, names, backend)
    try:
        import torch
    except ImportError as exc:
        raise MissingError("finding the first departing value needs torch", fix='pip install "hst_trt[export]"') from exc
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.datatype import DataType
    from polygraphy.exception import PolygraphyException

    try:
        with TrtRunner(EngineFromBytes(loader)) as runner:
            wanted = {name: DataType.to_dtype(tensor.dtype, "torch") for name, tensor in runner.get_input_metadata().items()}
            feed = {name: torch.from_numpy(values).to(wanted[name]) for name, values in call.inputs.items()}
            outputs = runner.infer(feed)
            return {name: torch.as_tensor(outputs[name]).float().numpy() for name in names}
    except PolygraphyException as exc:
        raise BuildError(f"the engine {call.engine} with more outputs could not be built or run", found=str(exc)) from exc
