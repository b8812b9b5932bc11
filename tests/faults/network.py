"""Faults of the network between two hosts, with real ssh: cut, restored, and dropped silently."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from jobs import rank_processes
from testbed import Testbed, missing_for_testbed

from faults.row import Row
from faults.scene import Scene

GROUP = "Network between hosts"
SETTINGS = (
    "launch.interfaces=[eth0]",
    "launch.connect_timeout=3",
    # Long enough to mend the network in, where the row does.
    "launch.restart_pause=4",
)
FLICKER = 2.0
"""Seconds of a cut that nothing should come of."""


def lose(how: str, until: str, scene: Scene) -> None:
    """``how``: cut, or drop; ``until``: when the network is whole again."""
    update = scene.update()
    done = {"cut": "the link of one of two hosts cut", "drop": "all to and from a host dropped"}
    ends = {
        "end": "until the run's end",
        "known": "until it is known, then restored",
        "soon": f"for {FLICKER:g} s",
    }
    scene.finding.what = f"{done[how]} in update {update}, {ends[until]}"
    scene.plan("update", 0, update)
    words = ["--hosts", "n1:1,n2:1", "--launcher", "mpirun"]
    with Testbed(2, scene.folder) as bed:
        command = scene.words(*SETTINGS)
        at = command.index("--hosts")
        command[at : at + 2] = words
        there = ["env", "-C", str(scene.folder)]
        with scene.start(words=command, where=lambda w: bed.on("n1", [*there, *w])) as job:
            scene.held(job)
            scene.strike(lambda: bed.cut("n2") if how == "cut" else bed.drop("n2"))
            scene.release()
            if until == "known":
                scene.until(job, lambda: scene.events("fault"), "the fault was known")
                bed.mend("n2")
            elif until == "soon":
                time.sleep(FLICKER)
                bed.mend("n2")
            scene.end(job)
        left_out = [event["host"] for event in scene.events("host_left_out")]
        left = sorted(rank_processes(scene.run_dir))
    if until == "soon":
        scene.judge([0], "going on|starting", known_by="nothing to know", repeated=0)
        if scene.events("fault"):
            scene.finding.broken.append("a cut of 2 s ended the launch")
        return
    scene.judge([0], "lost|silent|unreachable|without a word|left out|ended with exit code")
    if left_out != (["n2"] if until == "end" else []):
        scene.finding.broken.append(f"left out were {left_out}")
    if left:
        scene.finding.broken.append(f"ranks {left} are still there after the run's end")


def rows() -> Iterator[Row]:
    """All of them, in the order of the table."""
    for how in ("cut", "drop"):
        for until in ("end", "known", "soon"):
            name = {"end": how, "known": f"{how}-restored", "soon": f"{how}-briefly"}[until]
            yield Row(name, GROUP, partial(lose, how, until), missing=missing_for_testbed)
