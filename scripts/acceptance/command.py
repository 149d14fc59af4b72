"""The run as a whole: the device first, then the jobs of the chosen parts, one after another."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from .jobs import DEVICE, JOBS, REHEARSAL, Job, Outcome, limit_of_first, missing_packages, run_job
from .journal import Findings, read_journal
from .report import Report

__all__ = ["accept"]


def accept(
    parts: Sequence[str],
    seconds: float,
    output: Path,
    work: Path | None = None,
    *,
    rehearse: bool = False,
    jobs: Sequence[Job] | None = None,
    path: Sequence[Path] = (),
) -> int:
    """Runs the chosen parts and writes the report.

    Args:
        parts: some of `acceptance.jobs.PARTS`; the device is looked at in any case.
        seconds: for all of them together.
        output: folder of the report.
        work: folder for bundles and weights, which is kept; a temporary one if left out.
        jobs: what to run instead of the parts' own jobs.
        path: more folders to find the jobs' modules in.

    Returns:
        The exit code.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_acceptance.")))
        work.mkdir(parents=True, exist_ok=True)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_acceptance.")))
        outcome, device = run_job(DEVICE, place / "device.jsonl", work, 120.0, rehearse=rehearse)
        gpus = device.facts.get("gpus") or []
        if not gpus and not rehearse:
            _say(f"gpu_acceptance: {outcome.reason}")
            return outcome.exit_code or 1
        report = Report(output, "cpu" if rehearse else gpus[0]["name"], rehearsal=rehearse, places=(work, place))
        commit = (device.facts.get("hst_trt") or {}).get("commit", "unknown")
        _take_up(report, commit)
        report.put("device", outcome, device, commit)
        code = outcome.exit_code
        waiting = [job for job in jobs or (REHEARSAL if rehearse else JOBS) if jobs is not None or job.part in parts]
        packages = device.facts.get("packages") or {}
        for job in [*waiting]:
            if missing := missing_packages(job, packages):
                report.put(job.name, Outcome("skipped", missing, 0, 0.0, 0.0), Findings(), commit)
                _say(f"{job.name}: skipped, {missing}")
                waiting.remove(job)
        while waiting:
            limit = limit_of_first(waiting, seconds - (time.monotonic() - start))
            job = waiting.pop(0)
            try:
                outcome = _run(job, report, work, limit, commit, rehearse, path)
            except KeyboardInterrupt:
                _take_up(report, commit)
                _say(f"interrupted; what there is is in {report.markdown}")
                return 130
            code = code or outcome.exit_code
        report.write()
        _say(f"{report.markdown}\n{report.json}")
        return code


def _run(job: Job, report: Report, work: Path, limit: float, commit: str, rehearse: bool, path: Sequence[Path]) -> Outcome:
    _say(f"{job.name}: at most {limit:.0f} s")
    journal, start = report.journal(job.name), time.monotonic()

    def on_progress(findings: Findings) -> None:
        report.put(job.name, Outcome("running", "", 0, round(time.monotonic() - start, 1), limit), findings, commit)

    outcome, findings = run_job(job, journal, work, limit, rehearse=rehearse, path=path, on_progress=on_progress)
    report.put(job.name, outcome, findings, commit)
    journal.unlink(missing_ok=True)
    for name, check in findings.checks.items():
        if check.state in ("failed", "skipped"):
            _say(f"  {check.state}: {name}: {check.reason}")
    why = "" if outcome.status in ("ok", "failed", "skipped") else f": {outcome.reason}"  # of those the checks have said it
    _say(f"{job.name}: {outcome.status} after {outcome.seconds:.0f} s{why}")
    return outcome


def _take_up(report: Report, commit: str) -> None:
    """What a run that was killed had found out."""
    for job, path in report.journals():
        reason = "the run was killed; this is what it had found out"
        report.put(job, Outcome("died", reason, 1, 0.0, 0.0), read_journal(path), commit)
        path.unlink()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
