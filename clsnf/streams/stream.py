"""Streams: the images of a category, batch by batch, at the size of the network's input.

A stream decides nothing. Its caller says which images make up every batch, and the defect of a
sample comes from its key. So all streams give the same bits in the same order, with any number of
workers, and no content key depends on which stream is used.

    MemoryStream     images that lie in memory
    LocalStream      images that threads of this process decode again in every epoch, a few
                     batches ahead
    RayStream        images that the workers of a Ray cluster read, decode and give defects
                     (:mod:`clsnf.streams.ray_stream`)

B is the number of images of a batch; images are uint8 (B, 3, H, W), contiguous.
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
from clsnf.data.images import Placement, decode_placed, image_size
from clsnf.data.sources import Reference, read_bytes
from clsnf.synthesis.object_mask import object_masks
from clsnf.synthesis.training_defects import DefectBatch, DefectMaker

_AHEAD = 3  # batches that are worked on, or are ready, before they are asked for

T = TypeVar("T")
R = TypeVar("R")

Arrays = dict[str, np.ndarray]
Worker = Callable[["ImageBatch"], Arrays]
MakeWorker = Callable[[torch.device], Worker]


@dataclass(frozen=True)
class ImageBatch:
    """Images of a stream.

    Attributes:
        images: uint8 (B, 3, H, W).
        valid: bool (B, H, W), False on padding; None where no image of the stream is padded.
        indices: int64 (B,), which of the stream's images.
    """

    images: Tensor
    valid: Tensor | None
    indices: Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """A batch with defects, on the device that trains; the rest is as in :class:`ImageBatch`."""

    defects: DefectBatch
    valid: Tensor | None
    indices: Tensor


@dataclass(frozen=True)
class DefectRecipe:
    """How images get defects.

    Attributes:
        maker: makes them.
        mask_mode: where they may lie: ``off`` (everywhere), or on the ``dark`` or ``bright``
            product.
    """

    maker: DefectMaker
    mask_mode: str = "off"

    def apply(
        self, batch: ImageBatch, keys: Tensor, device: torch.device, masks: Tensor | None = None
    ) -> TrainingBatch:
        """The batch with a defect in each image, made on `device`.

        Args:
            keys: int64 (B,), see :func:`clsnf.synthesis.training_defects.sample_key`.
            masks: the object masks, bool (B, H, W), if they are known; else they are computed.
        """
        if masks is None and self.mask_mode != "off":
            masks = object_masks(batch.images, self.mask_mode)
        valid = None if batch.valid is None else batch.valid.to(device)
        allowed = valid
        if masks is not None:
            allowed = masks.to(device) if valid is None else masks.to(device) & valid
        defects = self.maker.make(batch.images.to(device), allowed, keys)
        return TrainingBatch(defects, valid, batch.indices)


class Counters:
    """What a stream did: images and seconds of each step, and how long its caller waited.

    The steps are ``read``, ``decode`` (with resizing) and ``defects``.

    Attributes:
        images: number of images that the stream has given.
        waited: seconds that the caller of the stream waited for them.
    """

    def __init__(self) -> None:
        self.images, self.waited = 0, 0.0
        self._steps: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def add(self, step: str, images: int, seconds: float) -> None:
        """Add the seconds that a worker took for one step of some images."""
        with self._lock:
            before = self._steps.get(step, (0, 0.0))
            self._steps[step] = (before[0] + images, before[1] + seconds)

    def add_batch(self, images: int, seconds: float) -> None:
        """Add a batch that the stream has given, and the seconds that its caller waited for it."""
        with self._lock:
            self.images += images
            self.waited += seconds

    def totals(self) -> dict[str, float]:
        """The sums ``images`` and ``waited``, and ``STEP_images`` and ``STEP_seconds`` by step.

        The seconds of a step are those of all its workers together.
        """
        with self._lock:
            sums: dict[str, float] = {"images": self.images, "waited": self.waited}
            for step, (images, seconds) in self._steps.items():
                sums |= {f"{step}_images": images, f"{step}_seconds": seconds}
        return sums


class Stream(ABC):
    """N images, in batches that the caller chooses.

    Attributes:
        kind: ``memory``, ``local`` or ``ray``.
        counters: what the stream did so far.
    """

    kind: str

    def __init__(self) -> None:
        self.counters = Counters()

    @abstractmethod
    def __len__(self) -> int:
        """N, the number of images."""

    @property
    @abstractmethod
    def valid(self) -> Tensor | None:
        """bool (N, H, W), False on padding; None where no image is padded."""

    @abstractmethod
    def take(self, indices: Tensor) -> Tensor:
        """Read some images in this process: ``indices`` int64 (K,) -> uint8 (K, 3, H, W)."""

    def load_shared(self, indices: Tensor, device: torch.device) -> Tensor:
        """As :meth:`take`, on a device, for as long as the stream is used.

        They may lie in memory that other processes share: nobody may write to them.
        """
        return self.take(indices).to(device)

    @abstractmethod
    def _batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        """The batches of :meth:`batches`."""

    def batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        """The batches of these images, in this order.

        Args:
            chosen: the images of each batch, int64 (B,).

        Raises:
            ImageError: an image can't be read.
        """
        return self._counted(self._batches(chosen), lambda batch: len(batch.indices))

    def training_batches(
        self,
        recipe: DefectRecipe,
        chosen: Sequence[Tensor],
        keys: Sequence[Tensor],
        device: torch.device,
    ) -> Iterator[TrainingBatch]:
        """As :meth:`batches`, each image with a defect, on `device`.

        Args:
            keys: the samples' keys of each batch, int64 (B,).
        """
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
        """The object masks of these images, bool (B, H, W), if the stream knows them; else None."""
        return None

    def map_batches(
        self, make: MakeWorker, chosen: Sequence[Tensor], device: torch.device
    ) -> Iterator[Arrays]:
        """What a worker returns for every batch, in order.

        Args:
            make: makes the worker on the device that it is given. The worker is a function of an
                :class:`ImageBatch` that returns arrays of the batch's length.
            chosen: the images of each batch, int64 (B,).
            device: this process's device.
        """
        worker = make(device)
        for batch in self.batches(chosen):
            yield worker(batch)

    def _counted(self, batches: Iterator[Any], size: Callable[[Any], int]) -> Iterator[Any]:
        """The batches, while counting their images and the time that the caller waits for them."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            seconds = time.perf_counter() - started
            self.counters.add_batch(0 if batch is None else size(batch), seconds)
            if batch is None:
                return
            yield batch


