"""Random numbers that are a pure function of (key, stream, position): SplitMix64.

There is no generator object. Every training sample has a 64-bit key, and each of its numbers is a
hash of that key. So a sample is the same in any batch, order or worker, and one call serves a whole
batch without a loop over its samples. The generator is SplitMix64 (Steele, Lea and Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014) with the hashed key as its seed. Called by
:mod:`clsnf.synthesis.training_defects`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: SplitMix64's step


def mix_bits(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection of uint64; an input bit flips half of the output bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash_keys(*parts: ArrayLike) -> NDArray[np.int64]:
    """Hash integers to int64 keys, shape (N,).

    The parts are scalars or arrays that broadcast, of any 64-bit sign; scalars alone give shape
    (1,). The order of the parts counts. If all parts but one are held fixed, different values of
    that one give different keys.
    """
    as_arrays = (np.atleast_1d(np.asarray(part, dtype=np.int64)) for part in parts)
    words = np.broadcast_arrays(*as_arrays)
    keys = np.zeros(words[0].shape, np.uint64)
    for word in words:
        keys = mix_bits((keys + GOLDEN) ^ word.view(np.uint64))
    return keys.view(np.int64)


def random_words(keys: NDArray[np.int64], stream: int, count: int) -> NDArray[np.uint64]:
    """``count`` uint64 for each of N keys, shape (N, count).

    Different streams of one key are independent.
    """
    start = hash_keys(keys, stream).view(np.uint64)
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return mix_bits(start[:, None] + steps)


def random_uniforms(keys: NDArray[np.int64], stream: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), shape (N, count), with 53 random bits each."""
    return (random_words(keys, stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_bytes(keys: NDArray[np.int64], stream: int, count: int) -> NDArray[np.uint8]:
    """Uniform bytes, shape (N, count)."""
    words = random_words(keys, stream, -(-count // 8))
    # Little-endian: the same bytes on every machine.
    return words.astype("<u8", copy=False).view(np.uint8)[:, :count]
