"""What this machine can run, and what to do about the rest; nothing heavy is imported to find out.

Versions come from the packages' metadata, what Horovod was built with from names in its library,
GPUs from the driver's files in /proc. So it runs on a login node, and says so of one.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap

from harness.data_listing import class_folders, split_folder
from harness.data_sizes import IDX_FOLDERS, find_parts
from harness.dataset_table import DATASETS
from harness.errors import DataError
from harness.schema import Data
from harness.shard_listing import shard_paths

_WIDTH = 80
_NVIDIA = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU, if the driver is loaded
_SETUP = "not found: `make setup` installs it"
_PACKAGES = {
    "torch": ("torch", _SETUP),
    "torchvision": ("torchvision", _SETUP),
    "horovod": ("horovod", "not found: `make setup` builds it for the torch that is installed"),
    "mpi4py": ("mpi4py", _SETUP),
    "scikit-learn": ("sklearn", f"{_SETUP}; only digits and digits-enlarged need it"),
    "Pillow": ("PIL", f"{_SETUP}; only imagenet, folder and webdataset need it"),
}
"""Name -> what it is imported as, and what to say without it."""
_LAUNCHERS = {
    "horovodrun": "not on PATH: it comes with Horovod",
    "mpirun": "not on PATH: `make setup` installs Open MPI; on a cluster, `module avail` lists its",
    "srun": "not on PATH: it is part of Slurm, and only needed there",
}
_OPERATIONS = {"MPI": b"MPIAllreduce", "Gloo": b"GlooAllreduce", "NCCL": b"NCCLAllreduce"}
"""Name -> the class that Horovod's library has if it was built with it."""


@dataclass(frozen=True)
class Finding:
    name: str
    text: str
    """``found …``, ``ready …``, or what is missing and what to do."""


def doctor(root: Path | None = None) -> str:
    """The report, in lines of 80 columns; with ``root``, which data sets have their files there.

    Raises DataError if root is not a directory.
    """
    if root is not None and not os.path.isdir(root):  # Path.is_dir raises where access is denied
        raise DataError(f"--data {root} is not a directory")
    findings = software()
    missing = {finding.name for finding in findings if not finding.text.startswith("found")}
    lines = ["Software"]
    for finding in findings:
        lines += _entry(finding, 14)
    lines += ["", "Data sets"]
    lines += _wrapped("ROOT stands for data.root of the configuration. Nothing is downloaded.", 2)
    absent = []
    for finding in data_sets(root, with_digits="scikit-learn" not in missing):
        dataset = DATASETS[finding.name]
        if finding.text == f"not in {root}":
            absent.append(finding.name)
            continue
        lines += ["", *_entry(finding, 17), *_wrapped(dataset.title, 4)]
        if dataset.files:
            lines += _wrapped(f"files: {dataset.files}", 4, 7)
            lines += _wrapped(f"from:  {dataset.source}", 4, 7) if dataset.source else []
    if absent:
        told = f"Not in {root}: {', '.join(absent)}. `harness doctor` says what they need."
        lines += ["", *_wrapped(told, 2)]
    if root is None:
        lines += ["", *_wrapped("`harness doctor --data DIR` looks for the files in DIR.", 2)]
    return "\n".join(lines)


def software() -> list[Finding]:
    """What of the software is found here; nothing of it is imported or started."""
    found = [Finding("Python", f"found {platform.python_version()}, {sys.executable}")]
    versions = {name: _version(name, module) for name, (module, _) in _PACKAGES.items()}
    for name, known in versions.items():
        text = _PACKAGES[name][1] if known is None else f"found {known}"
        if name == "horovod" and known is not None:
            text += _horovod(versions["torch"])
        found.append(Finding(name, text))
    for name, otherwise in _LAUNCHERS.items():
        path = _which(name)
        found.append(Finding(name, otherwise if path is None else f"found {path}"))
    return [*found, Finding("GPUs", _gpus(versions["torch"]))]


def data_sets(root: Path | None, with_digits: bool) -> list[Finding]:
    """The state of each data set; ``with_digits``: scikit-learn is there."""
    return [Finding(name, _state(name, root, with_digits)) for name in DATASETS]


# ---- software -----------------------------------------------------------------------------------


def _version(package: str, module: str) -> str | None:
    """None: not installed."""
    with suppress(PackageNotFoundError):
        return str(version(package))
    with suppress(ImportError, ValueError):
        if find_spec(module) is not None:
            return "(version unknown)"
    return None


def _horovod(torch: str | None) -> str:
    """What Horovod was built with, and for."""
    with suppress(ImportError, ValueError, OSError):
        spec = find_spec("horovod")
        for place in (spec.submodule_search_locations if spec else None) or ():
            return _built(Path(place), torch)
    return ""


