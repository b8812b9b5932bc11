"""Whether a launch hangs, and on whom: what follows from the ranks' signs of life.

Ranks meet in every update, so one that stands still soon makes all others wait. The job hangs when
no rank has got any further for ``launch.hang_seconds``. A rank that was silent in the meantime does
not answer: it is stopped, its machine or network is gone, or its interpreter is held up. Of those
that answer, the ones that are somewhere else than in a collective are what the others wait for.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import environment
from harness.errors import HarnessError
from harness.files import open_regular
from harness.processes import STATES, Look, Process, descendants, look
from harness.pulse import MARK, MEETING, Silence, tick_of
from harness.rundir import RunDirectory
from harness.wording import counted
from launch.preflight import over_ssh, ssh
from launch.spec import LaunchSpec

_START = 120.0  # seconds at least for ranks that do not train yet: programs and data are read
_NAMED = 8  # ranks that a message names
_MOST = 10**6  # ranks of a job
_SSH = 10.0  # seconds for a host to let ssh in, and as many to answer
_PARALLEL = 32
_LONGEST_END = 120.0  # seconds to wait for the end of a job that hangs, and for its stacks


@dataclass(frozen=True)
class Told:
    """What a rank has said of itself."""

    rank: int
    size: int
    host: str
    pid: int
    begun: int
    dump: int
    step: str | None
    training: bool
    silent: float
    place: str
    collective: str

    @classmethod
    def parse(cls, line: str) -> Told | None:
        """None if the line is no sign of life."""
        _, mark, payload = line.partition(MARK)
        if not mark:
            return None
        with suppress(ValueError, TypeError, RecursionError):
            fields = json.JSONDecoder().raw_decode(payload)[0]
            told = cls(**fields)
            return told if told._is_sound() else None
        return None

    def _is_sound(self) -> bool:
        """A model of the user's may print what merely begins like a sign of life."""
        numbers = (self.rank, self.size, self.pid, self.begun, self.dump)
        texts = (self.host, self.place, self.collective, self.step or "")
        return (
            all(isinstance(number, int) for number in numbers)
            and all(isinstance(text, str) for text in texts)
            and isinstance(self.training, bool)
            and 0 <= self.rank < self.size <= _MOST
            and self.pid > 0
            and 0 <= self.silent < math.inf
        )

    @property
    def process(self) -> Process:
        return Process(self.pid, "?", 0, self.begun)

    @property
    def name(self) -> str:
        """For ``python -m harness.processes``."""
        return f"{self.pid}:{self.begun}:{self.dump}"


@dataclass(frozen=True)
class Stuck:
    """A rank when the job hung."""

    rank: int
    told: Told | None
    """None: it has never said anything."""
    answers: bool
    seconds: float
    """Without a sign of getting on."""
    seen: Look = field(default_factory=Look)

    @property
    def waits(self) -> bool:
        """Whether it is others that it waits for."""
        return self.answers and self.told is not None and self.told.place == MEETING

    def __str__(self) -> str:
        if self.told is None:
            return f"rank {self.rank} has not begun"
        name = f"rank {self.rank} on {self.told.host}"
        if self.answers:
            return f"{name} has been {self.told.place} for {self.seconds:.0f} s"
        state = "has ended" if not self.seen.state else STATES.get(self.seen.state, "")
        shown = f"is {state}" if self.seen.state else state
        return f"{name} does not answer" + (f" (pid {self.told.pid} {shown})" if state else "")


