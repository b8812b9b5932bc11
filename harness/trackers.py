"""Telling experiment trackers of a run: MLflow, Weights & Biases, or the user's own.

A tracker can neither stop nor hold up a run. It works in a thread of its own; what it raises, or
that it cannot keep up, is one warning, and it is dropped. Rank 0 alone has any.

What has been handed over is marked before it is, by kind and by samples seen, in
``trackers/NAME/sent.json``. A run that goes on hands over what lies behind the marks, from its
records: after a kill nothing is there twice, and at most the line that was under way is missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from heapq import merge
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from harness.errors import ConfigError
from harness.files import write_atomic
from harness.jsonl import Record, read_jsonl, read_object, write_json
from harness.own import calling, find
from harness.own_names import is_own
from harness.resume import settled
from harness.rundir import RunDirectory
from harness.schema import Config
from harness.tensorboard import evaluation_values, line_values
from harness.wording import plain_name

_WAITING = 10_000
"""Lines that may wait for a tracker."""
_PATIENCE = 15.0
"""Seconds that the end of a run waits for one."""
_LINE = "line"


class Tracker(Protocol):
    """What is told of a run. Its methods are called in one thread, in the order of events."""

    def scalars(self, samples_seen: int, values: Mapping[str, float]) -> None:
        """Values by tag, such as ``train/loss`` and ``test/accuracy``, at a number of samples."""
        ...

    def event(self, samples_seen: int, kind: str, fields: Mapping[str, Any]) -> None:
        """A line of events.jsonl: a stage, an evaluation, a checkpoint, a warning …"""
        ...

    def end(self) -> None:
        """The run has ended, or stopped to go on later."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is made for: its callable gets one of these."""

    name: str
    """The configuration's."""
    folder: Path
    """The tracker's own, in the run directory, there until the run directory goes."""
    settings: Mapping[str, object]
    """What of the configuration the trajectory depends on: values by their keys' full names."""


