"""Image folders: what is found, in which order, and what is refused."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import write

from harness.data.datasets import ImageData
from harness.data.datasets import load as load_data
from harness.data.encoded import EncodedSplit
from harness.data.folder import Files
from harness.data_listing import class_folders, count_images, images_by_class, split_folder
from harness.errors import DataError
from harness.schema import Data


def settings_of(root: Path | None, dataset: str = "folder", **more: object) -> Data:
    return Data.model_validate({"dataset": dataset, "root": root and str(root), **more})


def load(root: Path | None, dataset: str = "folder") -> ImageData:
    return load_data(settings_of(root, dataset))


def files(data: ImageData, train: bool = True) -> Files:
    split = data.train if train else data.test
    assert isinstance(split, EncodedSplit)
    assert isinstance(split.source, Files)
    return split.source


def names(found: Files) -> list[str]:
    root = os.fsdecode(found.folder)
    return [os.path.relpath(found.name(i), root) for i in range(len(found.labels))]


def make(root: Path, *paths: str) -> Path:
    """Files whose contents nobody reads."""
    for path in paths:
        write(root / path, b"x")
    return root


TRAIN = ("train/b/2.jpg", "train/b/1.JPEG", "train/a/z.png", "train/a/sub/k.WebP", "train/a/A.bmp")
VAL = ("val/b/1.ppm",)


def test_samples_are_sorted_by_class_and_path(tmp_path: Path) -> None:
    data = load(make(tmp_path, *TRAIN, *VAL))
    train, test = files(data), files(data, train=False)
    assert names(train) == ["a/A.bmp", "a/sub/k.WebP", "a/z.png", "b/1.JPEG", "b/2.jpg"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert (names(test), test.labels.tolist()) == (["b/1.ppm"], [1])
    assert (data.name, data.num_classes, data.shape) == ("folder", 2, (3, 224, 224))
    assert (len(data.train), len(data.test)) == (5, 1)


@given(
    names=st.sets(st.text("abAB.é 0_-", min_size=1, max_size=6), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_is_the_bytes_own(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], seed: int
) -> None:
    """Not that in which files were made, nor that of a language."""
    root = tmp_path_factory.mktemp("order")
    paths = [f"{name[0]}x/{name}y.jpg" for name in names if not name.startswith(".")]
    shuffled = random.Random(seed).sample(paths, len(paths))
    made = make(root, *(f"train/{path}" for path in ["ax/a.jpg", *shuffled]), "val/ax/1.jpg")
    data = load(made)
    found = files(data)
    expected = sorted(
        {*paths, "ax/a.jpg"}, key=lambda path: [os.fsencode(part) for part in path.split("/", 1)]
    )
    assert [os.path.relpath(found.name(i), root / "train") for i in range(len(found.labels))] == (
        expected
    )
    assert count_images(settings_of(root)) == len(expected) == len(data.train)


def test_names_that_are_no_text_are_found(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"train", b"c")
    os.makedirs(folder)
    path = os.path.join(folder, b"\xff\n.jpg")
    with open(path, "wb"):
        pass
    make(tmp_path, "val/c/1.jpg")
    found = files(load(tmp_path))
    assert found.place(0).path == path
    assert found.name(0).endswith("train/c/\\udcff\n.jpg")


def test_what_is_not_an_image_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, *TRAIN, *VAL, "train/a/.hidden.jpg", "train/a/notes.txt", "train/a/jpg")
    make(tmp_path, "train/.git/x.jpg", "train/loose.jpg", "train/a/.thumbs/x.jpg")
    (tmp_path / "train/b/folder.jpg").mkdir()
    assert len(load(tmp_path).train) == len(TRAIN)
    make(tmp_path, "train/b/folder.jpg/inside.jpg")
    assert len(load(tmp_path).train) == len(TRAIN) + 1


def test_links_are_followed(tmp_path: Path) -> None:
    make(tmp_path, "far/one/1.jpg", "far/x.jpg", "train/a/2.jpg", *VAL)
    (tmp_path / "train/b").symlink_to(tmp_path / "far/one")
    (tmp_path / "train/a/x.jpg").symlink_to(tmp_path / "far/x.jpg")
    (tmp_path / "train/a/more").symlink_to(tmp_path / "far")
    found = files(load(tmp_path))
    assert names(found) == ["a/2.jpg", "a/more/one/1.jpg", "a/more/x.jpg", "a/x.jpg", "b/1.jpg"]


def test_a_link_that_leads_nowhere_is_a_missing_image(tmp_path: Path) -> None:
    make(tmp_path, *TRAIN, *VAL)
    (tmp_path / "train/a/gone.jpg").symlink_to(tmp_path / "nowhere")
    assert "a/gone.jpg" in names(files(load(tmp_path)))


def test_a_link_to_itself_is_a_missing_image_or_nothing(tmp_path: Path) -> None:
    make(tmp_path, *TRAIN, *VAL)
    for name in ("a/x.jpg", "a/notes", "notes"):
        path = tmp_path / "train" / name
        path.symlink_to(path.name)
    assert len(load(tmp_path).train) == len(TRAIN) + 1


def test_folders_may_be_deep(tmp_path: Path) -> None:
    make(tmp_path, *TRAIN, *VAL)
    deep = "train/a" + "/d" * 1500
    here = os.open(tmp_path / "train" / "a", os.O_RDONLY)
    try:
        for _ in range(1500):
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
    finally:
        os.close(here)
    try:
        write(tmp_path / deep / "x.jpg")
        assert len(load(tmp_path).train) == len(TRAIN) + 1
    finally:  # Python's own way to remove folders is recursive, and pytest would fail at it
        subprocess.run(["rm", "-rf", str(tmp_path / "train")], check=True)


def test_a_folder_in_itself_is_refused(tmp_path: Path) -> None:
    make(tmp_path, *TRAIN, *VAL)
    (tmp_path / "train/a/sub/up").symlink_to(tmp_path / "train/a")
    with pytest.raises(DataError, match=r"sub/up is a link to a folder that it lies in"):
        load(tmp_path)


def test_test_takes_the_place_of_val(tmp_path: Path) -> None:
    make(tmp_path, *TRAIN, "test/a/1.jpg", "test/a/2.jpg")
    assert len(load(tmp_path).test) == 2
    make(tmp_path, *VAL)
    assert len(load(tmp_path).test) == 1


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_a_missing_root_says_what_belongs_there(tmp_path: Path, dataset: str) -> None:
    for root, message in ((None, "data.root is not set"), (tmp_path / "no", "not a directory")):
        with pytest.raises(DataError, match=message) as caught:
            load(root, dataset)
        assert "ROOT/train/CLASS" in str(caught.value)
        assert ("image-net.org" in str(caught.value)) == (dataset == "imagenet")


@pytest.mark.parametrize(
    ("paths", "dataset", "message"),
    [
        (VAL, "folder", "has no folder train; folder needs ROOT/train"),
        (TRAIN, "folder", "has no folder val or test; folder needs"),
        ((*TRAIN, "test/a/1.jpg"), "imagenet", "has no folder val; imagenet needs"),
        ((*TRAIN, *VAL, "val/c/1.jpg"), "folder", r"val/c is a class that .*/train lacks"),
        ((*TRAIN, *VAL, "train/c/x.txt"), "folder", r"train/c is a class without images .*\.png"),
        ((*TRAIN, *VAL, "val/a/x.gif"), "folder", "val/a is a class without images"),
        (("train/1.jpg", *VAL), "folder", "train holds no folders; one for each class"),
        ((*TRAIN, "val/1.jpg"), "folder", "val holds no folders"),
        ((*TRAIN, *VAL), "imagenet", "2 class folders, but imagenet has 1000; .*dataset=folder"),
    ],
)
def test_folders_that_are_not_as_they_should_be(
    tmp_path: Path, paths: tuple[str, ...], dataset: str, message: str
) -> None:
    make(tmp_path, *paths)
    with pytest.raises(DataError, match=message):
        load(tmp_path, dataset)


def test_imagenet_has_a_thousand_classes(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/n{i:08}/{i}.JPEG" for i in range(1000)), "val/n00000999/v.JPEG")
    data = load(tmp_path, "imagenet")
    assert (data.num_classes, len(data.train)) == (1000, 1000)
    assert files(data).labels.tolist() == list(range(1000))
    assert files(data, train=False).labels.tolist() == [999]


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    make(tmp_path, *TRAIN, *VAL)
    (tmp_path / "train/a").chmod(0)
    try:
        with pytest.raises(DataError, match=r"train/a: cannot be read \(Permission denied\)"):
            load(tmp_path)
    finally:
        (tmp_path / "train/a").chmod(0o755)


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    make(tmp_path, *TRAIN, *VAL)
    train = split_folder(settings_of(tmp_path), train=True)
    classes = [*class_folders(train), b"gone"]
    with pytest.raises(DataError, match=r"train/gone: cannot be read \(No such file"):
        list(images_by_class(train, classes))


def test_counting_finds_what_loading_finds(tmp_path: Path) -> None:
    make(tmp_path, *TRAIN)
    assert count_images(settings_of(tmp_path)) == len(TRAIN)  # val is not needed for a plan
    with pytest.raises(DataError, match=r"data\.root is not set"):
        count_images(settings_of(None))


def test_paths_take_little_memory(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/c/{i:030}.jpg" for i in range(500)), "val/c/1.jpg")
    found = files(load(tmp_path))
    arrays = found.paths.nbytes + found.ends.nbytes + found.labels.nbytes
    assert arrays <= 500 * (len("c/") + 34 + 8 + 4) + 8
    assert found.paths.dtype == np.uint8
