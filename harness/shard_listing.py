"""The samples of WebDataset's tar shards: where each image lies, from the headers alone.

Nothing is unpacked, so that a member's name can lead nowhere. Formats: ustar (POSIX.1-1988), with
pax headers (POSIX.1-2001) and with GNU's long names and large sizes. Imports neither torch nor
numpy, as planning counts samples too.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from harness.data_listing import data_root, needs, shown
from harness.errors import DataError
from harness.schema import Data

MAX_LABEL = 10**6
_IMAGES = frozenset({b"jpg", b"jpeg", b"png", b"webp"})
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_LABEL = re.compile(rb"\s*(\d{1,18})\s*")
_BLOCK, _WINDOW = 512, 4096
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FILE, _LINK, _NO_DATA = b"0\x007", b"12", b"123456"  # kinds of members
_LONG = 1 << 20  # bytes of a long name or a pax header that are taken for real
_THREADS = 8  # a network's file system answers several at once


class Member(NamedTuple):
    """A member of a tar file."""

    name: bytes
    kind: bytes
    offset: int
    """Of its contents."""
    size: int
    head: bytes
    """At most the first 512 bytes of its contents."""


class Sample(NamedTuple):
    """An image in a shard and its label."""

    offset: int
    size: int
    label: int


@dataclass
class _Parts:
    """What has been found of a shard's samples, by key."""

    images: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    labels: dict[bytes, int] = field(default_factory=dict)


def shard_paths(data: Data, train: bool) -> list[bytes]:
    """ROOT/train*.tar, or ROOT/val*.tar, or else ROOT/test*.tar, sorted by their bytes.

    Raises DataError if there is none.
    """
    root = data_root(data)
    names = [b"train"] if train else [b"val", b"test"]
    try:
        present = sorted(os.listdir(root))
    except OSError as error:
        raise DataError(f"{shown(root)}: cannot be read ({error.strerror or error})") from error
    for name in names:
        found = [one for one in present if one.startswith(name) and one.endswith(b".tar")]
        if found:
            return [os.path.join(root, one) for one in found]
    packed = re.compile(rb"(%s).*\.(tar\.\w+|tgz|tbz2|txz)" % b"|".join(names))
    for one in present:
        if packed.fullmatch(one):
            raise DataError(_unreadable(os.path.join(root, one)))
    wanted = " or ".join(f"{name.decode()}*.tar" for name in names)
    raise DataError(f"{shown(root)} has no {wanted}; {needs(data)}")


def samples_by_shard(paths: list[bytes]) -> Iterator[list[Sample]]:
    """For each shard its samples; raises DataError as `samples`."""
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(samples, paths)


def count_samples(data: Data) -> int:
    """Number of training samples; raises DataError as what lists them does."""
    return sum(map(len, samples_by_shard(shard_paths(data, train=True))))


def samples(path: bytes) -> list[Sample]:
    """The samples of a shard, by the position of their images.

    As WebDataset has it, a sample is what shares a key: a member's path up to the first dot of its
    last part. Each has one image and one ``cls``, a label in ASCII digits; what else there is does
    not count. Raises DataError for a shard where this is not so, that is cut off, or holds none.
    """
    parts = _Parts()
    for member in members(path):
        _sort_in(parts, member, path)
    halves = parts.images.keys() ^ parts.labels.keys()
    if halves:
        key = min(halves)
        has, lacks = ("an image", ".cls") if key in parts.images else ("a .cls", "image")
        raise DataError(
            f"{shown(path)}: {shown(key)} has {has}, but no {lacks}; each sample needs both"
        )
    if not parts.images:
        raise DataError(
            f"{shown(path)} holds no samples (KEY.jpg, .jpeg, .png or .webp, with KEY.cls); remove "
            "it, or replace it"
        )
    found = [Sample(*place, parts.labels[key]) for key, place in parts.images.items()]
    return sorted(found)


def member_name(path: bytes, offset: int) -> str:
    """What the member is called whose contents begin at ``offset``; "?" if it is not there."""
    try:
        for member in members(path):
            if member.offset == offset:
                return shown(member.name)
    except DataError:
        pass
    return "?"


def _sort_in(parts: _Parts, member: Member, path: bytes) -> None:
    name = member.name
    last = name.rfind(b"/") + 1
    dot = name.find(b".", last)
    if dot <= last:  # no suffix, or hidden
        return
    key, suffix = name[:dot], name[dot + 1 :].lower()
    if suffix not in _IMAGES and suffix != b"cls":
        return
    where = f"{shown(path)}: {shown(name)}"
    if member.kind in _LINK:
        raise DataError(f"{where} is a link; write the shard with files instead of links")
    if member.kind not in _FILE:
        return
    if key in (parts.labels if suffix == b"cls" else parts.images):
        what = "label" if suffix == b"cls" else "image"
        raise DataError(f"{where} is the second {what} of its sample; each has one")
    if suffix == b"cls":
        parts.labels[key] = _label(member, where)
    else:
        parts.images[key] = member.offset, member.size


