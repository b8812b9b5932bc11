"""Images/s of feeding CIFAR: crop, flip and normalise, against torchvision's usual pipeline.

    .venv/bin/python benchmarks/cifar_pipeline.py [--images 50000] [--rounds 5]

All on one core, to which this process and its workers are bound, and with one thread each. The
images are random bytes of CIFAR-10's size in memory (what is in them changes nothing here); a
DataLoader feeds from memory too, as torchvision.datasets.CIFAR10 does. An epoch is one pass over
the images in batches of 128, in an order and with augmentation of its own; DataLoaders keep their
workers from epoch to epoch. Rounds alternate between the pipelines; the ratio is taken within a
round. A second table has the sampler alone: time to the first batch of an epoch, and the memory
it takes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from harness.data.augment import CropFlip
from harness.data.datasets import ImageSplit
from harness.data.feed import Feed
from harness.data.sampler import GlobalBatchSampler
from harness.torchvision_ops import import_tolerantly

v2 = import_tolerantly("torchvision.transforms.v2")

BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CPU = torch.device("cpu")

PILLOW = v2.Compose(
    [
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)
TENSOR = v2.Compose(
    [
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


class Pictures(Dataset):  # type: ignore[type-arg]
    """What torchvision.datasets.CIFAR10 does for each image: an array becomes a PIL image."""

    def __init__(self, images: np.ndarray, labels: list[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return PILLOW(Image.fromarray(self.images[index])), self.labels[index]


class Tensors(Dataset):  # type: ignore[type-arg]
    """A tuned one: the transforms work on tensors of bytes."""

    def __init__(self, images: torch.Tensor, labels: list[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return TENSOR(self.images[index]), self.labels[index]


def ours(split: ImageSplit) -> Callable[[], Iterator[torch.Tensor]]:
    sampler = GlobalBatchSampler(len(split), 0, BATCH)
    feed = Feed(split, sampler, 1, 0, True, CPU)
    epoch = iter(range(10**6))

    def once() -> Iterator[torch.Tensor]:
        seen = len(split) * next(epoch)
        for _, batch in feed.update(seen, len(split)):
            yield batch.images

    return once


def loader(data: Dataset, workers: int) -> Callable[[], Iterator[torch.Tensor]]:  # type: ignore[type-arg]
    loads = DataLoader(
        data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    def once() -> Iterator[torch.Tensor]:
        for images, _ in loads:
            yield images

    return once


def rate(epoch: Callable[[], Iterator[torch.Tensor]]) -> float:
    begin, count = time.perf_counter(), 0
    for images in epoch():
        count += len(images)
    return count / (time.perf_counter() - begin)


def first_batch(size: int) -> tuple[float, float]:
    """(milliseconds, KiB) until the first batch of an epoch of ``size`` samples is known."""
    spent = []
    for epoch in range(21):
        begin = time.perf_counter()
        next(GlobalBatchSampler(size, 1, BATCH).micro_batches(size * epoch, BATCH))
        spent.append(1e3 * (time.perf_counter() - begin))
    tracemalloc.start()
    for _ in GlobalBatchSampler(size, 2, BATCH).micro_batches(size, 400 * BATCH):
        pass
    peak = tracemalloc.get_traced_memory()[1] / 1024
    tracemalloc.stop()
    return statistics.median(spent), peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "This DataLoader will create 2 worker processes")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (options.images, 3, 32, 32)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (options.images,), generator=generator)
    pictures = images.permute(0, 2, 3, 1).contiguous().numpy()
    subjects = {
        "this project": ours(ImageSplit(images, labels, MEAN, STD, CropFlip(4))),
        "DataLoader, 2 workers, transforms.v2 on PIL images": loader(
            Pictures(pictures, labels.tolist()), 2
        ),
        "the same without workers": loader(Pictures(pictures, labels.tolist()), 0),
        "DataLoader, 2 workers, transforms.v2 on tensors": loader(
            Tensors(images, labels.tolist()), 2
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(options.rounds + 1):
        for name, epoch in subjects.items():
            found = rate(epoch)
            if turn:  # the first one starts workers and fills caches
                rates[name].append(found)
    base = rates["this project"]
    print("| pipeline | images/s, median | fastest to slowest | ours is so many times as fast |")
    print("|---|---|---|---|")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(base, found, strict=True))
        print(
            f"| {name} | {statistics.median(found):,.0f} | {max(found):,.0f} to {min(found):,.0f} "
            f"| {ratio:.1f} |"
        )
    print(
        "\n| samples in an epoch | first batch, ms | memory for 400 batches, KiB |\n|---|---|---|"
    )
    for size in (50_000, 1_281_167, 1_000_000_000):
        spent, peak = first_batch(size)
        print(f"| {size:,} | {spent:.2f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
