"""What training minimises and what evaluation counts: cross-entropy, or what is the user's own.

Everything is a sum over samples: sums of micro-batches and ranks, divided by the number of samples,
are then the exact mean, however the samples were spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.errors import ConfigError
from harness.own import calling, check_options, find, written
from harness.own_names import is_own
from harness.schema import Train


class Criterion:
    """The loss, and the metric if there is one, that a configuration's ``train`` describes."""

    def __init__(self, train: Train) -> None:
        """Raises ConfigError for callables that are not there or do not take their options."""
        self._smoothing = train.label_smoothing
        self._reduction = train.loss_reduction
        self._loss_name, self._metric_name = train.loss, train.metric
        self._loss = self._metric = None
        if is_own(train.loss):
            self._loss = _own("train.loss", train.loss, train.loss_options)
        if train.metric is not None:
            self._metric = _own("train.metric", train.metric, train.metric_options)

    @property
    def has_metric(self) -> bool:
        return self._metric is not None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed over the samples, of float32 logits (m, classes) and labels (m,); float32.

        Raises ConfigError for a loss that is not what it should be.
        """
        if self._loss is None:
            return functional.cross_entropy(
                logits, labels, reduction="sum", label_smoothing=self._smoothing
            )
        if not len(labels):  # where all ranks pass the model equally often
            return logits.sum() * 0.0
        found = self._summed(self._loss, logits, labels, torch.float32)
        if logits.requires_grad and not found.requires_grad:
            raise ConfigError(
                f"train.loss {self._loss_name}: what it returns does not depend on the logits as "
                "far as autograd knows; keep to torch's operations, without detach, item or numpy"
            )
        return found

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Like `loss` without label smoothing, summed in float64."""
        if self._loss is None:
            return functional.cross_entropy(logits, labels, reduction="none").double().sum()
        return self._summed(self._loss, logits, labels, torch.float64)

    def metrics(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The metric, summed over the samples in float64; 0 if there is none."""
        if self._metric is None:
            return torch.zeros((), dtype=torch.float64, device=logits.device)
        with calling("train.metric", self._metric_name or "", "calling it"):
            found = self._metric(logits, labels)
        what = "a value for each sample"
        values = _checked(found, f"train.metric {self._metric_name}", what, labels.shape)
        return values.double().sum()

    def try_on(self, num_classes: int, device: torch.device) -> None:
        """Raise ConfigError if the user's own cannot take logits of so many classes."""
        labels = torch.arange(2, device=device) % num_classes
        logits = torch.zeros(2, num_classes, device=device, requires_grad=True)
        if self._loss is not None:
            self.loss(logits, labels)
        self.metrics(logits.detach(), labels)

    def _summed(
        self, function: Callable[..., Any], logits: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        key = f"train.loss {self._loss_name}"
        with calling("train.loss", self._loss_name, "calling it"):
            found = function(logits, labels)
        if self._reduction == "none":
            what = "a value for each sample, with loss_reduction none"
            return _checked(found, key, what, labels.shape).to(dtype).sum()
        what = f"one number, with loss_reduction {self._reduction}"
        total = _checked(found, key, what, torch.Size()).to(dtype)
        return total * len(labels) if self._reduction == "mean" else total


def _own(key: str, name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The user's function with its options; of a class, as torch's losses are, an instance."""
    function = find(key, name)
    check_options(f"{key}_options", name, function, options, {})
    if isinstance(function, type):
        with calling(key, name, f"calling it with ({written(options)})"):
            made: object = function(**options)
        if not callable(made):
            raise ConfigError(f"{key} {name}: its instances are not callable")
        return made
    return lambda logits, labels: function(logits, labels, **options)


def _checked(found: object, key: str, what: str, shape: torch.Size) -> Tensor:
    if not isinstance(found, Tensor):
        raise ConfigError(f"{key}: must return {what}, as a tensor, not {type(found).__name__}")
    if found.shape != shape:
        raise ConfigError(
            f"{key}: must return {what}: shape {tuple(shape)} for these samples, not "
            f"{tuple(found.shape)}"
        )
    if found.dtype.is_complex:
        raise ConfigError(f"{key}: must return real numbers, not {found.dtype}")
    return found
