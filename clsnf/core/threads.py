"""How OpenMP threads wait for each other. It must be set before torch is imported."""

from __future__ import annotations

import os

# Waiting threads sleep instead of spinning. On a machine that does other work too, a spinning
# thread occupies the core that the thread it waits for needs. Measured on two shared cores:
# training on two threads took 2 to 5 times as long with GNU OpenMP's default.
PASSIVE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


def wait_passively() -> None:
    """Let waiting OpenMP threads sleep, in this process and in those that it starts.

    A value that the user has set in the environment is kept.
    """
    for name, value in PASSIVE_THREADS.items():
        os.environ.setdefault(name, value)
