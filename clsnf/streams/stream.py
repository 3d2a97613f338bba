"""Streams: a category's images on the network's canvas, batch by batch, from wherever they lie to
whoever computes with them.

Unusual: a stream decides nothing. Its caller says which images make up every batch, and every
    sample's defect comes from its key, so
that all streams give the same bits in the same order, with however many workers; which one is used
is no part of any content key.

    MemoryStream     images that lie in memory
    LocalStream      decoded over and over by threads of this process, a few batches ahead
    RayStream        read, decoded and given defects by the workers of a Ray cluster
    (:mod:`clsnf.streams.ray_stream`)

B is the images of a batch; images are uint8 (B, 3, H, W), contiguous.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clsnf.core.config import ImageSettings
from clsnf.data.images import Placement, decode_image, image_size, place
from clsnf.data.sources import Reference, read_bytes
from clsnf.synthesis.object_mask import object_masks
from clsnf.synthesis.training_defects import DefectBatch, DefectMaker

_AHEAD = 3  # batches that are under way or lie ready before they are asked for

T = TypeVar("T")
R = TypeVar("R")

Arrays = dict[str, np.ndarray]
Worker = Callable[["ImageBatch"], Arrays]
MakeWorker = Callable[[torch.device], Worker]


@dataclass(frozen=True)
class ImageBatch:
    """Images of a stream: ``valid`` (B, H, W) bool is False on padding, None where no image of the
    stream is padded.
    """

    images: Tensor
    valid: Tensor | None
    indices: Tensor  # int64 (B,), of the stream's images


@dataclass(frozen=True)
class TrainingBatch:
    """A batch with defects, on the device that trains; ``valid`` as in :class:`ImageBatch`."""

    defects: DefectBatch
    valid: Tensor | None
    indices: Tensor


@dataclass(frozen=True)
class DefectRecipe:
    """How defects come into images: what makes them, and where they may lie (``off``, ``dark`` or
    ``bright`` products).
    """

    maker: DefectMaker
    mask_mode: str = "off"

    def apply(
        self, batch: ImageBatch, keys: Tensor, device: torch.device, masks: Tensor | None = None
    ) -> TrainingBatch:
        """The batch with a defect in each image, made on `device`.

        Args:
            keys: int64 (B,), see :func:`clsnf.synthesis.training_defects.sample_key`.
            masks: (B, H, W) bool, the product, where it is known; it is looked for where it is not.
        """
        if masks is None and self.mask_mode != "off":
            masks = object_masks(batch.images, self.mask_mode)
        valid = None if batch.valid is None else batch.valid.to(device)
        where = (
            valid
            if masks is None
            else masks.to(device)
            if valid is None
            else masks.to(device) & valid
        )
        return TrainingBatch(
            self.maker.make(batch.images.to(device), where, keys), valid, batch.indices
        )


class Counters:
    """What a stream did, step by step: ``read``, ``decode`` (with resizing), ``defects``; and how
    long its user waited for batches.

    Attributes:
        images: that were handed out.
        waited: seconds that the user of the stream waited for them.
    """

    def __init__(self) -> None:
        self.images, self.waited = 0, 0.0
        self._steps: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def add(self, step: str, images: int, seconds: float) -> None:
        """Some images took a worker so long at a step."""
        with self._lock:
            before = self._steps.get(step, (0, 0.0))
            self._steps[step] = (before[0] + images, before[1] + seconds)

    def totals(self) -> dict[str, float]:
        """All sums: ``images``, ``waited``, and for each step ``STEP_images`` and ``STEP_seconds``
        of its workers.
        """
        with self._lock:
            steps = dict(self._steps)
        sums: dict[str, float] = {"images": self.images, "waited": self.waited}
        for step, (images, seconds) in steps.items():
            sums |= {f"{step}_images": images, f"{step}_seconds": seconds}
        return sums


class Stream(ABC):
    """N images, as batches of whichever of them are asked for.

    Attributes:
        kind: ``memory``, ``local`` or ``ray``.
        counters: what it did so far.
    """

    kind: str

    def __init__(self) -> None:
        self.counters = Counters()

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @property
    @abstractmethod
    def valid(self) -> Tensor | None:
        """(N, H, W) bool, False on padding; None where no image is padded."""

    @abstractmethod
    def take(self, indices: Tensor) -> Tensor:
        """A few images at once, (K, 3, H, W), read by this process."""

    def load_shared(self, indices: Tensor, device: torch.device) -> Tensor:
        """As :meth:`take`, for images that stay on a device while the stream is used, maybe in
        shared memory: not to be written to.
        """
        return self.take(indices).to(device)

    @abstractmethod
    def _batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        """The batches."""

    def batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        """The batches of these images, in this order: int64 (B,) each. Raises ImageError for one
        that can't be read.
        """
        return self._counted(self._batches(chosen), lambda batch: len(batch.indices))

    def training_batches(
        self,
        recipe: DefectRecipe,
        chosen: Sequence[Tensor],
        keys: Sequence[Tensor],
        device: torch.device,
    ) -> Iterator[TrainingBatch]:
        """The batches with defects from these keys, int64 (B,) each, on `device`."""
        return self._counted(
            self._training_batches(recipe, chosen, keys, device), lambda batch: len(batch.indices)
        )

    def _training_batches(
        self,
        recipe: DefectRecipe,
        chosen: Sequence[Tensor],
        keys: Sequence[Tensor],
        device: torch.device,
    ) -> Iterator[TrainingBatch]:
        for batch, of_batch in zip(self._batches(chosen), keys, strict=True):
            started = time.perf_counter()
            made = recipe.apply(
                batch, of_batch, device, self._object_masks(recipe.mask_mode, batch.indices)
            )
            self.counters.add("defects", len(of_batch), time.perf_counter() - started)
            yield made

    def _object_masks(self, mask_mode: str, indices: Tensor) -> Tensor | None:
        """What the stream knows of the products in these images; None where they must be looked
        for.
        """
        return None

    def map_batches(
        self, make: MakeWorker, chosen: Sequence[Tensor], device: torch.device
    ) -> Iterator[Arrays]:
        """What a worker makes of every batch, in order.

        Args:
            make: gives the worker, on the device that it is told: a function of a batch that gives
                arrays of the batch's length.
            device: this process's.
        """
        worker = make(device)
        for batch in self.batches(chosen):
            yield worker(batch)

    def _counted(self, batches: Iterator[Any], size: Callable[[Any], int]) -> Iterator[Any]:
        """The batches, with the time that their user waits for them."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.counters.waited += time.perf_counter() - started
            if batch is None:
                return
            self.counters.images += size(batch)
            yield batch


