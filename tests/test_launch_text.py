"""Launches as text: argument lists, host lists, and what launchers say when a rank dies."""

from __future__ import annotations

import itertools
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.environment import FORWARDED
from harness.errors import LaunchError
from launch import horovodrun, mpirun
from launch.hosts import check_slots, fill, parse_hosts, this_host
from launch.spec import Death, Host, LaunchSpec, first_death
from launch.supervise import RunRequest, run

SPEC = LaunchSpec(
    ranks=3,
    hosts=(Host("node1", 2), Host("node2", 1)),
    command=("/venv/bin/python", "-m", "harness", "train", "my config.yaml", "name='a b'"),
    environment={"OMP_NUM_THREADS": "1", "HARNESS_WORLD_SIZE": "3"},
)


# Arguments


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_horovodrun(controller: Literal["mpi", "gloo"]) -> None:
    spec = replace(SPEC, controller=controller)
    assert shlex.join(horovodrun.arguments(spec)) == (
        f"horovodrun -np 3 -H node1:2,node2:1 --{controller} "
        "/venv/bin/python -m harness train 'my config.yaml' "
        "'name='\"'\"'a b'\"'\"''"
    )


def test_mpirun() -> None:
    assert shlex.join(mpirun.arguments(SPEC)) == (
        "mpirun --tag-output -np 3 -H node1:2,node2:1 -bind-to none -map-by slot "
        "-mca pml ob1 -mca btl '^openib' -x HARNESS_WORLD_SIZE -x OMP_NUM_THREADS "
        "/venv/bin/python -m harness train 'my config.yaml' "
        "'name='\"'\"'a b'\"'\"''"
    )


def test_mpirun_lets_root_run_where_it_is_told_to() -> None:
    plain = mpirun.arguments(SPEC)
    assert mpirun.arguments(replace(SPEC, as_root=True)) == [
        plain[0],
        "--allow-run-as-root",
        *plain[1:],
    ]


def test_no_values_of_variables_are_on_mpirun_s_command_line() -> None:
    """They go through its environment: a command line is for all users of the machine to read."""
    arguments = mpirun.arguments(replace(SPEC, environment={"TOKEN": "secret"}))
    assert ("-x", "TOKEN") in itertools.pairwise(arguments)
    assert not [part for part in arguments if "secret" in part]


@given(st.lists(st.text(max_size=10), min_size=1, max_size=6))
def test_the_command_comes_last_and_unchanged(command: list[str]) -> None:
    spec = replace(SPEC, command=tuple(command))
    for arguments in (horovodrun.arguments(spec), mpirun.arguments(spec)):
        assert arguments[-len(command) :] == command


# Variables


