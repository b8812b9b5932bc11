"""The image files of ROOT/train/CLASS/…: found fast, in an order that no machine changes.

Imports neither torch nor numpy, as planning counts images too.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from harness.dataset_table import DATASETS
from harness.errors import DataError
from harness.schema import Data

_SUFFIXES = frozenset({b"jpg", b"jpeg", b"png", b"webp", b"bmp", b"ppm"})
_THREADS = 8  # a network's file system answers several at once
_Above = frozenset[tuple[int, int]]  # device and inode of each folder that one lies in


def data_root(data: Data) -> bytes:
    """data.root as an absolute path; raises DataError if it is not set or not a directory."""
    if data.root is None:
        raise DataError(f"data.root is not set; {needs(data)}")
    if not os.path.isdir(data.root):  # Path.is_dir raises where access is denied
        raise DataError(f"data.root {data.root} is not a directory; {needs(data)}")
    return os.fsencode(os.path.abspath(data.root))


def needs(data: Data) -> str:
    """What a data set expects in data.root and how to get it."""
    dataset = DATASETS[data.dataset]
    return f"{data.dataset} needs {dataset.files}. {dataset.source}"


def split_folder(data: Data, train: bool) -> bytes:
    """ROOT/train or ROOT/val; ``folder`` takes ROOT/test too. Raises DataError if none is there."""
    root = data_root(data)
    names = [b"train"] if train else [b"val", b"test"] if data.dataset == "folder" else [b"val"]
    for name in names:
        folder = os.path.join(root, name)
        if os.path.isdir(folder):
            return folder
    wanted = " or ".join(name.decode() for name in names)
    raise DataError(f"{shown(root)} has no folder {wanted}; {needs(data)}")


def class_folders(folder: bytes) -> list[bytes]:
    """Names of the folders in a split's folder, sorted by their bytes; hidden ones do not count.

    Raises DataError if there is none.
    """
    with _scan(folder) as entries:
        found = [one.name for one in entries if not one.name.startswith(b".") and _is_folder(one)]
    if not found:
        raise DataError(f"{shown(folder)} holds no folders; one for each class is needed")
    return sorted(found)


def images_by_class(folder: bytes, classes: list[bytes]) -> Iterator[list[bytes]]:
    """For each class the paths of its images, relative to its folder, sorted by their bytes.

    Folders in it are searched too. A file counts by its suffix, in any case; hidden ones do not.
    Raises DataError for a folder that cannot be read, holds no images, or contains itself.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        folders = [os.path.join(folder, name) for name in classes]
        for path, found in zip(folders, threads.map(_images, folders), strict=True):
            if not found:
                raise DataError(
                    f"{shown(path)} is a class without images ({_suffixes()}); add some, or remove "
                    "the folder"
                )
            found.sort()
            yield found


def count_images(data: Data) -> int:
    """Number of training images; raises DataError as what lists them does."""
    folder = split_folder(data, train=True)
    return sum(len(found) for found in images_by_class(folder, class_folders(folder)))


def shown(path: bytes) -> str:
    """A path for a message."""
    return os.fsdecode(path).encode(errors="backslashreplace").decode()


def _suffixes() -> str:
    return ", ".join(sorted(f".{suffix.decode()}" for suffix in _SUFFIXES))


def _images(folder: bytes) -> list[bytes]:
    """Paths of the images in a folder and in those in it, relative to it."""
    found: list[bytes] = []
    waiting: list[tuple[bytes, _Above]] = [(b"", frozenset())]
    while waiting:
        inside, above = waiting.pop()
        place = os.path.join(folder, inside) if inside else folder
        with _scan(place) as entries:
            status = os.stat(place)
            here = above | {(status.st_dev, status.st_ino)}
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                _, dot, suffix = name.rpartition(b".")
                if dot and suffix.lower() in _SUFFIXES and _is_file(entry):
                    found.append(inside + name)
                elif _is_folder(entry):
                    status = entry.stat()
                    if (status.st_dev, status.st_ino) in here:
                        path = shown(entry.path)
                        raise DataError(f"{path} is a link to a folder that it lies in")
                    waiting.append((inside + name + b"/", here))
    return found


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    """A link that leads nowhere counts: its image is missing, and decoding will say so."""
    if entry.is_file(follow_symlinks=False):
        return True
    return entry.is_symlink() and (not os.path.exists(entry.path) or entry.is_file())


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """A link to itself is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


class _scan:  # noqa: N801 - used as a function
    """os.scandir that raises DataError, also for what goes wrong while it is read."""

    def __init__(self, folder: bytes) -> None:
        self._folder = folder

    def __enter__(self) -> Iterator[os.DirEntry[bytes]]:
        try:
            self._entries = os.scandir(self._folder)
        except OSError as error:
            raise self._failure(error) from error
        return self._entries

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._entries.close()
        if isinstance(error, OSError):
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> DataError:
        return DataError(f"{shown(self._folder)}: cannot be read ({error.strerror or error})")
