"""Submitting jobs to a Slurm that only writes down what it is asked, and what a job does at its
end."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fakeslurm import FakeSlurm, fake_slurm
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from harness.cli import _parser, main
from harness.config import load_config
from harness.jsonl import encode
from harness.rundir import RunDirectory
from harness.schema import Config
from launch import job
from launch.graph import OPTIONS
from launch.jobs import JobList, list_path, parse_jobs, read_list, write_list
from launch.submit import submit_successor

DEMO = str(ROOT / "configs" / "adabatch-digits.yaml")
CHAIN = "ranks={start: 2, max: 8, per_node: 2}"
GROWING = "batch={growth: {policy: noise}, initial: 128}"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return fake_slurm(tmp_path, monkeypatch)


def submitted(*words: str) -> JobList:
    assert main(["submit", DEMO, *words, "--run-dir", "r"]) == 0
    return read_list(Path("r"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    before = sorted(Path.cwd().rglob("*"))
    assert main(["submit", DEMO, *words]) == 2
    assert sorted(Path.cwd().rglob("*")) == before
    return capsys.readouterr().err


def config_of(run: str = "r") -> Config:
    return load_config(Path(run) / "slurm" / "config.yaml")


# What is submitted


@pytest.mark.smoke
def test_a_chain_is_submitted_job_after_job(slurm: FakeSlurm) -> None:
    jobs = submitted("batch.micro=16", CHAIN, "--partition=debug", "--time", "30")
    own = Path("r/slurm").absolute()
    tied = ["--kill-on-invalid-dep=yes"]
    assert slurm.calls() == [
        ["sbatch", "--parsable", f"{own}/job-0.sbatch"],
        ["sbatch", "--parsable", "--dependency=afterok:101", *tied, f"{own}/job-1.sbatch"],
        ["sbatch", "--parsable", "--dependency=afterok:102", *tied, f"{own}/job-2.sbatch"],
    ]
    assert [(one.id, one.ranks, one.nodes, one.segment) for one in jobs.jobs] == [
        ("101", 2, 1, 0),
        ("102", 4, 2, 1),
        ("103", 8, 4, 2),
    ]
    assert {one.options["partition"] for one in jobs.jobs} == {"debug"}
    assert {one.options["time"] for one in jobs.jobs} == {"30"}
    assert not RunDirectory(Path("r")).holds_run


def test_the_job_runs_what_was_submitted(slurm: FakeSlurm, tmp_path: Path) -> None:
    source = tmp_path / "mine.yaml"
    source.write_text(f"extends: {DEMO}\nseed: 5\n")
    assert main(["submit", str(source), "lr.base=0.5", "--run-dir", "r", "--hold"]) == 0
    source.write_text(f"extends: {DEMO}\nseed: 6\n")
    stored = config_of()
    assert (stored.seed, stored.lr.base, stored.slurm.options) == (5, 0.5, {"hold": None})
    assert "mine.yaml" not in Path("r/slurm/job-0.sbatch").read_text()


def test_data_are_found_from_any_directory(slurm: FakeSlurm) -> None:
    submitted("data={dataset: synthetic, size: 1000, classes: 10}")
    assert config_of().data.root is None
    recipe = str(ROOT / "configs/adabatch/cifar100-resnet20-adaptive-1024.yaml")
    assert main(["submit", recipe, "data.root=c100", "--run-dir", "s"]) == 0
    assert config_of("s").data.root == str(Path("c100").absolute())


def test_growth_by_measurement_is_submitted_as_one_job(slurm: FakeSlurm) -> None:
    jobs = submitted(CHAIN, GROWING)
    assert [(one.ranks, one.nodes) for one in jobs.jobs] == [(2, 1)]


def test_ranks_from_start_to_end_are_one_job(slurm: FakeSlurm) -> None:
    jobs = submitted("ranks.per_node=1", "--ranks", "2")
    assert [(one.ranks, one.nodes) for one in jobs.jobs] == [(2, 2)]
    assert (config_of().ranks.start, config_of().ranks.max) == (2, 2)


@pytest.mark.smoke
def test_a_dry_run_writes_scripts_and_commands_that_a_shell_takes(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", DEMO, "batch.micro=16", CHAIN, "--run-dir", "a b", "--dry-run"]) == 0
    assert slurm.calls() == []
    assert not list_path(Path("a b")).exists()
    names = sorted(path.name for path in Path("a b/slurm").glob("*.sbatch"))
    assert names == ["job-0.sbatch", "job-1.sbatch", "job-2.sbatch"]
    told = [line for line in capsys.readouterr().out.splitlines() if "sbatch --parsable" in line]
    subprocess.run(["bash", "-euc", "\n".join(told)], check=True)
    dry = slurm.calls()
    (slurm.folder / "calls").unlink()
    (slurm.folder / "number").write_text("100\n")
    assert main(["submit", DEMO, "batch.micro=16", CHAIN, "--run-dir", "a b"]) == 0
    assert slurm.calls() == dry


def test_a_sweep_is_an_array_and_a_report(slurm: FakeSlurm) -> None:
    jobs = submitted(
        "--sweep", "lr.base=0.1,0.2", "--sweep", "model={name: lenet5},{name: resnet20}"
    )
    assert [call[2:] for call in slurm.calls("sbatch")] == [
        [str(Path("r/slurm/sweep.sbatch").absolute())],
        ["--dependency=afterany:101", str(Path("r/slurm/gather.sbatch").absolute())],
    ]
    assert [point.settings for point in jobs.points] == [
        [f"lr.base={rate}", f'model={{"name": "{name}"}}']
        for rate in ("0.1", "0.2")
        for name in ("lenet5", "resnet20")
    ]
    for point in jobs.points:
        stored = config_of(f"r/{point.directory}")
        assert f"lr.base={stored.lr.base}" == point.settings[0]
        assert stored.model.name in point.settings[1]
    assert jobs.jobs[0].options["array"] == "0-3"


def test_values_of_a_sweep_are_yaml(slurm: FakeSlurm) -> None:
    growth = "batch.growth={policy: fixed},{policy: geometric, every: 5ep, factor: 2}"
    jobs = submitted("--sweep", growth, "--sweep", "train.eval_every=1ep,null,2ep")
    stored = [config_of(f"r/{point.directory}") for point in jobs.points]
    assert [one.batch.growth.policy for one in stored] == ["fixed"] * 3 + ["geometric"] * 3
    assert [str(one.train.eval_every) for one in stored] == ["1ep", "None", "2ep"] * 2
    assert jobs.points[0].settings[1] == "train.eval_every=1ep"


def test_a_sweep_can_be_kept_small(slurm: FakeSlurm) -> None:
    jobs = submitted("--sweep", "seed=1,2,3", "--limit", "2")
    assert jobs.jobs[0].options["array"] == "0-2%2"


def test_a_scaling_series_has_a_job_for_each_size(slurm: FakeSlurm) -> None:
    jobs = submitted("--nodes", "1,2", "ranks={start: 1, per_node: 1}")
    assert [(one.name, one.ranks, one.nodes, one.after) for one in jobs.jobs] == [
        ("nodes-1", 1, 1, []),
        ("nodes-2", 2, 2, []),
        ("gather", 1, 1, ["101", "102"]),
    ]
    assert [config_of(f"r/nodes-{n}").ranks.start for n in (1, 2)] == [1, 2]
    assert [config_of(f"r/nodes-{n}").ranks.max for n in (1, 2)] == [1, 2]


def test_a_probe_may_have_more_ranks_than_the_run(slurm: FakeSlurm) -> None:
    jobs = submitted("--probe", "--ranks", "64", "ranks.per_node=8")
    assert [(one.kind, one.ranks, one.nodes) for one in jobs.jobs] == [("probe", 64, 8)]


def test_jobs_of_a_job_are_not_taken_for_repeated_ones(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submitted()
    seen = (slurm.folder / "env-101").read_text()
    assert "SLURM_RESTART_COUNT" not in seen
    assert "SLURM_CONF=/etc/slurm.conf" in seen


def test_every_option_of_the_parser_is_known_as_the_harness_s_own() -> None:
    parser = _parser()._subparsers._group_actions[0].choices["submit"]  # type: ignore
    known = {word[2:] for word in parser._option_string_actions if word.startswith("--")}
    assert known == OPTIONS


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr.base=x"], "lr.base: must be a number"),
        (["lr.warmup={duration: 100ep}"], "longer than"),
        (["-p", "x"], "-p is neither an option of the harness nor a long one of sbatch"),
        (["--Part=x"], "--Part=x is neither"),
        (["--array=1-3"], "array is settled by harness submit --sweep"),
        (["--nodelist=a\nb"], "nodelist must be|one printable line"),
        (["--comment="], "must not be empty"),
        (["--requeue"], "settled by slurm.requeue"),
        (["--ranks", "0"], "at least 1 rank"),
        (["--ranks", "3"], "makes 2 for 3 ranks"),
        (["--nodes", "1,2"], "--nodes needs ranks.per_node"),
        (["--nodes", "1,,2", "ranks.per_node=1"], "numbers of nodes such as 1,2,4"),
        (["--nodes", "1,1", "ranks.per_node=1"], "can stand there once"),
        (["--nodes", "1", "--ranks", "1"], "omit --ranks"),
        (["--nodes", "1", "--probe"], "--nodes and --probe cannot be had together"),
        (["--sweep", "lr.base"], "write KEY=VALUE,VALUE"),
        (["--sweep", "=1,2"], "write KEY=VALUE,VALUE"),
        (["--sweep", "lr.base=0.1,,0.2"], "--sweep lr.base=0.1,,0.2.*not valid YAML"),
        (["--sweep", "lr.base={"], "not valid YAML"),
        (["--sweep", "slurm.time=1,2"], "have one of these"),
        (["--sweep", "lr.base=0.1,x"], "lr.base: must be a number"),
        (["--sweep", "seed=" + ",".join(map(str, range(1001)))], "1001 points are more than"),
        (["--sweep", "ranks={start: 1},{start: 2}"], "other ranks and nodes"),
        (["--limit", "2"], "with --sweep"),
        (["--resume"], "--resume needs --run-dir"),
        (["--resume", "--run-dir", "r"], "holds no run to resume"),
        (["slurm.gpus_per_node=1"], "set ranks.per_node=1"),
        (["ranks={start: 1, max: 4}", GROWING, "slurm.gpus_per_node=2"], "set ranks.per_node=2"),
        (["--run-dir", "a\nb"], "do not print"),
        (["data.dataset=cifar10"], "data.root is not set"),
    ],
    ids=lambda value: None,
)
def test_what_is_refused_leaves_nothing(
    words: list[str], message: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(capsys, *words))
    assert slurm.calls() == []


@given(
    st.sampled_from(["--{}", "--comment={}", "--sweep=seed={}", "--sweep={}", "--nodes={}", "-{}"]),
    st.text(st.characters(exclude_characters="\0"), max_size=20),
)
def test_any_words_are_submitted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, form: str, text: str
) -> None:
    folder = tmp_path_factory.mktemp("work")
    try:
        code = main(
            ["submit", DEMO, form.format(text), "--dry-run", "--run-dir", str(folder / "r")]
        )
    except SystemExit as usage:
        code = int(usage.code or 0)
    assert code in (0, 2)
    assert (folder / "r").exists() <= (code == 0)


def test_a_directory_with_a_run_is_left_alone(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r").mkdir()
    Path("r/config.yaml").write_text("name: x\n")
    assert "already holds a run" in refused(capsys, "--run-dir", "r")


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_directory_with_jobs_is_left_alone(
    words: list[str], slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted()
    slurm.job(101, "PENDING")
    told = refused(capsys, "--run-dir", "r", *words)
    assert "in use by job 101 (PENDING); wait, or end it with scancel" in told
    slurm.sets("down")
    assert "whether they have ended cannot be told" in refused(capsys, "--run-dir", "r", *words)
    (slurm.folder / "down").unlink()
    slurm.job(101, "CANCELLED")
    assert [one.id for one in submitted().jobs] == ["102"]
    (slurm.folder / "job-102").unlink(missing_ok=True)  # Slurm has forgotten it
    assert [one.id for one in submitted().jobs] == ["103"]


def test_what_sbatch_refuses_leaves_no_half_of_a_chain(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.sets("refuse-103")
    told = refused(capsys, "--run-dir", "r", "batch.micro=16", CHAIN)
    assert told == "harness: sbatch: error: no such partition\n"
    assert slurm.calls("scancel") == [["scancel", "101", "102"]]


def test_what_sbatch_says_must_name_a_job(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.sets("before", "welcome to this cluster\n")
    assert submitted().jobs[0].id == "101"
    slurm.sets("after", "your budget is spent\n")
    assert "names no job, but says: welcome" in refused(capsys, "--run-dir", "s")


def test_without_slurm_the_message_says_where_it_is(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch is not on PATH" in refused(capsys, "--run-dir", "r")


def test_a_broken_list_of_jobs_is_told(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r/slurm").mkdir(parents=True)
    for text in ("", "[]", "{}", '{"jobs": [{"id": 1}], "points": []}', "\x00"):
        Path("r/slurm/jobs.json").write_text(text)
        assert "r/slurm/jobs.json cannot be read" in refused(capsys, "--run-dir", "r")


# Going on


def stopped_run(ranks: int, wanted: int | None = None) -> None:
    """A run in r/ that has stopped."""
    run = Path("r")
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_bytes((run / "slurm" / "config.yaml").read_bytes())
    events = [
        {"kind": "start", "update": 0, "ranks": ranks, "attempt": 1},
        {"kind": "stop", "update": 9, "ranks_wanted": wanted, "reason": "asked to stop"},
    ]
    (run / "events.jsonl").write_bytes(b"".join(map(encode, events)))


def test_a_stopped_chain_goes_on_with_what_is_left(slurm: FakeSlurm) -> None:
    submitted("batch.micro=16", CHAIN)
    stopped_run(4)
    words = ["submit", "r/slurm/config.yaml", "--run-dir", "r", "--resume"]
    assert main(words) == 0
    assert [(one.ranks, one.segment) for one in read_list(Path("r")).jobs] == [(4, 1), (8, 2)]


def test_a_run_can_go_on_with_other_ranks(slurm: FakeSlurm) -> None:
    submitted("batch.micro=16", CHAIN)
    stopped_run(4)
    words = ["submit", "r/slurm/config.yaml", "--run-dir", "r", "--resume", "--ranks", "3"]
    assert main(words) == 0
    assert [(one.ranks, one.nodes) for one in read_list(Path("r")).jobs] == [(3, 2)]
    assert "--go-on --ranks 3 &" in Path("r/slurm/job-0.sbatch").read_text()


def test_another_configuration_does_not_go_on(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted()
    stopped_run(2)
    assert main(["submit", DEMO, "seed=9", "--run-dir", "r", "--resume"]) == 2
    assert "seed: 0 → 9" in capsys.readouterr().err


def test_a_finished_run_is_left_alone(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    submitted()
    stopped_run(2)
    with Path("r/events.jsonl").open("ab") as file:
        file.write(encode({"kind": "end", "update": 9}))
    assert main(["submit", DEMO, "--run-dir", "r", "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert len(slurm.calls("sbatch")) == 1


# A job's end


def end(number: int = 101, restarts: int = 0, *words: str) -> tuple[int, str]:
    """What the batch script calls after code 75, in a process of its own: it blocks signals."""
    environment = {**os.environ, "SLURM_JOB_ID": str(number), "PYTHONPATH": str(ROOT)}
    if restarts:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(
        [sys.executable, "-m", "launch.job", "r", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def warn(number: int = 101, run: str = "r") -> None:
    (Path(run) / "slurm" / f"warned-{number}").touch()


def test_the_next_of_the_chain_goes_on(slurm: FakeSlurm) -> None:
    submitted("batch.micro=16", CHAIN)
    stopped_run(2, wanted=4)
    slurm.job(102, "PENDING", reason="Dependency")
    code, said = end()
    assert (code, said) == (0, "harness: wants 4 ranks, which job 102 is for\n")
    assert len(slurm.calls("sbatch")) == 3
    (noted,) = read_list(Path("r")).history
    assert (noted["job"], noted["outcome"], noted["ranks_wanted"]) == ("101", "handed on", 4)


def test_growth_by_measurement_submits_the_next_job(slurm: FakeSlurm) -> None:
    submitted(CHAIN, GROWING, "--partition=debug")
    stopped_run(2, wanted=5)
    code, said = end()
    assert code == 0
    assert "submitted job 102 with 3 nodes" in said
    tied = ["--dependency=afterok:101", "--kill-on-invalid-dep=yes"]
    script = Path("r/slurm/job-1.sbatch").absolute()
    assert slurm.calls("sbatch")[1] == ["sbatch", "--parsable", *tied, str(script)]
    text = script.read_text()
    assert "#SBATCH --nodes=3\n#SBATCH --ntasks=5\n" in text
    assert "#SBATCH --partition=debug\n" in text
    jobs = read_list(Path("r"))
    assert [(one.id, one.ranks, one.after) for one in jobs.jobs] == [
        ("101", 2, []),
        ("102", 5, ["101"]),
    ]


def test_a_job_that_is_repeated_does_not_submit_the_next_one_twice(slurm: FakeSlurm) -> None:
    submitted(CHAIN, GROWING)
    stopped_run(2, wanted=4)
    assert end()[0] == 0
    slurm.job(102, "PENDING")
    assert end(restarts=1)[0] == 0
    assert len(slurm.calls("sbatch")) == 2


def test_a_next_job_that_was_cancelled_is_submitted_anew(slurm: FakeSlurm) -> None:
    submitted("batch.micro=16", CHAIN)
    stopped_run(2, wanted=4)
    slurm.job(102, "CANCELLED")
    assert end()[0] == 0
    assert read_list(Path("r")).jobs[-1].after == ["101"]
    assert len(slurm.calls("sbatch")) == 4


def test_a_warned_job_is_queued_again_and_ends(slurm: FakeSlurm) -> None:
    submitted()
    stopped_run(2)
    warn()
    slurm.job(101, "RUNNING", restarts=2)
    code, said = end(restarts=2)
    assert code == 75
    assert "queueing this job again" in said
    assert slurm.calls("scontrol")[-1] == ["scontrol", "requeue", "101"]
    (noted,) = read_list(Path("r")).history
    assert (noted["restarts"], noted["outcome"]) == (2, "queued again")


def test_a_job_that_was_warned_while_it_started_is_queued_again(slurm: FakeSlurm) -> None:
    submitted()
    warn()
    slurm.job(101, "RUNNING")
    assert end()[0] == 75
    assert slurm.calls("scontrol")[-1] == ["scontrol", "requeue", "101"]


def test_a_preemption_that_reached_the_ranks_alone_is_queued_again(slurm: FakeSlurm) -> None:
    """By default Slurm sends its SIGTERM to the job's steps, and not to the script."""
    submitted()
    stopped_run(2)
    slurm.job(101, "RUNNING")
    assert end()[0] == 75
    assert slurm.calls("scontrol")[-1] == ["scontrol", "requeue", "101"]


