"""The request core: limits, decode, place, batch, answer. Knows neither HTTP nor Ray; made and used
inside one event loop.

Unusual: three kinds of threads, so that no stage waits for another without need: *readers* decode
    and resize (and draw what was asked
for), one *network* thread computes, one thread loads models. The event loop only hands things on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from clsnf.core.device import choose_device
from clsnf.core.memory import keep_freed_memory
from clsnf.data.image_statistics import STATISTICS
from clsnf.detector import Detector
from clsnf.serving.answers import Answer, Seen, answer, verdict_of
from clsnf.serving.batching import Batcher
from clsnf.serving.catalogue import Entry
from clsnf.serving.errors import Busy, Late, TooLarge, Unavailable
from clsnf.serving.metrics import Meters
from clsnf.serving.preprocess import Picture, take_array, take_file
from clsnf.serving.settings import MiB, ServingSettings
from clsnf.serving.store import Model, ModelStore, load_detector
from clsnf.serving.thresholds import Thresholds

T = TypeVar("T")

log = logging.getLogger("clsnf.serving")

_REFRESH = 1.0  # seconds after which a threshold that another replica was told holds here
_FORGET = 0.02  # weight of the newest picture in the drift: about the last 50 count
_LONGEST_RETRY = 60


class InspectionService:
    """Answers about pictures.

    Args:
        settings: resolved (see :meth:`ServingSettings.resolved`).
        meters: told about everything.
        open_models: roll in the models that the settings name; else there are none before
            :meth:`roll`.

    Raises:
        ClsnfError: models or thresholds that can't be used, a device that does not exist.
    """

    def __init__(
        self, settings: ServingSettings, meters: Meters | None = None, *, open_models: bool = True
    ) -> None:
        keep_freed_memory()
        self.settings, self.meters = settings, meters or Meters()
        self._device = str(choose_device(settings.device))
        mixed = settings.precision == "mixed" or (
            settings.precision == "auto" and self._device.startswith("cuda")
        )
        self._autocast = partial(
            torch.autocast, torch.device(self._device).type, dtype=torch.bfloat16, enabled=mixed
        )
        self.store = ModelStore(settings.memory_mb * MiB, self._load, self._tell_loaded)
        self.thresholds = Thresholds(Path(settings.state or "."))
        threads = settings.threads or max(1, (_cores() // settings.max_replicas))
        self._readers = ThreadPoolExecutor(
            settings.readers, "read", initializer=_claim_threads, initargs=(1,)
        )
        self._network = ThreadPoolExecutor(
            1, "network", initializer=_claim_threads, initargs=(threads,)
        )
        self._batcher: Batcher[Model, Picture, Seen] = Batcher(
            self._look,
            self._network,
            settings.batch_size or (4 if self._device == "cpu" else 16),
            settings.batch_wait_ms / 1000,
        )
        self._waiting = 0
        self._seconds_per_image = 0.0
        self._drift: dict[tuple[str, str], np.ndarray] = {}
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        self._lost: str | None = None  # what a device said that will not compute again
        if open_models:
            self._roll(Path(settings.models))

    # ---- life ----

    async def start(self) -> None:
        """Begin to notice thresholds that other replicas were told."""
        self._watch = self._watch or asyncio.create_task(self._refresh_thresholds())

    @property
    def ready(self) -> bool:
        """Whether pictures can be inspected."""
        return not self._closed and bool(self.store.catalogue.entries)

    def check_alive(self) -> None:
        """Raise RuntimeError where the process must be replaced: its device will not compute again."""
        if self._lost is not None:
            raise RuntimeError(f"the network can't compute any more: {self._lost}")

    async def close(self) -> None:
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        await self._batcher.close()
        self.store.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._network.shutdown(wait=False, cancel_futures=True)

    async def roll(self, folder: Path) -> None:
        """Let the models of a folder take the place of those served now; see
        :meth:`ModelStore.roll`. Raises ClsnfError.
        """
        await asyncio.to_thread(self._roll, folder)

    def _roll(self, folder: Path) -> None:
        try:
            self.store.roll(folder, self.settings.preload)
        finally:
            self.meters.record("clsnf_models_refused", float(self.store.refused is not None))

    async def _refresh_thresholds(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH)
            try:
                await asyncio.to_thread(self.thresholds.refresh)
            except (
                Exception
            ) as error:  # what is in force stays in force; a broken file must not end the watch
                log.warning("thresholds stay as they are: %s", error)

    def _load(self, entry: Entry) -> Detector:
        return load_detector(entry, self._device)

    def _tell_loaded(self, models: list[Model]) -> None:
        self.meters.forget("clsnf_model_bytes")
        for model in models:
            self.meters.record(
                "clsnf_model_bytes", model.bytes, model.entry.category, model.entry.version
            )

    # ---- inspecting ----

    @asynccontextmanager
    async def before(self, deadline: float) -> AsyncIterator[None]:
        """Raise :class:`Late` in the block where it still runs at `deadline`, in the event loop's
        time.
        """
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError as error:
            raise Late(
                f"There was no answer within {self.settings.deadline_s:g} s: the server has more "
                "to do than it can."
            ) from error

    @contextmanager
    def room(self, images: int = 1) -> Iterator[None]:
        """Hold places in the queue while the block runs: from before a body is read, so that bodies
        can't fill the memory. Raises Busy.
        """
        if self._waiting + images > self.settings.queue:
            seconds = math.ceil(self._waiting * self._seconds_per_image)
            raise Busy(
                f"{self._waiting} images wait already, of {self.settings.queue} that may: come "
                "again.",
                min(_LONGEST_RETRY, max(1, seconds)),
            )
        self._waiting += images
        self.meters.record("clsnf_waiting_images", self._waiting)
        try:
            yield
        finally:
            self._waiting -= images
            self.meters.record("clsnf_waiting_images", self._waiting)

    async def inspect(
        self,
        category: str,
        images: Sequence[tuple[str, bytes | np.ndarray]],
        kind: str = "none",
        *,
        admitted: int = 0,
    ) -> list[Answer]:
        """Answers about the images of one request, which go through the network as one batch.

        Args:
            category: whose model is asked.
            images: names and files' bytes, or RGB arrays (h, w, 3) uint8 whose sides were checked.
            kind: of map, one of :data:`clsnf.serving.answers.MAPS`.
            admitted: places that the request holds already, see :meth:`room`.

        Raises:
            RequestError: with the HTTP status that says what is wrong.
        """
        most = self.settings.images_per_request
        if len(images) > most:
            raise TooLarge(
                f"{len(images)} images in one request: at most {most} are looked at together. "
                "Send them in several requests."
            )
        with self.room(max(0, len(images) - admitted)):
            started = time.perf_counter()
            model = await self.store.get(category)
            pictures = await self._read(model, images)
            if kind != "none":
                self._check_maps(pictures)
            read = time.perf_counter()
            seen = await self._batcher.submit(model, pictures)
            looked = time.perf_counter()
            in_force = self.thresholds.in_force(
                model.entry, model.detector
            )  # once: all answers of a request agree
            draw = partial(
                answer, entry=model.entry, detector=model.detector, in_force=in_force, kind=kind
            )
            if kind == "none":
                answers = [draw(p, s) for p, s in zip(pictures, seen, strict=True)]
            else:
                answers = await self._in_readers(
                    [partial(draw, p, s) for p, s in zip(pictures, seen, strict=True)]
                )
            spent = _milliseconds(
                read=read - started,
                wait=looked - read - seen[0].seconds,
                network=seen[0].seconds,
                draw=time.perf_counter() - looked,
                total=time.perf_counter() - started,
            )
            for picture, found in zip(pictures, answers, strict=True):
                found.fields.update(milliseconds=spent, batch=found.seen.batch)
                self._count(
                    model, picture, found.seen.score, verdict_of(found.seen.score, in_force)
                )
            return answers

    def _check_maps(self, pictures: Sequence[Picture]) -> None:
        """Refuse maps that would take more memory than one picture of the largest size. Raises
        TooLarge.
        """
        most = self.settings.max_megapixels
        if sum(p.placement.source[0] * p.placement.source[1] for p in pictures) > most * 1_000_000:
            raise TooLarge(
                f"The maps of these images have more than {most} megapixels together: ask for "
                "maps of fewer at a time."
            )

    async def _read(
        self, model: Model, images: Sequence[tuple[str, bytes | np.ndarray]]
    ) -> list[Picture]:
        settings, most = model.detector.settings.image, self.settings.max_megapixels

        def take(name: str, image: bytes | np.ndarray) -> Picture:
            if isinstance(image, bytes):
                return take_file(image, name, settings, most)
            return take_array(image, name, settings)

        return await self._in_readers([partial(take, name, image) for name, image in images])

    async def aside(self, task: Callable[[], T]) -> T:
        """The result of a task that would hold the event loop up, done in a reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, task)

    async def _in_readers(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Results of tasks done side by side; of several errors, that of the first task."""
        loop = asyncio.get_running_loop()
        done = await asyncio.gather(
            *(loop.run_in_executor(self._readers, task) for task in tasks), return_exceptions=True
        )
        results = []
        for result in done:
            if isinstance(result, BaseException):
                raise result
            results.append(result)
        return results

    def _look(self, model: Model, pictures: Sequence[Picture]) -> list[Seen]:
        """One batch through the network; runs in the network's thread."""
        started = time.perf_counter()
        placements = [p.placement for p in pictures]
        valid = (
            torch.stack([p.valid for p in placements])
            if any(p.padded for p in placements)
            else None
        )
        try:
            with self._autocast():
                maps, scores = model.detector.score_placed(
                    torch.stack([p.placed for p in pictures]), valid
                )
        except torch.OutOfMemoryError as error:
            raise Unavailable(
                f"The device has no memory for {len(pictures)} images at once: lower batch_size, "
                "or the share of other replicas."
            ) from error
        except torch.AcceleratorError as error:
            self._lost = str(error).splitlines()[0]
            raise Unavailable(
                f"The device is lost ({self._lost}): this replica is about to be replaced."
            ) from error
        seconds = time.perf_counter() - started
        if not np.isfinite(scores).all():
            raise Unavailable(
                f"The model {model.entry.category!r} gives a score that is no number: it must be "
                "trained again."
            )
        category = model.entry.category
        self.meters.record("clsnf_network_seconds", seconds, category)
        self.meters.record("clsnf_batch_images", len(pictures), category)
        self._seconds_per_image += 0.2 * (seconds / len(pictures) - self._seconds_per_image)
        return [
            Seen(m, float(s), seconds, len(pictures)) for m, s in zip(maps, scores, strict=True)
        ]

    def _count(self, model: Model, picture: Picture, score: float, verdict: str) -> None:
        category = model.entry.category
        self.meters.record("clsnf_verdicts_total", 1, category, verdict)
        self.meters.record("clsnf_score", score, category)
        known = model.entry.provenance.looks
        if set(known) != set(STATISTICS):  # saved before there were looks
            return
        mean, spread = np.array([known[look] for look in STATISTICS]).T
        away = (picture.looks - mean) / spread
        key = (category, model.entry.version)
        before = self._drift.get(key)
        now = away if before is None else before + _FORGET * (away - before)
        self._drift[key] = now
        for look, value in zip(STATISTICS, now, strict=True):
            self.meters.record("clsnf_drift", float(value), category, look)


def _milliseconds(**seconds: float) -> dict[str, float]:
    return {name: round(1000 * max(0.0, value), 2) for name, value in seconds.items()}


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_claiming = threading.Lock()


def _claim_threads(count: int) -> None:
    """Give the calling thread `count` threads of its own for torch's loops.

    torch keeps one number for all threads, which each thread takes over at its first loop: both are
    said here, one thread at a time.
    """
    with _claiming:
        torch.set_num_threads(count)
        torch.get_num_threads()
