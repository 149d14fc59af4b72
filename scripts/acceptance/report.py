"""Part 5: one JSON file that holds every measurement, and the page of tables made from it."""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .aims import REFERENCES, judge
from .jobs import DEVICE, JOBS, PARTS, REHEARSAL, WHOLE, Outcome
from .journal import Findings
from .page import markdown
from .settings import ROOT

__all__ = ["Report", "file_stem"]

SCHEMA = "hst_trt.gpu_acceptance/1"


def file_stem(device: str, date: datetime.date) -> str:
    """The name of a report's files without their suffix: gpu_DEVICE_DATE."""
    return f"gpu_{re.sub(r'[^a-z0-9]+', '-', device.lower().removeprefix('nvidia ')).strip('-')}_{date.isoformat()}"


class Report:
    """The results of a run, on disk after every change. Those of jobs that ran earlier on the same day are kept.

    Args:
        folder: where the two files are.
        device: the GPU's name; "cpu" in a rehearsal.
        rehearsal: whether it says nothing of a GPU.
        places: folders whose names shall not be published.
    """

    def __init__(
        self, folder: Path, device: str, *, rehearsal: bool, places: Sequence[Path] = (), date: datetime.date | None = None
    ) -> None:
        date = date or datetime.date.today()
        folder.mkdir(parents=True, exist_ok=True)
        self.stem = folder / file_stem(f"rehearsal {device}" if rehearsal else device, date)
        self._places = (*places, ROOT, Path(sys.prefix), Path.home())
        self._content: dict[str, Any] = {"schema": SCHEMA, "date": date.isoformat(), "rehearsal": rehearsal, "device": device}
        self._jobs: dict[str, dict[str, Any]] = {}
        if self.json.is_file():
            self._jobs = json.loads(self.json.read_text(encoding="utf-8"))["jobs"]

    @property
    def json(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.json")

    @property
    def markdown(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.md")

    def journal(self, job: str) -> Path:
        """Where a job writes while it runs; if it is still there later, the run was killed."""
        return self.stem.with_name(f"{self.stem.name}.{job}.jsonl")

    def journals(self) -> Iterator[tuple[str, Path]]:
        """What a killed run has left, by job."""
        for path in sorted(self.stem.parent.glob(f"{self.stem.name}.*.jsonl")):
            yield path.name.removeprefix(f"{self.stem.name}.").removesuffix(".jsonl"), path

    def put(self, job: str, outcome: Outcome, findings: Findings, commit: str) -> None:
        """Sets the result of a job and writes both files."""
        self._jobs[job] = {
            "status": outcome.status,
            "reason": outcome.reason,
            "seconds": outcome.seconds,
            "limit_seconds": round(outcome.limit, 1),
            "commit": commit,
            "checks": {name: asdict(check) for name, check in findings.checks.items() if name != WHOLE},
            "facts": findings.facts,
            "series": findings.series,
        }
        self.write()

    def write(self) -> None:
        content = self.content()
        text = json.dumps(content, indent=1)
        for name, value in ((self.json, text + "\n"), (self.markdown, "\n".join(markdown(content)) + "\n")):
            part = name.with_name(f".{name.name}.part")
            part.write_text(self._published(value), encoding="utf-8")
            part.replace(name)

    def content(self) -> dict[str, Any]:
        """All of it, jobs in the order of the parts."""
        jobs = dict(sorted(self._jobs.items(), key=lambda item: _order(item[0])))
        aims = [verdict.to_dict() for verdict in judge(jobs, self._content["device"], rehearsal=self._content["rehearsal"])]
        references = [{"system": system, "figure": figure} for system, figure in REFERENCES]
        return self._content | {"aims": aims, "published": references, "jobs": jobs}

    def _published(self, text: str) -> str:
        for place in self._places:
            text = text.replace(str(place), "...")
        return text


def _order(job: str) -> tuple[int, int]:
    part, names = job.partition(".")[0], [known.name for known in (DEVICE, *JOBS, *REHEARSAL)]
    return (
        PARTS.index(part) if part in PARTS else len(PARTS),
        names.index(job) if job in names else len(names),
    )
