"""Opening a bundle: schema, containment of every path and every file's hash are checked before anything is loaded."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from ..disk import user_cache
from ..errors import IncompatibleError, IntegrityError, MissingError
from ..schedule import FlowMatchEuler
from ..spec import PairSpec, TransformerSpec
from ..tensor_names import LARGE, SMALL, TEXT_ENCODERS, VAE_DECODER
from . import strict_json
from .manifest import SCHEMA_VERSION, FileEntry, Manifest

__all__ = ["MANIFEST", "SUFFIX", "Bundle", "bundles_folder", "hash_file", "newest_bundle", "verify_files"]

SUFFIX = ".hstb"
MANIFEST = "manifest.json"
_CHUNK = 4 * 2**20
_BUILD_AGAIN = "run `hst-trt build --force` again"


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
        _check_contained(folder, manifest.files)
        _check_references(folder, manifest)
        bundle = cls(folder, manifest)
        try:
            _ = bundle.spec
        except (KeyError, ValueError) as exc:
            found = f"{type(exc).__name__}: {exc}"
            raise IntegrityError(f"{folder} does not describe its models", found=found, fix=_BUILD_AGAIN) from exc
        if check_hashes:
            verify_files(folder, manifest.files, progress)
            _ = bundle.scheduler
        return bundle

    def read(self, name: str) -> bytes:
        """A listed file, of which the very bytes that are returned were compared with the manifest.

        Raises:
            IntegrityError: it is missing, or not the file that was built.
        """
        try:
            content = _read(self.path / name)
        except OSError as exc:
            raise _unreadable(self.path, name, exc) from exc
        _compare(self.path, name, self.manifest.files[name], len(content), hashlib.sha256(content).hexdigest())
        return content

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

    @cached_property
    def scheduler(self) -> FlowMatchEuler:
        """The scheduler's settings, read when they are first asked for.

        Raises:
            IntegrityError: the file is damaged.
            IncompatibleError: another scheduler, or a setting that the loop cannot run.
        """
        content = self.read(self.manifest.scheduler)
        try:
            return FlowMatchEuler.from_config(strict_json.parse(content))
        except ValueError as exc:
            raise IntegrityError(f"{self.path} does not describe its scheduler", found=str(exc), fix=_BUILD_AGAIN) from exc

    def graph_paths(self) -> dict[str, Path]:
        return {name: self.path / graph.path for name, graph in self.manifest.graphs.items()}


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    if not folder.is_dir():
        raise MissingError(f"there is no bundle at {folder}", fix="run `hst-trt build` to make one")
    try:
        content = _read(file)
        table = strict_json.parse(content)
    except FileNotFoundError:
        raise IntegrityError(
            f"{folder} is not a complete bundle: it has no {MANIFEST}",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
            fix="give the folder of a bundle, or run `hst-trt build` to make one",
        ) from None
    except (OSError, ValueError) as exc:
        raise IntegrityError(f"{file} cannot be read", found=str(exc), fix="run `hst-trt build` again") from exc
    version = table.get("schema_version") if isinstance(table, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:  # before the fields, which are those of that version
        raise IncompatibleError(
            f"{folder} was written by a newer hst_trt",
            found=f"bundle schema {version}, this version reads up to {SCHEMA_VERSION}",
            fix="upgrade hst_trt, or build the bundle again with this version",
        )
    try:
        return Manifest.model_validate_json(content, strict=True)  # of JSON: its arrays become our tuples
    except ValidationError as exc:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()[:4])
        raise IntegrityError(f"{file} is not a valid manifest", found=problems, fix="run `hst-trt build` again") from exc


def _check_contained(folder: Path, names: Iterable[str]) -> None:
    home = folder.resolve()
    for name in names:
        if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise IntegrityError(f"{folder} names a path outside itself", found=name, fix="do not use this bundle")
        try:
            inside = (home / name).resolve().is_relative_to(home)
        except (OSError, RuntimeError):  # links in a circle
            inside = False
        if not inside:
            raise IntegrityError(f"{folder}: {name} is a link that leads outside the bundle", fix="do not use this bundle")


def _check_references(folder: Path, manifest: Manifest) -> None:
    named = {manifest.scheduler, *(t.path for t in manifest.tokenizers)}
    for graph in manifest.graphs.values():
        named |= {graph.path, *graph.weights}
    named |= {engine.path for engine in manifest.engines.values()}
    unlisted = sorted(named - manifest.files.keys())
    if unlisted:
        raise IntegrityError(
            f"{folder} uses files that its manifest does not list", found=", ".join(unlisted[:4]), fix=_BUILD_AGAIN
        )
    needed = {LARGE, SMALL, VAE_DECODER, *TEXT_ENCODERS[: len(manifest.tokenizers)]}
    if missing := sorted(needed - manifest.graphs.keys()):
        raise IntegrityError(f"{folder} lacks graphs of its models", found=", ".join(missing), fix=_BUILD_AGAIN)


def _read(path: Path) -> bytes:
    """A whole file; only a plain one, since opening a pipe would wait for its writer."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    return path.read_bytes()


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
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a plain file")
            digest = hash_file(path, advance) if status.st_size == entry.bytes else ""
        except OSError as exc:
            raise _unreadable(folder, name, exc) from exc
        _compare(folder, name, entry, status.st_size, digest)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(check, files.items()))


def _unreadable(folder: Path, name: str, exc: OSError) -> IntegrityError:
    return IntegrityError(f"{folder}: {name} is missing or cannot be read", found=exc.strerror, fix=_BUILD_AGAIN)


def _compare(folder: Path, name: str, entry: FileEntry, size: int, digest: str) -> None:
    """Refuses a file that is not the one of the manifest."""
    if (size, digest) != (entry.bytes, entry.sha256):
        found = f"{size} bytes instead of {entry.bytes}" if size != entry.bytes else f"sha256 {digest}"
        raise IntegrityError(f"{folder}: {name} is not the file that was built", found=found, fix=_BUILD_AGAIN)


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
