"""Elastic launches as text: horovodrun's words, and what the discovery script prints."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import environment
from harness.config import load_config
from harness.errors import ConfigError, LaunchError
from launch import elastic
from launch.deaths import Death
from launch.spec import Host, LaunchSpec

DEMO = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
SPEC = LaunchSpec(
    ranks=2,
    hosts=(Host("localhost", 2),),
    command=("/venv/bin/python", "-m", "harness", "train", "my config.yaml"),
    controller="gloo",
)
NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=5)
HOSTS = st.lists(
    st.builds(Host, st.sampled_from("abcdefgh"), st.integers(1, 12)),
    unique_by=lambda host: host.name,
    max_size=6,
)


def discovered(script: Path) -> list[Host]:
    """What horovodrun gets: it runs the script in a shell, in whatever folder it was called."""
    words = ["sh", "-c", shlex.quote(str(script))]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, check=True)
    assert done.stderr == ""
    pairs = (line.rpartition(":") for line in done.stdout.splitlines())
    nobody, *hosts = [Host(name, int(slots)) for name, _, slots in pairs]
    assert str(nobody) == "0.0.0.0:0"
    return hosts


def set_up(folder: Path, hosts: list[Host], wanted: int) -> Path:
    folder.mkdir(exist_ok=True)
    return elastic.write_discovery(folder / "elastic", hosts, wanted)


# Arguments


def test_arguments() -> None:
    words = elastic.arguments(SPEC, 1, 4, Path("/runs/a/elastic/discover.sh"))
    assert words[:3] == [sys.executable, "-m", "launch.closed"]
    assert shlex.join(words[3:]) == (
        "--gloo -np 2 --min-np 1 --max-np 4 "
        "--host-discovery-script /runs/a/elastic/discover.sh --network-interfaces lo "
        "--blacklist-cooldown-range 10 600 /venv/bin/python -m harness train 'my config.yaml'"
    )


def test_a_script_in_a_folder_with_a_space_is_one_word_of_the_shell() -> None:
    words = elastic.arguments(SPEC, 1, 2, Path("/my runs/discover.sh"))
    script = words[words.index("--host-discovery-script") + 1]
    assert shlex.split(script) == ["/my runs/discover.sh"]


def test_horovodrun_never_compares_hosts_to_find_an_interface() -> None:
    """It would wait for a second host, and with one host for ever."""
    far = replace(SPEC, hosts=(Host("localhost", 1), Host("node7", 1)))
    with pytest.raises(LaunchError, match=r"other hosts \(node7\) needs launch\.interfaces"):
        elastic.arguments(far, 1, 2, Path("/discover.sh"))
    words = elastic.arguments(replace(far, interfaces=("eth0", "ib0")), 1, 2, Path("/discover.sh"))
    assert words[words.index("--network-interfaces") + 1] == "eth0,ib0"


@pytest.mark.parametrize(("least", "ranks", "most"), [(0, 1, 2), (2, 1, 2), (1, 3, 2)])
def test_a_world_begins_between_its_bounds(least: int, ranks: int, most: int) -> None:
    with pytest.raises(LaunchError, match=f"world of {least} to {most} ranks cannot begin"):
        elastic.arguments(replace(SPEC, ranks=ranks), least, most, Path("/discover.sh"))


@given(st.lists(st.text(max_size=10), min_size=1, max_size=6))
def test_the_command_comes_last_and_unchanged(command: list[str]) -> None:
    spec = replace(SPEC, command=tuple(command))
    assert elastic.arguments(spec, 1, 2, Path("/discover.sh"))[-len(command) :] == command


@pytest.mark.parametrize(
    ("overrides", "launcher", "needs"),
    [
        (["comm.controller=gloo"], "mpirun", "the horovodrun launcher"),
        (["comm.controller=mpi"], "horovodrun", "comm.controller=gloo"),
        (["comm.backend=torch", "comm.controller=gloo"], "horovodrun", "comm.backend=horovod"),
        (["comm.cycle_ms=2", "comm.controller=gloo"], "horovodrun", "comm.cycle_ms=null"),
        (
            ["launch.ranks_per_gpu=2", "comm.controller=gloo"],
            "horovodrun",
            "launch.ranks_per_gpu=1",
        ),
    ],
)
def test_what_cannot_be_elastic_is_refused(overrides: list[str], launcher: str, needs: str) -> None:
    config = load_config(DEMO, ["launch.elastic=true", "comm.compression=none", *overrides])
    with pytest.raises(ConfigError, match=f"launch.elastic = true needs {needs};"):
        elastic.check(config, launcher)


def test_what_can_be_is_not() -> None:
    config = load_config(DEMO, ["comm.controller=gloo", "comm.compression=none"])
    elastic.check(config, "horovodrun")


def test_ranks_read_back_what_the_launcher_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in elastic.variables(2, 6, tmp_path / "elastic").items():
        monkeypatch.setenv(name, value)
    assert environment.elastic_bounds() == (2, 6)
    assert environment.discovery_dir() == (tmp_path / "elastic").resolve()
    assert environment.growth_limit() == 6


@pytest.mark.parametrize("value", ["", "1", "1:", ":2", "a:b", "-1:2"])
def test_without_bounds_a_world_does_not_change(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.ELASTIC, value)
    assert environment.elastic_bounds() is None


def test_a_place_in_the_next_world_is_what_the_launcher_would_have_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        monkeypatch.setenv(f"HOROVOD_{name}", "0")
    monkeypatch.setenv("HOROVOD_HOSTNAME", "node1")
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    monkeypatch.delenv(environment.WORLD_SIZE, raising=False)
    environment.take_place([3, 8, 1, 4, 0, 2])
    assert environment.launched_rank() == 3
    assert environment.promised_world_size() == 8
    assert environment.launched_local_rank() == 1
    assert environment.launched_local_size() == 4
    assert environment.elastic_slot() == "node1:1"


# How it ended


SURVIVED = "Process 1 exit with status code 137.\n"
ENDED = (
    "RuntimeError: Horovod detected that one or more processes exited with non-zero status, thus "
    "causing the job to be terminated. The first process to do so was:\n"
    "Process name: node2[0]\nExit code: {code}\n\n"
)


@pytest.mark.parametrize(
    ("code", "death"),
    [
        (75, Death(None, 75, None, "node2")),
        (1, Death(None, 1, None, "node2")),
        (137, Death(None, None, 9, "node2")),
        (128, Death(None, 128, None, "node2")),
        (255, Death(None, 255, None, "node2")),
    ],
)
def test_the_end_of_a_launch_is_not_the_death_that_it_survived(code: int, death: Death) -> None:
    assert elastic.last_death(SURVIVED + ENDED.format(code=code)) == death


def test_a_launch_that_names_no_end_has_none() -> None:
    assert elastic.last_death(SURVIVED) is None
    assert elastic.last_death("") is None


# Discovery


@given(hosts=HOSTS, wanted=st.integers(1, 40), lost=NAMES, failed=NAMES)
def test_the_script_prints_the_wanted_slots_of_the_hosts_that_are_left(
    tmp_path_factory: pytest.TempPathFactory,
    hosts: list[Host],
    wanted: int,
    lost: list[str],
    failed: list[str],
) -> None:
    folder = tmp_path_factory.mktemp("run's")
    script = set_up(folder, hosts, wanted)
    elastic.set_lost(script.parent, lost)
    (script.parent / "failed").write_text("".join(f"{name}\n" for name in failed))
    printed = discovered(script)
    left = [host for host in hosts if host.name not in lost]
    # As many as are wanted or there, no host twice, none beyond its slots, none that is lost.
    assert sum(host.slots for host in printed) == min(wanted, sum(host.slots for host in left))
    slots = {host.name: host.slots for host in left}
    assert len({host.name for host in printed}) == len(printed)
    assert all(0 < host.slots <= slots[host.name] for host in printed)
    # In their order, and those that have failed after all others.
    order = [host.name for host in sorted(left, key=lambda host: host.name in failed)]
    assert [host.name for host in printed] == order[: len(printed)]
    # Only the last of them may have slots to spare.
    assert all(host.slots == slots[host.name] for host in printed[:-1])


def test_more_ranks_leave_those_that_there_are_in_their_slots(tmp_path: Path) -> None:
    hosts = [Host("node1", 2), Host("10.0.0.2", 3), Host("node3.example.org", 1)]
    script = set_up(tmp_path, hosts, 1)
    before: dict[str, int] = {}
    for wanted in range(1, 8):
        (script.parent / "wanted").write_text(f"{wanted}\n")
        now = {host.name: host.slots for host in discovered(script)}
        assert all(now[name] >= slots for name, slots in before.items())
        before = now
    assert before == {"node1": 2, "10.0.0.2": 3, "node3.example.org": 1}


def test_hosts_can_be_changed_while_a_launch_goes_on(tmp_path: Path) -> None:
    script = set_up(tmp_path, [Host("a", 1)], 3)
    elastic.set_hosts(script.parent, [Host("a", 1), Host("b", 2)])
    assert discovered(script) == [Host("a", 1), Host("b", 2)]
    elastic.set_lost(script.parent, ["a"])
    assert discovered(script) == [Host("b", 2)]
    elastic.set_lost(script.parent, [])
    assert discovered(script) == [Host("a", 1), Host("b", 2)]


def test_a_new_launch_forgets_what_the_last_one_found(tmp_path: Path) -> None:
    script = set_up(tmp_path, [Host("a", 1), Host("b", 1)], 2)
    elastic.set_lost(script.parent, ["a"])
    (script.parent / "failed").write_text("b\n")
    assert discovered(set_up(tmp_path, [Host("a", 1), Host("b", 1)], 1)) == [Host("a", 1)]


def test_horovodrun_finds_an_ssh_that_notices_when_a_host_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own bin").mkdir()
    own = tmp_path / "own bin" / "ssh"
    own.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    own.chmod(0o755)
    monkeypatch.setenv("PATH", f"{own.parent}{os.pathsep}{os.environ['PATH']}")
    folder = set_up(tmp_path, [Host("a", 1)], 1).parent
    variables = elastic.variables(1, 2, folder)
    done = subprocess.run(
        ["ssh", "node2", "two words"], env=variables, capture_output=True, text=True, check=True
    )
    alive = ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
    assert done.stdout.splitlines() == [*alive, "node2", "two words"]


def test_a_script_whose_folder_is_gone_fails(tmp_path: Path) -> None:
    text = elastic.script_text(tmp_path / "gone")
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
