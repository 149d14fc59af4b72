"""What a full disk looks like, and where files go that every run may use: said once for everything that writes files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ResourceError

__all__ = ["FULL", "free_bytes", "translated_disk_errors", "user_cache"]

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def translated_disk_errors(
    folder: Path, then: str = "run the same command again; it goes on where it stopped"
) -> Iterator[None]:
    """Turns "no space left", "quota exceeded" and "file too large" into an error that says how much is free, and what to do
    once there is more: `then`."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EFBIG:
            raise ResourceError(
                f"a file under {folder} is larger than its file system or `ulimit -f` allows",
                found=f"{exc.strerror}: {exc.filename2 or exc.filename or 'no file was named'}",
                fix="raise the limit or use a folder on another disk, then run the same command again",
            ) from exc
        if exc.errno not in FULL:
            raise
        raise ResourceError(
            f"the disk that holds {folder} is full",
            found=f"{free_bytes(folder) / 2**20:.0f} MiB free",
            fix=f"free some space and {then}",
        ) from exc


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or would be made."""
    return shutil.disk_usage(next(path for path in [folder, *folder.resolve().parents] if path.exists())).free


def user_cache() -> Path:
    """The user's own cache for this package; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hst_trt"