class MlflowTracker:
    """One MLflow run for all attempts, in the folder's own store unless MLFLOW_TRACKING_URI is set;
    metrics have the samples seen as their step."""

    def __init__(self, run: TrackedRun) -> None:
        entities, tracking = import_module("mlflow.entities"), import_module("mlflow.tracking")
        self._metric = entities.Metric
        store = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlruns").as_uri()
        # MLflow 3 wants to be asked for its store of plain files.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = tracking.MlflowClient(tracking_uri=store)
        known = read_object(run.folder / "run.json") or {}
        self._id = str(known.get("run_id") or "")
        if not self._id:
            experiment = self._client.get_experiment_by_name(run.name)
            where = experiment and experiment.experiment_id
            where = where or self._client.create_experiment(run.name)
            made = self._client.create_run(where, run_name=run.folder.parent.parent.name)
            self._id = made.info.run_id
            write_json(run.folder / "run.json", {"run_id": self._id, "store": store})
            params = [entities.Param(key, str(value)[:500]) for key, value in run.settings.items()]
            for start in range(0, len(params), 100):  # as many as one call may have
                self._client.log_batch(self._id, params=params[start : start + 100])

    def scalars(self, samples_seen: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        metrics = [self._metric(tag, value, now, samples_seen) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def event(self, samples_seen: int, kind: str, fields: Mapping[str, Any]) -> None:
        """See `Tracker`: the newest of each kind is a tag."""
        said = json.dumps({"samples_seen": samples_seen, **fields}, default=str)
        self._client.set_tag(self._id, f"event.{kind}", said[:5000])

    def end(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id)


class WandbTracker:
    """One run of Weights & Biases for all attempts, offline unless WANDB_MODE says otherwise; the
    step is the samples seen."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = import_module("wandb")
        known = read_object(run.folder / "run.json") or {}
        ident = str(known.get("id") or secrets.token_hex(4))
        if not known:
            write_json(run.folder / "run.json", {"id": ident})
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or plain_name(run.name),
            name=run.folder.parent.parent.name,
            id=ident,
            resume="allow",
            mode=os.environ.get("WANDB_MODE") or "offline",
            dir=str(run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
            ),
        )

    def scalars(self, samples_seen: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=samples_seen)

    def event(self, samples_seen: int, kind: str, fields: Mapping[str, Any]) -> None:
        """See `Tracker`: the newest of each kind is in the summary."""
        self._run.summary[f"event.{kind}"] = {"samples_seen": samples_seen, **fields}

    def end(self) -> None:
        """See `Tracker`."""
        self._run.finish()


_KNOWN: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "mlflow": MlflowTracker,
    "wandb": WandbTracker,
}


def check_trackers(config: Config) -> None:
    """Raise ConfigError for a tracker whose package is not installed, or that is not there."""
    for name in config.train.trackers or []:
        if is_own(name):
            find("train.trackers", name)
        elif name in _KNOWN and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.trackers: {name} needs the package {name}, which is not installed; install "
                f"it (the extra `{name}` of this project) or leave it out"
            )


def open_trackers(config: Config, run: RunDirectory, say: Callable[[str], None]) -> Trackers | None:
    """Those of a run whose records have been cut back to where it goes on from; None if there are
    none. ``say``: tells a person of one that is dropped."""
    names = [name for name in config.train.trackers or [] if name != "tensorboard"]
    if not names:
        return None
    return Trackers([_opened(name, config, run) for name in names], say)


def _opened(name: str, config: Config, run: RunDirectory) -> Guarded:
    folder = run.path.resolve() / "trackers" / plain_name(name)

    def make() -> Tracker:
        folder.mkdir(parents=True, exist_ok=True)
        tracked = TrackedRun(config.name, folder, settled(config))
        if not is_own(name):
            return _KNOWN[name](tracked)
        with calling("train.trackers", name, "calling it"):
            made: Tracker = find("train.trackers", name)(tracked)
        return made

    return Guarded(name, make, folder / "sent.json", lambda: _recorded(run))


def _recorded(run: RunDirectory) -> Iterator[Record]:
    """All lines of a run so far, in the order in which they came."""
    files = [
        [line for line in read_jsonl(path) if line is not None]
        for path in (run.metrics, run.events)
    ]
    yield from merge(*files, key=_seen)


def _seen(record: Record) -> int:
    seen = record.get("samples_seen")
    return seen if type(seen) is int else 0


class Trackers:
    """All trackers of a run."""

    def __init__(self, trackers: list[Guarded], say: Callable[[str], None]) -> None:
        self._trackers, self._say = trackers, say

    def tell(self, line: Record) -> None:
        """A line of metrics.jsonl or events.jsonl. Returns at once, raises nothing."""
        for tracker in self._trackers:
            tracker.tell(line)

    def problems(self) -> list[str]:
        """What has made trackers fail since this was last asked; they are dropped."""
        failed = [tracker for tracker in self._trackers if tracker.problem is not None]
        self._trackers = [tracker for tracker in self._trackers if tracker not in failed]
        told = [f"the tracker {one.name} is dropped: {one.problem}" for one in failed]
        for text in told:
            self._say(f"harness: warning: {text}")
        return told

    def close(self) -> None:
        """Let each finish what it has, for a while."""
        for tracker in self._trackers:
            tracker.finish()
        for tracker in self._trackers:
            tracker.wait(_PATIENCE)
        self.problems()


class Guarded:
    """A tracker in a thread of its own, which cannot harm who tells it something."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        marks: Path,
        before: Callable[[], Iterator[Record]],
    ) -> None:
        """``marks``: the file that says what it has been told; ``before``: what was recorded so
        far. Both ``make`` and ``before`` are called in the thread."""
        self.name = name
        self.problem: str | None = None
        """Why it is not told any more."""
        self._make, self._marks_file, self._before = make, marks, before
        self._waiting: queue.Queue[Record | None] = queue.Queue(_WAITING)
        self._marks: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def tell(self, line: Record) -> None:
        """Returns at once."""
        if self.problem is None:
            try:
                self._waiting.put_nowait(line)
            except queue.Full:
                self.problem = f"it is {_WAITING} lines behind"

    def finish(self) -> None:
        """There is no more."""
        with suppress(queue.Full):
            self._waiting.put_nowait(None)

    def wait(self, seconds: float) -> None:
        """Until it has ended, but not for longer."""
        self._thread.join(seconds)
        if self._thread.is_alive() and self.problem is None:
            self.problem = f"it has not ended within {seconds:g} s"

    def _run(self) -> None:
        try:
            tracker = self._make()
            self._marks = _read_marks(self._marks_file)
            for line in self._before():
                self._hand_over(tracker, line)
            while self.problem is None:
                waiting = self._waiting.get()
                if waiting is None:
                    break
                self._hand_over(tracker, waiting)
            tracker.end()
        except BaseException as error:
            self.problem = f"{type(error).__name__}: {error}"

    def _hand_over(self, tracker: Tracker, line: Record) -> None:
        """Unless it has been, before a kill or among what was recorded before."""
        kind, seen = str(line.get("kind") or _LINE), line.get("samples_seen")
        if type(seen) is not int:
            return
        if seen <= self._marks.get(kind, -1):
            return
        self._marks[kind] = seen
        write_atomic(self._marks_file, json.dumps(self._marks).encode())
        if kind == _LINE:
            tracker.scalars(seen, line_values(line))
            return
        if kind == "evaluation":
            tracker.scalars(seen, evaluation_values(line))
        told = {key: value for key, value in line.items() if key not in ("kind", "samples_seen")}
        tracker.event(seen, kind, told)


def _read_marks(path: Path) -> dict[str, int]:
    found = read_object(path) or {}
    return {key: value for key, value in found.items() if type(value) is int}
