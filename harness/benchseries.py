"""Which points a bench has: decompositions over numbers of ranks, their settings, their order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from harness.benchfile import Mode, point_name
from harness.errors import ConfigError
from harness.schedule.plan import decompose
from harness.schema import Config


@dataclass(frozen=True, order=True)
class Shape:
    """A global batch as ranks × accumulation × micro-batch."""

    ranks: int
    global_batch: int
    micro_batch: int
    accumulation: int
    """Micro-batches of the busiest rank."""

    @property
    def name(self) -> str:
        return point_name(self.ranks, self.accumulation, self.micro_batch, self.global_batch)

    def __str__(self) -> str:
        return f"{self.global_batch:,} = {self.ranks} × {self.accumulation} × {self.micro_batch}"


@dataclass(frozen=True)
class Wanted:
    """What was asked for; empty: what the configuration has."""

    ranks: tuple[int, ...]
    scaling: Literal["weak", "strong"] | None = None
    """None: strong if there are batches, else weak."""
    micros: tuple[int, ...] = ()
    accumulations: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    """Global batches, of strong scaling."""


@dataclass(frozen=True)
class Series:
    """Points over numbers of ranks; one may stand in several of them."""

    scaling: Literal["weak", "strong"]
    groups: tuple[tuple[Shape, ...], ...]

    @property
    def mode(self) -> Mode:
        return self.scaling if len(self.groups) == 1 else "grid"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All points, each once, in ascending order."""
        return tuple(sorted({shape for group in self.groups for shape in group}))

    def names(self) -> list[list[str]]:
        return [[shape.name for shape in group] for group in self.groups]


def series(config: Config, wanted: Wanted) -> Series:
    """The points that are asked for.

    Weak scaling keeps micro-batch and accumulation, so that each rank has as many images in each
    update; by default those of the configuration's first launch. Strong scaling keeps the global
    batch: of its micro-batch and its accumulation one is given, and the other follows. Raises
    ConfigError for what cannot be cut.
    """
    scaling = wanted.scaling or ("strong" if wanted.batches else "weak")
    if scaling == "weak":
        if wanted.batches:
            raise ConfigError(
                "--batches are global batches, which weak scaling does not keep; use --mode "
                "strong, or --micro and --accumulation"
            )
        groups = _weak(config, wanted)
    else:
        groups = _strong(config, wanted)
    return Series(scaling, tuple(dict.fromkeys(tuple(group) for group in groups)))


def _weak(config: Config, wanted: Wanted) -> Iterator[list[Shape]]:
    batch = config.batch
    usual = decompose(batch.initial, batch.micro_batch, config.ranks.start).accumulation
    pairs = product(wanted.micros or (batch.micro_batch,), wanted.accumulations or (usual,))
    for micro, accumulation in pairs:
        yield [Shape(n, n * accumulation * micro, micro, accumulation) for n in wanted.ranks]


def _strong(config: Config, wanted: Wanted) -> Iterator[list[Shape]]:
    if wanted.micros and wanted.accumulations:
        raise ConfigError(
            "--micro and --accumulation: with --mode strong one follows from the other and the "
            "global batch; leave one of them out"
        )
    for batch in wanted.batches or (config.batch.initial,):
        for accumulation in wanted.accumulations:
            yield [_cut(batch, n, accumulation) for n in wanted.ranks]
        if not wanted.accumulations:
            for micro in wanted.micros or (config.batch.micro_batch,):
                yield [_pieces(batch, n, micro) for n in wanted.ranks]


def _cut(batch: int, ranks: int, accumulation: int) -> Shape:
    """With that accumulation, and the micro-batch that follows."""
    if batch < ranks * accumulation:
        raise ConfigError(
            f"a global batch of {batch} cannot be cut into {ranks} ranks × {accumulation} "
            "micro-batches; use a larger batch, fewer ranks or less accumulation"
        )
    return _pieces(batch, ranks, -(-batch // (ranks * accumulation)))


def _pieces(batch: int, ranks: int, micro: int) -> Shape:
    """With micro-batches of that size, or of a rank's share where that is less."""
    if batch < ranks:
        raise ConfigError(
            f"a global batch of {batch} is less than one image for each of {ranks} ranks; use a "
            "larger batch or fewer ranks"
        )
    micro = min(micro, -(-batch // ranks))
    return Shape(ranks, batch, micro, decompose(batch, micro, ranks).accumulation)


def overrides(shape: Shape, threads: int) -> tuple[str, ...]:
    """What a point lays over the configuration: a fixed batch on fixed ranks, a line of records for
    each update, and nothing but updates.

    The rate is next to nothing, so that no batch diverges: an update that is skipped takes another
    time. Each rank has the same threads on all numbers of ranks.
    """
    return (
        f"batch.initial={shape.global_batch}",
        f"batch.micro={shape.micro_batch}",
        "batch.max=null",
        "batch.multiple_of=1",
        "batch.epoch_end=carry",
        "batch.growth={policy: fixed}",
        f"ranks.start={shape.ranks}",
        f"ranks.max={shape.ranks}",
        f"ranks.threads={threads}",
        "lr.base=1e-6",
        "lr.base_batch=null",
        "lr.scaling=none",
        "lr.min=0",
        "lr.max=null",
        "lr.warmup=null",
        "lr.decay={kind: none}",
        "lr.on_growth=1",
        "optimizer.momentum_scaling=none",
        "train.duration=1000000000000up",
        "train.eval_every=null",
        "train.checkpoint_every=null",
        "train.layers_every=null",
        "train.log_every=1",
        "train.tensorboard=false",
        "launch.elastic=false",
    )


def shuffled(pairs: Sequence[tuple[str, int]], seed: int) -> tuple[tuple[str, int], ...]:
    """The same (point, repeat) pairs in random order: what changes on the machine while a bench
    goes on then falls on all points alike."""
    # A seed of text does not depend on the interpreter's hash seed.
    return tuple(random.Random(f"bench {seed}").sample(sorted(pairs), len(pairs)))  # noqa: S311
