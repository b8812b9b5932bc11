"""Looks that can crash the interpreter or hang it, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from harness.wording import signal_name

PATIENCE = 90.0
"""Seconds; a file server that is slow needs some of them for torch."""

_LIBMPI = """
def libmpi():
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/") > 1}
    names = ("libmpi.so", "libmpi_abi.so", "libmpich.so", "libmpi-")
    return sorted(p for p in paths if p.rpartition("/")[2].startswith(names))
"""

TORCH = """
import json, torch
cuda = torch.cuda.is_available()
count = torch.cuda.device_count() if cuda else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
nccl = None
if cuda and torch.distributed.is_nccl_available():
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
print("@", json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "cuda_works": cuda, "nccl": nccl,
    "gpus": [{"name": g.name, "memory_bytes": g.total_memory} for g in gpus],
}))
"""
TORCHVISION = """
import json
from harness.torchvision_ops import import_tolerantly
print("@", json.dumps({"version": import_tolerantly("torchvision").__version__}))
"""
HOROVOD = f"""{_LIBMPI}
import json, horovod, horovod.torch as hvd
print("@", json.dumps({{
    "version": horovod.__version__,
    "controllers": [n for n, b in (("MPI", hvd.mpi_built()), ("Gloo", hvd.gloo_built())) if b],
    "nccl": bool(hvd.nccl_built()), "cuda": bool(hvd.cuda_built()), "libmpi": libmpi(),
}}))
"""
MPI4PY = f"""{_LIBMPI}
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print("@", json.dumps({{
    "version": mpi4py.__version__, "libmpi": libmpi(), "vendor": MPI.get_vendor()[0],
    "library": MPI.Get_library_version().partition(",")[0].strip("\\0\\n "),
}}))
"""


@dataclass(frozen=True)
class Look:
    """What a child process found, or how it ended instead."""

    facts: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    """In words; empty: it found what it looked for."""
    errors: str = ""
    """All that it printed on standard error."""


def look(
    source: str,
    *arguments: str,
    patience: float = PATIENCE,
    environ: Mapping[str, str] | None = None,
) -> Look:
    """Run Python in another process; its last line that begins with ``@`` is the answer, in JSON.

    Whatever becomes of it, this returns within ``patience`` seconds and a few more.
    """
    words = [sys.executable, "-c", source, *arguments]
    return look_at(words, patience, {**(os.environ if environ is None else environ)})


def look_at(words: list[str], patience: float, environ: Mapping[str, str]) -> Look:
    """``look`` of a whole command."""
    try:
        process = subprocess.Popen(
            words,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Look(failure=f"cannot be tried: {error.strerror}")
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        _end(process)
        return Look(failure=f"does not come back within {patience:g} s")
    except BaseException:  # Ctrl-C is not the child's, which has a session of its own
        _end(process)
        raise
    return _answer(process.returncode, out, err)


def _answer(code: int, out: str, err: str) -> Look:
    answers = [line[1:] for line in out.splitlines() if line.startswith("@")]
    if code == 0 and answers:
        with suppress(ValueError):
            facts = json.loads(answers[-1])
            if isinstance(facts, dict):
                return Look(facts, errors=err)
    if code < 0 and (name := signal_name(-code)):
        return Look(failure=f"crashes ({name})", errors=err)
    said = [line.strip() for line in err.splitlines() if line.strip()]
    last = said[-1] if said else f"ends with exit code {code}, without a word"
    return Look(failure=last[:400], errors=err)


def _end(process: subprocess.Popen[str]) -> None:
    """A process in an uninterruptible wait, as for a dead file server, is not waited for."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=2)
