"""``manifest.json`` as frozen values: every field of the bundle format, and nothing that is not in it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..recipe import Defaults, Limits

__all__ = [
    "SCHEMA_VERSION",
    "EngineEntry",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "ModelEntry",
    "PartEntry",
    "ProfileEntry",
    "TargetEntry",
    "TensorEntry",
    "TokenizerEntry",
]

SCHEMA_VERSION = 1


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(_Entry):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class TensorEntry(_Entry):
    """Symbolic axes are names, static ones numbers."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphEntry(_Entry):
    path: str
    weights: tuple[str, ...] = ()  # files it refers to
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    worst_error: float | None = None  # graph against torch at export: relative, or for the VAE in 1/255 of a pixel

    @property
    def axes(self) -> tuple[str, ...]:
        """The symbolic axes of the inputs, in order."""
        return tuple(dict.fromkeys(axis for tensor in self.inputs for axis in tensor.shape if isinstance(axis, str)))


class ModelEntry(_Entry):
    source: str
    revision: str | None
    component: str
    config: dict[str, Any]


class TokenizerEntry(_Entry):
    path: str
    length: int = Field(gt=0)
    pad_id: int = Field(ge=0)


class ProfileEntry(_Entry):
    """The shapes that one optimisation profile of an engine takes: for each symbolic axis of its graph the least, the best
    and the greatest length. A profile is *pinned* where the three are the same."""

    axes: dict[str, tuple[int, int, int]]


class EngineEntry(_Entry):
    """An engine made from the graph of the same name."""

    path: str
    profiles: tuple[ProfileEntry, ...] = Field(min_length=1)
    activation_bytes: int | None = None  # scratch memory that its largest profile needs; None: no GPU was there to ask
    read_back: Literal["network", "engine"]  # what of TensorRT's was compared with the graph: "engine" only on a GPU
    seconds: float = Field(ge=0)  # that the build took


class TargetEntry(_Entry):
    name: str
    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    backend_version: str
    sms: tuple[int, ...] = ()  # compute capabilities that the engines run on, 90 for 9.0
    precision: Literal["float32", "float16", "bfloat16"]
    os: str
    arch: str


class PartEntry(_Entry):
    """A part is made in one go: equal inputs need no new making."""

    inputs: str  # a hash of what it was made from
    files: tuple[str, ...] = ()


class Manifest(_Entry):
    """``manifest.json``."""

    schema_version: int = Field(strict=True, ge=1)
    name: str
    created_by: str
    created: str  # ISO 8601, UTC
    state: Literal["graphs", "complete"]
    target: TargetEntry
    recipe: str
    models: dict[str, ModelEntry]
    vae_scale: int = Field(gt=0)
    t5_length: int = Field(ge=0)
    tokenizers: tuple[TokenizerEntry, ...] = Field(min_length=1)
    scheduler: str
    graphs: dict[str, GraphEntry]
    engines: dict[str, EngineEntry] = {}  # by the name of the graph
    defaults: Defaults
    limits: Limits
    bucket_ratios: tuple[float, ...]
    files: dict[str, FileEntry]
    parts: dict[str, PartEntry]
    fingerprint: str  # over everything that decides the content: hashes of all files, and the target
