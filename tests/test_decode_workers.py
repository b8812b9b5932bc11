"""Decoding: the pixels, whoever decodes them; loading processes, however they or their rank end."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encoded, photo, write
from PIL import Image
from support import ROOT

from harness.data import decode as decoding
from harness.data.datasets import CPU, Batch, ImageData, load
from harness.data.decode import Job, Place, crop_draws, decode, random_box
from harness.data.encoded import EncodedSplit
from harness.data.workers import Workers
from harness.errors import DataError
from harness.schema import Data
from harness.torchvision_ops import import_tolerantly

SIDE, IMAGES = 32, 23
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of photographs of many shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(IMAGES):
        image = photo(40 + 13 * i % 170, 36 + 29 * i % 140, seed=i)
        kind = ("JPEG", "PNG", "WEBP")[i % 3]
        write(folder / f"train/{'ab'[i % 2]}/{i:02}.{kind}", encoded(image, kind))
    write(folder / "val/a/1.jpg")
    return folder


def data_of(root: Path, **more: object) -> ImageData:
    keys: dict[str, object] = {"dataset": "folder", "root": str(root), "image_size": SIDE}
    return load(Data.model_validate(keys | more))


def take(data: ImageData, samples: npt.ArrayLike, epoch: int = 0, augment: bool = True) -> Batch:
    index = np.asarray(samples, np.int64)
    return data.train.request(index, np.full_like(index, epoch), 5, augment, CPU).take()


def pids(data: ImageData) -> list[int]:
    assert isinstance(data.train, EncodedSplit)
    return data.train.workers.pids


def alive(pid: int) -> bool:
    """And no zombie, as an orphan is one until something reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(processes: list[int]) -> bool:
    """Wait until none of them is alive."""
    for _ in range(600):
        if not any(map(alive, processes)):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def three(root: Path) -> Iterator[ImageData]:
    data = data_of(root, workers=3)
    yield data
    data.train.close()


@pytest.fixture(scope="module")
def plain(root: Path) -> ImageData:
    return data_of(root)


# ---- the same pixels ----------------------------------------------------------------------------


def test_workers_change_no_pixel(root: Path, plain: ImageData, three: ImageData) -> None:
    one, everything = data_of(root, workers=1), np.arange(IMAGES)
    try:
        for augment in (True, False):
            expected = take(plain, everything, 3, augment)
            assert expected.images.shape == (IMAGES, 3, SIDE, SIDE)
            assert expected.images.dtype == torch.float32
            assert expected.labels.tolist() == [0] * 12 + [1] * 11
            for data in (one, three):
                found = take(data, everything, 3, augment)
                assert torch.equal(found.images, expected.images)
                assert torch.equal(found.labels, expected.labels)
    finally:
        one.train.close()


@settings(max_examples=15)
@given(order=st.permutations(range(IMAGES)), cut=st.integers(0, IMAGES), epoch=st.integers(0, 3))
def test_the_batch_changes_no_pixel(
    plain: ImageData, three: ImageData, order: list[int], cut: int, epoch: int
) -> None:
    whole = take(plain, range(IMAGES), epoch).images
    parts = [order[:cut], order[cut:]]
    index = np.array(order)
    waiting = [
        three.train.request(np.array(part, np.int64), np.full(len(part), epoch), 5, True, CPU)
        for part in parts
    ]
    found = [pending.take().images for pending in reversed(waiting)]  # in any order
    assert torch.equal(torch.cat(found[::-1]), whole[torch.from_numpy(index)])


def test_pixels_depend_on_seed_epoch_and_sample(plain: ImageData) -> None:
    index, zero = np.array([4]), np.array([0])
    base = plain.train.request(index, zero, 5, True, CPU).take().images
    assert torch.equal(base, take(plain, [4]).images)
    assert not torch.equal(base, take(plain, [4], epoch=1).images)
    assert not torch.equal(base, plain.train.request(index, zero, 6, True, CPU).take().images)
    assert not torch.equal(base, take(plain, [4], augment=False).images)
    draws = crop_draws(0, np.zeros(9, np.int64), np.arange(9))
    assert len(np.unique(draws)) == draws.size  # nor do two samples share a number


