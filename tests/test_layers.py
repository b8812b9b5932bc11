"""Which module may import which; what runs without torch; who reads the launcher's variables."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import ROOT

# The layout of the project, top to bottom: a module imports from its own entry or from those above.
# A new module gets its place here.
ABOVE_THE_LINE = (
    "harness.errors",
    "harness.units",
    "harness.lenient",
    "harness.wording",
    "harness.redact",
    "harness.versions",
    "harness.student",
    "harness.yamlfile",
    "harness.own_names",
    "harness.recipes",
    "harness.optimizer_table",
    "harness.dataset_table",
    "harness.model_table",
    "harness.section",
    "harness.launch_schema",
    "harness.schema",
    "harness.keyed",
    "harness.data_listing",
    "harness.shard_listing",
    "harness.data_sizes",
    "harness.doctor",
    "harness.config",
    "harness.json_schema",
    "harness.origins",
    "harness.completion",
    "harness.environment",
    "harness.processes",
    "harness.pulse",
    "harness.progress",
    "harness.schedule.choices",
    "harness.schedule.clock",
    "harness.schedule.growth",
    "harness.schedule.rates",
    "harness.schedule.measured",
    "harness.schedule.goodput",
    "harness.schedule.noise",
    "harness.schedule.configured",
    "harness.schedule.plan",
    "harness.schedule.updates",
    "harness.files",
    "harness.jsonl",
    "harness.rundir",
    "harness.runlock",
    "harness.records",
    "harness.first_config",
    "harness.attempts",
    "harness.benchfile",
    "harness.benchstats",
    "harness.benchruns",
    "harness.benchseries",
    "harness.benchtable",
    "harness.schedule.costs",
    "harness.schedule.table",
    "harness.scaling",
    "harness.tensorboard",
    "harness.spread",
    "harness.trace_merge",
    "harness.resume",
    "harness.standing",
    "harness.follow",
    "harness.watched",
    "harness.watch",
    "harness.twoway_steps",
    "harness.probe_results",
    "harness.alphabeta",
    "harness.probe_verdict",
    "harness.report",
    "harness.speedfit",
    "harness.study",
)
BELOW_THE_LINE = (
    "harness.comm",
    "harness.phases",
    "harness.counters",
    "harness.tracing",
    "harness.profiler",
    "harness.memory",
    "harness.buckets",
    "harness.compression",
    "harness.reducer",
    "harness.syncbn",
    "harness.precision",
    "harness.autotune",
    "harness.consistency",
    "harness.gradstats",
    "harness.layerwise",
    "harness.lars",
    "harness.lamb",
    "harness.torchvision_ops",
    "harness.own",
    "harness.optimizer",
    "harness.models",
    "harness.data",
    "harness.window",
    "harness.stop",
    "harness.checkpoint",
    "harness.buffers",
    "harness.api",
    "harness.criterion",
    "harness.evaluate",
    "harness.forward",
    "harness.gradient_step",
    "harness.trackers",
    "harness.journal",
    "harness.provenance",
    "harness.last_words",
    "harness.elastic",
    "harness.trainer",
    "harness.worker",
    "harness.trial",
    "harness.cells",
    "harness.probe",
    "harness.twoway",
    "harness.benchmachine",
)
LAUNCH = (
    "launch.bootstrap",
    "launch.spec",
    "launch.containers",
    "launch.hosts",
    "launch.deaths",
    "launch.detect",
    "launch.mpirun",
    "launch.closed",
    "launch.horovodrun",
    "launch.srun",
    "launch.local",
    "launch.elastic",
    "launch.preflight",
    "launch.hangs",
    "launch.outcome",
    "launch.restarts",
    "launch.tied",
    "launch.execute",
    "launch.assemble",
    "launch.supervise",
    "launch.probe",
    "launch.twoway",
    "launch.doctor",
    "launch.bench",
    "launch.slurm",
    "launch.jobs",
    "launch.graph",
    "launch.submit",
    "launch.job",
    "launch.status",
    "launch.study",
)
ENTRY = ("harness.cli", "harness.__main__")
LINES = (*ABOVE_THE_LINE, *LAUNCH, *BELOW_THE_LINE, *ENTRY)
WITHOUT_TORCH = (*ABOVE_THE_LINE, *LAUNCH, "harness.cli")

HEAVY = ("torch", "torchvision", "horovod", "mpi4py", "sklearn", "psutil", "numpy", "scipy")
TAKES_NUMPY = (
    "harness.keyed",
    "harness.scaling",
    "harness.report",  # through matplotlib
    "harness.study",
    "launch.study",
    "harness.alphabeta",
    "harness.probe_verdict",
)
IS_HOROVODRUN = ("launch.closed",)  # in a process of its own
LOADS_SCIPY = ("harness.student", "harness.scaling")  # in functions, when there is something to fit


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    inside: bool
    """In a function: it happens when that is called, not when the module is imported."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in ("harness", "launch")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module: absolute names, ``from a import b`` as ``a.b``."""
    tree = ast.parse(source)
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, node in inside)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, node in inside)


