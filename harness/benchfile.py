"""bench.json: what ``harness bench`` has measured, read and written as plain data.

A missing value is null, never 0. Whoever reads it gets every field checked; keys that are not known
here are left alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from harness.errors import DataError
from harness.files import is_file, read_text
from harness.jsonl import write_json
from harness.lenient import LARGEST

FORMAT = 1
NAME = "bench.json"
WINDOWS = "windows.csv"
Mode = Literal["weak", "strong", "grid"]
Status = Literal["complete", "partial"]


@dataclass(frozen=True)
class Repeat:
    """One launch of a point. Its steady part is what follows its warm-up."""

    repeat: int
    """From 0."""
    images_per_sec: float
    """Images of all ranks over the time of the steady windows."""
    seconds_per_update: float
    windows: int
    """All that were recorded; with ``train.log_every: 1`` each is an update."""
    warmup_windows: int
    """Those of them, at the front, that were left out."""
    seconds: Mapping[str, float]
    """Phase → seconds per update on rank 0."""
    settled: bool = True
    """Whether the warm-up was seen to end before half of the windows had passed."""


@dataclass(frozen=True)
class Point:
    """One decomposition of a global batch, over its repeats."""

    ranks: int
    nodes: int
    micro_batch: int
    accumulation: int
    """Micro-batches of the busiest rank in an update."""
    global_batch: int
    repeats: tuple[Repeat, ...]
    confidence: float
    images_per_sec: float
    """Mean over the repeats."""
    images_per_sec_low: float | None
    """Student's t interval of that mean; None with one repeat."""
    images_per_sec_high: float | None
    seconds_per_update: float
    seconds: Mapping[str, float]
    """Phase → seconds per update; means over the repeats."""
    mfu: float | None
    """Model FLOPs utilisation: FLOP/s of the model over the ranks' peak (Chowdhery et al. 2022)."""

    @property
    def name(self) -> str:
        return point_name(self.ranks, self.accumulation, self.micro_batch, self.global_batch)


@dataclass(frozen=True)
class Failure:
    """A repeat that could not be measured."""

    point: str
    """Its name, as the folder under points/ has it."""
    repeat: int
    reason: str


@dataclass(frozen=True)
class Bench:
    """What bench.json holds."""

    name: str
    mode: Mode
    """weak: as many images per rank and update everywhere; strong: one global batch; grid: several
    series of either."""
    dataset: str
    model: str
    parameters: int | None
    gradient_bytes: int | None
    """Payload that each rank hands to the allreduce in an update."""
    compression: str
    engine: str
    """What carried the collectives, as ``horovod-mpi``."""
    flops_per_image: float | None
    """Forward and backward."""
    peak_flops_per_rank: float | None
    peak_source: str | None
    machine: Mapping[str, Any]
    """Of the launch with the most ranks, as its provenance.json has it."""
    status: Status
    points: tuple[Point, ...]
    failures: tuple[Failure, ...] = ()
    seed: int = 0
    """Of ``order``."""
    order: tuple[tuple[str, int], ...] = ()
    """(point, repeat) in the order in which they were, or are to be, measured."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: launcher, hosts, threads of a rank, seconds."""

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def point_name(ranks: int, accumulation: int, micro_batch: int, global_batch: int) -> str:
    """As ``r0004-a0002-m0032``; with the global batch where that does not follow from these."""
    name = f"r{ranks:04d}-a{accumulation:04d}-m{micro_batch:04d}"
    even = ranks * accumulation * micro_batch == global_batch
    return name if even else f"{name}-b{global_batch}"


def holds_bench(path: Path) -> bool:
    """Whether a path is a bench directory."""
    return is_file(path / NAME)


def write_bench(directory: Path, bench: Bench) -> None:
    """Replace bench.json in one step."""
    write_json(directory / NAME, bench.as_dict())


def read_bench(path: Path) -> Bench:
    """Read bench.json, or that of a bench directory.

    Raises DataError with the file, the key and what would be valid.
    """
    file = path / NAME if path.is_dir() else path
    try:
        content = json.loads(read_text(file))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read: {error.strerror}; give a directory that harness bench has "
            "made, or its bench.json"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{file}: not JSON; harness bench writes it whole or not at all") from None
    return _bench(_Object(content, str(file)))


