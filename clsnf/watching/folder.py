"""Pictures that arrive in a folder, in the order in which they are complete.

The file system's events (inotify on Linux, by watchdog) say at once that a file was closed or moved
in. Scans of the folder find what no event told: files that were there before, events that the
system dropped, and shares whose other machines cause no events here. Where there are no events,
scans do it alone, each second. A file that nobody is known to have closed is complete when its size
and time have not changed for a while.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from clsnf.core.errors import DataError
from clsnf.data.images import IMAGE_SUFFIXES
from clsnf.watching.pictures import FilePicture, MissingPicture, Picture, version_of
from clsnf.watching.state import State

# File systems that other machines, or the host of a virtual one, write to without an event here.
_SHARED = ("nfs", "cifs", "smb", "fuse", "9p", "vboxsf", "afpfs", "ncpfs", "ceph", "glusterfs")
_SCANS = {True: 1.0, False: 30.0}  # seconds between two scans: without events, and beside them
_SETTLED = {True: 3.0, False: 0.5}  # on a share, whose sizes are cached for 3 s, and on a disk
_EVENTS = 10_000  # that may wait; a scan finds what more of them would have told
_TIDYING = 86_400.0  # seconds between two looks for judged files that are gone
_SLOWEST = 60.0  # seconds after which a file that still changes is said to be not ok


@dataclass(frozen=True)
class FolderSettings:
    """How a folder is watched.

    Attributes:
        recursive: pictures in its folders too.
        new_only: files that are there at the first start are not judged.
        polling: look at the folder now and then, and use no events; None where it is on a share.
        settle: seconds for which a file must not have changed; None: 0.5, on a share 3.
        max_waiting: pictures that wait at most; others stay in the folder until there is room.
        left_out: folders whose files are not judged, such as the outputs'.
    """

    recursive: bool = False
    new_only: bool = False
    polling: bool | None = None
    settle: float | None = None
    max_waiting: int = 1000
    left_out: tuple[Path, ...] = ()

    def leaving_out(self, folders: Sequence[Path]) -> FolderSettings:
        """The same, without the files of these folders."""
        return dataclasses.replace(self, left_out=tuple(folders))


class _Event(NamedTuple):
    """What the file system told of a path."""

    path: str
    kind: Literal["seen", "complete", "left"]


@dataclass
class _Unsettled:
    """A file that may still be written to."""

    version: tuple[int, int]
    since: float  # when it had this version first
    first: float  # when it was seen first
    told: bool = False  # that it takes so long


class FolderSource:
    """The pictures of a folder; see :class:`clsnf.watching.pictures.Source`.

    Args:
        folder: to watch.
        settings: how.
        state: knows what was judged.
        say: gets lines for people.
    """

    ended = False

    def __init__(
        self, folder: Path, settings: FolderSettings, state: State, say: Callable[[str], None]
    ) -> None:
        self.name, self._folder = str(folder), folder.absolute()
        self._settings, self._state, self._say = settings, state, say
        self._left_out = tuple(str(path.absolute()) for path in settings.left_out)
        self._mount = mount_point(self._folder)
        shared = on_a_share(self._folder)
        self._polling = shared if settings.polling is None else settings.polling
        self._settle = _SETTLED[shared] if settings.settle is None else settings.settle
        self._events: queue.Queue[_Event] = queue.Queue(_EVENTS)
        self._unsettled: dict[str, _Unsettled] = {}
        self._ready: deque[Picture] = deque()
        self._in_ready: set[str] = set()
        self._observer: BaseObserver | None = None
        self._next_scan = self._next_tidying = 0.0
        self._missed = False  # whether files were left in the folder, or events dropped
        self._ignored: set[str] = set()
        self.overloaded = False
        self.dropped, self.trouble = 0, ""

    @property
    def waiting(self) -> int:
        """Pictures that wait, complete or not."""
        return len(self._ready) + len(self._unsettled)

    def open(self) -> None:
        """Begin to watch. Raises DataError where there is no such folder."""
        if not self._folder.is_dir():
            raise DataError(f"There is no folder {self.name} to watch: give one that exists.")
        try:
            found = list(self._files())
        except OSError as error:
            raise DataError(
                f"{self.name} can't be read ({error.strerror}): check its permissions."
            ) from error
        if self._settings.new_only:
            self._state.remember_old(str(self._folder), [(path, v) for path, v in found])
        self._observe()

    def _observe(self) -> None:
        """Ask for events. Without them, scan more often."""
        self._next_scan = 0.0  # what came before the first event is found by a scan after it
        if self._polling:
            return
        self._stop_observing()
        observer = new_observer()
        try:
            observer.schedule(
                _Events(self._events, self._on_overflow),
                str(self._folder),
                recursive=self._settings.recursive,
            )
            observer.start()
        except OSError as error:  # no inotify, or no watch left of those that a user may have
            self._say(f"{self.name}: no events ({error.strerror or error}): it is scanned instead")
            self._polling = True
            return
        self._observer = observer

    def _stop_observing(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join(5)

    def close(self) -> None:
        """Watch no longer."""
        self._stop_observing()

    def _on_overflow(self) -> None:
        self._missed = True

    # ---- what comes ----

    def take(self, seconds: float) -> Picture | None:
        """The next complete picture; None where none comes within so many seconds."""
        until = time.monotonic() + seconds
        while True:
            self._hear_events()
            self._scan_if_due()
            self._settle_files()
            if self._ready:
                picture = self._ready.popleft()
                self._in_ready.discard(picture.source)
                return picture
            left = until - time.monotonic()
            if left <= 0:
                return None
            self._wait_for_event(min(left, 0.05 if self._unsettled else 0.2))

    def postpone(self, picture: Picture) -> None:
        """Give a picture again once its file has stopped changing."""
        if version_of(picture.source) is None:
            reason = f"{picture.source} is gone: it was taken away before it could be judged."
            self._enqueue(MissingPicture(picture.source, reason))
        else:
            self._look_at(picture.source, closed=False, again=True)

    def _wait_for_event(self, seconds: float) -> None:
        try:
            event = self._events.get(timeout=seconds) if seconds else self._events.get_nowait()
        except queue.Empty:
            return
        if event.kind == "left":
            self._unsettled.pop(event.path, None)
        else:
            self._look_at(event.path, event.kind == "complete")

    def _hear_events(self) -> None:
        for _ in range(self._events.qsize()):
            self._wait_for_event(0)

    def _look_at(self, path: str, closed: bool, again: bool = False) -> None:
        """Take notice of a file that came or changed."""
        version = version_of(path)
        if version is None or not self._is_picture(path):
            return
        if not again and (path in self._in_ready or self._state.was_judged(path, version)):
            return
        if not self._has_room(path):
            return
        if closed and version[0] > 0:
            self._unsettled.pop(path, None)
            self._enqueue(FilePicture(path, version, may_change=True))
            return
        now = time.monotonic()
        known = self._unsettled.get(path)
        if known is None:
            self._unsettled[path] = _Unsettled(version, now, now)
        elif known.version != version:
            known.version, known.since = version, now

    def _has_room(self, path: str) -> bool:
        if path in self._unsettled or self.waiting < self._settings.max_waiting:
            return True
        self._missed = True
        if not self.overloaded:
            self._say(
                f"{self.name}: {self._settings.max_waiting} pictures wait: more stay in the folder "
                "until there is room (--max-waiting)"
            )
        self.overloaded = True
        return False

    def _enqueue(self, picture: Picture) -> None:
        self._ready.append(picture)
        self._in_ready.add(picture.source)

    def _settle_files(self) -> None:
        """Let files go that have not changed for a while."""
        now = time.monotonic()
        due = [p for p, seen in self._unsettled.items() if now - seen.since >= self._settle]
        for path in due:
            seen, version = self._unsettled[path], version_of(path)
            if version is None:
                del self._unsettled[path]
                self._say(f"{path} is gone before it was complete: it is not judged")
            elif version != seen.version:
                seen.version, seen.since = version, now
            else:
                del self._unsettled[path]
                self._enqueue(FilePicture(path, version))
        for path, seen in self._unsettled.items():
            if now - seen.first > _SLOWEST and not seen.told:
                seen.told = True
                reason = f"{path} is still being written after {_SLOWEST:.0f} s."
                self._enqueue(MissingPicture(path, reason, seen.version))

    # ---- scans ----

    def _scan_if_due(self) -> None:
        now = time.monotonic()
        has_room = 2 * self.waiting <= self._settings.max_waiting
        if now < self._next_scan and not (self._missed and has_room):
            return
        self._missed = False
        try:
            if self._mount is not None and not os.path.ismount(self._mount):
                raise OSError(0, f"{self._mount} is not mounted")
            found = sorted(self._files(), key=lambda file: (file[1][1], file[0]))
        except OSError as error:
            self._away(error)
            found = []
        else:
            if self.trouble:
                self._say(f"{self.name} is back")
                self.trouble = ""
                self._observe()  # the events of a folder that was removed are gone for good
        if found and now >= self._next_tidying:
            self._next_tidying = now + _TIDYING
            self._state.forget_missing(str(self._folder))
        for path, version in found:
            if path not in self._unsettled and not self._state.was_judged(path, version):
                self._look_at(path, closed=False)
        self.overloaded = self.overloaded and self._missed
        took = time.monotonic() - now
        self._next_scan = now + max(_SCANS[self._polling], 10 * took)  # a large one, more seldom
        if self.trouble:
            self._next_scan = now + 1.0

    def _away(self, error: OSError) -> None:
        reason = f"{self.name} can't be read ({error.strerror or error})"
        if not self.trouble:
            self._say(f"{reason}: waiting until it works again")
            self._enqueue(MissingPicture(self.name, f"{reason}."))
        self.trouble = reason

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Path and version of each picture in the folder. Raises OSError."""
        folders = [str(self._folder)]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError:
                if folder == str(self._folder):
                    raise
                continue  # a folder that was removed meanwhile, or may not be read
            for entry in entries:
                if self._settings.recursive and entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif self._is_picture(entry.path):
                    version = version_of(entry.path)
                    if version is not None:
                        yield entry.path, version

    def _is_picture(self, path: str) -> bool:
        """Whether a path names a picture: none that is hidden, temporary, or an output."""
        folder, name = os.path.split(path)
        suffix = os.path.splitext(name)[1].lower()
        parts = os.path.relpath(path, self._folder).split(os.sep)
        if any(part.startswith((".", "~", "#")) for part in parts):
            return False
        if any(folder == out or folder.startswith(out + os.sep) for out in self._left_out):
            return False
        if suffix not in IMAGE_SUFFIXES:
            self._tell_ignored(path, suffix)
            return False
        return os.path.isfile(path)

    def _tell_ignored(self, path: str, suffix: str) -> None:
        if suffix in self._ignored or suffix in TEMPORARY or not os.path.isfile(path):
            return
        self._ignored.add(suffix)
        if len(self._ignored) <= 20:
            self._say(
                f"{self.name}: files that end in {suffix or 'nothing'} are not judged; "
                f"{', '.join(IMAGE_SUFFIXES)} are"
            )


