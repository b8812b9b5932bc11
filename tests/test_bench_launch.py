"""The order of a bench's launches, what it keeps of them, and how it goes on; without ranks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from harness.benchfile import read_bench
from harness.cli import main
from harness.jsonl import encode, write_json
from harness.rundir import RunDirectory
from launch.bench import Runner
from launch.outcome import Outcome

CONFIG = ROOT / "configs" / "adabatch-digits.yaml"
PHASES = {"data": 0.1, "forward": 0.2, "backward": 0.3, "comm_exposed": 0.2, "optimizer": 0.2}
WARM, ALL = 3, 40


def write_run(directory: RunDirectory, batch: int, ranks: int) -> None:
    """Records of updates of 10 ms, of which the first three took ten times as long."""
    lines = []
    for update in range(1, ALL + 1):
        factor = (0.1 if update <= WARM else 0.01) * (1 + 1e-3 * (update % 5))
        seconds = {phase: share * factor for phase, share in PHASES.items()}
        line = {"update": update, "samples_seen": update * batch, "seconds": seconds}
        lines.append(encode({**line, "comm_bytes": 1000}))
    directory.metrics.write_bytes(b"".join(lines))
    write_json(
        directory.provenance,
        {"started": "now", "communication": {"kind": "horovod-mpi", "ranks": ranks}},
    )
    directory.checkpoints.mkdir()


class Ranks:
    """Takes the place of launches."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.before: Callable[[Runner, str], Outcome | None] = lambda runner, name: None

    def __call__(
        self, runner: Runner, shape: Any, directory: RunDirectory, words: tuple[str, ...] = ()
    ) -> Outcome:
        directory.failures.mkdir(parents=True)
        name = "machine" if words else "/".join(directory.path.parts[-2:])
        self.launched.append(name)
        early = self.before(runner, name)
        if early is not None:
            return early
        if words:
            facts = {"parameters": 7, "flops_per_image": 2e6, "flops_problem": None}
            peak = {"peak_flops_per_rank": 1e9, "peak_source": "measured"}
            write_json(Path(words[-1]) / "machine.json", facts | peak)
            return Outcome("failed", "it leaves without a stop")
        write_run(directory, shape.global_batch, shape.ranks)
        return Outcome("stopped")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    fake = Ranks()

    def launch(runner: Runner, *arguments: Any) -> Outcome:
        return fake(runner, *arguments)

    monkeypatch.setattr(Runner, "_launch", launch)
    return fake


def bench(out: Path, *more: str) -> int:
    return main(["bench", str(CONFIG), "--hosts", "localhost:4", "-o", str(out), *more])


