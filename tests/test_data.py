"""Data sets, IDX files (written here, in the true format) and augmentation."""

from __future__ import annotations

import gzip
import hashlib
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from math import cos, radians, sin
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate

from harness.data.augment import Affine, Compose, CropFlip, Cutout, draws, with_cutout
from harness.data.datasets import ImageData, ImageSplit, load
from harness.data.digits import enlarge, stratified_split
from harness.data.idx import read_idx
from harness.data.sampler import GlobalBatchSampler
from harness.data_sizes import train_size
from harness.dataset_table import DATASETS, OPTIONAL
from harness.errors import DataError
from harness.models import build_model
from harness.schema import Data

I64 = npt.NDArray[np.int64]


@cache
def digits_once() -> ImageData:
    return load(Data(dataset="digits"))


@pytest.fixture
def digits() -> ImageData:
    return digits_once()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for each other on busy cores cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- digits -------------------------------------------------------------------------------------


def test_digits_are_split_without_overlap(digits: ImageData) -> None:
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    both = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 1797  # so no image, nor a copy of one, is in both


def test_digits_are_stratified(digits: ImageData) -> None:
    train, test = (torch.bincount(split.labels) for split in (digits.train, digits.test))
    assert len(test) == digits.num_classes == 10
    share = (train + test) * 360 / 1797
    assert ((test - share).abs() < 1).all()


def test_digits_stay_what_they_are(digits: ImageData) -> None:
    """Results of different machines and versions can be compared only on the same bytes."""
    sha = hashlib.sha256()
    for split in (digits.train, digits.test):
        sha.update(split.images.numpy().tobytes())
        sha.update(split.labels.numpy().astype("<i8").tobytes())
    assert sha.hexdigest()[:16] == "3a74af96a0fee3dc"


def test_enlarging_is_bilinear() -> None:
    small = np.random.default_rng(0).integers(0, 17, (20, 8, 8))
    reference = interpolate(
        torch.from_numpy(small * 255 / 16)[:, None], size=(28, 28), mode="bilinear"
    )
    off = reference[:, 0].numpy() - enlarge(small).astype(np.float64)
    assert np.abs(off).max() <= 0.5 + 1e-9
    assert (enlarge(np.full((1, 8, 8), 16)) == 255).all()


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    part=st.floats(0, 1),
    key=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_stratified_split_is_a_split(labels: list[int], part: float, key: int) -> None:
    classes = np.array(labels)
    test_size = round(part * len(labels))
    train, test = stratified_split(classes, test_size, key)
    assert len(test) == test_size
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    share = np.bincount(classes) * test_size / len(labels)
    assert (np.abs(np.bincount(classes[test], minlength=len(share)) - share) < 1).all()


def test_the_split_depends_on_its_key() -> None:
    labels = np.arange(100) % 10
    assert not np.array_equal(
        stratified_split(labels, 20, 0)[1], stratified_split(labels, 20, 1)[1]
    )


# ---- splits and batches -------------------------------------------------------------------------


def test_a_batch_is_normalised(digits: ImageData) -> None:
    images, labels = digits.train.batch(np.arange(1437))
    assert (images.dtype, images.shape) == (torch.float32, (1437, 1, 28, 28))
    assert abs(float(images.mean())) < 1e-4
    assert abs(float(images.std()) - 1) < 1e-3
    assert torch.equal(labels, digits.train.labels)


