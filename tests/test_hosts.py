"""Lists of hosts: as people write them, in files, and in Slurm's short form."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import LaunchError
from launch.hosts import (
    check_slots,
    expand_nodelist,
    fill,
    interface_settings,
    parse_hosts,
    read_hostfile,
    slurm_hosts,
    this_host,
)
from launch.spec import Host, LaunchSpec


def tried(read: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], str]:
    """What it returns, or nothing and the message of its LaunchError."""
    try:
        return read(), ""
    except LaunchError as error:
        return (), str(error)


# As they are written after --hosts


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
    with pytest.raises(LaunchError, match=f"--hosts: {bad}.* is not a host.*; .*node1:4,node2:4"):
        parse_hosts(text)


@pytest.mark.parametrize("text", ["[::1]:2", "::1", "fe80::1%eth0", "2001:db8::7", "[fe80::1]"])
def test_an_ipv6_address_is_told_apart_from_a_slip(text: str) -> None:
    with pytest.raises(LaunchError, match="the colons of an IPv6 address as slots: use its name"):
        parse_hosts(f"a:2,{text}")


def test_a_host_stands_there_once() -> None:
    with pytest.raises(LaunchError, match="a stands there twice; add up its slots"):
        parse_hosts("a:2,b:1,a:3")


names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,10}[A-Za-z0-9])?", fullmatch=True)
hosts = st.lists(st.builds(Host, names, st.integers(1, 999999)), min_size=1, max_size=5)
distinct = hosts.filter(lambda hosts: len({host.name for host in hosts}) == len(hosts))


@given(distinct)
def test_hosts_are_read_as_they_are_written(hosts: list[Host]) -> None:
    assert parse_hosts(",".join(map(str, hosts))) == tuple(hosts)


@given(st.text(max_size=20))
def test_any_text_is_hosts_or_a_launch_error(text: str) -> None:
    found, _ = tried(lambda: parse_hosts(text))
    assert all(host.slots >= 1 and not host.name.startswith("-") for host in found)


def test_this_host_has_a_slot_for_each_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 8})
    assert this_host() == (Host("localhost", 3),)


# Slots


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
    assert fill(ranks, placed) == placed


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_rank_s_host_is_the_one_that_is_filled_with_it(slots: list[int]) -> None:
    hosts = tuple(Host(f"n{index}", count) for index, count in enumerate(slots))
    ranks = sum(slots)
    spec = LaunchSpec(ranks=ranks, hosts=hosts, command=("true",))
    for used in range(1, ranks + 1):
        assert spec.host_of(used - 1) == fill(used, hosts)[-1].name
    assert spec.host_of(ranks) is None


# Host files


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "hosts.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a slots=4\nb slots=2 max_slots=8\n", (Host("a", 4), Host("b", 2))),
        ("a slots = 4\nb max-slots=2\n", (Host("a", 4), Host("b", 1))),
        ("a:4\nb:2\n", (Host("a", 4), Host("b", 2))),
        ("a\na\nb\na\n", (Host("a", 3), Host("b", 1))),
        ("# two nodes\n\n a slots=4 # the large one\r\n\tb:2\r\n", (Host("a", 4), Host("b", 2))),
        ("a", (Host("a", 1),)),
        ("10.0.0.1:2\nn-1.x.example slots=1", (Host("10.0.0.1", 2), Host("n-1.x.example", 1))),
        ("a:2 max_slots=2", (Host("a", 2),)),
    ],
)
def test_host_files(text: str, hosts: tuple[Host, ...], tmp_path: Path) -> None:
    assert read_hostfile(written(tmp_path, text)) == hosts


@pytest.mark.parametrize(
    ("text", "line", "wrong"),
    [
        ("a slots=4\na slots=2\n", 2, "a stands there twice; add up its slots"),
        ("a slots=4\nb\na\n", 3, "a stands there twice"),
        ("a\na:2\n", 2, "a stands there twice"),
        ("a:2 slots=2\n", 1, "slots stands there twice"),
        ("\n\na slots=0\n", 3, "'0' is not a number of slots"),
        ("a slots=\n", 1, "'' is not a number of slots"),
        ("a:x\n", 1, "'x' is not a number of slots"),
        ("a slots=-2\n", 1, "'-2' is not a number of slots"),
        ("a slots=9999999\n", 1, "'9999999' is not a number of slots from 1 to 999999"),
        ("a slots=4 max_slots=2\n", 1, "a has 4 slots, but max_slots=2"),
        ("a slots=4 username=joe\n", 1, "'username=joe' is not understood; valid: slots=N"),
        ("a 4\n", 1, "'4' is not understood"),
        ("[::1]:2\n", 1, r"'\[::1\]:2' is not a host \(.*IPv6"),
        ("-oProxyCommand=x\n", 1, "'-oProxyCommand=x' is not a host"),
        ("$(reboot)\n", 1, r"'\$\(reboot\)' is not a host"),
        ("nöde\n", 1, "'nöde' is not a host"),
        (b"\xff\xfe\n", 1, "'\ufffd\ufffd' is not a host"),
    ],
)
def test_what_is_wrong_in_a_host_file_is_told_with_its_line(
    text: str | bytes, line: int, wrong: str, tmp_path: Path
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(LaunchError, match=f"^{path}:{line}: {wrong}.*a line is `name slots=4`"):
        read_hostfile(path)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but words\n"])
def test_a_host_file_names_a_host(text: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"hosts\.txt: names no host; write one a line"):
        read_hostfile(written(tmp_path, text))


def test_a_host_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    wrong = {"none": "No such file", ".": "Is a directory", "pipe": "not a regular file"}
    for path, why in ((tmp_path / name, why) for name, why in wrong.items()):
        with pytest.raises(LaunchError, match=f"--hostfile {path}: {why}"):
            read_hostfile(path)


FORMS = (
    "{0.name} slots={0.slots}",
    "{0.name}:{0.slots}",
    "{0.name}  slots = {0.slots}   max_slots={0.slots}  # all of them",
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hosts=distinct, forms=st.lists(st.sampled_from(FORMS), min_size=5, max_size=5))
def test_host_files_are_read_as_they_are_written(
    hosts: list[Host], forms: list[str], tmp_path: Path
) -> None:
    lines = [form.format(host) for form, host in zip(forms, hosts, strict=False)]
    assert read_hostfile(written(tmp_path, "\n".join(lines))) == tuple(hosts)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    place=st.integers(0, 60),
    removed=st.integers(0, 10),
    added=st.one_of(st.binary(max_size=6), st.text(" =:#slotmax_\n0123[]", max_size=8)),
)
def test_a_damaged_host_file_is_hosts_or_one_message(
    place: int, removed: int, added: bytes | str, tmp_path: Path
) -> None:
    whole = b"# nodes\nn1 slots=4 max_slots=8\nn2:2\nn3\nn3\n"
    extra = added.encode() if isinstance(added, str) else added
    path = written(tmp_path, whole[:place] + extra + whole[place + removed :])
    found, message = tried(lambda: read_hostfile(path))
    if message:
        assert message.startswith(str(path))
    else:
        assert parse_hosts(",".join(map(str, found))) == found


# Slurm's short form


@pytest.mark.parametrize(
    ("text", "names"),
    [  # as `scontrol show hostnames` of Slurm 22.05 writes them out
        ("n[1-3,07-10],m[1-2]x[01-03],login", "n1 n2 n3 n07 n08 n09 n10 m1x01 m1x02 m1x03 m2x01"
         " m2x02 m2x03 login"),
        ("a[007-10]", "a007 a008 a009 a010"),
        ("n[9-11]", "n9 n10 n11"),
        ("n[3,1,2]", "n3 n1 n2"),
        ("n[08-12]", "n08 n09 n10 n11 n12"),
        ("n[1,1]", "n1 n1"),
        ("a1,a1", "a1 a1"),
        ("x", "x"),
        # what follows a range scontrol refuses, and other tools write
        ("a[1-2]-ib,r[0-1]n[0-1].x", "a1-ib a2-ib r0n0.x r0n1.x r1n0.x r1n1.x"),
    ],
)  # fmt: skip
def test_nodelists(text: str, names: str) -> None:
    assert expand_nodelist(text) == tuple(names.split())


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "'' is not a host"),
        ("a,,b", "'' is not a host"),
        ("n[1-2],", "'' is not a host"),
        ("n[]", "'' is not a range"),
        ("n[1-2", "a bracket is not closed"),
        ("n1]", "a bracket too many at character 3"),
        ("n[[1]]", "a bracket too many at character 3"),
        ("n[10-9]", "the range 10-9 runs backwards"),
        ("n[1--3]", "'1--3' is not a range"),
        ("n[1-2-3]", "'1-2-3' is not a range"),
        ("n[a-c]", "'a-c' is not a range"),
        ("n[١]", "is not a range"),
        ("n[1, 2]", "' 2' is not a range"),
        ("n 1", "'n 1' is not a host"),
        ("(null)", r"'\(null\)' is not a host"),
        ("-n[1-2]", "'-n1' is not a host"),
        ("n1\n", r"'n1\\n' is not a host"),
        ("n[1-100001]", "it makes more than 100,000 names"),
        ("n[1-60000],m[1-60000]", "it makes more than 100,000 names"),
        ("n[0-999999999999999999]", "it makes more than 100,000 names"),
        ("n" + "[1-9]" * 200, "it makes more than 100,000 names"),
        ("n[" + "9" * 5000 + "]", "is not a range"),
        ("n" * 254, "it makes names of more than 253 characters"),
        ("n[1-2]" + "[1]" * 252, "it makes names of more than 253 characters"),
    ],
)
def test_what_is_no_nodelist_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(LaunchError, match=f"is not a list of nodes: .*{wrong}.*; Slurm writes"):
        expand_nodelist(text)


def test_the_largest_nodelist_is_written_out() -> None:
    names = expand_nodelist("n[00001-99999],x")
    assert (len(names), names[0], names[99998], names[99999]) == (10**5, "n00001", "n99999", "x")


def test_a_refusal_does_not_repeat_a_long_text() -> None:
    with pytest.raises(LaunchError) as caught:
        expand_nodelist("n" * 10**6)
    assert len(str(caught.value)) < 300


ranges = st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(1, 4))


@st.composite
def nodelists(draw: st.DrawFn) -> str:
    """Terms of one to three words, with ranges between them."""
    terms = []
    for _ in range(draw(st.integers(1, 4))):
        term = draw(st.sampled_from(["n", "gpu-", "r2.c"]))
        for _ in range(draw(st.integers(0, 2))):
            chosen = draw(st.lists(ranges, min_size=1, max_size=3))
            spelt = [
                f"{a:0{w}}" if extra == 0 else f"{a:0{w}}-{a + extra}" for a, extra, w in chosen
            ]
            term += f"[{','.join(spelt)}]" + draw(st.sampled_from(["", "x"]))
        terms.append(term + "0")
    return ",".join(terms)


def naive(text: str) -> list[str]:
    """The same by writing out one bracket after the other, the first one first."""
    found = re.search(r"(?:^|,)([^,\[]*)\[([^\]]*)\]((?:[^,\[]|\[[^\]]*\])*)", text)
    if not found:
        return text.split(",")
    before = text[: found.start()]
    after = text[found.end() :].removeprefix(",")
    made = []
    for entry in found[2].split(","):
        first, _, last = entry.partition("-")
        for number in range(int(first), int(last or first) + 1):
            made += naive(found[1] + str(number).rjust(len(first), "0") + found[3])
    return [*(naive(before) if before else []), *made, *(naive(after) if after else [])]


@given(nodelists())
def test_nodelists_are_written_out_as_a_plain_way_does_it(text: str) -> None:
    assert list(expand_nodelist(text)) == naive(text)


@given(st.lists(names, min_size=1, max_size=8))
def test_names_without_brackets_stay_as_they_are(names: list[str]) -> None:
    assert list(expand_nodelist(",".join(names))) == names


@given(st.integers(1, 6), st.integers(0, 999), st.integers(1, 60))
def test_a_range_has_its_numbers_in_order_and_as_wide(width: int, first: int, count: int) -> None:
    last = first + count - 1
    found = expand_nodelist(f"n[{first:0{width}}-{last}]")
    assert [int(name[1:]) for name in found] == list(range(first, last + 1))
    shortest = max(width, len(str(first)))
    assert all(len(name) - 1 == max(shortest, len(str(int(name[1:])))) for name in found)


@settings(max_examples=300)
@given(st.text("n1-9[],x0 .\n", max_size=40))
def test_any_nodelist_is_names_or_one_message(text: str) -> None:
    found, message = tried(lambda: expand_nodelist(text))
    assert ("is not a list of nodes" in message) != bool(found)
    assert not any(set(name) & set("[], \n") for name in found)


# The hosts of a job


@pytest.mark.parametrize(
    ("variables", "slots"),
    [
        ({"SLURM_TASKS_PER_NODE": "2(x3),1"}, [2, 2, 2, 1]),
        ({"SLURM_TASKS_PER_NODE": "4(x4)"}, [4, 4, 4, 4]),
        ({"SLURM_TASKS_PER_NODE": "1,2,3,4", "SLURM_JOB_CPUS_PER_NODE": "8(x4)"}, [1, 2, 3, 4]),
        ({"SLURM_JOB_CPUS_PER_NODE": "8(x2),4(x2)"}, [8, 8, 4, 4]),
        ({"SLURM_JOB_CPUS_PER_NODE": "8(x2),4(x2)", "SLURM_CPUS_PER_TASK": "3"}, [2, 2, 1, 1]),
        ({"SLURM_JOB_CPUS_PER_NODE": "2(x4)", "SLURM_CPUS_PER_TASK": "64"}, [1, 1, 1, 1]),
        ({}, [1, 1, 1, 1]),
    ],
)
def test_hosts_of_a_job(variables: dict[str, str], slots: list[int]) -> None:
    found = slurm_hosts({"SLURM_JOB_NODELIST": "n[01-03],big", **variables})
    assert found == tuple(map(Host, ("n01", "n02", "n03", "big"), slots))


def test_outside_a_job_slurm_names_no_hosts() -> None:
    assert slurm_hosts({"SLURM_TASKS_PER_NODE": "2", "PATH": "/bin"}) is None
    assert slurm_hosts({"SLURM_JOB_NODELIST": ""}) is None


@pytest.mark.parametrize(
    ("variables", "wrong"),
    [
        ({"SLURM_TASKS_PER_NODE": "2(x3)"}, "SLURM_TASKS_PER_NODE=2.x3. does not fit the 2 nodes"),
        ({"SLURM_TASKS_PER_NODE": "2"}, "does not fit the 2 nodes"),
        ({"SLURM_TASKS_PER_NODE": "1(x999999),1"}, "does not fit the 2 nodes"),
        ({"SLURM_TASKS_PER_NODE": "two"}, "SLURM_TASKS_PER_NODE=two does not read like"),
        ({"SLURM_TASKS_PER_NODE": "0(x2)"}, "does not read like Slurm's"),
        ({"SLURM_JOB_CPUS_PER_NODE": "1(2)"}, "SLURM_JOB_CPUS_PER_NODE=1.2. does not read like"),
        ({"SLURM_JOB_NODELIST": "n[1-"}, "is not a list of nodes"),
    ],
)
def test_a_job_whose_variables_do_not_fit_is_refused(variables: dict[str, str], wrong: str) -> None:
    with pytest.raises(LaunchError, match=wrong):
        slurm_hosts({"SLURM_JOB_NODELIST": "n[1-2]", **variables})


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 20)), min_size=1, max_size=6))
def test_tasks_per_node_are_read_as_slurm_writes_them(groups: list[tuple[int, int]]) -> None:
    slots = list(itertools.chain.from_iterable([count] * times for count, times in groups))
    text = ",".join(str(n) if times == 1 else f"{n}(x{times})" for n, times in groups)
    found = slurm_hosts({"SLURM_JOB_NODELIST": f"n[1-{len(slots)}]", "SLURM_TASKS_PER_NODE": text})
    assert found is not None
    assert [host.slots for host in found] == slots


# Interfaces


def test_interfaces_go_to_each_engine_in_its_own_words() -> None:
    assert interface_settings(()) == {}
    assert interface_settings(("eth0", "ib0.8001")) == {
        "GLOO_SOCKET_IFNAME": "eth0,ib0.8001",
        "HOROVOD_GLOO_IFACE": "eth0",
        "NCCL_SOCKET_IFNAME": "=eth0,ib0.8001",
    }


@pytest.mark.parametrize(
    "name", ["", "^docker0", "10.0.0.0/24", "eth0,ib0", "eth0 ib0", "$(x)", "-x", "a" * 16, "é"]
)
def test_what_is_no_interface_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match=r"launch.interfaces: .* is not an interface; .*eth0"):
        interface_settings(("lo", name))
