"""What this machine can run, and what to do about the rest.

Nothing heavy is imported here to find out: versions come from the packages' metadata, GPUs from
the driver's files in /proc. What only an import can tell (whether Horovod was built for this torch,
whose MPI mpi4py has loaded) is tried in processes of their own, which may crash or hang. So it runs
on a login node, and on a machine where everything is broken.

What needs to know launchers (MPI, Slurm, other hosts) is in `launch.doctor`.
"""

from harness.doctor.findings import Finding

__all__ = ["Finding"]
