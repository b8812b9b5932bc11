"""One copy of a data set per host: what ranks get, what they share, and what may go wrong."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from threads import ThreadCommunicator, run_ranks

from harness.comm.solo import SoloCommunicator
from harness.comm.together import AllLeave
from harness.data import shared
from harness.data.datasets import ImageData, ImageSplit, load
from harness.data.shared import Block, load_shared
from harness.errors import DataError
from harness.schema import Data

DIGITS = Data(dataset="digits")


def mapped() -> Counter[str]:
    """Inodes of the blocks that this process has mapped, and how often."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return Counter(line.split()[4] for line in lines if "memfd:harness-data" in line)


def open_files() -> int:
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)]
    return sum("memfd:harness-data" in link for link in links)


def equal(a: ImageData, b: ImageData) -> bool:
    return all(
        isinstance(x, ImageSplit)
        and isinstance(y, ImageSplit)
        and torch.equal(x.images, y.images)
        and torch.equal(x.labels, y.labels)
        and (x.mean, x.std, x.augmentation) == (y.mean, y.std, y.augmentation)
        for x, y in ((a.train, b.train), (a.test, b.test))
    )


def test_ranks_share_one_block_and_have_the_data() -> None:
    before, files = mapped(), open_files()
    found = run_ranks(4, lambda comm: load_shared(DIGITS, comm))
    expected = load(DIGITS)
    assert all(equal(content, expected) for content in found)
    assert list((mapped() - before).values()) == [4]  # one block, mapped four times
    assert open_files() == files + 4  # Python's mmap keeps one each
    del found
    assert mapped() == before
    assert open_files() == files


def test_a_rank_that_writes_changes_only_its_own() -> None:
    first, second = run_ranks(2, lambda comm: load_shared(DIGITS, comm))
    assert isinstance(first.train, ImageSplit)
    assert isinstance(second.train, ImageSplit)
    before = second.train.images[0].clone()
    first.train.images[0].add_(1)
    assert torch.equal(second.train.images[0], before)
    assert not torch.equal(first.train.images[0], before)


def test_one_rank_or_no_sharing_needs_no_block() -> None:
    before = mapped()
    alone = load_shared(DIGITS, SoloCommunicator())
    apart = run_ranks(2, lambda comm: load_shared(DIGITS.model_copy(update={"share": False}), comm))
    assert equal(alone, apart[1])
    assert mapped() == before


def test_a_rank_that_cannot_open_the_block_makes_its_own(monkeypatch: Any) -> None:
    before = mapped()
    monkeypatch.setattr(Block, "opened", classmethod(lambda cls, offer: None))
    found = run_ranks(3, lambda comm: load_shared(DIGITS, comm))
    assert equal(found[0], found[2])
    assert list((mapped() - before).values()) == [1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 2**22 + 1},
        {"file": 10**6},
        {"size": 17},
        {"token": "00" * 16},
    ],
)
def test_an_offer_that_is_not_what_it_says_is_declined(change: dict[str, Any]) -> None:
    block = Block.of(load(DIGITS))
    offer = json.loads(block.offer())
    assert Block.opened(json.dumps(offer).encode()) is not None
    files = open_files()
    assert Block.opened(json.dumps({**offer, **change}).encode()) is None
    assert open_files() == files
    block.close_file()
    assert Block.opened(json.dumps(offer).encode()) is None


def other(images: int) -> Callable[[Data], ImageData]:
    """Digits of which some differ."""

    def loader(data: Data) -> ImageData:
        content = load(data)
        assert isinstance(content.train, ImageSplit)
        content.train.images[:images] += 1
        return content

    return loader


