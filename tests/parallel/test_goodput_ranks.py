"""Growth by goodput on real ranks: it starts on one, goes on with two, and resumes as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import (
    Job,
    attempts,
    events,
    harness,
    identical,
    last_state,
    metrics,
    run_arguments,
    train,
)

MODEL = "{per_image: 1.0e-4, fixed: 2.0e-3, within_latency: 5.0e-4, gradient_bytes: 1.0e+6}"
GROWING = (
    "batch={initial: 32, max: 256, micro: 8}",
    f"batch.growth={{policy: goodput, dwell: 0.5ep, model: {MODEL}}}",
    "comm={compression: none, summation: exact}",
    "ranks={start: 1, max: 2, threads: 1}",
    "lr={base: 0.02, scaling: none}",
    "lr.on_growth=1",
    "lr.warmup=null",
    "train={duration: 3ep, checkpoint_every: 0.5ep, eval_every: 1ep, log_every: 1}",
)


@pytest.mark.slow
def test_ranks_grow_by_goodput_and_the_run_resumes_as_it_was(tmp_path: Path) -> None:
    """Against a run on one rank throughout, which is never stopped."""
    grown, alone = tmp_path / "grown", tmp_path / "alone"
    with Job(grown, *run_arguments(grown, None, *GROWING)) as job:
        while job.process.poll() is None and 2 not in ranks_of(grown):
            job.wait_for_update(len(ranks_of(grown)) + 1)
        job.process.terminate()
        code, output = job.finish()
    assert code == 75, output
    kept = (grown / "config.yaml").absolute()  # with the model that it began with
    words = ("run", kept, "--hosts", "localhost:4", "--run-dir", grown, "--resume")
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert attempts(grown) == 3

    train(alone, 1, *GROWING, "batch.growth.ranks=[1,2]")
    state, reference = last_state(grown), last_state(alone)
    for key in ("model", "optimizer", "growth", "samples_seen", "update"):
        assert identical(state[key], reference[key]), key
    assert [line["global_batch"] for line in metrics(grown)] == [
        line["global_batch"] for line in metrics(alone)
    ]
    assert set(ranks_of(grown)) == {1, 2}
    assert ranks_of(grown) == sorted(ranks_of(grown))
    for run in (grown, alone):
        decided = events(run, "decision")
        assert {one["ranks_wanted"] for one in decided} == {1, 2}
        assert any("goodput: " in one["reason"] for one in decided)
    assert [stop["ranks_wanted"] for stop in events(grown, "stop")] == [2, None]
    assert json.loads((grown / "plan.json").read_text("utf-8"))["fastest"]


def ranks_of(run: Path) -> list[int]:
    return [line["ranks"] for line in metrics(run)] if (run / "metrics.jsonl").exists() else []
