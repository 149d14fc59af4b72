"""``hst-trt inspect`` and ``hst-trt verify``: what a bundle holds, and whether it is whole."""

from __future__ import annotations

from typing import Any

import click

from ..bundle import Bundle, Manifest, ProfileEntry
from ..tensor_names import GLUE, VAE_DECODER
from .console import bars, print_json, tables
from .options import find_bundle

__all__ = ["inspect", "verify"]

_ARGUMENT = click.argument("bundle", required=False)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@click.command()
@_ARGUMENT
@_JSON
def inspect(bundle: str | None, as_json: bool) -> None:
    """Show what a bundle holds: models, graphs with their inputs and outputs, engines with their profiles. Nothing is hashed or
    loaded."""
    opened = Bundle.open(find_bundle(bundle), check_hashes=False)
    m = opened.manifest
    if as_json:
        print_json("hst_trt.inspect/1", {"bundle": str(opened.path), "manifest": m.model_dump(mode="json")})
        return
    from rich.table import Table

    t = m.target
    tables.print(opened.path)
    backend = f"{t.backend} {t.backend_version}".strip() + (f" for {', '.join(f'SM{sm}' for sm in t.sms)}" if t.sms else "")
    tables.print(f"{m.recipe} for {t.name}: {backend}, {t.precision}, {t.os}/{t.arch}, state {m.state}")
    tables.print(f"made {m.created} by {m.created_by}, fingerprint {m.fingerprint[:16]}")
    for name, model in m.models.items():
        spec = getattr(opened.spec, name)
        at = f" at {model.revision}" if model.revision else ""
        size = f"{spec.layers} layers of width {spec.width}, {spec.dual_layers} with dual attention"
        tables.print(f"{name}: {model.source}{at} ({model.component}), {size}")
    table = Table("graph", "MiB", "inputs", "outputs", "worst error")
    for name, graph in m.graphs.items():
        if name in GLUE:
            continue
        mib = sum(m.files[file].bytes for file in (graph.path, *graph.weights)) / 2**20
        error = "" if graph.worst_error is None else f"{graph.worst_error:.1e}"
        if name == VAE_DECODER and graph.worst_error is not None:
            error = f"{graph.worst_error:.0f}/255"
        table.add_row(name, f"{mib:.2f}", _tensors(graph.inputs), _tensors(graph.outputs), error)
    tables.print(table)
    tables.print(f"glue: {', '.join(name for name in m.graphs if name in GLUE)}")
    if m.engines:
        tables.print(_engines(m))
        tables.print("shapes they take, by the axes of their graphs:")
        for name, engine in m.engines.items():
            tables.print(f"  {name}: {'; '.join(_lengths(profile) for profile in engine.profiles)}")
    d, limits = m.defaults, f"side {m.limits.max_side}, {m.limits.max_images} images"
    tables.print(
        f"defaults: {d.width}x{d.height}, {d.num_inference_steps} steps, guidance {d.guidance_scale}; limits: {limits}"
    )


def _engines(m: Manifest) -> Any:
    from rich.table import Table

    table = Table(f"{m.target.backend} engine", "MiB", "pinned", "ranges", "scratch MiB", "read back", "seconds")
    for name, engine in m.engines.items():
        pinned = sum(_is_pinned(profile) for profile in engine.profiles)
        scratch = "" if engine.activation_bytes is None else f"{engine.activation_bytes / 2**20:.1f}"
        mib = f"{m.files[engine.path].bytes / 2**20:.2f}"
        profiles = (str(pinned), str(len(engine.profiles) - pinned))
        table.add_row(name, mib, *profiles, scratch, engine.read_back, f"{engine.seconds:.1f}")
    return table


def _is_pinned(profile: ProfileEntry) -> bool:
    return all(least == greatest for least, _, greatest in profile.axes.values())


def _lengths(profile: ProfileEntry) -> str:
    return " ".join(
        f"{axis} {least}" if least == greatest else f"{axis} {least}..{greatest}"
        for axis, (least, _, greatest) in profile.axes.items()
    )


def _tensors(tensors: Any) -> str:
    shown = [
        f"{t.name} {t.dtype}[{', '.join(map(str, t.shape))}]" for t in tensors if not t.name.startswith(("past_", "present_"))
    ]
    cached = len(tensors) - len(shown)
    return "\n".join(shown + ([f"and {cached} cache tensors"] if cached else []))


@click.command()
@_ARGUMENT
@_JSON
def verify(bundle: str | None, as_json: bool) -> None:
    """Check every file of a bundle against its hash. Exit code 6 if one differs."""
    path = find_bundle(bundle)
    with bars(quiet=as_json) as progress:
        task = progress.add_task("hashing", total=None, note="")
        opened = Bundle.open(path, progress=lambda done, total: progress.update(task, completed=done, total=total))
    files = opened.manifest.files
    size = sum(entry.bytes for entry in files.values())
    if as_json:
        print_json("hst_trt.verify/1", {"bundle": str(opened.path), "ok": True, "files": len(files), "bytes": size})
        return
    tables.print(f"{opened.path}: {len(files)} files, {size / 2**20:.1f} MiB, all as built")
