"""Worker processes that read pictures and draw maps, driven by the event loop.

A worker that takes longer than it may, or whose client has gone, is ended and replaced: the one
request gets a refusal, the others go on. Workers take tasks as they become free, those of smallest
rank first, so that the second image of a large request waits behind the first of a small one. No
thread takes part: the loop sends and receives, buffers are neither pickled nor copied. See
:mod:`clsnf.serving.reading_worker` for the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from clsnf.core.errors import OutageError
from clsnf.serving.errors import BadRequest, GatewayTimeout, RequestError, ServiceUnavailable
from clsnf.serving.reading_worker import (
    END,
    ENDED,
    FORK,
    FORKED,
    HEAD,
    NOTICE,
    ORDER,
    Buffer,
    Failed,
    Task,
    packed,
    unpacked,
)

log = logging.getLogger("clsnf.serving")

_GRACE = 0.25  # seconds that a worker has for a task whose client has gone, before it is ended
_PAUSE = 1.0  # seconds before a nursery that did not start is tried again
_SOCKET_BYTES = 2**20
# One thread for each worker: the pool has as many workers as shall run side by side.
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
}


class Reply(NamedTuple):
    """What a task gives: a small result, and buffers."""

    result: Any
    buffers: Sequence[memoryview]


class ReadingError(RuntimeError):
    """A bug in a task, with the worker's traceback."""


@dataclass(order=True)
class _Job:
    rank: int
    number: int
    head: bytes = field(compare=False)
    buffers: Sequence[Buffer] = field(compare=False)
    seconds: float | None = field(compare=False)
    reply: asyncio.Future[Reply] = field(compare=False)


@dataclass(eq=False)
class _Worker:
    """A process; `ended` becomes its exit code."""

    pid: int
    connection: socket.socket
    ended: asyncio.Future[int]


class ReadingPool:
    """Some workers, used inside one event loop; their processes begin to start at once.

    Args:
        workers: how many run side by side.
        seconds: that one task may take, unless it is trusted.
        memory: bytes that one worker may take for its task.
        on_end: called with ``late``, ``gone`` or ``died`` where a worker is replaced.
    """

    def __init__(
        self,
        workers: int,
        seconds: float,
        memory: int,
        on_end: Callable[[str], None] = lambda cause: None,
    ) -> None:
        self._count, self._seconds, self._memory = workers, seconds, memory
        self._on_end = on_end
        self._jobs: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._nursery: _Nursery | None = _Nursery(memory)
        self._nursing = asyncio.Lock()
        self._live: set[_Worker] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Wait until a worker can be asked. Call it once.

        Raises:
            OutageError: none can be started.
        """
        try:
            first = await self._fork()
        except OSError as error:
            raise OutageError(
                f"The processes that read images can't be started ({error}): see what they wrote, "
                "and whether the machine has memory and processes left."
            ) from error
        workers = [first, *[None] * (self._count - 1)]
        self._tasks = [asyncio.create_task(self._serve(worker)) for worker in workers]

    @property
    def alive(self) -> bool:
        """Whether there is a worker that can be asked, now or after its task."""
        return bool(self._live)

    async def run(
        self, task: Task, buffers: Sequence[Buffer] = (), rank: int = 0, *, trusted: bool = False
    ) -> Reply:
        """The reply of a worker; cancelling ends the task.

        Args:
            task: to run, with
            buffers: which must not change before the reply.
            rank: tasks of smaller rank come first, those of the same in their order.
            trusted: it has no limit of time beside its request's, as its work is known.

        Raises:
            RequestError: the task's own; or it took too long, or crashed its worker.
            ReadingError: a bug.
        """
        reply = asyncio.get_running_loop().create_future()
        self._jobs.put_nowait(
            _Job(
                rank,
                next(self._numbers),
                packed(task, buffers),
                buffers,
                None if trusted else self._seconds,
                reply,
            )
        )
        return await reply

    async def close(self) -> None:
        """End all processes; what waits is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._jobs.empty():
            self._jobs.get_nowait().reply.cancel()
        if self._nursery is not None:
            await self._nursery.close()

    # ---- one worker after the other ----

    async def _serve(self, worker: _Worker | None) -> None:
        """Keep one worker alive and give it jobs."""
        worker = worker or await self._start_worker()
        try:
            while True:
                job = await self._jobs.get()
                if job.reply.done():  # its client has gone
                    continue
                if _has_ended(worker):
                    worker = await self._replace(worker, "died")
                cause = await self._do(worker, job)
                if cause is not None:
                    worker = await self._replace(worker, cause)
        finally:
            worker.connection.close()

    async def _do(self, worker: _Worker, job: _Job) -> str | None:
        """Run a job; gives the cause where the worker is of no more use."""
        loop, cause = asyncio.get_running_loop(), None
        try:
            async with asyncio.timeout(job.seconds) as clock:

                def hurry(_: object) -> None:
                    with contextlib.suppress(RuntimeError):  # the task has just ended
                        clock.reschedule(min(clock.when() or math.inf, loop.time() + _GRACE))

                job.reply.add_done_callback(hurry)
                try:
                    reply = await _exchange(worker.connection, job)
                finally:
                    job.reply.remove_done_callback(hurry)
        except TimeoutError:
            cause = "gone" if job.reply.done() else "late"
            error: Exception = GatewayTimeout(
                f"The images were not read within {self._seconds:g} s: scale them down, or save "
                "them anew in a plain form."
            )
        except OSError:
            cause, error = "died", await _death(worker)
        except asyncio.CancelledError:
            job.reply.cancel()
            raise
        else:
            if not isinstance(reply.result, Failed):
                if not job.reply.done():
                    job.reply.set_result(reply)
                return None
            failed = reply.result.error
            error = failed if isinstance(failed, RequestError) else ReadingError(failed)
        if not job.reply.done():
            job.reply.set_exception(error)
        return cause

    async def _replace(self, worker: _Worker, cause: str) -> _Worker:
        level = logging.INFO if cause == "gone" else logging.WARNING
        log.log(level, "a reader (process %d) is replaced: %s", worker.pid, cause)
        self._on_end(cause)
        self._live.discard(worker)
        worker.connection.close()
        if self._nursery is not None:
            self._nursery.end(worker)
        return await self._start_worker()

    async def _start_worker(self) -> _Worker:
        """A new worker; tries until there is one."""
        while True:
            try:
                return await self._fork()
            except OSError as error:
                log.error("readers can't be started (%s): trying again", error)
                await asyncio.sleep(_PAUSE)

    async def _fork(self) -> _Worker:
        """A new worker, of a new nursery where the old one is gone. Raises OSError."""
        async with self._nursing:  # all wait for the same new nursery
            if self._nursery is None:
                self._nursery = _Nursery(self._memory)
            try:
                worker = await self._nursery.fork()
            except OSError:
                await self._nursery.close()
                self._nursery = None
                raise
        self._live.add(worker)
        worker.ended.add_done_callback(partial(self._forget, worker))
        return worker

    def _forget(self, worker: _Worker, ended: asyncio.Future[int]) -> None:
        self._live.discard(worker)


