"""Attempts at a run: each writes into a folder of its own, so that no other can harm it.

    attempts/00000003/    all that attempt 3 records, and the checkpoints that it goes on from
    metrics.jsonl, …      links to what the newest attempt has

An attempt that was cut off from the network, stopped or hung in its file system may come back after
the run was started again elsewhere. Between any check that it makes and the write that follows it
may have slept for a day, and locks of a shared file system go with the network. So nothing here
depends on a check: an old attempt has no name in common with a newer one that it could write to,
replace or remove.

- A new attempt prepares its folder under a name that nobody looks at: the records as far as its
  checkpoint knows of them, copied into fresh files, and the checkpoints as further links to the
  same files. It takes its number by renaming the folder, which fails if there is one: of several
  that race for a number one gets it, with all that it prepared, in one step.
- The highest number is the run. What an older attempt writes from then on is in a folder that no
  reader takes into account, or in files that have lost their names.
- A folder of a higher number is never touched. Older ones are removed.
- Links in the run directory are for people and their tools. An old attempt that was frozen while it
  made them may lead one of them astray; the newest attempt, which looks after them at each
  checkpoint, sets that right, and the harness's own readers go by the numbers.

An attempt looks for a newer one before each line and each checkpoint, only to end early and say why
(Superseded). Order comes from numbers alone, never from a clock.

What is asked of the file system: that mkdir and rename are atomic, and symbolic links. Hard links
save a copy of the checkpoints where they are to be had.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import RunDirectoryError, StorageError, Superseded
from harness.files import open_regular, partial_name, storage_error, sync_directory, write_atomic
from harness.jsonl import Record, now, read_object, write_json
from harness.records import Position, rewind
from harness.rundir import ITEMS, RunDirectory, newest_number, numbered, place_name
from harness.versions import installed_version
from harness.yamlfile import one_line

FORMAT = 1
"""Of an attempt's folder and its records. Run directories without such folders are older."""
_MARK = "attempt.json"
_TEMPORARY = re.compile(r"\.(?:new|old)-(?P<number>[0-9]{8,})-[0-9a-f]+")
_NO_HARD_LINKS = (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT)
"""Why a rename to a name that there is already fails; ENOENT: whoever has it has cleaned up."""


@dataclass(frozen=True)
class Attempt:
    """This process's right to write a run's records, as long as it has no successor."""

    run: RunDirectory
    """With this attempt's own folder."""
    number: int

    def check(self) -> None:
        """Raise Superseded if there is a newer attempt, StorageError if the directory is gone."""
        after = self.run.attempts / place_name(self.number + 1)
        if os.path.lexists(after) or not os.path.lexists(self._place):
            self._end()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around what writes to the folder: raises what ``check`` does, before and after, and
        StorageError where nothing can be written."""
        self.check()
        try:
            yield
        except OSError as error:
            self.check()  # in a folder that a newer attempt has removed, nothing can be
            raise storage_error(self.run.path, error) from None

    def begin(self) -> None:
        """Be what the run directory shows, alone. Raises what ``check`` does."""
        if newest_number(self.run.attempts) > self.number:  # and the one that came next is gone
            self._end()
        with self.writing():
            self.publish()
            self.retire_older()

    def publish(self) -> None:
        """Have the names in the run directory lead to this attempt's folder."""
        for name in ITEMS:
            if os.path.lexists(self._place / name):
                _lead(self.run.path / name, self._place / name, self._aside(0))

    def retire_older(self) -> None:
        """Remove the folders of older attempts, and what attempts that came to nothing left."""
        for entry in list(self.run.attempts.iterdir()):
            temporary = _TEMPORARY.fullmatch(entry.name)
            if temporary is not None and int(temporary["number"]) <= self.number:
                shutil.rmtree(entry, ignore_errors=True)
            elif 0 < numbered(entry.name) < self.number:
                # Under another name first: its owner finds nothing to write to from then on.
                aside = self._aside(int(entry.name))
                with suppress(OSError):
                    entry.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)

    @property
    def _place(self) -> Path:
        return self.run.attempts / place_name(self.number)

    def _aside(self, number: int) -> Path:
        return self.run.attempts / f".old-{place_name(number)}-{secrets.token_hex(8)}"

    def _end(self) -> None:
        newest = 0
        with suppress(OSError):  # a file system that is gone
            newest = newest_number(self.run.attempts)
        if newest <= self.number:
            raise StorageError(
                f"{self.run.path}: this attempt's folder was moved, removed or unmounted while the "
                "run went on; nothing more can be written there"
            )
        raise Superseded(
            f"{self.run.path}: attempt {self.number} ends, as attempt {newest} "
            f"({holder(self.run)}) has taken the run over"
        )


