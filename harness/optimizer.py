"""The optimizer that a configuration names."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from harness.lars import LARS
from harness.schema import LARS_ONLY, Config


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """An optimizer over all of a model's parameters; rate and momentum change as it trains."""
    settings = config.optimizer
    if settings.name == "lars":
        options = {name: getattr(settings, name) for name in LARS_ONLY}
        return LARS(
            model.parameters(),
            lr=config.lr.base,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
            **{name: value for name, value in options.items() if value is not None},
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr.base,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        foreach=True,
    )
