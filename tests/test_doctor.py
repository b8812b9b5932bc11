"""`harness doctor`: what is found of the software, the machine and the data.

What it says of machines on which something is broken is in test_doctor_broken.py.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, require

from harness.data_sizes import CIFAR_FOLDERS, CIFAR_TEST, CIFAR_TRAIN, IDX_FOLDERS, IDX_PARTS
from harness.dataset_table import DATASETS
from harness.doctor import Finding, findings, looks, machine, software, storage
from harness.doctor.datasets import as_lines, check_root, data_sets
from harness.doctor.looks import Look, look
from harness.errors import DataError, LaunchError
from harness.processes import Process
from launch import doctor as module
from launch.doctor import DoctorRequest, doctor

FILE_SETS = [name for name in DATASETS if DATASETS[name].files]


def states(root: Path | None, with_digits: bool = True) -> dict[str, str]:
    return {finding.name: finding.text for finding in data_sets(root, with_digits)}


def found(quick: bool = True) -> dict[str, Finding]:
    return {finding.name: finding for finding in software.software(quick)}


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


def shown(root: Path | None = None) -> str:
    return "\n".join(as_lines(data_sets(root, with_digits=True), root))


@pytest.mark.smoke
def test_every_data_set_is_there_with_what_it_needs() -> None:
    words = " ".join(shown().split())
    for name, dataset in DATASETS.items():
        assert f" {name} " in words
        for text in (dataset.title, dataset.files):
            assert text in words
        if dataset.files:
            assert dataset.source in words


def test_what_is_not_in_a_folder_is_told_in_short(tmp_path: Path) -> None:
    words = " ".join(shown(tmp_path).split())
    names = [name for name, dataset in DATASETS.items() if dataset.files]
    assert f"Not in {tmp_path}: {', '.join(names)}." in words
    for name, dataset in DATASETS.items():
        assert (dataset.title in words) == (name not in names)


def test_lines_are_at_most_80_columns_wide(capsys: pytest.CaptureFixture[str]) -> None:
    doctor(DoctorRequest(quick=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and "/" not in line] == []


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
        "from harness.cli import main\nmain(['doctor', '--quick'])\n"
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
        check_root(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a directory"):
        doctor(DoctorRequest(data=tmp_path / "nowhere", quick=True))


@pytest.mark.parametrize("bad", [{"ranks": 0}, {"timeout": 0.0}, {"hosts": "a:b:c"}])
def test_what_cannot_be_asked(bad: dict[str, Any]) -> None:
    with pytest.raises(LaunchError):
        doctor(DoctorRequest(quick=True, **bad))


def test_the_json_has_what_the_lines_have(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor(DoctorRequest(quick=True, json=True))
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"format", "ok", "checks", "data"}
    assert told["ok"] == (code == 0)
    checks = {key: set(group) for key, group in told["checks"].items()}
    assert checks["software"] == {
        "python", "torch", "torchvision", "horovod", "mpi4py", "scikit-learn", "pillow", "mpi",
        "horovodrun", "slurm",
    }  # fmt: skip
    assert {"cores", "memory", "gpus", "network"} <= checks["machine"]
    assert checks["storage"] == {"directory", "free_space", "file_system"}
    for group in told["checks"].values():
        for check in group.values():
            assert {"status", "text", "remedy"} <= check.keys()
            assert check["status"] in ("ok", "warning", "missing")
            assert check["status"] != "missing" or check["remedy"]
    assert told["data"]["synthetic"] == {
        "usable": True, "text": "ready: made on the device that trains",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("ranks_available")
def test_here_a_run_would_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "doctor", "--json", "--run-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    of_horovod, of_mpi4py = checks["software"]["horovod"], checks["software"]["mpi4py"]
    assert "MPI" in of_horovod["controllers"]
    assert {os.path.realpath(path) for path in of_horovod["libmpi"]} == {
        os.path.realpath(path) for path in of_mpi4py["libmpi"]
    }
    assert checks["software"]["mpi"]["version"]
    assert checks["storage"]["file_system"]["features"]["atomic_rename"] is True


def test_only_what_is_missing_fails() -> None:
    warning = Finding("a", "a", "warning", "b")
    assert findings.good([Finding("a", "a"), warning])
    assert not findings.good([warning, Finding("a", "a", "missing", "b")])
    assert "worth a look: a" in findings.verdict([warning])
    assert "To be put right: x; worth a look: a." in findings.verdict(
        [warning, Finding("x", "", "missing")]
    )


# ---- looks --------------------------------------------------------------------------------------


def test_a_look_comes_back_with_what_it_found() -> None:
    assert look("print('noise'); print('@ {\"a\": [1]}')").facts == {"a": [1]}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes (SIGSEGV)"),
        ("raise ImportError('no such thing')", "ImportError: no such thing"),
        ("import sys; sys.exit(3)", "ends with exit code 3, without a word"),
        ("print('@ [1]')", "ends with exit code 0, without a word"),
        ("print('@ {')", "ends with exit code 0, without a word"),
    ],
)
def test_a_look_that_fails_says_how(source: str, said: str) -> None:
    seen = look(source)
    assert (seen.facts, seen.failure) == ({}, said)


def test_a_look_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; "
    child += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); "
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(1000)"
    seen = look(child, patience=2)
    assert seen.failure == "does not come back within 2 s"
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 60  # for the kernel to be done with it
    while (left := Process.of(pid)) is not None and left.lives and time.monotonic() < until:
        time.sleep(0.01)
    assert left is None or not left.lives


def test_an_interpreter_that_is_not_there() -> None:
    seen = looks.look_at(["/nowhere/python", "-c", ""], 5, {})
    assert seen.failure == "cannot be tried: No such file or directory"


# ---- software -----------------------------------------------------------------------------------


def test_versions_are_those_of_the_packages() -> None:
    torch = pytest.importorskip("torch")
    assert found()["torch"].facts["version"] == torch.__version__
    assert found()["Python"].text.startswith(f"{sys.version.split()[0]}, ")


def test_what_is_looked_at_loads() -> None:
    """Of an environment in which training works nothing is warned of."""
    for name in ("torch", "torchvision"):
        require(importlib.util.find_spec(name) is not None, f"{name} is not installed")
    told = found(quick=False)
    assert {name: told[name].status for name in ("torch", "torchvision")} == {
        "torch": "ok",
        "torchvision": "ok",
    }


def test_what_is_missing_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(name: str, *_: object) -> None:
        return None

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(software, "version", missing)
    monkeypatch.setattr(software, "find_spec", none)
    monkeypatch.setattr(module.detect, "program", none)
    monkeypatch.setattr(machine, "which", none)
    monkeypatch.setattr(machine, "nvidia_models", list)
    told = {one.name: one for one in module.local_findings(DoctorRequest())}
    for name, status in (
        ("torch", "missing"), ("Horovod", "missing"), ("MPI", "missing"),
        ("torchvision", "warning"), ("mpi4py", "warning"),
        ("scikit-learn", "warning"), ("Pillow", "warning"), ("horovodrun", "warning"),
    ):  # fmt: skip
        assert (told[name].status, bool(told[name].remedy)) == (status, True), name
    assert told["Slurm"].status == "ok"
    assert told["GPUs"].text == "none: ranks on this machine train on the CPU"
    assert doctor(DoctorRequest()) == 1
    report = " ".join(capsys.readouterr().out.split())
    assert "digits needs scikit-learn" in report
    assert "synthetic ready" in report
    assert "A run does not start here. To be put right: torch, Horovod, MPI" in report


def test_a_package_without_metadata_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(software, "version", missing)
    assert software.installed_as("torch", "json") == "(version unknown)"
    assert software.installed_as("horovod", "no_such_module") is None


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
    assert software.read_build(tmp_path, "2.9.0")[:2] == (f", {said}", "ok")
    (tmp_path / "metadata.json").write_text(json.dumps({"pytorch": "2.9.0"}))
    assert software.read_build(tmp_path, "2.9.0")[:2] == (f", {said}", "ok")
    text, status, facts = software.read_build(tmp_path, "2.13.0+cpu")
    assert "but for torch 2.9.0 and not 2.13.0+cpu" in text
    assert (status, facts["built_for_torch"]) == ("missing", "2.9.0")
    assert software.read_build(tmp_path, None)[1] == "ok"


def test_horovod_that_was_built_without_torch(tmp_path: Path) -> None:
    assert software.read_build(tmp_path, "2.9.0")[:2] == (", built without torch", "missing")


def test_an_empty_library_of_horovod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an installation; a file of no bytes cannot be mapped."""
    touch(tmp_path / "torch", "mpi_lib_v2.so")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(software, "find_spec", lambda name: Spec)
    assert software.built_with("2.9.0") == ("", "ok", {})


