"""Your own images or ImageNet's, one folder for each class: ROOT/train/CLASS and ROOT/val/CLASS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.data.datasets import ImageData
from harness.data.decode import U8, Place
from harness.data.encoded import encoded_data
from harness.data_listing import class_folders, images_by_class, needs, shown, split_folder
from harness.dataset_table import DATASETS
from harness.errors import DataError
from harness.schema import Data


@dataclass(frozen=True, eq=False)
class Files:
    """Image files. Paths lie one after the other in an array: a million take 40 MB, and not the
    ten times as much of Python's strings."""

    folder: bytes
    paths: U8
    """Relative to the folder."""
    ends: npt.NDArray[np.int64]
    """Of each path, shape (n + 1,); a path begins where the one before ends, the first at 0."""
    labels: npt.NDArray[np.int32]

    def place(self, sample: int) -> Place:
        """See `harness.data.encoded.Source`."""
        first, last = self.ends[sample : sample + 2]
        return Place(self.folder + b"/" + self.paths[first:last].tobytes())

    def name(self, sample: int) -> str:
        """See `harness.data.encoded.Source`."""
        return shown(self.place(sample).path)


def load(data: Data) -> ImageData:
    """Find the images; samples are sorted by class, then path. Raises DataError for folders that
    are not as they should be."""
    train, test = split_folder(data, train=True), split_folder(data, train=False)
    classes = class_folders(train)
    expected = DATASETS[data.dataset].classes
    if expected is not None and len(classes) != expected:
        raise DataError(
            f"{shown(train)} holds {len(classes)} class folders, but {data.dataset} has "
            f"{expected}; a subset of it is loaded with data.dataset=folder, or complete it: "
            f"{needs(data)}"
        )
    of_test = class_folders(test)
    unknown = sorted(set(of_test) - set(classes))
    if unknown:
        raise DataError(
            f"{shown(test)}/{shown(unknown[0])} is a class that {shown(train)} lacks; its classes "
            "must be among those of the training images"
        )
    return encoded_data(
        data, _files(train, classes, classes), _files(test, of_test, classes), len(classes)
    )


def _files(folder: bytes, present: list[bytes], classes: list[bytes]) -> Files:
    """The images of the classes that are ``present``; labels are places in ``classes``."""
    number = {name: label for label, name in enumerate(classes)}
    parts, lengths, labels = [], [np.zeros(1, np.int64)], []
    for name, found in zip(present, images_by_class(folder, present), strict=True):
        prefix = name + b"/"
        parts.append(prefix + prefix.join(found))
        lengths.append(np.fromiter(map(len, found), np.int64, len(found)) + len(prefix))
        labels.append(np.full(len(found), number[name], np.int32))
    paths = np.frombuffer(b"".join(parts), np.uint8)
    return Files(folder, paths, np.concatenate(lengths).cumsum(), np.concatenate(labels))