def _built(folder: Path, torch: str | None) -> str:
    libraries = sorted((folder / "torch").glob("mpi_lib*.so"))
    if not libraries:
        return ", but built without torch: `make setup` builds it anew"
    with (
        libraries[0].open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
        having = {name: library.find(mark) >= 0 for name, mark in _OPERATIONS.items()}
    parts = [
        f"{word} {' and '.join(names)}"
        for word, wanted in (("with", True), ("without", False))
        if (names := [name for name, there in having.items() if there == wanted])
    ]
    text = f", built {', '.join(parts)}"
    with suppress(OSError, ValueError, AttributeError):
        built_for = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["pytorch"]
        if torch is not None and built_for != torch:
            text += f", but for torch {built_for}: `make setup` builds it anew"
    return text


def _which(name: str) -> str | None:
    """On PATH, or beside an interpreter whose environment is not activated."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name) or shutil.which(name, path=beside)


def _gpus(torch: str | None) -> str:
    models = Counter(_nvidia_models())
    if not models:
        there = "nvidia-smi is here, but its driver is not" if _which("nvidia-smi") else "none"
        return f"{there}: ranks on this machine train on the CPU"
    text = "found " + ", ".join(f"{count} × {model}" for model, count in models.items())
    if torch is not None and torch.endswith("+cpu"):
        text += "; but this torch is built without CUDA: install one from https://pytorch.org"
    return text


def _nvidia_models() -> Iterator[str]:
    with suppress(OSError):
        for folder in sorted(_NVIDIA.iterdir()):
            lines = (folder / "information").read_text(errors="replace").splitlines()
            facts = dict(line.split(":", 1) for line in lines if ":" in line)
            yield facts.get("Model", "GPU").strip()


# ---- data ---------------------------------------------------------------------------------------


def _state(name: str, root: Path | None, with_digits: bool) -> str:
    dataset = DATASETS[name]
    if not dataset.files:
        if name.startswith("digits") and not with_digits:
            return f"needs scikit-learn: {dataset.source}"
        return f"ready: {dataset.source}"
    if root is None:
        return "needs data.root"
    if dataset.kind == "memory":
        return _of_parts(name, root)
    return _of_shards(root) if name == "webdataset" else _of_folders(name, root)


def _of_parts(name: str, root: Path) -> str:
    """A fixed list of files."""
    found, missing = find_parts(root, name)
    if not found:
        return f"not in {root}"
    places = ", ".join(dict.fromkeys(str(path.parent) for path in found.values()))
    if missing:
        return f"incomplete in {places}: {', '.join(missing)} missing"
    for other in IDX_FOLDERS:
        if other != name and name in IDX_FOLDERS and find_parts(root, other)[0] == found:
            return f"found in {places}, unless these are {other}'s files: the names are the same"
    return f"found in {places}"


def _of_folders(name: str, root: Path) -> str:
    """One folder for each class."""
    train, test = _both(name, root, lambda data, half: class_folders(split_folder(data, half)))
    wanted = DATASETS[name].classes
    if train and wanted is not None and train != wanted:
        return f"not in {root}: {train:,} class folders for training, and not {wanted:,}"
    return _of_halves(root, "class folders", train, test)


def _of_shards(root: Path) -> str:
    return _of_halves(root, "shards", *_both("webdataset", root, shard_paths))


def _both(name: str, root: Path, listing: Callable[[Data, bool], list[bytes]]) -> tuple[int, int]:
    """How many the loader would find for training and for the test."""
    data, counts = Data(dataset=name, root=str(root)), [0, 0]
    for at, train in enumerate((True, False)):
        with suppress(DataError):  # for want of any
            counts[at] = len(listing(data, train))
    return counts[0], counts[1]


def _of_halves(root: Path, what: str, train: int, test: int) -> str:
    if train and test:
        return f"found in {root}: {train:,} {what} for training, {test:,} for the test"
    if train or test:
        return f"incomplete in {root}: no {what} for {'the test' if train else 'training'}"
    return f"not in {root}"


# ---- lines --------------------------------------------------------------------------------------


def _entry(finding: Finding, width: int) -> list[str]:
    """A name and beside it, in a column of its own, what is to be said."""
    lines = _wrapped(finding.text, 2 + width)
    return [f"  {finding.name:<{width}}{lines[0].lstrip()}", *lines[1:]]


def _wrapped(text: str, indent: int, hanging: int = 0) -> list[str]:
    return wrap(
        text,
        _WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hanging),
        break_long_words=False,
        break_on_hyphens=False,
    )