def test_a_batch_normalises_each_channel() -> None:
    raw = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    split = ImageSplit(raw, torch.arange(5), mean, std)
    images, labels = split.batch(np.array([4, 0, 4]))
    for channel in range(3):
        expected = (raw[[4, 0, 4], channel] / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(images[:, channel], expected)
    assert labels.tolist() == [4, 0, 4]


def test_batches_do_not_alter_the_split(digits: ImageData) -> None:
    before = digits.train.images.clone()
    samples = np.arange(8)
    digits.train.batch(samples, samples, 0, digits.train.augmentation)[0].zero_()
    assert torch.equal(before, digits.train.images)


def test_a_batch_refuses_what_it_has_not(digits: ImageData) -> None:
    with pytest.raises(IndexError):
        digits.train.batch(np.array([1437]))
    with pytest.raises(ValueError, match="epoch"):
        digits.train.batch(np.array([0]), augment=digits.train.augmentation)


@pytest.mark.parametrize(
    ("images", "labels", "std", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), (1.0,), "float32"),
        (
            torch.zeros(2, 3, 3, dtype=torch.uint8),
            torch.zeros(2, dtype=torch.int64),
            (1.0,),
            "uint8",
        ),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), (1.0,), "int64"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3).long(), (1.0,), r"\(2,\)"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2).long(), (0.0,), "positive"),
        (
            torch.zeros(2, 1, 3, 3, dtype=torch.uint8),
            torch.zeros(2).long(),
            (1.0, 1.0),
            "1 channel",
        ),
    ],
)
def test_a_split_that_does_not_fit_itself(
    images: torch.Tensor, labels: torch.Tensor, std: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSplit(images, labels, (0.0,), std)


# ---- registry and sizes -------------------------------------------------------------------------


def test_the_table_has_the_published_sizes(digits: ImageData) -> None:
    assert train_size(Data(dataset="digits")) == len(digits.train)
    assert train_size(Data(dataset="mnist")) == 60_000
    assert train_size(Data(dataset="cifar100")) == 50_000
    assert train_size(Data(dataset="imagenet")) == 1_281_167
    assert train_size(Data(dataset="synthetic", size=77)) == 77


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_its_loader(name: str) -> None:
    assert callable(import_module(DATASETS[name].module).load)
    assert DATASETS[name].takes <= set(OPTIONAL)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": "cifar"}, r"not known \(did you mean cifar10\?\); valid: digits, "),
        ({"dataset": "mnist", "size": 5}, "data.size = 5 has no meaning .* = mnist; it belongs to"),
        ({"dataset": "digits", "root": "/x"}, "data.root = /x has no meaning"),
        ({"dataset": "digits", "augment": False, "cutout": 3}, "needs data.augment = true"),
    ],
)
def test_keys_that_do_not_fit_the_data_set(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Data(**keys)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("harness.data_sizes", ("torch", "numpy")), ("harness.data.sampler", ("torch",))],
)
def test_planning_imports_stay_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- MNIST from IDX files -----------------------------------------------------------------------


def idx_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def sample_arrays() -> dict[str, npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return {
        "train-images": rng.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        "train-labels": (np.arange(30) % 10).astype(np.uint8),
        "t10k-images": rng.integers(0, 256, (10, 28, 28), dtype=np.uint8),
        "t10k-labels": np.arange(10, dtype=np.uint8),
    }


def write_mnist(folder: Path, joint: str = "-", zipped: bool = False) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for part, array in sample_arrays().items():
        name = f"{part}{joint}idx{array.ndim}-ubyte" + (".gz" if zipped else "")
        paths[part] = folder / name
        data = idx_bytes(array)
        paths[part].write_bytes(gzip.compress(data) if zipped else data)
    return paths


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw"])
def test_mnist_is_found_and_read(tmp_path: Path, folder: str, joint: str, zipped: bool) -> None:
    write_mnist(tmp_path / folder, joint, zipped)
    data, arrays = load(Data(dataset="mnist", root=str(tmp_path))), sample_arrays()
    assert (data.name, data.num_classes, data.shape) == ("mnist", 10, (1, 28, 28))
    for split, part in ((data.train, "train"), (data.test, "t10k")):
        assert np.array_equal(split.images[:, 0].numpy(), arrays[f"{part}-images"])
        assert np.array_equal(split.labels.numpy(), arrays[f"{part}-labels"])
    assert train_size(Data(dataset="mnist", root=str(tmp_path))) == 30


def test_what_a_file_is_counts_more_than_what_it_is_called(tmp_path: Path) -> None:
    """Browsers unpack .gz downloads and keep the name."""
    paths = write_mnist(tmp_path, zipped=True)
    paths["train-images"].write_bytes(gzip.decompress(paths["train-images"].read_bytes()))
    assert len(load(Data(dataset="mnist", root=str(tmp_path))).train) == 30


def test_the_size_needs_only_one_file(tmp_path: Path) -> None:
    paths = write_mnist(tmp_path)
    paths["train-images"].unlink()
    assert train_size(Data(dataset="mnist", root=str(tmp_path))) == 30
    paths["train-labels"].unlink()
    assert train_size(Data(dataset="mnist", root=str(tmp_path))) == 60_000
    assert train_size(Data(dataset="mnist", root=str(tmp_path / "nowhere"))) == 60_000


def test_a_missing_root_says_what_belongs_there(tmp_path: Path) -> None:
    for root, message in ((None, "data.root is not set"), (tmp_path / "no", "not a directory")):
        with pytest.raises(DataError, match=message) as caught:
            load(Data(dataset="mnist", root=None if root is None else str(root)))
        assert "train-images-idx3-ubyte" in str(caught.value)
        assert "LeCun" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)["t10k-labels"].unlink()
    with pytest.raises(DataError, match=r"^t10k-labels-idx1-ubyte not found in"):
        load(Data(dataset="mnist", root=str(tmp_path)))


