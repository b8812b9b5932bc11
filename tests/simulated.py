"""Run, bench and probe directories that never happened, with records as they are written."""

from __future__ import annotations

import json
import math
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from harness.jsonl import encode
from harness.probe_results import read_results
from harness.probe_verdict import judge

SIZE = 1437
PHASES = ("data", "forward", "backward", "comm_exposed", "optimizer", "other")
LAYERS = tuple(
    f"{layer}.{kind}"
    for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")
    for kind in ("weight", "bias")
)


class Simulation:
    """A run that never happened, with records as the trainer writes them."""

    def __init__(
        self,
        seed: int = 0,
        initial: int = 64,
        factor: int = 2,
        epochs: int = 30,
        every: int = 2,
        name: str = "adabatch-digits",
        reason: str = "geometric: ×2 every 5ep",
        measured: bool = False,
    ) -> None:
        """``measured``: with the noise scale, the distance from the initial weights, and layers."""
        self.random = random.Random(seed)
        self.initial, self.factor, self.epochs, self.every = initial, factor, epochs, every
        self.name, self.reason, self.measured = name, reason, measured
        self.hosts: int | None = None
        self.layers: list[dict[str, Any]] = []
        self.update = self.samples = self.stage = 0
        self.clock = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
        self.metrics: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def batch(self, stage: int) -> int:
        return min(self.initial * int(self.factor**stage), 1024)

    def tell(self, kind: str, **more: Any) -> None:
        stamp = self.clock.isoformat(timespec="milliseconds")
        self.events.append({"kind": kind, "update": self.update, "time": stamp, **more})

    def begin_stage(self) -> None:
        size = self.batch(self.stage)
        ranks = 1 if self.stage < 2 else 2
        self.tell(
            "stage",
            stage=self.stage,
            samples_seen=self.samples,
            epoch=self.samples / SIZE,
            global_batch=size,
            ranks=ranks,
            accumulation=size // 32 // ranks,
            micro_batch=32,
            reason="initial batch" if self.stage == 0 else self.reason,
        )

    def evaluate(self) -> None:
        done = self.samples / (SIZE * self.epochs)
        accuracy = 0.985 - 0.885 * math.exp(-9 * done) + self.random.gauss(0, 0.002)
        self.tell(
            "evaluation",
            samples_seen=self.samples,
            epoch=self.samples / SIZE,
            loss=0.06 + 2.2 * math.exp(-8 * done),
            accuracy=round(accuracy * 360) / 360,
            accuracy_top5=round((1 + accuracy) / 2 * 360) / 360,
        )

    def window(self, warm_up: bool) -> None:
        done = self.samples / (SIZE * self.epochs)
        ranks = 1 if self.stage < 2 else 2
        rate = 1500.0 * ranks * self.random.gauss(1, 0.03) * (0.4 if warm_up else 1)
        self.metrics.append(
            {
                "update": self.update,
                "samples_seen": self.samples,
                "epoch": self.samples / SIZE,
                "stage": self.stage,
                "ranks": ranks,
                "accumulation": self.batch(self.stage) // 32 // ranks,
                "micro_batch": 32,
                "global_batch": self.batch(self.stage),
                "lr": 0.01 * 2**self.stage * (1 - done) ** 2,
                "momentum": 0.9,
                "loss": 0.02 + 2.3 * math.exp(-8 * done) * self.random.gauss(1, 0.08),
                "images_per_sec": rate,
                "seconds": {phase: self.random.random() for phase in PHASES},
                "comm_bytes": 246_824 * self.every,
                "grad_norm": self.random.random(),
                "noise_scale": None,
                "distance_from_init": None,
            }
        )
        if self.measured:
            self.metrics[-1]["noise_scale"] = 30 * math.exp(4 * done + self.random.gauss(0, 0.2))
            distance = 0.4 + 1.5 * math.log(self.update) + self.random.gauss(0, 0.05)
            self.metrics[-1]["distance_from_init"] = distance
        self.clock += timedelta(seconds=self.every * self.batch(self.stage) / rate)

    def log_layers(self) -> None:
        at = {"update": self.update, "samples_seen": self.samples, "epoch": self.samples / SIZE}
        self.layers.append({**at, "layers": [self.layer(name) for name in LAYERS]})

    def layer(self, name: str) -> dict[str, Any]:
        weight, grad = 10 * self.random.random(), self.random.random()
        trust = 0.001 * weight / grad if name.endswith("weight") else None
        return {"layer": name, "weight_norm": weight, "grad_norm": grad, "trust_ratio": trust}

    def run(self, restart_at: int | None = 130, finish: bool = True) -> Simulation:
        self.tell("start", attempt=1, ranks=1, samples_seen=0)
        self.begin_stage()
        self.evaluate()
        warm_up, evaluated = True, 0
        while self.samples < SIZE * self.epochs:
            if self.samples // (5 * SIZE) > self.stage:
                self.stage += 1
                self.begin_stage()
            self.update += self.every
            self.samples += self.every * self.batch(self.stage)
            self.window(warm_up)
            warm_up = False
            if self.samples // SIZE > evaluated:
                evaluated = self.samples // SIZE
                self.evaluate()
                self.tell("checkpoint", samples_seen=self.samples, file=f"u{self.update:08}.pt")
                if self.measured:
                    self.log_layers()
            if restart_at is not None and self.update >= restart_at:
                restart_at, warm_up = None, True
                self.interrupt()
        if finish:
            accuracy = self.events[-2]["accuracy"]
            self.tell("end", samples_seen=self.samples, seconds=21.5, accuracy=accuracy)
        return self

    def interrupt(self) -> None:
        died = "rank 1 on n2 was killed by signal 9 (SIGKILL), and the job was ended"
        self.tell("fault", samples_seen=self.samples, reason=died, rank=1, host="n2")
        self.tell("restart", samples_seen=self.samples, reason="restart 1 of at most 3 in 1 s")
        self.clock += timedelta(seconds=12)
        self.tell("checkpoint_rejected", file="update-00000310.pt", reason="digest does not match")
        self.tell(
            "resume",
            attempt=2,
            ranks=2,
            samples_seen=self.samples,
            checkpoint=f"update-{self.update:08}.pt",
            updates_repeated=7,
            samples_repeated=448,
        )
        self.tell("skipped_update", samples_seen=self.samples, reason="gradient overflow in fp16")
        for split in ("train", "test"):
            reason = f"{split}/3/x.jpg: truncated"
            self.tell("corrupt_image", samples_seen=self.samples, split=split, reason=reason)

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seed": 0,
            "data": {"dataset": "digits", "root": None, "augment": True},
            "model": {"name": "lenet5"},
            "batch": {"initial": self.initial, "max": 1024, "micro": 32},
            "ranks": {"start": 1, "max": 2, "prefer": "ranks"},
            "lr": {"base": 0.01, "warmup": {"kind": "gradual", "duration": "2ep"}},
            "comm": {"backend": "horovod", "compression": "fp16"},
            "train": {"duration": f"{self.epochs}ep", "eval_every": "1ep"},
        }

    def plan(self) -> dict[str, Any]:
        stages = [
            {
                "stage": i,
                "start_epoch": 5 * i,
                "end_epoch": min(5 * i + 5, self.epochs),
                "updates": math.ceil(5 * SIZE / self.batch(i)),
                "global_batch": self.batch(i),
                "ranks": 1 if i < 2 else 2,
                "accumulation": self.batch(i) // 32 // (1 if i < 2 else 2),
                "micro_batch": 32,
                "lr_start": 0.01 * 2**i,
                "lr_end": 0.005 * 2**i,
                "momentum": 0.9,
                "segment": 0 if i < 2 else 1,
            }
            for i in range(math.ceil(self.epochs / 5))
        ]
        totals = {"samples": SIZE * self.epochs, "dataset_size": SIZE, "epochs": self.epochs}
        return {"stages": stages, "segments": [], "totals": totals}

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.safe_dump(self.config()), encoding="utf-8")
        (path / "plan.json").write_text(json.dumps(self.plan()), encoding="utf-8")
        provenance: dict[str, Any] = {
            "started": "2026-03-02T09:00:00+00:00",
            "command": ["harness", "run", "configs/adabatch-digits.yaml"],
            "launcher": "horovodrun",
            "world_size": 2,
            "host": {"name": "node-17", "cpu": "EPYC 9354", "cores": 32, "gpus": []},
            "versions": {"python": "3.11.9", "torch": "2.5.1", "horovod": "0.28.1"},
        }
        if self.hosts is not None:
            hosts = [{"host": f"n{number + 1}"} for number in range(self.hosts)]
            provenance["communication"] = {"hosts": hosts}
        (path / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
        (path / "metrics.jsonl").write_bytes(b"".join(map(encode, self.metrics)))
        (path / "events.jsonl").write_bytes(b"".join(map(encode, self.events)))
        if self.measured:
            (path / "layers.jsonl").write_bytes(b"".join(map(encode, self.layers)))
        return path


def bench(mode: str = "weak", ranks: tuple[int, ...] = (1, 2, 4, 8), repeats: int = 4) -> Any:
    """What `bench.json` holds: an update takes 4 ms an image of a rank, and with several ranks
    10 ms and 6 ms for each."""
    draw = random.Random(7)
    points = []
    for count in ranks:
        micro = 256 // count if mode == "strong" else 32
        batch = micro * count
        wait = 0.0 if count == 1 else 0.01 + 0.006 * count
        seconds = {"data": 0.001, "forward": 0.0013 * micro, "backward": 0.0027 * micro,
                   "comm_exposed": wait, "optimizer": 0.002, "other": 0.001}  # fmt: skip
        rates = [batch / (sum(seconds.values()) * draw.gauss(1, 0.01)) for _ in range(repeats)]
        mean = sum(rates) / repeats
        half = 0.01 * mean if repeats > 1 else None
        points.append(
            {
                "ranks": count, "nodes": 1, "micro_batch": micro, "accumulation": 1,
                "global_batch": batch, "confidence": 0.95, "images_per_sec": mean,
                "images_per_sec_low": half and mean - half,
                "images_per_sec_high": half and mean + half,
                "seconds_per_update": batch / mean, "seconds": seconds, "mfu": None,
                "repeats": [
                    {"repeat": i, "images_per_sec": rate, "seconds_per_update": batch / rate,
                     "windows": 9, "warmup_windows": 2, "seconds": seconds}
                    for i, rate in enumerate(rates)
                ],
            }
        )  # fmt: skip
    return {
        "format": 1, "name": f"bench-{mode}", "mode": mode, "dataset": "digits", "model": "lenet5",
        "parameters": 61_706, "gradient_bytes": 123_412, "compression": "fp16",
        "engine": "horovod", "flops_per_image": 2.5e6, "peak_flops_per_rank": None,
        "peak_source": None, "machine": {"host": "n1"}, "status": "complete", "points": points,
    }  # fmt: skip


def write_bench(path: Path, content: Any) -> Path:
    path.mkdir(parents=True)
    (path / "bench.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def probe(
    hosts: tuple[int, ...] = (2,),
    alpha: float = 2e-4,
    beta: float = 1e-9,
    noise: float = 0.02,
    rounds: int = 24,
    largest: int = 12,
) -> Any:
    """What `probe.json` holds before its verdict: ``hosts`` has the ranks of each host, Horovod's
    allreduce takes ``alpha`` + ``beta`` × bytes, with fp16 twice the first and half of the second.
    """
    draw = random.Random(11)
    ranks = sum(hosts)
    lines = {
        "mpi_alone": (alpha / 10, beta),
        "horovod": (alpha, beta),
        "horovod_fp16": (2 * alpha, beta / 2),
        "horovod_broadcast": (alpha, beta / 2),
    }
    timings = [
        {
            "operation": name,
            "bytes": 4**power,
            "seconds": [(a + b * 4**power) * math.exp(draw.gauss(0, noise)) for _ in range(rounds)],
        }
        for power in range(1, largest + 1)
        for name, (a, b) in lines.items()
    ]
    firsts = [sum(hosts[:place]) for place in range(len(hosts))]
    listed = [
        {"host": f"n{place + 1}", "ranks": [*range(first, first + count)]}
        for place, (first, count) in enumerate(zip(firsts, hosts, strict=True))
    ]
    return {
        "provenance": {
            "started": "2026-03-02T08:30:00.000+00:00",
            "launcher": "mpirun",
            "communication": {"kind": "horovod-mpi", "ranks": ranks, "hosts": listed},
        },
        "mpi": "Open MPI v4.1.8",
        "ranks": ranks,
        "warm_up_rounds": 2,
        "left_out": {"torch Gloo": "its ranks cannot find each other under this launcher"},
        "timings": timings,
    }


def write_probe(path: Path, content: Any, verdict: bool = True) -> Path:
    """``verdict``: add one, as `harness probe` does."""
    path.mkdir(parents=True)
    (path / "probe.json").write_text(json.dumps(content), encoding="utf-8")
    if verdict:
        found = judge(read_results(path), [1.0, 97.5])
        written = {**content, "verdict": found.as_dict()}
        (path / "probe.json").write_text(json.dumps(written), encoding="utf-8")
    return path


def text_of(index: Path) -> str:
    """The words of a report's page, given its index.html."""
    words = re.sub(
        r"<style>.*?</style>|<[^>]+>", " ", index.read_text(encoding="utf-8"), flags=re.S
    )
    return " ".join(words.split())


def summary_of(index: Path) -> Any:
    """The summary.json beside a report's index.html."""
    return json.loads((index.parent / "summary.json").read_text())
