"""What a data set is to a trainer, images that lie in memory as bytes, and loading by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harness.data.augment import Augmentation
from harness.dataset_table import dataset_of
from harness.phases import copying
from harness.schema import Data

I64 = npt.NDArray[np.int64]

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch on its device."""

    images: Tensor
    """Normalised float32 (k, C, H, W)."""
    labels: Tensor
    """int64 (k,)."""
    corrupt: tuple[str, ...] = ()
    """Samples that were asked for and left out, each with its name and what is wrong with it;
    k + len(corrupt) were asked for."""


class Pending(Protocol):
    """A micro-batch that has been asked for."""

    def take(self) -> Batch:
        """Wait for it. Raises DataError if it cannot be had. At most once."""
        ...

    def cancel(self) -> None:
        """Instead of `take`: it is not wanted any more."""
        ...


class Split(Protocol):
    """The samples of one split, by number. Can be pickled; large arrays are numpy's or torch's."""

    @property
    def ahead(self) -> int:
        """How many micro-batches to ask for ahead of the one that is taken, so that they are ready
        in time; 0 where that gains nothing."""
        ...

    def __len__(self) -> int: ...

    def request(
        self, samples: I64, epochs: I64, seed: int, augment: bool, device: torch.device
    ) -> Pending:
        """Ask for samples (m,), as training sees them with ``augment`` (random, but a function of
        seed, epoch (m,) and sample only), else as evaluation does. Returns at once."""
        ...

    def close(self) -> None:
        """Let go of worker processes, if there are any."""
        ...


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and labels in memory. Raises ValueError for tensors that do not fit each other."""

    images: Tensor = field(repr=False)
    """uint8, shape (n, C, H, W)."""
    labels: Tensor = field(repr=False)
    """int64, shape (n,)."""
    mean: tuple[float, ...]
    """Per channel, of pixels in 0..1."""
    std: tuple[float, ...]
    """Per channel, of pixels in 0..1."""
    augmentation: Augmentation | None = None
    """What `request` with ``augment`` applies."""
    ahead: int = 0

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
        device: torch.device = CPU,
    ) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (m, C, H, W) and int64 labels (m,) of the samples (m,).

        With ``augment`` each sample's pixels also depend on its epoch and the seed; never on the
        rest of the batch. Raises ValueError if epochs are then missing, IndexError for a sample
        outside the split.
        """
        index = torch.from_numpy(np.array(samples, dtype=np.int64))
        images = to_device(self.images.index_select(0, index), device)
        labels = to_device(self.labels.index_select(0, index), device)
        if augment is not None:
            if epochs is None:
                raise ValueError("augmentation needs the epoch of each sample")
            images = augment(images, seed, epochs, samples)
        return normalised(images, *self._normalisation), labels

    def request(
        self, samples: I64, epochs: I64, seed: int, augment: bool, device: torch.device
    ) -> Pending:
        """See `Split`."""
        chosen = self.augmentation if augment else None
        return Deferred(lambda: Batch(*self.batch(samples, epochs, seed, chosen, device)))

    def close(self) -> None:
        """See `Split`."""

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        return normalisation(self.mean, self.std)


@dataclass(frozen=True)
class Deferred:
    """A micro-batch that is made when it is taken."""

    make: Callable[[], Batch]

    def take(self) -> Batch:
        """See `Pending`."""
        return self.make()

    def cancel(self) -> None:
        """See `Pending`."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: what a trainer needs to know of it."""

    name: str
    train: Split
    test: Split
    num_classes: int
    shape: tuple[int, int, int]
    """(C, H, W) of one image."""


def load(data: Data) -> ImageData:
    """Load what a configuration names; raises DataError for files that do not fit."""
    # Imported only here, so that scikit-learn need not be there for MNIST.
    loader: Callable[[Data], ImageData] = import_module(dataset_of(data.dataset).module).load
    return loader(data)


def normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(scale, shift) of shape (C, 1, 1): bytes × scale + shift is (pixel - mean) / std."""
    means = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
    stds = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
    return (1 / (255 * stds)).to(torch.float32), (-means / stds).to(torch.float32)


def normalised(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """float32 images × scale + shift, of bytes or float32 (m, C, H, W), which may be overwritten;
    scale and shift are (C, 1, 1)."""
    scale, shift = scale.to(images.device), shift.to(images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a copy to a GPU leaves from pinned memory and is not waited for."""
    if device.type == "cpu":
        return tensor
    with copying():
        pinned = tensor.pin_memory() if device.type == "cuda" else tensor
        return pinned.to(device, non_blocking=True)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
