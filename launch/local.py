"""A launch on this host without MPI, as an argument list."""

from __future__ import annotations

from harness.errors import LaunchError
from launch.hosts import fill, interface_settings
from launch.spec import LaunchSpec


def arguments(spec: LaunchSpec) -> list[str]:
    """One rank is the command itself; torchrun starts several, for torch.distributed.

    Raises LaunchError for other hosts, and for binding.
    """
    hosts = fill(spec.ranks, spec.hosts)
    if len(hosts) > 1:
        raise LaunchError(
            f"--launcher local starts ranks on this host alone, not on {','.join(map(str, hosts))};"
            " use horovodrun, mpirun or srun"
        )
    if spec.bind != "none":
        raise LaunchError(
            f"launch.bind = {spec.bind}: --launcher local binds no ranks; use horovodrun, mpirun "
            "or srun, or launch.bind=none and ranks.pin=true"
        )
    if spec.ranks == 1 and not spec.like_many:
        return list(spec.command)
    ranks = f"--nproc-per-node={spec.ranks}"
    return ["torchrun", "--standalone", ranks, "--no-python", *spec.command]


def launcher_settings(spec: LaunchSpec) -> dict[str, str]:
    """Variables that the launcher and its ranks need besides ``spec.environment``."""
    return interface_settings(spec.interfaces)
