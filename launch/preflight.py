"""Whether hosts can be reached and have what ranks need, asked before anything is started there."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness.errors import LaunchError
from launch import detect

_OTHER_SSH = "OMPI_MCA_plm_rsh_agent"
"""Names what Open MPI calls in place of ssh; the harness does not know how that is asked."""
_SLACK = 5.0  # seconds that ssh may take besides connecting
_PARALLEL = 32

_REFUSALS = (
    (
        r"Could not resolve hostname",
        "its name is not known here; correct it, or add it to /etc/hosts or ~/.ssh/config",
    ),
    (
        r"Connection refused",
        "it refuses ssh; start sshd there, or give its port in ~/.ssh/config",
    ),
    (
        r"Permission denied|Too many authentication failures",
        "ssh wants a password there; put your public key into its ~/.ssh/authorized_keys "
        "(ssh-copy-id {host})",
    ),
    (
        r"Host key verification failed",
        "its host key is not known or has changed; log in once by hand (ssh {host})",
    ),
    (
        r"timed out|No route to host|unreachable",
        "it does not answer; is it up, and is its network?",
    ),
)


@dataclass(frozen=True)
class Needs:
    """What ranks need on every host."""

    python: str
    directory: Path
    """One that is there already, for all hosts to see."""
    programs: tuple[str, ...] = ()
    """Absolute paths of further programs, such as Open MPI's orted."""
    option: str = "--run-dir"
    """What chooses another directory."""
    python_key: str | None = "launch.python"
    """What chooses another interpreter, if anything does."""


def over_ssh(launcher: str) -> bool:
    """Whether this launcher reaches other hosts by the ssh that can be tried here."""
    return launcher not in ("srun", "local") and _OTHER_SSH not in os.environ


def mpi_daemon(controller: str) -> tuple[str, ...]:
    """The program of MPI's that every host needs, if there is one; for ``Needs.programs``."""
    daemon = detect.mpi_programs()[1] if controller == "mpi" else None
    return (daemon,) if daemon else ()


def check_reachable(launcher: str, names: Iterable[str], needs: Needs, timeout: float) -> None:
    """Raise LaunchError unless all hosts let ssh in, as far as the launcher goes by it, and have
    what is needed."""
    if over_ssh(launcher) and (troubles := check_hosts(names, needs, timeout)):
        raise LaunchError(told(troubles))


def check_hosts(names: Iterable[str], needs: Needs, timeout: float) -> dict[str, str]:
    """What is wrong with each host that cannot be used; empty if all can.

    ``timeout``: seconds that a host may take to let ssh in. Raises LaunchError if there is no ssh.
    """
    remote = [name for name in names if not is_local(name)]
    if not remote:
        return {}
    with ThreadPoolExecutor(min(_PARALLEL, len(remote))) as pool:
        found = pool.map(lambda name: _ask(name, needs, timeout), remote)
        return {name: wrong for name, wrong in zip(remote, found, strict=True) if wrong}


def told(troubles: dict[str, str]) -> str:
    """All of it as a message, a line for each host."""
    return "\n".join(f"host {name}: {wrong}" for name, wrong in troubles.items())


def is_local(name: str) -> bool:
    """Whether a host's name means this machine."""
    if name in ("localhost", socket.gethostname(), socket.gethostname().partition(".")[0]):
        return True
    try:
        addresses = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_is_ours(family, address) for family, *_, address in addresses)


def _is_ours(family: int, address: Sequence[object]) -> bool:
    """An address that one can listen on is one's own."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
        return True


def _ask(name: str, needs: Needs, timeout: float) -> str | None:
    try:
        done = subprocess.run(
            [*ssh(name, timeout), _question(needs)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout + _SLACK,
            check=False,
            start_new_session=True,  # Ctrl-C is for the launching process, and no fault of the host
        )
    except FileNotFoundError:
        raise LaunchError(
            f"ssh is not on PATH, and {name} is another machine; install an ssh client"
        ) from None
    except subprocess.TimeoutExpired:
        return f"ssh did not come back within {timeout + _SLACK:g} s; is the host up?"
    if done.returncode == 0:
        return _missing(done.stdout.split(), needs)
    for pattern, remedy in _REFUSALS:
        if re.search(pattern, done.stderr):
            return remedy.format(host=name)
    said = done.stderr.strip().splitlines()
    return f"ssh ended with exit code {done.returncode}: {said[-1] if said else 'no message'}"


def ssh(name: str, timeout: float) -> list[str]:
    """The beginning of a command line that runs one there, and never asks for a password."""
    patience = f"ConnectTimeout={max(1, round(timeout))}"
    return ["ssh", "-o", "BatchMode=yes", "-o", patience, "-n", "--", name]


def _question(needs: Needs) -> str:
    """A command for the remote shell that prints the number of each thing that is not there."""
    checks = [f"test -x {shlex.quote(needs.python)} || echo 0"]
    checks.append(f"test -d {shlex.quote(os.fspath(needs.directory))} || echo 1")
    checks += [
        f"test -x {shlex.quote(program)} || echo {number}"
        for number, program in enumerate(needs.programs, start=2)
    ]
    return "; ".join([*checks, "true"])


def _missing(numbers: Sequence[str], needs: Needs) -> str | None:
    other_python = f", or set {needs.python_key}" if needs.python_key else ""
    told = [
        f"has no {needs.python}; install the harness there under the same path{other_python}",
        f"does not see {needs.directory}; choose with {needs.option} one on a file system that all "
        "hosts share",
        *(
            f"has no {program}; install the same MPI there, under the same path"
            for program in needs.programs
        ),
    ]
    chosen = [told[int(n)] for n in numbers if n.isdigit() and int(n) < len(told)]
    return "; ".join(chosen) or None
