"""Hosts, what Slurm and launchers tell, and what launchers say: an answer or one message."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from fuzzing import HOSTILE_TEXTS, WATCH, Said, command, damaged, fuzz, words_of
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from harness import environment
from harness.errors import LaunchError
from launch import deaths, detect, job
from launch.hosts import expand_nodelist, parse_hosts, slurm_hosts
from launch.jobs import parse_jobs

DEMO = str(ROOT / "configs" / "adabatch-digits.yaml")
LAUNCHERS = ("horovodrun", "mpirun", "srun", "local")
SAFE = ("launch.mpi=openmpi4", "launch.srun_mpi=pmix", "batch.micro=8")
"""So that nothing is asked of the machine."""
pieces = words_of(
    (
        *("n1", "node-2", "a.b", "localhost", "127.0.0.1", "[::1]", "-oProxyCommand=x", "--", "-"),
        *(":", ":4", ",", " ", "=", "slots=", "max_slots=2", "#", "[", "]", "[1-3]", "[001-100]"),
        *("[1-999999999999]", "0-9", "(x3)", "2(x3),1", "1", "0", "07", "99999999999999999999"),
        *HOSTILE_TEXTS,
    )
)
variables = st.dictionaries(
    st.sampled_from(
        [
            *("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS"),
            *("SLURM_JOB_CPUS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_PROCID", "SLURM_LOCALID"),
            *("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE", "SLURM_RESTART_COUNT"),
            *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "HOROVOD_RANK", "HOROVOD_SIZE"),
            *("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT", "PMI_RANK", "RANK"),
            *("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
            *("HARNESS_WORLD_SIZE", "HARNESS_GROW", "HARNESS_LAUNCHED_AT", "HARNESS_MEASURE"),
            *("HARNESS_RANKS_PER_GPU", "HARNESS_MPS", "HARNESS_ELASTIC", "OMP_NUM_THREADS"),
            *("CUDA_VISIBLE_DEVICES", "COLUMNS", "LINES"),
        ]
    ),
    pieces.filter(lambda text: "\0" not in text and _encodable(text)),
    max_size=6,
)


def _encodable(text: str) -> bool:
    try:
        return os.fsencode(text) is not None
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def told(settings: Mapping[str, str]) -> Iterator[None]:
    """An environment with these variables, and nothing that could be started."""
    before = dict(os.environ)
    os.environ.update(settings)
    os.environ["PATH"] = "/nowhere"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def dry_run(*words: str, launcher: str = "horovodrun") -> Said:
    """`harness run --dry-run`: a command line in which no host is an option, or one message."""
    run_dir = Path("/nowhere/at/all")
    with WATCH.watching() as done:
        said = command(
            "run", DEMO, *SAFE, "--run-dir", run_dir, "--dry-run", "--launcher", launcher, *words
        )
    allowed = ("socket.bind",)  # how it is told whether an address is this machine's
    assert [event for event, _ in done if event not in allowed] == []
    if said.code == 0:
        read = shlex.split(said.out)
        assert read[0] == "env"
    else:
        assert all(line.isprintable() for line in said.err.splitlines()), said.err
    return said


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are not looked up: a resolver may take seconds for each."""
    monkeypatch.setattr("launch.preflight.is_local", lambda name: name == "localhost")
    monkeypatch.setattr("launch.assemble.is_local", lambda name: name == "localhost")


@fuzz(25)
@given(pieces, st.sampled_from(LAUNCHERS))
def test_hosts(text: str, launcher: str) -> None:
    with told({}):
        dry_run(f"--hosts={text}", launcher=launcher)


@pytest.mark.parametrize("text", ["--", "", ",", "-", "a:--", "--hosts=--"])
def test_hosts_that_are_none(text: str) -> None:
    assert dry_run(f"--hosts={text}").code == 2


@fuzz(20)
@given(st.data())
def test_host_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    good = b"# ours\nn1 slots=4\nn2:2\nn3 max_slots = 8 slots=2\nn4\nn4\n"
    content = data.draw(damaged(good) | pieces.map(lambda t: t.encode("utf-8", "replace")))
    path = tmp_path_factory.getbasetemp() / "hostfile"
    path.write_bytes(content)
    with told({}):
        dry_run(f"--hostfile={path}")


@fuzz(30)
@given(variables)
def test_what_slurm_tells(settings: dict[str, str]) -> None:
    with told(settings):
        dry_run("--ranks", "1")
        with contextlib.suppress(LaunchError):
            slurm_hosts(os.environ)


@fuzz(50)
@given(variables)
def test_what_launchers_tell_a_rank(settings: dict[str, str]) -> None:
    """Numbers, or that nothing is known."""
    with told(settings):
        for ask in (
            environment.promised_world_size,
            environment.launched_world_size,
            environment.launched_rank,
            environment.launched_local_size,
            environment.launched_local_rank,
            environment.horovodrun_store,
            environment.elastic_bounds,
            environment.promised_cores,
            environment.growth_limit,
            environment.seconds_since_launch,
            environment.ranks_per_gpu,
            environment.seconds_to_measure,
            environment.wants_mps,
        ):
            ask()


@fuzz(50)
@given(pieces)
def test_node_lists(text: str) -> None:
    for read in (expand_nodelist, parse_hosts):
        with contextlib.suppress(LaunchError):
            names = [getattr(host, "name", host) for host in read(text)]
            assert all(not name.startswith("-") and name.isprintable() for name in names)


