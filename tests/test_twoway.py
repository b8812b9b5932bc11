"""The trial of ranks that `harness doctor --ranks` makes: its order, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.twoway_steps import STEPS, Steps, read_result, standings
from launch import twoway
from launch.spec import Host, LaunchSpec

SPEC = LaunchSpec(3, (Host("n1", 1), Host("n2", 2)), ("true",))


@given(st.integers(1, 40))
def test_each_pair_meets_once_and_nobody_is_wanted_twice(size: int) -> None:
    pytest.importorskip("torch")
    from harness.twoway import rounds

    met = list(rounds(size))
    pairs = [pair for one in met for pair in one]
    assert sorted(pairs) == [(a, b) for a in range(size) for b in range(a + 1, size)]
    for one in met:
        ranks = [rank for pair in one for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert len(met) <= size


# How far ranks have come


def test_steps_are_read_as_they_were_left(tmp_path: Path) -> None:
    Steps(tmp_path, 0, "n1").begin("start", versions={"torch": "2"})
    steps = Steps(tmp_path, 2, "n2")
    steps.begin("start")
    steps.begin("pairs", peer="rank 0 on n1")
    (tmp_path / "rank-00001.jsonl").write_text("{half a li")
    known = standings(tmp_path, 3)
    assert known.keys() == {0, 2}
    assert (known[0].step, known[0].facts["versions"]) == ("start", {"torch": "2"})
    assert known[2].doing == "exchanging messages with rank 0 on n1"


def test_who_is_behind_is_named_by_host(tmp_path: Path) -> None:
    for rank, host, step in ((0, "n1", "allreduce"), (1, "n2", "join"), (2, "n2", "join")):
        Steps(tmp_path, rank, host).begin(step)
    known = standings(tmp_path, 3)
    assert twoway.behind(known, SPEC) == "n2 (ranks 1, 2): joining the other ranks"
    assert "ip addr" in twoway._remedy(known, SPEC)
    del known[2]
    assert twoway.behind(known, SPEC) == "n2 (rank 2): not begun"
    assert twoway._remedy(known, SPEC).startswith("ssh n2 ")
    assert twoway.behind({}, SPEC) == "n1 (rank 0): not begun; n2 (ranks 1, 2): not begun"


def test_of_a_traceback_the_last_line_is_told() -> None:
    message = "it ended\nTraceback (most recent call last):\n  File x\nImportError: no y"
    assert twoway._brief(message) == "it ended: ImportError: no y"
    assert twoway._brief("one\ntwo") == "one\ntwo"


def test_every_step_is_told_in_words() -> None:
    assert all(STEPS.values())


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff"])
def test_a_result_that_is_none(content: str, tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text(content, encoding="latin-1")
    assert read_result(tmp_path) is None


# What they have found


def about(host: str, ahead: float = 0.0, unseen: tuple[int, ...] = (), **of: str) -> dict[str, Any]:
    versions = {"python": "3.11.2", "torch": "2.13", "horovod": "0.28.1", "numpy": "2.4"} | of
    pairs = {str(k): {"seconds": 0.001 * k, "ahead": ahead, "within": 0.001} for k in (1, 2)}
    return {
        "host": host, "versions": versions, "mpi": "Open MPI", "pairs": pairs,
        "unseen": list(unseen),
    }  # fmt: skip


def found(*ranks: dict[str, Any]) -> dict[str, Any]:
    result = {"kind": "horovod-mpi", "pairs_tried": True, "ranks": list(ranks)}
    return {one.name: one for one in twoway._agreements(json.loads(json.dumps(result)))}


def test_ranks_that_agree() -> None:
    told = found(about("n1"), about("n2"), about("n2"))
    assert {one.status for one in told.values()} == {"ok"}
    assert told["versions"].text == "the same everywhere: torch 2.13, Horovod 0.28.1"
    assert "the slowest 1 MiB takes 2.0 ms" in told["pairs"].text


def test_clocks_that_differ_are_named() -> None:
    told = found(about("n1", ahead=7.5), about("n2"), about("n2"))
    assert told["clocks"].status == "warning"
    assert told["clocks"].text.startswith("n2 is 7.5 s ahead of n1")
    assert told["clocks"].remedy.startswith("ssh n1 timedatectl")
    assert found(about("n1", ahead=0.2), about("n2"), about("n2"))["clocks"].status == "ok"


@pytest.mark.parametrize(("name", "status"), [("torch", "missing"), ("numpy", "warning")])
def test_versions_that_differ_are_named(name: str, status: str) -> None:
    told = found(about("n1"), about("n2", **{name: "1.0"}), about("n3"))["versions"]
    assert told.status == status
    assert f"differ: {name} " in told.text
    assert "1.0 on n2" in told.text
    assert "on n1, n3" in told.text


def test_what_is_not_seen_is_named() -> None:
    told = found(about("n1"), about("n2", unseen=(0,)), about("n2"))["shared files"]
    assert (told.status, told.text) == ("missing", "n2 does not see what n1 wrote")
    assert "--run-dir" in told.remedy
