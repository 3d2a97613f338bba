"""The core of a request: admit, read, batch, answer. Knows neither HTTP nor Ray.

A service is made and used inside one event loop, which only hands work on, so that no part of a
request waits for another without need: processes read pictures and draw maps (``reading.py``), one
*network* thread computes, one thread loads models.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from clsnf.core.device import choose_device
from clsnf.core.memory import release_freed_memory
from clsnf.core.threads import use_torch_threads
from clsnf.detector import Detector
from clsnf.evaluation.pictures import MapSize
from clsnf.serving.answers import Inspection, image_answer
from clsnf.serving.batching import Batcher
from clsnf.serving.body_forms import InferHead, too_many_images
from clsnf.serving.budget import Allowance, BodyBudget
from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.drift import DriftMonitor
from clsnf.serving.errors import (
    ContentTooLarge,
    GatewayTimeout,
    NotAcceptable,
    ServiceUnavailable,
    TooManyRequests,
)
from clsnf.serving.inference import NetworkOutput, NetworkRunner
from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.reading import MapStyle, Picture, PictureReader, RequestBody, pixels_of
from clsnf.serving.reading_pool import ReadingPool
from clsnf.serving.schemas import ImageAnswer, MapChoice, Milliseconds
from clsnf.serving.settings import MiB, ServingSettings
from clsnf.serving.store import LoadedModel, ModelStore, load_detector
from clsnf.serving.thresholds import ActiveThreshold, Thresholds
from clsnf.serving.watchdog import Watchdog

log = logging.getLogger("clsnf.serving")

_REFRESH_SECONDS = 1.0  # how often a replica looks for thresholds that another one was given
_LONGEST_RETRY = 60  # seconds
# Requests of this many bytes leave holes in the heap that those of every day do not fill.
_LARGE, _MAP_BYTES = 32 * MiB, 6  # the largest map has 4 bytes a pixel, in base64
_TRIMS = 15  # of the heap after them, one a second
# Bytes that a reader may take: for its libraries, and for each pixel of the largest image. An
# overlay takes the most, some 20 a pixel.
_READER_BYTES, _READER_BYTES_PER_PIXEL = 512 * MiB, 40
_PATIENCE = 20.0  # seconds without any answer after which a replica is not ready
_ANSWERED_LATELY = 10.0  # seconds for which an answer says that a model is ready


@dataclass(frozen=True)
class MapWish:
    """The maps that a request asks for, and the threshold that it tries.

    Attributes:
        choice: the kind of map.
        size: of the map, see :func:`clsnf.evaluation.pictures.drawn_size`.
        threshold: judges this request's pictures in place of the one in force. Such a request is a
            try, and does not count among the verdicts.
        in_base64: for JSON.
        alone: the map is the whole answer, so it can be that of one image only.
    """

    choice: MapChoice = "none"
    size: MapSize = "native"
    threshold: float | None = None
    in_base64: bool = False
    alone: bool = False


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

        def load(entry: ModelEntry) -> Detector:
            self.metrics.record("clsnf_model_loads_total", 1, entry.category)
            return load_detector(entry, device)

        self.store = ModelStore(settings.memory_mb * MiB, load, self._record_models)
        self.thresholds = Thresholds(Path(settings.state or "."))
        threads = settings.threads or max(1, (_cores() // settings.max_replicas))
        self._network_thread = ThreadPoolExecutor(
            1, "network", initializer=use_torch_threads, initargs=(threads,)
        )
        self._runner = NetworkRunner(device, settings.precision, self.metrics)
        self._batcher: Batcher[LoadedModel, Picture, NetworkOutput] = Batcher(
            self._runner.run,
            self._network_thread,
            settings.batch_size or (4 if device == "cpu" else 16),
            settings.batch_wait_ms / 1000,
        )
        self._drift = DriftMonitor()
        self.bodies = BodyBudget(settings.bodies_mb * MiB)
        pixels = settings.max_megapixels * 1_000_000
        self._maps = Allowance(pixels)
        self._watchdog = Watchdog(self._probe, max(_PATIENCE, settings.deadline_s))
        self._answered: WeakKeyDictionary[LoadedModel, float] = WeakKeyDictionary()
        self._waiting = 0  # images
        self._drawn = 0  # bytes of the largest maps since the heap was trimmed
        self._refresh: asyncio.Task[None] | None = None
        self._closed = False
        if open_models:
            self.store.roll(Path(settings.models), settings.preload)
        # Last, because it starts processes.
        self._pool = ReadingPool(
            settings.readers,
            settings.read_s,
            _READER_BYTES + _READER_BYTES_PER_PIXEL * pixels,
            partial(self.metrics.record, "clsnf_readers_replaced_total", 1),
        )
        self.reader = PictureReader(self._pool, settings.max_megapixels)

    @property
    def requests(self) -> int:
        """Images that wait or are looked at now."""
        return self._waiting

    # ---- life ----

    async def start(self) -> None:
        """Wait for the readers, and begin to look for thresholds that other replicas were given."""
        self._refresh = self._refresh or asyncio.create_task(self._look_after())
        await self._pool.start()
        self._watchdog.start()

    @property
    def ready(self) -> bool:
        """Whether pictures can be inspected."""
        return not self._closed and bool(self.store.catalogue.entries)

    def check_ready(self) -> None:
        """Check that a request would be answered now.

        Raises:
            ServiceUnavailable: it would not, with the reason.
        """
        if not self.ready:
            raise ServiceUnavailable("The server is closing.")
        if not self._pool.alive:
            raise ServiceUnavailable("No process that reads images is there: they are started.")
        problem = self._watchdog.problem()
        if problem is not None:
            raise ServiceUnavailable(f"The server does not answer: {problem}.")

    def check_alive(self) -> None:
        """Check that the process still computes.

        Raises:
            RuntimeError: it does not, so it must be replaced.
        """
        if self._runner.device_error is not None:
            raise RuntimeError(f"the network can't compute any more: {self._runner.device_error}")
        problem = self._watchdog.problem(2 * self._watchdog.patience)
        if problem is not None:
            raise RuntimeError(problem)

    async def _probe(self) -> None:
        """Go the way of a small request, without its queue and its metrics."""
        await self.reader.probe()
        loaded = self.store.loaded
        if loaded:
            await asyncio.get_running_loop().run_in_executor(
                self._network_thread, self._runner.probe, loaded[-1]
            )

    async def close(self) -> None:
        self._closed = True
        if self._refresh is not None:
            self._refresh.cancel()
        await self._watchdog.close()
        await self._batcher.close()
        self.store.close()
        self._network_thread.shutdown(wait=False, cancel_futures=True)
        await self._pool.close()

    async def roll(self, folder: Path) -> None:
        """Roll in the models of a folder: they replace those served now.

        See :meth:`ModelStore.roll`. Raises ClsnfError.
        """
        await asyncio.to_thread(self.store.roll, folder, self.settings.preload)

    async def _look_after(self) -> None:
        """Read thresholds that others were given, and give memory back after large requests."""
        trims = 0
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            if self._were_large():
                trims = _TRIMS
            # Several times, because an answer may still be on its way when its request is over.
            if trims and not (self._waiting or self.bodies.held):
                trims -= 1
                await asyncio.to_thread(release_freed_memory)
            try:
                await asyncio.to_thread(self.thresholds.refresh)
            except Exception as error:  # nothing that lies in a file may end this loop
                log.error("thresholds stay as they are: %s", error)
            self.metrics.record("clsnf_thresholds_refused", len(self.thresholds.refused))

    def _were_large(self) -> bool:
        """Whether requests since the last call have left much freed memory behind."""
        large = max(self.bodies.peak, self._drawn) > _LARGE
        self.bodies.peak = self._drawn = 0
        return large

    def _record_models(self) -> None:
        self.metrics.record("clsnf_models_refused", len(self.store.refused))
        self.metrics.clear("clsnf_model_bytes")
        for model in self.store.loaded:
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

        A route does so when a body is whole, so that nobody holds places by sending slowly. The
        memory that bodies take is bounded by :attr:`bodies`.

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
        map_choice: MapChoice = "none",
    ) -> list[Inspection]:
        """Inspect images, which go through the network as one batch.

        Args:
            category: whose model is asked.
            images: names and files' bytes, or RGB arrays (h, w, 3) uint8.
            map_choice: the kind of map to draw, as a file.

        Raises:
            RequestError: with the HTTP status that says what is wrong.
        """
        most = self.settings.images_per_request
        if len(images) > most:
            raise too_many_images(most)
        started = time.perf_counter()
        with self.admit(len(images)):
            model = await self.store.get(category)
            bodies = [RequestBody.of_image(name, image) for name, image in images]
            pictures = await self.reader.read_all(bodies, model.detector.settings.image)
            async with AsyncExitStack() as held:
                return await self._answer(model, pictures, MapWish(map_choice), held, started)

    async def check_answers(self, category: str) -> None:
        """Load a model, and let it score a black picture if it has answered none for 10 seconds.

        Raises:
            RequestError: it can't answer.
        """
        model = await self.store.get(category)
        if time.monotonic() - self._answered.get(model, -math.inf) > _ANSWERED_LATELY:
            await asyncio.get_running_loop().run_in_executor(
                self._network_thread, self._runner.probe, model
            )
            self._answered[model] = time.monotonic()

    async def inspect_body(
        self, category: str, body: RequestBody, wish: MapWish, held: AsyncExitStack
    ) -> tuple[list[Inspection], InferHead | None]:
        """Inspect the images of a request's body, which go through the network as one batch.

        Args:
            category: whose model is asked.
            body: whole.
            wish: the maps to draw.
            held: what the maps hold; to be closed when the answer is sent.

        Returns:
            Each image's inspection, and what an inference request asks for beside.

        Raises:
            RequestError: with the HTTP status that says what is wrong.
        """
        started = time.perf_counter()
        with self.admit():
            model = await self.store.get(category)
            pictures, head = await self.reader.read(body, model.detector.settings.image)
            if wish.alone and len(pictures) > 1:
                raise NotAcceptable(
                    f"There are {len(pictures)} images: with Accept: image/png send one at a time."
                )
            with self.admit(len(pictures) - 1):
                return await self._answer(model, pictures, wish, held, started), head

    async def _answer(
        self,
        model: LoadedModel,
        pictures: Sequence[Picture],
        wish: MapWish,
        held: AsyncExitStack,
        started: float,
    ) -> list[Inspection]:
        """The inspections of pictures, since `started` by the performance counter."""
        if wish.choice != "none":
            self._check_maps(pictures, wish.size)
        read = time.perf_counter()
        outputs = await self._batcher.submit(model, pictures)
        self._answered[model] = time.monotonic()
        computed = time.perf_counter()
        # Taken once, so that all answers of a request agree.
        threshold = self.thresholds.active(model.entry, model.detector, wish.threshold)
        map_files: Sequence[memoryview | None] = [None] * len(pictures)
        if wish.choice != "none":
            self._drawn = max(self._drawn, _MAP_BYTES * pixels_of(pictures, wish.size))
            await held.enter_async_context(self._maps.hold(pixels_of(pictures, wish.size)))
            style = _map_style(model, threshold, wish)
            map_files = await self.reader.draw(pictures, [o.score_map for o in outputs], style)
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
            if wish.threshold is None:
                self._record(model, picture, answer)
        self._watchdog.note_answer()
        return inspections

    def _check_maps(self, pictures: Sequence[Picture], size: MapSize) -> None:
        """Refuse maps that would take more memory than one picture of the largest size.

        Raises:
            ContentTooLarge: they would.
        """
        most = self.settings.max_megapixels
        if pixels_of(pictures, size) > most * 1_000_000:
            raise ContentTooLarge(
                f"The maps of these images have more than {most} megapixels together: ask for "
                "smaller ones (size), or for fewer at a time."
            )

    def _record(self, model: LoadedModel, picture: Picture, answer: ImageAnswer) -> None:
        category = answer.category
        self.metrics.record("clsnf_verdicts_total", 1, category, answer.verdict)
        self.metrics.record("clsnf_score", answer.score, category)
        for name, value in self._drift.update(model.entry, picture.statistics).items():
            self.metrics.record("clsnf_drift", value, category, name)


def _map_style(model: LoadedModel, threshold: ActiveThreshold, wish: MapWish) -> MapStyle:
    return MapStyle(
        wish.choice, wish.size, model.detector.shown_from, threshold.map_value, wish.in_base64
    )


def _milliseconds(seconds: float) -> float:
    return round(1000 * max(0.0, seconds), 2)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
