"""Residual networks for CIFAR (He et al. 2016, section 4.2): ResNet-20, 32, 44, 56 and 110.

Three groups of n basic blocks with 16, 32 and 64 channels on 32 × 32, 16 × 16 and 8 × 8; depth is
6n + 2. Shortcuts without parameters: where a group begins, every other pixel and zeros for the new
channels (the paper's option A).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64)


class _Block(nn.Module):
    last_norm: ClassVar[str] = "bn2"  # for model.zero_gamma

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self._stride, self._padding = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if not self._padding:
            return x
        return functional.pad(x[:, :, :: self._stride, :: self._stride],
                              (0, 0, 0, 0, 0, self._padding))  # fmt: skip


class CifarResNet(nn.Module):
    """(N, C, H, W) float32 → (N, classes) logits."""

    def __init__(self, depth: int, num_classes: int, channels: int = 3) -> None:
        """Raises ValueError for a depth that is not 6n + 2."""
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth = {depth} is not 6n + 2 (20, 32, 44, 56, 110)")
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        groups, before = [], WIDTHS[0]
        for index, width in enumerate(WIDTHS):
            first = _Block(before, width, stride=1 if index == 0 else 2)
            groups.append(
                nn.Sequential(first, *(_Block(width, width, 1) for _ in range(blocks - 1)))
            )
            before = width
        self.layers = nn.Sequential(*groups)
        self.fc = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(functional.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits
