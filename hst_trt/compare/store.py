"""What expensive parts leave behind, in folders that are named by a hash of what they were made from.

So an evaluation that was stopped finds what it had, and one of other weights or of a changed recipe finds nothing: there is
no state to get wrong but whole files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

_Arrays = dict[str, np.ndarray]


def digest(*parts: Path | str) -> str:
    """12 hex digits over texts and the contents of files."""
    whole = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()[:12]


def write_bytes(path: Path, content: bytes) -> None:
    """As a whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, default: Any = None) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def write_arrays(path: Path, arrays: _Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)


def read_arrays(paths: Iterable[Path], axis: int = 0) -> _Arrays:
    """The arrays of several files, joined along `axis`."""
    files = [dict(np.load(path)) for path in paths]
    return {name: np.concatenate([file[name] for file in files], axis) for name in files[0]}
