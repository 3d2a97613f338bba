"""Shapes of requests and answers, for the OpenAPI page and for checking what is set. Answers
themselves are made in :mod:`answers`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clsnf.serving.request_body import IMAGE_TYPES, MULTIPART


class MapFile(BaseModel):
    """A picture or array, in base64."""

    format: Literal["png", "npy", "overlay"]
    base64: str


class ImageAnswer(BaseModel):
    """The answer about one image."""

    name: str
    category: str
    version: str = Field(description="of the model; equal versions answer equally")
    verdict: Literal["good", "defect"]
    score: float
    threshold: float = Field(description="scores above it are defects")
    p_value: float = Field(
        description=(
            "share of validation normals that score at least as high, counted with the image itself"
        )
    )
    reading: str = Field(description="the same in words")
    width: int
    height: int
    milliseconds: dict[str, float] = Field(description="read, wait, network, draw, total")
    batch: int = Field(description="images that went through the network together")
    map: MapFile | None = None


class Answers(BaseModel):
    """The answers about the images of a multipart request, in their order."""

    answers: list[ImageAnswer]


class ModelLine(BaseModel):
    category: str
    version: str
    loaded: bool
    threshold: float
    threshold_source: Literal["model", "rate", "value"]
    image_size: list[int] = Field(description="height and width of the network's input")


class ModelList(BaseModel):
    models: list[ModelLine]
    folder: str
    refused: str | None = Field(
        description="why the last winners that should have rolled in were not"
    )


class ThresholdState(BaseModel):
    value: float
    source: Literal["model", "rate", "value"]
    false_reject_rate: float
    supported_rate: float
    interval: list[float | None] = Field(
        description="what the false-reject rate really is, with 95 % confidence"
    )
    normals: int
    models_own: float


class ModelPage(BaseModel):
    category: str
    version: str
    loaded: bool
    trained_on: dict[str, Any]
    image_size: list[int]
    fusion_weight: float
    megabytes: float
    figures: dict[str, float] = Field(
        description="of the test images, where the study that made the model noted them"
    )
    threshold: ThresholdState
    validation_scores: list[float]
    looks: dict[str, list[float]]


class NewThreshold(BaseModel):
    """One of both: a false-reject rate keeps its meaning when new winners roll in, a value holds
    for this version of the model alone.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"minProperties": 1, "maxProperties": 1}
    )

    # absent, never null
    false_reject_rate: float = Field(default=None, gt=0, lt=1)  # type: ignore[assignment]
    value: float = Field(default=None, ge=0, le=1)  # type: ignore[assignment]

    @model_validator(mode="after")
    def _one(self) -> NewThreshold:
        if len(self.model_fields_set) != 1:
            raise ValueError("give false_reject_rate or value, one of both")
        return self


class Problem(BaseModel):
    """Why a request was refused, in one line."""

    model_config = ConfigDict(extra="allow")

    error: str


REASONS = {
    400: "No image, half an image, absurd dimensions, or a body that is not what it says.",
    401: "No token, or a wrong one.",
    403: "The server was started without a token.",
    404: "No such model; the answer lists the categories.",
    406: "An overlay can be answered for one image alone.",
    408: "The body did not arrive before the deadline.",
    413: "More bytes or images than one request may hold.",
    415: "A body of a kind that is not read.",
    422: "Parameters that make no sense.",
    429: "The queue is full: come again after Retry-After seconds.",
    503: "The model can't be used now.",
    504: "There was no answer before the deadline.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of an endpoint, for OpenAPI."""
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
