"""What requests and answers look like: the types of the server's JSON.

The routes build their answers from these models, and FastAPI makes the OpenAPI document from them.
The order of the fields is the order of the keys. Keys that are not set are left out of an answer.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Verdict = Literal["good", "defect"]
MapChoice = Literal["none", "png", "npy", "overlay", "mask"]
ThresholdSource = Literal["model", "rate", "value"]

# ---- inspection ----


class MapFile(BaseModel):
    """A picture or array, in base64."""

    format: Literal["png", "npy", "overlay", "mask"]
    base64: str


class Milliseconds(BaseModel):
    """How long the parts of a request took; ``wait`` is the time in the queue."""

    read: float
    wait: float
    network: float
    draw: float
    total: float


class ImageAnswer(BaseModel):
    """The answer about one image."""

    name: str
    category: str
    version: str = Field(description="of the model; equal versions answer equally")
    verdict: Verdict
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
    milliseconds: Milliseconds
    batch: int = Field(description="images that went through the network together")
    map: MapFile | None = None


class Answers(BaseModel):
    """The answers about the images of a multipart request, in their order."""

    answers: list[ImageAnswer]


# ---- models ----


class ModelLine(BaseModel):
    """A model in the list of models."""

    category: str
    version: str
    loaded: bool
    threshold: float
    threshold_source: ThresholdSource
    refused: str | None = Field(
        description="why the newest version does not serve, or this one can't be loaded"
    )
    threshold_refused: str | None = Field(
        description="why the file of thresholds does not say which one is in force"
    )
    image_size: list[int] = Field(description="height and width of the network's input")


class RefusedModel(BaseModel):
    """A model that lies in the folder and does not serve."""

    category: str | None = Field(description="null: the folder as a whole")
    cause: str
    serves: str | None = Field(description="the version of before, which serves on")


class ModelList(BaseModel):
    """All models of the server."""

    models: list[ModelLine]
    folder: str
    refused: str | None = Field(
        description="why the server refused the newest models, in a line; null if it serves them"
    )
    refusals: list[RefusedModel] = Field(description="the same, one by one")
    left_out: dict[str, str] = Field(
        description="what lies in the folder and is no saved detector, with the cause"
    )


class ThresholdState(BaseModel):
    """A model's threshold: its value, where it comes from, and what it promises."""

    value: float
    source: ThresholdSource
    false_reject_rate: float
    supported_rate: float
    interval: list[float | None] = Field(
        description="low and high of the true false-reject rate, with 95 % confidence"
    )
    normals: int
    models_own: float
    refused: str | None = Field(
        description="why the file of thresholds does not say which one is in force"
    )


class TrainedOn(BaseModel):
    """What a model was trained on."""

    images: int
    backbone: str
    object_mask: str
    data_fingerprint: str
    validation_fingerprint: str
    versions: dict[str, str]
    imported: dict[str, str]


class ModelPage(BaseModel):
    """All that the server knows about a model."""

    category: str
    version: str
    loaded: bool
    refused: str | None = Field(
        description="why the newest version does not serve, or this one can't be loaded"
    )
    trained_on: TrainedOn
    image_size: list[int] = Field(description="height and width of the network's input")
    fusion_weight: float
    megabytes: float
    figures: dict[str, float] = Field(
        description="metrics of the test images, if the study that made the model noted them"
    )
    threshold: ThresholdState
    validation_scores: list[float]
    looks: dict[str, list[float]] = Field(
        description="mean and standard deviation of each image statistic of the validation normals"
    )


class NewThreshold(BaseModel):
    """A false-reject rate, or a value: one of both.

    A false-reject rate keeps its meaning when new models roll in. A value holds for this version of
    the model only.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"minProperties": 1, "maxProperties": 1}
    )

    # None stands for "absent" and is never sent: null is not a number.
    false_reject_rate: float = Field(default=None, gt=0, lt=1)  # type: ignore[assignment]
    value: float = Field(default=None, ge=0, le=1)  # type: ignore[assignment]

    @model_validator(mode="after")
    def _one(self) -> NewThreshold:
        if len(self.model_fields_set) != 1:
            raise ValueError("give false_reject_rate or value, one of both")
        return self


# ---- health and refusals ----


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """The server can be asked about its models."""

    status: Literal["ready"]
    models: int
    loaded: int


class Problem(BaseModel):
    """Why a request was refused, in one line."""

    model_config = ConfigDict(extra="allow")

    error: str


# ---- the Open Inference Protocol ----


class ServerMetadata(BaseModel):
    """The server's name, version and protocol extensions."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """The process answers."""

    live: bool


class ServerReady(BaseModel):
    """The server can be asked about its models."""

    ready: bool


class ModelReady(BaseModel):
    """The server can be asked about this model."""

    name: str
    ready: bool


class RepositoryModel(BaseModel):
    """A model in the repository's index."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class TensorMetadata(BaseModel):
    """An input or output of a model; -1 in the shape stands for any size."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None


class ModelMetadata(BaseModel):
    """A model's versions, inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
