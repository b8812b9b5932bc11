"""Augmentation whose random numbers belong to (seed, epoch, sample).

A sample's pixels are therefore the same, bit for bit, on any rank, in any batch and at any place in
it. To keep that, coefficients come from +, -, × and / alone, which IEEE 754 rounds the same
everywhere; sine and cosine may differ between a vector loop and its remainder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi, tan
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from harness.keyed import fold_key, uniform

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_AUGMENT = 0x61756764  # keeps these keys apart from those of the shuffle
_SAMPLE_BITS, _DRAW_BITS = np.uint64(40), np.uint64(4)


class Augmentation(Protocol):
    """Anything that alters a batch of images, keyed by seed, epoch and sample."""

    def __call__(self, images: Tensor, seed: int, epochs: I64, samples: I64) -> Tensor:
        """Altered copies of images (m, C, H, W), bytes or float32 in 0..255; epochs and samples are
        (m,). On the images' device. The images may be overwritten.
        """
        ...


def draws(seed: int, epochs: I64, samples: I64, count: int, stream: int) -> F64:
    """Uniform numbers in [-1, 1), shape (count, m): up to 16 for each (seed, epoch, sample).

    Each augmentation takes a ``stream`` of its own. Epochs repeat after 2**20, samples are below
    2**40.
    """
    if not 0 < count <= 16:
        raise ValueError(f"count must be in 1..16, not {count}")
    epoch, sample = epochs.astype(np.uint64), samples.astype(np.uint64)
    word = (epoch << _SAMPLE_BITS | sample) << _DRAW_BITS
    index = word | np.arange(count, dtype=np.uint64)[:, None]
    return 2 * uniform(_key(seed), index, stream) - 1


@lru_cache(maxsize=16)
def _key(seed: int) -> int:
    return fold_key(_AUGMENT, seed)


@dataclass(frozen=True)
class Affine:
    """Rotation, isotropic scale, shear and translation in one bilinear resampling; outside is 0.

    Each amplitude is the largest deviation to either side. The defaults were chosen on digits;
    there, most of what they bring comes from the translation.
    """

    degrees: float = 10.0
    """Rotation about the centre."""
    scale: float = 0.1
    """Relative change of size."""
    shear: float = 0.1
    """Horizontal shift per row, in pixels."""
    translate: float = 0.1
    """Shift along each axis, as a fraction of the image's size."""

    def __call__(self, images: Tensor, seed: int, epochs: I64, samples: I64) -> Tensor:
        """See `Augmentation`."""
        height, width = images.shape[-2:]
        # On the CPU, whatever the images are on: the coefficients are then the same everywhere.
        grid = self._grid(draws(seed, epochs, samples, 5, stream=1), height, width)
        images, grid = images.to(torch.float32), grid.to(images.device)
        return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _grid(self, random: F64, height: int, width: int) -> Tensor:
        """Where each output pixel is read from, shape (m, H, W, 2), in grid_sample's -1..1.

        Built by broadcasting; torch's affine_grid is a matrix product, which costs more and whose
        summation may change with the size of the batch.
        """
        along_x, along_y = self._coefficients(random, height, width)
        xs = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
        ys = (torch.arange(height, dtype=torch.float32) - (height - 1) / 2)[:, None]
        grid = torch.empty(random.shape[1], height, width, 2)
        for axis, (x, y, shift) in enumerate((along_x, along_y)):
            torch.add(x * xs, y * ys + shift, out=grid[..., axis])
        return grid

    def _coefficients(self, random: F64, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Per input axis the factors of output x and y and the shift, each tensor (3, m, 1, 1)."""
        turn, size, slant, right, down = random
        # With t = tan(angle / 2): cos = (1 - t²) / (1 + t²) and sin = 2t / (1 + t²).
        t = turn * tan(self.degrees * pi / 360)
        norm = (1 + size * self.scale) * (1 + t * t)
        cos, sin, shear = (1 - t * t) / norm, 2 * t / norm, slant * self.shear
        from_x = np.stack([cos, cos * shear - sin, right * (self.translate * width)]) * (2 / width)
        from_y = np.stack([sin, sin * shear + cos, down * (self.translate * height)]) * (2 / height)
        return _column(from_x), _column(from_y)


def _column(values: F64) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, :, None, None]


@dataclass(frozen=True)
class CropFlip:
    """A crop of the image's own size from the image with a border of zeros, then a flip for every
    other one (He et al. 2016, section 4.2; in bytes, exact)."""

    padding: int = 4
    """Width of the border, in pixels: shifts are -padding..padding along each axis."""
    flip: bool = True
    """Left and right change places in half of the images."""

    def __call__(self, images: Tensor, seed: int, epochs: I64, samples: I64) -> Tensor:
        """See `Augmentation`."""
        (count, channels, height, width), border = images.shape, self.padding
        random = draws(seed, epochs, samples, 3, stream=2)
        device = images.device
        top, left = (_whole(row, 2 * border + 1).to(device) for row in random[:2])
        padded = images.new_zeros(count, channels, height + 2 * border, width + 2 * border)
        padded[:, :, border : border + height, border : border + width] = images
        rows = top[:, None] + torch.arange(height, device=device)
        columns = torch.arange(width, device=device).expand(count, width)
        if self.flip:
            flipped = torch.from_numpy(random[2] < 0).to(device)
            columns = torch.where(flipped[:, None], columns.flip(1), columns)
        columns = left[:, None] + columns
        # One index for all channels of an image; a gather is the fastest way that runs on any
        # device (a third of the time of indexing an unfolded view).
        index = rows[:, :, None] * (width + 2 * border) + columns[:, None, :]
        index = index.view(count, 1, height * width).expand(count, channels, height * width)
        return padded.flatten(2).gather(2, index).view_as(images)


@dataclass(frozen=True)
class Cutout:
    """A square wiped out around a random pixel, cut off at the image's edge (DeVries and Taylor
    2017, arXiv 1708.04552, section 3)."""

    side: int
    """In pixels."""
    fill: tuple[float, ...]
    """Value in 0..255 for each channel; the mean, which normalisation turns into 0."""

    def __call__(self, images: Tensor, seed: int, epochs: I64, samples: I64) -> Tensor:
        """See `Augmentation`."""
        (height, width), device = images.shape[-2:], images.device
        random = draws(seed, epochs, samples, 2, stream=3)
        wiped = [
            self._covered(_whole(row, length), length).to(device)
            for row, length in zip(random, (height, width), strict=True)
        ]
        mask = wiped[0][:, None, :, None] & wiped[1][:, None, None, :]
        fill = torch.tensor(self.fill, dtype=torch.float32).round().to(images.dtype).to(device)
        return torch.where(mask, fill[:, None, None], images)

    def _covered(self, centre: Tensor, length: int) -> Tensor:
        """Which of ``length`` pixels along an axis are in the square around ``centre`` (m,)."""
        offset = torch.arange(length) - centre[:, None] + self.side // 2
        return (offset >= 0) & (offset < self.side)


@dataclass(frozen=True)
class Compose:
    """One augmentation after the other."""

    parts: tuple[Augmentation, ...]

    def __call__(self, images: Tensor, seed: int, epochs: I64, samples: I64) -> Tensor:
        """See `Augmentation`."""
        for part in self.parts:
            images = part(images, seed, epochs, samples)
        return images


def with_cutout(
    augmentation: Augmentation, side: int | None, mean: tuple[float, ...]
) -> Augmentation:
    """The augmentation, followed by a cutout of ``side`` pixels unless that is None; ``mean`` is of
    pixels in 0..1."""
    if side is None:
        return augmentation
    return Compose((augmentation, Cutout(side, tuple(255 * value for value in mean))))


def _whole(random: F64, count: int) -> Tensor:
    """int64 in 0..count-1, evenly, from uniform numbers in [-1, 1)."""
    return torch.from_numpy(((random + 1) / 2 * count).astype(np.int64))
