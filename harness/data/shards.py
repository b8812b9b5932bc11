"""WebDataset's tar shards, ROOT/train*.tar and ROOT/val*.tar, read at random.

The headers say where each image lies; so the shards are shuffled sample by sample, as any other
data set, and not shard by shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.data.datasets import ImageData
from harness.data.decode import Place
from harness.data.encoded import encoded_data
from harness.data_listing import shown
from harness.errors import DataError
from harness.schema import Data
from harness.shard_listing import member_name, samples_by_shard, shard_paths

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Members:
    """Images in tar files; all arrays are of shape (n,)."""

    paths: list[bytes]
    """Of the shards."""
    shards: I32
    offsets: I64
    sizes: I64
    labels: I32

    def place(self, sample: int) -> Place:
        """See `harness.data.encoded.Source`."""
        path = self.paths[self.shards[sample]]
        return Place(path, int(self.offsets[sample]), int(self.sizes[sample]))

    def name(self, sample: int) -> str:
        """See `harness.data.encoded.Source`: the shard and the member, which is looked up in it."""
        path, offset, _ = self.place(sample)
        return f"{shown(path)}: {member_name(path, offset)}"


def load(data: Data) -> ImageData:
    """Find the images; samples are sorted by shard, then place in it. Raises DataError for shards
    that are not as they should be."""
    train = _members(shard_paths(data, train=True))
    count = len(train.labels)
    if data.size is not None and data.size != count:
        raise DataError(
            f"data.size = {data.size}, but the training shards in {data.root} hold {count} "
            f"samples; set it to {count}, or leave it out"
        )
    test = _members(shard_paths(data, train=False))
    classes = int(train.labels.max()) + 1
    if test.labels.max() >= classes:
        at = int(np.argmax(test.labels >= classes))
        raise DataError(
            f"{test.name(at)} is of class {test.labels[at]}, but the training shards hold classes "
            f"0 to {classes - 1}"
        )
    return encoded_data(data, train, test, classes)


def _members(paths: list[bytes]) -> Members:
    table: list[npt.NDArray[np.int64]] = []
    shards: list[I32] = []
    for number, found in enumerate(samples_by_shard(paths)):
        table.append(np.array(found, np.int64))
        shards.append(np.full(len(found), number, np.int32))
    offsets, sizes, labels = np.concatenate(table).T
    return Members(
        paths,
        np.concatenate(shards),
        np.ascontiguousarray(offsets),
        np.ascontiguousarray(sizes),
        labels.astype(np.int32),
    )
