"""What a rank that fails says: in words of its own where it knows the cause."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from harness.errors import DataError, PeerLost
from harness.last_words import lacks_memory, leave_last_words

FULL = (
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("std::bad_alloc"),
)


def words(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("HARNESS_FAILURE_DIR", str(folder))
    leave_last_words(error, 3)
    told: dict[str, object] = json.loads((folder / "rank-00003.json").read_text())
    return told


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_want_of_memory_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = words(error, tmp_path, monkeypatch)
    assert str(told["message"]).startswith("out of memory (")
    assert not told["final"]  # there may be more the next time


def test_what_torch_says_when_it_gets_no_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert lacks_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("no"), DataError("no"), PeerLost("x"), OSError(5)])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not lacks_memory(error)
