"""The C++ host in a process of its own, on doubles of CUDA and TensorRT (`hst_trt/csrc/tests/fake_gpu`).

The libraries that a process has opened stay open, so each test that needs others needs another process. Run as a script this is
that process: it reads pickled (function name, arguments) from stdin and answers with a pickled (result, None) or (None, error).
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from host import GO_ON, Drawn, HostBundle, HostError, HostPipeline, Library, Loop, onnxruntime_library

LIVE = (
    "memory", "stream", "event", "graph", "recording", "module", "context", "runtime", "engine", "execution_context", "config",
    "cache", "blob",
)  # fmt: skip


class Doubles:
    """Starts the process and calls the functions of `Host` in it.

    Args:
        built: where `make host` builds.
        kind: ``tensorrt`` or ``rtx``.
        cache: the user's cache folder.
        driver: where the driver's library is; the double's if left out.
        environment: more variables.
    """

    def __init__(self, built: Path, kind: str, cache: Path, driver: Path | None = None, **environment: str) -> None:
        fakes = built / "tests" / "fake_gpu"
        variables = {
            "LD_LIBRARY_PATH": f"{driver or fakes / 'cuda'}:{fakes / kind}",
            "HST_ONNXRUNTIME": str(onnxruntime_library()),
            "XDG_CACHE_HOME": str(cache),
        }
        command = [sys.executable, __file__, str(fakes / kind / "libhst_trt.so")]
        self._process = subprocess.Popen(
            command, env=os.environ | variables | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            pickle.dump((name, args, kwargs), self._process.stdin)
            self._process.stdin.flush()
            try:
                result, error = pickle.load(self._process.stdout)
            except EOFError:
                raise AssertionError(f"the host ended with {self._process.wait()} in {name}") from None
            if error is not None:
                raise HostError(*error)
            return result

        return call

    def end(self) -> int:
        """Ends the process; its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait()


def watched(
    pipeline: HostPipeline, prompts: list[str], replaced: dict[int, np.ndarray], **fields: Any
) -> tuple[Drawn, list[np.ndarray], list[float]]:
    """What is drawn if latents are replaced after some steps; the latents after each step; the seconds callbacks get."""
    seen, seconds = [], []

    def look(loop: Loop) -> int:
        if loop.step in replaced:
            loop.latents = replaced[loop.step]
        seen.append(loop.latents)
        seconds.append(loop.seconds)
        return GO_ON

    return pipeline(prompts, on_step_end=look, **fields), seen, seconds


class Host:
    """What can be called; pipelines have names."""

    def __init__(self, library: str) -> None:
        self._library, self._cuda = Library(Path(library)), None
        self._pipelines: dict[str, HostPipeline] = {}

    def open(self, bundle: Path, name: str = "", **params: Any) -> None:
        self._pipelines[name] = HostPipeline(HostBundle(self._library, bundle), **params)

    def close(self, name: str = "") -> None:
        del self._pipelines[name]

    def draw(self, prompts: list[str], *, pipeline: str = "", cancel_after: int = 0, **fields: Any) -> Any:
        progress = (lambda done, _: int(done == cancel_after)) if cancel_after else None
        return self._pipelines[pipeline](prompts, progress=progress, **fields)

    def watched(self, prompts: list[str], replaced: dict[int, np.ndarray], *, pipeline: str = "", **fields: Any) -> Any:
        return watched(self._pipelines[pipeline], prompts, replaced, **fields)

    def get(self, *names: str) -> dict[str, int]:
        """Counters of the doubles."""
        return {name: self._fake().fake_get(name.encode()) for name in names}

    def set(self, **values: int) -> None:
        """Settings and counters of the doubles."""
        for name, value in values.items():
            self._fake().fake_set(name.encode(), ctypes.c_long(value))

    def live(self) -> dict[str, int]:
        """How many of each kind of thing there are, of those that there are any of."""
        return {name: count for name, count in self.get(*(f"live.{kind}" for kind in LIVE)).items() if count}

    def _fake(self) -> Any:
        if self._cuda is None:
            self._cuda = ctypes.CDLL("libcuda.so.1")  # the one that the host opens too
            self._cuda.fake_get.restype = ctypes.c_long
        return self._cuda


def main() -> None:
    host = Host(sys.argv[1])
    while True:
        try:
            name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(host, name)(*args, **kwargs), None
        except HostError as exc:
            answer = None, (exc.code, str(exc))
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
