"""The sections of a configuration that say how its ranks are started: launch and slurm.

None of them changes what is computed, so a run that goes on may have others.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from harness.section import Count, Section
from harness.yamlfile import shown

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_TIME = re.compile(r"[0-9]{1,9}(:[0-9]{1,2}){0,2}|[0-9]{1,6}-[0-9]{1,2}(:[0-9]{1,2}){0,2}")
# Options of sbatch that the harness settles itself, and where.
_SETTLED = {
    "array": "harness submit --sweep",
    "chdir": "the directory in which harness submit is called",
    "cpus-per-gpu": "slurm.cpus_per_rank",
    "cpus-per-task": "slurm.cpus_per_rank",
    "dependency": "the chain of jobs",
    "error": "RUN_DIR/slurm",
    "export": "launch.environment",
    "gpus": "slurm.gpus_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "gpus-per-task": "slurm.gpus_per_node and launch.ranks_per_gpu",
    "help": "harness submit --help",
    "input": "nothing: a job reads no input",
    "job-name": "name",
    "kill-on-invalid-dep": "the chain of jobs",
    "no-requeue": "slurm.requeue",
    "nodes": "ranks and ranks.per_node",
    "ntasks": "ranks",
    "ntasks-per-node": "ranks.per_node",
    "open-mode": "append",
    "output": "RUN_DIR/slurm",
    "parsable": "harness submit",
    "requeue": "slurm.requeue",
    "signal": "slurm.warning and slurm.signal",
    "test-only": "harness submit --dry-run",
    "usage": "harness submit --help",
    "version": "harness doctor",
    "wait": "harness status",
    "wrap": "harness submit",
}


def _line(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > 4096:
        raise ValueError(f"must be text, not {shown(value)}")
    if _CONTROL.search(value):
        raise ValueError(f"must be one printable line, not {shown(value)}")
    return value


Line = Annotated[
    str,
    PlainValidator(_line),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 4096}),
]
"""Text that stands on one line of a script."""


_TEXT_OR_COUNT = WithJsonSchema(
    {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}]}
)


def _time(value: object) -> str:
    """A time limit in Slurm's words; a mere number is minutes to it."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9:
        return str(value)
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError(
            f"must be a time limit such as 30 (minutes), 02:30:00 or 1-12:00:00, not {shown(value)}"
        )
    return value


