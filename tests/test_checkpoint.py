"""Checkpoints: atomic, verified, newest valid wins, nothing in them is executed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint import (
    FORMAT,
    checkpoint_name,
    load_state,
    newest_valid,
    save_checkpoint,
    set_aside,
)
from harness.config import dump_config, load_config
from harness.errors import CheckpointError, RunDirectoryError
from harness.resume import check_same_run, check_same_settings, settled
from harness.rundir import RunDirectory
from harness.yamlfile import dump_yaml, parse_yaml

DEMO = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"


def state(update: int) -> dict[str, Any]:
    torch.manual_seed(update)
    return {"model": {"w": torch.randn(5, 3)}, "update": update, "window": {"seconds": {"a": 0.5}}}


def save(directory: Path, update: int, keep: int = 5) -> Path:
    return save_checkpoint(directory, update, state(update), keep, lambda: None)


def rejected(directory: Path) -> tuple[int | None, list[str]]:
    notes: list[str] = []
    found = newest_valid(directory, lambda path, why: notes.append(f"{path.name}: {why}"))
    return (found.update if found else None), notes


@pytest.mark.smoke
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


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """In every kind of place: headers, names, numbers, the pickle, its directory, the digest."""
    save(tmp_path, 7)
    path = save(tmp_path, 8)
    digest = path.with_name(f"{path.name}.sha256")
    content, words = path.read_bytes(), digest.read_bytes()
    step = max(1, len(content) // 300)
    for place in range(0, len(content), step):
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        assert rejected(tmp_path)[0] == 7, place
    path.write_bytes(content)
    for place in range(64):
        digest.write_bytes(words[:place] + bytes([words[place] ^ 1]) + words[place + 1 :])
        assert rejected(tmp_path)[0] == 7, place
    digest.write_bytes(words)
    assert rejected(tmp_path) == (8, [])


@given(st.binary(max_size=300), st.integers(0, 2000), st.booleans())
@settings(deadline=None)
def test_bytes_that_got_past_the_digest_are_one_message(
    noise: bytes, place: int, cut: bool
) -> None:
    file = io.BytesIO()
    torch.save({"format": FORMAT, "model": {"w": torch.ones(3)}}, file)
    content = file.getvalue()
    place %= len(content)
    broken = content[:place] + noise + (b"" if cut else content[place + len(noise) :])
    said = "x.pt: "
    try:
        assert load_state(broken, "x.pt")["format"] in (4, FORMAT)
    except CheckpointError as error:
        said = str(error)
    assert said.startswith("x.pt: ")


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


@pytest.mark.parametrize("found", [1, 3, FORMAT + 1, None, str(FORMAT), True])
def test_another_format_is_refused_by_name(found: object, tmp_path: Path) -> None:
    torch.save({"format": found, "model": {}}, tmp_path / "x.pt")
    words = f"written in format {found}, .* reads formats 4 to {FORMAT}"
    with pytest.raises(CheckpointError, match=words) as error:
        load_state((tmp_path / "x.pt").read_bytes(), "x.pt")
    newer = found == FORMAT + 1
    assert ("a newer version wrote it; go on with that one" in str(error.value)) == newer


@pytest.mark.parametrize("found", [4, FORMAT])
def test_the_formats_of_earlier_versions_are_read(found: int, tmp_path: Path) -> None:
    torch.save({"format": found, "model": {}}, tmp_path / "x.pt")
    assert load_state((tmp_path / "x.pt").read_bytes(), "x.pt")["format"] == found


def test_a_newer_version_s_checkpoint_is_passed_over_for_the_newest_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 7)
    with monkeypatch.context() as patch:
        patch.setattr("harness.checkpoint.FORMAT", FORMAT + 1)
        newer = save(tmp_path, 8)
    notes: list[str] = []

    def check(content: bytes, name: str) -> None:
        load_state(content, name)

    found = newest_valid(tmp_path, lambda path, why: notes.append(f"{path.name}: {why}"), check)
    assert found is not None
    assert found.update == 7
    (said,) = notes
    assert said.startswith(f"{newer.name}: written in format {FORMAT + 1}, but this version reads")
    content = newer.read_bytes()
    set_aside(tmp_path, found.update)
    assert newer.with_name("update-00000008.pt.rejected").read_bytes() == content
    assert newer.with_name("update-00000008.pt.sha256.rejected").exists()
    assert rejected(tmp_path) == (7, [])


def test_settings_of_another_run_are_named() -> None:
    words = ("train.duration=3ep",)
    config = load_config(DEMO, words)
    mine = settled(config)
    check_same_settings(mine, config, "x.pt")
    check_same_settings(None, config, "x.pt")  # of format 4, which did not say
    check_same_settings({**mine, "model.gone": 3}, config, "x.pt")  # of another version
    check_same_settings(settled(load_config(DEMO, (*words, "data.workers=1"))), config, "x.pt")
    other = settled(load_config(DEMO, (*words, "seed=3", "lr.base=0.5")))
    with pytest.raises(CheckpointError, match=r"x\.pt: it is of another configuration") as error:
        check_same_settings(other, config, "x.pt")
    assert "lr.base: 0.5 → " in str(error.value)
    assert "seed: 3 → 0" in str(error.value)


def test_a_run_that_knew_fewer_keys_is_the_same_run(tmp_path: Path) -> None:
    config, run = load_config(DEMO), RunDirectory(tmp_path)
    stored = parse_yaml(dump_config(config), "x").data
    del stored["train"]["label_smoothing"], stored["profile"], stored["optimizer"]["skip"]
    run.config.write_text(dump_yaml(stored), encoding="utf-8")
    check_same_run(config, run)
    with pytest.raises(RunDirectoryError, match=r"train\.label_smoothing: 0\.0 → 0\.1"):
        check_same_run(load_config(DEMO, ("train.label_smoothing=0.1",)), run)
    stored["train"]["gone"] = 3  # since then
    run.config.write_text(dump_yaml(stored), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=r"train\.gone: 3 → None"):
        check_same_run(config, run)


def test_what_a_checkpoint_says_of_its_settings_is_read_back(tmp_path: Path) -> None:
    mine = settled(load_config(DEMO))
    path = save_checkpoint(tmp_path, 1, {"settings": mine}, 1, lambda: None)
    assert load_state(path.read_bytes(), "x")["settings"] == mine


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04 nothing", b"hello"])
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt: not a checkpoint"):
        load_state(content, "x.pt")
