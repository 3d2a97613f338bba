"""Messages of the Open Inference Protocol over gRPC, and what they say.

Their classes are made from ``open_inference.binpb``, which is ``open_inference.proto`` compiled, in
a pool of their own. Protobuf allows a name once in its default pool, and ``tritonclient[grpc]``,
which may live in the same process, registers the same names there.

Of a request for inference, protobuf parses only what is not image data. The images stay where they
lie in the message, and a message of a million pieces is refused before it becomes objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from clsnf.serving.body_forms import Item, ParsedBody
from clsnf.serving.errors import BadRequest
from clsnf.serving.tensors import (
    FILES,
    OUTPUTS,
    PIXELS,
    InferResponse,
    InputTensor,
    arrays_of,
    checked_request,
)

SERVICE = "inference.GRPCInferenceService"
MAX_FIELDS = 4096  # of a request, those of its inputs included
MAX_HEAD = 64 * 1024  # bytes of a request without its images

Span = tuple[int, int]  # start and end in a message

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_NAME, _VERSION, _INPUTS, _RAW = 1, 2, 5, 7  # of a request
_CONTENTS = 5  # of an input
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
        raise _unreadable(name) from error


def _unreadable(name: str = "ModelInferRequest") -> BadRequest:
    return BadRequest(f"The message is no {name}, or is cut short: it can't be parsed.")


# ---- requests ----


def asked_model(data: bytes) -> tuple[str, str | None]:
    """Category and version (None for any) that a ModelInferRequest names. Raises BadRequest."""
    found: dict[int, Span] = {}
    for count, (number, start, end) in enumerate(_fields(memoryview(data), 0, len(data))):
        if count >= MAX_FIELDS:
            raise _too_many()
        if number in (_NAME, _VERSION):
            found[number] = start, end
    name, version = (data[slice(*found.get(number, (0, 0)))] for number in (_NAME, _VERSION))
    return name.decode("utf-8", "replace"), version.decode("utf-8", "replace") or None


@dataclass(frozen=True)
class GrpcInferBody:
    """A ModelInferRequest, a :class:`clsnf.serving.body_forms.BodyForm`.

    Attributes:
        max_images: that one request may hold.
    """

    max_images: int

    def parse(self, data: memoryview) -> ParsedBody:
        pieces = _Pieces.of(data)
        message = parsed("ModelInferRequest", bytes(pieces.head))
        if pieces.raw and len(pieces.raw) != len(message.inputs):
            raise BadRequest(
                f"There are {len(pieces.raw)} raw_input_contents for {len(message.inputs)} inputs: "
                "give one for each, or none."
            )
        inputs = [
            _input(tensor, pieces.raw[index : index + 1], pieces.contents[index])
            for index, tensor in enumerate(message.inputs)
        ]
        outputs = [
            {"name": output.name, "parameters": _parameters(output)} for output in message.outputs
        ]
        content = {"id": message.id, "inputs": inputs, "outputs": outputs}
        tensor, head = checked_request(content, self.max_images)
        if pieces.raw:
            start, end = pieces.raw[0]
            return ParsedBody(data, tensor.items_within(data[:end], start), head)
        if tensor.name == FILES:
            return ParsedBody(data, _files(tensor), head)
        values = [_numbers(data, span) for span in tensor.data]
        plain, items = tensor.pixels_of(np.concatenate(values))
        return ParsedBody(plain, items, head)


def _input(tensor: Any, raw: list[Span], contents: dict[int, list[Span]]) -> dict[str, Any]:
    """An input as the protocol's JSON describes it; its data are spans."""
    parameters = _parameters(tensor)
    parameters.pop("binary_data_size", None)
    content = {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.shape),
        "parameters": parameters,
    }
    spans = contents.get({PIXELS: _UINT, FILES: _FILES}.get(tensor.name, 0))
    if raw:
        parameters["binary_data_size"] = raw[0][1] - raw[0][0]
    elif spans:
        content["data"] = spans
    elif contents:
        raise BadRequest(
            f"The input {tensor.name[:100]!r} has contents of another type: give {PIXELS!r} "
            f"uint_contents, {FILES!r} bytes_contents, or both raw_input_contents."
        )
    return content


def _parameters(message: Any) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for name, value in message.parameters.items()
    }


