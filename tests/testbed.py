"""Test hosts on one machine, each with an sshd of its own, on links of a given rate. Needs root.

A host is a set of namespaces (network, host name, processes, mounts, IPC); files of this machine
are visible on all of them, as on a cluster with a shared file system. All hosts live in one outer
set of namespaces that nothing else sees, so that one kill takes everything down; the kernel does
that kill itself when the process that made them dies (or the thread: make them in a lasting one).
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

import psutil

CTL = "ctl"
"""The outer namespace by its name as a host: where a user's shell or a controller runs."""
NETWORK = "10.77.0.0/24"
INTERFACE = "eth0"
"""Name of every host's link."""

_TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_NAMESPACES = ("unshare", "-m", "-n", "-u", "-i", "-p", "-f", "--kill-child")
_ENTER = ("-m", "-n", "-u", "-i", "-p")
# A command dies with the nsenter that waits for it, which is all that its caller can kill.
_TIED = ("setpriv", "--pdeathsig", "KILL")
# Hosts of different beds have the same names and numbers of processes, by which Open MPI tells its
# sessions apart.
_OWN_TMP = "/run/tmp"
_NOBODY = "02:77:00:00:00:ff"  # the hardware address of no host
_START_SECONDS = 60.0

# Every script gets the bed's folder as $1. A first process reads its own number as those outside
# see it, which is what nsenter needs, before it mounts its own /proc; then it reaps orphans.
_FIRST = f"""
read -r pid _ </proc/self/stat
mount -t proc proc /proc
hostname "$2"
for file in /proc/sys/net/ipv6/conf/*/disable_ipv6; do
    [ ! -e "$file" ] || echo 1 >"$file"
done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd /run/munge
mkdir -m 1777 {_OWN_TMP}
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
"""
_REAP = """
echo "$pid" >"$1/$2.part"
mv "$1/$2.part" "$1/$2.pid"
while :; do
    sleep infinity &
    wait
done
"""
_OUTER = f"""set -e
{_FIRST}
for file in hosts passwd shadow; do
    mount --bind "$1/$file" /etc/$file
done
ip link add br0 type bridge
ip link set br0 up
ip link add v$2 type veth peer name eth0
ip addr add 10.77.0.254/24 dev eth0
ip link set eth0 up
ip link set v$2 master br0 up
{_REAP}"""
_HOST = f"""set -e
{_FIRST}
{_REAP}"""

# $2: the rate of a link or nothing, $3: _HOST, then hosts. Runs in the outer namespaces.
_POWER_ON = f"""set -e
folder=$1 rate=$2 first=$3
shift 3
for host; do
    rm -f "$folder/$host.pid"
    setsid {" ".join(_NAMESPACES)} sh -c "$first" sh "$folder" "$host" \\
        </dev/null >>"$folder/log/$host" 2>&1 &
done
for host; do
    until [ -e "$folder/$host.pid" ]; do sleep 0.01; done
    read -r pid <"$folder/$host.pid"
    inside="nsenter -t $pid -n"
    ip link del "v$host" 2>/dev/null || true
    # The hardware stays the same, so what others remember of it holds when a host comes back.
    card=$(printf 02:77:00:00:00:%02x "${{host#n}}")
    ip link add "v$host" type veth peer name eth0 address "$card" netns "$pid"
    $inside ip addr add "10.77.0.${{host#n}}/24" dev eth0
    $inside ip link set eth0 up
    ip link set "v$host" master br0 up
    if [ -n "$rate" ]; then
        shape="root tbf rate $rate burst 256kb latency 50ms"
        $inside tc qdisc replace dev eth0 $shape
        tc qdisc replace dev "v$host" $shape
    fi
done
"""
# $1: host, $2: its first process. The link goes first: what is left of it could still refuse.
_POWER_OFF = """
ip link del "v$1"
kill -KILL "$2"
while kill -0 "$2" 2>/dev/null; do sleep 0.01; done
"""
_SSHD = """
ListenAddress 0.0.0.0
HostKey {folder}/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
MaxStartups 100
PrintLastLog no
PidFile /run/sshd.pid
SetEnv TMPDIR={tmp}
"""


