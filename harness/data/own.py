"""A user's own data set: a map-style torch Dataset, as ``package.module:callable``.

The callable is called for each split, with ``train=True`` and ``train=False``, or with
``split="train"`` and ``split="test"``, whichever its signature has (torchvision's data sets have
one of both), with ``root=`` if it takes that and ``data.root`` is set, and with ``data.options``.
What it returns has a length and gives (image, label) for an index.

Random transforms stay a function of seed, epoch and sample: Python's, numpy's and torch's global
generators are seeded with them before each sample, and put back afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harness.data.datasets import Batch, Deferred, ImageData, Pending, to_device
from harness.errors import ConfigError, DataError
from harness.keyed import fold_key
from harness.own import calling, check_options, find, keywords, written
from harness.schema import Data

I64 = npt.NDArray[np.int64]

_KEY = "data.dataset"
_ITEM = 0x6974656D  # keeps these keys apart from all others
_WANTED = "(image, label): a tensor, a PIL image or an array, and a whole number"


def load(data: Data) -> ImageData:
    """Call for both splits and look at the first sample of each.

    Raises ConfigError for a callable that does not do what it should, DataError for another number
    of samples than ``data.sizes`` says.
    """
    assert data.sizes is not None  # noqa: S101 - the schema has seen to it
    factory = find(_KEY, data.dataset)
    with _generators_put_back():
        _seed_generators(fold_key(_ITEM))  # data that is drawn when it is made: alike on all ranks
        train, test = _made(data, factory, True), _made(data, factory, False)
    for part, made, size in (("train", train, data.sizes.train), ("test", test, data.sizes.test)):
        with calling(_KEY, data.dataset, f"len() of its {part} split"):
            length = len(made)
        if length != size:
            raise DataError(
                f"data.sizes.{part} = {size}, but {data.dataset} has {length} samples; "
                f"set data.sizes.{part}={length}"
            )
    classes = _classes(data, train)
    shape = _first(data, "train", train, classes)
    training = OwnSplit(data.dataset, "train", train, classes, shape)
    testing = OwnSplit(data.dataset, "test", test, classes, shape)
    with _generators_put_back():
        for split in (training, testing):
            split.fetch(0)
    return ImageData(data.dataset, training, testing, classes, shape)


@dataclass(frozen=True, eq=False)
class OwnSplit:
    """One split of a user's data set."""

    name: str
    part: str
    """train or test, for messages."""
    items: Any = field(repr=False)
    """Has a length; gives (image, label) for an index."""
    num_classes: int
    shape: tuple[int, int, int]
    """(C, H, W) that every image has."""
    ahead: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def request(
        self, samples: I64, epochs: I64, seed: int, augment: bool, device: torch.device
    ) -> Pending:
        """See `harness.data.datasets.Split`. What is random in it is the data set's own matter,
        with ``augment`` or without."""
        return Deferred(lambda: self._batch(samples, epochs, seed, device))

    def fetch(self, sample: int) -> tuple[Tensor, int]:
        """One sample's image, float32 (C, H, W), and label.

        Raises ConfigError for what is no such sample, or of another shape than the first one.
        """
        image, label = _fetched(self.name, self.part, self.items, sample)
        where = f"{_KEY} {self.name}: sample {sample} of its {self.part} split"
        if image.shape != self.shape:
            raise ConfigError(
                f"{where} has shape {tuple(image.shape)}, and the first one {self.shape}; all "
                "images need the same"
            )
        if not 0 <= label < self.num_classes:
            raise ConfigError(
                f"{where} has the label {label}; {self.num_classes} classes have labels 0 to "
                f"{self.num_classes - 1}"
            )
        return image, label

    def close(self) -> None:
        """See `harness.data.datasets.Split`."""

    def _batch(self, samples: I64, epochs: I64, seed: int, device: torch.device) -> Batch:
        if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < len(self):
            raise IndexError(f"a sample lies outside range({len(self)})")
        images = torch.empty((len(samples), *self.shape))
        labels = torch.empty(len(samples), dtype=torch.int64)
        with _generators_put_back():
            for place, (sample, epoch) in enumerate(
                zip(samples.tolist(), epochs.tolist(), strict=True)
            ):
                _seed_generators(fold_key(seed, _ITEM, epoch, sample))
                images[place], labels[place] = self.fetch(sample)
        return Batch(to_device(images, device), to_device(labels, device))


