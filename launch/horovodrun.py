"""A launch by horovodrun, as an argument list."""

from __future__ import annotations

from launch.spec import LaunchSpec


def arguments(spec: LaunchSpec) -> list[str]:
    """horovodrun passes the launching process's environment on to all ranks."""
    return [
        "horovodrun",
        "-np",
        str(spec.ranks),
        "-H",
        ",".join(map(str, spec.hosts)),
        f"--{spec.controller}",
        *spec.command,
    ]
