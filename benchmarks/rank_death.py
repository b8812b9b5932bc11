"""From the death of a rank to the end of the job, in seconds, for each launcher.

    .venv/bin/python benchmarks/rank_death.py [--repeats 5]

Kills rank 1 of 2 with SIGKILL in the middle of training and waits for `harness run` to end. Prints
a Markdown table of medians and ranges.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

CONFIG = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
LAUNCHES = {
    "horovodrun, MPI": ("--launcher", "horovodrun"),
    "horovodrun, Gloo": ("--launcher", "horovodrun", "comm={controller: gloo, compression: none}"),
    "mpirun": ("--launcher", "mpirun"),
}


def rank_1(directory: Path) -> psutil.Process | None:
    """The process of rank 1 of the run in a directory."""
    for process in psutil.process_iter():
        try:
            words, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        rank = variables.get("OMPI_COMM_WORLD_RANK", variables.get("HOROVOD_RANK"))
        if "train" in words and str(directory) in words and rank == "1" and "python" in words[0]:
            return process
    return None


def seconds_to_end(options: tuple[str, ...]) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch).resolve() / "run"
        command = [sys.executable, "-m", "harness", "run", str(CONFIG), *options]
        job = subprocess.Popen(
            [*command, "--ranks", "2", "--hosts", "localhost:2", "--run-dir", str(directory)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not list((directory / "checkpoints").glob("*.pt")):
            time.sleep(0.05)
        victim = rank_1(directory)
        if victim is None or job.poll() is not None:
            raise SystemExit("the run ended before its rank could be killed")
        victim.kill()
        start = time.perf_counter()
        if job.wait(timeout=120) != 1:
            raise SystemExit("the run did not fail")
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print("| launcher | median, s | range, s |")
    print("|---|---|---|")
    for name, options in LAUNCHES.items():
        times = [seconds_to_end(options) for _ in range(repeats)]
        median = statistics.median(times)
        print(f"| {name} | {median:.1f} | {min(times):.1f} to {max(times):.1f} |", flush=True)


if __name__ == "__main__":
    main()
