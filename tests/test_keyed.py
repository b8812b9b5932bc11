"""Keyed random numbers: the published mixer, even spread, independent streams."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.keyed import fold_key, mix64, uniform

COUNT = 100_000
INDEX = np.arange(COUNT, dtype=np.uint64)
keys = st.integers(0, 2**64 - 1)


def test_the_mixer_gives_the_published_sequence_of_splitmix64() -> None:
    """The first five outputs for the seed 1234567, as other implementations print them."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(1, 6)], dtype=np.uint64)
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_the_mixer_leaves_its_argument_alone() -> None:
    words = INDEX[:5].copy()
    mix64(words)
    assert words.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("key", "stream"), [(0, 0), (1, 0), (2**64 - 1, 7), (fold_key(3), 1)])
def test_numbers_are_spread_evenly(key: int, stream: int) -> None:
    numbers = uniform(key, INDEX, stream)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    chi_square = float(((counts - COUNT / 100) ** 2 / (COUNT / 100)).sum())
    assert 50 < chi_square < 170  # 99 degrees of freedom: five standard deviations on either side
    assert numbers.mean() == pytest.approx(0.5, abs=5 * 0.2887 / COUNT**0.5)
    assert len(np.unique(numbers)) == COUNT


@pytest.mark.parametrize(
    ("one", "two"),
    [((5, 0), (5, 1)), ((5, 0), (6, 0)), ((5, 1), (6, 0)), ((0, 0), (0, 2**32)), ((0, 1), (1, 0))],
)
def test_streams_and_keys_are_independent(one: tuple[int, int], two: tuple[int, int]) -> None:
    first, second = (uniform(key, INDEX, stream) for key, stream in (one, two))
    assert abs(correlation(first, second)) < 5 / COUNT**0.5
    for shift in (1, 2, 64):  # nor is one the other, moved on
        assert abs(correlation(first[shift:], second[:-shift])) < 5 / COUNT**0.5


def test_neighbours_are_independent() -> None:
    numbers = uniform(11, INDEX, 0)
    for lag in (1, 2, 3, 64, 1024):
        assert abs(correlation(numbers[lag:], numbers[:-lag])) < 5 / COUNT**0.5


def correlation(
    first: np.typing.NDArray[np.float64], second: np.typing.NDArray[np.float64]
) -> float:
    return float(np.corrcoef(first, second)[0, 1])


@given(keys, st.integers(0, 100), st.lists(st.integers(0, 2**63), min_size=1, max_size=20))
def test_a_number_depends_on_its_own_index_only(key: int, stream: int, index: list[int]) -> None:
    together = uniform(key, np.array(index, dtype=np.uint64), stream)
    alone = [uniform(key, np.array([i], dtype=np.uint64), stream)[0] for i in index]
    assert together.tolist() == alone


def test_a_key_stays_the_same_key() -> None:
    """Written down: another value would give every saved run other augmentations."""
    assert fold_key(0) == 6685036501382267578
    assert fold_key(1, 2, 3) == 11504766095819006337
    assert uniform(42, INDEX[:2], 1).tolist() == [0.1989065592111856, 0.5929544316360672]


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=5))
def test_order_and_number_of_parts_matter(parts: list[int]) -> None:
    assert fold_key(*parts) != fold_key(*parts, 0)
    if parts != parts[::-1]:
        assert fold_key(*parts) != fold_key(*parts[::-1])


def test_keys_of_many_parts_do_not_meet() -> None:
    found = {fold_key(*parts) for parts in product(range(20), repeat=3)}
    assert len(found) == 8000


@given(st.integers(1 - 2**63, -1))
def test_negative_parts_are_keys_too(part: int) -> None:
    assert 0 <= fold_key(part) < 2**64
    assert fold_key(part) != fold_key(-part)


def test_one_bit_of_a_part_changes_half_of_the_key() -> None:
    changed = [(fold_key(7, 1 << bit) ^ fold_key(7, 0)).bit_count() for bit in range(64)]
    assert 28 < sum(changed) / 64 < 36
    assert min(changed) > 10