@cache
def missing_for_testbed() -> str | None:
    """What keeps this machine from having test hosts, in words; None if nothing does."""
    if os.geteuid() != 0:
        return "test hosts need root"
    for name, package in _TOOLS.items():
        if (system_tool if name == "sshd" else shutil.which)(name) is None:
            return f"test hosts need the command {name} on PATH (Debian: {package})"
    probe = [*_NAMESPACES, "ip", "link", "add", "br0", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return f"this machine allows no namespaces with a bridge: {done.stderr.strip()}"
    return None


def system_tool(name: str) -> str | None:
    """A command's path, from PATH or from where daemons are, which not everyone's PATH has."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")


def daemon(name: str) -> str:
    """The path of a daemon that is installed."""
    return system_tool(name) or name


def completed(words: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, of at most that many seconds."""
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Testbed:
    """Hosts n1, n2, … with addresses 10.77.0.1, …; leaving the ``with`` block ends them."""

    __test__ = False  # whatever pytest makes of its name

    def __init__(self, hosts: int, folder: Path, rate: str | None = None) -> None:
        """``rate``: of each host's link, both ways, in tc's words (``1gbit``); None: unlimited.
        ``folder``: for keys, logs and the home directory of those who log in."""
        self.hosts = tuple(f"n{number}" for number in range(1, hosts + 1))
        self.folder = folder.resolve() / "testbed"
        self.home = self.folder / "home"
        """Of all who run there: keys of ssh, and what horovodrun remembers of the hosts."""
        self.logs = self.folder / "log"
        self._rate = rate or ""
        self._outer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Testbed:
        try:
            self._write_files()
            self._start_outer()
            self.start(*self.hosts)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` on a host, in the calling process's directory, with
        its environment but for HOME and for TMPDIR, which is the host's own.

        It dies when the process that is started with these words does, in whatever way. That one
        must be started by a thread that outlives it.
        """
        words: list[str] = []
        for entered in (CTL,) if host == CTL else (CTL, host):
            words += ["nsenter", "-t", str(self.first_process(entered)), *_ENTER]
            words += [f"--wdns={os.getcwd()}", *_TIED]
        return [*words, "env", f"HOME={self.home}", f"TMPDIR={_OWN_TMP}", *command]

    def run(
        self, host: str, command: Sequence[str], timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end, of at most that many seconds."""
        return completed(self.on(host, command), timeout)

    def do(self, host: str, *command: str) -> str:
        """Run a command that must succeed on a host; returns what it prints.

        Raises RuntimeError, with the ends of the logs.
        """
        name = f"on test host {host}, {shlex.join(command)}"
        try:
            done = self.run(host, command, timeout=_START_SECONDS)
            done.check_returncode()
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"{name} ended with exit code {error.returncode}: {error.stdout}{error.stderr}\n"
                f"{self.log_tails()}"
            ) from None
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"{name} did not end in {_START_SECONDS:g} s\n{self.log_tails()}"
            ) from None
        return done.stdout

    def mpirun(self, command: Sequence[str], variables: Sequence[str] = ()) -> list[str]:
        """The command that starts one rank of ``command`` on each host from n1, over ssh, with
        these of the calling process's variables."""
        settings = {
            "btl_tcp_if_include": NETWORK,
            "oob_tcp_if_include": NETWORK,
            "pml": "ob1",
            "btl": "^openib",
        }
        options = [word for key, value in settings.items() for word in ("--mca", key, value)]
        passed = [word for name in variables for word in ("-x", name)]
        # By its whole path, it starts its daemons on the other hosts by theirs.
        started = [shutil.which("mpirun") or "mpirun", "--allow-run-as-root"]
        started += ["-np", str(len(self.hosts)), "-H", ",".join(f"{host}:1" for host in self.hosts)]
        return self.on("n1", [*started, "--bind-to", "none", *options, *passed, *command])

    # Faults, and their ends

    def cut(self, host: str) -> None:
        """Pull the host's cable out of the switch."""
        self.do(CTL, "ip", "link", "set", f"v{host}", "down")

    def drop(self, host: str) -> None:
        """Let nothing reach the host any more, and nobody hear of it: no refusal, no answer."""
        for other in self._others(host):
            self.do(other, "ip", "neigh", "replace", self.address(host), "lladdr", _NOBODY,
                     "nud", "permanent", "dev", INTERFACE)  # fmt: skip

    def mend(self, host: str) -> None:
        """Undo ``cut`` and ``drop``."""
        self.do(CTL, "ip", "link", "set", f"v{host}", "up")
        for other in self._others(host):
            self.run(other, ["ip", "neigh", "del", self.address(host), "dev", INTERFACE])

    def kill(self, host: str) -> None:
        """Switch the host off: all that runs on it is gone at once."""
        self.do(CTL, "sh", "-c", _POWER_OFF, "sh", host, str(self.first_process(host)))
        (self.folder / f"{host}.pid").unlink()

    def start(self, *hosts: str) -> None:
        """Switch these hosts on, with their sshd."""
        script = ["sh", "-c", _POWER_ON, "sh", str(self.folder), self._rate, _HOST, *hosts]
        self.do(CTL, *script)
        for host in hosts:
            self.start_sshd(host)

    def start_sshd(self, host: str) -> None:
        log = str(self.logs / f"{host}-sshd")
        self.do(host, daemon("sshd"), "-f", str(self.folder / "sshd_config"), "-E", log)
        self.do(host, "sh", "-c", "until [ -s /run/sshd.pid ]; do sleep 0.01; done")

    def stop_sshd(self, host: str) -> None:
        """From now on, connections are refused; sessions that are open go on."""
        end = 'kill "$(cat /run/sshd.pid)"; while [ -e /run/sshd.pid ]; do sleep 0.01; done'
        self.do(host, "sh", "-c", end)

    def is_up(self, host: str) -> bool:
        """Whether the host is switched on."""
        return (self.folder / f"{host}.pid").exists()

    def address(self, host: str) -> str:
        return f"10.77.0.{254 if host == CTL else int(host[1:])}"

    def log_tails(self, lines: int = 20) -> str:
        """The last lines of every log, for the message of a failure."""
        told = []
        for path in sorted(self.logs.iterdir()):
            last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            if last:
                told.append("\n".join([f"--- {path.name}", *last]))
        return "\n".join(told)

    def first_process(self, host: str) -> int:
        """The number of the process whose end is the host's, as the outer namespace counts; that
        of the outer one itself as its maker counts. Raises RuntimeError if the host is off."""
        try:
            return int((self.folder / f"{host}.pid").read_text(encoding="ascii"))
        except FileNotFoundError:
            raise RuntimeError(f"test host {host} is not there, or is switched off") from None

    # How it is made

    def _others(self, host: str) -> list[str]:
        return [other for other in (CTL, *self.hosts) if other != host and self.is_up(other)]

    def _write_files(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        ssh = self.home / ".ssh"
        for folder in (self.logs, ssh):
            folder.mkdir(parents=True)
        ssh.chmod(0o700)
        names = [f"{self.address(host)} {host}" for host in (CTL, *self.hosts)]
        self._write("hosts", "127.0.0.1 localhost", *names)
        self._write_account()
        self._write("sshd_config", _SSHD.format(folder=self.folder, tmp=_OWN_TMP).strip())
        for key in (self.folder / "host_key", ssh / "id_ed25519"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "testbed", "-f", str(key)]
            subprocess.run(make, check=True, timeout=60, stdin=subprocess.DEVNULL)
        shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
        public = (self.folder / "host_key.pub").read_text(encoding="ascii").strip()
        self._write("home/.ssh/known_hosts", f"n*,{CTL},10.77.0.* {public}")
        self._write("home/.ssh/config", "StrictHostKeyChecking no")
        caches = Path.home() / ".cache"  # of fonts, say, which take seconds to look through
        if caches.is_dir():
            (self.home / ".cache").symlink_to(caches)

    def _write_account(self) -> None:
        """Accounts of the hosts: as here, but for root's home, which is where ssh looks for keys,
        and for its password, without which sshd may take the account for a locked one."""
        root = pwd.getpwuid(0)
        accounts = Path("/etc/passwd").read_text(encoding="utf-8").splitlines()
        others = [line for line in accounts if line.split(":")[2:3] != ["0"]]
        ours = f"{root.pw_name}:x:0:{root.pw_gid}:root:{self.home}:/bin/sh"
        self._write("passwd", ours, *others)
        self._write("shadow", f"{root.pw_name}:*:19000:0:99999:7:::")
        (self.folder / "shadow").chmod(0o600)

    def _write(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _start_outer(self) -> None:
        words = [*_TIED, *_NAMESPACES, "sh", "-c", _OUTER, "sh", str(self.folder), CTL]
        with (self.logs / CTL).open("wb") as log:
            self._outer = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + _START_SECONDS
        while not self.is_up(CTL):
            if self._outer.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"test hosts did not start:\n{self.log_tails()}")
            time.sleep(0.01)

    def _end(self) -> None:
        if self._outer is None:
            return
        # Its first process is gone only when all others of the namespaces are.
        if self._outer.poll() is None and self.is_up(CTL):
            os.kill(self.first_process(CTL), signal.SIGKILL)
        else:
            self._outer.kill()
        self._outer.wait()
        self._outer = None


def assert_ends_with_its_owner(bed: str, folder: Path) -> None:
    """Kill a process that holds a bed; all that ran in it must end.

    ``bed``: Python that makes one in ``folder`` and then gives its first process to ``hold``.
    """
    script = f"""
import sys, time
from pathlib import Path
from testbed import CTL
folder = Path(sys.argv[1])
def hold(pid):
    print(pid, flush=True)
    time.sleep(1000)
{bed}"""
    words = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent, start_new_session=True
    ) as owner:
        assert owner.stdout is not None
        first = psutil.Process(int(owner.stdout.readline()))
        inside = [first, *first.children(recursive=True)]
        owner.kill()
    assert psutil.wait_procs(inside, timeout=60)[1] == []
