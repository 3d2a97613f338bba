"""Requests and responses of the Open Inference Protocol, as bytes."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.serving.errors import BadRequest
from clsnf.serving.tensors import OUTPUTS, InferResponse, read_request, write_response


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
    assert list(request.images) == files
    assert set(request.outputs) == set(OUTPUTS)


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


def test_outputs_come_as_text_or_binary_as_asked() -> None:
    tensors = {name: np.arange(2) for name in OUTPUTS} | {"map": np.ones((2, 3, 4))}
    response = InferResponse("x", "1", "seven", tensors)
    body, length = write_response(response, {"score": False, "map": True})
    assert length is not None
    head = json.loads(body[:length])
    assert (head["model_name"], head["model_version"], head["id"]) == ("x", "1", "seven")
    assert head["outputs"][0]["data"] == [0.0, 1.0]
    assert head["outputs"][1]["shape"] == [2, 3, 4]
    np.testing.assert_array_equal(np.frombuffer(body[length:], "<f4"), np.ones(24))
