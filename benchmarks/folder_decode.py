"""Decoding an image folder: images/s and first batch, beside torchvision's ImageFolder, DataLoader.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/folder_decode.py [--repeats 7] [--images 512]

Prints Markdown tables: the training transforms to 224 pixels, two workers each, on photographs made
for it. A repeat runs all loaders in turn, so that a busy spell slows all alike; ratios are of one
repeat. All decode with the same Pillow and end with normalised float32 batches in the main process.
"of all": the first batch of all, which starts the processes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.data.datasets import CPU, ImageData, Pending, load
from harness.data.sampler import GlobalBatchSampler
from harness.schema import Data
from harness.torchvision_ops import import_tolerantly

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 8


def photograph(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Smooth noise of several sizes, with as much grain as makes a JPEG of 0.5 bytes a pixel."""
    total = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 160):
        shape = (max(2, height * cells // 512), max(2, width * cells // 512), 3)
        small = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        smooth = small.resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(smooth, np.float64) * (4 / cells) ** 0.5
    total = (total - total.min()) / (total.max() - total.min()) * 255
    total += rng.normal(0, 14, total.shape)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def write_folder(root: Path, images: int, width: int, height: int) -> float:
    """ROOT/train and ROOT/val; returns the mean size of a file in KB."""
    rng, sizes = np.random.default_rng(0), []
    for i in range(images):
        path = root / "train" / f"class{i % CLASSES}" / f"{i:05}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(width, height, rng).save(path, quality=90)
        sizes.append(path.stat().st_size)
    (root / "val" / "class0").mkdir(parents=True)
    photograph(width, height, rng).save(root / "val" / "class0" / "0.JPEG")
    return statistics.mean(sizes) / 1000


def ours(data: ImageData, batch: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch as the trainer asks for it."""
    size = len(data.train)
    sampler = GlobalBatchSampler(size, 0, batch)
    micros = sampler.micro_batches(epoch * size, size)
    waiting: deque[Pending] = deque()
    for micro in micros:
        waiting.append(data.train.request(micro.samples, micro.epochs, 0, True, CPU))
        if len(waiting) > max(1, data.train.ahead):
            taken = waiting.popleft().take()
            yield taken.images, taken.labels
    while waiting:
        taken = waiting.popleft().take()
        yield taken.images, taken.labels


def torchvision_loader(
    root: Path, batch: int, workers: int, side: int, v2: bool
) -> torch.utils.data.DataLoader[tuple[Tensor, Tensor]]:
    """As the reference recipes have it, each in its version of the transforms."""
    t = import_tolerantly("torchvision.transforms.v2" if v2 else "torchvision.transforms")
    folder = import_tolerantly("torchvision.datasets").ImageFolder
    tensor = [t.PILToTensor(), t.ToDtype(torch.float32, scale=True)] if v2 else [t.ToTensor()]
    crop = [t.RandomResizedCrop(side), t.RandomHorizontalFlip()]
    transform = t.Compose([*crop, *tensor, t.Normalize(MEAN, STD)])
    return torch.utils.data.DataLoader(
        folder(str(root / "train"), transform),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
    )


def timed(epoch: Callable[[], Iterator[tuple[Tensor, Tensor]]], images: int) -> tuple[float, float]:
    """(images/s, seconds to the first batch) of an epoch."""
    begin = time.perf_counter()
    first, count = 0.0, 0
    for pixels, _ in epoch():
        first = first or time.perf_counter() - begin
        count += len(pixels)
    assert count == images  # noqa: S101
    return count / (time.perf_counter() - begin), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", default="500x375")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    width, height = map(int, asked.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_folder(root, asked.images, width, height)
        print(
            f"{asked.images} JPEGs of {width} × {height} and {size:.0f} KB to {asked.side} pixels"
        )
        compare(root, asked)


def compare(root: Path, asked: argparse.Namespace) -> None:
    begin = time.perf_counter()
    settings = {"root": str(root), "workers": asked.workers, "image_size": asked.side}
    data = load(Data.model_validate({"dataset": "folder", **settings}))
    loaders = {
        name: torchvision_loader(root, asked.batch, asked.workers, asked.side, v2)
        for name, v2 in (("ImageFolder, transforms", False), ("ImageFolder, transforms.v2", True))
    }
    epochs: dict[str, Callable[[int], Iterator[tuple[Tensor, Tensor]]]] = {
        "ours": lambda epoch: ours(data, asked.batch, epoch)
    }
    for name, loader in loaders.items():
        epochs[name] = lambda _, loader=loader: iter(loader)  # type: ignore[misc]
    speeds: dict[str, list[float]] = {name: [] for name in epochs}
    starts: dict[str, list[float]] = {name: [] for name in epochs}
    cold: dict[str, float] = {}
    for repeat in range(-1, asked.repeats):  # the first starts the processes
        for name, epoch in epochs.items():
            speed, first = timed(lambda: epoch(repeat + 1), asked.images)  # noqa: B023
            if repeat < 0:
                cold[name] = first
            else:
                speeds[name].append(speed)
                starts[name].append(first)
    data.train.close()
    print(f"({time.perf_counter() - begin:.0f} s)\n")
    table(speeds, starts, cold)


def table(
    speeds: dict[str, list[float]], starts: dict[str, list[float]], cold: dict[str, float]
) -> None:
    print("| loader | images/s | lowest to highest | ours is × | first batch, ms | of all, ms |")
    print("|---|---|---|---|---|---|")
    for name, found in speeds.items():
        ratios = [a / b for a, b in zip(speeds["ours"], found, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        row = f"| {name} | {statistics.median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f}"
        row += f" | {'' if name == 'ours' else ratio} "
        print(f"{row}| {1e3 * statistics.median(starts[name]):.0f} | {1e3 * cold[name]:.0f} |")


if __name__ == "__main__":
    main()
