"""Opening a bundle: schema, containment of every path and every file's hash are checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from ..disk import user_cache
from ..errors import IncompatibleError, IntegrityError, MissingError
from ..schedule import FlowMatchEuler
from ..spec import PairSpec, TransformerSpec
from .manifest import SCHEMA_VERSION, FileEntry, Manifest

__all__ = ["MANIFEST", "SUFFIX", "Bundle", "bundles_folder", "hash_file", "newest_bundle", "verify_files"]

SUFFIX = ".hstb"
MANIFEST = "manifest.json"
_CHUNK = 4 * 2**20


class Bundle:
    """A complete bundle on disk, opened and checked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        check_hashes: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Bundle:
        """Opens a bundle.

        Args:
            path: the folder.
            check_hashes: hash every file. Only commands that load nothing (listing, planning) leave it out.
            progress: called with (bytes hashed, bytes in all).

        Raises:
            MissingError: there is no such bundle.
            IntegrityError: it is half-written, damaged or changed, or names a path outside itself.
            IncompatibleError: it was written by a newer version.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        for name in manifest.files:
            _contained(folder, name)
        _check_references(folder, manifest)
        bundle = cls(folder, manifest)
        try:
            _ = bundle.spec, bundle.scheduler
        except (KeyError, TypeError, ValueError, OSError) as exc:
            raise IntegrityError(
                f"{folder} does not describe its models or its scheduler",
                found=f"{type(exc).__name__}: {exc}",
                fix="run `hst-trt build --force` again",
            ) from exc
        if check_hashes:
            verify_files(folder, manifest.files, progress)
        return bundle

    @property
    def spec(self) -> PairSpec:
        models = self.manifest.models
        large = models["large"].config
        return PairSpec(
            large=TransformerSpec.from_config(large),
            small=TransformerSpec.from_config(models["small"].config),
            latent_channels=large["in_channels"],
            patch_size=large["patch_size"],
            vae_scale=self.manifest.vae_scale,
            clip_length=self.manifest.tokenizers[0].length,
            t5_length=self.manifest.t5_length,
        )

    @property
    def scheduler(self) -> FlowMatchEuler:
        return FlowMatchEuler.from_config(json.loads((self.path / self.manifest.scheduler).read_text()))

    def graph_paths(self) -> dict[str, Path]:
        return {name: self.path / graph.path for name, graph in self.manifest.graphs.items()}


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    if not folder.is_dir():
        raise MissingError(f"there is no bundle at {folder}", fix="run `hst-trt build` to make one")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(
            f"{folder} is not a complete bundle: it has no {MANIFEST}",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
            fix="give the folder of a bundle, or run `hst-trt build` to make one",
        ) from None
    except (OSError, ValueError, RecursionError) as exc:
        raise IntegrityError(f"{file} cannot be read", found=str(exc), fix="run `hst-trt build` again") from exc
    version = table.get("schema_version") if isinstance(table, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise IncompatibleError(
            f"{folder} was written by a newer hst_trt",
            found=f"bundle schema {version}, this version reads up to {SCHEMA_VERSION}",
            fix="upgrade hst_trt, or build the bundle again with this version",
        )
    try:
        return Manifest.model_validate(table)
    except ValidationError as exc:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()[:4])
        raise IntegrityError(f"{file} is not a valid manifest", found=problems, fix="run `hst-trt build` again") from exc


def _contained(folder: Path, name: str) -> Path:
    """The file `name` of the bundle, refused if it or a link in it leads outside."""
    parts = PurePosixPath(name).parts
    path = folder / name
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise IntegrityError(f"{folder} names a path outside itself", found=name, fix="do not use this bundle")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"{folder}: {name} is a link that leads outside the bundle", fix="do not use this bundle")
    return path


def _check_references(folder: Path, manifest: Manifest) -> None:
    named = {manifest.scheduler, *(t.path for t in manifest.tokenizers)}
    for graph in manifest.graphs.values():
        named |= {graph.path, *graph.weights}
    named |= {engine.path for engine in manifest.engines.values()}
    unlisted = sorted(named - manifest.files.keys())
    if unlisted:
        raise IntegrityError(
            f"{folder} uses files that its manifest does not list",
            found=", ".join(unlisted[:4]),
            fix="run `hst-trt build --force` again",
        )


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def verify_files(folder: Path, files: dict[str, FileEntry], progress: Callable[[int, int], None] | None = None) -> None:
    """Hashes files in parallel and compares them with what the manifest says."""
    total, done = sum(entry.bytes for entry in files.values()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    def check(item: tuple[str, FileEntry]) -> None:
        name, entry = item
        path = folder / name
        try:
            size = path.stat().st_size
            digest = hash_file(path, advance) if size == entry.bytes else None
        except OSError as exc:
            raise IntegrityError(
                f"{folder}: {name} is missing or cannot be read",
                found=exc.strerror,
                fix="run `hst-trt build --force` again",
            ) from exc
        if digest != entry.sha256:
            found = f"sha256 {digest}" if digest else f"{size} bytes instead of {entry.bytes}"
            raise IntegrityError(
                f"{folder}: {name} is not the file that was built", found=found, fix="run `hst-trt build --force` again"
            )

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(check, files.items()))


def bundles_folder() -> Path:
    """Where bundles live: ``./engines`` inside a checkout, else ``$HST_TRT_HOME/bundles``, else the user's cache."""
    checkout = Path.cwd()
    if (checkout / "engines" / "README.md").is_file() and (checkout / "hst_trt").is_dir():
        return checkout / "engines"
    if home := os.environ.get("HST_TRT_HOME"):
        return Path(home) / "bundles"
    folder = user_cache() / "bundles"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def newest_bundle(folder: Path, fits: Callable[[Manifest], bool]) -> Path | None:
    """The most recently built bundle that `fits`; damaged ones are passed over."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            manifest = _read_manifest(path)
        except (IntegrityError, IncompatibleError, MissingError):
            continue
        if fits(manifest):
            found.append((manifest.created, path.name, path))
    return max(found)[2] if found else None