def consecutive(n: int, size: int) -> list[Tensor]:
    """All of N images in order, as batches of at most `size`."""
    return list(torch.arange(n).split(size))


class MemoryStream(Stream):
    """Images that lie in memory.

    The object masks of a mode are computed once, at its first use, and kept.

    Args:
        images: uint8 (N, 3, H, W).
        valid: bool (N, H, W), False on padding; None where no image is padded.
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
        if torch.equal(indices, torch.arange(len(self))):
            return self.images.to(device)  # no second copy on a CPU
        return super().load_shared(indices, device)

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
    """Images that threads of this process read and decode whenever they are asked for.

    Decoding releases the interpreter's lock, so that other threads go on.

    Args:
        paths: N references, see :mod:`clsnf.data.sources`.
        settings: the network's input.
        threads: number of threads that decode; None for one a core.
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
        """Where each image lies in the network's input, by its header; None if none is padded."""
        if not self.settings.may_pad:
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
            return placements[0].valid.expand(len(placements), -1, -1)  # one mask for all
        return torch.stack([placement.valid for placement in placements])

    def take(self, indices: Tensor) -> Tensor:
        taken = torch.empty((len(indices), 3, *self.settings.size), dtype=torch.uint8)
        # A subclass may bring batches from elsewhere: a few images are read here in any case.
        found = LocalStream._batches(self, indices.split(16))
        for batch, into in zip(found, taken.split(16), strict=True):
            into.copy_(batch.images)
        return taken

    def _batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        padded = self._placements is not None
        batches = map_in_batches(self._load, (i.tolist() for i in chosen), self._threads)
        for indices, loaded in zip(chosen, batches, strict=True):
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
    """One image, its placement, and the seconds that reading and decoding it took.

    Returns:
        uint8 (3, H, W); where the source lies in it; (read, decode) in seconds.
    """
    started = time.perf_counter()
    data = read_bytes(path)
    read = time.perf_counter()
    image, placement = decode_placed(data, os.fspath(path), settings)
    return image, placement, (read - started, time.perf_counter() - read)


def map_in_batches(
    work: Callable[[T], R], batches: Iterable[Sequence[T]], threads: int | None = None
) -> Iterator[list[R]]:
    """What `work` returns for the items of each batch, in order.

    Threads work a few batches ahead of the caller; None stands for one thread a core. An error of
    `work` is raised when its batch is asked for.
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
