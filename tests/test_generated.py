"""Data sets that are generated: synthetic images, and digits-enlarged."""

from __future__ import annotations

import pickle
import tracemalloc
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from harness.data import synthetic
from harness.data.augment import draws
from harness.data.datasets import Batch, ImageData, Split, load
from harness.data.digits import splits
from harness.data.digits_enlarged import AffineElastic, EnlargedSplit
from harness.data.sampler import GlobalBatchSampler
from harness.data.synthetic import SyntheticSplit
from harness.data_sizes import train_size
from harness.errors import DataError
from harness.models import build_model
from harness.schema import Data

CPU = torch.device("cpu")
I64 = npt.NDArray[np.int64]


def take(
    split: Split, samples: I64, epochs: I64 | None = None, seed: int = 0, augment: bool = False
) -> Batch:
    some = np.zeros_like(samples) if epochs is None else epochs
    return split.request(samples, some, seed, augment, CPU).take()


def generated(name: str, **keys: Any) -> ImageData:
    return load(Data(dataset=name, **keys))


@cache
def enlarged() -> ImageData:
    return generated("digits-enlarged", size=10**7)


@pytest.mark.parametrize("name", ["synthetic", "digits-enlarged"])
def test_the_size_is_as_planned(name: str) -> None:
    for size in (1, 77, None):
        data = Data(dataset=name, size=size)
        assert len(load(data).train) == train_size(data)


@pytest.mark.parametrize("name", ["synthetic", "digits-enlarged"])
@pytest.mark.parametrize("samples", [[10], [-1], [0, 11, 3]])
def test_a_sample_outside_the_split(name: str, samples: list[int]) -> None:
    data = generated(name, size=10)
    with pytest.raises(IndexError):
        take(data.train, np.array(samples))
    assert len(take(data.train, np.array([], dtype=np.int64)).labels) == 0


@pytest.mark.parametrize("name", ["synthetic", "digits-enlarged"])
def test_splits_can_be_sent_to_other_processes(name: str) -> None:
    data, samples = generated(name, size=5000), np.array([0, 4999, 7])
    before = take(data.train, samples, augment=True)
    sent = pickle.dumps(data.train)
    assert len(sent) < 2 * 2**20  # the digits are 1.1 MB; the pool is made anew
    after = take(pickle.loads(sent), samples, augment=True)  # noqa: S301 - made here
    assert torch.equal(before.images, after.images)
    assert torch.equal(before.labels, after.labels)


# ---- synthetic ----------------------------------------------------------------------------------


def test_synthetic_images_are_as_asked_for() -> None:
    data = generated("synthetic", size=2000, classes=7, channels=2, image_size=9)
    assert (data.name, data.num_classes, data.shape) == ("synthetic", 7, (2, 9, 9))
    assert (len(data.train), len(data.test)) == (2000, 1000)
    batch = take(data.train, np.arange(2000))
    assert batch.images.shape == (2000, 2, 9, 9)
    assert batch.images.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert sorted(set(batch.labels.tolist())) == list(range(7))
    assert len(torch.unique(batch.images.flatten(1), dim=0)) == 2000
    assert abs(float(batch.images.mean())) < 0.01
    assert abs(float(batch.images.std()) - 1) < 0.01


def test_synthetic_defaults_are_imagenet_like() -> None:
    data = generated("synthetic")
    assert (len(data.train), data.num_classes, data.shape) == (50_000, 1000, (3, 224, 224))


def test_a_pool_takes_64_mib_at_most() -> None:
    def pool(**keys: int) -> int:
        split = generated("synthetic", **keys).train
        assert isinstance(split, SyntheticSplit)
        return split.pool

    assert pool() == 2**26 // (3 * 224 * 224)
    assert pool(size=5) == 5
    assert pool(image_size=8192) == 1  # 201 MB each
    assert pool(channels=1, image_size=8192) == 1
    assert pool(channels=1, image_size=4096) == 4


def test_an_image_larger_than_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_POOL_BYTES", 100)
    data = generated("synthetic", size=3, channels=1, image_size=11, classes=5)
    batch = take(data.test, np.array([2, 0]))
    assert batch.images.shape == (2, 1, 11, 11)
    assert torch.equal(batch.images[0], batch.images[1])
    assert batch.labels.tolist() == [0, 0]


