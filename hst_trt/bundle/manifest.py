"""``manifest.json`` as frozen values: every field of the bundle format, and nothing that is not in it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..recipe import Defaults, Limits
from ..schedule import Solver
from ..spec import MAX_COUNT
from ..tensor_names import TEXT_ENCODERS

__all__ = [
    "SCHEMA_VERSION",
    "CalibratedEntry",
    "CalibrationEntry",
    "CostsEntry",
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

_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(gt=0, le=MAX_COUNT)]


def _key(tokens: object) -> object:
    """A number of tokens as a key of JSON, which is a text: decimal digits, written in one way only."""
    return int(tokens) if isinstance(tokens, str) and re.fullmatch("[1-9][0-9]{0,17}", tokens) else tokens


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
    length: _Count
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


class CostsEntry(_Entry):
    """What was measured on a machine for one request shape: medians, in seconds."""

    machine: str  # the CPU's name and number, or the GPU's name
    backend_version: str
    threads: int = Field(ge=0)  # of a call on a CPU; 0: one per physical core
    images: int = Field(gt=0)
    guided: bool
    height: int = Field(gt=0)  # pixels
    width: int = Field(gt=0)
    date: str  # ISO 8601 day, UTC
    large_seconds: dict[Annotated[int, Field(gt=0, strict=True), BeforeValidator(_key)], _Seconds] = Field(
        min_length=1
    )  # by the image tokens that are computed
    small_seconds: _Seconds
    text_seconds: _Seconds
    vae_seconds: _Seconds
    step_seconds: _Seconds  # of a step outside the two transformers

    @property
    def key(self) -> tuple[str, int, int, bool, int, int]:
        """What they hold for; a bundle has one entry of each."""
        return self.machine, self.threads, self.images, self.guided, self.height, self.width


class DistanceEntry(_Entry):
    """To the converged large model, means over prompts."""

    latents: float = Field(gt=0, allow_inf_nan=False)  # root mean square
    features: float = Field(gt=0, allow_inf_nan=False)  # of the pictures' features, the root of `hst-trt compare`'s


class CalibratedEntry(DistanceEntry):
    """A schedule and its distances, on the first prompts of a calibration."""

    stages: tuple[int, int, int]  # large, hybrid and small steps
    solver: Solver
    shift: float | None = Field(gt=0, allow_inf_nan=False)  # of sigmas; null for the pair's own
    ratio: float = Field(ge=0, lt=1)  # of the mask; 0 without hybrid steps
    correction: float = Field(ge=0, le=1)
    refresh: int = Field(ge=0)  # every so manyth hybrid step is a full large call
    ras: bool  # tokens outside the mask keep their last velocity, and the small model draws nothing
    confirmed: DistanceEntry | None = None  # the same on all prompts, where it comes near being chosen


class CalibrationEntry(_Entry):
    """What `hst-trt calibrate` measured for one size; it holds on every machine."""

    height: int = Field(gt=0)  # pixels
    width: int = Field(gt=0)
    guidance_scale: float = Field(ge=0)
    prompts: int = Field(gt=0)  # that every schedule was measured on
    prompts_hash: str
    further_prompts: int = Field(0, ge=0)  # that those near the frontier were measured on too
    further_hash: str = ""
    baseline_steps: int = Field(gt=0)  # large-only steps that speed-ups are over
    converged_steps: int = Field(gt=0)  # of the large-only run that distances are to
    date: str  # ISO 8601 day, UTC
    schedules: tuple[CalibratedEntry, ...]

    def same_as(self, other: CalibrationEntry) -> bool:
        """Whether the two measured the same thing, further prompts aside, so that their schedules can stand side by side."""
        aside = {"date", "schedules", "further_prompts", "further_hash"}
        return all(getattr(self, name) == getattr(other, name) for name in type(self).model_fields.keys() - aside)


class Manifest(_Entry):
    """``manifest.json``."""

    schema_version: int = Field(ge=1)
    name: str
    created_by: str
    created: str  # ISO 8601, UTC
    state: Literal["graphs", "complete"]
    target: TargetEntry
    recipe: str
    models: dict[str, ModelEntry]
    vae_scale: _Count
    t5_length: int = Field(ge=0, le=MAX_COUNT)
    tokenizers: tuple[TokenizerEntry, ...] = Field(min_length=1, max_length=len(TEXT_ENCODERS))
    scheduler: str
    graphs: dict[str, GraphEntry]
    engines: dict[str, EngineEntry] = {}  # by the name of the graph
    defaults: Defaults
    limits: Limits
    bucket_ratios: tuple[Annotated[float, Field(gt=0, le=1)], ...]
    files: dict[str, FileEntry]
    parts: dict[str, PartEntry]
    costs: tuple[CostsEntry, ...] = ()
    calibrations: tuple[CalibrationEntry, ...] = ()  # one a size
    fingerprint: str  # over everything that decides the content: hashes of all files, and the target
