"""The models that are loaded: each on its first use, within a bound of memory.

The least recently used models make room for others. New models *roll in*: each is loaded and
answers a picture before anything changes, and then the whole catalogue is replaced in one step. So
no request sees half of the change, and requests under way end with the model that they began with.

What is broken is *refused*, category by category: its version of before serves on, and the others
roll in. A folder that can't be read, or of which no model can be used, changes nothing. To roll
back is to roll in the folder of before.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from clsnf.core.errors import ClsnfError, ModelError, nearest
from clsnf.core.threads import use_torch_threads
from clsnf.detector import Detector
from clsnf.detector_file import check_tensors, read_description
from clsnf.serving.catalogue import Catalogue, ModelEntry, none_usable, read_catalogue
from clsnf.serving.errors import NotFound, ServiceUnavailable

Loader = Callable[[ModelEntry], Detector]
Key = tuple[str, str]  # category and version

log = logging.getLogger("clsnf.serving")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A loaded detector and its catalogue entry.

    Equal only to itself: batches are gathered by it.
    """

    entry: ModelEntry
    detector: Detector
    bytes: int


@dataclass(frozen=True)
class Refusal:
    """A model that does not serve, though it lies in the folder.

    Attributes:
        category: whose; None for the whole folder.
        cause: one line.
        serves: the version of before, which serves on; None where there is none.
    """

    category: str | None
    cause: str
    serves: str | None


def refusals_line(refused: list[Refusal]) -> str | None:
    """What does not serve and why, in one line; None where all serves."""
    causes = [f"{r.category}: {r.cause}" if r.category else r.cause for r in refused]
    return "; ".join(causes) or None


