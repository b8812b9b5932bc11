"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the official python batches; nothing is downloaded.

The batches are pickles, and are read as data that may be hostile: see `harness.data.safe_pickle`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from harness.data.augment import CropFlip, with_cutout
from harness.data.datasets import ImageData, ImageSplit
from harness.data.safe_pickle import Bytes, Span, copy_span, read_pickle
from harness.data_sizes import CIFAR_FOLDERS, CIFAR_TEST, CIFAR_TRAIN, FRESH_COPY, find_parts
from harness.dataset_table import DATASETS
from harness.errors import DataError
from harness.schema import Data

SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Facts:
    classes: int
    key: str
    """Of the labels, in a batch."""
    mean: tuple[float, float, float]
    """Of the 50,000 training images in 0..1, as commonly published; so is std."""
    std: tuple[float, float, float]


_FACTS = {
    "cifar10": _Facts(10, "labels", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Facts(100, "fine_labels", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load(data: Data) -> ImageData:
    """Read the batches from data.root or the folder of their archive in it; raises DataError.

    Each training image is cropped with a border of 4 and flipped (He et al. 2016, section 4.2). The
    pixels go from the files straight to where they stay.
    """
    name, facts = data.dataset, _FACTS[data.dataset]
    files = _find(Path(data.root) if data.root else None, name)
    train = _split([files[part] for part in CIFAR_TRAIN[name]], facts)
    augmentation = with_cutout(CropFlip(4), data.cutout, facts.mean)
    return ImageData(
        name=name,
        train=replace(train, augmentation=augmentation),
        test=_split([files[CIFAR_TEST[name]]], facts),
        num_classes=facts.classes,
        shape=SHAPE,
    )


def _find(root: Path | None, name: str) -> dict[str, Path]:
    dataset = DATASETS[name]
    needs = f"{name} needs {dataset.files}. Get it: {dataset.source}"
    if root is None:
        raise DataError(f"data.root is not set; {needs}")
    if not os.path.isdir(root):  # Path.is_dir raises where access is denied
        raise DataError(f"data.root {root} is not a directory; {needs}")
    found, missing = find_parts(root, name)
    if missing:
        where = f"{root} or {root / CIFAR_FOLDERS[name]}"
        raise DataError(f"{', '.join(missing)} not found in {where}; {needs}")
    return found


@dataclass(frozen=True)
class _Batch:
    """One file, read but for its pixels."""

    path: Path
    labels: list[int]
    pixels: Span | bytes
    """Of as many rows as there are labels."""
    column_major: bool


def _split(paths: list[Path], facts: _Facts) -> ImageSplit:
    batches = [_read(path, facts) for path in paths]
    labels = [label for batch in batches for label in batch.labels]
    images = torch.empty(len(labels), *SHAPE, dtype=torch.uint8)
    start = 0
    for batch in batches:
        _fill(batch, images[start : start + len(batch.labels)])
        start += len(batch.labels)
    return ImageSplit(images, torch.tensor(labels), facts.mean, facts.std)


def _read(path: Path, facts: _Facts) -> _Batch:
    """What a batch holds, held against what it should be; raises DataError."""
    try:
        with path.open("rb") as stream:
            found = read_pickle(stream, path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a batch of CIFAR: its pickle holds no dictionary")
    batch = {key.decode("latin-1") if isinstance(key, bytes) else key: found[key] for key in found}
    for key in ("data", facts.key):
        if key not in batch:
            raise DataError(
                f"{path}: has no {key!r}, but {', '.join(map(repr, list(batch)[:8])) or 'nothing'};"
                " CIFAR-10's batches have data and labels, CIFAR-100's data and fine_labels"
            )
    pixels, labels = batch["data"], _labels(path, facts, batch[facts.key])
    if not isinstance(pixels, Bytes) or pixels.shape is None:
        raise DataError(f"{path}: its data is not an array of unsigned bytes; {FRESH_COPY}")
    if pixels.shape != (len(labels), _PIXELS):
        raise DataError(
            f"{path}: its data has the shape {pixels.shape!s:.60}, but {len(labels)} labels ask "
            f"for {(len(labels), _PIXELS)}; {FRESH_COPY}"
        )
    held = len(pixels.data) if isinstance(pixels.data, bytes) else pixels.data.length
    if held < len(labels) * _PIXELS:  # before any memory is taken
        raise DataError(
            f"{path}: an array of {len(labels) * _PIXELS} bytes expected, {held} found; "
            f"{FRESH_COPY}"
        )
    return _Batch(path, labels, pixels.data, pixels.column_major)


def _labels(path: Path, facts: _Facts, found: object) -> list[int]:
    if not isinstance(found, list) or not found:
        raise DataError(f"{path}: its {facts.key} is not a list of labels; {FRESH_COPY}")
    for at, label in enumerate(found):
        if type(label) is not int or not 0 <= label < facts.classes:
            shown = label if type(label) is int else "not a number"
            raise DataError(
                f"{path}: label {at} is {shown}, outside 0..{facts.classes - 1}; {FRESH_COPY}"
            )
    return found


def _fill(batch: _Batch, rows: torch.Tensor) -> None:
    """Read the batch's pixels into uint8 rows (n, 3, 32, 32)."""
    into = rows.numpy().reshape(-1)
    target = np.empty_like(into) if batch.column_major else into
    try:
        with batch.path.open("rb") as stream:
            copy_span(stream, batch.path, batch.pixels, target.data)
    except OSError as error:
        raise _unreadable(batch.path, error) from error
    if batch.column_major:
        into.reshape(-1, _PIXELS)[:] = target.reshape(_PIXELS, -1).T


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error})")
