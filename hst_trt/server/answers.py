"""What clients get: pictures and errors in the form of OpenAI's image interface, with what the stitching did beside them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from ..arguments import call_costs, token_grid
from ..bundle import Bundle
from ..errors import BusyError, DeadlineError, HstError, MissingError, NumericsError, RequestError, ResourceError
from ..machine import Machine
from ..plan import Schedule
from ..planner.choose import calibration_of, frontier
from ..workspace import RequestShape
from .drawing import Drawn
from .request import FieldError, Limits

__all__ = ["FORMATS", "OutputFormat", "ServerError", "encode", "error_body", "model_entry", "report", "status_of"]

OutputFormat = Literal["png", "jpeg", "webp"]
FORMATS: Mapping[OutputFormat, Mapping[str, Any]] = {
    "png": {"compress_level": 1},  # a fifth of the default's time for a tenth more bytes
    "jpeg": {"quality": 95},
    "webp": {"quality": 95, "method": 2},
}


def encode(image: Image.Image, output_format: OutputFormat) -> bytes:
    """The file of a picture."""
    content = io.BytesIO()
    image.save(content, output_format, **FORMATS[output_format])
    return content.getvalue()


def report(drawn: Drawn, queued_seconds: float) -> dict[str, Any]:
    """What drew the pictures of an answer, and what that took."""
    plan, stats = drawn.drawing.plan, drawn.stats
    steps = [(record.step, record.tokens, record.seconds) for record in stats.records]
    content: dict[str, Any] = {
        "schedule": drawn.drawing.options,
        "plan": [{"stage": step.stage.value, "large_tokens": tokens, "small": step.small} for step, tokens, _ in steps],
        "num_tokens": plan.num_tokens,
        "stats": stats.to_dict(),
        "queued_seconds": round(queued_seconds, 4),
        "batch": drawn.batch,
    }
    if drawn.drawing.details:
        content["steps"] = [
            {"stage": step.stage.value, "large_tokens": tokens, "seconds": round(seconds, 5)} for step, tokens, seconds in steps
        ]
        content["masks"] = [_mask_entry(step, mask) for step, mask in drawn.masks.items()]
    return content


def _mask_entry(step: int, mask: np.ndarray) -> dict[str, Any]:
    images = [base64.b64encode(np.packbits(image).tobytes()).decode() for image in mask]
    return {"step": step, "rows": mask.shape[1], "columns": mask.shape[2], "images": images}


def model_entry(bundle: Bundle, machine: Machine | None, limits: Limits) -> dict[str, Any]:
    """A bundle in the list of models, with what a client must know to ask for pictures of it."""
    manifest, defaults = bundle.manifest, bundle.manifest.defaults
    h, w = token_grid(bundle, None, None)
    return {
        "id": manifest.name,
        "object": "model",
        "created": int(datetime.fromisoformat(manifest.created).timestamp()),
        "owned_by": "hst_trt",
        "hst_trt": {
            "height": defaults.height,
            "width": defaults.width,
            "side": bundle.spec.token_side,
            "max_side": min(manifest.limits.max_side, bundle.spec.max_side),
            "num_inference_steps": defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale,
            "num_tokens": h * w,
            "schedules": list(get_args(Schedule)),
            "speedups": _speedups(bundle, machine),
            "baseline_steps": _baseline_steps(bundle),
            "max_images": min(limits.images, manifest.limits.max_images),
            "max_steps": limits.steps,
            "precision": manifest.target.precision,
            "backend": manifest.target.backend,
            "machine": None if machine is None else machine.name,
        },
    }


def _speedups(bundle: Bundle, machine: Machine | None) -> list[dict[str, Any]]:
    """What a speed-up can be at the bundle's own size, and what is chosen for it; none without a calibration."""
    try:
        calibration = calibration_of(bundle, None, None)
    except MissingError:
        return []
    shape = RequestShape(1, calibration.guidance_scale > 1, *token_grid(bundle, None, None))
    best = frontier(bundle, calibration, call_costs(bundle, shape, machine))
    return [{"speedup": round(option.speedup, 3), "schedule": option.options} for option in best]


def _baseline_steps(bundle: Bundle) -> int | None:
    """Steps of the large model alone that speed-ups are counted from."""
    try:
        return calibration_of(bundle, None, None).baseline_steps
    except MissingError:
        return None


# -- errors ----------------------------------------------------------------------------------------------------------------
class ServerError(HstError):
    """An error of the protocol itself: a path, a method, a key, a body."""

    def __init__(self, status: int, problem: str, *, found: str | None = None, fix: str | None = None) -> None:
        super().__init__(problem, found=found, fix=fix)
        self.status = status


_TYPES = {401: "authentication_error", 503: "server_error", 504: "server_error", 500: "server_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 503: "overloaded", 504: "deadline_exceeded"}


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    if isinstance(error, ServerError):
        return error.status
    if isinstance(error, FieldError) and error.field == "model":
        return 404
    for kind, status in ((RequestError, 400), (BusyError, 503), (DeadlineError, 504)):
        if isinstance(error, kind):
            return status
    return 500


def error_body(error: BaseException) -> dict[str, Any]:
    """An error as OpenAI's clients read it. Of errors nobody foresaw it says only that there was one: the log has the rest."""
    status = status_of(error)
    if isinstance(error, ServerError) or status != 500:
        message = "; ".join(str(error).splitlines())
    elif isinstance(error, (NumericsError, ResourceError)):
        message = "; ".join(filter(None, (error.problem, error.fix)))  # what was found may be a library's words, with paths
    else:
        message = "the server failed to draw this; its log says why"
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(status, "invalid_request_error"),
            "param": error.field if isinstance(error, FieldError) else None,
            "code": _CODES.get(status),
        }
    }
