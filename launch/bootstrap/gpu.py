"""Whether Horovod gets its NCCL operations: torch with CUDA, the toolkit's nvcc, and NCCL."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .environment import Torch
from .process import output_of

# Options of Horovod's own build that a user may set; they change the wheel, so they are in its key.
USER_OPTIONS = (
    "HOROVOD_GPU",
    "HOROVOD_GPU_OPERATIONS",
    "HOROVOD_CUDA_HOME",
    "HOROVOD_NCCL_HOME",
    "HOROVOD_NCCL_LINK",
    "HOROVOD_BUILD_CUDA_CC_LIST",
)
SYSTEM_PREFIXES = (Path("/usr"), Path("/usr/local"))


@dataclass(frozen=True)
class Gpu:
    options: Mapping[str, str] = field(default_factory=dict)
    identity: str = "no GPU operations"
    note: str = ""


def find_gpu(torch: Torch, site_packages: Path, environ: Mapping[str, str]) -> Gpu:
    if torch.cuda is None:
        return Gpu()
    chosen = {name: environ[name] for name in USER_OPTIONS if environ.get(name)}
    home = chosen.get("HOROVOD_CUDA_HOME") or environ.get("CUDA_HOME") or _home_of_nvcc(environ)
    if not home or not (Path(home) / "bin/nvcc").exists():
        note = f"torch is built for CUDA {torch.cuda}, but there is no nvcc (CUDA toolkit)"
        return Gpu(note=f"{note}: Horovod gets no GPU operations")
    nccl = find_nccl(
        [Path(environ[name]) for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME") if environ.get(name)]
        + [site_packages / "nvidia/nccl", Path(home), *SYSTEM_PREFIXES]
    )
    options = {"HOROVOD_CUDA_HOME": home} | chosen
    if nccl is None:
        note = "CUDA was found, but no NCCL (nccl.h, libnccl): GPU tensors travel through the host"
        return Gpu(options, f"CUDA {home}", note)
    options = {"HOROVOD_GPU_OPERATIONS": "NCCL"} | options
    nvcc = output_of([Path(home) / "bin/nvcc", "--version"])
    place = "PyPI" if nccl.is_relative_to(site_packages) else nccl  # the same for all checkouts
    identity = f"{sorted(options.items())}\n{nvcc}\n{place} {nccl_version(nccl)}"
    return Gpu(options | {"HOROVOD_NCCL_HOME": str(nccl)}, identity)


def _home_of_nvcc(environ: Mapping[str, str]) -> str | None:
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    return str(Path(nvcc).resolve().parent.parent) if nvcc else None


def find_nccl(prefixes: Iterable[Path]) -> Path | None:
    """torch's own NCCL comes before the system's: two copies in one process do not get on."""
    found = (p for p in prefixes if (p / "include/nccl.h").exists() and nccl_library(p))
    return next(found, None)


def nccl_library(prefix: Path) -> Path | None:
    folders = [prefix / "lib", prefix / "lib64", *prefix.glob("lib/*-linux-gnu")]
    return next((path for folder in folders for path in sorted(folder.glob("libnccl.so*"))), None)


def nccl_version(prefix: Path) -> str:
    header = (prefix / "include/nccl.h").read_text(encoding="utf-8", errors="replace")
    return "".join(re.findall(r"#define NCCL_VERSION_CODE.*", header))


def link_nccl(prefix: Path, target: Path) -> dict[str, str]:
    """The linker wants `libnccl.so`; PyPI's package has only `libnccl.so.2`: give it that name."""
    library = nccl_library(prefix)
    if library is None or library.name == "libnccl.so":
        return {}
    (target / "lib").mkdir(parents=True)
    os.symlink(prefix / "include", target / "include")
    os.symlink(library, target / "lib/libnccl.so")
    return {"HOROVOD_NCCL_HOME": str(target), "HOROVOD_NCCL_LINK": "SHARED"}
