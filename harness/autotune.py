"""Bucket size and compression chosen by a short measurement, or the configured one checked by one.

What is measured is the update that training will make: forward and backward of the model, a copy of
it, on a micro-batch of noise, with the sums over all ranks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from harness.comm.base import Communicator, allreduce
from harness.compression import Compression
from harness.errors import ConfigError
from harness.reducer import GradientReducer
from harness.schema import Comm

_BUCKETS_MB = (1.0, 4.0, 16.0, 64.0)
_UPDATES = 5
_MARGIN = 0.97
"""Another setting must take less than this share of the configured one's time."""
_SLOWER = 1.25
"""How much longer compression must take than none before that is worth a word."""


@dataclass(frozen=True)
class Trial:
    bucket_mb: float
    compression: Compression
    seconds: float
    """Median time of an update, the mean over ranks."""


@dataclass(frozen=True)
class Tuned:
    """The settings to train with, and what they were chosen from."""

    bucket_mb: float
    compression: Compression
    ranks: int
    trials: list[Trial]

    def applied(self, settings: Comm) -> Comm:
        chosen = {"bucket_mb": self.bucket_mb, "compression": self.compression}
        return settings.model_copy(update=chosen)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Tuned:
        return cls(**{**fields, "trials": [Trial(**trial) for trial in fields["trials"]]})


def tune(
    settings: Comm,
    model: nn.Module,
    shape: tuple[int, int, int],
    micro_batch: int,
    comm: Communicator,
) -> Tuned:
    """Measure some bucket sizes with the configured compression, then the other compression with
    the best of them. The model's state is left as it is. A collective call; equal on all ranks.

    Args:
        shape: (C, H, W) of one image.
        micro_batch: images of the backward pass that is measured.
    """
    update = _Update(model, shape, micro_batch, comm, settings)
    update.timed(settings.bucket_mb, settings.compression)  # the first to run pays for all
    configured = update.timed(settings.bucket_mb, settings.compression)
    trials = [configured]
    trials += [update.timed(size, settings.compression) for size in _sizes(model, settings)]
    best = _better(configured, trials)
    other: Compression = "fp16" if settings.compression == "none" else "none"
    if settings.summation == "float":
        trials.append(update.timed(best.bucket_mb, other))
        best = _better(best, [trials[-1]])
    return Tuned(best.bucket_mb, best.compression, comm.size, trials)


def slower_than_none(settings: Comm, model: nn.Module, comm: Communicator) -> float | None:
    """How many times as long one of the model's buckets takes with the configured compression as
    with none, if that is clearly longer; else None. A collective call; equal on all ranks."""
    if settings.compression == "none" or comm.size == 1:
        return None
    device = comm.device
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bucket = torch.zeros(min(elements, int(settings.bucket_mb * 2**20) // 4), device=device)

    def plain() -> None:
        allreduce(comm, bucket, "check")

    def packed() -> None:
        bucket.copy_(allreduce(comm, bucket.half(), "check"))

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_UPDATES + 1):
        for action, taken in zip((plain, packed), times, strict=True):
            start = time.perf_counter()
            action()
            _settle(device)
            taken.append(time.perf_counter() - start)
    medians = torch.tensor([median(taken[1:]) for taken in times], dtype=torch.float64)
    none, compressed = allreduce(comm, medians, "check.times").tolist()
    ratio = float(compressed / none)
    return ratio if ratio > _SLOWER else None


class _Update:
    """An update of a copy of the model, as training makes it."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        micro_batch: int,
        comm: Communicator,
        settings: Comm,
    ) -> None:
        try:
            self._model = copy.deepcopy(model).train()
        except Exception as error:
            raise ConfigError(
                f"comm.autotune = true measures with a copy of the model, which cannot be copied "
                f"({type(error).__name__}: {error}); set comm.autotune to false"
            ) from error
        self._device = next(self._model.parameters()).device
        self._comm, self._settings = comm, settings
        noise = torch.Generator().manual_seed(0)
        self._images = torch.randn(micro_batch, *shape, generator=noise).to(self._device)

    def timed(self, bucket_mb: float, compression: Compression) -> Trial:
        reducer = GradientReducer(
            self._model,
            self._comm,
            compression,
            int(bucket_mb * 2**20),
            self._settings.summation,
        )
        seconds = []
        with torch.random.fork_rng(devices=[]):
            for _ in range(_UPDATES + 2):  # the first goes uncompressed, the second warms up
                start = time.perf_counter()
                reducer.start(1)
                loss: torch.Tensor = self._model(self._images).square().mean()
                reducer.backward(loss / self._comm.size)
                reducer.finish()
                _settle(self._device)
                seconds.append(time.perf_counter() - start)
        reducer.close()
        mine = torch.tensor([median(seconds[2:])], dtype=torch.float64)
        mean = float(allreduce(self._comm, mine, "autotune")) / self._comm.size
        return Trial(bucket_mb, compression, mean)


def _sizes(model: nn.Module, settings: Comm) -> list[float]:
    """Bucket sizes to try besides the configured one; those that hold the whole model are one."""
    whole = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad) / 2**20
    found = {min(size, whole): size for size in reversed(_BUCKETS_MB)}
    found.pop(min(settings.bucket_mb, whole), None)
    return sorted(found.values())


def _better(standing: Trial, others: Iterable[Trial]) -> Trial:
    """The fastest, if it is clearly faster than the one that stands."""
    fastest = min(others, key=lambda trial: trial.seconds)
    return fastest if fastest.seconds < _MARGIN * standing.seconds else standing


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
