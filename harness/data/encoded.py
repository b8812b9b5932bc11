"""Splits whose images lie compressed in files and are decoded as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harness.data.augment import Augmentation, Compose, with_cutout
from harness.data.datasets import (
    Batch,
    Deferred,
    ImageData,
    Pending,
    normalisation,
    normalised,
    to_device,
)
from harness.data.decode import U8, Job, Place, decode
from harness.data.workers import Ticket, Workers
from harness.errors import CorruptImage
from harness.schema import Data

I64 = npt.NDArray[np.int64]

# Per channel, of ImageNet's training images in 0..1, as commonly published.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 224


class Source(Protocol):
    """Where compressed images are, by sample number. Can be pickled."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Shape (n,)."""
        ...

    def place(self, sample: int) -> Place:
        """Where a sample's bytes are."""
        ...

    def name(self, sample: int) -> str:
        """What a person calls it."""
        ...


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """Images that are decoded in loading processes, or by the rank when they are taken."""

    source: Source = field(repr=False)
    side: int
    """Of the square images that training sees, in pixels."""
    workers: Workers
    """The train and the test split may share them."""
    prefetch: int
    """Micro-batches that each worker may be ahead."""
    skip: bool
    """A corrupt image is left out, instead of a CorruptImage error."""
    augmentation: Augmentation | None = None
    """Of the decoded images, after random crop and flip; `request` with ``augment`` applies it."""

    def __len__(self) -> int:
        return len(self.source.labels)

    @property
    def ahead(self) -> int:
        """See `harness.data.datasets.Split`."""
        return self.workers.count * self.prefetch

    def request(
        self, samples: I64, epochs: I64, seed: int, augment: bool, device: torch.device
    ) -> Pending:
        """See `harness.data.datasets.Split`. Raises IndexError for a sample outside the split and
        DataError if workers cannot be started."""
        if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < len(self):
            raise IndexError(f"a sample lies outside range({len(self)})")
        places = [self.source.place(sample) for sample in samples.tolist()]
        job = Job(places, self.side, augment, seed, epochs, samples)
        if self.workers.count:
            return _Decoding(self, job, device, self.workers.submit(job))
        return Deferred(lambda: self._decoded(job, device))

    def close(self) -> None:
        """See `harness.data.datasets.Split`."""
        self.workers.close()

    def batch(self, pixels: U8, wrong: Sequence[str], job: Job, device: torch.device) -> Batch:
        """What has been decoded, without the images with something ``wrong``; copies the pixels.

        Raises CorruptImage if there is one and none may be left out.
        """
        corrupt = tuple(
            f"{self.source.name(int(sample))}: {text}"
            for sample, text in zip(job.samples, wrong, strict=True)
            if text
        )
        if corrupt and not self.skip:
            raise CorruptImage(
                f"{corrupt[0]}; replace the image, or leave such images out with "
                "data.on_corrupt=skip"
            )
        images, samples, epochs = torch.from_numpy(pixels), job.samples, job.epochs
        if corrupt:
            good = np.flatnonzero([not text for text in wrong])
            images, samples, epochs = images[torch.from_numpy(good)], samples[good], epochs[good]
        labels = torch.from_numpy(self.source.labels[samples].astype(np.int64))
        images = to_device(images, device)
        if job.augment and self.augmentation is not None:
            images = self.augmentation(images, job.seed, epochs, samples)
        images = normalised(images, *self._normalisation)
        return Batch(images, to_device(labels, device), corrupt)

    def _decoded(self, job: Job, device: torch.device) -> Batch:
        pixels = np.empty((len(job.places), 3, self.side, self.side), np.uint8)
        return self.batch(pixels, decode(job, pixels), job, device)

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        return normalisation(_MEAN, _STD)


@dataclass(frozen=True, eq=False)
class _Decoding:
    """A micro-batch that workers are at."""

    split: EncodedSplit
    job: Job
    device: torch.device
    ticket: Ticket

    def take(self) -> Batch:
        """See `harness.data.datasets.Pending`."""
        try:
            pixels, wrong = self.split.workers.wait(self.ticket)
            return self.split.batch(pixels, wrong, self.job, self.device)
        finally:
            self.split.workers.release(self.ticket)

    def cancel(self) -> None:
        """See `harness.data.datasets.Pending`."""
        self.split.workers.release(self.ticket)


def encoded_data(data: Data, train: Source, test: Source, num_classes: int) -> ImageData:
    """A data set as ``data`` wants it; both splits share the workers."""
    side, workers = data.image_size or _SIDE, Workers(data.workers)
    cutout = with_cutout(Compose(()), data.cutout, _MEAN) if data.cutout else None

    def split(source: Source, augmentation: Augmentation | None) -> EncodedSplit:
        skip = data.on_corrupt == "skip"
        return EncodedSplit(source, side, workers, data.prefetch, skip, augmentation)

    shape = (3, side, side)
    return ImageData(data.dataset, split(train, cutout), split(test, None), num_classes, shape)