class Draft:
    """The folder of the next attempt in the making; it counts for nothing until ``commit``."""

    def __init__(self, run: RunDirectory, fresh: bool = False, before: int | None = None) -> None:
        """Take the newest attempt's checkpoints and scalars over.

        ``fresh``: there was no run when we looked last; ``before``: the newest attempt when our
        launching process began, which has to know of all since. Raises Superseded if it does not
        (it may have slept before it started us), RunDirectoryError if another attempt
        begins at the same time, or the file system has no symbolic links; StorageError if nothing
        can be written.
        """
        # The number first: an attempt that comes between makes the base newer, and has the number.
        self._number = newest_number(run.attempts) + 1
        self._run, self._base = run, run.newest()
        self._token = secrets.token_hex(8)
        self._folder = run.attempts / f".new-{place_name(self._number)}-{self._token}"
        self._done = False
        self.run = replace(run, place=self._folder)
        if fresh and self._base.holds_run:
            raise self._taken()
        if before is not None and not is_ours(self._base, before):
            raise Superseded(
                f"{run.path}: this launch ends, as {holder(run)} has taken the run over"
            )
        try:
            with self.making():
                run.attempts.mkdir(exist_ok=True)
                self._folder.mkdir()
                _check_links(self._folder)
                _adopt(self._base.checkpoints, self.run.checkpoints)
                _adopt(self._base.tensorboard, self.run.tensorboard)
        except BaseException:
            self.discard()
            raise

    def take_records(self, position: Position) -> int:
        """Take the records over as far as a checkpoint knows of them; how many lines of metrics
        are missing of those."""
        with self.making():
            for name in ("config.yaml", "provenance.json", "plan.json"):
                source = (self._base.place or self._base.path) / name
                if source.exists():
                    with open_regular(source) as file:
                        write_atomic(self._folder / name, file.read())
            return rewind(self._base, position, self.run)

    def commit(self) -> Attempt:
        """Make it the newest attempt, all in one step.

        Raises RunDirectoryError, with everything as it was, if another one has come first.
        """
        place = self._run.attempts / place_name(self._number)
        with self.making():
            write_json(self._folder / _MARK, self._mark())
            for folder, _, _ in os.walk(self._folder):
                sync_directory(Path(folder))
            try:
                self._folder.rename(place)
            except OSError as error:
                # The answer to a rename that was done may be lost on the way from a file server.
                mine = (read_object(place / _MARK) or {}).get("token") == self._token
                if error.errno in _TAKEN and not mine:
                    raise self._taken() from None
                if not mine:
                    raise
            self._done = True
            sync_directory(self._run.attempts)
        attempt = Attempt(replace(self._run, place=place), self._number)
        attempt.begin()
        return attempt

    def discard(self) -> None:
        """Leave nothing of it, unless it has become an attempt."""
        if not self._done:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):
                self._run.attempts.rmdir()  # if there was none before

    @contextmanager
    def making(self) -> Iterator[None]:
        """Around what writes to the folder: raises RunDirectoryError if another attempt has come
        first, StorageError where nothing can be written."""
        try:
            yield
        except OSError as error:
            if newest_number(self._run.attempts) >= self._number:
                raise self._taken() from None
            raise storage_error(self._run.path, error) from None

    def _taken(self) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self._run.path} is in use by {holder(self._run)}, which has begun at the same time"
        )

    def _mark(self) -> Record:
        return {
            "format": FORMAT,
            "attempt": self._number,
            "token": self._token,
            "launch": None if self._run.launch is None else self._run.launch.name,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": now(),
            "version": installed_version(),
        }


def check_format(run: RunDirectory) -> None:
    """Raise RunDirectoryError if the records are in a newer format than this version knows."""
    place = run.newest().place
    mark = None if place is None else read_object(place / _MARK)
    found = (mark or {}).get("format")
    if isinstance(found, int) and found > FORMAT:
        written_by = one_line(str((mark or {}).get("version")))
        raise RunDirectoryError(
            f"{run.path}: its records are in format {found}, written by version {written_by}; "
            f"this is version {installed_version()}, which knows format {FORMAT}: go on with "
            "that version, or a newer one"
        )


