"""What a feed hands out never depends on what it has asked for ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.datasets import Batch
from harness.data.feed import I64, Feed, batches
from harness.data.sampler import GlobalBatchSampler

CPU = torch.device("cpu")


@dataclass
class _Pending:
    split: Log
    samples: I64
    done: bool = False

    def take(self) -> Batch:
        assert not self.done
        self.done = True
        self.split.open -= 1
        self.split.taken.append(self.samples.tolist())
        numbers = torch.from_numpy(self.samples.copy())
        return Batch(numbers[:, None, None, None].float(), numbers)

    def cancel(self) -> None:
        assert not self.done
        self.done = True
        self.split.open -= 1
        self.split.cancelled += 1


@dataclass
class Log:
    """A split that notes what is asked of it. A sample's pixel and label are its number."""

    size: int
    ahead: int
    open: int = 0
    most: int = 0
    cancelled: int = 0
    asked: list[tuple[list[int], list[int], int, bool]] = field(default_factory=list)
    taken: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    def request(
        self, samples: I64, epochs: I64, seed: int, augment: bool, device: torch.device
    ) -> _Pending:
        self.asked.append((samples.tolist(), epochs.tolist(), seed, augment))
        self.open += 1
        self.most = max(self.most, self.open)
        return _Pending(self, samples)

    def close(self) -> None:
        return


def spans(seen: int, size: int, end: int) -> Iterator[tuple[int, int]]:
    while seen < end:
        yield seen, min(size, end - seen)
        seen += size


@given(
    ahead=st.integers(0, 9),
    micro=st.integers(1, 7),
    ranks=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    guess=st.sampled_from(["as it is", "as it was", "nothing"]),
    data=st.data(),
)
@settings(deadline=None)
def test_what_comes_out_is_what_the_sampler_says(
    ahead: int, micro: int, ranks: int, sizes: list[int], guess: str, data: st.DataObject
) -> None:
    """Whatever the global batches, and however wrong the guesses of those to come."""
    rank = data.draw(st.integers(0, ranks - 1))
    sampler = GlobalBatchSampler(23, 5, micro)
    split = Log(23, ahead)
    feed = Feed(split, sampler, ranks, rank, True, CPU)
    seen, end, before, expected = 0, sum(sizes), sizes[0], []
    for size in sizes:
        guessed = {
            "as it is": spans(seen, size, end),
            "as it was": iter([(seen, size), *spans(seen + size, before, end)]),
            "nothing": iter([(seen, size)]),
        }[guess]
        wanted = list(sampler.micro_batches(seen, size, ranks, rank))
        found = list(feed.update(*next(guessed), guessed))
        assert [m.start for m, _ in found] == [m.start for m in wanted]
        for (got, batch), want in zip(found, wanted, strict=True):
            assert np.array_equal(got.epochs, want.epochs)
            assert batch.labels.tolist() == want.samples.tolist()
        expected += [m.samples.tolist() for m in wanted]
        seen, before = seen + size, size
    assert split.taken == expected
    assert split.most <= ahead + 1
    feed.close()
    assert split.open == 0
    assert split.cancelled == len(split.asked) - len(split.taken)
    assert all((seed, augment) == (5, True) for _, _, seed, augment in split.asked)


def test_with_right_guesses_nothing_is_asked_for_twice() -> None:
    split = Log(100, 5)
    feed = Feed(split, GlobalBatchSampler(100, 0, 4), 2, 1, False, CPU)
    for update in range(10):
        list(feed.update(24 * update, 24, spans(24 * update + 24, 24, 240)))
    assert split.cancelled == 0
    assert len(split.asked) == len(split.taken) == 30
    assert split.most == 6


def test_the_next_updates_are_asked_for_before_this_one_is_through() -> None:
    split = Log(100, 5)
    feed = Feed(split, GlobalBatchSampler(100, 0, 4), 1, 0, False, CPU)
    stream = feed.update(0, 8, spans(8, 8, 1000))
    next(stream)
    assert len(split.asked) == 6
    next(stream)
    assert len(split.asked) == 7
    assert next(stream, None) is None


def test_nothing_is_asked_for_ahead_where_that_gains_nothing() -> None:
    split = Log(100, 0)
    feed = Feed(split, GlobalBatchSampler(100, 0, 4), 1, 0, False, CPU)
    for taken, _ in enumerate(feed.update(0, 20, spans(20, 20, 1000)), start=1):
        assert len(split.asked) == taken
    assert split.most == 1


@given(
    count=st.integers(0, 40),
    size=st.integers(1, 15),
    ahead=st.integers(0, 5),
    stop=st.integers(0, 9),
)
@settings(deadline=None)
def test_batches_cover_the_samples_in_order(count: int, size: int, ahead: int, stop: int) -> None:
    split = Log(100, ahead)
    samples = np.random.default_rng(count).permutation(100)[:count]
    found = list(batches(split, samples, size, CPU))
    assert [label for batch in found for label in batch.labels.tolist()] == samples.tolist()
    assert all(len(batch.labels) == size for batch in found[:-1])
    assert split.most <= ahead + 1
    some = batches(split, samples, size, CPU)
    list(islice(some, stop))
    some.close()  # type: ignore[attr-defined]
    assert split.open == 0
    assert not any(augment for *_, augment in split.asked)


@pytest.mark.parametrize("ahead", [0, 3])
def test_an_update_in_which_a_rank_has_no_part(ahead: int) -> None:
    split = Log(10, ahead)
    feed = Feed(split, GlobalBatchSampler(10, 0, 5), 3, 2, False, CPU)
    assert list(feed.update(0, 10)) == []
    assert split.asked == []
