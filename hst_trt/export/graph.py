"""A small builder of ONNX graphs whose weights stay where they are.

Graphs are written node by node instead of traced: every node is chosen, every dynamic axis is named by us, nothing depends
on an exporter's version, and a graph of 8 billion parameters takes about a second because its initializers only *refer* to
the model's safetensors files (ONNX external data: file name, offset, length). The torch modules remain the oracle that
tests the graphs (`hst_trt.models`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .weights import WeightStore

__all__ = ["OPSET", "Dim", "GraphBuilder", "Precision", "onnx_dtype"]

OPSET = 24  # the first with TensorScatter; Attention and RMSNormalization came with 23
IR_VERSION = 11
Precision = Literal["float32", "float16", "bfloat16"]
Dim = int | str
_ONNX_DTYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.bool_): TensorProto.BOOL,
}


def onnx_dtype(dtype: str | np.dtype) -> int:
    """ONNX's number for a dtype given by name (``"float32"``, ``"bfloat16"``, ``"int64"`` ...)."""
    return _ONNX_DTYPES[np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)]


class GraphBuilder:
    """Collects nodes; a value is its name.

    Args:
        name: the graph's name.
        weights: where `weight` finds its tensors; None for graphs without any.
        precision: the dtype in which `weight` and `scalar` give their values, and so in which the graph computes.
            A weight that is stored in another dtype is followed by a Cast, which every backend folds away when it loads.
    """

    def __init__(self, name: str, weights: WeightStore | None = None, precision: Precision = "float32") -> None:
        self.name = name
        self.precision: Precision = precision
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._made: set[str] = set()
        self._counts: dict[str, int] = {}
        self._scope = ""

    # -- inputs and outputs ------------------------------------------------------------------------------------------
    def input(self, name: str, dtype: str, shape: Sequence[Dim]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, onnx_dtype(dtype), list(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[Dim]) -> None:
        """Declares `value` as the graph's output `name`; an Identity is added where the value has another name."""
        if value != name:
            self._nodes.append(helper.make_node("Identity", [value], [name], name=f"output.{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, onnx_dtype(dtype), list(shape)))

    @property
    def input_names(self) -> list[str]:
        return [value.name for value in self._inputs]

    @property
    def output_names(self) -> list[str]:
        return [value.name for value in self._outputs]

    # -- nodes -------------------------------------------------------------------------------------------------------
    def scope(self, name: str) -> None:
        """Names of nodes made from here on start with `name` (a block's path in the checkpoint)."""
        self._scope = f"{name}." if name else ""

    @overload
    def op(self, op_type: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]: ...
    @overload
    def op(self, op_type: str, *inputs: str, outputs: None = None, **attributes: Any) -> str: ...
    def op(self, op_type: str, *inputs: str, outputs: int | None = None, **attributes: Any) -> str | list[str]:
        """Adds a node and returns its output, or the list of them where `outputs` asks for a number."""
        stem = f"{self._scope}{op_type}"
        self._counts[stem] = number = self._counts.get(stem, 0) + 1
        name = f"{stem}_{number}"
        results = [name] if outputs is None else [f"{name}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(op_type, list(inputs), results, name=name, **attributes))
        return results[0] if outputs is None else results

    def op_into(self, result: str, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node whose one output has the given name: for outputs that must be a node's own (in-place caches)."""
        self._nodes.append(helper.make_node(op_type, list(inputs), [result], name=f"{op_type}.{result}", **attributes))
        return result

    # -- constants and weights ---------------------------------------------------------------------------------------
    def constant(self, value: np.ndarray, name: str | None = None) -> str:
        """An initializer stored in the graph itself; equal values share one."""
        value = np.ascontiguousarray(value)
        if name is None:
            name = f"constant.{value.dtype}.{'x'.join(map(str, value.shape))}.{value.tobytes().hex()[:64]}"
        if name in self._initializers:
            stored = numpy_helper.to_array(self._initializers[name])
            if stored.shape != value.shape or stored.tobytes() != value.tobytes():
                name = f"{name}.{len(self._initializers)}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float, dtype: str | None = None) -> str:
        """A 0-D constant in the graph's precision, or in `dtype`."""
        dtype = dtype or self.precision
        return self.constant(np.array(value, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))

    def weight(self, key: str) -> str:
        """The stored tensor `key`, in the graph's precision."""
        assert self._weights is not None, "this graph has no weights"
        if key not in self._initializers:
            stored = self._weights[key]
            tensor = TensorProto(name=key, data_type=onnx_dtype(stored.dtype), dims=stored.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for entry, value in (("location", stored.file.name), ("offset", stored.offset), ("length", stored.length)):
                tensor.external_data.add(key=entry, value=str(value))
            self._initializers[key] = tensor
        if self._initializers[key].data_type == onnx_dtype(self.precision):
            return key
        return self._once(f"{key}.{self.precision}", "Cast", key, to=onnx_dtype(self.precision))

    def has_weight(self, key: str) -> bool:
        return self._weights is not None and key in self._weights

    def weight_shape(self, key: str) -> tuple[int, ...]:
        assert self._weights is not None, "this graph has no weights"
        return self._weights[key].shape

    def _once(self, result: str, op_type: str, *inputs: str, **attributes: Any) -> str:
        if result not in self._made:
            self._nodes.append(helper.make_node(op_type, list(inputs), [result], name=f"{op_type}.{result}", **attributes))
            self._made.add(result)
        return result

    # -- phrases every model speaks ----------------------------------------------------------------------------------
    def cast(self, value: str, dtype: str) -> str:
        return self.op("Cast", value, to=onnx_dtype(dtype))

    def linear(self, x: str, prefix: str) -> str:
        """``x @ weight.T + bias``: torch's Linear, with the bias left out where the checkpoint has none."""
        transposed = self._once(f"{prefix}.weight.T", "Transpose", self.weight(f"{prefix}.weight"), perm=[1, 0])
        y = self.op("MatMul", x, transposed)
        return self.op("Add", y, self.weight(f"{prefix}.bias")) if self.has_weight(f"{prefix}.bias") else y

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    # -- the result --------------------------------------------------------------------------------------------------
    def build(self) -> onnx.ModelProto:
        """The finished model; external data is referred to by bare file name, so it must stand beside the graph."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values()))
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="hst_trt",
        )

    def save(self, path: Path) -> onnx.ModelProto:
        """Writes the graph to `path`, deterministically: the same weights give the same bytes."""
        model = self.build()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString(deterministic=True))
        return model
