"""Python, torch, Horovod and mpi4py: what is installed, and whether it works together."""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.doctor.findings import Finding, Status
from harness.doctor.looks import HOROVOD, MPI4PY, TORCH, TORCHVISION, Look, look

_SETUP = "make setup (in a checkout)"
_TORCH = (
    f'{_SETUP}; or pip install -c "$(python -m launch.bootstrap --constraints)" torch torchvision'
)
_HOROVOD = "python -m launch.bootstrap --horovod-only"
_MPI4PY = "pip install --force-reinstall --no-cache-dir --no-binary mpi4py mpi4py"
_LEAST = (3, 11)
_SMALL = {"scikit-learn": ("sklearn", "digits and digits-enlarged"),
          "Pillow": ("PIL", "imagenet, folder and webdataset")}  # fmt: skip
"""Name -> what it is imported as, and which data sets alone need it."""
_OPERATIONS = {"MPI": b"MPIAllreduce", "Gloo": b"GlooAllreduce", "NCCL": b"NCCLAllreduce"}
"""Name -> the class that Horovod's library has if it was built with it."""
_MODULES = {"torch": "torch", "torchvision": "torchvision", "horovod": "horovod",
            "mpi4py": "mpi4py"}  # fmt: skip


def software(quick: bool = False) -> list[Finding]:
    """All findings; ``quick``: without importing anything, so what is told is what is installed."""
    installed = {name: installed_as(name, module) for name, module in _MODULES.items()}
    looks = {} if quick else _looks(name for name, known in installed.items() if known)
    findings = [_python(), _torch(installed["torch"], looks.get("torch"))]
    findings.append(_torchvision(installed["torchvision"], looks.get("torchvision")))
    findings.append(_horovod(installed, looks.get("horovod")))
    findings.append(_mpi4py(installed["mpi4py"], looks.get("mpi4py"), looks.get("horovod")))
    return [*findings, *(_small(name) for name in _SMALL)]


def _looks(names: Iterable[str]) -> dict[str, Look]:
    """All at once: each spends most of its time on files."""
    sources = {"torch": TORCH, "torchvision": TORCHVISION, "horovod": HOROVOD, "mpi4py": MPI4PY}
    wanted = [name for name in names if name in sources]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(wanted, pool.map(lambda name: look(sources[name]), wanted), strict=True))


def installed_as(package: str, module: str) -> str | None:
    """Its version by the metadata; None: it is not installed."""
    with suppress(PackageNotFoundError):
        return str(version(package))
    with suppress(ImportError, ValueError):
        if find_spec(module) is not None:
            return "(version unknown)"
    return None


