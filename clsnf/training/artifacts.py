"""Artifacts: finished pieces of work on disk, found by what decided them.

An artifact is a folder ``<root>/<kind>/<key>/`` with ``tensors.safetensors`` and ``facts.json``.
The key is the hash of everything that decided its content. The folder appears whole or not at all.
While one process computes an artifact, others that ask for the same one wait for it (see
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
from clsnf.training.leases import FileLeases, Leases

# Part of every key. Raise it when the same settings give other results than before.
RESULTS_VERSION = 2


@dataclass(frozen=True)
class Artifact:
    """A finished piece of work: named tensors and plain facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class ArtifactStore:
    """Artifacts in a folder.

    Args:
        root: the folder; created if it is missing.
        remote: a folder that more machines share. Artifacts that are missing in `root` are fetched
            from there, and computed ones are stored there too.
        leases: say who computes an artifact; None for files in `root`.

    Attributes:
        computed, reused: for each kind, the number of artifacts that this object computed and
            found.
        seconds: for each kind, the time of computing, without that of other artifacts asked for
            meanwhile; also ``waiting`` for other processes, ``storing``, and what callers count
            with :meth:`clock`.
    """

    def __init__(
        self, root: Path, remote: RemoteFolder | None = None, leases: Leases | None = None
    ) -> None:
        self.root = root
        self._remote = remote
        self.computed: dict[str, int] = {}
        self.reused: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._leases = leases or FileLeases(root / ".leases")
        self._inner = 0.0  # seconds of the block under way that were counted inside it

    def key(self, content: Mapping[str, Any]) -> str:
        """The key of the artifact that this content decides."""
        return content_key({"version": RESULTS_VERSION, **content})

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact, or None if it is not stored.

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
        except FileNotFoundError:  # dropped meanwhile
            return None
        except (SafetensorError, OSError, ValueError) as error:
            raise OutputError(
                f"The stored artifact {folder} is damaged ({error}): delete it, and it will be "
                "computed anew."
            ) from error

    def _pull(self, name: str, folder: Path) -> bool:
        """Fetch an artifact that another machine stored: it is whole where its facts exist, because
        :meth:`_put` writes them last.
        """
        return (
            self._remote is not None
            and self._remote.read(f"{name}/facts.json") is not None
            and self._remote.pull(name, folder)
        )

    def get(
        self, kind: str, content: Mapping[str, Any], compute: Callable[[], Artifact]
    ) -> Artifact:
        """The artifact that `content` decides: stored, or computed by this or another process.

        Args:
            kind: name of its folder.
            content: everything that decides it, plain JSON types.
            compute: makes it.
        """
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
                        artifact = compute()
                        with self.clock("storing"):
                            self._put(kind, key, artifact)
                    release_freed_memory()
                    return artifact
        self.reused[kind] = self.reused.get(kind, 0) + 1
        return found

    @contextmanager
    def clock(self, kind: str) -> Iterator[None]:
        """Count the block's time in :attr:`seconds`, without that of blocks counted inside it."""
        started, outer = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[kind] = self.seconds.get(kind, 0.0) + took - self._inner
            self._inner = outer + took

    def drop(self, kind: str, content: Mapping[str, Any]) -> None:
        """Delete an artifact that no run will ask for again."""
        folder = self.root / kind / self.key(content)
        gone = folder.with_name(f".{folder.name}.old")
        with suppress(OSError):
            folder.rename(gone)  # in one step: no process finds half of it
        shutil.rmtree(gone, ignore_errors=True)
        if self._remote is not None:
            name = f"{kind}/{folder.name}"
            self._remote.delete(f"{name}/facts.json")  # first: without it there is no artifact
            self._remote.delete(name)

    def _put(self, kind: str, key: str, artifact: Artifact) -> None:
        with atomic_write(self.root / kind / key) as draft:
            draft.mkdir()
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in artifact.tensors.items()},
                draft / "tensors.safetensors",
            )
            write_json(draft / "facts.json", artifact.facts)
        if self._remote is not None:
            for file in ("tensors.safetensors", "facts.json"):  # in this order: see _pull
                self._remote.push(self.root / kind / key / file, f"{kind}/{key}/{file}")