def _variables(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping of variables, not {shown(value)}")
    read = {}
    for name, content in value.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(f"{shown(name)} is no name of a variable")
        if name.startswith("HARNESS_"):
            raise ValueError(f"{name} is set by the harness itself")
        if not _is_plain(content):
            raise ValueError(f"{name} must be text or a number up to 1e15, not {shown(content)}")
        read[name] = str(content)
    return read


def _is_plain(value: object) -> bool:
    """Whether it is a number, or text that a variable can hold."""
    if isinstance(value, str):
        return not re.search("[\0\ud800-\udfff]", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e15 < value < 1e15


def _sbatch_options(value: object) -> dict[str, str | None]:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping of sbatch's options, not {shown(value)}")
    read: dict[str, str | None] = {}
    for name, content in value.items():
        if not isinstance(name, str) or not _OPTION.fullmatch(name):
            raise ValueError(
                f"{shown(name)} is no long option of sbatch; write it without dashes, such as "
                "exclude or gres-flags"
            )
        # sbatch takes the beginning of an option for the option.
        settled = [option for option in _SETTLED if option.startswith(name)]
        if settled:
            raise ValueError(f"{settled[0]} is settled by {_SETTLED[settled[0]]}")
        if content is True or content is None:
            read[name] = None
        elif not _is_plain(content) or isinstance(content, float):
            raise ValueError(
                f"{name} must be text, a whole number, or true for an option without a value, "
                f"not {shown(content)}"
            )
        elif content == "":
            raise ValueError(f"{name} must not be empty; true stands for no value")
        else:
            read[name] = _line(str(content))
    return read


def _gpus(value: object) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"([A-Za-z0-9_.-]+:)?[1-9][0-9]{0,3}", text):
        raise ValueError(f"must be a number or TYPE:NUMBER such as a100:4, not {shown(value)}")
    return text


class Launch(Section):
    launcher: Literal["horovodrun", "mpirun", "srun", "local"] | None = None
    """What starts the ranks; default: srun inside a Slurm job, horovodrun elsewhere."""
    mpi: Literal["openmpi4", "openmpi5", "mpich"] | None = None
    """Whose mpirun it is; default: what `mpirun --version` says."""
    srun_mpi: Line | None = None
    """What srun's --mpi is to be; default: pmix if `srun --mpi=list` has it, else pmi2, which an
    Open MPI must have been built for."""
    interfaces: list[Line] = []
    """Network interfaces for MPI, Gloo and NCCL, by name; default: their own choice."""
    bind: Literal["none", "core", "numa", "socket"] = "none"
    """What the launcher binds each rank to."""
    ranks_per_gpu: Count = 1
    """Several ranks share a GPU, as solvers do in You et al. 2017 (LARS), section 4.2."""
    mps: bool = False
    """Start CUDA's MPS on each host, where it is installed, so that they compute at once."""
    environment: Annotated[
        dict[str, str],
        PlainValidator(_variables),
        WithJsonSchema(
            {
                "type": "object",
                "propertyNames": {"pattern": f"^(?!HARNESS_)({_VARIABLE.pattern})$"},
                "additionalProperties": {"type": ["string", "number"]},
            }
        ),
    ] = {}
    """Variables that every rank gets, such as NCCL_DEBUG."""
    python: Line | None = None
    """Interpreter of the ranks; default: the one that runs the harness."""
    max_restarts: Annotated[int, Field(ge=0, le=10**6)] = 3
    """Launches after one that failed; --max-restarts beats it."""
    restart_pause: Annotated[float, Field(ge=0, le=3600)] = 1.0
    """Seconds before the first restart; doubled before each further one, up to 60."""
    host_failures: Count = 2
    """A host is left out once this many launches in a row have failed on it."""
    hang_seconds: Annotated[float, Field(ge=1, le=10**6)] | None = 600.0
    """A job of which no rank has got any further for so long is ended; null: never."""
    connect_timeout: Annotated[float, Field(gt=0, le=600)] = 10.0
    """Seconds that a host may take to answer."""
    elastic: bool = False
    """Grow and shrink without ending the processes, with Horovod Elastic (Gloo)."""


class Container(Section):
    runtime: Literal["apptainer", "pyxis"]
    image: Line
    """A file, or what the runtime takes as an address."""
    python: Line = "python3"
    """Interpreter inside the image, which has the harness installed."""
    mounts: list[Line] = []
    """``SOURCE:TARGET`` or one path for both; the directories of run and data are always there."""
    options: list[Line] = []
    """Further words for ``apptainer exec``, such as --nv, or for srun with Pyxis."""


class Slurm(Section):
    account: Line | None = None
    partition: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    reservation: Line | None = None
    time: Annotated[str, BeforeValidator(_time), _TEXT_OR_COUNT] | None = None
    """Limit of each job; default: the partition's."""
    gpus_per_node: Annotated[str, PlainValidator(_gpus), _TEXT_OR_COUNT] | None = None
    """A number, or a type and a number such as a100:4."""
    cpus_per_rank: Count | None = None
    """Cores of each rank; default: ranks.threads, else what Slurm gives."""
    memory: Line | None = None
    """Of each node, in sbatch's words, such as 64G."""
    exclusive: bool = False
    mail_user: Line | None = None
    mail_type: list[Line] = []
    """When to write mail: END, FAIL, REQUEUE, …"""
    signal: Literal["USR1", "USR2", "TERM", "INT"] = "USR2"
    """What warns a job before its time limit and at preemption; NCCL may use USR1 itself."""
    warning: Annotated[int, Field(ge=1, le=65535)] = 120
    """Seconds before the time limit at which it is sent."""
    requeue: bool = True
    """Queue a job again that was stopped by its limit, by preemption or by a node's failure."""
    max_requeues: Annotated[int, Field(ge=0, le=10**6)] = 100
    """A job that has been queued again so often stays ended."""
    modules: list[Line] = []
    """Environment modules that a job loads, in this order."""
    setup: Line | None = None
    """A shell script that a job reads in before anything else runs."""
    container: Container | None = None
    """What the ranks run in; the job itself runs the harness of the node."""
    options: Annotated[
        dict[str, str | None],
        PlainValidator(_sbatch_options),
        WithJsonSchema(
            {
                "type": "object",
                "propertyNames": {"pattern": f"^{_OPTION.pattern}$"},
                "additionalProperties": {
                    "anyOf": [{"type": ["string", "integer", "null"]}, {"const": True}]
                },
            }
        ),
    ] = {}
    """Further long options of sbatch: a value, or true for those without one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mail_type and self.mail_user is None:
            raise ValueError("slurm.mail_type needs slurm.mail_user")
        return self
