"""The profiler under real ranks: its times against an independent clock, causes that were planted,
traces of several ranks, and that none of it changes what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import assert_same_run, events, harness, lines, run_arguments

from harness.records import PHASES

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]

# One micro-batch on each rank in each update; nothing but updates in between.
EVEN = (
    "batch={initial: 64, micro: 32}",
    "batch.growth.policy=fixed",
    "lr.warmup=null",
    "data.augment=false",
    "model.name=mine:Net",
)

MODEL = """
import atexit, json, os, time
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from harness.data.datasets import ImageSplit

RANK = int(os.environ["OMPI_COMM_WORLD_RANK"])
BEGUN = []


def slowly(call):
    def slow(*arguments):
        time.sleep(0.08)
        return call(*arguments)
    return slow


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(196, num_classes))

    def forward(self, x):
        if self.training:
            BEGUN.append(time.monotonic())
        return self.body(x)


@atexit.register
def tell():
    with open(f"begun-{RANK}.json", "w") as file:
        json.dump(BEGUN, file)


"""


def run(tmp_path: Path, name: str, *settings: str, planted: str = "") -> Path:
    (tmp_path / "mine.py").write_text(MODEL + planted)
    directory = tmp_path / name
    done = harness(*run_arguments(directory, 2, *EVEN, *settings), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_phases_add_up_to_the_time_of_their_updates(tmp_path: Path) -> None:
    train = "train={duration: 300up, eval_every: null, checkpoint_every: null, log_every: 1}"
    directory = run(tmp_path, "run", train)
    begun = json.loads((tmp_path / "begun-0.json").read_text())
    per_update = [line["seconds"] for line in lines(directory / "metrics.jsonl")]
    assert len(begun) == len(per_update) == 300
    # From the first forward pass to the last: data comes before it, all other phases after.
    told = sum(sum(seconds.values()) for seconds in per_update[:-1])
    told += per_update[-1]["data"] - per_update[0]["data"]
    assert told == pytest.approx(begun[-1] - begun[0], rel=0.02)


CAUSES = {
    "a slow rank": ("if RANK == 1: Net.forward = slowly(Net.forward)", "forward"),
    "a slow loader": ("if RANK == 1: ImageSplit.batch = slowly(ImageSplit.batch)", "data"),
    "a large step": (
        "if RANK == 1: register_optimizer_step_pre_hook(slowly(lambda *_: None))",
        "optimizer",
    ),
}
SHORT = "train={duration: 120up, eval_every: null, checkpoint_every: null}"


SOME = [
    cause if cause == "a slow rank" else pytest.param(cause, marks=pytest.mark.long)
    for cause in CAUSES
]


@pytest.mark.parametrize("cause", SOME)
def test_a_planted_cause_is_named_with_its_rank(cause: str, tmp_path: Path) -> None:
    planted, phase = CAUSES[cause]
    directory = run(tmp_path, "run", SHORT, planted=planted)
    records = lines(directory / "metrics.jsonl")
    told = [record["rank_seconds"] for record in records]
    assert [one["updates"] for one in told] == [10] * 12
    assert all(one["slowest_host"] for one in told)
    # 80 ms in each of 10 updates; in an epoch's last one there is nothing left for rank 1.
    assert all(one["busy_max"] > 9 * 0.08 for one in told)
    named = [(one["slowest_rank"], one["phase"]) for one in told]
    assert named.count((1, phase)) >= 10  # a busy machine may hold rank 0 up for longer, for once
    stragglers = events(directory, "straggler")
    assert {(event["rank"], event["phase"]) for event in stragglers} == {(1, phase)}
    assert stragglers[0]["host"] == told[0]["slowest_host"]
    assert stragglers[0]["ratio"] > 1.1
    assert stragglers[0]["seconds_per_update"] > 0.03
    # Rank 0, which writes the lines, does little but wait.
    assert max(PHASES, key=lambda one: total(records, one)) == "comm_exposed"


@pytest.mark.parametrize("cause", SOME)
def test_what_all_ranks_lose_is_seen_in_its_phase(cause: str, tmp_path: Path) -> None:
    planted, phase = CAUSES[cause]
    train = "train={duration: 30up, eval_every: null, checkpoint_every: null}"
    directory = run(tmp_path, "run", train, planted=planted.removeprefix("if RANK == 1: "))
    records = lines(directory / "metrics.jsonl")
    # How long ranks wait for each other is the machine's matter as well.
    busy = [one for one in PHASES if one != "comm_exposed"]
    assert max(busy, key=lambda one: total(records, one)) == phase
    assert total(records, phase) > 30 * 0.08
    assert events(directory, "straggler") == []  # nor lines enough


def total(records: list[dict[str, Any]], phase: str) -> float:
    return sum(float(record["seconds"][phase]) for record in records)


def test_it_changes_nothing_and_its_traces_fit_together(tmp_path: Path) -> None:
    train = "train.duration=3ep"
    plain = run(tmp_path, "plain", train, "profile.enabled=false")
    assert_same_run(run(tmp_path, "measured", train), plain)
    traced = run(tmp_path, "traced", train, "profile={trace: {updates: [10, 13]}, timeline: true}")
    assert_same_run(traced, plain)
    assert not (plain / "traces").exists()
    assert [event["update"] for event in events(traced, "trace")] == [13]

    done = harness("trace", traced)
    assert done.returncode == 0, done.stderr
    assert "updates 10 to 13 of ranks 0, 1, clocks within " in done.stdout
    merged = json.loads((traced / "traces" / "merged.json").read_text())["traceEvents"]
    processes = {e["args"]["name"]: e["pid"] for e in merged if e["name"] == "process_name"}
    named = [name.split(" on ")[0] for name in processes]
    assert named == ["rank 0", "rank 1", "Horovod, seen by rank 0"]
    assert any(e["pid"] == processes["Horovod, seen by rank 0"] for e in merged if e["ph"] == "X")
    ranks = [pid for name, pid in processes.items() if name.startswith("rank")]
    waits = [phases(merged, pid, "comm_exposed") for pid in ranks]
    passes = [phases(merged, pid, "forward") for pid in ranks]
    assert [len(some) for some in passes] == [4, 4]
    assert [len(some) for some in waits] == [5, 5]  # once for the times of ten updates
    for one, other in zip(*waits, strict=True):
        # No rank has its gradients before the other has come to hand over its own.
        assert one["ts"] + one["dur"] > other["ts"] - 1000
        assert other["ts"] + other["dur"] > one["ts"] - 1000
    for pid, forward in zip(ranks, passes, strict=True):
        products = [e for e in merged if e["pid"] == pid and e["name"] == "aten::addmm"]
        assert len(products) == 4
        for phase, product in zip(forward, products, strict=True):
            assert phase["ts"] - 1000 < product["ts"] < phase["ts"] + phase["dur"] + 1000


def phases(merged: list[dict[str, Any]], pid: int, name: str) -> list[dict[str, Any]]:
    chosen = [e for e in merged if e["pid"] == pid and e.get("cat") == "phase"]
    return [event for event in chosen if event["name"] == name]
