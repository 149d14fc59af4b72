"""Parity of a bundle: what its engines compute, beside the float32 twins of their graphs, on the calls of real requests.

A few short requests are drawn whose plans touch every engine and every bucket. The first call of each engine on each shape
is kept, inputs and outputs, and computed again by ONNX Runtime from the graph's float32 twin. So engines are judged one by
one, on inputs that occur, and an error in one does not blur the next.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle, link_or_copy
from .errors import NumericsError
from .pipeline import HybridStitchPipeline
from .plan import MaskRule
from .runtime.engine import Backend, Engine, PreparedCall, TensorInfo
from .tensor_names import GLUE

__all__ = [
    "TOLERANCES",
    "Call",
    "Parity",
    "Twins",
    "compare",
    "error_of",
    "tap_calls",
    "tolerance_of",
    "twin_values",
    "validate",
]

TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}
"""Largest error relative to the largest value of an output, by what is computed in. Integers must be equal. Torch on a CPU
departs on the demo pair by up to 0.002 in float16 and 0.017 in bfloat16; what is wrong, such as another token's row, by about
1."""

PIXEL_TOLERANCES = {"float32": 2, "float16": 4, "bfloat16": 12}
"""Largest difference of a pixel, in 1/255; torch on a CPU departs by 1 in float16 and 2 in bfloat16."""

_CACHE = "present_"  # starts the names of outputs that are caches, updated in place
_PROMPT = "a red apple on a blue background"


@dataclass(frozen=True)
class Call:
    """One call of an engine: its inputs before it and its outputs after it, half precision widened to float32. Of caches,
    the outputs hold the rows that the call writes."""

    engine: str
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    @property
    def shape(self) -> str:
        """The shapes of what was computed, for people."""
        shapes = {name: list(values.shape) for name, values in self.outputs.items() if not name.startswith(_CACHE)}
        return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


@dataclass(frozen=True)
class Parity:
    """How far the outputs of one call are from the twin's.

    Attributes:
        engine: its name.
        shape: what was computed, for people.
        error: relative to the largest value, for pixels in 1/255, for integers the share that differs; a value that is not
            finite counts as infinitely far.
        tolerance: the largest error that is allowed.
        call: kept only of the call that departs most of all, since a call holds caches of gigabytes.
    """

    engine: str
    shape: str
    error: float
    tolerance: float
    call: Call | None = None

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance

    @property
    def excess(self) -> float:
        """The error in units of what is allowed."""
        return self.error / self.tolerance


def validate(path: Path, *, device: int = 0, on_call: Callable[[Parity], None] = lambda parity: None) -> list[Parity]:
    """Compares every engine of the bundle at `path` on every shape that its default size needs, or, if one gives values that
    are not finite, as far as requests get with it.

    Takes host memory for all weights in float32 and four times the cache of keys and values, and the export extra.

    Args:
        on_call: called with each result as soon as it is there.

    Raises:
        HstError: the bundle cannot be used here.
    """
    pipeline = HybridStitchPipeline.from_bundle(path, device=device)
    precision = pipeline.bundle.manifest.target.precision
    results: list[Parity] = []
    worst: int | None = None
    with tempfile.TemporaryDirectory(dir=pipeline.bundle.path.parent, prefix=".validate.") as folder:
        twins = Twins(pipeline.bundle, Path(folder))

        def judge(call: Call) -> None:
            nonlocal worst
            if not _can_be_judged(call):
                return
            parity = compare(call, twins.outputs(call), precision)
            if not parity.holds and (worst is None or parity.excess > results[worst].excess):
                if worst is not None:
                    results[worst] = replace(results[worst], call=None)
                worst, parity = len(results), replace(parity, call=call)
            results.append(parity)
            on_call(parity)

        try:
            tap_calls(pipeline, judge)
        except NumericsError:  # the request ended without a picture: whose fault that is has been seen by now
            if worst is None:
                raise
    return results


def _can_be_judged(call: Call) -> bool:
    """Whether it was given numbers. What an engine makes of others is not its fault; caches hold anything until they are
    written."""
    given = (values for name, values in call.inputs.items() if not name.startswith("past_"))
    return all(np.isfinite(values).all() for values in given)


def compare(call: Call, expected: Mapping[str, np.ndarray], precision: str) -> Parity:
    """A call's outputs beside what they should be.

    Args:
        precision: of the bundle's target.
    """
    worst, tolerance = 0.0, tolerance_of(call.engine, precision)
    for name, theirs in expected.items():
        ours = call.outputs[name]
        if theirs.dtype == np.uint8:
            tolerance = PIXEL_TOLERANCES[precision]
            worst = max(worst, float(np.abs(ours.astype(int) - theirs.astype(int)).max()))
        elif name == "ranks":
            worst = max(worst, error_of(*(_in_order(expected["priority"], ranks) for ranks in (ours, theirs))))
        elif np.issubdtype(theirs.dtype, np.integer):
            worst = max(worst, float((ours != theirs).mean()))
        else:
            worst = max(worst, error_of(ours, theirs))
    return Parity(call.engine, call.shape, worst, tolerance)


def tolerance_of(engine: str, precision: str) -> float:
    """The largest error that an engine of a bundle of that precision may have. The glue is in float32 everywhere."""
    return TOLERANCES["float32" if engine in GLUE else precision]


def _in_order(priority: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Priorities [B, h, w] as ranks [B, N] order them: two tokens whose priorities are all but equal may change places."""
    return np.take_along_axis(priority.reshape(ranks.shape), np.argsort(ranks, axis=1, kind="stable"), axis=1)


