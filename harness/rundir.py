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

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import RunDirectoryError

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
