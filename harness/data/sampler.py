"""Which samples an update takes, as a pure function of integers: no state, no epoch-long array.

The stream of a run is the concatenation of all its epochs, each one shuffled with a key of its own.
A stream position says epoch and place, and a keyed bijection says which sample lies there. So any
rank can start at any position at once, and memory follows the micro-batches it asks for, not the
data set.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isqrt

import numpy as np
import numpy.typing as npt

from harness.keyed import U64, fold_key, mix64

I64 = npt.NDArray[np.int64]

MAX_SIZE = 1 << 40
"""Largest set that `permute` shuffles; a round's sum, 63 bits + 20 bits, stays below 2**64."""

_ROUNDS = 10  # as FF1 has (NIST SP 800-38G); 6 betray themselves in a million pairs, 8 do not
_TINY = 64
_SHUFFLE = 0x73687566  # keeps these keys apart from those of the augmentation
_GROUP = 8192  # positions shuffled in one go: amortises numpy's cost per call, bounds memory
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(index: U64, size: int, key: int) -> U64:
    """Images of ``index`` (any shape, each < size) under the key's permutation of range(size).

    Memory and time follow ``index``, never ``size``. It is a generalised Feistel network (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains") on a × b >= size cells, a and b next to
    the root of size; the few images past size, at most one in a, are sent through again (cycle
    walking). Up to 64 elements a network has too few states for a fair shuffle, and sorting random
    words is exact.

    The algorithm is our own because numpy does not promise that a ``Generator``'s stream stays the
    same from one version to the next (NEP 19), and a resumed run must see the order it began with.

    Raises ValueError if size is outside 1..2**40 or an index is outside range(size).
    """
    size = _whole("size", size, 1)
    if size > MAX_SIZE:
        raise ValueError(f"size is {size}; at most 2**40 can be shuffled")
    index = np.asarray(index)
    if index.size and (int(index.min()) < 0 or int(index.max()) >= size):
        raise ValueError(f"an index lies outside range({size})")
    index = index.astype(np.uint64, copy=False)
    if size <= _TINY:
        return _sorted_words(size, key)[index]
    flat = _feistel(index.reshape(-1), size, key)
    astray = np.flatnonzero(flat >= size)
    while astray.size:
        flat[astray] = _feistel(flat[astray], size, key)
        astray = astray[flat[astray] >= size]
    return flat.reshape(index.shape)


def _feistel(x: U64, size: int, key: int) -> U64:
    """A bijection of range(a × b) where a × b is the first such product at or past ``size``."""
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    a, b = np.uint64(rows), np.uint64(columns)
    left, right = np.divmod(x, b)
    keys = _words(_ROUNDS, key)
    one = np.uint64(1)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        # Without the shift the sum could wrap at 2**64, and the round would not be a bijection.
        left = (left + (mix64(right ^ even) >> one)) % a
        right = (right + (mix64(left ^ odd) >> one)) % b
    return left * b + right


@lru_cache(maxsize=64)
def _words(count: int, key: int) -> U64:
    """SplitMix64's first ``count`` outputs for a seed: distinct, as the mixer is a bijection."""
    seed = np.full(count, key & (2**64 - 1), dtype=np.uint64)
    words = mix64(seed + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    words.flags.writeable = False
    return words


@lru_cache(maxsize=64)
def _sorted_words(size: int, key: int) -> U64:
    table = np.argsort(_words(size, key)).astype(np.uint64)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int) -> int:
    return fold_key(_SHUFFLE, seed, epoch)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The samples of one backward pass."""

    start: int
    """Stream position of its first sample: a unique key of the micro-batch within the run."""
    epochs: I64
    """Epoch of each sample, shape (m,): the augmentation needs it."""
    samples: I64
    """Each sample's index into the data set, shape (m,)."""

    def __len__(self) -> int:
        return len(self.samples)


