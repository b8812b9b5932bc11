"""What the machine of a rank is doing: processor, memory, network and GPU, by psutil and NVML."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from typing import Any

import psutil
import torch

_PERIOD = 1.0
"""Seconds between two readings at least, so that they cost next to nothing."""


class Counters:
    """Readings at most once a second; what is counted is since the last one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._read_at = time.perf_counter()
        self._sent, self._received = _network()
        psutil.cpu_percent(None)  # which begins to count

    def read(self) -> dict[str, Any] | None:
        """None if the last reading is not a second ago. ``cpu_percent`` is the host's, over all
        cores; ``rss_bytes`` this process's; the network's bytes are the host's on all interfaces
        but the loopback; ``gpu_percent`` is null without nvidia-ml-py."""
        now = time.perf_counter()
        if now - self._read_at < _PERIOD:
            return None
        sent, received = _network()
        reading = {
            "seconds": now - self._read_at,
            "cpu_percent": psutil.cpu_percent(None),
            "rss_bytes": self._process.memory_info().rss,
            "net_sent_bytes": sent - self._sent,
            "net_received_bytes": received - self._received,
            **_gpu(self._device),
        }
        self._read_at, self._sent, self._received = now, sent, received
        return reading


def memory_peak(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the GPU's memory by tensors, else its
    resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _network() -> tuple[int, int]:
    """(sent, received) by all interfaces but the loopback since the host was started."""
    interfaces = psutil.net_io_counters(pernic=True, nowrap=True).items()
    real = [counted for name, counted in interfaces if name != "lo"]
    return sum(one.bytes_sent for one in real), sum(one.bytes_recv for one in real)


def _gpu(device: torch.device) -> dict[str, int | None]:
    """Its share of time with a kernel, and its memory in use, by whichever process."""
    reading: dict[str, int | None] = {"gpu_percent": None, "gpu_memory_bytes": None}
    if device.type == "cuda":
        # torch sees to NVML's own numbering of devices. NVML's Python module may be missing, and
        # has errors of its own for what a device does not tell, as one that MIG shares out.
        with suppress(Exception):
            reading["gpu_percent"] = torch.cuda.utilization(device)
        with suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info(device)
            reading["gpu_memory_bytes"] = total - free
    return reading
