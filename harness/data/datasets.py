"""Image data sets held in memory as bytes, and the registry of those that can be named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harness.data.augment import Augmentation
from harness.data_sizes import check_loadable

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and labels of one split. Raises ValueError for tensors that do not fit each other."""

    images: Tensor = field(repr=False)
    """uint8, shape (n, C, H, W)."""
    labels: Tensor = field(repr=False)
    """int64, shape (n,)."""
    mean: tuple[float, ...]
    """Per channel, of pixels in 0..1."""
    std: tuple[float, ...]
    """Per channel, of pixels in 0..1."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 (n, C, H, W), not {_kind(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(self.images)},), not {_kind(self.labels)}"
            )
        channels = self.images.shape[1]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise ValueError(f"mean and positive std are needed for each of {channels} channels")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self,
        samples: I64,
        epochs: I64 | None = None,
        seed: int = 0,
        augment: Augmentation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (m, C, H, W) and int64 labels (m,) of the samples (m,).

        With ``augment`` each sample's pixels also depend on its epoch and the seed; never on the
        rest of the batch. Raises ValueError if epochs are then missing, IndexError for a sample
        outside the split.
        """
        index = torch.from_numpy(np.array(samples, dtype=np.int64))
        images = self.images.index_select(0, index).to(torch.float32)
        if augment is not None:
            if epochs is None:
                raise ValueError("augmentation needs the epoch of each sample")
            images = augment(images, seed, epochs, samples)
        scale, shift = self._normalisation
        return images.mul_(scale).add_(shift), self.labels.index_select(0, index)

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) of shape (C, 1, 1): bytes × scale + shift is (pixel - mean) / std."""
        mean = torch.tensor(self.mean, dtype=torch.float64).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float64).view(-1, 1, 1)
        return (1 / (255 * std)).to(torch.float32), (-mean / std).to(torch.float32)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: what a trainer needs to know of it."""

    name: str
    train: ImageSplit
    test: ImageSplit
    num_classes: int
    shape: tuple[int, int, int]
    """(C, H, W) of one image."""
    augmentation: Augmentation
    """The data set's own default, for ``data.augment: true``."""


# name -> module with `load(root: Path | None) -> ImageData`; imported only when asked for, so that
# scikit-learn need not be there for MNIST. harness/data_sizes.py has each one's training size.
LOADERS = {
    "digits": "harness.data.digits",
    "mnist": "harness.data.mnist",
}


def load(name: str, root: Path | None) -> ImageData:
    """Load a data set by name; raises DataError for an unknown name or files that do not fit."""
    check_loadable(name)
    loader: Callable[[Path | None], ImageData] = import_module(LOADERS[name]).load
    return loader(root)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