def _files(tensor: InputTensor) -> tuple[Item, ...]:
    if len(tensor.data) != tensor.shape[0]:
        raise BadRequest(
            f"The input {FILES!r} has the shape [{tensor.shape[0]}], but holds {len(tensor.data)} "
            "files."
        )
    return tuple(Item(f"image {i}", *span) for i, span in enumerate(tensor.data))


def _numbers(data: memoryview, span: Span) -> np.ndarray:
    """Packed numbers below 2**14, int32; greater ones become greater than any level.

    Each has 7 bits to a byte, the lowest first; the last byte is below 128.
    """
    packed = np.frombuffer(data[slice(*span)], np.uint8)
    ends = np.flatnonzero(packed < 0x80)
    if not len(packed) or not len(ends) or ends[-1] != len(packed) - 1:
        raise _unreadable()
    lengths = np.diff(ends, prepend=-1)
    values = packed[ends].astype(np.int32)
    two = lengths == 2
    values[two] = values[two] << 7 | (packed[ends[two] - 1] & 0x7F)
    values[lengths > 2] = 2**14
    return values


@dataclass
class _Pieces:
    """A request in pieces: small ones that protobuf parses, and where the others lie.

    Attributes:
        head: the request without its images.
        raw: spans of the raw contents.
        contents: of each input, spans by the number of the contents' field.
    """

    head: bytearray = field(default_factory=bytearray)
    raw: list[Span] = field(default_factory=list)
    contents: list[dict[int, list[Span]]] = field(default_factory=list)
    _left: int = MAX_FIELDS

    @classmethod
    def of(cls, data: memoryview) -> _Pieces:
        """The pieces of a ModelInferRequest. Raises BadRequest."""
        pieces, position = cls(), 0
        for number, start, end in _fields(data, 0, len(data)):
            pieces._count()
            if number == _RAW:
                pieces.raw.append((start, end))
            elif number == _INPUTS:
                small = pieces._add_input(data, start, end)
                pieces.head += bytes([_INPUTS << 3 | _BYTES]) + _as_varint(len(small)) + small
            else:
                pieces._keep(pieces.head, data, position, end)
            position = end
        return pieces

    def _add_input(self, data: memoryview, start: int, end: int) -> bytearray:
        """Take an input apart; gives its bytes without contents."""
        small, spans = bytearray(), {}
        position = start
        for number, inner, inner_end in _fields(data, start, end):
            self._count()
            if number == _CONTENTS:
                spans.update(self._contents(data, inner, inner_end))
            else:
                self._keep(small, data, position, inner_end)
            position = inner_end
        self.contents.append(spans)
        return small

    def _contents(self, data: memoryview, start: int, end: int) -> dict[int, list[Span]]:
        spans: dict[int, list[Span]] = {}
        for number, inner, inner_end in _fields(data, start, end):
            self._count()
            spans.setdefault(number, []).append((inner, inner_end))
        return spans

    def _keep(self, head: bytearray, data: memoryview, start: int, end: int) -> None:
        if len(self.head) + len(head) + end - start > MAX_HEAD:
            raise BadRequest(
                f"The request has more than {MAX_HEAD // 1024} KiB beside its images: send these "
                "as raw_input_contents."
            )
        head += data[start:end]

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _too_many()


def _too_many() -> BadRequest:
    return BadRequest(
        f"The request has more than {MAX_FIELDS} fields: send raw_input_contents, or packed values."
    )


def _fields(data: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of the content of each field of a message. Raises BadRequest."""
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
            raise _unreadable()
        if position > end:
            raise _unreadable()
        yield key >> 3, start, position


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    """A number and the position after it."""
    value = 0
    for index in range(10):
        if position + index >= end:
            break
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise _unreadable()


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(parts) + bytes([value])


# ---- responses ----


def written_response(response: InferResponse, names: list[str]) -> bytes:
    """The bytes of a ModelInferResponse with these outputs, their values as raw contents."""
    message = message_class("ModelInferResponse")(
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id or "",
    )
    for name in names:
        arrays, shape = arrays_of(response, name)
        message.outputs.add(name=name, datatype=OUTPUTS[name], shape=shape)
        message.raw_output_contents.append(b"".join(array.data.cast("B") for array in arrays))
    written: bytes = message.SerializeToString()
    return written
