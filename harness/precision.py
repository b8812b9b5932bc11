"""The arithmetic of forward and backward: float32, or bf16 and fp16 by autocast with a scaled loss.

Weights, gradients and updates are float32 throughout. In bf16 and fp16 torch casts what enters the
operations that gain by it, convolutions and matrix products; the loss must be computed outside of
``autocast``, from logits in float32.

fp16 keeps nothing below 2^-24. Micikevicius et al. (2018, section 3.2) multiply the loss, and so
all gradients, by a scale as large as they bear: it is halved when a gradient overflows, whose
update is skipped, and doubled after 2000 updates that went well.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

Name = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_INITIAL = 2.0**16
_SMALLEST, _LARGEST = 1.0, 2.0**24
_PATIENCE = 2000
"""Finite updates after which the scale is doubled."""


class Precision:
    """How one run computes; decided by values that all ranks agree on, so equal on all ranks.

    Use per update: ``reducer.start(…, loss_scale=precision.loss_scale(size, micro_batch))``; of
    each micro-batch the forward pass inside ``autocast()``; ``adapt(reduced.finite)`` at the end.
    """

    def __init__(self, name: Name, device: torch.device) -> None:
        self._dtype = _DTYPES.get(name)
        self._device = device
        self.scale = _INITIAL if name == "fp16" else 1.0
        """Of the mean loss of a micro-batch, a power of two; always 1 but in fp16."""
        self._finite_updates = 0
        """Since the scale last changed."""

    def autocast(self) -> AbstractContextManager[object]:
        """For the forward pass alone: backward follows it, and the loss is not to be rounded.

        To be entered for each micro-batch: the weights' casts are kept until it is left.
        """
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def loss_scale(self, size: int, micro_batch: int) -> float:
        """What the losses of an update of ``size`` samples are to be multiplied by.

        They are sums over a micro-batch divided by ``size``, smaller than means over a micro-batch
        by the number of micro-batches, which is made up for: the scale need not find its way anew
        whenever the global batch grows.
        """
        if self._dtype != torch.float16:
            return 1.0
        return self.scale * 2.0 ** round(math.log2(max(1.0, size / micro_batch)))

    def adapt(self, finite: bool) -> bool:
        """Take notice of whether an update's gradients were finite, and set the next one's scale.

        Returns whether it was lowered: the update that is skipped then was the search for a scale,
        and no sign that the run diverges.
        """
        if self._dtype != torch.float16:
            return False
        before = self.scale
        if not finite:
            self.scale = max(_SMALLEST, self.scale / 2)
            self._finite_updates = 0
        else:
            self._finite_updates += 1
            if self._finite_updates == _PATIENCE:
                self.scale = min(_LARGEST, self.scale * 2)
                self._finite_updates = 0
        return self.scale < before

    def state_dict(self) -> dict[str, Any]:
        """The same on all ranks."""
        return {"scale": self.scale, "finite_updates": self._finite_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self._finite_updates = state["scale"], state["finite_updates"]
