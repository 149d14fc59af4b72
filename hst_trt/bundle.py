"""Bundles: what was built, as one folder ``NAME.hstb`` (the format is specified in ``engines/README.md``).

A bundle is written into a staging folder beside its final place and renamed when it is complete, so a reader sees the old
bundle or the new one, never a part. An interrupted build leaves its staging folder, and the next one goes on from there.
Opening checks the schema, that every path stays inside, and every file's hash, before anything is loaded.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import IncompatibleError, IntegrityError, MissingError, RequestError, ResourceError
from .recipe import Defaults, Limits
from .schedule import FlowMatchEuler
from .spec import PairSpec, TransformerSpec

__all__ = [
    "SCHEMA_VERSION",
    "Bundle",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "ModelEntry",
    "Staging",
    "TargetEntry",
    "TensorEntry",
    "TokenizerEntry",
    "bundles_folder",
    "hash_file",
    "newest_bundle",
    "recover",
]

SCHEMA_VERSION = 1
SUFFIX = ".hstb"
MANIFEST = "manifest.json"
_CHUNK = 4 * 2**20
_LINK_FROM = 256 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(_Entry):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class TensorEntry(_Entry):
    """Symbolic axes are names, static ones numbers."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphEntry(_Entry):
    path: str
    weights: tuple[str, ...] = ()  # files it refers to
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    worst_error: float | None = None  # graph against torch at export: relative, or for the VAE in 1/255 of a pixel


class ModelEntry(_Entry):
    source: str
    revision: str | None
    component: str
    config: dict[str, Any]


class TokenizerEntry(_Entry):
    path: str
    length: int = Field(gt=0)
    pad_id: int = Field(ge=0)


class TargetEntry(_Entry):
    name: str
    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    backend_version: str
    precision: Literal["float32", "float16", "bfloat16"]
    os: str
    arch: str


