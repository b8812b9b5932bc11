"""Loss and accuracy on a data set's split, exact over all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from harness.comm.base import Communicator, allgather_bytes, allreduce
from harness.criterion import Criterion
from harness.data.datasets import Split
from harness.data.feed import batches
from harness.errors import DataError
from harness.schema import Train
from harness.units import Duration

I64 = npt.NDArray[np.int64]

_VALUES = 250 * 3 * 64 * 64
"""Most values in the images of one batch: large images need no more memory than small ones."""


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy, without label smoothing; or the mean of the user's own loss."""
    accuracy: float
    """Share of the samples whose label has the highest logit (top-1)."""
    accuracy_top5: float
    """Share whose label is among the five highest logits; 1 with five classes or fewer."""
    samples: int
    """How many were counted."""
    corrupt: tuple[str, ...] = ()
    """Those more that could not be read, each with its name and why."""
    metric: float | None = None
    """Mean of the user's own metric; None if there is none."""


def evaluate(
    model: nn.Module,
    split: Split,
    comm: Communicator,
    samples: I64 | None = None,
    shape: tuple[int, int, int] = (1, 28, 28),
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    criterion: Criterion | None = None,
) -> Evaluation:
    """Measure over the split, or over some of its samples (m,); ``shape`` is one image's;
    ``criterion``: the user's own loss and metric.

    Each rank takes an equal share, give or take one sample; counts and sums travel in float64, so
    no sample is dropped or counted twice. The model is left in training mode. Raises DataError if
    no sample can be read.
    """
    model.eval()
    chosen = np.arange(len(split), dtype=np.int64) if samples is None else samples
    bounds = [len(chosen) * i // comm.size for i in range(comm.size + 1)]
    mine = chosen[bounds[comm.rank] : bounds[comm.rank + 1]]
    size = max(1, min(250, _VALUES // prod(shape)))
    criterion = criterion or Criterion(Train(duration=Duration.parse("1up")))
    found = torch.zeros(5, dtype=torch.float64, device=comm.device)
    corrupt: list[str] = []
    with torch.inference_mode():
        for batch in batches(split, mine, size, comm.device):
            corrupt += batch.corrupt
            if len(batch.labels):
                with autocast():
                    logits = model(batch.images)
                found += _sums(logits.float(), batch.labels, criterion)
    model.train()
    loss, top1, top5, metric, total = allreduce(comm, found.cpu(), "evaluation").tolist()
    left_out = gather_texts(comm, corrupt) if total < len(chosen) else ()
    if not total:
        first = f": {left_out[0]}" if left_out else ""
        raise DataError(f"none of {len(left_out)} samples to evaluate on can be read{first}")
    return Evaluation(
        loss / total,
        top1 / total,
        top5 / total,
        int(total),
        left_out,
        metric / total if criterion.has_metric else None,
    )


def gather_texts(comm: Communicator, texts: Sequence[str]) -> tuple[str, ...]:
    """All ranks' texts, sorted. Collective."""
    told = allgather_bytes(comm, json.dumps(texts).encode(), "texts")
    return tuple(sorted(text for content in told for text in json.loads(content)))


def _sums(logits: Tensor, labels: Tensor, criterion: Criterion) -> Tensor:
    """(loss, right at first, right among five, metric, samples) of logits (m, classes)."""
    loss, metric = criterion.losses(logits, labels), criterion.metrics(logits, labels)
    first = logits.argmax(dim=1) == labels
    among = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(dim=1) | first
    sums = (loss, first.sum(), among.sum(), metric, torch.tensor(len(labels)))
    return torch.stack([value.to(logits.device, torch.float64) for value in sums])
