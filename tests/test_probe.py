"""What a probe makes of its measurements, and how it is started; the ranks themselves are faked."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from harness import environment, probe
from harness.cli import main
from harness.comm import SoloCommunicator
from harness.errors import HarnessError, RankFailure, StoppedEarly, UsageError
from harness.probe import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    Action,
    Peers,
    is_enough,
    measure,
    measure_sizes,
    message_sizes,
    round_order,
)
from harness.probe_results import (
    GLOO,
    HOROVOD,
    HOROVOD_BROADCAST,
    HOROVOD_FP16,
    MPI_ALONE,
    Timing,
    as_csv,
    bus_factor,
    in_order,
    print_tables,
    shown_size,
    shown_time,
)
from launch import probe as launching
from launch.outcome import Ended
from launch.probe import ProbeRequest
from launch.spec import Host, LaunchSpec

times = st.lists(st.floats(1e-7, 1e3), min_size=LEAST_ROUNDS, max_size=50).map(tuple)


# Sizes, orders, bandwidths


def test_the_sizes_are_the_powers_of_4_up_to_64_mib() -> None:
    assert message_sizes(64) == tuple(4**k for k in range(1, 14))


@given(st.integers(1, 4096))
def test_sizes_rise_to_the_largest_and_are_whole_floats(max_mb: int) -> None:
    sizes = message_sizes(max_mb)
    assert sizes[0] == 4
    assert sizes[-1] == max_mb * 2**20
    assert all(size % 4 == 0 for size in sizes)
    assert all(a < b <= 4 * a for a, b in pairwise(sizes))


@pytest.mark.parametrize(("ranks", "factor"), [(1, 0.0), (2, 1.0), (4, 1.5), (8, 1.75)])
def test_the_bus_factor_of_allreduce_is_that_of_nccl_tests(ranks: int, factor: float) -> None:
    assert bus_factor("allreduce", ranks) == factor
    assert bus_factor("broadcast", ranks) == 1.0


@given(st.integers(1, 10**6))
def test_the_bus_factor_grows_with_the_ranks_and_stays_below_2(ranks: int) -> None:
    assert bus_factor("allreduce", ranks) < bus_factor("allreduce", ranks + 1) < 2


@given(st.integers(1, 8), st.integers(1, 2**30), st.integers(0, 500))
def test_each_round_has_each_operation_once(count: int, size: int, number: int) -> None:
    assert sorted(round_order(count, size, number)) == list(range(count))
    assert round_order(count, size, number) == round_order(count, size, number)


def test_rounds_differ_in_their_order() -> None:
    assert len({tuple(round_order(5, 4, number)) for number in range(50)}) > 10


@given(st.integers(0, 1000), st.floats(-1e6, 1e6))
def test_rounds_end_between_their_bounds(rounds: int, left: float) -> None:
    assert is_enough(max(rounds, MOST_ROUNDS), left)
    assert not is_enough(min(rounds, LEAST_ROUNDS - 1), left)
    assert is_enough(LEAST_ROUNDS, left) == (left <= 0)


@given(times, st.integers(1, 2**20), st.integers(2, 64))
def test_quartiles_are_in_order_and_bandwidth_follows_the_median(
    seconds: tuple[float, ...], floats: int, ranks: int
) -> None:
    timing = Timing(HOROVOD, 4 * floats, ranks, seconds)
    low, middle, high = timing.quartiles
    assert min(seconds) <= low <= middle <= high <= max(seconds)
    assert timing.algorithm_bandwidth == pytest.approx(4 * floats / middle)
    bus = timing.bus_bandwidth
    assert bus is not None
    assert timing.algorithm_bandwidth * 0.999 <= bus < 2 * timing.algorithm_bandwidth
    sent = Timing(HOROVOD_BROADCAST, 4 * floats, ranks, seconds)
    assert sent.bus_bandwidth == sent.algorithm_bandwidth


def test_a_single_rank_has_no_bus() -> None:
    alone = [Timing(one, 4, 1, (1.0,) * 5) for one in (HOROVOD, HOROVOD_BROADCAST)]
    assert [one.bus_bandwidth for one in alone] == [None, None]
    assert [row["bus_gb_per_s"] for row in csv.DictReader(io.StringIO(as_csv(alone)))] == ["", ""]


# Rounds


def alone(add: Callable[[torch.Tensor], object] = lambda table: None) -> Peers:
    return Peers(0, 1, add, lambda: None)


def action(expected: float = 1.0) -> Action:
    tensor = torch.ones(4)
    return Action(HOROVOD, lambda: None, lambda: None, tensor, expected)


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, LEAST_ROUNDS), (math.inf, MOST_ROUNDS)])
def test_a_spent_budget_gives_the_least_rounds_a_large_one_the_most(
    budget: float, rounds: int
) -> None:
    timings = measure([action(), action()], alone(), 16, budget, lambda: False)
    assert [len(timing.seconds) for timing in timings] == [rounds, rounds]


def test_the_slowest_rank_counts() -> None:
    other = torch.tensor([0.25, 7.0, 0.0], dtype=torch.float64)

    def add(table: torch.Tensor) -> None:
        table[1] = other

    peers = Peers(0, 2, add, lambda: None)
    assert peers.share([0.5, 0.75], 2) == ([0.5, 7.0], 2)


def test_the_verdict_is_rank_0_s() -> None:
    def add(table: torch.Tensor) -> None:
        table[0] = torch.tensor([0.5, 1.0])

    assert Peers(1, 2, add, lambda: None).share([0.25], 0) == ([0.5], 1)


def test_a_stop_ends_it_on_the_ranks_that_nobody_asked_too() -> None:
    with pytest.raises(StoppedEarly):
        measure([action()], alone(), 16, 1.0, lambda: True)

    def add(table: torch.Tensor) -> None:
        table[0, -1] = 2

    with pytest.raises(StoppedEarly):
        measure([action()], Peers(1, 2, add, lambda: None), 16, 1.0, lambda: False)


def test_a_wrong_sum_is_told() -> None:
    with pytest.raises(HarnessError, match=r"Horovod of 16 B gave values from 1 to 1 where all"):
        measure([action(expected=2.0)], alone(), 16, 1.0, lambda: False)
    not_finite = Action(HOROVOD, lambda: None, lambda: None, torch.full((4,), math.nan), 1.0)
    with pytest.raises(HarnessError, match="nan"):
        not_finite.check()


def test_all_sizes_are_measured_the_largest_first() -> None:
    made: list[int] = []

    def make(size: int) -> list[Action]:
        made.append(size)
        return [action()]

    found = list(measure_sizes(make, alone(), (4, 16, 64), 0.0, lambda: False))
    assert made == [64, 16, 4]
    assert [timing.bytes for timing in in_order(found)] == [4, 16, 64]


class Twice(SoloCommunicator):
    """A world of two ranks that do the same."""

    size = 2

    def __init__(self) -> None:
        self.types: list[torch.dtype] = []

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> None:
        self.types.append(tensor.dtype)
        tensor.mul_(2)


@pytest.mark.parametrize("size", [4, 64, 4096, 2**20])
def test_fp16_goes_through_the_harness_s_own_compression(size: int) -> None:
    comm = Twice()
    packed = probe.fp16_action(comm, size)
    for _ in range(3):
        packed.prepare()
        packed.run()
        packed.check()
    assert packed.result.dtype == torch.float32
    assert comm.types == [torch.float16] * 3


def test_sums_start_anew_each_time() -> None:
    comm = Twice()
    summed = probe.sum_action(GLOO, comm, torch.empty(8))
    for _ in range(200):  # 2^200 would be infinite
        summed.prepare()
        summed.run()
        summed.check()


# Tables


TIMINGS = [
    Timing(operation, size, 2, tuple(size * 1e-9 * k for k in range(1, 6)))
    for operation in (HOROVOD, MPI_ALONE, HOROVOD_FP16)
    for size in (2**20, 4)
]


def test_the_csv_holds_what_was_measured() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(in_order(TIMINGS)))))
    assert [(row["bytes"], row["operation"]) for row in rows] == [
        (size, name)
        for size in ("4", "1048576")
        for name in ("mpi_alone", "horovod", "horovod_fp16")
    ]
    last = rows[-1]
    assert (last["ranks"], last["rounds"], last["collective"]) == ("2", "5", "allreduce")
    assert float(last["median_seconds"]) == pytest.approx(3 * 2**20 * 1e-9)
    assert float(last["lower_quartile_seconds"]) == pytest.approx(2 * 2**20 * 1e-9)
    assert float(last["bus_gb_per_s"]) == pytest.approx(1 / 3)


def printed(timings: list[Timing], width: int) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width)
    print_tables("2 ranks", timings, {"torch Gloo": "no way"}, console)
    return text.getvalue()


@pytest.mark.smoke
def test_the_table_has_quartiles_where_there_is_room() -> None:
    wide, narrow = printed(TIMINGS, 120), printed(TIMINGS, 60)
    assert "3.15 (2.10-4.19) ms" in wide
    assert "3.15 ms" in narrow
    assert "median time" in narrow
    for text in (wide, narrow):
        assert "0.333" in text
        assert "torch Gloo is not measured: no way" in text
        assert "Horovod broadcast" not in text  # a column for what was measured
        assert max(map(len, text.splitlines())) <= 120
    assert "…" not in narrow


def test_a_cell_without_a_measurement_is_empty() -> None:
    assert "1 MiB" in printed(TIMINGS[1:], 120)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        ([2.5e-6], "2.50 µs"),
        ([0.0345], "34.5 ms"),
        ([12.0], "12.0 s"),
        ([9e-6, 99e-6, 0.0012], "99.0 (9.00-1200) µs"),
    ],
)
def test_times_have_the_unit_of_their_median(seconds: list[float], shown: str) -> None:
    assert shown_time(seconds) == shown


def test_sizes_are_told_in_the_largest_unit() -> None:
    assert [shown_size(size) for size in (4, 1024, 65536, 2**26, 100 * 2**20)] == [
        "4 B",
        "1 KiB",
        "64 KiB",
        "64 MiB",
        "100 MiB",
    ]


# The launch


def written(ranks: int = 2) -> dict[str, Any]:
    """A small probe.json."""
    return {
        "ranks": ranks,
        "timings": [
            {"operation": name, "bytes": 4**k, "seconds": [1e-4 + beta * 4**k] * 5}
            for name, beta in (("horovod", 1e-9), ("horovod_fp16", 0.6e-9))
            for k in range(1, 14)
        ],
    }


class FakeRanks:
    """Stands for ``execute``: writes what ranks would leave, keeps what they were started as."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spec: LaunchSpec | None = None
        self.argv: list[str] = []
        self.words: dict[str, object] | None = None
        self.exit_code = 0
        self.result: str | None = json.dumps(written())
        monkeypatch.setattr(launching, "execute", self)
        monkeypatch.setattr("launch.detect.installed_mpi", lambda: "openmpi4")

    @property
    def directory(self) -> Path:
        assert self.spec is not None
        return Path(self.spec.command[3])

    def __call__(self, argv: list[str], spec: LaunchSpec, *rest: object) -> Ended:
        self.argv, self.spec = argv, spec
        assert spec.environment[environment.FAILURE_DIR] == str(self.directory / "failures")
        if self.words is not None:
            (self.directory / "failures" / "rank-00000.json").write_text(json.dumps(self.words))
        elif self.result is not None:
            (self.directory / "probe.json").write_text(self.result)
        return Ended(self.exit_code, "")

    def die(self, exit_code: int, message: str, traceback: str | None = None) -> None:
        self.exit_code = exit_code
        self.words = {
            "rank": 0,
            "host": "h",
            "exit_code": exit_code,
            "message": message,
            "consequence": False,
            "final": exit_code == 2,
            "traceback": traceback,
        }


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> FakeRanks:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    return FakeRanks(monkeypatch)


