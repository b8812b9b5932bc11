"""``harness bench`` on real ranks."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jobs import CONFIG, command, harness, lines

from harness.benchfile import Bench, read_bench

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]

MODEL = """
import os, time
from harness.environment import launched_rank
from harness.models.lenet5 import LeNet5

class Net(LeNet5):
    '''Writes down when each forward pass begins: a stopwatch of the test's own.'''

    def __init__(self, num_classes, shape):
        super().__init__(num_classes, shape)
        name = f"stamps-{launched_rank()}-{os.getpid()}"
        self.file = open(os.path.join(os.path.dirname(__file__), name), "w", buffering=1)

    def forward(self, images):
        if self.training:
            self.file.write(f"{time.monotonic()!r}\\n")
        return super().forward(images)
"""


def arguments(out: Path, *more: str) -> list[str]:
    return ["bench", str(CONFIG), "--hosts", "localhost:2", "-o", str(out), *more]


def measure(out: Path, *more: str, cwd: Path | None = None) -> tuple[Bench, str]:
    done = harness(*arguments(out, *more), cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_bench(out), done.stdout


def windows(out: Path) -> list[dict[str, str]]:
    with (out / "windows.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def test_throughput_is_that_of_an_independent_stopwatch(tmp_path: Path) -> None:
    (tmp_path / "timed.py").write_text(MODEL)
    out = tmp_path / "out"
    settings = ("model.name=timed:Net", "--ranks", "2", "--repeats", "1", "--seconds", "3")
    found, _ = measure(out, *settings, cwd=tmp_path)
    (point,) = found.points
    (repeat,) = point.repeats
    rows = windows(out)
    assert len(rows) == repeat.windows
    warm, steady = repeat.warmup_windows, [row for row in rows if row["warmup"] == "0"]
    assert len(steady) == repeat.windows - warm
    assert sum(float(row["seconds"]) for row in steady) >= 2.9
    # Each update has one forward pass on each rank. From the first steady one to the last one there
    # are as many updates as steps between the stamps.
    stamps = max(
        (
            [float(line) for line in path.read_text().split()]
            for path in tmp_path.glob("stamps-0-*")
        ),
        key=len,
    )
    assert len(stamps) == len(rows)
    updates = len(steady) - 1
    own = 64 * updates / (stamps[-1] - stamps[warm])
    theirs = 64 * updates / sum(float(row["seconds"]) for row in steady[:-1])
    assert theirs == pytest.approx(own, rel=0.01)
    assert repeat.images_per_sec == pytest.approx(
        64 * len(steady) / sum(float(row["seconds"]) for row in steady)
    )
    # All windows together are the time between the events around them.
    (run,) = out.glob("points/*/repeat-0")
    told = lines(run / "events.jsonl")
    wall = at(next(e for e in told if e["kind"] == "checkpoint")) - at(
        next(e for e in told if e["kind"] == "stage")
    )
    total = sum(float(row["seconds"]) for row in rows)
    assert 0.95 * wall < total < wall + 0.01  # between the last update and the event it is saved
    # The updates were those of a run.
    assert [line["global_batch"] for line in lines(run / "metrics.jsonl")] == [64] * len(rows)
    expected = {"start", "stage", "checkpoint", "stop", "warning", "straggler"}
    assert {e["kind"] for e in told} <= expected
    assert not (run / "checkpoints").exists()


def test_an_interrupted_bench_goes_on_to_the_same_points(tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--ranks", "1,2", "--repeats", "2", "--seconds", "0.3")
    process = subprocess.Popen(
        command(*arguments(out, *more)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while process.poll() is None:
            if (out / "bench.json").exists() and read_bench(out).points:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.02)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, output
    partial = read_bench(out)
    assert partial.status == "partial"
    assert "the same command with -o" in output
    kept = {
        (point.name, one.repeat): one.images_per_sec
        for point in partial.points
        for one in point.repeats
    }
    assert {path.parts[-2:] for path in out.glob("points/*/repeat-*")} == {
        (name, f"repeat-{repeat}") for name, repeat in kept
    }
    found, _ = measure(out, *more)
    assert found.status == "complete"
    assert found.order == partial.order
    assert [(p.ranks, p.accumulation, p.micro_batch, len(p.repeats)) for p in found.points] == [
        (1, 1, 32, 2),
        (2, 1, 32, 2),
    ]
    rates = {(p.name, one.repeat): one.images_per_sec for p in found.points for one in p.repeats}
    assert {pair: rates[pair] for pair in kept} == kept
    assert {(row["point"], int(row["repeat"])) for row in windows(out)} == set(found.order)


def test_one_rank_runs_the_code_of_many(tmp_path: Path) -> None:
    for name, more in {
        "horovod": (),
        "torch": ("comm.backend=torch", "comm.compression=none", "--launcher", "local"),
    }.items():
        out = tmp_path / name
        found, printed = measure(out, *more, "--ranks", "1,2", "--repeats", "1", "--seconds", "0.3")
        kinds = set()
        for path in out.glob("points/*/repeat-0/provenance.json"):
            provenance = json.loads(path.read_text())
            kinds.add((provenance["communication"]["kind"], provenance["launcher"]))
        assert len(kinds) == 1, kinds
        assert found.engine == next(iter(kinds))[0] != "solo"
        assert found.gradient_bytes is not None
        assert found.gradient_bytes >= 2 * 61706 * (2 if name == "torch" else 1)
        assert found.parameters == 61706
        # A published count of LeNet-5's first convolution alone: 2 × 25 × 6 × 28².
        assert found.flops_per_image is not None
        assert found.flops_per_image > 2 * 25 * 6 * 28**2
        assert all(point.mfu is not None and 0 < point.mfu < 1.5 for point in found.points)
        assert "64 = 2 × 1 × 32" in printed


def test_a_point_that_fails_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text(
        "from harness.models.lenet5 import LeNet5\n"
        "class Net(LeNet5):\n"
        "    def __init__(self, num_classes, shape):\n"
        "        super().__init__(num_classes, shape)\n"
        "    def forward(self, images):\n"
        "        if len(images) == 16:\n"
        "            raise RuntimeError('sixteen is too much')\n"
        "        return super().forward(images)\n"
    )
    out = tmp_path / "out"
    more = ("model.name=picky:Net", "--ranks", "1", "--micro", "8,16", "--repeats", "1")
    done = harness(*arguments(out, *more, "--seconds", "0.2"), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = read_bench(out)
    assert [point.micro_batch for point in found.points] == [8]
    (failure,) = found.failures
    assert failure.point == "r0001-a0001-m0016"
    assert "sixteen is too much" in failure.reason
    assert found.mode == "grid"
