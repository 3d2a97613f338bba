"""The models that are loaded: each on its first use, within a bound of memory.

The least recently used models make room for others. New models *roll in*: the store loads those
whose categories are in use from the new folder, and then replaces the whole catalogue in one step.
So no request waits for a load, none sees half of the change, and requests under way end with the
model that they began with. Models that can't be loaded are refused, and those of before serve on.
To roll back is to roll in the folder of before.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clsnf.core.errors import ClsnfError, ModelError, nearest
from clsnf.detector import Detector
from clsnf.serving.catalogue import Catalogue, ModelEntry, read_catalogue_within
from clsnf.serving.errors import NotFound, ServiceUnavailable

Loader = Callable[[ModelEntry], Detector]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A loaded detector and its catalogue entry.

    Equal only to itself: batches are gathered by it.
    """

    entry: ModelEntry
    detector: Detector
    bytes: int


class ModelStore:
    """Models of one folder, none before the first :meth:`roll`.

    All calls of :meth:`get` come from one event loop.

    Args:
        memory: bytes of parameters that may stay loaded.
        load: makes a detector of an entry.
        on_change: called with the loaded models whenever they change.
    """

    def __init__(
        self,
        memory: int,
        load: Loader,
        on_change: Callable[[list[LoadedModel]], None] = lambda models: None,
    ) -> None:
        self._memory, self._load, self._on_change = memory, load, on_change
        # By category and version, least recently used first; under the lock.
        self._loaded: OrderedDict[tuple[str, str], LoadedModel] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[tuple[str, str], asyncio.Future[LoadedModel]] = {}
        # One at a time: two networks that are built at once would need the memory of both.
        self._pool = ThreadPoolExecutor(1, "load")
        self._catalogue = Catalogue(Path(), {})
        self.refused: str | None = None  # why the newest models did not roll in

    @property
    def catalogue(self) -> Catalogue:
        return self._catalogue

    @property
    def loaded(self) -> list[LoadedModel]:
        """Least recently used first."""
        with self._lock:
            return list(self._loaded.values())

    def entry(self, category: str) -> ModelEntry:
        """The catalogue's entry of a category. Raises NotFound, with the list of categories."""
        catalogue = self._catalogue
        found = catalogue.entries.get(category)
        if found is None:
            hint = nearest(category[:100], catalogue.categories)
            raise NotFound(
                f"There is no model {category[:100]!r}.{hint}", {"categories": catalogue.categories}
            )
        return found

    async def get(self, category: str) -> LoadedModel:
        """The model of a category, loaded if it was not.

        Raises:
            NotFound: there is none.
            ServiceUnavailable: it can't be loaded.
        """
        entry = self.entry(category)
        key = (entry.category, entry.version)
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
                return self._loaded[key]
        if key not in self._loading:  # all who ask meanwhile wait for the same load
            future = asyncio.get_running_loop().run_in_executor(self._pool, self._load_model, entry)
            self._loading[key] = future
            future.add_done_callback(lambda _: self._loading.pop(key, None))
        try:
            return await asyncio.shield(self._loading[key])
        except ClsnfError as error:
            raise ServiceUnavailable(f"The model {category!r} can't be loaded: {error}") from error

    def roll(self, folder: Path, preload: bool = False) -> None:
        """Roll in the models of a folder: they replace those served now. Blocks until they have.

        Args:
            folder: of models, see :func:`clsnf.serving.catalogue.read_catalogue`.
            preload: load all that fit before the change, not only those whose categories are in
                use.

        Raises:
            ClsnfError: the models can't be used; everything stays as it is, and :attr:`refused`
                says why.
        """
        try:
            catalogue = read_catalogue_within(folder, self._memory)
            in_use = {model.entry.category for model in self.loaded}
            free = self._memory
            for category in catalogue.categories:
                entry = catalogue.entries[category]
                if (preload or category in in_use) and entry.size <= free:
                    free -= entry.size
                    self._pool.submit(self._load_model, entry).result()
        except ClsnfError as error:
            self.refused = f"{folder}: {error}"
            raise
        self._catalogue, self.refused = catalogue, None
        kept = {(e.category, e.version) for e in catalogue.entries.values()}
        with self._lock:
            for key in [key for key in self._loaded if key not in kept]:
                del self._loaded[key]
        self._on_change(self.loaded)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load_model(self, entry: ModelEntry) -> LoadedModel:
        """Load a model, and drop others first if it needs their memory; in the loading thread."""
        key = (entry.category, entry.version)
        with self._lock:
            if key in self._loaded:
                return self._loaded[key]
            while (
                self._loaded
                and sum(m.bytes for m in self._loaded.values()) + entry.size > self._memory
            ):
                self._loaded.popitem(last=False)
        detector = self._load(entry)
        model = LoadedModel(entry, detector, max(entry.size, size_of(detector)))
        with self._lock:
            self._loaded[key] = model
        self._on_change(self.loaded)
        return model


def size_of(detector: Detector) -> int:
    """Bytes of a detector's parameters and buffers."""
    tensors = [*detector.network.parameters(), *detector.network.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def load_detector(entry: ModelEntry, device: str) -> Detector:
    """Load a saved detector, check that it is the catalogue's, and score one black picture.

    Raises:
        ModelError: it is damaged, was replaced meanwhile, or gives a score that is no number.
    """
    detector = Detector.load(entry.folder, device)
    if detector.provenance != entry.provenance or detector.threshold != entry.threshold:
        raise ModelError(f"{entry.folder} has changed since it was looked at: roll it in again.")
    _, scores = detector.score_placed(torch.zeros((1, 3, *entry.image_size), dtype=torch.uint8))
    if not np.isfinite(scores).all():
        raise ModelError(
            f"{entry.folder} gives no finite score for a black picture: train it again."
        )
    return detector
