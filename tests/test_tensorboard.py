"""Scalars for TensorBoard: what its own reader finds in them, after kills and resumes too."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from harness import tensorboard
from harness.cli import main
from harness.journal import Journal
from harness.jsonl import Record, read_jsonl
from harness.records import Position, rewind
from harness.rundir import RunDirectory
from harness.tensorboard import Scalars, crc32c, framed, open_scalars

pytest.importorskip("tensorboard")

DEMO = str(ROOT / "configs" / "adabatch-digits.yaml")
Points = dict[str, list[tuple[int, float]]]
TRAIN = (
    *("loss", "lr", "momentum", "global_batch", "grad_norm", "noise_scale", "distance_from_init"),
    "epoch",
)
SPEED = ("images_per_sec", "ranks", "accumulation", "memory_peak_bytes")
TEST = ("loss", "accuracy", "accuracy_top5")


def points(run: Path) -> Points:
    """Tag -> (step, value) in order, as TensorBoard itself reads and purges them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in scalars]
        for tag in found.Tags()["scalars"]
        if (scalars := found.Scalars(tag))  # a tag outlives its points
    }


def told(run: Path) -> Points:
    """What the records have of the same."""
    found: Points = {}
    for record in filter(None, read_jsonl(run / "metrics.jsonl")):
        values = {f"train/{name}": record.get(name) for name in TRAIN}
        values |= {f"speed/{name}": record.get(name) for name in SPEED}
        for name, key in (("slowest", "busy_max"), ("median", "busy_median")):
            values[f"speed/{name}_rank_busy_seconds"] = (record.get("rank_seconds") or {}).get(key)
        total = sum(record["seconds"].values())
        values |= {f"time/{name}": spent / total for name, spent in record["seconds"].items()}
        note(found, record, values)
    for record in filter(None, read_jsonl(run / "events.jsonl")):
        if record.get("kind") == "evaluation":
            note(found, record, {f"test/{name}": record.get(name) for name in TEST})
    return found


def note(found: Points, record: Record, values: dict[str, float | None]) -> None:
    for tag, value in values.items():
        if value is not None:
            found.setdefault(tag, []).append((record["samples_seen"], value))


def assert_equal(run: Path) -> None:
    shown, expected = points(run), told(run)
    assert shown.keys() == expected.keys()
    for tag in expected:
        assert [step for step, _ in shown[tag]] == [step for step, _ in expected[tag]], tag
        assert [value for _, value in shown[tag]] == pytest.approx(
            [value for _, value in expected[tag]], rel=1e-6
        )


def line(samples: int, **more: Any) -> Record:
    return {
        "update": samples // 10, "samples_seen": samples, "loss": 1 / samples, "global_batch": 10,
        "noise_scale": None, "seconds": {"forward": 3.0, "backward": 1.0}, **more,
    }  # fmt: skip


def journal(run: RunDirectory, position: Position, samples: int = 0) -> Journal:
    writing = Journal(run, True, 3, position)
    writing.open(scalars=open_scalars(True, run, samples))
    return writing


# The format


def test_the_checksum_is_castagnoli_s() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


@given(st.binary(max_size=300))
def test_records_are_framed_as_tensorboard_s_own_writer_does(content: bytes) -> None:
    import io

    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    RecordWriter(file).write(content)
    assert framed(content) == file.getvalue()


# What is written


def test_a_line_s_values_lie_at_its_samples(tmp_path: Path) -> None:
    scalars = Scalars(RunDirectory(tmp_path), 0)
    scalars.line(line(640, lr=0.5, noise_scale=32.0, rank_seconds={"busy_max": 2.0}))
    scalars.evaluation({"samples_seen": 640, "loss": 0.25, "accuracy": 0.75})
    scalars.close()
    found = points(tmp_path)
    assert found["train/lr"] == [(640, 0.5)]
    assert found["train/noise_scale"] == [(640, 32.0)]
    assert found["speed/slowest_rank_busy_seconds"] == [(640, 2.0)]
    assert (found["time/forward"], found["time/backward"]) == ([(640, 0.75)], [(640, 0.25)])
    assert (found["test/loss"], found["test/accuracy"]) == ([(640, 0.25)], [(640, 0.75)])


