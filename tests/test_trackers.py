"""Experiment trackers: told of everything once, whatever is killed; never able to harm a run."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from harness import trackers
from harness.cli import main
from harness.config import load_config
from harness.errors import ConfigError
from harness.jsonl import Record, read_jsonl
from harness.trackers import (
    Guarded,
    MlflowTracker,
    TrackedRun,
    Tracker,
    Trackers,
    WandbTracker,
    check_trackers,
)

DEMO = ROOT / "configs" / "adabatch-digits.yaml"
SHORT = (
    *("train.duration=6up", "train.checkpoint_every=2up", "train.log_every=1", "lr.warmup=null"),
    *("ranks.threads=1", "profile.enabled=false", "train.eval_every=3up"),
)
Call = tuple[str, int, Any]


class Recording:
    """A tracker that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ended = False

    def scalars(self, samples_seen: int, values: Mapping[str, float]) -> None:
        self.calls.append(("scalars", samples_seen, dict(values)))

    def event(self, samples_seen: int, kind: str, fields: Mapping[str, Any]) -> None:
        self.calls.append((kind, samples_seen, dict(fields)))

    def end(self) -> None:
        self.ended = True


def line(seen: int) -> Record:
    return {"update": seen // 10, "samples_seen": seen, "loss": 1 / seen}


def evaluation(seen: int) -> Record:
    return {"kind": "evaluation", "samples_seen": seen, "loss": 2.0, "accuracy": 0.5, "metric": 3.0}


def stage(seen: int) -> Record:
    return {"kind": "stage", "samples_seen": seen, "reason": "so"}


def guarded(tracker: Tracker, folder: Path, before: list[Record] | None = None) -> Guarded:
    return Guarded("fake", lambda: tracker, folder / "sent.json", lambda: iter(before or []))


def finished(one: Guarded, *lines: Record) -> Guarded:
    for record in lines:
        one.tell(record)
    one.finish()
    one.wait(60)
    return one


# ---- told once ----------------------------------------------------------------------------------


def test_lines_become_scalars_and_events(tmp_path: Path) -> None:
    tracker = Recording()
    finished(guarded(tracker, tmp_path), stage(0), line(10), evaluation(10), {"kind": "warning"})
    assert tracker.ended
    told = {"test/loss": 2.0, "test/accuracy": 0.5, "test/metric": 3.0}
    assert tracker.calls == [
        ("stage", 0, {"reason": "so"}),
        ("scalars", 10, {"train/loss": 0.1}),
        ("scalars", 10, told),
        ("evaluation", 10, {"loss": 2.0, "accuracy": 0.5, "metric": 3.0}),
    ]


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=25)
def test_after_any_kills_every_point_has_come_once(cuts: list[tuple[int, int, int]]) -> None:
    """A kill at a line, with some lines not handed over yet, goes on from an earlier checkpoint."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder, calls, start = Path(name), [], 0
        for ran, waiting, back in [*cuts, (12, 0, 0)]:
            end = min(12, start + ran)
            tracker = Recording()
            recorded = [line(10 * n) for n in range(1, start + 1)]
            new = [line(10 * n) for n in range(start + 1, end + 1)]
            finished(guarded(tracker, folder, recorded), *new[: max(0, len(new) - waiting)])
            calls += tracker.calls
            start = max(0, end - back)
        last = guarded(tracker := Recording(), folder, [line(10 * n) for n in range(1, 13)])
        finished(last)
        steps = [step for _, step, _ in calls + tracker.calls]
        assert steps == [10 * n for n in range(1, 13)]


def test_the_past_of_a_run_that_had_no_tracker_comes_in_order(tmp_path: Path) -> None:
    files = [tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"]
    records: list[list[Record]] = [
        [line(10), line(20)],
        [stage(0), evaluation(10), {"kind": "x"}, stage(15)],
    ]
    for path, lines in zip(files, records, strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in lines), encoding="utf-8")
    from harness.rundir import RunDirectory

    found = list(trackers._recorded(RunDirectory(tmp_path)))
    assert len(found) == 6
    assert [r["samples_seen"] for r in found if "samples_seen" in r] == [0, 10, 10, 15, 20]


# ---- harmless -----------------------------------------------------------------------------------


class Failing(Recording):
    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def scalars(self, samples_seen: int, values: Mapping[str, float]) -> None:
        super().scalars(samples_seen, values)
        if self.at == "scalars":
            raise OSError("server gone")

    def event(self, samples_seen: int, kind: str, fields: Mapping[str, Any]) -> None:
        if self.at == "event":
            raise SystemExit(3)

    def end(self) -> None:
        if self.at == "end":
            raise KeyError("late")


@pytest.mark.parametrize(
    ("at", "said"),
    [("scalars", "OSError: server gone"), ("event", "SystemExit: 3"), ("end", "KeyError: 'late'")],
)
def test_what_raises_is_dropped_with_one_warning(at: str, said: str, tmp_path: Path) -> None:
    tracker, other, warnings = Failing(at), Recording(), list[str]()
    both = Trackers(
        [guarded(tracker, tmp_path / "a"), guarded(other, tmp_path / "b")], warnings.append
    )
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for seen in (10, 20, 30):
        both.tell(line(seen))
        both.tell(stage(seen))
    both.close()
    both.close()
    assert warnings == [f"harness: warning: the tracker fake is dropped: {said}"]
    assert [step for kind, step, _ in other.calls if kind == "scalars"] == [10, 20, 30]
    assert len(tracker.calls) == (1 if at == "scalars" else 1 if at == "event" else 3)


def test_one_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, asked = threading.Event(), threading.Event()

    class Hanging(Recording):
        def scalars(self, samples_seen: int, values: Mapping[str, float]) -> None:
            asked.set()
            go_on.wait(60)

    monkeypatch.setattr(trackers, "_WAITING", 5)
    one = guarded(Hanging(), tmp_path)
    one.tell(line(10))
    assert asked.wait(60)
    for seen in range(20, 70, 10):
        one.tell(line(seen))
    assert one.problem is None
    one.tell(line(70))
    assert one.problem == "it is 5 lines behind"
    go_on.set()
    one.wait(60)

    go_on.clear()
    asked.clear()
    other = guarded(Hanging(), tmp_path / "other")
    (tmp_path / "other").mkdir()
    other.tell(line(10))
    other.finish()
    assert asked.wait(60)
    other.wait(0.01)
    assert other.problem == "it has not ended within 0.01 s"
    go_on.set()


# ---- in a run -----------------------------------------------------------------------------------


@pytest.fixture
def own_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "owntracker.py").write_text(
        "import json\n\n\nclass Lines:\n"
        "    def __init__(self, run):\n"
        "        self.file = open(run.folder / 'lines', 'a', buffering=1)\n"
        "        assert run.settings['batch.initial'] == 64\n\n"
        "    def scalars(self, samples_seen, values):\n"
        "        tag = 'train' if 'train/loss' in values else 'test'\n"
        "        print(json.dumps([tag, samples_seen]), file=self.file)\n\n"
        "    def event(self, samples_seen, kind, fields):\n"
        "        print(json.dumps([kind, samples_seen]), file=self.file)\n\n"
        "    def end(self):\n        self.file.close()\n\n\n"
        "def broken(run):\n    raise OSError('no server')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("owntracker", None)


def test_a_run_that_goes_on_goes_on_in_its_trackers(
    own_tracker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = own_tracker / "run"
    names = "[owntracker:Lines, owntracker:broken]"
    words = ["train", str(DEMO), *SHORT, f"code={own_tracker}", "--run-dir", str(directory)]
    assert main([*words, f"train.trackers={names}"]) == 0
    told = directory / "trackers" / "owntracker-Lines" / "lines"
    first = told.read_text().splitlines()
    steps = [r["samples_seen"] for r in read_jsonl(directory / "metrics.jsonl") if r]
    assert [json.loads(text)[1] for text in first if '"train"' in text] == steps
    assert sum('"test"' in text for text in first) == 2
    said = capsys.readouterr().out
    assert said.count("the tracker owntracker:broken is dropped") == 1
    assert "calling it raised OSError: no server" in said
    newest = max((directory / "checkpoints").glob("*.pt"))
    newest.unlink()
    assert main([*words, f"train.trackers={names}", "--resume"]) == 0
    again = told.read_text().splitlines()
    assert again[: len(first)] == first
    assert [text for text in again if '"train"' in text or '"test"' in text] == [
        text for text in first if '"train"' in text or '"test"' in text
    ]
    assert '["resume"' in again[len(first)]


def test_a_missing_package_or_callable_is_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlflow" else find_spec(name)
    )
    words = ["train", str(DEMO), "train.trackers=[mlflow]", "--run-dir", str(tmp_path / "run")]
    assert main(words) == 2
    assert "needs the package mlflow, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    config = load_config(DEMO, ['train.trackers=["ownnowhere:x"]'])
    with pytest.raises(ConfigError, match="there is no module ownnowhere"):
        check_trackers(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.trackers=[neptune]"], "neptune is not known; valid: tensorboard, mlflow, wandb,"),
        (["train.trackers=[mlflow, mlflow]"], "train.trackers.1 = mlflow stands there twice"),
        (["train.trackers=[tensorboard]", "train.tensorboard=false"], "leave one out"),
        (['train.trackers=["a:"]'], "write package.module:callable"),
    ],
)
def test_settings_of_trackers(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, overrides)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], None),
        (["train.trackers=[]"], False),
        (["train.trackers=[wandb]"], False),
        (["train.trackers=[wandb, tensorboard]"], True),
        (["train.trackers=[wandb]", "train.tensorboard=true"], True),
        (["train.tensorboard=false"], False),
    ],
)
def test_tensorboard_is_one_of_them(overrides: list[str], wanted: bool | None) -> None:
    assert load_config(DEMO, overrides).train.wants_tensorboard is wanted


# ---- MLflow and Weights & Biases, with stand-ins of the same shape ------------------------------


def tracked(tmp_path: Path) -> TrackedRun:
    folder = tmp_path / "run" / "trackers" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    return TrackedRun("a name", folder, {f"key{n}": n for n in range(150)})


def test_mlflow_is_asked_for_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            asked.append(("store", tracking_uri))

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment_id: str, run_name: str) -> Any:
            asked.append(("run", experiment_id, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            asked.append(("batch", run_id, list(metrics), len(list(params))))

        def set_tag(self, run_id: str, key: str, value: str) -> None:
            asked.append(("tag", key, json.loads(value)))

        def set_terminated(self, run_id: str) -> None:
            asked.append(("end", run_id))

    entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (key, value, step), Param=lambda key, value: key
    )
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", types.SimpleNamespace(MlflowClient=Client))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tracked(tmp_path)
    tracker = MlflowTracker(run)
    tracker.scalars(10, {"train/loss": 0.5})
    tracker.event(10, "stage", {"reason": "so"})
    tracker.end()
    store = ("store", (run.folder / "mlruns").as_uri())
    assert asked == [
        store,
        ("run", "7", "run"),
        ("batch", "abc", [], 100),
        ("batch", "abc", [], 50),
        ("batch", "abc", [("train/loss", 0.5, 10)], 0),
        ("tag", "event.stage", {"samples_seen": 10, "reason": "so"}),
        ("end", "abc"),
    ]
    asked.clear()
    MlflowTracker(run).scalars(20, {"train/loss": 0.25})
    assert asked == [store, ("batch", "abc", [("train/loss", 0.25, 20)], 0)]


def test_wandb_is_offline_and_has_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[Any] = []

    class Run:
        summary: dict[str, Any] = {}  # noqa: RUF012 - one for the test

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append("end")

    def init(**words: Any) -> Run:
        begun.append(words)
        return Run()

    fake = types.SimpleNamespace(init=init, Settings=lambda **words: words)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for seen in (10, 20):
        tracker = WandbTracker(tracked(tmp_path))
        tracker.scalars(seen, {"train/loss": 0.5})
        tracker.event(seen, "stage", {})
        tracker.end()
    assert [one["mode"] for one in begun] == ["offline", "offline"]
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["project"] == "a-name"
    assert logged == [(10, {"train/loss": 0.5}), "end", (20, {"train/loss": 0.5}), "end"]
    assert Run.summary == {"event.stage": {"samples_seen": 20}}
    monkeypatch.setenv("WANDB_MODE", "online")
    WandbTracker(tracked(tmp_path))
    assert begun[-1]["mode"] == "online"


# ---- the real ones, where they are installed ----------------------------------------------------


def twice(make: Any, tmp_path: Path) -> None:
    """A run that is cut off after its third line and goes on from its second."""
    run = tracked(tmp_path)
    for before, new in ((0, (1, 2, 3)), (2, (3, 4, 5))):
        recorded = [line(10 * n) for n in range(1, before + 1)]
        one = Guarded(
            "real", lambda: make(run), run.folder / "sent.json", lambda r=recorded: iter(r)
        )
        finished(one, stage(0), *(line(10 * n) for n in new), evaluation(50))
        assert one.problem is None


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("default")
def test_real_mlflow_has_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    twice(MlflowTracker, tmp_path)
    from mlflow.tracking import MlflowClient

    folder = tracked(tmp_path).folder
    ident = json.loads((folder / "run.json").read_text())["run_id"]
    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    history = client.get_metric_history(ident, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(10 * n, 0.1 / n) for n in range(1, 6)]
    assert client.get_run(ident).data.metrics["test/accuracy"] == 0.5
    assert client.get_run(ident).data.params["key149"] == "149"


def records_of(content: bytes) -> Iterator[bytes]:
    """Of a file of Weights & Biases: LevelDB's log format, after seven bytes of a header."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # no room for a header in this block
            place += 2**15 - place % 2**15
        size = int.from_bytes(content[place + 4 : place + 6], "little")
        last = content[place + 6] in (1, 4)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if last:
            yield whole
            whole = b""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("default")
def test_real_wandb_has_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    twice(WandbTracker, tmp_path)
    steps: list[int] = []
    deadline = time.monotonic() + 60
    while len(steps) < 5 and time.monotonic() < deadline:  # its service may still be writing
        steps = logged_steps(tracked(tmp_path).folder)
    assert steps == [10, 20, 30, 40, 50]


def logged_steps(folder: Path) -> list[int]:
    from wandb.proto import wandb_internal_pb2

    steps: list[int] = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for content in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            keys = {item.key or "/".join(item.nested_key) for item in record.history.item}
            if "train/loss" in keys:
                steps.append(record.history.step.num)
    return steps
