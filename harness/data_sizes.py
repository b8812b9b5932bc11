"""How many training samples a data set has, for planning: imports neither torch nor numpy.

Also home of what the plan and the loaders must agree on: where IDX files lie and how they begin.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from harness.dataset_table import DEFAULT_SIZES, dataset_of
from harness.errors import DataError
from harness.schema import Data

ByteStream = BufferedReader | gzip.GzipFile
FRESH_COPY = "replace it with a fresh copy"
IDX_PARTS = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}
"""What MNIST's file names begin with, and each one's number of dimensions."""
IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
"""The folders that torchvision makes."""
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
CIFAR_TRAIN = {
    "cifar10": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "cifar100": ("train",),
}
CIFAR_TEST = {"cifar10": "test_batch", "cifar100": "test"}
_MAGIC = 0x0800  # third byte 0x08: unsigned bytes; the fourth is the number of dimensions


def check_root(data: Data) -> None:
    """Raise DataError if the data set needs files and ``data.root`` does not say where."""
    dataset = dataset_of(data.dataset)
    if dataset.files and data.root is None:
        source = f". From: {dataset.source}" if dataset.source else ""
        raise DataError(
            f"data.root is not set; for data.dataset = {data.dataset} it is the directory ROOT "
            f"with {dataset.files}{source}"
        )


def train_size(data: Data) -> int:
    """Training samples of a data set: what its files say if they are there, else what is published.

    Of MNIST the first bytes of one file are read; a folder's images are counted. Raises DataError
    for files that are not what they should be, or if there is no way to tell.
    """
    if data.sizes is not None:
        return data.sizes.train
    dataset = dataset_of(data.dataset)
    if dataset.kind == "generated":
        return data.size or DEFAULT_SIZES[data.dataset]
    if data.root is not None and data.dataset in ("mnist", "fashion-mnist"):
        for part, dimensions in (("train-images", 3), ("train-labels", 1)):
            path = find_idx(Path(data.root), part, dimensions, data.dataset)
            if path is not None:
                with open_idx(path) as stream:
                    return read_header(stream, path, dimensions)[0]
    if dataset.train_size is not None:
        return dataset.train_size
    # Imported only here: what they use takes a plan of another data set too long to import.
    if data.dataset == "webdataset":
        from harness.shard_listing import count_samples

        return data.size if data.size is not None else count_samples(data)
    from harness.data_listing import count_images

    return count_images(data)


def find_idx(root: Path, part: str, dimensions: int, dataset: str = "mnist") -> Path | None:
    """The file of ``part`` (such as ``train-images``) in root, root/raw or root/MNIST/raw.

    fashion-mnist has the same file names, and FashionMNIST for MNIST; neither is read from a folder
    that has the other's name.
    """
    own = IDX_FOLDERS[dataset]
    for folder in (root, root / "raw", root / own / "raw"):
        named = Path(os.path.abspath(folder))
        name = named.parent.name if named.name == "raw" else named.name
        if name != own and name in IDX_FOLDERS.values():
            continue
        for joint in "-.":
            for suffix in ("", ".gz"):
                path = folder / f"{part}{joint}idx{dimensions}-ubyte{suffix}"
                if os.path.isfile(path):  # Path.is_file raises where a folder may not be searched
                    return path
    return None


def find_cifar(root: Path, dataset: str, name: str) -> Path | None:
    """The file ``name`` of cifar10 or cifar100 in root or in the folder that its archive makes."""
    for folder in (root, root / CIFAR_FOLDERS[dataset]):
        if os.path.isfile(folder / name):
            return folder / name
    return None


def find_parts(root: Path, dataset: str) -> tuple[dict[str, Path], list[str]]:
    """Of a data set that has a fixed list of files: where each part lies, and the names of those
    that are missing."""
    if dataset in IDX_FOLDERS:
        names = {part: f"{part}-idx{dims}-ubyte" for part, dims in IDX_PARTS.items()}
        found = {part: find_idx(root, part, dims, dataset) for part, dims in IDX_PARTS.items()}
    else:
        parts = (*CIFAR_TRAIN[dataset], CIFAR_TEST[dataset])
        names = {part: part for part in parts}
        found = {part: find_cifar(root, dataset, part) for part in parts}
    missing = [names[part] for part, path in found.items() if path is None]
    return {part: path for part, path in found.items() if path is not None}, missing


@contextmanager
def open_idx(path: Path) -> Iterator[ByteStream]:
    """The file's bytes, unpacked if they are gzip, whatever the file is called.

    Raises DataError, also for what goes wrong while the caller reads.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield gzip.GzipFile(fileobj=raw) if zipped else raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: corrupt gzip data ({error}); {FRESH_COPY}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_header(stream: ByteStream, path: Path, dimensions: int) -> tuple[int, ...]:
    """Sizes of the ``dimensions`` axes of a file of unsigned bytes, samples first, all positive.

    The format is the one described with MNIST: a big-endian magic number, then one 32-bit size per
    axis. Raises DataError if the file is empty, of another kind, cut off, or has no samples.
    """
    length = 4 + 4 * dimensions
    head = stream.read(length)
    if not head:
        raise DataError(f"{path}: the file is empty; {FRESH_COPY}")
    magic = (_MAGIC | dimensions).to_bytes(4, "big")
    if not magic.startswith(head[:4]):
        raise DataError(
            f"{path}: starts with 0x{head[:4].hex()}, but an IDX file of unsigned bytes in "
            f"{dimensions} dimension(s) starts with 0x{magic.hex()}; {FRESH_COPY}"
        )
    if len(head) < length:
        raise DataError(
            f"{path}: truncated: {length} bytes of header expected, {len(head)} found; {FRESH_COPY}"
        )
    sizes = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, length, 4))
    if sizes[0] == 0:
        raise DataError(f"{path}: holds zero samples; {FRESH_COPY}")
    return sizes
