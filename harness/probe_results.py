"""What a probe has measured: tables, files, and reading them again. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from rich import box
from rich.console import Console
from rich.measure import Measurement as Width
from rich.table import Table

from harness.errors import UsageError
from harness.files import is_file, read_text
from harness.lenient import number, pick
from harness.wording import counted
from harness.yamlfile import one_line

NAME = "probe.json"
_COLUMNS = (
    *("operation", "collective", "bytes", "ranks", "rounds"),
    *("median_seconds", "lower_quartile_seconds", "upper_quartile_seconds"),
    *("algorithm_gb_per_s", "bus_gb_per_s"),
)
_WIDE = 200  # columns where no terminal sets them


@dataclass(frozen=True)
class Operation:
    name: str
    """In the files."""
    label: str
    """In the table."""
    collective: Literal["allreduce", "broadcast"] = "allreduce"


MPI_ALONE = Operation("mpi_alone", "MPI alone")
MPI_BESIDE = Operation("mpi", "MPI beside")
HOROVOD = Operation("horovod", "Horovod")
HOROVOD_FP16 = Operation("horovod_fp16", "Horovod fp16")
HOROVOD_BROADCAST = Operation("horovod_broadcast", "Horovod broadcast", "broadcast")
GLOO = Operation("torch_gloo", "torch Gloo")
OPERATIONS = (MPI_ALONE, MPI_BESIDE, HOROVOD, HOROVOD_FP16, HOROVOD_BROADCAST, GLOO)


@dataclass(frozen=True)
class Timing:
    """An operation's times with messages of one size."""

    operation: Operation
    bytes: int
    """Of the float32 tensor; what travels of it as fp16 is half of that."""
    ranks: int
    seconds: tuple[float, ...]
    """The slowest rank's, for each round."""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile in seconds."""
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes of the message in a second, at the median."""
        return self.bytes / self.quartiles[1]

    @property
    def bus_bandwidth(self) -> float | None:
        """Bytes in a second that a rank's link must carry at least; None for a single rank.

        As NVIDIA's nccl-tests define it (doc/PERFORMANCE.md), so that it can be compared with the
        hardware's whatever the number of ranks.
        """
        factor = bus_factor(self.operation.collective, self.ranks)
        return self.algorithm_bandwidth * factor if self.ranks > 1 else None

    def as_dict(self) -> dict[str, Any]:
        low, middle, high = self.quartiles
        return {
            "operation": self.operation.name,
            "bytes": self.bytes,
            "median": middle,
            "lower_quartile": low,
            "upper_quartile": high,
            "algorithm_bandwidth": self.algorithm_bandwidth,
            "bus_bandwidth": self.bus_bandwidth,
            "seconds": list(self.seconds),
        }


