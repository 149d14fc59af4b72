"""What ``/openapi.json`` says of requests and answers; a test asks for thousands and compares every answer with it."""

from __future__ import annotations

from typing import Any

from .answers import FORMATS
from .request import ImageRequest

__all__ = ["PICTURE", "REQUEST", "RESPONSES"]

Schema = dict[str, Any]


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": required | (optional or {})}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _inlined_request() -> Schema:
    """The request's, without references."""
    schema = ImageRequest.model_json_schema()
    schema["properties"]["nvext"]["anyOf"][0] = schema.pop("$defs")["Extensions"]
    return schema


_STRING: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number", "minimum": 0}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_MAYBE: Schema = {"type": ["string", "null"]}
_STAGE: dict[str, Schema] = {"stage": {"enum": ["large", "hybrid", "small"]}, "large_tokens": _COUNT}
_REPORT = _object(
    {
        "schedule": _STRING,
        "plan": _list(_object(_STAGE | {"small": {"type": "boolean"}})),
        "num_tokens": _COUNT,
        "stats": {"type": "object"},
        "queued_seconds": _NUMBER,
        "batch": {"type": "integer", "minimum": 1},
    },
    {
        "steps": _list(_object(_STAGE | {"seconds": _NUMBER})),
        "masks": _list(_object({"step": _COUNT, "rows": _COUNT, "columns": _COUNT, "images": _list(_STRING)})),
    },
)
_ANSWER = _object(
    {
        "created": _COUNT,
        "data": _list(_object({"seed": _COUNT}, {"b64_json": _STRING, "url": {"type": "string", "format": "uri"}})),
        "output_format": {"enum": list(FORMATS)},
        "size": {"type": "string", "pattern": "^[0-9]+x[0-9]+$"},
        "hst_trt": _REPORT,
    }
)
_EVENTS = [f"image_generation.{name}" for name in ("queued", "progress", "completed")]
_EVENT = _object({"event": {"enum": [*_EVENTS, "error"]}, "data": _STRING})  # of each; `data` is JSON
_ERROR = _object({"error": _object({"message": _STRING, "type": _STRING, "param": _MAYBE, "code": _MAYBE})})

_EXAMPLE = {"prompt": "a red apple on a blue background", "seed": 7}
REQUEST = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _inlined_request(), "example": _EXAMPLE}},
    }
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The pictures; with `stream`, server-sent events.",
        "content": {"application/json": {"schema": _ANSWER}, "text/event-stream": {"schema": _EVENT}},
    },
    **{
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in {
            400: "A field is not usable.",
            401: "A key is needed.",
            404: "There is no such model.",
            413: "The body is too large.",
            415: "The body is not JSON.",
            500: "Drawing failed.",
            503: "The queue is full, or the server shuts down; ask again after the seconds of `Retry-After`.",
            504: "It took longer than a request may.",
        }.items()
    },
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The picture.", "content": {f"image/{form}": {} for form in FORMATS}},
    "4XX": {"description": "It is not kept any more, or never was.", "content": {"application/json": {"schema": _ERROR}}},
}
