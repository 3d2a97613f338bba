"""Artifacts: finished pieces of work on disk, found by what decided them.

An artifact is a folder ``<root>/<kind>/<key>/`` with ``tensors.safetensors`` and ``facts.json``.
The key is the hash of everything that decided its content. The folder appears whole or not at all.
Checksums in ``facts.json`` show whether a disk or a power cut damaged it since; a damaged artifact
counts as missing, and is computed anew. While one process computes an artifact, others that ask for
the same one wait for it (see :mod:`clsnf.training.leases`).
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clsnf.core.errors import OutputError
from clsnf.core.files import atomic_write, write_json
from clsnf.core.hashing import content_key, sha256_file
from clsnf.core.memory import release_freed_memory
from clsnf.core.remote import RemoteFolder
from clsnf.core.tensors import save_tensors
from clsnf.training.leases import FileLeases, Leases

# Part of every key. Raise it when the same settings give other results than before.
RESULTS_VERSION = 2
_TENSORS, _FACTS = "tensors.safetensors", "facts.json"
_CHECKSUMS = "sha256"  # the name in facts.json beside the facts; earlier versions wrote none


@dataclass(frozen=True)
class Artifact:
    """A finished piece of work: named tensors and plain facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class _DamagedError(Exception):
    """An artifact's files are not what was stored."""


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
        dropped: ``kind/key`` of each damaged artifact that this object dropped.
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
        self.dropped: list[str] = []
        self.seconds: dict[str, float] = {}
        self._leases = leases or FileLeases(root / ".leases")
        self._inner = 0.0  # seconds of the block under way that were counted inside it

    def key(self, content: Mapping[str, Any]) -> str:
        """The key of the artifact that this content decides."""
        return content_key({"version": RESULTS_VERSION, **content})

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact, or None if it is not stored, or damaged.

        Raises:
            OutputError: its files can't be read.
        """
        folder = self.root / kind / key
        if not (folder / _FACTS).is_file() and not self._pull(f"{kind}/{key}", folder):
            return None
        try:
            return _read(folder)
        except _DamagedError:  # `get` drops it, while no other process stores it
            return None

    def _find_or_drop(self, kind: str, key: str) -> Artifact | None:
        """As :meth:`find`; drops what is damaged, in the remote folder too. Needs the lease."""
        folder, name = self.root / kind / key, f"{kind}/{key}"
        if (folder / _FACTS).is_file():
            try:
                return _read(folder)
            except _DamagedError as error:
                self._warn_of(name, error)
                self._drop_local(folder)
        if not self._pull(name, folder):
            return None
        try:
            return _read(folder)
        except _DamagedError as error:
            self._warn_of(name, error)
            self._drop(kind, key)
            return None

    def _warn_of(self, name: str, error: _DamagedError) -> None:
        self.dropped.append(name)
        warnings.warn(
            f"The stored artifact {self.root / name} is damaged ({error}): it is computed anew.",
            RuntimeWarning,
            stacklevel=4,
        )

    def _pull(self, name: str, folder: Path) -> bool:
        """Fetch an artifact that another machine stored: it is whole where its facts exist, because
        :meth:`_put` writes them last.
        """
        return (
            self._remote is not None
            and self._remote.read(f"{name}/{_FACTS}") is not None
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
                    found = self._find_or_drop(kind, key)
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
        self._drop(kind, self.key(content))

    def _drop(self, kind: str, key: str) -> None:
        self._drop_local(self.root / kind / key)
        if self._remote is not None:
            name = f"{kind}/{key}"
            self._remote.delete(f"{name}/{_FACTS}")  # first: without it there is no artifact
            self._remote.delete(name)

    def _drop_local(self, folder: Path) -> None:
        gone = folder.with_name(f".{folder.name}.old")
        with suppress(OSError):
            folder.rename(gone)  # in one step: no process finds half of it
        shutil.rmtree(gone, ignore_errors=True)

    def _put(self, kind: str, key: str, artifact: Artifact) -> None:
        with atomic_write(self.root / kind / key) as draft:
            draft.mkdir()
            save_tensors(artifact.tensors, draft / _TENSORS)
            sums = {"tensors": sha256_file(draft / _TENSORS), "facts": _sum_of(artifact.facts)}
            write_json(draft / _FACTS, artifact.facts | {_CHECKSUMS: sums})
        if self._remote is not None:
            for file in (_TENSORS, _FACTS):  # in this order: see _pull
                self._remote.push(self.root / kind / key / file, f"{kind}/{key}/{file}")


def _sum_of(facts: Mapping[str, Any]) -> str:
    """The checksum of facts, the same before and after they were JSON."""
    return content_key(json.loads(json.dumps(facts, allow_nan=False)))


def _read(folder: Path) -> Artifact | None:
    """A stored artifact; None where it was dropped meanwhile.

    Raises:
        _DamagedError: its files are not what was stored.
        OutputError: they can't be read.
    """
    try:
        facts = json.loads((folder / _FACTS).read_bytes())
        if not isinstance(facts, dict):
            raise _DamagedError(f"{_FACTS} holds no facts")
        sums = facts.pop(_CHECKSUMS, None)
        # What earlier versions stored has no checksums.
        if sums is not None and sums != {
            "tensors": sha256_file(folder / _TENSORS),
            "facts": _sum_of(facts),
        }:
            raise _DamagedError("its content does not have its checksum")
        return Artifact(load_file(folder / _TENSORS), facts)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(
            f"The stored artifact {folder} can't be read ({error.strerror or error}): see to its "
            "disk and its permissions, or delete it, and it will be computed anew."
        ) from error
    except (SafetensorError, ValueError) as error:
        raise _DamagedError(error) from error