@dataclass(frozen=True)
class Hang:
    """What was found when a launch hung."""

    seconds: float
    """After which it counted as hanging."""
    ranks: tuple[Stuck, ...]
    stopped: tuple[str, ...] = ()
    """Other processes of the launch on this host that are stopped: the launcher's, or loading
    processes."""
    stacks: Path | None = None
    """Where they lie."""

    @property
    def facts(self) -> dict[str, Any]:
        """For an event."""
        causes = [
            {
                "rank": rank.rank,
                "host": rank.told and rank.told.host,
                "pid": rank.told and rank.told.pid,
                "answers": rank.answers,
                "place": rank.told and rank.told.place,
                "state": rank.seen.state or None,
            }
            for rank in self.causes
        ]
        stacks = None if self.stacks is None else f"{self.stacks.parent.name}/{self.stacks.name}"
        return {"hang_seconds": self.seconds, "stuck": causes, "stacks": stacks}

    @property
    def causes(self) -> tuple[Stuck, ...]:
        """The ranks that the others wait for; none if all wait."""
        return tuple(rank for rank in self.ranks if not rank.waits)

    @property
    def message(self) -> str:
        where = f"; stacks in {self.stacks}" if self.stacks else ""
        return (
            f"{self._who()}; no rank has got any further for {self.seconds:g} s "
            f"(launch.hang_seconds), and the job was ended{where}"
        )

    def _who(self) -> str:
        found = self._ranks()
        return f"{found}; {', '.join(self.stopped)}" if self.stopped else found

    def _ranks(self) -> str:
        causes = self.causes
        if not causes:
            return self._collectives()
        if len(causes) == len(self.ranks) > 1 and not any(rank.answers for rank in causes):
            return f"none of {counted(len(causes), 'rank')} answers: {_joined(causes)}"
        return _joined(causes)

    def _collectives(self) -> str:
        places: dict[str, list[int]] = defaultdict(list)
        for rank in self.ranks:
            if rank.told is not None:
                places[rank.told.collective or "their first collective"].append(rank.rank)
        if len(places) < 2:
            return f"all ranks wait for each other in {next(iter(places), 'a collective')}"
        told = [
            f"{counted(len(ranks), 'rank')} (the first is {min(ranks)}) in {name}"
            for name, ranks in places.items()
        ]
        return f"the ranks wait for each other in different collectives: {', '.join(told)}"


class Vigil:
    """Hears the ranks and says whether the launch hangs. Clocks are the caller's, and monotonic."""

    def __init__(self, seconds: float, ranks: int, now: float) -> None:
        self._seconds, self._size = seconds, ranks
        self._silence = Silence(tick_of(seconds), now)
        self._told: dict[int, Told] = {}
        self._heard: dict[int, float] = {}
        self._progress: dict[int, float] = {}
        self._any = now
        self._shift = 0.0
        """Time that does not count: see ``look``."""

    def hear(self, told: Told, now: float) -> None:
        now -= self._shift
        self._size = told.size
        self._told[told.rank], self._heard[told.rank] = told, now
        self._progress[told.rank] = now - told.silent

    def progress(self, now: float) -> None:
        """A rank has shown that it goes on."""
        self._any = now - self._shift

    def look(self, now: float, reading: bool = True) -> bool:
        """Whether it hangs. Time does not count in which nobody looked, because this process was
        stopped, or in which it did not read what the ranks have said (``reading`` is false), as
        when someone holds the terminal up."""
        skipped = self._silence.skipped(now, reading)
        if skipped:
            self._shift += skipped
            now_counted = now - self._shift
            self._any = min(self._any, now_counted)
            for times in (self._heard, self._progress):
                times.update({rank: min(time, now_counted) for rank, time in times.items()})
        newest = max([self._any, *(self._progress[rank] for rank in self._known)])
        return now - self._shift - newest >= self.limit

    @property
    def limit(self) -> float:
        """Seconds after which a silence counts now. Before all ranks train, steps that give no sign
        take longer."""
        training = [rank for rank in self._known if self._told[rank].training]
        return self._seconds if len(training) == self._size else max(self._seconds, _START)

    def stuck(self, now: float) -> list[Stuck]:
        """All ranks, as far as is known."""
        now -= self._shift
        recent = now - self._seconds / 2 - tick_of(self._seconds)
        return [
            Stuck(
                rank,
                self._told.get(rank),
                self._heard.get(rank, -1e300) >= recent,
                now - self._progress.get(rank, now),
            )
            for rank in range(self._size)
        ]

    @property
    def _known(self) -> list[int]:
        """Ranks that have been heard; of a world that has become smaller, those that are left."""
        return [rank for rank in self._told if rank < self._size]

    @property
    def told(self) -> Mapping[int, Told]:
        return self._told


