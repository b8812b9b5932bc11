"""A launch by Slurm's srun inside a job, as an argument list."""

from __future__ import annotations

from collections.abc import Sequence

from harness.errors import LaunchError
from launch.hosts import fill, interface_settings
from launch.spec import Host, LaunchSpec

_BIND = {"none": "none", "core": "cores", "numa": "ldoms", "socket": "sockets"}


# What Open MPI 4.1 needs of PMIx to start without fail, and without a warning of each rank: 1 in 30
# starts has crashed otherwise, and none of 100 with them.
DEFAULTS = {"PMIX_MCA_gds": "hash", "PMIX_MCA_psec": "native", "SLURM_PMIX_FENCE": "ring"}


def arguments(spec: LaunchSpec) -> list[str]:
    """A job step of its own, whose ranks get the environment of the launching process.

    Raises LaunchError for hosts that are no nodes of Slurm's.
    """
    if spec.controller == "gloo":
        raise LaunchError(
            "srun starts ranks that find each other by MPI; comm.controller = gloo needs "
            "--launcher horovodrun"
        )
    hosts = fill(spec.ranks, spec.hosts)
    for host in hosts:
        if host.name == "localhost" or host.name.startswith("127."):
            raise LaunchError(
                f"srun knows nodes by the names that Slurm gives them, not {host.name}; start "
                "inside a Slurm job, or use --launcher horovodrun, mpirun or local"
            )
    # Since Slurm 22.05 a step no longer takes the job's --cpus-per-task for its own.
    cores = [f"--cpus-per-task={spec.cores_per_rank}"] if spec.cores_per_rank else []
    return [
        "srun",
        f"--mpi={spec.srun_mpi}",
        *_placed(spec.ranks, hosts),
        *cores,
        f"--cpu-bind={_BIND[spec.bind]}",
        "--kill-on-bad-exit=1",  # else the other ranks wait for a dead one for ever
        "--label",
        "--export=ALL",
        "--overlap",  # else a step from which this one is started keeps the cores to itself
        *spec.srun_options,
        *spec.command,
    ]


def _placed(ranks: int, hosts: Sequence[Host]) -> list[str]:
    """Options that put each host's ranks on it.

    As many on each: by Slurm's block distribution, in the order that Slurm has its nodes in. Else
    by a list with a node for each rank.
    """
    words = [f"--nodes={len(hosts)}", f"--ntasks={ranks}"]
    each = {host.slots for host in hosts}
    if len(each) == 1:
        names = ",".join(host.name for host in hosts)
        even = [f"--ntasks-per-node={each.pop()}", "--distribution=block"]
        return [*words, *even, f"--nodelist={names}"]
    names = ",".join(",".join([host.name] * host.slots) for host in hosts)
    return [*words, "--distribution=arbitrary", f"--nodelist={names}"]


def launcher_settings(spec: LaunchSpec) -> dict[str, str]:
    """Variables that the launcher and its ranks need besides ``spec.environment``."""
    settings = interface_settings(spec.interfaces)
    if settings:
        settings["OMPI_MCA_btl_tcp_if_include"] = ",".join(spec.interfaces)
    if spec.srun_mpi.startswith("pmix"):
        settings |= DEFAULTS
    return settings
