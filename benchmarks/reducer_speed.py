"""Training speed with our reducer against hvd.DistributedOptimizer and DistributedDataParallel.

    python benchmarks/reducer_speed.py [--models resnet20,resnet50,alexnet,lenet5] [--rounds 5]

Two ranks of this host, one thread each, fp16 on the wire, SGD with momentum, synthetic images.
Every round starts each contender once, in turn, so that what else the machine does falls on all of
them; a contender's figure for a round is the median over its blocks of updates. What is printed is
the median over rounds of images/s, and of each round's ratio ours / peer.

Contenders: ``ours`` (as `harness run` starts it); ``hvd``: a plain loop with
hvd.DistributedOptimizer, started by horovodrun as its users do; ``hvd+``: the same with the
environment that `harness run` sets; ``hvd++``: with its allocator settings too; ``ddp``: torch's
DistributedDataParallel over Gloo with fp16_compress_hook; ``ddp32``: the same without compression;
``apart``: two ranks that train without talking to each other, with a plain loop, which nobody can
beat by better communication alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODELS = {  # name: (batch of a rank, (C, H, W), classes, updates of a block)
    "lenet5": (32, (1, 28, 28), 10, 100),
    "resnet20": (32, (3, 32, 32), 10, 5),
    "resnet50": (4, (3, 32, 32), 1000, 4),
    "alexnet": (8, (3, 64, 64), 1000, 4),
}
CONTENDERS = ("ours", "hvd", "hvd+", "hvd++", "ddp")
SETTINGS = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "HOROVOD_FUSION_THRESHOLD": "0",
    "HOROVOD_CYCLE_TIME": "0.1",
}
PORT = 29517


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="resnet20,resnet50,alexnet,lenet5")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--bucket-mb", type=float, default=4.0)
    parser.add_argument("--rank", metavar="CONTENDER", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        _rank(options)
    else:
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    contenders = options.contenders.split(",")
    print("| model | " + " | ".join(contenders) + " | " + " | ".join(
        f"ours / {peer}" for peer in contenders[1:]) + " |")  # fmt: skip
    print("|---" * (2 * len(contenders)) + "|")
    for model in options.models.split(","):
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name in contenders:
                speeds[name].append(_start(name, model, options))
        row = [model, *(f"{statistics.median(speeds[name]):.1f}" for name in contenders)]
        ours = speeds[contenders[0]]
        for peer in contenders[1:]:
            ratios = sorted(a / b for a, b in zip(ours, speeds[peer], strict=True))
            row.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})")
        print(f"| {' | '.join(row)} |", flush=True)


def _start(name: str, model: str, options: argparse.Namespace) -> float:
    """Images/s of both ranks together."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.json"
        command = [sys.executable, __file__, "--rank", name, "--models", model]
        command += ["--blocks", str(options.blocks), "--bucket-mb", str(options.bucket_mb)]
        command += ["--out", str(out)]
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("HOROVOD_", "OMPI_"))}
        variables["OMP_NUM_THREADS"] = "1"
        if name in ("ours", "hvd+", "hvd++", "apart"):
            variables |= SETTINGS
        if name.startswith("ddp"):
            started = ["torchrun", "--nproc-per-node=2", f"--master-port={PORT}", "--no-python"]
        else:
            started = ["horovodrun", "-np", "2", "-H", "localhost:2", "--mpi"]
        done = subprocess.run(started + command, env=variables, capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return float(json.loads(out.read_text())["images_per_sec"])


def _rank(options: argparse.Namespace) -> None:
    """One contender, as one of its two ranks."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, shape, classes, updates = MODELS[options.models]
    model = _model(options.models, classes)
    images, labels = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    loss_of = functional.cross_entropy

    def plain(optimizer: torch.optim.Optimizer, network: nn.Module) -> Callable[[], None]:
        def update() -> None:
            optimizer.zero_grad()
            loss_of(network(images), labels).backward()
            optimizer.step()

        return update

    if options.rank in ("ours", "hvd++"):
        from harness.memory import keep_freed_memory

        keep_freed_memory()
    if options.rank == "ours":
        from harness.comm import open_communicator
        from harness.optimizer import build_optimizer
        from harness.reducer import GradientReducer
        from harness.schema import Config

        comm = open_communicator("horovod")
        rank = comm.rank
        config = Config.model_validate(
            {
                "name": "x",
                "data": {"dataset": "digits"},
                "model": {"name": "lenet5"},
                "batch": {"initial": 64},
                "lr": {"base": 0.01},
                "train": {"duration": "1ep"},
                "optimizer": {"weight_decay": 1e-4},
            }
        )
        reducer = GradientReducer(model, comm, "fp16", int(options.bucket_mb * 2**20))
        optimizer = build_optimizer(model, config)

        def update() -> None:
            reducer.start(1)
            loss = loss_of(model(images), labels, reduction="sum")
            reducer.backward(loss / (2 * batch))
            if reducer.finish([float(loss.detach())]).finite:
                optimizer.step()

        def barrier() -> None:
            comm.broadcast(torch.zeros(1), "barrier")

        close = comm.close

    elif options.rank == "apart" or options.rank.startswith("hvd"):
        import horovod.torch as hvd

        hvd.init()
        rank = hvd.rank()
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        if options.rank != "apart":
            sgd = hvd.DistributedOptimizer(
                sgd, named_parameters=model.named_parameters(), compression=hvd.Compression.fp16
            )
        update = plain(sgd, model)

        def barrier() -> None:
            hvd.allreduce(torch.zeros(1), name="barrier")

        close = hvd.shutdown

    else:
        from torch import distributed
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        wrapped = nn.parallel.DistributedDataParallel(model)
        if options.rank == "ddp":
            wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
        update = plain(
            torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4), wrapped
        )

        def barrier() -> None:
            distributed.barrier()

        close = distributed.destroy_process_group

    for _ in range(max(3, updates // 2)):
        update()
    seconds = []
    for _ in range(options.blocks):
        barrier()
        start = time.perf_counter()
        for _ in range(updates):
            update()
        barrier()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        speed = 2 * batch * updates / statistics.median(seconds)
        options.out.write_text(json.dumps({"images_per_sec": speed}))
    close()


def _model(name: str, classes: int):  # type: ignore[no-untyped-def]
    from harness.models.lenet5 import LeNet5
    from harness.models.resnet_cifar import CifarResNet
    from harness.torchvision_ops import import_tolerantly

    if name == "lenet5":
        return LeNet5(classes, (1, 28, 28))
    if name == "resnet20":
        return CifarResNet(20, classes)
    return getattr(import_tolerantly("torchvision.models"), name)(num_classes=classes)


if __name__ == "__main__":
    main()
