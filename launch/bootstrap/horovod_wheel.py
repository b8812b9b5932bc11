"""Horovod as a wheel, compiled once per Python, torch, MPI, GPU options and machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .console import BootstrapError, Console
from .environment import Interpreter, Torch, digest, libc
from .gpu import Gpu, find_gpu, link_nccl
from .mpi import Mpi
from .process import locked, run_logged

VERSION = "0.28.1"
ARCHIVE = f"horovod-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
FLAGS = "-g0 -w -O2"
BUILD_SECONDS = 190  # of processor time, seen on x86-64 without CUDA
BUILD_REQUIREMENTS = (
    "cffi>=1.4",
    "cloudpickle",
    "numpy",
    "packaging",
    "psutil",
    "pyyaml",
    "setuptools>=77,<81",
    "wheel",
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the wheel holds."""

    python: Interpreter
    torch: Torch
    mpi: Mpi
    gpu: Gpu

    @classmethod
    def detect(cls, python: Interpreter, mpi: Mpi) -> Recipe:
        torch = Torch.read(python.torch)
        return cls(python, torch, mpi, find_gpu(torch, Path(python.site_packages), os.environ))

    def ingredients(self) -> dict[str, str]:
        return {
            "horovod": f"{VERSION} {FLAGS}",
            "python": self.python.abi,
            "machine": f"{self.python.machine} {libc()}",
            "torch": f"{self.torch.version} {self.torch.build} c++{self.torch.cxx_standard}",
            "mpi": self.mpi.identity,
            "gpu": self.gpu.identity,
        }

    def key(self) -> str:
        return wheel_key(self.ingredients())


