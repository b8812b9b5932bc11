"""What each rank executes before a bench's points: the model's FLOPs, and the machine's peak.

    python -m harness.benchmachine CONFIG DIR

Writes DIR/machine.json. FLOPs are counted by torch.utils.flop_counter over forward and backward: of
matrix products and convolutions, two for each multiply-add. The peak is that of square matrix
products in the type that training computes in, by all ranks at once, so that they share memory and
clock rates as they do in training.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from harness import environment
from harness.comm import Communicator, allreduce, open_communicator
from harness.comm.together import AllLeave, together
from harness.config import load_config
from harness.data.datasets import Batch, ImageData
from harness.data.shared import load_shared
from harness.forward import ForwardPass
from harness.jsonl import write_json
from harness.last_words import leave_at_once, leave_last_words
from harness.models import configured_model
from harness.schema import Config
from harness.wording import counted

FILE = "machine.json"
_IMAGES = 2  # batch norm cannot train on one
_SIZES = {"cpu": (512, 1024, 1536), "cuda": (1024, 2048, 4096, 8192)}
_BLOCK, _TIME = 0.03, 0.4  # seconds of a block of products, and of each size
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def count_model(config: Config, data: ImageData) -> dict[str, Any]:
    """Parameters, and FLOPs of forward and backward for an image; None with the reason if torch
    cannot count those."""
    model = configured_model(config, data.num_classes, data.shape)
    counted: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_image": None,
        "flops_problem": None,
    }
    eager = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    forward = ForwardPass(model.train(), eager, data.num_classes, torch.device("cpu"))
    images = torch.rand(_IMAGES, *data.shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.zeros(_IMAGES, dtype=torch.int64))
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            torch.autograd.backward(forward.loss(batch))
    except Exception as error:  # of somebody's model under torch's counter: training may do without
        counted["flops_problem"] = f"{type(error).__name__}: {error}"
    else:
        counted["flops_per_image"] = counter.get_total_flops() / _IMAGES or None
    return counted


def measure_peak(comm: Communicator, precision: str) -> tuple[float, str]:
    """(FLOP/s of a rank, how that was found): of the size that is fastest, the mean over ranks of
    each one's best block. Collective."""
    kind, sizes = _TYPES[precision], _SIZES[comm.device.type]
    if comm.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    table = torch.zeros(len(sizes), dtype=torch.float64)
    for index, size in enumerate(sizes):
        a, b = (torch.rand(size, size, device=comm.device).to(kind) for _ in range(2))
        torch.mm(a, b)
        allreduce(comm, torch.zeros(1), "bench.barrier")
        table[index] = 2 * size**3 / _fastest(a, b)
    rates = allreduce(comm, table, "bench.peak") / comm.size
    best = int(rates.argmax())
    name, threads = str(kind).removeprefix("torch."), counted(torch.get_num_threads(), "thread")
    source = (
        f"measured: {sizes[best]} × {sizes[best]} matrix products in {name} on "
        f"{counted(comm.size, 'rank')} at once, {threads} each"
    )
    return float(rates[best]), source


def _fastest(a: Tensor, b: Tensor) -> float:
    """Seconds of a product in the best block of them."""
    out = torch.empty_like(a)
    count, best, begin = 1, float("inf"), time.perf_counter()
    while True:
        before = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=out)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        now = time.perf_counter()
        if now - before < _BLOCK:  # too short to tell
            count *= 2
        else:
            best = min(best, (now - before) / count)
        if now - begin > _TIME and best < float("inf"):
            return best


def _run(config: Config, out: Path) -> Communicator:
    torch.set_num_threads(config.ranks.threads or environment.usable_cores())
    comm = open_communicator(config.comm)
    data = load_shared(config.data, comm)
    try:
        found = together(comm, lambda: count_model(config, data) if comm.rank == 0 else {})
    finally:
        data.train.close()
        data.test.close()
    peak, source = measure_peak(comm, config.train.precision)
    if comm.rank == 0:
        found |= {"peak_flops_per_rank": peak, "peak_source": source}
        write_json(out / FILE, found)
    return comm


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as one rank; returns the exit code. Errors end as one message."""
    parser = argparse.ArgumentParser(prog="python -m harness.benchmachine", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("directory", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        _run(load_config(options.config), options.directory).close()
    except AllLeave as leave:
        if leave.mine is not None:
            leave_last_words(leave.mine, environment.launched_rank())
        leave_at_once(leave.exit_code)
    except Exception as error:
        leave_at_once(leave_last_words(error, environment.launched_rank()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
