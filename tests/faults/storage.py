"""Faults of what lies on disks: full, read-only, broken checkpoints, two writers for one run."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import psutil
import torch
from jobs import harness, rank_processes

from faults.row import Row
from faults.scene import EVERY, PATIENCE, Scene

GROUP = "Disks and files"
DISK_MIB = 8
ITEMS = ("config.yaml", "plan.json", "metrics.jsonl", "events.jsonl", "checkpoints", "report")
"""What a run consists of."""


@cache
def no_mounts() -> str | None:
    """What keeps this machine from mounting a small disk, in words."""
    if os.geteuid() != 0:
        return "a small disk of its own needs root"
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    return f"nothing can be mounted here: {done.stderr.strip()}" if done.returncode else None


@contextmanager
def disk(place: Path) -> Iterator[Path]:
    """A disk of a few MiB at ``place``."""
    place.mkdir()
    size = f"size={DISK_MIB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def fill(place: Path, left: int = 0) -> Path:
    """Fill a disk but for so many KiB; returns the file that does it."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    size = filler.stat().st_size
    os.truncate(filler, max(0, size - left * 1024))
    return filler


def disk_full(what: str, scene: Scene) -> None:
    """The disk of the run directory is full from one moment on, and has room again before the run
    is gone on with."""
    checkpoint = what == "checkpoint"
    update = scene.update() // EVERY * EVERY + (0 if checkpoint else 1)
    room = " but for 8 KiB" if checkpoint else ""
    scene.finding.what = (
        f"the disk is full{room} from update {update} on "
        f"({'checkpoint' if checkpoint else 'metrics'}); room made, then --resume"
    )
    with disk(scene.folder / "disk") as place:
        scene.run_dir = place / "run"
        scene.plan("update", 0, update)
        with scene.start(restarts=0) as job:
            scene.held(job)
            scene.strike(lambda: fill(place, left=8 if checkpoint else 0))
            scene.release()
            scene.end(job)
            scene.finding.known_after = time.time() - scene.struck_at
        (place / "filler").unlink()
        scene.go_on()
        scene.judge([74, 0], "[Nn]o space left|disk full", known_by="the command's end")


def read_only(resume: bool, scene: Scene) -> None:
    """Refused before anything is started; afterwards it goes on as if nothing had been."""
    scene.finding.what = (
        "the run directory cannot be written when a run is to "
        f"{'go on' if resume else 'start'} there; made writable, then again"
    )
    with disk(scene.folder / "disk") as place:
        scene.run_dir = place / "run"
        if resume:
            _killed_once(scene, scene.update())
        remount(place, "ro")
        scene.strike(lambda: None)
        words = scene.words(resume=resume)
        refused = harness(*words, cwd=scene.folder, timeout=PATIENCE)
        scene.finding.known_after = time.time() - scene.struck_at
        scene.finding.exit_codes.append(refused.returncode)
        scene.output += refused.stdout + refused.stderr
        remount(place, "rw")
        if resume:
            scene.go_on()
        else:
            with scene.start() as job:
                scene.end(job)
        exits = [1, 2, 0] if resume else [2, 0]
        scene.judge(exits, "[Rr]ead-only file system", known_by="the command's end")


def _killed_once(scene: Scene, update: int) -> None:
    """A run that was killed in an update, with some checkpoints."""
    scene.plan("update", 1, update)
    with scene.start(restarts=0) as job:
        scene.held(job)
        rank_processes(scene.run_dir)[1].kill()
        scene.release()
        scene.end(job)


def _killed_and_then(scene: Scene, what: str) -> None:
    """The same in a random update, with words for what follows."""
    update = scene.update()
    scene.finding.what = f"killed in update {update}; {what}"
    _killed_once(scene, update)


def _checkpoints(run_dir: Path) -> list[Path]:
    """Newest first."""
    return sorted((run_dir / "checkpoints").glob("update-*.pt"), reverse=True)


def truncate(path: Path, scene: Scene) -> None:
    os.truncate(path, scene.random.randrange(1, path.stat().st_size))


def flip_a_bit(path: Path, scene: Scene) -> None:
    content = bytearray(path.read_bytes())
    content[scene.random.randrange(len(content))] ^= 1 << scene.random.randrange(8)
    path.write_bytes(content)


def empty(path: Path, scene: Scene) -> None:
    path.write_bytes(b"")


def lose_digest(path: Path, scene: Scene) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


DAMAGES: dict[str, tuple[Callable[[Path, Scene], None], str, str]] = {
    "truncated": (truncate, "truncated at a random byte", "does not match its digest"),
    "bit": (flip_a_bit, "with one random bit flipped", "does not match its digest"),
    "empty": (empty, "empty", "does not match its digest"),
    "no-digest": (lose_digest, "without its digest", "digest is missing"),
}


def broken_checkpoint(damage: str, scene: Scene) -> None:
    """The one before it is used instead."""
    change, words, said = DAMAGES[damage]
    _killed_and_then(scene, f"the newest checkpoint {words}; --resume")
    change(_checkpoints(scene.run_dir)[0], scene)
    scene.go_on()
    scene.judge([1, 0], said, known_by="the next start", repeated=2 * EVERY)


def all_broken(scene: Scene) -> None:
    _killed_and_then(scene, "all checkpoints broken; --resume; restored")
    kept = scene.folder / "kept"
    shutil.copytree(scene.run_dir / "checkpoints", kept)
    for path in _checkpoints(scene.run_dir):
        flip_a_bit(path, scene)
    scene.go_on()
    shutil.copytree(kept, scene.run_dir / "checkpoints", dirs_exist_ok=True)
    scene.go_on()
    scene.judge([1, 1, 0], "/run/checkpoints: no checkpoint is valid", known_by="the next start")


