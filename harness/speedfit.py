"""From what benches, runs and probes have measured to the model of speed of growth by goodput.

A run reads the files once, when it starts: the coefficients become part of its configuration, and
so of its run directory and its checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.benchfile import NAME as BENCH
from harness.benchfile import holds_bench, read_bench
from harness.config import load_config
from harness.errors import ConfigError, DataError, UsageError
from harness.probe_results import holds_probe
from harness.rundir import RunDirectory
from harness.schedule.choices import rank_counts
from harness.schedule.costs import measured_otherwise, read_throughput
from harness.schema import Config, GoodputGrowth, SpeedModel
from harness.wording import counted

if TYPE_CHECKING:
    from harness.scaling.fit import Fit
    from harness.scaling.points import Point

_MIB = 2**20


def settled_growth(config: Config, run: RunDirectory | None = None) -> Config:
    """The configuration with everything in it that growth by goodput is decided with.

    Of a run that goes on, that is what it began with; else what ``batch.growth.throughput`` names
    is read. Raises ConfigError for files that tell too little, DataError for what cannot be read.
    """
    growth = config.batch.growth
    if not isinstance(growth, GoodputGrowth):
        return config
    before = None if run is None else _stored(run)
    if before is not None:
        growth = growth.model_copy(
            update={
                name: getattr(before, name)
                for name in ("model", "ranks")
                if getattr(growth, name) is None
            }
        )
    ranks = config.ranks
    if growth.ranks is None:
        counts = list(rank_counts(ranks.start, ranks.ceiling, ranks.per_node))
        growth = growth.model_copy(update={"ranks": counts})
    if growth.model is None:
        model = speed_model(config, [Path(path) for path in growth.throughput])
        growth = growth.model_copy(update={"model": model})
    batch = config.batch.model_copy(update={"growth": growth})
    return config.model_copy(update={"batch": batch})


def _stored(run: RunDirectory) -> GoodputGrowth | None:
    file = run.newest().config
    if not file.exists():
        return None
    growth = load_config(file).batch.growth
    return growth if isinstance(growth, GoodputGrowth) else None


def told_otherwise(config: Config) -> list[str]:
    """How what was measured differs from the run that it is to speak for, in sentences."""
    growth = config.batch.growth
    if not isinstance(growth, GoodputGrowth):
        return []
    paths = [Path(path) for path in growth.throughput]
    return [
        f"batch.growth.throughput: {path} was measured with {', '.join(differences)}"
        for path in paths
        if path.exists() and not holds_probe(path)
        if (differences := measured_otherwise(config, path))
    ]


def speed_model(config: Config, paths: Sequence[Path]) -> SpeedModel:
    """Fit the model to what the directories tell of this configuration's micro-batch.

    Raises ConfigError if that is too little.
    """
    probes = [path for path in paths if holds_probe(path)]
    points = _points(config, [path for path in paths if path not in probes])
    most = max(point.ranks for point in points)
    wanted = config.ranks.ceiling
    if len({point.ranks for point in points}) == 1:
        if wanted > 1:
            raise ConfigError(
                f"batch.growth.throughput: only {counted(most, 'rank')} was measured, and the "
                f"choice is of up to {wanted}; measure more with harness bench CONFIG --ranks "
                "1,2,4 -o DIR, and name that DIR too"
            )
        return _of_one(config, points)
    fit = _fit(config, points, paths, probes)
    found = {one.name.replace(".", "_"): one.interval.value for one in fit.coefficients}
    # Nobody knows how many ranks a node could have had that had all of them.
    apart = any(point.nodes > 1 for point in points)
    return SpeedModel(
        **{name: _six_digits(value) for name, value in found.items()},
        gradient_bytes=fit.wire.gradient_bytes,
        buckets=fit.wire.buckets,
        topology=fit.topology,
        ranks_per_node=config.ranks.per_node or (fit.ranks_per_node if apart else None),
        measured_ranks=most,
        misfit=_six_digits(fit.misfit),
    )


def _six_digits(value: float) -> float:
    """So that the last bits of a fit, which differ between machines, are not part of a run."""
    return float(f"{value:.6g}")


def _points(config: Config, paths: Sequence[Path]) -> list[Point]:
    """What was measured with the configuration's micro-batch; a bench with its repeats."""
    from harness.scaling.points import Point, points_of_runs

    micro, per_node = config.batch.micro_batch, config.ranks.per_node
    found: list[Point] = []
    others: set[int] = set()
    for path in paths:
        if holds_bench(path) or path.name == BENCH:
            bench = read_bench(path if path.name == BENCH else path / BENCH)
            others |= {point.micro_batch for point in bench.points}
            found += [
                Point(
                    point.ranks,
                    point.nodes,
                    point.ranks * point.accumulation * micro,
                    tuple(one.seconds_per_update for one in point.repeats),
                    point.accumulation,
                )
                for point in bench.points
                if point.micro_batch == micro
            ]
            continue
        throughput = read_throughput(path)
        others |= {size for _, size in throughput.times}
        times = {key: value for key, value in throughput.times.items() if key[1] == micro}
        found += points_of_runs(type(throughput)(times, None), per_node)
    if not found:
        told = ", ".join(map(str, sorted(others))) or "nothing"
        raise ConfigError(
            f"batch.growth.throughput: nothing was measured with batch.micro = {micro} (measured: "
            f"{told}); measure it with harness bench CONFIG --ranks 1,2,4 -o DIR"
        )
    return found


def _of_one(config: Config, points: Sequence[Point]) -> SpeedModel:
    """One number of ranks: a line through its accumulations, if there are several."""
    sizes = [point.images_per_rank for point in points]
    seconds = [sum(point.seconds) / len(point.seconds) for point in points]
    mean_x, mean_y = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
    spread = sum((x - mean_x) ** 2 for x in sizes)
    slope = (
        sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, seconds, strict=True)) / spread
        if spread
        else 0.0
    )
    if not 0 < slope * mean_x <= mean_y:  # through the origin
        slope = mean_y / mean_x
    return SpeedModel(
        per_image=_six_digits(slope),
        fixed=_six_digits(max(0.0, mean_y - slope * mean_x)),
        ranks_per_node=config.ranks.per_node,
        measured_ranks=points[0].ranks,
    )


def _fit(
    config: Config, points: Sequence[Point], paths: Sequence[Path], probes: Sequence[Path]
) -> Fit:
    from harness.scaling.fit import fit_step_time
    from harness.scaling.steptime import Wire

    measured = [path for path in paths if path not in probes]
    size = read_throughput(*measured).bytes_per_update or 0.0
    wire = Wire(size, config.comm.bucket_mb * _MIB)
    within = between = None
    if probes:
        from harness.report.network import network_of
        from harness.report.probes import load_probe

        network = network_of([load_probe(path, at) for at, path in enumerate(probes, 1)], wire)
        within, between = network.within, network.between
    given = {"within": within, "between": between} if within and between else {}
    try:
        return fit_step_time(points, wire, ensemble=40, **given)  # type: ignore[arg-type]
    except UsageError as error:
        raise DataError(f"batch.growth.throughput: {error}") from None