def variables(
    capsys: pytest.CaptureFixture[str], *overrides: str, hosts: str = "localhost:2"
) -> dict[str, str]:
    """What a dry run shows that every rank would get."""
    config = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
    run(RunRequest(config, overrides, 2, hosts, "mpirun", Path("not-made"), dry_run=True))
    words = shlex.split(capsys.readouterr().out)
    settings = words[1 : words.index("mpirun")]
    passed = {name for flag, name in itertools.pairwise(words) if flag == "-x"}
    found = dict(word.split("=", 1) for word in settings)
    assert set(found) == passed
    return found


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which the user has set nothing that ranks get."""
    for name in list(os.environ):
        if name.startswith((*FORWARDED, "OMP_", "OMPI_", "HARNESS_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_what_nobody_has_set_is_left_to_each_rank(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = variables(capsys)
    assert found.keys() == {
        "HARNESS_FAILURE_DIR",
        "HARNESS_GROW",
        "HARNESS_PROGRESS",
        "HARNESS_WORLD_SIZE",
        "OMP_NUM_THREADS",
    }
    assert (found["HARNESS_WORLD_SIZE"], found["HARNESS_GROW"]) == ("2", "0")


def test_keys_of_the_configuration_beat_the_user_s_variables(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.setenv("HOROVOD_CYCLE_TIME", "7")
    bare.setenv("HOROVOD_TIMELINE", "trace.json")
    bare.setenv("NCCL_DEBUG", "INFO")
    bare.setenv("MASTER_PORT", "1234")
    found = variables(capsys)
    assert found["HOROVOD_CYCLE_TIME"] == "7"
    assert found["HOROVOD_TIMELINE"] == "trace.json"
    assert (found["NCCL_DEBUG"], found["MASTER_PORT"]) == ("INFO", "1234")
    found = variables(capsys, "comm={cycle_ms: 0.05, fusion_mb: 2, yield_when_idle: true}")
    assert found["HOROVOD_CYCLE_TIME"] == "0.05"
    assert found["HOROVOD_FUSION_THRESHOLD"] == str(2 * 2**20)
    assert found["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert found["HOROVOD_TIMELINE"] == "trace.json"


@pytest.mark.parametrize(
    ("hosts", "key", "threads"),
    [
        ("a:2", "null", "4"),
        ("a:1,b:1", "null", "8"),
        ("a:1,b:2", "null", "8"),
        ("a:2", "3", "3"),
    ],
)
def test_threads_are_the_share_of_a_rank_on_the_fullest_host(
    hosts: str,
    key: str,
    threads: str,
    bare: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    found = variables(capsys, f"ranks.threads={key}", hosts=hosts)
    assert found["OMP_NUM_THREADS"] == threads
    bare.setenv("OMP_NUM_THREADS", "5")
    found = variables(capsys, f"ranks.threads={key}", hosts=hosts)
    assert found["OMP_NUM_THREADS"] == ("5" if key == "null" else threads)


@pytest.mark.parametrize(
    ("keys", "warned"),
    [
        ("{backend: horovod, controller: gloo, compression: fp16}", True),
        ("{backend: horovod, controller: gloo, compression: fp16_feedback}", True),
        ("{backend: horovod, controller: gloo, compression: none}", False),
        ("{backend: horovod, controller: mpi, compression: fp16}", False),
        ("{backend: torch, controller: gloo, compression: fp16}", False),
    ],
)
def test_half_precision_over_horovod_s_gloo_is_warned_of(
    keys: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
    run(RunRequest(config, (f"comm={keys}",), 2, "a:2", run_dir=Path("not-made"), dry_run=True))
    assert ("fp16 over Horovod's Gloo" in capsys.readouterr().err) == warned


# Hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("localhost", (Host("localhost", 1),)),
        ("a:2,b:3", (Host("a", 2), Host("b", 3))),
        (" a:2 , b ", (Host("a", 2), Host("b", 1))),
        ("node-1.cluster.example:16", (Host("node-1.cluster.example", 16),)),
        ("10.0.0.1:4,10.0.0.2:4", (Host("10.0.0.1", 4), Host("10.0.0.2", 4))),
    ],
)
def test_hosts(text: str, hosts: tuple[Host, ...]) -> None:
    assert parse_hosts(text) == hosts


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("", "''"), ("a,", "''"), ("a,,b", "''"), (":2", "':2'"), ("a:", "'a:'"), ("a:0", "'a:0'"),
        ("a:-1", "'a:-1'"), ("a:2.5", "'a:2.5'"), ("a:x", "'a:x'"), ("a:2:3", "'a:2:3'"),
        ("a:٢", "'a:٢'"), ("a:1000000", "'a:1000000'"), ("a b:2", "'a b:2'"), ("-x:2", "'-x:2'"),
        ("a;rm:2", "'a;rm:2'"), ("$(x):2", r"'\$\(x\):2'"), ("é:2", "'é:2'"), ("[::1]:2", "'"),
    ],
)  # fmt: skip
def test_what_is_no_host_is_refused(text: str, bad: str) -> None:
    with pytest.raises(LaunchError, match=f"--hosts: {bad}.* is not a host; .*node1:4,node2:4"):
        parse_hosts(text)


def test_a_host_stands_there_once() -> None:
    with pytest.raises(LaunchError, match="a stands there twice; add up its slots"):
        parse_hosts("a:2,b:1,a:3")


names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,10}[A-Za-z0-9])?", fullmatch=True)
hosts = st.lists(st.builds(Host, names, st.integers(1, 999999)), min_size=1, max_size=5)


@given(hosts.filter(lambda hosts: len({host.name for host in hosts}) == len(hosts)))
def test_hosts_are_read_as_they_are_written(hosts: list[Host]) -> None:
    assert parse_hosts(",".join(map(str, hosts))) == tuple(hosts)


@given(st.text(max_size=20))
def test_any_text_is_hosts_or_a_launch_error(text: str) -> None:
    try:
        found = parse_hosts(text)
    except LaunchError:
        found = ()
    assert all(host.slots >= 1 and not host.name.startswith("-") for host in found)


def test_this_host_has_a_slot_for_each_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 8})
    assert this_host() == (Host("localhost", 3),)


def test_more_ranks_than_slots_are_refused() -> None:
    hosts = (Host("a", 2), Host("b", 1))
    check_slots(3, hosts)
    with pytest.raises(LaunchError) as caught:
        check_slots(4, hosts)
    assert str(caught.value) == (
        "4 ranks need 4 slots, but a:2,b:1 has 3; ask for at most 3 ranks, or name hosts with "
        "enough slots (--hosts a:4 puts several ranks on a core)"
    )
    check_slots(4, parse_hosts("a:4"))


@given(hosts, st.integers(1, 10**6))
def test_filled_hosts_have_a_slot_for_each_rank(hosts: list[Host], ranks: int) -> None:
    offered = {index: host.slots for index, host in enumerate(hosts)}
    if ranks > sum(offered.values()):
        with pytest.raises(LaunchError, match="ranks need"):
            fill(ranks, tuple(hosts))
        return
    placed = fill(ranks, tuple(hosts))
    assert sum(host.slots for host in placed) == ranks
    assert [host.name for host in placed] == [host.name for host in hosts[: len(placed)]]
    assert [host.slots for host in placed[:-1]] == [offered[i] for i in range(len(placed) - 1)]
    assert 1 <= placed[-1].slots <= offered[len(placed) - 1]


# Deaths, in the words of real launchers

SIGNAL = """\
--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
--------------------------------------------------------------------------
mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).
--------------------------------------------------------------------------
"""
EXIT = """\
--------------------------------------------------------------------------
mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[18222,1],1]
  Exit code:    2
