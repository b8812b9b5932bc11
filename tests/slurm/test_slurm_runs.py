"""Runs under a real Slurm from submission to end: chains, faults, growth, series, odd names.

Exact summation makes the final weights the same to the last bit on any number of ranks, so equality
with a run that nobody disturbed says that every update had its samples, once.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurmruns
from slurmbed import SlurmBed, missing_for_pmix, require_slurm
from slurmruns import NODES, PATIENCE, SETTINGS, SlurmRun, call, mend, ranks, recover
from support import ROOT, require, require_ranks

sys.path.append(str(ROOT / "tests" / "parallel"))

from jobs import CONFIG, command, events, identical, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GROWING = (
    # No loss falls by nine tenths, so the second decision grows the batch, whatever was measured.
    "batch={initial: 48, max: 96, micro: 12, growth: "
    "{policy: plateau, patience: 1, threshold: 0.9, dwell: 1ep}}"
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmBed]:
    require_slurm()
    require_ranks()
    missing = missing_for_pmix()
    require(missing is None, str(missing))
    with SlurmBed(NODES, folder=tmp_path_factory.mktemp("slurm"), timeout=5) as started:
        yield started


@pytest.fixture
def cluster(slurm: SlurmBed) -> SlurmBed:
    """With all nodes idle."""
    mend(slurm)
    slurm.wait_for_nodes(NODES, PATIENCE)
    return slurm


def undisturbed(folder: Path, *settings: str) -> Path:
    """The run in one process that no Slurm knows of."""
    (folder / "mine.py").write_text(slurmruns.MODEL, encoding="utf-8")
    words = command("train", CONFIG, *SETTINGS, ranks(1, 1), *settings, "--run-dir", folder / "run")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("alone"))


def used(directory: Path) -> list[int]:
    """Ranks of each attempt."""
    return [e["ranks"] for e in [*events(directory, "start"), *events(directory, "resume")]]


def column(told: dict[str, Any], name: str) -> list[Any]:
    return [job[name] for job in told["jobs"]]


def test_a_chain_of_jobs_grows_from_node_to_node(
    cluster: SlurmBed, alone: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path)
    run.brake(0.1)
    numbers = run.submit(ranks(1, 4), "--hold")
    before = run.status()
    assert column(before, "id") == numbers
    assert column(before, "nodes") == column(before, "ranks") == [1, 2, 4]
    assert column(before, "segment") == [0, 1, 2]
    assert column(before, "after") == [[], numbers[:1], numbers[1:2]]
    assert column(before, "state") == ["PENDING"] * 3
    assert f"scontrol release {numbers[0]}" in before["jobs"][0]["hint"]
    assert before["run"]["state"] == "not started"
    waits = [cluster.job(number)["Dependency"] for number in numbers]
    assert waits == ["(null)", *(f"afterok:{number}(unfulfilled)" for number in numbers[:2])]

    call(cluster, "scontrol", "release", ",".join(numbers))
    run.wait_for_update(3)
    during = run.status()
    assert during["run"]["state"] == "running"
    assert during["run"]["ranks"] == 1
    assert 0 < during["run"]["samples_seen"] < during["run"]["samples_planned"] == 3 * 1437
    assert during["next"] == f"job {numbers[0]} runs, then job {numbers[1]} on 2 ranks"
    shown = run.harness("status", run.path).stdout
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == numbers
    assert "run: running" in shown
    assert during["next"] in shown

    run.release()
    run.finish(*numbers)
    assert [cluster.job(number)["NumNodes"] for number in numbers] == ["1", "2", "4"]
    assert used(run.path) == [1, 2, 4]
    after = run.status()
    assert column(after, "state") == ["COMPLETED"] * 3
    assert after["run"]["state"] == "done"
    assert after["run"]["samples_seen"] == 3 * 1437
    assert after["run"]["updates_repeated"] == 0
    assert [note["outcome"] for note in after["history"]] == ["handed on"] * 2
    assert identical(weights(run.path), weights(alone))


Fault = Callable[[SlurmRun, str], None]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.long) if fault is slurmruns.switched_off else fault
        for fault in slurmruns.FAULTS
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_run_comes_back_from_a_fault(
    fault: Fault, cluster: SlurmBed, alone: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path)
    recovery = recover(run, fault)
    told = run.status()
    assert identical(weights(run.path), weights(alone)), run.output()
    assert told["run"]["state"] == "done"
    assert told["run"]["attempts"] == recovery.attempts
    # Of the updates since the last checkpoint, each is done again at most once for each attempt.
    assert 0 <= recovery.updates_repeated <= 5 * (recovery.attempts - 1)
    assert told["run"]["updates_repeated"] == recovery.updates_repeated
    summary = json.loads((run.path / "report" / "summary.json").read_text(encoding="utf-8"))
    [repeated] = [n for n in summary["runs"][0]["numbers"] if n["name"] == "updates_repeated"]
    assert repeated["value"] == recovery.updates_repeated
    if fault is slurmruns.cancelled:
        assert cluster.job(recovery.first_job)["JobState"] == "CANCELLED"
    else:  # it is the same job that comes back
        assert [(job["id"], job["state"]) for job in told["jobs"]] == [
            (recovery.first_job, "COMPLETED")
        ]
        assert told["jobs"][0]["restarts"] >= 1
    if fault is slurmruns.warned:
        assert recovery.updates_repeated == 0
        assert [note["outcome"] for note in told["history"]] == ["queued again"]
    if fault is slurmruns.slurmd_killed:  # whose ranks were alive when the job began again
        assert "asking it to stop" in run.output()
        assert [note["outcome"] for note in told["history"]] == ["left to Slurm"]


def test_growth_that_is_measured_submits_the_job_that_it_needs(
    cluster: SlurmBed, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path)
    [first] = run.submit(GROWING, ranks(1, 2))
    run.finish(first)
    listed = run.jobs()["jobs"]
    assert [(job["ranks"], job["nodes"], job["after"]) for job in listed] == [
        (1, 1, []),
        (2, 2, [first]),
    ]
    second = listed[1]["id"]
    run.finish(second)
    assert cluster.job(second)["NumNodes"] == "2"
    assert used(run.path) == [1, 2]
    assert run.status()["history"][0]["reason"] == (
        f"wants 2 ranks; submitted job {second} with 2 nodes for them"
    )
    folder = tmp_path / "alone"
    folder.mkdir()
    assert identical(weights(run.path), weights(undisturbed(folder, GROWING)))


def test_a_sweep_and_a_scaling_series_end_in_one_report_each(
    cluster: SlurmBed, tmp_path: Path
) -> None:
    sweep, scaling = (SlurmRun(cluster, tmp_path, name) for name in ("sweep", "scaling"))
    short = (ranks(1, 1), "train.duration=2ep")
    array, together = sweep.submit(*short, "--sweep", "batch.initial=24,48")
    *members, page = scaling.submit(*short, "--nodes", "1,2")
    sweep.finish(together)
    scaling.finish(*members, page)
    assert [cluster.job(number)["NumNodes"] for number in members] == ["1", "2"]
    for run in (sweep, scaling):
        told = run.status()
        points = [Path(point["path"]) for point in told["points"]]
        assert [point["run"]["state"] for point in told["points"]] == ["done", "done"]
        assert set(column(told, "state")) == {"COMPLETED"}
        assert told["next"] == f"nothing: 2 of 2 runs are done; report: {run.path / 'report'}"
        summary = json.loads((run.path / "report" / "summary.json").read_text(encoding="utf-8"))
        assert len(summary["runs"]) == len(points) == 2
        assert (run.path / "report" / "index.html").exists()
    tasks = [job["id"] for job in sweep.status()["jobs"]]
    assert tasks == [f"{array}_0", f"{array}_1", together]
    assert [used(point) for point in points] == [[1], [2]]
    assert identical(weights(points[0]), weights(points[1]))


def test_ranks_without_mpi_are_started_over_ssh(
    cluster: SlurmBed, alone: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path)
    run.finish(*run.submit(ranks(2, 2), "comm.controller=gloo"))
    assert used(run.path) == [2]
    assert identical(weights(run.path), weights(alone))


HOSTILE = 'it\'s "a" $(touch canary) `touch canary`; touch canary & %j #'


def test_names_that_a_shell_would_read_and_a_stop_that_stays_one(
    cluster: SlurmBed, alone: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path / HOSTILE, HOSTILE)
    run.brake(0.1)
    [number] = run.submit(ranks(1, 1), f"name={json.dumps(HOSTILE)}")
    run.wait_for_update(3)
    (run.path / "stop").touch()
    job = cluster.wait(number, ["COMPLETED", "FAILED", "CANCELLED"], PATIENCE)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0")
    told = run.status()
    assert told["run"]["state"] == "stopped"
    assert [note["outcome"] for note in told["history"]] == ["stopped"]

    _, go_on, words = told["next"].partition("go on with: harness ")
    assert go_on, told["next"]
    run.release()
    done = run.harness(*shlex.split(words))
    assert done.returncode == 0, done.stdout + done.stderr
    run.finish(run.jobs()["jobs"][-1]["id"])
    assert identical(weights(run.path), weights(alone))
    assert list(tmp_path.rglob("canary")) == []
    assert len(list((run.path / "slurm").glob("*.out"))) == 2


STUDY = """
name: tiny
title: Two batches
question: Does it run?
base: base.yaml
set: {train.duration: 1ep, lr.scaling: none, lr.warmup: null}
variants: {plain: {}}
grid: {batch.initial: [48, 96]}
tune: {key: lr.base, values: [0.01, 0.05], seeds: [100]}
seeds: [0, 1]
table: [accuracy, updates]
figure: [{kind: lines, y: accuracy}]
findings:
  - {kind: trend, of: updates, a: plain, expect: less, says: Fewer updates}
