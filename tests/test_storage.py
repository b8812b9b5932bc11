"""A run directory that can take no more, met by a real process: one message; it goes on later."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.checkpoint import load_state, newest_valid
from harness.jsonl import read_jsonl
from harness.resume import has_finished
from harness.rundir import RunDirectory

DEMO = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
WORDS = ("batch.initial=128", "train.duration=2ep", "train.log_every=1", "ranks.threads=1")


def train(
    directory: Path, *more: str, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "harness", "train", str(DEMO), *WORDS, *more]
    return subprocess.run(
        [*words, "--run-dir", str(directory)],
        capture_output=True,
        text=True,
        preexec_fn=before,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_files_that_may_not_grow_end_the_run_with_74_and_nothing_older_is_lost(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    run = RunDirectory(directory)
    assert train(directory, "train.checkpoint_every=1ep").returncode == 0
    newest = max(run.checkpoints.glob("*.pt"))
    newest.with_name(f"{newest.name}.sha256").unlink()  # to go on from half of its way
    events = run.events.read_bytes()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = train(directory, "train.checkpoint_every=1ep", "--resume", before=limit)
    assert done.returncode == 74, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "File too large; raise the limit on the size of files (ulimit -f)" in said
    assert "the run goes on from its newest checkpoint once it can write there" in said
    assert "Traceback" not in done.stderr
    found = newest_valid(run.checkpoints, lambda *_: None)
    assert found is not None
    assert load_state(found.content, "x")["update"] == found.update
    assert not has_finished(run)
    assert run.events.read_bytes()[:200] == events[:200]
    done = train(directory, "train.checkpoint_every=1ep", "--resume")
    assert done.returncode == 0, done.stderr
    assert has_finished(run)
    updates = [record["update"] for record in read_jsonl(run.metrics) if record]
    assert updates == list(range(1, len(updates) + 1))
