"""What a fault costs a run under Slurm: updates done again, seconds until it trains again.

    .venv/bin/python benchmarks/slurm_faults.py [--repeats 3]

Starts a Slurm of four nodes on this machine (as root), submits LeNet-5 on one or two of them,
strikes in the middle, and lets the run come back by itself; after scancel it is submitted again at
once. Prints a Markdown table of medians and ranges. Most of the time until training is this Slurm's
own: it takes 5 s to call a silent node down where a cluster takes minutes, and queues a job again
after 5 s where the default is 120.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from slurmbed import SlurmBed, missing_for_pmix  # noqa: E402
from slurmruns import FAULTS, NODES, PATIENCE, SlurmRun, mend, recover  # noqa: E402


def shown(values: list[float], digits: int = 0) -> str:
    """The median, and the range where the values differ."""
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    missing = missing_for_pmix()
    if missing is not None:
        raise SystemExit(missing)
    print("| fault | outcome | updates repeated | seconds until training |")
    print("|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as scratch,
        SlurmBed(NODES, folder=Path(scratch), timeout=5) as slurm,
    ):
        for fault in FAULTS:
            found = []
            for repeat in range(repeats):
                slurm.wait_for_nodes(NODES, PATIENCE)
                run = SlurmRun(slurm, Path(scratch) / f"{fault.__name__}-{repeat}")
                found.append(recover(run, fault))
                mend(slurm)
            outcomes = sorted({recovery.outcome for recovery in found})
            again = shown([recovery.updates_repeated for recovery in found])
            seconds = shown([recovery.seconds for recovery in found], 1)
            what = (fault.__doc__ or "").rstrip(".")
            print(f"| {what} | {', '.join(outcomes)} | {again} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
