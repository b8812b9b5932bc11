"""The schedule objects that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable

from harness.errors import ConfigError
from harness.schedule import measured
from harness.schedule.choices import UpdateTime
from harness.schedule.goodput import Goodput, Options
from harness.schedule.growth import Fixed, Geometric, GrowthPolicy, Linear, Listed, StageScheduler
from harness.schedule.rates import (
    POWERS,
    ConstantWarmup,
    Cosine,
    DecayRule,
    Exponential,
    GradualWarmup,
    Multistep,
    Poly,
    RateSchedule,
    Step,
    constant,
)
from harness.schema import (
    Batch,
    Config,
    CosineDecay,
    Decay,
    ExponentialDecay,
    FixedGrowth,
    GeometricGrowth,
    GoodputGrowth,
    LearningRate,
    LinearGrowth,
    ListGrowth,
    LossGrowth,
    MultistepDecay,
    NoiseGrowth,
    PolyDecay,
    RollingGrowth,
    StepDecay,
)
from harness.units import Duration


def growth_policy(batch: Batch) -> GrowthPolicy:
    """The policy that ``batch.growth`` names, at its start."""
    initial, growth = batch.initial, batch.growth
    if isinstance(growth, FixedGrowth):
        return Fixed(initial)
    if isinstance(growth, ListGrowth):
        return Listed(initial, tuple((stage.start, stage.batch) for stage in growth.stages))
    if isinstance(growth, GeometricGrowth):
        return Geometric(initial, growth.factor, growth.every)
    if isinstance(growth, LinearGrowth):
        return Linear(initial, growth.rate, growth.every)
    if isinstance(growth, GoodputGrowth):
        return _goodput(batch, growth)
    settings = {name: getattr(growth, name) for name in type(growth).model_fields}
    del settings["policy"]
    if isinstance(growth, LossGrowth):
        return measured.Loss(initial, **settings)
    if isinstance(growth, RollingGrowth):
        return measured.Rolling(initial, **settings)
    if isinstance(growth, NoiseGrowth):
        return measured.Noise(initial, **settings)
    return measured.Plateau(initial, **settings)


_NOT_OF_SPEED = {"measured_ranks", "misfit"}


def _goodput(batch: Batch, growth: GoodputGrowth) -> Goodput:
    if growth.model is None or growth.ranks is None:
        raise ConfigError(
            "batch.growth.model, batch.growth.ranks: to be settled before the run is planned "
            "(harness.speedfit.settled_growth)"
        )
    options = Options(
        batch.initial,
        batch.micro_batch,
        UpdateTime(**growth.model.model_dump(exclude=_NOT_OF_SPEED)),
        growth.ranks,
        batch.max or batch.initial,
        batch.multiple_of,
    )
    names = ("objective", "efficiency", "hysteresis", "limit", "memory", "dwell", "wait")
    settings = {name: getattr(growth, name) for name in names}
    return Goodput(batch.initial, options, shrink=batch.shrink, **settings)


def stage_scheduler(batch: Batch, agree: Callable[[int], int] | None = None) -> StageScheduler:
    """The scheduler of a run at its start; ``agree`` as ``StageScheduler`` has it."""
    scheduler = StageScheduler(growth_policy(batch), batch.max, batch.multiple_of, batch.shrink)
    if agree is not None:
        scheduler.agree = agree
    return scheduler


def rate_schedule(config: Config) -> RateSchedule:
    """The schedule that a configuration's ``lr`` and ``optimizer`` describe."""
    lr, optimizer = config.lr, config.optimizer
    return RateSchedule(
        base=lr.base,
        base_batch=lr.base_batch or config.batch.initial,
        power=POWERS[lr.scaling],
        momentum=optimizer.momentum,
        max_batch=lr.max_batch,
        least=lr.min,
        most=lr.max,
        warmup=_warmup(lr),
        decay_in_warmup=lr.warmup is None or lr.warmup.decayed,
        decay=_decay_rule(lr.decay, config.train.duration),
        end=getattr(lr.decay, "end", 0.0),
        on_growth=tuple(lr.on_growth) if isinstance(lr.on_growth, list) else (lr.on_growth,),
        scale_momentum=optimizer.momentum_scaling == "smith_le",
        max_momentum=optimizer.max_momentum,
    )


def _warmup(lr: LearningRate) -> GradualWarmup | ConstantWarmup | None:
    if lr.warmup is None:
        return None
    start = lr.base if lr.warmup.start is None else lr.warmup.start
    if lr.warmup.kind == "constant":
        return ConstantWarmup(start, lr.warmup.duration)
    return GradualWarmup(start, lr.warmup.duration, lr.warmup.per == "epoch")


def _decay_rule(decay: Decay, total: Duration) -> DecayRule:
    if isinstance(decay, PolyDecay):
        return Poly(decay.power, total, decay.begin)
    if isinstance(decay, CosineDecay):
        return Cosine(total, decay.begin)
    if isinstance(decay, StepDecay):
        return Step(decay.factor, decay.every, decay.begin)
    if isinstance(decay, ExponentialDecay):
        return Exponential(decay.factor, decay.every, decay.begin)
    if isinstance(decay, MultistepDecay):
        return Multistep(decay.factor, tuple(decay.at))
    return constant
