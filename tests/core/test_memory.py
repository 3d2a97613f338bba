"""How much memory there is, and what is done where it is short."""

from __future__ import annotations

import torch

from clsnf.core.memory import allocate_tensor, free_memory, memory_budget


def test_a_tensor_that_would_fill_the_memory_lies_in_a_file_and_is_one_like_any_other() -> None:
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
