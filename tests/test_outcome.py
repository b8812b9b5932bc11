"""How a launch ended, from what the launcher and the ranks have left; and hosts that are asked."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from harness.jsonl import encode
from harness.rundir import RunDirectory
from launch.outcome import Ended, judge
from launch.preflight import Needs, check_hosts, is_local, ssh, told
from launch.spec import Host, LaunchSpec

SPEC = LaunchSpec(ranks=4, hosts=(Host("n1", 1), Host("n2", 2), Host("n3", 1)), command=("x",))
KILLED = "mpirun noticed that process rank 2 with PID 7 on node n2 exited on signal 9 (Killed).\n"


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.failures.mkdir()
    return run


def leave(run: RunDirectory, rank: int, **more: Any) -> None:
    note = {
        "rank": rank,
        "host": "somewhere",
        "exit_code": 1,
        "message": f"message of {rank}",
        "consequence": False,
        "final": False,
        "traceback": None,
    }
    (run.failures / f"rank-{rank:05d}.json").write_text(json.dumps(note | more))


def record(run: RunDirectory, *events: dict[str, Any]) -> None:
    run.events.write_bytes(b"".join(encode(event) for event in events))


def test_a_run_is_done_when_its_records_say_so_too(directory: RunDirectory) -> None:
    record(directory, {"kind": "start"}, {"kind": "end"})
    assert judge(Ended(0, ""), SPEC, directory).kind == "done"
    record(directory, {"kind": "start"})  # as when mpirun has lost a host, and ends with 0
    lost = judge(Ended(0, "ssh: connect to host n3 port 22: Connection refused"), SPEC, directory)
    assert (lost.kind, lost.host) == ("failed", "n3")


@pytest.mark.parametrize(("wanted", "kind"), [(8, "grow"), (4, "stopped"), (None, "stopped")])
def test_75_is_growth_if_more_ranks_are_wanted(
    wanted: int | None, kind: str, directory: RunDirectory
) -> None:
    record(directory, {"kind": "stop", "ranks_wanted": wanted})
    assert judge(Ended(75, ""), SPEC, directory).kind == kind
    # srun and horovodrun have exit codes of their own, and say which one the rank's was.
    said = "Process 1 exit with status code 75.\n"
    assert judge(Ended(1, said), SPEC, directory).kind == kind


def test_the_lowest_rank_that_failed_by_itself_has_the_last_word(directory: RunDirectory) -> None:
    leave(directory, 0, consequence=True)
    leave(directory, 3)
    leave(directory, 2)
    outcome = judge(Ended(1, KILLED), SPEC, directory)
    assert outcome.message == "rank 2 on somewhere: message of 2"
    assert (outcome.kind, outcome.rank, outcome.host) == ("failed", 2, "n2")
    assert outcome.final  # no run has begun
    directory.config.touch()
    assert not judge(Ended(1, KILLED), SPEC, directory).final


def test_what_the_run_itself_has_done_is_final(directory: RunDirectory) -> None:
    leave(directory, 1, final=True, message="diverged")
    assert judge(Ended(1, ""), SPEC, directory).final
    leave(directory, 0, exit_code=2, message="bad settings")
    outcome = judge(Ended(2, ""), SPEC, directory)
    assert (outcome.kind, outcome.message) == ("refused", "bad settings")


def test_a_traceback_is_kept_in_a_file(directory: RunDirectory) -> None:
    leave(directory, 1, traceback="Traceback: here")
    outcome = judge(Ended(1, ""), SPEC, directory)
    kept = directory.failures / "rank-00001.txt"
    assert kept.read_text() == "Traceback: here"
    assert str(kept) in outcome.message


def test_a_death_without_words_names_rank_host_and_signal(directory: RunDirectory) -> None:
    outcome = judge(Ended(137, KILLED), SPEC, directory)
    assert "rank 2 on n2 was killed by signal 9 (SIGKILL)" in outcome.message
    assert (outcome.rank, outcome.host) == (2, "n2")


def test_where_no_host_is_named_it_follows_from_the_rank(directory: RunDirectory) -> None:
    outcome = judge(Ended(1, "Process 3 exit with status code 137.\n"), SPEC, directory)
    assert "rank 3 on n3 was killed by signal 9" in outcome.message
    assert outcome.host == "n3"
    assert [SPEC.host_of(rank) for rank in range(5)] == ["n1", "n2", "n2", "n3", None]


def test_a_launcher_that_just_ends_is_quoted(directory: RunDirectory) -> None:
    said = "".join(f"line {number}\n" for number in range(40))
    outcome = judge(Ended(213, said), SPEC, directory)
    assert outcome.message.startswith("the launcher ended with exit code 213\nline 25\n")
    assert outcome.message.endswith("line 39")


def test_broken_last_words_are_passed_over(directory: RunDirectory) -> None:
    (directory.failures / "rank-00000.json").write_text('{"rank": 0')
    assert "SIGKILL" in judge(Ended(1, KILLED), SPEC, directory).message


# Hosts


def test_this_machine_is_asked_nothing(tmp_path: Path) -> None:
    names = ["localhost", socket.gethostname(), "127.0.0.1"]
    assert all(is_local(name) for name in names)
    assert check_hosts(names, Needs("/no/python", tmp_path), timeout=1.0) == {}
    assert not is_local("no-such-host.invalid")


# What ssh says of a host that cannot be used, as OpenSSH 9.2 prints it.
SAID = {
    "unknown": ("ssh: Could not resolve hostname unknown: Name or service not known", "not known"),
    "refuses": ("ssh: connect to host refuses port 22: Connection refused", "refuses ssh"),
    "silent": ("ssh: connect to host silent port 22: Connection timed out", "does not answer"),
    "unrouted": ("ssh: connect to host unrouted port 22: No route to host", "does not answer"),
    "locked": ("me@locked: Permission denied (publickey,password).", "ssh-copy-id locked"),
    "changed": ("Host key verification failed.", "ssh changed"),
    "odd": ("something else", "ssh ended with exit code 255: something else"),
}
FAKE = """#!/bin/sh
for word; do before=$host; host=$word; done  # the last word is the command, before it the host
host=$before
case $host in
    good) exit 0 ;;
    bare) printf '0\\n2\\n'; exit 0 ;;
    apart) echo 1; exit 0 ;;
{cases}
esac
"""


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = "\n".join(
        f"    {name}) echo '{said}' >&2; exit 255 ;;" for name, (said, _) in SAID.items()
    )
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(FAKE.format(cases=cases))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("launch.preflight.is_local", lambda name: False)


@pytest.mark.usefixtures("fake_ssh")
def test_each_host_is_told_of_with_a_remedy(tmp_path: Path) -> None:
    needs = Needs("/opt/python", tmp_path / "run", ("/opt/bin/orted",))
    names = [*SAID, "good", "bare", "apart"]
    troubles = check_hosts(names, needs, timeout=1.0)
    assert list(troubles) == [name for name in names if name != "good"]
    for name, (_, words) in SAID.items():
        assert words in troubles[name]
    assert "has no /opt/python" in troubles["bare"]
    assert "has no /opt/bin/orted" in troubles["bare"]
    assert f"does not see {tmp_path / 'run'}" in troubles["apart"]
    assert told(troubles).count("\n") == len(troubles) - 1
    assert "host refuses: " in told(troubles)


def test_ssh_never_asks_and_takes_no_host_for_an_option() -> None:
    words = ssh("-oProxyCommand=x", 2.4)
    assert words[:3] == ["ssh", "-o", "BatchMode=yes"]
    assert words[-2:] == ["--", "-oProxyCommand=x"]


def test_a_kill_for_want_of_memory_is_told(directory: RunDirectory) -> None:
    plain = judge(Ended(137, KILLED), SPEC, directory).message
    assert "memory" not in plain
    assert "because memory ran out" in judge(Ended(137, KILLED, None, 1), SPEC, directory).message
    other = KILLED.replace("signal 9 (Killed)", "signal 15 (Terminated)")
    assert "memory" not in judge(Ended(143, other, None, 1), SPEC, directory).message
    srun = "srun: error: n1: task 0: Out Of Memory\n"
    assert "Slurm says: out of memory" in judge(Ended(137, srun), SPEC, directory).message
