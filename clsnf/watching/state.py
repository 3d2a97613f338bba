"""What a watch remembers on disk: what was judged, and the results that outputs still wait for.

One SQLite database in a folder of its own. A picture and its result go into it in one step, before
any output sees the result. So a watch that is killed judges nothing twice and loses nothing: at the
next start each output gets what it has not confirmed. The folder has to lie on a local disk.
"""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from clsnf.core.errors import OutageError, OutputError
from clsnf.core.files import locked
from clsnf.core.patience import NO_PATIENCE, Patience
from clsnf.watching.result import Result

_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judged (
  path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS results (n INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS waiting (
  output TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (output, n));
"""
Numbered = tuple[int, Result]


class State:
    """The memory of one watch; other processes are kept out of its folder.

    Args:
        folder: made where it is missing.
        outputs: names of the outputs that get every result.
        limit: results that may wait for one output. Of more, the oldest are dropped and counted.
        say: gets a line when results are dropped.

    Attributes:
        id: 8 hex digits, of this folder; results begin with it.
        changed: notified when results were added.
        lost: results dropped since the start, by output.
        patience: with a full disk; whoever ends the watch sets its event.

    Raises:
        OutputError: another watch uses the folder, or it can't be written or read.
    """

    def __init__(
        self,
        folder: Path,
        outputs: Sequence[str],
        limit: int,
        say: Callable[[str], None],
        patience: Patience = NO_PATIENCE,
    ) -> None:
        self.folder, self._outputs, self._limit, self._say = folder, tuple(outputs), limit, say
        self.patience = patience
        self._lock, self.changed = threading.Lock(), threading.Condition()
        self.lost = dict.fromkeys(outputs, 0)
        self._closing = ExitStack()
        in_use = f"{folder} is in use by another watch: give this one its own --state FOLDER."
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._closing.enter_context(locked(folder, in_use))
            self._database = sqlite3.connect(folder / "watch.sqlite", check_same_thread=False)
            self._closing.callback(self._database.close)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_TABLES)
            self.id = self._about("id", uuid.uuid4().hex[:8])
            self._judged: dict[str, tuple[int, int]] = {
                os.fsdecode(path): (size, mtime_ns)
                for path, size, mtime_ns in self._database.execute("SELECT * FROM judged")
            }
            self._counts = dict(
                self._database.execute("SELECT output, COUNT(*) FROM waiting GROUP BY output")
            )
        except (sqlite3.Error, OSError) as error:
            self._closing.close()
            raise OutputError(
                f"{folder} can't hold what the watch remembers ({error}): give --state a folder on "
                "a local disk; if the file there is damaged, move it away."
            ) from error
        except BaseException:
            self._closing.close()
            raise

    def close(self) -> None:
        """Let other processes in."""
        self._closing.close()

    # ---- pictures ----

    def was_judged(self, path: str, version: tuple[int, int]) -> bool:
        """Whether a file of this size and time of last change was judged."""
        return self._judged.get(path) == version

    def remember_old(self, folder: str, files: Sequence[tuple[str, tuple[int, int]]]) -> None:
        """Take these files for judged, on the first start with this folder alone.

        At a later start, files that came meanwhile are new.
        """
        with self._changes() as database:
            if self._about(f"old files of {folder}", "are known", database) == "known":
                return
            database.executemany(
                "INSERT OR REPLACE INTO judged VALUES (?, ?, ?)",
                [(os.fsencode(path), *version) for path, version in files],
            )
            database.execute(
                "UPDATE about SET value = 'known' WHERE name = ?", [f"old files of {folder}"]
            )
            self._judged |= dict(files)

    def forget_missing(self, folder: str) -> None:
        """Forget files below a folder that are no longer there.

        To be called when the folder is there and not empty: a share that is away would have all its
        pictures judged again.
        """
        below = folder.rstrip(os.sep) + os.sep
        self.forget([path for path in list(self._judged) if path.startswith(below)])

    def forget(self, paths: Sequence[str]) -> None:
        """Forget those of these files that are no longer there: one that comes back is new."""
        gone = [path for path in paths if not os.path.lexists(path)]
        with self._changes() as database:
            database.executemany(
                "DELETE FROM judged WHERE path = ?", [(os.fsencode(path),) for path in gone]
            )
            for path in gone:
                self._judged.pop(path, None)

    # ---- results ----

    def add(self, result: Result) -> Result:
        """Store a result for all outputs, with the picture that it is about; returns it with an id.

        Raises:
            OutageError: the disk is full, and the watch ends.
        """
        added = self.patience.wait_for(lambda: self._add(result))
        with self.changed:
            self.changed.notify_all()
        return added

    def _add(self, result: Result) -> Result:
        dropped: dict[str, int] = {}
        with self._changes() as database:
            # The number comes first, because the body holds it.
            n = database.execute("INSERT INTO results (body) VALUES ('')").lastrowid
            result = dataclasses.replace(result, id=f"{self.id}-{n:09d}")
            if self._outputs:
                database.execute("UPDATE results SET body = ? WHERE n = ?", [result.to_json(), n])
            else:
                database.execute("DELETE FROM results WHERE n = ?", [n])
            for output in self._outputs:
                database.execute("INSERT INTO waiting VALUES (?, ?)", [output, n])
                surplus = self._counts.get(output, 0) + 1 - self._limit
                if surplus > 0:
                    dropped[output] = self._drop_oldest(output, surplus)
            if result.size is not None and result.mtime_ns is not None:
                database.execute(
                    "INSERT OR REPLACE INTO judged VALUES (?, ?, ?)",
                    [os.fsencode(result.source), result.size, result.mtime_ns],
                )
        if result.size is not None and result.mtime_ns is not None:
            self._judged[result.source] = (result.size, result.mtime_ns)
        for output in self._outputs:
            self._counts[output] = self._counts.get(output, 0) + 1 - dropped.get(output, 0)
        for output, number in dropped.items():
            first = self.lost[output] == 0
            self.lost[output] += number
            if first:
                self._say(
                    f"{output}: more than {self._limit} results wait for it: the oldest are "
                    "dropped, the heartbeat counts them (--max-spooled)"
                )
        return result

    def _drop_oldest(self, output: str, number: int) -> int:
        oldest = "SELECT n FROM waiting WHERE output = ? ORDER BY n LIMIT ?"
        gone = [n for (n,) in self._database.execute(oldest, [output, number])]
        self._confirm(output, gone)
        return len(gone)

    def next_for(self, output: str, number: int) -> list[Numbered]:
        """The oldest results, at most `number`, that an output has not confirmed.

        Raises:
            OutageError: the disk is away.
        """
        query = (
            "SELECT results.n, body FROM waiting JOIN results ON waiting.n = results.n "
            "WHERE output = ? ORDER BY results.n LIMIT ?"
        )
        with self._changes() as database:
            rows = database.execute(query, [output, number]).fetchall()
        return [(n, Result.from_json(body)) for n, body in rows]

    def confirm(self, output: str, numbers: Sequence[int]) -> None:
        """An output has these results. Raises OutageError where the disk is full."""
        with self._changes():
            known = self._confirm(output, numbers)
        self._counts[output] -= known

    def _confirm(self, output: str, numbers: Sequence[int]) -> int:
        """Take results from an output's list; returns how many were on it."""
        known = self._database.executemany(
            "DELETE FROM waiting WHERE output = ? AND n = ?", [(output, n) for n in numbers]
        ).rowcount
        self._database.executemany(
            "DELETE FROM results WHERE n = ?1 AND NOT EXISTS "
            "(SELECT 1 FROM waiting WHERE waiting.n = ?1)",
            [(n,) for n in numbers],
        )
        return max(known, 0)

    def waiting(self) -> dict[str, int]:
        """Results that outputs wait for, by output; of earlier starts' outputs too."""
        return {name: n for name, n in dict(self._counts).items() if n or name in self._outputs}

    # ---- the database ----

    @contextmanager
    def _changes(self) -> Iterator[sqlite3.Connection]:
        """One transaction. Raises OutageError where the disk is full or away."""
        with self._lock:
            try:
                with self._database:
                    yield self._database
            except sqlite3.OperationalError as error:
                raise OutageError(f"{self.folder} can't be written ({error})") from error

    def _about(self, name: str, value: str, database: sqlite3.Connection | None = None) -> str:
        """The value of this name; `value` where there was none."""
        database = database or self._database
        with database:
            database.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", [name, value])
        row = database.execute("SELECT value FROM about WHERE name = ?", [name]).fetchone()
        return str(row[0])
