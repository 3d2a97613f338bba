"""OpenMP threads: how they wait for each other, how many there are, and what a fork leaves of them.

How they wait must be set before torch is imported.
"""

from __future__ import annotations

import os
import sys
import threading

# Waiting threads spin for some microseconds, and then sleep. On a machine that does other work too,
# a thread that spins on occupies the core that the thread it waits for needs. Measured on two
# shared cores: training on two threads took 2 to 5 times as long with GNU OpenMP's default. Without
# any spinning, waking costs as much as the second thread gives: scoring a picture on two quiet
# cores took 54 ms without, 36 with it, and 46 on one thread.
PASSIVE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


def wait_passively() -> None:
    """Let waiting OpenMP threads sleep, in this process and in those that it starts.

    A value that the user has set in the environment is kept.
    """
    for name, value in PASSIVE_THREADS.items():
        os.environ.setdefault(name, value)


_setting_threads = threading.Lock()
_forked = False  # whether this process is a fork of one that had imported torch


def use_torch_threads(count: int) -> None:
    """Let torch use `count` threads for the loops of the calling thread.

    Where several threads of a process compute, let all but one use one: each that uses more keeps
    threads of its own, and OpenMP does not spin where it counts more threads than cores.

    torch keeps one number for all threads. A thread copies it at its first loop, or when it asks
    for it. So both happen here, for one thread at a time. In a forked process it stays at one
    thread: see :func:`compute_after_a_fork`.
    """
    import torch

    with _setting_threads:
        torch.set_num_threads(1 if _forked else count)
        torch.get_num_threads()


def compute_after_a_fork() -> None:
    """Let forked children of this process compute, on one thread each.

    A child has the record of its parent's OpenMP threads, but not the threads: with more than one
    it would wait for them forever. Call this once, where torch is imported.
    """
    os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    global _forked, _setting_threads
    if "torch" in sys.modules:
        _forked, _setting_threads = True, threading.Lock()  # the parent may have held the old one
        use_torch_threads(1)
