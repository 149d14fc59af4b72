"""Compiles the row-move kernel to PTX for the C++ host, which so needs neither NVRTC nor a CUDA toolkit.

    python scripts/host_row_move.py        needs nvidia-cuda-nvrtc and cuda-python, and no GPU

PTX is forward compatible: for the oldest GPU that any target has, and in the oldest PTX version that knows that GPU, every
driver that TensorRT takes compiles it for its own.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cuda.bindings import nvrtc

from hst_trt.runtime.row_move import kernel_source

TARGET = Path(__file__).resolve().parents[1] / "hst_trt" / "csrc" / "src" / "row_move.inc"
OLDEST_GPU, OLDEST_PTX = 75, "6.3"


def row_move_ptx() -> str:
    """The kernel, without comments, which name the compiler's version."""
    _, program = nvrtc.nvrtcCreateProgram(kernel_source().encode(), b"row_move.cu", 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, 2, [f"--gpu-architecture=compute_{OLDEST_GPU}".encode(), b"--std=c++17"])[0]
    if int(status):
        raise SystemExit(f"the kernel does not compile: {status.name}")
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytearray(size)
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    lines = [
        line.rstrip() for line in text.decode().rstrip("\0").splitlines() if line.strip() and not line.lstrip().startswith("//")
    ]
    return re.sub(r"(?m)^\.version .*$", f".version {OLDEST_PTX}", "\n".join(lines))


def included() -> str:
    """The kernel as a C++ string literal, to be included."""
    return f'// Written by scripts/host_row_move.py from hst_trt/runtime/row_move.cu.\nR"ptx(\n{row_move_ptx()}\n)ptx"\n'


if __name__ == "__main__":
    TARGET.write_text(included(), encoding="ascii")
    print(TARGET, file=sys.stderr)
