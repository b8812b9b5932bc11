"""Laws of the sampler: bijection, exact coverage, independence from ranks, a fair shuffle."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd, sqrt

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import sampler as sampler_module
from harness.data.sampler import GlobalBatchSampler, MicroBatch, permute
from harness.keyed import fold_key

I64 = npt.NDArray[np.int64]
Shuffle = Callable[[int, int], I64]


def whole(size: int, key: int) -> I64:
    return permute(np.arange(size, dtype=np.uint64), size, key).astype(np.int64)


# ---- permute is a bijection --------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 201))
def test_every_small_size_is_permuted(size: int) -> None:
    for key in (0, 1, fold_key(size)):
        assert sorted(whole(size, key)) == list(range(size))


@given(size=st.integers(1, 50_000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_any_size_is_permuted(size: int, key: int) -> None:
    assert np.array_equal(np.sort(whole(size, key)), np.arange(size))


@given(
    size=st.integers(1, 2**40),
    key=st.integers(0, 2**64 - 1),
    wanted=st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=50, unique=True),
)
@settings(deadline=None)
def test_huge_sizes_stay_in_range_and_apart(size: int, key: int, wanted: list[int]) -> None:
    index = np.unique(np.array(wanted, dtype=np.uint64) % np.uint64(size))
    image = permute(index, size, key)
    assert image.max() < size
    assert len(np.unique(image)) == len(index)


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1), seed=st.integers(0, 99))
@settings(deadline=None)
def test_an_image_does_not_depend_on_what_else_is_asked(size: int, key: int, seed: int) -> None:
    some = np.random.default_rng(seed).integers(0, size, (3, 7))
    assert np.array_equal(permute(some.astype(np.uint64), size, key), whole(size, key)[some])


def test_the_order_is_pinned() -> None:
    """A run resumed with a later version must go on with the order it began with."""
    first = np.arange(6, dtype=np.uint64)
    assert permute(first, 10, 3).tolist() == [3, 0, 6, 4, 8, 2]
    assert permute(first, 1437, 3).tolist() == [458, 96, 615, 689, 308, 37]
    assert permute(first[:3], 10**9, 3).tolist() == [772687017, 153804142, 825981484]


@pytest.mark.parametrize(
    ("index", "size", "message"),
    [([0], 0, "size"), ([0], 2**40 + 1, r"2\*\*40"), ([5], 5, r"range\(5\)"), ([-1], 5, "range")],
)
def test_permute_refuses_what_is_out_of_range(index: list[int], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        permute(np.array(index), size, 0)


# ---- the shuffle is fair: each statistic must also convict a shuffle that is not ----------------

KEYS = 3000
FAIR, UNFAIR = 4.0, 10.0  # standard deviations; the keys are fixed, so the outcome is too


def identity(size: int, key: int) -> I64:
    return np.arange(size, dtype=np.int64)


def congruential(size: int, key: int) -> I64:
    """i -> a·i + c mod size with keyed a (prime to size) and c: a bijection on a straight line."""
    rng = np.random.default_rng(key)
    factor = next(a for a in rng.integers(1, size, 10_000).tolist() if gcd(a, size) == 1)
    line: I64 = (factor * np.arange(size) + int(rng.integers(size))) % size
    return line


def rotation(size: int, key: int) -> I64:
    """One good permutation, turned by the key: what reusing the first epoch's order looks like."""
    return np.roll(whole(size, 1), key % size)


def four_rounds(size: int, key: int) -> I64:
    with rounds(4):
        return whole(size, key)


@contextmanager
def rounds(count: int) -> Iterator[None]:
    before = sampler_module._ROUNDS
    sampler_module._ROUNDS = count
    try:
        yield
    finally:
        sampler_module._ROUNDS = before


def shuffles(shuffle: Shuffle, size: int, keys: int = KEYS) -> I64:
    """Shape (keys, size)."""
    return np.stack([shuffle(size, fold_key(size, key)) for key in range(keys)])


def deviation(chi_square: float, freedom: float) -> float:
    """How many standard deviations chi-square lies above its mean."""
    return (chi_square - freedom) / sqrt(2 * freedom)


