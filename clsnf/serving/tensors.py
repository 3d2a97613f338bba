"""Tensors of the Open Inference Protocol (KServe v2), as JSON or with Triton's binary extension.

Source: the protocol's REST specification of KServe, and Triton's "binary tensor data" extension.
The JSON comes first, its length in the header ``Inference-Header-Content-Length``, then the bytes
of the tensors, in the order of those that say ``binary_data_size``.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from clsnf.serving.body_forms import InferHead, Item, ParsedBody, too_many_images
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


_MOST_SIDES = 8  # of a shape, whatever its input
_MOST_DIGITS = 12  # of the length of the JSON


@dataclass(frozen=True)
class InferBody:
    """The body of an inference request, a :class:`clsnf.serving.body_forms.BodyForm`.

    Attributes:
        json_length: bytes of the JSON that binary data follow; None where all is JSON.
        max_images: that one request may hold.
    """

    json_length: int | None
    max_images: int

    @classmethod
    def of(cls, header_length: str | None, max_images: int) -> InferBody:
        """The form for a value of the header, or none. Raises BadRequest."""
        if header_length is None:
            return cls(None, max_images)
        if not header_length.isdecimal() or len(header_length) > _MOST_DIGITS:
            raise BadRequest(
                f"Inference-Header-Content-Length is {header_length[:30]!r}: it must be the bytes "
                "of the JSON."
            )
        return cls(int(header_length), max_images)

    def parse(self, data: memoryview) -> ParsedBody:
        length = len(data) if self.json_length is None else self.json_length
        if length > len(data):
            raise BadRequest(
                f"Inference-Header-Content-Length is {length}, the body has {len(data)} bytes."
            )
        tensor, head = checked_request(_parse(data[:length]), self.max_images)
        left = len(data) - length
        if (tensor.binary or 0) > left:
            raise BadRequest(
                f"The input {tensor.name!r} announces {tensor.binary} bytes, {left} are left in "
                "the body."
            )
        if (tensor.binary or 0) < left:
            raise BadRequest(f"{left - (tensor.binary or 0)} bytes of the body belong to no input.")
        if tensor.binary is not None:
            return ParsedBody(data, tensor.items_within(data, length), head)
        plain, items = tensor.items_of_json()
        return ParsedBody(plain, items, head)


def checked_request(content: dict[str, Any], max_images: int) -> tuple[InputTensor, InferHead]:
    """The one input of a request, and what it asks for beside.

    Args:
        content: as the JSON has it, with a list of ``inputs``.
        max_images: that one request may hold.

    Raises:
        BadRequest, ContentTooLarge.
    """
    inputs = content["inputs"]
    if len(inputs) != 1:
        raise BadRequest(
            f"There are {len(inputs)} inputs: give one, either {PIXELS!r} (UINT8) or {FILES!r} "
            "(BYTES)."
        )
    tensor = InputTensor.of(inputs[0])
    if tensor.shape[0] > max_images:
        raise too_many_images(max_images)
    return tensor, InferHead(_id(content), _outputs(content))


@dataclass(frozen=True)
class InferResponse:
    """An inference response.

    Attributes:
        model_name, model_version, id: as the response names them.
        outputs: (N,) each, all but ``map``, also those that were not asked for.
        maps: N, (H, W) float32.
    """

    model_name: str
    model_version: str
    id: str | None
    outputs: Mapping[str, np.ndarray]
    maps: Sequence[np.ndarray]


def _parse(text: memoryview) -> dict[str, Any]:
    """The JSON of a request, with a list of ``inputs``."""
    try:
        content = orjson.loads(text)
    except ValueError as error:
        raise BadRequest(f"The body is no JSON ({str(error)[:200]}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        raise BadRequest(
            'The body must be {"inputs": [...]}, as the Open Inference Protocol has it.'
        )
    return content


def _id(content: dict[str, Any]) -> str | None:
    found = content.get("id")
    if found is not None and not isinstance(found, str):
        raise BadRequest("id must be a text.")
    return found


@dataclass(frozen=True)
class InputTensor:
    """An input; `binary` counts the bytes after the JSON that belong to it, None where none do."""

    name: str
    shape: tuple[int, ...]
    data: Any
    binary: int | None

    @classmethod
    def of(cls, content: Any) -> InputTensor:
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
        if (
            not isinstance(shape, list)
            or len(shape) > _MOST_SIDES
            or not all(type(side) is int and 0 < side < 2**31 for side in shape)
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

    def items_within(self, body: memoryview, start: int) -> tuple[Item, ...]:
        """The images of binary data, which begin at `start` and end with the body."""
        if self.name == PIXELS:
            self._check_count(len(body) - start)
            return self._pixel_items(start)
        items = []
        for index in range(self.shape[0]):
            if start + 4 > len(body):
                raise BadRequest(
                    f"The input {FILES!r} has the shape [{self.shape[0]}], but holds {index} files."
                )
            (length,) = struct.unpack_from("<I", body, start)
            start += 4
            if start + length > len(body):
                raise BadRequest(f"The input {FILES!r} is cut short within a file.")
            items.append(Item(f"image {index}", start, start + length))
            start += length
        if start != len(body):
            raise BadRequest(
                f"The input {FILES!r} has the shape [{self.shape[0]}], but {len(body) - start} "
                "bytes follow its files."
            )
        return tuple(items)

    def items_of_json(self) -> tuple[memoryview, tuple[Item, ...]]:
        """The images of JSON data, and the bytes that they lie in."""
        if self.name == PIXELS:
            return self.pixels_of(self.data)
        data = self.data
        if not isinstance(data, list) or len(data) != self.shape[0]:
            raise BadRequest(
                f"The input {FILES!r} has the shape [{self.shape[0]}]: its data must be a list of "
                "as many texts, files in base64. Binary data spare that."
            )
        items, start, files = [], 0, []
        for index, text in enumerate(data):
            files.append(_from_base64(text))
            items.append(Item(f"image {index}", start, start + len(files[-1])))
            start += len(files[-1])
        return memoryview(b"".join(files)), tuple(items)

    def _pixel_items(self, start: int) -> tuple[Item, ...]:
        images, height, width, channels = self.shape
        size = height * width * channels
        return tuple(
            Item(f"image {i}", start + i * size, start + (i + 1) * size, (height, width, channels))
            for i in range(images)
        )

    def _check_count(self, values: int) -> None:
        if values != math.prod(self.shape):
            raise BadRequest(
                f"The input {PIXELS!r} has the shape {list(self.shape)}, but {values} values."
            )

    def pixels_of(self, numbers: Any) -> tuple[memoryview, tuple[Item, ...]]:
        """The images of an array of numbers, and the bytes that they lie in. Raises BadRequest."""
        try:
            values = np.asarray(numbers)
        except (ValueError, OverflowError, RecursionError) as error:
            raise BadRequest(f"The data of {PIXELS!r} are no array of numbers.") from error
        if values.dtype.kind not in "iu" or (
            values.size and (values.min() < 0 or values.max() > 255)
        ):
            raise BadRequest(f"The data of {PIXELS!r} must be whole numbers from 0 to 255.")
        self._check_count(values.size)
        return values.astype(np.uint8).ravel().data, self._pixel_items(0)


def _from_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise BadRequest(f"The data of {FILES!r} must be texts: files in base64.")
    try:
        return base64.b64decode(text, validate=True)
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
    if not isinstance(asked, list) or len(asked) > len(OUTPUTS):
        raise BadRequest(f"outputs must be a list of at most {len(OUTPUTS)}.")
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


def arrays_of(response: InferResponse, name: str) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """An output as arrays whose bytes follow each other on the wire, and its shape."""
    found = response.maps if name == "map" else [response.outputs[name]]
    arrays = [np.ascontiguousarray(values, _TYPES[OUTPUTS[name]]).reshape(-1) for values in found]
    return arrays, (len(found), *found[0].shape) if name == "map" else found[0].shape


def write_response(
    response: InferResponse, outputs: dict[str, bool]
) -> tuple[bytes, list[memoryview]]:
    """A response's JSON, and the binary data that follow it.

    Args:
        response: to write.
        outputs: those to write, each with whether it comes as binary data.
    """
    described: list[dict[str, Any]] = []
    raw: list[memoryview] = []
    for name, binary in outputs.items():
        arrays, shape = arrays_of(response, name)
        entry: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": list(shape)}
        if binary:
            raw += [values.data.cast("B") for values in arrays]
            entry["parameters"] = {"binary_data_size": sum(a.nbytes for a in arrays)}
        else:
            entry["data"] = np.concatenate(arrays)
        described.append(entry)
    head = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id is not None:
        head["id"] = response.id
    text = orjson.dumps({**head, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    return text, raw
