"""The stage store: finished pieces of work on disk, found by their content.

A stage is a folder ``<root>/<kind>/<key>/`` with ``tensors.safetensors`` and ``facts.json``; the
key is the hash of everything that decided its content. Unusual: a stage appears whole or not at
all, and while one process computes a stage, others that want the same one, on this machine or on
another that shares the file system, wait for it instead of doing it twice (see
:mod:`clsnf.training.leases`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clsnf.core.errors import OutputError
from clsnf.core.files import atomic_write, write_json
from clsnf.core.hashing import content_key
from clsnf.core.memory import release_freed_memory
from clsnf.core.remote import RemoteFolder
from clsnf.training.leases import Holder, Leases

# Part of every key: raise it when the same settings would give other results.
RESULTS_VERSION = 2


@dataclass(frozen=True)
class Artifact:
    """A finished piece of work: named tensors and plain facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class ArtifactStore:
    """Stages below a folder.

    Args:
        root: made where it is missing.
        remote: a folder that more machines share than `root`: what is missing in `root` is looked
            for there, what is computed is stored there too.
        leases: hands out the leases on stages; files in `root` where None.

    Attributes:
        computed, reused: number of stages of each kind that this object had to compute, and that it
            found.
        seconds: time that computing each kind took, without the stages that it asked for itself;
            ``waiting`` for those that another process was computing, ``storing``, and what callers
            count with :meth:`clock`.
    """

    def __init__(
        self, root: Path, remote: RemoteFolder | None = None, leases: Holder | None = None
    ) -> None:
        self.root, self._remote = root, remote
        self.computed: dict[str, int] = {}
        self.reused: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._leases = leases or Leases(root / ".leases")
        self._inner = 0.0  # seconds of the block under way that were counted inside it

    def key(self, content: Mapping[str, Any]) -> str:
        """The name of the stage that this content decides."""
        return content_key({"version": RESULTS_VERSION, **content})

    def find(self, kind: str, key: str) -> Artifact | None:
        """The stage, None where it was not computed yet.

        Raises:
            OutputError: its files are damaged.
        """
        folder = self.root / kind / key
        facts = folder / "facts.json"
        if not facts.is_file() and not self._pull(f"{kind}/{key}", folder):
            return None
        try:
            return Artifact(
                load_file(folder / "tensors.safetensors"), json.loads(facts.read_text())
            )
        except FileNotFoundError:  # dropped since we looked
            return None
        except (SafetensorError, OSError, ValueError) as error:
            raise OutputError(
                f"The stored stage {folder} is damaged ({error}): delete it, and it will be "
                "computed anew."
            ) from error

    def _pull(self, name: str, folder: Path) -> bool:
        """Fetch a stage that another machine stored; its facts come last, and so does a whole
        stage.
        """
        return (
            self._remote is not None
            and self._remote.read(f"{name}/facts.json") is not None
            and self._remote.pull(name, folder)
        )

    def get(
        self, kind: str, content: Mapping[str, Any], compute: Callable[[], Artifact]
    ) -> Artifact:
        """The stage that `content` decides, computed only if nobody has it."""
        key = self.key(content)
        found = self.find(kind, key)
        if found is None:
            with ExitStack() as held:
                with self.clock("waiting"):
                    held.enter_context(self._leases.hold(f"{kind}-{key}"))
                    found = self.find(kind, key)
                if found is None:
                    self.computed[kind] = self.computed.get(kind, 0) + 1
                    with self.clock(kind):
                        stage = compute()
                        with self.clock("storing"):
                            self._put(kind, key, stage)
                    release_freed_memory()
                    return stage
        self.reused[kind] = self.reused.get(kind, 0) + 1
        return found

    @contextmanager
    def clock(self, kind: str) -> Iterator[None]:
        """Count the block's time in :attr:`seconds`, without that of blocks and stages inside it."""
        started, outer = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[kind] = self.seconds.get(kind, 0.0) + took - self._inner
            self._inner = outer + took

    def drop(self, kind: str, content: Mapping[str, Any]) -> None:
        """Forget a stage that nobody will ask for again."""
        folder = self.root / kind / self.key(content)
        gone = folder.with_name(f".{folder.name}.old")
        with suppress(OSError):
            folder.rename(gone)  # at once: nobody finds half of it
        shutil.rmtree(gone, ignore_errors=True)
        if self._remote is not None:
            name = f"{kind}/{folder.name}"
            self._remote.delete(f"{name}/facts.json")  # first: without it there is no stage
            self._remote.delete(name)

    def _put(self, kind: str, key: str, stage: Artifact) -> None:
        with atomic_write(self.root / kind / key) as draft:
            draft.mkdir()
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in stage.tensors.items()},
                draft / "tensors.safetensors",
            )
            write_json(draft / "facts.json", stage.facts)
        if self._remote is not None:
            for file in ("tensors.safetensors", "facts.json"):  # in this order: see _pull
                self._remote.push(self.root / kind / key / file, f"{kind}/{key}/{file}")
