"""WebDataset shards: what is found in them without unpacking, and what is refused."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encoded, photo

from harness.data.datasets import CPU, ImageData
from harness.data.datasets import load as load_data
from harness.data.encoded import EncodedSplit
from harness.data.shards import Members
from harness.errors import DataError
from harness.schema import Data
from harness.shard_listing import count_samples, members, samples

JPEG = encoded(photo(40, 30))
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Contents = Iterable[tuple[str, bytes]]


def tar_bytes(contents: Contents, form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in contents:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def pairs(count: int, first: int = 0, folder: str = "") -> list[tuple[str, bytes]]:
    """Samples with images of their own, of class i mod 3."""
    found = []
    for i in range(first, first + count):
        image = encoded(photo(24, 20, i), "PNG")
        found += [(f"{folder}{i:04}.png", image), (f"{folder}{i:04}.cls", b"%d" % (i % 3))]
    return found


def settings_of(root: Path | None, **more: object) -> Data:
    return Data.model_validate({"dataset": "webdataset", "root": root and str(root), **more})


def load(root: Path | None, **more: object) -> ImageData:
    return load_data(settings_of(root, **more))


def source(data: ImageData) -> Members:
    assert isinstance(data.train, EncodedSplit)
    assert isinstance(data.train.source, Members)
    return data.train.source


def write(root: Path, **shards: bytes) -> Path:
    for name, data in shards.items():
        (root / f"{name.replace('_', '-')}.tar").write_bytes(data)
    return root


def one(tmp_path: Path, data: bytes) -> bytes:
    path = tmp_path / "train.tar"
    path.write_bytes(data)
    return os.fsencode(path)


def refusal(path: bytes) -> str:
    with pytest.raises(DataError) as caught:
        samples(path)
    assert str(caught.value).startswith(os.fsdecode(path))
    return str(caught.value)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_samples_are_read_at_random(tmp_path: Path, form: int) -> None:
    write(
        tmp_path,
        train_1=tar_bytes(pairs(3, 4), form),
        train_0=tar_bytes(pairs(4, 0, "some/folder/"), form),
        val_0=tar_bytes(pairs(2), form),
    )
    data = load(tmp_path, image_size=21)
    assert (data.name, data.num_classes, data.shape) == ("webdataset", 3, (3, 21, 21))
    assert (len(data.train), len(data.test)) == (7, 2)
    assert count_samples(settings_of(tmp_path)) == 7
    assert source(data).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source(data).name(1) == f"{tmp_path}/train-0.tar: some/folder/0001.png"
    for sample in (6, 0, 3):
        path, offset, size = source(data).place(sample)
        with open(path, "rb") as file:
            file.seek(offset)
            assert file.read(size) == encoded(photo(24, 20, sample), "PNG")
    order = np.array([6, 0, 3])
    batch = data.train.request(order, order, 0, False, CPU).take()
    for row, sample in enumerate(order):
        alone = data.train.request(np.array([sample]), order[:1], 0, False, CPU).take()
        assert torch.equal(batch.images[row], alone.images[0])
    assert batch.labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("length", [100, 101, 300, 2000])
def test_long_names(tmp_path: Path, form: int, length: int) -> None:
    key = "é" + "x" * length
    path = one(tmp_path, tar_bytes([(f"{key}.jpg", JPEG), (f"{key}.cls", b"1")], form))
    ((offset, size, label),) = samples(path)
    assert (size, label) == (len(JPEG), 1)
    (first, _) = members(path)
    assert first.name == f"{key}.jpg".encode()
    assert first.offset == offset


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.text("ab/é._", min_size=1, max_size=130), st.binary(max_size=1100)),
        max_size=6,
    ),
    st.sampled_from(list(FORMATS.values())),
)
def test_members_are_those_that_tarfile_finds(
    tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[str, bytes]], form: int
) -> None:
    try:
        data = tar_bytes(contents, form)
    except ValueError:  # a name that ustar cannot hold
        return
    path = one(tmp_path_factory.getbasetemp(), data)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    # tarfile takes trailing slashes off
    found = [(os.fsdecode(m.name).rstrip("/"), m.offset, m.size) for m in members(path)]
    assert found == [(name.rstrip("/"), offset, size) for name, offset, size in expected]


def test_a_large_size_in_bytes(tmp_path: Path) -> None:
    """GNU's form for sizes past 8 GiB, here of a small member."""
    data = bytearray(tar_bytes([("a.jpg", JPEG), ("a.cls", b"0")]))
    data[124:136] = b"\x80" + len(JPEG).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:512]) - sum(data[148:156]) + 256)
    assert samples(one(tmp_path, bytes(data)))[0].size == len(JPEG)


