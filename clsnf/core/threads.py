"""How OpenMP threads wait for each other: must be said before torch is imported."""

from __future__ import annotations

import os

# Threads that wait sleep instead of spinning. On a machine that does other work too, spinning
# threads take the core that the one they wait for needs: measured on two shared cores, training on
# two threads took 2 to 5 times as long with GNU OpenMP's default.
PASSIVE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


def wait_passively() -> None:
    """Let this process's threads, and those of processes it starts, wait patiently unless the user
    said otherwise.
    """
    for name, value in PASSIVE_THREADS.items():
        os.environ.setdefault(name, value)
