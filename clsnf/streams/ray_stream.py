"""A stream whose images are read, decoded and given defects by a Ray cluster's workers (Ray Data).

A block of Ray Data is a batch. The table that goes in names the images and their keys; the table
that comes out holds the tensors, in order. Tasks, not actors, do the work: Ray keeps their
processes from one epoch to the next, with the textures and donors that each has loaded
(:func:`_load_recipe`). If a task's process dies, Ray runs the task again. This module checks that
every batch comes once, whole and in order.

Where the trainer computes on a CPU, workers send plain images, regions and the pixels inside the
regions: a third of the bytes of whole batches with defects. Where it computes on a GPU, workers
send plain images alone, a fifth of the bytes, and the GPU makes the defects, which takes it hardly
any time. The results are those of the other streams.

In a trial, the work runs in the trial's second bundle of resources, which is reserved with the
trial (see :mod:`clsnf.study.cluster`). Below the jobs, Ray is imported here alone.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import RayTaskError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from clsnf.core.config import ImageSettings
from clsnf.core.errors import ClsnfError, SettingsError, TrainingError
from clsnf.core.memory import keep_freed_memory
from clsnf.data.sources import Reference
from clsnf.streams.stream import (
    Arrays,
    DefectRecipe,
    ImageBatch,
    LocalStream,
    MakeWorker,
    TrainingBatch,
    Worker,
    load_timed,
)
from clsnf.synthesis.training_defects import DefectBatch, DefectMaker

_STEPS = ("read", "decode", "defects")
_BATCH, _INDEX, _PATH, _KEY = "batch", "index", "path", "key"
# The pixels inside the whole batch's regions. They are spread over the rows, because Ray Data wants
# rows of one length.
_REGION_PIXELS = "region_pixels"


class RayStream(LocalStream):
    """Images that the workers of a Ray cluster read; Ray must be running.

    Args:
        paths: N references that every node can read.
        settings: the network's input.
        workers: number of CPUs that work for this stream.
        gpus: number of GPUs that the workers of :meth:`map_batches` may take, one each.

    Raises:
        SettingsError: Ray isn't running.
    """

    kind = "ray"

    def __init__(
        self, paths: Sequence[Reference], settings: ImageSettings, workers: int, gpus: int = 0
    ) -> None:
        super().__init__(paths, settings)
        if not ray.is_initialized():
            raise SettingsError("A stream of --stream ray needs a running Ray: say --stream local.")
        self.workers, self.gpus = workers, gpus
        # What lies in Ray's object store: images by the address of their memory, and the recipe
        # that was sent last.
        self._shared: dict[int, ray.ObjectRef] = {}
        self._sent: tuple[DefectRecipe, ray.ObjectRef] | None = None

    def load_shared(self, indices: Tensor, device: torch.device) -> Tensor:
        """As :meth:`Stream.load_shared`; for a CPU the images lie in Ray's object store.

        There they are held once, for this process and for the workers of its machine.
        """
        if device.type != "cpu":
            return super().load_shared(indices, device)
        reference = ray.put(self.take(indices).numpy())
        images = _as_tensor(ray.get(reference))
        self._shared[images.data_ptr()] = reference
        return images

    def _batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        padded = self._placements is not None
        function = {"fn": _load, "fn_kwargs": {"settings": self.settings, "padded": padded}}
        for number, found in enumerate(self._run(function, chosen)):
            valid = torch.from_numpy(found["valid"]) if padded else None
            yield ImageBatch(torch.from_numpy(found["images"]), valid, chosen[number])

    def _training_batches(
        self,
        recipe: DefectRecipe,
        chosen: Sequence[Tensor],
        keys: Sequence[Tensor],
        device: torch.device,
    ) -> Iterator[TrainingBatch]:
        if device.type != "cpu":
            yield from super()._training_batches(recipe, chosen, keys, device)
            return
        padded = self._placements is not None
        given = {"settings": self.settings, "padded": padded, "recipe": self._send(recipe)}
        function = {"fn": _load_with_defects, "fn_kwargs": given}
        for number, found in enumerate(self._run(function, chosen, keys)):
            images, regions, pixels = (
                torch.from_numpy(found[name]) for name in ("images", "regions", _REGION_PIXELS)
            )
            pixels = pixels.flatten()[: 3 * int(regions.sum())].view(3, -1)
            made = DefectBatch.from_region_pixels(images, regions, pixels)
            valid = torch.from_numpy(found["valid"]) if padded else None
            yield TrainingBatch(made, valid, chosen[number])

    def map_batches(
        self, make: MakeWorker, chosen: Sequence[Tensor], device: torch.device
    ) -> Iterator[Arrays]:
        """As :meth:`Stream.map_batches`; each worker is an actor, on a GPU if the stream has some.

        If this process computes on a GPU and the stream has none, this process is the worker, on
        images that the stream's workers read.
        """
        if device.type != "cpu" and not self.gpus:
            yield from super().map_batches(make, chosen, device)
            return
        padded = self._placements is not None
        given = {
            "settings": self.settings,
            "padded": padded,
            "make": make,
            "threads": torch.get_num_threads(),
        }
        function: dict[str, Any] = {"fn": _Actor, "fn_constructor_kwargs": given}
        if self.gpus:
            # CPUs read and GPUs compute, in separate workers. The GPU's workers hold no CPU, for
            # which a reader may be waiting.
            read = {"fn": _load, "fn_kwargs": {"settings": self.settings, "padded": padded}}
            given["reads"] = False
            function |= {
                "num_gpus": 1,
                "num_cpus": 0,
                "compute": ActorPoolStrategy(min_size=1, max_size=self.gpus),
            }
            yield from self._counted(self._run(read, chosen, then=function), _row_count)
            return
        at_once = max(1, min(len(chosen), self.workers // torch.get_num_threads()))
        function |= {
            "num_cpus": min(self.workers, torch.get_num_threads()),
            "compute": ActorPoolStrategy(size=at_once),
        }
        yield from self._counted(self._run(function, chosen), _row_count)

    def _send(self, recipe: DefectRecipe) -> ray.ObjectRef:
        """What workers make a recipe from, in Ray's object store; the same recipe is sent once."""
        if self._sent is None or self._sent[0] is not recipe:
            maker = recipe.maker
            shared = self._shared.get(maker.donors.data_ptr())
            donors = maker.donors.cpu().numpy() if shared is None else shared
            parts = (maker.settings, maker.textures.cpu().numpy(), donors, recipe.mask_mode)
            self._sent = (recipe, ray.put(parts))
        return self._sent[1]

    def _run(
        self,
        function: Mapping[str, Any],
        chosen: Sequence[Tensor],
        keys: Sequence[Tensor] | None = None,
        then: Mapping[str, Any] | None = None,
    ) -> Iterator[Arrays]:
        """The function's arrays for each batch, in order, each batch once.

        Args:
            function: arguments of Ray Data's ``map_batches``, with ``fn`` the function.
            keys: the samples' keys of each batch, if the function needs them.
            then: a second function, which works on what the first one returns.
        """
        if len(chosen) == 0:
            return
        strategy = _scheduling_strategy()
        own: dict[str, Any] = {} if strategy is None else {"scheduling_strategy": strategy}
        if "compute" not in function:
            own |= {"num_cpus": 1, "compute": TaskPoolStrategy(self.workers)}
        data = _dataset(self._tables(chosen, keys), strategy)
        data = data.map_batches(batch_size=None, batch_format="numpy", **own, **function)
        if then is not None:
            data = data.map_batches(batch_size=None, batch_format="numpy", **then)
        found = data.iter_torch_batches(batch_size=None, prefetch_batches=1, device="cpu")
        yield from self._in_order(_user_errors(iter(found)), chosen)

    def _tables(
        self, chosen: Sequence[Tensor], keys: Sequence[Tensor] | None
    ) -> Iterator[pa.Table]:
        """What goes to the workers: a table for each batch, a row for each image."""
        for number, indices in enumerate(chosen):
            columns: dict[str, Any] = {
                _BATCH: np.full(len(indices), number),
                _INDEX: indices.numpy(),
                _PATH: [str(self.paths[index]) for index in indices.tolist()],
            }
            yield pa.table(columns if keys is None else columns | {_KEY: keys[number].numpy()})

    def _in_order(
        self, found: Iterator[dict[str, Tensor]], chosen: Sequence[Tensor]
    ) -> Iterator[Arrays]:
        """The batches as they were asked for. Raises TrainingError if one is not whole."""
        number = -1
        for number, tensors in enumerate(found):
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            if (
                number >= len(chosen)
                or set(arrays.pop(_BATCH)) != {number}
                or not np.array_equal(arrays.pop(_INDEX), chosen[number])
            ):
                raise TrainingError(
                    f"Ray's workers gave batch {number} twice, in parts or not at all: say "
                    "--stream local."
                )
            for step in _STEPS:
                seconds = arrays.pop(f"{step}_seconds", None)
                if seconds is not None:
                    self.counters.add(step, len(seconds), float(seconds.sum()))
            yield arrays
        if number + 1 != len(chosen):
            raise TrainingError(
                f"Ray's workers gave {number + 1} of {len(chosen)} batches: say --stream local."
            )


