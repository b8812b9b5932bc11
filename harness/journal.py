"""What a running job writes down: metrics, events, checkpoints. Only rank 0 writes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import checkpoint
from harness.records import TRAJECTORY_EVENTS, JsonlWriter, Position, RunDirectory, now
from harness.tensorboard import Scalars


class Journal:
    """The records of a run while it goes on; on ranks other than 0 every method does nothing."""

    def __init__(
        self,
        run: RunDirectory,
        writes: bool,
        keep_checkpoints: int,
        position: Position,
        scalars: Scalars | None = None,
    ) -> None:
        """``position``: how much of the records is there already, for a run that goes on;
        ``scalars``: a copy for TensorBoard, closed with the journal."""
        self.run = run
        self._keep = keep_checkpoints
        self._lines, self._trajectory = position.metrics, position.events
        self._layer_lines = position.layers
        self._writes = writes
        self._opened: dict[Path, JsonlWriter] = {}
        self._scalars = scalars

    def _writer(self, path: Path) -> JsonlWriter:
        """Of one file, which is opened at its first line: until then it may be cut or replaced."""
        if path not in self._opened:
            self._opened[path] = JsonlWriter(path)
        return self._opened[path]

    def open(self, scalars: Scalars | None = None) -> None:
        """Create the files that every run has; see ``__init__`` for ``scalars``."""
        self._scalars = self._scalars or scalars
        if self._writes:
            self._writer(self.run.metrics)
            self._writer(self.run.events)

    def event(self, kind: str, update: int, **fields: Any) -> None:
        """Append a line to events.jsonl. ``update``: the last one that it depends on."""
        if self._writes:
            self._trajectory += kind in TRAJECTORY_EVENTS
            self._writer(self.run.events).append(
                {"kind": kind, "update": update, "time": now(), **fields}
            )
            if kind == "evaluation" and self._scalars is not None:
                self._scalars.evaluation(fields)

    def metrics(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self._writes:
            self._lines += 1
            self._writer(self.run.metrics).append(line)
            if self._scalars is not None:
                self._scalars.line(line)

    def layers(self, line: dict[str, Any]) -> None:
        """Append a line to layers.jsonl, which the first one creates."""
        if self._writes:
            self._layer_lines += 1
            self._writer(self.run.layers).append(line)

    def save(self, update: int, samples_seen: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, after everything that was recorded before it."""
        if not self._writes:
            return
        events = self._writer(self.run.events)
        for writer in self._all():
            if writer is not events:
                writer.sync()
        # The checkpoint's own event is written before the checkpoint gets its name.
        position = Position(self._lines, self._trajectory + 1, self._layer_lines)

        def announce() -> None:
            name = checkpoint.checkpoint_name(update)
            self.event("checkpoint", update, samples_seen=samples_seen, file=name)
            events.sync()

        checkpoint.save_checkpoint(
            self.run.checkpoints,
            update,
            {**state, "records": asdict(position)},
            self._keep,
            announce,
        )

    def _all(self) -> list[JsonlWriter | Scalars]:
        return [*self._opened.values(), *([] if self._scalars is None else [self._scalars])]

    def close(self) -> None:
        for writer in self._all():
            writer.sync()
            writer.close()
        self._opened.clear()