def _made(data: Data, factory: Callable[..., Any], train: bool) -> Any:
    named, any_keyword = keywords(factory)
    given: dict[str, object] = {}
    if "train" in named:
        given["train"] = train
    elif "split" in named:
        given["split"] = "train" if train else "test"
    else:
        raise ConfigError(
            f'{_KEY} {data.dataset}: it must take train=True and train=False, or split="train" '
            f'and split="test"; it takes ({", ".join(named) or "nothing"})'
        )
    if "root" in named or (any_keyword and data.root is not None):
        if data.root is None:
            raise ConfigError(f"{_KEY} {data.dataset}: it takes root=; set data.root")
        given["root"] = data.root
    elif data.root is not None:
        raise ConfigError(f"data.root is set, but {data.dataset} does not take root=")
    elsewhere = {"train": "the harness", "split": "the harness", "root": "data.root"}
    check_options("data.options", data.dataset, factory, data.options, elsewhere)
    arguments = {**given, **data.options}
    with calling(_KEY, data.dataset, f"calling it with ({written(arguments)})"):
        made = factory(**arguments)
    if not hasattr(made, "__len__") or not hasattr(made, "__getitem__"):
        raise ConfigError(
            f"{_KEY} {data.dataset}: must return a map-style data set, with a length and samples "
            f"by index, but returned {type(made).__name__}"
        )
    return made


def _classes(data: Data, train: Any) -> int:
    """What data.classes says, else how many ``classes`` the data set lists."""
    if data.classes is not None:
        return data.classes
    classes = getattr(train, "classes", None)
    if not isinstance(classes, list | tuple) or not classes:
        raise ConfigError(
            f"data.classes is not set, and {data.dataset} has no attribute `classes` that lists "
            "them; set data.classes to the number of classes"
        )
    return len(classes)


def _first(data: Data, part: str, made: Any, classes: int) -> tuple[int, int, int]:
    """Shape of the first image."""
    with _generators_put_back():
        image, _ = _fetched(data.dataset, part, made, 0)
    channels, height, width = image.shape
    return channels, height, width


def _fetched(name: str, part: str, items: Any, sample: int) -> tuple[Tensor, int]:
    where = f"sample {sample} of its {part} split"
    with calling(_KEY, name, where):
        item = items[sample]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ConfigError(
            f"{_KEY} {name}: {where} must be {_WANTED}, but is {type(item).__name__}"
            + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
        )
    try:
        return _as_image(item[0]), _as_label(item[1])
    except ValueError as error:
        raise ConfigError(f"{_KEY} {name}: {where}: {error}") from None


def _as_image(image: Any) -> Tensor:
    """float32 (C, H, W): bytes in 0..1, numbers as they are. Raises ValueError."""
    if not isinstance(image, Tensor):
        if not isinstance(image, np.ndarray):
            if not hasattr(image, "getbands"):
                raise ValueError(
                    f"the image must be a tensor, PIL image or array, not {_is(image)}"
                )
            image = np.asarray(image.convert("RGB") if image.mode in ("P", "CMYK") else image)
        if image.dtype == np.bool_ or image.dtype.kind not in "uf":
            raise ValueError(f"the image must be uint8 or of floats, not {image.dtype}")
        if image.ndim == 2:
            image = image[:, :, None]
        image = torch.from_numpy(np.array(image))
        if image.dim() == 3:  # arrays have the channels last, tensors first
            image = image.permute(2, 0, 1)
    return _as_floats(image)


def _as_floats(image: Tensor) -> Tensor:
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(
            "the image must have shape (C, H, W), an array (H, W) or (H, W, C), not "
            f"{tuple(image.shape)}"
        )
    if image.dtype == torch.uint8:
        return image.to("cpu", torch.float32) / 255
    if not image.dtype.is_floating_point:
        raise ValueError(f"the image must be uint8 or of floats, not {_dtype(image)}")
    return image.detach().to("cpu", torch.float32)


def _as_label(label: Any) -> int:
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
        raise ValueError(f"the label must be a whole number, not {_is(label)}")
    return int(label)


def _is(value: object) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} {_dtype(value)} {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.40}"


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _seed_generators(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key >> 1)


@contextmanager
def _generators_put_back() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
