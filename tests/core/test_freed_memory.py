"""Freed memory: kept by the process, or given to the system."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import psutil
import pytest

from clsnf.core.memory import release_freed_memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps its memory in other ways"
)


def test_freed_memory_between_used_pieces_goes_back_to_the_system() -> None:
    pieces = [bytearray(100_000) for _ in range(2000)]
    kept = pieces[::100]
    process = psutil.Process()
    full = process.memory_info().rss
    del pieces
    release_freed_memory()
    assert full - process.memory_info().rss > 150e6
    assert all(len(piece) == 100_000 for piece in kept)


def faults_of(beginning: str) -> int:
    """Pages that a process has to be given, which works with a block of 40 MB four times after ten
    times, in a thread.
    """
    work = """
import resource, threading
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    # the first seven leave small pieces between them, which glibc keeps for each size
    for _ in range(10):
        torch.ones(10_000_000)
    before = faults()
    for _ in range(4):
        torch.ones(10_000_000)
    print(faults() - before)
"""
    text = (
        work + beginning + "\nthread = threading.Thread(target=work)\nthread.start()\nthread.join()"
    )
    return int(
        subprocess.run(
            [sys.executable, "-c", text], check=True, capture_output=True, text=True
        ).stdout
    )


def test_a_block_that_was_freed_is_used_again() -> None:
    pages = 40_000_000 // resource.getpagesize()
    assert faults_of("") > 2 * pages, (
        "the C library hands such blocks back: else there is nothing to mend"
    )
    assert (
        faults_of("from clsnf.core.memory import keep_freed_memory\nkeep_freed_memory()")
        < pages / 10
    )
