"""Checkpoints: written in one step, verified by digest, loaded without running what they hold.

``checkpoints/update-00001234.pt`` is a dict that ``torch.load(weights_only=True)`` reads; beside it
lies ``update-00001234.pt.sha256`` in the form of sha256sum. The digest is in place before the file
gets its name, so a named file without a matching digest is broken.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn

from harness import pulse
from harness.errors import CheckpointError
from harness.files import open_regular, partial_name, sync_directory, write_atomic
from harness.records import Position
from harness.yamlfile import one_line

FORMAT = 5
_READABLE = (4, 5)
"""Format 4 did not say of which configuration it is."""
State = dict[str, Any]

_NAME = re.compile(r"update-([0-9]{8,18})\.pt")
_MAX_VALUES = 10**6  # lists of lists of the same list can stand for more than memory holds
_DIGEST = 1000  # bytes of a file with one, at most


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read back whole."""

    path: Path
    update: int
    content: bytes


class _Hashing(io.RawIOBase):
    """Passes writes on and hashes them on the way: no second pass, no copy in memory."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        """Why a write failed; torch's writer would only tell that one did."""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        pulse.beat()
        self.digest.update(content)
        try:
            return self._target.write(content)
        except OSError as error:
            self.error = error
            raise


def checkpoint_name(update: int) -> str:
    return f"update-{update:08d}.pt"


def save_checkpoint(
    directory: Path, update: int, state: State, keep: int, announce: Callable[[], None]
) -> Path:
    """Write a checkpoint and remove all but the ``keep`` newest.

    ``announce`` is called when everything is on the disk and before the checkpoint gets its name:
    a record written there is never missing from a run that resumes from this checkpoint.
    """
    pulse.at("writing a checkpoint")
    directory.mkdir(exist_ok=True)
    path = directory / checkpoint_name(update)
    partial = partial_name(path)
    try:
        with partial.open("xb") as file:
            writer = _Hashing(file)
            try:
                torch.save({"format": FORMAT, **state}, cast(IO[bytes], writer))
            except RuntimeError:
                if writer.error is None:
                    raise
                raise OSError(writer.error.errno, writer.error.strerror, str(path)) from None
            file.flush()
            os.fsync(file.fileno())
        digest = f"{writer.digest.hexdigest()}  {path.name}\n".encode()
        write_atomic(_digest_path(path), digest)
        announce()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(directory)
    for _, old in _named(directory)[keep:]:
        old.unlink(missing_ok=True)
        _digest_path(old).unlink(missing_ok=True)
    pulse.at("computing")
    return path


def newest_valid(
    directory: Path,
    reject: Callable[[Path, str], None],
    check: Callable[[bytes, str], None] | None = None,
    shown: Path | None = None,
) -> Found | None:
    """The newest checkpoint whose digest holds; None if there is none at all.

    ``check`` is given the content and the name of such a one, and raises CheckpointError if it is
    not to be used all the same; ``reject`` is told of each one that is passed over; ``shown`` is
    the name that the directory has for users. Raises CheckpointError if there are checkpoints and
    all are passed over.
    """
    reasons = []
    for update, path in _named(directory):
        try:
            with open_regular(path) as file:
                content = file.read()
            problem = _problem(path, content)
            if problem is None and check is not None:
                check(content, path.name)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        except CheckpointError as error:
            problem = str(error).removeprefix(f"{path.name}: ")
        if problem is None:
            return Found(path, update, content)
        reject(path, problem)
        reasons.append(f"{path.name}: {problem}")
    if reasons:
        raise CheckpointError(
            f"{shown or directory}: no checkpoint is valid ({'; '.join(reasons)}); restore one "
            "from a copy, or start anew in another --run-dir"
        )
    return None


def set_aside(directory: Path, update: int) -> None:
    """Give checkpoints after that update, which were passed over, a name under which they are not
    looked at again: somebody may have a use for them."""
    for number, path in _named(directory):
        if number > update:
            for one in (path, _digest_path(path)):
                if one.exists():
                    one.replace(one.with_name(f"{one.name}.rejected"))


