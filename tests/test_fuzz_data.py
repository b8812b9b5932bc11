"""Data files, whatever is in them: they are read, or one message names the file."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import ROOM, WATCH, check_message, command, damaged, fuzz, limited
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import ROOT

from harness.data.datasets import CPU, load
from harness.errors import DataError, HarnessError
from harness.schema import Data

DEMO = ROOT / "configs" / "adabatch-digits.yaml"
KINDS = ("mnist", "cifar10", "folder", "webdataset")


def idx(array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    head = b"\0\0\x08" + bytes([array.ndim])
    return head + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def image(seed: int, suffix: str, size: tuple[int, int] = (20, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix])
    return buffer.getvalue()


def write_mnist(root: Path) -> None:
    draw = np.random.default_rng(0)
    for part, count in (("train", 32), ("t10k", 8)):
        images = idx(draw.integers(0, 256, (count, 28, 28), np.uint8))
        labels = idx((np.arange(count) % 10).astype(np.uint8))
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, mtime=0))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def write_cifar(root: Path) -> None:
    draw = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {
            b"batch_label": name.encode(),
            b"labels": list(range(8)),
            b"data": draw.integers(0, 256, (8, 3072), np.uint8),
            b"filenames": [b"x.png"] * 8,
        }
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_folder(root: Path) -> None:
    for split, name in ((s, n) for s in ("train", "val") for n in ("a", "b")):
        (root / split / name).mkdir(parents=True)
        for number, suffix in enumerate(("jpg", "png", "webp")):
            path = root / split / name / f"{number}.{suffix}"
            path.write_bytes(image(number, suffix))


def write_shards(root: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}-0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number in range(8):
                for name, content in (
                    (f"{number:05d}.jpg", image(number, "jpg")),
                    (f"{number:05d}.cls", b"%d" % (number % 2)),
                ):
                    info = tarfile.TarInfo(name if number else "é" * 120 + name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


WRITERS: dict[str, Callable[[Path], None]] = {
    "mnist": write_mnist,
    "cifar10": write_cifar,
    "folder": write_folder,
    "webdataset": write_shards,
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {}
    for kind in KINDS:
        roots[kind] = tmp_path_factory.mktemp(kind)
        WRITERS[kind](roots[kind])
    return roots


@pytest.fixture
def copies(
    wholes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        target: Path = tmp_path_factory.mktemp("copy") / kind
        shutil.copytree(wholes[kind], target)
        return target

    return copy


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def take_all(kind: str, root: Path) -> None:
    """Load it and decode every sample, in this process, or meet a DataError that names the root."""
    side = {"image_size": 16} if kind in ("folder", "webdataset") else {}
    try:
        with limited(ROOM), WATCH.watching() as done:
            data = load(Data(dataset=kind, root=str(root), **side))
            for split in (data.train, data.test):
                samples = np.arange(len(split))
                split.request(samples, samples, 0, True, CPU).take()
    except DataError as error:
        check_message(error, root.name)
    finally:
        started = [event for event, _ in done if not event.startswith("socket")]
        assert started == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_below_is_whole(kind: str, wholes: dict[str, Path]) -> None:
    size = 16 if kind in ("folder", "webdataset") else None
    data = load(Data(dataset=kind, root=str(wholes[kind]), image_size=size))
    assert len(data.train) >= 6


@pytest.mark.parametrize("kind", KINDS)
@fuzz(15)
@given(data=st.data())
def test_damaged_files(kind: str, copies: Callable[[str], Path], data: st.DataObject) -> None:
    root = copies(kind)
    for path in data.draw(
        st.lists(st.sampled_from(files(root)), min_size=1, max_size=2, unique=True)
    ):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    take_all(kind, root)


@pytest.mark.parametrize("kind", KINDS)
@fuzz(2)
@given(data=st.data())
def test_commands_on_damaged_files(
    kind: str, copies: Callable[[str], Path], data: st.DataObject
) -> None:
    root = copies(kind)
    path = data.draw(st.sampled_from(files(root)))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    assert command("doctor", "--quick", "--data", root).code == 0
    command("plan", DEMO, f"data.dataset={kind}", f"data.root={root}")


NUMBERS = (0, 1, 0x7F, 0xFF, 0x8000_0000, 0xFFFF_FFFF)


@fuzz(10)
@given(sizes=st.lists(st.sampled_from(NUMBERS) | st.integers(0, 99), min_size=3, max_size=3),
       zipped=st.booleans())  # fmt: skip
def test_headers_that_claim_anything(
    copies: Callable[[str], Path], sizes: list[int], zipped: bool
) -> None:
    """2^96 bytes of images, for instance; no memory is taken on the word of a header."""
    root = copies("mnist")
    content = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in sizes) + bytes(99)
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(content) if zipped else content)
    take_all("mnist", root)


def png(width: int, height: int) -> bytes:
    """A PNG whose header says so; there are no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_images_that_claim_to_be_large(copies: Callable[[str], Path]) -> None:
    for size in (
        (60_000, 60_000),
        (2**31 - 1, 2**31 - 1),
        (2**31 - 1, 1),
        (0, 0),
        (13_000, 13_000),
    ):
        root = copies("folder")
        (root / "train" / "a" / "1.png").write_bytes(png(*size))
        data = load(Data(dataset="folder", root=str(root), image_size=16))
        samples = np.arange(len(data.train))
        asked = data.train.request(samples, samples, 0, False, CPU)
        with limited(ROOM), pytest.raises(DataError, match=r"1\.png"):
            asked.take()


def test_a_file_that_unpacks_to_much_more(copies: Callable[[str], Path]) -> None:
    root = copies("mnist")
    body = b"\0\0\x08\x03" + (32).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(body + bytes(1 << 30)))
    with limited(1 << 28), pytest.raises(DataError, match="trailing bytes"):
        load(Data(dataset="mnist", root=str(root)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["pipe", "folder", "endless", "loop"])
def test_what_is_no_file(kind: str, what: str, copies: Callable[[str], Path]) -> None:
    root = copies(kind)
    path = files(root)[0]
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "endless" else path)
    assert command("doctor", "--quick", "--data", root).code == 0
    command("plan", DEMO, f"data.dataset={kind}", f"data.root={root}")
    take_all(kind, root)


def test_a_pickle_that_would_run_code_is_refused(
    copies: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("touch pwned",)

    root = copies("cifar10")
    monkeypatch.chdir(root)
    for protocol in range(6):
        (root / "data_batch_1").write_bytes(pickle.dumps({b"labels": Evil()}, protocol=protocol))
        with pytest.raises(HarnessError):
            load(Data(dataset="cifar10", root=str(root)))
    assert not (root / "pwned").exists()
