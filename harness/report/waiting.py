"""What exposed communication consists of: the sums over ranks themselves, and waiting for ranks.

In each update the rank that comes last waits for nobody: what passes in ``comm_exposed`` even there
is what the sums take (``rank_seconds.wait_least`` of metrics.jsonl). What the median rank is
neither busy nor needs for the sums it waits for ranks that come later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from harness.lenient import listed, pick
from harness.report.runs import Run
from harness.report.scaling import updates_of_windows
from harness.report.summary import Number, quantile_of


@dataclass(frozen=True)
class Exchange:
    """Of one update, a mean over the run."""

    sums: float
    """Seconds in ``comm_exposed`` that pass on every rank."""
    busy: float
    """Seconds of the median rank outside ``comm_exposed``."""
    backward: float
    """Seconds of backward, with which sums overlap."""
    total: float
    """Seconds of the update."""
    sent: float | None
    """Bytes that a rank sends, and receives, if sums go round in a ring: 2 (n − 1) / n times the
    gradients', which is how nccl-tests count them."""
    hosts: int | None
    processors: float | None
    """How busy those of rank 0's host were, in percent of all cores; the median reading."""
    uneven: tuple[int, int] | None
    """Micro-batches of an update, and the ranks among which they do not divide evenly, where most
    updates are so."""

    @property
    def sums_share(self) -> float:
        """Of the update's time."""
        return self.sums / self.total

    @property
    def waiting_share(self) -> float:
        """What the median rank waits for others."""
        return max(0.0, self.total - self.busy - self.sums) / self.total

    @property
    def bandwidth(self) -> tuple[float, float] | None:
        """Bus bandwidth in bits per second: if sums went on during all of backward, and if during
        nothing of it."""
        if not self.sent or not self.sums:
            return None
        return 8 * self.sent / (self.sums + self.backward), 8 * self.sent / self.sums


def exchange_of(run: Run, seconds: dict[str, float]) -> Exchange | None:
    """None where the records do not tell waiting and sums apart.

    Args:
        seconds: of an update, by phase, as the page has them.
    """
    columns = run.columns
    least, over = columns["rank_seconds.wait_least"], columns["rank_seconds.updates"]
    busy = columns["rank_seconds.busy_median"]
    told = run.timed & (least >= 0) & (busy >= 0) & (over > 0)
    exposed = seconds.get("comm_exposed", 0.0)
    if not told.any() or not exposed:
        return None
    return Exchange(
        sums=min(exposed, float(np.average(least[told], weights=over[told]))),
        busy=float(busy[told].sum() / over[told].sum()),
        backward=seconds.get("backward", 0.0),
        total=sum(seconds.values()),
        sent=_sent(run),
        hosts=_hosts(run),
        processors=quantile_of(columns.known("counters.cpu_percent"), 0.5),
        uneven=_uneven(run),
    )


def _sent(run: Run) -> float | None:
    ranks, sent, updates = run.columns["ranks"], run.columns["comm_bytes"], updates_of_windows(run)
    known = run.timed & (ranks > 1) & (sent >= 0) & (updates > 0)
    if not known.any():
        return None
    return float((sent * 2 * (ranks - 1) / ranks)[known].sum() / updates[known].sum())


def _hosts(run: Run) -> int | None:
    """Of the last attempt."""
    return len(listed(pick(run.starts[-1], "hosts"))) or None


def _uneven(run: Run) -> tuple[int, int] | None:
    batch, micro = run.columns["global_batch"][run.timed], run.columns["micro_batch"][run.timed]
    ranks = run.columns["ranks"][run.timed]
    known = (batch > 0) & (micro > 0) & (ranks > 0)
    pieces, ranks = np.ceil(batch[known] / micro[known]), ranks[known]
    odd = pieces % ranks != 0
    if not len(odd) or odd.mean() < 0.5:
        return None
    return int(pieces[odd][-1]), int(ranks[odd][-1])


def exchange_numbers(exchange: Exchange | None) -> Iterator[Number]:
    """What the findings say of it."""
    if exchange is None:
        return
    windows = "of the windows of metrics.jsonl, first of each attempt left out"
    rule = f"mean of rank_seconds.wait_least weighted by rank_seconds.updates, {windows}"
    rule += "; at most seconds_per_update_comm_exposed"
    yield Number("seconds_per_update_sums", exchange.sums, "s", rule)
    rule = f"sum of rank_seconds.busy_median / sum of rank_seconds.updates, {windows}"
    yield Number("seconds_per_update_busy_median", exchange.busy, "s", rule)
    rule = "seconds_per_update_sums / seconds_per_update"
    yield Number("share_sums", exchange.sums_share, "fraction", rule)
    rule = "(seconds_per_update - seconds_per_update_busy_median - seconds_per_update_sums) / "
    rule += "seconds_per_update"
    yield Number("share_waiting_for_ranks", exchange.waiting_share, "fraction", rule)
    if exchange.sent is not None:
        rule = f"sum of comm_bytes × 2 (ranks - 1) / ranks, over updates, {windows}"
        yield Number("bus_bytes_per_update", exchange.sent, "bytes", rule)
    if exchange.bandwidth is not None:
        low, high = exchange.bandwidth
        rule = "8 bus_bytes_per_update / (seconds_per_update_sums + seconds_per_update_backward)"
        yield Number("bus_bandwidth_low", low, "bit/s", rule)
        rule = "8 bus_bytes_per_update / seconds_per_update_sums"
        yield Number("bus_bandwidth_high", high, "bit/s", rule)
