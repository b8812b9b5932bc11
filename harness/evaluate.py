"""Loss and accuracy on a data set's test split, exact over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from harness.comm.base import Communicator, allreduce
from harness.data.datasets import ImageSplit

I64 = npt.NDArray[np.int64]

_BATCH = 250


@dataclass(frozen=True)
class Evaluation:
    loss: float
    accuracy: float
    samples: int


def evaluate(
    model: nn.Module, split: ImageSplit, comm: Communicator, samples: I64 | None = None
) -> Evaluation:
    """Mean cross-entropy and top-1 accuracy over the split, or over some of its samples (m,).

    Each rank takes an equal share, give or take one sample; sums travel in float64, so no sample is
    dropped or counted twice. The model is left in training mode.
    """
    model.eval()
    chosen = np.arange(len(split), dtype=np.int64) if samples is None else samples
    bounds = [len(chosen) * i // comm.size for i in range(comm.size + 1)]
    mine = chosen[bounds[comm.rank] : bounds[comm.rank + 1]]
    found = torch.zeros(3, dtype=torch.float64, device=comm.device)
    with torch.inference_mode():
        for start in range(0, len(mine), _BATCH):
            images, labels = split.batch(mine[start : start + _BATCH])
            images, labels = images.to(comm.device), labels.to(comm.device)
            logits = model(images)
            losses = functional.cross_entropy(logits, labels, reduction="none")
            correct = (logits.argmax(dim=1) == labels).sum()
            found[0] += losses.double().sum()
            found[1] += correct
            found[2] += len(labels)
    model.train()
    loss, correct_count, total = allreduce(comm, found.cpu(), "evaluation").tolist()
    return Evaluation(loss / total, correct_count / total, int(total))