--------------------------------------------------------------------------
"""
GLOO = """\
Process 1 exit with status code 137.
Terminating remaining workers after failure of Process 1.
Process 0 exit with status code 143.
Traceback (most recent call last):
"""


@pytest.mark.parametrize(
    ("output", "death"),
    [
        (SIGNAL, Death(1, signal=9, host="vm")),
        (SIGNAL.replace("rank 1", "rank 1023").replace("9 (Killed)", "11 (Segmentation fault)"),
         Death(1023, signal=11, host="vm")),
        (SIGNAL.replace("node vm", "node gpu-7.x"), Death(1, signal=9, host="gpu-7.x")),
        (EXIT, Death(1, exit_code=2)),
        (EXIT.replace("2\n", "75\n"), Death(1, exit_code=75)),
        (EXIT.replace("2\n", "137\n"), Death(1, signal=9)),
        (EXIT.replace("2\n", "255\n"), Death(1, exit_code=255)),
        (EXIT.replace("2\n", "128\n"), Death(1, exit_code=128)),
        (GLOO, Death(1, signal=9)),
        (GLOO.replace("137", "75"), Death(1, exit_code=75)),
        (GLOO.replace("137", "1"), Death(1, exit_code=1)),
        (EXIT + SIGNAL, Death(1, exit_code=2)),
        (SIGNAL.replace("rank 1 ", "rank 4 ") + EXIT, Death(4, signal=9, host="vm")),
        ("some line\n" * 50 + GLOO, Death(1, signal=9)),
        ("", None),
        ("ssh: Could not resolve hostname node9: Name or service not known\n", None),
        ("process rank 1 is fine\nProcess 1 exits\n", None),
    ],
)  # fmt: skip
def test_the_first_death(output: str, death: Death | None) -> None:
    assert first_death(output) == death


@given(st.text(max_size=200))
def test_any_output_is_read(output: str) -> None:
    first_death(output + SIGNAL[:40])
    assert first_death(output + "\n" + GLOO) is not None
