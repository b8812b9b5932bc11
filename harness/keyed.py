"""Random numbers keyed by what they are for, not by who asks: a pure function of integers.

The same (seed, epoch, sample) gives the same numbers on any rank, worker, machine and library
version, which a stateful generator cannot promise. The mixer is the finalizer of SplitMix64
(Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 15).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix64(x: U64) -> U64:
    """Bijective avalanche mix of 64-bit words, elementwise; returns a new array of x's shape."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def fold_key(*parts: int) -> int:
    """One 64-bit key from a sequence of integers; order and number of the parts matter."""
    key = len(parts)
    for part in parts:
        key = ((key ^ (part & _MASK)) * _GOLDEN + 0x632BE59BD9B4E019) & _MASK
        key = _mix_int(key)
    return key


def _mix_int(x: int) -> int:
    """``mix64`` of one word without an array: forty times faster."""
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & _MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def uniform(key: int, index: U64, stream: int) -> npt.NDArray[np.float64]:
    """Uniform floats in [0, 1), one per entry of ``index``; independent between streams."""
    base = np.uint64(fold_key(key, stream))
    with np.errstate(over="ignore"):
        word = mix64((index + np.uint64(1)) * np.uint64(_GOLDEN) + base)
    return (mix64(word ^ base) >> np.uint64(11)).astype(np.float64) * 2.0**-53
