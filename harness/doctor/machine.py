"""Cores, memory, GPUs and network interfaces of this machine."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.doctor.findings import Finding, Status
from harness.doctor.software import which

_NVIDIA = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU, if the driver is loaded
_NETWORK = Path("/sys/class/net")
_INFINIBAND = Path("/sys/class/infiniband")
_CGROUP = Path("/sys/fs/cgroup")
_SIOCGIFADDR = 0x8915
_LITTLE_SHARED = 128 * 2**20  # bytes; ranks of one host talk through it


def machine(torch: Finding, horovod: Finding) -> list[Finding]:
    """All findings; what torch and Horovod are built for says what a GPU is good for."""
    found = [_cores(), _memory(), _gpus(torch)]
    if found[-1].facts["gpus"]:
        found.append(_nccl(torch, horovod))
    return [*found, _interfaces()]


def _found(
    facts: dict[str, Any], name: str, text: str, status: Status = "ok", remedy: str = ""
) -> Finding:
    return Finding(name, text, status, remedy, "machine", facts)


def _cores() -> Finding:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = cpu_quota()
    text = f"{usable} of {there} may be used"
    facts = {"usable": usable, "cores": there, "quota": quota}
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        text += f"; OMP_NUM_THREADS={threads}"
    if quota is not None and quota < usable:
        text += f", but a cgroup allows the time of {quota:g}: more ranks × threads slow each other"
        remedy = f"ranks.threads so that ranks × threads ≤ {max(1, int(quota))}, or a larger quota"
        return _found(facts, "cores", text, "warning", remedy)
    return _found(facts, "cores", text)


def cpu_quota() -> float | None:
    """Cores' worth of time that this process's cgroup may take; None: as much as there is."""
    with suppress(OSError, ValueError):
        limit, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        if limit != "max":
            return int(limit) / int(period)
    return None


def available_memory() -> int | None:
    """Bytes that this process may still take: the machine's, or its cgroup's if that is less."""
    known = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        known.append(max(0, limit - used))
    return min(known, default=None)


def _memory() -> Finding:
    free = available_memory()
    shared = None
    with suppress(OSError):
        usage = os.statvfs("/dev/shm")  # noqa: S108 - it is looked at
        shared = usage.f_blocks * usage.f_frsize
    facts = {"available_bytes": free, "shared_bytes": shared}
    text = "unknown" if free is None else f"{free / 2**30:,.1f} GiB available"
    if shared is not None and shared < _LITTLE_SHARED:
        text += f", but /dev/shm has {shared / 2**20:.0f} MiB, by which ranks of a host talk"
        remedy = "mount -o remount,size=2G /dev/shm (docker run --shm-size=2g)"
        return _found(facts, "memory", text, "warning", remedy)
    return _found(facts, "memory", text)


# GPUs


def _gpus(torch: Finding) -> Finding:
    models = Counter(nvidia_models())
    named = [*models.elements()]
    if not models:
        there = which("nvidia-smi")
        text = "nvidia-smi is here, but its driver is not" if there else "none"
        return _found({"gpus": []}, "GPUs", f"{text}: ranks on this machine train on the CPU")
    text = ", ".join(f"{count} × {model}" for model, count in models.items())
    version = str(torch.facts.get("version") or "")
    works = torch.facts.get("cuda_works")
    if version.endswith("+cpu") or (works is False and torch.facts.get("cuda") is None):
        text += "; but this torch is built without CUDA"
        remedy = "pip install torch (a CUDA build: https://pytorch.org has the line), then "
        remedy += "python -m launch.bootstrap --horovod-only"
        return _found({"gpus": named}, "GPUs", text, "warning", remedy)
    if works is False:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        text += "; but torch does not get them"
        remedy = "nvidia-smi shows whether the driver works, and whether it is new enough"
        if hidden is not None:
            remedy = f"unset CUDA_VISIBLE_DEVICES (it is {hidden!r}), if they are to be used"
        return _found({"gpus": named}, "GPUs", text, "warning", remedy)
    return _found({"gpus": named}, "GPUs", text)


def _nccl(torch: Finding, horovod: Finding) -> Finding:
    version = torch.facts.get("nccl")
    by_horovod = "NCCL" in horovod.facts.get("operations", ())
    facts = {"version": version, "horovod": by_horovod}
    known = f"{version} in torch" if version else "not in torch"
    if not by_horovod and horovod.facts.get("version"):
        text = f"{known}; Horovod is built without: its ranks leave the GPUs alone"
        remedy = (
            "HOROVOD_GPU_OPERATIONS=NCCL python -m launch.bootstrap --horovod-only, or "
            "comm.backend=torch"
        )
        return _found(facts, "NCCL", text, "warning", remedy)
    return _found(facts, "NCCL", known)


def nvidia_models() -> Iterator[str]:
    """The model of each GPU that the driver lists."""
    with suppress(OSError):
        for folder in sorted(_NVIDIA.iterdir()):
            lines = (folder / "information").read_text(errors="replace").splitlines()
            facts = dict(line.split(":", 1) for line in lines if ":" in line)
            yield facts.get("Model", "GPU").strip()


# Network


def _interfaces() -> Finding:
    found = list(interfaces())
    infiniband = []
    with suppress(OSError):
        infiniband = sorted(os.listdir(_INFINIBAND))
    facts = {"interfaces": found, "infiniband": infiniband}
    told = [_told(one) for one in found if one["name"] != "lo" and one["address"]]
    if infiniband:
        told.append(f"InfiniBand {', '.join(infiniband)}")
    if not any(one["name"] == "lo" and one["up"] for one in found):
        text = "the loopback is down, by which ranks of this machine find each other"
        return _found(facts, "network", text, "missing", "ip link set lo up")
    if not told:
        text = "only the loopback has an address: ranks stay on this machine"
        remedy = "ip link; ip addr (other machines are reached by an interface with an address)"
        return _found(facts, "network", text, "warning", remedy)
    return _found(facts, "network", ", ".join(told))


def _told(one: dict[str, Any]) -> str:
    speed = f", {one['mbit_per_s']:,} Mbit/s" if one["mbit_per_s"] else ""
    return f"{one['name']} {one['address']}{'' if one['up'] else ' (down)'}{speed}"


def interfaces() -> Iterator[dict[str, Any]]:
    """Name, IPv4 address, whether it is up, and its rate if it tells one."""
    with suppress(OSError):
        for folder in sorted(_NETWORK.iterdir()):
            flags, rate = 0, None
            with suppress(OSError, ValueError):
                flags = int((folder / "flags").read_text(encoding="ascii"), 16)
            with suppress(OSError, ValueError):
                rate = int((folder / "speed").read_text(encoding="ascii"))
            yield {
                "name": folder.name,
                "up": bool(flags & 1),
                "address": _address(folder.name),
                "mbit_per_s": rate if rate and rate > 0 else None,
            }


def _address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, suppress(OSError):
        answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None
