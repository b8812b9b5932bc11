"""How many images a second one rank computes here, by the size of its micro-batch.

    python -m harness.trial CONFIG --seconds 10 --ranks 2

Forward and backward on the real data, one process, nothing sent. Micro-batches double until memory
has no room for the next (its share among the host's ranks), or until they gain nothing any more.
Prints a line of JSON for `harness init`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import environment
from harness.config import load_config
from harness.data.datasets import ImageData, load
from harness.data.feed import batches
from harness.doctor.machine import available_memory
from harness.errors import HarnessError
from harness.forward import ForwardPass
from harness.last_words import lacks_memory
from harness.memory import keep_freed_memory
from harness.models import configured_model
from harness.schema import Config

_FIRST = 8
_LARGEST = 1024
_GAIN = 1.05
"""A doubled micro-batch that gains less, twice, ends the search."""
_SHARE = 0.7
"""Of the memory that is there: optimizer, buckets and other processes want some."""


def measure(config: Config, seconds: float, ranks: int) -> dict[str, Any]:
    """``{"device", "threads", "points", "stopped"}``; a point is ``{"micro", "images_per_sec",
    "memory_bytes"}``.

    ``seconds``: about how long, all together; ``ranks``: those of one host, which share it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, environment.usable_cores() // ranks))
    data = load(config.data)
    keep_freed_memory()
    model = configured_model(config, data.num_classes, data.shape).to(device)
    forward = ForwardPass(model, config, data.num_classes, device)
    room = _room(device, ranks)
    points: list[dict[str, Any]] = []
    stopped, micro, flat = "largest", _FIRST, 0
    while micro <= min(_LARGEST, len(data.train)):
        if points and _needed(points) > room:
            stopped = "memory"
            break
        try:
            point = _timed(forward, model, data, device, micro, seconds / 8)
        except Exception as error:
            if not lacks_memory(error) or not points:
                raise
            stopped = "memory"
            break
        flat = flat + 1 if points and _gains(points, point) < _GAIN else 0
        points.append(point)
        if flat == 2:
            stopped = "no gain"
            break
        micro *= 2
    data.train.close()
    data.test.close()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "points": points,
        "stopped": stopped,
    }


def _gains(points: list[dict[str, Any]], point: dict[str, Any]) -> float:
    best = max(float(one["images_per_sec"]) for one in points)
    return float(point["images_per_sec"]) / best


def _room(device: torch.device, ranks: int) -> float:
    """Bytes that one rank may take, beyond what this process has now."""
    if device.type == "cuda":
        return _SHARE * torch.cuda.mem_get_info()[0]
    free = available_memory()
    return float("inf") if free is None else _SHARE * free / ranks


def _needed(points: list[dict[str, Any]]) -> float:
    """Bytes of twice the last micro-batch, in a straight line from the first."""
    return 2.0 * float(points[-1]["memory_bytes"])


def _timed(
    forward: ForwardPass,
    model: torch.nn.Module,
    data: ImageData,
    device: torch.device,
    micro: int,
    seconds: float,
) -> dict[str, Any]:
    """Of steady steps for about ``seconds``; the first is not counted."""
    before = _peak(device)
    samples = np.arange(micro, dtype=np.int64)
    (batch,) = batches(data.train, samples, micro, device)
    done, begun = -1, time.perf_counter()
    while done < 1 or time.perf_counter() - begun < seconds:
        for parameter in model.parameters():
            parameter.grad = None
        torch.autograd.backward(forward.loss(batch) / micro)
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += 1
        if done == 0:
            begun = time.perf_counter()
    took = time.perf_counter() - begun
    return {
        "micro": micro,
        "images_per_sec": done * micro / took,
        "memory_bytes": max(0, _peak(device) - before),
    }


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.trial", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    options = parser.parse_args()
    try:
        found = measure(load_config(options.config), options.seconds, options.ranks)
    except (HarnessError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print("@", json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
