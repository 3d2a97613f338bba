"""What the OpenAPI document says beyond the answers' types: bodies of requests, and refusals."""

from __future__ import annotations

from typing import Any

from clsnf.serving.request_body import IMAGE_TYPES, MULTIPART
from clsnf.serving.schemas import NewThreshold, Problem

REASONS = {
    400: "Not an image, half an image, absurd dimensions, or a body that is not what it says.",
    401: "No token, or a wrong one.",
    403: "The server was started without a token.",
    404: "No such model; the answer lists the categories.",
    406: "An overlay can be answered for one image alone.",
    408: "The body did not arrive before the deadline.",
    413: "More bytes or images than one request may hold.",
    415: "A body of a kind that is not read.",
    422: "Parameters that make no sense.",
    429: "The queue is full: ask again after Retry-After seconds.",
    503: "The model can't be used now.",
    504: "There was no answer before the deadline.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route."""
    return {status: {"model": Problem, "description": REASONS[status]} for status in statuses}


_BINARY = {"type": "string", "format": "binary"}
IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **{kind: {"schema": _BINARY} for kind in IMAGE_TYPES},
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": _BINARY, "minItems": 1}},
                    "required": ["images"],
                }
            },
        },
    }
}
THRESHOLD_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": NewThreshold.model_json_schema()}},
    }
}
INFER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"inputs": {"type": "array", "minItems": 1}},
                    "required": ["inputs"],
                }
            },
            "application/octet-stream": {"schema": _BINARY},
        },
    }
}
