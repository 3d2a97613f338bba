"""Messages of the Open Inference Protocol over gRPC, and what they say.

Their classes are made from ``open_inference.binpb``, which is ``open_inference.proto`` compiled, in
a pool of their own. Protobuf allows a name once in its default pool, and ``tritonclient[grpc]``,
which may live in the same process, registers the same names there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from clsnf.serving.errors import BadRequest
from clsnf.serving.tensors import (
    FILES,
    OUTPUTS,
    PIXELS,
    InferRequest,
    InferResponse,
    output_tensor,
    request_of,
)

SERVICE = "inference.GRPCInferenceService"
# Fields of a request, those of its inputs included. Each becomes an object when it is parsed.
MAX_FIELDS = 4096
_MAX_SHAPE_BYTES = 1024

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_INPUTS = 5  # of a request
_SHAPE, _CONTENTS = 3, 5  # of an input
_UINT, _FILES = 4, 8  # of its contents


def _read_pool() -> DescriptorPool:
    pool = DescriptorPool()
    compiled = resources.files("clsnf.serving").joinpath("open_inference.binpb").read_bytes()
    for file in FileDescriptorSet.FromString(compiled).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _read_pool()


def message_class(name: str) -> Any:
    """The class of a message, such as ``ModelInferRequest``."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))


def parsed(name: str, data: bytes) -> Any:
    """A message from its bytes. Raises BadRequest."""
    try:
        return message_class(name).FromString(data)
    except DecodeError as error:
        raise BadRequest(f"The message is no {name}: it can't be parsed.") from error


# ---- requests ----


@dataclass(frozen=True)
class InferCall:
    """A call of ModelInfer.

    Attributes:
        category: whose model is asked.
        version: that it must have; None for any.
        request: what to inspect.
    """

    category: str
    version: str | None
    request: InferRequest


def read_call(data: bytes) -> InferCall:
    """The call that the bytes of a ModelInferRequest make. Raises BadRequest."""
    _check_fields(data)
    message = parsed("ModelInferRequest", data)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise BadRequest(
            f"There are {len(raw)} raw_input_contents for {len(message.inputs)} inputs: give one "
            "for each, or none."
        )
    inputs = [
        _input(tensor, raw[index] if raw else None) for index, tensor in enumerate(message.inputs)
    ]
    outputs = [
        {"name": output.name, "parameters": _parameters(output)} for output in message.outputs
    ]
    content = {"id": message.id, "inputs": inputs, "outputs": outputs}
    return InferCall(
        message.model_name, message.model_version or None, request_of(content, b"".join(raw))
    )


def _input(tensor: Any, raw: bytes | None) -> dict[str, Any]:
    """An input as the protocol's JSON describes it."""
    parameters = _parameters(tensor)
    parameters.pop("binary_data_size", None)
    content = {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.shape),
        "parameters": parameters,
    }
    if raw is not None:
        parameters["binary_data_size"] = len(raw)
    elif tensor.name == FILES and tensor.contents.bytes_contents:
        content["data"] = list(tensor.contents.bytes_contents)
    elif tensor.name == PIXELS and tensor.contents.uint_contents:
        values = tensor.contents.uint_contents
        content["data"] = np.fromiter(values, np.uint32, len(values))
    return content


def _parameters(message: Any) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for name, value in message.parameters.items()
    }


def _check_fields(data: bytes) -> None:
    """Refuse a request of more pieces than one can have, before they become objects.

    Raises:
        BadRequest: there are too many, or they are no fields of protobuf.
    """
    left = MAX_FIELDS
    for number, start, end in _fields(data, 0, len(data)):
        left -= 1
        if number == _INPUTS:
            for inner, inner_start, inner_end in _fields(data, start, end):
                left -= 1
                if inner == _SHAPE and inner_end - inner_start > _MAX_SHAPE_BYTES:
                    raise BadRequest("A shape has more sides than any tensor.")
                if inner == _CONTENTS:
                    left = _check_contents(data, inner_start, inner_end, left)
                _check_left(left)
        _check_left(left)


def _check_contents(data: bytes, start: int, end: int, left: int) -> int:
    """What of `left` remains after the contents of an input."""
    for number, _, _ in _fields(data, start, end):
        left -= 1
        _check_left(left)
        if number not in (_UINT, _FILES):
            raise BadRequest(
                f"An input has contents of another type: give {PIXELS!r} uint_contents, {FILES!r} "
                "bytes_contents, or both raw_input_contents."
            )
    return left


def _check_left(left: int) -> None:
    if left < 0:
        raise BadRequest(
            f"The request has more than {MAX_FIELDS} fields: send raw_input_contents, or packed "
            "values."
        )


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of the fields of a message. Raises BadRequest."""
    while position < end:
        key, position = _varint(data, position, end)
        wire = key & 7
        if wire == _VARINT:
            start, (_, position) = position, _varint(data, position, end)
        elif wire == _BYTES:
            length, start = _varint(data, position, end)
            position = start + length
        elif wire in (_FIXED32, _FIXED64):
            start, position = position, position + (4 if wire == _FIXED32 else 8)
        else:
            raise BadRequest("The message is no ModelInferRequest: it can't be parsed.")
        if position > end:
            raise BadRequest("The message is no ModelInferRequest: it is cut short.")
        yield key >> 3, start, position


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """A number and the position after it."""
    value = 0
    for index in range(10):
        if position + index >= end:
            break
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise BadRequest("The message is no ModelInferRequest: it is cut short.")


# ---- responses ----


def write_call(response: InferResponse, names: list[str]) -> bytes:
    """The bytes of a ModelInferResponse with these outputs, their values as raw contents."""
    message = message_class("ModelInferResponse")(
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id or "",
    )
    for name in names:
        values = output_tensor(response, name)
        message.outputs.add(name=name, datatype=OUTPUTS[name], shape=values.shape)
        message.raw_output_contents.append(values.tobytes())
    written: bytes = message.SerializeToString()
    return written
