"""MNIST and Fashion-MNIST from IDX files on disk; nothing is downloaded.

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) was made to take the place of MNIST (LeCun, Bottou,
Bengio, Haffner 1998): the files have the same names and the same format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from harness.data.augment import Affine, Augmentation, CropFlip, with_cutout
from harness.data.datasets import ImageData, ImageSplit
from harness.data.idx import read_idx
from harness.data_sizes import IDX_FOLDERS, IDX_PARTS, find_parts
from harness.errors import DataError
from harness.schema import Data


@dataclass(frozen=True)
class _Facts:
    title: str
    source: str
    mean: float
    """Of the 60,000 training images in 0..1, as commonly published; so is std."""
    std: float
    augmentation: Augmentation


_FACTS = {
    "mnist": _Facts(
        "MNIST",
        "MNIST is the handwritten-digit database of LeCun, Cortes and Burges; torchvision's MNIST "
        "data set class, told to download, writes the same files to ROOT/MNIST/raw",
        0.1307,
        0.3081,
        Affine(),
    ),
    "fashion-mnist": _Facts(
        "Fashion-MNIST",
        "Fashion-MNIST is on https://github.com/zalandoresearch/fashion-mnist; torchvision's "
        "FashionMNIST data set class, told to download, writes the same files to "
        "ROOT/FashionMNIST/raw",
        0.2860,
        0.3530,
        CropFlip(2),  # clothes, unlike digits, stay what they are in a mirror
    ),
}


def load(data: Data) -> ImageData:
    """Read the four files from root, root/raw or root/MNIST/raw (or root/FashionMNIST/raw); raises
    DataError."""
    facts = _FACTS[data.dataset]
    files = _find(Path(data.root) if data.root else None, data.dataset)
    train = _split(files["train-images"], files["train-labels"], facts)
    augmentation = with_cutout(facts.augmentation, data.cutout, train.mean)
    return ImageData(
        name=data.dataset,
        train=replace(train, augmentation=augmentation),
        test=_split(files["t10k-images"], files["t10k-labels"], facts),
        num_classes=10,
        shape=(1, 28, 28),
    )


def _find(root: Path | None, name: str) -> dict[str, Path]:
    wanted = ", ".join(f"{part}-idx{dims}-ubyte" for part, dims in IDX_PARTS.items())
    needs = f"{name} needs {wanted} (each may end in .gz). {_FACTS[name].source}"
    if root is None:
        raise DataError(f"data.root is not set; {needs}")
    if not os.path.isdir(root):  # Path.is_dir raises where access is denied
        raise DataError(f"data.root {root} is not a directory; {needs}")
    found, missing = find_parts(root, name)
    if missing:
        where = f"{root}, {root / 'raw'} or {root / IDX_FOLDERS[name] / 'raw'}"
        for other, folder in IDX_FOLDERS.items():
            if other != name and find_parts(root, other)[0]:
                where += f" (a folder named {folder} is not read as {name})"
        raise DataError(f"{', '.join(missing)} not found in {where}; {needs}")
    return found


def _split(image_file: Path, label_file: Path, facts: _Facts) -> ImageSplit:
    images, labels = read_idx(image_file, (28, 28)), read_idx(label_file, ())
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} holds {len(images)} images, but {label_file} holds {len(labels)} "
            f"labels; take both files from the same copy of {facts.title}"
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
        mean=(facts.mean,),
        std=(facts.std,),
    )
