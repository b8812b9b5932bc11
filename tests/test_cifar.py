"""CIFAR-10 and CIFAR-100 from batches in the true format, and from hostile and damaged ones."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness.data import safe_pickle
from harness.data.augment import Compose, Cutout
from harness.data.cifar import load as load_cifar
from harness.data.datasets import ImageData, ImageSplit, load
from harness.data.safe_pickle import Bytes, read_pickle
from harness.errors import DataError
from harness.schema import Data

U8 = npt.NDArray[np.uint8]
ROWS = 3
NEW, OLD = b"numpy._core", b"numpy.core"
OURS, OTHER = (NEW, OLD) if NEW in pickle.dumps(np.zeros(1), 2) else (OLD, NEW)
"""What the installed numpy and other versions of it call the same module."""


# ---- batches as Python 2's cPickle, and later Python 3, write them -------------------------------


class Writer:
    """The opcodes of Python 2's cPickle, protocol 2, one value after the other."""

    def __init__(self, core: str = "numpy.core") -> None:
        self.core = core
        self.puts = 0
        self.out = bytearray(b"\x80\x02")

    def put(self) -> None:
        self.puts += 1
        few = self.puts < 256
        self.out += b"q" + bytes([self.puts]) if few else b"r" + struct.pack("<I", self.puts)

    def string(self, value: bytes) -> None:
        short = len(value) < 256
        self.out += b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<I", len(value))
        self.out += value
        self.put()

    def number(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif 0 <= value < 65536:
            self.out += b"M" + struct.pack("<H", value)
        else:
            self.out += b"J" + struct.pack("<i", value)

    def list(self, values: list[Any]) -> None:
        self.out += b"]"
        self.put()
        for start in range(0, len(values), 1000):
            self.out += b"("
            for value in values[start : start + 1000]:
                self.string(value) if isinstance(value, bytes) else self.number(value)
            self.out += b"e"

    def array(self, pixels: U8) -> None:
        self.out += f"c{self.core}.multiarray\n_reconstruct\n".encode()
        self.put()
        self.out += b"cnumpy\nndarray\n"
        self.put()
        self.out += b"K\x00\x85U\x01b\x87R"
        self.put()
        self.out += b"(K\x01"
        for length in pixels.shape:
            self.number(length)
        self.out += b"\x86" if pixels.ndim == 2 else b"\x85"
        self.out += b"cnumpy\ndtype\n"
        self.put()
        self.out += b"U\x02u1K\x00K\x01\x87R"
        self.put()
        self.out += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        ordered = pixels.flags.c_contiguous
        self.out += b"\x89" if ordered else b"\x88"
        self.string(pixels.tobytes("C" if ordered else "F"))
        self.out += b"tb"

    def dictionary(self, items: dict[bytes, Any]) -> bytes:
        self.out += b"}"
        self.put()
        self.out += b"("
        for key, value in items.items():
            self.string(key)
            if isinstance(value, np.ndarray):
                self.array(value)
            elif isinstance(value, list):
                self.list(value)
            else:
                self.string(value)
        return bytes(self.out + b"u.")


def python2(batch: dict[bytes, Any]) -> bytes:
    return Writer().dictionary(batch)


def python2_of_numpy2(batch: dict[bytes, Any]) -> bytes:
    return Writer("numpy._core").dictionary(batch)


def python3(batch: dict[bytes, Any]) -> bytes:
    """Loaded with encoding="bytes" and saved again; the bytes then travel as text."""
    return pickle.dumps(batch, protocol=2, fix_imports=True)


def python3_of_other_numpy(batch: dict[bytes, Any]) -> bytes:
    return python3(batch).replace(OURS + b".multiarray", OTHER + b".multiarray")


def python3_protocol_4(batch: dict[bytes, Any]) -> bytes:
    """Loaded with encoding="latin1", which makes text of the keys."""
    return pickle.dumps({key.decode(): value for key, value in batch.items()}, protocol=4)


def python3_without_text(batch: dict[bytes, Any]) -> bytes:
    """Python 3 has a call for bytes of which there are none."""
    content = pickle.dumps({**batch, b"batch_label": b""}, protocol=2)
    assert b"c__builtin__\nbytes\n" in content
    return content


WRITERS = (
    python2,
    python2_of_numpy2,
    python3,
    python3_of_other_numpy,
    python3_protocol_4,
    python3_without_text,
)


def batch(
    rows: int = ROWS, seed: int = 0, dataset: str = "cifar10", pixels: U8 | None = None
) -> dict[bytes, Any]:
    rng = np.random.default_rng(seed)
    if pixels is None:
        pixels = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
    names = [f"image_{seed}_{i}.png".encode() for i in range(rows)]
    if dataset == "cifar100":
        fine = rng.integers(0, 100, rows).tolist()
        coarse = [label // 5 for label in fine]
        return {
            b"filenames": names,
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": fine,
            b"coarse_labels": coarse,
            b"data": pixels,
        }
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": rng.integers(0, 10, rows).tolist(),
        b"data": pixels,
        b"filenames": names,
    }


NAMES = {
    "cifar10": [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"],
    "cifar100": ["train", "test"],
}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def write_cifar(
    folder: Path,
    dataset: str = "cifar10",
    writer: Callable[[dict[bytes, Any]], bytes] = python2,
    rows: int = ROWS,
) -> dict[str, Path]:
    """Batches of rows, rows + 1, … samples."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for number, name in enumerate(NAMES[dataset]):
        paths[name] = folder / name
        paths[name].write_bytes(writer(batch(rows + number, number, dataset)))
    return paths


def cifar(root: Path, dataset: str = "cifar10", **more: Any) -> ImageData:
    return load(Data(dataset=dataset, root=str(root), **more))


def parsed(data: bytes, folder: Path) -> object:
    path = folder / "one.pickle"
    path.write_bytes(data)
    with path.open("rb") as stream:
        return read_pickle(stream, path)


@pytest.mark.parametrize("writer", WRITERS)
def test_the_batches_written_here_are_pickles(writer: Callable[..., bytes]) -> None:
    """What the reader is tested on is what Python's own unpickler takes for the same batch."""
    wanted = batch(300, dataset="cifar100")
    if writer is python3_without_text:
        wanted[b"batch_label"] = b""
    data = writer(wanted).replace(OTHER + b".multiarray", OURS + b".multiarray")
    found = pickle.loads(data, encoding="bytes")  # noqa: S301 - written here
    found = {key.encode() if isinstance(key, str) else key: found[key] for key in found}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert np.array_equal(found[key], value)


# ---- the true format ----------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("writer", WRITERS)
def test_cifar_is_found_and_read(
    tmp_path: Path, dataset: str, writer: Callable[..., bytes], inside: bool
) -> None:
    write_cifar(tmp_path / FOLDERS[dataset] if inside else tmp_path, dataset, writer)
    data = cifar(tmp_path, dataset)
    key = b"labels" if dataset == "cifar10" else b"fine_labels"
    assert (data.name, data.num_classes, data.shape) == (dataset, int(dataset[5:]), (3, 32, 32))
    batches = [batch(ROWS + i, i, dataset) for i in range(len(NAMES[dataset]))]
    for split, parts in ((data.train, batches[:-1]), (data.test, batches[-1:])):
        assert isinstance(split, ImageSplit)
        pixels = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        assert np.array_equal(split.images.numpy(), pixels)
        assert split.labels.tolist() == [label for part in parts for label in part[key]]


def test_a_column_major_array_is_read_as_it_is_meant(tmp_path: Path) -> None:
    paths = write_cifar(tmp_path)
    pixels = np.asfortranarray(batch()[b"data"])
    for writer in (python2, python3):
        paths["test_batch"].write_bytes(writer(batch(pixels=pixels)))
        test = cifar(tmp_path).test
        assert isinstance(test, ImageSplit)
        assert np.array_equal(test.images.numpy().reshape(ROWS, -1), pixels)


def test_normalisation_is_as_published(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    split = cifar(tmp_path).train
    assert isinstance(split, ImageSplit)
    images, _ = split.batch(np.array([1]))
    mean, std = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    expected = (split.images[1] / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    torch.testing.assert_close(images[0], expected)


def test_training_images_are_shifted_and_flipped(tmp_path: Path) -> None:
    """By up to 4 pixels: each is a crop of the image or its mirror image, with a black border."""
    write_cifar(tmp_path, rows=40)
    split = cifar(tmp_path).train
    assert isinstance(split, ImageSplit)
    assert split.augmentation is not None
    samples = np.arange(40)
    found = split.augmentation(split.images[:40].clone(), 0, samples, samples)
    kinds = set()
    for plain, one in zip(split.images[:40], found, strict=True):
        for flipped in (False, True):
            bordered = torch.nn.functional.pad(plain.flip(2) if flipped else plain, (4,) * 4)
            crops = bordered.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
            equal = (crops == one[:, None, None]).all(dim=-1).all(dim=-1).all(dim=0)
            kinds |= {(flipped, *at) for at in equal.nonzero().tolist()}
    assert len(kinds) > 20
    assert {kind[0] for kind in kinds} == {False, True}
    assert min(kind[1] for kind in kinds) == 0
    assert max(kind[2] for kind in kinds) == 8


def test_cutout_follows_the_crop(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    split = cifar(tmp_path, cutout=16).train
    assert isinstance(split, ImageSplit)
    assert isinstance(split.augmentation, Compose)
    assert isinstance(split.augmentation.parts[-1], Cutout)


# ---- files that are missing or not what they should be ------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_a_missing_root_says_what_belongs_there(tmp_path: Path, dataset: str) -> None:
    roots = ((None, "data.root is not set"), (str(tmp_path / "no"), "not a directory"))
    for root, message in roots:
        with pytest.raises(DataError, match=message) as caught:
            load_cifar(Data(dataset=dataset, root=root))
        assert NAMES[dataset][0] in str(caught.value)
        assert "cs.toronto.edu" in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    paths = write_cifar(tmp_path)
    paths["data_batch_2"].unlink()
    paths["test_batch"].unlink()
    paths["test_batch"].mkdir()
    with pytest.raises(DataError, match=r"^data_batch_2, test_batch not found in"):
        cifar(tmp_path)


def test_the_other_cifar_in_its_place(tmp_path: Path) -> None:
    paths = write_cifar(tmp_path)
    paths["data_batch_1"].write_bytes(python2(batch(dataset="cifar100")))
    with pytest.raises(DataError, match=r"has no 'labels', but 'filenames', 'batch_label'"):
        cifar(tmp_path)


def changed(**changes: Any) -> dict[bytes, Any]:
    return batch() | {key.encode(): value for key, value in changes.items()}


def without(key: bytes) -> dict[bytes, Any]:
    return {name: value for name, value in batch().items() if name != key}


@pytest.mark.parametrize("writer", [python2, python3])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without(b"data"), "has no 'data', but"),
        (without(b"labels"), "has no 'labels', but"),
        ({}, "has no 'data', but nothing"),
        (changed(data=b"pixels"), "not an array of unsigned bytes"),
        (changed(data=np.zeros((2, 3072), np.uint8)), r"shape \(2, 3072\), but 3 labels"),
        (changed(data=np.zeros((3, 3071), np.uint8)), r"shape \(3, 3071\), but 3 labels"),
        (changed(data=np.zeros(3 * 3072, np.uint8)), r"shape \(9216,\), but 3 labels"),
        (changed(labels=[1, 2]), r"shape \(3, 3072\), but 2 labels"),
        (changed(labels=[1, 2, 10]), r"label 2 is 10, outside 0\.\.9"),
        (changed(labels=[1, -1, 3]), r"label 1 is -1, outside 0\.\.9"),
        (changed(labels=[1, b"2", 3]), "label 1 is not a number"),
        (changed(labels=[]), "not a list of labels"),
        (changed(labels=b"123"), "not a list of labels"),
        (changed(labels=np.zeros(3, np.uint8)), "not a list of labels"),
    ],
)
def test_a_batch_that_is_not_cifar(
    tmp_path: Path, writer: Callable[..., bytes], content: dict[bytes, Any], message: str
) -> None:
    path = write_cifar(tmp_path)["data_batch_3"]
    path.write_bytes(writer(content))
    with pytest.raises(DataError, match=message) as caught:
        cifar(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["object", "<f8", "<i8", "S3", "u2", "bool"])
def test_arrays_of_other_types(tmp_path: Path, kind: str) -> None:
    path = write_cifar(tmp_path)["data_batch_1"]
    path.write_bytes(python3(changed(data=np.zeros((3, 3072)).astype(kind))))
    with pytest.raises(DataError, match="CIFAR's are unsigned bytes") as caught:
        cifar(tmp_path)
    assert str(path) in str(caught.value)


WHOLE = python2(batch())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>", "not a pickle as CIFAR's: byte 0x3c at 0"),
        (b"PK\x03\x04", "not a pickle as CIFAR's: byte 0x50 at 0"),
        (b"\x1f\x8b\x08", "not a pickle as CIFAR's: byte 0x1f at 0"),
        (b"\x80\x06}.", "not a pickle of protocol 2 to 4, but 6"),
        (WHOLE[:1], "truncated"),
        (WHOLE[:-1], "truncated: its pickle has no end"),
        (WHOLE[: len(WHOLE) // 2], "truncated: a string of 9216 bytes begins at"),
        (b"\x80\x02].", "holds no dictionary"),
        (b"\x80\x02K\x01.", "holds no dictionary"),
    ],
)
def test_a_file_that_is_no_batch(tmp_path: Path, data: bytes, message: str) -> None:
    path = write_cifar(tmp_path)["test_batch"]
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        cifar(tmp_path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_a_data_error(tmp_path: Path) -> None:
    places = [*range(200), *range(200, len(WHOLE) - 200, 97), *range(len(WHOLE) - 200, len(WHOLE))]
    for place in places:
        with pytest.raises(DataError):
            parsed(WHOLE[:place], tmp_path)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = write_cifar(tmp_path)["test_batch"], Path.open

    def refuse(self: Path, *arguments: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"test_batch: cannot be read \(Permission denied\)"):
        cifar(tmp_path)


# ---- hostile files ------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Plain:
    pass


def mark_of(folder: Path) -> str:
    return str(folder / "code-ran")


def hostile_calls(folder: Path) -> dict[str, object]:
    """Objects that leave a file behind when they are unpickled."""
    touch = f"open({mark_of(folder)!r}, 'w')"
    return {
        "posix.system": Calls(os.system, f"touch {mark_of(folder)}"),
        "__builtin__.eval": Calls(eval, touch),
        "__builtin__.exec": Calls(exec, touch),
        "numpy.load": Calls(np.load, mark_of(folder)),
        "__builtin__.getattr": Calls(getattr, {}, "clear"),
        "copy_reg._reconstructor": Plain(),
    }


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("name", hostile_calls(Path()))
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, name: str, protocol: int) -> None:
    attack = hostile_calls(tmp_path)[name]
    path = write_cifar(tmp_path)["data_batch_1"]
    modern = name.replace("__builtin__", "builtins").replace("copy_reg", "copyreg")
    wanted = f"{modern if protocol > 2 else name}, |NEWOBJ, |cPickle, |Plain, "
    for content in (
        attack,
        {b"data": attack},
        {b"labels": [[[attack]]]},
        [Calls(bytes, attack)],
        batch() | {b"filenames": attack},
    ):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(DataError) as caught:
            cifar(tmp_path)
        assert str(path) in str(caught.value)
        if content is attack:
            assert any(part in str(caught.value) for part in wanted.split("|"))
            assert "a pickle that would run code is refused" in str(caught.value)
    assert not Path(mark_of(tmp_path)).exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Python's own unpickler runs them."""
    pickle.loads(pickle.dumps(hostile_calls(tmp_path)["posix.system"]))  # noqa: S301
    assert Path(mark_of(tmp_path)).exists()


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
U1 = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
U1_STATE = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"cos\nsystem\n(U\x04truetR.", "asks for os.system"),
        (b"(U\x04trueios\nsystem\n.", "asks for os.system"),  # INST
        (b"(cos\nsystem\nU\x04trueo.", "asks for os.system"),  # OBJ
        (b"\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),  # STACK_GLOBAL
        (b"c__builtin__\neval\nU\x011\x85R.", "asks for __builtin__.eval"),
        (b"cnumpy\nload\n.", "asks for numpy.load"),
        (b"cnumpy\nndarray.__reduce__\n.", "asks for numpy.ndarray.__reduce__"),
        (b"c_codecs\ndecode\n.", "asks for _codecs.decode"),
        (b"c\n\n.", r"asks for \., which"),
        (b"cnumpy\nndarray\n)\x81.", "asks for the opcode NEWOBJ"),
        (b"cnumpy\nndarray\n)}\x92.", "asks for the opcode NEWOBJ_EX"),
        (b"\x82\x01.", "asks for the opcode EXT1"),
        (b"\x83\x01\x00.", "asks for the opcode EXT2"),
        (b"\x84\x01\x00\x00\x00.", "asks for the opcode EXT4"),
        (b"Pid\n.", "asks for the opcode PERSID"),
        (b"U\x02idQ.", "asks for the opcode BINPERSID"),
        (b"(cnumpy\nndarray\no.", "asks for the opcode OBJ"),
        # Known names put together in other ways
        (b"cnumpy\nndarray\n)R.", "a call of numpy.ndarray"),
        (b"cnumpy.core.multiarray\n_reconstruct\n)R.", "a call of numpy.core.multiarray._recon"),
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.", "a call"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aU\x03rot\x86R.", "a call of _codecs.encode"),
        (b"c_codecs\nencode\nK\x01U\x06latin1\x86R.", "does not stand for bytes"),
        (b"c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacU\x06latin1\x86R.", "does not stand"),
        (b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.", "array of type O8"),
        (b"cnumpy\ndtype\nU\x02u1K\x01K\x01\x87R.", "array of type u1"),
        (b"cnumpy\ndtype\ncnumpy\ndtype\n\x85R.", "a call of numpy.dtype"),
        (b"K\x01)R.", "a call of what is no function"),
        (b"U\x04evil)R.", "a call of what is no function"),
        (RECONSTRUCT + b")R.", "a call of what is no function"),
        # States
        (U1 + b"(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.", "array type"),
        (U1 + b"(K\x03U\x01|U\x02u1U\x01aNK\x08K\x01K\x00tb.", "array type"),
        (U1 + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb.", "array type"),
        (U1 + b")b.", "array type"),
        (U1 + b"Nb.", "array type"),
        (RECONSTRUCT + b"(K\x01K\x01\x85U\x02u1\x89U\x01atb.", "not plain unsigned bytes"),
        (RECONSTRUCT + b"(K\x01K\x01\x85" + U1 + b"\x89]tb.", "not plain unsigned bytes"),
        (RECONSTRUCT + b"(K\x01K\x01" + U1 + b"\x89U\x01atb.", "not plain unsigned bytes"),
        (RECONSTRUCT + b"(K\x01J\xff\xff\xff\xff\x85" + U1 + b"\x89U\x01atb.", "not plain"),
        (RECONSTRUCT + b"(K\x01\x88\x85" + U1 + b"\x89U\x01atb.", "not plain unsigned bytes"),
        (RECONSTRUCT + b"(K\x02K\x01\x85" + U1 + b"\x89U\x01atb.", "not plain unsigned bytes"),
        (RECONSTRUCT + b"(K\x01K\x01\x85" + U1 + b"NU\x01atb.", "not plain unsigned bytes"),
        (RECONSTRUCT + b"}b.", "the state of an object"),
        (b"}}b.", "the state of an object"),
        (b"cnumpy\nndarray\n}b.", "the state of an object"),
        # What does not hold together
        (b".", "takes more than it has"),
        (b"K\x01\x86.", "takes more than it has"),
        (b"t.", "takes more than it has"),
        (b"q\x01.", "takes more than it has"),
        (b"h\x01.", "refers to what is not there"),
        (b"j\xff\xff\xff\xff.", "refers to what is not there"),
        (b"K\x01K\x02a.", "appends to what is no list"),
        (b"(K\x01e.", "takes more than it has"),
        (b"](K\x01u.", "sets items of what is no dictionary"),
        (b"}(K\x01u.", "sets items of what is no dictionary"),
        (b"}](K\x01s.", "takes more than it has|sets items"),
        (b"}]K\x01s.", "keys that are not names"),
        (b"}K\x01K\x02s.", "keys that are not names"),
        (b"}cnumpy\nndarray\nK\x02s.", "keys that are not names"),
        (b"X\x02\x00\x00\x00\xff\xff.", "not UTF-8"),
        (b"]]\x93.", "is not text"),
        (b"c" + b"a" * 1000 + b"\nb\n.", "a name in its pickle that does not end"),
        (b"cos", "a name in its pickle that does not end"),
        # Claims
        (b"\x8b\xff\xff\xff\x7f.", "the opcode LONG4"),
        (b"\x8a\xff" + bytes(255) + b".", "a number of 255 bytes"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "truncated: a string of 9223372036854775807"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff.", "truncated: a string of 18446744073709551615"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "truncated: a string of"),
        (b"T\xff\xff\xff\xff.", "truncated: a string of 4294967295"),
        (b"X\xff\xff\xff\x7f.", "truncated: a string of"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "the opcode BYTEARRAY8"),
        (b"\x97.", "the opcode NEXT_BUFFER"),
        (b"F1.5\n.", "the opcode FLOAT"),
    ],
)
def test_hostile_opcodes(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parsed(b"\x80\x02" + body, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("layers", [10**3, 10**5])
@pytest.mark.parametrize("form", [b"]", b"(", b"\x85"])
def test_deep_nesting_is_harmless(tmp_path: Path, form: bytes, layers: int) -> None:
    ends = {b"]": b"a" * (layers - 1), b"(": b"t" * layers, b"\x85": b""}
    begins = {b"]": b"]" * layers, b"(": b"(" * layers, b"\x85": b"N" + b"\x85" * layers}
    path = write_cifar(tmp_path)["test_batch"]
    path.write_bytes(b"\x80\x02" + begins[form] + ends[form] + b".")
    with pytest.raises(DataError, match="holds no dictionary"):
        cifar(tmp_path)


def claims(rows: int, labels: int, held: int) -> bytes:
    """A batch whose array claims more rows than its bytes."""
    whole = BytesIO()
    whole.write(b"\x80\x02}(U\x06labels](" + b"K\x01" * labels + b"eU\x04data" + RECONSTRUCT)
    whole.write(b"(K\x01J" + struct.pack("<i", rows) + b"M\x00\x0c\x86" + U1 + U1_STATE + b"\x89")
    whole.write(b"T" + struct.pack("<I", held) + bytes(held) + b"tbu.")
    return whole.getvalue()


def self_holding() -> bytes:
    """Lists that hold each other a thousand times over, through the memo."""
    body = b"]q\x00" + b"".join(b"(" + b"h\x00" * 100 + b"e" + b"]q\x00" for _ in range(1000))
    return b"\x80\x02" + body + b"."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (claims(2**31 - 1, 3, 9216), "shape"),
        (claims(100_000, 100_000, 9216), "307200000 bytes expected, 9216 found"),
        (claims(3, 3, 9217), "9216 bytes expected, 9217 found"),
        (claims(3, 3, 9215), "9216 bytes expected, 9215 found"),
        (self_holding(), "no dictionary"),
        (b"\x80\x02" + b"X\xe8\x03\x00\x00" + b"a" * 1000 + b"q\x00c_codecs\nencode\nq\x01"
         + b"h\x01h\x00U\x06latin1\x86R" * 20_000 + b".", "no dictionary"),
        (b"\x80\x02" + b"]" * 300_000 + b".", "more than 200,000 steps"),
    ],
)  # fmt: skip
def test_memory_follows_the_file_and_not_its_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    monkeypatch.setattr(safe_pickle, "_MOST_STEPS", 200_000)  # a fifth, for the sake of time
    path = write_cifar(tmp_path)["test_batch"]
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            cifar(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20


def test_rows_that_are_not_there_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, "cifar100")
    (tmp_path / "train").write_bytes(
        claims(100_000, 100_000, 9216).replace(b"U\x06labels", b"U\x0bfine_labels")
    )
    monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(DataError, match="307200000 bytes expected, 9216 found"):
        cifar(tmp_path, "cifar100")


@pytest.mark.parametrize("writer", [python2, python3])
def test_loading_takes_little_more_than_the_data(
    tmp_path: Path, writer: Callable[..., bytes]
) -> None:
    """torch's memory is not traced, so the pixels themselves do not count here."""
    write_cifar(tmp_path, "cifar100", writer, rows=2000)
    tracemalloc.start()
    try:
        data = cifar(tmp_path, "cifar100")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(data.train, ImageSplit)
    assert peak < data.train.images.numel() / 2


def test_strings_stay_in_the_file(tmp_path: Path) -> None:
    found = parsed(python2(batch(300)), tmp_path)
    assert isinstance(found, dict)
    pixels = found[b"data"]
    assert isinstance(pixels, Bytes)
    assert not isinstance(pixels.data, bytes)
    assert pixels.data.length == 300 * 3072


SMALL = {writer: writer(batch(2, dataset="cifar100")) for writer in WRITERS}


@given(
    writer=st.sampled_from(WRITERS),
    at=st.one_of(st.integers(0, 250), st.integers(-250, -1), st.integers(0, 2**20)),
    junk=st.binary(max_size=8),
    keep=st.integers(0, 12),
    end=st.one_of(st.none(), st.integers(0, 2**20)),
)
@example(python2, 1, b"\x00", 1, None)
def test_damage_is_a_data_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory,
    writer: Callable[..., bytes],
    at: int,
    junk: bytes,
    keep: int,
    end: int | None,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-cifar"
    if not folder.exists():
        write_cifar(folder, "cifar100")
    whole = SMALL[writer]
    at %= len(whole)
    damaged = whole[:at] + junk + whole[at + keep :]
    (folder / "train").write_bytes(damaged if end is None else damaged[: end % len(whole)])
    try:
        split = cifar(folder, "cifar100").train
    except DataError:
        return
    assert isinstance(split, ImageSplit)
    assert split.images.shape == (2, 3, 32, 32)
    assert 0 <= int(split.labels.min()) <= int(split.labels.max()) < 100


@given(
    bits=st.lists(st.integers(0, 2**20), min_size=1, max_size=4), writer=st.sampled_from(WRITERS)
)
def test_flipped_bits_are_a_data_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, writer: Callable[..., bytes], bits: list[int]
) -> None:
    """Where the bits are not pixels; those of pixels cannot be told from others."""
    damaged = bytearray(SMALL[writer])
    spans = [*range(400), *range(len(damaged) - 400, len(damaged))]
    for bit in bits:
        damaged[spans[bit // 8 % len(spans)]] ^= 1 << bit % 8
    folder = tmp_path_factory.getbasetemp()
    with suppress(DataError):
        parsed(bytes(damaged), folder)
