"""The models that are loaded: each on its first use, within a bound of memory, the least recently
used out first.

Unusual: the catalogue is one immutable reference. A new study's winners *roll in* by exchanging it,
    after those models that are in use
have been loaded from the new folder: no request waits for a load, none sees half of the change, and
requests under way end with the model that they began with. Winners that can't be loaded are not
rolled in at all. To roll back is to roll in the folder of before.
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

from clsnf.core.errors import ClsnfError, ModelError, SettingsError, nearest
from clsnf.detector import Detector
from clsnf.serving.catalogue import Catalogue, Entry, read_catalogue
from clsnf.serving.errors import Unavailable, Unknown

Loader = Callable[[Entry], Detector]


@dataclass(frozen=True, eq=False)  # itself, not its content, is what batches are gathered by
class Model:
    """A loaded detector and its catalogue entry."""

    entry: Entry
    detector: Detector
    bytes: int


class ModelStore:
    """Models of one folder, none before the first :meth:`roll`; :meth:`get` belongs to one event
    loop.

    Args:
        memory: bytes of parameters that may stay loaded.
        load: makes a detector of an entry.
        on_change: told the loaded models, whenever they change.
    """

    def __init__(
        self,
        memory: int,
        load: Loader,
        on_change: Callable[[list[Model]], None] = lambda models: None,
    ) -> None:
        self._memory, self._load, self._on_change = memory, load, on_change
        self._loaded: OrderedDict[tuple[str, str], Model] = (
            OrderedDict()
        )  # least recently used first
        self._lock = threading.Lock()  # over _loaded
        self._loading: dict[tuple[str, str], asyncio.Future[Model]] = {}
        # One at a time: two networks that are built at once would need the memory of both.
        self._pool = ThreadPoolExecutor(1, "load")
        self._catalogue = Catalogue(Path(), {})
        self.refused: str | None = None  # why the last winners that should have rolled in were not

    @property
    def catalogue(self) -> Catalogue:
        return self._catalogue

    @property
    def loaded(self) -> list[Model]:
        """Least recently used first."""
        with self._lock:
            return list(self._loaded.values())

    def entry(self, category: str) -> Entry:
        """Raises Unknown, with the list of categories."""
        catalogue = self._catalogue
        found = catalogue.entries.get(category)
        if found is None:
            hint = nearest(category[:100], catalogue.categories)
            raise Unknown(
                f"There is no model {category[:100]!r}.{hint}", {"categories": catalogue.categories}
            )
        return found

    async def get(self, category: str) -> Model:
        """The model of a category, loaded if it was not.

        Raises:
            Unknown: there is none.
            Unavailable: it can't be loaded.
        """
        entry = self.entry(category)
        key = (entry.category, entry.version)
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
                return self._loaded[key]
        if key not in self._loading:  # all who ask meanwhile wait for the same load
            future = asyncio.get_running_loop().run_in_executor(self._pool, self._bring, entry)
            self._loading[key] = future
            future.add_done_callback(lambda _: self._loading.pop(key, None))
        try:
            return await asyncio.shield(self._loading[key])
        except ClsnfError as error:
            raise Unavailable(f"The model {category!r} can't be loaded: {error}") from error

    def roll(self, folder: Path, preload: bool = False) -> None:
        """Let the models of a folder (see :func:`read_catalogue`) take the place of this one's;
        blocks until they have.

        Args:
            folder: of models.
            preload: load all that fit before the change, not only those whose categories are in
                use.

        Raises:
            ClsnfError: those models can't be used; everything stays as it is, and :attr:`refused`
                says why.
        """
        try:
            catalogue = read_fitting(folder, self._memory)
            in_use = {model.entry.category for model in self.loaded}
            room = self._memory
            for category in catalogue.categories:
                entry = catalogue.entries[category]
                if (preload or category in in_use) and entry.size <= room:
                    room -= entry.size
                    self._pool.submit(self._bring, entry).result()
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

    def _bring(self, entry: Entry) -> Model:
        """Load a model, after making room for it; runs in the loading thread."""
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
        model = Model(entry, detector, max(entry.size, size_of(detector)))
        with self._lock:
            self._loaded[key] = model
        self._on_change(self.loaded)
        return model


def read_fitting(folder: Path, memory: int) -> Catalogue:
    """:func:`read_catalogue`, where each model fits into the memory that all of them share. Raises
    SettingsError, ModelError.
    """
    catalogue = read_catalogue(folder)
    for entry in catalogue.entries.values():
        if entry.size > memory:
            raise SettingsError(
                f"The model {entry.category!r} has {entry.size / 2**20:.0f} MiB, but all models "
                "together may have "
                f"{memory / 2**20:.0f}: raise memory_mb."
            )
    return catalogue


def size_of(detector: Detector) -> int:
    """Bytes of a detector's parameters and buffers."""
    tensors = [*detector.network.parameters(), *detector.network.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def load_detector(entry: Entry, device: str) -> Detector:
    """Load a saved detector, see that it is the one that the catalogue speaks of, and let it look
    at one black picture.

    Raises:
        ModelError: it is damaged, was exchanged meanwhile, or gives figures that are none.
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
