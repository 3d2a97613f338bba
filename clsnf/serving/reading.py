"""Reading and drawing, as the service asks for it: by tasks in the worker processes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from clsnf.core.config import ImageSettings
from clsnf.data.images import Placement
from clsnf.serving.body_forms import FileBody, FrameBody, InferHead
from clsnf.serving.reading_pool import ReadingPool
from clsnf.serving.reading_tasks import DrawMap, Encoded, PlacedImage, ReadBody, WriteTensors
from clsnf.serving.reading_worker import Buffer
from clsnf.serving.schemas import MapChoice
from clsnf.serving.tensors import InferResponse

T = TypeVar("T")


@dataclass(frozen=True)
class RequestBody:
    """A body, and how it is read."""

    source: Encoded
    data: Buffer

    @classmethod
    def of_image(cls, name: str, image: bytes | np.ndarray) -> RequestBody:
        """The body of one image: a file's bytes, or RGB (h, w, 3) uint8."""
        if isinstance(image, bytes):
            return cls(Encoded(FileBody(name), "", len(image)), image)
        height, width, channels = image.shape
        pixels = np.ascontiguousarray(image).reshape(-1).data
        return cls(Encoded(FrameBody((height, width, channels), name), "", len(pixels)), pixels)


@dataclass(frozen=True)
class Picture:
    """A picture that is ready for the network.

    Attributes:
        name: for messages and answers.
        placed: (3, H, W) uint8 on the canvas.
        placement: where it lies there.
        statistics: (5,), see :func:`clsnf.data.image_statistics.statistics_of`.
        body: what it was read from. An overlay decodes it again: the decoded pictures of all
            requests that wait could fill the memory.
        index: of the picture in its body.
    """

    name: str
    placed: torch.Tensor
    placement: Placement
    statistics: np.ndarray
    body: RequestBody
    index: int

    @classmethod
    def of(cls, placed: PlacedImage, pixels: memoryview, body: RequestBody, index: int) -> Picture:
        height, width = placed.placement.canvas
        # (3 * H * W,) -> (3, H, W)
        canvas = torch.frombuffer(pixels, dtype=torch.uint8).view(3, height, width)
        return cls(placed.name, canvas, placed.placement, placed.statistics, body, index)


@dataclass(frozen=True)
class MapStyle:
    """How a map is drawn, see :class:`clsnf.serving.reading_tasks.DrawMap`."""

    choice: MapChoice
    low: float
    threshold: float
    in_base64: bool


class PictureReader:
    """Reads bodies and draws maps in the workers of `pool`.

    Args:
        pool: started by its owner.
        max_megapixels: of one image.
    """

    def __init__(self, pool: ReadingPool, max_megapixels: int) -> None:
        self._pool, self._max_megapixels = pool, max_megapixels

    async def read(
        self, body: RequestBody, settings: ImageSettings, rank: int = 0
    ) -> tuple[list[Picture], InferHead | None]:
        """The pictures of a body, side by side where that pays. Raises RequestError."""
        task = ReadBody(body.source, settings, self._max_megapixels)
        content, pixels = await self._pool.run(task, [body.data], rank)
        if content.placed is not None:
            found = zip(content.placed, pixels, strict=True)
            return [Picture.of(*one, body, i) for i, one in enumerate(found)], content.head
        data = memoryview(body.data)
        parts = [
            RequestBody(
                Encoded(
                    FileBody(item.name) if item.shape is None else FrameBody(item.shape, item.name),
                    "",
                    item.stop - item.start,
                ),
                data[item.start : item.stop],
            )
            for item in content.items
        ]
        return await self.read_all(parts, settings), content.head

    async def read_all(
        self, bodies: Sequence[RequestBody], settings: ImageSettings
    ) -> list[Picture]:
        """The pictures of bodies with one image each, in their order. Raises RequestError."""
        done = await side_by_side(
            [self.read(body, settings, rank) for rank, body in enumerate(bodies)]
        )
        return [picture for pictures, _ in done for picture in pictures]

    async def draw(
        self, pictures: Sequence[Picture], maps: Sequence[np.ndarray], style: MapStyle
    ) -> list[memoryview]:
        """The maps as files, in base64 where the style says so. Raises RequestError.

        Args:
            pictures: of one request.
            maps: of each, (H, W) float32 on the canvas.
            style: its choice is not ``none``.
        """

        async def draw_one(rank: int, picture: Picture, score_map: np.ndarray) -> memoryview:
            task = DrawMap(
                picture.placement,
                style.choice,
                style.low,
                style.threshold,
                style.in_base64,
                picture.body.source,
                picture.index,
            )
            buffers: list[Buffer] = [bytes_of(score_map)]
            if style.choice == "overlay":
                buffers.append(picture.body.data)
            return (await self._pool.run(task, buffers, rank, trusted=True)).buffers[0]

        pairs = zip(pictures, maps, strict=True)
        return await side_by_side([draw_one(i, *pair) for i, pair in enumerate(pairs)])

    async def write(
        self, response: InferResponse, outputs: dict[str, bool]
    ) -> tuple[Buffer, Sequence[Buffer]]:
        """:func:`clsnf.serving.tensors.write_response`, where the JSON may be long."""
        maps = response.maps
        task = WriteTensors(replace(response, maps=()), outputs, maps[0].shape)
        _, (text, *raw) = await self._pool.run(task, [bytes_of(one) for one in maps], trusted=True)
        return text, raw

    async def probe(self) -> None:
        """Read a small frame. Raises RequestError where no worker can."""
        frame = np.zeros((32, 32, 3), np.uint8)
        await self.read(RequestBody.of_image("the probe", frame), ImageSettings(32, 32))


def bytes_of(values: np.ndarray) -> memoryview:
    """The bytes of an array, float32, in C order."""
    return np.ascontiguousarray(values, "<f4").reshape(-1).data.cast("B")


def pixels_of(pictures: Sequence[Picture]) -> int:
    """Pixels of the images that pictures were read from, and so of their maps."""
    return sum(math.prod(picture.placement.source) for picture in pictures)


async def side_by_side(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all; the first error ends the others."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
