"""One copy of a data set for all ranks of a host.

A host's first rank loads the data and lays its arrays out in a block of anonymous shared memory
(memfd), which the host's other ranks open through /proc and map. The block has no name, so nothing
is left behind however the ranks end. A rank that cannot open it, as in a container of its own,
makes a copy for itself. What is listed rather than loaded (folders, shards) rank 0 alone lists, for
all hosts: one host may see a file a moment later than another.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import secrets
import zlib
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from harness.comm.base import Communicator, allgather_bytes, broadcast_bytes
from harness.comm.together import together
from harness.comm.topology import Topology
from harness.data.datasets import ImageData, load
from harness.dataset_table import dataset_of
from harness.errors import DataError
from harness.schema import Data

_ALIGNED = 64
_CLASSES = {
    "harness.data.augment": ("Affine", "CropFlip", "Cutout", "Compose"),
    "harness.data.datasets": ("ImageData", "ImageSplit"),
    "harness.data.encoded": ("EncodedSplit",),
    "harness.data.folder": ("Files",),
    "harness.data.shards": ("Members",),
    "harness.data.workers": ("Workers",),
}
"""What a data set may be made of."""
_TOKEN = 16
_HEAD = _TOKEN + 8


def load_shared(data: Data, comm: Communicator) -> ImageData:
    """Load what a configuration names, once per host. Collective.

    Raises AllLeave if that fails on some rank, or hosts have different data.
    """
    kind = dataset_of(data.dataset).kind
    if comm.size == 1 or kind == "generated" or not (data.share and hasattr(os, "memfd_create")):
        return together(comm, lambda: load(data))
    topology = comm.topology
    (first,) = (
        places[0].rank
        for places in topology.by_host().values()
        if topology.places[comm.rank] in places
    )
    make: Callable[[], Block]
    if kind == "decoded":
        block = together(comm, lambda: Block.of(load(data)) if comm.rank == 0 else None)
        content = broadcast_bytes(comm, block.content() if block else None, "data")
        make = lambda: Block.from_content(content)  # noqa: E731 - the other branch's counterpart
    else:
        block = None
        make = lambda: Block.of(load(data))  # noqa: E731
    block = together(comm, lambda: block or (make() if first == comm.rank else None))
    own = block is not None
    offers = allgather_bytes(comm, block.offer() if block else b"", "data.offers")
    block = block or Block.opened(offers[first])
    own = own or block is None
    ready = together(comm, lambda: block or make())  # and all have mapped what they can
    ready.close_file()
    _check_same(comm, topology, ready.checksum() if own else None)
    return ready.unpack()


def _check_same(comm: Communicator, topology: Topology, checksum: int | None) -> None:
    """Collective: raise AllLeave unless all ranks that have made a block have made the same."""
    told = allgather_bytes(comm, b"" if checksum is None else b"%d" % checksum, "data.checksums")

    def compare() -> None:
        known = {text: rank for rank, text in reversed(list(enumerate(told))) if text}
        if len(known) > 1:
            hosts = sorted({topology.places[rank].host for rank in known.values()})
            raise DataError(
                f"the files of the data set differ between ranks {sorted(known.values())} (hosts "
                f"{', '.join(hosts)}); give every host the same copy"
            )

    together(comm, compare)


class Block:
    """A data set laid out in shared memory: a token, a pickle without its arrays, those."""

    def __init__(self, file: int, size: int) -> None:
        self._file: int | None = file
        # Pages are shared until someone writes to them, which nobody does.
        self._map = mmap.mmap(file, size, access=mmap.ACCESS_COPY)

    @classmethod
    def of(cls, data: ImageData) -> Self:
        """Lay out; ``data`` is not needed any more."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(data)
        pickled = buffer.getvalue()
        start = _aligned(_HEAD + len(pickled))
        file = os.memfd_create("harness-data")
        os.truncate(file, start + pickler.size)
        with mmap.mmap(file, start + pickler.size) as area:
            area[:_HEAD] = secrets.token_bytes(_TOKEN) + len(pickled).to_bytes(8, "little")
            area[_HEAD : _HEAD + len(pickled)] = pickled
            for offset, array in pickler.arrays:
                begin = start + offset
                if array.nbytes:
                    area[begin : begin + array.nbytes] = array.data.cast("B")
        return cls(file, start + pickler.size)

    @classmethod
    def from_content(cls, content: bytes) -> Self:
        """What `content` has returned, perhaps on another host."""
        file = os.memfd_create("harness-data")
        with open(os.dup(file), "wb") as stream:
            stream.write(content)
        return cls(file, len(content))

    @classmethod
    def opened(cls, offer: bytes) -> Self | None:
        """The block that another process of this host offers; None if this one cannot have it."""
        try:
            terms = json.loads(offer)
            file = os.open(f"/proc/{terms['pid']}/fd/{terms['file']}", os.O_RDWR)
        except (OSError, ValueError):
            return None
        # Another process may have that number in this one's view of the host.
        same = os.fstat(file).st_size == terms["size"]
        if not same or os.pread(file, _TOKEN, 0).hex() != terms["token"]:
            os.close(file)
            return None
        return cls(file, terms["size"])

    def offer(self) -> bytes:
        """What `opened` needs, while this process keeps the file open."""
        terms = {"pid": os.getpid(), "file": self._file, "size": len(self._map)}
        return json.dumps({**terms, "token": self._map[:_TOKEN].hex()}).encode()

    def content(self) -> bytes:
        """All of it."""
        return self._map[:]

    def close_file(self) -> None:
        """What is mapped stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def checksum(self) -> int:
        """CRC-32 of the large arrays."""
        with memoryview(self._map) as view, view[self._start :] as arrays:
            return zlib.crc32(arrays)

    def unpack(self) -> ImageData:
        """The data set, whose large arrays stay in the block."""
        unpickler = _Unpickler(io.BytesIO(self._map[_HEAD : _HEAD + self._pickled]))
        unpickler.block, unpickler.start = self._map, self._start
        data = unpickler.load()
        assert isinstance(data, ImageData)  # noqa: S101 - for the type checker
        return data

    @property
    def _pickled(self) -> int:
        return int.from_bytes(self._map[_TOKEN:_HEAD], "little")

    @property
    def _start(self) -> int:
        return _aligned(_HEAD + self._pickled)


class _Pickler(pickle.Pickler):
    """Keeps arrays apart, with the place that each is to have."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=5)
        self.size = 0
        self.arrays: list[tuple[int, npt.NDArray[Any]]] = []
        self._known: dict[int, tuple[Any, ...]] = {}

    def persistent_id(self, value: object) -> tuple[Any, ...] | None:
        if not isinstance(value, torch.Tensor | np.ndarray):
            return None
        tensor = isinstance(value, torch.Tensor)
        if id(value) not in self._known:
            array = np.ascontiguousarray(
                value.numpy() if isinstance(value, torch.Tensor) else value
            )
            place = (tensor, self.size, array.dtype.str, array.shape)
            self.arrays.append((self.size, array))
            self.size = _aligned(self.size + array.nbytes)
            self._known[id(value)] = place
        return self._known[id(value)]


class _Unpickler(pickle.Unpickler):
    """Reads only what `_Pickler` has written. It comes from a process of the same user (see the
    token), or from rank 0 on another host over a network that may not be one's own: so nothing but
    the data sets' own classes can be named in it."""

    block: mmap.mmap
    start: int

    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise DataError(
                f"the data that ranks share has {module}.{name} in it, which is refused"
            )
        return super().find_class(module, name)

    def persistent_load(self, place: tuple[Any, ...]) -> Any:
        tensor, offset, dtype, shape = place
        count = int(np.prod(shape))
        at = self.start + offset if count else 0  # what is empty may lie behind the end
        array = np.frombuffer(self.block, np.dtype(dtype), count=count, offset=at).reshape(shape)
        return torch.from_numpy(array) if tensor else array


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
