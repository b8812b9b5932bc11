"""What this machine has: whose MPI, what srun can do, MPS, GPUs. Nothing else asks it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from harness.errors import LaunchError

_PATIENCE = 20.0  # seconds; a file server that is busy takes some of them
_GPUS = Path("/proc/driver/nvidia/gpus")


def mpi_flavour(version_text: str) -> Literal["openmpi4", "openmpi5", "mpich"]:
    """Whose mpirun it is by what ``mpirun --version`` prints; raises LaunchError if it is not one
    whose options are known. Open MPI 3 takes those of version 4."""
    if found := re.search(r"\((?:Open MPI|OpenRTE)\) (\d+)\.", version_text):
        version = int(found[1])
        if version >= 3:
            return "openmpi5" if version >= 5 else "openmpi4"
    elif re.search(r"HYDRA build details|MPICH", version_text):
        return "mpich"
    elif "Intel(R) MPI" in version_text:
        raise LaunchError(
            "mpirun is Intel MPI's, which takes other options; start the ranks with --launcher "
            "srun or horovodrun, or put Open MPI or MPICH first on PATH"
        )
    printed = version_text.strip().partition("\n")[0][:120] or "nothing"
    raise LaunchError(
        f"mpirun is not one that is known (mpirun --version says {printed!r}); known are Open MPI "
        "3 to 5 and MPICH. If it takes the options of one of them, set launch.mpi to openmpi4, "
        "openmpi5 or mpich"
    )


def installed_mpi() -> Literal["openmpi4", "openmpi5", "mpich"]:
    """Whose mpirun would be started. Raises LaunchError if there is none, or an unknown one."""
    return mpi_flavour(mpi_version())


def mpi_version() -> str:
    """What ``mpirun --version`` prints. Raises LaunchError if there is none, or it fails."""
    return said(
        ["mpirun", "--version"],
        "install Open MPI (`make setup` in a checkout), or set launch.mpi",
    )


def mpi_programs() -> tuple[str | None, str | None]:
    """Where Open MPI is installed, and the daemon that it starts on other hosts; None for what is
    not to be found."""
    mpirun = program("mpirun")
    if mpirun is None:
        return None, None
    daemon = Path(mpirun).with_name("orted")
    return str(Path(mpirun).parents[1]), str(daemon) if daemon.exists() else None


def srun_mpi(list_text: str) -> str:
    """What srun's --mpi is to be by what ``srun --mpi=list`` prints: pmix, else its newest version
    by name, else pmi2. Raises LaunchError if it has none of them."""
    words = set(_words(list_text))
    if "pmix" in words:
        return "pmix"
    versions = [int(word[6:]) for word in words if re.fullmatch(r"pmix_v[0-9]{1,3}", word)]
    if versions:
        return f"pmix_v{max(versions)}"
    if "pmi2" in words:
        return "pmi2"
    raise LaunchError(
        "srun starts no MPI ranks here (srun --mpi=list has neither pmix nor pmi2), and each rank "
        "would be a world of its own; use --launcher mpirun or horovodrun, or have Slurm's PMIx "
        "plugin installed"
    )


def _words(list_text: str) -> list[str]:
    return re.findall(r"[a-z][a-z0-9_]*", list_text)


def available_srun_mpi() -> str:
    """What srun's --mpi is to be on this machine. Raises LaunchError as ``srun_mpi``."""
    return srun_mpi(_srun_list())


def srun_mpi_types() -> list[str]:
    """What srun can start ranks by: pmix, pmix_v4, pmi2, …. Raises LaunchError if it does not
    say."""
    return sorted({word for word in _words(_srun_list()) if word.startswith("pmi")})


def _srun_list() -> str:
    return said(
        ["srun", "--mpi=list"],
        "start inside a Slurm job, use another --launcher, or set launch.srun_mpi",
    )


def srun_starts_mpi() -> bool:
    """Whether srun can start MPI's ranks in this job. What it lists does not tell: the plugin may
    lack its library, which only a trial shows."""
    try:
        kind = available_srun_mpi()
        said(["srun", f"--mpi={kind}", "--ntasks=1", "--nodes=1", "--overlap", "true"], "")
    except LaunchError:
        return False
    return True


def inside_slurm_job(environ: Mapping[str, str]) -> bool:
    """Whether this process runs in a job of Slurm's, where srun starts ranks at once."""
    return bool(environ.get("SLURM_JOB_ID"))


def cuda_mps() -> str | None:
    """Where CUDA's MPS control program lies; None if it is not installed."""
    return shutil.which("nvidia-cuda-mps-control")


def gpus(environ: Mapping[str, str], devices: Path = _GPUS) -> int:
    """NVIDIA GPUs that a process with these variables may use; 0 without a driver.

    ``devices``: where the driver lists them.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _visible(visible)
    try:
        return len(list(devices.iterdir()))
    except OSError:
        pass
    if shutil.which("nvidia-smi") is None:  # such as under WSL, whose driver lists none
        return 0
    try:
        listed = said(["nvidia-smi", "-L"], "")
    except LaunchError:  # it is there, but no driver
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _visible(devices: str) -> int:
    """CUDA takes the devices up to the first that cannot be one."""
    count = 0
    for device in devices.split(","):
        if not re.fullmatch(r"[0-9]+|(GPU|MIG)-[\w/-]+", device.strip()):
            break
        count += 1
    return count


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def program(name: str) -> str | None:
    """Where a launcher's program lies: beside this interpreter, else on PATH."""
    return shutil.which(name, path=_path())


def said(command: Sequence[str], remedy: str, patience: float | None = None) -> str:
    """What a command prints, found as a launcher is found: beside this interpreter, then on PATH.

    Raises LaunchError if it is not there, fails, or does not come back.
    """
    found, patience = program(command[0]), patience or _PATIENCE
    if found is None:
        raise LaunchError(f"{command[0]} is not on PATH; {remedy}")
    shown = " ".join(command)
    try:
        done = subprocess.run(
            [found, *command[1:]],
            env={**os.environ, "PATH": _path(), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # Slurm's older versions list there
            text=True,
            errors="replace",
            timeout=patience,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"`{shown}` did not end within {patience:g} s; {remedy}") from None
    except OSError as error:
        raise LaunchError(f"`{shown}` does not start: {error.strerror}; {remedy}") from None
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no message"])[-1]
        raise LaunchError(f"`{shown}` ended with exit code {done.returncode} ({last}); {remedy}")
    return done.stdout
