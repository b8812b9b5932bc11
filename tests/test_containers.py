"""The images' definitions: linted, held to the project's files, built where there is an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, require, tool

FOLDER = ROOT / "containers"
DOCKERFILE = FOLDER / "Dockerfile"
DEFINITION = FOLDER / "scaling-harness.def"
PINS = "launch/bootstrap/constraints.txt"


def sections(text: str) -> dict[str, list[str]]:
    """Header ("") and %sections of an Apptainer definition, without comments and empty lines."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"%(\w+)\s*", line):
            name = heading[1]
            assert name not in found, f"two of %{name}"
            found[name] = []
        elif line.strip() and not line.lstrip().startswith("#"):
            found[name].append(line.strip())
    return found


def copied() -> Iterator[str]:
    """What the definitions take from the checkout."""
    for line in sections(DEFINITION.read_text("utf-8"))["files"]:
        yield line.split()[0]
    for words in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text("utf-8"), re.M):
        yield from words.split()


def test_the_dockerfile_is_without_fault() -> None:
    hadolint = tool("hadolint")
    require(hadolint, "hadolint is not installed (`make setup`)")
    done = subprocess.run([str(hadolint), DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_definition_has_what_apptainer_asks_for() -> None:
    found = sections(DEFINITION.read_text("utf-8"))
    header = dict(line.split(": ", 1) for line in found.pop(""))
    assert header == {"Bootstrap": "docker", "From": "python:3.11-slim-bookworm"}
    assert set(found) == {
        "arguments", "files", "post", "environment", "runscript", "test", "labels",
    }  # fmt: skip
    named = {line.split("=")[0] for line in found["arguments"]}
    assert named == set(re.findall(r"{{ (\w+) }}", "\n".join(found["post"])))


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_the_shell_in_the_definition_parses(section: str) -> None:
    lines = sections(DEFINITION.read_text("utf-8"))[section]
    subprocess.run(["sh", "-n"], input="\n".join(lines), text=True, check=True)


def test_what_is_copied_is_there() -> None:
    missing = [name for name in copied() if not (ROOT / name).exists()]
    assert list(copied())
    assert missing == []


def test_the_definition_copies_all_that_a_wheel_is_made_from() -> None:
    files = set(sections(DEFINITION.read_text("utf-8"))["files"])
    parts = ("harness", "launch", "slurm", "configs", "pyproject.toml", "setup.py", "LICENSE")
    assert {f"{name} /src/{name}" for name in parts} <= files


@pytest.mark.parametrize("path", [DOCKERFILE, DEFINITION], ids=lambda path: path.name)
def test_what_is_installed_has_the_pinned_versions(path: Path) -> None:
    commands = path.read_text("utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install [^&\n]*", commands)
    assert len(installs) == 2
    assert all(f"-c {PINS}" in one or "-c /src/constraints.txt" in one for one in installs)
    assert "launch.bootstrap --horovod-only" in commands
    assert f"COPY {PINS} /src/constraints.txt" in commands or path == DEFINITION


def engine() -> list[str] | None:
    """The words that build an image with what is here; None where nothing could."""
    for name in ("docker", "podman"):
        if shutil.which(name):
            told = subprocess.run([name, "info"], capture_output=True, check=False)
            if told.returncode == 0:
                return [name, "build", "-f", str(DOCKERFILE), "-t", "scaling-harness-test", "."]
    if shutil.which("apptainer"):
        return ["apptainer", "build", "--force", "scaling-harness-test.sif", str(DEFINITION)]
    return None


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_builds(tmp_path: Path) -> None:
    words = engine()
    if words is None:  # also under HARNESS_REQUIRE=all: CI has none
        pytest.skip("neither docker nor podman nor apptainer can build here")
    shutil.copytree(
        ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache")
    )
    done = subprocess.run(words, cwd=tmp_path / "tree", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
