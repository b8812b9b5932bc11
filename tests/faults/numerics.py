"""Faults of what a rank computes with: NaN and inf, memory, the clock."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial

from faults.row import Row
from faults.scene import Scene

GROUP = "Numbers, memory, clock"
SHOWN = {"nan": "NaN", "inf": "inf"}
WHAT = {"loss": "logits, and so its loss", "gradients": "gradients", "inputs": "images"}


def spoil(what: str, value: str, scene: Scene) -> None:
    """One update of one rank: all ranks leave it out together, and the run goes on."""
    update, rank = scene.update(), scene.random.randrange(2)
    scene.finding.what = f"{SHOWN[value]} among rank {rank}'s {WHAT[what]} in update {update}"
    scene.plan(what, rank, update, value=value)
    scene.strike(lambda: None)
    with scene.start() as job:
        scene.end(job)
    scene.struck_at = scene.planned_at()
    scene.judge([0], "a gradient is inf or NaN", known_by="skipped_update", same=False)
    skipped = scene.events("skipped_update")
    if [event["update"] for event in skipped] != [update]:
        scene.finding.broken.append(f"skipped were {[event['update'] for event in skipped]}")
    scene.check_records(evaluations=False)


def spoil_for_ever(scene: Scene) -> None:
    """Nothing that another launch would mend: ten updates are skipped, then the run ends."""
    update = scene.update()
    scene.finding.what = f"NaN among rank 1's logits from update {update} on"
    scene.plan("loss", 1, update, value="nan", always=True)
    with scene.start() as job:
        scene.end(job)
    scene.struck_at = scene.planned_at()
    scene.judge([1], "10 updates in a row were skipped", same=False, repeated=0)
    if scene.events("restart"):
        scene.finding.broken.append("it was started again, which mends nothing")


def out_of_memory(scene: Scene) -> None:
    update, rank = scene.update(), scene.random.randrange(2)
    scene.finding.what = f"no memory is left to rank {rank} in update {update}"
    scene.plan("memory", rank, update)
    with scene.start() as job:
        scene.end(job)
    scene.struck_at = scene.planned_at()
    scene.judge([0], f"rank {rank} on .*(memory|alloc)")


CLOCK = """
import time
from pathlib import Path

true, shift = time.time, Path({path!r})


def shifted():
    try:
        return true() + float(shift.read_text())
    except (OSError, ValueError):
        return true()


time.time = shifted
"""
"""A sitecustomize, by which every Python process of a run has a clock that can be moved."""


def clock_jump(hours: int, scene: Scene) -> None:
    """Of all of the run's processes, launcher and ranks; a rank is killed after it, so that the
    pauses and waits of a restart are seen too."""
    update = scene.update()
    words = f"{abs(hours)} h {'ahead' if hours > 0 else 'back'}"
    scene.finding.what = (
        f"time.time() of launcher and ranks jumps {words} in update {update}; rank 1 killed there"
    )
    shift = scene.folder / "shift"
    (scene.folder / "site").mkdir()
    customize = scene.folder / "site" / "sitecustomize.py"
    customize.write_text(CLOCK.format(path=str(shift)), encoding="utf-8")
    scene.plan("update", 0, update)
    variable = f"PYTHONPATH={customize.parent}"
    with scene.start(where=lambda words: ["env", variable, *words]) as job:
        scene.held(job)
        shift.write_text(str(3600 * hours), encoding="ascii")
        scene.signal(job, [1], signal.SIGKILL)
        scene.release()
        scene.end(job)
    scene.judge([0], r"rank 1.*SIGKILL")
    took = time.time() - scene.struck_at
    if took > 600:
        scene.finding.broken.append(f"it went on after {took:.0f} s only")


def rows() -> Iterator[Row]:
    """All of them, in the order of the table."""
    for what in WHAT:
        for value in ("nan", "inf"):
            quick = (what, value) == ("loss", "nan")
            yield Row(f"{value}-{what}", GROUP, partial(spoil, what, value), quick)
    yield Row("nan-for-ever", GROUP, spoil_for_ever)
    yield Row("memory", GROUP, out_of_memory)
    for hours in (24, -24):
        name = "clock-ahead" if hours > 0 else "clock-back"
        yield Row(name, GROUP, partial(clock_jump, hours))