def imports_of(module: str) -> list[Import]:
    path = MODULES[module]
    return list(imports(path.read_text(encoding="utf-8"), module, path.stem == "__init__"))


def entry(name: str, lines: tuple[str, ...] = LINES) -> str | None:
    """The entry of the layout that a module (or something imported from it) belongs to."""
    fitting = [line for line in lines if name == line or name.startswith(f"{line}.")]
    return max(fitting, key=len) if fitting else None


def upward(module: str, found: list[Import], lines: tuple[str, ...] = LINES) -> list[str]:
    """Imports that go against the layout."""
    own = entry(module, lines)
    return [
        f"{module}:{one.line} imports {one.name}"
        for one in found
        if (target := entry(one.name, lines)) is not None
        and own is not None
        and lines.index(target) > lines.index(own)
    ]


def test_every_module_has_its_place() -> None:
    packages = {"harness", "launch", "harness.schedule"}
    placed = {module for module in MODULES if entry(module)}
    assert set(MODULES) - placed - packages == set(), "give it a place in LINES"
    assert all(
        (ROOT / name.replace(".", "/") / "__init__.py").stat().st_size == 0 for name in packages
    )
    assert {entry(module) for module in placed} == set(LINES), "an entry without a module"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_up_only(module: str) -> None:
    assert upward(module, imports_of(module)) == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("harness")))
def test_harness_does_not_import_launch(module: str) -> None:
    found = [one for one in imports_of(module) if one.name.split(".")[0] == "launch"]
    if module == "harness.cli":
        assert found
        found = [one for one in found if not one.inside]
    assert found == []


@pytest.mark.parametrize(
    "module", sorted(m for m in MODULES if entry(m) in WITHOUT_TORCH and m != "harness.cli")
)
def test_nothing_above_the_line_imports_what_is_heavy(module: str) -> None:
    allowed = {"numpy"} if entry(module) in TAKES_NUMPY else set()
    allowed |= {"scipy"} if entry(module) in LOADS_SCIPY else set()
    allowed |= {"horovod"} if entry(module) in IS_HOROVODRUN else set()
    heavy = {one.name.split(".")[0] for one in imports_of(module)} & set(HEAVY)
    assert heavy <= allowed


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("launch")))
def test_launch_knows_nothing_below_the_line(module: str) -> None:
    assert [one for one in imports_of(module) if entry(one.name) in BELOW_THE_LINE] == []


def test_the_command_imports_almost_nothing_before_it_knows_what_to_do() -> None:
    at_once = {one.name for one in imports_of("harness.cli") if not one.inside}
    assert {name for name in at_once if entry(name)} == {
        "harness.errors.HarnessError",
        "harness.errors.UsageError",
        "harness.errors.told",
    }


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("launch.bootstrap")))
def test_the_set_up_needs_nothing_but_python(module: str) -> None:
    outside = {
        one.name.split(".")[0]
        for one in imports_of(module)
        if not one.name.startswith("launch.bootstrap.")
    }
    assert outside <= set(sys.stdlib_module_names) | {"__future__"}