def test_a_size_in_a_pax_header(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = len(JPEG)
    info.pax_headers = {"size": str(len(JPEG)), "comment": "x=y"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(JPEG))
        label = tarfile.TarInfo("a.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"7"))
    ((_, size, number),) = samples(one(tmp_path, out.getvalue()))
    assert (size, number) == (len(JPEG), 7)


def test_what_makes_a_sample(tmp_path: Path) -> None:
    contents = [
        ("b.json", b"{}"),
        ("b.seg.png", b"another part"),
        ("b.cls", b" 12\n"),
        ("dir.with.dots/a.JPG", JPEG),
        ("._a.jpg", b"what macOS leaves"),
        ("README", b"no suffix"),
        ("b.jpeg", JPEG),
        ("dir.with.dots/a.cls", b"3"),
    ]
    found = samples(one(tmp_path, tar_bytes(contents)))
    assert [sample.label for sample in found] == [3, 12]  # by the position of the image
    assert found[0].offset < found[1].offset


def test_folders_are_passed_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("x.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in pairs(1):
            member = tarfile.TarInfo(f"x.jpg/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert len(samples(one(tmp_path, out.getvalue()))) == 1


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    assert "a.jpg is a link" in refusal(one(tmp_path, out.getvalue()))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "holds no samples"),
        ([("a.txt", b"x")], "holds no samples"),
        ([("a.jpg", JPEG)], "a has an image, but no .cls"),
        ([("a.cls", b"1")], "a has a .cls, but no image"),
        ([("a.jpg", JPEG), ("a.cls", b"1"), ("a.png", JPEG)], "a.png is the second image"),
        ([("a.jpg", JPEG), ("a.cls", b"1"), ("a.cls", b"1")], "a.cls is the second label"),
        *(
            ([("a.jpg", JPEG), ("a.cls", label)], "but a label is a whole number from 0 to 999999")
            for label in (b"", b"cat", b"-1", b"1.0", b"1_0", b"1000000", b"9" * 400, b"1 2")
        ),
        ([("a.jpg", JPEG), ("a.cls", b"1" + b" " * 600)], "but a label is a whole number"),
    ],
)
def test_samples_that_are_not_as_they_should_be(
    tmp_path: Path, contents: Contents, message: str
) -> None:
    assert message in refusal(one(tmp_path, tar_bytes(contents)))


WHOLE = tar_bytes(pairs(2))
HEADER = bytes(tarfile.TarInfo("a.jpg").tobuf())


def reheaded(change: dict[int, bytes], data: bytes = WHOLE) -> bytes:
    """With other bytes in its first header, and the checksum they have."""
    new = bytearray(data)
    for at, value in change.items():
        new[at : at + len(value)] = value
    new[148:156] = b"%06o\0 " % (sum(new[:148]) + 256 + sum(new[156:512]))
    return bytes(new)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"x" * 100, "truncated"),
        (b"<!DOCTYPE html>" * 100, "this is not a tar file"),
        (gzip.compress(WHOLE, mtime=0), "is compressed and cannot be read at random; unpack"),
        (gzip.compress(b"", mtime=0), "is compressed"),
        (WHOLE[:700], "truncated"),
        (WHOLE[: WHOLE.index(b"0001.png")], "truncated"),  # between two members
        (WHOLE[: WHOLE.index(b"0001.png") + 100], "truncated"),
        (WHOLE[: WHOLE.index(b"0001.png")] + b"\1" * 1024, "is no header of a member"),
        (reheaded({124: b"\x80" + b"\x7f" * 11}), "truncated"),
        (reheaded({124: b"\xff" * 12}), "invalid size"),
        (reheaded({124: b"-0000000100\0"}), "invalid size"),
        (reheaded({124: b"00000000099\0"}), "invalid size"),
        (reheaded({156: b"S"}), "sparse"),
        (reheaded({156: b"x"}), "invalid pax header"),
    ],
)
def test_files_that_are_no_shards(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in refusal(one(tmp_path, data))


def pax(records: bytes) -> bytes:
    """A pax header before a member."""
    header = bytearray(tarfile.TarInfo("pax").tobuf(tarfile.USTAR_FORMAT))
    body = records + bytes(-len(records) % 512)
    return reheaded({124: b"%011o\0" % len(records), 156: b"x"}, bytes(header)) + body + WHOLE


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"10 path=a\n10 path=b\n", None),
        (b"9 size=1\n", None),
        (b"99999999999999 path=a\n", "invalid pax"),
        (b"0 path=a\n", "invalid pax"),
        (b"7 path=a\n", "invalid pax"),
        (b"path=a\n", "invalid pax"),
        (b"11 size=-1\n", "invalid pax"),
        (b"11 size=xx\n", "invalid pax"),
        (b"13 size=1e40\n", "invalid pax"),
        (b"4010 size=" + b"9" * 3999 + b"\n", "invalid pax"),
        (b"22 GNU.sparse.size=12\n", "sparse"),
        (b"26 size=" + b"9" * 17 + b"\n", "truncated"),
    ],
)
def test_pax_headers(tmp_path: Path, records: bytes, message: str | None) -> None:
    path = one(tmp_path, pax(records))
    if message is None:
        assert next(members(path)).offset == 3 * 512
    else:
        assert message in refusal(path)


