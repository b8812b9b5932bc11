"""Real ranks, started as a run's are, and what they find of each other; bounded in time."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import environment
from harness.doctor import Finding
from harness.doctor.storage import nearest
from harness.errors import LaunchError
from harness.launch_schema import Launch
from harness.progress import PlainLines
from harness.rundir import RunDirectory
from harness.schema import Comm
from harness.twoway_steps import STEPS, Standing, read_result, standings
from harness.wording import counted
from harness.yamlfile import one_line
from launch.assemble import MODULES, Launcher, completed, find_hosts, inherited, usual_launcher
from launch.execute import Stopper, execute
from launch.hosts import fill
from launch.outcome import Ended, judge
from launch.preflight import Needs, check_reachable, is_local, mpi_daemon
from launch.spec import LaunchSpec

_LAUNCH = Launch()
_GROUP = "ranks"
_FAR = 1.0
"""Seconds between clocks that deserve a word: records of several hosts are read side by side."""
_LAST_LINES = 6
"""Of what the ranks have printed, for a message."""
_MUST_AGREE = ("python", "torch", "horovod", "harness")


@dataclass(frozen=True)
class TwoWay:
    """A trial of ranks on hosts."""

    ranks: int
    hosts: str | None
    hostfile: Path | None
    launcher: Launcher | None
    run_dir: Path
    timeout: float

    def findings(self) -> list[Finding]:
        """Start the ranks and tell what they have found. Raises LaunchError, RunDirectoryError if
        they cannot be started as asked."""
        hosts = find_hosts(self.hosts, self.hostfile)
        placed = fill(self.ranks, hosts)
        launcher = self.launcher or usual_launcher(_LAUNCH, Comm())
        folder = self._folder()
        try:
            directory = RunDirectory(folder)
            directory.failures.mkdir()
            needs = Needs(sys.executable, folder, mpi_daemon("mpi"), python_key=None)
            names = [host.name for host in placed]
            check_reachable(launcher, names, needs, _LAUNCH.connect_timeout)
            settings = inherited(placed, None) | {
                environment.WORLD_SIZE: str(self.ranks),
                environment.FAILURE_DIR: str(directory.failures),
                environment.LAUNCHER: launcher,
            }
            command = (sys.executable, "-m", "harness.twoway", str(folder))
            spec = completed(LaunchSpec(self.ranks, placed, command, settings), launcher, _LAUNCH)
            return self._told(spec, launcher, directory)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self) -> Path:
        """Where runs will be, which all hosts must see."""
        place = nearest(self.run_dir)
        try:
            return Path(tempfile.mkdtemp(prefix=".harness-doctor-", dir=place)).resolve()
        except OSError as error:
            raise LaunchError(
                f"{place}: nothing can be written there ({error.strerror}); name a directory that "
                "all hosts see with --run-dir"
            ) from None

    def _told(self, spec: LaunchSpec, launcher: Launcher, directory: RunDirectory) -> list[Finding]:
        begun, display = time.monotonic(), _Silent()
        with Stopper(lambda: None, "after this") as stopper:
            ended = execute(
                MODULES[launcher].arguments(spec),
                spec,
                launcher,
                directory,
                display,
                stopper,
                limit=self.timeout,
            )
        late = time.monotonic() - begun >= self.timeout
        known = standings(directory.path, spec.ranks)
        result = read_result(directory.path)
        if result is None or ended.exit_code:
            failed = self._failed(spec, launcher, directory, ended, known, late)
            said = "".join(f"\n{line}" for line in display.last) if not late else ""
            return [replace(failed, text=failed.text + said), *_versions(known)]
        return [_started(spec, launcher, result, begun), *_agreements(result)]

    def _failed(
        self,
        spec: LaunchSpec,
        launcher: Launcher,
        directory: RunDirectory,
        ended: Ended,
        known: dict[int, Standing],
        late: bool,
    ) -> Finding:
        facts = {"launcher": launcher, "standing": _standing(known, spec)}
        if late:
            text = f"not done after {self.timeout:g} s, and ended: {behind(known, spec)}"
            remedy = _remedy(known, spec)
            return Finding("ranks", text, "missing", remedy, _GROUP, facts)
        outcome = judge(ended, spec, directory)
        text = f"{_brief(outcome.message)} (least far: {behind(known, spec)})"
        return Finding("ranks", text, "missing", _remedy(known, spec), _GROUP, facts)


class _Silent(PlainLines):
    """What the ranks print belongs to a message if something goes wrong, and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.last: deque[str] = deque(maxlen=_LAST_LINES)

    def say(self, text: str) -> None:
        self.last.append(one_line(text, 300))