class Manifest(_Entry):
    """``manifest.json``."""

    schema_version: int = Field(strict=True, ge=1)
    name: str
    created_by: str
    created: str  # ISO 8601, UTC
    state: Literal["graphs", "complete"]
    target: TargetEntry
    recipe: str
    models: dict[str, ModelEntry]
    vae_scale: int = Field(gt=0)
    t5_length: int = Field(ge=0)
    tokenizers: tuple[TokenizerEntry, ...] = Field(min_length=1)
    scheduler: str
    graphs: dict[str, GraphEntry]
    defaults: Defaults
    limits: Limits
    bucket_ratios: tuple[float, ...]
    files: dict[str, FileEntry]
    inputs: dict[str, str]  # for each part, a hash of what it was made from: equal inputs need no new build
    fingerprint: str  # over everything that decides the content: hashes of all files, and the target


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
            _ = bundle.spec
        except (KeyError, TypeError) as exc:
            raise IntegrityError(
                f"{folder} does not describe its models", found=f"no {exc}", fix="run `hst-trt build --force` again"
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


# -- writing ----------------------------------------------------------------------------------------------------------
class _FinishedPart(_Entry):
    """What the journal says of a part."""

    inputs: str
    files: dict[str, FileEntry]
    result: dict[str, Any]


_JOURNAL = TypeAdapter(dict[str, _FinishedPart])


class Staging:
    """The folder in which a bundle grows, with a journal of the parts that are finished.

    Use `Staging.open` as a context manager: it holds the bundle's lock. Leaving it without `commit` keeps what is there
    for the next build.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.parent / f".{final.name}.building"
        self._journal = self.path / "journal.json"
        self._parts: dict[str, _FinishedPart] = {}

    @classmethod
    @contextmanager
    def open(cls, final: Path) -> Iterator[Staging]:
        """Locks the bundle and opens its staging folder, resuming an earlier one.

        Raises:
            RequestError: the folder cannot be written.
            ResourceError: another build of this bundle is running, or the disk is full.
        """
        staging = cls(final)
        with translated_disk_errors(final.parent), _locked(final):
            _recover(final)
            staging.path.mkdir(exist_ok=True)
            staging._load()
            yield staging

    def _load(self) -> None:
        try:
            self._parts = _JOURNAL.validate_json(self._journal.read_bytes())
        except (OSError, ValueError):
            self._parts = {}

    def clear(self) -> None:
        """Forgets what an earlier build left."""
        shutil.rmtree(self.path)
        self.path.mkdir()
        self._parts = {}

    def part(self, name: str, inputs: Any) -> dict[str, Any] | None:
        """What a finished part left in the journal, if it was made from the same `inputs` and its files are still whole."""
        entry = self._parts.get(name)
        if entry is None or entry.inputs != _canonical(inputs):
            return None
        try:  # hashed, not only measured: after a power cut a file can have its length but not its bytes
            verify_files(self.path, entry.files)
        except IntegrityError:
            return None
        return entry.result

    def finish(self, name: str, inputs: Any, files: Iterable[Path], result: dict[str, Any]) -> None:
        """Records a part as finished: its files are hashed now, and not made again by a build that resumes."""
        entries = {
            file.relative_to(self.path).as_posix(): FileEntry(sha256=hash_file(file), bytes=file.stat().st_size)
            for file in files
        }
        self._parts[name] = _FinishedPart(inputs=_canonical(inputs), files=entries, result=result)
        temporary = self._journal.with_suffix(".tmp")
        temporary.write_bytes(_JOURNAL.dump_json(self._parts))
        temporary.replace(self._journal)

    def files(self, parts: Iterable[str]) -> dict[str, FileEntry]:
        """The files of the named parts, with hashes."""
        entries = {file: entry for part in parts for file, entry in self._parts[part].files.items()}
        return dict(sorted(entries.items()))

    def commit(self, manifest: Manifest) -> Bundle:
        """Writes the manifest, syncs everything to disk and puts the folder in its place."""
        kept = {MANIFEST, self._journal.name, *manifest.files}  # the journal until the end: a commit too can be interrupted
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.path).as_posix() not in kept:
                path.unlink()
        (self.path / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        for path in [*self.path.rglob("*"), self.path]:
            _sync(path)
        old = self.final.parent / f".{self.final.name}.old"
        if self.final.exists():
            self.final.rename(old)
        self.path.rename(self.final)
        (self.final / self._journal.name).unlink(missing_ok=True)
        _sync(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)
        return Bundle(self.final, manifest)


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = (final.parent / f".{final.name}.lock").open("w")
    except OSError as exc:
        if exc.errno in _FULL:
            raise
        raise RequestError(
            f"the folder {final.parent} cannot be written", found=exc.strerror, fix="give another folder with --output"
        ) from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ResourceError(
                f"another build of {final} is running", fix="wait for it, or build under another --output"
            ) from exc
        yield


def recover(final: Path) -> None:
    """Puts a bundle back that a crash in the middle of a commit left beside its place; call it before looking for one.

    Raises:
        ResourceError: a build of this bundle is running.
    """
    if (final.parent / f".{final.name}.old").exists():
        with Staging.open(final):
            pass


def _recover(final: Path) -> None:
    """After a crash between the two renames of `commit`, the old bundle is still beside its place."""
    old = final.parent / f".{final.name}.old"
    if old.exists():
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def fingerprint(files: dict[str, FileEntry], target: TargetEntry) -> str:
    """A hash over all that decides what a bundle computes."""
    content = {name: entry.sha256 for name, entry in files.items()}
    return hashlib.sha256(_canonical([SCHEMA_VERSION, content, target.model_dump()]).encode()).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Puts a file into a bundle, without a second copy of its bytes if it is large and the file system allows that.

    Small files are always copied: a hard link would let damage to the bundle reach the model it was built from.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    source = source.resolve()  # the hub's cache holds links; a link to a link would dangle in the bundle
    if source.stat().st_size >= _LINK_FROM:
        try:
            os.link(source, target)
            return
        except OSError as exc:
            if exc.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                raise
    temporary = target.with_name(target.name + ".part")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


@contextmanager
def translated_disk_errors(folder: Path) -> Iterator[None]:
    """Turns "no space left", "quota exceeded" and "file too large" into an error that says how much is free."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EFBIG:
            raise ResourceError(
                f"a file under {folder} is larger than its file system or `ulimit -f` allows",
                found=f"{exc.strerror}: {exc.filename2 or exc.filename or 'no file was named'}",
                fix="raise the limit or use a folder on another disk, then run the same command again",
            ) from exc
        if exc.errno not in _FULL:
            raise
        raise ResourceError(
            f"the disk that holds {folder} is full",
            found=f"{free_bytes(folder) / 2**20:.0f} MiB free",
            fix="free some space and run the same command again; it goes on where it stopped",
        ) from exc


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or would be made."""
    return shutil.disk_usage(next(path for path in [folder, *folder.resolve().parents] if path.exists())).free


# -- finding ----------------------------------------------------------------------------------------------------------
def bundles_folder() -> Path:
    """Where bundles live: ``./engines`` inside a checkout, else ``$HST_TRT_HOME/bundles``, else the user's cache."""
    checkout = Path.cwd()
    if (checkout / "engines" / "README.md").is_file() and (checkout / "hst_trt").is_dir():
        return checkout / "engines"
    if home := os.environ.get("HST_TRT_HOME"):
        return Path(home) / "bundles"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hst_trt" / "bundles"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def newest_bundle(folder: Path, backends: Iterable[str]) -> Path | None:
    """The most recently built complete bundle for one of `backends`; damaged ones are passed over."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            manifest = _read_manifest(path)
        except (IntegrityError, IncompatibleError, MissingError):
            continue
        if manifest.state == "complete" and manifest.target.backend in set(backends):
            found.append((manifest.created, path.name, path))
    return max(found)[2] if found else None