def _dataset(
    tables: Iterable[pa.Table], strategy: PlacementGroupSchedulingStrategy | None
) -> Dataset:
    """A data set of one block for each table, with the settings that a stream needs.

    In this process, Ray Data logs critical messages alone from now on, and its own small tasks too
    are scheduled by ``strategy``: elsewhere they would wait for CPUs that trials hold.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if strategy is not None:
        DataContext.get_current().scheduling_strategy = strategy
    data: Dataset = ray.data.from_blocks(list(tables))
    context = data.context
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # a batch is a block, however large its images
    context.raise_original_map_exception = True  # an error that a user can mend keeps its type
    return data


def _row_count(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _user_errors(found: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The batches; raises an error of this project that a worker raised as it is, not as Ray's."""
    try:
        yield from found
    except RayTaskError as error:
        if isinstance(error.cause, ClsnfError):
            raise error.cause from None
        raise


def _scheduling_strategy() -> PlacementGroupSchedulingStrategy | None:
    """Where a stream's work runs: in the bundle that its trial reserved; None for anywhere."""
    group = get_current_placement_group()
    if group is None or group.bundle_count < 2:
        return None
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1)


# ---- in the workers ----


def _load(rows: Arrays, settings: ImageSettings, padded: bool) -> Arrays:
    """A batch's images at the size of the network's input, with the seconds that each took."""
    _use_one_thread()
    images = np.empty((len(rows[_PATH]), 3, *settings.size), np.uint8)
    valid = np.ones((len(images), *settings.size), np.bool_) if padded else None
    seconds = np.empty((2, len(images)), np.float32)
    for row, path in enumerate(rows[_PATH]):
        image, placement, seconds[:, row] = load_timed(str(path), settings)
        images[row] = image.numpy()
        if valid is not None:
            valid[row] = placement.valid.numpy()
    found = {_BATCH: rows[_BATCH], _INDEX: rows[_INDEX], "images": images}
    found |= {"read_seconds": seconds[0], "decode_seconds": seconds[1]}
    return found if valid is None else found | {"valid": valid}


