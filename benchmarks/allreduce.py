"""What an allreduce costs: raw MPI, Horovod and torch.distributed; and Horovod's cycle time.

    .venv/bin/python benchmarks/allreduce.py [--ranks 2] [--rounds 5] [--only engines|cycles]

Each measurement is a launch of mpirun on this host, one thread a rank, so that no engine's threads
disturb another one; the launches of one table take turns, ``--rounds`` times, and a cell is the
median of all its operations. Times are rank 0's, from one barrier to the end of the operation.
Prints Markdown tables.
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
from typing import Any

import torch

from harness.comm import Communicator, allreduce, mpi, open_communicator
from harness.environment import communication_settings
from harness.schema import Comm
from launch import mpirun
from launch.execute import child_environment
from launch.spec import Host, LaunchSpec

KIB, MIB = 2**10, 2**20
SIZES = (4, 4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 100 * MIB)
ENGINES = {
    "raw MPI": "raw",
    "Horovod fp32": "horovod",
    "Horovod fp16": "horovod-fp16",
    "Gloo (torch) fp32": "torch",
}
CYCLES_MS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
LOOP_SECONDS = 0.1
Result = dict[str, list[float]]


def repeats(size: int) -> int:
    """Operations of one launch: enough of the short ones for a median, few of the long ones."""
    return max(5, min(200, 16 * MIB // size))


# What a rank measures


def timed(
    operation: Callable[[], object], barrier: Callable[[], object], count: int
) -> list[float]:
    """Seconds of each operation, after two that are not counted."""
    seconds = []
    for index in range(count + 2):
        barrier()
        begin = time.perf_counter()
        operation()
        if index >= 2:
            seconds.append(time.perf_counter() - begin)
    return seconds


def measure_engine(engine: str) -> Result:
    """Times for each size in bytes of float32."""
    if engine == "raw":
        world = mpi.join_world()
        torch.set_num_threads(1)
        result = {}
        for size in SIZES:
            tensor = torch.ones(size // 4)
            action = lambda tensor=tensor: mpi.raw_allreduce(world, tensor)  # noqa: E731
            result[str(size)] = timed(action, world.Barrier, repeats(size))
        mpi.leave()
        return result
    comm = open_communicator("torch" if engine == "torch" else "horovod")
    result = {}
    for size in SIZES:
        tensor, wire = torch.ones(size // 4), torch.ones(size // 4, dtype=torch.float16)
        if engine == "horovod-fp16":
            # with the casts that a gradient bucket needs
            action = lambda t=tensor, w=wire: t.copy_(allreduce(comm, w.copy_(t), "it"))  # noqa: E731
        else:
            action = lambda t=tensor: allreduce(comm, t, "it")  # noqa: E731
        result[str(size)] = timed(action, lambda: barrier(comm), repeats(size))
    comm.close()
    return result


def barrier(comm: Communicator) -> None:
    allreduce(comm, torch.zeros(1), "barrier")


def measure_cycle(cycle_ms: float, gives_way: bool) -> Result:
    """Times of a small and a 4 MiB allreduce, and what Horovod takes from a computation."""
    torch.set_num_threads(1)
    rounds = calibrated()
    before = [loop(rounds) for _ in range(10)]
    comm = open_communicator(Comm(cycle_ms=cycle_ms, yield_when_idle=gives_way))
    large = torch.ones(MIB)
    result = {
        "small": timed(lambda: allreduce(comm, torch.ones(1), "s"), lambda: barrier(comm), 200),
        "large": timed(lambda: allreduce(comm, large, "l"), lambda: barrier(comm), 20),
    }
    idle, pending = [], []
    for _ in range(10):
        barrier(comm)
        idle.append(loop(rounds) / statistics.median(before))
    for _ in range(10):
        # Rank 0 has handed its part in and computes; the others come after the computation.
        barrier(comm)
        handle = comm.allreduce_async(torch.ones(MIB), "p") if comm.rank == 0 else None
        pending.append(loop(rounds) / statistics.median(before))
        comm.wait(handle or comm.allreduce_async(torch.ones(MIB), "p"))
    barrier(comm)
    wall, cpu = time.perf_counter(), time.process_time()
    time.sleep(1.0)
    result["thread"] = [(time.process_time() - cpu) / (time.perf_counter() - wall)]
    comm.close()
    return {**result, "idle": idle, "pending": pending}


def loop(rounds: int) -> float:
    """Seconds of a computation on one core that fits into its cache."""
    matrix = torch.full((64, 64), 1e-3)
    begin = time.perf_counter()
    for _ in range(rounds):
        matrix = matrix @ matrix
    return time.perf_counter() - begin


def calibrated() -> int:
    return max(1, int(1000 * LOOP_SECONDS / min(loop(1000) for _ in range(5))))


def rank(what: list[str], result: Path) -> None:
    found = (
        measure_engine(what[1])
        if what[0] == "engine"
        else measure_cycle(float(what[1]), what[2] == "True")
    )
    if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
        result.write_text(json.dumps(found))


# Launches and tables


def launch(ranks: int, settings: Comm, *what: object) -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "result.json"
        spec = LaunchSpec(
            ranks=ranks,
            hosts=(Host("localhost", ranks),),
            command=(sys.executable, __file__, "--result", str(path), "--what", *map(str, what)),
            environment={"OMP_NUM_THREADS": "1", **communication_settings(settings)},
            as_root=os.geteuid() == 0,
        )
        subprocess.run(
            mpirun.arguments(spec), env=child_environment(spec), check=True, capture_output=True
        )
        found: Result = json.loads(path.read_text())
    return found


def collect(ranks: int, rounds: int, cells: dict[Any, tuple[Comm, tuple[object, ...]]]) -> Any:
    """Each cell's measurements, its launches taking turns with the other cells'."""
    gathered: dict[Any, Result] = {key: {} for key in cells}
    for _ in range(rounds):
        for key, (settings, what) in cells.items():
            for name, values in launch(ranks, settings, *what).items():
                gathered[key].setdefault(name, []).extend(values)
    return gathered


def shown(size: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def show_engines(ranks: int, rounds: int) -> None:
    """Bus bandwidth as nccl-tests define it for allreduce, S / t · 2 (n − 1) / n, where S is the
    size in float32 for every column: what a gradient of that size gets."""
    # MPI without Horovod has the same setting that Horovod's ranks choose here.
    cells = {name: (Comm(yield_when_idle=True), ("engine", code)) for name, code in ENGINES.items()}
    found = collect(ranks, rounds, cells)
    print(f"| float32, {ranks} ranks |" + "".join(f" {name} |" for name in ENGINES))
    print("|---|" + "---|" * len(ENGINES))
    for size in SIZES:
        words = []
        for name in ENGINES:
            seconds = statistics.median(found[name][str(size)])
            bandwidth = size / seconds * 2 * (ranks - 1) / ranks / 1e9
            speed = f" ({bandwidth:.2f} GB/s)" if size >= 4 * KIB else ""
            words.append(f" {1e6 * seconds:,.0f} µs{speed} |")
        print(f"| {shown(size)} |" + "".join(words), flush=True)


def show_cycles(ranks: int, rounds: int) -> None:
    cells = {
        (cycle, way): (Comm(cycle_ms=cycle, yield_when_idle=way), ("cycle", cycle, way))
        for way in (True, False)
        for cycle in CYCLES_MS
    }
    found = collect(ranks, rounds, cells)
    print(
        "| cycle, ms | yields | 4 B, µs | 4 MiB, ms | CPU of an idle rank | "
        "compute, nothing pending | compute, one pending |"
    )
    print("|---|---|---|---|---|---|---|")
    for (cycle, way), result in found.items():
        of = {name: statistics.median(values) for name, values in result.items()}
        print(
            f"| {cycle:g} | {'yes' if way else 'no'} | {1e6 * of['small']:,.0f} | "
            f"{1e3 * of['large']:.2f} | {of['thread']:.0%} | {of['idle'] - 1:+.1%} | "
            f"{of['pending'] - 1:+.1%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["engines", "cycles"])
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # set for the ranks
    parser.add_argument("--what", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what:
        rank(arguments.what, arguments.result)
        return
    if arguments.only != "cycles":
        show_engines(arguments.ranks, arguments.rounds)
        print()
    if arguments.only != "engines":
        show_cycles(arguments.ranks, arguments.rounds)


if __name__ == "__main__":
    main()