def _brief(message: str) -> str:
    """Of a launcher's traceback, its last line."""
    lines = message.splitlines()
    if not any(line.startswith("Traceback") for line in lines):
        return message
    return f"{lines[0]}: {lines[-1].strip()}"


def behind(known: dict[int, Standing], spec: LaunchSpec) -> str:
    """Which ranks, on which hosts, have got least far."""
    order = list(STEPS)

    def step(rank: int) -> int:
        return order.index(known[rank].step) if rank in known and known[rank].step in order else -1

    least = min((step(rank) for rank in range(spec.ranks)), default=-1)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank in range(spec.ranks):
        if step(rank) == least:
            doing = known[rank].doing if rank in known else "not begun"
            groups[str(spec.host_of(rank)), doing].append(rank)
    told = [
        f"{host} ({'rank' if len(ranks) == 1 else 'ranks'} {_numbers(ranks)}): {doing}"
        for (host, doing), ranks in list(groups.items())[:8]
    ]
    return "; ".join(told) + ("; …" if len(groups) > len(told) else "")


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:6])) + (", …" if len(ranks) > 6 else "")


def _standing(known: dict[int, Standing], spec: LaunchSpec) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "host": str(spec.host_of(rank)),
            "step": known[rank].step if rank in known else None,
        }
        for rank in range(spec.ranks)
    ]


def _remedy(known: dict[int, Standing], spec: LaunchSpec) -> str:
    steps = {standing.step for standing in known.values()}
    if len(known) < spec.ranks:
        missing = next(rank for rank in range(spec.ranks) if rank not in known)
        host = spec.host_of(missing)
        there = "" if host is None or is_local(host) else f"ssh {host} "
        return f"{there}{sys.executable} -m harness doctor"
    if steps & {"join", "allreduce", "pairs"}:
        return (
            "the hosts do not reach each other on the interface that MPI has chosen: `ip addr` on "
            "each, then launch.interfaces=[NAME] (OMPI_MCA_btl_tcp_if_include=NAME for this check)"
        )
    return f"{sys.executable} -m harness doctor, on that host, says more"


# What the ranks have found


def _started(spec: LaunchSpec, launcher: str, result: dict[str, Any], begun: float) -> Finding:
    hosts = {one["host"] for one in result["ranks"]}
    text = (
        f"{counted(spec.ranks, 'rank')} on {counted(len(hosts), 'host')} by {launcher}, "
        f"{result['kind']}: allreduce and its result are right; "
        f"{time.monotonic() - begun:.0f} s in all"
    )
    return Finding(
        "ranks", text, group=_GROUP, facts={"launcher": launcher, "kind": result["kind"]}
    )


def _agreements(result: dict[str, Any]) -> list[Finding]:
    ranks: list[dict[str, Any]] = result["ranks"]
    return [_of_pairs(result), _of_clocks(ranks), _of_versions(ranks), _of_directory(ranks)]


