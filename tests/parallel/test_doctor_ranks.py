"""`harness doctor --ranks` on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import command
from support import require
from testbed import Testbed, missing_for_testbed

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    with Testbed(2, tmp_path_factory.mktemp("bed")) as hosts:
        yield hosts


def trial(
    bed: Testbed, run_dir: Path, *more: object, **variables: str
) -> tuple[int, dict[str, Any]]:
    """A trial of two hosts; exit code and checks."""
    words = (
        "doctor",
        "--quick",
        "--json",
        "--ranks",
        2,
        "--hosts",
        "n1:1,n2:1",
        "--run-dir",
        run_dir,
        *more,
    )
    done = subprocess.run(
        bed.on("n1", command(*words)),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, **variables},
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    checks: dict[str, Any] = json.loads(done.stdout)["checks"]
    assert list(run_dir.iterdir()) == []
    return done.returncode, checks


def test_ranks_of_two_hosts_meet(bed: Testbed, tmp_path: Path) -> None:
    code, checks = trial(bed, tmp_path)
    assert code == 0, checks
    told = checks["ranks"]
    assert told.keys() == {"ranks", "pairs", "clocks", "versions", "shared_files"}
    assert {one["status"] for one in told.values()} == {"ok"}
    assert told["ranks"]["text"].startswith("2 ranks on 2 hosts by horovodrun, horovod-mpi")
    assert told["pairs"]["slowest_seconds"] > 0
    assert told["clocks"]["seconds_ahead"].keys() == {"n1", "n2"}
    assert checks["hosts"]["n2"]["status"] == "ok"


def test_a_rank_that_hangs_is_named_by_its_host(bed: Testbed, tmp_path: Path) -> None:
    """On one host, importing torch does not come back."""
    package = tmp_path / "path" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import socket, sys, time\n"
        "if socket.gethostname() == 'n2':\n    time.sleep(1000)\n"
        f"sys.path.remove({str(package.parent)!r})\ndel sys.modules['torch']\nimport torch\n"
    )
    run_dir = tmp_path / "runs"
    run_dir.mkdir()
    code, checks = trial(bed, run_dir, "--timeout", 20, PYTHONPATH=str(package.parent))
    assert code == 1
    told = checks["ranks"]["ranks"]
    assert told["status"] == "missing"
    assert told["text"].startswith("not done after 20 s, and ended: ")
    assert "n2 (rank 1): importing torch" in told["text"]
    assert told["standing"][1] == {"rank": 1, "host": "n2", "step": "torch"}
    assert told["remedy"]
