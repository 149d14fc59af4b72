"""Writing a bundle: parts grow in a staging folder with a journal, and the whole is put in its place by a rename.

So a reader sees the old bundle or the new one, never a part; and an interrupted build leaves its staging folder, from which
the next one goes on. Only what was measured is written into a bundle later, and only into its manifest.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from ..disk import FULL, translated_disk_errors
from ..errors import IncompatibleError, IntegrityError, RequestError, ResourceError
from .manifest import SCHEMA_VERSION, CalibrationEntry, CostsEntry, FileEntry, Manifest, TargetEntry
from .reading import MANIFEST, Bundle, hash_file, verify_files

__all__ = [
    "Staging",
    "fingerprint",
    "link_or_copy",
    "locked",
    "put_back",
    "put_in_place",
    "recover",
    "save_calibration",
    "save_costs",
]

_LINK_FROM = 256 * 2**20
_FOR_A_BUILD = ("give another folder with --output", "wait for it, or build under another --output")
_FOR_A_MEASUREMENT = (
    "copy the bundle to a folder that can be written, and measure the copy",
    "wait for it, then measure again",
)
"""What to do where a folder cannot be written, and where another writer holds the lock."""


class _FinishedPart(BaseModel, frozen=True, extra="forbid"):
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
        with translated_disk_errors(final.parent), locked(final, *_FOR_A_BUILD):
            put_back(final)
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

    def adopt(self, bundle: Bundle, inputs: Mapping[str, str]) -> None:
        """Takes over the parts of an older bundle that `inputs` would give again."""
        m = bundle.manifest
        for name, part in m.parts.items():
            if part.files and part.inputs == inputs.get(name) and self.part(name, part.inputs) is None:
                for file in part.files:
                    link_or_copy(bundle.path / file, self.path / file)
                graphs = {key: graph.model_dump() for key, graph in m.graphs.items() if graph.path in part.files}
                tokenizers = [entry.model_dump() for entry in m.tokenizers if entry.path in part.files]
                engines = {key: engine.model_dump() for key, engine in m.engines.items() if engine.path in part.files}
                result = {"graphs": graphs, "tokenizers": tokenizers, "engines": engines}
                self.finish(name, part.inputs, [self.path / file for file in part.files], result)

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
        _write_manifest(self.path / MANIFEST, manifest)
        put_in_place(self.path, self.final)
        (self.final / self._journal.name).unlink(missing_ok=True)
        return Bundle(self.final, manifest)


def save_costs(bundle: Bundle, entry: CostsEntry) -> Bundle:
    """Writes measured costs into a bundle's manifest, in the place of those with the same `CostsEntry.key`. See `_amend`."""
    return _amend(bundle, lambda m: {"costs": (*(c for c in m.costs if c.key != entry.key), entry)})


def save_calibration(bundle: Bundle, entry: CalibrationEntry) -> Bundle:
    """Writes a calibration into a bundle's manifest, in the place of the one for the same size. See `_amend`."""
    size = (entry.height, entry.width)
    return _amend(bundle, lambda m: {"calibrations": (*(c for c in m.calibrations if (c.height, c.width) != size), entry)})


def _amend(bundle: Bundle, change: Callable[[Manifest], dict[str, Any]]) -> Bundle:
    """Writes what was measured into a bundle's manifest.

    The manifest is read again under the lock, so what others saved since the bundle was opened stays, and is replaced by a
    rename; nothing else of the bundle is touched.

    Args:
        change: from the manifest to the fields that are new.

    Returns:
        The bundle as it is then.

    Raises:
        RequestError: the bundle's folder or the one around it cannot be written.
        ResourceError: a build of this bundle is running, or the disk is full.
        IncompatibleError: the bundle was built anew since it was opened: what was measured is another build's.
    """
    final, (unwritable, _) = bundle.path, _FOR_A_MEASUREMENT
    with translated_disk_errors(final, "measure again"), locked(final, *_FOR_A_MEASUREMENT):
        put_back(final)
        there = Bundle.open(final, check_hashes=False).manifest
        if there.fingerprint != bundle.manifest.fingerprint:
            raise IncompatibleError(
                f"{final} was built anew while it was measured",
                found=f"fingerprint {there.fingerprint[:16]}, measured was {bundle.manifest.fingerprint[:16]}",
                fix="measure it again",
            )
        manifest = there.model_copy(update=change(there))
        temporary = final / f".{MANIFEST}.part"
        with _refused(final, unwritable):
            try:
                _write_manifest(temporary, manifest)
                shutil.copymode(final / MANIFEST, temporary)
                _sync(temporary)
                temporary.replace(final / MANIFEST)
            finally:
                temporary.unlink(missing_ok=True)
        _sync(final)
    return Bundle(final, manifest)


@contextmanager
def locked(final: Path, unwritable: str, busy: str) -> Iterator[None]:
    """Holds the lock of a folder that is to be written.

    Args:
        unwritable, busy: what to do where the folder around it cannot be written, and where another process holds the lock.

    Raises:
        RequestError: the folder around it cannot be written; ResourceError: another process writes it.
    """
    with _refused(final.parent, unwritable):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = (final.parent / f".{final.name}.lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ResourceError(f"another build of {final} is running", fix=busy) from exc
        yield


@contextmanager
def _refused(folder: Path, fix: str) -> Iterator[None]:
    """Turns what a folder that cannot be written says into an error; a full disk is not meant."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (*FULL, errno.EFBIG):
            raise
        raise RequestError(f"the folder {folder} cannot be written", found=exc.strerror, fix=fix) from exc


def _write_manifest(path: Path, manifest: Manifest) -> None:
    path.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def put_in_place(staged: Path, final: Path) -> None:
    """Syncs a finished folder to disk and puts it at `final` by a rename; what was there is removed then.

    Hold the lock (`locked`). After a crash between the two renames `put_back` brings back what was there.
    """
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    old = _old(final)
    if final.exists():
        final.rename(old)
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(final: Path) -> None:
    """Puts a bundle back that a crash in the middle of a commit left beside its place; call it before looking for one.

    Raises:
        ResourceError: a build of this bundle is running.
    """
    if _old(final).exists():
        with Staging.open(final):
            pass


def put_back(final: Path) -> None:
    """After a crash between the two renames of `put_in_place`, what was there is still beside its place."""
    old = _old(final)
    if old.exists():
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _old(final: Path) -> Path:
    return final.parent / f".{final.name}.old"


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

    A hard link shares its bytes with the model it was built from, so what damages one damages both (and the hashes will
    say so); that is worth it for gigabytes only, and smaller files are copied.
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