def test_every_pair_is_launched_once_and_written_down(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bench(out, "--ranks", "4,1,2,2", "--repeats", "3") == 0
    assert ranks.launched[0] == "machine"
    found = read_bench(out)
    assert found.status == "complete"
    assert found.mode == "weak"
    names = [f"r{n:04d}-a0001-m0032" for n in (1, 2, 4)]
    assert [point.name for point in found.points] == names
    assert sorted(found.order) == [(name, repeat) for name in names for repeat in range(3)]
    launched = [f"{name}/repeat-{repeat}" for name, repeat in found.order]
    assert ranks.launched[1:] == launched
    assert launched != sorted(launched)
    assert found.engine == "horovod-mpi"
    assert found.machine["communication"]["ranks"] == 4
    assert "started" not in found.machine
    assert (found.parameters, found.gradient_bytes) == (7, 1000)


def test_throughput_is_images_over_steady_time(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bench(out, "--ranks", "2", "--repeats", "2") == 0
    (point,) = read_bench(out).points
    assert point.images_per_sec == pytest.approx(64 / 0.01, rel=0.01)
    assert point.images_per_sec_low is not None
    assert point.mfu == pytest.approx(point.images_per_sec * 2e6 / 2e9)
    first = point.repeats[0]
    assert (first.windows, first.settled) == (ALL, True)
    assert WARM <= first.warmup_windows <= WARM + 2
    assert sum(first.seconds.values()) == pytest.approx(first.seconds_per_update)
    assert first.seconds["backward"] == pytest.approx(0.3 * first.seconds_per_update)
    with (out / "windows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * ALL
    mine = [row for row in rows if row["repeat"] == "0"]
    steady = [row for row in mine if row["warmup"] == "0"]
    assert [row["window"] for row in mine] == [str(number) for number in range(ALL)]
    assert sum(int(row["images"]) for row in steady) / sum(
        float(row["seconds"]) for row in steady
    ) == pytest.approx(first.images_per_sec)
    assert not list(out.glob("points/*/*/checkpoints"))


def test_a_finished_bench_is_only_shown(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = (out, "--ranks", "1,2", "--repeats", "1")
    assert bench(*arguments) == 0
    before, launched = read_bench(out), list(ranks.launched)
    capsys.readouterr()
    assert bench(*arguments) == 0
    assert ranks.launched == launched
    assert read_bench(out) == before
    assert "r0001" not in (shown := capsys.readouterr().out)
    assert "64 = 2 × 1 × 32" in shown


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_bench_goes_on(after: int, ranks: Ranks, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ("--ranks", "1,2", "--repeats", "2")
    assert bench(whole, *arguments) == 0
    ranks.launched.clear()

    def interrupt(runner: Runner, name: str) -> Outcome | None:
        if len(ranks.launched) < after:
            return None
        runner.stopper.asked = True
        return Outcome("stopped")

    ranks.before = interrupt
    assert bench(out, *arguments) == 75
    partial = read_bench(out)
    assert partial.status == "partial"
    finished = sum(len(point.repeats) for point in partial.points)
    assert finished == max(0, after - 2)
    assert len(list(out.glob("points/*/repeat-*"))) == finished
    half = out / "points" / partial.order[finished][0] / f"repeat-{partial.order[finished][1]}"
    half.mkdir(parents=True)  # what a bench leaves that was killed
    (half / "metrics.jsonl").write_text('{"update": 1')
    with (out / "windows.csv").open("a") as file:
        file.write(f"{partial.order[finished][0]},{partial.order[finished][1]},0,1,32,0.1,0\n0,")

    ranks.before = lambda runner, name: None
    first = list(ranks.launched)
    assert bench(out, *arguments) == 0
    again = ranks.launched[len(first) :]
    assert not {name for name in first[:-1] if name != "machine"} & set(again)
    done, expected = read_bench(out), read_bench(whole)
    assert (done.points, done.order, done.status) == (expected.points, expected.order, "complete")
    assert sorted((out / "windows.csv").read_text().splitlines()) == sorted(
        (whole / "windows.csv").read_text().splitlines()
    )


def test_more_can_be_asked_for_later(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bench(out, "--ranks", "1,2", "--repeats", "1") == 0
    before = len(ranks.launched)
    assert bench(out, "--ranks", "1,2,4", "--repeats", "2") == 0
    assert len(ranks.launched) - before == 4
    found = read_bench(out)
    assert {(p.ranks, len(p.repeats)) for p in found.points} == {(1, 2), (2, 2), (4, 2)}


def test_a_point_that_fails_is_told_and_the_others_go_on(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = (out, "--ranks", "1,2", "--repeats", "2")

    def fail(runner: Runner, name: str) -> Outcome | None:
        return Outcome("failed", "rank 1 was killed") if name.startswith("r0002") else None

    ranks.before = fail
    assert bench(*arguments) == 1
    found = read_bench(out)
    assert [point.ranks for point in found.points] == [1]
    assert [(one.point, one.repeat, one.reason) for one in found.failures] == [
        ("r0002-a0001-m0032", repeat, "rank 1 was killed") for repeat in (0, 1)
    ]
    assert found.status == "partial"
    assert "r0002-a0001-m0032, repeat 1 failed: rank 1 was killed" in capsys.readouterr().out
    ranks.before = lambda runner, name: None
    assert bench(*arguments) == 0
    assert not read_bench(out).failures
    assert read_bench(out).status == "complete"


def test_a_run_too_short_to_measure_has_failed(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ranks.before = lambda runner, name: Outcome("stopped") if name != "machine" else None
    assert bench(out, "--ranks", "1", "--repeats", "1") == 1
    (failure,) = read_bench(out).failures
    assert "0 updates were recorded" in failure.reason


def test_without_a_peak_there_is_no_utilisation(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ranks.before = lambda runner, name: Outcome("failed", "no") if name == "machine" else None
    assert bench(out, "--ranks", "1", "--repeats", "1") == 0
    found = read_bench(out)
    assert (found.flops_per_image, found.peak_flops_per_rank, found.points[0].mfu) == (None,) * 3
    assert "no utilisation is shown: no" in capsys.readouterr().err


def test_a_known_peak_takes_the_place_of_the_measured_one(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bench(out, "--ranks", "1", "--repeats", "1", "--peak", "4e9") == 0
    found = read_bench(out)
    assert (found.peak_flops_per_rank, found.peak_source) == (4e9, "given (--peak)")
    assert found.points[0].mfu == pytest.approx(found.points[0].images_per_sec * 2e6 / 4e9)


def test_what_no_rank_can_start_with_is_refused_at_once(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ranks.before = lambda runner, name: Outcome("refused", "no such model")
    assert bench(out, "--ranks", "1,2") == 2
    assert ranks.launched == ["machine"]
    assert "harness: no such model" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--ranks", "8"), "8 ranks need 8 slots"),
        (("--ranks", "1", "--repeats", "0"), "--repeats 0: must be from 1 to 1000"),
        (("--ranks", "1", "--seconds", "0"), "--seconds 0: must be above 0"),
        (("--ranks", "1", "--seconds", "nan"), "--seconds nan: must be above 0"),
        (("--ranks", "1", "--peak", "-1"), "--peak -1: must be FLOP/s"),
        (("--ranks", "1", "--mode", "weak", "--batches", "64"), "--batches are global batches"),
        (("--ranks", "1", "model.name=none"), "model.name 'none' is not known"),
        (("--ranks", "1,2", "--launcher", "local"), "comm.backend=torch"),
        (("--ranks", "1,2", "comm.backend=solo", "ranks.start=1"), "comm.backend"),
        (("--ranks", "1", "data.dataset=mnist"), "data.root is not set"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_made(
    more: tuple[str, ...],
    said: str,
    ranks: Ranks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert bench(out, *more) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert not ranks.launched


@pytest.mark.parametrize("words", ["0", "1,,2", "a", "-1", "1.5", ""])
def test_counts_that_are_none_are_refused(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        bench(tmp_path / "out", f"--ranks={words}")
    assert refused.value.code == 2
    assert "write whole numbers from 1 on, such as 1,2,4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("lr.base=0.5",), "another configuration"),
        (("--seconds", "9"), "seconds: 5.0 → 9.0"),
        (("--mode", "strong"), "mode: weak → strong"),
    ],
)
def test_another_bench_is_not_gone_on_with(
    more: tuple[str, ...],
    said: str,
    ranks: Ranks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert bench(out, "--ranks", "1", "--repeats", "1") == 0
    assert bench(out, "--ranks", "1", "--repeats", "1", *more) == 2
    assert said in capsys.readouterr().err
    assert read_bench(out).status == "complete"


def test_a_bench_whose_configuration_is_no_text_is_not_gone_on_with(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert bench(out, "--ranks", "1", "--repeats", "1") == 0
    (out / "config.yaml").write_bytes(b"\xff")
    assert bench(out, "--ranks", "1", "--repeats", "1") == 2
    assert "a bench of another configuration" in capsys.readouterr().err


def test_a_directory_with_something_else_is_left_alone(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    assert bench(tmp_path, "--ranks", "1") == 2
    assert "holds no bench to go on with, and is not empty" in capsys.readouterr().err


def test_a_dry_run_prints_what_would_be_started(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert bench(out, "launch.mpi=openmpi4", "--ranks", "1,2", "--dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("#")][:2] == [
        "# 32 = 1 × 1 × 32",
        "# 64 = 2 × 1 × 32",
    ]
    assert "HARNESS_MEASURE=5" in printed[1]
    assert "horovodrun" in printed[1]  # one rank by the same launcher as many
    assert "batch.initial=64" in printed[3]
    assert not out.exists()
    assert not ranks.launched


def test_each_rank_has_as_many_threads_on_all_numbers_of_ranks(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("harness.environment.usable_cores", lambda: 8)
    out = tmp_path / "out"
    more = ("ranks.threads=null", "--ranks", "1,4", "--repeats", "1")
    assert bench(out, *more) == 0
    assert json.loads((out / "bench.json").read_text())["settings"]["threads"] == 2