def test_hostile_names_lead_nowhere(tmp_path: Path) -> None:
    names = ("../../up", "/etc/absolute", "a/../../b", "..", "nul\0cut", "~/home", "$(id)")
    contents = [(f"{key}.jpg", JPEG) for key in names] + [(f"{key}.cls", b"0") for key in names]
    write(tmp_path, train=tar_bytes(contents[:2] + contents[7:9]), val=tar_bytes(pairs(1)))
    before = sorted(tmp_path.rglob("*")), sorted(tmp_path.parent.iterdir())
    data = load(tmp_path)
    both = np.arange(2)
    assert len(data.train.request(both, both, 0, True, CPU).take().images) == 2
    assert (sorted(tmp_path.rglob("*")), sorted(tmp_path.parent.iterdir())) == before
    for path, offset, size in map(source(data).place, range(2)):
        assert path == os.fsencode(tmp_path / "train.tar")
        assert offset + size <= (tmp_path / "train.tar").stat().st_size


@settings(max_examples=150)
@given(at=st.integers(0, 2**20), junk=st.binary(max_size=40), cut=st.integers(0, 2**20))
def test_damage_is_a_data_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes, cut: int
) -> None:
    """Whatever a shard holds, places lie inside it and labels are in range."""
    whole = pax(b"10 path=a\n")
    at, cut = at % len(whole), cut % 600
    path = one(tmp_path_factory.getbasetemp(), whole[:at] + junk + whole[at + cut :])
    try:
        found = samples(path)
    except DataError:
        return
    size = os.stat(path).st_size
    assert all(0 < s.offset <= s.offset + s.size <= size and s.label < 10**6 for s in found)


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train.tgz", "train_000.tar.zst"])
def test_compressed_shards_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(WHOLE, mtime=0))
    with pytest.raises(DataError, match=f"{name} is compressed and cannot be read at random"):
        load(tmp_path)


def test_missing_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.root is not set; .* ROOT/train\*.tar"):
        load(None)
    with pytest.raises(DataError, match=r"has no train\*.tar; webdataset needs"):
        load(tmp_path)
    write(tmp_path, train=WHOLE)
    with pytest.raises(DataError, match=r"has no val\*.tar or test\*.tar"):
        load(tmp_path)
    write(tmp_path, test=WHOLE)
    assert len(load(tmp_path).test) == 2
    (tmp_path / "train-folder.tar").mkdir()
    with pytest.raises(DataError, match=r"train-folder.tar: is not a regular file"):
        load(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, train=WHOLE, val=WHOLE)
    os.mkfifo(tmp_path / "train-9.tar")
    with pytest.raises(DataError, match=r"train-9.tar: is not a regular file"):
        load(tmp_path)


def test_a_test_class_that_training_does_not_have(tmp_path: Path) -> None:
    write(tmp_path, train=tar_bytes(pairs(2)), val=tar_bytes(pairs(3)))
    with pytest.raises(DataError, match=r"val.tar: 0002.png is of class 2, .* classes 0 to 1"):
        load(tmp_path)


def test_the_size_that_is_given_must_be_right(tmp_path: Path) -> None:
    write(tmp_path, train=WHOLE, val=WHOLE)
    assert len(load(tmp_path, size=2).train) == 2
    with pytest.raises(DataError, match=r"data.size = 3, but .* hold 2 samples; set it to 2"):
        load(tmp_path, size=3)


def test_a_corrupt_member_is_named(tmp_path: Path) -> None:
    broken = [*pairs(1), ("deep/er.jpg", JPEG[:-200]), ("deep/er.cls", b"0")]
    write(tmp_path, train=tar_bytes(broken), val=tar_bytes(pairs(1)))
    both = np.arange(2)
    with pytest.raises(DataError, match=r"train.tar: deep/er.jpg: .*truncated.*on_corrupt=skip"):
        load(tmp_path).train.request(both, both, 0, False, CPU).take()
    batch = load(tmp_path, on_corrupt="skip").train.request(both, both, 0, False, CPU).take()
    assert len(batch.images) == len(batch.labels) == 1
    assert "train.tar: deep/er.jpg: " in batch.corrupt[0]


def test_a_shard_that_has_been_cut_since(tmp_path: Path) -> None:
    write(tmp_path, train=WHOLE, val=WHOLE)
    data = load(tmp_path)
    os.truncate(tmp_path / "train.tar", 600)
    first = np.zeros(1, np.int64)
    with pytest.raises(DataError, match=r"train.tar: 0000.png|train.tar: \?: truncated"):
        data.train.request(first, first, 0, False, CPU).take()
