"""Memory banks: they cover what they were shown, and their distances become likelihoods."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clsnf.model.memory_bank import MemoryBank


def vectors(n: int, channels: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))


def fitted(size: int, seen: Tensor, seed: int = 0) -> MemoryBank:
    memory = MemoryBank(size, seen.shape[1])
    memory.fit(seen, torch.arange(len(seen)), seed)
    return memory


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 20))
@settings(deadline=None, max_examples=30)
def test_distances_are_those_to_the_nearest_remembered_vector(size: int, n: int, seed: int) -> None:
    memory = fitted(size, vectors(50, seed=seed))
    asked = vectors(n, seed=seed + 1)[None].repeat(2, 1, 1)
    expected = torch.cdist(asked, memory.vectors[None]).amin(dim=2).square()
    torch.testing.assert_close(memory.squared_distances(asked), expected, rtol=1e-3, atol=1e-4)


def test_a_rare_vector_is_remembered_where_a_random_choice_would_forget_it() -> None:
    seen = torch.cat([0.1 * vectors(5000), 0.1 * vectors(3) + 50, 0.1 * vectors(3) - 50])
    memory = fitted(8, seen)
    assert float(memory.squared_distances(seen[None]).max()) < 4
    assert (memory.vectors.mean(dim=1) > 40).any()
    assert (memory.vectors.mean(dim=1) < -40).any()


def test_remembered_vectors_are_at_most_twice_as_far_from_all_as_the_best_choice() -> None:
    """Gonzalez's bound, against all choices of three of twelve vectors."""
    seen = vectors(12, 2)
    found = float(fitted(3, seen).squared_distances(seen[None]).max()) ** 0.5
    choices = torch.combinations(torch.arange(12), 3)
    best = min(
        float(torch.cdist(seen, seen[list(choice)]).amin(dim=1).max())
        for choice in choices.tolist()
    )
    assert found <= 2 * best + 1e-5


def test_likelihoods_are_one_on_a_known_vector_one_half_at_the_width_and_nothing_far_away() -> None:
    memory = fitted(20, vectors(2000))
    at = memory.vectors[:3]
    away = torch.zeros(3, 5)
    away[:, 0] = 1e4
    p = memory(torch.cat([at, away])[None])[0]
    torch.testing.assert_close(p[:3], torch.ones(3), rtol=0, atol=1e-3)
    assert p[3:].max() == 0
    seen = memory(vectors(2000)[None])
    assert (
        0.98 < float((seen >= 0.5).float().mean()) < 1
    )  # all but a hundredth of the normal vectors


def test_only_the_given_rows_are_looked_at() -> None:
    seen = vectors(100)
    seen[50:] = torch.nan
    memory = MemoryBank(10, 5)
    memory.fit(seen, torch.arange(50), seed=1)
    assert memory.vectors.isfinite().all()
    assert memory.width.isfinite()


def test_fewer_vectors_than_the_memory_holds_are_no_error_and_equal_ones_give_a_width() -> None:
    assert fitted(10, vectors(4)).squared_distances(vectors(4)[None]).max() < 1e-5
    alike = fitted(3, torch.ones(20, 5))
    assert alike.width > 0
    assert alike(torch.ones(1, 2, 5)).isfinite().all()


def test_the_same_seed_remembers_the_same() -> None:
    one, same = (fitted(10, vectors(500, channels=40), seed=3) for _ in range(2))
    assert torch.equal(one.vectors, same.vectors)
    assert torch.equal(one.width, same.width)


def test_distances_are_exact_far_from_the_origin() -> None:
    seen = vectors(200) + 1000
    memory = fitted(50, seen)
    asked = (vectors(30, seed=9) + 1000)[None]
    expected = torch.cdist(asked.double(), memory.vectors[None].double()).amin(dim=2).square()
    torch.testing.assert_close(
        memory.squared_distances(asked).double(), expected, rtol=1e-3, atol=1e-3
    )
