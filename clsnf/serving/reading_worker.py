"""The processes that read pictures: a *nursery* that imports everything once, and its children.

Bytes from outside meet decoders here alone, because a process can be ended where a thread can't.
The nursery is a process with the heavy modules and no thread beside its own; for each worker that
:mod:`clsnf.serving.reading_pool` asks for it forks itself, which takes milliseconds. This is what
multiprocessing's forkserver does, without its two faults: its children run the program's main
module again, and a child that hangs keeps the server alive after a ``kill -9`` of the program.
Here the nursery ends when the program's end of its socket closes, however the program ended, and
the system ends the children with the nursery.

Messages to and from a worker are a head, a pickled object, and buffers that are sent as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from clsnf.serving.errors import BadRequest, RequestError

Buffer = bytes | bytearray | memoryview

# Of every message: length of the pickled object, length of all buffers together.
HEAD = struct.Struct("<IQ")
# To the nursery: FORK with a worker's end of a socket, or END and a worker's id.
ORDER, FORK, END = struct.Struct("<ci"), b"f", b"k"
# From the nursery: FORKED and a worker's id, or ENDED, its id and its exit code (-N for signal N).
NOTICE, FORKED, ENDED = struct.Struct("<cii"), b"f", b"e"

_DIES_WITH_ITS_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_FIRST_TO_GO = "800"  # where memory runs out, the system ends a worker rather than the server


class Task(Protocol):
    """Work for a worker; it is pickled, and so small."""

    def run(self, buffers: Sequence[memoryview]) -> tuple[Any, Sequence[Buffer]]:
        """A small result, and buffers. Raises RequestError."""


class Failed(NamedTuple):
    """A result that is an error: the request's, or the text of a bug."""

    error: RequestError | str


def packed(content: Any, buffers: Sequence[Buffer]) -> bytes:
    """The first part of a message; its buffers follow."""
    lengths = [len(buffer) for buffer in buffers]
    text = pickle.dumps((content, lengths), pickle.HIGHEST_PROTOCOL)
    return HEAD.pack(len(text), sum(lengths)) + text


def unpacked(text: Buffer, joined: memoryview) -> tuple[Any, list[memoryview]]:
    """The object of a message and its buffers, which lie one after the other in `joined`."""
    content, lengths = pickle.loads(text)
    buffers, start = [], 0
    for length in lengths:
        buffers.append(joined[start : start + length])
        start += length
    return content, buffers


# ---- the nursery ----


def main() -> None:
    """Serve orders on the socket whose number is the first argument, until it closes.

    The second argument is the memory in bytes that a worker may take beside what it starts with.
    """
    control, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    # Ctrl-C and a service's stop reach all processes of a group. The program ends its requests
    # first, and this process with it.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    _prepare()
    children: set[int] = set()

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                children.discard(pid)
                control.sendall(NOTICE.pack(ENDED, pid, os.waitstatus_to_exitcode(status)))

    signal.signal(signal.SIGCHLD, reap)
    with contextlib.suppress(ConnectionError):
        while True:
            order, files, _, _ = socket.recv_fds(control, ORDER.size, 1)
            if not order:
                break
            kind, child = ORDER.unpack(order)
            if kind == FORK:
                _fork(control, socket.socket(fileno=files[0]), memory, children)
            elif child in children:
                os.kill(child, signal.SIGKILL)


def _prepare() -> None:
    """Import what workers need, and run each of its parts once."""
    import cv2
    import torch

    from clsnf.serving import reading_tasks

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    reading_tasks.warm_up()
    gc.collect()
    gc.freeze()  # the collector must not write to pages that the workers share


def _fork(
    control: socket.socket, connection: socket.socket, memory: int, children: set[int]
) -> None:
    nursery = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            control.close()
            _bind_to(nursery, memory)
            _work(connection)
            code = 0
        except ConnectionError:
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    connection.close()
    children.add(child)
    control.sendall(NOTICE.pack(FORKED, child, 0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


# ---- a worker ----


def _bind_to(nursery: int, memory: int) -> None:
    """End with the nursery, and take no more than `memory` bytes beside those shared with it."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_DIES_WITH_ITS_PARENT, signal.SIGKILL)
    if os.getppid() != nursery:  # it ended before the line above
        os._exit(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    # RLIMIT_AS would count what torch only reserves; this counts what can be written.
    lines = Path("/proc/self/status").read_text().splitlines()
    held = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData")))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory, held + memory))


def _work(connection: socket.socket) -> None:
    """Run tasks until the connection closes."""
    # Not within a task: the collector looks at all objects again and again while JSON makes
    # millions of them.
    gc.disable()
    while True:
        task, buffers = _receive(connection)
        result, answer = _run(task, buffers)
        connection.sendall(packed(result, answer))
        for buffer in answer:
            connection.sendall(buffer)
        del task, buffers, result, answer  # a worker that waits holds no picture
        gc.collect()


def _run(task: Task, buffers: Sequence[memoryview]) -> tuple[Any, Sequence[Buffer]]:
    try:
        return task.run(buffers)
    except RequestError as error:
        return Failed(error), ()
    except Exception as error:
        if _lacks_memory(error):
            reason = "The request needs more memory than a reader may take: scale its images down."
            return Failed(BadRequest(reason)), ()
        return Failed(traceback.format_exc()), ()


def _lacks_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch and OpenCV have errors of their own for that."""
    words = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in words or "(-4:" in words


def _receive(connection: socket.socket) -> tuple[Task, list[memoryview]]:
    head, size = HEAD.unpack(_read(connection, HEAD.size))
    text = _read(connection, head)
    return unpacked(text, _read(connection, size))


def _read(connection: socket.socket, size: int) -> memoryview:
    import numpy as np

    found = np.empty(size, np.uint8).data  # not cleared first, as a bytearray would be
    start = 0
    while start < size:
        count = connection.recv_into(found[start:])
        if not count:
            raise ConnectionResetError
        start += count
    return found


if __name__ == "__main__":
    # The module under its own name: what is pickled here must have it.
    from clsnf.serving import reading_worker

    reading_worker.main()
    os._exit(0)  # at once, without the libraries' farewells: the program has ended or closes