def bus_factor(collective: Literal["allreduce", "broadcast"], ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth: 2(n − 1)/n for allreduce, 1 for broadcast."""
    return 2 * (ranks - 1) / ranks if collective == "allreduce" else 1.0


# Reading


@dataclass(frozen=True)
class Results:
    """A probe that was written down."""

    path: Path
    content: dict[str, Any]
    """probe.json."""
    ranks: int
    hosts: int | None
    timings: tuple[Timing, ...]
    left_out: Mapping[str, str]
    """Label of an operation that was not measured -> why."""

    @property
    def title(self) -> str:
        where = "" if self.hosts is None else f" on {counted(self.hosts, 'host')}"
        return f"{counted(self.ranks, 'rank')}{where}"

    def rounds(self, operation: Operation) -> dict[int, tuple[float, ...]]:
        """Bytes of the message -> seconds of each round."""
        return {one.bytes: one.seconds for one in self.timings if one.operation == operation}


def holds_probe(path: Path) -> bool:
    """Whether a path is a probe directory."""
    return is_file(path / NAME)


def read_results(path: Path) -> Results:
    """Read probe.json, or the one in a directory. Raises UsageError if it holds no probe."""
    file = path / NAME if path.is_dir() else path
    try:
        content = json.loads(read_text(file))
    except OSError as error:
        raise UsageError(
            f"{file}: {error.strerror}; give a directory that harness probe -o has written"
        ) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{file} is not JSON; is it cut off? Measure again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} is no probe: an object is wanted")
    ranks, listed = content.get("ranks"), content.get("timings")
    if not is_count(ranks):
        raise UsageError(f"{file} is no probe: ranks must be a count, not {ranks!r:.50}")
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{file} is no probe: timings must be a list that is not empty")
    timings = tuple(
        read_timing(one, ranks, f"{file}: timings[{i}]") for i, one in enumerate(listed)
    )
    if len({(one.operation, one.bytes) for one in timings}) < len(timings):
        raise UsageError(f"{file}: an operation has one size of messages twice")
    left_out = content.get("left_out")
    return Results(
        file,
        content,
        ranks,
        _count_hosts(content),
        timings,
        {one_line(name): one_line(str(why), 300) for name, why in left_out.items()}
        if isinstance(left_out, dict)
        else {},
    )


def read_timing(value: Any, ranks: int, where: str) -> Timing:
    """An entry of ``timings``. Raises UsageError, which begins with ``where``."""
    value = value if isinstance(value, dict) else {}
    known = {operation.name: operation for operation in OPERATIONS}
    name, size, seconds = (value.get(key) for key in ("operation", "bytes", "seconds"))
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"{where}: operation {name!r:.50} is none of {', '.join(known)}")
    if not is_count(size):
        raise UsageError(f"{where}: bytes must be a count, not {size!r:.50}")
    if not isinstance(seconds, list) or len(seconds) < 2 or not all(map(_is_time, seconds)):
        raise UsageError(
            f"{where}: seconds must be a list of 2 times or more, each above 0 (1e-12 to 1e9)"
        )
    return Timing(known[name], size, ranks, tuple(map(float, seconds)))


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number from 1 on that a float holds exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**53


def _is_time(value: Any) -> bool:
    known = number(value)
    return known is not None and 1e-12 <= known <= 1e9


def _count_hosts(content: dict[str, Any]) -> int | None:
    value = pick(content, "provenance", "communication", "hosts")
    return len(value) if isinstance(value, list) else None


# Tables


def in_order(timings: Iterable[Timing]) -> list[Timing]:
    """By size, and within one as the operations are listed."""
    return sorted(timings, key=lambda one: (one.bytes, OPERATIONS.index(one.operation)))


def as_csv(timings: Iterable[Timing]) -> str:
    """A line for each operation and size; bandwidths in GB/s, which are 10^9 bytes a second."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for one in timings:
        low, middle, high = one.quartiles
        bus = one.bus_bandwidth
        about = (one.operation.name, one.operation.collective, one.bytes, one.ranks)
        measured = [middle, low, high, one.algorithm_bandwidth / 1e9]
        measured += [] if bus is None else [bus / 1e9]
        numbers = [f"{value:.6g}" for value in measured]
        writer.writerow((*about, len(one.seconds), *numbers, *([""] if bus is None else [])))
    return text.getvalue()


def print_tables(
    title: str,
    timings: Sequence[Timing],
    left_out: Mapping[str, str],
    console: Console | None = None,
) -> None:
    """Print times and bus bandwidths, a column for each operation; a narrow terminal gets medians
    without their quartiles."""
    # A launcher may give its ranks a terminal of its own; how wide the real one is, the launching
    # process says.
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if re.fullmatch("[1-9][0-9]{0,4}", columns) else _WIDE
    target = console or Console(width=width, force_terminal=False, color_system=None)
    times = _table(timings, lambda one: shown_time(one.quartiles))
    heading = "time, median (quartiles)"
    if Width.get(target, target.options.update(max_width=_WIDE), times).maximum > target.width:
        times, heading = _table(timings, lambda one: shown_time(one.quartiles[1:2])), "median time"
    _say(target, f"{title}: {heading}")
    target.print(times)
    _say(target, "bus bandwidth, GB/s (of the float32 bytes; as nccl-tests define it)")
    target.print(_table(timings, _shown_bandwidth))
    for label, why in left_out.items():
        _say(target, f"{label} is not measured: {why}")


def _say(target: Console, sentence: str) -> None:
    target.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _table(timings: Sequence[Timing], cell: Callable[[Timing], str]) -> Table:
    present = [one for one in OPERATIONS if any(t.operation == one for t in timings)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for heading in ("size", *(one.label for one in present)):
        table.add_column(heading, justify="right")
    found = {(one.bytes, one.operation): one for one in timings}
    for size in sorted({one.bytes for one in timings}):
        cells = [cell(found[size, one]) if (size, one) in found else "" for one in present]
        table.add_row(shown_size(size), *cells)
    return table


def _shown_bandwidth(timing: Timing) -> str:
    bus = timing.bus_bandwidth
    return "-" if bus is None else f"{bus / 1e9:.3f}" if bus < 1e9 else f"{bus / 1e9:.2f}"


def shown_time(seconds: Sequence[float]) -> str:
    """A median, or quartiles with the median first, in the unit that fits the median."""
    median = seconds[len(seconds) // 2]
    unit, factor = ("s", 1.0) if median >= 1 else ("ms", 1e3) if median >= 1e-3 else ("µs", 1e6)
    words = [_three_digits(value * factor) for value in seconds]
    if len(words) == 1:
        return f"{words[0]} {unit}"
    return f"{words[1]} ({words[0]}-{words[2]}) {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def shown_size(size: int) -> str:
    """Bytes in the largest unit that they fill: 4 B, 16 KiB, 64 MiB."""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size} B"