@pytest.mark.parametrize(
    "text",
    [
        "n[1-100000],m[1-100000]",
        "n[0-9][0-9][0-9][0-9][0-9][0-9][0-9]",
        "n[1-999999999999999999]",
        "[" * 10_000,
        "n[" + "1," * 200_000 + "1]",
        "a," * 200_000 + "a",
        "n[000000000000000001-000000000000000002]" * 50,
    ],
)
def test_a_short_text_that_stands_for_many_names_is_refused(text: str) -> None:
    with pytest.raises(LaunchError) as refused:
        expand_nodelist(text)
    assert len(str(refused.value)) < 400


said_by_launchers = words_of(
    (
        "process rank 1 with PID 5 on node n1 exited on signal 9 (Killed).\n",
        "Process name: [[1,1],2]\nExit code:    7\n",
        "MPI_ABORT was invoked on rank 3 in communicator MPI_COMM_WORLD\nwith errorcode 5.\n",
        "Process name: 1\nExit code: 143\n",
        "=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   PID 1 RUNNING AT n1\n",
        "=   EXIT CODE: 9\n",
        "srun: error: n[1-3]: tasks 0-2: Killed\n",
        "srun: error: n1: task 1: Exited with exit code 1\n",
        "error: Node failure on n[1-\n",
        "ssh: connect to host n1 port 22: Connection refused\n",
        "Root Cause (first observed failure):\n[0]:\n  time : x\n  host : n1\n  rank : 1 (x)\n",
        "  exitcode  : -9 (pid: 1)\n",
        *("9" * 5000, "[0]<stdout>:", "[1] ", " 0: ", "\n", " ", "²", "-", *HOSTILE_TEXTS),
    )
)


@fuzz(50)
@given(said_by_launchers, st.sampled_from(["openmpi4", "mpich"]))
def test_what_launchers_say(text: str, mpi: str) -> None:
    deaths.first_death(text)
    deaths.lost_host(text)
    for launcher in LAUNCHERS:
        tag = deaths.rank_tag(launcher, mpi)
        assert tag is None or tag.sub("", text) is not None
    list(parse_jobs(text.replace("\n", " Restarts=")))
    for read in (detect.mpi_flavour, detect.srun_mpi):
        with contextlib.suppress(LaunchError):
            read(text)


def test_a_long_word_of_a_launcher_takes_no_long_time() -> None:
    """Backtracking over it would take hours."""
    for text in ("process rank " * 20_000, "Exit code: " * 20_000, "a" * 200_000, " " * 200_000):
        assert deaths.first_death(text) is None
        assert deaths.lost_host(text) is None


@fuzz(10)
@given(variables)
def test_the_end_of_a_job(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, str]
) -> None:
    """`python -m launch.job`, which a job's script calls, with a directory that is none."""
    folder = tmp_path_factory.getbasetemp() / "no-run"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with told(settings), contextlib.redirect_stderr(io.StringIO()) as err:
            assert job.main([str(folder)]) in (2, 75)
        assert err.getvalue().startswith("harness: ")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


# Names and paths in scripts

NAMES = (
    *("$(touch pwned)", "`touch pwned`", "; touch pwned #", "a' b", 'a" b', "$HOME", "*", "a b"),
    *("-n", "--wrap=x", "~root", "a&b", "a|b", "a>b", "{a,b}", "!!", "%j", "#SBATCH -x", "é", "&&"),
)
STUB = """#!/bin/sh
printf '%s\\n' "$@" "$NOTE" >> {said}
"""


@fuzz(5)
@given(
    name=st.sampled_from(NAMES),
    folder=st.sampled_from(NAMES),
    value=st.sampled_from(NAMES),
    words=st.sampled_from([(), ("--sweep", "lr.base=0.1,0.2"), ("--probe",)]),
)
def test_hostile_names_in_batch_scripts(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    folder: str,
    value: str,
    words: tuple[str, ...],
) -> None:
    """The scripts run, with a harness that only says what it was called with."""
    base = tmp_path_factory.mktemp("jobs")
    run_dir = base / folder
    settings = {"name": name, "launch.environment.NOTE": value, "slurm.account": value}
    overrides = [f"{key}={json.dumps(text)}" for key, text in settings.items()]
    said = command("submit", DEMO, *SAFE, *overrides, f"--run-dir={run_dir}", "--dry-run", *words)
    assert said.code == 0, said.err
    python = base / "python"
    python.write_text(STUB.format(said=shlex.quote(str(base / "said"))), encoding="utf-8")
    python.chmod(0o700)
    for script in (run_dir / "slurm").glob("*.sbatch"):
        text = script.read_text(encoding="utf-8")
        own = shlex.quote(sys.executable)
        assert own in text
        (base / "script").write_text(text.replace(own, shlex.quote(str(python))), encoding="utf-8")
        done = subprocess.run(
            ["bash", str(base / "script")],
            cwd=base,
            env={"PATH": os.defpath, "SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if script.name != "gather.sbatch":  # there is no run to make a report of
            assert done.returncode == 0, done.stderr
    heard = (base / "said").read_text(encoding="utf-8").splitlines()
    assert value in heard
    assert any(word.startswith(str(run_dir)) for word in heard)
    assert not list(base.rglob("pwned"))