def which(name: str) -> str | None:
    """On PATH, or beside an interpreter whose environment is not activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


# One by one


def _python() -> Finding:
    text = f"{platform.python_version()}, {sys.executable}"
    facts = {"version": platform.python_version(), "executable": sys.executable}
    if sys.version_info[:2] < _LEAST:
        remedy = f"install Python {_LEAST[0]}.{_LEAST[1]} or newer, then {_SETUP}"
        return Finding("Python", text, "missing", remedy, facts=facts)
    return Finding("Python", text, facts=facts)


def _torch(known: str | None, seen: Look | None) -> Finding:
    if known is None:
        text = "not installed; plan, config, submit and report do without"
        return Finding("torch", text, "missing", _TORCH, facts={"version": None})
    facts: dict[str, Any] = {"version": known}
    if seen is None:
        return Finding("torch", f"{known}, not tried", facts=facts)
    if seen.failure:
        text = f"{known}: importing it {_said(seen.failure)}"
        remedy = f"pip install --force-reinstall torch=={known.partition('+')[0]}"
        return Finding("torch", text, "missing", remedy, facts=facts)
    facts |= seen.facts
    built = f"built for CUDA {seen.facts['cuda']}" if seen.facts["cuda"] else "built for the CPU"
    return Finding("torch", f"{seen.facts['version']}, {built}", facts=facts)


def _torchvision(known: str | None, seen: Look | None) -> Finding:
    facts = {"version": known}
    if known is None:
        text = "not installed; models of torchvision and images on disk need it"
        return Finding("torchvision", text, "warning", _TORCH, facts=facts)
    if seen is not None and seen.failure:
        text = f"{known}: importing it {_said(seen.failure)}"
        remedy = "pip install --force-reinstall torchvision (of the release that fits this torch)"
        return Finding("torchvision", text, "warning", remedy, facts=facts)
    return Finding("torchvision", known, facts=facts)


def _horovod(installed: dict[str, str | None], seen: Look | None) -> Finding:
    known, torch = installed["horovod"], installed["torch"]
    if known is None:
        text = "not installed; a single process and comm.backend=torch do without"
        return Finding("Horovod", text, "missing", _HOROVOD, facts={"version": None})
    text, status, built = built_with(torch)
    facts: dict[str, Any] = {"version": known, **built}
    text = f"{known}{text}"
    if seen is not None and seen.failure:
        text = f"{text}: importing it {_said(seen.failure)}"
        if symbol := re.search(r"undefined symbol: (\S+)", seen.failure):
            facts["undefined_symbol"] = symbol[1]
            text = (
                f"{known} was built for another torch than the one installed ({torch}): it looks "
                f"for {_short(symbol[1])}, which this one does not have"
            )
        elif missing := re.search(r"(lib\w[\w.+-]*\.so[\w.]*): cannot open shared", seen.failure):
            text = f"{known} needs {missing[1]}, which is not found here"
        return Finding("Horovod", text, "missing", _HOROVOD, facts=facts)
    if seen is not None:
        facts |= seen.facts
    if status != "ok":
        return Finding("Horovod", text, status, _HOROVOD, facts=facts)
    return Finding("Horovod", text, facts=facts)


def _mpi4py(known: str | None, seen: Look | None, horovod: Look | None) -> Finding:
    facts: dict[str, Any] = {"version": known}
    if known is None:
        text = "not installed; `harness probe` and comm.backend=torch under MPI need it"
        return Finding("mpi4py", text, "warning", "pip install mpi4py", facts=facts)
    if seen is None:
        return Finding("mpi4py", f"{known}, not tried", facts=facts)
    if seen.failure:
        text = f"{known} does not load: {seen.failure}"
        remedy = f"{_MPI4PY} builds it for the mpicc on PATH; without MPI: {_SETUP}"
        return Finding("mpi4py", text, "missing", remedy, facts=facts)
    facts |= seen.facts
    own, others = _real(seen), _real(horovod)
    text = f"{known} with {seen.facts['library']}"
    if own and others and own != others:
        facts["horovod_libmpi"] = sorted(others)
        text = (
            f"{known} has loaded another MPI than Horovod: {', '.join(sorted(own))} "
            f"({seen.facts['vendor']}), Horovod {', '.join(sorted(others))}; ranks would be "
            "worlds of their own, or crash"
        )
        variables = [name for name in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI") if name in os.environ]
        remedy = f"unset {' '.join(variables)}; or {_MPI4PY}" if variables else _MPI4PY
        return Finding("mpi4py", text, "missing", remedy, facts=facts)
    return Finding("mpi4py", text, facts=facts)


def _real(seen: Look | None) -> set[str]:
    return {os.path.realpath(path) for path in (seen.facts.get("libmpi", ()) if seen else ())}


def _small(name: str) -> Finding:
    module, users = _SMALL[name]
    known = installed_as(name, module)
    if known is None:
        text = f"not installed; only {users} need it"
        return Finding(
            name, text, "warning", f"pip install {name.lower()}", facts={"version": None}
        )
    return Finding(name, known, facts={"version": known})


def _said(failure: str) -> str:
    """To stand behind "importing it"."""
    whole = failure.startswith(("crashes", "does not", "ends", "cannot"))
    return failure if whole else f"fails: {failure}"


def _short(symbol: str) -> str:
    return symbol if len(symbol) <= 40 else f"{symbol[:39]}…"


# What Horovod's own files say


def built_with(torch: str | None) -> tuple[str, Status, dict[str, Any]]:
    """What Horovod was built with and for, and whether that will do."""
    with suppress(ImportError, ValueError, OSError):
        spec = find_spec("horovod")
        for place in (spec.submodule_search_locations if spec else None) or ():
            return read_build(Path(place), torch)
    return "", "ok", {}


def read_build(folder: Path, torch: str | None) -> tuple[str, Status, dict[str, Any]]:
    """The same of the package in ``folder``."""
    libraries = sorted((folder / "torch").glob("mpi_lib*.so"))
    if not libraries:
        return ", built without torch", "missing", {"operations": []}
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
    facts: dict[str, Any] = {"operations": [name for name, there in having.items() if there]}
    with suppress(OSError, ValueError, AttributeError, KeyError):
        built_for = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["pytorch"]
        facts["built_for_torch"] = built_for
        if torch is not None and built_for != torch:
            return f"{text}, but for torch {built_for} and not {torch}", "missing", facts
    return text, "ok", facts