def test_normalisation_is_imagenets(tmp_path: Path) -> None:
    grey = encoded(Image.new("RGB", (50, 50), (10, 128, 255)), "PNG")
    write(tmp_path / "train/a/1.png", grey)
    write(tmp_path / "val/a/1.png", grey)
    images = take(data_of(tmp_path), [0]).images
    expected = (torch.tensor([10, 128, 255]).view(3, 1, 1) / 255 - MEAN) / STD
    assert (images - expected).abs().max() < 1e-5


def test_cutout_is_for_training_only(root: Path, plain: ImageData, three: ImageData) -> None:
    cut = data_of(root, cutout=8)
    differs = (take(cut, range(8)).images != take(plain, range(8)).images).any(1).sum((1, 2))
    assert ((differs >= 15) & (differs <= 64)).all()
    wiped = take(cut, range(8)).images[take(cut, range(8)).images != take(plain, range(8)).images]
    assert wiped.abs().max() < 0.02  # the mean, rounded to a byte
    same = take(cut, range(8), augment=False).images
    assert torch.equal(same, take(plain, range(8), augment=False).images)
    assert cut.test.request(np.zeros(1, np.int64), np.zeros(1), 0, True, CPU).take().corrupt == ()


def test_ahead(root: Path, plain: ImageData, three: ImageData) -> None:
    assert (plain.train.ahead, three.train.ahead, three.test.ahead) == (0, 12, 12)
    assert data_of(root, workers=2, prefetch=5).train.ahead == 10


@pytest.mark.parametrize("samples", [[-1], [0, IMAGES]])
def test_a_sample_outside_the_split(plain: ImageData, samples: list[int]) -> None:
    with pytest.raises(IndexError, match=f"outside range.{IMAGES}"):
        take(plain, samples)


# ---- what is decoded ----------------------------------------------------------------------------


def job(path: Path, side: int = SIDE, augment: bool = False, count: int = 1) -> Job:
    place, samples = Place(os.fsencode(path)), np.arange(count)
    return Job([place] * count, side, augment, 0, samples, samples)


def decoded(
    path: Path, side: int = SIDE, augment: bool = False
) -> tuple[npt.NDArray[np.uint8], str]:
    pixels = np.zeros((1, 3, side, side), np.uint8)
    (wrong,) = decode(job(path, side, augment), pixels)
    return pixels[0], wrong


SIZES = [(40, 30), (30, 40), (99, 100), (37, 37), (500, 375), (41, 300), (36, 36), (1, 1), (3, 400)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 32, 33])
def test_evaluation_is_torchvisions(tmp_path: Path, size: tuple[int, int], side: int) -> None:
    t = import_tolerantly("torchvision.transforms")
    image = photo(*size, seed=1)
    expected = t.Compose([t.Resize(round(side * 256 / 224)), t.CenterCrop(side)])(image)
    found, wrong = decoded(write(tmp_path / "x.png", encoded(image, "PNG")), side)
    assert wrong == ""
    off = np.abs(found.transpose(1, 2, 0).astype(int) - np.asarray(expected))
    # Of lines the middle alone is resized; Pillow takes that box in single precision.
    assert off.max() <= (1 if max(size) > 8 * min(size) else 0)


def test_a_line_of_pixels_takes_no_memory(tmp_path: Path) -> None:
    """Resized as a whole it would have 24 GB."""
    path = write(tmp_path / "x.png", encoded(Image.new("L", (1, 30_000), 9), "PNG"))
    found, wrong = decoded(path, 512)
    assert wrong == ""
    assert (found == 9).all()


