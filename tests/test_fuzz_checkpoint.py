"""Checkpoints, whatever is in them: the run goes on, or one message says why it does not."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import (
    ROOM,
    WATCH,
    check_message,
    command,
    damaged,
    fuzz,
    hostile,
    limited,
    replaced,
    tree,
)
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from harness.checkpoint import load_state
from harness.errors import CheckpointError

SMALL = (
    *(
        "comm.backend=solo",
        "batch={initial: 8, micro: 8, max: 8, growth: {policy: fixed}}",
        "ranks={start: 1, max: 1}",
        "train.duration=4up",
    ),
    *("train.eval_every=null", "train.checkpoint_every=2up", "train.log_every=1"),
    *("train.tensorboard=false", "data.augment=false", "lr.warmup=null", "lr.decay={kind: none}"),
    *("data.dataset=synthetic", "data.size=32", "data.classes=2", "data.channels=1"),
    *("data.image_size=28", "optimizer.momentum=0.9", "ranks.threads=1"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped after its second update, and could go on."""
    run: Path = tmp_path_factory.mktemp("trained") / "run"
    config = ROOT / "configs" / "adabatch-digits.yaml"
    assert command("train", config, *SMALL, "--run-dir", run).code == 0
    newest, older = sorted((run / "checkpoints").glob("*.pt"), reverse=True)[:2]
    for path in (newest, newest.with_name(f"{newest.name}.sha256")):
        path.unlink()
    (run / "events.jsonl").write_bytes(
        b"".join(
            line
            for line in (run / "events.jsonl").read_bytes().splitlines(keepends=True)
            if b'"end"' not in line and newest.name.encode() not in line
        )
    )
    assert older.name == "update-00000002.pt"
    return run


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "update-00000002.pt"


def put(run: Path, content: bytes) -> None:
    """A checkpoint with a digest that fits."""
    path = checkpoint_of(run)
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")


@pytest.fixture
def again(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    def copy() -> Path:
        target: Path = tmp_path_factory.mktemp("again") / "run"
        shutil.copytree(trained, target, symlinks=True)
        return target

    return copy


def resume(run: Path) -> int:
    """Go on in this process; what was recorded up to the checkpoint stays as it is."""
    before, whole = contents(run), checkpoint_of(run).read_bytes()
    said = command("train", run / "config.yaml", "--run-dir", run, "--resume")
    assert not list(run.rglob("*pwned*"))
    assert checkpoint_of(run).read_bytes() == whole
    if said.code:
        assert contents(run) == before, "nothing is changed unless the run goes on"
    return said.code


def contents(run: Path) -> dict[str, bytes]:
    return {name: content for name, (_, _, content) in tree(run).items() if name != "lock"}


def test_the_run_that_is_damaged_below_goes_on_where_it_is_whole(
    again: Callable[[], Path],
) -> None:
    assert resume(again()) == 0


@fuzz(37)
@given(st.data())
def test_damaged_bytes(trained: Path, data: st.DataObject) -> None:
    """With or without harm they are read whole, or refused; never is code run on the way."""
    content = data.draw(damaged(checkpoint_of(trained).read_bytes(), most=6))
    with WATCH.watching() as done, limited(ROOM):
        try:
            state = load_state(content, "x.pt")
        except CheckpointError as error:
            check_message(error)
        else:
            assert isinstance(state, dict)
    assert done == []


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def rewritten(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """The same archive with other members."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return buffer.getvalue()


@fuzz(25)
@given(st.data())
def test_damaged_members(trained: Path, data: st.DataObject) -> None:
    """Of archives whose checksums fit: the pickle is what is read."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        harmed: bytes = data.draw(damaged(content))
        return harmed

    content = rewritten(checkpoint_of(trained).read_bytes(), change)
    with WATCH.watching() as done, limited(ROOM):
        try:
            load_state(content, "x.pt")
        except CheckpointError as error:
            check_message(error)
    assert done == []


tensors = st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(3, 4),
        torch.zeros(1).expand(2**40),
        torch.full((2, 2), float("nan")),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, 2).to_sparse(),
    ]
)


