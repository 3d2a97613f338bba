"""The core of a request: admit, decode, place, batch, answer. Knows neither HTTP nor Ray.

A service is made and used inside one event loop, which only hands work on to three kinds of
threads, so that no part of a request waits for another without need: *readers* decode and resize
pictures and draw maps, one *network* thread computes, one thread loads models.
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
from clsnf.evaluation.pictures import MapSize, drawn_size
from clsnf.serving.answers import VERDICTS_ALONE, Inspection, InspectOptions, draw_map, image_answer
from clsnf.serving.batching import Batcher
from clsnf.serving.drift import DriftMonitor
from clsnf.serving.errors import ContentTooLarge, GatewayTimeout, TooManyRequests
from clsnf.serving.inference import NetworkOutput, NetworkRunner
from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.preprocess import Picture, picture_from_array, picture_from_file
from clsnf.serving.schemas import ImageAnswer, Milliseconds
from clsnf.serving.settings import MiB, ServingSettings
from clsnf.serving.store import LoadedModel, ModelStore, load_detector
from clsnf.serving.thresholds import ActiveThreshold, Thresholds

T = TypeVar("T")

log = logging.getLogger("clsnf.serving")

_REFRESH_SECONDS = 1.0  # how often a replica looks for thresholds that another one was given
_LONGEST_RETRY = 60  # seconds


class InspectionService:
    """Answers about pictures.

    Args:
        settings: resolved (see :meth:`ServingSettings.resolved`).
        metrics: records everything.
        open_models: roll in the models that the settings name; else there are none before
            :meth:`roll`.

    Raises:
        ClsnfError: models or thresholds that can't be used, a device that does not exist.
    """

    def __init__(
        self,
        settings: ServingSettings,
        metrics: ServerMetrics | None = None,
        *,
        open_models: bool = True,
    ) -> None:
        self.settings, self.metrics = settings, metrics or ServerMetrics()
        device = str(choose_device(settings.device))
        self.store = ModelStore(
            settings.memory_mb * MiB, partial(load_detector, device=device), self._record_loaded
        )
        self.thresholds = Thresholds(Path(settings.state or "."))
        threads = settings.threads or max(1, (_cores() // settings.max_replicas))
        self._readers = ThreadPoolExecutor(
            settings.readers, "read", initializer=_set_torch_threads, initargs=(1,)
        )
        self._network_thread = ThreadPoolExecutor(
            1, "network", initializer=_set_torch_threads, initargs=(threads,)
        )
        self._runner = NetworkRunner(device, settings.precision, self.metrics)
        self._batcher: Batcher[LoadedModel, Picture, NetworkOutput] = Batcher(
            self._runner.run,
            self._network_thread,
            settings.batch_size or (4 if device == "cpu" else 16),
            settings.batch_wait_ms / 1000,
        )
        self._drift = DriftMonitor()
        self._waiting = 0  # images
        self._refresh: asyncio.Task[None] | None = None
        self._closed = False
        if open_models:
            self._roll(Path(settings.models))

    # ---- life ----

    async def start(self) -> None:
        """Begin to look for thresholds that other replicas were given."""
        self._refresh = self._refresh or asyncio.create_task(self._refresh_thresholds())

    @property
    def ready(self) -> bool:
        """Whether pictures can be inspected."""
        return not self._closed and bool(self.store.catalogue.entries)

    def check_alive(self) -> None:
        """Check that the device still computes.

        Raises:
            RuntimeError: it does not, so the process must be replaced.
        """
        if self._runner.device_error is not None:
            raise RuntimeError(f"the network can't compute any more: {self._runner.device_error}")

    async def close(self) -> None:
        self._closed = True
        if self._refresh is not None:
            self._refresh.cancel()
        await self._batcher.close()
        self.store.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._network_thread.shutdown(wait=False, cancel_futures=True)

    async def roll(self, folder: Path) -> None:
        """Roll in the models of a folder: they replace those served now.

        See :meth:`ModelStore.roll`. Raises ClsnfError.
        """
        await asyncio.to_thread(self._roll, folder)

    def _roll(self, folder: Path) -> None:
        try:
            self.store.roll(folder, self.settings.preload)
        finally:
            self.metrics.record("clsnf_models_refused", float(self.store.refused is not None))

    async def _refresh_thresholds(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            try:
                await asyncio.to_thread(self.thresholds.refresh)
            except Exception as error:  # a broken file must not end this loop
                log.warning("thresholds stay as they are: %s", error)

    def _record_loaded(self, models: list[LoadedModel]) -> None:
        self.metrics.clear("clsnf_model_bytes")
        for model in models:
            entry = model.entry
            self.metrics.record("clsnf_model_bytes", model.bytes, entry.category, entry.version)

    # ---- limits of time and of the queue ----

    @asynccontextmanager
    async def answer_before(self, deadline: float) -> AsyncIterator[None]:
        """End the block at `deadline`, a time of the event loop.

        Raises:
            GatewayTimeout: the block still ran then.
        """
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError as error:
            raise GatewayTimeout(
                f"There was no answer within {self.settings.deadline_s:g} s: the server has more "
                "to do than it can."
            ) from error

    @contextmanager
    def admit(self, images: int = 1) -> Iterator[None]:
        """Hold places in the queue while the block runs.

        A route does so before it reads a body, so that bodies can't fill the memory.

        Raises:
            TooManyRequests: the queue is full.
        """
        if self._waiting + images > self.settings.queue:
            seconds = math.ceil(self._waiting * self._runner.seconds_per_image)
            raise TooManyRequests(
                f"{self._waiting} images wait already, of {self.settings.queue} that may: come "
                "again.",
                min(_LONGEST_RETRY, max(1, seconds)),
            )
        self._waiting += images
        self.metrics.record("clsnf_waiting_images", self._waiting)
        try:
            yield
        finally:
            self._waiting -= images
            self.metrics.record("clsnf_waiting_images", self._waiting)

    # ---- inspecting ----

    async def inspect(
        self,
        category: str,
        images: Sequence[tuple[str, bytes | np.ndarray]],
        options: InspectOptions = VERDICTS_ALONE,
        *,
        admitted: int = 0,
    ) -> list[Inspection]:
        """Inspect the images of one request, which go through the network as one batch.

        Args:
            category: whose model is asked.
            images: names and files' bytes, or RGB arrays (h, w, 3) uint8 whose sides were checked.
            options: maps to draw, and a threshold to try.
            admitted: places that the request holds already, see :meth:`admit`.

        Raises:
            RequestError: with the HTTP status that says what is wrong.
        """
        most = self.settings.images_per_request
        if len(images) > most:
            raise ContentTooLarge(
                f"{len(images)} images in one request: at most {most} are looked at together. "
                "Send them in several requests."
            )
        with self.admit(max(0, len(images) - admitted)):
            started = time.perf_counter()
            model = await self.store.get(category)
            pictures = await self._read(model, images)
            if options.map_choice != "none":
                self._check_maps(pictures, options.map_size)
            read = time.perf_counter()
            outputs = await self._batcher.submit(model, pictures)
            computed = time.perf_counter()
            # Taken once, so that all answers of a request agree.
            threshold = self.thresholds.active(model.entry, model.detector, options.threshold)
            map_files = await self._draw(model, pictures, outputs, threshold, options)
            milliseconds = Milliseconds(
                read=_milliseconds(read - started),
                wait=_milliseconds(computed - read - outputs[0].seconds),
                network=_milliseconds(outputs[0].seconds),
                draw=_milliseconds(time.perf_counter() - computed),
                total=_milliseconds(time.perf_counter() - started),
            )
            inspections = []
            for picture, output, map_file in zip(pictures, outputs, map_files, strict=True):
                answer = image_answer(picture, output, model.entry, threshold, milliseconds)
                inspections.append(Inspection(answer, output.score_map, map_file))
                if options.threshold is None:
                    self._record(model, picture, answer)
            return inspections

    async def _read(
        self, model: LoadedModel, images: Sequence[tuple[str, bytes | np.ndarray]]
    ) -> list[Picture]:
        settings, max_megapixels = model.detector.settings.image, self.settings.max_megapixels

        def read(name: str, image: bytes | np.ndarray) -> Picture:
            if isinstance(image, bytes):
                return picture_from_file(image, name, settings, max_megapixels)
            return picture_from_array(image, name, settings)

        return await self._run_in_readers([partial(read, name, image) for name, image in images])

    def _check_maps(self, pictures: Sequence[Picture], size: MapSize) -> None:
        """Refuse maps that would take more memory than one picture of the largest size.

        Raises:
            ContentTooLarge: they would.
        """
        most = self.settings.max_megapixels
        if sum(math.prod(drawn_size(p.placement, size)) for p in pictures) > most * 1_000_000:
            raise ContentTooLarge(
                f"The maps of these images have more than {most} megapixels together: ask for "
                "smaller ones (size), or for fewer at a time."
            )

    async def _draw(
        self,
        model: LoadedModel,
        pictures: Sequence[Picture],
        outputs: Sequence[NetworkOutput],
        threshold: ActiveThreshold,
        options: InspectOptions,
    ) -> Sequence[bytes | None]:
        """The maps as files; None for each picture where the request asks for no maps."""
        if options.map_choice == "none":
            return [None] * len(pictures)
        return await self._run_in_readers(
            [
                partial(draw_map, picture, output, model.detector, threshold, options)
                for picture, output in zip(pictures, outputs, strict=True)
            ]
        )

    def _record(self, model: LoadedModel, picture: Picture, answer: ImageAnswer) -> None:
        category = answer.category
        self.metrics.record("clsnf_verdicts_total", 1, category, answer.verdict)
        self.metrics.record("clsnf_score", answer.score, category)
        for name, value in self._drift.update(model.entry, picture.statistics).items():
            self.metrics.record("clsnf_drift", value, category, name)

    # ---- threads ----

    async def run_in_reader(self, task: Callable[[], T]) -> T:
        """The result of a task that would block the event loop, run in a reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, task)

    async def _run_in_readers(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Results of tasks run side by side; of several errors, that of the first task."""
        done = await asyncio.gather(
            *(self.run_in_reader(task) for task in tasks), return_exceptions=True
        )
        results = []
        for result in done:
            if isinstance(result, BaseException):
                raise result
            results.append(result)
        return results


def _milliseconds(seconds: float) -> float:
    return round(1000 * max(0.0, seconds), 2)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_setting_threads = threading.Lock()


def _set_torch_threads(count: int) -> None:
    """Let torch use `count` threads for the loops of the calling thread.

    torch keeps one number for all threads. A thread copies it at its first loop, or when it asks
    for it. So both happen here, for one thread at a time.
    """
    with _setting_threads:
        torch.set_num_threads(count)
        torch.get_num_threads()
