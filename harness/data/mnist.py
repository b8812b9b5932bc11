"""MNIST (LeCun, Bottou, Bengio, Haffner 1998) from IDX files on disk; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from harness.data.augment import Affine
from harness.data.datasets import ImageData, ImageSplit
from harness.data.idx import read_idx
from harness.data_sizes import find_idx
from harness.errors import DataError

_PARTS = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}
_SOURCE = (
    "MNIST is the handwritten-digit database of LeCun, Cortes and Burges; torchvision's MNIST data "
    "set class, told to download, writes the same files to ROOT/MNIST/raw"
)
# Mean and standard deviation of the 60,000 training images in 0..1, as commonly published.
_MEAN, _STD = 0.1307, 0.3081


def load(root: Path | None) -> ImageData:
    """Read the four files from root, root/raw or root/MNIST/raw; raises DataError."""
    files = _find(root)
    return ImageData(
        name="mnist",
        train=_split(files["train-images"], files["train-labels"]),
        test=_split(files["t10k-images"], files["t10k-labels"]),
        num_classes=10,
        shape=(1, 28, 28),
        augmentation=Affine(),
    )


def _find(root: Path | None) -> dict[str, Path]:
    wanted = ", ".join(f"{part}-idx{dims}-ubyte" for part, dims in _PARTS.items())
    needs = f"mnist needs {wanted} (each may end in .gz). {_SOURCE}"
    if root is None:
        raise DataError(f"data.root is not set; {needs}")
    if not os.path.isdir(root):  # Path.is_dir raises where access is denied
        raise DataError(f"data.root {root} is not a directory; {needs}")
    found = {part: find_idx(root, part, dims) for part, dims in _PARTS.items()}
    missing = [f"{part}-idx{_PARTS[part]}-ubyte" for part, path in found.items() if path is None]
    if missing:
        where = f"{root}, {root / 'raw'} or {root / 'MNIST' / 'raw'}"
        raise DataError(f"{', '.join(missing)} not found in {where}; {needs}")
    return {part: path for part, path in found.items() if path is not None}


def _split(image_file: Path, label_file: Path) -> ImageSplit:
    images, labels = read_idx(image_file, (28, 28)), read_idx(label_file, ())
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} holds {len(images)} images, but {label_file} holds {len(labels)} "
            "labels; take both files from the same copy of MNIST"
        )
    if labels.max() > 9:
        at = int(np.argmax(labels > 9))
        raise DataError(
            f"{label_file}: label {at} is {labels[at]}, outside 0..9; replace the file with a "
            "fresh copy"
        )
    return ImageSplit(
        images=torch.from_numpy(images[:, None]),
        labels=torch.from_numpy(labels.astype(np.int64)),
        mean=(_MEAN,),
        std=(_STD,),
    )
