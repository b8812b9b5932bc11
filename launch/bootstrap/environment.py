"""What is there: the interpreter of an environment, the torch in it, and its stamp."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from .console import BootstrapError
from .process import output_of

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = Path(__file__).with_name("constraints.txt")

PROBE = """
import importlib.util, json, platform, sys, sysconfig
def home(name):
    spec = importlib.util.find_spec(name)
    return spec and spec.submodule_search_locations and spec.submodule_search_locations[0]
print(json.dumps(dict(
    executable=sys.executable, abi=sysconfig.get_config_var("SOABI") or sys.version,
    machine=platform.machine(), scripts=sysconfig.get_path("scripts"),
    headers=sysconfig.get_path("include"), site_packages=sysconfig.get_path("platlib"),
    torch=home("torch"), horovod=home("horovod"))))
"""


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    executable: str
    abi: str
    machine: str
    scripts: str
    headers: str
    site_packages: str
    torch: str | None
    horovod: str | None

    @classmethod
    def probe(cls, python: Path | str) -> Interpreter | None:
        """None where that Python does not run (no environment, or its base Python is gone)."""
        found = output_of([python, "-c", PROBE])
        return cls(**json.loads(found)) if found else None


@dataclass(frozen=True, kw_only=True)
class Torch:
    """Read from torch's files: importing it takes seconds."""

    version: str
    cuda: str | None
    build: str
    cxx_standard: int

    @classmethod
    def read(cls, home: str | None) -> Torch:
        if home is None:
            raise BootstrapError("torch is not installed here; Horovod is compiled against it")
        text = (Path(home) / "version.py").read_text(encoding="utf-8")
        version = str(_assigned(text, "__version__"))
        header = Path(home) / "include/ATen/ATen.h"
        source = header.read_text(encoding="utf-8") if header.exists() else ""
        return cls(
            version=version,
            cuda=_assigned(text, "cuda"),
            build=str(_assigned(text, "git_version")),
            cxx_standard=cxx_standard(source, version),
        )


def _assigned(source: str, name: str) -> str | None:
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if getattr(target, "id", None) == name and isinstance(value, ast.Constant):
            return value.value if isinstance(value.value, str) else None
    return None


def cxx_standard(aten_header: str, version: str) -> int:
    """The C++ standard that torch's headers ask for, else what that version is known to need."""
    if asked := re.search(r"__cplusplus\s*<\s*(\d{4})\d\dL", aten_header):
        return int(asked.group(1)) % 100
    major, minor = (int(part) for part in version.split(".")[:2])
    return 14 if (major, minor) < (2, 1) else 17 if (major, minor) < (2, 14) else 20


def libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return ""


def checked_extras(names: str) -> tuple[str, ...]:
    """Extras of pyproject.toml, which only a checkout has."""
    if not (ROOT / "pyproject.toml").is_file():
        raise BootstrapError(
            f"{ROOT} is no checkout, from which alone the whole set-up can be made; with torch "
            "installed, --horovod-only adds Horovod to the environment of this Python"
        )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = tuple(sorted({name.strip() for name in names.split(",") if name.strip()}))
    valid = sorted(project["optional-dependencies"])
    if unknown := [name for name in extras if name not in valid]:
        raise BootstrapError(f"no such extra: {', '.join(unknown)}; there are {', '.join(valid)}")
    return extras


def project_dependencies(pyproject: str) -> str:
    """The part of pyproject.toml that decides what is installed."""
    project = tomllib.loads(pyproject)["project"]
    names = ("dependencies", "optional-dependencies", "scripts", "requires-python")
    return json.dumps({name: project.get(name) for name in names}, sort_keys=True)


def digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def inputs_digest(extras: tuple[str, ...], wheel_key: str) -> str:
    """Changes with everything that the set-up installs or does."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(CONSTRAINTS.parent.glob("*.py"))]
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    constraints = CONSTRAINTS.read_text(encoding="utf-8")
    return digest(
        constraints, project_dependencies(pyproject), ",".join(extras), wheel_key, *sources
    )


@dataclass(frozen=True)
class Stamp:
    """A finished set-up: where it was made (scripts hold that path) and from what."""

    place: str
    digest: str

    @staticmethod
    def path(venv: Path) -> Path:
        return venv / ".harness-setup"

    @classmethod
    def read(cls, venv: Path) -> Stamp | None:
        try:
            lines = cls.path(venv).read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        return cls(*lines) if len(lines) == 2 else None

    def write(self, venv: Path) -> None:
        draft = self.path(venv).with_suffix(".new")
        draft.write_text(f"{self.place}\n{self.digest}\n", encoding="utf-8")
        draft.replace(self.path(venv))
