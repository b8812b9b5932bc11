"""The data sets by name: what each is, what it needs, how to get it. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from harness.own_names import check_own, is_own


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before its files are read."""

    title: str
    kind: Literal["memory", "decoded", "generated"]
    """memory: held there as bytes, shared by the ranks of a host; decoded: from compressed files
    as training goes on; generated: from nothing."""
    module: str
    """Has ``load(data: harness.schema.Data) -> harness.data.datasets.ImageData``."""
    train_size: int | None = None
    """Published number of training samples; None: its files or ``data.size`` say."""
    classes: int | None = None
    """None: its files or ``data.classes`` say."""
    files: str = ""
    """What is expected in data.root; empty: no data.root is needed."""
    source: str = ""
    """How to get them."""
    takes: frozenset[str] = frozenset()
    """Those of OPTIONAL that have a meaning here."""


OPTIONAL = ("image_size", "size", "sizes", "classes", "channels")
"""Keys of ``data`` that only some data sets take."""

_IDX = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, each plain or .gz, in ROOT, ROOT/raw or ROOT/{}/raw"
)
_DOWNLOAD = "on a machine with internet: torchvision.datasets.{}(ROOT, download=True)"
_FOLDERS = "ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (also .jpeg, .png, .webp, .bmp, .ppm)"

DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        "1,797 real handwritten digits, 28 × 28 grey, 10 classes",
        "memory",
        "harness.data.digits",
        train_size=1437,
        classes=10,
        source="comes with scikit-learn",
    ),
    "digits-enlarged": Dataset(
        "affine and elastic variants of the training digits, as many as data.size says; "
        "the test digits are as they were",
        "generated",
        "harness.data.digits_enlarged",
        classes=10,
        source="made from scikit-learn's digits as training goes on",
        takes=frozenset({"size"}),
    ),
    "mnist": Dataset(
        "70,000 handwritten digits, 28 × 28 grey, 10 classes (LeCun et al. 1998)",
        "memory",
        "harness.data.mnist",
        train_size=60_000,
        classes=10,
        files=_IDX.format("MNIST"),
        source=_DOWNLOAD.format("MNIST"),
    ),
    "fashion-mnist": Dataset(
        "70,000 pictures of clothes, 28 × 28 grey, 10 classes (Xiao et al. 2017)",
        "memory",
        "harness.data.mnist",
        train_size=60_000,
        classes=10,
        files=_IDX.format("FashionMNIST"),
        source=_DOWNLOAD.format("FashionMNIST"),
    ),
    "cifar10": Dataset(
        "60,000 photographs, 32 × 32, 10 classes (Krizhevsky 2009)",
        "memory",
        "harness.data.cifar",
        train_size=50_000,
        classes=10,
        files="data_batch_1 … data_batch_5 and test_batch, in ROOT or ROOT/cifar-10-batches-py",
        source="cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked in "
        "ROOT",
    ),
    "cifar100": Dataset(
        "60,000 photographs, 32 × 32, 100 classes (Krizhevsky 2009)",
        "memory",
        "harness.data.cifar",
        train_size=50_000,
        classes=100,
        files="train and test, in ROOT or ROOT/cifar-100-python",
        source="cifar-100-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked "
        "in ROOT",
    ),
    "imagenet": Dataset(
        "1,331,167 photographs, 1,000 classes (ILSVRC 2012)",
        "decoded",
        "harness.data.folder",
        train_size=1_281_167,
        classes=1000,
        files=_FOLDERS,
        source="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of https://image-net.org (an "
        "account is needed), unpacked into one folder for each class",
        takes=frozenset({"image_size"}),
    ),
    "folder": Dataset(
        "your own images, one folder for each class",
        "decoded",
        "harness.data.folder",
        files=_FOLDERS.replace("ROOT/val/CLASS", "ROOT/val/CLASS (or ROOT/test/CLASS)"),
        takes=frozenset({"image_size"}),
    ),
    "webdataset": Dataset(
        "your own images in WebDataset's tar shards",
        "decoded",
        "harness.data.shards",
        files="ROOT/train*.tar and ROOT/val*.tar (or ROOT/test*.tar), with KEY.jpg (or .jpeg, "
        ".png, .webp) and KEY.cls",
        source="https://github.com/webdataset/webdataset, whose ShardWriter makes them",
        takes=frozenset({"image_size", "size"}),
    ),
    "synthetic": Dataset(
        "random images of any size, with any number of classes, to measure throughput",
        "generated",
        "harness.data.synthetic",
        source="made on the device that trains",
        takes=frozenset({"image_size", "size", "classes", "channels"}),
    ),
}
OWN = Dataset(
    "your own torch Dataset, as package.module:callable",
    "generated",
    "harness.data.own",
    takes=frozenset({"sizes", "classes"}),
)
"""What is known of a user's own. Each rank calls for it, and nobody looks inside."""

DEFAULT_SIZES = {"digits-enlarged": 100_000, "synthetic": 50_000}
"""Training samples of generated data where ``data.size`` is not set."""


def dataset_of(name: str) -> Dataset:
    """What is known of the data set that a configuration names."""
    return OWN if is_own(name) else DATASETS[name]


def check_dataset(name: str, root: str | None, given: dict[str, object]) -> None:
    """Raise ValueError for an unknown name, a root where none is needed, and for keys of OPTIONAL,
    as ``given`` (None: not set), that the data set does not take."""
    if is_own(name):
        check_own("data.dataset", name)
    elif name not in DATASETS:
        close = get_close_matches(name, DATASETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"data.dataset = {name} is not known{hint}; valid: {', '.join(DATASETS)}")
    dataset = dataset_of(name)
    for key in OPTIONAL:
        if given[key] is not None and key not in dataset.takes:
            takers = ", ".join(other for other, entry in DATASETS.items() if key in entry.takes)
            if key in OWN.takes:
                takers = f"{takers}, or your own" if takers else "your own, package.module:callable"
            raise ValueError(
                f"data.{key} = {given[key]} has no meaning for data.dataset = {name}; it belongs "
                f"to {takers}"
            )
    if root is not None and not dataset.files and dataset is not OWN:
        raise ValueError(f"data.root = {root} has no meaning for data.dataset = {name}")