def test_hosts_with_different_files_are_told(monkeypatch: Any) -> None:
    monkeypatch.setattr(Block, "opened", classmethod(lambda cls, offer: None))
    loaders = {0: other(0), 1: other(0), 2: other(1)}

    def act(comm: ThreadCommunicator) -> str | None:
        try:
            load_shared(DIGITS, comm)
        except AllLeave as leave:
            return None if leave.mine is None else str(leave.mine)
        raise AssertionError("accepted")

    local = threading.local()

    def choose(data: Data) -> ImageData:
        return loaders[local.rank](data)

    def with_rank(comm: ThreadCommunicator) -> str | None:
        local.rank = comm.rank
        return act(comm)

    monkeypatch.setattr(shared, "load", choose)
    said = run_ranks(3, with_rank)
    assert said[1:] == [None, None]
    assert said[0] is not None
    assert "differ between ranks [0, 2]" in said[0]


@pytest.mark.parametrize("dataset", ["mnist", "folder"])
def test_files_that_are_missing_end_all_ranks_with_one_message(dataset: str) -> None:
    def act(comm: ThreadCommunicator) -> Exception | None:
        with pytest.raises(AllLeave) as caught:
            load_shared(Data(dataset=dataset, root="/nowhere"), comm)
        assert caught.value.exit_code == 2
        return caught.value.mine

    said = run_ranks(3, act)
    assert isinstance(said[0], DataError)
    assert said[1:] == [None, None]


def test_what_is_listed_is_listed_by_rank_0_alone(monkeypatch: Any) -> None:
    asked = []

    def listing(data: Data) -> ImageData:
        asked.append(data.dataset)
        return load(DIGITS)

    monkeypatch.setattr(shared, "load", listing)
    found = run_ranks(3, lambda comm: load_shared(Data(dataset="folder", root="/x"), comm))
    assert asked == ["folder"]
    assert all(equal(content, load(DIGITS)) for content in found)
    # … and so it is where no other rank can open the block.
    monkeypatch.setattr(Block, "opened", classmethod(lambda cls, offer: None))
    found = run_ranks(3, lambda comm: load_shared(Data(dataset="folder", root="/x"), comm))
    assert asked == ["folder"] * 2
    assert all(equal(content, load(DIGITS)) for content in found)


@dataclass(eq=False)
class _Anything:
    """In place of splits: what a loader may keep in them."""

    arrays: list[npt.NDArray[Any]]
    tensors: list[torch.Tensor]
    twice: torch.Tensor
    text: str


ARRAYS = hnp.arrays(
    dtype=st.sampled_from([np.uint8, np.int64, np.float32, np.int32]),
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=40),
    elements=st.integers(0, 100),
    fill=st.just(7),
)


@given(arrays=st.lists(ARRAYS, max_size=4), text=st.text(max_size=50))
@settings(deadline=None, max_examples=40)
def test_any_arrays_come_back_as_they_were(arrays: list[npt.NDArray[Any]], text: str) -> None:
    tensors = [torch.from_numpy(array.copy()) for array in arrays]
    shared_twice = torch.arange(3000)
    content = _Anything(
        [*arrays, *[a.T for a in arrays]], [*tensors, shared_twice], shared_twice, text
    )
    data = replace(load(DIGITS), train=content)  # type: ignore[arg-type]
    block = Block.of(data)
    copied = Block.from_content(block.content())
    assert copied.checksum() == block.checksum()
    for one in (block, copied):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(shared._CLASSES, __name__, ("_Anything",))
            back = one.unpack().train
        assert isinstance(back, _Anything)
        assert back.text == text
        for a, b in zip(back.arrays, content.arrays, strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
        assert all(torch.equal(a, b) for a, b in zip(back.tensors, content.tensors, strict=True))
        assert torch.equal(back.twice, shared_twice)
        one.close_file()


def test_checksums_tell_data_apart() -> None:
    blocks = [Block.of(other(count)(DIGITS)) for count in (0, 0, 1)]
    sums = [block.checksum() for block in blocks]
    assert sums[0] == sums[1] != sums[2]
    for block in blocks:
        block.close_file()
