"""Data sets under real ranks: folders decoded by workers, memory that ranks share, precision."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from images import write
from jobs import Job, events, harness, last_state, metrics, trajectory

from harness.environment import FAILURE_DIR

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from data_memory import grown, write_cifar10

BROKEN = ("train/b/07.jpg", "train/c/03.jpg", "val/a/02.jpg")
NAME = "a folder with 'quotes' and $(spaces)"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose folder of images has some that cannot be read."""
    place = tmp_path_factory.mktemp("data")
    root = place / NAME
    for split, count in (("train", 20), ("val", 4)):
        for label in "abc":
            for i in range(count):
                write(root / split / label / f"{i:02}.jpg", seed=100 * ord(label) + i)
    for name in BROKEN:
        (root / name).write_bytes((root / name).read_bytes()[:200])
    content = {
        "name": "folder",
        "data": {
            "dataset": "folder",
            "root": str(root),
            "image_size": 24,
            "workers": 2,
            "on_corrupt": "skip",
        },
        "model": {"name": "resnet20"},
        "batch": {"initial": 12, "micro": 4, "growth": {"policy": "geometric", "every": "2ep"}},
        "lr": {"base": 0.05},
        "ranks": {"threads": 1},
        "comm": {"summation": "exact"},
        "train": {"duration": "6ep", "log_every": 1, "checkpoint_every": "5up"},
    }
    path = place / "folder.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def arguments(config: Path, directory: Path, ranks: int, *overrides: str) -> list[str]:
    words = ["run", str(config), *overrides, "--ranks", str(ranks), "--run-dir", str(directory)]
    return [*words, "--hosts", "localhost:4", "--max-restarts", "0"]


def trained(config: Path, directory: Path, ranks: int, *overrides: str) -> Path:
    done = harness(*arguments(config, directory, ranks, *overrides))
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Without batch norm's statistics, which are an average over ranks."""
    model = last_state(directory)["model"]
    return {key: value for key, value in model.items() if "running" not in key}


def workers(directory: Path) -> list[psutil.Process]:
    """Loading processes of a run's ranks, whose variables they have inherited."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if any("harness.data" in word for word in process.info["cmdline"] or [])
        and str(directory) in (process.info["environ"] or {}).get(FAILURE_DIR, "")
    ]


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config, tmp_path_factory.mktemp("undisturbed") / "run", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "count"), [(1, 0), (3, 1)])
def test_ranks_and_workers_change_nothing(
    ranks: int, count: int, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    directory = trained(config, tmp_path / "run", ranks, f"data.workers={count}")
    found, wanted = weights(directory), weights(undisturbed)
    for name in wanted:
        if "tracked" not in name:
            assert torch.equal(found[name], wanted[name]), name
    told = [event["reason"] for event in events(directory, "corrupt_image")]
    assert told == [event["reason"] for event in events(undisturbed, "corrupt_image")]
    assert len(told) == len(BROKEN)
    assert all(event["corrupt"] == 1 for event in events(directory, "evaluation"))


@pytest.mark.slow
def test_a_killed_rank_leaves_no_workers_and_costs_nothing(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    for attempt, update in enumerate((7, 20)):
        more = ["--resume"] if attempt else []
        with Job(directory, *arguments(config, directory, 2), *more) as job:
            job.wait_for_update(update)
            assert len(workers(directory)) == 4
            job.signal_rank(attempt, signal.SIGKILL)
            code, output = job.finish()
        assert code == 1, output
        assert workers(directory) == []
    done = harness(*arguments(config, directory, 2), "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(directory) == metrics(undisturbed)
    assert trajectory(directory) == trajectory(undisturbed)
    found, wanted = last_state(directory)["model"], last_state(undisturbed)["model"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert workers(directory) == []


@pytest.mark.slow
def test_an_image_that_cannot_be_read_stops_the_run_with_its_name(
    config: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    done = harness(*arguments(config, directory, 2, "data.on_corrupt=stop"))
    assert done.returncode == 1
    assert any(name in done.stderr for name in BROKEN)
    assert "data.on_corrupt=skip" in done.stderr
    assert "Traceback" not in done.stderr
    assert workers(directory) == []
    # … and goes on without it, also where it is resumed from what the run directory says.
    stop = ("train.duration=6ep", "data.on_corrupt=skip", "--resume")
    with Job(directory, *arguments(config, directory, 2, *stop[:2]), stop[2]) as job:
        job.wait_for_update(6)
        job.process.send_signal(signal.SIGTERM)
        code, output = job.finish()
    assert code == 75, output
    again = ["run", str(directory / "config.yaml"), "--run-dir", str(directory), "--resume"]
    done = harness(*again, "--ranks", "2", "--hosts", "localhost:4")
    assert done.returncode == 0, done.stdout + done.stderr


CALM = ("lr.base=0.005", "batch.growth={policy: fixed}", "train.duration=1ep")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("train.precision=fp16", "comm={compression: fp16, summation: float}"),
        ("train.precision=bf16", "train.channels_last=true"),
    ],
    ids=lambda settings: settings[0],
)
def test_half_precision_on_ranks_is_near_float32(
    settings: tuple[str, ...], config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    directory = trained(config, tmp_path / "run", 2, *CALM, *settings)
    losses = [line["loss"] for line in metrics(directory)]
    assert losses[0] == pytest.approx(metrics(undisturbed)[0]["loss"], rel=0.02)
    assert losses[0] != metrics(undisturbed)[0]["loss"]
    assert all(0 < loss < 10 for loss in losses)
    assert all(value.dtype == torch.float32 for value in weights(directory).values() if value.dim())


@pytest.mark.slow
def test_synchronised_batch_norm_sees_the_micro_batches_of_all_ranks(
    config: Path, tmp_path: Path
) -> None:
    settings = (*CALM, "train.sync_batch_norm=true")
    two = trained(config, tmp_path / "two", 2, *settings, "batch.micro=3")
    one = trained(config, tmp_path / "one", 1, *settings, "batch.micro=6")
    found = [line["loss"] for line in metrics(two)]
    assert found == pytest.approx([line["loss"] for line in metrics(one)], rel=1e-3)
    # 12 in pieces of 5: one rank passes the model twice, and so must the other.
    uneven = trained(config, tmp_path / "uneven", 2, *settings, "batch.micro=5")
    assert len(metrics(uneven)) == 5


@pytest.mark.slow
def test_four_ranks_need_the_memory_of_one(tmp_path: Path) -> None:
    """Of data of CIFAR-10's size; proportional set sizes."""
    write_cifar10(tmp_path)
    alone, together = (grown(tmp_path, ranks, "share") for ranks in (1, 4))
    assert alone > 170  # 60,000 × 3,072 bytes
    assert together < 1.3 * alone
    assert grown(tmp_path, 2, "apart") > 1.8 * alone


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parallel(2)
def test_a_loading_process_that_is_stopped_is_found(config: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    words = arguments(config, directory, 2, "data.workers=1", "launch.hang_seconds=3")
    with Job(directory, *words) as job:
        job.wait_for_update(5)
        stopped = workers(directory)
        for process in stopped:
            process.suspend()
        assert len(stopped) == 2
        code, output = job.finish()
    assert code == 1, output
    assert "has been waiting for data" in output
    assert f"python (pid {stopped[0].pid}) is stopped, as by SIGSTOP" in output
    assert "in finish" in (directory / "stacks" / "hang-1" / "rank-00001.txt").read_text()
    _, alive = psutil.wait_procs(stopped, timeout=60)
    assert alive == []
