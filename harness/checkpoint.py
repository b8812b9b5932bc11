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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from harness import pulse
from harness.errors import CheckpointError
from harness.records import sync_directory, write_atomic

FORMAT = 5
_READABLE = (4, 5)
"""Format 4 did not say of which configuration it is."""
State = dict[str, Any]

_NAME = re.compile(r"update-(\d{8,})\.pt")


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
    partial = directory / f".{path.name}.{os.getpid()}.tmp"
    try:
        with partial.open("wb") as file:
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
) -> Found | None:
    """The newest checkpoint whose digest holds; None if there is none at all.

    ``check`` is given the content and the name of such a one, and raises CheckpointError if it is
    not to be used all the same; ``reject`` is told of each one that is passed over. Raises
    CheckpointError if there are checkpoints and all are passed over.
    """
    reasons = []
    for update, path in _named(directory):
        try:
            content = path.read_bytes()
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
            f"{directory}: no checkpoint is valid ({'; '.join(reasons)}); restore one from a copy, "
            "or start anew in another --run-dir"
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
    """The state in a checkpoint's bytes, tensors on the CPU; raises CheckpointError."""
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's readers make of other bytes
        raise CheckpointError(f"{name}: not a checkpoint: {error}") from None
    if not isinstance(state, dict) or not _is_readable(state.get("format")):
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        newer = type(found) is int and found > FORMAT
        raise CheckpointError(
            f"{name}: written in format {found}, but this version reads formats "
            f"{_READABLE[0]} to {_READABLE[-1]}"
            + "; a newer version wrote it; go on with that one"
            * newer
        )
    return state


def _is_readable(found: object) -> bool:
    return type(found) is int and found in _READABLE


def _problem(path: Path, content: bytes) -> str | None:
    try:
        expected = _digest_path(path).read_text(encoding="ascii").split()[0]
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
