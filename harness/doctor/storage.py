"""Whether a directory can hold runs: what `harness.attempts` and `harness.records` ask of a file
system, tried for real. In a process of its own, as a dead file server holds up whoever asks it:

    python -m harness.doctor.storage DIR
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.doctor.findings import Finding, Status
from harness.doctor.looks import Look, look_at

_BLOCK = 4 * 2**20
"""Bytes that are written; less than any checkpoint that matters."""
LITTLE = 2 * 2**30
"""Bytes of free space that deserve a word."""
_PATIENCE = 30.0


def storage(directory: Path) -> list[Finding]:
    """Findings on the directory, or on the nearest one above it that is there."""
    place = nearest(directory)
    below = directory.absolute().relative_to(place).parts[:1]
    if below and os.path.lexists(inside := place / below[0]):
        text, other = f"{inside} is not a directory", "name another one with --run-dir"
        return [_found("directory", text, "missing", other, {"directory": str(inside)})]
    words = [sys.executable, "-m", "harness.doctor.storage", os.fspath(place)]
    return judged(place, look_at(words, _PATIENCE, os.environ))


def nearest(directory: Path) -> Path:
    place = directory.absolute()
    while not os.path.isdir(place) and place != place.parent:
        place = place.parent
    return place


def judged(place: Path, look: Look) -> list[Finding]:
    facts = {"directory": str(place)}
    if not look.facts:
        remedy = "is its file server up? Choose another directory: harness doctor --run-dir DIR"
        text = f"{place}: {look.failure}"
        return [_found("directory", text, "missing", remedy, facts)]
    seen = look.facts
    findings = [_writable(place, seen, facts), _space(place, seen)]
    if seen["error"] is None:
        findings.append(_features(place, seen))
    return findings


def _found(name: str, text: str, status: Status, remedy: str, facts: dict[str, Any]) -> Finding:
    return Finding(name, text, status, remedy, "storage", facts)


def _writable(place: Path, seen: dict[str, Any], facts: dict[str, Any]) -> Finding:
    error = seen["error"]
    if error is None:
        text = f"{place} can be written ({seen['type'] or 'file system of unknown type'})"
        return _found("directory", text, "ok", "", facts | {"type": seen["type"]})
    text = f"{place} cannot be written: {os.strerror(error)}"
    return _found("directory", text, "missing", _remedy(error, place), facts | {"errno": error})


def _remedy(error: int, place: Path) -> str:
    other = "name another directory with --run-dir"
    return {
        errno.EACCES: f"chmod u+rwx {place} (if it is yours), or {other}",
        errno.EPERM: f"lsattr -d {place} shows whether it is immutable (chattr -i); or {other}",
        errno.EROFS: f"it is mounted read-only: mount -o remount,rw (as root), or {other}",
        errno.ENOSPC: f"df -h {place}; du -sh {place}/* shows what to remove; or {other}",
        errno.EDQUOT: f"the quota is used up: quota -s; du -sh {place}/*; or {other}",
    }.get(error, other)


def _space(place: Path, seen: dict[str, Any]) -> Finding:
    free, total = seen["free_bytes"], seen["total_bytes"]
    text = f"{_size(free)} free of {_size(total)} at {place}"
    facts = {"free_bytes": free, "total_bytes": total}
    remedy = f"df -h {place}; du -sh {place}/* shows what to remove"
    if seen["error"] in (errno.ENOSPC, errno.EDQUOT):
        return _found("free space", text, "missing", remedy, facts)
    if seen["files_free"] is not None and seen["files_free"] < 1000:
        text += f", and room for {seen['files_free']} more files"
        return _found("free space", text, "warning", f"df -i {place}; remove files", facts)
    if free < LITTLE:
        return _found("free space", f"{text}: few checkpoints fit", "warning", remedy, facts)
    return _found("free space", text, "ok", "", facts)


def _features(place: Path, seen: dict[str, Any]) -> Finding:
    """Of what `harness.attempts` asks for."""
    tried: dict[str, str | None] = seen["tried"]
    failed = {name: why for name, why in tried.items() if why is not None}
    needed = sorted(set(failed) - {"hard links"})
    facts = {"features": {name.replace(" ", "_"): why is None for name, why in tried.items()}}
    other = "choose a directory on another file system with --run-dir"
    if needed:
        told = ", ".join(f"{name} ({failed[name]})" for name in needed)
        return _found("file system", f"does not do: {told}", "missing", other, facts)
    if failed:
        text = f"no hard links ({failed['hard links']}): each launch copies its checkpoints"
        return _found("file system", text, "warning", other, facts)
    return _found("file system", f"has {', '.join(tried)}", "ok", "", facts)


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:,.1f} TiB"


# In the process of its own


def examine(place: Path) -> dict[str, Any]:
    """Write, rename, link and lock in a folder of its own there, and remove it."""
    facts: dict[str, Any] = {"error": None, "tried": {}, "type": _type(place)}
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".harness-doctor-", dir=place))
        try:
            _write(scratch / "block")
            facts["tried"] = {name: _tried(check, scratch) for name, check in _CHECKS.items()}
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        facts["error"] = error.errno
    usage = os.statvfs(place)
    facts["free_bytes"] = usage.f_bavail * usage.f_frsize
    facts["total_bytes"] = usage.f_blocks * usage.f_frsize
    facts["files_free"] = usage.f_favail if usage.f_files else None
    return facts


def _write(path: Path) -> None:
    content = os.urandom(2**16) * (_BLOCK // 2**16)  # which no file system compresses away
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if path.read_bytes() != content:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _tried(check: Callable[[Path], str | None], scratch: Path) -> str | None:
    """Why it is not to be had; None if it is."""
    try:
        return check(scratch)
    except OSError as error:
        return error.strerror or str(error)


def _renames(folder: Path) -> str | None:
    """A rename replaces a file in one step, and does not replace a folder that holds something."""
    for name, content in (("old", "old"), ("new", "new")):
        (folder / name).write_text(content)
    os.rename(folder / "new", folder / "old")
    if (folder / "old").read_text() != "new":
        return "the old content is left"
    for name in ("first", "second"):
        (folder / name).mkdir()
        (folder / name / "mark").write_text(name)
    try:
        os.rename(folder / "second", folder / "first")
    except OSError:
        return None
    return "a folder replaces one that is not empty"


def _locks(folder: Path) -> str | None:
    """A lock that is held keeps a second one out."""
    path = folder / "lock"
    with path.open("w") as first, path.open("w") as second:
        fcntl.flock(first.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
    return "a lock is given twice"


def _syncs(folder: Path) -> str | None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


def _links(folder: Path) -> str | None:
    (folder / "one").write_text("1")
    os.link(folder / "one", folder / "other")
    return None if os.stat(folder / "one").st_nlink == 2 else "a link is a copy"


def _leads(folder: Path) -> str | None:
    (folder / "target").write_text("1")
    os.symlink("target", folder / "lead")
    return None if os.readlink(folder / "lead") == "target" else "a link leads elsewhere"


_CHECKS: dict[str, Callable[[Path], str | None]] = {
    "atomic rename": _renames,
    "locks": _locks,
    "fsync": _syncs,
    "symbolic links": _leads,
    "hard links": _links,
}


def _type(place: Path) -> str | None:
    """Of the file system, as the mount table has it."""
    real, best = os.path.realpath(place), ("", None)
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, where, kind, *_ = line.split()
                where = where.encode().decode("unicode_escape")
                inside = real == where or real.startswith(where.rstrip("/") + "/")
                if inside and len(where) >= len(best[0]):
                    best = (where, kind)  # type: ignore[assignment]
    except (OSError, ValueError):
        return None
    return best[1]


if __name__ == "__main__":
    print("@", json.dumps(examine(Path(sys.argv[1]))))
