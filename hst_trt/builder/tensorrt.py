"""From a bundle's graphs to its engines, for TensorRT and TensorRT-RTX: one part of the bundle each, so a build resumes engine
by engine, and one whose graph, profiles, TensorRT and target are what they were is taken over.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ..bundle import Bundle, EngineEntry, GraphEntry, Manifest, PartEntry, ProfileEntry, Staging, fingerprint
from ..disk import user_cache
from ..errors import HstError, MissingError
from ..recipe import Recipe, Target, departures
from ..spec import PairSpec
from ..tensorrt_module import EXTRAS
from .engine import EngineJob
from .estimate import EngineEstimate, estimate_from_manifest
from .graphs import ENGINE_PART
from .profiles import engine_profiles
from .toolchain import Toolchain, find_toolchain
from .worker import build_in_child

__all__ = ["EngineProgress", "OnEngine", "PlannedEngine", "add_engines", "plan_engines", "waiting"]


@dataclass(frozen=True)
class PlannedEngine:
    """An engine that a bundle shall have. `inputs`: a hash of what it is made from; `reason`: why it is to be built, empty if
    the bundle that is there has it."""

    name: str
    graph: GraphEntry
    profiles: tuple[ProfileEntry, ...]
    estimate: EngineEstimate
    inputs: str
    reason: str

    @property
    def part(self) -> str:
        return self.name + ENGINE_PART


@dataclass(frozen=True)
class EngineProgress:
    """Where the work on an engine is. `done`: about what share of it."""

    name: str
    number: int  # from 1
    of: int
    state: Literal["building", "built", "kept"]
    phase: str = ""
    done: float = 0.0


OnEngine = Callable[[EngineProgress], None]


def plan_engines(
    graphs: Manifest, spec: PairSpec, existing: Manifest | None, tools: Toolchain, recipe: Recipe, target: Target
) -> list[PlannedEngine]:
    """The engines of a bundle and why each has to be built, or not.

    Args:
        graphs: what describes the graphs and their files.
        spec: of the pair.
        existing: the bundle that is there.
    """
    estimates = estimate_from_manifest(graphs, spec, recipe, target).engines
    planned = []
    for name, graph in graphs.graphs.items():
        profiles = engine_profiles(name, graph.axes, spec, recipe, target)
        inputs = _inputs(graphs, graph, profiles, tools)
        reason = _reason(name, inputs, profiles, graphs, existing, tools)
        planned.append(PlannedEngine(name, graph, profiles, estimates[name], inputs, reason))
    return planned


def add_engines(
    staging: Staging,
    graphs: Manifest,
    planned: list[PlannedEngine],
    existing: Bundle | None,
    tools: Toolchain,
    on_engine: OnEngine,
) -> tuple[Manifest, tuple[str, ...]]:
    """Builds in the staging folder, which holds the graphs, every engine that it lacks.

    Args:
        graphs: the manifest of the bundle that grows, in the state "graphs".
        existing: the bundle whose engines are taken over where they are what they would be again.

    Returns:
        The manifest of the complete bundle, to be committed, and the names of the engines that were taken over.

    Raises:
        HstError: an engine could not be built; those before it are kept.
    """
    if existing is not None:
        staging.adopt(existing, {engine.part: engine.inputs for engine in planned})
    entries: dict[str, EngineEntry] = {}
    kept: list[str] = []
    for number, engine in enumerate(planned, start=1):
        result = staging.part(engine.part, engine.inputs)
        at = EngineProgress(engine.name, number, len(planned), "building" if result is None else "kept")
        on_engine(at)
        if result is not None:
            kept.append(engine.name)
        else:
            entry = _build(staging, engine, tools, partial(_report, on_engine, at))
            result = {"engines": {engine.name: entry.model_dump()}}
            staging.finish(engine.part, engine.inputs, [staging.path / entry.path], result)
            on_engine(replace(at, state="built", done=1.0))
        entries[engine.name] = EngineEntry.model_validate(result["engines"][engine.name])
    target = graphs.target.model_copy(update={"backend_version": tools.version, "sms": tools.sms})
    files = graphs.files | staging.files(engine.part for engine in planned)
    parts = {engine.part: PartEntry(inputs=engine.inputs, files=(entries[engine.name].path,)) for engine in planned}
    files = dict(sorted(files.items()))
    update = {"state": "complete", "target": target, "engines": entries, "files": files, "parts": graphs.parts | parts}
    return graphs.model_copy(update=update | {"fingerprint": fingerprint(files, target)}), tuple(kept)


def waiting(path: Path, target: Target, pair: str, missing: MissingError) -> HstError:
    """The error where a target's engines cannot be built here, and its graphs wait in the bundle at `path`.

    Args:
        pair: the recipe as the user gave it, a name or a path.
        missing: what is not here.
    """
    options = [word for key, value in departures(target).items() for word in (f"--{key}", value)]
    command = shlex.join(["hst-trt", "build", "--gpu", target.name, "--pair", pair, *options, "--output", str(path.parent)])
    elsewise = "; to build TensorRT-RTX's engines here, add `--backend tensorrt-rtx`" if _rtx_would_do(target) else ""
    return MissingError(
        f"{target.name} needs {target.backend} engines, which cannot be built here: {missing.problem}",
        found=f"the graphs are exported and checked, and wait in {path}",
        fix=f'on a machine with that GPU: pip install "hst_trt[{EXTRAS[target.backend]}]", copy the bundle there if it is '
        f"another machine, then `{command}`{elsewise}; to draw without a GPU: `hst-trt build --gpu cpu`",
    )


def _rtx_would_do(target: Target) -> bool:
    if target.backend == "tensorrt-rtx":
        return False
    try:
        find_toolchain(target.model_copy(update={"backend": "tensorrt-rtx"}))
    except HstError:
        return False
    return True


def _report(on_engine: OnEngine, at: EngineProgress, phase: str, done: float) -> None:
    on_engine(replace(at, phase=phase, done=done))


def _build(staging: Staging, engine: PlannedEngine, tools: Toolchain, on_progress: Callable[[str, float], None]) -> EngineEntry:
    path = f"engines/{engine.name}.engine"
    (staging.path / path).parent.mkdir(exist_ok=True)
    job = EngineJob(
        name=engine.name,
        backend=tools.backend,
        graph=engine.graph,
        onnx=staging.path / engine.graph.path,
        profiles=engine.profiles,
        sms=tools.sms,
        gpu=tools.gpu.uuid if tools.gpu is not None else None,
        output=staging.path / path,
        timing_cache=_timing_cache(tools),
    )
    built = build_in_child(job, staging.path / "logs" / f"{engine.name}.log", engine.estimate.host_bytes, on_progress)
    return EngineEntry(
        path=path,
        profiles=engine.profiles,
        activation_bytes=built.activation_bytes,
        read_back=built.read_back,
        seconds=built.seconds,
    )


def _timing_cache(tools: Toolchain) -> Path | None:
    """One file for each GPU and version: TensorRT takes no timings of another. TensorRT-RTX times nothing."""
    if tools.backend == "tensorrt-rtx":
        return None
    return user_cache() / f"{tools.backend}-{tools.version}-sm{tools.sms[0]}.timing"


# -- what an engine is made from ---------------------------------------------------------------------------------------------
def _inputs(graphs: Manifest, graph: GraphEntry, profiles: tuple[ProfileEntry, ...], tools: Toolchain) -> str:
    content = {
        "files": [graphs.files[file].sha256 for file in (graph.path, *graph.weights)],
        "profiles": [profile.model_dump() for profile in profiles],
        "toolchain": [tools.backend, tools.version, tools.sms],
        "builder": hashlib.sha256(Path(__file__).with_name("engine.py").read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reason(
    name: str,
    inputs: str,
    profiles: tuple[ProfileEntry, ...],
    graphs: Manifest,
    existing: Manifest | None,
    tools: Toolchain,
) -> str:
    """Why an engine has to be built: the first thing that is not as it was when the one that is there was built."""
    if existing is None or name not in existing.engines:
        return "there is no engine yet"
    part = existing.parts.get(name + ENGINE_PART)
    if part is not None and part.inputs == inputs:
        return ""
    before = existing.target
    if (before.backend, before.backend_version) != (tools.backend, tools.version):
        return f"it is of {before.backend} {before.backend_version}, and {tools.backend} {tools.version} is here"
    if before.sms != tools.sms:
        return f"it is for SM{', SM'.join(map(str, before.sms))} instead of SM{', SM'.join(map(str, tools.sms))}"
    old, new = existing.graphs[name], graphs.graphs[name]
    if [existing.files[file] for file in (old.path, *old.weights)] != [graphs.files[file] for file in (new.path, *new.weights)]:
        return "its graph or weights have changed"
    if existing.engines[name].profiles != profiles:
        return "its profiles have changed"
    return "the builder has changed"
