"""The logging window: what has been summed up since the last line of metrics.jsonl."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from harness.records import PHASES


@dataclass
class Window:
    """Sums over the updates of one line. Part of the checkpoint, so resuming loses no line."""

    updates: int = 0
    samples: int = 0
    kept: int = 0
    """Those of the samples that could be read; the loss is over these."""
    loss_sum: float = 0.0
    bytes_sent: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    latest: dict[str, Any] = field(default_factory=dict)
    """Fields that tell of the last update, not of the sum."""

    def add(
        self,
        samples: int,
        kept: int,
        loss_sum: float,
        bytes_sent: int,
        latest: dict[str, Any],
    ) -> None:
        """Count one update; its time comes by `spend`."""
        self.updates += 1
        self.samples += samples
        self.kept += kept
        self.loss_sum += loss_sum
        self.bytes_sent += bytes_sent
        self.latest = latest

    def spend(self, seconds: dict[str, float]) -> None:
        """Count time by phase, of any number of updates."""
        for phase, spent in seconds.items():
            self.seconds[phase] += spent

    def line(self) -> dict[str, Any]:
        """The record: ``images_per_sec`` is samples of all ranks over the time of their updates."""
        total = sum(self.seconds.values())
        return {
            **self.latest,
            "loss": self.loss_sum / self.kept if self.kept else None,
            "images_per_sec": self.samples / total if total > 0 else None,
            "seconds": self.seconds,
            "comm_bytes": self.bytes_sent,
        }

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        return cls(**state)
