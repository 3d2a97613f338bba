"""Tensors of the Open Inference Protocol (KServe v2), as JSON or with Triton's binary extension.

Source: the protocol's REST specification of KServe, and Triton's "binary tensor data" extension.
The JSON comes first, its length in the header ``Inference-Header-Content-Length``, then the bytes
of the tensors, in the order of those that say ``binary_data_size``.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clsnf.serving.errors import BadRequest

PIXELS, FILES = "images", "files"
INPUTS = {PIXELS: "UINT8", FILES: "BYTES"}  # datatypes
OUTPUTS = {
    "score": "FP32",
    "threshold": "FP32",
    "verdict": "BOOL",
    "p_value": "FP32",
    "map": "FP32",
}


@dataclass(frozen=True)
class InferRequest:
    """An inference request.

    Attributes:
        id: of the request; the response repeats it.
        images: N RGB arrays (h, w, 3) uint8, or N files' bytes.
        outputs: names of the outputs, each with whether it shall come as binary data.
    """

    id: str | None
    images: Sequence[np.ndarray | bytes]
    outputs: dict[str, bool]


@dataclass(frozen=True)
class InferResponse:
    """An inference response; `outputs` holds all of :data:`OUTPUTS`, also those not asked for."""

    model_name: str
    model_version: str
    id: str | None
    outputs: dict[str, np.ndarray]


def read_request(body: bytes, header_length: str | None) -> InferRequest:
    """The request in a body; `header_length` is the header's text. Raises BadRequest."""
    text, binary = _split(body, header_length)
    return request_of(_parse(text), binary)


def request_of(content: dict[str, Any], binary: bytes) -> InferRequest:
    """The request that `content` describes, as the JSON has it; raises BadRequest.

    Args:
        content: with a list of ``inputs``. The files of :data:`FILES` may be bytes too.
        binary: of the tensors that say ``binary_data_size``, in their order.
    """
    tensors = _read_tensors(content["inputs"], binary)
    if len(tensors) != 1:
        raise BadRequest(
            f"There are {len(tensors)} inputs: give one, either {PIXELS!r} (UINT8) or {FILES!r} "
            "(BYTES)."
        )
    request_id = content.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadRequest("id must be a text.")
    return InferRequest(request_id, tensors[0].images(), _outputs(content))


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """The JSON and the binary data of a body."""
    if header_length is None:
        return body, b""
    if not header_length.isdecimal() or int(header_length) > len(body):
        raise BadRequest(
            f"Inference-Header-Content-Length is {header_length[:30]!r}, the body has "
            f"{len(body)} bytes."
        )
    return body[: int(header_length)], body[int(header_length) :]


def _parse(text: bytes) -> dict[str, Any]:
    """The JSON of a request, with a list of ``inputs``."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(
            f"The body is no JSON ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        raise BadRequest(
            'The body must be {"inputs": [...]}, as the Open Inference Protocol has it.'
        )
    return content


def _read_tensors(inputs: list[Any], binary: bytes) -> list[_Tensor]:
    """The inputs, those with binary data filled from it, in order."""
    tensors = []
    for content in inputs:
        tensor = _Tensor.of(content)
        if tensor.binary is not None:
            if tensor.binary > len(binary):
                raise BadRequest(
                    f"The input {tensor.name!r} announces {tensor.binary} bytes, {len(binary)} "
                    "are left in the body."
                )
            size = tensor.binary
            tensor, binary = tensor.filled(binary[:size]), binary[size:]
        tensors.append(tensor)
    if binary:
        raise BadRequest(f"{len(binary)} bytes of the body belong to no input.")
    return tensors


@dataclass(frozen=True)
class _Tensor:
    """An input; `binary` counts the bytes after the JSON that belong to it, None where none do."""

    name: str
    shape: tuple[int, ...]
    data: Any
    binary: int | None

    @classmethod
    def of(cls, content: Any) -> _Tensor:
        """The tensor that an entry of ``inputs`` describes, checked. Raises BadRequest."""
        if not isinstance(content, dict):
            raise BadRequest("An input must be an object with name, shape, datatype and data.")
        name, shape = content.get("name"), content.get("shape")
        parameters = content.get("parameters") or {}
        if name not in (PIXELS, FILES):
            raise BadRequest(
                f"There is no input {str(name)[:100]!r}: give {PIXELS!r} (UINT8) or {FILES!r} "
                "(BYTES)."
            )
        expected = INPUTS[name]
        if content.get("datatype") != expected:
            raise BadRequest(
                f"The input {name!r} has the datatype {str(content.get('datatype'))[:30]!r}: it "
                f"must be {expected}."
            )
        if not isinstance(shape, list) or not all(
            type(side) is int and 0 < side < 2**31 for side in shape
        ):
            raise BadRequest(f"The shape of {name!r} must be a list of whole numbers above 0.")
        if not isinstance(parameters, dict) or "shared_memory_region" in parameters:
            raise BadRequest("Shared memory is not offered: send the tensor's data in the body.")
        if len(shape) != (4 if name == PIXELS else 1) or (name == PIXELS and shape[3] != 3):
            raise BadRequest(
                f"The input {name!r} has the shape {shape}: it must be "
                f"{'[N, height, width, 3]' if name == PIXELS else '[N]'}."
            )
        binary = parameters.get("binary_data_size")
        if binary is not None and (type(binary) is not int or binary < 0):
            raise BadRequest("binary_data_size must be a whole number.")
        if binary is None and "data" not in content:
            raise BadRequest(f"The input {name!r} has no data.")
        return cls(name, tuple(shape), content.get("data"), binary)

    def filled(self, raw: bytes) -> _Tensor:
        """The tensor with its binary data."""
        return _Tensor(self.name, self.shape, raw, len(raw))

    def images(self) -> Sequence[np.ndarray | bytes]:
        """N RGB arrays (h, w, 3) uint8, or N files' bytes. Raises BadRequest."""
        if self.name == PIXELS:
            return list(self._pixels())
        files = _unpacked(self.data) if self.binary is not None else _files(self.data)
        if len(files) != self.shape[0]:
            raise BadRequest(
                f"The input {FILES!r} has the shape [{self.shape[0]}], but holds {len(files)} "
                "files."
            )
        return files

    def _pixels(self) -> np.ndarray:
        """(N, h, w, 3) uint8."""
        count = 1
        for side in self.shape:
            count *= side
        if self.binary is not None:
            values = np.frombuffer(bytearray(self.data), np.uint8)  # writable, as torch wants it
        else:
            try:
                values = np.asarray(self.data)
            except (ValueError, OverflowError, RecursionError) as error:
                raise BadRequest(f"The data of {PIXELS!r} are no array of numbers.") from error
            if values.dtype.kind not in "iu" or (
                values.size and (values.min() < 0 or values.max() > 255)
            ):
                raise BadRequest(f"The data of {PIXELS!r} must be whole numbers from 0 to 255.")
        if values.size != count:
            raise BadRequest(
                f"The input {PIXELS!r} has the shape {list(self.shape)}, but {values.size} values."
            )
        return values.astype(np.uint8, copy=False).reshape(self.shape)


