"""Which data sets have their files where, without reading them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.data_listing import class_folders, split_folder
from harness.data_sizes import IDX_FOLDERS, find_parts
from harness.dataset_table import DATASETS
from harness.doctor.findings import Finding, wrapped
from harness.errors import DataError
from harness.schema import Data
from harness.shard_listing import shard_paths

_NAME = 17  # columns


def check_root(root: Path | None) -> None:
    """Raise DataError if it is given and not a directory."""
    if root is not None and not os.path.isdir(root):  # Path.is_dir raises where access is denied
        raise DataError(f"--data {root} is not a directory")


def data_sets(root: Path | None, with_digits: bool) -> list[Finding]:
    """The state of each data set; ``with_digits``: scikit-learn is there."""
    return [Finding(name, _state(name, root, with_digits), group="data") for name in DATASETS]


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """``{NAME: {"usable", "text"}}``."""
    return {
        one.name: {"usable": one.text.startswith(("found", "ready")), "text": one.text}
        for one in findings
    }


def as_lines(findings: Sequence[Finding], root: Path | None) -> list[str]:
    """What each data set is, needs, and where it comes from; those that are not there in short."""
    lines = ["Data sets"]
    lines += wrapped("ROOT stands for data.root of the configuration. Nothing is downloaded.", 2)
    absent = [finding.name for finding in findings if finding.text == f"not in {root}"]
    for finding in findings:
        if finding.name in absent:
            continue
        dataset = DATASETS[finding.name]
        told = wrapped(finding.text, 2 + _NAME)
        lines += ["", f"  {finding.name:<{_NAME}}{told[0].lstrip()}", *told[1:]]
        lines += wrapped(dataset.title, 4)
        if dataset.files:
            lines += wrapped(f"files: {dataset.files}", 4, 7)
            lines += wrapped(f"from:  {dataset.source}", 4, 7) if dataset.source else []
    if absent:
        short = f"Not in {root}: {', '.join(absent)}. `harness doctor` says what they need."
        lines += ["", *wrapped(short, 2)]
    if root is None:
        lines += ["", *wrapped("`harness doctor --data DIR` looks for the files in DIR.", 2)]
    return lines


def _state(name: str, root: Path | None, with_digits: bool) -> str:
    dataset = DATASETS[name]
    if not dataset.files:
        if name.startswith("digits") and not with_digits:
            return f"needs scikit-learn: {dataset.source}"
        return f"ready: {dataset.source}"
    if root is None:
        return "needs data.root"
    if dataset.kind == "memory":
        return _of_parts(name, root)
    return _of_shards(root) if name == "webdataset" else _of_folders(name, root)


def _of_parts(name: str, root: Path) -> str:
    """A fixed list of files."""
    found, missing = find_parts(root, name)
    if not found:
        return f"not in {root}"
    places = ", ".join(dict.fromkeys(str(path.parent) for path in found.values()))
    if missing:
        return f"incomplete in {places}: {', '.join(missing)} missing"
    for other in IDX_FOLDERS:
        if other != name and name in IDX_FOLDERS and find_parts(root, other)[0] == found:
            return f"found in {places}, unless these are {other}'s files: the names are the same"
    return f"found in {places}"


def _of_folders(name: str, root: Path) -> str:
    """One folder for each class."""
    train, test = _both(name, root, lambda data, half: class_folders(split_folder(data, half)))
    wanted = DATASETS[name].classes
    if train and wanted is not None and train != wanted:
        return f"not in {root}: {train:,} class folders for training, and not {wanted:,}"
    return _of_halves(root, "class folders", train, test)


def _of_shards(root: Path) -> str:
    return _of_halves(root, "shards", *_both("webdataset", root, shard_paths))


def _both(name: str, root: Path, listing: Callable[[Data, bool], list[bytes]]) -> tuple[int, int]:
    """How many the loader would find for training and for the test."""
    data, counts = Data(dataset=name, root=str(root)), [0, 0]
    for at, train in enumerate((True, False)):
        with suppress(DataError):  # for want of any
            counts[at] = len(listing(data, train))
    return counts[0], counts[1]


def _of_halves(root: Path, what: str, train: int, test: int) -> str:
    if train and test:
        return f"found in {root}: {train:,} {what} for training, {test:,} for the test"
    if train or test:
        return f"incomplete in {root}: no {what} for {'the test' if train else 'training'}"
    return f"not in {root}"
