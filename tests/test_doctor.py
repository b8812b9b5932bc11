"""`harness doctor`: what is found of the software and of the data, without importing any of it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from support import ROOT

from harness import doctor as module
from harness.data_sizes import CIFAR_FOLDERS, CIFAR_TEST, CIFAR_TRAIN, IDX_FOLDERS, IDX_PARTS
from harness.dataset_table import DATASETS
from harness.doctor import data_sets, doctor, software
from harness.errors import DataError

FILE_SETS = [name for name in DATASETS if DATASETS[name].files]


def states(root: Path | None, with_digits: bool = True) -> dict[str, str]:
    return {finding.name: finding.text for finding in data_sets(root, with_digits)}


def found() -> dict[str, str]:
    return {finding.name: finding.text for finding in software()}


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def idx_names(suffix: str = "") -> list[str]:
    return [f"{part}-idx{dims}-ubyte{suffix}" for part, dims in IDX_PARTS.items()]


def class_folders(split: Path, count: int) -> None:
    for number in range(count):
        (split / f"n{number:08}").mkdir(parents=True)


# ---- the whole ----------------------------------------------------------------------------------


@pytest.mark.smoke
def test_every_data_set_is_there_with_what_it_needs() -> None:
    words = " ".join(doctor().split())
    for name, dataset in DATASETS.items():
        assert f" {name} " in words
        for text in (dataset.title, dataset.files):
            assert text in words
        if dataset.files:
            assert dataset.source in words


def test_what_is_not_in_a_folder_is_told_in_short(tmp_path: Path) -> None:
    words = " ".join(doctor(tmp_path).split())
    names = [name for name, dataset in DATASETS.items() if dataset.files]
    assert f"Not in {tmp_path}: {', '.join(names)}." in words
    for name, dataset in DATASETS.items():
        assert (dataset.title in words) == (name not in names)


def test_lines_are_at_most_80_columns_wide() -> None:
    too_long = [line for line in doctor().splitlines() if len(line) > 80 and "/" not in line]
    assert too_long == []


def test_it_runs_where_nothing_is_installed() -> None:
    """On a login node: what is heavy is blocked, and must not be loaded where it is there."""
    heavy = ("torch", "torchvision", "horovod", "mpi4py", "sklearn", "numpy", "PIL", "psutil")
    block = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {heavy!r}:\n"
        "            raise ImportError(name)\n"
    )
    run = (
        "from harness.doctor import doctor\nprint(doctor())\n"
        f"assert not set({heavy!r}) & set(sys.modules)\n"
    )
    for before in (block, block + "sys.meta_path.insert(0, Block())\n"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", before + run],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Data sets" in done.stdout


def test_a_place_to_look_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory"):
        doctor(tmp_path / "nowhere")


# ---- software -----------------------------------------------------------------------------------


def test_versions_are_those_of_the_packages() -> None:
    torch = pytest.importorskip("torch")
    assert found()["torch"] == f"found {torch.__version__}"
    assert found()["Python"].startswith(f"found {sys.version.split()[0]}, ")


def test_what_is_missing_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str, *_: object) -> None:
        return None

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    monkeypatch.setattr(module, "find_spec", none)
    monkeypatch.setattr(module, "_which", none)
    monkeypatch.setattr(module, "_nvidia_models", list)
    texts = found()
    assert set(texts) == {
        "Python", "torch", "torchvision", "horovod", "mpi4py", "scikit-learn", "Pillow",
        "horovodrun", "mpirun", "srun", "GPUs",
    }  # fmt: skip
    for name in ("torch", "torchvision", "horovod", "mpi4py", "scikit-learn", "Pillow"):
        assert texts[name].startswith("not found: `make setup`")
    for name in ("horovodrun", "mpirun", "srun"):
        assert texts[name].startswith("not on PATH")
    assert texts["GPUs"] == "none: ranks on this machine train on the CPU"
    report = " ".join(doctor().split())
    assert "digits needs scikit-learn" in report
    assert "synthetic ready" in report


def test_a_package_without_metadata_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    monkeypatch.setattr(module, "_PACKAGES", {"torch": ("json", ""), "horovod": ("no_such", "-")})
    assert found()["torch"] == "found (version unknown)"
    assert found()["horovod"] == "-"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"..13MPIAllreduce..GlooAllreduce..NCCLAllreduce", "built with MPI and Gloo and NCCL"),
        (b"..GlooAllreduce..", "built with Gloo, without MPI and NCCL"),
        (b"....", "built without MPI and Gloo and NCCL"),
    ],
)
def test_what_horovod_was_built_with(tmp_path: Path, content: bytes, said: str) -> None:
    touch(tmp_path / "torch")
    (tmp_path / "torch" / "mpi_lib_v2.cpython-311-x86_64-linux-gnu.so").write_bytes(content)
    assert module._built(tmp_path, "2.9.0") == f", {said}"
    (tmp_path / "metadata.json").write_text(json.dumps({"pytorch": "2.9.0"}))
    assert module._built(tmp_path, "2.9.0") == f", {said}"
    assert "but for torch 2.9.0: `make setup`" in module._built(tmp_path, "2.13.0+cpu")
    assert module._built(tmp_path, None) == f", {said}"


def test_horovod_that_was_built_without_torch(tmp_path: Path) -> None:
    assert "built without torch" in module._built(tmp_path, "2.9.0")


def test_an_empty_library_of_horovod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an installation; a file of no bytes cannot be mapped."""
    touch(tmp_path / "torch", "mpi_lib_v2.so")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(module, "find_spec", lambda name: Spec)
    assert module._horovod("2.9.0") == ""


