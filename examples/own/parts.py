"""A model, a data set, a loss, a metric and an optimizer of one's own, for own.yaml beside it."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's digits, 8 × 8, shifted at random while training."""

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, train: bool, shift: int = 1) -> None:
        digits = load_digits()
        part = slice(0, 1437) if train else slice(1437, None)
        self.images = torch.tensor(digits.images[part], dtype=torch.float32) / 16
        self.labels = digits.target[part].tolist()
        self.shift = shift if train else 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # Any generator will do: the harness seeds Python's, numpy's and torch's for each sample.
        down, right = torch.randint(-self.shift, self.shift + 1, (2,)).tolist()
        image = self.images[index].roll((down, right), dims=(0, 1))
        return image[None], self.labels[index]


def model(num_classes: int, shape: tuple[int, int, int], width: int = 64) -> nn.Module:
    channels, height, cols = shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * cols, width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Lin et al. 2017, equation 4: a loss for each sample, less for those that are easy."""
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-losses)) ** gamma * losses


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """The probability that each sample's label is given."""
    return logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]


class SignSGD(torch.optim.Optimizer):
    """Bernstein et al. 2018, algorithm 1, with momentum: Signum."""

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad, alpha=1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m.sign())