IMAGES = idx_bytes(sample_arrays()["train-images"])
LABELS = idx_bytes(sample_arrays()["train-labels"])
ZIPPED = gzip.compress(IMAGES, mtime=0)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("part", "data", "message"),
    [
        ("train-images", b"", "empty"),
        ("train-images", IMAGES[:3], "16 bytes of header expected, 3 found"),
        ("train-images", IMAGES[:10], "16 bytes of header expected, 10 found"),
        ("train-images", LABELS, "starts with 0x00000801, but .* 0x00000803"),
        ("train-labels", IMAGES, "starts with 0x00000803, but .* 0x00000801"),
        ("train-images", b"<!DOCTYPE html>", "starts with 0x3c21444f"),
        ("train-images", IMAGES[:16], "promises 23536 bytes, 16 found"),
        ("train-images", IMAGES[:-1], "promises 23536 bytes, 23535 found"),
        ("train-images", IMAGES + b"\0", "trailing bytes"),
        ("train-images", struct.pack(">4I", 0x803, 30, 28, 27) + IMAGES[16:], "of 28 × 27, but 28"),
        ("train-images", struct.pack(">4I", 0x803, 0, 28, 28), "zero samples"),
        ("train-images", idx_bytes(sample_arrays()["t10k-images"]), "10 images, but .* 30 labels"),
        ("train-labels", LABELS[:-1] + b"\x0a", "label 29 is 10, outside 0..9"),
    ],
)
def test_a_file_that_is_not_mnist(
    tmp_path: Path, part: str, data: bytes, message: str, zipped: bool
) -> None:
    path = write_mnist(tmp_path)[part]
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(DataError, match=message) as caught:
        load(Data(dataset="mnist", root=str(tmp_path)))
    assert str(path) in str(caught.value)
    assert "fresh copy" in str(caught.value) or "same copy" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        ZIPPED[:-3],
        ZIPPED[: len(ZIPPED) // 2],
        ZIPPED[:5],
        ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:],  # checksum of the contents
        ZIPPED[:-4] + b"\0\0\0\0",  # length of the contents
        ZIPPED[:100] + bytes(300) + ZIPPED[400:],
        ZIPPED + b"more",
    ],
)
def test_corrupt_gzip(tmp_path: Path, data: bytes) -> None:
    path = write_mnist(tmp_path, zipped=True)["train-images"]
    path.write_bytes(data)
    with pytest.raises(DataError, match="corrupt gzip data") as caught:
        load(Data(dataset="mnist", root=str(tmp_path)))
    assert str(path) in str(caught.value)


@given(
    zipped=st.booleans(),
    at=st.integers(0, 2**20),
    junk=st.binary(min_size=0, max_size=8),
    keep=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=300)
def test_damage_is_a_data_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, zipped: bool, at: int, junk: bytes, keep: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    small = idx_bytes(np.zeros((3, 28, 28), dtype=np.uint8))
    whole = gzip.compress(small) if zipped else small
    at, keep = at % len(whole), keep % len(whole)
    path.write_bytes(whole[:at] + junk + whole[at + keep :])
    try:
        shape = read_idx(path, (28, 28)).shape
    except DataError:
        return
    assert shape[1:] == (28, 28)