def test_gpus_come_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NVIDIA", tmp_path)
    for number in range(4):
        touch(tmp_path / f"0000:{number}")
        text = "Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 17\nVideo BIOS: \t ??\n"
        (tmp_path / f"0000:{number}" / "information").write_text(text)
    assert module._gpus("2.13.0+cu130") == "found 4 × NVIDIA A100-SXM4-40GB"
    assert "built without CUDA" in module._gpus("2.13.0+cpu")
    monkeypatch.setattr(module, "_NVIDIA", tmp_path / "nowhere")
    monkeypatch.setattr(module, "_which", lambda name: "/usr/bin/nvidia-smi")
    assert module._gpus(None).startswith("nvidia-smi is here, but its driver is not")


# ---- data ---------------------------------------------------------------------------------------


def test_without_a_root_nothing_is_looked_for() -> None:
    for name, text in states(None).items():
        assert text.startswith("needs data.root" if name in FILE_SETS else "ready")
    assert states(None, with_digits=False)["digits"].startswith("needs scikit-learn")
    assert states(None, with_digits=False)["synthetic"].startswith("ready")


def test_an_empty_folder_has_nothing(tmp_path: Path) -> None:
    for name in FILE_SETS:
        assert states(tmp_path)[name] == f"not in {tmp_path}"


@pytest.mark.parametrize("name", IDX_FOLDERS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_in_their_own_folder(tmp_path: Path, name: str, suffix: str) -> None:
    raw = tmp_path / IDX_FOLDERS[name] / "raw"
    touch(raw, *idx_names(suffix))
    (other,) = set(IDX_FOLDERS) - {name}
    assert states(tmp_path)[name] == f"found in {raw}"
    assert states(tmp_path)[other] == f"not in {tmp_path}"
    (raw / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    assert states(tmp_path)[name] == f"incomplete in {raw}: t10k-labels-idx1-ubyte missing"


def test_idx_files_that_may_be_of_either_set(tmp_path: Path) -> None:
    touch(tmp_path, *idx_names())
    for name, other in (("mnist", "fashion-mnist"), ("fashion-mnist", "mnist")):
        assert states(tmp_path)[name].startswith(f"found in {tmp_path}, unless these are {other}'s")


@pytest.mark.parametrize("name", CIFAR_FOLDERS)
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_in_its_folder_or_beside(tmp_path: Path, name: str, inside: bool) -> None:
    folder = tmp_path / CIFAR_FOLDERS[name] if inside else tmp_path
    touch(folder, *CIFAR_TRAIN[name], CIFAR_TEST[name])
    texts = states(tmp_path)
    assert texts.pop(name) == f"found in {folder}"
    assert [other for other, text in texts.items() if text.startswith("found")] == []
    (folder / CIFAR_TEST[name]).unlink()
    assert states(tmp_path)[name] == f"incomplete in {folder}: {CIFAR_TEST[name]} missing"


def test_image_folders(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", 3)
    assert states(tmp_path)["folder"] == f"incomplete in {tmp_path}: no class folders for the test"
    class_folders(tmp_path / "val", 2)
    said = f"found in {tmp_path}: 3 class folders for training, 2 for the test"
    assert states(tmp_path)["folder"] == said
    assert "3 class folders for training, and not 1,000" in states(tmp_path)["imagenet"]


def test_imagenet_has_a_thousand_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        class_folders(tmp_path / part, 1000)
    said = f"found in {tmp_path}: 1,000 class folders for training, 1,000 for the test"
    assert states(tmp_path)["imagenet"] == said


def test_shards(tmp_path: Path) -> None:
    touch(tmp_path, "val-0.tar")
    assert states(tmp_path)["webdataset"] == f"incomplete in {tmp_path}: no shards for training"
    touch(tmp_path, "train-0.tar", "train-1.tar", "notes.txt")
    said = f"found in {tmp_path}: 2 shards for training, 1 for the test"
    assert states(tmp_path)["webdataset"] == said


def test_files_are_looked_for_and_not_read(tmp_path: Path) -> None:
    """Wrong contents are the loader's business; here they must not cost time or fail."""
    raw = tmp_path / "MNIST" / "raw"
    touch(raw, *idx_names())
    (raw / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0, 2**31, 28, 28))
    assert states(tmp_path)["mnist"] == f"found in {raw}"
