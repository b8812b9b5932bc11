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

from harness.errors import DataError

TRAIN_SIZES = {
    "digits": 1437,
    "mnist": 60_000,
    "fashion-mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "imagenet": 1_281_167,
}
"""Published (or, for digits, our own) number of training samples of each data set by name."""

LOADABLE = ("digits", "mnist")
"""Those that this version can train on; the others can be planned."""

ByteStream = BufferedReader | gzip.GzipFile
FRESH_COPY = "replace it with a fresh copy"
_MAGIC = 0x0800  # third byte 0x08: unsigned bytes; the fourth is the number of dimensions


def train_size(name: str, root: str | None) -> int:
    """Training samples of a data set: what its files say if they are there, else what is published.

    Only the first bytes of one file are read. Raises DataError for an unknown name or a file that
    is not IDX.
    """
    check_name(name)
    if name == "mnist" and root is not None:
        for part, dimensions in (("train-images", 3), ("train-labels", 1)):
            path = find_idx(Path(root), part, dimensions)
            if path is not None:
                with open_idx(path) as stream:
                    return read_header(stream, path, dimensions)[0]
    return TRAIN_SIZES[name]


def check_name(name: str) -> None:
    """Raises DataError, with the valid names, if no data set is called ``name``."""
    if name not in TRAIN_SIZES:
        raise DataError(f"unknown data set {name!r}; valid: {', '.join(sorted(TRAIN_SIZES))}")


def check_loadable(name: str) -> None:
    """Raises DataError if no data set is called ``name``, or this version cannot load it."""
    check_name(name)
    if name not in LOADABLE:
        raise DataError(
            f"data.dataset = {name} can be planned, but this version cannot train on it; it can on "
            f"{', '.join(LOADABLE)}"
        )


def find_idx(root: Path, part: str, dimensions: int) -> Path | None:
    """The file of ``part`` (such as ``train-images``) in root, root/raw or root/MNIST/raw."""
    for folder in (root, root / "raw", root / "MNIST" / "raw"):
        for joint in "-.":
            for suffix in ("", ".gz"):
                path = folder / f"{part}{joint}idx{dimensions}-ubyte{suffix}"
                if os.path.isfile(path):  # Path.is_file raises where a folder may not be searched
                    return path
    return None


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