@pytest.mark.parametrize(
    ("count", "zeros", "message"),
    [
        (2**31, 28 * 28, "truncated"),  # the header claims 1.7 TB
        (2, 50_000_000, "trailing"),  # 50 MB, packed into 50 KB
        (200_000, 28 * 28, "truncated"),  # claims 157 MB, which the packed file cannot hold
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_memory_follows_the_file_and_not_its_claims(
    tmp_path: Path, count: int, zeros: int, message: str, zipped: bool
) -> None:
    path = tmp_path / "claims"
    header = struct.pack(">4I", 0x803, count, 28, 28)
    with gzip.open(path, "wb") if zipped else path.open("wb") as file:
        file.write(header)
        for done in range(0, zeros, 10**6):
            file.write(bytes(min(10**6, zeros - done)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            read_idx(path, (28, 28))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


def test_a_directory_in_place_of_a_file_is_missing(tmp_path: Path) -> None:
    path = write_mnist(tmp_path)["train-labels"]
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte not found"):
        load(Data(dataset="mnist", root=str(tmp_path)))
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(path, ())


# ---- augmentation -------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@given(
    cuts=st.lists(st.integers(1, 63), max_size=6),
    order=st.permutations(range(64)),
    seed=st.integers(0, 2**32),
)
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_pixels_do_not_depend_on_the_batch(cuts: list[int], order: list[int], seed: int) -> None:
    data = digits_once()
    samples = np.random.default_rng(seed).integers(0, 1437, 64)
    epochs = np.random.default_rng(seed + 1).integers(0, 40, 64)
    whole, _ = data.train.batch(samples, epochs, seed, data.train.augmentation)
    bounds = sorted({0, 64, *cuts})
    for low, high in pairwise(bounds):
        some = np.array(order[low:high])
        part, _ = data.train.batch(samples[some], epochs[some], seed, data.train.augmentation)
        assert torch.equal(part, whole[torch.from_numpy(some)])


def test_pixels_do_not_depend_on_the_number_of_threads(digits: ImageData) -> None:
    samples, threads = np.arange(100), torch.get_num_threads()
    batches = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            batches.append(digits.train.batch(samples, samples, 0, digits.train.augmentation)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


def test_pixels_depend_on_seed_epoch_and_sample(digits: ImageData) -> None:
    same = np.full(4, 11)
    split = ImageSplit(
        digits.train.images[:1].repeat(20, 1, 1, 1), digits.train.labels[:20], (0,), (1,)
    )

    def one(sample: int, epoch: int, seed: int) -> torch.Tensor:
        return split.batch(np.array([sample]), np.array([epoch]), seed, Affine())[0]

    base = one(11, 3, 5)
    assert torch.equal(base, one(11, 3, 5))
    for other in (one(12, 3, 5), one(11, 4, 5), one(11, 3, 6)):
        assert not torch.equal(base, other)
    images, _ = split.batch(same, np.arange(4), 0, Affine())
    assert len(torch.unique(images, dim=0)) == 4


def test_no_amplitude_no_change() -> None:
    images = torch.rand(3, 2, 9, 14) * 255
    samples = np.arange(3)
    same = Affine(0, 0, 0, 0)(images.clone(), 0, samples, samples)
    torch.testing.assert_close(same, images, atol=1e-2, rtol=0)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 32)])
def test_affine_agrees_with_torch(shape: tuple[int, int, int]) -> None:
    """The same map through trigonometry and torch's affine_grid, from the same random numbers."""
    images = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0)) * 255
    epochs, samples = np.arange(6), np.arange(6) * 7
    affine = Affine(degrees=12, scale=0.2, shear=0.15, translate=0.1)
    _, height, width = shape
    maps = []
    for turn, size, slant, right, down in draws(9, epochs, samples, 5, stream=1).T:
        # The angle's half tangent is what is drawn evenly, not the angle.
        angle = 2 * np.arctan(turn * np.tan(radians(12) / 2))
        rotate = np.array([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]])
        pixels = rotate @ np.array([[1, slant * 0.15], [0, 1]]) / (1 + size * 0.2)
        half = np.diag([width / 2, height / 2])
        shift = [[2 * right * 0.1], [2 * down * 0.1]]
        maps.append(np.hstack([np.linalg.inv(half) @ pixels @ half, shift]))
    theta = torch.from_numpy(np.stack(maps)).float()
    grid = affine_grid(theta, [6, *shape], align_corners=False)
    expected = grid_sample(images, grid, align_corners=False)
    found = affine(images.clone(), 9, epochs, samples)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_translation_stays_within_its_amplitude() -> None:
    samples = np.arange(200)
    plain = torch.zeros(200, 1, 28, 28)
    plain[:, :, 11:16, 13:17] = 255
    moved = Affine(0, 0, 0, 0.1)(plain.clone(), 0, samples, samples)
    shift = (centroid(moved) - centroid(plain)).abs()
    assert float(shift.max()) < 2.8 + 1e-3  # a tenth of 28 pixels
    assert float(shift.max(dim=0).values.min()) > 2.5  # and both axes use it


def centroid(images: torch.Tensor) -> torch.Tensor:
    """(x, y) in pixels, shape (m, 2)."""
    weight = images.sum(dim=(1, 2, 3))
    x = (images.sum(dim=(1, 2)) * torch.arange(28)).sum(dim=1) / weight
    y = (images.sum(dim=(1, 3)) * torch.arange(28)).sum(dim=1) / weight
    return torch.stack([x, y], dim=1)