class HangWatch:
    """Watches one launch beside what reads its output, and ends it when it hangs."""

    def __init__(
        self, seconds: float, spec: LaunchSpec, launcher: str, directory: RunDirectory
    ) -> None:
        self._seconds, self._spec, self._launcher = seconds, spec, launcher
        self._directory = directory
        self._vigil = Vigil(seconds, spec.ranks, time.monotonic())
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._handled = 0
        self._handling = False
        self.hang: Hang | None = None
        """Once it has hung."""
        for old in directory.stacks.glob("rank-*.txt"):
            old.unlink(missing_ok=True)

    def takes(self, line: str) -> bool:
        """Whether a line of output is a sign of life, and nothing else."""
        told = Told.parse(line)
        if told is not None:
            with self._lock:
                self._vigil.hear(told, time.monotonic())
        return told is not None or MARK in line

    def progress(self) -> None:
        with self._lock:
            self._vigil.progress(time.monotonic())

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Around what is done with a line of output."""
        self._handling = True
        try:
            yield
        finally:
            self._handled += 1
            self._handling = False

    @contextmanager
    def beside(self, process: subprocess.Popen[str], end: Callable[[], None]) -> Iterator[None]:
        """``end``: ends the launcher and all that it has started here."""
        thread = threading.Thread(
            target=self._watch, args=(process, end), name="hang-watch", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(_LONGEST_END)

    def _watch(self, process: subprocess.Popen[str], end: Callable[[], None]) -> None:
        handled = -1
        while not self._over.wait(tick_of(self._seconds)):
            reading = not (self._handling and self._handled == handled)
            handled = self._handled
            with self._lock:
                now = time.monotonic()
                hangs = self._vigil.look(now, reading)
                stuck = self._vigil.stuck(now) if hangs else []
                limit = self._vigil.limit
            if hangs and process.poll() is None:
                self._conclude(process, end, stuck, limit)
                return

    def _conclude(
        self,
        process: subprocess.Popen[str],
        end: Callable[[], None],
        stuck: Sequence[Stuck],
        limit: float,
    ) -> None:
        """Look at what does not answer, end the job, and write down what was found. In this order:
        the file system may be what hangs."""
        told = list(self._vigil.told.values())
        self.hang = Hang(limit, tuple(stuck))
        try:
            stopped = _stopped(process.pid, {one.pid for one in told})
            self.hang = Hang(limit, tuple(self._looked_at(stuck)), stopped)
        finally:
            self._end(told, end)
        folder = self._keep(self.hang.ranks)
        if folder is not None:
            self.hang = replace(self.hang, stacks=folder)

    def _end(self, told: Sequence[Told], end: Callable[[], None]) -> None:
        for one in told:
            if one.host == environment.host():
                one.process.kill()
        self._cancel(told)
        end()
        self._elsewhere("kill", [one for one in told if one.host != environment.host()])

    def _looked_at(self, stuck: Sequence[Stuck]) -> list[Stuck]:
        """With what can be seen from outside of those that the others wait for."""
        asked = [rank.told for rank in stuck if rank.told is not None and not rank.waits]
        here = [told for told in asked if told.host == environment.host()]
        seen = {told: look(told.pid, told.begun, told.dump) for told in here}
        seen |= self._elsewhere("look", [told for told in asked if told not in seen])
        return [
            replace(rank, seen=seen[rank.told]) if rank.told in seen else rank for rank in stuck
        ]

    def _elsewhere(self, what: str, ranks: Sequence[Told]) -> dict[Told, Look]:
        """Look at ranks on other hosts, or kill what is left of them, where ssh leads there."""
        if not over_ssh(self._launcher):
            return {}
        by_host: dict[str, list[Told]] = defaultdict(list)
        for told in ranks:
            host = self._spec.host_of(told.rank)
            if host is not None:
                by_host[host].append(told)
        if not by_host:
            return {}
        with ThreadPoolExecutor(min(_PARALLEL, len(by_host))) as pool:
            answers = pool.map(lambda host: self._ask(host, what, by_host[host]), by_host)
            return {told: seen for answer in answers for told, seen in answer.items()}

    def _ask(self, host: str, what: str, ranks: Sequence[Told]) -> dict[Told, Look]:
        names = [told.name for told in ranks]
        words = [self._spec.command[0], "-m", "harness.processes", what, *names]
        try:
            done = subprocess.run(
                [*ssh(host, _SSH), shlex.join(words)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=2 * _SSH,
                check=False,
                start_new_session=True,
            )
            answers = [Look(**json.loads(line)) for line in done.stdout.splitlines()]
        except (OSError, subprocess.TimeoutExpired, ValueError, TypeError):
            return {}
        return dict(zip(ranks, answers, strict=False))

    def _cancel(self, told: Sequence[Told]) -> None:
        """Have Slurm kill the ranks that srun has started, on all nodes: a srun that is asked to
        end waits for ranks that are not going to."""
        for step in {one.step for one in told if one.step is not None}:
            with suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    ["scancel", "--signal=KILL", step],  # noqa: S607 - the user's Slurm
                    timeout=2 * _SSH,
                    check=False,
                    capture_output=True,
                )

    def _keep(self, found: Sequence[Stuck]) -> Path | None:
        """Put what the ranks have written, and what there is to say of those that did not, into a
        folder of its own; None if that is not possible."""
        assert self.hang is not None  # noqa: S101 - for the type checker
        stacks = self._directory.stacks
        try:
            stacks.mkdir(exist_ok=True)
            folder = _fresh(stacks)
            for path in sorted(stacks.glob("rank-*.txt")):
                path.rename(folder / path.name)
            for rank in found:
                path = folder / f"rank-{rank.rank:05d}.txt"
                if not rank.answers or not path.exists():
                    path.write_text(_account(rank, path), encoding="utf-8")
            (folder / "hang.txt").write_text(f"{self.hang.message}\n", encoding="utf-8")
        except OSError:
            return None
        return folder


def _stopped(launcher: int, ranks: Set[int]) -> tuple[str, ...]:
    """What has been started here and is stopped, besides the ranks themselves."""
    own = Process.of(launcher)
    family = [*([own] if own else []), *descendants(launcher)]
    return tuple(
        f"{one.name} (pid {one.pid}) is {STATES[one.state]}"
        for one in family
        if one.state in ("T", "t") and one.pid not in ranks
    )


def _account(rank: Stuck, path: Path) -> str:
    """What there is to tell of a rank that has not written its stacks, or did before and then fell
    silent."""
    earlier = ""
    with suppress(OSError), open_regular(path) as file:
        earlier = file.read().decode(errors="replace")
    lines = [str(rank)]
    if rank.told is not None:
        lines.append(f"last heard while {rank.told.place}")
    if rank.seen.threads:
        lines += ["", "its threads, as the kernel has them:", *rank.seen.threads]
    if rank.seen.dump:
        lines += ["", rank.seen.dump]
    if earlier:
        lines += ["", "before it fell silent:", "", earlier]
    return "\n".join([*lines, ""])


def _fresh(stacks: Path) -> Path:
    for number in range(1, 10**6):
        folder = stacks / f"hang-{number}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise HarnessError(f"{stacks} is full")


def _joined(ranks: Sequence[Stuck]) -> str:
    shown = ", ".join(map(str, ranks[:_NAMED]))
    return f"{shown} and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else shown
