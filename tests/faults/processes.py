"""Faults of processes: ranks and launchers that are killed, stopped, or asked to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import psutil
from jobs import rank_processes

from faults.row import Row
from faults.scene import EVERY, PATIENCE, Scene, Unexpected, is_mpirun

GROUP = "Processes"
RANKS = (0, 1)
_SLOWLY = 0.1  # seconds that a training pass takes more
KILLED = r"was killed by signal 9 \(SIGKILL\)"


def _of_rank(rank: int) -> str:
    return f"rank {rank} {KILLED}|rank {rank} on \\S+ {KILLED}"


def kill_at_update(rank: int, scene: Scene) -> None:
    update = scene.update()
    scene.finding.what = f"SIGKILL to rank {rank} as it begins update {update}"
    _kill(scene, "update", held=rank, victim=rank, update=update)


def kill_in_collective(rank: int, scene: Scene) -> None:
    """The other rank is in it, or this one is; the one that is held has not come to it yet."""
    update = scene.update()
    scene.finding.what = {
        0: f"SIGKILL to rank 0 inside the allreduce of update {update}",
        1: f"SIGKILL to rank 1 as rank 0 waits for it inside the allreduce of update {update}",
    }[rank]
    _kill(scene, "collective", held=1, victim=rank, update=update)


def kill_in_checkpoint(rank: int, scene: Scene) -> None:
    update = scene.update() // EVERY * EVERY
    times = scene.random.randint(1, 12)
    scene.finding.what = (
        f"SIGKILL to rank {rank} after write {times} of the checkpoint of update {update}"
    )
    _kill(scene, "checkpoint", held=0, victim=rank, update=update, times=times)


def kill_before_its_name(scene: Scene) -> None:
    update = scene.update() // EVERY * EVERY
    scene.finding.what = (
        f"SIGKILL to rank 0 when the checkpoint of update {update} has its digest and no name yet"
    )
    _kill(scene, "digest", held=0, victim=0, update=update)


def kill_in_evaluation(rank: int, scene: Scene) -> None:
    update = scene.update(first=16)
    scene.finding.what = f"SIGKILL to rank {rank} in the first evaluation from update {update} on"
    _kill(scene, "evaluation", held=rank, victim=rank, update=update)


def kill_in_start(rank: int, scene: Scene) -> None:
    scene.finding.what = f"SIGKILL to rank {rank} as it builds its model, before any update"
    scene.plan("start", rank, 0)
    with scene.start() as job:
        scene.held(job)
        scene.signal(job, [rank], signal.SIGKILL)
        scene.release()
        scene.end(job)
    scene.judge([0], _of_rank(rank))


def _kill(scene: Scene, moment: str, held: int, victim: int, update: int, **more: object) -> None:
    scene.plan(moment, held, update, **more)
    with scene.start() as job:
        scene.held(job)
        if moment == "collective":
            entered = scene.folder / f"entered-{1 - held}"
            scene.until(job, entered.exists, "the other rank was in the collective")
        scene.signal(job, [victim], signal.SIGKILL)
        scene.release()
        scene.end(job)
    scene.judge([0], _of_rank(victim))


def kill_all_ranks(scene: Scene) -> None:
    update = scene.update()
    scene.finding.what = f"SIGKILL to all ranks at once in update {update}"
    scene.plan("update", 1, update)
    with scene.start() as job:
        scene.held(job)
        scene.signal(job, RANKS, signal.SIGKILL)
        scene.end(job)
    scene.judge([0], KILLED)


def kill_mpirun(scene: Scene) -> None:
    update = scene.update()
    scene.finding.what = f"SIGKILL to horovodrun's mpirun in update {update}"
    scene.plan("update", 0, update)
    with scene.start() as job:
        scene.held(job)
        below = psutil.Process(job.process.pid).children(recursive=True)
        victims = [one for one in below if is_mpirun(one)]
        if not victims:
            raise Unexpected(f"no mpirun among {[one.name() for one in below]}")
        scene.strike(lambda: [one.kill() for one in victims])
        scene.release()
        scene.end(job)
    scene.judge([0], "the launcher ended|was killed|without a word")


def kill_launcher(scene: Scene) -> None:
    update = scene.update()
    scene.finding.what = f"SIGKILL to `harness run` itself in update {update}; then --resume"
    # horovodrun gives ranks some seconds to end, in which they would be through.
    scene.plan("update", 1, update, pause=_SLOWLY)
    with scene.start() as job:
        scene.held(job)
        ranks = list(rank_processes(scene.run_dir).values())
        scene.strike(job.process.kill)
        scene.release()
        alive = psutil.wait_procs(ranks, timeout=PATIENCE)[1]
        scene.finding.known_after = time.time() - scene.struck_at
        scene.end(job)
    if alive:
        scene.finding.broken.append("ranks outlived their launcher")
    scene.go_on()
    scene.judge([-9, 0], "going on with 2 ranks", known_by="the end of its ranks")


def ask_to_stop(number: signal.Signals, whom: str, scene: Scene) -> None:
    update = scene.update()
    told = {"one": "to rank 1", "all": "to all ranks", "launcher": "to `harness run`"}[whom]
    scene.finding.what = f"{number.name} {told} in update {update}; then --resume"
    scene.plan("update", 0, update)
    with scene.start() as job:
        scene.held(job)
        if whom == "launcher":
            scene.strike(lambda: job.process.send_signal(number))
            scene.until(job, scene.relayed, "the signal was taken up")
        else:
            scene.signal(job, RANKS if whom == "all" else [1], number)
        scene.release()
        scene.end(job)
    scene.go_on()
    scene.judge([75, 0], "stopped on request with a checkpoint", known_by="stop", repeated=0)


def interrupt_twice(scene: Scene) -> None:
    update = scene.update()
    scene.finding.what = f"SIGINT twice to `harness run` in update {update}; then --resume"
    scene.plan("update", 0, update)
    with scene.start() as job:
        scene.held(job)
        scene.strike(lambda: job.process.send_signal(signal.SIGINT))
        scene.until(job, scene.relayed, "the first was taken up")
        job.process.send_signal(signal.SIGINT)
        scene.end(job)
        scene.finding.known_after = time.time() - scene.struck_at
    scene.go_on()
    scene.judge([1, 0], "ending the ranks at once", known_by="the command's end")


def stop_in_start(scene: Scene) -> None:
    scene.finding.what = "SIGTERM to `harness run` as its ranks build their models; then --resume"
    scene.plan("start", 0, 0)
    with scene.start() as job:
        scene.held(job)
        scene.strike(lambda: job.process.send_signal(signal.SIGTERM))
        scene.until(job, scene.relayed, "the signal was taken up")
        scene.release()
        scene.end(job)
    scene.go_on()
    scene.judge([75, 0], "stopped on request with a checkpoint", known_by="stop", repeated=0)


def hang(rank: int, scene: Scene) -> None:
    """SIGSTOP: the rank neither works nor ends."""
    update = scene.update()
    scene.finding.what = f"SIGSTOP to rank {rank} in update {update}, {HANG_KEY} = {HANG_SECONDS}"
    scene.plan("update", rank, update)
    with scene.start(f"{HANG_KEY}={HANG_SECONDS}") as job:
        scene.held(job)
        processes = list(rank_processes(scene.run_dir).values())
        scene.signal(job, [rank], signal.SIGSTOP)
        scene.release()
        scene.end(job)
    _judge_hang(scene, processes, rf"rank {rank} .*does not answer")


def stuck(scene: Scene) -> None:
    """The rank is alive and does not get on, as in a read that never returns."""
    update = scene.update()
    scene.finding.what = f"rank 1 stuck in update {update}, {HANG_KEY} = {HANG_SECONDS}"
    scene.plan("update", 1, update)
    with scene.start(f"{HANG_KEY}={HANG_SECONDS}") as job:
        scene.held(job)
        processes = list(rank_processes(scene.run_dir).values())
        scene.strike(lambda: None)
        scene.end(job)
    _judge_hang(scene, processes, "rank 1 .* has been ")


def _judge_hang(scene: Scene, processes: list[psutil.Process], said: str) -> None:
    if psutil.wait_procs(processes, timeout=PATIENCE)[1]:
        scene.finding.broken.append("ranks of the launch that hung are still there")
    written = {p.name for p in scene.run_dir.rglob("rank-*.txt") if "stacks" in p.parts}
    if len(written) < len(RANKS):
        scene.finding.broken.append(f"stacks were written of {sorted(written)} alone")
    scene.judge([0], said)


HANG_KEY, HANG_SECONDS = "launch.hang_seconds", 5


def rows() -> Iterator[Row]:
    """All of them, in the order of the table."""
    by_rank: dict[str, Callable[[int, Scene], None]] = {
        "update": kill_at_update,
        "collective": kill_in_collective,
        "checkpoint": kill_in_checkpoint,
        "evaluation": kill_in_evaluation,
        "start": kill_in_start,
    }
    for name, stage in by_rank.items():
        for rank in RANKS:
            quick = (name, rank) in {("update", 1), ("checkpoint", 0)}
            yield Row(f"kill-{name}-{rank}", GROUP, partial(stage, rank), quick)
    yield Row("kill-digest-0", GROUP, kill_before_its_name)
    yield Row("kill-all", GROUP, kill_all_ranks)
    yield Row("kill-mpirun", GROUP, kill_mpirun)
    yield Row("kill-launcher", GROUP, kill_launcher)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        for whom in ("one", "all", "launcher"):
            short = number.name.removeprefix("SIG").lower()
            quick = (short, whom) == ("usr2", "one")
            yield Row(f"{short}-{whom}", GROUP, partial(ask_to_stop, number, whom), quick)
    yield Row("int-twice", GROUP, interrupt_twice)
    yield Row("term-start", GROUP, stop_in_start)
    for rank in RANKS:
        yield Row(f"hang-{rank}", GROUP, partial(hang, rank))
    yield Row("hang-alive", GROUP, stuck)
