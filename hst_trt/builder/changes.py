"""Why a bundle is to be made: what the one that is there was made from, against what would be used now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..bundle import Bundle, recover
from ..errors import HstError, MissingError
from ..recipe import Recipe, Target
from .graphs import graph_inputs, graphs_of, make_exporter, recipe_hash

__all__ = ["changed_parts", "look", "visible_changes"]


def look(final: Path, target: Target, *, check_hashes: bool = True) -> tuple[Bundle | None, str]:
    """The bundle that is there, or None and why it cannot be taken as it is."""
    recover(final)
    try:
        bundle = Bundle.open(final, check_hashes=check_hashes)
    except MissingError:
        return None, "there is no bundle yet"
    except HstError as exc:
        return None, f"the bundle that is there cannot be used: {exc.problem}"
    there = bundle.manifest.target
    if (there.name, there.backend, there.precision) != (target.name, target.backend, target.precision):
        return None, f"the bundle that is there is for {there.name} ({there.backend}, {there.precision})"
    return bundle, ""


def changed_parts(existing: Bundle | None, trouble: str, inputs: Mapping[str, str], force: bool) -> tuple[str, ...]:
    """Why a bundle's graphs are to be made; empty if those that are there are what `inputs` would give."""
    if force:
        return ("--force was given",)
    if existing is None:
        return (trouble,)
    before = {name: part.inputs for name, part in graphs_of(existing.manifest).parts.items()}
    changed = sorted(name for name in before.keys() | inputs.keys() if before.get(name) != inputs.get(name))
    return tuple(f"{name} is made from something else now" for name in changed)


def visible_changes(existing: Bundle, recipe: Recipe, target: Target) -> tuple[str, ...]:
    """Why a bundle's graphs would be made anew; empty if nothing that can be seen from here has changed.

    Graphs that wait for their engines may have been carried here: only their recipe is compared. So are those whose models
    or whose exporter are not on this machine; nothing is downloaded for a comparison.
    """
    recipe_part = existing.manifest.parts.get("recipe")
    if recipe_part is None or recipe_part.inputs != recipe_hash(recipe, target):
        return ("recipe is made from something else now",)
    if existing.manifest.state == "graphs":
        return ()
    try:
        return changed_parts(existing, "", graph_inputs(make_exporter(recipe, target, download=False)), force=False)
    except MissingError:
        return ()
