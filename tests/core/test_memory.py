"""Free memory, tensors in files, and freed memory that is kept or returned."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import psutil
import pytest
import torch

from clsnf.core.memory import allocate_tensor, free_memory, memory_budget, release_freed_memory

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries treat freed memory differently"
)


def test_a_tensor_that_would_fill_the_memory_lies_in_a_file_and_works_like_any_other() -> None:
    for budget in (0, 1 << 30):
        tensor = allocate_tensor((5, 7, 2), torch.float16, budget)
        tensor.copy_(torch.arange(70).view(5, 7, 2))
        assert torch.equal(
            tensor.flatten(0, 1)[torch.tensor([30, 0])],
            torch.tensor([[60, 61], [0, 1]], dtype=torch.float16),
        )
        assert tensor.dtype == torch.float16


def test_the_budget_is_a_share_of_what_is_free() -> None:
    assert 0 < memory_budget() < free_memory()
    assert memory_budget(4, 4000) == 400


# ---- freed memory ----


@glibc
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
    """Page faults of a process that allocates and frees 40 MB four times in a thread."""
    work = """
import resource, threading
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    # the first times leave small blocks in between, which glibc keeps for each size
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


@glibc
def test_a_block_that_was_freed_is_used_again() -> None:
    pages = 40_000_000 // resource.getpagesize()
    assert faults_of("") > 2 * pages, "by default the C library returns such blocks to the system"
    assert (
        faults_of("from clsnf.core.memory import keep_freed_memory\nkeep_freed_memory()")
        < pages / 10
    )