INSTALLED: dict[str, str | None] = {"torch": "2.13.0", "horovod": "0.28.1"}


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("ImportError: x.so: undefined symbol: _ZN3c105ErrorC1E", "was built for another torch"),
        ("OSError: libmpi.so.40: cannot open shared object file", "needs libmpi.so.40"),
        ("crashes (SIGSEGV)", "importing it crashes (SIGSEGV)"),
    ],
)
def test_a_horovod_that_does_not_load(failure: str, said: str) -> None:
    told = software._horovod(INSTALLED, Look(failure=failure))
    assert (told.status, said in told.text) == ("missing", True), told.text
    assert told.remedy == "python -m launch.bootstrap --horovod-only"


# ---- machine ------------------------------------------------------------------------------------


def torch_of(version: str, **facts: Any) -> Finding:
    return Finding("torch", version, facts={"version": version, **facts})


def test_gpus_come_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path)
    for number in range(4):
        touch(tmp_path / f"0000:{number}")
        text = "Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 17\nVideo BIOS: \t ??\n"
        (tmp_path / f"0000:{number}" / "information").write_text(text)
    cuda = torch_of("2.13.0+cu130", cuda="13.0", cuda_works=True, nccl="2.28.9")
    assert machine._gpus(cuda).text == "4 × NVIDIA A100-SXM4-40GB"
    plain = machine._gpus(torch_of("2.13.0+cpu"))
    assert (plain.status, "built without CUDA" in plain.text) == ("warning", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = machine._gpus(torch_of("2.13.0+cu130", cuda="13.0", cuda_works=False))
    assert hidden.remedy.startswith("unset CUDA_VISIBLE_DEVICES")
    without = Finding("Horovod", "", facts={"version": "0.28.1", "operations": ["MPI"]})
    assert machine._nccl(cuda, without).status == "warning"
    with_it = Finding("Horovod", "", facts={"version": "0.28.1", "operations": ["MPI", "NCCL"]})
    assert machine._nccl(cuda, with_it).text == "2.28.9 in torch"
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path / "nowhere")
    monkeypatch.setattr(machine, "which", lambda name: "/usr/bin/nvidia-smi")
    assert machine._gpus(torch_of("2.13.0")).text.startswith(
        "nvidia-smi is here, but its driver is not"
    )


