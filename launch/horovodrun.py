"""A launch by horovodrun, as an argument list."""

from __future__ import annotations

import shlex
import sys

from harness.errors import LaunchError
from launch import mpirun
from launch.hosts import fill, interface_settings
from launch.spec import LaunchSpec


def arguments(spec: LaunchSpec) -> list[str]:
    """horovodrun passes the launching process's environment on to all ranks.

    Raises LaunchError for what it cannot do with the MPI, or without one.
    """
    hosts = fill(spec.ranks, spec.hosts)
    words = [*program(spec.controller), "-np", str(spec.ranks), "-H", ",".join(map(str, hosts))]
    words.append(f"--{spec.controller}")
    interface_settings(spec.interfaces)  # refuses what the shell that starts mpirun would read
    if spec.interfaces and len(hosts) > 1:  # on this host alone it takes the loopback, or stops
        words += ["--network-interfaces", ",".join(spec.interfaces)]
    if spec.controller == "mpi":
        words += _binding(spec, {host.slots for host in hosts})
    elif spec.bind != "none":
        raise LaunchError(
            f"launch.bind = {spec.bind} is MPI's to do, and comm.controller = gloo goes without; "
            "set comm.controller=mpi, or launch.bind=none and ranks.pin=true"
        )
    return [*words, *spec.command]


def program(controller: str) -> list[str]:
    """horovodrun; without MPI the one that keeps its store to the ranks (``launch.closed``)."""
    return ["horovodrun"] if controller == "mpi" else [sys.executable, "-m", "launch.closed"]


def _binding(spec: LaunchSpec, slots: set[int]) -> list[str]:
    """What horovodrun hands to mpirun; its own default is to bind nothing."""
    if spec.mpi == "openmpi5":
        raise LaunchError(
            "horovodrun writes options that Open MPI 5 does not read; use --launcher mpirun, "
            "comm.controller=gloo, or Open MPI 4"
        )
    if spec.mpi == "mpich":
        if len(slots) > 1:
            raise LaunchError(
                "horovodrun gives MPICH the same number of ranks on each host; use --launcher "
                "mpirun, or hosts with as many slots each"
            )
        if spec.bind != "none":
            raise LaunchError(
                f"launch.bind = {spec.bind}: horovodrun does not hand it to MPICH; use --launcher "
                "mpirun, or launch.bind=none"
            )
    # In one word, with the sign: what begins with a dash is taken for an option of its own.
    words = []
    if spec.mpi_prefix and len(spec.hosts) > 1:  # a shell reads it
        words.append(f"--mpi-args=--prefix {shlex.quote(spec.mpi_prefix)}")
    if spec.bind != "none":
        words.append(f"--binding-args={' '.join(mpirun.binding(spec))}")
    return words


def launcher_settings(spec: LaunchSpec) -> dict[str, str]:
    """Variables that the launcher and its ranks need besides ``spec.environment``."""
    if spec.controller == "mpi":
        return mpirun.launcher_settings(spec)
    return interface_settings(spec.interfaces)
