"""Wheel and sdist: what is in them, and that they install and run away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from support import ROOT

from harness.cli import main
from harness.config import load_config
from harness.recipes import copy, find, recipes, title
from harness.versions import installed_version

# Left by tools, or not of the project.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".audit", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build",
    "dist", "runs", "shared", "*.pyc",
)  # fmt: skip
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('.'))"


def build(kind: str, tree: Path, target: Path) -> Path:
    """What setuptools makes of a source tree, as pip has it do it without build isolation."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD.replace("'.'", repr(str(target))), kind],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: a build leaves files in what it is made from."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=LEFT_OUT))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the sdist, as an index's users would."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("build_wheel", next(folder.iterdir()), tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tracked(*folders: str) -> set[str]:
    """Files of the checkout, as far as they are no leftovers."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_all_that_is_imported_or_read(wheel: Path) -> None:
    found = set(contents(wheel))
    recipes = {f"harness/{name}" for name in tracked("configs")}
    assert {name for name in found if ".dist-info/" not in name} == {
        *tracked("harness", "launch", "slurm"), *recipes,
    }  # fmt: skip
    about = {name.partition(".dist-info/")[2] for name in found if ".dist-info/" in name}
    assert about >= {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_the_wheel_of_the_tree_is_that_of_the_sdist(
    tree: Path, wheel: Path, tmp_path: Path
) -> None:
    assert contents(build("build_wheel", tree, tmp_path)) == contents(wheel)


def test_the_sdist_holds_what_tests_and_docs_are_made_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("harness", "launch", "slurm", "configs", "docs", "tests", "benchmarks", "containers")
    alone = ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile")
    assert {*tracked(*folders), *alone, "pyproject.toml", "setup.py", "mkdocs.yml"} <= found


def test_the_metadata_are_whole(wheel: Path) -> None:
    text = next(v for k, v in contents(wheel).items() if k.endswith("/METADATA")).decode()
    lines = text.partition("\n\n")[0].splitlines()
    fields = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert fields["Version"] == project["version"]
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Author"]
    assert fields["Description-Content-Type"] == "text/markdown"
    assert "# scaling-harness" in text


# Installed


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and this one's other packages."""
    home = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    own = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", own, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-index", "--no-warn-script-location", wheel], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    # A folder that is named like this has its packages found, and its own .pth not read.
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return own


@pytest.fixture(scope="module")
def away(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tests, and the recipes as the installed harness copies them."""
    folder = tmp_path_factory.mktemp("away")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=LEFT_OUT)
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    assert run(python, folder, "-m", "harness", "recipes", "--copy", "configs").returncode == 0
    return folder


def run(python: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed environment's Python without anything of this one's but its commands."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "HARNESS"))
    }
    tools = [str(python.parent), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return subprocess.run(
        [python, *words],
        cwd=cwd,
        env={**kept, "PATH": os.pathsep.join(tools)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_imported_is_the_wheel_s(python: Path, away: Path) -> None:
    code = "import harness.cli, launch.slurm; print(harness.cli.__file__, launch.slurm.__file__)"
    done = run(python, away, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(str(python.parent.parent) in path for path in done.stdout.split())


def test_the_command_knows_its_version(python: Path, away: Path) -> None:
    done = run(python, away, str(python.parent / "harness"), "--version")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (done.returncode, done.stdout) == (0, f"scaling-harness {project['version']}\n")


def test_the_set_up_is_there_and_says_what_needs_a_checkout(python: Path, away: Path) -> None:
    done = run(python, away, "-m", "launch.bootstrap")
    assert done.returncode == 1
    assert "is no checkout" in done.stderr
    assert "--horovod-only" in done.stderr
    where = run(python, away, "-m", "launch.bootstrap", "--constraints").stdout.strip()
    assert Path(where).is_relative_to(python.parent.parent)
    own = ROOT / "launch" / "bootstrap" / "constraints.txt"
    assert Path(where).read_bytes() == own.read_bytes()


@pytest.mark.slow
def test_the_smoke_tests_pass_away_from_the_checkout(python: Path, away: Path) -> None:
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "\n@pytest.mark.smoke" in path.read_text("utf-8")
    ]
    done = run(python, away, "-m", "pytest", "-q", "-m", "smoke", "-p", "no:cacheprovider", *marked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].split(" passed")[0]) >= 12


@pytest.mark.slow
@pytest.mark.parallel(2)
def test_the_demo_runs_on_two_ranks_away_from_the_checkout(python: Path, away: Path) -> None:
    short = ["train.duration=2ep", "ranks.threads=1", "--run-dir", "r", "--hosts", "localhost:2"]
    done = run(python, away, "-m", "harness", "run", "adabatch-digits", *short, "--ranks", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (away / "r" / "report" / "index.html").is_file()
    provenance = json.loads((away / "r" / "provenance.json").read_text("utf-8"))
    assert provenance["source"] is None
    assert provenance["versions"]["scaling-harness"] == installed_version()


# Recipes, wherever they lie


def test_every_recipe_has_a_name_and_a_title() -> None:
    found = recipes()
    assert len(found) > 100
    assert found["adabatch-digits"] == ROOT / "configs" / "adabatch-digits.yaml"
    assert not [name for name, path in found.items() if not title(path)]
    assert not [name for name in found if "/_" in name]


def test_a_recipe_stands_for_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "adabatch-digits", "--json"]) == 0
    by_name = capsys.readouterr().out
    assert main(["plan", str(ROOT / "configs" / "adabatch-digits.yaml"), "--json"]) == 0
    assert capsys.readouterr().out == by_name


def test_a_file_comes_before_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("adabatch-digits").write_text("- mine\n")
    assert main(["plan", "adabatch-digits"]) == 2
    assert "found a list" in capsys.readouterr().err


def test_an_unknown_recipe_is_answered_with_what_is_like_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["recipes", "vgg19_bn-fixed"]) == 2
    assert "adabatch/cifar100-vgg19_bn-fixed-128" in capsys.readouterr().err
    assert main(["recipes", "no\nsuch"]) == 2
    assert "`harness recipes` lists them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adabatch/cifar100-resnet20-adaptive-1024", "adabatch-digits"])
def test_a_copied_recipe_is_the_same_configuration(name: str, tmp_path: Path) -> None:
    copy(name, tmp_path)
    assert load_config(tmp_path / f"{name}.yaml") == load_config(find(name))


def test_copying_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adabatch-digits.yaml").write_text("mine")
    assert main(["recipes", "--copy", str(tmp_path)]) == 2
    assert "nothing was copied" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adabatch-digits.yaml"]
    assert (tmp_path / "adabatch-digits.yaml").read_text() == "mine"


def test_the_version_is_pyproject_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"scaling-harness {installed_version()}\n"


def test_the_citation_has_what_the_format_asks_for() -> None:
    """Citation File Format 1.2.0; the version is told by pyproject.toml alone."""
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    found = yaml.safe_load(text)
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert found["cff-version"] == "1.2.0"
    assert found["type"] == "software"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert found["title"] == project["name"]
    assert found["license"] == project["license"]
    assert found["authors"] == project["authors"]
    assert "version" not in found
