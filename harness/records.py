"""The run directory: its layout, its lock, and the JSON Lines files that a run appends to.

    config.yaml  provenance.json  plan.json
    metrics.jsonl   one line per logging window
    events.jsonl    stage changes and why, evaluations, checkpoints, faults, restarts
    layers.jsonl    per-layer ‖w‖, ‖∇w‖ and trust ratio, where train.layers_every asks for it
    checkpoints/    update-00001234.pt and its digest
    tensorboard/    a copy of metrics and evaluations as TensorBoard's event files
    traces/         of chosen updates, where profile.trace asks for it; Horovod's timeline
    failures/       the last words of ranks that failed
    stacks/         where the ranks were when the job hung
    report/         index.html, summary.json, *.csv, *.svg
    attempts/       what the first six lines' names lead to: a folder of the newest attempt's own
    launches/       the same for what a launching process and its ranks tell each other

Only rank 0 writes records, and only in its attempt's folder (harness/attempts.py says why). A line
goes out in one ``write``, so a killed process leaves at most one partial line, at the end, which
the next attempt does not take over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from harness.errors import ConfigError, RunDirectoryError, StorageError
from harness.yamlfile import parse_yaml

Record = dict[str, Any]

PHASES = ("data", "to_device", "forward", "backward", "comm_exposed", "optimizer", "other")
"""The keys of ``seconds`` in metrics.jsonl. ``data``: waiting for samples, and making them
(augmentation); ``to_device``: handing them to the GPU; ``comm_exposed``: waiting for the other
ranks; ``other``: what the rest of the loop takes."""
# Events that belong to the trajectory: a resumed run writes them again, so those past the
# checkpoint are cut. All others (start, restart, fault, stop) tell what happened to the processes
# and stay.
TRAJECTORY_EVENTS = frozenset(
    {
        "stage",
        "decision",
        "evaluation",
        "checkpoint",
        "skipped_update",
        "corrupt_image",
        "diverged",
        "end",
    }
)


ITEMS = (
    "config.yaml",
    "provenance.json",
    "plan.json",
    "metrics.jsonl",
    "events.jsonl",
    "layers.jsonl",
    "checkpoints",
    "tensorboard",
)
"""What belongs to an attempt."""
_ATTEMPT = re.compile("[0-9]{8,}")


def of_trajectory(event: Record) -> bool:
    """Whether an event belongs to the trajectory."""
    kind = event.get("kind")
    return isinstance(kind, str) and kind in TRAJECTORY_EVENTS


@dataclass(frozen=True)
class RunDirectory:
    """Names of everything in a run directory; creates nothing by itself."""

    path: Path
    place: Path | None = None
    """Where the records of one attempt are; None: whatever the names in ``path`` lead to."""
    launch: Path | None = None
    """Where one launching process and its ranks leave word for each other; None: in ``path``."""

    @property
    def config(self) -> Path:
        return self._records / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self._records / "provenance.json"

    @property
    def plan(self) -> Path:
        return self._records / "plan.json"

    @property
    def metrics(self) -> Path:
        return self._records / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self._records / "events.jsonl"

    @property
    def layers(self) -> Path:
        return self._records / "layers.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self._records / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self._records / "tensorboard"

    @property
    def _records(self) -> Path:
        return self.place or self.path

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def launches(self) -> Path:
        return self.path / "launches"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def failures(self) -> Path:
        return (self.launch or self.path) / "failures"

    @property
    def elastic(self) -> Path:
        """What tells Horovod Elastic which hosts there are."""
        return (self.launch or self.path) / "elastic"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def stop_request(self) -> Path:
        """A file whose presence asks the running job to stop at the next update."""
        return self.path / "stop"

    @property
    def stop_relay(self) -> Path:
        """The same, from the launching process on behalf of a signal that it got; gone with it."""
        return (self.launch or self.path) / "stop-signal"

    @property
    def launch_log(self) -> Path:
        return self.path / "launch.log"

    def newest(self) -> RunDirectory:
        """The same with the newest attempt's records.

        They are in its folder, whatever a name in ``path`` leads to: an attempt that was frozen as
        it made those names may have led them back to its own. Where a name is no link the directory
        is a copy, or from before attempts had folders, and its names are what counts.
        """
        number = newest_number(self.attempts)
        plain = any(
            os.path.lexists(name) and not name.is_symlink()
            for name in map(self.path.joinpath, ITEMS)
        )
        place = None if plain or not number else self.attempts / place_name(number)
        return replace(self, place=place)

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        run = self.newest()
        return any(p.exists() for p in (run.config, run.metrics, run.events, run.checkpoints))

    def check_usable(self, resume: bool) -> None:
        """Raise RunDirectoryError unless a run may start here (or go on, with ``resume``)."""
        try:
            self._check_usable(resume)
        except OSError as error:  # a name that is too long, a folder that may not be searched
            raise RunDirectoryError(f"{self.path}: cannot be used: {error.strerror}") from None

    def _check_usable(self, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is not a directory; choose another --run-dir")
        if resume and not self.newest().config.exists():
            raise RunDirectoryError(
                f"{self.path} holds no run to resume (no config.yaml); "
                "leave out --resume to start one"
            )
        if not resume and self.holds_run:
            raise RunDirectoryError(
                f"{self.path} already holds a run; continue it with --resume "
                "or choose another --run-dir"
            )


def place_name(number: int) -> str:
    return f"{number:08d}"


def numbered(name: str) -> int:
    """The number of an attempt's or a launch's folder; 0: it has another name."""
    return int(name) if _ATTEMPT.fullmatch(name) else 0


def newest_number(folder: Path) -> int:
    """The highest number among the folders of attempts, or of launches; 0 if there is none."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max(map(numbered, names), default=0)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """An advisory lock that one process (rank 0) holds for as long as it writes to a run directory.

    It lives in the kernel, so it goes with the process that held it, however that died. On a shared
    file system it may also go with the network: no more than an early word that a run is in use.
    """

    def __init__(self, run: RunDirectory, name: str = "lock", needed: bool = False) -> None:
        """``needed``: refuse a file system without locks; else do without, as attempts are kept
        apart by their folders."""
        self._path = run.path / name
        self._needed = needed
        self._fd: int | None = None

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock; raise RunDirectoryError with its holder after ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while self._fd is None:
            fd = self._open()
            try:
                self._take(fd, deadline)
                if self._is_file_of(fd):  # its last holder may have removed the file meanwhile
                    self._sign(fd)
                    self._fd = fd
            finally:
                if self._fd != fd:
                    os.close(fd)

    def discard(self) -> None:
        """Give up a directory in which nothing has been written: remove the file, and with it the
        directory if there is nothing else in it."""
        if self._fd is not None:
            self._path.unlink(missing_ok=True)
            with suppress(OSError):
                self._path.parent.rmdir()

    def _open(self) -> int:
        # What the file says is replaced: it must not be another one, to which a link leads.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(self._path, flags, 0o644)
        except OSError as error:
            why = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise RunDirectoryError(f"{self._path}: cannot be opened: {why}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise RunDirectoryError(f"{self._path}: cannot be locked: it is no regular file")
        return fd

    def _take(self, fd: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                holder = os.pread(fd, 1000, 0).decode(errors="replace").strip() or "another process"
                raise RunDirectoryError(
                    f"{self._path.parent} is in use by {holder}; wait for that run to end, "
                    "stop it, or choose another directory"
                ) from None
            except OSError as error:
                if error.errno in _NO_LOCKS and not self._needed:
                    break
                raise RunDirectoryError(
                    f"{self._path}: cannot be locked: {error.strerror}; choose a --run-dir on a "
                    "file system that has locks"
                ) from None

    def _is_file_of(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _sign(self, fd: int) -> None:
        os.ftruncate(fd, 0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            text = f"pid {os.getpid()} on {socket.gethostname()} since {started}\n"
            os.pwrite(fd, text.encode(), 0)

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()


def check_unlocked(run: RunDirectory, patience: float = 0.0) -> None:
    """Raise RunDirectoryError if another process still holds the lock after so many seconds."""
    if (run.path / "lock").exists():
        lock = RunLock(run)
        lock.acquire(patience)
        lock.release()


def encode(record: Record) -> bytes:
    """One JSON line. A value that JSON cannot hold (NaN, ±inf) becomes null: missing, never 0."""
    return (json.dumps(_finite(record), separators=(",", ":"), allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def write_all(fd: int, content: bytes, path: Path) -> None:
    """Write in one piece; where the disk takes only a part, OSError says why it takes no more."""
    written = os.write(fd, content)
    while written < len(content):
        more = os.write(fd, content[written:])
        if not more:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written += more


class JsonlWriter:
    """Appends records to a JSON Lines file, a line in one write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def append(self, record: Record) -> None:
        write_all(self._fd, encode(record), self._path)

    def end_line(self) -> None:
        """Make what follows a line of its own, after a writer that was killed in the middle of
        one."""
        end = os.lseek(self._fd, 0, os.SEEK_END)
        with open(self._path, "rb") as file:
            file.seek(max(0, end - 1))
            if file.read(1) not in (b"", b"\n"):
                os.write(self._fd, b"\n")

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises OSError, for a pipe or a device too: who waits for somebody
    to write into it, or reads it to its end, may do so for ever."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines from where a file stands. One that is too long to be a record is cut short, which
    makes a broken one of it."""
    while line := file.readline(LONGEST_LINE):
        cut = len(line) == LONGEST_LINE and not line.endswith(b"\n")
        yield line + b"\n" if cut else line
        while cut:
            line = file.readline(LONGEST_LINE)
            cut = len(line) == LONGEST_LINE and not line.endswith(b"\n")


def read_jsonl(path: Path) -> Iterator[Record | None]:
    """Records of a JSON Lines file in order; None for a line that is not a complete JSON object."""
    if not path.exists():
        return
    with open_regular(path) as file:
        for line in read_lines(file):
            yield parse_line(line)


def parse_line(line: bytes) -> Record | None:
    """The record in a line with its end; None if it is not a complete JSON object."""
    record = None
    if line.endswith(b"\n"):
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
    return record if isinstance(record, dict) else None


def furthest(run: RunDirectory) -> tuple[int, int]:
    """(updates, samples) up to which the records tell of training; at most a logging window less
    than what was done."""
    run = run if run.place else run.newest()
    updates = samples = 0
    for record in (*read_jsonl(run.events), _last_line(run.metrics)):
        update, seen = (record or {}).get("update"), (record or {}).get("samples_seen")
        if isinstance(update, int) and isinstance(seen, int) and update > updates:
            updates, samples = update, seen
    return updates, samples


def _last_line(path: Path) -> Record | None:
    """The last whole line of a JSON Lines file that may be too long to read."""
    whole = _whole_lines(path, 2**16)
    return parse_line(whole[-1]) if whole else None


def last_records(path: Path, size: int) -> list[Record]:
    """Records at the end of a JSON Lines file, in its last ``size`` bytes; the first line in there,
    which may be half a line, is left out with all that are broken."""
    records = map(parse_line, _whole_lines(path, size))
    return [record for record in records if record is not None]


def _whole_lines(path: Path, size: int) -> list[bytes]:
    """Lines with an end among the last ``size`` bytes of a file; the first may lack its start."""
    if not path.exists():
        return []
    with open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - size))
        # Not splitlines, for which a carriage return ends a line too.
        return [line + b"\n" for line in file.read().split(b"\n")[:-1]]


def spread_lines(path: Path, at_most: int) -> tuple[list[Record | None], int]:
    """At most so many (two or more) lines of a JSON Lines file, as ``read_jsonl`` gives them: the
    first, the last and others at equal distances. And how many lines there are.

    Only these are held in memory: a line may be as long as a model has layers.
    """
    if not path.exists():
        return [], 0
    with open_regular(path) as file:
        total = sum(line.endswith(b"\n") for line in read_lines(file))
    count = min(at_most, total)
    chosen = {i * (total - 1) // max(count - 1, 1) for i in range(count)}
    with open_regular(path) as file:
        lines = enumerate(read_lines(file))
        return [parse_line(line) for i, line in lines if i in chosen], total


@dataclass(frozen=True)
class Position:
    """How much of the records belongs to a checkpoint: lines of metrics, trajectory events, lines
    of layers."""

    metrics: int = 0
    events: int = 0
    layers: int = 0


def rewind(run: RunDirectory, position: Position, into: RunDirectory | None = None) -> int:
    """Leave out what was recorded after a checkpoint, so that the resumed run writes it anew, once.

    ``into``: where the records go on; by default they stay where they are. Either way the files are
    fresh ones: a writer that still has the old ones open writes into those.

    Returns how many lines of metrics are missing from before the checkpoint: 0 unless someone took
    them away, since lines are on the disk before a checkpoint counts.
    """
    into = into or run
    missing = position.metrics - _keep_lines(run.metrics, into.metrics, position.metrics)
    _keep_lines(run.layers, into.layers, position.layers)
    seen = 0
    kept = []
    for record in read_jsonl(run.events):
        if record is None:
            continue
        if of_trajectory(record):
            seen += 1
            if seen > position.events:
                continue
        kept.append(encode(record))
    if run.events.exists():
        write_atomic(into.events, b"".join(kept))
    return missing


def _keep_lines(source: Path, target: Path, count: int) -> int:
    """Copy the first ``count`` lines of a file, which may be long; it is there in one step.

    Returns how many of them there are.
    """
    if not source.exists():
        return 0
    with open_regular(source) as file, replacing(target) as copy:
        kept = 0
        while kept < count and (line := file.readline(LONGEST_LINE)):
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                break
            copy.write(line)
            kept += line.endswith(b"\n")
    return kept


_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "have its file system mounted for writing",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "it was moved, removed or unmounted",
    errno.ESTALE: "it was moved, removed or unmounted",
    errno.EIO: "look after its file system",
}


def storage_error(path: Path, error: OSError) -> StorageError:
    """What has kept a run from being recorded in ``path``, and what to do about it."""
    where = error.filename if isinstance(error.filename, str) else str(path)
    advice = _ADVICE.get(error.errno or 0, "look after its file system")
    return StorageError(
        f"{where}: {error.strerror or error}; {advice}. What was written before is whole, and the "
        "run goes on from its newest checkpoint once it can write there"
    )


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Around what writes to a run directory: raises StorageError where that fails."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from None


@contextmanager
def creating(path: Path, instead: str) -> Iterator[None]:
    """Around what makes a directory: raises RunDirectoryError where that fails; ``instead``: what
    to choose another of."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be created: {error.strerror}; choose another {instead}"
        ) from None


