"""From a micro-batch to its loss, computed as the configuration wants it."""

from __future__ import annotations

import os
import shutil
from typing import cast

import torch
from torch import Tensor, nn

from harness.criterion import Criterion
from harness.data.datasets import Batch
from harness.errors import ConfigError, HarnessError
from harness.precision import Precision
from harness.schema import Config


class ForwardPass:
    """A model with its precision, memory format, compilation and loss."""

    def __init__(
        self, model: nn.Module, config: Config, num_classes: int, device: torch.device
    ) -> None:
        """Raises ConfigError if train.compile is set and there is no compiler."""
        self._model, self._config, self._num_classes = model, config, num_classes
        self.precision = Precision(config.train.precision, device)
        self._channels_last = config.train.channels_last
        self._compiled = _compiled(model, device) if config.train.compile else None
        self.criterion = Criterion(config.train)

    def loss(self, batch: Batch) -> Tensor:
        """The loss summed over the micro-batch; float32.

        Raises ConfigError if the model does not return logits, or the user's own loss no loss.
        """
        images, labels = batch.images, batch.labels
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            logits = self._logits(images)
        if logits.shape != (len(labels), self._num_classes):
            raise ConfigError(
                f"model.name {self._config.model.name} returns {tuple(logits.shape)} for a "
                f"micro-batch of {len(labels)}; logits of ({len(labels)}, {self._num_classes}) are "
                "needed"
            )
        return self.criterion.loss(logits.float(), labels)

    def _logits(self, images: Tensor) -> Tensor:
        try:
            return cast(Tensor, self._chosen(len(images))(images))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise HarnessError(
                f"batch norm cannot train on a micro-batch of {len(images)} (one value per channel "
                "is no sample of a distribution). Where the global batch, or the rest of an epoch, "
                "leaves such a micro-batch, take another batch.micro or batch.initial, "
                "batch.epoch_end=carry, or train.sync_batch_norm=true"
            ) from error

    def _chosen(self, size: int) -> nn.Module:
        # Other sizes than the full micro-batch are rare. Compiling for them too would depend on
        # which comes first in this process, and a resumed run would round otherwise.
        if self._compiled is not None and size == self._config.batch.micro_batch:
            return self._compiled
        return self._model


def _compiled(model: nn.Module, device: torch.device) -> nn.Module:
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile = true needs a C++ compiler, but there is no {compiler} on PATH; "
            "install one, set CXX, or leave train.compile at false"
        )
    return cast(nn.Module, torch.compile(model, dynamic=False))