def error_of(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest error relative to the largest value; infinite where a value is not finite."""
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-12))


# -- the calls -----------------------------------------------------------------------------------------------------------
def tap_calls(pipeline: HybridStitchPipeline, on_call: Callable[[Call], None]) -> None:
    """Draws requests that together touch every engine and every bucket of the default size; `on_call` gets the first call
    of each engine on each shape."""
    tapped = HybridStitchPipeline(pipeline.bundle, _Tap(pipeline.backend, on_call))
    scale = pipeline.bundle.manifest.defaults.guidance_scale
    request = tapped.plan().request
    assert request is not None

    def draw(steps: int, **settings: Any) -> None:
        tapped(_PROMPT, seed=7, num_inference_steps=steps, correction=0.9, output_type="np", **settings)

    for bucket in request.buckets[:-1]:
        draw(4, stages=(1, 2, 1), mask=MaskRule(bucket / request.num_tokens))
    draw(6, stages=(3, 2, 1), mask=MaskRule(threshold=2.0))
    draw(6, schedule="srdiffusion", adaptive=True)
    if scale <= 1:  # guidance is a choice of each request
        draw(4, stages=(1, 2, 1), guidance_scale=3.0)


class _Tap:
    """A backend that shows calls on their way to another one."""

    def __init__(self, backend: Backend, on_call: Callable[[Call], None]) -> None:
        self._backend, self._on_call = backend, on_call
        self._seen: set[Hashable] = set()

    def engine(self, name: str) -> Engine:
        return _TappedEngine(name, self._backend.engine(name), self)

    def recorder(self) -> None:
        """Replays would pass the tap by."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def execute(self, name: str, engine: Engine, call: PreparedCall, bindings: Mapping[str, Any]) -> None:
        key = (name, *(bindings[tensor].shape for tensor in (*engine.input_names, *engine.output_names)))
        if key in self._seen:
            call.execute()
            return
        self._seen.add(key)
        inputs = self._read(engine, engine.input_names, bindings)
        call.execute()
        outputs = self._read(engine, engine.output_names, bindings)
        rows = _rows_written(outputs, bindings)
        self._on_call(Call(name, inputs, outputs | {cache: outputs[cache][:, :, :count] for cache, count in rows.items()}))

    def _read(self, engine: Engine, names: Iterable[str], bindings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: _widened(self._backend.read(bindings[name]), engine.tensors.get(name)) for name in names}


def _rows_written(outputs: Mapping[str, np.ndarray], bindings: Mapping[str, Any]) -> dict[str, int]:
    """How many rows of each cache a transformer call writes: text and computed tokens, or in the shorter caches of dual
    attention the tokens alone."""
    caches = {name: values.shape[2] for name, values in outputs.items() if name.startswith(_CACHE)}
    if not caches:
        return {}
    tokens, text = bindings["hidden_tokens"].shape[1], bindings["encoder_hidden_states"].shape[1]
    return {name: tokens + (text if rows == max(caches.values()) else 0) for name, rows in caches.items()}


@dataclass(frozen=True)
class _TappedEngine:
    name: str
    engine: Engine
    tap: _Tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def prepare(self, bindings: Mapping[str, Any]) -> _TappedCall:
        return _TappedCall(self, self.engine.prepare(bindings), bindings)


@dataclass(frozen=True)
class _TappedCall:
    engine: _TappedEngine
    call: PreparedCall
    bindings: Mapping[str, Any]

    def execute(self) -> None:
        self.engine.tap.execute(self.engine.name, self.engine.engine, self.call, self.bindings)


def _widened(values: np.ndarray, info: TensorInfo | None) -> np.ndarray:
    """Half precision as float32; numpy has no bfloat16, whose bits are the upper half of a float32's."""
    if info is not None and info.dtype == "bfloat16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if values.dtype == np.float16 else values


# -- the twins -----------------------------------------------------------------------------------------------------------
class Twins:
    """ONNX Runtime sessions of a bundle's float32 twins, made in `folder` on first use and kept."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self._bundle, self._folder = bundle, folder
        self._sessions: dict[str, Any] = {}

    def outputs(self, call: Call) -> dict[str, np.ndarray]:
        """What the twin computes from a call's inputs."""
        if call.engine not in self._sessions:
            self._sessions[call.engine] = self._load(call.engine)
        computed = _computed(self._sessions[call.engine], call.inputs, list(call.outputs))
        return {name: values[tuple(map(slice, call.outputs[name].shape))] for name, values in computed.items()}

    def _load(self, name: str) -> Any:
        graph = self._bundle.manifest.graphs[name]
        home = self._folder / name
        home.mkdir()
        for weights in graph.weights:
            link_or_copy(self._bundle.path / weights, home / Path(weights).name)
        link_or_copy(self._bundle.path / graph.path, home / "model.onnx")
        return _session(home / "model.onnx")


def twin_values(
    graph: Path, inputs: Mapping[str, np.ndarray], names: Sequence[str], *, optimised: bool = False
) -> dict[str, np.ndarray]:
    """Values of a graph's float32 twin, by name, computed from a call's inputs.

    Args:
        graph: with its weights beside it; the twin is written there, too.
        optimised: let ONNX Runtime rewrite the twin as it does when a bundle for the CPU is run.
    """
    return _computed(_session(graph, also=names, optimised=optimised), inputs, names)


def _session(graph: Path, *, also: Sequence[str] = (), optimised: bool = False) -> Any:
    import onnxruntime as ort

    from .export.float32 import float32_twin

    path = graph.with_name("twin.onnx")
    path.write_bytes(float32_twin(graph, also=also).SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimised:  # rewriting graphs is one thing that could be wrong: the twin is computed as it is written
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _computed(session: Any, inputs: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    return dict(zip(names, session.run(list(names), dict(inputs)), strict=True))
