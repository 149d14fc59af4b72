"""What a client may ask for: OpenAI's fields of an image request, and ours beside them or inside ``nvext``.

The HTTP server, the Dynamo worker and the Triton model all read requests with this one class, so a field means the same
wherever it arrives. Fields it does not know are refused by name: a misspelt one would otherwise be drawn without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import RequestError
from ..plan import Schedule

__all__ = ["FieldError", "ImageRequest", "Limits", "read_request"]


_MOST = 10_000
"""Beyond any server's limits, which are checked later and name what was asked for: that has to be short."""


class FieldError(RequestError):
    """A field of a request is not usable; `field` is its name."""

    def __init__(self, problem: str, *, field: str | None, found: str | None = None, fix: str | None = None) -> None:
        super().__init__(problem, found=found, fix=fix)
        self.field = field


@dataclass(frozen=True)
class Limits:
    """What one request may take, beside the limits of the bundle itself.

    Attributes:
        prompt_characters: of the prompt, and of the negative prompt.
        images: of one request, and of one batch.
        steps: denoising steps.
        pixels: height times width.
        body_bytes: of a request as it arrives.
    """

    prompt_characters: int = 4000
    images: int = 10
    steps: int = 100
    pixels: int = 2048 * 2048
    body_bytes: int = 64 * 1024


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Extensions(_Fields):
    """Fields that OpenAI's interface lacks. All may be left out; the bundle's defaults are taken then."""

    negative_prompt: str | None = Field(None, description="What not to draw.")
    num_inference_steps: int | None = Field(None, ge=1, le=_MOST, description="Denoising steps.")
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        None, description="Classifier-free guidance; off at 1 and below."
    )
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = Field(
        None, description="Of the start noise, one for all images of the request; random if left out."
    )
    schedule: Schedule | None = Field(None, description="Which model runs when; hybrid if left out.")
    stages: Annotated[list[Annotated[int, Field(ge=0, le=_MOST)]], Field(min_length=3, max_length=3)] | None = Field(
        None, description="Large, hybrid and small steps."
    )
    mask_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="Share of tokens the large model works on in hybrid steps."
    )
    speedup: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = Field(
        None, description="Choose the schedule: a loop so many times faster than the large model's alone."
    )
    details: bool | None = Field(None, description="Answer with the masks and the time of every step, too.")


class ImageRequest(Extensions):
    """One request. See `read_request`."""

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, description="The bundle's name, as /v1/models lists it.")
    n: int | None = Field(None, ge=1, le=_MOST, description="Images; 1 if left out.")
    size: str | None = Field(
        None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description='Pixels as "WIDTHxHEIGHT", or "auto".'
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json if left out.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png if left out.")
    stream: bool | None = Field(None, description="Answer with server-sent events: the queue, each step, the images.")
    nvext: Extensions | None = Field(None, description="The extensions once more, where clients of NVIDIA's servers put them.")

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """Height and width in pixels; None for the bundle's."""
        if self.size in (None, "auto"):
            return None, None
        assert self.size is not None
        width, height = map(int, self.size.split("x"))
        return height, width


def read_request(fields: object) -> ImageRequest:
    """A request of decoded JSON, with what was in ``nvext`` at top level.

    Raises:
        FieldError: a field is unknown, of the wrong type, out of range or given twice.
    """
    if not isinstance(fields, Mapping):
        raise FieldError("a request is a JSON object", field=None, found=type(fields).__name__)
    try:
        request = ImageRequest.model_validate(fields)
    except ValidationError as exc:
        raise _field_error(exc) from exc
    return request if request.nvext is None else _merged(request, request.nvext)


def _merged(request: ImageRequest, nvext: Extensions) -> ImageRequest:
    inside = {name: value for name in Extensions.model_fields if (value := getattr(nvext, name)) is not None}
    for name in inside:
        if getattr(request, name) is not None:
            raise FieldError(f"{name} is given twice, at top level and inside nvext", field=name, fix="give it once")
    return request.model_copy(update={**inside, "nvext": None})


def _field_error(exc: ValidationError) -> FieldError:
    """The first thing that is wrong, in a sentence, without the value: it may be a megabyte, or private."""
    error = exc.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in error["loc"]]
    field = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = Extensions.model_fields if path[0] == "nvext" else ImageRequest.model_fields
        return FieldError(
            f"{_short(field)} is not a field of a request", field=_short(field), fix=f"known are {', '.join(known)}"
        )
    if error["type"] == "missing":
        return FieldError(f"{field} is missing", field=field)
    return FieldError(f"{field or 'the request'} is not usable", field=field or None, found=_plain(error))


def _plain(error: Mapping[str, Any]) -> str:
    message: str = error["msg"]
    return message[0].lower() + message[1:]


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:80]}..."