def test_a_request_to_stop_holds_until_the_run_is_submitted_again(slurm: FakeSlurm) -> None:
    submitted()
    stopped_run(2)
    stop = Path("r/stop")
    stop.touch()
    assert main(["run", "r/slurm/config.yaml", "--run-dir", "r", "--go-on"]) == 75
    assert stop.exists()
    slurm.job(101, "FAILED")
    assert main(["submit", "r/slurm/config.yaml", "--run-dir", "r", "--resume"]) == 0
    assert not stop.exists()


@pytest.mark.parametrize(
    ("state", "restarts"),
    [("CANCELLED", 0), ("PENDING", 1), ("RUNNING", 1), ("COMPLETING", 0), ("PREEMPTED", 0)],
)
def test_a_job_that_slurm_has_done_with_is_not_queued_again(
    state: str, restarts: int, slurm: FakeSlurm
) -> None:
    """It may be cancelled, queued again by its preemption, or run elsewhere by now."""
    submitted()
    stopped_run(2)
    warn()
    slurm.job(101, state, restarts)
    code, said = end()
    assert code == 75
    assert (state if restarts == 0 else "started again elsewhere") in said
    assert not [call for call in slurm.calls("scontrol") if call[1] == "requeue"]


@pytest.mark.parametrize(
    ("settings", "restarts", "warned", "told"),
    [
        ((), 0, False, "stopped as asked"),
        (("slurm.requeue=false",), 0, True, "slurm.requeue is off"),
        (("slurm.max_requeues=2",), 2, True, "after 2 requeues"),
    ],
)
def test_a_job_that_stays_stopped_says_how_to_go_on(
    settings: tuple[str, ...], restarts: int, warned: bool, told: str, slurm: FakeSlurm
) -> None:
    submitted(*settings)
    stopped_run(2)
    if warned:
        warn()
    else:
        Path("r/stop").touch()
    slurm.job(101, "RUNNING", restarts)
    code, said = end(restarts=restarts)
    assert code == 75
    assert told in said
    assert "go on with: harness submit r/slurm/config.yaml --run-dir r --resume" in said
    assert not [call for call in slurm.calls("scontrol") if "requeue" in call]
    words = shlex.split(said.partition("go on with: harness ")[2])
    slurm.job(101, "FAILED")
    assert main(words) == 0