def test_draws_are_even_and_apart() -> None:
    epochs, samples = np.divmod(np.arange(20_000), 100)
    first = draws(0, epochs, samples, 16, stream=1)
    assert first.shape == (16, 20_000)
    assert -1 <= first.min() < -0.999
    assert 0.999 < first.max() < 1
    others = [draws(1, epochs, samples, 1, stream=1), draws(0, epochs, samples, 1, stream=2)]
    correlation = np.corrcoef(np.vstack([first, *others])) - np.eye(18)
    assert np.abs(correlation).max() < 5 / 20_000**0.5
    assert np.abs(first.mean(axis=1)).max() < 5 / (3 * 20_000) ** 0.5
    with pytest.raises(ValueError, match=r"1\.\.16"):
        draws(0, epochs, samples, 17, stream=1)


# ---- crop, flip, cutout -------------------------------------------------------------------------

AUGMENTATIONS = [
    CropFlip(),
    CropFlip(2, flip=False),
    Cutout(5, (1.0, 2.0, 3.0)),
    Compose((CropFlip(3), Cutout(4, (9.0, 9.0, 9.0)))),
    with_cutout(Affine(), 6, (0.1, 0.5, 0.9)),
]


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 16), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("augment", AUGMENTATIONS, ids=str)
@given(order=st.permutations(range(24)), cut=st.integers(1, 23), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=15)
def test_augmented_pixels_belong_to_the_sample_alone(
    augment: Any, order: list[int], cut: int, seed: int
) -> None:
    images, samples = pictures(24), np.arange(24) * 3
    epochs = np.random.default_rng(seed).integers(0, 50, 24)
    whole = augment(images.clone(), seed, epochs, samples)
    for some in (np.array(order[:cut]), np.array(order[cut:])):
        part = augment(images[torch.from_numpy(some)], seed, epochs[some], samples[some])
        assert torch.equal(part, whole[torch.from_numpy(some)])


def test_crops_are_what_slicing_gives() -> None:
    """Against plain slices of an image with a border, from the same random numbers."""
    images, count, border = pictures(200), 200, 4
    epochs, samples = np.arange(count) % 7, np.arange(count)
    found = CropFlip(border)(images.clone(), 11, epochs, samples)
    bordered = torch.nn.functional.pad(images, (border,) * 4)
    random = (draws(11, epochs, samples, 3, stream=2) + 1) / 2
    seen = set()
    for i in range(count):
        top, left = (int(value * (2 * border + 1)) for value in random[:2, i])
        flips = random[2, i] < 0.5
        expected = bordered[i, :, top : top + 12, left : left + 16]
        assert torch.equal(found[i], expected.flip(-1) if flips else expected)
        seen.add((top, left, bool(flips)))
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert 60 < int((random[2] < 0.5).sum()) < 140


def test_without_a_border_or_flips_nothing_changes() -> None:
    images, samples = pictures(5), np.arange(5)
    assert torch.equal(CropFlip(0, flip=False)(images, 0, samples, samples), images)


def test_cutout_wipes_one_square_and_nothing_else() -> None:
    images = torch.full((400, 3, 12, 16), 200, dtype=torch.uint8)
    samples = np.arange(400)
    found = Cutout(5, (1.4, 2.0, 3.0))(images, 0, samples, samples)
    wiped = found[:, 0] == 1
    assert torch.equal(wiped, found[:, 1] == 2)
    assert torch.equal(found[:, 2] != 3, found[:, 0] == 200)
    rows, columns = wiped.any(2).sum(1), wiped.any(1).sum(1)
    assert torch.equal(rows * columns, wiped.sum((1, 2)))  # a rectangle
    assert int(rows.max()) == int(columns.max()) == 5
    assert int(rows.min()) == int(columns.min()) == 3  # the centre is always inside
    assert 0.4 < float(((rows == 5) & (columns == 5)).float().mean()) < 0.6  # 8/12 × 12/16


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_lenet5_learns_augmented_digits(digits: ImageData) -> None:
    accuracies = [accuracy_after_training(digits, seed) for seed in range(3)]
    assert sorted(accuracies)[1] > 0.98


def accuracy_after_training(data: ImageData, seed: int) -> float:
    model = build_model("lenet5", data.num_classes, data.shape, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sampler = GlobalBatchSampler(len(data.train), seed, 64)
    for micro in sampler.micro_batches(0, 30 * len(data.train)):
        images, labels = data.train.batch(
            micro.samples, micro.epochs, seed, data.train.augmentation
        )
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    images, labels = data.test.batch(np.arange(len(data.test)))
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())