# Endings of files that their writers rename once they are complete.
TEMPORARY = (".tmp", ".temp", ".part", ".partial", ".filepart", ".crdownload", ".swp", ".lock")


class _Events(FileSystemEventHandler):
    """Passes on what happens to files, from watchdog's thread."""

    def __init__(self, found: queue.Queue[_Event], overflow: Callable[[], None]) -> None:
        self._found, self._overflow = found, overflow

    def dispatch(self, event: FileSystemEvent) -> None:
        """An event of the file system."""
        source, kind = os.fsdecode(event.src_path), event.event_type
        if event.is_directory:
            # What lies in a folder that was moved in has no events of its own.
            if kind in ("created", "moved"):
                self._overflow()
        elif kind == "moved":  # one of both names is empty where it is in no watched folder
            self._put(_Event(source, "left"))
            if event.dest_path:
                self._put(_Event(os.fsdecode(event.dest_path), "complete"))
        elif kind == "closed":
            self._put(_Event(source, "complete"))
        elif kind in ("created", "modified"):
            self._put(_Event(source, "seen"))

    def _put(self, event: _Event) -> None:
        try:
            self._found.put_nowait(event)
        except queue.Full:
            self._overflow()


def new_observer() -> BaseObserver:
    """What asks the system for events; on Linux also for files that are moved in from elsewhere."""
    if sys.platform != "linux":
        return Observer()
    from watchdog.observers.inotify import InotifyObserver

    return InotifyObserver(generate_full_events=True)


def mount_point(path: Path) -> str | None:
    """Where the file system of a path is mounted; None for the root's."""
    for place in (path, *path.parents):
        if os.path.ismount(place):
            return None if place == Path(place.anchor) else str(place)
    return None


def on_a_share(path: Path) -> bool:
    """Whether a path lies on a file system that others write to without an event here."""
    mounts: Sequence[tuple[str, str]] = [
        (part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)
    ]
    real = os.path.realpath(path)
    holding = [m for m in mounts if real == m[0] or real.startswith(m[0].rstrip(os.sep) + os.sep)]
    kind = max(holding, key=lambda mount: len(mount[0]), default=("", ""))[1]
    return kind.lower().startswith(_SHARED)