def make_directory(path: Path, instead: str) -> bool:
    """Make a directory if it is not there yet; whether it was not. Of several processes that begin
    at once, one has made it. Raises as ``creating`` does."""
    with creating(path, instead):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.is_dir():
                raise
            return False
    return True


def partial_name(path: Path) -> Path:
    """Where to write what is then given the name ``path``: beside it, under a name that nobody can
    have taken before, as with a link to another file. To be opened with mode x."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers see the old bytes or the new ones, also after a crash."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` in one step, if nothing is raised."""
    partial = partial_name(path)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # as a directory that was made read-only
            partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())


def now() -> str:
    """The wall clock, for people who read records; nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class RunRecords:
    """What a run directory tells. ``problems`` says what is missing or broken, in words."""

    path: Path
    config: Record | None
    provenance: Record | None
    plan: Record | None
    metrics: list[Record]
    events: list[Record]
    problems: list[str] = field(default_factory=list)


def read_run(path: Path, metrics: bool = True) -> RunRecords:
    """Read a run directory with whatever is there; raises RunDirectoryError if it is no run.

    ``metrics``: read metrics.jsonl, which may have a million lines."""
    run = RunDirectory(path).newest()
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is not a directory; give a run directory (…/runs/NAME)")
    if not run.holds_run:
        raise RunDirectoryError(
            f"{path} holds no run: none of config.yaml, metrics.jsonl, events.jsonl, checkpoints/"
        )
    problems: list[str] = []
    return RunRecords(
        path=path,
        config=_read_object(run.config, parse_config, problems),
        provenance=_read_object(run.provenance, json.loads, problems),
        plan=_read_object(run.plan, json.loads, problems),
        metrics=_read_lines(run.metrics, problems) if metrics else [],
        events=_read_lines(run.events, problems),
        problems=problems,
    )


LONGEST_LINE = 1 << 25
"""Bytes of a line; the norms of ten thousand layers take a tenth of that."""
_LARGEST = 1 << 28
"""Bytes of a file with one object."""


def parse_config(text: str) -> Any:
    """What a configuration's text holds, for ``read_object``. Raises ConfigError."""
    return parse_yaml(text, "config.yaml").data


def _read_object(path: Path, parse: Callable[[str], Any], problems: list[str]) -> Record | None:
    try:
        value = parse(read_text(path))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        problems.append(f"{path.name} cannot be read: {type(error).__name__}")
    else:
        if isinstance(value, dict):
            return value
        problems.append(f"{path.name} is not a mapping")
    return None


def read_text(path: Path, most: int = _LARGEST) -> str:
    """A file of UTF-8 text. Raises OSError and ValueError, as what is no regular file or has more
    than ``most`` bytes does."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
        return file.read(size).decode()


def read_object(path: Path, parse: Callable[[str], Any] = json.loads) -> Record | None:
    """The JSON object in a file, or what else ``parse`` reads; None if it holds none or cannot be
    read."""
    return _read_object(path, parse, [])


def _read_lines(path: Path, problems: list[str]) -> list[Record]:
    if not path.exists():
        problems.append(f"{path.name} is missing")
    try:
        records = list(read_jsonl(path))
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    broken = sum(record is None for record in records)
    if broken:
        problems.append(f"{path.name}: {broken} of {len(records)} lines are broken and left out")
    return [record for record in records if record is not None]
