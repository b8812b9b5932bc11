"""scikit-learn's digits: 1,797 real handwritten images that come with the package.

They are the test part of the UCI data set "Optical Recognition of Handwritten Digits" (Alpaydin
and Kaynak 1998): 8 × 8 pixels of 0..16. Here they are enlarged to LeNet-5's 28 × 28 and split into
1,437 for training and 360 for the test, in integer arithmetic and with our own keyed shuffle, so
that split and pixels stay the same whatever the versions of scikit-learn, numpy and torch.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from harness.data.augment import Affine, with_cutout
from harness.data.datasets import ImageData, ImageSplit
from harness.data.sampler import permute
from harness.errors import DataError
from harness.keyed import fold_key
from harness.schema import Data

I64 = npt.NDArray[np.int64]

_SIDE, _BRIGHTEST, _COUNT, _TEST = 8, 16, 1797, 360
_ENLARGED = 28
IMAGE_SHAPE = (1, _ENLARGED, _ENLARGED)
_SPLIT_KEY = 0x64696769


def load(data: Data) -> ImageData:
    """The data set. Raises DataError if scikit-learn cannot provide it."""
    train, test = splits()
    augmentation = with_cutout(Affine(), data.cutout, train.mean)
    return ImageData("digits", replace(train, augmentation=augmentation), test, 10, IMAGE_SHAPE)


def splits() -> tuple[ImageSplit, ImageSplit]:
    """(train, test), without augmentation; raises DataError as `load`."""
    small, labels = _from_sklearn()
    images = enlarge(small)
    train, test = stratified_split(labels, _TEST, _SPLIT_KEY)
    pixels = images[train].astype(np.int64)
    mean = float(pixels.sum() / pixels.size / 255)
    std = float(((pixels**2).sum() / pixels.size / 255**2 - mean**2) ** 0.5)

    def split(members: I64) -> ImageSplit:
        chosen = torch.from_numpy(images[members][:, None])
        return ImageSplit(chosen, torch.from_numpy(labels[members]), (mean,), (std,))

    return split(train), split(test)


def enlarge(small: I64) -> npt.NDArray[np.uint8]:
    """Bilinear enlargement of (n, 8, 8) images of 0..16 to uint8 (n, 28, 28) of 0..255.

    Pixel i of 28 lies at (2i + 1)·8/56 - 1/2 = (4i - 5)/14 of 8, held inside the image (the rule of
    OpenCV and of torch with align_corners=False). In fourteenths all weights are whole numbers.
    """
    steps = 14
    at = np.clip(4 * np.arange(_ENLARGED) - 5, 0, steps * (_SIDE - 1))
    low, weight = at // steps, at % steps
    matrix = np.zeros((_ENLARGED, _SIDE), dtype=np.int64)
    matrix[np.arange(_ENLARGED), low] = steps - weight
    matrix[np.arange(_ENLARGED), np.minimum(low + 1, _SIDE - 1)] += weight
    sums = matrix @ small @ matrix.T
    full = steps * steps * _BRIGHTEST
    return ((2 * 255 * sums + full) // (2 * full)).astype(np.uint8)


def stratified_split(labels: I64, test_size: int, key: int) -> tuple[I64, I64]:
    """Ascending (train, test) indices; each class is in the test in proportion, by largest rest."""
    classes, counts = np.unique(labels, return_counts=True)
    shares, rests = np.divmod(counts * test_size, len(labels))
    most = np.argsort(-rests, kind="stable")
    shares[most[: test_size - int(shares.sum())]] += 1
    in_test = np.zeros(len(labels), dtype=bool)
    for label, count, share in zip(classes.tolist(), counts.tolist(), shares.tolist(), strict=True):
        places = np.arange(share, dtype=np.uint64)
        chosen = permute(places, count, fold_key(key, label))
        in_test[np.flatnonzero(labels == label)[chosen]] = True
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


def _from_sklearn() -> tuple[I64, I64]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"the data set digits comes with scikit-learn, which cannot be imported ({error}); "
            "install scikit-learn or take another data set"
        ) from error
    bunch = load_digits()
    images, labels = bunch.images.astype(np.int64), bunch.target.astype(np.int64)
    if images.shape != (_COUNT, _SIDE, _SIDE) or not 0 <= images.min() <= images.max() <= 16:
        raise DataError(
            f"scikit-learn's digits are {images.shape} with values {images.min()}..{images.max()}; "
            f"expected ({_COUNT}, {_SIDE}, {_SIDE}) with 0..16: install scikit-learn 1.4 or later"
        )
    return images, labels