class GlobalBatchSampler:
    """Cuts any stretch of the shuffled stream into micro-batches and deals them to ranks.

    Examples::

        sampler = GlobalBatchSampler(dataset_size=1437, seed=0, micro_batch=32)
        for micro in sampler.micro_batches(samples_seen=6400, size=64, ranks=2, rank=0):
            images, labels = data.train.batch(micro.samples, micro.epochs)
    """

    def __init__(self, dataset_size: int, seed: int, micro_batch: int) -> None:
        """Of ``seed`` the lower 64 bits count.

        Raises ValueError if dataset_size is not in 1..2**40 or micro_batch is not positive.
        """
        self.dataset_size = _whole("dataset_size", dataset_size, 1)
        if self.dataset_size > MAX_SIZE:
            raise ValueError(f"dataset_size is {dataset_size}; at most 2**40 can be shuffled")
        self.micro_batch = _whole("micro_batch", micro_batch, 1)
        self.seed = _whole("seed", seed, None)

    def count(self, size: int, ranks: int = 1, rank: int = 0) -> int:
        """Number of micro-batches that ``rank`` gets of an update of ``size`` samples."""
        size, ranks, rank = _share(size, ranks, rank)
        total = -(-size // self.micro_batch)
        return max(0, -(-(total - rank) // ranks))

    def micro_batches(
        self, samples_seen: int, size: int, ranks: int = 1, rank: int = 0
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the update at stream positions [seen, seen + size).

        Micro-batch j holds positions seen + j × micro_batch onwards and goes to rank j mod ranks:
        what is grouped together never depends on the ranks, which batch norm relies on. Epoch ends
        do not cut a micro-batch, and an update may span any number of epochs.

        Raises ValueError, at the call and not at the first step, for arguments out of range.
        """
        seen = _whole("samples_seen", samples_seen, 0)
        size, ranks, rank = _share(size, ranks, rank)
        if seen + size >= 1 << 62:
            raise ValueError(f"stream position {seen + size} is past 2**62")
        return self._deal(seen, size, ranks, rank)

    def _deal(self, seen: int, size: int, ranks: int, rank: int) -> Iterator[MicroBatch]:
        micro = min(self.micro_batch, size)
        at_once = max(1, _GROUP // micro)
        mine = self.count(size, ranks, rank)
        for first in range(0, mine, at_once):
            turns = np.arange(first, min(first + at_once, mine), dtype=np.int64)
            starts = seen + (rank + turns * ranks) * micro
            positions = (starts[:, None] + np.arange(micro, dtype=np.int64)).reshape(-1)
            positions = positions[positions < seen + size]  # only an update's last may be short
            epochs, samples = self._look_up(positions)
            for i, start in enumerate(starts.tolist()):
                cut = slice(i * micro, (i + 1) * micro)
                yield MicroBatch(start, epochs[cut], samples[cut])

    def _look_up(self, positions: I64) -> tuple[I64, I64]:
        """(epochs, samples) at ascending stream positions, each of shape (m,)."""
        epochs, places = np.divmod(positions, self.dataset_size)
        samples = np.empty_like(places)
        bounds = [0, *(np.flatnonzero(np.diff(epochs)) + 1).tolist(), len(epochs)]
        for low, high in pairwise(bounds):
            key = _epoch_key(self.seed, int(epochs[low]))
            samples[low:high] = permute(places[low:high].view(np.uint64), self.dataset_size, key)
        return epochs, samples


def _whole(name: str, value: int, minimum: int | None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None
    if isinstance(value, bool) or (minimum is not None and number < minimum):
        at_least = "" if minimum is None else f" of at least {minimum}"
        raise ValueError(f"{name} must be a whole number{at_least}, not {value!r}")
    return number


def _share(size: int, ranks: int, rank: int) -> tuple[int, int, int]:
    size, ranks = _whole("size", size, 1), _whole("ranks", ranks, 1)
    rank = _whole("rank", rank, 0)
    if rank >= ranks:
        raise ValueError(f"rank is {rank}, but with {ranks} ranks it must be below {ranks}")
    return size, ranks, rank