def _of_pairs(result: dict[str, Any]) -> Finding:
    ranks = result["ranks"]
    if len(ranks) == 1:
        return Finding("pairs", "one rank has no other", group=_GROUP)
    if not result["pairs_tried"]:
        text = "not tried: these ranks were not started by MPI"
        return Finding("pairs", text, group=_GROUP)
    times = {
        (rank, int(peer)): pair["seconds"]
        for rank, one in enumerate(ranks)
        for peer, pair in one["pairs"].items()
    }
    slowest = max(times, key=lambda pair: times[pair])
    names = " and ".join(f"rank {rank} on {ranks[rank]['host']}" for rank in slowest)
    text = (
        f"{counted(len(times) // 2, 'pair')} send both ways; the slowest 1 MiB takes "
        f"{1000 * times[slowest]:.1f} ms, between {names}"
    )
    return Finding("pairs", text, group=_GROUP, facts={"slowest_seconds": times[slowest]})


def _of_clocks(ranks: list[dict[str, Any]]) -> Finding:
    """Of the hosts against rank 0's, which leads in all its pairs."""
    ahead = {ranks[0]["host"]: 0.0}
    for peer, pair in ranks[0]["pairs"].items():
        ahead.setdefault(ranks[int(peer)]["host"], pair["ahead"])
    apart = max(ahead.values()) - min(ahead.values())
    facts = {"seconds_ahead": ahead}
    if len(ahead) == 1:
        return Finding("clocks", "one host", group=_GROUP, facts=facts)
    if apart < _FAR:
        return Finding("clocks", f"at most {1000 * apart:.1f} ms apart", group=_GROUP, facts=facts)
    first, last = (f(ahead, key=lambda host: ahead[host]) for f in (max, min))
    text = f"{first} is {apart:.1f} s ahead of {last}: times of records do not fit together"
    remedy = f"ssh {last} timedatectl; chronyc makestep (as root) on the host that is wrong"
    return Finding("clocks", text, "warning", remedy, _GROUP, facts)


def _versions(known: dict[int, Standing]) -> list[Finding]:
    """Of ranks that have not come to the end."""
    told = [
        {"host": standing.host, "versions": standing.facts["versions"], "mpi": None}
        for standing in known.values()
        if isinstance(standing.facts.get("versions"), dict)
    ]
    return [_of_versions(told)] if len(told) > 1 else []


def _of_versions(ranks: list[dict[str, Any]]) -> Finding:
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for one in ranks:
        for name, version in {**one["versions"], "MPI": one["mpi"]}.items():
            hosts = found[name][str(version)]
            if one["host"] not in hosts:
                hosts.append(one["host"])
    differing = {name: dict(values) for name, values in found.items() if len(values) > 1}
    facts = {"differing": differing}
    if not differing:
        same = next(iter(ranks))["versions"]
        text = f"the same everywhere: torch {same['torch']}, Horovod {same['horovod']}"
        return Finding("versions", text, group=_GROUP, facts=facts)
    told = "; ".join(
        f"{name} " + ", ".join(f"{version} on {', '.join(on)}" for version, on in values.items())
        for name, values in differing.items()
    )
    status: Any = "missing" if set(differing) & {*_MUST_AGREE, "MPI"} else "warning"
    remedy = "install the same on all hosts, or one environment on a file system that all see"
    return Finding("versions", f"differ: {told}", status, remedy, _GROUP, facts)


def _of_directory(ranks: list[dict[str, Any]]) -> Finding:
    unseen = [(one["host"], ranks[rank]["host"]) for one in ranks for rank in one["unseen"]]
    if not unseen:
        text = "what each rank writes, all others read"
        return Finding("shared files", text, group=_GROUP, facts={"unseen": []})
    told = "; ".join(f"{reader} does not see what {writer} wrote" for reader, writer in unseen[:4])
    remedy = "name a directory on a file system that all hosts share with --run-dir"
    facts = {"unseen": [{"reader": reader, "writer": writer} for reader, writer in unseen]}
    return Finding("shared files", told, "missing", remedy, _GROUP, facts)
