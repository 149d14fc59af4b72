"""The float32 twin of an exported graph: the same nodes and weights, computed in float32.

It is what a bfloat16 or float16 engine is judged by: ONNX Runtime has no CPU kernels for bfloat16 products, and an engine
compared with a graph that rounds like itself would hide what the rounding costs. Values keep their names, so that the twin's
and an engine's can be compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["float32_twin", "float_values"]

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def float32_twin(graph: Path, *, also: Iterable[str] = ()) -> onnx.ModelProto:
    """The graph at `graph` with every half-precision value in float32.

    Stored weights stay external data beside the graph, as they are, each followed by a Cast; inputs and outputs in half
    precision become float32.

    Args:
        graph: a graph of a bundle.
        also: names of float values that shall be outputs, too.
    """
    model = onnx.load(graph, load_external_data=False)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type not in _HALVES:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            name = tensor.name
            tensor.name = f"{name}.stored"
            casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"Cast.{name}.stored", to=TensorProto.FLOAT))
        else:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALVES:
                attribute.i = TensorProto.FLOAT
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in _HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in also if name not in present
    )
    return model


def float_values(graph: Path) -> list[tuple[str, str]]:
    """The float values that a graph computes from its inputs, in its order: each node's name and the value's. Values that
    only weights decide are left out, and caches, which are updated in place."""
    model = onnx.load(graph, load_external_data=False)
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output)}
    live = {value.name for value in model.graph.input}
    found = []
    for node in model.graph.node:
        if live.isdisjoint(node.input):
            continue
        live.update(node.output)
        found += [
            (node.name, output)
            for output in node.output
            if kinds.get(output) in (TensorProto.FLOAT, *_HALVES) and not output.startswith("present_")
        ]
    return found
