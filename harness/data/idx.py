"""IDX files of unsigned bytes, plain or gzip, read strictly; the header is never trusted."""

from __future__ import annotations

import gzip
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harness.data_sizes import FRESH_COPY, ByteStream, open_idx, read_header
from harness.errors import DataError

_CHUNK = 1 << 20
_DEFLATE = 1032  # zlib's technical details: no deflate stream expands by more than 1032:1


def read_idx(path: Path, item: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """All samples of a file, shape (n, *item), where ``item`` is the shape of one sample.

    What the header promises is held against the file's size before any memory is taken, and no more
    than the promised bytes and one are unpacked. Raises DataError for everything that is not
    exactly the promised file.
    """
    with open_idx(path) as stream:
        sizes = read_header(stream, path, 1 + len(item))
        if sizes[1:] != item:
            found, wanted = _times(sizes[1:]), _times(item)
            raise DataError(f"{path}: samples of {found}, but {wanted} expected; {FRESH_COPY}")
        expected, header = prod(sizes), 4 + 4 * len(sizes)
        _check_claim(stream, path, header + expected)
        body = bytearray()
        while len(body) <= expected:
            chunk = stream.read(min(_CHUNK, expected + 1 - len(body)))
            if not chunk:
                break
            body += chunk
    if len(body) < expected:
        raise _wrong_length(path, header + expected, str(header + len(body)))
    if len(body) > expected:
        raise DataError(
            f"{path}: trailing bytes: its header promises {header + expected} bytes in all, and "
            f"more follow; {FRESH_COPY}"
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(sizes)


def _check_claim(stream: ByteStream, path: Path, claimed: int) -> None:
    """Refuse a file too small to hold ``claimed`` bytes, by its size alone."""
    on_disk = path.stat().st_size
    if not isinstance(stream, gzip.GzipFile):
        if claimed > on_disk:
            raise _wrong_length(path, claimed, str(on_disk))
    elif claimed > on_disk * _DEFLATE:
        raise _wrong_length(path, claimed, f"at most {on_disk * _DEFLATE} can be")


def _wrong_length(path: Path, expected: int, found: str) -> DataError:
    return DataError(
        f"{path}: truncated: its header promises {expected} bytes, {found} found; {FRESH_COPY}"
    )


def _times(sizes: tuple[int, ...]) -> str:
    return " × ".join(map(str, sizes))