def load_state(content: bytes, name: str) -> State:
    """The state in a checkpoint's bytes, tensors on the CPU; raises CheckpointError.

    Nothing is taken on trust: no code of the file's runs, no memory is taken that the file does not
    fill, and what comes out is plain data and dense tensors.
    """
    try:
        _check_archive(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _check_plain(state)
    except Exception as error:  # torch and zipfile answer damage with whatever happens
        said = one_line(str(error) or type(error).__name__, 300)
        raise CheckpointError(f"{name}: not a checkpoint: {said}") from None
    if not isinstance(state, dict) or not _is_readable(state.get("format")):
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        newer = type(found) is int and found > FORMAT
        raise CheckpointError(
            f"{name}: written in format {one_line(str(found))}, but this version reads formats "
            f"{_READABLE[0]} to {_READABLE[-1]}"
            + "; a newer version wrote it; go on with that one"
            * newer
        )
    return state


def _is_readable(found: object) -> bool:
    return type(found) is int and found in _READABLE


def check_fits(state: State, model: nn.Module, name: str) -> None:
    """Raise CheckpointError if a state is not of such a model, or does not say how much of the
    records belongs to it."""
    problem = _misfit(state, model)
    if problem is not None:
        raise CheckpointError(f"{name}: it is not of this configuration and version: {problem}")


def _misfit(state: State, model: nn.Module) -> str | None:
    counts = [state.get("samples_seen"), state.get("update")]
    records = state.get("records")
    counts += records.values() if isinstance(records, dict) else [None]
    if not all(type(count) is int and 0 <= count < 2**62 for count in counts):
        return "it does not say where the run was"
    if not isinstance(records, dict) or set(records) != set(asdict(Position())):
        return "it counts other records"
    saved = state.get("model")
    if not isinstance(saved, dict):
        return "it has no model"
    wanted = model.state_dict()
    if lacking := sorted(map(str, wanted.keys() ^ saved.keys())):
        return f"{one_line(lacking[0])} is not in both its model and this one"
    for key, tensor in wanted.items():
        found = saved[key]
        if not isinstance(found, torch.Tensor) or found.shape != tensor.shape:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else "no tensor"
            return f"{one_line(key)} is {shape}, and here {tuple(tensor.shape)}"
    return None


def _check_archive(content: bytes) -> None:
    """Raise ValueError for what torch.save does not write today: a format of old, which takes other
    paths through torch.load, or compressed members, which may unpack to any size."""
    if not content.startswith(b"PK\x03\x04"):
        raise ValueError("it is no zip file, as torch.save writes them")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it has compressed members")
    if sum(member.file_size for member in members) > len(content):
        raise ValueError("its members claim more bytes than it has")


def _check_plain(state: Any) -> None:
    """Raise ValueError for a tensor that claims more elements than it holds, and for anything that
    a run does not save."""
    waiting, seen = [state], 0
    while waiting:
        value, seen = waiting.pop(), seen + 1
        if seen > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values")
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError("a tensor that is not dense")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor that claims more elements than it holds")
        elif isinstance(value, dict):
            if not all(isinstance(key, str | int) for key in value):
                raise ValueError("a key that is neither text nor a number")
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif not isinstance(value, str | int | float | bool | None):
            raise ValueError(f"a {type(value).__name__}, which no run saves")


def _problem(path: Path, content: bytes) -> str | None:
    try:
        with open_regular(_digest_path(path)) as file:
            expected = file.read(_DIGEST).decode("ascii").split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        return "its digest is missing"
    if hashlib.sha256(content).hexdigest() != expected:
        return "its content does not match its digest"
    return None


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _named(directory: Path) -> list[tuple[int, Path]]:
    """(update, path) of all checkpoints, newest first."""

    def entries() -> Iterator[tuple[int, Path]]:
        if directory.is_dir():
            for path in directory.iterdir():
                match = _NAME.fullmatch(path.name)
                if match:
                    yield int(match[1]), path

    return sorted(entries(), reverse=True)