@given(samples=st.lists(st.integers(0, 10**12 - 1), min_size=1, max_size=20), period=st.just(4))
def test_a_sample_is_its_place_in_the_pool(samples: list[int], period: int) -> None:
    """Whatever seed, epoch, augmentation and batch; and its label goes with it."""
    split = SyntheticSplit(10**12, period, (1, 3, 3), classes=3)
    pool = take(split, np.arange(period))
    assert pool.labels.tolist() == [0, 1, 2, 0]
    numbers = np.array(samples)
    found = take(split, numbers, numbers, seed=samples[0], augment=True)
    places = torch.from_numpy(numbers % period)
    assert torch.equal(found.images, pool.images[places])
    assert torch.equal(found.labels, pool.labels[places])


def test_synthetic_images_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic._pool.cache_clear()
    data = generated("synthetic", size=100, image_size=8)
    first = take(data.train, np.arange(100))
    monkeypatch.setattr(torch, "randint", None)
    assert torch.equal(take(data.train, np.arange(100)).images, first.images)
    assert torch.equal(take(data.test, np.arange(50)).images, first.images[:50])


def test_synthetic_images_are_the_same_in_every_process() -> None:
    split = SyntheticSplit(10, 10, (1, 4, 4), classes=2)
    first = take(split, np.arange(10)).images
    synthetic._pool.cache_clear()
    torch.manual_seed(99)
    assert torch.equal(take(split, np.arange(10)).images, first)


def test_cutout_is_not_for_synthetic_images() -> None:
    with pytest.raises(ValidationError, match=r"data\.cutout has no meaning"):
        generated("synthetic", cutout=4)


# ---- digits-enlarged ----------------------------------------------------------------------------


def test_labels_are_those_of_the_training_digits() -> None:
    base, _ = splits()
    samples = np.random.default_rng(0).integers(0, 10**7, 500)
    digits = torch.from_numpy(samples % 1437)
    assert torch.equal(take(enlarged().train, samples).labels, base.labels[digits])


def test_the_first_are_the_digits_themselves() -> None:
    base, _ = splits()
    samples = np.arange(1437)
    assert torch.equal(take(enlarged().train, samples).images, base.batch(samples)[0])


def test_the_test_digits_stay_as_they_are() -> None:
    _, test = splits()
    data = enlarged()
    assert len(data.test) == 360
    samples = np.arange(360)
    assert torch.equal(take(data.test, samples).images, test.batch(samples)[0])


def test_variants_differ_and_stay_near_their_digit() -> None:
    base, _ = splits()
    digit, count = 5, 40
    images = take(enlarged().train, np.arange(count) * 1437 + digit).images
    assert len(torch.unique(images.flatten(1), dim=0)) == count
    flat = images.flatten(1)
    other = take(enlarged().train, np.arange(count) * 1437 + digit + 1).images.flatten(1)
    assert int((base.labels[digit] != base.labels[digit + 1]).sum()) == 1
    inside = torch.corrcoef(flat)[0, 1:]
    across = torch.corrcoef(torch.cat([flat[:1], other]))[0, 1:]
    assert float(inside.min()) > 0.2
    assert float(inside.mean()) > float(across.mean()) + 0.1


@given(
    cuts=st.lists(st.integers(1, 63), max_size=6),
    order=st.permutations(range(64)),
    seed=st.integers(0, 2**32),
    augment=st.booleans(),
)
def test_pixels_do_not_depend_on_the_batch(
    cuts: list[int], order: list[int], seed: int, augment: bool
) -> None:
    rng, split = np.random.default_rng(seed), enlarged().train
    samples, epochs = rng.integers(0, 10**7, 64), rng.integers(0, 40, 64)
    samples[:3] = rng.integers(0, 1437, 3)
    whole = take(split, samples, epochs, seed, augment)
    for low, high in pairwise(sorted({0, 64, *cuts})):
        some = np.array(order[low:high])
        part = take(split, samples[some], epochs[some], seed, augment)
        assert torch.equal(part.images, whole.images[torch.from_numpy(some)])
        assert torch.equal(part.labels, whole.labels[torch.from_numpy(some)])


def test_only_the_augmentation_follows_seed_and_epoch() -> None:
    split, samples = enlarged().train, np.array([0, 1437 * 3 + 2])
    plain = take(split, samples, samples * 0, seed=1).images
    assert torch.equal(plain, take(split, samples, samples * 0 + 7, seed=2).images)
    augmented = take(split, samples, samples * 0, seed=1, augment=True).images
    assert not torch.equal(plain[0], augmented[0])
    assert not torch.equal(plain[1], augmented[1])
    for epoch, seed in ((1, 1), (0, 2)):
        other = take(split, samples, samples * 0 + epoch, seed, augment=True).images
        assert not torch.equal(augmented, other)


