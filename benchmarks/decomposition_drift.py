"""How far 1 rank and 2 ranks drift apart, with float and with exact summation.

    .venv/bin/python benchmarks/decomposition_drift.py [--epochs 2 5 15 30]

LeNet-5 on the digits, batch 100, micro-batches of 7, one thread a rank. Prints a Markdown table of
the largest relative L2 difference of a parameter tensor between the two final weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CONFIG = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
SETTINGS = ("batch={initial: 100, micro: 7}", "batch.growth.policy=fixed", "ranks.threads=1")


def final_state(ranks: int, epochs: int, summation: str, scratch: Path) -> dict[str, object]:
    directory = scratch / f"{ranks}-{epochs}-{summation}"
    command = [sys.executable, "-m", "harness", "run", str(CONFIG), *SETTINGS]
    command += [f"train.duration={epochs}ep", f"comm.summation={summation}"]
    command += ["comm.compression=none", "--ranks", str(ranks), "--run-dir", str(directory)]
    subprocess.run(command, check=True, capture_output=True)
    newest = max((directory / "checkpoints").glob("*.pt"))
    state: dict[str, object] = torch.load(newest, weights_only=True)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 5, 15, 30])
    print("| epochs | updates | float | exact |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for epochs in parser.parse_args().epochs:
            cells = []
            for summation in ("float", "exact"):
                one, two = (final_state(n, epochs, summation, Path(scratch)) for n in (1, 2))
                a, b = one["model"], two["model"]
                cells.append(max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a))
            print(f"| {epochs} | {one['update']} | {cells[0]:.1e} | {cells[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