class TestTheChecksThemselves:
    def test_find_every_form_of_import(self) -> None:
        source = (
            "import torch.nn as nn\nfrom harness import worker\nfrom . import plan\n"
            "from .clock import Clock\nfrom ..errors import X\nif TYPE_CHECKING:\n    import a\n"
            "def f():\n    from harness.comm import base\nclass C:\n    import b\n"
            "    def g(self):\n        import c, d\n"
        )
        assert list(imports(source, "harness.schedule.growth")) == [
            Import("torch.nn", 1, False),
            Import("harness.worker", 2, False),
            Import("harness.schedule.plan", 3, False),
            Import("harness.schedule.clock.Clock", 4, False),
            Import("harness.errors.X", 5, False),
            Import("a", 7, False),
            Import("harness.comm.base", 9, True),
            Import("b", 11, False),
            Import("c", 13, True),
            Import("d", 13, True),
        ]

    def test_relative_imports_of_a_package_start_at_itself(self) -> None:
        assert list(imports("from . import base", "harness.comm", is_package=True)) == [
            Import("harness.comm.base", 1, False)
        ]

    def test_find_an_import_downwards(self) -> None:
        found = list(imports("from harness import trainer, errors\n", "harness.units"))
        assert upward("harness.units", found) == ["harness.units:1 imports harness.trainer"]
        assert upward("harness.trainer", found) == []


BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def python(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that cannot import some packages."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK.format(blocked=blocked) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_blocking_works() -> None:
    done = python("import torch", "torch")
    assert "ImportError: torch is blocked" in done.stderr


@pytest.mark.parametrize("with_numpy", [False, True])
def test_modules_above_the_line_import_without_what_is_heavy(with_numpy: bool) -> None:
    above = [
        module
        for module in MODULES
        if entry(module) in WITHOUT_TORCH
        and not module.endswith("__main__")
        and (entry(module) in TAKES_NUMPY) == with_numpy
    ]
    assert len(above) > 1
    code = "".join(f"import {module}\n" for module in above)
    code += f"assert not set(sys.modules) & {set(HEAVY) - {'numpy'}}\n"
    done = python(code, *(name for name in HEAVY if name != "numpy" or not with_numpy))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_planning_needs_no_part_of_a_compute_node(form: list[str]) -> None:
    arguments = ["plan", "configs/adabatch-digits.yaml", *form]
    code = f"from harness.cli import main\nsys.exit(main({arguments!r}))"
    done = python(code, *HEAVY, "matplotlib", "jinja2", "launch")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "1,024" in done.stdout or '"global_batch": 1024' in done.stdout


# Who reads what a launcher tells its ranks

RANK_VARIABLE = re.compile(
    r"(OMPI_COMM_WORLD|PMIX?|MV2_COMM_WORLD)_\w+"
    r"|(HOROVOD|SLURM|HARNESS|MPI)_(LOCAL_|CROSS_|NODE_|WORLD_)?(RANK|SIZE|PROCID|LOCALID|NODEID)"
    r"|SLURM_(NTASKS\w*|NPROCS|STEP_NUM_TASKS|STEP_TASKS_PER_NODE|TASKS_PER_NODE)"
    r"|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE"
)


def rank_variables(source: str) -> list[str]:
    """Names of rank and world variables among a module's strings."""
    return [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and RANK_VARIABLE.fullmatch(node.value)
    ]


def test_rank_variables_are_found() -> None:
    source = 'x = os.environ["OMPI_COMM_WORLD_RANK"] or os.getenv("SLURM_PROCID") or "RANK of x"'
    assert rank_variables(source) == ["OMPI_COMM_WORLD_RANK", "SLURM_PROCID"]


# What is no rank's own: how many slots a Slurm job has, and a setting of PMIx.
FOR_LAUNCHERS = {
    "launch.hosts": {"SLURM_TASKS_PER_NODE"},
    "launch.srun": {"PMIX_MCA_gds", "PMIX_MCA_psec"},
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_one_module_reads_rank_and_world_variables(module: str) -> None:
    named = set(rank_variables(MODULES[module].read_text(encoding="utf-8")))
    if module == "harness.environment":
        assert named
    else:
        assert named == FOR_LAUNCHERS.get(module, set())