class ModelStore:
    """Models of one folder, none before the first :meth:`roll`.

    All calls of :meth:`get` come from one event loop.

    Args:
        memory: bytes of parameters that may stay loaded. While a model loads, it comes on top.
        load: makes a detector of an entry, and lets it answer.
        on_change: called whenever the loaded or the refused models change.
    """

    def __init__(
        self, memory: int, load: Loader, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._memory, self._load, self._on_change = memory, load, on_change
        # By category and version, least recently used first; under the lock, as all of these.
        self._loaded: OrderedDict[Key, LoadedModel] = OrderedDict()
        self._staged: dict[Key, LoadedModel] = {}  # new ones that wait for the exchange
        self._only_here: set[Key] = set()  # loaded ones whose files are gone: they must stay
        self._failed: dict[str, str] = {}  # causes of the last loads, by category
        self._lock = threading.RLock()
        self._rolling = threading.Lock()
        self._loading: dict[Key, asyncio.Future[LoadedModel]] = {}
        # One at a time: two networks that are built at once would need the memory of both.
        self._pool = ThreadPoolExecutor(1, "load", initializer=use_torch_threads, initargs=(1,))
        self._catalogue = Catalogue(Path(), {})
        self._folder_refused: str | None = None
        self._told: set[str] = set()

    @property
    def catalogue(self) -> Catalogue:
        return self._catalogue

    @property
    def loaded(self) -> list[LoadedModel]:
        """Least recently used first."""
        with self._lock:
            return list(self._loaded.values())

    @property
    def refused(self) -> list[Refusal]:
        """What does not serve and why, the folder as a whole first."""
        with self._lock:
            entries = self._catalogue.entries
            causes = self._failed | self._catalogue.refused
            found = [
                Refusal(category, cause, entries[category].version if category in entries else None)
                for category, cause in sorted(causes.items())
            ]
            if self._folder_refused is not None:
                found.insert(0, Refusal(None, self._folder_refused, None))
            return found

    def entry(self, category: str) -> ModelEntry:
        """The catalogue's entry of a category.

        Raises:
            NotFound: there is none; the error has the list of categories.
            ServiceUnavailable: it was refused, and there is none of before.
        """
        catalogue = self._catalogue
        found = catalogue.entries.get(category)
        if found is None and category in catalogue.refused:
            raise ServiceUnavailable(
                f"The model {category!r} can't be used: {catalogue.refused[category]}"
            )
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
        while True:
            entry = self.entry(category)
            key = (entry.category, entry.version)
            with self._lock:
                if key in self._loaded:
                    self._loaded.move_to_end(key)
                    return self._loaded[key]
            if key not in self._loading:  # all who ask meanwhile wait for the same load
                loop = asyncio.get_running_loop()
                future = loop.run_in_executor(self._pool, self._load_model, entry)
                self._loading[key] = future
                future.add_done_callback(partial(self._forget_load, key))
            try:
                return await asyncio.shield(self._loading[key])
            except ClsnfError as error:
                now = self.entry(category)
                if (now.version, now.folder) == (entry.version, entry.folder):
                    raise ServiceUnavailable(
                        f"The model {category!r} can't be loaded: {error}"
                    ) from error  # else another has rolled in meanwhile

    def _forget_load(self, key: Key, _: asyncio.Future[LoadedModel]) -> None:
        self._loading.pop(key, None)

    def lacks_room_for(self, entry: ModelEntry) -> bool:
        """Whether another model would have to go to load this one, which is not loaded."""
        key = (entry.category, entry.version)
        with self._lock:
            here = key in self._loaded or key in self._loading
            return not here and self._bytes() + entry.size > self._memory

    # ---- roll in ----

    def roll(self, folder: Path, preload: bool = False) -> None:
        """Roll in the models of a folder: they replace those served now. Blocks until they have.

        At the start there is nothing to keep: the first model that answers is enough, and the files
        of the others are compared with their checksums. With `preload`, all of them answer. Later
        each new version answers. It stays loaded where there is room for it beside those in use.

        Args:
            folder: of models, see :func:`clsnf.detector_folders.find_detectors`. The same one
                again rolls in what it holds now.
            preload: load all that fit at the start.

        Raises:
            ClsnfError: the folder can't be read, or none of its models can be used; everything
                stays as it is, and :attr:`refused` says why.
        """
        with self._rolling:
            try:
                found = read_catalogue(folder, self._memory)
                self._keep_what_is_only_here()
                catalogue = self._checked(found, preload)
            except ClsnfError as error:
                with self._lock:
                    self._staged.clear()
                    self._folder_refused = str(error)
                self._tell(f"new models are refused: {error}")
                self._on_change()
                raise
            self._exchange(catalogue)

    def _checked(self, found: Catalogue, preload: bool) -> Catalogue:
        """The catalogue to exchange for: what works of the new one, else what served before.

        Raises ModelError where nothing of the new one works.
        """
        before = self._catalogue.entries
        entries: dict[str, ModelEntry] = {}
        refused = dict(found.refused)
        for category, entry in found.entries.items():
            enough = not before and not preload and bool(entries)
            try:
                if enough or self._is_known(entry):
                    check_tensors(entry.folder, entry.tensors_sha256)
                else:
                    self._pool.submit(self._stage, entry).result()
                entries[category] = entry
            except ClsnfError as error:
                refused[category] = str(error)
        if not entries:
            with self._lock:
                self._failed |= {name: cause for name, cause in refused.items() if name in before}
            raise ModelError(none_usable(found.folder, refused))
        refused |= {name: cause for name, cause in found.left_out.items() if name in before}
        for category in refused:
            if category in before and self._can_answer(before[category]):
                entries[category] = before[category]
        return replace(found, entries=entries, refused=refused)

    def _is_known(self, entry: ModelEntry) -> bool:
        """Whether this version serves already."""
        before = self._catalogue.entries.get(entry.category)
        return (
            before is not None
            and before.version == entry.version
            and entry.category not in self._failed
        )

    def _exchange(self, catalogue: Catalogue) -> None:
        """Replace the catalogue, and load what was in use where it is not loaded yet."""
        keys = {(e.category, e.version) for e in catalogue.entries.values()}
        with self._lock:
            in_use = [category for category, _ in self._loaded]
            models = [*self._loaded.items(), *self._staged.items()]
            self._catalogue = catalogue
            self._loaded = OrderedDict((key, model) for key, model in models if key in keys)
            self._only_here &= keys
            self._staged.clear()
            self._failed.clear()
            self._folder_refused = None
        for refusal in self.refused:
            goes_on = f"; {refusal.serves} serves on" if refusal.serves else ""
            self._tell(f"the model {refusal.category!r} is refused: {refusal.cause}{goes_on}")
        for name, cause in catalogue.left_out.items():
            if name not in catalogue.refused:
                self._tell(f"{name!r} in {catalogue.folder} {cause}: it is left out")
        self._on_change()
        for category in reversed(in_use):
            if category in catalogue.entries:
                self._pool.submit(self._load_if_it_fits, catalogue.entries[category])

    def _keep_what_is_only_here(self) -> None:
        """Find the loaded models whose files are gone: they serve as long as they stay loaded."""
        gone = {key for key, model in self._snapshot().items() if not _is_on_disk(model.entry)}
        with self._lock:
            self._only_here = gone & self._loaded.keys()

    def _can_answer(self, entry: ModelEntry) -> bool:
        """Whether a model is loaded, or can be loaded again."""
        with self._lock:
            if (entry.category, entry.version) in self._loaded:
                return True
        return _is_on_disk(entry)

    def _snapshot(self) -> dict[Key, LoadedModel]:
        with self._lock:
            return dict(self._loaded)

    def _tell(self, line: str) -> None:
        """Say something in the log, once."""
        if line not in self._told:
            self._told.add(line)
            log.warning("%s", line)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- the loading thread ----

    def _stage(self, entry: ModelEntry) -> None:
        """Let a new model answer, and keep it for the exchange where there is room for it."""
        model = self._answering(entry)
        with self._lock:
            if self._bytes() + model.bytes <= self._memory:
                self._staged[entry.category, entry.version] = model

    def _load_model(self, entry: ModelEntry) -> LoadedModel:
        """Load a model, and drop others first if it needs their memory."""
        key = (entry.category, entry.version)
        with self._lock:
            if key in self._loaded:
                return self._loaded[key]
            self._make_room(entry.size)
        try:
            model = self._answering(entry)
        except ClsnfError as error:
            with self._lock:
                if self._is_served(entry):
                    self._failed[entry.category] = str(error)
            self._tell(f"the model {entry.category!r} can't be loaded: {error}")
            self._on_change()
            raise
        with self._lock:
            if self._is_served(entry):  # else it was replaced meanwhile
                self._loaded[key] = model
                self._failed.pop(entry.category, None)
        self._on_change()
        return model

    def _is_served(self, entry: ModelEntry) -> bool:
        now = self._catalogue.entries.get(entry.category)
        return now is not None and now.version == entry.version

    def _load_if_it_fits(self, entry: ModelEntry) -> None:
        """Load a model that was in use before the exchange, if no other has to go for it."""
        with self._lock:
            fits = self._bytes() + entry.size <= self._memory
        if fits:
            self._load_model(entry)

    def _answering(self, entry: ModelEntry) -> LoadedModel:
        """A model that has answered. Raises ModelError, whatever goes wrong in its files."""
        try:
            detector = self._load(entry)
        except ClsnfError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{entry.folder}: {type(error).__name__} {reason}") from error
        return LoadedModel(entry, detector, max(entry.size, size_of(detector)))

    def _bytes(self) -> int:
        return sum(m.bytes for m in (*self._loaded.values(), *self._staged.values()))

    def _make_room(self, size: int) -> None:
        """Drop models until there is room, first those that wait, then the least recently used."""
        while self._bytes() + size > self._memory:
            if self._staged:
                self._staged.popitem()
                continue
            key = next((key for key in self._loaded if key not in self._only_here), None)
            if key is None:
                return
            del self._loaded[key]


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


def _is_on_disk(entry: ModelEntry) -> bool:
    """Whether the files of a model are still those of its version."""
    try:
        if read_description(entry.folder).version != entry.version:
            return False
        check_tensors(entry.folder, entry.tensors_sha256)
    except ClsnfError:
        return False
    return True
