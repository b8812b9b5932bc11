"""A user's own parts and a loop of one's own on real ranks: any number of them, killed, resumed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from jobs import Job, assert_same_run, harness, identical, last_state, weights
from support import ROOT, tool

EXAMPLES = ROOT / "examples"
RUN = (
    *("run", EXAMPLES / "own" / "own.yaml", "ranks.threads=1", "comm.summation=exact"),
    *("train.duration=3ep", "train.checkpoint_every=7up", "train.log_every=1"),
    *("--hosts", "localhost:2", "--max-restarts", "0"),
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parallel(2)
def test_own_parts_have_one_trajectory_on_any_ranks_and_after_a_kill(tmp_path: Path) -> None:
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    for directory, ranks in ((one, "1"), (two, "2")):
        done = harness(*RUN, "--ranks", ranks, "--run-dir", directory, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert identical(weights(one), weights(two))
    for key in ("loss", "accuracy", "metric"):
        alone, together = last_state(one)["evaluation"][key], last_state(two)["evaluation"][key]
        assert alone == pytest.approx(together, rel=1e-6)

    arguments = [str(word) for word in (*RUN, "--ranks", "2", "--run-dir", killed)]
    with Job(killed, *arguments) as job:
        job.wait_for_update(30)
        job.signal_rank(1, signal.SIGKILL)
        assert job.finish()[0] == 1
    # From the copy in the run directory, which has to find the code where it was.
    again = ("run", killed / "config.yaml", *RUN[-4:], "--ranks", "2", "--run-dir", killed)
    done = harness(*again, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(killed, two)


@pytest.mark.slow
@pytest.mark.parallel(2)
def test_ranks_with_other_copies_of_a_file_are_refused(tmp_path: Path) -> None:
    """Each rank finds parts.py in a folder of its own, as hosts that share no file system do."""
    source = (EXAMPLES / "own" / "parts.py").read_text(encoding="utf-8")
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "parts.py").write_text(source, encoding="utf-8")
    config = tmp_path / "own.yaml"
    config.write_bytes((EXAMPLES / "own" / "own.yaml").read_bytes())
    train = [sys.executable, "-m", "harness", "train", config, "train.duration=2up"]
    script = 'PYTHONPATH="$1/$OMPI_COMM_WORLD_RANK" && export PYTHONPATH && shift && exec "$@"'
    ranks = [tool("mpirun"), "--oversubscribe", "-np", "2", "sh", "-c", script, "sh", tmp_path]

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [*ranks, *train, "ranks.start=2", "ranks.threads=1", "--run-dir", tmp_path / name]
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=200, check=False
        )

    same = run("same")
    assert same.returncode == 0, same.stdout + same.stderr
    with (tmp_path / "1" / "parts.py").open("a", encoding="utf-8") as file:
        file.write("# later\n")
    other = run("other")
    assert other.returncode != 0
    assert "parts.py: rank 1 on" in other.stderr
    assert "has another one than rank 0; give every host the same copy" in other.stderr
    assert "Traceback" not in other.stdout + other.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parallel(2)
def test_a_loop_of_ones_own_on_two_ranks_killed_and_started_again(tmp_path: Path) -> None:
    script = EXAMPLES / "own_loop.py"
    done = run_loop([sys.executable], script, tmp_path / "one")
    assert done.returncode == 0, done.stdout
    two_ranks = [str(tool("horovodrun")), "-np", "2", sys.executable]
    killed = tmp_path / "two"
    with subprocess.Popen([*two_ranks, script, killed], stdout=subprocess.DEVNULL) as job:
        while not (killed / "update-00000003.pt").exists() and job.poll() is None:
            time.sleep(0.02)
        for process in psutil.Process(job.pid).children(recursive=True):
            if str(script) in process.cmdline() and "mpirun" not in process.cmdline()[0]:
                process.kill()
        assert job.wait(120) != 0
    done = run_loop(two_ranks, script, killed)
    assert done.returncode == 0, done.stdout
    begun = [int(number) for number in re.findall(r"update (\d+): batch", done.stdout)]
    assert begun[0] > 3
    assert begun == list(range(begun[0], 9))
    ours, theirs = (newest(tmp_path / name) for name in ("two", "one"))
    assert identical(ours["updates"], theirs["updates"])
    assert identical(ours["optimizer"]["state"], theirs["optimizer"]["state"])
    for key, tensor in theirs["model"].items():
        # Each rank's batch norm has seen the micro-batches of its own.
        assert torch.equal(ours["model"][key], tensor) or "running_" in key or "num_batch" in key


def run_loop(command: list[str], script: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, str(script), str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )


def newest(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = torch.load(
        max(directory.glob("update-*.pt")), weights_only=True
    )
    return state
