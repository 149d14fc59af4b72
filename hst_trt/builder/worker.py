"""Builds an engine in a process of its own: memory comes back whole, and a build that is killed does not take us with it.

The child (``python -m hst_trt.builder.worker FD``) reads its job from stdin as one line of JSON and writes events to the pipe
FD, one JSON object a line: ``step``, and at the end ``built``, ``failed``, ``unwritable`` or ``cancelled``. What it prints goes
to a log. Its stdin stays open as a lifeline: when that closes, because we were interrupted or are gone, the child cancels its
build at TensorRT's next step.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import BuildError, HstError, ResourceError
from .engine import BuiltEngine, Cancelled, EngineJob, build_engine
from .estimate import host_memory

__all__ = ["OnProgress", "build_in_child"]

OnProgress = Callable[[str, float], None]  # what TensorRT does, and the share that is done; called at least once a second

_GRACE = 10.0  # seconds that a cancelled build may take to its next step before it is killed
_EVENTS_A_SECOND = 10


# -- the parent --------------------------------------------------------------------------------------------------------------
def build_in_child(job: EngineJob, log: Path, asked: int, on_progress: OnProgress) -> BuiltEngine:
    """Builds an engine and waits for it.

    Args:
        job: what to build.
        log: what TensorRT prints is kept here.
        asked: bytes of host memory that the build is estimated to need, for the message if it is killed.

    Raises:
        BuildError: TensorRT failed; its own error lines are in the message.
        ResourceError: the child was killed, or TensorRT says that it is out of memory.
        OSError: the engine cannot be written, because the disk is full.
        KeyboardInterrupt: the build was cancelled with Ctrl-C, and the child is gone.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    free = host_memory().free
    reading, writing = os.pipe()
    command = [sys.executable, "-P", "-m", __name__, str(writing)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": job.gpu} if job.gpu is not None else {})
    with (
        os.fdopen(reading, "rb", buffering=0) as events,
        log.open("wb") as output,
        subprocess.Popen(
            command,
            bufsize=0,  # what a child that died at once did not read is not written again when its stdin is closed
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for us alone: we tell the child
        ) as child,
    ):
        os.close(writing)
        assert child.stdin is not None
        try:
            with suppress(BrokenPipeError):  # a child that died at once is reported below
                child.stdin.write(job.model_dump_json().encode() + b"\n")
            end = _follow(events.fileno(), on_progress)
        except BaseException:
            _cancel(child)
            raise
        child.wait()
    if end is None:
        raise _died(job, child.returncode, log, asked, free)
    return _result(end, log)


def _follow(events: int, on_progress: OnProgress) -> dict[str, Any] | None:
    """Passes the child's steps on, and returns its last event; None if it ended without one."""
    end, rest, phase, done = None, b"", "starting", 0.0
    while True:
        if select.select([events], [], [], 1.0)[0]:
            content = os.read(events, 65536)
            if not content:
                return end
            *lines, rest = (rest + content).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["event"] == "step":
                    phase, done = event["phase"], event["done"]
                else:
                    end = event
        on_progress(phase, done)


def _cancel(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    try:
        child.stdin.close()
        child.wait(_GRACE)
    except (OSError, subprocess.TimeoutExpired, KeyboardInterrupt):  # who presses Ctrl-C again does not want to wait
        child.kill()
        child.wait()


def _result(end: dict[str, Any], log: Path) -> BuiltEngine:
    match end["event"]:
        case "built":
            return BuiltEngine.model_validate(end["engine"])
        case "unwritable":
            raise OSError(end["errno"], os.strerror(end["errno"]), end["path"])
        case "cancelled":  # not by us, so by someone who closed its stdin
            raise KeyboardInterrupt
        case _:
            fix = end["fix"] or "if nothing above says what to change, report this with the log"
            raise getattr(errors, end["error"])(end["problem"], found=end["found"], fix=f"{fix}; the whole log is {log}")


def _died(job: EngineJob, status: int, log: Path, asked: int, free: int) -> HstError:
    if status == -signal.SIGKILL:
        now = host_memory()
        return ResourceError(
            f"the build of the engine {job.name} was killed, as the system does where memory runs out",
            found=f"by estimate it needs {asked / 2**30:.1f} GiB of host memory; {free / 2**30:.1f} GiB were free when it "
            f"started, {now.free / 2**30:.1f} GiB of {now.total / 2**30:.1f} GiB are now",
            fix="end what else uses memory, or build on a machine with more; the same command goes on with this engine",
        )
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    last = log.read_text(errors="replace").splitlines()[-6:]
    return BuildError(
        f"the build of the engine {job.name} ended with {how}",
        found="\n".join(last) or "an empty log",
        fix=f"report this with the log {log}",
    )


# -- the child ---------------------------------------------------------------------------------------------------------------
def _main(events: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a stray one would surface in the middle of TensorRT's C++
    with suppress(OSError):  # where memory runs out, this process shall be killed and not the one that reports it
        Path("/proc/self/oom_score_adj").write_text("500")
    job = EngineJob.model_validate_json(sys.stdin.buffer.readline())

    def send(**event: Any) -> None:
        with suppress(BrokenPipeError):  # nobody listens any more; the lifeline ends this process
            os.write(events, json.dumps(event).encode() + b"\n")

    send(**_build(job, send))


def _build(job: EngineJob, send: Callable[..., None]) -> dict[str, Any]:
    """Builds, and returns the last event."""
    last = 0.0

    def on_step(phase: str, done: float) -> bool:
        nonlocal last
        if time.monotonic() - last > 1 / _EVENTS_A_SECOND:
            last = time.monotonic()
            send(event="step", phase=phase, done=done)
        return not select.select([sys.stdin.fileno()], [], [], 0)[0]

    try:
        return {"event": "built", "engine": build_engine(job, on_step).model_dump()}
    except Cancelled:
        return {"event": "cancelled"}
    except HstError as exc:
        return {"event": "failed", "error": type(exc).__name__, "problem": exc.problem, "found": exc.found, "fix": exc.fix}
    except MemoryError:
        problem = f"the build of the engine {job.name} ran out of host memory"
        return {"event": "failed", "error": "ResourceError", "problem": problem, "found": None, "fix": None}
    except OSError as exc:
        return {"event": "unwritable", "errno": exc.errno, "path": str(exc.filename or job.output)}


if __name__ == "__main__":
    _main(int(sys.argv[1]))
