"""The jobs of a run: a process each, with a time limit, whatever becomes of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .device import PACKAGES
from .journal import Findings, read_journal
from .settings import ROOT

__all__ = [
    "DEVICE",
    "JOBS",
    "PARTS",
    "REHEARSAL",
    "WHOLE",
    "Job",
    "Outcome",
    "limit_of_first",
    "missing_packages",
    "outcome_of",
    "run_job",
]

WHOLE = "runs to its end"
"""The check that a child puts around all of a job."""

_GRACE = 5.0  # seconds between being told to stop and being killed
_LOG_LINES = 12


@dataclass(frozen=True)
class Job:
    """One part, or what one backend has of it.

    Attributes:
        name: "PART.BACKEND".
        target: the function that a child runs, "module:function".
        share: of the time, beside the other jobs' shares.
        needs: modules without which it is skipped.
    """

    name: str
    target: str
    share: float
    needs: tuple[str, ...] = ()

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]


_RUN = ("numpy", "pydantic", "PIL", "tokenizers", "onnxruntime", "onnx", "ml_dtypes")
_TORCH = (*_RUN, "torch", "diffusers")
_EXPORT = (*_TORCH, "transformers", "safetensors")
_TRT, _RTX = ("cuda.bindings", "tensorrt"), ("cuda.bindings", "tensorrt_rtx")

DEVICE = Job("device", "acceptance.device:look", 1)
JOBS = (
    Job("engines.torch", "acceptance.engines:torch_parity", 2, _TORCH),
    Job("engines.tensorrt", "acceptance.engines:tensorrt", 7, _EXPORT + _TRT),
    Job("engines.tensorrt-rtx", "acceptance.engines:tensorrt_rtx", 4, _EXPORT + _RTX),
    Job("engines.tests", "acceptance.engines:gpu_tests", 3, ("pytest",)),
    Job("graphs.torch", "acceptance.replays:prove_on_torch", 1.5, _TORCH),
    Job("graphs.tensorrt", "acceptance.replays:tensorrt", 2, _EXPORT + _TRT),
    Job("graphs.tensorrt-rtx", "acceptance.replays:tensorrt_rtx", 2, _EXPORT + _RTX),
    Job("shapes.torch", "acceptance.shapes:measure_torch", 9, _TORCH),
    Job("shapes.tensorrt", "acceptance.shapes:tensorrt", 12, _EXPORT + _TRT),
    Job("shapes.tensorrt-rtx", "acceptance.shapes:tensorrt_rtx", 9, _EXPORT + _RTX),
)
REHEARSAL = (
    Job("engines.torch", "acceptance.engines:torch_parity", 1, _TORCH),
    Job("engines.onnxruntime", "acceptance.engines:onnxruntime", 1, _EXPORT),
    Job("engines.tests", "acceptance.engines:gpu_tests", 1, ("pytest",)),
    Job("graphs.torch", "acceptance.replays:prove_on_torch", 1, _TORCH),
    Job("graphs.onnxruntime", "acceptance.replays:onnxruntime", 1, _EXPORT),
    Job("shapes.torch", "acceptance.shapes:measure_torch", 1, _TORCH),
    Job("shapes.onnxruntime", "acceptance.shapes:onnxruntime", 1, _EXPORT),
)
PARTS = ("device", "engines", "graphs", "shapes", "report")


@dataclass(frozen=True)
class Outcome:
    """How a job ended: ok, failed, skipped, timed out, or died; why, and after how many seconds of how many."""

    status: str
    reason: str
    exit_code: int
    seconds: float
    limit: float


def limit_of_first(jobs: Sequence[Job], seconds: float) -> float:
    """The time limit of the first of `jobs`, if all of them are to be done in `seconds`."""
    return max(20.0, seconds * jobs[0].share / sum(job.share for job in jobs))


def missing_packages(job: Job, packages: Mapping[str, str | None]) -> str:
    """What a job needs and is not installed, as a sentence; empty if all of it is.

    Args:
        packages: the version by module, None for those that are not installed.
    """
    missing = [module for module in job.needs if packages.get(module) is None]
    return f"needs {', '.join(missing)}: pip install {' '.join(PACKAGES[module] for module in missing)}" if missing else ""


def run_job(
    job: Job,
    journal: Path,
    work: Path,
    limit: float,
    *,
    rehearse: bool = False,
    path: Sequence[Path] = (),
    on_progress: Callable[[Findings], None] = lambda findings: None,
) -> tuple[Outcome, Findings]:
    """Runs a job in a process of its own and stops it, with all it has started, when its time is up.

    Args:
        journal: where it writes what it finds.
        work: a folder that the jobs of a run share.
        path: more folders to find the job's module in.
        on_progress: called about once a second while the journal grows.
    """
    folders = [str(folder) for folder in (Path(__file__).parents[1], ROOT, *path)]
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(folders + inherited),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",  # nothing here needs the network, and nothing shall wait for it
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    start, size = time.monotonic(), -1  # the same clock for all processes
    command = [sys.executable, "-m", "acceptance.child", job.target, str(journal), str(work), str(start + limit)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(
            [*command, *(["rehearse"] if rehearse else [])],
            stdin=subprocess.PIPE,  # never written to: it tells the child when we have gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while child.poll() is None and time.monotonic() - start < limit:
                time.sleep(min(1.0, 0.05 + (time.monotonic() - start) / 10))
                if journal.is_file() and journal.stat().st_size != size:
                    size = journal.stat().st_size
                    on_progress(read_journal(journal))
            timed_out = child.poll() is None
        finally:
            _stop(child)
        findings, seconds = read_journal(journal), round(time.monotonic() - start, 1)
        log.seek(0)
        said = "\n".join(log.read().splitlines()[-_LOG_LINES:])
    return outcome_of(findings, child.returncode, timed_out, said, seconds, limit), findings


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends the child's process group: first the polite way, so that nothing is left on the GPU."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            os.killpg(child.pid, how)
            try:
                child.wait(_GRACE)
            except subprocess.TimeoutExpired:
                continue


def outcome_of(findings: Findings, returncode: int, timed_out: bool, said: str, seconds: float, limit: float) -> Outcome:
    """How a job ended, from what it has written and how its process ended.

    Args:
        timed_out: whether it was stopped.
        said: the end of what it printed.
    """
    running = [name for name, check in findings.checks.items() if check.state == "running" and name != WHOLE]
    during = f" during: {running[-1]}" if running else ""
    if timed_out:
        return Outcome("timed out", f"stopped after {limit:.0f} s{during}", 1, seconds, limit)
    if not findings.ended:
        how = f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"exit status {returncode}"
        return Outcome("died", f"ended with {how}{during}; its last words: {said or 'none'}", 1, seconds, limit)
    failed = {name: check for name, check in findings.checks.items() if check.state == "failed"}
    if failed:
        name, check = next(iter(failed.items()))
        where = "" if name == WHOLE else f"{name}: "
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return Outcome("failed", f"{where}{check.reason}{more}", check.exit_code, seconds, limit)
    checks = [check for name, check in findings.checks.items() if name != WHOLE or check.state == "skipped"]
    if checks and all(check.state == "skipped" for check in checks):
        return Outcome("skipped", checks[0].reason, 0, seconds, limit)
    return Outcome("ok", "", 0, seconds, limit)