@pytest.mark.parametrize("value", [None, "0.5", True, float("nan"), float("inf"), 1e300, [1], {}])
def test_what_is_no_number_has_no_point(value: Any, tmp_path: Path) -> None:
    scalars = Scalars(RunDirectory(tmp_path), 0)
    scalars.line(line(10, loss=value, seconds=value))
    scalars.line({"loss": 1.0})  # of no step
    scalars.line({})
    scalars.close()
    found = points(tmp_path)
    assert "train/loss" not in found
    assert found["train/global_batch"] == [(10, 10.0)]


def test_points_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    scalars = Scalars(RunDirectory(tmp_path), 0)
    scalars.line(line(10))
    assert points(tmp_path)["train/loss"] == [(10, pytest.approx(0.1))]
    scalars.close()


# Going on


@given(
    attempts=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_kills_and_resumes_neither_double_nor_lose_points(
    attempts: list[tuple[int, int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each attempt writes some lines, saves, writes some more and is killed, in the middle of a
    record perhaps; the next goes on from the checkpoint."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    samples, position = 0, Position()
    for number, (before, after) in enumerate(attempts):
        rewind(run, position)
        writing = journal(run, position, samples)
        place = samples
        for count in (before, after):
            for _ in range(count):
                # A stage's end flushes a window at the very samples of the checkpoint.
                place += data.draw(st.sampled_from([0, 10])) if place else 10
                writing.metrics(line(place, loss=number + place / 1000))
                if data.draw(st.booleans()):
                    writing.event("evaluation", place // 10, samples_seen=place, accuracy=number)
            if count is before:
                samples = place
                lines = sum(1 for _ in read_jsonl(run.metrics))
                events = sum(1 for _ in read_jsonl(run.events))
                position = Position(lines, events)
        writing.close()
        newest = max(run.tensorboard.iterdir())
        if data.draw(st.booleans()) and after:
            os.truncate(newest, newest.stat().st_size - data.draw(st.integers(1, 30)))
    rewind(run, position)
    journal(run, position, samples).close()
    assert_equal(run.path)


def test_a_run_that_had_no_scalars_gets_those_of_its_past(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    writing = Journal(run, True, 3, Position())
    for samples in (10, 20, 30):
        writing.metrics(line(samples))
    writing.event("evaluation", 3, samples_seen=30, accuracy=0.5)
    writing.close()
    journal(run, Position(3, 1), 30).close()
    assert_equal(tmp_path)


def test_a_host_whose_clock_is_behind_goes_on_after_the_others(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.9999999998.h.1.0").touch()
    (tmp_path / "tensorboard" / "notes").touch()
    Scalars(RunDirectory(tmp_path), 0).close()
    assert max(tmp_path.glob("tensorboard/events*")).name.startswith("events.out.tfevents.99999999")
    assert len(list(tmp_path.glob("tensorboard/events.out.tfevents.9999999999.*"))) == 1


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars = Scalars(RunDirectory(tmp_path), 0)
    monkeypatch.setattr(os, "write", lambda fd, content: len(content) - 1)
    with pytest.raises(OSError, match="No space left on device"):
        scalars.line(line(10))
    scalars.close()


# The setting


def test_without_the_package_it_is_off_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard, "is_installed", lambda: False)
    assert open_scalars(None, RunDirectory(tmp_path), 0) is None
    assert open_scalars(False, RunDirectory(tmp_path), 0) is None
    out = tmp_path / "run"
    words = ["train", DEMO, "train.tensorboard=true", "train.duration=1up", "--run-dir", str(out)]
    assert main(words) == 2
    assert "the package tensorboard, which is not installed" in capsys.readouterr().err
    assert not out.exists()


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    assert open_scalars(False, RunDirectory(tmp_path), 0) is None
    assert list(tmp_path.iterdir()) == []


# Whole runs


def trained(run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness", "train", DEMO, *words, "--run-dir", str(run)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_where_its_points_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("train.duration=40ep", "train.log_every=3", "train.checkpoint_every=10up")
    words = (*words, "batch.growth={policy: geometric, factor: 2, every: 1ep}", "batch.max=256")
    chance = random.Random(0)
    for attempt in range(3):
        with trained(run, *words, *(["--resume"] if attempt else [])) as process:
            wanted = (attempt + 1) * 25 + chance.randrange(15)
            while sum(1 for _ in read_jsonl(run / "metrics.jsonl")) < wanted / 3:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            process.kill()
    with trained(run, *words, "--resume") as process:
        said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert len(list((run / "tensorboard").iterdir())) == 4
    assert_equal(run)
    events = [json.loads(text) for text in (run / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "resume" for event in events) == 3
