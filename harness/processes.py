"""What Linux tells of processes in /proc.

    python -m harness.processes look|kill PID:BEGUN:FILE …

does the same on another host, for processes that hang there: a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

STATES = {
    "R": "running",
    "S": "asleep",
    "D": "in an uninterruptible wait, as for a file system or a device",
    "T": "stopped, as by SIGSTOP",
    "t": "stopped by a debugger",
    "Z": "dead",
    "I": "idle",
}
"""The letters of proc(5)."""


@dataclass(frozen=True)
class Process:
    """One process; ``pid`` and ``begun`` together are no other's, ever."""

    pid: int
    state: str
    """A key of ``STATES``, of its main thread."""
    parent: int
    begun: int
    """Clock ticks after the machine's start."""

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """None if there is none of that number."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            # The second field is the program's name in brackets, which may hold some itself.
            fields = text.rpartition(")")[2].split()
            return cls(pid, fields[0], int(fields[1]), int(fields[19]))
        except (OSError, ValueError, IndexError):
            return None

    @property
    def name(self) -> str:
        """Of its program, the first 15 letters; empty if it has ended."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text(errors="replace").strip()
        except OSError:
            return ""

    @property
    def lives(self) -> bool:
        now = Process.of(self.pid)
        return now is not None and now.begun == self.begun and now.state != "Z"

    def kill(self) -> None:
        """End it at once, also if it is stopped; nothing happens if it has ended before."""
        if self.lives:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def descendants(pid: int) -> list[Process]:
    """All processes that this one, and those in turn, have started and that still have them for
    parents."""
    children: dict[int, list[Process]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        process = Process.of(int(entry)) if entry.isdigit() else None
        if process is not None:
            children[process.parent].append(process)
    found: list[Process] = []
    waiting = [pid]
    while waiting:
        below = children[waiting.pop()]
        found += below
        waiting += [process.pid for process in below]
    return found


def killed_for_memory() -> int:
    """Processes that this host's kernel has killed since its start because memory ran out."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def threads_of(pid: int) -> list[str]:
    """A line for each thread of a process: number, name, state, and where in the kernel it waits,
    as far as one may know."""
    lines = []
    folder = Path(f"/proc/{pid}/task")
    with suppress(OSError):
        for task in sorted(folder.iterdir(), key=lambda path: int(path.name)):
            with suppress(OSError):
                text = (task / "stat").read_text(encoding="utf-8", errors="replace")
                name = text.partition("(")[2].rpartition(")")[0]
                state = text.rpartition(")")[2].split()[0]
                where = _where(task)
                lines.append(f"{task.name} {name}: {STATES.get(state, state)}{where}")
    return lines


@dataclass(frozen=True)
class Look:
    """What can be seen of a process from outside."""

    state: str = "?"
    """A key of ``STATES``; ``?``: nothing is known; empty: it has ended."""
    threads: tuple[str, ...] = ()
    dump: str = ""
    """What a thread of its own has written of its stacks."""


def look(pid: int, begun: int, file: int) -> Look:
    """``file``: the number of the process's file in memory that it may have written stacks to."""
    process = Process.of(pid)
    if process is None or process.begun != begun:
        return Look("")
    return Look(process.state, tuple(threads_of(pid)), _content(Path(f"/proc/{pid}/fd/{file}")))


def main(arguments: Sequence[str]) -> None:
    """See the head of this module."""
    what, *names = arguments
    for name in names:
        pid, begun, file = map(int, name.split(":"))
        print(json.dumps(asdict(look(pid, begun, file))), flush=True)
        if what == "kill":
            Process(pid, "?", 0, begun).kill()


def _content(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(0)
            return stream.read(1 << 20).decode(errors="replace")
    except OSError:
        return ""


def _where(task: Path) -> str:
    try:
        name = (task / "wchan").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f", in {name}" if name not in ("", "0") else ""


if __name__ == "__main__":
    main(sys.argv[1:])
