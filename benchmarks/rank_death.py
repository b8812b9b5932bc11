"""From the death of a rank until it is known and until all train again, for each launcher.

    .venv/bin/python benchmarks/rank_death.py [--repeats 5] [--ranks 4]

Kills rank 1 with SIGKILL in the middle of training and reads in events.jsonl when `harness run`
knew of it and when the ranks that it started anew had loaded the checkpoint. Prints a Markdown
table of medians and ranges.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil

CONFIG = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
ALWAYS = ("ranks.threads=1", "batch.micro=16", "train.duration=900ep", "launch.restart_pause=0")
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


def seconds_after_death(options: tuple[str, ...], ranks: int) -> tuple[float, float]:
    """From a rank's death until `harness run` knows of it, and until all ranks train again."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch).resolve() / "run"
        command = [sys.executable, "-m", "harness", "run", str(CONFIG), *options, *ALWAYS]
        command += ["--hosts", f"localhost:{ranks}"]
        job = subprocess.Popen(
            [*command, "--ranks", str(ranks), "--run-dir", str(directory)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not list((directory / "checkpoints").glob("*.pt")) and job.poll() is None:
            time.sleep(0.05)
        victim = rank_1(directory)
        if victim is None or job.poll() is not None:
            raise SystemExit("the run ended before its rank could be killed")
        victim.kill()
        died = time.time()
        try:
            known = moment(job, directory, "fault") - died
            return known, moment(job, directory, "resume") - died
        finally:
            (directory / "stop").touch()
            job.wait(timeout=120)


def moment(job: subprocess.Popen[bytes], directory: Path, kind: str) -> float:
    """When an event was recorded, in seconds since the epoch; waits for it."""
    while True:
        ended = job.poll() is not None
        for line in (directory / "events.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["kind"] == kind:
                return datetime.fromisoformat(event["time"]).timestamp()
        if ended:
            raise SystemExit(f"the run ended without a {kind} event")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    print("| launcher | known after, s | training again after, s |")
    print("|---|---|---|")
    for name, settings in LAUNCHES.items():
        pairs = [seconds_after_death(settings, options.ranks) for _ in range(options.repeats)]
        cells = [
            f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
            for times in zip(*pairs, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
