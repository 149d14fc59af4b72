"""Reads where each tensor of a model lies inside its safetensors files, so that a graph can point there instead of copying.

Only safetensors is read: a pickle can run code when it is opened, and its tensors cannot be referred to by offset.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ..errors import IntegrityError, MissingError

__all__ = ["NUMPY_DTYPES", "StoredTensor", "WeightStore"]

NUMPY_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100 * 2**20  # the limit of the safetensors format itself


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: little-endian, row-major, contiguous (the layout ONNX external data has too)."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self) -> np.ndarray:
        """The tensor's values, as a read-only memory map."""
        return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape or (1,))


class WeightStore:
    """All tensors of one component folder (``transformer/``, ``vae/`` ...), sharded or not.

    Raises:
        MissingError: the folder has no safetensors weights (pickle weights are named, and refused).
        IntegrityError: a file's header is not valid, or a shard that the index names is missing a tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self._tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self._tensors.update(_read_header(file))

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, key: str) -> StoredTensor:
        try:
            return self._tensors[key]
        except KeyError:
            raise IntegrityError(
                f"the weights in {self.folder} lack the tensor {key!r}",
                found=f"{len(self._tensors)} tensors in {len(self.files)} file(s)",
                fix="download the model again, or check that its config.json belongs to these weights",
            ) from None


def _weight_files(folder: Path) -> list[Path]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if ".fp16." in index.name:
            continue
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise IntegrityError(f"{index} is not a valid index of shards", found=str(exc), fix="download it again") from exc
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise MissingError(
                    f"the shard {name!r} that {index} names is not there",
                    fix=f"complete the download of the model into {folder}",
                )
        return [folder / name for name in names]
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise MissingError(
            f"{folder} has no safetensors weights",
            found=f"pickle weights ({', '.join(pickles)}), which are never opened because a pickle can run code",
            fix="convert them once with save_pretrained(..., safe_serialization=True) on a machine you trust",
        )
    raise MissingError(
        f"{folder} has no weights",
        found=", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "no *.safetensors file"
        if folder.is_dir()
        else "no such folder",
        fix="give the directory of a complete diffusers model",
    )


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER, size):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        entries = [
            (key, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for key, entry in header.items()
            if key != "__metadata__"
        ]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise IntegrityError(
            f"{file} is not a valid safetensors file", found=f"{type(exc).__name__}: {exc}", fix="download or save it again"
        ) from exc
    start = 8 + length
    for key, stored, shape, begin, end in entries:
        dtype = NUMPY_DTYPES.get(stored)
        if dtype is None:
            raise IntegrityError(f"{file}: tensor {key!r} has the unsupported dtype {stored}")
        if end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize or start + end > size:
            raise IntegrityError(
                f"{file}: tensor {key!r} does not fit its place",
                found=f"bytes {begin}..{end} of {size - start} for shape {shape}",
                fix="the file is cut short or damaged: download it again",
            )
        yield key, StoredTensor(file, dtype, shape, start + begin, end - begin)
