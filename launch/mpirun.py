"""A launch by Open MPI's mpirun (4.x), as an argument list."""

from __future__ import annotations

from launch.spec import LaunchSpec


def arguments(spec: LaunchSpec) -> list[str]:
    """The options that Horovod's documentation gives for Open MPI, and the variables to pass on."""
    allow = ["--allow-run-as-root"] if spec.as_root else []
    passed = [part for name in sorted(spec.environment) for part in ("-x", name)]
    return [
        "mpirun",
        *allow,
        "--tag-output",
        "-np",
        str(spec.ranks),
        "-H",
        ",".join(map(str, spec.hosts)),
        "-bind-to",
        "none",
        "-map-by",
        "slot",
        "-mca",
        "pml",
        "ob1",
        "-mca",
        "btl",
        "^openib",
        *passed,
        *spec.command,
    ]