def _unpacked(raw: bytes) -> list[bytes]:
    """Byte strings, each after its length in 4 bytes, little-endian."""
    found, position = [], 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise BadRequest(f"The input {FILES!r} is cut short within a length.")
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        if position + length > len(raw):
            raise BadRequest(f"The input {FILES!r} is cut short within a file.")
        found.append(raw[position : position + length])
        position += length
    return found


def _files(data: Any) -> list[bytes]:
    """Files in base64, or as they are, which JSON can't hold."""
    if isinstance(data, list) and data and all(isinstance(file, bytes) for file in data):
        return data
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise BadRequest(
            f"The data of {FILES!r} must be a list of texts: files in base64. Binary data spare "
            "that."
        )
    try:
        return [base64.b64decode(text, validate=True) for text in data]
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"The data of {FILES!r} are no base64 ({error}).") from error


def _outputs(content: dict[str, Any]) -> dict[str, bool]:
    """Names of outputs and whether they are binary; all of them where the request names none."""
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest("parameters must be an object.")
    binary = parameters.get("binary_data_output", False) is True
    asked = content.get("outputs")
    if asked is None or asked == []:
        return dict.fromkeys(OUTPUTS, binary)
    if not isinstance(asked, list):
        raise BadRequest("outputs must be a list.")
    outputs = {}
    for output in asked:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in OUTPUTS:
            raise BadRequest(
                f"There is no output {str(name)[:100]!r}: there are {', '.join(OUTPUTS)}."
            )
        own = output.get("parameters") or {}
        if not isinstance(own, dict) or "classification" in own or "shared_memory_region" in own:
            raise BadRequest(f"The output {name!r} can be asked for with binary_data alone.")
        outputs[name] = bool(own.get("binary_data", binary))
    return outputs


_TYPES = {"FP32": np.dtype("<f4"), "BOOL": np.dtype("?")}


def output_tensor(response: InferResponse, name: str) -> np.ndarray:
    """An output in the bytes that go over the wire."""
    return np.ascontiguousarray(response.outputs[name], _TYPES[OUTPUTS[name]])


def write_response(response: InferResponse, outputs: dict[str, bool]) -> tuple[bytes, int | None]:
    """A response's body, and the length of its JSON where binary data follow (else None).

    Args:
        response: to write.
        outputs: those to write, each with whether it comes as binary data.
    """
    described, raw = [], []
    for name, binary in outputs.items():
        values = output_tensor(response, name)
        entry: dict[str, Any] = {
            "name": name,
            "datatype": OUTPUTS[name],
            "shape": list(values.shape),
        }
        if binary:
            raw.append(values.tobytes())
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            entry["data"] = values.ravel().tolist()
        described.append(entry)
    head = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id is not None:
        head["id"] = response.id
    text = json.dumps({**head, "outputs": described}).encode()
    return b"".join((text, *raw)), len(text) if raw else None
