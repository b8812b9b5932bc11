"""Fashion-MNIST beside MNIST: the same files, told apart by their folders."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.data.augment import Affine, Compose, CropFlip, Cutout
from harness.data.datasets import ImageData, ImageSplit, load
from harness.data_sizes import find_idx, train_size
from harness.errors import DataError
from harness.schema import Data

PARTS = ("train", "t10k")


def write_idx(folder: Path, rows: int) -> None:
    """A set of ``rows`` training images, so that sets can be told apart."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in zip(PARTS, (rows, 5), strict=True):
        images = np.random.default_rng(rows).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            path = folder / f"{part}-{kind}-idx{array.ndim}-ubyte"
            path.write_bytes(header + array.tobytes())


def data_of(name: str, root: Path, **more: Any) -> ImageData:
    return load(Data(dataset=name, root=str(root), **more))


def train_of(name: str, root: Path, **more: Any) -> ImageSplit:
    split = data_of(name, root, **more).train
    assert isinstance(split, ImageSplit)
    return split


@pytest.mark.parametrize("folder", [".", "raw", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_and_read(tmp_path: Path, folder: str) -> None:
    write_idx(tmp_path / folder, 20)
    data = data_of("fashion-mnist", tmp_path)
    assert (data.name, data.num_classes, data.shape) == ("fashion-mnist", 10, (1, 28, 28))
    assert (len(data.train), len(data.test)) == (20, 5)
    assert train_size(Data(dataset="fashion-mnist", root=str(tmp_path))) == 20


def test_each_set_reads_its_own_folder_of_a_common_root(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw", 20)
    write_idx(tmp_path / "FashionMNIST" / "raw", 30)
    for name, rows in (("mnist", 20), ("fashion-mnist", 30)):
        assert len(train_of(name, tmp_path)) == rows
        assert train_size(Data(dataset=name, root=str(tmp_path))) == rows


@pytest.mark.parametrize("below", ["", "raw"])
@pytest.mark.parametrize(
    ("name", "own", "other"),
    [("mnist", "MNIST", "FashionMNIST"), ("fashion-mnist", "FashionMNIST", "MNIST")],
)
def test_a_folder_with_the_other_name_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, own: str, other: str, below: str
) -> None:
    for root in (own, other):
        write_idx(tmp_path / root / "raw", 20)
    assert len(train_of(name, tmp_path / own / below)) == 20
    with pytest.raises(DataError, match=f"a folder named {other} is not"):
        data_of(name, tmp_path / other / below)
    assert train_size(Data(dataset=name, root=str(tmp_path / other / below))) == 60_000
    monkeypatch.chdir(tmp_path / other / "raw")
    assert find_idx(Path(), "train-images", 3, name) is None
    monkeypatch.chdir(tmp_path / own / "raw")
    assert find_idx(Path(), "train-images", 3, name) is not None


def test_a_parent_with_the_other_name_does_not_matter(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "FashionMNIST" / "raw", 30)
    assert len(train_of("fashion-mnist", tmp_path / "MNIST" / "FashionMNIST")) == 30
    assert len(train_of("fashion-mnist", tmp_path / "MNIST")) == 30


@pytest.mark.parametrize(
    ("name", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)]
)
def test_normalisation_is_as_published(tmp_path: Path, name: str, mean: float, std: float) -> None:
    write_idx(tmp_path, 20)
    split = train_of(name, tmp_path)
    images, _ = split.batch(np.array([7]))
    torch.testing.assert_close(images, (split.images[7:8] / 255 - mean) / std)


def test_clothes_are_mirrored_and_digits_are_not(tmp_path: Path) -> None:
    write_idx(tmp_path, 20)
    assert train_of("mnist", tmp_path).augmentation == Affine()
    assert train_of("fashion-mnist", tmp_path).augmentation == CropFlip(2)
    wiped = train_of("fashion-mnist", tmp_path, cutout=8).augmentation
    assert wiped == Compose((CropFlip(2), Cutout(8, (255 * 0.2860,))))


def test_what_is_missing_is_said_of_the_right_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"FashionMNIST/raw; fashion-mnist needs .*zalando"):
        data_of("fashion-mnist", tmp_path)
    with pytest.raises(DataError, match=r"MNIST/raw; mnist needs .* LeCun"):
        data_of("mnist", tmp_path)