"""


def test_a_study_is_an_array_of_trials_then_one_of_runs_and_a_page(
    cluster: SlurmBed, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path, "study")
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    (tmp_path / "base.yaml").write_text(
        f"extends: {CONFIG}\nmodel: {{name: 'mine:net'}}\n"
        "batch: {initial: 48, max: null, micro: 12, growth: {policy: fixed}}\n"
        "launch: {interfaces: [eth0]}\nlr: {on_growth: 1.0}\n"
        "ranks: {start: 2, per_node: 1, threads: 1}\n",
        encoding="utf-8",
    )

    def study(*words: str) -> str:
        done = run.harness("study", "study.yaml", "-o", run.path, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    cells = run.path / "cells"
    for _ in range(2):  # of each size two rates; then of each size two seeds
        study("--submit")
        jobs = json.loads((cells / "slurm" / "jobs.json").read_text(encoding="utf-8"))["jobs"]
        assert [job["kind"] for job in jobs[-2:]] == ["sweep", "gather"]
        run.finish(jobs[-1]["id"])
    assert "all runs are over" in study("--submit")
    study("--gather")
    page = (run.path / "tiny.md").read_text(encoding="utf-8")
    assert "| 1 | Fewer updates | " in page
    assert "4 runs and 4 trials" in page
    assert [used(cell) for cell in sorted(cells.glob("plain-*"))] == [[2]] * 4
