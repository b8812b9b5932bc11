"""Where a run and its jobs are, as far as records and Slurm tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakeslurm import FakeSlurm, fake_slurm
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from harness.cli import main
from harness.jsonl import encode
from launch.jobs import State, Submitted, parse_jobs, read_list
from launch.status import UNKNOWN, hint, read_status

DEMO = str(ROOT / "configs" / "adabatch-digits.yaml")
CHAIN = ("batch.micro=16", "ranks={start: 2, max: 8, per_node: 2}")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return fake_slurm(tmp_path, monkeypatch)


def line(**fields: Any) -> dict[str, Any]:
    return {
        "update": 20, "samples_seen": 1280, "epoch": 0.9, "stage": 1, "ranks": 2, "accumulation": 4,
        "micro_batch": 16, "global_batch": 128, "images_per_sec": 1234.5, **fields,
    }  # fmt: skip


def write_run(path: Path, *events: dict[str, Any], metrics: int = 2) -> None:
    """A run directory with these events."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text("name: digits\n")
    (path / "plan.json").write_text('{"totals": {"samples": 12800}}')
    lines = [line(update=10 * i, samples_seen=640 * i) for i in range(1, metrics + 1)]
    (path / "metrics.jsonl").write_bytes(b"".join(map(encode, lines)))
    (path / "events.jsonl").write_bytes(b"".join(map(encode, events)))


START = {"kind": "start", "ranks": 2, "attempt": 1}
SAVED = {"kind": "checkpoint", "file": "update-00000020.pt", "samples_seen": 1280}
FAULT = {"kind": "fault", "time": "2026-01-02T03:04:05", "reason": "rank 1 was killed"}
AGAIN = {"kind": "resume", "ranks": 2, "attempt": 2, "updates_repeated": 7}
STOP = {"kind": "stop", "reason": "asked to stop", "ranks_wanted": None}
END = {"kind": "end"}


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["status", *words]) == 0
    return capsys.readouterr().out


def test_a_run_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    write_run(tmp_path / "r", START, SAVED, FAULT, AGAIN)
    assert shown(capsys, str(tmp_path / "r")) == (
        "run: running\n"
        "samples seen: 1,280 of 12,800 (10%), epoch 0.90\n"
        "stage 1: batch 128 = 2 × 4 × 16, 1,234 images/s\n"
        "newest checkpoint: update-00000020.pt\n"
        "attempts: 2, updates repeated: 7\n"
        "  2026-01-02T03:04:05 fault: rank 1 was killed\n"
        f"next: go on unless it still runs elsewhere with: harness run {tmp_path}/r/config.yaml "
        f"--run-dir {tmp_path}/r --resume\n"
    )


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "not started"),
        ([START], "running"),
        ([START, SAVED, STOP], "stopped"),
        ([START, FAULT], "failed"),
        ([START, STOP, AGAIN], "running"),
        ([START, FAULT, AGAIN, END], "done"),
    ],
)
def test_the_state_is_what_was_recorded_last(
    events: list[dict[str, Any]], state: str, tmp_path: Path
) -> None:
    write_run(tmp_path, *events)
    assert read_status(tmp_path).run.state == state


json_values = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats()
records = st.dictionaries(
    st.sampled_from([*line(), "kind", "file", "reason", "time", "updates_repeated"]),
    json_values | st.lists(json_values, max_size=2) | st.sampled_from(["start", "stop", "end"]),
    max_size=6,
)


@given(st.lists(records, max_size=4), st.lists(records, max_size=4))
def test_any_records_have_a_status(
    tmp_path_factory: pytest.TempPathFactory,
    metrics: list[dict[str, Any]],
    events: list[dict[str, Any]],
) -> None:
    path = tmp_path_factory.mktemp("run")
    write_run(path, *events)
    (path / "metrics.jsonl").write_bytes(b"".join(map(encode, metrics)) + b'{"half')
    assert main(["status", str(path)]) == 0
    assert main(["status", str(path), "--json"]) == 0


