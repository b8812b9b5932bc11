"""Checkpoints: atomic, verified, newest valid wins, nothing in them is executed."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import (
    FORMAT,
    checkpoint_name,
    load_state,
    newest_valid,
    remove_partial,
    save_checkpoint,
)
from harness.errors import CheckpointError


def state(update: int) -> dict[str, Any]:
    torch.manual_seed(update)
    return {"model": {"w": torch.randn(5, 3)}, "update": update, "window": {"seconds": {"a": 0.5}}}


def save(directory: Path, update: int, keep: int = 5) -> Path:
    return save_checkpoint(directory, update, state(update), keep, lambda: None)


def rejected(directory: Path) -> tuple[int | None, list[str]]:
    notes: list[str] = []
    found = newest_valid(directory, lambda path, why: notes.append(f"{path.name}: {why}"))
    return (found.update if found else None), notes


def test_round_trip_and_the_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    path = save(tmp_path, 1234)
    assert path.name == "update-00001234.pt"
    plain = torch.load(path, weights_only=True)  # as anybody would read it
    assert torch.equal(plain["model"]["w"], state(1234)["model"]["w"])
    digest = (tmp_path / "update-00001234.pt.sha256").read_text()
    assert digest == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    found = newest_valid(tmp_path, lambda *_: None)
    assert found is not None
    assert torch.equal(load_state(found.content, "x")["model"]["w"], plain["model"]["w"])


def test_the_newest_are_kept_and_the_newest_wins(tmp_path: Path) -> None:
    for update in (1, 2, 30, 100_000_000):
        save(tmp_path, update, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{checkpoint_name(update)}{suffix}"
        for update in (30, 100_000_000)
        for suffix in ("", ".sha256")
    }
    assert rejected(tmp_path) == (100_000_000, [])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def lose_the_digest(path: Path) -> None:
    path.with_name(path.name + ".sha256").unlink()


BREAKAGE = {
    "truncated": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "bit flipped": flip_a_bit,
    "digest missing": lose_the_digest,
    "digest empty": lambda path: path.with_name(path.name + ".sha256").write_text(""),
    "digest binary": lambda path: path.with_name(path.name + ".sha256").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("how", BREAKAGE)
def test_a_broken_one_is_passed_over_with_its_reason(how: str, tmp_path: Path) -> None:
    save(tmp_path, 7)
    BREAKAGE[how](save(tmp_path, 8))
    update, notes = rejected(tmp_path)
    assert update == 7
    assert len(notes) == 1
    assert notes[0].startswith("update-00000008.pt: its ")


def test_if_all_are_broken_it_says_so_and_if_there_is_none_it_does_not(tmp_path: Path) -> None:
    assert rejected(tmp_path / "nowhere") == (None, [])
    (tmp_path / "update-0000000x.pt").write_bytes(b"not ours")
    assert rejected(tmp_path) == (None, [])
    flip_a_bit(save(tmp_path, 3))
    with pytest.raises(CheckpointError, match=r"no checkpoint is valid \(update-00000003"):
        rejected(tmp_path)


@pytest.mark.parametrize("moment", ["announce", "rename"])
def test_dying_while_writing_leaves_the_older_one_in_force(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    if moment == "rename":
        # The digest is renamed first, with `Path.replace` too: let that one pass.
        real = Path.replace

        def replace(self: Path, target: Path) -> Path:
            if target.name.endswith(".pt"):
                raise Killed
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 2, state(2), 5, die if moment == "announce" else lambda: None)
    monkeypatch.undo()
    assert rejected(tmp_path) == (1, [])
    save(tmp_path, 2)
    assert rejected(tmp_path) == (2, [])


def test_announced_before_it_counts(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    save_checkpoint(
        tmp_path, 5, state(5), 3, lambda: seen.append([p.name for p in tmp_path.glob("update*.pt")])
    )
    assert seen == [[]]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_what_a_file_holds_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": FORMAT, "model": Evil()}, tmp_path / "evil.pt")
    for content in (pickle.dumps(Evil(), protocol=2), (tmp_path / "evil.pt").read_bytes()):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_state(content, "evil.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("found", [1, FORMAT - 1, FORMAT + 1, None, str(FORMAT)])
def test_another_format_is_refused_by_name(found: object, tmp_path: Path) -> None:
    torch.save({"format": found, "model": {}}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=f"written in format {found}, .* reads format {FORMAT}"
    ):
        load_state((tmp_path / "x.pt").read_bytes(), "x.pt")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04 nothing", b"hello"])
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt: not a checkpoint"):
        load_state(content, "x.pt")


def test_partial_files_of_dead_writers_go(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (tmp_path / ".update-00000002.pt.123.tmp").write_bytes(b"half")
    remove_partial(tmp_path)
    remove_partial(tmp_path / "nowhere")
    assert path in set(tmp_path.iterdir())
    assert not list(tmp_path.glob(".*"))
