"""Random images of any size and any number of classes, made on the device: to measure throughput
without files, decoding, or copies to the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harness.data.datasets import Batch, Deferred, ImageData, Pending, normalisation, normalised
from harness.dataset_table import DEFAULT_SIZES
from harness.schema import Data

I64 = npt.NDArray[np.int64]

_SIDE, _CHANNELS, _CLASSES, _TEST = 224, 3, 1000, 1000
_POOL_BYTES = 64 << 20
_KEY = 0x73796E74  # of the pixels: the same in every run
_MEAN, _STD = 0.5, ((256**2 - 1) / 12) ** 0.5 / 255  # of evenly distributed bytes, in 0..1


def load(data: Data) -> ImageData:
    """Nothing is read or made yet."""
    side = data.image_size or _SIDE
    shape = (data.channels or _CHANNELS, side, side)
    size, classes = data.size or DEFAULT_SIZES["synthetic"], data.classes or _CLASSES
    pool = min(size, max(1, _POOL_BYTES // prod(shape)))
    return ImageData(
        name="synthetic",
        train=SyntheticSplit(size, pool, shape, classes),
        test=SyntheticSplit(min(_TEST, size), pool, shape, classes),
        num_classes=classes,
        shape=shape,
    )


@dataclass(frozen=True)
class SyntheticSplit:
    """Samples whose pixels come from a pool of random images, which each device makes once.

    Sample i has image i mod pool, whose label never changes: what a model learns of them by heart
    shows in the test, whose samples are training's first. Augmentation does nothing.
    """

    size: int
    pool: int
    """Number of different images."""
    shape: tuple[int, int, int]
    classes: int
    ahead: int = 0

    def __len__(self) -> int:
        return self.size

    def request(
        self, samples: I64, epochs: I64, seed: int, augment: bool, device: torch.device
    ) -> Pending:
        """See `harness.data.datasets.Split`; IndexError for a sample outside the split."""
        return Deferred(lambda: self._batch(samples, device))

    def close(self) -> None:
        """See `harness.data.datasets.Split`."""

    def _batch(self, samples: I64, device: torch.device) -> Batch:
        if len(samples) and not 0 <= samples.min() <= samples.max() < self.size:
            raise IndexError(f"samples {samples.min()}..{samples.max()} of {self.size}")
        places = torch.from_numpy(samples % self.pool).to(device)
        images = _pool(self.pool, self.shape, device).index_select(0, places)
        pixels = normalised(images, *_normalisation(self.shape[0]))
        return Batch(pixels, places % self.classes)


@lru_cache(maxsize=2)  # not a field of the split, which would take it along when it is pickled
def _pool(count: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Random bytes (count, *shape) on the device; on CPUs they are the same everywhere."""
    generator = torch.Generator(device).manual_seed(_KEY)
    size = (count, *shape)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=generator)


@lru_cache(maxsize=8)
def _normalisation(channels: int) -> tuple[Tensor, Tensor]:
    return normalisation((_MEAN,) * channels, (_STD,) * channels)