def consecutive(n: int, size: int) -> list[Tensor]:
    """All of N images in their order, as batches of `size` at most."""
    return list(torch.arange(n).split(size))


class MemoryStream(Stream):
    """Images that lie in memory.

    Args:
        images: uint8 (N, 3, H, W).
        valid: (N, H, W) bool, or None.
    """

    kind = "memory"

    def __init__(self, images: Tensor, valid: Tensor | None = None) -> None:
        super().__init__()
        self.images, self._valid = images, valid
        self._masks: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    @property
    def valid(self) -> Tensor | None:
        return self._valid

    def take(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def load_shared(self, indices: Tensor, device: torch.device) -> Tensor:
        return (
            self.images.to(device)
            if torch.equal(indices, torch.arange(len(self)))
            else super().load_shared(indices, device)
        )

    def _batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        for indices in chosen:
            yield ImageBatch(
                self.images[indices], None if self._valid is None else self._valid[indices], indices
            )

    def _object_masks(self, mask_mode: str, indices: Tensor) -> Tensor | None:
        if mask_mode == "off":
            return None
        if mask_mode not in self._masks:
            self._masks[mask_mode] = object_masks(self.images, mask_mode)
        return self._masks[mask_mode][indices]


class LocalStream(Stream):
    """Images that threads of this process read and decode whenever they are asked for; decoding
    leaves the interpreter to the others.

    Args:
        paths: N references.
        settings: how they come onto the canvas.
        threads: how many decode; None for one a core.
    """

    kind = "local"

    def __init__(
        self, paths: Sequence[Reference], settings: ImageSettings, threads: int | None = None
    ) -> None:
        super().__init__()
        self.paths, self.settings = list(paths), settings
        self._threads = threads or (os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def _placements(self) -> list[Placement] | None:
        """Where each image lies on the canvas, by the files' headers; None where none is padded."""
        if self.settings.aspect == "squeeze":
            return None
        with ThreadPoolExecutor(self._threads) as pool:
            placements = list(
                pool.map(lambda path: Placement.of(image_size(path), self.settings), self.paths)
            )
        return placements if any(placement.padded for placement in placements) else None

    @property
    def valid(self) -> Tensor | None:
        placements = self._placements
        if placements is None:
            return None
        if len({placement.source for placement in placements}) == 1:
            return placements[0].valid.expand(len(placements), -1, -1)  # one for all
        return torch.stack([placement.valid for placement in placements])

    def take(self, indices: Tensor) -> Tensor:
        taken = torch.empty((len(indices), 3, *self.settings.size), dtype=torch.uint8)
        for batch, into in zip(
            LocalStream._batches(self, indices.split(16)), taken.split(16), strict=True
        ):
            into.copy_(batch.images)
        return taken

    def _batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        padded = self._placements is not None
        for indices, loaded in zip(
            chosen,
            map_in_batches(self._load, (i.tolist() for i in chosen), self._threads),
            strict=True,
        ):
            valid = torch.stack([placement.valid for _, placement in loaded]) if padded else None
            yield ImageBatch(torch.stack([image for image, _ in loaded]), valid, indices)

    def _load(self, index: int) -> tuple[Tensor, Placement]:
        image, placement, seconds = load_timed(self.paths[index], self.settings)
        self.counters.add("read", 1, seconds[0])
        self.counters.add("decode", 1, seconds[1])
        return image, placement


def load_timed(
    path: Reference, settings: ImageSettings
) -> tuple[Tensor, Placement, tuple[float, float]]:
    """An image on the canvas, uint8 (3, H, W), where it lies there, and the seconds that reading
    and decoding it took.
    """
    started = time.perf_counter()
    data = read_bytes(path)
    read = time.perf_counter()
    image, placement = place(decode_image(data, os.fspath(path)), settings)
    return image, placement, (read - started, time.perf_counter() - read)


def map_in_batches(
    work: Callable[[T], R], batches: Iterable[Sequence[T]], threads: int | None = None
) -> Iterator[list[R]]:
    """What threads make of the items of batches, batch by batch in order, a few batches ahead of
    whoever asks.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    under_way: deque[list[Future[R]]] = deque()
    try:
        for batch in batches:
            under_way.append([pool.submit(work, item) for item in batch])
            if len(under_way) > _AHEAD:
                yield [future.result() for future in under_way.popleft()]
        while under_way:
            yield [future.result() for future in under_way.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)