def test_jobs_are_shown_with_what_slurm_says(
    cluster: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", DEMO, *CHAIN, "--run-dir", "r"]) == 0
    cluster.job(101, "RUNNING", restarts=1)
    cluster.job(102, "PENDING", reason="Dependency")
    write_run(Path("r"), START, SAVED)
    first, second, third = read_status(Path("r")).jobs
    assert (first.state, first.restarts, first.started) == ("RUNNING", 1, "2026-01-02T03:04:05")
    assert (second.state, second.reason, second.after) == ("PENDING", "Dependency", ["101"])
    assert third.state == UNKNOWN
    text = shown(capsys, "r")
    assert "next: job 101 runs, then job 102 on 4 ranks\n" in text
    assert text.splitlines()[1].split()[:6] == ["101", "job-0", "0", "1", "2", "RUNNING"]


def test_a_job_that_has_failed_is_named(
    cluster: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", DEMO, *CHAIN, "--run-dir", "r"]) == 0
    cluster.job(101, "FAILED", reason="NonZeroExitCode")
    cluster.job(102, "CANCELLED", reason="DependencyNeverSatisfied")
    text = shown(capsys, "r")
    assert "next: job 101 has failed: see its output in r/slurm; submit it with: harness" in text
    assert "scancel" not in text  # it has ended already


def test_json_tells_the_same(cluster: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", DEMO, *CHAIN, "--run-dir", "r"]) == 0
    cluster.job(101, "PENDING", reason="Priority")
    told = json.loads(shown(capsys, "r", "--json"))
    assert told == read_status(Path("r")).as_dict()
    assert told["jobs"][0]["state"] == "PENDING"
    assert told["next"] == "job 101 is queued (Priority)"
    assert told["run"]["state"] == "not started"


def test_a_slurm_that_does_not_answer_is_no_obstacle(
    cluster: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", DEMO, "--run-dir", "r"]) == 0
    write_run(Path("r"), START, SAVED, STOP)
    cluster.sets("down")
    text = shown(capsys, "r")
    assert "states of jobs are not known: scontrol: error: Unable to contact controller" in text
    assert "go on with: harness submit r/slurm/config.yaml --run-dir r --resume" in text


def test_a_series_has_a_line_for_each_run(
    cluster: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", DEMO, "--sweep", "seed=1,2,3", "--run-dir", "r"]) == 0
    first, second, third = (Path("r") / one.directory for one in read_list(Path("r")).points)
    write_run(first, START, END)
    write_run(second, START, SAVED)
    lines = shown(capsys, "r").splitlines()
    (begin,) = (i for i, text in enumerate(lines) if text.startswith("run "))
    rows = [text.split() for text in lines[begin + 1 : begin + 4]]
    assert [row[0] for row in rows] == [first.name, second.name, third.name]
    assert [row[1] for row in rows] == ["done", "running", "not"]
    assert lines[-1] == "next: nothing: 1 of 3 runs are done; report: r/report"
    assert [one["run"]["state"] for one in json.loads(shown(capsys, "r", "--json"))["points"]] == [
        "done",
        "running",
        "not started",
    ]


def test_tasks_of_an_array_are_jobs_of_their_own(cluster: FakeSlurm) -> None:
    assert main(["submit", DEMO, "--sweep", "seed=1,2,3", "--run-dir", "r"]) == 0
    cluster.sets(
        "job-101",
        "JobId=103 ArrayJobId=101 ArrayTaskId=0 JobState=RUNNING Restarts=0\n"
        "JobId=101 ArrayJobId=101 ArrayTaskId=1-2 JobState=PENDING Reason=Resources\n",
    )
    states = [(one.id, one.state) for one in read_status(Path("r")).jobs]
    assert states == [("101_0", "RUNNING"), ("101_1-2", "PENDING"), ("102", UNKNOWN)]


def test_what_was_only_rendered_is_to_be_submitted(
    cluster: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", DEMO, "--run-dir", "r", "--dry-run"]) == 0
    assert shown(capsys, "r").endswith("again without --dry-run\n")
    assert main(["submit", "r/slurm/config.yaml", "--run-dir", "r"]) == 0
    assert "next: submit it with: harness submit r/slurm/config.yaml" in shown(capsys, "r")


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_what_is_no_run_is_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert main(["status", str(tmp_path / name)]) == 2
    assert "no run and no batch jobs" in capsys.readouterr().err.replace("holds ", "")


JOB = Submitted("job-1", "job", "7", 2, 1, 1, ["6"], "afterok", {}, "job-1.sbatch", "")


@pytest.mark.parametrize(
    ("state", "reason", "told"),
    [
        ("PENDING", "DependencyNeverSatisfied", "scancel 7, and submit again with --resume"),
        ("PENDING", "JobHeldUser", "is held by you; scontrol release 7"),
        ("PENDING", "JobHeldAdmin", "held by the cluster's staff"),
        ("PENDING", "launch_failed_requeued_held", "scontrol release 7"),
        ("REQUEUE_HOLD", "None", "sinfo -R"),
        ("SPECIAL_EXIT", "None", "sinfo -R"),
        ("PENDING", "PartitionTimeLimit", "the partition never gives"),
        ("PENDING", "Resources", None),
        ("PENDING", "Dependency", None),
        ("RUNNING", "None", None),
    ],
)
def test_what_is_stuck_has_a_hint(state: str, reason: str, told: str | None) -> None:
    (found,) = parse_jobs(f"JobId=7 JobState={state} Reason={reason}\n")
    said = hint(found, JOB)
    assert (told is None) == (said is None)
    assert told is None or (said is not None and told in said)


@given(st.text(max_size=60))
def test_any_words_of_slurm_are_read(text: str) -> None:
    assert all(isinstance(one, State) for one in parse_jobs(text))
