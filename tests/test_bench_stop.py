"""A run that stops by itself when it has been measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import environment
from harness.stop import StopRequest


def test_a_stop_is_asked_for_when_it_is_enough(tmp_path: Path) -> None:
    answers = iter([False, False, True])
    stop = StopRequest(tmp_path / "stop", enough=lambda: next(answers))
    assert [stop.asked() for _ in range(3)] == [False, False, True]


def test_every_update_is_counted_even_if_someone_else_asks(tmp_path: Path) -> None:
    calls = []
    stop = StopRequest(tmp_path / "stop", enough=lambda: bool(calls.append(1)))
    (tmp_path / "stop").touch()
    assert stop.asked()
    assert stop.asked()
    assert len(calls) == 2


def test_only_a_run_that_is_measured_does_without_records() -> None:
    assert StopRequest(enough=lambda: False).measured
    assert not StopRequest().measured
    assert not StopRequest().asked()


def test_seconds_come_from_the_launching_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.MEASURE, raising=False)
    assert environment.seconds_to_measure() is None
    monkeypatch.setenv(environment.MEASURE, "2.5")
    assert environment.seconds_to_measure() == 2.5
