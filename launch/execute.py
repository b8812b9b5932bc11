"""The one place that starts a launcher: its output, its end, and how to stop it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from harness.errors import LaunchError
from harness.progress import Display, parse_relayed
from launch.spec import Death, LaunchSpec, first_death

_TAG = re.compile(r"\[(?:\d+,)?(\d+)\]<(?:stdout|stderr)>: ?")
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a launch ended."""

    exit_code: int
    death: Death | None
    own_words: str
    """What the launcher itself printed, without the ranks' output."""


def child_environment(spec: LaunchSpec) -> dict[str, str]:
    """This process's environment, the spec's variables, and the interpreter's folder on PATH:
    mpirun and horovodrun lie there in a virtual environment that nobody has activated."""
    here = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    return {**os.environ, "PATH": f"{here}{os.pathsep}{path}", **spec.environment}


def execute(
    argv: Sequence[str],
    spec: LaunchSpec,
    display: Display,
    log: IO[str],
    ask_to_stop: Callable[[], None],
) -> Ended:
    """Run a launcher to its end, showing what the ranks print.

    SIGINT, SIGTERM or SIGUSR2 to this process asks the ranks to stop with a checkpoint; a second
    SIGINT ends them at once. Raises LaunchError if the launcher is not there.
    """
    with _Stopper(display, ask_to_stop) as stopper:
        process = stopper.process = _start(argv, spec)
        own_words = _pump(process, display, log)
        code = process.wait()
        stopper.kill_group()  # ranks that outlived their launcher
    return Ended(code, first_death(own_words), own_words)


def _start(argv: Sequence[str], spec: LaunchSpec) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            argv,
            env=child_environment(spec),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so Ctrl-C reaches this process alone, which stops it cleanly
        )
    except FileNotFoundError:
        raise LaunchError(
            f"{argv[0]} is not on PATH; install it (`make setup` in a checkout, or "
            "`python -m launch.bootstrap --horovod-only`), or choose another --launcher"
        ) from None


def _pump(process: subprocess.Popen[str], display: Display, log: IO[str]) -> str:
    own_words = []
    assert process.stdout is not None  # noqa: S101 - it is a pipe, for the type checker
    for line in process.stdout:
        with suppress(OSError):  # a log that cannot grow does not end a run
            log.write(line)
            log.flush()
        status = parse_relayed(line)
        if status is not None:
            display.show(status)
            continue
        tags = _TAG.findall(line)
        if not tags:
            own_words.append(line)
            continue
        text = _TAG.sub("", line).rstrip()
        if text:
            display.say(text if tags[0] == "0" else f"[rank {tags[0]}] {text}")
    return "".join(own_words[-200:])


class _Stopper:
    """Turns signals to this process into a clean stop of the ranks while a launcher runs."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self, display: Display, ask_to_stop: Callable[[], None]) -> None:
        self.process: subprocess.Popen[str] | None = None
        """The launcher, once it has been started."""
        self._display, self._ask = display, ask_to_stop
        self._asked = False

    def __enter__(self) -> _Stopper:
        self._before = {number: signal.signal(number, self._on_signal) for number in self._NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.process is not None and self.process.poll() is None:
            self.kill_group()
            self.process.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            self._display.say("harness: ending the ranks at once")
            self.kill_group()
            return
        self._asked = True
        self._ask()
        self._display.say(
            "harness: asked the ranks to stop with a checkpoint (Ctrl-C again ends them now)"
        )

    def kill_group(self) -> None:
        """End the launcher's whole process group, first gently."""
        if self.process is None:
            return
        for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, 0.0)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and _group_lives(self.process):
                time.sleep(0.05)


def _group_lives(process: subprocess.Popen[str]) -> bool:
    process.poll()  # reaps the launcher, which would count as alive otherwise
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
