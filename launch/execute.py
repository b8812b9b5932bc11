"""The one place that starts a launcher: its output, its end, and how to stop it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Self

from harness.errors import LaunchError
from harness.processes import descendants, killed_for_memory
from harness.progress import Display, parse_relayed
from harness.redact import is_secret
from harness.rundir import RunDirectory
from launch.deaths import rank_tag
from launch.hangs import HangWatch
from launch.outcome import Ended
from launch.spec import LaunchSpec

_TIED = str(Path(__file__).with_name("tied.py"))
_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL
_LAST_LINES = 200  # of the launcher's own, by which its end is judged


def child_environment(spec: LaunchSpec) -> dict[str, str]:
    """This process's environment, the spec's variables, and the interpreter's folder on PATH:
    mpirun and horovodrun lie there in a virtual environment that nobody has activated."""
    here = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    # horovodrun writes all names into a line that a shell reads, and without MPI all values too,
    # on this host and on others, where everybody may read the command lines of processes.
    told = {
        name: value
        for name, value in os.environ.items()
        if _NAME.fullmatch(name) and not (spec.controller == "gloo" and is_secret(name))
    }
    return {**told, "PATH": f"{here}{os.pathsep}{path}", **spec.environment}


def execute(
    argv: Sequence[str],
    spec: LaunchSpec,
    launcher: str,
    directory: RunDirectory,
    display: Display,
    stopper: Stopper,
    hang_seconds: float | None = None,
    limit: float | None = None,
) -> Ended:
    """Run a launcher to its end, showing what the ranks print.

    The command, and all that it prints, is added to the directory's launch.log. ``hang_seconds``:
    after so long without a sign of any rank it is ended; the ranks must have been asked to give
    signs (`launch.assemble.hang_variable`). ``limit``: seconds after which it is ended in any case.
    Raises LaunchError if the launcher is not there.
    """
    watch = None if hang_seconds is None else HangWatch(hang_seconds, spec, launcher, directory)
    killed_before = killed_for_memory()
    with _Log(directory.launch_log) as log:
        log.write(f"$ {spec.as_log_line(argv)}\n")
        process = _start(argv, spec)
        beside: AbstractContextManager[None] = nullcontext()
        if watch is not None:
            beside = watch.beside(process, lambda: kill_group(process))
        with stopper.watching(process, display), beside, _ended_after(limit, process):
            own_words = _pump(process, display, log, rank_tag(launcher, spec.mpi), watch)
            code = process.wait()
            if process.stdout is not None:
                process.stdout.close()
            kill_group(process)  # ranks that outlived their launcher
    killed = killed_for_memory() - killed_before
    return Ended(code, own_words, watch.hang if watch else None, killed)


@contextmanager
def _ended_after(seconds: float | None, process: subprocess.Popen[str]) -> Iterator[None]:
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, kill_group, (process,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start(argv: Sequence[str], spec: LaunchSpec) -> subprocess.Popen[str]:
    variables = child_environment(spec)
    if shutil.which(argv[0], path=variables["PATH"]) is None:
        raise LaunchError(
            f"{argv[0]} is not on PATH; install it (`make setup` in a checkout, or "
            "`python -m launch.bootstrap --horovod-only`), or choose another --launcher"
        )
    return subprocess.Popen(
        [sys.executable, "-I", _TIED, str(os.getpid()), *argv],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so Ctrl-C reaches this process alone, which stops it cleanly
    )


class _Log:
    """launch.log, which is for people: that it cannot grow does not end a run."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] | None = None
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        with suppress(OSError):  # a pipe that nobody reads is not waited for
            self._file = os.fdopen(os.open(path, flags | os.O_NONBLOCK, 0o644), "ab", buffering=0)

    def write(self, text: str) -> None:
        with suppress(OSError):
            if self._file is not None:
                # As the names of files have bytes that are no text.
                self._file.write(text.encode(errors="backslashreplace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            if self._file is not None:
                self._file.close()


def _pump(
    process: subprocess.Popen[str],
    display: Display,
    log: _Log,
    tag: re.Pattern[str] | None,
    watch: HangWatch | None,
) -> str:
    own_words: deque[str] = deque(maxlen=_LAST_LINES)
    assert process.stdout is not None  # noqa: S101 - it is a pipe, for the type checker
    for line in process.stdout:
        if watch is None:
            _handle(line, display, log, tag, own_words)
        elif not watch.takes(line):
            with watch.handling():
                if _handle(line, display, log, tag, own_words):
                    watch.progress()
    return "".join(own_words)


def _handle(
    line: str,
    display: Display,
    log: _Log,
    tag: re.Pattern[str] | None,
    own_words: deque[str],
) -> bool:
    """Log and show a line of output; whether it told of progress."""
    log.write(line)
    status = parse_relayed(line)
    if status is not None:
        display.show(status)
        return True
    tags = tag.findall(line) if tag else []
    if not tags:
        own_words.append(line)
    if tags or not tag:
        text = tag.sub("", line).rstrip() if tag else line.rstrip()
        if text:
            first = not tags or tags[0] == "0"
            display.say(text if first else f"[rank {tags[0]}] {text}")
    return False


class Stopper:
    """Turns signals to this process into a clean stop of the ranks, for as long as it is entered.

    SIGINT, SIGTERM or SIGUSR2 asks the ranks to stop; a second SIGINT ends them at once.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self, ask_to_stop: Callable[[], None], manner: str = "with a checkpoint") -> None:
        """``manner``: how the ranks stop then, for the user to read."""
        self._ask, self._manner = ask_to_stop, manner
        self.asked = False
        """Whether a signal has come."""
        self._process: subprocess.Popen[str] | None = None
        self._display: Display | None = None

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._on_signal) for number in self._NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def watching(self, process: subprocess.Popen[str], display: Display) -> Iterator[None]:
        """While a launcher runs: what a second SIGINT ends, and where to say so."""
        self._process, self._display = process, display
        try:
            yield
        finally:
            self._process = self._display = None
            if process.poll() is None:
                kill_group(process)
                process.wait()

    def pause(self, seconds: float) -> bool:
        """Wait; whether that much time has passed without a signal."""
        deadline = time.monotonic() + seconds
        while not self.asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return not self.asked

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT and self._process is not None:
            self._say("harness: ending the ranks at once")
            kill_group(self._process)
            return
        self.asked = True
        with suppress(OSError):  # the directory is gone, and so are its ranks
            self._ask()
        self._say(f"harness: asked the ranks to stop {self._manner} (Ctrl-C again ends them now)")

    def _say(self, text: str) -> None:
        if self._display is not None:
            self._display.say(text)


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a launcher's whole process group, first gently, and then all that it has started here:
    some ranks have groups of their own, and one that is stopped heeds no request."""
    below = descendants(process.pid) if process.poll() is None else []
    _end_group(process)
    for left in below:
        left.kill()


def _end_group(process: subprocess.Popen[str]) -> None:
    for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _group_lives(process):
            time.sleep(0.05)


def _group_lives(process: subprocess.Popen[str]) -> bool:
    process.poll()  # reaps the launcher, which would count as alive otherwise
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
