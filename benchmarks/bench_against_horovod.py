"""Throughput by `harness bench` beside what Horovod's own synthetic benchmark reports, on one work.

    python benchmarks/bench_against_horovod.py [--rounds 5] [--seconds 10] [--batch 32]

ResNet-20 on synthetic images of 3 × 32 × 32, two ranks of this host with one thread each, plain
SGD, float32 gradients. Both take turns, in another order in each round. Horovod's side is what its
examples/pytorch/pytorch_synthetic_benchmark.py does: 10 updates of warm-up, then stretches of 10
updates by a stopwatch, and images/s of rank 0 times the ranks; here for as many seconds as ours. It
runs with Horovod's defaults (``hvd``), and with the environment and the allocator settings of
`harness run` (``hvd, our settings``), with which both should agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RANKS, SHAPE, CLASSES = 2, (3, 32, 32), 10
WARM_UP, STRETCH = 10, 10
OURS, PLAIN, LIKE_OURS = "harness bench", "hvd", "hvd, our settings"
SETTINGS = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "HOROVOD_FUSION_THRESHOLD": "0",
    "HOROVOD_CYCLE_TIME": "0.1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=32, help="of a rank")
    parser.add_argument("--rank", metavar="CONTENDER", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        _rank(options)
    else:
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in (OURS, PLAIN, LIKE_OURS)}
    order = random.Random(0)  # noqa: S311
    for _ in range(options.rounds):
        for name in order.sample(list(speeds), len(speeds)):
            speeds[name].append(_ours(options) if name == OURS else _horovod(name, options))
    print("| contender | images/s by round | median | harness bench / this, by round |")
    print("|---|---|---|---|")
    for name, found in speeds.items():
        ratios = [ours / other for ours, other in zip(speeds[OURS], found, strict=True)]
        print(
            f"| {name} | {' '.join(f'{one:.0f}' for one in found)} | "
            f"{statistics.median(found):.0f} | {' '.join(f'{one:.2f}' for one in ratios)} |"
        )


def _ours(options: argparse.Namespace) -> float:
    """Images/s of both ranks together."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "synthetic.yaml"
        config.write_text(
            "name: synthetic\n"
            f"data: {{dataset: synthetic, image_size: {SHAPE[1]}, classes: {CLASSES}}}\n"
            "model: {name: resnet20}\n"
            f"batch: {{initial: {options.batch}, micro: {options.batch}}}\n"
            "optimizer: {name: sgd, momentum: 0}\n"
            "lr: {base: 0.01}\n"
            "ranks: {threads: 1}\n"
            "train: {duration: 1ep}\n"
        )
        command = [sys.executable, "-m", "harness", "bench", str(config), "--ranks", str(RANKS)]
        command += ["--hosts", f"localhost:{RANKS}", "--repeats", "1", "-o", f"{folder}/bench"]
        command += ["--peak", "1", "--seconds", str(options.seconds)]
        _run(command, dict(os.environ))
        found = json.loads((Path(folder) / "bench" / "bench.json").read_text())
        return float(found["points"][0]["images_per_sec"])


def _horovod(name: str, options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.json"
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("HOROVOD_", "OMPI_"))}
        variables["OMP_NUM_THREADS"] = "1"
        if name == LIKE_OURS:
            variables |= SETTINGS
        command = ["horovodrun", "-np", str(RANKS), "-H", f"localhost:{RANKS}", "--mpi"]
        command += [sys.executable, __file__, "--rank", name, "--out", str(out)]
        command += ["--seconds", str(options.seconds), "--batch", str(options.batch)]
        _run(command, variables)
        return float(json.loads(out.read_text())["images_per_sec"])


def _run(command: list[str], variables: dict[str, str]) -> None:
    beside = str(Path(sys.executable).parent)
    path = f"{beside}{os.pathsep}{variables.get('PATH', os.defpath)}"
    done = subprocess.run(
        command, env={**variables, "PATH": path}, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _rank(options: argparse.Namespace) -> None:
    """Horovod's loop as one of its ranks."""
    import horovod.torch as hvd
    import torch
    from torch.nn import functional

    from harness.memory import keep_freed_memory
    from harness.models.resnet_cifar import CifarResNet

    torch.set_num_threads(1)
    hvd.init()
    if options.rank == LIKE_OURS:
        keep_freed_memory()
    torch.manual_seed(0)
    model = CifarResNet(20, CLASSES)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), named_parameters=model.named_parameters()
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    images, labels = torch.randn(options.batch, *SHAPE), torch.randint(CLASSES, (options.batch,))

    def stretch(updates: int) -> float:
        begin = time.perf_counter()
        for _ in range(updates):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return time.perf_counter() - begin

    stretch(WARM_UP)
    rates, spent, over = [], 0.0, torch.zeros(1)
    while not over:
        seconds = stretch(STRETCH)
        spent += seconds
        rates.append(options.batch * STRETCH / seconds)
        over = hvd.broadcast(torch.tensor([float(spent >= options.seconds)]), 0, name="over")
    if hvd.rank() == 0:
        speed = hvd.size() * statistics.fmean(rates)
        options.out.write_text(json.dumps({"images_per_sec": speed}))
    hvd.shutdown()


if __name__ == "__main__":
    main()