def test_variants_of_a_digit_are_augmented_apart() -> None:
    split = EnlargedSplit(splits()[0], 10**6, AffineElastic(), AffineElastic(0, 0, 0, 0, 0))
    images = take(split, np.array([1, 1438]), augment=True).images
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("size", [1, 1436, 1438, 5000])
def test_an_epoch_takes_every_variant_once(size: int) -> None:
    """As (digit, variant), which is what a sample's number stands for."""
    sampler = GlobalBatchSampler(size, seed=3, micro_batch=64)
    seen = np.concatenate([micro.samples for micro in sampler.micro_batches(0, size)])
    pairs = sorted(zip(*np.divmod(seen, 1437), strict=True))
    assert pairs == [(sample // 1437, sample % 1437) for sample in range(size)]
    labels = take(generated("digits-enlarged", size=size).train, np.sort(seen)).labels
    assert torch.equal(labels, splits()[0].labels[torch.arange(size) % 1437])


def test_memory_does_not_grow_with_the_size() -> None:
    def peak(size: int) -> int:
        tracemalloc.start()
        try:
            data = generated("digits-enlarged", size=size)
            take(data.train, np.arange(size - 64, size))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2000)  # imports and caches
    assert peak(10**9) < 1.1 * peak(2000)


def test_more_than_can_be_told_apart_is_refused() -> None:
    most = 1437 * 2**20
    assert len(generated("digits-enlarged", size=most).train) == most
    with pytest.raises(DataError, match=f"at most {most}"):
        generated("digits-enlarged", size=most + 1)


def test_the_displacement_is_the_spline_of_its_random_numbers() -> None:
    """Against the textbook's cubic B-spline, one pixel and one sample at a time."""
    samples, epochs = np.array([3, 8]), np.array([1, 5])
    found = AffineElastic(strength=3)._displacement(4, epochs, samples)
    knots = np.stack([draws(4, epochs, samples, 14, stream) for stream in range(21, 28)])
    rng = np.random.default_rng(0)
    for axis, y, x, m in zip(*(rng.integers(0, top, 60) for top in (2, 28, 28, 2)), strict=True):
        value = 0.0
        for row in range(7):
            for column in range(7):
                weight = spline((y + 0.5) / 7 + 1 - row) * spline((x + 0.5) / 7 + 1 - column)
                value += weight * float(knots[row, axis * 7 + column, m])
        assert abs(value * 3 * 2 / 28 - found[axis, y, x, m]) < 1e-6


def spline(t: float) -> float:
    t = abs(t)
    return max(0.0, 2 / 3 - t * t + t**3 / 2 if t < 1 else max(0.0, 2 - t) ** 3 / 6)


def test_no_amplitude_no_change() -> None:
    images, samples = torch.rand(3, 1, 28, 28) * 255, np.arange(3)
    same = AffineElastic(0, 0, 0, 0, 0)(images.clone(), 0, samples, samples)
    torch.testing.assert_close(same, images, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="28 × 28, not 32 × 28"):
        AffineElastic()(torch.rand(1, 1, 32, 28), 0, samples[:1], samples[:1])


def test_the_displacement_is_smooth_and_as_strong_as_said() -> None:
    samples = np.arange(2000)
    pixels = AffineElastic(strength=2)._displacement(0, samples, samples) * 14
    assert float(np.abs(pixels).max()) < 2
    assert abs(float(pixels.std()) / (2 * 0.28) - 1) < 0.05
    assert float(np.abs(np.diff(pixels, axis=1)).max()) < 2 * 2 / 7


@pytest.mark.slow
def test_lenet5_learns_from_variants_what_it_learns_from_digits() -> None:
    plain = [accuracy_after_training(generated("digits"), seed) for seed in range(3)]
    many = [accuracy_after_training(generated("digits-enlarged"), seed) for seed in range(3)]
    assert sorted(many)[1] > 0.95
    assert sorted(many)[1] > sorted(plain)[1] - 0.01


def accuracy_after_training(data: ImageData, seed: int, samples: int = 25_000) -> float:
    """Without augmentation on top."""
    model = build_model("lenet5", data.num_classes, data.shape, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for micro in GlobalBatchSampler(len(data.train), seed, 64).micro_batches(0, samples):
        batch = take(data.train, micro.samples, micro.epochs, seed)
        optimizer.zero_grad()
        cross_entropy(model(batch.images), batch.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    batch = take(data.test, np.arange(len(data.test)))
    with torch.no_grad():
        return float((model(batch.images).argmax(dim=1) == batch.labels).float().mean())