def test_a_cgroup_s_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.cpu_quota() is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota() is None
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cpu_quota() == 0.5
    told = machine._cores()
    assert (told.status, "ranks × threads ≤ 1" in told.remedy) == ("warning", True)


def test_memory_is_what_the_cgroup_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = machine.available_memory()
    (tmp_path / "memory.max").write_text("1000000")
    (tmp_path / "memory.current").write_text("400000")
    assert machine.available_memory() == 600_000
    (tmp_path / "memory.max").write_text("max")
    again = machine.available_memory()
    assert whole is not None
    assert again is not None
    assert again > 600_000


def test_the_loopback_is_an_interface() -> None:
    by_name = {one["name"]: one for one in machine.interfaces()}
    assert by_name["lo"]["address"] == "127.0.0.1"


# ---- storage ------------------------------------------------------------------------------------


def test_a_directory_that_will_do(tmp_path: Path) -> None:
    told = {one.name: one for one in storage.storage(tmp_path / "not" / "there" / "yet")}
    assert told["directory"].facts["directory"] == str(tmp_path)
    assert [one.status for one in told.values() if one.name != "free space"] == ["ok", "ok"]
    assert set(told["file system"].facts["features"]) == {
        "atomic_rename", "locks", "fsync", "symbolic_links", "hard_links",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", list(storage._CHECKS))
def test_each_way_in_which_a_file_system_may_fail(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    target = {
        "atomic rename": (os, "rename"), "locks": (storage.fcntl, "flock"), "fsync": (os, "fsync"),
        "symbolic links": (os, "symlink"), "hard links": (os, "link"),
    }[name]  # fmt: skip
    monkeypatch.setattr(*target, refuses)
    seen = storage.examine(tmp_path) if name != "fsync" else None
    why = storage._tried(storage._CHECKS[name], tmp_path) if seen is None else seen["tried"][name]
    assert why == "Operation not supported"


def test_a_lock_that_is_given_twice_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.fcntl, "flock", lambda *_: None)
    assert storage.examine(tmp_path)["tried"]["locks"] == "a lock is given twice"


def test_without_hard_links_runs_go_on(tmp_path: Path) -> None:
    seen = storage.examine(tmp_path)
    seen["tried"]["hard links"] = "Operation not permitted"
    told = {one.name: one for one in storage.judged(tmp_path, Look(seen))}
    assert told["file system"].status == "warning"
    seen["tried"]["locks"] = "No locks available"
    told = {one.name: one for one in storage.judged(tmp_path, Look(seen))}
    assert told["file system"].status == "missing"
    assert "locks (No locks available)" in told["file system"].text


def test_a_file_system_that_does_not_answer(tmp_path: Path) -> None:
    (told,) = storage.judged(tmp_path, Look(failure="does not come back within 30 s"))
    assert (told.status, "file server" in told.remedy) == ("missing", True)


# ---- launchers ----------------------------------------------------------------------------------


def a_program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("echo MPI plugin types are... none pmi2 pmix pmix_v4", "ok", "pmix_v4"),
        ("echo MPI plugin types are... none cray_shasta", "warning", "it starts no MPI ranks"),
        ("echo srun: fatal: no configuration >&2; exit 1", "warning", "no configuration"),
    ],
)  # fmt: skip
def test_what_slurm_starts_ranks_by(
    script: str, status: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_program(tmp_path, "srun", script)
    a_program(tmp_path, "sinfo", "echo 'debug*'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    told = module._slurm(quick=False)
    assert (told.status, said in told.text) == (status, True), told.text
    if status == "ok":
        assert told.facts["pmi"] == ["pmi2", "pmix", "pmix_v4"]
        assert told.facts["partitions"] == ["debug*"]
        a_program(tmp_path, "sinfo", "exit 1")
        assert "does not answer" in module._slurm(quick=False).text
    else:
        assert told.remedy


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
