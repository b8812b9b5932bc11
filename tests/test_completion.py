"""Shell completion, asked as a shell asks: real bash, and zsh and fish where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, require, tool

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    words = [sys.executable, "-m", "harness", "completion", shell]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def bash_script() -> str:
    return script("bash")


ASK = r"""
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
read -ra COMP_WORDS <<<"${1//=/ = }"
[[ $1 == *" " || $1 == *= ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
compopt() { :; }
entry=$(complete -p harness) || exit 3
name=${entry#*-F } name=${name%% *}
"$name" harness "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


def completed(line: str, text: str, folder: Path = ROOT) -> list[str]:
    """What bash offers at the end of a line, by the function that it would call."""
    harness = tool("harness")
    assert harness is not None
    done = subprocess.run(
        [shutil.which("bash") or "bash", "--norc", "-c", f"{text}\n{ASK}", "bash", line],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(harness).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("harness pl", {"plan"}),
        ("harness do", {"doctor"}),
        ("harness doctor --la", {"--launcher"}),
        ("harness doctor --launcher h", {"horovodrun"}),
        ("harness completion ", {"bash", "zsh", "fish"}),
        ("harness plan configs/adab", {"configs/adabatch/", "configs/adabatch-digits.yaml"}),
        ("harness plan configs/adabatch-digits.yaml batch.mi", {"batch.micro="}),
        ("harness run configs/adabatch-digits.yaml --ranks 2 lr.dec",
         {"lr.decay.kind=", "lr.decay.power=", "lr.decay.every="}),
        ("harness run configs/adabatch-digits.yaml train.precision=", {"fp32", "bf16", "fp16"}),
        ("harness run configs/adabatch-digits.yaml data.dataset=cif", {"cifar10", "cifar100"}),
        ("harness run configs/adabatch-digits.yaml batch.growth.policy=ge", {"geometric"}),
        ("harness config configs/adabatch-digits.yaml train.compile=t", {"true"}),
    ],
)  # fmt: skip
def test_bash_offers_what_fits(line: str, offered: set[str], bash_script: str) -> None:
    found = completed(line, bash_script)
    # Behind an = bash takes the value alone for the word.
    assert offered <= {word.rpartition("=")[2] or word for word in found} | set(found), found


@pytest.mark.slow
def test_files_that_are_no_yaml_are_not_offered(bash_script: str, tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yml", "c.txt", ".d.yaml"):
        (tmp_path / name).write_text("")
    (tmp_path / "e").mkdir()
    assert set(completed("harness plan ", bash_script, tmp_path)) >= {"a.yaml", "b.yml", "e/"}
    assert not {"c.txt", ".d.yaml"} & set(completed("harness plan ", bash_script, tmp_path))
    assert completed("harness plan .d", bash_script, tmp_path) == [".d.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if shell != "bash" and program is None:
        pytest.skip(f"{shell} is not installed")  # whoever has it has tried it
    require(program, f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(script(shell), encoding="utf-8")
    begin = "autoload -U compinit; compinit -u; " if shell == "zsh" else ""
    done = subprocess.run(
        [program or shell, "-c", f"{begin}source {path}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path), "TERM": "dumb"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_shell_that_is_none() -> None:
    words = [sys.executable, "-m", "harness", "completion", "tcsh"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "invalid choice: 'tcsh'" in done.stderr
