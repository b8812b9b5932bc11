"""As many handwritten digits as one asks for: variants of scikit-learn's training digits.

For experiments with large batches where nothing can be downloaded. Sample i is variant i // 1437 of
training digit i mod 1437 (see `harness.data.digits`), and variant 0 is the digit itself; all others
are made when they are asked for, so memory does not grow with the number of samples. The test
digits are those of the data set digits, and no variant is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from harness.data.augment import Affine, Augmentation, draws, with_cutout
from harness.data.datasets import (
    Batch,
    Deferred,
    ImageData,
    ImageSplit,
    Pending,
    normalisation,
    normalised,
    to_device,
)
from harness.data.digits import IMAGE_SHAPE, splits
from harness.dataset_table import DEFAULT_SIZES
from harness.errors import DataError
from harness.schema import Data

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_KEY = 0x656C6173  # of the variants: they are the data set, so they do not follow the run's seed
_VARIANTS = 1 << 20  # `draws` tells no more apart
_STREAM = 20  # the first of those of `draws` that are used here
_KNOTS, _SPACING = 7, 7  # control points along an axis; 28 pixels are 4 intervals of 7


def load(data: Data) -> ImageData:
    """The data set. Raises DataError if scikit-learn cannot provide the digits, or for more samples
    than there are different ones."""
    base, test = splits()
    size = data.size or DEFAULT_SIZES["digits-enlarged"]
    if size > len(base) * _VARIANTS:
        raise DataError(
            f"data.size = {size} is more than data.dataset = digits-enlarged can tell apart: at "
            f"most {len(base) * _VARIANTS}"
        )
    augmentation = with_cutout(Affine(), data.cutout, base.mean)
    train = EnlargedSplit(base, size, augmentation)
    return ImageData("digits-enlarged", train, test, 10, IMAGE_SHAPE)


@dataclass(frozen=True)
class AffineElastic(Affine):
    """An affine map with a smooth random displacement on top (Simard, Steinkraus, Platt 2003,
    section 2), for images of 28 × 28, in one bilinear resampling; outside is 0.

    The paper smooths a displacement of each pixel with a Gaussian of 4 pixels. Here random numbers
    on a grid of 7 pixels are spread by cubic B-splines, a kernel of 4.04 pixels, which takes a
    sixteenth of the random numbers. Sums are elementwise and in one order, so that the pixels do
    not depend on the batch: see `harness.data.augment`.
    """

    translate: float = 0.05
    """As in `Affine`; digits that fill the image lose strokes with more."""
    strength: float = 2.0
    """Displacement of a control point along an axis, at most, in pixels; the standard deviation of
    a pixel's is 0.28 times as much. The paper's is more than twice as strong, which makes these
    digits, drawn in 8 × 8 pixels, hard to read."""

    def __call__(self, images: Tensor, seed: int, epochs: I64, samples: I64) -> Tensor:
        """See `harness.data.augment.Augmentation`."""
        height, width = images.shape[-2:]
        if (height, width) != IMAGE_SHAPE[1:]:
            raise ValueError(f"images must be 28 × 28, not {height} × {width}")
        # On the CPU, whatever the images are on: the coefficients are then the same everywhere.
        grid = self._grid(draws(seed, epochs, samples, 5, stream=_STREAM), height, width)
        grid += torch.from_numpy(self._displacement(seed, epochs, samples)).permute(3, 1, 2, 0)
        images, grid = images.to(torch.float32), grid.to(images.device)
        return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _displacement(self, seed: int, epochs: I64, samples: I64) -> F32:
        """Shape (2, 28, 28, m): along x and y, in grid_sample's units; the samples come last, so
        that numpy's inner loop is long."""
        streams = range(_STREAM + 1, _STREAM + 1 + _KNOTS)
        rows = [draws(seed, epochs, samples, 2 * _KNOTS, stream) for stream in streams]
        knots = np.stack(rows).astype(np.float32)  # (7, 2 × 7, m)
        knots *= np.float32(self.strength * 2 / IMAGE_SHAPE[1])
        knots = knots.reshape(_KNOTS, 2, _KNOTS, -1).transpose(1, 0, 2, 3)
        along_x = _spread(knots)  # (2, 7, 28, m)
        flat = along_x.reshape(2, _KNOTS, -1)
        return _spread(flat).reshape(2, *IMAGE_SHAPE[1:], -1)


def _spread(knots: F32) -> F32:
    """Values at 28 pixels between 7 control points along the axis before the last, (…, 7, m) to
    (…, 28, m)."""
    intervals = _KNOTS - 3
    result = np.zeros((*knots.shape[:-2], intervals, _SPACING, knots.shape[-1]), np.float32)
    for first, weights in enumerate(_WEIGHTS):
        result += knots[..., first : first + intervals, None, :] * weights[:, None]
    return result.reshape(*knots.shape[:-2], intervals * _SPACING, -1)


def _weights() -> F32:
    """Uniform cubic B-spline: weight of each of 4 control points at the 7 pixels of an interval."""
    t = (np.arange(_SPACING) + 0.5) / _SPACING
    s = 1 - t
    pieces = [s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3]
    return (np.stack(pieces) / 6).astype(np.float32)


_WEIGHTS = _weights()


@dataclass(frozen=True, eq=False)
class EnlargedSplit:
    """Variants of the images of a split, made when they are asked for."""

    base: ImageSplit
    size: int
    augmentation: Augmentation | None = None
    """What `request` with ``augment`` applies on top."""
    variants: Augmentation = AffineElastic()
    ahead: int = 0

    def __len__(self) -> int:
        return self.size

    def request(
        self, samples: I64, epochs: I64, seed: int, augment: bool, device: torch.device
    ) -> Pending:
        """See `harness.data.datasets.Split`; IndexError for a sample outside the split."""
        chosen = self.augmentation if augment else None
        return Deferred(lambda: self._batch(samples, epochs, seed, chosen, device))

    def close(self) -> None:
        """See `harness.data.datasets.Split`."""

    def _batch(
        self,
        samples: I64,
        epochs: I64,
        seed: int,
        augment: Augmentation | None,
        device: torch.device,
    ) -> Batch:
        if len(samples) and not 0 <= samples.min() <= samples.max() < self.size:
            raise IndexError(f"samples {samples.min()}..{samples.max()} of {self.size}")
        variant, digit = np.divmod(samples, len(self.base))
        index = torch.from_numpy(digit)
        originals = to_device(self.base.images.index_select(0, index), device)
        labels = to_device(self.base.labels.index_select(0, index), device)
        images = self.variants(originals, _KEY, variant, digit)
        kept = torch.from_numpy(variant == 0).to(device)[:, None, None, None]
        images = torch.where(kept, originals.to(torch.float32), images)
        if augment is not None:
            images = augment(images, seed, epochs, samples)
        return Batch(normalised(images, *normalisation(self.base.mean, self.base.std)), labels)
