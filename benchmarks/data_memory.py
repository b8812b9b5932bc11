"""Memory that a data set of CIFAR-10's size takes on one host, by number of ranks.

    .venv/bin/python benchmarks/data_memory.py [--ranks 1,2,4]

Writes files in CIFAR-10's format (random images), loads them under mpirun, touches every byte on
each rank, and adds up over the ranks by how much each one's proportional share of resident memory
(PSS, which counts a page that k processes share as 1/k in each) has grown since before loading.
With `data.share: false` every rank holds a copy of its own.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]

RANK = """
import sys
import torch
from pathlib import Path
from harness.comm import allreduce, open_communicator
from harness.data.shared import load_shared
from harness.schema import Data

def resident():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

comm = open_communicator("horovod")
torch.zeros(1) + 1
load_shared(Data(dataset="digits"), comm)  # imports what loading needs
allreduce(comm, torch.zeros(1), "before")
before = resident()
allreduce(comm, torch.zeros(1), "measured")
data = load_shared(Data(dataset="cifar10", root=sys.argv[1], share=sys.argv[2] == "share"), comm)
total = int(data.train.images.sum()) + int(data.test.images.sum())
allreduce(comm, torch.zeros(1), "loaded")
grown = torch.tensor([float(resident() - before)])
allreduce(comm, torch.zeros(1), "measured.again")
allreduce(comm, grown, "sum")
if comm.rank == 0:
    print("GROWN", float(grown) / 1024)
comm.close()
"""


def write_cifar10(root: Path) -> None:
    """50,000 + 10,000 random images in the official batches' format."""
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = random.integers(0, 256, (10_000, 3072), dtype=np.uint8)
        labels = random.integers(0, 10, 10_000).tolist()
        content = {b"batch_label": b"random", b"labels": labels, b"data": images, b"filenames": []}
        (root / name).write_bytes(pickle.dumps(content, protocol=2))


def grown(root: Path, ranks: int, how: str) -> float:
    """MiB by which all ranks together grow."""
    launch = "mpirun --allow-run-as-root --oversubscribe --bind-to none -mca btl self,vader -np"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables["OMPI_MCA_mpi_yield_when_idle"] = "1"
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(
        [*launch.split(), str(ranks), sys.executable, "-c", RANK, str(root), how],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split("GROWN")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="1,2,4")
    options = parser.parse_args()
    print("| ranks | shared, MiB | a copy each, MiB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_cifar10(Path(folder))
        for ranks in map(int, options.ranks.split(",")):
            shared, apart = (grown(Path(folder), ranks, how) for how in ("share", "apart"))
            print(f"| {ranks} | {shared:.0f} | {apart:.0f} |")


if __name__ == "__main__":
    main()
