"""Scalars for TensorBoard, written by rank 0 beside the records.

They are a copy of what metrics.jsonl and events.jsonl say, with the samples seen as the step: runs
of different batch sizes lie over each other then. Each launch writes a file of its own, which
begins with the purge of what a resumed run does again. As with the records a line goes out in one
write, at once: no thread, nothing that a kill could lose, and at most one partial record, at the
end of a file to which nothing is added any more.

Only the messages are taken from the tensorboard package: its writers look for TensorFlow and load
it. They are framed as TFRecords: length, masked CRC-32C of it, content, masked CRC-32C of that
(tensorflow/core/lib/io/record_writer.h).
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.files import write_all
from harness.jsonl import Record, last_records, read_jsonl
from harness.lenient import number, pick
from harness.rundir import RunDirectory

_TAIL = 2**20
"""Bytes at the end of records in which a checkpoint's own lines lie."""
_NUMBER = re.compile(r"events\.out\.tfevents\.(\d+)\.")
_LINE = {
    "train/loss": ("loss",),
    "train/lr": ("lr",),
    "train/momentum": ("momentum",),
    "train/global_batch": ("global_batch",),
    "train/grad_norm": ("grad_norm",),
    "train/noise_scale": ("noise_scale",),
    "train/distance_from_init": ("distance_from_init",),
    "train/epoch": ("epoch",),
    "speed/images_per_sec": ("images_per_sec",),
    "speed/ranks": ("ranks",),
    "speed/accumulation": ("accumulation",),
    "speed/memory_peak_bytes": ("memory_peak_bytes",),
    "speed/slowest_rank_busy_seconds": ("rank_seconds", "busy_max"),
    "speed/median_rank_busy_seconds": ("rank_seconds", "busy_median"),
}
"""Tag -> where in a line of metrics.jsonl its value is."""
_EVALUATION = {
    "test/loss": ("loss",),
    "test/accuracy": ("accuracy",),
    "test/accuracy_top5": ("accuracy_top5",),
    "test/metric": ("metric",),
}


def is_installed() -> bool:
    """Whether the tensorboard package is there; it is not imported."""
    return importlib.util.find_spec("tensorboard") is not None


def check_installed(wanted: bool | None) -> None:
    """Raise ConfigError if the package is needed and is not there."""
    if wanted and not is_installed():
        raise ConfigError(
            "train.tensorboard = true needs the package tensorboard, which is not installed; "
            "install it (the extra `tensorboard` of this project) or leave the key out"
        )


def open_scalars(wanted: bool | None, run: RunDirectory, samples_seen: int) -> Scalars | None:
    """Scalars of a run that goes on from so many samples seen, with its records already cut back to
    there; None if they are not wanted.

    ``wanted``: None for "if the package is there". Raises ConfigError as ``check_installed`` does.
    """
    check_installed(wanted)
    return Scalars(run, samples_seen) if wanted is not False and is_installed() else None


class Scalars:
    """Appends scalars to a new event file of a run."""

    def __init__(self, run: RunDirectory, samples_seen: int) -> None:
        """Take back what is there from ``samples_seen`` on, and write that part of the records
        again, or all of them where the run had no scalars so far."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        directory = run.tensorboard
        directory.mkdir(exist_ok=True)
        older = [int(m[1]) for path in directory.iterdir() if (m := _NUMBER.match(path.name))]
        # Files are read in the order of their names, which no clock may decide.
        number = max(older, default=0) + 1
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._path = directory / name
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._write(file_version="brain.Event:2")
        since = samples_seen if older else 0
        if older:
            self._write(step=since, session_log=start)
        for record in _since(run.metrics, since):
            self.line(record)
        for record in _since(run.events, since):
            if record.get("kind") == "evaluation":
                self.evaluation(record)

    def line(self, line: Record) -> None:
        """The scalars of a line of metrics.jsonl."""
        self._scalars(line, line_values(line))

    def evaluation(self, event: Record) -> None:
        """The scalars of an evaluation's line in events.jsonl."""
        self._scalars(event, evaluation_values(event))

    def sync(self) -> None:
        """Wait until all is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _scalars(self, record: Record, values: dict[str, float]) -> None:
        """Points of one step. What is missing has none."""
        step = record.get("samples_seen")
        if not isinstance(step, int):
            return
        value = self._summary.Value
        found = [value(tag=tag, simple_value=v) for tag, v in values.items()]
        if found:
            self._write(step=step, summary=self._summary(value=found))

    def _write(self, **fields: Any) -> None:
        content = framed(self._event(wall_time=time.time(), **fields).SerializeToString())
        write_all(self._fd, content, self._path)


def line_values(line: Record) -> dict[str, float]:
    """What is to be drawn of a line of metrics.jsonl, by tag. What is missing has no value."""
    values = _picked(line, _LINE)
    seconds = line.get("seconds")
    if isinstance(seconds, dict):
        spent = _picked(seconds, {phase: (phase,) for phase in seconds})
        total = sum(spent.values())
        if total > 0:
            values |= {f"time/{phase}": value / total for phase, value in spent.items()}
    return values


def evaluation_values(event: Record) -> dict[str, float]:
    """The same of an evaluation's line in events.jsonl."""
    return _picked(event, _EVALUATION)


def _picked(record: Record, tags: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    found = {tag: _pick(record, *keys) for tag, keys in tags.items()}
    return {tag: value for tag, value in found.items() if value is not None}


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC = _crc_table()


def crc32c(content: bytes) -> int:
    """The CRC with Castagnoli's polynomial (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def framed(content: bytes) -> bytes:
    """A TFRecord."""
    length = struct.pack("<Q", len(content))
    return length + _masked(length) + content + _masked(content)


def _masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _since(path: Path, samples: int) -> Iterator[Record]:
    """Records at or after so many samples seen; if those are not all, they are the last ones, with
    nothing after them that has been cut back."""
    records: Iterable[Record | None] = last_records(path, _TAIL) if samples else read_jsonl(path)
    for record in records:
        seen = (record or {}).get("samples_seen")
        if record is not None and isinstance(seen, int) and seen >= samples:
            yield record


def _pick(record: Record, *keys: str) -> float | None:
    """A finite number under nested keys, else None."""
    value = number(pick(record, *keys))
    # float32, in which a simple value is held, ends at 3.4e38.
    return float(value) if value is not None and abs(value) < 3e38 else None
