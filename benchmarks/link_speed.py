"""What compression and accumulation save on a slow link: two test hosts, one rank each.

    sudo python benchmarks/link_speed.py [--rate 1gbit] [--models resnet20,resnet50] [--repeats 3]

The hosts are network namespaces of this machine whose links are limited both ways
(tests/testbed.py); root is needed for that. In every repeat each setting makes some updates, in
turn; what is printed is the median over repeats. Bytes are what a rank hands to the allreduce.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

COMPRESSIONS = ("none", "fp16")
ACCUMULATIONS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", default="1gbit", help="of a link, in tc's words")
    parser.add_argument("--models", default="resnet20,resnet50")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        _rank(options)
    else:
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    from testbed import Testbed, missing_for_testbed

    from harness.environment import CYCLE_TIME, FUSION, YIELD

    reason = missing_for_testbed()
    if reason is not None:
        raise SystemExit(f"link_speed: {reason}")
    os.environ.update({"OMP_NUM_THREADS": "1", CYCLE_TIME: "0.1", FUSION: "0", YIELD: "1"})
    passed = ["PATH", "OMP_NUM_THREADS", CYCLE_TIME, FUSION]
    print(f"Two hosts, one rank each, links of {options.rate}.\n")
    print(
        "| model | compression | accumulation | ms an update | images/s | kB an image | × none, 1 |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Testbed(2, folder, options.rate) as bed:
            for model in options.models.split(","):
                out = folder / "found.json"
                command = [sys.executable, __file__, "--rank", "--models", model]
                command += ["--repeats", str(options.repeats), "--updates", str(options.updates)]
                command += ["--out", str(out)]
                done = subprocess.run(bed.mpirun(command, passed), capture_output=True, text=True)
                if done.returncode or not out.exists():
                    raise SystemExit(f"{model} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
                _print(model, json.loads(out.read_text(encoding="utf-8")))


def _print(model: str, rows: list[dict[str, float]]) -> None:
    first = rows[0]["images_per_sec"]
    for row in rows:
        speed, size = row["images_per_sec"], row["bytes_per_image"] / 1e3
        cells = [model, row["compression"], row["accumulation"], f"{row['seconds'] * 1e3:.1f}",
                 f"{speed:.1f}", f"{size:.1f}", f"{speed / first:.2f}"]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _rank(options: argparse.Namespace) -> None:
    import torch
    from reducer_speed import MODELS, _model
    from torch.nn import functional

    from harness.comm import open_communicator
    from harness.memory import keep_freed_memory
    from harness.reducer import GradientReducer

    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    comm = open_communicator("horovod")
    batch, shape, classes, _ = MODELS[options.models]
    model = _model(options.models, classes)
    images, labels = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

    def update(reducer: GradientReducer, accumulation: int) -> int:
        reducer.start(accumulation)
        for _ in range(accumulation):
            loss = functional.cross_entropy(model(images), labels, reduction="sum")
            reducer.backward(loss / (comm.size * accumulation * batch))
        reduced = reducer.finish()
        optimizer.step()
        return reduced.bytes_sent

    times: dict[tuple[str, int], list[float]] = {}
    sent: dict[tuple[str, int], int] = {}
    for _ in range(options.repeats):
        for compression in COMPRESSIONS:
            reducer = GradientReducer(model, comm, compression)  # type: ignore[arg-type]
            update(reducer, 1)  # the first goes uncompressed
            for accumulation in ACCUMULATIONS:
                update(reducer, accumulation)
                comm.broadcast(torch.zeros(1), "begin")
                start = time.perf_counter()
                for _ in range(options.updates):
                    sent[compression, accumulation] = update(reducer, accumulation)
                seconds = (time.perf_counter() - start) / options.updates
                times.setdefault((compression, accumulation), []).append(seconds)
            reducer.close()
    if comm.rank == 0:
        rows = []
        for (compression, accumulation), seconds in times.items():
            median, images_each = statistics.median(seconds), accumulation * batch
            rows.append(
                {
                    "compression": compression,
                    "accumulation": accumulation,
                    "seconds": median,
                    "images_per_sec": comm.size * images_each / median,
                    "bytes_per_image": sent[compression, accumulation] / images_each,
                }
            )
        options.out.write_text(json.dumps(rows), encoding="utf-8")
    comm.close()


if __name__ == "__main__":
    main()