@fuzz(3)
@given(st.data())
def test_runs_go_on_from_damaged_states_or_say_why_not(
    again: Callable[[], Path], data: st.DataObject
) -> None:
    run = again()
    state = torch.load(checkpoint_of(run), weights_only=True)
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(state)))
        how = data.draw(st.integers(0, 3))
        if how == 0:
            del state[key]
            break
        state[key] = data.draw(replaced(state[key]) if how > 1 else hostile | tensors)
    try:
        content = saved(state)
    except Exception:  # not even torch can write it
        return
    put(run, content)
    assert resume(run) in (0, 1)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


EVIL = {
    "os.system": Evil(os.system, "touch pwned"),
    "open": Evil(open, "pwned", "w"),
    "exec": Evil(exec, "open('pwned', 'w')"),
    "getattr": Evil(getattr, "x", "upper"),
    "torch.load": Evil(torch.load, "/etc/passwd"),
    "memory": Evil(bytearray, 2**40),
    "tensor": Evil(torch.Tensor, 2**40),
    "ones": Evil(torch.ones, 2**40),
    "fromfile": Evil(torch.from_file, "/etc/passwd", False, 10),
}


@pytest.mark.parametrize("name", EVIL)
def test_what_a_checkpoint_names_is_not_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (
        saved({"format": 4, "model": EVIL[name]}),
        pickle.dumps({"format": 4, "model": EVIL[name]}, protocol=2),
    ):
        with limited(ROOM), WATCH.watching() as done, pytest.raises(CheckpointError):
            load_state(content, "evil.pt")
        assert done == []
    assert list(tmp_path.iterdir()) == []


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"format": 4}, protocol=2))
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(1 << 20))
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def overlapping() -> bytes:
    """Members that all have the same bytes: many times as many as the file has."""
    content = saved({"format": 4, "x": torch.zeros(1 << 18)})
    end = content.rindex(b"PK\5\6")
    size, start = struct.unpack_from("<II", content, end + 12)
    directory, times = content[start : start + size], 50
    count = struct.unpack_from("<H", content, end + 10)[0] * times
    last = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size * times, start, 0)
    return content[:start] + directory * times + last


def shared_lists() -> bytes:
    value: Any = [0]
    for _ in range(60):
        value = [value, value, value]
    return saved({"format": 4, "model": value})


@pytest.mark.parametrize(
    "content",
    [
        bomb(),
        overlapping(),
        shared_lists(),
        saved({"format": 4, "model": torch.zeros(1).expand(2**50)}),
        saved({"format": 4, "model": torch.zeros(4).to_sparse()}),
        saved({"format": 4, "model": torch.empty(2**50, device="meta")}),
        saved({"format": 4, "model": {(1, 2): 3}}),
        saved({"format": "x" * 10**6}),
        b"PK\3\4" + b"\xff" * 1000,
    ],
    ids=range(9),
)
def test_what_claims_more_than_it_holds_is_refused(content: bytes) -> None:
    with limited(ROOM), pytest.raises(CheckpointError) as refused:
        load_state(content, "x.pt")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "huge digest"])
def test_what_is_no_checkpoint_is_passed_over(kind: str, again: Callable[[], Path]) -> None:
    run = again()
    newer = run / "checkpoints" / "update-00000009.pt"
    if kind == "pipe":
        os.mkfifo(newer)
    elif kind == "folder":
        newer.mkdir()
    elif kind == "endless":
        newer.symlink_to("/dev/zero")
    else:
        newer.write_bytes(b"x")
        with newer.with_name(f"{newer.name}.sha256").open("wb") as file:
            file.truncate(1 << 40)
    assert command("train", run / "config.yaml", "--run-dir", run, "--resume").code == 0