def test_an_attempt_that_slurm_has_lost_sight_of_leaves_the_run_to_the_next(
    slurm: FakeSlurm,
) -> None:
    """The next one, elsewhere, has asked it to stop."""
    submitted()
    stopped_run(2)
    slurm.job(101, "RUNNING", restarts=1)
    code, said = end(restarts=0)
    assert code == 75
    assert "started again elsewhere" in said
    assert "go on with" not in said
    assert read_list(Path("r")).history[-1]["outcome"] == "left to Slurm"


def test_a_requeue_that_is_refused_ends_the_job(slurm: FakeSlurm) -> None:
    submitted()
    stopped_run(2)
    warn()
    slurm.job(101, "RUNNING")
    slurm.sets("stays")
    code, said = end()
    assert code == 75
    assert "Job is not requeueable; go on with: harness submit" in said


def test_a_member_of_a_series_is_queued_again_by_itself(slurm: FakeSlurm) -> None:
    submitted("--nodes", "1,2", "ranks={start: 1, per_node: 1}")
    Path("r/slurm/warned-102").touch()  # another one's
    warn(102, "r/nodes-2")
    slurm.job(102, "RUNNING")
    environment = {**os.environ, "SLURM_JOB_ID": "102", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "launch.job", "r/nodes-2", "--base", "r"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert slurm.calls("scontrol")[-1] == ["scontrol", "requeue", "102"]
    assert read_list(Path("r")).history[-1]["job"] == "102"


def test_a_job_s_end_outside_of_a_job(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["r"]) == 2
    assert "SLURM_JOB_ID is not set" in capsys.readouterr().err


def test_a_successor_keeps_the_working_directory(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submitted(CHAIN, GROWING)
    before = os.getcwd()
    monkeypatch.chdir(tmp_path)
    submit_successor(Path(before) / "r", "101", 4)
    text = (Path(before) / "r/slurm/job-1.sbatch").read_text()
    assert f"#SBATCH --chdir={before}\n" in text


# What Slurm says


def test_what_scontrol_says_is_read() -> None:
    text = (
        "JobId=7 ArrayJobId=5 ArrayTaskId=2 JobName=x JobState=RUNNING Reason=None Restarts=3 "
        "ExitCode=0:9 StartTime=2026-01-02T03:04:05 EndTime=Unknown NodeList=(null) "
        "Comment=JobState=FAILED Restarts=8\n"
        "JobId=5 ArrayJobId=5 ArrayTaskId=3-9%2 JobState=PENDING Reason=JobArrayTaskLimit\n\nx\n"
    )
    first, second = parse_jobs(text)
    assert (first.id, first.state, first.restarts, first.reason) == ("5_2", "RUNNING", 3, None)
    assert (first.started, first.ended, first.nodes) == ("2026-01-02T03:04:05", None, None)
    assert (second.id, second.state, second.over) == ("5_3-9%2", "PENDING", False)


def test_the_list_of_jobs_is_read_as_it_is_written(slurm: FakeSlurm) -> None:
    jobs = submitted("--sweep", "seed=1,2")
    jobs.note("101", 1, "queued again", "warned", ranks_wanted=4)
    write_list(Path("r"), jobs)
    assert read_list(Path("r")) == jobs
    assert json.loads(list_path(Path("r")).read_text())["kind"] == "sweep"
