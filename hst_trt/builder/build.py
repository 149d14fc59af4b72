"""From a recipe and a target to a bundle: graphs first, then what the target's backend makes of them.

The graphs come from an earlier `export` (possibly on another machine), from the package itself for the demo pair on a CPU,
or from an export that is run now. Graphs and engines grow in one staging folder, part by part, so what is there stays until
the new bundle is whole, and an interrupted build goes on where it was. Where the engines cannot be built, for want of a GPU
or of TensorRT, the graphs are committed as a bundle of their own, which can be carried to the machine that can.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle, Manifest, Staging
from ..errors import HstError, MissingError
from ..recipe import Recipe, Target
from .changes import changed_parts, look, visible_changes
from .estimate import BuildEstimate, estimate_from_manifest, estimate_from_models
from .graphs import OnPart, add_graphs, graph_inputs, graphs_of, make_exporter, now
from .shipped import install_shipped, is_shipped, shipped_demo, shipped_hash, with_known_calibrations
from .tensorrt import EngineProgress, OnEngine, PlannedEngine, add_engines, plan_engines, waiting
from .toolchain import Toolchain, find_toolchain

__all__ = ["BuildOutcome", "BuildPlan", "build_bundle", "export_bundle", "plan_build", "shipped_demo"]


def _unwatched_part(name: str, made: bool) -> None:
    """For callers who do not watch."""


def _unwatched_engine(progress: EngineProgress) -> None:
    """For callers who do not watch."""


@dataclass(frozen=True)
class BuildOutcome:
    """The bundle, why it was made or left as it was, and the engines that were taken over."""

    bundle: Bundle
    made: bool
    reasons: tuple[str, ...]
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildPlan:
    """What a build would do.

    Attributes:
        reasons: why something would be made; empty if the bundle is what it should be.
        estimate: of all engines, those to be built and the others; None for ONNX Runtime, and where the pair's models are not
            on this machine.
        rebuilt: names of the engines that would be built.
        tools: what would build them; None for ONNX Runtime, or where `trouble` says why nothing here can.
    """

    reasons: tuple[str, ...]
    estimate: BuildEstimate | None
    rebuilt: tuple[str, ...]
    tools: Toolchain | None
    trouble: str


def export_bundle(
    recipe: Recipe, target: Target, final: Path, *, force: bool = False, on_part: OnPart = _unwatched_part
) -> BuildOutcome:
    """Exports the graphs of a pair into the bundle at `final`. For a CPU that is all there is to build; for a GPU the bundle
    is left in the state "graphs".

    Raises:
        MissingError: a model or one of the packages torch, diffusers, transformers, onnx is not there.
        HstError: the pair does not fit, a check failed, or the disk is full.
    """
    exporter = make_exporter(recipe, target)
    existing, trouble = look(final, target)
    reasons = changed_parts(existing, trouble, graph_inputs(exporter), force)
    if existing is not None and not reasons:
        return _unchanged(existing)
    with Staging.open(final) as staging:
        manifest = add_graphs(staging, exporter, existing, force, on_part)
        return BuildOutcome(staging.commit(with_known_calibrations(manifest, existing)), True, reasons)


def build_bundle(
    recipe: Recipe,
    target: Target,
    final: Path,
    *,
    force: bool = False,
    on_part: OnPart = _unwatched_part,
    on_engine: OnEngine = _unwatched_engine,
) -> BuildOutcome:
    """Builds a complete bundle at `final`.

    Args:
        on_part: called with a graph part's name, and whether it is made or taken over.
        on_engine: called before, during and after the build of each engine.

    Raises:
        MissingError: the target's GPU or TensorRT is not here; the graphs are kept in the bundle, and the error names the
            command that finishes it.
        IncompatibleError: the target's engines cannot be built on the GPU that is here, or by this TensorRT.
    """
    existing, trouble = look(final, target)
    if is_shipped(recipe, target) and (existing is None or "shipped" in existing.manifest.parts):
        reasons = changed_parts(existing, trouble, {"shipped": shipped_hash()}, force)
        if existing is not None and not reasons:
            return _unchanged(existing)
        return BuildOutcome(install_shipped(final), made=True, reasons=reasons)
    if target.backend != "onnxruntime":
        return _with_engines(recipe, target, final, existing, trouble, force, on_part, on_engine)
    if existing is not None and not force and not visible_changes(existing, recipe, target):
        return _unchanged(existing)
    return export_bundle(recipe, target, final, force=force, on_part=on_part)


def plan_build(recipe: Recipe, target: Target, final: Path, *, force: bool = False) -> BuildPlan:
    """What `build_bundle` would do now, and what that takes. Nothing is built or downloaded, and the bundle is not hashed."""
    existing, trouble = look(final, target, check_hashes=False)
    if existing is None or force:
        reasons = changed_parts(existing, trouble, {}, force)
    else:
        reasons = visible_changes(existing, recipe, target)
    if target.backend == "onnxruntime":
        return BuildPlan(reasons, None, (), None, "")
    tools, obstacle = None, ""
    try:
        tools = find_toolchain(target)
    except HstError as exc:
        obstacle = exc.problem
    if existing is None or reasons:
        models = estimate_from_models(recipe, target)
        return BuildPlan(reasons, models, tuple(models.engines if models else ()), tools, obstacle)
    graphs = graphs_of(existing.manifest)
    estimate = estimate_from_manifest(graphs, existing.spec, recipe, target)
    if tools is None:
        waits = existing.manifest.state == "graphs"
        return BuildPlan(("its graphs wait for their engines",) if waits else (), estimate, (), None, obstacle)
    planned = plan_engines(graphs, existing.spec, existing.manifest, tools, recipe, target)
    rebuilt = tuple(engine.name for engine in planned if engine.reason)
    return BuildPlan(_engine_reasons(planned), estimate, rebuilt, tools, obstacle)


def _with_engines(
    recipe: Recipe,
    target: Target,
    final: Path,
    existing: Bundle | None,
    trouble: str,
    force: bool,
    on_part: OnPart,
    on_engine: OnEngine,
) -> BuildOutcome:
    tools: Toolchain | None = None
    try:
        tools = find_toolchain(target)
    except MissingError as exc:
        missing = exc
    complete = existing is not None and existing.manifest.state == "complete"
    if existing is not None and not force and not visible_changes(existing, recipe, target):
        graphs = graphs_of(existing.manifest)
        planned = [] if tools is None else plan_engines(graphs, existing.spec, existing.manifest, tools, recipe, target)
        if complete and not _engine_reasons(planned):
            return _unchanged(existing)
        if tools is None:
            raise waiting(final, target, recipe.given_as, missing)
        with Staging.open(final) as staging:
            staging.adopt(existing, {name: part.inputs for name, part in graphs.parts.items()})
            return _finished(staging, graphs, planned, existing, tools, (), on_engine)

    if tools is None and complete:
        raise MissingError(
            f"{target.name} needs {target.backend} engines, which cannot be built here: {missing.problem}",
            found=f"the complete bundle {final}, which was left as it is",
            fix="build on a machine with that GPU and its TensorRT, or into another folder with --output",
        ) from missing
    exporter = make_exporter(recipe, target)
    reasons = changed_parts(existing, trouble, graph_inputs(exporter), force)
    with Staging.open(final) as staging:
        graphs = add_graphs(staging, exporter, existing, force, on_part)
        if tools is None:
            staging.commit(graphs)
            raise waiting(final, target, recipe.given_as, missing) from missing
        usable = None if force else existing
        before = usable.manifest if usable is not None else None
        planned = plan_engines(graphs, Bundle(staging.path, graphs).spec, before, tools, recipe, target)
        return _finished(staging, graphs, planned, usable, tools, reasons, on_engine)


def _finished(
    staging: Staging,
    graphs: Manifest,
    planned: list[PlannedEngine],
    existing: Bundle | None,
    tools: Toolchain,
    reasons: tuple[str, ...],
    on_engine: OnEngine,
) -> BuildOutcome:
    manifest, kept = add_engines(staging, graphs, planned, existing, tools, on_engine)
    manifest = manifest.model_copy(update={"created": now()})
    built = [engine for engine in planned if engine.name not in kept]
    return BuildOutcome(staging.commit(manifest), made=True, reasons=reasons + _engine_reasons(built), kept=kept)


def _engine_reasons(planned: list[PlannedEngine]) -> tuple[str, ...]:
    return tuple(f"engine {engine.name}: {engine.reason}" for engine in planned if engine.reason)


def _unchanged(bundle: Bundle) -> BuildOutcome:
    return BuildOutcome(bundle, made=False, reasons=("nothing it was made from has changed",))
