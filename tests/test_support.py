"""HARNESS_REQUIRE: what the machine lacks is a skip with its reason, or a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
from support import REQUIRE, ROOT, missing_for_ranks, require, tool

SUITE = """
import pytest
from support import require

def test_that_can_run():
    require(True, "never said")

def test_that_cannot():
    require(False, "no accelerator here")
    raise AssertionError("went on")

@pytest.fixture
def accelerator():
    require(False, "no accelerator for the fixture")

def test_with_a_fixture(accelerator):
    raise AssertionError("went on")

@pytest.mark.parallel(2)
def test_of_ranks():
    pass

def test_with_ranks(ranks_available):
    pass
"""


NO_RANKS = "import support\nsupport.missing_for_ranks = lambda: 'there is no launcher here'\n"


def suite(folder: Path, value: str | None) -> tuple[int, str]:
    """Run a small suite under this project's conftest, as without Horovod; exit code and output."""
    for name in ("conftest.py", "support.py"):
        (folder / name).write_text((ROOT / "tests" / name).read_text(encoding="utf-8"))
    (folder / "test_small.py").write_text(NO_RANKS + SUITE)
    marker = "markers=parallel(ranks): x"
    environment = {key: entry for key, entry in os.environ.items() if key != REQUIRE}
    environment |= {} if value is None else {REQUIRE: value}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "-o", marker],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_lack_is_a_skip_that_says_why(tmp_path: Path) -> None:
    code, output = suite(tmp_path, None)
    assert code == 0
    assert "no accelerator here" in output
    assert "no accelerator for the fixture" in output
    assert "there is no launcher here" in output
    assert "1 passed, 4 skipped" in output


def test_a_lack_is_a_failure_where_all_is_required(tmp_path: Path) -> None:
    code, output = suite(tmp_path, "all")
    assert code == 1
    assert "HARNESS_REQUIRE=all, but no accelerator here" in output
    assert "HARNESS_REQUIRE=all, but no accelerator for the fixture" in output
    assert "HARNESS_REQUIRE=all, but there is no launcher here" in output
    assert "1 failed, 1 passed, 3 errors" in output


def test_another_value_is_refused(tmp_path: Path) -> None:
    code, output = suite(tmp_path, "some")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "HARNESS_REQUIRE=some is not known; valid: all, or unset" in output


def test_skipping_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRE, raising=False)
    require(True, "unused")
    with pytest.raises(pytest.skip.Exception, match="no such thing"):
        require(None, "no such thing")


def test_failing_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE, "all")
    require(True, "unused")
    with pytest.raises(pytest.fail.Exception, match="HARNESS_REQUIRE=all, but no such thing"):
        require([], "no such thing")


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(missing_for_ranks.cache_clear)
    missing_for_ranks.cache_clear()
    monkeypatch.setattr(support, "find_spec", lambda name: None if name == "horovod" else object())
    assert missing_for_ranks() == "horovod is not installed (`make setup`)"


def test_a_launcher_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(missing_for_ranks.cache_clear)
    missing_for_ranks.cache_clear()
    monkeypatch.setattr(support, "find_spec", lambda name: object())
    monkeypatch.setattr(support, "tool", lambda name: None if name == "mpirun" else name)
    assert missing_for_ranks() == "mpirun is not on PATH (`make setup`)"


def test_tools_are_found_beside_the_interpreter_first() -> None:
    assert tool("python") == str(Path(sys.executable).parent / "python")
    assert tool("no-such-command") is None
