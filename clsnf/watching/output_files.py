"""Outputs that are files: the list of results, overlays, and pictures sorted by verdict."""

from __future__ import annotations

import csv
import errno
import filecmp
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from clsnf.core.errors import ClsnfError, OutageError, SettingsError
from clsnf.core.files import check_writable
from clsnf.core.patience import is_outage
from clsnf.data.images import write_image
from clsnf.evaluation.pictures import overlay
from clsnf.watching.output import Output, OutputContext, RefusedError
from clsnf.watching.pictures import version_of
from clsnf.watching.result import FIELDS, Judgement, Result

_TAIL = 1 << 20  # bytes at the end of a results file in which its last line lies


class ResultsFile(Output):
    """``--out``: results as JSON lines or CSV, appended and on the disk before they are confirmed.

    A last line that a crash tore is cut off; its result comes again. The file may be moved away at
    any time, as logrotate does: the next results begin a new one.
    """

    keeps_history, batch = True, 200

    def __init__(self, target: str, context: OutputContext) -> None:
        super().__init__(target, context)
        self._path = Path(target).expanduser()
        if self._path.suffix.lower() not in (".jsonl", ".csv"):
            raise SettingsError(f"--out {target}: give a file that ends in .jsonl or .csv.")
        self._is_csv = self._path.suffix.lower() == ".csv"
        check_writable(self._path, folder=False)

    def open(self) -> None:
        """Cut off a torn line, and look which result was written last."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._last = ""
        if not self._path.exists():
            return
        with self._path.open("r+b") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - _TAIL)
            file.seek(begin)
            tail = file.read()
            whole = tail.rfind(b"\n") + 1
            if whole < len(tail):
                file.truncate(begin + whole)
                self.context.say(f"--out {self.target}: its torn last line was cut off")
        lines = tail[:whole].decode("utf-8", "replace").splitlines()
        self._last = self._id_of(lines[-1]) if lines else ""

    def _id_of(self, line: str) -> str:
        """The id in a line of the file; empty where there is none."""
        try:
            found = next(csv.reader([line]))[0] if self._is_csv else json.loads(line)["id"]
        except (ValueError, TypeError, KeyError, IndexError, StopIteration, csv.Error):
            return ""
        return str(found)

    def deliver(self, results: Sequence[Result]) -> None:
        """Append the results that are not in the file yet."""
        if self._last.startswith(self.context.state_id):
            results = [result for result in results if result.id > self._last]
        if not results:
            return
        try:
            self._append(results)
        except OSError as error:
            raise OutageError(f"{self._path} can't be written ({error.strerror})") from error
        self._last = results[-1].id

    def _append(self, results: Sequence[Result]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            size = file.tell()
            try:
                file.write(self._text(results, with_header=size == 0).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)  # needs no room
                raise

    def _text(self, results: Sequence[Result], with_header: bool) -> str:
        if not self._is_csv:
            return "".join(result.to_json() + "\n" for result in results)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if with_header:
            writer.writerow(FIELDS)
        for result in results:
            writer.writerow(_cell(value) for value in result.to_plain().values())
        return text.getvalue()


def _cell(value: object) -> object:
    """A value as a cell that a spreadsheet takes for no formula, on one line."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = " ".join(value.encode("utf-8", "backslashreplace").decode().splitlines())
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


class Overlays(Output):
    """``--overlays``: each picture under its heat map, as ``<name>_<id>_<verdict>.png``."""

    def __init__(self, target: str, context: OutputContext) -> None:
        super().__init__(target, context)
        self._folder, self._failing = Path(target).expanduser(), False
        check_writable(self._folder, folder=True)

    def show(self, judgement: Judgement) -> None:
        """Write the overlay. That it can't be written is said, and changes no verdict."""
        result, image, score_map = judgement
        if image is None or score_map is None:
            return
        stem = Path(result.source).stem if result.frame is None else f"frame{result.frame:08d}"
        low, limit = self.context.shown_from, self.context.map_threshold
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_image(
                self._folder / f"{stem}_{result.id}_{result.verdict}.png",
                overlay(image, score_map, low, limit),
            )
            self._failing = False
        except (ClsnfError, OSError) as error:
            if not self._failing:
                self.context.say(f"--overlays {self.target}: overlays can't be written: {error}")
            self._failing = True


class Sorted(Output):
    """``--sort``: judged files are moved to ``ok/`` and ``ng/``.

    A move is atomic, replaces no file, and works across file systems. A file that changed since it
    was judged stays where it is, because it will be judged again.
    """

    keeps_history, takes_files = True, True

    def __init__(self, target: str, context: OutputContext) -> None:
        super().__init__(target, context)
        self._folder = Path(target).expanduser()
        check_writable(self._folder, folder=True)

    def open(self) -> None:
        """Make both folders."""
        for verdict in ("ok", "ng"):
            (self._folder / verdict).mkdir(parents=True, exist_ok=True)

    def deliver(self, results: Sequence[Result]) -> None:
        """Move the files of these results."""
        for result in results:
            if result.size is None or result.mtime_ns is None:
                continue  # a frame
            if version_of(result.source) != (result.size, result.mtime_ns):
                continue  # moved already, or changed
            try:
                move_into(Path(result.source), self._folder / result.verdict)
            except OSError as error:
                line = f"{result.source} can't be moved to {self._folder} ({error.strerror})"
                if is_outage(error):
                    raise OutageError(line) from error
                raise RefusedError(line) from error


# A file system without hard links says one of these.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)


def move_into(file: Path, folder: Path) -> Path:
    """Move a file into a folder; returns where it is then. It replaces no other file.

    Where its name is taken it becomes ``name-1.png``, unless the same content lies there already,
    as after a crash between copy and removal.

    Raises:
        OSError: it can't be moved, and is where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = None
    try:
        if os.stat(file).st_dev != os.stat(folder).st_dev:
            draft = folder / f".{file.name}.part"
            shutil.copy2(file, draft)
            with draft.open("rb") as copied:
                os.fsync(copied.fileno())
        number = 0
        while True:
            target = folder / (f"{file.stem}-{number}{file.suffix}" if number else file.name)
            if _put(draft or file, target) or _same_content(file, target):
                break
            number += 1
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    return target


def _put(file: Path, target: Path) -> bool:
    """Give a file the name `target` as well, or move it there; False where the name is taken."""
    try:
        os.link(file, target, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:  # an empty file of ours, which the move replaces
            os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(file, target)
    return True


def _same_content(file: Path, target: Path) -> bool:
    return target.is_file() and filecmp.cmp(file, target, shallow=False)