class _Object:
    """A JSON object that knows where it stands."""

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{place}: must be a JSON object, not {_shown(value)}")
        self.value: dict[str, Any] = value
        self.place = place

    def refuse(self, key: str, valid: str) -> DataError:
        found = f"not {_shown(self.value[key])}" if key in self.value else "but is missing"
        return DataError(f"{self.place}: {key} must be {valid}, {found}")

    def text(self, key: str, *choices: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.refuse(key, f"one of {', '.join(choices)}" if choices else "text")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.null(key) else self.text(key)

    def count(self, key: str, least: int = 1) -> int:
        value = self.value.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**62:
            raise self.refuse(key, f"a whole number, {least} or more")
        return value

    def optional_count(self, key: str) -> int | None:
        return None if self.null(key) else self.count(key, 0)

    def number(self, key: str, least: float = 0.0, most: float = 1e30, zero: bool = False) -> float:
        value = self.value.get(key)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may be larger than any float.
        number = float(value) if known and value is not None and abs(value) < LARGEST else math.nan
        if not (least <= number <= most) or (number == 0 and not zero):
            valid = "" if least < 0 else ", 0 or more" if zero else ", more than 0"
            raise self.refuse(key, f"a number{valid}, at most {most:g}")
        return number

    def optional_number(self, key: str) -> float | None:
        return None if self.null(key) else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def mapping(self, key: str, needed: bool = True) -> dict[str, Any]:
        value = self.value.get(key, None if needed else {})
        if not isinstance(value, dict):
            raise self.refuse(key, "a JSON object")
        return value

    def seconds(self) -> dict[str, float]:
        inner = _Object(self.mapping("seconds"), f"{self.place}: seconds")
        return {name: inner.number(name, zero=True) for name in inner.value}

    def objects(self, key: str, needed: bool = True) -> list[_Object]:
        value = self.value.get(key, None if needed else [])
        if not isinstance(value, list):
            raise self.refuse(key, "a list")
        return [_Object(entry, f"{self.place}: {key}[{i}]") for i, entry in enumerate(value)]

    def null(self, key: str) -> bool:
        """Whether a key that must be there is null."""
        if key not in self.value:
            raise self.refuse(key, "there, null where it is not known")
        return self.value[key] is None


def _bench(raw: _Object) -> Bench:
    if raw.value.get("format") != FORMAT:
        raise raw.refuse("format", f"{FORMAT}, which this version of the harness reads")
    mode, status = raw.text("mode", *get_args(Mode)), raw.text("status", *get_args(Status))
    return Bench(
        name=raw.text("name"),
        mode=mode,  # type: ignore[arg-type]
        dataset=raw.text("dataset"),
        model=raw.text("model"),
        parameters=raw.optional_count("parameters"),
        gradient_bytes=raw.optional_count("gradient_bytes"),
        compression=raw.text("compression"),
        engine=raw.text("engine"),
        flops_per_image=raw.optional_number("flops_per_image"),
        peak_flops_per_rank=raw.optional_number("peak_flops_per_rank"),
        peak_source=raw.optional_text("peak_source"),
        machine=raw.mapping("machine"),
        status=status,  # type: ignore[arg-type]
        points=_distinct(raw, [_point(one) for one in raw.objects("points")]),
        failures=tuple(
            Failure(one.text("point"), one.count("repeat", 0), one.text("reason"))
            for one in raw.objects("failures", needed=False)
        ),
        seed=raw.count("seed", 0) if "seed" in raw.value else 0,
        order=_order(raw),
        settings=raw.mapping("settings", needed=False),
    )


def _point(raw: _Object) -> Point:
    repeats = tuple(_repeat(one) for one in raw.objects("repeats"))
    if not repeats or len({one.repeat for one in repeats}) < len(repeats):
        raise raw.refuse("repeats", "a list of one or more repeats, each with a number of its own")
    return Point(
        ranks=raw.count("ranks"),
        nodes=raw.count("nodes"),
        micro_batch=raw.count("micro_batch"),
        accumulation=raw.count("accumulation"),
        global_batch=raw.count("global_batch"),
        repeats=repeats,
        confidence=raw.number("confidence", most=1.0),
        images_per_sec=raw.number("images_per_sec"),
        images_per_sec_low=_bound(raw, "images_per_sec_low"),
        images_per_sec_high=_bound(raw, "images_per_sec_high"),
        seconds_per_update=raw.number("seconds_per_update"),
        seconds=raw.seconds(),
        mfu=raw.optional_number("mfu"),
    )


def _bound(raw: _Object, key: str) -> float | None:
    """An end of an interval, which may lie below 0 where repeats differ much."""
    return None if raw.null(key) else raw.number(key, least=-1e30, zero=True)


def _repeat(raw: _Object) -> Repeat:
    windows, warmup = raw.count("windows"), raw.count("warmup_windows", 0)
    if warmup >= windows:
        raise raw.refuse("warmup_windows", f"less than the {windows} of windows")
    return Repeat(
        repeat=raw.count("repeat", 0),
        images_per_sec=raw.number("images_per_sec"),
        seconds_per_update=raw.number("seconds_per_update"),
        windows=windows,
        warmup_windows=warmup,
        seconds=raw.seconds(),
        settled=raw.flag("settled", True),
    )


def _distinct(raw: _Object, points: list[Point]) -> tuple[Point, ...]:
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{raw.place}: points: {twice} stands there twice")
    return tuple(points)


def _order(raw: _Object) -> tuple[tuple[str, int], ...]:
    order = raw.value.get("order", [])
    fits = isinstance(order, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and type(pair[1]) is int
        for pair in order
    )
    if not fits:
        raise raw.refuse("order", "a list of pairs of a point's name and a repeat")
    return tuple((name, repeat) for name, repeat in order)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
