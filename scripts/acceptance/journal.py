"""What a part of the acceptance run has found out, one line a finding, on disk before the next is looked for.

A part may be killed at any moment, by its time limit or with the whole machine; all that it had measured is then in its
journal, and the report is made from journals alone.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hst_trt.errors import HstError

__all__ = ["Check", "Findings", "Journal", "Skip", "read_journal"]


class Skip(Exception):
    """A check cannot be made here; its text says why."""


class Journal:
    """Writes findings.

    Args:
        path: the file; lines are added to it.
        deadline: when the part will be stopped, in seconds of `time.monotonic`.
    """

    def __init__(self, path: Path, deadline: float) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._deadline = deadline

    @property
    def remaining(self) -> float:
        """Seconds until the part will be stopped."""
        return self._deadline - time.monotonic()

    def fact(self, name: str, value: Any) -> None:
        """One finding; a later one of the same name replaces it."""
        self._write({"fact": name, "value": value})

    def sample(self, series: str, name: str, value: float) -> None:
        """One measurement of `name` in the next round of `series`."""
        self._write({"series": series, "name": name, "value": value})

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """A check, whose failure ends it and nothing else. What it raises is recorded, `Skip` as skipped."""
        start = time.monotonic()

        def end(state: str, reason: str = "", exit_code: int = 0) -> None:
            seconds = round(time.monotonic() - start, 3)
            self._write({"check": name, "state": state, "reason": reason, "exit_code": exit_code, "seconds": seconds})

        self._write({"check": name, "state": "running", "reason": "", "exit_code": 0, "seconds": 0.0})
        try:
            yield
        except Skip as exc:
            end("skipped", str(exc))
        except HstError as exc:
            end("failed", str(exc), exc.exit_code)
        except Exception as exc:
            where = traceback.extract_tb(exc.__traceback__)[-1]
            end("failed", f"{type(exc).__name__}: {exc} ({Path(where.filename).name}:{where.lineno})", 1)
        else:
            end("ok")

    def end(self) -> None:
        """The part has come to its end by itself."""
        self._write({"end": True})
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass
class Check:
    state: str  # running, ok, failed, skipped
    reason: str
    exit_code: int
    seconds: float


@dataclass
class Findings:
    """What a journal holds. `series`: values by series and name, in the order of the rounds."""

    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    series: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ended: bool = False


def read_journal(path: Path) -> Findings:
    """Reads a journal, whose last line may be cut short; a missing one is empty."""
    found = Findings()
    series: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            match json.loads(line):
                case {"fact": name, "value": value}:
                    found.facts[name] = value
                case {"series": which, "name": name, "value": value}:
                    series[which][name].append(value)
                case {"check": name, **rest}:
                    found.checks[name] = Check(**rest)
                case {"end": True}:
                    found.ended = True
        except ValueError:
            break
    found.series = {which: dict(rows) for which, rows in series.items()}
    return found