def test_a_box_is_what_is_resized(tmp_path: Path) -> None:
    path = write(tmp_path / "x.png", encoded(photo(90, 70), "PNG"))
    box, flip = random_box(90, 70, crop_draws(0, np.zeros(1, np.int64), np.zeros(1, np.int64))[0])
    expected = photo(90, 70).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    if flip:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(decoded(path, augment=True)[0].transpose(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize("augment", [True, False])
def test_large_jpegs_are_decoded_at_a_fraction(tmp_path: Path, augment: bool) -> None:
    """The same picture, in less time: few pixels are off by more than a JPEG is anyhow."""
    image, sizes = photo(1000, 800, seed=3), []
    path = write(tmp_path / "x.jpg", encoded(image, quality=95))
    draft = decoding.JpegImageFile.draft

    def watch(self: decoding.JpegImageFile, *asked: object) -> object:
        answer = draft(self, *asked)  # type: ignore[arg-type]
        sizes.append(self.size)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding.JpegImageFile, "draft", watch)
        found, _ = decoded(path, augment=augment)
        patch.setattr(decoding, "_fraction", lambda box, size: 1)
        full, _ = decoded(path, augment=augment)
    assert sizes
    assert sizes[0][0] in (125, 250, 500)
    assert np.abs(found.astype(int) - full).mean() < 1.0


@given(wide=st.floats(1, 5000), high=st.floats(1, 5000), side=st.integers(1, 512))
def test_a_fraction_leaves_pixels_to_spare(wide: float, high: float, side: int) -> None:
    scale = decoding._fraction((3.0, 4.0, 3.0 + wide, 4.0 + high), (side, side))
    assert scale in (1, 2, 4, 8)
    least = min(wide, high) / side
    assert scale == 1 or least / scale >= 1.5 - 1e-9
    assert scale == 8 or least / (2 * scale) < 1.5 + 1e-9


@given(width=st.integers(1, 4000), height=st.integers(1, 4000), sample=st.integers(0, 2**40 - 1))
def test_boxes_lie_in_the_image(width: int, height: int, sample: int) -> None:
    one = np.array([sample])
    box, _ = random_box(width, height, crop_draws(1, one % 7, one)[0].tolist())
    assert 0 <= box[0] < box[2] <= width
    assert 0 <= box[1] < box[3] <= height
    assert all(edge == int(edge) for edge in box)


@given(width=st.integers(1, 300), height=st.integers(1, 300), draw=st.floats(0, 1 - 2**-53))
def test_the_last_draw_before_one_stays_inside(width: int, height: int, draw: float) -> None:
    for draws in ([draw] * 23, [1 - 2**-53] * 23, [0.0] * 23):
        (left, top, right, bottom), _ = random_box(width, height, draws)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def ranks_apart(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Kolmogorov and Smirnov's distance of two samples, in units of its 99.9 % quantile."""
    both = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max() / (1.95 * (1 / len(a) + 1 / len(b)) ** 0.5))


@pytest.mark.parametrize("size", [(500, 375), (200, 600), (800, 90)])
def test_crops_follow_torchvisions_law(size: tuple[int, int]) -> None:
    count, (width, height) = 3000, size
    crop = import_tolerantly("torchvision.transforms").RandomResizedCrop
    torch.manual_seed(0)
    image = Image.new("L", size)
    theirs = np.array(
        [crop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)], np.float64
    )
    draws = crop_draws(0, np.zeros(count, np.int64), np.arange(count)).tolist()
    boxes, flips = zip(*(random_box(width, height, row) for row in draws), strict=True)
    left, top, right, bottom = np.array(boxes, np.float64).T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)
    for kind in range(4):
        assert ranks_apart(ours[:, kind], theirs[:, kind]) < 1
    assert ranks_apart(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]) < 1
    assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / count**0.5
    share = ours[:, 2] * ours[:, 3] / (width * height)
    assert share.max() <= 1.0


def test_area_is_even_and_aspect_log_even() -> None:
    """In an image so high that any box fits: shares in [0.08, 1) are cut by nothing."""
    count, side = 4000, 20_000
    draws = crop_draws(3, np.zeros(count, np.int64), np.arange(count))
    draws[:, 0] *= 0.5  # small boxes only, which fit whatever their aspect
    boxes = np.array([random_box(side, side, row)[0] for row in draws.tolist()])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = wide * high / side**2
    even = (np.arange(count) + 0.5) / count
    assert ranks_apart(area, 0.08 + 0.92 * 0.5 * even) < 1
    assert ranks_apart(np.log(wide / high), (2 * even - 1) * log(4 / 3)) < 1


@given(st.floats(-0.3, 0.3))
def test_exponential(x: float) -> None:
    assert abs(decoding._exp(x) - exp(x)) < 1e-15 * 2


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(3, 0).repeat(3, 1)


