"""Test hosts on one machine: network namespaces on a bridge, links of a given rate. Needs root.

All of it lives in one outer namespace that nothing else sees, so that one kill takes it down.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_TOOLS = ("ip", "tc", "nsenter", "unshare")

_OUTER = """set -e
hostname testbed
mount --bind "$4" /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/netns
mount --make-shared /run
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.254/24 dev br0
ip link set br0 up
for number in $(seq "$1"); do
    host=n$number
    ip netns add $host
    ip link add v$number type veth peer name eth0 netns $host
    ip link set v$number master br0 up
    ip -n $host addr add 10.77.0.$number/24 dev eth0
    ip -n $host link set lo up
    ip -n $host link set eth0 up
    if [ -n "$2" ]; then
        tc -n $host qdisc replace dev eth0 root tbf rate $2 burst 256kb latency 50ms
        tc qdisc replace dev v$number root tbf rate $2 burst 256kb latency 50ms
    fi
done
touch "$3"
exec sleep infinity
"""

# What mpirun calls in place of ssh: HOST COMMAND …
_AGENT = """#!/bin/sh
host=$1; shift
exec nsenter --net=/run/netns/$host unshare -u sh -c 'hostname "$0"; eval "$@"' "$host" "$@"
"""


def missing_for_testbed() -> str | None:
    """What keeps this machine from having test hosts, in words; None if nothing does."""
    if os.geteuid() != 0:
        return "test hosts need root"
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return f"test hosts need the command {tool} (Debian: iproute2, util-linux)"
    return None


class Testbed:
    """Hosts n1, n2, … with addresses 10.77.0.1, …; leaving the ``with`` block ends them."""

    def __init__(self, hosts: int, folder: Path, rate: str | None = None) -> None:
        """``rate``: of each host's link, both ways, in tc's words (``1gbit``); None: unlimited.
        ``folder``: for what mpirun needs to reach them."""
        self._hosts, self._folder, self._rate = hosts, folder, rate
        self._outer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Testbed:
        ready = self._folder / "testbed-ready"
        ready.unlink(missing_ok=True)
        names = self._folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"10.77.0.{n} n{n}" for n in range(1, self._hosts + 1))]
        names.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.agent = self._folder / "agent.sh"
        self.agent.write_text(_AGENT, encoding="utf-8")
        self.agent.chmod(0o755)
        namespaces = ["unshare", "-m", "-n", "-u", "-i", "-p", "-f", "--kill-child", "--mount-proc"]
        script = ["sh", "-c", _OUTER, "sh", str(self._hosts), self._rate or "", str(ready)]
        script.append(str(names))
        self._outer = subprocess.Popen(
            [*namespaces, *script], stderr=subprocess.PIPE, start_new_session=True
        )
        until = time.monotonic() + 20
        while not ready.exists():
            if self._outer.poll() is not None or time.monotonic() > until:
                self._outer.kill()
                raise RuntimeError(f"test hosts did not start: {self._outer.communicate()[1]!r}")
            time.sleep(0.02)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._outer is not None
        self._outer.send_signal(signal.SIGKILL)
        self._outer.wait()

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` on a host."""
        assert self._outer is not None
        inner = subprocess.run(
            ["pgrep", "-P", str(self._outer.pid)], capture_output=True, text=True, check=True
        ).stdout.split()[0]
        enter = ["nsenter", "-t", inner, "-m", "-n", "-u", "-i", "-p", f"--wd={os.getcwd()}"]
        return [*enter, "nsenter", f"--net=/run/netns/{host}", "unshare", "-u",
                "sh", "-c", 'hostname "$0"; exec "$@"', host, *command]  # fmt: skip

    def mpirun(self, command: Sequence[str], variables: Sequence[str] = ()) -> list[str]:
        """The command that starts one rank of ``command`` on each host, with these of the calling
        process's variables."""
        hosts = ",".join(f"n{number}:1" for number in range(1, self._hosts + 1))
        settings = {
            "plm_rsh_agent": str(self.agent),
            "btl_tcp_if_include": "10.77.0.0/24",
            "oob_tcp_if_include": "10.77.0.0/24",
            "pml": "ob1",
            "btl": "^openib",
        }
        options = [word for key, value in settings.items() for word in ("--mca", key, value)]
        passed = [word for name in variables for word in ("-x", name)]
        started = ["mpirun", "--allow-run-as-root", "-np", str(self._hosts), "-H", hosts]
        return self.on("n1", [*started, "--bind-to", "none", *options, *passed, *command])