def wheel_key(ingredients: Mapping[str, str]) -> str:
    return digest(json.dumps(ingredients, sort_keys=True))[:16]


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    if chosen := environ.get("HARNESS_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "scaling-harness"


def cached_wheel(key: str) -> Path | None:
    wheels = (cache_root() / "wheels" / key).glob("*.whl")
    return next((wheel for wheel in wheels if zipfile.is_zipfile(wheel)), None)


def parse_percent(line: str) -> int | None:
    """The percentage in a line of cmake's make output."""
    found = re.match(r"\s*\[\s*(\d{1,3})%\] ", line)
    return int(found.group(1)) if found else None


def jobs(environ: Mapping[str, str] = os.environ) -> int:
    """One compiler per processor, 2 GB of memory for each, at most 8: there are not many files."""
    if chosen := environ.get("HARNESS_BUILD_JOBS"):
        if not chosen.isdecimal() or int(chosen) < 1:
            raise BootstrapError(f"HARNESS_BUILD_JOBS is {chosen!r}; it must be a number from 1")
        return int(chosen)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return max(1, min(processors, memory // 2_000_000_000, 8))


def compiler(environ: Mapping[str, str] = os.environ, standard: int | None = None) -> list[str]:
    """The C++ compiler as a command, refused where it or make is missing or too old."""
    path = environ.get("PATH", "")
    names = [environ["CXX"]] if environ.get("CXX") else ["g++", "c++", "clang++"]
    commands = [shlex.split(name) for name in names]
    found = next((words for words in commands if shutil.which(words[0], path=path)), None)
    if found is None:
        where = "CXX names one that cannot be run" if environ.get("CXX") else "not on PATH"
        raise BootstrapError(
            f"there is no C++ compiler: {' or '.join(names)} ({where}). Horovod is compiled; "
            "install g++ (package g++ or gcc-c++, or load a compiler module) or set CXX"
        )
    if not shutil.which("make", path=path):
        raise BootstrapError("there is no make on PATH; Horovod's build needs it (package make)")
    if standard is not None:
        words = [*found, f"-std=c++{standard}", "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(words, capture_output=True, check=False, env=dict(environ)).returncode:
            raise BootstrapError(f"{shlex.join(found)} knows no C++{standard}, which torch needs")
    return found


def verify_archive(archive: Path) -> None:
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != ARCHIVE_SHA256:
        raise BootstrapError(
            f"{archive} is not Horovod {VERSION}'s source: sha256 {actual}, not {ARCHIVE_SHA256}"
        )


def source_archive(python: str, workdir: Path, log: Path) -> Path:
    """The verified source: named by HARNESS_HOROVOD_SDIST, kept from before, or downloaded."""
    if given := os.environ.get("HARNESS_HOROVOD_SDIST"):
        if not Path(given).is_file():
            raise BootstrapError(f"HARNESS_HOROVOD_SDIST names {given}, which is no file")
        verify_archive(Path(given))
        return Path(given).absolute()
    kept = cache_root() / "sources" / ARCHIVE
    if not kept.exists():
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(workdir)]
        run_logged([python, "-m", "pip", "download", *options, f"horovod=={VERSION}"], log)
        verify_archive(workdir / ARCHIVE)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(workdir / ARCHIVE, kept.with_suffix(f".{os.getpid()}"))
        kept.with_suffix(f".{os.getpid()}").replace(kept)
    verify_archive(kept)
    return kept


def write_wrapper(path: Path, command: list[str], standard: int, *, relocatable: bool) -> None:
    """A compiler that has the last word on -std: Horovod asks for C++14, torch needs more.

    With PyPI's MPI the library looks for libmpi relative to itself, in whatever environment the
    wheel is installed, and not in the one where it was compiled.
    """
    rpath = "'-Wl,-rpath,$ORIGIN/../../../..'" if relocatable else ""
    last = f"-std=c++{standard} {FLAGS}"
    path.write_text(
        f'#!/bin/sh\nexec {shlex.join(command)} {rpath} "$@" {last}\n', encoding="utf-8"
    )
    path.chmod(0o755)


def build_environment(recipe: Recipe, workdir: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    folders = [recipe.mpi.folder, recipe.python.scripts, os.environ.get("PATH", "")]
    env |= {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI": "1",
        "MAKEFLAGS": f"-j{jobs()}",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "CXX": str(workdir / "c++"),
        "PATH": os.pathsep.join(str(folder) for folder in folders if folder),
        "TMPDIR": str(workdir),
        **recipe.gpu.options,
    }
    if nccl := recipe.gpu.options.get("HOROVOD_NCCL_HOME"):
        env |= link_nccl(Path(nccl), workdir / "nccl")
    return env


def build_wheel(recipe: Recipe, log: Path, console: Console) -> Path:
    """The cached wheel, built now if it is not there; two set-ups at once build it only once."""
    folder = cache_root() / "wheels" / recipe.key()
    with locked(folder / "lock", console):
        if wheel := cached_wheel(recipe.key()):
            return wheel
        for left in folder.glob("build-*"):  # by a set-up that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as name:
            built = _compile(recipe, Path(name), log, console)
            (folder / "ingredients.json").write_text(json.dumps(recipe.ingredients(), indent=1))
            return built.replace(folder / built.name)


def _compile(recipe: Recipe, workdir: Path, log: Path, console: Console) -> Path:
    standard = recipe.torch.cxx_standard
    command = compiler(standard=standard)
    if not (Path(recipe.python.headers) / "Python.h").exists():
        raise BootstrapError("Python's headers (Python.h) are missing (package python3-dev)")
    write_wrapper(workdir / "c++", command, standard, relocatable=recipe.mpi.folder is None)
    minutes = max(1, round(BUILD_SECONDS / jobs() / 60))
    console.say(
        f"Horovod {VERSION} is compiled once for this Python, torch and MPI: about {minutes} "
        f"min with {jobs()} processes; the wheel is kept in {workdir.parent}"
    )
    with console.step(f"Horovod {VERSION}") as step:
        archive = source_archive(recipe.python.executable, workdir, log)
        options = ["-v", "--no-deps", "--no-build-isolation", "-w", str(workdir / "out")]
        run_logged(
            [recipe.python.executable, "-m", "pip", "wheel", *options, archive],
            log,
            env=build_environment(recipe, workdir),
            on_line=lambda line: step.percent(parse_percent(line)),
        )
        step.outcome = f"Horovod {VERSION} compiled"
    return next((workdir / "out").glob("horovod-*.whl"))
