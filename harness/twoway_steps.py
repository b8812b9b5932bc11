"""What the ranks of `harness doctor --ranks` leave in the directory that all of them share.

    rank-00000.jsonl    a line when a rank begins a step, so that one that hangs says where
    result.json         what rank 0 has gathered, at the end
    seen-00000          what that rank has written for the others to read

Knows no torch: the launching process reads it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = {
    "start": "starting",
    "torch": "importing torch",
    "horovod": "importing Horovod",
    "join": "joining the other ranks",
    "allreduce": "in the first allreduce",
    "pairs": "sending to each other rank",
    "directory": "reading what the other ranks wrote",
    "done": "done",
}
"""A step's name -> what a rank is doing then."""
RESULT = "result.json"


@dataclass(frozen=True)
class Standing:
    """How far a rank has come."""

    rank: int
    host: str
    step: str
    facts: dict[str, Any]
    """All that its lines hold."""

    @property
    def doing(self) -> str:
        peer = self.facts.get("peer")
        if self.step == "pairs" and isinstance(peer, str):
            return f"exchanging messages with {peer}"
        return STEPS.get(self.step, self.step)


class Steps:
    """Writes a rank's own lines."""

    def __init__(self, folder: Path, rank: int, host: str) -> None:
        self._path, self._host = folder / f"rank-{rank:05d}.jsonl", host

    def begin(self, step: str, **facts: object) -> None:
        line = json.dumps({"step": step, "host": self._host, "time": time.time(), **facts})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())  # for other hosts to see, whatever becomes of this process


def standings(folder: Path, ranks: int) -> dict[int, Standing]:
    """By rank; those are missing that have never begun, as far as this host can see."""
    found = {}
    for rank in range(ranks):
        facts: dict[str, Any] = {}
        try:
            text = (folder / f"rank-{rank:05d}.jsonl").read_text(encoding="utf-8")
            for line in text.splitlines():
                facts |= json.loads(line)
        except (OSError, ValueError):
            pass
        if facts:
            found[rank] = Standing(rank, str(facts.get("host")), str(facts.get("step")), facts)
    return found


def read_result(folder: Path) -> dict[str, Any] | None:
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None
