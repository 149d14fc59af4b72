"""A real Triton Inference Server for tests: starts one on a repository, asks it over HTTP as any client would, stops it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATATYPES = {
    "num_inference_steps": "INT32", "n": "INT32", "stages": "INT32", "seed": "UINT64",
    "guidance_scale": "FP64", "mask_ratio": "FP64", "speedup": "FP64",
}  # fmt: skip


def environment() -> Path | None:
    """The environment of `make triton`, or the one that HST_TRT_TEST_TRITON names; None if it is not there."""
    folder = Path(os.environ.get("HST_TRT_TEST_TRITON", ROOT / "build" / "out" / "triton")).absolute()
    return folder if _site(folder) is not None else None


def _site(folder: Path) -> Path | None:
    return next((path.parent for path in folder.glob("lib/python3.*/site-packages/pytriton")), None)


@dataclass(frozen=True)
class Triton:
    http: int
    grpc: int
    process: subprocess.Popen[bytes]
    log: Path

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http}/v2/{path}"

    def ready(self) -> bool:
        try:
            return urllib.request.urlopen(self.url("health/ready"), timeout=5).status == 200
        except OSError:
            return False

    def get(self, path: str) -> Any:
        return json.load(urllib.request.urlopen(self.url(path), timeout=10))

    def post(self, path: str, body: bytes = b"{}") -> int:
        """The status of a POST."""
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url(path), body), timeout=60).status
        except urllib.error.HTTPError as exc:
            return exc.code

    def ask(
        self,
        model: str = "demo",
        *,
        outputs: Sequence[str] = ("image", "seed"),
        parameters: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> tuple[int, dict[str, Any]]:
        """The status and the outputs by name, or what an error says under "error"."""
        inputs = []
        for name, value in fields.items():
            data = value if isinstance(value, list) else [value]
            inputs.append({"name": name, "datatype": DATATYPES.get(name, "BYTES"), "shape": [1, len(data)], "data": data})
        wanted = [{"name": name, "parameters": {"binary_data": name in ("image", "png")}} for name in outputs]
        body = {"inputs": inputs, "outputs": wanted, "parameters": dict(parameters or {})}
        request = urllib.request.Request(self.url(f"models/{model}/infer"), json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                content, header = answer.read(), answer.headers.get("Inference-Header-Content-Length")
        except urllib.error.HTTPError as exc:
            return exc.code, json.load(exc)
        end = int(header or len(content))
        found: dict[str, Any] = {}
        for output in json.loads(content[:end])["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                found[output["name"]] = output["data"]
                continue
            found[output["name"]], end = content[end : end + size], end + size
            if output["datatype"] == "UINT8":
                found[output["name"]] = np.frombuffer(found[output["name"]], np.uint8).reshape(output["shape"])
        return 200, found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def triton(repository: Path, work: Path, *options: str) -> Iterator[Triton]:
    """A server with all models of a repository; ended by SIGTERM, with its exit code checked, unless the test did that.

    Args:
        work: an empty folder for the backend and the log.
    """
    home = environment()
    assert home is not None
    site = _site(home)
    assert site is not None
    server, backend = site / "pytriton" / "tritonserver", work / "backends" / "python"
    backend.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).symlink_to(server / "backends" / "python" / name)
    python = site.parent.name.removeprefix("python")  # the stub carries no Python: it loads the environment's own library
    shutil.copy(server / "python_backend_stubs" / python / "triton_python_backend_stub", backend)
    libraries = [site / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR"))]
    http, grpc = free_port(), free_port()
    command = [
        server / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backend.parent}",
        "--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--allow-metrics=false", *options,
    ]  # fmt: skip
    path = f"{home / 'bin'}:{os.environ['PATH']}"  # Python finds its environment by the `python3` that is first on the path
    variables = os.environ | {"PATH": path, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    log = work / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=variables, cwd=work, stdout=stream, stderr=subprocess.STDOUT)
    running = Triton(http, grpc, process, log)
    try:
        deadline = time.monotonic() + 120
        while not running.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text(errors="replace")[-4000:])
            time.sleep(0.1)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
