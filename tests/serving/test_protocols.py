"""Clients that others wrote: Triton's for v2, schemathesis on the OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import schemathesis
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from tritonclient.utils import InferenceServerException

from clsnf.detector import Detector, Prediction
from tests.support.small_server import TOKEN, encoded, http_server, picture, small_settings


@pytest.fixture(scope="module")
def server(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "token").write_text(TOKEN)
    made = small_settings(
        winners, state=str(folder / "state"), token_file=str(folder / "token"), max_megabytes=2
    )
    with http_server(made) as address:
        yield address


# ---- Triton's client, unmodified ----


@pytest.fixture
def client(server: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server) as client:
        yield client


@pytest.fixture(scope="module")
def plate(winners: Path) -> Detector:
    return Detector.load(winners / "plate", device="cpu")


def pixels(images: list[np.ndarray], binary: bool = True) -> triton.InferInput:
    stack = np.stack(images)
    asked = triton.InferInput("images", list(stack.shape), "UINT8")
    asked.set_data_from_numpy(stack, binary_data=binary)
    return asked


def check(result: triton.InferResult, expected: Prediction, threshold: float) -> None:
    np.testing.assert_allclose(result.as_numpy("score"), expected.scores, atol=1e-6)
    np.testing.assert_array_equal(result.as_numpy("verdict"), expected.verdicts)
    np.testing.assert_allclose(result.as_numpy("map"), expected.maps, atol=1e-5)
    np.testing.assert_allclose(
        result.as_numpy("threshold"), np.full(len(expected.scores), threshold), rtol=1e-6
    )


@pytest.mark.parametrize("binary", [True, False])
def test_pixels_get_what_the_detector_gives(
    client: triton.InferenceServerClient, plate: Detector, binary: bool
) -> None:
    images = [picture(seed) for seed in range(3)]
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary)
        for name in ("score", "verdict", "map", "threshold")
    ]
    result = client.infer("plate", [pixels(images, binary)], outputs=outputs, request_id="seven")
    check(result, plate.predict(images), plate.threshold.value)
    assert result.get_response()["id"] == "seven"
    assert (
        result.get_response()["model_version"] == client.get_model_metadata("plate")["versions"][0]
    )


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_files_of_any_size_get_what_the_detector_gives(
    client: triton.InferenceServerClient, plate: Detector, compression: str | None
) -> None:
    images = [picture(1, (50, 90)), picture(2, (64, 64))]
    asked = triton.InferInput("files", [2], "BYTES")
    asked.set_data_from_numpy(np.array([encoded(image) for image in images], dtype=np.object_))
    result = client.infer(
        "plate",
        [asked],
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    check(result, plate.predict(images), plate.threshold.value)
    assert result.as_numpy("p_value").shape == (2,)


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("plate")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata()["name"] == "clsnf"
    metadata = client.get_model_metadata("sheet")
    assert {i["name"]: i["datatype"] for i in metadata["inputs"]} == {
        "images": "UINT8",
        "files": "BYTES",
    }
    assert next(o for o in metadata["outputs"] if o["name"] == "map")["shape"] == [-1, 64, 96]
    assert {m["name"] for m in client.get_model_repository_index()} == {"plate", "sheet"}
    assert client.is_model_ready("sheet", metadata["versions"][0])
    with pytest.raises(InferenceServerException, match="no version"):
        client.get_model_metadata("sheet", "another")


def test_what_cannot_be_asked_is_said(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="There is no model"):
        client.infer("nothing", [pixels([picture()])])
    wrong = triton.InferInput("images", [1, 64, 64, 3], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(InferenceServerException, match="UINT8"):
        client.infer("plate", [wrong])
    with pytest.raises(InferenceServerException, match="no output"):
        client.infer(
            "plate", [pixels([picture()])], outputs=[triton.InferRequestedOutput("logits")]
        )
    with pytest.raises(InferenceServerException, match="each side"):
        client.infer("plate", [pixels([picture(size=(4, 40))])])
    with pytest.raises(InferenceServerException, match="at most 16"):
        client.infer("plate", [pixels([picture(size=(16, 16))] * 17)])


# ---- the OpenAPI document ----


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def test_every_answer_is_one_that_the_document_names(server: str) -> None:
    document = schemathesis.openapi.from_url(f"http://{server}/openapi.json")
    operations: list[Any] = [operation.ok() for operation in document.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 15
    statuses: dict[str, set[int]] = {}
    for operation in operations:
        found = statuses.setdefault(operation.label, set())
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            ask_all(operation, mode, found)
    assert all(statuses.values()), "every operation was asked"
    assert {200, 400, 404, 422} <= set().union(*statuses.values())


def test_generators_of_clients_find_all_they_need(server: str) -> None:
    with urlopen(f"http://{server}/openapi.json") as answer:
        document = json.load(answer)
    operations = [o for path in document["paths"].values() for o in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    # Others have no code for bodies of type image/png, and leave the whole body out.
    known = {"application/json", "application/octet-stream", "multipart/form-data"}
    bodies = [set(o["requestBody"]["content"]) for o in operations if "requestBody" in o]
    assert len(bodies) == 5
    assert all(body <= known for body in bodies)
    for operation in operations:
        for status, answered in operation["responses"].items():
            schema = str(answered["content"])
            assert ("Problem" in schema) == (int(status) >= 400), (operation["operationId"], status)
    assert "HTTPValidationError" not in str(document)
    assert [a for a in mappings(document) if a.get("type") == "array" and "items" not in a] == []
    references = re.findall(r"#/components/schemas/(\w+)", str(document))
    assert set(references) <= set(document["components"]["schemas"])


def mappings(content: Any) -> Iterator[dict[str, Any]]:
    """All mappings within a document."""
    if isinstance(content, dict):
        yield content
    for part in content.values() if isinstance(content, dict) else content:
        if isinstance(part, dict | list):
            yield from mappings(part)


def ask_all(operation: Any, mode: GenerationMode, statuses: set[int]) -> None:
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    @settings(
        max_examples=12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    def ask(case: Any, known: bool) -> None:
        if (
            known and "category" in case.path_parameters
        ):  # a random name is hardly ever that of a model
            case.path_parameters["category"] = "plate"
        answer = case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {TOKEN}"})
        statuses.add(answer.status_code)

    with suppress(Unsatisfiable):  # nothing about this operation can be wrong
        ask()
