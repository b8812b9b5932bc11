"""A launch by mpirun, Open MPI's or MPICH's, as an argument list."""

from __future__ import annotations

from harness.errors import LaunchError
from launch.hosts import fill, interface_settings
from launch.spec import LaunchSpec

# By Open MPI's own defaults a host that was switched off goes unnoticed for more than five minutes.
DEFAULTS = {
    "OMPI_MCA_oob_tcp_keepalive_time": "5",
    "OMPI_MCA_oob_tcp_keepalive_intvl": "2",
    "OMPI_MCA_oob_tcp_keepalive_probes": "3",
}


def arguments(spec: LaunchSpec) -> list[str]:
    """Raises LaunchError for what this MPI's mpirun cannot do."""
    if spec.controller == "gloo":
        raise LaunchError(
            "mpirun starts ranks that find each other by MPI; comm.controller = gloo needs "
            "--launcher horovodrun"
        )
    hosts = ",".join(map(str, fill(spec.ranks, spec.hosts)))
    form = _hydra if spec.mpi == "mpich" else _open_mpi
    return ["mpirun", *form(spec, hosts), *spec.command]


def _open_mpi(spec: LaunchSpec, hosts: str) -> list[str]:
    """The options that Horovod's documentation gives for Open MPI, and the variables to pass on.

    Version 5 spells them with two dashes, and knows neither --tag-output nor the openib transport.
    """
    allow = ["--allow-run-as-root"] if spec.as_root else []
    names = spec.environment.keys() | interface_settings(spec.interfaces).keys()
    passed = [part for name in sorted(names) for part in ("-x", name)]
    if spec.mpi_prefix and len(spec.hosts) > 1:
        allow += ["--prefix", spec.mpi_prefix]
    ranks = str(spec.ranks)
    if spec.mpi == "openmpi5":
        placed = ["--output", "tag", "--np", ranks, "--host", hosts, *binding(spec)]
        return [*allow, *placed, "--mca", "pml", "ob1", *passed]
    placed = ["--tag-output", "-np", ranks, "-H", hosts, *binding(spec)]
    return [*allow, *placed, "-mca", "pml", "ob1", "-mca", "btl", "^openib", *passed]


def binding(spec: LaunchSpec) -> list[str]:
    """Open MPI's words for what a rank is bound to; a rank that is not may use all cores."""
    slot = "slot"
    if spec.bind == "core" and spec.cores_per_rank is not None:
        slot = f"slot:PE={spec.cores_per_rank}"
    if spec.mpi == "openmpi5":
        target = "package" if spec.bind == "socket" else spec.bind
        return ["--bind-to", target, "--map-by", slot]
    return ["-bind-to", spec.bind, "-map-by", slot]


def _hydra(spec: LaunchSpec, hosts: str) -> list[str]:
    """Hydra's options; it passes the launching process's whole environment on."""
    words = ["-prepend-rank", "-np", str(spec.ranks), "-hosts", hosts, "-genvall"]
    if len(spec.interfaces) > 1:
        raise LaunchError(
            f"launch.interfaces = {list(spec.interfaces)}: MPICH's mpirun takes one; valid: "
            f"launch.interfaces=[{spec.interfaces[0]}]"
        )
    interface_settings(spec.interfaces)  # refuses what is none
    if spec.interfaces:
        words += ["-iface", spec.interfaces[0]]
    target: str = spec.bind
    if spec.bind == "core" and spec.cores_per_rank is not None:
        target = f"core:{spec.cores_per_rank}"
    return [*words, "-bind-to", target]


def launcher_settings(spec: LaunchSpec) -> dict[str, str]:
    """Variables that the launcher and its ranks need besides ``spec.environment``.

    Open MPI's own are for its daemons too, which no ``-x`` reaches.
    """
    settings = interface_settings(spec.interfaces)
    if spec.mpi == "openmpi4":
        settings |= DEFAULTS
    if not spec.interfaces or spec.mpi == "mpich":
        return settings
    listed = ",".join(spec.interfaces)
    daemons = "OMPI_MCA_oob_tcp" if spec.mpi == "openmpi4" else "PRTE_MCA_prte"
    return {**settings, "OMPI_MCA_btl_tcp_if_include": listed, f"{daemons}_if_include": listed}
