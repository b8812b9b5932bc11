"""What a running job writes down: metrics, events, checkpoints. Only rank 0 writes."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import checkpoint
from harness.attempts import Attempt
from harness.files import storing
from harness.jsonl import JsonlWriter, now
from harness.records import TRAJECTORY_EVENTS, Position
from harness.rundir import RunDirectory
from harness.tensorboard import Scalars
from harness.trackers import Trackers


class Journal:
    """The records of a run while it goes on; on ranks other than 0 every method does nothing."""

    def __init__(
        self, run: RunDirectory, writes: bool, keep_checkpoints: int, position: Position
    ) -> None:
        """``position``: how much of the records is there already, for a run that goes on.

        Nothing is opened or created before ``open``: until then the run is as it was.
        """
        self.run = run
        self._attempt: Attempt | None = None
        self._writes, self._keep = writes, keep_checkpoints
        self._lines, self._trajectory = position.metrics, position.events
        self._layer_lines = position.layers
        self._opened: dict[Path, JsonlWriter] = {}
        self._scalars: Scalars | None = None
        self._trackers: Trackers | None = None

    def open(
        self,
        attempt: Attempt | None = None,
        scalars: Scalars | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        """Create the files that every run has.

        ``attempt``: who writes, into its own folder, and is looked after by each method: Superseded
        if there is a newer one. ``scalars``: a copy for TensorBoard, closed with the journal;
        ``trackers``: told of every line, and closed too.

        Raises StorageError, as all methods do, where nothing can be written.
        """
        if attempt is not None:
            self.run, self._attempt = attempt.run, attempt
        self._scalars, self._trackers = scalars, trackers
        if self._writes:
            with self._writing():
                self._writer(self.run.metrics)
                self._writer(self.run.events)

    def _writing(self) -> AbstractContextManager[None]:
        return storing(self.run.path) if self._attempt is None else self._attempt.writing()

    def _writer(self, path: Path) -> JsonlWriter:
        """Of one file, which its first line creates."""
        if path not in self._opened:
            self._opened[path] = JsonlWriter(path)
        return self._opened[path]

    def event(self, kind: str, update: int, **fields: Any) -> None:
        """Append a line to events.jsonl. ``update``: the last one that it depends on."""
        if not self._writes:
            return
        with self._writing():
            self._trajectory += kind in TRAJECTORY_EVENTS
            line = {"kind": kind, "update": update, "time": now(), **fields}
            self._writer(self.run.events).append(line)
            if kind == "evaluation" and self._scalars is not None:
                self._scalars.evaluation(fields)
        self._tell(line)

    def metrics(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if not self._writes:
            return
        with self._writing():
            self._lines += 1
            self._writer(self.run.metrics).append(line)
            if self._scalars is not None:
                self._scalars.line(line)
        self._tell(line)

    def _tell(self, line: dict[str, Any]) -> None:
        """Hand a line that has been written to the trackers, and write down which have failed."""
        if self._trackers is not None:
            self._trackers.tell(line)
            for problem in self._trackers.problems():
                self.event("warning", int(line.get("update") or 0), reason=problem)

    def layers(self, line: dict[str, Any]) -> None:
        """Append a line to layers.jsonl, which the first one creates."""
        if not self._writes:
            return
        with self._writing():
            is_first = self.run.layers not in self._opened
            writer = self._writer(self.run.layers)
            if is_first and self._attempt is not None:
                self._attempt.publish()
            self._layer_lines += 1
            writer.append(line)

    def save(self, update: int, samples_seen: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, after everything that was recorded before it."""
        if self._writes:
            with self._writing():
                self._save(update, samples_seen, state)

    def _save(self, update: int, samples_seen: int, state: dict[str, Any]) -> None:
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
        if self._attempt is not None:
            self._attempt.publish()  # should an older attempt have led a name to itself

    def _all(self) -> list[JsonlWriter | Scalars]:
        return [*self._opened.values(), *([] if self._scalars is None else [self._scalars])]

    def close(self) -> None:
        """Raises StorageError if something that was written has not come to the disk."""
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None
        writers = self._all()
        with ExitStack() as closing:
            for writer in writers:
                closing.callback(writer.close)
            with self._writing() if writers else nullcontext():
                for writer in writers:
                    writer.sync()
        self._opened.clear()
