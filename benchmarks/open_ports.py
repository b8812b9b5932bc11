"""What a launch opens: sockets that listen, their interfaces, command lines, files of its own.

    python benchmarks/open_ports.py --launcher horovodrun comm.controller=gloo

Starts a short run on 2 ranks of this machine and looks at its processes, ten times a second, until
it ends: at /proc/net/tcp, tcp6 and unix for sockets in the state LISTEN, at what is mapped or open
in /dev/shm and /tmp, and whether the value of a variable with a secret name (which is set here)
stands on a command line, where every user of the host can read it. docs/security.md quotes it.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_SECRET = "hunter2-on-a-command-line"  # noqa: S105
_RUN = (
    *("data={dataset: synthetic, size: 4096, image_size: 28, channels: 1, classes: 10}",),
    *("batch={initial: 32, micro: 16}", "train.duration=60up", "train.eval_every=null"),
    *("lr.warmup=null", "train.tensorboard=false", "data.augment=false", "ranks.threads=1"),
)
_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "adabatch-digits.yaml"
_LISTEN = "0A"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launcher", default="horovodrun")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "harness", "run", str(_CONFIG), *_RUN, *options.overrides]
        words += [*rest, "--launcher", options.launcher, "--ranks", "2", "--hosts", "localhost:2"]
        process = subprocess.Popen(
            [*words, "--run-dir", f"{folder}/run"],
            env={**os.environ, "MY_API_TOKEN": _SECRET},
            stdout=subprocess.DEVNULL,
        )
        seen: dict[tuple[str, ...], int] = {}
        while process.poll() is None:
            for line in set(look(process.pid)):
                seen[line] = seen.get(line, 0) + 1
            time.sleep(0.1)
    print(f"{' '.join(words[3:])}\nexit code {process.returncode}")
    for line, times in sorted(seen.items()):
        print(f"  {'  '.join(line)}  (in {times} looks)")


def look(root: int) -> Iterator[tuple[str, ...]]:
    """What the process and those below it have open now."""
    listening = {**tcp("tcp", 4), **tcp("tcp6", 6), **unix()}
    with suppress(psutil.Error):
        below = psutil.Process(root).children(recursive=True)
        for one in (psutil.Process(root), *below):
            with suppress(psutil.Error, OSError):
                name = title(one)
                if _SECRET in " ".join(one.cmdline()):
                    yield name, "has the secret on its command line"
                for place in opened(one.pid):
                    if place in listening:
                        yield name, listening[place]
                    elif (
                        re.match(r"/(dev/shm|tmp)/", place)
                        and str(tempfile.gettempprefix()) not in place
                    ):
                        yield name, described(place)


def title(process: psutil.Process) -> str:
    words = process.cmdline()
    told = " ".join(words)
    rank = process.environ().get("OMPI_COMM_WORLD_RANK") or process.environ().get("HOROVOD_RANK")
    if "harness train" in told and rank is not None and "python" in Path(words[0]).name:
        return f"rank {rank}"
    for part in ("mpirun", "orted", "horovodrun", "launch.closed", "torchrun", "harness run"):
        if part in told:
            return part
    return Path(words[0]).name if words else "?"


def opened(pid: int) -> Iterator[str]:
    """Targets of a process's file descriptors, and what it has mapped from /dev/shm and /tmp."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            yield os.readlink(entry)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if found := re.search(r" (/(?:dev/shm|tmp)/.*?)( \(deleted\))?$", line):
            yield found[1]


def tcp(table: str, version: int) -> dict[str, str]:
    """Listening sockets by ``socket:[inode]``."""
    found = {}
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == _LISTEN:
            address, port = words[1].split(":")
            raw = bytes.fromhex(address)
            told = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
            where = ipaddress.ip_address(told)
            kind = "ephemeral" if int(port, 16) >= ephemeral() else str(int(port, 16))
            found[f"socket:[{words[9]}]"] = f"TCP{version} {where} {kind} port"
    return found


def unix() -> dict[str, str]:
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "00010000":  # __SO_ACCEPTCON
            path = words[7] if len(words) > 7 else "(unnamed)"
            found[f"socket:[{words[6]}]"] = described(path)
    return found


def ephemeral() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def described(path: str) -> str:
    """A path with numbers left out, and who may do what with it."""
    shown = re.sub(r"\d{2,}", "N", path).replace(socket.gethostname(), "HOST")
    with suppress(OSError):
        return f"{stat.filemode(os.stat(path).st_mode)} {shown}"
    return shown


if __name__ == "__main__":
    main()