def _has_ended(worker: _Worker) -> bool:
    """Whether a worker without a task has closed its end."""
    try:
        return not worker.connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


async def _exchange(connection: socket.socket, job: _Job) -> Reply:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, job.head)
    for buffer in job.buffers:
        await loop.sock_sendall(connection, buffer)
    head, size = HEAD.unpack(await _read(connection, HEAD.size))
    text = await _read(connection, head)
    return Reply(*unpacked(text, await _read(connection, size)))


async def _read(connection: socket.socket, size: int) -> memoryview:
    loop = asyncio.get_running_loop()
    # Writable, as torch wants it, and not cleared first.
    found, start = np.empty(size, np.uint8).data, 0
    while start < size:
        count = await loop.sock_recv_into(connection, found[start:])
        if not count:
            raise ConnectionResetError("the reader has closed its connection")
        start += count
    return found


async def _death(worker: _Worker) -> RequestError:
    """The refusal of a request whose worker died."""
    code = 0
    with contextlib.suppress(TimeoutError):
        code = await asyncio.wait_for(asyncio.shield(worker.ended), 1.0)
    if code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL):
        return BadRequest(
            f"The images crash their decoder ({signal.Signals(-code).name}): save them anew."
        )
    return ServiceUnavailable(
        "The process that read the images was ended, perhaps for want of memory: ask again."
    )


# ---- the process that forks them ----


class _Nursery:
    """The process that forks workers; it ends with this one."""

    def __init__(self, memory: int) -> None:
        self._control, theirs = socket.socketpair()
        paths = (os.path.abspath(path) for path in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "clsnf.serving.reading_worker",
                    str(theirs.fileno()),
                    str(memory),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        self._control.setblocking(False)
        self._forks: deque[tuple[socket.socket, asyncio.Future[_Worker]]] = deque()
        self._workers: dict[int, _Worker] = {}
        self._listener: asyncio.Task[None] | None = None

    async def fork(self) -> _Worker:
        """A new worker. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen())
        if self._listener.done():
            raise ConnectionResetError(f"their parent ended with code {self._process.poll()}")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            for end in (ours, theirs):
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
            forked: asyncio.Future[_Worker] = loop.create_future()
            try:
                socket.send_fds(self._control, [ORDER.pack(FORK, 0)], [theirs.fileno()])
                self._forks.append((ours, forked))
                return await forked
            except BaseException:
                ours.close()
                raise

    def end(self, worker: _Worker) -> None:
        """End a worker at once, whatever it does."""
        with contextlib.suppress(OSError):  # the nursery is gone, and its workers with it
            self._control.send(ORDER.pack(END, worker.pid))

    async def close(self) -> None:
        """End the process and its workers."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        self._control.close()
        try:
            await asyncio.to_thread(self._process.wait, 5)
        except subprocess.TimeoutExpired:  # it still imports
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _listen(self) -> None:
        """Take the nursery's notices until it ends."""
        loop, waiting = asyncio.get_running_loop(), b""
        with contextlib.suppress(OSError):
            while received := await loop.sock_recv(self._control, 4096):
                waiting += received
                while len(waiting) >= NOTICE.size:
                    self._note(*NOTICE.unpack_from(waiting))
                    waiting = waiting[NOTICE.size :]
        for _, forked in self._forks:
            if not forked.done():
                forked.set_exception(ConnectionResetError("their parent ended"))
        for worker in self._workers.values():
            worker.ended.set_result(-signal.SIGKILL)
        self._workers.clear()

    def _note(self, kind: bytes, pid: int, code: int) -> None:
        if kind == FORKED:
            connection, forked = self._forks.popleft()
            if not forked.done():  # else its pool closes
                ended = asyncio.get_running_loop().create_future()
                self._workers[pid] = _Worker(pid, connection, ended)
                forked.set_result(self._workers[pid])
        elif kind == ENDED and pid in self._workers:
            self._workers.pop(pid).ended.set_result(code)
