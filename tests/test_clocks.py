"""A clock on the wall that is set by an hour, back or forth, between any two looks at it."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from harness import environment
from harness.cli import main
from harness.jsonl import read_jsonl
from harness.rundir import RunDirectory

DEMO = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
HOUR = 3600.0


@contextmanager
def wild_clock(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Iterator[None]:
    """Each look is up to an hour before or after the true time."""
    chance, true = random.Random(seed), time.time
    moments = (true() + chance.choice([-HOUR, HOUR]) for _ in itertools.count())

    def label() -> str:
        return datetime.fromtimestamp(next(moments), UTC).isoformat(timespec="milliseconds")

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(moments))
        patch.setattr(time, "time_ns", lambda: int(next(moments) * 1e9))
        for name in ("jsonl.now", "journal.now", "provenance.time_now", "attempts.now"):
            patch.setattr(f"harness.{name}", label)
        yield


def test_a_run_is_the_same_but_for_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that stops and goes on: order comes from the numbers of attempts and updates."""
    settings = ["batch.initial=128", "train.log_every=1", "ranks.threads=1"]

    def train(name: str, duration: str, *more: str) -> None:
        words = ["train", str(DEMO), *settings, f"train.duration={duration}"]
        assert main([*words, "--run-dir", str(tmp_path / name), *more]) == 0

    train("true", "2ep")
    with wild_clock(monkeypatch):
        train("wild", "2ep")
        newest = max((tmp_path / "wild" / "checkpoints").glob("*.pt"))
        newest.with_name(f"{newest.name}.sha256").unlink()
        train("wild", "2ep", "--resume")
    capsys.readouterr()
    keys = ("update", "samples_seen", "loss", "lr", "grad_norm")
    lines = {}
    for name in ("true", "wild"):
        run = RunDirectory(tmp_path / name)
        records = [record for record in read_jsonl(run.metrics) if record]
        lines[name] = [[record[key] for key in keys] for record in records]
        for record in records:
            assert all(0 <= spent < HOUR / 4 for spent in record["seconds"].values())
            assert record["images_per_sec"] > 0
    assert lines["wild"] == lines["true"]
    ends = [r for r in read_jsonl(RunDirectory(tmp_path / "wild").events) if r]
    assert ends[-1]["kind"] == "end"
    assert 0 < ends[-1]["seconds"] < HOUR / 4
    mark = tmp_path / "wild" / "attempts" / "00000002" / "attempt.json"
    assert json.loads(mark.read_text())["attempt"] == 2


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_what_a_start_takes_is_not_told_by_the_wall(
    jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = environment.moment()
    now = time.time() + jump
    monkeypatch.setattr(time, "time", lambda: now)
    seconds = environment.seconds_since(begun)
    assert seconds is not None
    assert 0 <= seconds < HOUR / 4


def test_elsewhere_only_the_wall_tells_and_only_what_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = environment.moment()
    monkeypatch.setattr(environment, "_boot", lambda: "another-machine")
    lived = time.monotonic() - environment._LOADED
    now = time.time()
    for ago, told in ((lived + 30, True), (lived + 3600, False), (lived - 30, False), (-9, False)):
        monkeypatch.setattr(time, "time", lambda ago=ago: now + ago)
        assert (environment.seconds_since(begun) is not None) == told, ago
    assert environment.seconds_since("") is None
    assert environment.seconds_since("a,b,c") is None