def chi_square(counts: npt.NDArray[np.float64] | I64, expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def places_deviation(orders: I64) -> float:
    """Is each (group of) place equally likely to hold each (group of) element?"""
    keys, size = orders.shape
    groups = max(g for g in range(1, 21) if size % g == 0)
    table = np.zeros((groups, groups))
    place = np.broadcast_to(np.arange(size) * groups // size, orders.shape)
    np.add.at(table, (place, orders * groups // size), 1)
    # A permutation fills the table without replacement, which inflates chi-square by n / (n - 1).
    deflate = (size - 1) / size
    return deviation(chi_square(table, keys * size / groups**2) * deflate, (groups - 1) ** 2)


def steps_deviation(orders: I64) -> float:
    """Is each difference of neighbours, modulo the size, equally frequent?"""
    size = orders.shape[1]
    steps = np.diff(orders, axis=1) % size
    counts = np.bincount(steps.ravel(), minlength=size)[1:]
    return deviation(chi_square(counts, float(counts.mean())), size - 2)


def adjacency_deviation(orders: I64) -> float:
    """Do elements i and i + 1 lie beside each other as often as chance has it: 2 pairs an order?"""
    keys, size = orders.shape
    found = int((np.abs(np.diff(orders, axis=1)) == 1).sum())
    expected = keys * 2 * (size - 1) / size
    return float((found - expected) / sqrt(expected))


def correlation_deviation(first: I64, second: I64) -> float:
    """Squared correlations of pairs of rows, summed: chi-square with one degree for each row."""
    a = first - first.mean(axis=1, keepdims=True)
    b = second - second.mean(axis=1, keepdims=True)
    r = (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    rows, columns = first.shape
    return deviation(float((r**2).sum()) * (columns - 1), rows)


@pytest.mark.parametrize("size", [5, 10, 100, 1437])
def test_every_place_holds_every_element_equally_often(size: int) -> None:
    keys = KEYS if size < 1000 else 500
    assert abs(places_deviation(shuffles(whole, size, keys))) < FAIR
    assert places_deviation(shuffles(identity, size, keys)) > UNFAIR


def test_all_orders_of_five_are_equally_likely() -> None:
    def orders_deviation(shuffle: Shuffle) -> float:
        orders = shuffles(shuffle, 5, 6000)
        _, counts = np.unique(orders, axis=0, return_counts=True)
        all_counts = np.zeros(120)
        all_counts[: len(counts)] = counts
        return deviation(chi_square(all_counts, 6000 / 120), 119)

    assert abs(orders_deviation(whole)) < FAIR
    for bad in (identity, congruential):
        assert orders_deviation(bad) > UNFAIR, bad.__name__


@pytest.mark.parametrize("size", [65, 100, 1437])
def test_every_step_between_neighbours_is_equally_frequent(size: int) -> None:
    keys = KEYS if size < 1000 else 1000
    assert abs(steps_deviation(shuffles(whole, size, keys))) < FAIR
    for bad in (identity, rotation, four_rounds):
        assert steps_deviation(shuffles(bad, size, keys)) > UNFAIR, bad.__name__


@pytest.mark.parametrize("size", [10, 100, 1437])
def test_neighbours_part_as_often_as_chance_has_it(size: int) -> None:
    assert abs(adjacency_deviation(shuffles(whole, size, 1000))) < FAIR
    assert adjacency_deviation(shuffles(identity, size, 1000)) > UNFAIR


@pytest.mark.parametrize("size", [100, 1437])
def test_neighbours_are_uncorrelated(size: int) -> None:
    for shuffle, fair in ((whole, True), (identity, False), (congruential, False)):
        orders = shuffles(shuffle, size, 500)
        found = correlation_deviation(orders[:, :-1], orders[:, 1:])
        assert abs(found) < FAIR if fair else found > UNFAIR, shuffle.__name__


@pytest.mark.parametrize("size", [10, 100, 1437])
def test_epochs_are_uncorrelated(size: int) -> None:
    orders = np.stack([epoch_order(size, seed=0, epoch=epoch) for epoch in range(500)])
    assert abs(correlation_deviation(orders[:-1], orders[1:])) < FAIR
    same = np.stack([whole(size, 1)] * 500)
    assert correlation_deviation(same[:-1], same[1:]) > UNFAIR


def epoch_order(size: int, seed: int, epoch: int) -> I64:
    stream = GlobalBatchSampler(size, seed, size).micro_batches(epoch * size, size)
    return next(stream).samples


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    keys = [(seed, epoch) for seed in (-1, 0, 1, 2**63) for epoch in range(4)]
    orders = {tuple(epoch_order(50, seed, epoch)) for seed, epoch in keys}
    assert len(orders) == len(keys)


# ---- updates cover the stream exactly -----------------------------------------------------------


def cover(
    sampler: GlobalBatchSampler, sizes: list[int], ranks: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(epoch, sample) at each stream position, put together from all ranks of each update."""
    total = sum(sizes)
    epochs, samples = np.full(total, -1), np.full(total, -1)
    seen = 0
    for size in sizes:
        for rank in range(ranks):
            for micro in sampler.micro_batches(seen, size, ranks, rank):
                place = slice(micro.start, micro.start + len(micro))
                assert (samples[place] == -1).all(), "two micro-batches hold the same position"
                assert len(samples[place]) == len(micro)
                epochs[place], samples[place] = micro.epochs, micro.samples
        seen += size
        assert (samples[:seen] >= 0).all(), "a position of the update is in no micro-batch"
    return epochs, samples


def assert_exact(epochs: I64, samples: I64, dataset_size: int) -> None:
    assert np.array_equal(epochs, np.arange(len(epochs)) // dataset_size)
    for epoch in range(len(samples) // dataset_size):
        order = samples[epoch * dataset_size : (epoch + 1) * dataset_size]
        assert np.array_equal(np.sort(order), np.arange(dataset_size))


@given(
    dataset_size=st.integers(1, 300),
    micro=st.integers(1, 50),
    ranks=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_each_epoch_visits_each_sample_once(
    dataset_size: int, micro: int, ranks: int, sizes: list[int], seed: int
) -> None:
    sampler = GlobalBatchSampler(dataset_size, seed, micro)
    assert_exact(*cover(sampler, sizes, ranks), dataset_size)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_nothing_divides(ranks: int) -> None:
    sampler = GlobalBatchSampler(1437, 0, 7)
    epochs, samples = cover(sampler, [100] * 44, ranks)  # three epochs and a bit
    assert len(samples) > 3 * 1437
    assert_exact(epochs, samples, 1437)


def test_an_update_may_span_many_epochs() -> None:
    micro = GlobalBatchSampler(3, 0, 10_000).micro_batches(1, 7000)
    batch = next(micro)
    assert next(micro, None) is None
    assert np.array_equal(batch.epochs, np.arange(1, 7001) // 3)
    assert sorted(np.bincount(batch.samples).tolist()) == [2333, 2333, 2334]


@given(
    seen=st.integers(0, 10**12),
    size=st.integers(1, 500),
    micro=st.integers(1, 600),
    ranks=st.integers(1, 9),
)
@settings(deadline=None)
def test_grouping_does_not_depend_on_ranks(seen: int, size: int, micro: int, ranks: int) -> None:
    sampler = GlobalBatchSampler(1437, 3, micro)
    alone = [facts(batch) for batch in sampler.micro_batches(seen, size)]
    assert [len(samples) for _, _, samples in alone[:-1]] == [micro] * (len(alone) - 1)
    for rank in range(ranks):
        mine = [facts(batch) for batch in sampler.micro_batches(seen, size, ranks, rank)]
        assert mine == alone[rank::ranks]
        assert len(mine) == sampler.count(size, ranks, rank)


def facts(batch: MicroBatch) -> tuple[int, list[int], list[int]]:
    return batch.start, batch.epochs.tolist(), batch.samples.tolist()


def test_count_is_closed_form() -> None:
    sampler = GlobalBatchSampler(10**9, 0, 1)
    assert sampler.count(10**18, 3, 0) == (10**18 + 2) // 3
    assert sum(sampler.count(10**18, 7, rank) for rank in range(7)) == 10**18
    assert GlobalBatchSampler(10, 0, 8).count(8, ranks=4, rank=3) == 0


def test_a_billion_samples_start_anywhere_in_little_memory() -> None:
    sampler = GlobalBatchSampler(10**9, 0, 32)
    tracemalloc.start()
    try:
        deep = list(sampler.micro_batches(5 * 10**9 + 123_456_789, 64, ranks=2, rank=1))
        first = next(sampler.micro_batches(7, 2 * 10**9))  # a whole epoch and more in one update
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [batch.start for batch in deep] == [5 * 10**9 + 123_456_789 + 32]
    assert set(deep[0].epochs.tolist()) == {5}
    assert len(first) == 32
    assert peak < 4 * 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_size": 0}, "dataset_size"),
        ({"dataset_size": 2**41}, r"2\*\*40"),
        ({"dataset_size": 2.5}, "dataset_size"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"micro_batch": True}, "micro_batch"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_a_sampler_that_cannot_be(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(**{"dataset_size": 10, "seed": 0, "micro_batch": 2} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_seen": -1}, "samples_seen"),
        ({"samples_seen": 2**62}, "past"),
        ({"size": 0}, "size"),
        ({"ranks": 0}, "ranks"),
        ({"rank": 2, "ranks": 2}, "below 2"),
        ({"rank": -1}, "rank"),
    ],
)
def test_an_update_that_cannot_be_is_refused_at_once(
    arguments: dict[str, int], message: str
) -> None:
    sampler = GlobalBatchSampler(10, 0, 2)
    with pytest.raises(ValueError, match=message):
        sampler.micro_batches(**{"samples_seen": 0, "size": 4} | arguments)
