"""The stream whose images are read, decoded and given defects by a Ray cluster's workers: a Ray
Data pipeline.

A block is a batch: the table that goes in names its images and their keys, the one that comes out
holds its tensors, in order. Unusual: tasks, not actors, do the work, because Ray keeps their
processes from one epoch to the next, with the textures and donors that each has unpacked; and a
task that dies with its process is begun again by Ray, so that its rows come once. Batches are
checked for that here. Of images with defects only the defects' pixels travel, beside the plain
images: a third of the bytes.

Where the trainer computes on a GPU, workers send plain images and the GPU makes the defects: it
takes no time there, a fifth of the bytes travels, and the figures are those of the other streams.
This is the only place below the jobs that imports Ray.

In a trial, the work runs in the trial's second bundle, which is reserved with the trial (see
:mod:`clsnf.study.cluster`).
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
# the defects' pixels, of the whole batch, spread over its rows, which Ray wants to be of one length
_INSIDE = "inside"


class RayStream(LocalStream):
    """Images that the workers of a Ray cluster read; Ray must be running.

    Args:
        paths: N references that every node can read.
        settings: how they come onto the canvas.
        workers: CPUs that work for this stream.
        gpus: that workers of :meth:`map_batches` may take, one each.

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
        self._recipes: dict[int, tuple[DefectRecipe, Any]] = {}
        self._banks: dict[int, Any] = {}  # what lies in Ray's object store, by its address

    def load_shared(self, indices: Tensor, device: torch.device) -> Tensor:
        """For a CPU the images lie in Ray's object store, once for this process and the workers of
        its machine.
        """
        if device.type != "cpu":
            return super().load_shared(indices, device)
        reference = ray.put(self.take(indices).numpy())
        bank = _as_tensor(ray.get(reference))
        self._banks[bank.data_ptr()] = reference
        return bank

    def _batches(self, chosen: Sequence[Tensor]) -> Iterator[ImageBatch]:
        padded = self._placements is not None
        function = {"fn": _read, "fn_kwargs": {"settings": self.settings, "padded": padded}}
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
        given = {"settings": self.settings, "padded": padded, "recipe": self._sent(recipe)}
        for number, found in enumerate(
            self._run({"fn": _read_with_defects, "fn_kwargs": given}, chosen, keys)
        ):
            images, regions, inside = (
                torch.from_numpy(found[name]) for name in ("images", "regions", _INSIDE)
            )
            made = DefectBatch.from_region_pixels(
                images, regions, inside.flatten()[: 3 * int(regions.sum())].view(3, -1)
            )
            yield TrainingBatch(
                made, torch.from_numpy(found["valid"]) if padded else None, chosen[number]
            )

    def map_batches(
        self, make: MakeWorker, chosen: Sequence[Tensor], device: torch.device
    ) -> Iterator[Arrays]:
        """As :meth:`Stream.map_batches`, the workers being actors that each hold what `make` gives, on
        GPUs where there are some.

        A process that has a GPU of its own, while the workers have none, does the work itself, on
        images that the workers read.
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
            # CPUs read, GPUs compute: they are other workers, and hold no CPU that a reader may be
            # waiting for.
            read = {"fn": _read, "fn_kwargs": {"settings": self.settings, "padded": padded}}
            given["reads"] = False
            function |= {
                "num_gpus": 1,
                "num_cpus": 0,
                "compute": ActorPoolStrategy(min_size=1, max_size=self.gpus),
            }
            yield from self._counted(self._run(read, chosen, then=function), _rows)
            return
        at_once = max(1, min(len(chosen), self.workers // torch.get_num_threads()))
        function |= {
            "num_cpus": min(self.workers, torch.get_num_threads()),
            "compute": ActorPoolStrategy(size=at_once),
        }
        yield from self._counted(self._run(function, chosen), _rows)

    def _sent(self, recipe: DefectRecipe) -> Any:
        """What workers make a recipe from, in Ray's object store; sent once."""
        if id(recipe) not in self._recipes:
            maker = recipe.maker
            donors = self._banks.get(maker.donors.data_ptr())
            donors = maker.donors.cpu().numpy() if donors is None else donors
            parts = (maker.settings, maker.textures.cpu().numpy(), donors, recipe.mask_mode)
            self._recipes = {
                id(recipe): (recipe, ray.put(parts))
            }  # the recipe is kept, so that its id stays its own
        return self._recipes[id(recipe)][1]

    def _run(
        self,
        function: Mapping[str, Any],
        chosen: Sequence[Tensor],
        keys: Sequence[Tensor] | None = None,
        then: Mapping[str, Any] | None = None,
    ) -> Iterator[Arrays]:
        """The function's arrays for each batch, in order, each batch once."""
        tables = []
        for number, indices in enumerate(chosen):
            columns: dict[str, Any] = {
                _BATCH: np.full(len(indices), number),
                _INDEX: indices.numpy(),
                _PATH: [str(self.paths[index]) for index in indices.tolist()],
            }
            tables.append(
                pa.table(columns if keys is None else columns | {_KEY: keys[number].numpy()})
            )
        if not tables:
            return
        own: dict[str, Any] = (
            {}
            if "compute" in function
            else {"num_cpus": 1, "compute": TaskPoolStrategy(self.workers)}
        )
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        strategy = _strategy()
        if (
            strategy is not None
        ):  # Ray Data's own small tasks too would wait for CPUs that trials hold
            DataContext.get_current().scheduling_strategy = strategy
        data: Dataset = ray.data.from_blocks(tables)
        context = data.context
        context.enable_progress_bars = context.print_on_execution_start = (
            context.execution_options.verbose_progress
        ) = False
        context.execution_options.preserve_order = True
        context.target_max_block_size = None  # a batch is a block, however large its images
        context.raise_original_map_exception = True  # what a user can mend is said in its own words
        own |= {} if strategy is None else {"scheduling_strategy": strategy}
        data = data.map_batches(batch_size=None, batch_format="numpy", **own, **function)
        if then is not None:
            data = data.map_batches(batch_size=None, batch_format="numpy", **then)
        found = data.iter_torch_batches(batch_size=None, prefetch_batches=1, device="cpu")
        yield from self._in_order(_errors_named(iter(found)), chosen)

    def _in_order(
        self, found: Iterator[dict[str, Tensor]], chosen: Sequence[Tensor]
    ) -> Iterator[Arrays]:
        """The batches as they were asked for: each once, whole, in order. Raises TrainingError
        where Ray broke that promise.
        """
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


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _errors_named(found: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The batches; what a worker raised for a user to mend is raised as what it was."""
    try:
        yield from found
    except RayTaskError as error:
        if isinstance(error.cause, ClsnfError):
            raise error.cause from None
        raise


def _strategy() -> PlacementGroupSchedulingStrategy | None:
    """Where the work of a stream is scheduled: in the bundle that its trial reserved for it; None
    for anywhere.
    """
    group = get_current_placement_group()
    if group is None or group.bundle_count < 2:
        return None
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1)


# ---- in the workers ----


def _loaded(rows: Arrays, settings: ImageSettings, padded: bool) -> Arrays:
    """A batch's images on the canvas, with what the work took."""
    _one_thread()
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


def _read(rows: Arrays, settings: ImageSettings, padded: bool) -> Arrays:
    return _loaded(rows, settings, padded)


def _read_with_defects(rows: Arrays, settings: ImageSettings, padded: bool, recipe: Any) -> Arrays:
    found = _loaded(rows, settings, padded)
    maker = _recipe_of(recipe)
    started = time.perf_counter()
    made = maker.apply(
        _as_batch(found), torch.from_numpy(rows[_KEY].copy()), torch.device("cpu")
    ).defects
    count, values = len(rows[_KEY]), made.region_pixels().numpy().ravel()
    inside = np.zeros(
        (count, max(1, math.ceil(len(values) / count))), np.float32
    )  # Ray takes no rows of length 0
    inside.ravel()[: len(values)] = values
    seconds = np.full(count, (time.perf_counter() - started) / count, np.float32)
    return found | {_INSIDE: inside, "regions": made.regions.numpy(), "defects_seconds": seconds}


@lru_cache(maxsize=1)
def _recipe_of(reference: Any) -> DefectRecipe:
    """A recipe, unpacked once in each process."""
    settings, textures, donors, mask_mode = ray.get(reference)
    donors = ray.get(donors) if isinstance(donors, ray.ObjectRef) else donors
    return DefectRecipe(DefectMaker(settings, _as_tensor(textures), _as_tensor(donors)), mask_mode)


def _as_tensor(bank: np.ndarray) -> Tensor:
    """A bank that lies in the object store, as it lies there."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The given NumPy array is not writable"
        )  # nobody writes to a bank
        return torch.from_numpy(bank)


def _one_thread() -> None:
    """A task is one CPU's work."""
    keep_freed_memory()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


class _Actor:
    """Holds a worker, and gives it batches that it reads itself or that other workers read."""

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
        found = _loaded(rows, self._settings, self._padded) if self._reads else rows
        torch.set_num_threads(self._threads)  # figures may depend on it, in the last bit
        kept = {name: found[name] for name in (_BATCH, _INDEX, "read_seconds", "decode_seconds")}
        return kept | self._worker(_as_batch(found))
