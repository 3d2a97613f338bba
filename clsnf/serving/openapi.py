"""What the OpenAPI document says beyond the answers' types: bodies of requests, and refusals."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from clsnf.serving.request_body import MULTIPART
from clsnf.serving.schemas import NewThreshold, Problem

REASONS = {
    400: "Not an image, half an image, absurd dimensions, or a body that is not what it says.",
    401: "No token, or a wrong one.",
    403: "The server was started without a token, or a page of another origin asks.",
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


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the app; made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for operations in document["paths"].values():
            for operation in operations.values():
                _drop_validation_error(operation["responses"])
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _drop_validation_error(responses: dict[str, Any]) -> None:
    """Drop the 422 that FastAPI adds to every route with a parameter; the real ones are Problems.

    A path's own parameters are texts, which are never wrong.
    """
    content = responses.get("422", {}).get("content", {})
    if "HTTPValidationError" in str(content):
        del responses["422"]


_BINARY = {"type": "string", "format": "binary"}
ONE_IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": _BINARY}},
    }
}
IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            # Types such as image/png are read too. Generators of clients know this one.
            "application/octet-stream": {"schema": _BINARY},
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
_INPUT = {
    "type": "object",
    "description": "a tensor; its data stand here as JSON, or after the JSON as bytes",
    "properties": {
        "name": {"type": "string", "enum": ["images", "files"]},
        "datatype": {"type": "string", "enum": ["UINT8", "BYTES"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object"},
    },
    "required": ["name", "datatype", "shape"],
}
_OUTPUT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
    "required": ["name"],
}
_ANSWERED = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object"},
    },
    "required": ["name", "datatype", "shape"],
}
INFER_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs; their data stand in the JSON, or after it as bytes.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "model_name": {"type": "string"},
                        "model_version": {"type": "string"},
                        "id": {"type": "string"},
                        "outputs": {"type": "array", "items": _ANSWERED},
                    },
                    "required": ["model_name", "outputs"],
                }
            },
            "application/octet-stream": {"schema": _BINARY},
        },
    }
}
INFER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "string"},
                        "inputs": {"type": "array", "minItems": 1, "items": _INPUT},
                        "outputs": {"type": "array", "items": _OUTPUT},
                    },
                    "required": ["inputs"],
                }
            },
            "application/octet-stream": {"schema": _BINARY},
        },
    }
}
THRESHOLD_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": NewThreshold.model_json_schema()}},
    }
}