@pytest.mark.smoke
def test_each_slot_gets_a_rank_by_default(ranks: FakeRanks) -> None:
    assert launching.probe(ProbeRequest(hosts="localhost:3")) == 0
    assert ranks.spec is not None
    assert (ranks.spec.ranks, ranks.spec.hosts) == (3, (Host("localhost", 3),))
    assert ranks.argv[0] == "horovodrun"
    assert ranks.spec.command[1:3] == ("-m", "harness.probe")
    assert ranks.spec.command[4:] == ("--max-mb", "64", "--seconds", "20")
    assert ranks.spec.environment[environment.WORLD_SIZE] == "3"
    assert not ranks.directory.exists()


def test_inside_a_job_hosts_and_launcher_are_the_job_s(
    ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setattr("launch.detect.srun_starts_mpi", lambda: True)
    monkeypatch.setattr("launch.detect.available_srun_mpi", lambda: "pmix")
    assert main(["probe", "--ranks", "3", "-o", str(tmp_path / "out")]) == 0
    assert ranks.spec is not None
    assert ranks.spec.hosts == (Host("n1", 2), Host("n2", 1))
    assert ranks.argv[:2] == ["srun", "--mpi=pmix"]


def test_results_stay_where_they_are_wanted(ranks: FakeRanks, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()  # a submitted probe's directory is there already
    assert launching.probe(ProbeRequest(hosts="localhost:2", out=tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.json", "slurm"]
    with pytest.raises(UsageError, match="already holds a probe"):
        launching.probe(ProbeRequest(hosts="localhost:2", out=tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "--ranks 0: at least 1 rank is needed"),
        (["--ranks", "5", "--hosts", "localhost:2"], "5 ranks need 5 slots"),
        (["--hosts", "nowhere.invalid:2"], "host nowhere.invalid: "),
        (["--hosts", "a b"], "--hosts: 'a b' is not a host"),
        (["--hosts", "a:1", "--hostfile", "b"], "leave one of them out"),
        (["--hostfile", "not-there"], "--hostfile not-there: No such file"),
        (["--max-mb", "0"], "--max-mb 0: must be from 1 to 4096 MiB"),
        (["--seconds", "nan"], "--seconds nan: must be above 0"),
        (["--seconds", "-1"], "--seconds -1: must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(
    arguments: list[str],
    said: str,
    ranks: FakeRanks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(["probe", *arguments, "-o", str(out)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("harness: ")
    assert said in told
    assert not out.exists()
    assert ranks.spec is None


def test_the_verdict_is_written_and_printed(
    ranks: FakeRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--hosts", "localhost:2", "--gradient-mb", "10", "--gradient-mb", "20"]
    assert main(["probe", *words, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "fp16 pays" in printed
    content = json.loads((out / "probe.json").read_text())
    assert content["timings"] == written()["timings"]
    assert [one["gradient_mb"] for one in content["verdict"]["advice"]] == [10, 20]
    assert main(["probe", "--read", str(out), "--gradient-mb", "10"]) == 0
    again = capsys.readouterr().out
    assert "64 MiB" in again.partition("verdict")[0]  # the tables
    assert "A gradient of 10 MiB" in again
    assert json.loads((out / "probe.json").read_text()) == content


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1e9"])
def test_a_gradient_has_a_size(
    size: str, ranks: FakeRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--hosts", "localhost:2"], ["--read", str(tmp_path)]):
        assert main(["probe", *words, "--gradient-mb", size]) == 2
        assert "must be above 0" in capsys.readouterr().err
    assert ranks.spec is None


def test_reading_starts_nothing(ranks: FakeRanks, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--read", "x", "--ranks", "2", "-o", "y"]) == 2
    assert "leave out --ranks, --out" in capsys.readouterr().err
    assert ranks.spec is None


def test_a_directory_that_cannot_be_made_is_refused(ranks: FakeRanks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot be created"):
            launching.probe(ProbeRequest(hosts="localhost:2", out=out))


def test_what_the_ranks_refuse_is_refused(ranks: FakeRanks, tmp_path: Path) -> None:
    ranks.die(2, "Horovod cannot be imported")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"^Horovod cannot be imported$"):
        launching.probe(ProbeRequest(hosts="localhost:2", out=out))
    assert not out.exists()


def test_a_rank_that_fails_is_told_of(ranks: FakeRanks) -> None:
    ranks.die(1, "the sums are wrong")
    with pytest.raises(RankFailure, match="rank 0 on h: the sums are wrong"):
        launching.probe(ProbeRequest(hosts="localhost:2"))
    assert not ranks.directory.exists()


def test_a_traceback_that_the_message_names_stays(
    ranks: FakeRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ranks.die(1, "KeyError: 1", "Traceback ...")
    with pytest.raises(RankFailure, match=r"\(traceback in (.*)\)") as caught:
        launching.probe(ProbeRequest(hosts="localhost:2"))
    named = str(caught.value).partition("traceback in ")[2].rstrip(")")
    assert Path(named).read_text() == "Traceback ..."


def test_ranks_that_end_without_a_result_have_failed(ranks: FakeRanks) -> None:
    ranks.result = None
    with pytest.raises(RankFailure, match="exit code 0"):
        launching.probe(ProbeRequest(hosts="localhost:2"))


def test_a_stop_on_request_is_no_failure(ranks: FakeRanks) -> None:
    ranks.result, ranks.exit_code = None, StoppedEarly.exit_code
    with pytest.raises(StoppedEarly, match="nothing was written"):
        launching.probe(ProbeRequest(hosts="localhost:2"))
    assert not ranks.directory.exists()
