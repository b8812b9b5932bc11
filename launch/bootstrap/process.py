"""Commands whose output goes to a log, the reason why one failed, and the lock between set-ups."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .console import BootstrapError, Console

# What a failed command said -> what is missing. The first match counts.
REASONS = (
    (r"No space left on device|Disk quota exceeded", "no disk space is left"),
    (
        r"Killed signal terminated program|cannot allocate memory|MemoryError",
        "the machine ran out of memory; HARNESS_BUILD_JOBS=1 compiles one file at a time",
    ),
    (r"fatal error: Python\.h", "the headers of Python are missing (package python3-dev)"),
    (r"Could NOT find MPI|fatal error: mpi\.h", "the MPI on PATH lacks its headers or libraries"),
    (
        r"Could NOT find (NCCL|CUDAToolkit)|No CMAKE_CUDA_COMPILER",
        "CUDA or NCCL was not found; see HOROVOD_CUDA_HOME and HOROVOD_NCCL_HOME",
    ),
    (
        r"Name or service not known|Temporary failure in name resolution|NewConnectionError"
        r"|Network is unreachable|ConnectTimeoutError|ReadTimeoutError|ProxyError|SSLError",
        "the package index cannot be reached (no network?)",
    ),
    (
        r"(?:No matching distribution found for|user requested \(constraint\)) (\S+)",
        "no package index that pip can reach has {} for this Python and machine",
    ),
    (r"unrecognized (command[- ]line )?option .-std=", "the C++ compiler is too old"),
    (r"externally-managed-environment", "this Python is managed by the system; use a venv"),
)


def explain(output: str) -> str:
    """The missing thing that the output of a failed command names, else its last error line."""
    for pattern, reason in REASONS:
        if found := re.search(pattern, output, re.IGNORECASE):
            return reason.format(*found.groups())
    lines = [line.strip() for line in output.splitlines() if re.search(r"error", line, re.I)]
    return lines[-1] if lines else "it gave no reason"


def run_logged(
    command: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    on_end: Callable[[], None] = lambda: None,
) -> None:
    """Run the command, append what it prints to the log, and say why when it fails.

    `on_end` is called when the command ended by itself, well or not; not when it was interrupted.
    """
    words = [str(word) for word in command]
    seen: list[str] = []
    with log.open("a", encoding="utf-8", errors="replace") as out:
        out.write(f"\n$ {' '.join(words)}\n")
        out.flush()
        with subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            text=True,
            errors="replace",
            preexec_fn=_end_with_parent,
        ) as child:
            for line in child.stdout or ():
                out.write(line)
                seen.append(line)
                on_line(line)
    on_end()
    if child.returncode:
        raise BootstrapError(f"{explain(''.join(seen))}\nThe whole output is in {log}")


def _end_with_parent() -> None:
    """A set-up that is killed takes pip with it, and so its compilers (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def output_of(command: Sequence[str | Path]) -> str:
    """What a quick command prints; empty when it cannot be run."""
    try:
        result = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout


@contextmanager
def locked(path: Path, console: Console) -> Iterator[None]:
    """Wait for any other set-up that holds this lock file; the lock dies with its processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"Waiting for another set-up that holds {path} …")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            console.say(f"note: no locks on the file system of {path}; run one set-up at a time")
        yield
