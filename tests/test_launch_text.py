"""Launches as text: argument lists and variables, and what the machine is asked for them."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, require, require_ranks, tool

from harness.environment import FORWARDED
from harness.errors import LaunchError
from launch import detect, horovodrun, local, mpirun, srun
from launch.spec import Host, LaunchSpec
from launch.supervise import RunRequest, run

LAUNCHERS: dict[str, Any] = {
    module.__name__.removeprefix("launch."): module for module in (horovodrun, mpirun, srun, local)
}
GOLDEN = Path(__file__).parent / "golden" / "launch"
ACCEPT = "HARNESS_ACCEPT"

SPEC = LaunchSpec(
    ranks=3,
    hosts=(Host("node1", 2), Host("node2", 1)),
    command=("/venv/bin/python", "-m", "harness", "train", "my config.yaml", "name='a b'"),
    environment={"OMP_NUM_THREADS": "1", "HARNESS_WORLD_SIZE": "3"},
)

# What each launcher makes of a grid of launches

HOSTS = {
    "one": (Host("n1", 4),),
    "even": (Host("n1", 2), Host("n2", 2)),
    "uneven": (Host("n1", 3), Host("n2", 4)),  # of which one is used
}
OF_LAUNCHER: dict[str, list[dict[str, Any]]] = {
    "horovodrun": [
        {"controller": "gloo"},
        *({"mpi": mpi} for mpi in ("openmpi4", "openmpi5", "mpich")),
        {"mpi": "openmpi4", "mpi_prefix": "/opt/open mpi"},
    ],
    "mpirun": [
        {"controller": "gloo"},
        *({"mpi": mpi} for mpi in ("openmpi4", "openmpi5", "mpich")),
        *(
            {"mpi": mpi, "as_root": True, "mpi_prefix": "/opt/open mpi"}
            for mpi in ("openmpi4", "openmpi5", "mpich")
        ),
    ],
    "srun": [
        {"controller": "gloo"},
        {"srun_mpi": "pmix"},
        {"srun_mpi": "pmi2", "srun_options": ("--container-image=a b.sqsh",)},
    ],
    "local": [{}],
}


def grid(launcher: str) -> Iterator[tuple[str, LaunchSpec]]:
    """Launches of four ranks, and of one on a single host, each with a name."""
    bindings: list[dict[str, Any]] = [{"bind": bind} for bind in ("none", "core", "numa", "socket")]
    bindings += [{"bind": bind, "cores_per_rank": 2} for bind in ("none", "core")]
    interfaces: list[dict[str, Any]] = [
        {"interfaces": names} for names in ((), ("eth0",), ("eth0", "ib0"))
    ]
    command = ("python", "-m", "harness", "train", "it's $HOME.yaml")
    for own, (where, hosts) in itertools.product(OF_LAUNCHER[launcher], HOSTS.items()):
        for more, binding in itertools.product(interfaces, bindings):
            if more["interfaces"] and binding not in ({"bind": "none"}, {"bind": "core"}):
                continue  # one has nothing to do with the other
            settings = own | more | binding
            for ranks in (
                (4, 1)
                if where == "one"
                and settings
                == own
                | {
                    "interfaces": (),
                    "bind": "none",
                }
                else (4,)
            ):
                shown = ", ".join(f"{key}={value}" for key, value in settings.items() if value)
                spec = LaunchSpec(
                    ranks=ranks,
                    hosts=hosts,
                    command=command,
                    environment={"OMP_NUM_THREADS": "1"},
                    **settings,
                )
                yield f"{ranks} of {','.join(map(str, hosts))}: {shown}", spec


def rendered(launcher: ModuleType, spec: LaunchSpec) -> str:
    try:
        words = ["python" if word == sys.executable else word for word in launcher.arguments(spec)]
    except LaunchError as error:
        return f"refused: {error}"
    settings = sorted(launcher.launcher_settings(spec).items())
    return shlex.join([*(f"{name}={value}" for name, value in settings), *words])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_golden_launches(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    found = "\n".join(
        f"# {title}\n{rendered(LAUNCHERS[name], spec)}\n" for title, spec in grid(name)
    )
    if os.environ.get(ACCEPT):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    held = path.read_text(encoding="utf-8") if path.exists() else ""
    difference = difflib.unified_diff(
        held.splitlines(), found.splitlines(), str(path.relative_to(ROOT)), "now", lineterm="", n=1
    )
    assert held == found, "\n".join(
        [*difference, f"if this is what it should be: {ACCEPT}=1 python -m pytest {__file__}"]
    )


def test_no_golden_launch_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(LAUNCHERS)


def launches() -> Iterator[tuple[str, list[str], LaunchSpec]]:
    """Launcher, argument list and launch, for all of the grid that is not refused."""
    for name, module in LAUNCHERS.items():
        for _, spec in grid(name):
            try:
                yield name, module.arguments(spec), spec
            except LaunchError:
                continue


def test_ranks_and_no_more_are_on_the_hosts_of_a_command_line() -> None:
    """Hosts are given as many slots as ranks: launchers differ in what they make of others."""
    for name, words, spec in launches():
        options = words[: -len(spec.command)]
        if name == "local":
            continue
        if name == "srun":
            (listed,) = (word for word in options if word.startswith("--nodelist="))
            nodes = listed.partition("=")[2].split(",")
            each = [word for word in options if word.startswith("--ntasks-per-node=")]
            placed = len(nodes) * int(each[0].partition("=")[2]) if each else len(nodes)
            assert f"--ntasks={spec.ranks}" in options
            assert f"--nodes={len(set(nodes))}" in options
        else:
            (listed,) = (word for word in options if word.startswith("n1:"))
            placed = sum(int(entry.partition(":")[2]) for entry in listed.split(","))
        assert placed == spec.ranks


def test_the_command_is_the_last_of_every_launch() -> None:
    for _, words, spec in launches():
        assert tuple(words[-len(spec.command) :]) == spec.command


@pytest.mark.parametrize("name", LAUNCHERS)
def test_more_ranks_than_slots_start_nowhere(name: str) -> None:
    with pytest.raises(LaunchError, match="4 ranks need 4 slots, but n1:3 has 3"):
        LAUNCHERS[name].arguments(replace(SPEC, ranks=4, hosts=(Host("n1", 3),)))


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("interface", ["eth0;reboot", "$(x)", "^lo", "10.0.0.0/24"])
def test_an_interface_is_a_name_and_nothing_else(name: str, interface: str) -> None:
    spec = replace(SPEC, hosts=(Host("n1", 3),), interfaces=(interface,))
    with pytest.raises(LaunchError, match="is not an interface"):
        LAUNCHERS[name].launcher_settings(spec)
    if name in ("horovodrun", "mpirun"):  # which would have it on a command line
        with pytest.raises(LaunchError, match="is not an interface"):
            LAUNCHERS[name].arguments(spec)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_srun_is_not_sent_to_a_host_that_slurm_does_not_know(host: str) -> None:
    with pytest.raises(LaunchError, match=f"not {host}; start inside a Slurm job"):
        srun.arguments(replace(SPEC, hosts=(Host(host, 3),)))


# Arguments


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_horovodrun(controller: Literal["mpi", "gloo"]) -> None:
    spec = replace(SPEC, controller=controller)
    program = horovodrun.program(controller)
    assert (
        program
        == {"mpi": ["horovodrun"], "gloo": [sys.executable, "-m", "launch.closed"]}[controller]
    )
    assert shlex.join(horovodrun.arguments(spec)) == (
        f"{shlex.join(program)} -np 3 -H node1:2,node2:1 --{controller} "
        "/venv/bin/python -m harness train 'my config.yaml' "
        "'name='\"'\"'a b'\"'\"''"
    )


def test_mpirun() -> None:
    assert shlex.join(mpirun.arguments(SPEC)) == (
        "mpirun --tag-output -np 3 -H node1:2,node2:1 -bind-to none -map-by slot "
        "-mca pml ob1 -mca btl '^openib' -x HARNESS_WORLD_SIZE -x OMP_NUM_THREADS "
        "/venv/bin/python -m harness train 'my config.yaml' "
        "'name='\"'\"'a b'\"'\"''"
    )


def test_mpirun_lets_root_run_where_it_is_told_to() -> None:
    plain = mpirun.arguments(SPEC)
    assert mpirun.arguments(replace(SPEC, as_root=True)) == [
        plain[0],
        "--allow-run-as-root",
        *plain[1:],
    ]


def test_one_local_rank_is_the_command_itself() -> None:
    one = replace(SPEC, ranks=1, hosts=(Host("localhost", 2),))
    assert local.arguments(one) == list(SPEC.command)


def test_a_local_rank_that_is_compared_with_many_is_started_like_them() -> None:
    one = replace(SPEC, ranks=1, hosts=(Host("localhost", 2),), like_many=True)
    words = local.arguments(one)
    assert words[:3] == ["torchrun", "--standalone", "--nproc-per-node=1"]
    assert words[-len(SPEC.command) :] == list(SPEC.command)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_values_of_variables_are_on_a_command_line(name: str) -> None:
    """They go through its environment: a command line is for all users of the machine to read."""
    secret = replace(SPEC, hosts=(Host("n1", 3),), environment={"TOKEN": "secret"})
    for mpi in ("openmpi4", "openmpi5", "mpich") if name == "mpirun" else ("openmpi4",):
        arguments = LAUNCHERS[name].arguments(replace(secret, mpi=mpi))
        assert not [part for part in arguments if "secret" in part]
        if name == "mpirun" and mpi != "mpich":
            assert ("-x", "TOKEN") in itertools.pairwise(arguments)


words_of_a_command = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)
    | st.sampled_from(["", " ", "'", '"', "$(reboot)", "`x`", "a\nb", "\\", "--", "-np", "*", "~"]),
    min_size=1,
    max_size=6,
)


@given(words_of_a_command, st.sampled_from(["none", "core"]))
def test_the_command_comes_last_and_unchanged(
    command: list[str], bind: Literal["none", "core"]
) -> None:
    spec = replace(SPEC, command=tuple(command), bind=bind)
    for module in (horovodrun, mpirun, srun):
        assert module.arguments(spec)[-len(command) :] == command
    one = replace(spec, hosts=(Host("n1", 3),), bind="none")
    assert local.arguments(one)[-len(command) :] == command


# A dry run's line, given to a shell


def read_by_bash(words: list[str]) -> list[str]:
    """The words of a line that ``shlex.join`` has made of them, as bash reads it."""
    line = shlex.join(words)
    bash = tool("bash")
    require(bash is not None, "bash is not on PATH")
    subprocess.run([str(bash), "-n"], input=line.encode(), check=True)
    done = subprocess.run(
        [str(bash), "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True
    )
    return done.stdout.decode().split("\0")[:-1]


@given(words_of_a_command)
def test_a_shell_reads_the_words_that_were_printed(command: list[str]) -> None:
    words = srun.arguments(replace(SPEC, command=tuple(command)))
    assert read_by_bash(words) == words


def test_a_shell_reads_every_launch_of_the_grid() -> None:
    seen = list(dict.fromkeys(tuple(words) for _, words, _ in launches()))
    joined = [word for words in seen for word in words]
    assert read_by_bash(joined) == joined


# What real launchers make of it

HOSTILE = ("a b", "it's", '"', "$(echo x)", "`y`", "new\nline", "\\", "*", "", "--help", "é")
SHOW = (
    "import json, os, sys; "
    "open(f'{sys.argv[1]}/{os.getpid()}', 'w').write("
    "json.dumps([os.environ.get('HARNESS_SHOWN'), sys.argv[2:]]))"
)


def started(module: Any, spec: LaunchSpec, folder: Path) -> list[Any]:
    """Run it, and read what each of its ranks has been given."""
    command = (sys.executable, "-c", SHOW, str(folder), *HOSTILE)
    environment = {"HARNESS_SHOWN": "two words"}
    spec = replace(spec, command=command, environment=environment, as_root=os.geteuid() == 0)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        module.arguments(spec),
        env={**os.environ, **environment, **module.launcher_settings(spec), "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return [json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir()]


HERE = LaunchSpec(ranks=2, hosts=(Host("localhost", 4),), command=("true",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mpirun", HERE),
        ("mpirun", replace(HERE, bind="core", ranks=1, cores_per_rank=1, interfaces=("lo",))),
        ("horovodrun", HERE),
        ("horovodrun", replace(HERE, bind="core", ranks=1, interfaces=("lo",))),
        ("horovodrun", replace(HERE, controller="gloo", interfaces=("lo",))),
        ("local", replace(HERE, ranks=1)),
        ("local", HERE),
    ],
    ids=["mpirun", "mpirun-bound", "horovodrun", "horovodrun-bound", "gloo", "one", "torchrun"],
)
def test_every_rank_gets_the_command_and_the_variables(
    name: str, spec: LaunchSpec, tmp_path: Path
) -> None:
    require_ranks()
    if name == "mpirun":
        spec = replace(spec, mpi=detect.installed_mpi())
    found = started(LAUNCHERS[name], spec, tmp_path)
    assert found == [["two words", list(HOSTILE)]] * spec.ranks


# What the machine is asked

VERSIONS = {
    "mpirun (Open MPI) 4.1.8\n\nReport bugs to http://www.open-mpi.org/": "openmpi4",
    "mpirun (Open MPI) 3.1.6": "openmpi4",
    "mpirun.real (OpenRTE) 4.0.3": "openmpi4",
    "mpirun (Open MPI) 5.0.11": "openmpi5",
    "mpirun (Open MPI) 10.0.0a1": "openmpi5",
    "HYDRA build details:\n    Version:    5.0.2\n": "mpich",
}


@pytest.mark.parametrize("text", VERSIONS, ids=lambda text: text.split("\n")[0][-24:])
def test_an_mpi_is_known_by_its_version(text: str) -> None:
    assert detect.mpi_flavour(text) == VERSIONS[text]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("mpirun (IBM Spectrum MPI) 10.3", "says 'mpirun .IBM Spectrum MPI. 10.3'.*launch.mpi"),
        ("mpirun (Open MPI) 1.10.2", "known are Open MPI 3 to 5"),
        ("", "says 'nothing'"),
        ("x" * 5000, "says 'x{120}'"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.19", "mpirun is Intel MPI's.*srun"),
    ],
)
def test_an_unknown_mpi_is_told(text: str, wrong: str) -> None:
    with pytest.raises(LaunchError, match=wrong):
        detect.mpi_flavour(text)


@pytest.mark.parametrize(
    ("text", "mpi"),
    [
        (
            "MPI plugin types are...\n\tpmix\n\tnone\n\tcray_shasta\n\tpmi2\n"
            "specific pmix plugin versions available: pmix_v4",
            "pmix",
        ),
        ("srun: MPI types are...\nsrun: pmi2\nsrun: pmix_v2\nsrun: pmix_v10\n", "pmix_v10"),
        ("MPI plugin types are...\n\tnone\n\tpmi2\n", "pmi2"),
    ],
)
def test_srun_starts_ranks_by_the_best_that_it_has(text: str, mpi: str) -> None:
    assert detect.srun_mpi(text) == mpi


@pytest.mark.parametrize("text", ["", "MPI plugin types are...\n\tnone\n\tcray_shasta\n"])
def test_an_srun_without_mpi_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match=r"has neither pmix nor pmi2.*--launcher mpirun"):
        detect.srun_mpi(text)


@given(st.text(max_size=60))
def test_any_text_of_a_launcher_is_an_answer_or_a_launch_error(text: str) -> None:
    for read in (detect.mpi_flavour, detect.srun_mpi):
        try:
            assert read(text)
        except LaunchError:
            continue


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, and whose programs are asked."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return tmp_path


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def test_the_launchers_on_the_path_are_asked(programs: Path) -> None:
    program(programs, "mpirun", 'test "$*" = --version && echo "mpirun (Open MPI) 5.0.3"')
    program(programs, "srun", 'test "$*" = --mpi=list && echo "srun: pmi2" >&2')
    assert detect.installed_mpi() == "openmpi5"
    assert detect.available_srun_mpi() == "pmi2"


def test_launchers_that_cannot_be_asked_are_told(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaunchError, match="mpirun is not on PATH; install Open MPI"):
        detect.installed_mpi()
    with pytest.raises(LaunchError, match="srun is not on PATH; start inside a Slurm job"):
        detect.available_srun_mpi()
    program(programs, "mpirun", "echo broken library; exit 127")
    with pytest.raises(LaunchError, match=r"`mpirun --version` ended with exit code 127 \(broken"):
        detect.installed_mpi()
    program(programs, "srun", "exit 1")
    with pytest.raises(LaunchError, match=r"exit code 1 \(no message\); start inside"):
        detect.available_srun_mpi()
    (programs / "mpirun").write_text("#!/no/such/interpreter\n", encoding="utf-8")
    with pytest.raises(LaunchError, match="`mpirun --version` does not start: No such file"):
        detect.installed_mpi()
    monkeypatch.setattr(detect, "_PATIENCE", 0.1)
    program(programs, "srun", "exec /bin/sleep 60")
    with pytest.raises(LaunchError, match=r"`srun --mpi=list` did not end within 0\.1 s; start"):
        detect.available_srun_mpi()


def test_a_job_of_slurm_s_is_known_by_its_number() -> None:
    assert detect.inside_slurm_job({"SLURM_JOB_ID": "7"})
    assert not detect.inside_slurm_job({"SLURM_JOB_ID": "", "SLURM_CONF": "/etc/slurm.conf"})


def test_mps_is_where_its_control_program_is(programs: Path) -> None:
    assert detect.cuda_mps() is None
    program(programs, "nvidia-cuda-mps-control", "exit 0")
    assert detect.cuda_mps() == str(programs / "nvidia-cuda-mps-control")


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0", 1), ("0,1,2", 3), ("2, 3", 2), ("", 0), ("-1", 0), ("0,1,-1,3", 2),
        ("NoDevFiles", 0), ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ("MIG-GPU-89/1/2,MIG-49c7", 2),
    ],
)  # fmt: skip
def test_visible_gpus_are_counted_as_cuda_does(visible: str, count: int, tmp_path: Path) -> None:
    assert detect.gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count


def test_gpus_are_those_of_the_driver(programs: Path) -> None:
    none = programs / "gpus"
    assert detect.gpus({}, none) == 0
    program(programs, "nvidia-smi", "echo no driver; exit 9")
    assert detect.gpus({}, none) == 0
    program(programs, "nvidia-smi", 'echo "GPU 0: H100 (UUID: GPU-1)"; echo "  MIG 1g: (UUID)"')
    assert detect.gpus({}, none) == 1
    for bus in ("0000:01:00.0", "0000:41:00.0"):
        (none / bus).mkdir(parents=True)
    assert detect.gpus({}, none) == 2


# Variables


def variables(
    capsys: pytest.CaptureFixture[str], *overrides: str, hosts: str = "localhost:2"
) -> dict[str, str]:
    """What a dry run shows that every rank would get."""
    config = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
    run(
        RunRequest(
            config,
            overrides,
            ranks=2,
            hosts=hosts,
            launcher="mpirun",
            run_dir=Path("not-made"),
            dry_run=True,
        )
    )
    words = shlex.split(capsys.readouterr().out)
    settings = words[1 : words.index("mpirun")]
    passed = {name for flag, name in itertools.pairwise(words) if flag == "-x"}
    found = dict(word.split("=", 1) for word in settings)
    assert set(found) == passed
    return found


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which the user has set nothing that ranks get."""
    for name in list(os.environ):
        if name.startswith((*FORWARDED, "OMP_", "OMPI_", "HARNESS_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_what_nobody_has_set_is_left_to_each_rank(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = variables(capsys)
    assert found.keys() == {
        *mpirun.DEFAULTS,
        "HARNESS_FAILURE_DIR",
        "HARNESS_GROW",
        "HARNESS_HANG_SECONDS",
        "HARNESS_LAUNCHED_AT",
        "HARNESS_LAUNCHER",
        "HARNESS_MPS",
        "HARNESS_PROGRESS",
        "HARNESS_RANKS_PER_GPU",
        "HARNESS_WORLD_SIZE",
        "OMP_NUM_THREADS",
    }
    assert (found["HARNESS_WORLD_SIZE"], found["HARNESS_GROW"]) == ("2", "0")


def test_keys_of_the_configuration_beat_the_user_s_variables(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.setenv("HOROVOD_CYCLE_TIME", "7")
    bare.setenv("HOROVOD_TIMELINE", "trace.json")
    bare.setenv("NCCL_DEBUG", "INFO")
    bare.setenv("MASTER_PORT", "1234")
    found = variables(capsys)
    assert found["HOROVOD_CYCLE_TIME"] == "7"
    assert found["HOROVOD_TIMELINE"] == "trace.json"
    assert (found["NCCL_DEBUG"], found["MASTER_PORT"]) == ("INFO", "1234")
    found = variables(capsys, "comm={cycle_ms: 0.05, fusion_mb: 2, yield_when_idle: true}")
    assert found["HOROVOD_CYCLE_TIME"] == "0.05"
    assert found["HOROVOD_FUSION_THRESHOLD"] == str(2 * 2**20)
    assert found["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert found["HOROVOD_TIMELINE"] == "trace.json"


@pytest.mark.parametrize(
    ("hosts", "key", "threads"),
    [
        ("a:2", "null", "4"),
        ("a:1,b:1", "null", "8"),
        ("a:1,b:2", "null", "8"),
        ("a:2", "3", "3"),
    ],
)
def test_threads_are_the_share_of_a_rank_on_the_fullest_host(
    hosts: str,
    key: str,
    threads: str,
    bare: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    found = variables(capsys, f"ranks.threads={key}", hosts=hosts)
    assert found["OMP_NUM_THREADS"] == threads
    bare.setenv("OMP_NUM_THREADS", "5")
    found = variables(capsys, f"ranks.threads={key}", hosts=hosts)
    assert found["OMP_NUM_THREADS"] == ("5" if key == "null" else threads)


@pytest.mark.parametrize(
    ("keys", "warned"),
    [
        ("{backend: horovod, controller: gloo, compression: fp16}", True),
        ("{backend: horovod, controller: gloo, compression: fp16_feedback}", True),
        ("{backend: horovod, controller: gloo, compression: none}", False),
        ("{backend: horovod, controller: mpi, compression: fp16}", False),
        ("{backend: torch, controller: gloo, compression: fp16}", False),
    ],
)
def test_half_precision_over_horovod_s_gloo_is_warned_of(
    keys: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
    run(
        RunRequest(
            config,
            (f"comm={keys}",),
            ranks=2,
            hosts="a:2",
            launcher="horovodrun",
            run_dir=Path("not-made"),
            dry_run=True,
        )
    )
    assert ("fp16 over Horovod's Gloo" in capsys.readouterr().err) == warned
