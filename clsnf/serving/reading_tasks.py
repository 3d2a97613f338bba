"""What workers of :mod:`clsnf.serving.reading_pool` do: read pictures, draw maps, write tensors.

This module is imported by processes that shall start fast and stay small: no detector, no Ray.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clsnf.core.config import ImageSettings
from clsnf.data.images import Placement, png_bytes, restore_map
from clsnf.evaluation.pictures import heat_map, overlay, resized
from clsnf.serving.body_forms import (
    BodyForm,
    FileBody,
    InferHead,
    Item,
    ParsedBody,
    decompressed,
)
from clsnf.serving.preprocess import decode_item, place_item
from clsnf.serving.reading_worker import Buffer
from clsnf.serving.schemas import MapChoice
from clsnf.serving.tensors import InferResponse, write_response

_APART = 2**18  # images of a body with more bytes are read side by side


@dataclass(frozen=True)
class Encoded:
    """How the bytes of a body are read.

    Attributes:
        form: of the body.
        encoding: ``gzip``, ``deflate`` or ``""``.
        limit: bytes that it may have without the encoding.
    """

    form: BodyForm
    encoding: str
    limit: int

    def parse(self, body: memoryview) -> ParsedBody:
        return self.form.parse(decompressed(body, self.encoding, self.limit))


@dataclass(frozen=True)
class PlacedImage:
    """An image on the canvas; its pixels come beside it.

    Attributes:
        name: for answers.
        placement: where it lies.
        statistics: (5,), see :func:`clsnf.data.image_statistics.statistics_of`.
    """

    name: str
    placement: Placement
    statistics: np.ndarray


@dataclass(frozen=True)
class BodyContent:
    """What is in a body.

    Attributes:
        items: where its images lie.
        head: of an inference request.
        placed: its images; None where they shall be read side by side, each from its part.
    """

    items: tuple[Item, ...]
    head: InferHead | None
    placed: tuple[PlacedImage, ...] | None


@dataclass(frozen=True)
class ReadBody:
    """Read the images of a body; the buffers are their pixels, (3, H, W) uint8 each."""

    source: Encoded
    image: ImageSettings
    max_megapixels: int

    def run(self, buffers: Sequence[memoryview]) -> tuple[BodyContent, Sequence[Buffer]]:
        (body,) = buffers
        parsed = self.source.parse(body)
        if len(parsed.items) > 1 and parsed.data is body and len(body) > _APART:
            return BodyContent(parsed.items, parsed.head, None), []
        placed, pixels = [], []
        for item in parsed.items:
            canvas, placement, statistics = place_item(
                parsed.data, item, self.image, self.max_megapixels
            )
            placed.append(PlacedImage(item.name, placement, statistics))
            pixels.append(canvas.numpy().reshape(-1).data)
        return BodyContent(parsed.items, parsed.head, tuple(placed)), pixels


@dataclass(frozen=True)
class DrawMap:
    """Draw the map of one image as a file.

    The buffers are the map on the canvas, float32, and for an overlay the body of the image.

    Attributes:
        placement: of the image.
        choice: not ``none``.
        size: (height, width) of the file.
        low, threshold: values of the map, see :func:`clsnf.evaluation.pictures.overlay`.
        in_base64: whether the answer holds the file so.
        source: of the image; for an overlay.
        index: of the image in its body.
    """

    placement: Placement
    choice: MapChoice
    size: tuple[int, int]
    low: float
    threshold: float
    in_base64: bool
    source: Encoded
    index: int

    def run(self, buffers: Sequence[memoryview]) -> tuple[None, list[Buffer]]:
        canvas_map = np.frombuffer(buffers[0], np.float32).reshape(self.placement.canvas)
        score_map = restore_map(canvas_map, self.placement, self.size)
        if self.choice == "npy":
            file = io.BytesIO()
            np.save(file, score_map, allow_pickle=False)
            drawn = file.getvalue()
        elif self.choice == "mask":
            drawn = png_bytes(np.where(score_map > self.threshold, np.uint8(255), np.uint8(0)))
        elif self.choice == "png":
            drawn = png_bytes(heat_map(score_map, self.low, 1.2 * self.threshold))
        else:
            parsed = self.source.parse(buffers[1])
            image = resized(decode_item(parsed.data, parsed.items[self.index]), self.size)
            drawn = png_bytes(overlay(image, score_map, self.low, self.threshold))
        return None, [base64.b64encode(drawn) if self.in_base64 else drawn]


@dataclass(frozen=True)
class WriteTensors:
    """Write an inference response; the buffers are its JSON and its binary data.

    Attributes:
        response: without its maps, which are the buffers, float32.
        outputs: as in :class:`clsnf.serving.body_forms.InferHead`.
        map_shape: (H, W).
    """

    response: InferResponse
    outputs: dict[str, bool]
    map_shape: tuple[int, int]

    def run(self, buffers: Sequence[memoryview]) -> tuple[None, list[Buffer]]:
        maps = [np.frombuffer(buffer, "<f4").reshape(self.map_shape) for buffer in buffers]
        text, raw = write_response(replace(self.response, maps=maps), self.outputs)
        return None, [text, *raw]


def warm_up() -> None:
    """Run each part once: libraries prepare much on their first use."""
    image = np.zeros((48, 64, 3), np.uint8)
    source = Encoded(FileBody(), "", 2**20)
    settings = ImageSettings(32, 32)
    body = memoryview(png_bytes(image))
    content, _ = ReadBody(source, settings, 1).run([body])
    assert content.placed is not None
    score_map = np.zeros(1024, np.float32).data.cast("B")
    draw = DrawMap(content.placed[0].placement, "overlay", (48, 64), 0.0, 1.0, True, source, 0)
    draw.run([score_map, body])
