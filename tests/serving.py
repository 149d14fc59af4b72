"""The server as a process of its own, for tests: started on a free port, asked over HTTP, ended by a signal."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

IMAGES = "/v1/images/generations"
SECONDS = 60
"""The longest that a test waits for anything."""

_PLAIN = "from hst_trt.cli.main import main; main()"
_READY = re.compile(r" is ready on (http://\S+)")


@dataclass(frozen=True)
class Server:
    """A server that was started. `log` is the file of what it wrote to stderr."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **arguments: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS, trust_env=False, **arguments)

    def ask(self, **fields: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(IMAGES, json=fields)

    def raw(self, content: bytes, *, end: bool = False) -> bytes:
        """What comes back for these bytes until the server closes the connection, or says nothing for two seconds."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            with contextlib.suppress(OSError):  # it may refuse before it has read all
                connection.sendall(content)
                if end:
                    connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while received := connection.recv(1 << 16):
                    answer += received
        return answer

    def metric(self, *names: str, **labels: str) -> float:
        """The sum of metrics, read at once, over those of their series that have these labels; 0 if none has yet."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        given = [f'{label}="{value}"' for label, value in labels.items()]
        series = [line.rpartition(" ") for line in lines if re.split(r"[{ ]", line, maxsplit=1)[0] in names]
        return sum(float(value) for label, _, value in series if all(pair in label for pair in given))

    def wait_for_metric(self, name: str, value: float) -> None:
        until = time.monotonic() + SECONDS
        while (now := self.metric(name)) != value:
            assert time.monotonic() < until, f"{name} is {now}, not {value}"
            time.sleep(0.02)

    def written(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


def start(*arguments: object, program: str = _PLAIN) -> tuple[subprocess.Popen[bytes], Path]:
    """``hst-trt`` with arguments as a process, and the file of its stderr."""
    descriptor, name = tempfile.mkstemp(prefix="hst-trt-serve-", suffix=".log")
    with os.fdopen(descriptor, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
    return process, Path(name)


@contextlib.contextmanager
def serving(bundle: Path, *options: object, program: str = _PLAIN) -> Iterator[Server]:
    """``hst-trt -v serve`` on a free port, ready; ended after the block, if it has not ended there."""
    process, log = start("-v", "serve", bundle, "--port", 0, *options, program=program)
    try:
        until = time.monotonic() + SECONDS
        while not (ready := _READY.search(log.read_text(encoding="utf-8", errors="replace"))):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < until, log.read_text(encoding="utf-8")
            time.sleep(0.02)
        yield Server(process, ready[1], log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(SECONDS)
        log.unlink()


def ended(*arguments: object, program: str = _PLAIN) -> tuple[int, str]:
    """Exit code and stderr of a server that cannot start."""
    process, log = start("serve", *arguments, program=program)
    try:
        return process.wait(SECONDS), log.read_text(encoding="utf-8")
    finally:
        process.kill()
        log.unlink()


def pixels_of(entry: dict[str, Any]) -> np.ndarray:
    """The picture of an entry of an answer's `data`, [H, W, 3] int16."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))), np.int16)


# What faults are provoked by: a server whose pipeline obeys words of its prompts. The loop, the checks and the queue are real.
FAULTY = """
import os, time
import numpy as np
from pathlib import Path
from hst_trt.cli.main import main
from hst_trt.errors import ResourceError
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.server import service

draw, load = HybridStitchPipeline.__call__, service.open_backend

def faulty(self, prompt, *, latents=None, on_step=None, **settings):
    prompts = " ".join([prompt] if isinstance(prompt, str) else prompt).split()
    if "broken" in prompts:
        raise RuntimeError("/a/secret/path is broken")
    if "hungry" in prompts and len(latents) > 1:
        raise ResourceError("there is no memory for so many", found="cudaMalloc failed in /a/secret/path")
    for image, text in enumerate([prompt] if isinstance(prompt, str) else prompt):
        if "infinite" in text.split():
            latents[image] = np.nan
    def slowly(t, record):
        if "slow" in prompts:
            time.sleep(0.05)
        if "stuck" in prompts:
            time.sleep(1.5)
        if on_step is not None:
            on_step(t, record)
    return draw(self, prompt, latents=latents, on_step=slowly, **settings)

def fallible(*arguments, **settings):
    if "UNLOADABLE" in os.environ and Path(os.environ["UNLOADABLE"]).exists():
        raise OSError("the weights at /a/secret/path are gone")
    return load(*arguments, **settings)

HybridStitchPipeline.__call__, service.open_backend = faulty, fallible
main()
"""
