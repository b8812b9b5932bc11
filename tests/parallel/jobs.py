"""Starting, watching and killing real jobs, and comparing what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

CONFIG = Path(__file__).parents[2] / "configs" / "adabatch-digits.yaml"
TIMES = {
    "time",
    "images_per_sec",
    "seconds",
    "train_seconds",
    "rank_seconds",
    "memory_peak_bytes",
    "counters",
}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "harness", *map(str, arguments)]


Where = Callable[[list[str]], list[str]]
"""Turns a command into the one that runs it elsewhere, as on a test host."""


def here(words: list[str]) -> list[str]:
    return words


def harness(
    *arguments: object, cwd: Path | None = None, where: Where = here, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run a harness command to its end, whatever it is."""
    return subprocess.run(
        where(command(*arguments)),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        check=False,
    )


def train(run_dir: Path, ranks: int, *overrides: str, resume: bool = False) -> None:
    """A run on that many ranks of this host, one thread each; must succeed."""
    done = harness(*run_arguments(run_dir, ranks, *overrides, resume=resume))
    assert done.returncode == 0, done.stdout + done.stderr


def run_arguments(
    run_dir: Path,
    ranks: int | None,
    *overrides: str,
    resume: bool = False,
    restarts: int = 0,
) -> list[str]:
    """A run on that many ranks of this host; None: on as many as the configuration wants."""
    # Runs this short would never grow by ranks if their starts were weighed.
    settings = ("ranks.threads=1", "ranks.restart_seconds=0")
    arguments = ["run", str(CONFIG), *settings, *overrides]
    arguments += ["--hosts", "localhost:4", "--run-dir", str(run_dir)]
    arguments += ["--max-restarts", str(restarts)]
    if ranks is not None:
        arguments += ["--ranks", str(ranks)]
    return [*arguments, "--resume"] if resume else arguments


class Job:
    """A run in the background; leaving the ``with`` block ends whatever is left of it."""

    def __init__(
        self, run_dir: Path, *arguments: str, cwd: Path | None = None, where: Where = here
    ) -> None:
        self.run_dir = run_dir
        self.attempts_before = attempts(run_dir)
        self.ranks: dict[int, psutil.Process] = {}
        self.process = subprocess.Popen(
            where(command(*arguments)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            for process in rank_processes(self.run_dir).values():
                process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def wait_for_update(self, update: int) -> None:
        """Return once this job has done that update, or has ended.

        Lines of an earlier attempt, which may have come further, do not count: they are cut
        before the attempt writes that it has begun.
        """
        while self.process.poll() is None:
            if attempts(self.run_dir) > self.attempts_before:
                self.ranks = self.ranks or rank_processes(self.run_dir)  # so that a kill is quick
                if last_update(self.run_dir) >= update:
                    return
            time.sleep(0.005)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        self.ranks = self.ranks or rank_processes(self.run_dir)
        assert rank in self.ranks, f"rank {rank} is not running: {self.process.poll()}"
        self.ranks[rank].send_signal(number)

    def finish(self, timeout: float = 120) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output


def rank_processes(run_dir: Path) -> dict[int, psutil.Process]:
    """The processes of a run's ranks, by rank."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "train" in words and str(run_dir.resolve()) in words and "python" in words[0]:
                variables = process.environ()
                rank = variables.get("OMPI_COMM_WORLD_RANK", variables.get("HOROVOD_RANK"))
                if rank is not None:
                    found[int(rank)] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def attempts(run_dir: Path) -> int:
    """How often ranks have begun to train in that directory."""
    path = run_dir / "events.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return content.count(b'"kind":"start"') + content.count(b'"kind":"resume"')


def last_update(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, os.path.getsize(path) - 4096))
        lines = file.read().split(b"\n")
    for line in reversed(lines[:-1]):
        try:
            return int(json.loads(line)["update"])
        except ValueError:
            continue
    return 0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock on the wall decides."""
    return [timeless(record) for record in lines(run_dir / "metrics.jsonl")]


def trajectory(run_dir: Path) -> list[dict[str, Any]]:
    """Events that belong to the training, without wall-clock times."""
    kinds = {
        "stage",
        "decision",
        "evaluation",
        "checkpoint",
        "skipped_update",
        "corrupt_image",
        "end",
    }
    return [timeless(r) for r in lines(run_dir / "events.jsonl") if r["kind"] in kinds]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in lines(run_dir / "events.jsonl") if record["kind"] == kind]


def last_state(run_dir: Path) -> dict[str, Any]:
    newest = max((run_dir / "checkpoints").glob("update-*.pt"))
    state: dict[str, Any] = torch.load(newest, weights_only=True)
    return state


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = last_state(run_dir)["model"]
    return model


def identical(a: Any, b: Any) -> bool:
    """Equality to the last bit of nested states."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Weights, optimizer, records and evaluations of two runs are equal to the last bit."""
    ours, theirs = last_state(run_dir), last_state(reference)
    for key in ("model", "optimizer", "reducer", "growth", "samples_seen", "update"):
        assert identical(ours[key], theirs[key]), key
    assert metrics(run_dir) == metrics(reference)
    assert trajectory(run_dir) == trajectory(reference)


def relative_difference(run_dir: Path, reference: Path) -> float:
    """The largest relative L2 difference of a parameter between two runs' final weights."""
    ours, theirs = weights(run_dir), weights(reference)
    return max(float((ours[k] - theirs[k]).norm() / theirs[k].norm()) for k in theirs)
