"""Where a run's numbers come from: versions, machine, settings of allow-listed names."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from harness.comm.base import Communicator
from harness.environment import host, launcher, usable_cores
from harness.jsonl import now as time_now
from harness.lenient import pick
from harness.own import files
from harness.redact import hidden, is_secret, redacted_words
from harness.versions import PACKAGE, installed_version

_PACKAGES = (
    PACKAGE,
    "torch",
    "torchvision",
    "horovod",
    "mpi4py",
    "numpy",
    "scikit-learn",
)
_VARIABLES = (
    "HOROVOD_",
    "OMPI_MCA_",
    "OMP_NUM_THREADS",
    "NCCL_",
    "GLOO_",
    "CUDA_VISIBLE_DEVICES",
    "MKL_",
)
# Launchers put addresses and keys of their own into variables that begin like settings.
_SETTINGS_ONLY = (
    "ADDR",
    "URI",
    "IFACE",
    "HOSTNAME",
    "PORT",
    "PRECONDITION",
)


def collect(comm: Communicator, own_parts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Provenance of a run as plain data; called on rank 0.

    ``own_parts``: what of the run is the user's own, as `Config.own_parts` has it.
    """
    return {
        "started": time_now(),
        "launcher": launcher(),
        "command": redacted_words([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in _PACKAGES},
        },
        "source": _git_commit(),
        "communication": {
            "kind": comm.kind,
            "ranks": comm.size,
            "ranks_per_host": comm.local_size,
            "hosts": comm.topology.as_list(),
        },
        "hardware": {
            "host": host(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "processor": _processor(),
            "usable_cores": usable_cores(),
            "threads_per_rank": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "environment": _settings(),
        **({"own": files(own_parts)} if own_parts else {}),
    }


def changed_files(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Files of the user's own parts that are not what they were in the attempt before, of all that
    ``first``, the provenance of a run, tells of; ``now`` is this attempt's."""
    attempts = pick(first, "attempts")
    last = attempts[-1] if isinstance(attempts, list) and attempts else first
    before, after = pick(last, "own"), pick(now, "own")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    digests = {path: pick(before, path, "sha256") for path in before}
    return sorted(path for path in digests.keys() & after if digests[path] != after[path]["sha256"])


def _settings() -> dict[str, str]:
    return {
        name: hidden(name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES)
        and not is_secret(name)
        and not any(word in name.upper() for word in _SETTINGS_ONLY)
    }


def _processor() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``+`` if files differ from it;
    None if it is installed, be it into an environment that lies in another repository."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        return result.stdout.strip() or None
    return None
