"""What a running job writes down: metrics, events, checkpoints. Only rank 0 writes."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from typing import Any

from harness import checkpoint
from harness.attempts import Attempt
from harness.records import TRAJECTORY_EVENTS, JsonlWriter, Position, RunDirectory, now, storing
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
        attempt: Attempt | None = None,
    ) -> None:
        """``position``: how much of the records is there already, for a run that goes on;
        ``scalars``: a copy for TensorBoard, closed with the journal; ``attempt``: who writes, and
        is looked after by each method: Superseded if there is a newer one.

        Raises StorageError, as all methods do, where nothing can be written.
        """
        self.run, self._attempt = run, attempt
        self._keep = keep_checkpoints
        self._lines, self._trajectory = position.metrics, position.events
        self._layer_lines = position.layers
        with self._writing():
            self._metrics = JsonlWriter(run.metrics) if writes else None
            self._events = JsonlWriter(run.events) if writes else None
        self._layers: JsonlWriter | None = None  # few runs have it
        self._scalars = scalars

    def _writing(self) -> AbstractContextManager[None]:
        return storing(self.run.path) if self._attempt is None else self._attempt.writing()

    def event(self, kind: str, update: int, **fields: Any) -> None:
        """Append a line to events.jsonl. ``update``: the last one that it depends on."""
        if self._events is None:
            return
        with self._writing():
            self._trajectory += kind in TRAJECTORY_EVENTS
            self._events.append({"kind": kind, "update": update, "time": now(), **fields})
            if kind == "evaluation" and self._scalars is not None:
                self._scalars.evaluation(fields)

    def metrics(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self._metrics is None:
            return
        with self._writing():
            self._lines += 1
            self._metrics.append(line)
            if self._scalars is not None:
                self._scalars.line(line)

    def layers(self, line: dict[str, Any]) -> None:
        """Append a line to layers.jsonl, which the first one creates."""
        if self._metrics is None:
            return
        with self._writing():
            if self._layers is None:
                self._layers = JsonlWriter(self.run.layers)
                if self._attempt is not None:
                    self._attempt.publish()
            self._layer_lines += 1
            self._layers.append(line)

    def save(self, update: int, samples_seen: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, after everything that was recorded before it."""
        if self._metrics is not None:
            with self._writing():
                self._save(update, samples_seen, state)

    def _save(self, update: int, samples_seen: int, state: dict[str, Any]) -> None:
        for writer in (self._metrics, self._layers, self._scalars):
            if writer is not None:
                writer.sync()
        # The checkpoint's own event is written before the checkpoint gets its name.
        position = Position(self._lines, self._trajectory + 1, self._layer_lines)

        def announce() -> None:
            name = checkpoint.checkpoint_name(update)
            self.event("checkpoint", update, samples_seen=samples_seen, file=name)
            if self._events is not None:
                self._events.sync()

        checkpoint.save_checkpoint(
            self.run.checkpoints,
            update,
            {**state, "records": asdict(position)},
            self._keep,
            announce,
        )
        if self._attempt is not None:
            self._attempt.publish()  # should an older attempt have led a name to itself

    def close(self) -> None:
        """Raises StorageError if something that was written has not come to the disk."""
        open_ones = (self._metrics, self._events, self._layers, self._scalars)
        writers = [writer for writer in open_ones if writer is not None]
        with ExitStack() as closing:
            for writer in writers:
                closing.callback(writer.close)
            with self._writing() if writers else nullcontext():
                for writer in writers:
                    writer.sync()
