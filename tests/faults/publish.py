"""Puts the last results into docs/reliability.md, between their markers."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from faults import cycles, matrix, soak

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def publish(out: Path, page: Path = PAGE) -> None:
    """Write what there is of results; parts without one keep what they show."""
    text = page.read_text(encoding="utf-8")
    findings = matrix.load(out)
    if findings:
        found = matrix.summary(findings)
        head = (
            f"{found['date']}, {machine()}: {found['kept']} of {found['tried']} tries in "
            f"{found['rows']} of {len(matrix.ROWS)} rows kept all that is promised."
        )
        text = between(text, "matrix", f"{head}\n\n{matrix.table(findings)}")
    done = cycles.load(out / cycles.FILE)
    if done:
        date = time.strftime("%Y-%m-%d", time.gmtime((out / cycles.FILE).stat().st_mtime))
        told = f"{date}, {machine()}: {cycles.sentence(done)}"
        text = between(text, "cycles", f"{told}\n\n{cycles.table(done)}")
    result = soak.read(out)
    if result is not None:
        told = f"{result['date']}, {machine()}: {soak.sentence(result)}"
        text = between(text, "soak", f"{told}\n\n{soak.table(result)}")
    page.write_text(text, encoding="utf-8")


def between(text: str, name: str, content: str) -> str:
    """The text with other content between a part's markers; raises ValueError without them."""
    begin, end = f"<!-- faults: {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no {begin} … {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def machine() -> str:
    """Where it was measured, in words."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    asked = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False)
    mpi = re.sub(r"[()]|mpirun ", "", asked.stdout.splitlines()[0]) if asked.stdout else "no MPI"
    return f"{psutil.cpu_count()} cores shared with other work, Python {version}, {mpi}"