def foreign(scene: Scene) -> None:
    """A whole and valid checkpoint, but of another model."""
    _killed_and_then(scene, "the newest checkpoint is another configuration's; --resume")
    newest = _checkpoints(scene.run_dir)[0]
    other = scene.folder / "other"
    words = scene.words("model.options={width: 24}", "train.duration=3ep", restarts=0)
    words[words.index(str(scene.run_dir))] = str(other)
    made = harness(*words, cwd=scene.folder, timeout=PATIENCE)
    assert made.returncode == 0, made.stdout + made.stderr
    _replace(newest, _checkpoints(other)[0].read_bytes())
    scene.go_on()
    _judge_passed_over(scene, "another configuration")


def newer(scene: Scene) -> None:
    """A whole checkpoint in a format that is not known yet."""
    _killed_and_then(scene, "the newest checkpoint is a newer version's; --resume")
    newest = _checkpoints(scene.run_dir)[0]
    state = torch.load(newest, weights_only=True)
    content = io.BytesIO()
    torch.save({**state, "format": state["format"] + 1}, content)
    _replace(newest, content.getvalue())
    scene.go_on()
    _judge_passed_over(scene, r"written in format \d+")


def _judge_passed_over(scene: Scene, said: str) -> None:
    """The one before it is used instead."""
    scene.judge([1, 0], said, known_by="the next start", repeated=2 * EVERY)


def _replace(path: Path, content: bytes) -> None:
    """Put another content in a checkpoint's place, with its digest."""
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n", encoding="ascii")


def race(scene: Scene) -> None:
    """One of two wins and is not disturbed by the other."""
    scene.finding.what = "two `harness run` started at once in one directory"
    scene.strike(lambda: None)
    with scene.start() as one, scene.start() as two:
        ends = [one.finish(PATIENCE), two.finish(PATIENCE)]
    scene.finding.exit_codes = sorted(code for code, _ in ends)
    scene.output = "".join(output for _, output in ends)
    said = "is in use by|already holds a run"
    scene.judge([0, 2], said, known_by="the loser's end")


def resume_while_it_runs(scene: Scene) -> None:
    update = scene.update()
    scene.finding.what = f"--resume while the run is in update {update}"
    scene.plan("update", 0, update)
    with scene.start() as job:
        scene.held(job)
        scene.strike(lambda: None)
        scene.go_on()
        scene.finding.known_after = time.time() - scene.struck_at
        scene.release()
        scene.end(job)
    scene.judge([2, 0], "is in use by", known_by="the command's end", repeated=0)


def old_writer(scene: Scene) -> None:
    """Cut off with all its processes, as by a network that is gone: its locks are lost, and
    somebody else finishes the run before it comes back."""
    update = scene.update()
    scene.finding.what = (
        f"a whole attempt stopped in update {update}, its locks lost; the run finished by another; "
        "then the old one goes on"
    )
    scene.plan("update", 0, update)
    with scene.start(restarts=0) as job:
        scene.held(job)
        top = psutil.Process(job.process.pid)
        old = [top, *top.children(recursive=True)]
        _suspend(old)
        for name in ("lock", "launch.lock"):
            (scene.run_dir / name).unlink(missing_ok=True)
        scene.go_on()
        before = _content(scene.run_dir)
        scene.release()
        scene.strike(lambda: [one.resume() for one in reversed(old)])
        if psutil.wait_procs(old[1:], timeout=PATIENCE)[1]:
            scene.finding.broken.append("the old attempt's ranks are still there")
        scene.end(job)
        scene.finding.known_after = time.time() - scene.struck_at
    changed = {name for name, _ in before ^ _content(scene.run_dir)}
    if changed:
        scene.finding.broken.append(f"the old attempt has changed {', '.join(sorted(changed))}")
    said = "has taken the run over|newer attempt"
    scene.judge([0, 76], said, known_by="the old attempt's end")


def _suspend(processes: list[psutil.Process]) -> None:
    """The launcher first, so that none is taken for dead."""
    for process in processes:
        process.suspend()
    stopped = psutil.STATUS_STOPPED
    deadline = time.monotonic() + PATIENCE
    while any(one.status() != stopped for one in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def _content(run_dir: Path) -> set[tuple[str, str]]:
    """Names and digests of all that the run's names lead to."""
    items = [run_dir / name for name in ITEMS if (run_dir / name).exists()]
    files = [file for item in items for file in (item.rglob("*") if item.is_dir() else [item])]
    return {
        (str(file.relative_to(run_dir)), hashlib.sha256(file.read_bytes()).hexdigest())
        for file in files
        if file.is_file()
    }


def rows() -> Iterator[Row]:
    """All of them, in the order of the table."""
    for what in ("checkpoint", "metrics"):
        quick = what == "checkpoint"
        yield Row(f"full-{what}", GROUP, partial(disk_full, what), quick, no_mounts)
    yield Row("read-only", GROUP, partial(read_only, False), missing=no_mounts)
    yield Row("read-only-resume", GROUP, partial(read_only, True), missing=no_mounts)
    for damage in DAMAGES:
        name = f"checkpoint-{damage}"
        yield Row(name, GROUP, partial(broken_checkpoint, damage), damage == "bit")
    yield Row("checkpoint-all", GROUP, all_broken)
    yield Row("checkpoint-foreign", GROUP, foreign)
    yield Row("checkpoint-newer", GROUP, newer)
    yield Row("race", GROUP, race, quick=True)
    yield Row("resume-running", GROUP, resume_while_it_runs)
    yield Row("old-writer", GROUP, old_writer)