def launch_of(run: RunDirectory) -> str | None:
    """Name of the launching process's folder of the attempt that ``run`` is given with."""
    mark = None if run.place is None else read_object(run.place / _MARK)
    name = (mark or {}).get("launch")
    return name if isinstance(name, str) else None


# Launching processes


def is_ours(newest: RunDirectory, before: int) -> bool:
    """Whether the newest attempt is of this launching process or no newer than number ``before``,
    which was the newest one when it began."""
    if newest.place is None or numbered(newest.place.name) <= before:
        return True
    return newest.launch is not None and launch_of(newest) == newest.launch.name


def open_launch(run: RunDirectory) -> RunDirectory:
    """The same with a folder in which a launching process and its ranks leave word for each other,
    and no other's."""
    run.launches.mkdir(exist_ok=True)
    folder = None
    while folder is None:
        candidate = run.launches / place_name(newest_number(run.launches) + 1)
        with suppress(FileExistsError):
            candidate.mkdir()
            folder = candidate
    run = replace(run, launch=folder)
    run.failures.mkdir()
    return run


def show_launch(run: RunDirectory, target: Path) -> None:
    """Have the name of something in a launch's folder lead there from the run directory."""
    _lead(run.path / target.name, target, target.parent / "before")


def newest_launch(run: RunDirectory) -> RunDirectory:
    """The same with the newest launching process's folder, if there is any."""
    number = newest_number(run.launches)
    return replace(run, launch=run.launches / place_name(number) if number else None)


def retire_launches(run: RunDirectory) -> None:
    """Remove the folders of launching processes before this one."""
    if run.launch is None:
        return
    for entry in list(run.launches.iterdir()):
        if 0 < numbered(entry.name) < numbered(run.launch.name):
            shutil.rmtree(entry, ignore_errors=True)


def holder(run: RunDirectory) -> str:
    """Who has begun the newest attempt, in words."""
    place = run.attempts / place_name(newest_number(run.attempts))
    mark = read_object(place / _MARK) or {}
    pid, host, since = (one_line(str(mark.get(key))) for key in ("pid", "host", "since"))
    return f"pid {pid} on {host} since {since}"


def _adopt(source: Path, target: Path) -> None:
    """Give the files in a folder a second name, in a folder of ours; its owner may be at work."""
    if not source.is_dir():
        return
    target.mkdir()
    for place, folders, names in os.walk(source):
        mine = target / Path(place).relative_to(source)
        for name in folders:
            (mine / name).mkdir(exist_ok=True)
        for name in names:
            if not (name.startswith(".") and name.endswith(".tmp")):
                # The digest comes along even if it was not there yet when the names were read.
                for one in (name, f"{name}.sha256"):
                    _link(Path(place) / one, mine / one)


def _link(source: Path, target: Path) -> None:
    """Another name for a file, or a copy where that cannot be; nothing for one that is gone.

    What is no regular file is pointed at, so that whoever is to read it can say so."""
    with suppress(FileExistsError, FileNotFoundError):
        real = os.path.realpath(source)
        if os.path.lexists(source) and not os.path.isfile(real):
            target.symlink_to(real)
            return
        try:
            os.link(real, target)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            _copy(Path(real), target)


def _copy(source: Path, target: Path) -> None:
    with open_regular(source) as file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy, 2**20)
        copy.flush()
        os.fsync(copy.fileno())


def _check_links(folder: Path) -> None:
    probe = folder / ".link"
    try:
        probe.symlink_to("nowhere")
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise RunDirectoryError(
            f"{folder.parent.parent}: its file system has no symbolic links; choose another "
            "--run-dir"
        ) from None
    probe.unlink()


def _lead(public: Path, target: Path, aside: Path) -> None:
    """Make a name a link to a target below the same directory; what has the name now is replaced,
    or, as a directory cannot be, put aside."""
    words = os.path.relpath(target, public.parent)
    if public.is_symlink() and os.readlink(public) == words:
        return
    if public.is_dir() and not public.is_symlink():
        aside.mkdir()
        public.rename(aside / public.name)
    link = partial_name(public)
    try:
        link.symlink_to(words)
        link.replace(public)
    finally:
        link.unlink(missing_ok=True)