def png16() -> bytes:
    """A grey PNG of 16 bits."""
    return encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG")


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encoded(Image.fromarray(GREY), "PNG"), 0),
        (encoded(Image.fromarray(GREY).convert("RGB"), "PNG"), 0),
        (encoded(Image.fromarray(GREY).convert("RGBA"), "PNG"), 0),
        (encoded(Image.fromarray(GREY).convert("LA"), "PNG"), 0),
        (encoded(Image.fromarray(GREY).convert("P"), "PNG"), 0),
        (encoded(Image.fromarray(GREY).convert("P"), "PNG", transparency=b"\0\1\2"), 0),
        (png16(), 0),
        (encoded(Image.fromarray(GREY), "BMP"), 0),
        (encoded(Image.fromarray(GREY), "PPM"), 0),
        (encoded(Image.fromarray(GREY).convert("RGB"), "PPM"), 0),
        (encoded(Image.fromarray(GREY).convert("RGB"), "WEBP", lossless=True), 0),
        (encoded(Image.fromarray(GREY), quality=100), 3),
        (encoded(Image.fromarray(GREY).convert("RGB"), quality=100), 3),
        (encoded(Image.fromarray(GREY).convert("RGB"), quality=100, progressive=True), 3),
        (encoded(Image.fromarray(GREY).convert("RGB").convert("CMYK"), quality=100), 3),
    ],
)
def test_every_kind_becomes_rgb(tmp_path: Path, data: bytes, tolerance: int) -> None:
    expected, _ = decoded(write(tmp_path / "rgb", encoded(Image.fromarray(GREY), "PNG")))
    found, wrong = decoded(write(tmp_path / "x", data))
    assert wrong == ""
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    assert np.ptp(expected) > 100


def test_exif_orientation_is_left_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = write(tmp_path / "turned.jpg", encoded(photo(80, 40), exif=exif))
    straight = write(tmp_path / "straight.jpg", encoded(photo(80, 40)))
    assert np.array_equal(decoded(turned)[0], decoded(straight)[0])


