"""The container that ranks run in, as words of a command. The job itself needs none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import LaunchError
from harness.schema import Config


def container_command(config: Config, command: Sequence[str], run_dir: Path) -> list[str]:
    """What every rank executes, inside ``slurm.container`` if there is one.

    The first word of ``command`` is the interpreter; inside the image it is another one. Raises
    LaunchError for a directory that cannot be mounted.
    """
    container = config.slurm.container
    if container is None:
        return list(command)
    inside = [container.python, *command[1:]]
    if container.runtime == "pyxis":  # srun makes the container
        return inside
    binds = [word for mount in _mounts(config, run_dir) for word in ("--bind", mount)]
    return ["apptainer", "exec", *binds, *container.options, container.image, *inside]


def container_srun_options(config: Config, run_dir: Path) -> list[str]:
    """Options by which srun starts the ranks in a container: those of Pyxis, else none."""
    container = config.slurm.container
    if container is None or container.runtime != "pyxis":
        return []
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(_mounts(config, run_dir))}",
        *container.options,
    ]


def check_container(config: Config, run_dir: Path) -> None:
    """Raise LaunchError if the ranks could not be started in the container that is asked for."""
    container = config.slurm.container
    if container is None:
        return
    if container.runtime == "pyxis" and config.launch.launcher not in (None, "srun"):
        raise LaunchError(
            "slurm.container.runtime = pyxis needs launch.launcher = srun, which makes the "
            f"containers, not {config.launch.launcher}"
        )
    if container.image.startswith("-"):
        raise LaunchError(f"slurm.container.image = {container.image} is an option, not an image")
    _mounts(config, run_dir)


def _mounts(config: Config, run_dir: Path) -> list[str]:
    """``SOURCE:TARGET`` of the run, of its data, and what else is asked for."""
    own = [run_dir.absolute()]
    if config.data.root is not None:
        own.append(Path(config.data.root).absolute())
    for path in own:
        if any(sign in str(path) for sign in ":,"):
            raise LaunchError(
                f"{path} cannot be mounted into a container: ':' and ',' separate mounts; choose "
                "a directory without them"
            )
    asked = config.slurm.container.mounts if config.slurm.container else []
    for mount in asked:
        if "," in mount:
            raise LaunchError(
                f"slurm.container.mounts: {mount} has a ',', which separates mounts; write each as "
                "an entry of its own"
            )
    words = [*map(str, own), *asked]
    return list(dict.fromkeys(word if ":" in word else f"{word}:{word}" for word in words))