def _as_batch(found: Arrays) -> ImageBatch:
    valid = torch.from_numpy(found["valid"]) if "valid" in found else None
    return ImageBatch(torch.from_numpy(found["images"]), valid, torch.from_numpy(found[_INDEX]))


def _load_with_defects(
    rows: Arrays, settings: ImageSettings, padded: bool, recipe: ray.ObjectRef
) -> Arrays:
    """As :func:`_load`, with the regions of the defects and the pixels inside them."""
    found = _load(rows, settings, padded)
    maker = _load_recipe(recipe)
    started = time.perf_counter()
    keys = torch.from_numpy(rows[_KEY].copy())
    made = maker.apply(_as_batch(found), keys, torch.device("cpu")).defects
    count, values = len(rows[_KEY]), made.region_pixels().numpy().ravel()
    width = max(1, math.ceil(len(values) / count))  # Ray takes no rows of length 0
    pixels = np.zeros((count, width), np.float32)
    pixels.ravel()[: len(values)] = values
    seconds = np.full(count, (time.perf_counter() - started) / count, np.float32)
    return found | {
        _REGION_PIXELS: pixels,
        "regions": made.regions.numpy(),
        "defects_seconds": seconds,
    }


@lru_cache(maxsize=1)
def _load_recipe(reference: ray.ObjectRef) -> DefectRecipe:
    """The recipe behind a reference to Ray's object store.

    A worker's process keeps the last one, so that it counts the levels of textures and donors once
    and not for every batch. The next recipe takes its place; ``_load_recipe.cache_clear()`` drops
    it.
    """
    settings, textures, donors, mask_mode = ray.get(reference)
    donors = ray.get(donors) if isinstance(donors, ray.ObjectRef) else donors
    return DefectRecipe(DefectMaker(settings, _as_tensor(textures), _as_tensor(donors)), mask_mode)


def _as_tensor(images: np.ndarray) -> Tensor:
    """Images that lie in the object store as a tensor of the same memory; nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(images)


def _use_one_thread() -> None:
    """Set this worker's process to compute on one thread, as a task has one CPU."""
    keep_freed_memory()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


class _Actor:
    """Holds a worker of :meth:`RayStream.map_batches` in an actor's process.

    Args:
        settings: the network's input.
        padded: whether images of the stream are padded.
        make: makes the worker, on this actor's GPU if it has one.
        threads: that the worker computes on.
        reads: whether the actor reads the images; else it gets batches that were read.
    """

    def __init__(
        self,
        settings: ImageSettings,
        padded: bool,
        make: MakeWorker,
        threads: int,
        reads: bool = True,
    ) -> None:
        self._settings, self._padded, self._threads, self._reads = settings, padded, threads, reads
        self._worker: Worker = make(torch.device("cuda" if ray.get_gpu_ids() else "cpu"))

    def __call__(self, rows: Arrays) -> Arrays:
        found = _load(rows, self._settings, self._padded) if self._reads else rows
        torch.set_num_threads(self._threads)  # the last bit of a result may depend on it
        kept = {name: found[name] for name in (_BATCH, _INDEX, "read_seconds", "decode_seconds")}
        return kept | self._worker(_as_batch(found))