# ---- what cannot be decoded ---------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed(width: int, height: int) -> bytes:
    """A PNG that claims to be of that size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


JPEG, PNG = encoded(photo(64, 48)), encoded(photo(64, 48), "PNG")
BROKEN = {
    "zero bytes": (b"", "zero bytes"),
    "text": (b"<!DOCTYPE html>" * 50, "not a JPEG, PNG, WebP, BMP or PPM image"),
    "another kind": (encoded(photo(9, 9), "GIF"), "not a JPEG, PNG"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "runcated"),
    "most of a JPEG": (JPEG[:-20], "truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated"),
    "head of a JPEG": (JPEG[:100], "runcated"),
    "bomb": (claimed(20_000, 20_000), "pixels"),
    "too large": (claimed(16_000, 11_200), "179200000|too many"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files(tmp_path: Path, data: bytes, message: str) -> None:
    _, wrong = decoded(write(tmp_path / "x.jpg", data))
    assert any(part in wrong for part in message.split("|")), wrong


def test_missing_files(tmp_path: Path) -> None:
    assert decoded(tmp_path / "no.jpg")[1] == "cannot be read (No such file or directory)"
    assert decoded(tmp_path)[1] == "cannot be read (Is a directory)"
    path = write(tmp_path / "x.jpg")
    path.chmod(0)
    if os.geteuid() != 0:
        assert decoded(path)[1] == "cannot be read (Permission denied)"


@settings(max_examples=150)
@given(
    whole=st.sampled_from([JPEG, PNG, encoded(photo(30, 20), "WEBP"), encoded(photo(9, 9), "PPM")]),
    at=st.integers(0, 2**20),
    junk=st.binary(max_size=30),
    cut=st.integers(0, 200),
)
def test_damage_is_named_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, at: int, junk: bytes, cut: int
) -> None:
    at %= len(whole)
    path = write(
        tmp_path_factory.getbasetemp() / "damaged.jpg", whole[:at] + junk + whole[at + cut :]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, wrong = decoded(path, augment=True)
    assert isinstance(wrong, str)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_stop_or_are_left_out(tmp_path: Path, workers: int) -> None:
    for i in range(6):
        write(tmp_path / f"train/a/{i}.jpg", seed=i)
    write(tmp_path / "train/a/1.jpg", JPEG[:-50])
    write(tmp_path / "train/a/4.jpg", b"text")
    write(tmp_path / "val/a/1.jpg")
    stops, skips = (data_of(tmp_path, workers=workers, on_corrupt=how) for how in ("stop", "skip"))
    try:
        found = f"{tmp_path}/train/a/1.jpg: .*truncated.*data.on_corrupt=skip"
        with pytest.raises(DataError, match=found):
            take(stops, range(6))
        left = take(skips, range(6))
        assert torch.equal(left.images, take(stops, [0, 2, 3, 5]).images)
        assert len(left.labels) == 4
        assert [text.partition(": ")[0] for text in left.corrupt] == [
            f"{tmp_path}/train/a/1.jpg",
            f"{tmp_path}/train/a/4.jpg",
        ]
        (tmp_path / "train/a/0.jpg").unlink()
        none = take(skips, [0, 1])
        assert (none.images.shape, len(none.corrupt)) == ((0, 3, SIDE, SIDE), 2)
        assert "No such file" in none.corrupt[0]
    finally:
        stops.train.close()
        skips.train.close()


# ---- processes ----------------------------------------------------------------------------------


def test_workers_are_light_and_leave_no_name(three: ImageData) -> None:
    take(three, [0])
    assert len(pids(three)) == 3
    for pid in pids(three):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "numpy" in maps
        assert not any(name in maps for name in ("torch", "mpi", "horovod", "pydantic"))
        files = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        assert "/memfd:harness-images (deleted)" in files
        named = "/dev/shm"  # noqa: S108
        assert not any(name.startswith(named) for name in (*files, *maps.split()))


def test_what_workers_import() -> None:
    heavy = ("torch", "pydantic", "multiprocessing", "yaml", "harness.schema")
    code = f"import sys, harness.data.workers; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_signals_are_the_ranks_own(three: ImageData) -> None:
    before = take(three, range(IMAGES))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        for pid in pids(three):
            os.kill(pid, number)
    assert torch.equal(take(three, range(IMAGES)).images, before.images)
    assert all(map(alive, pids(three)))


def test_a_killed_worker_is_an_error_and_not_a_hang(root: Path) -> None:
    data = data_of(root, workers=2)
    try:
        take(data, [0])
        os.kill(pids(data)[0], signal.SIGKILL)
        os.kill(pids(data)[1], signal.SIGSEGV)
        with pytest.raises(DataError, match=r"was killed by (SIGKILL.*memory|signal 11)"):
            take(data, range(IMAGES))
        data.train.close()
        assert len(take(data, range(IMAGES)).images) == IMAGES  # by new ones
    finally:
        data.train.close()


def test_one_of_two_killed_while_the_other_works(tmp_path: Path) -> None:
    """At once, though the other one could go on alone."""
    workers, path = Workers(2), write(tmp_path / "x.png", PNG)
    try:
        for _ in range(3):
            assert workers.wait(workers.submit(job(path)))[1] == [""]
        os.kill(workers.pids[0], signal.SIGKILL)
        while psutil.Process(workers.pids[0]).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with pytest.raises(DataError, match=f"process {workers.pids[0]} was killed by SIGKILL"):
            workers.wait(workers.submit(job(path)))
    finally:
        workers.close()


def test_a_pipe_in_place_of_an_image_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")
    workers = Workers(1)
    try:
        said = workers.wait(workers.submit(job(tmp_path / "never")))[1]
        assert said == ["is not a regular file"]
    finally:
        workers.close()


def test_deep_grey_takes_no_more_memory_than_a_few_copies(tmp_path: Path) -> None:
    side = 3000
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((side, side), 0x8000, np.uint16)).save(path, compress_level=1)
    tracemalloc.start()
    try:
        (said,) = decode(job(path, side=8), pixels := np.empty((1, 3, 8, 8), np.uint8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said == ""
    assert (pixels == 128).all()
    assert peak < 6 * side**2  # bytes; numpy's arrays, beside Pillow's own two copies


def test_a_worker_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workers, path = Workers(1), write(tmp_path / "x.png", PNG)
    broken = replace(job(path), epochs=None)  # type: ignore[arg-type]
    try:
        with pytest.raises(DataError, match=r"ended with status 1; its standard error says why"):
            workers.wait(workers.submit(broken))
    finally:
        workers.close()
    assert "TypeError" in capfd.readouterr().err


def test_closing_is_for_both_splits_and_again(root: Path) -> None:
    data = data_of(root, workers=2)
    zero = np.zeros(1, np.int64)
    data.test.request(zero, zero, 0, False, CPU).take()
    take(data, [0])
    processes = pids(data)
    assert len(processes) == 2  # of both
    pending = data.train.request(zero, zero, 0, False, CPU)
    data.test.close()
    assert not any(map(alive, processes))
    with pytest.raises(DataError, match="have been closed"):
        pending.take()
    pending.cancel()
    data.train.close()


def test_a_split_travels_without_its_processes(three: ImageData) -> None:
    expected = take(three, range(5)).images
    copy = pickle.loads(pickle.dumps(three))  # noqa: S301
    assert pids(copy) == []
    assert copy.train.workers is copy.test.workers
    try:
        assert torch.equal(take(copy, range(5)).images, expected)
        assert not set(pids(copy)) & set(pids(three))
    finally:
        copy.train.close()


def test_more_requests_than_a_socket_holds(root: Path) -> None:
    """Answers and questions wait in turn; none is lost, and room is used again."""
    workers, count = Workers(2), 400
    path = write(root.parent / "tiny.png", encoded(Image.new("L", (4, 4), 77), "PNG"))
    try:
        for _ in range(2):
            tickets = [workers.submit(job(path, 2, count=2)) for _ in range(count)]
            for at, ticket in enumerate(tickets):
                if at % 3 == 0:
                    workers.release(ticket)
            for at, ticket in enumerate(tickets):
                if at % 3:
                    pixels, wrong = workers.wait(ticket)
                    assert (pixels == 77).all()
                    assert wrong == ["", ""]
                    workers.release(ticket)
        pool = workers._pool
        assert pool is not None
        assert os.fstat(pool._arena).st_size <= count * 2**16
        workers.wait(workers.submit(job(path)))  # after what nobody wanted
        assert len(pool._tickets) == 1
        assert len(pool._free) >= count - 1
    finally:
        workers.close()


def test_cancelled_work_frees_its_room(three: ImageData) -> None:
    assert isinstance(three.train, EncodedSplit)
    take(three, range(IMAGES))
    pool = three.train.workers._pool
    assert pool is not None
    size = os.fstat(pool._arena).st_size
    for _ in range(10):
        index = np.arange(IMAGES)
        pending = three.train.request(index, index, 0, True, CPU)
        pending.cancel()
        pending.cancel()
        take(three, range(IMAGES))
    assert os.fstat(pool._arena).st_size <= 3 * size
    assert not pool._tickets


def test_workers_that_cannot_be_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DataError, match=r"data.workers = 2: only 0 loading processes can be"):
        take(data_of(root, workers=2), [0])


PARENT = """
import os, sys, time
import numpy as np
from harness.data.decode import Job, Place
from harness.data.workers import Workers
workers, index = Workers(2), np.arange(1000)
job = Job([Place(os.fsencode(sys.argv[1]))] * 1000, 32, True, 0, index, index)
tickets = [workers.submit(job) for _ in range(40)]
workers.wait(tickets[0])
print(*workers.pids, flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


@pytest.mark.parametrize("end", ["wait", "go"])
def test_workers_go_with_their_rank(tmp_path: Path, end: str) -> None:
    """Killed, or at its end without a word: with thousands of images still to decode."""
    path, temporary = write(tmp_path / "x.jpg"), tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(path), end],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as rank:
        assert rank.stdout is not None
        assert rank.stderr is not None
        processes = [int(word) for word in rank.stdout.readline().split()]
        assert len(processes) == 2
        if end == "wait":
            assert all(map(alive, processes))
            rank.kill()
        assert rank.wait(60) == (-signal.SIGKILL if end == "wait" else 0)
        assert gone(processes)
        assert rank.stderr.read() == ""
    assert list(temporary.iterdir()) == []


def test_an_image_that_is_not_wanted_is_not_decoded(tmp_path: Path) -> None:
    path, asked = write(tmp_path / "x.png", PNG), iter([True, True, False])
    pixels = np.zeros((4, 3, SIDE, SIDE), np.uint8)
    decode(job(path, count=4), pixels, lambda: next(asked))
    assert [bool(image.any()) for image in pixels] == [True, True, False, False]