def _label(member: Member, where: str) -> int:
    match = _LABEL.fullmatch(member.head) if member.size <= _BLOCK else None
    label = int(match[1]) if match else -1
    if not 0 <= label < MAX_LABEL:
        raise DataError(
            f"{where} holds {shown(member.head[:30])!r}, but a label is a whole number from 0 to "
            f"{MAX_LABEL - 1}"
        )
    return label


def members(path: bytes) -> Iterator[Member]:
    """The members of a tar file, headers of long names and the like resolved.

    Raises DataError for a file that cannot be read, is not a tar file, or is cut off.
    """
    try:
        # Not waiting for somebody to write into it, should it be a pipe.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({error.strerror or error})") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise DataError(f"{shown(path)}: is not a regular file")
        yield from _members(file, path)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({error.strerror or error})") from error
    finally:
        os.close(file)


def _members(file: int, path: bytes) -> Iterator[Member]:
    end = os.fstat(file).st_size
    at, name, size = 0, None, None
    window, base = b"", 0  # a label and the next header, more often than not, are in one read
    while True:
        if at + 2 * _BLOCK > base + len(window):
            window, base = os.pread(file, _WINDOW, at), at
        header = window[at - base : at - base + _BLOCK]
        head = window[at - base + _BLOCK : at - base + 2 * _BLOCK]
        if header.count(0) == _BLOCK:
            return
        _check(header, path, at)
        kind = header[156:157]
        extended = kind in b"LKxg"
        length = _number(header[124:136], path, at) if size is None or extended else size
        offset = at + _BLOCK
        if kind in _NO_DATA:
            at = offset
        else:
            at = offset + -(-length // _BLOCK) * _BLOCK
            if offset + length > end:
                raise DataError(
                    f"{shown(path)}: truncated: {offset + length} bytes expected, {end} found; "
                    "replace it with a fresh copy"
                )
        if kind in b"Lx":
            data = os.pread(file, min(length, _LONG), offset)
            if kind == b"L":
                name = data.split(b"\0", 1)[0]
            else:
                records = _pax(data, path, offset)
                name = records.get(b"path", name)
                size = _pax_size(records, path, offset)
        elif not extended:
            if kind == b"S":
                raise DataError(f"{shown(path)}: sparse members are not read; write it without")
            yield Member(name or _name(header), kind, offset, length, head[:length])
            name = size = None


def _check(header: bytes, path: bytes, at: int) -> None:
    """Raises DataError unless this is a member's header."""
    if len(header) < _BLOCK:
        if not at and not header:
            raise DataError(f"{shown(path)}: the file is empty; replace it with a fresh copy")
        if not at:
            _refuse_packed(header, path)
        raise DataError(
            f"{shown(path)}: truncated: a tar file ends with blocks of zeros, this one at byte "
            f"{at + len(header)} without; replace it with a fresh copy"
        )
    stored = header[148:156]
    match = _OCTAL.fullmatch(stored)
    # The sum of its bytes, where the sum itself counts as spaces; Adler-32 has it modulo 65521.
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(stored) + 8 * 32
    if match is None or (int(match[1] or b"0", 8) - total) % 65521:
        _refuse_packed(header if not at else b"", path)
        where = f"at byte {at} is no header of a member" if at else "this is not a tar file"
        raise DataError(f"{shown(path)}: {where}; replace it with a fresh copy")


def _refuse_packed(start: bytes, path: bytes) -> None:
    if any(start.startswith(magic) for magic in _PACKED):
        raise DataError(_unreadable(path))


def _unreadable(path: bytes) -> str:
    return (
        f"{shown(path)} is compressed and cannot be read at random; unpack it to a plain .tar "
        "(images are compressed already)"
    )


def _number(data: bytes, path: bytes, at: int) -> int:
    """Octal digits, or (GNU) big-endian bytes after 0x80."""
    if data[0] == 0x80:
        return int.from_bytes(data[1:], "big")
    match = _OCTAL.fullmatch(data)
    if match:
        return int(match[1] or b"0", 8)
    raise DataError(f"{shown(path)}: at byte {at} is a member of invalid size {data!r}")


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] != b"ustar\0":
        return name
    prefix = header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix else name


def _pax_size(records: dict[bytes, bytes], path: bytes, at: int) -> int | None:
    value = records.get(b"size")
    if value is None:
        return None
    if not re.fullmatch(rb"\d{1,18}", value):
        raise DataError(f"{shown(path)}: at byte {at} is an invalid pax header")
    return int(value)


def _pax(data: bytes, path: bytes, at: int) -> dict[bytes, bytes]:
    """Records of a pax header: length, space, key=value, newline."""
    records: dict[bytes, bytes] = {}
    while data:
        digits = data.split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = data[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise DataError(f"{shown(path)}: at byte {at} is an invalid pax header")
        if key.startswith(b"GNU.sparse."):
            raise DataError(f"{shown(path)}: sparse members are not read; write it without")
        records[key] = value[:-1]
        data = data[length:]
    return records
