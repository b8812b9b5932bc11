"""layers.jsonl as the report sees it: each layer's norms, their quotient and its trust ratio.

The table has the form of Table 4 of the LARS paper (You, Gitman and Ginsburg 2017), turned on its
side, since models have more layers than a page has columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.jsonl import Record, spread_lines
from harness.lenient import listed, number
from harness.report.fields import clean, count, general, words

LOGGED = 400  # lines that are read, evenly spread; of a longer run layers.csv says how many it has
LAYERS = 10_000  # of one line; more is damage


@dataclass(frozen=True)
class Layer:
    """A parameter tensor at a logged update."""

    layer: str
    weight_norm: float | None
    grad_norm: float | None
    ratio: float | None
    """‖w‖ / ‖∇w‖"""
    trust_ratio: float | None


@dataclass(frozen=True)
class Snapshot:
    """All layers at a logged update."""

    update: float | None
    samples_seen: float | None
    epoch: float | None
    layers: list[Layer]

    @property
    def where(self) -> str:
        return "an unknown update" if self.update is None else f"update {count(self.update)}"


@dataclass(frozen=True)
class LayerLog:
    """What was read of layers.jsonl: of ``lines`` lines the ``snapshots``, first and last among
    them unless they are broken."""

    snapshots: list[Snapshot]
    lines: int
    problems: list[str]

    @property
    def ends(self) -> list[Snapshot]:
        """The first and the last, or the only one."""
        return self.snapshots[:1] + self.snapshots[1:][-1:]


@dataclass(frozen=True)
class LayerRow:
    """A layer at each of ``LayerLog.ends``; None where it is not in the line."""

    layer: str
    at: list[Layer | None]


def read_layers(path: Path) -> LayerLog:
    """Read layers.jsonl; a run without one has no lines."""
    try:
        lines, total = spread_lines(path, LOGGED)
    except OSError as error:
        return LayerLog([], 0, [f"layers.jsonl cannot be read: {error.strerror}"])
    broken = lines.count(None)
    problems = []
    if broken:
        problems.append(f"layers.jsonl: {broken:,} of {len(lines):,} lines are broken and left out")
    snapshots = [_snapshot(line) for line in lines if line is not None]
    return LayerLog([s for s in snapshots if s.layers], total, problems)


def _snapshot(line: Record) -> Snapshot:
    entries = line.get("layers")
    return Snapshot(
        update=number(line.get("update")),
        samples_seen=number(line.get("samples_seen")),
        epoch=number(line.get("epoch")),
        layers=list(_layers(listed(entries)[:LAYERS])),
    )


def _layers(entries: Iterable[Any]) -> Iterator[Layer]:
    for entry in entries:
        name = words(entry.get("layer")) if isinstance(entry, dict) else None
        if name is not None:
            weight, grad, trust = (
                number(entry.get(key)) for key in ("weight_norm", "grad_norm", "trust_ratio")
            )
            ratio = number(weight / grad) if weight is not None and grad else None
            yield Layer(name, weight, grad, ratio, trust)


def layer_rows(log: LayerLog) -> list[LayerRow]:
    """A row per layer, in the order of the model."""
    found = [{layer.layer: layer for layer in snapshot.layers} for snapshot in log.ends]
    names = dict.fromkeys(name for layers in found for name in layers)
    return [LayerRow(name, [layers.get(name) for layers in found]) for name in names]


def has_trust(log: LayerLog) -> bool:
    """Whether the optimizer has trust ratios."""
    return any(layer.trust_ratio is not None for s in log.ends for layer in s.layers)


def spread_of_ratios(log: LayerLog) -> str:
    """How far the layers' ‖w‖ / ‖∇w‖ lie apart: one rate for all fits them the less."""
    sentences = []
    for snapshot in log.ends:
        known = [(r, layer.layer) for layer in snapshot.layers if (r := layer.ratio)]
        if len(known) > 1:
            (low, lowest), (high, highest) = min(known), max(known)
            apart = f", a factor of {general(high / low, 3)}" if low > 0 else ""
            sentences.append(
                f"At {snapshot.where}, ‖w‖/‖∇w‖ lies between {general(low)} ({clean(lowest, 60)}) "
                f"and {general(high)} ({clean(highest, 60)}){apart}."
            )
    return " ".join(sentences)
