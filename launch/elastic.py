"""A launch whose ranks come and go: horovodrun's elastic mode, and what tells it which hosts there
are. `docs/elastic.md` has the whole picture.

The folder RUN_DIR/elastic belongs to one launch:

    hosts         all hosts that may be used, a line HOST:SLOTS each, in the order of filling
    wanted        how many ranks the run wants now; its rank 0 raises this at a stage's start
    lost          hosts to be left out, a name on each line
    failed        hosts that ranks were lost on, which rank 0 adds; they are filled last
    discover.sh   prints the first so many of these slots; horovodrun calls it once a second
    bin/ssh       the user's ssh, told to notice within 15 s when a host is gone
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness import environment
from harness.errors import ConfigError, LaunchError
from harness.files import write_atomic
from harness.schema import Config
from launch import horovodrun
from launch.deaths import Death
from launch.spec import Host, LaunchSpec

SCRIPT = "discover.sh"
_COOLDOWN = (10, 600)
_END = re.compile(r"Process name: (?P<host>\S+)\[\d+\]\s+Exit code: (?P<code>\d+)")
_LAST_SIGNAL = 64
# Only what POSIX promises of sh and awk. As long as all hosts are this one, horovodrun takes the
# loopback's interface, whatever it is told, and later hosts cannot reach it: hence one that is
# elsewhere, and on which nothing runs.
_SCRIPT = """\
#!/bin/sh
# Prints HOST:SLOTS for as many ranks as are wanted. Written by launch/elastic.py.
cd {folder} || exit 1
echo 0.0.0.0:0
awk -F: '
function give(name, slots) {{
    if (slots > left) slots = left
    if (slots > 0) print name ":" slots
    left -= slots
}}
FILENAME == "wanted" {{ left = $1 + 0; next }}
FILENAME == "lost" {{ lost[$1]; next }}
FILENAME == "failed" {{ failed[$1]; next }}
$1 in lost {{ next }}
$1 in failed {{ name[++late] = $1; slots[late] = $2 + 0; next }}
{{ give($1, $2 + 0) }}
END {{ for (i = 1; i <= late; ++i) give(name[i], slots[i]) }}
' wanted lost failed hosts
"""


# horovodrun goes on waiting for a host that is gone as long as its ssh does, if need be for ever.
_SSH = """\
#!/bin/sh
exec {ssh} -o ServerAliveInterval=5 -o ServerAliveCountMax=3 "$@"
"""


def check(config: Config, launcher: str) -> None:
    """Raise ConfigError if a configuration with ``launch.elastic`` cannot be launched so."""
    needs = {
        "the horovodrun launcher": launcher == "horovodrun",
        "comm.backend=horovod": config.comm.backend == "horovod",
        "comm.controller=gloo": config.comm.controller == "gloo",
        "launch.ranks_per_gpu=1": config.launch.ranks_per_gpu == 1,
        "comm.cycle_ms=null": config.comm.cycle_ms is None,
    }
    missing = [need for need, there in needs.items() if not there]
    if missing:
        raise ConfigError(
            f"launch.elastic = true needs {', '.join(missing)}; or set launch.elastic=false, and "
            "the ranks grow by restarts from a checkpoint"
        )


def arguments(
    spec: LaunchSpec, min_ranks: int, max_ranks: int, discovery_script: Path
) -> list[str]:
    """horovodrun's words for a world of ``min_ranks`` to ``max_ranks`` that begins with
    ``spec.ranks``. Raises LaunchError for what cannot be started.

    A host on which a rank has failed is left out for 10 s or more, twice as long each time, up to
    600 s.
    """
    if not 1 <= min_ranks <= spec.ranks <= max_ranks:
        raise LaunchError(
            f"launch.elastic: a world of {min_ranks} to {max_ranks} ranks cannot begin with "
            f"{spec.ranks}; ranks.start must lie between them"
        )
    return [
        *horovodrun.program("gloo"),
        "--gloo",
        "-np",
        str(spec.ranks),
        "--min-np",
        str(min_ranks),
        "--max-np",
        str(max_ranks),
        "--host-discovery-script",
        shlex.quote(str(discovery_script)),  # a shell runs it
        "--network-interfaces",
        ",".join(_interfaces(spec)),
        "--blacklist-cooldown-range",
        *map(str, _COOLDOWN),
        *spec.command,
    ]


def _interfaces(spec: LaunchSpec) -> tuple[str, ...]:
    """Without any, horovodrun waits for a second host to compare them with, if need be for ever."""
    if spec.interfaces:
        return spec.interfaces
    here = {"localhost", "127.0.0.1", socket.gethostname()}
    elsewhere = [host.name for host in spec.hosts if host.name not in here]
    if elsewhere:
        raise LaunchError(
            f"launch.elastic = true with other hosts ({', '.join(elsewhere)}) needs "
            "launch.interfaces: the name of the network interface by which all hosts see each "
            "other, such as launch.interfaces=[eth0]"
        )
    return ("lo",)


def variables(min_ranks: int, max_ranks: int, folder: Path) -> dict[str, str]:
    """What the ranks of an elastic launch get besides the others' variables. They have no
    HARNESS_WORLD_SIZE: their number changes, and Horovod's driver promises it anew each time."""
    return {
        environment.ELASTIC: f"{min_ranks}:{max_ranks}",
        environment.DISCOVERY: str(folder.resolve()),
        environment.GROW: str(max_ranks),
        "PATH": os.pathsep.join(
            [str(folder.resolve() / "bin"), str(Path(sys.executable).parent), *os.get_exec_path()]
        ),
    }


def write_discovery(folder: Path, hosts: Sequence[Host], ranks: int) -> Path:
    """Set the folder up for a launch that begins with so many ranks; returns the script."""
    folder.mkdir(exist_ok=True)
    set_hosts(folder, hosts)
    set_lost(folder, ())
    write_atomic(folder / "failed", b"")
    write_atomic(folder / "wanted", f"{ranks}\n".encode())
    script = folder / SCRIPT
    write_atomic(script, script_text(folder).encode())
    script.chmod(0o700)
    _write_ssh(folder / "bin")
    return script


def _write_ssh(folder: Path) -> None:
    ssh = shutil.which("ssh")
    if ssh is None:  # so there is no other host
        return
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "ssh", _SSH.format(ssh=shlex.quote(ssh)).encode())
    (folder / "ssh").chmod(0o700)


def script_text(folder: Path) -> str:
    """The discovery script. It prints nothing that is not in the folder's files."""
    return _SCRIPT.format(folder=shlex.quote(str(folder.resolve())))


def last_death(own_words: str) -> Death | None:
    """The death that ended an elastic launch, from what horovodrun has printed; None if it names
    none. Others that it tells of, before, the ranks may have survived."""
    found = _END.search(own_words)
    if found is None:
        return None
    code = int(found["code"])
    number = code - 128 if 128 < code <= 128 + _LAST_SIGNAL else None  # as a shell tells it
    return Death(None, code if number is None else None, number, found["host"])


def set_hosts(folder: Path, hosts: Iterable[Host]) -> None:
    """Which hosts there are from now on; a running launch follows within seconds."""
    write_atomic(folder / "hosts", "".join(f"{host}\n" for host in hosts).encode())


def set_lost(folder: Path, names: Iterable[str]) -> None:
    """Which of the hosts are to be left out from now on."""
    write_atomic(folder / "lost", "".join(f"{name}\n" for name in names).encode())
