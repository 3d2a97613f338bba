"""Requests and responses of the Open Inference Protocol, as bytes."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.serving.body_forms import ParsedBody
from clsnf.serving.errors import BadRequest, ContentTooLarge
from clsnf.serving.tensors import OUTPUTS, InferBody, InferResponse, write_response


def read_request(body: bytes, header_length: str | None) -> ParsedBody:
    return InferBody.of(header_length, 16).parse(memoryview(body))


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), st.booleans())
def test_files_survive_the_way_through_the_protocol(files: list[bytes], binary: bool) -> None:
    packed = b"".join(len(f).to_bytes(4, "little") + f for f in files)
    tensor: dict[str, Any] = {"name": "files", "datatype": "BYTES", "shape": [len(files)]}
    if binary:
        tensor["parameters"] = {"binary_data_size": len(packed)}
    else:
        tensor["data"] = [base64.b64encode(f).decode() for f in files]
    text = json.dumps({"inputs": [tensor]}).encode()
    request = read_request(text + packed if binary else text, str(len(text)) if binary else None)
    assert [bytes(request.data[item.start : item.stop]) for item in request.items] == files
    assert request.head is not None
    assert set(request.head.outputs) == set(OUTPUTS)


KEYS = ["inputs", "name", "shape", "datatype", "data", "parameters", "outputs"]
KEYS += ["binary_data_size"]


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.sampled_from(["images", "UINT8", "files"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(KEYS),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    ),
    st.none() | st.text(max_size=4),
)
@settings(max_examples=300)
def test_what_is_no_request_is_refused_never_a_crash(content: Any, length: str | None) -> None:
    for wrapped in (content, {"inputs": [content]}, {"inputs": content}):
        with pytest.raises(BadRequest):
            read_request(json.dumps(wrapped).encode(), length)


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "", "1e3", "١٢"])
def test_a_length_that_is_none_is_refused(length: str) -> None:
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length"):
        read_request(b"{}", length)


def test_counts_are_bounded_before_anything_is_looped_over() -> None:
    bomb: dict[str, Any] = {"name": "files", "datatype": "BYTES", "shape": [16_000_000]}
    bomb["parameters"] = {"binary_data_size": 64_000_000}
    text = json.dumps({"inputs": [bomb]}).encode()
    with pytest.raises(ContentTooLarge, match="at most 16"):
        read_request(text + bytes(64_000_000), str(len(text)))
    bomb["shape"] = [1] * 1_000_000
    with pytest.raises(BadRequest, match="shape"):
        read_request(json.dumps({"inputs": [bomb]}).encode(), None)


def test_outputs_come_as_text_or_binary_as_asked() -> None:
    tensors = {name: np.arange(2) for name in OUTPUTS if name != "map"}
    response = InferResponse("x", "1", "seven", tensors, [np.ones((3, 4), np.float32)] * 2)
    text, raw = write_response(response, {"score": False, "map": True})
    head = json.loads(text)
    assert (head["model_name"], head["model_version"], head["id"]) == ("x", "1", "seven")
    assert head["outputs"][0]["data"] == [0.0, 1.0]
    assert head["outputs"][1]["shape"] == [2, 3, 4]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 96}
    np.testing.assert_array_equal(np.frombuffer(b"".join(raw), "<f4"), np.ones(24))
    text, raw = write_response(response, {"map": False})
    assert (json.loads(text)["outputs"][0]["data"], raw) == ([1.0] * 24, [])
