"""Rates against values worked out by hand."""

from __future__ import annotations

from math import isfinite
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config import Config
from harness.errors import ConfigError
from harness.schedule.clock import Clock
from harness.schedule.growth import BatchDecision
from harness.schedule.rates import GradualWarmup, Poly, Step, rate_schedule
from harness.units import Duration


def config(train: str = "10ep", **lr: Any) -> Config:
    return Config.model_validate(
        {
            "name": "x",
            "data": {"dataset": "digits"},
            "model": {"name": "lenet5"},
            "batch": {"initial": 100},
            "lr": {"base": 0.1, **lr},
            "train": {"duration": train},
        }
    )


def decision(batch: int = 100, growths: int = 0, asked: int | None = None) -> BatchDecision:
    return BatchDecision(growths, batch, asked or batch, growths, "")


def rate(samples: int = 0, updates: int = 0, train: str = "10ep", **lr: Any) -> float:
    """The rate on a data set of 1,000 samples at a global batch of 100."""
    return lr_of(config(train, **lr), Clock(samples, updates, 1000), decision())


def lr_of(config: Config, clock: Clock, decision: BatchDecision) -> float:
    return rate_schedule(config).at(clock, decision).lr


@pytest.mark.parametrize(
    ("scaling", "batch", "lr"),
    [
        ("linear", 100, 0.1),
        ("linear", 800, 0.8),
        ("linear", 50, 0.05),
        ("sqrt", 100, 0.1),
        ("sqrt", 400, 0.2),
        ("sqrt", 1600, 0.4),
        ("none", 100, 0.1),
        ("none", 1600, 0.1),
    ],
)
def test_scaling_with_the_global_batch(scaling: str, batch: int, lr: float) -> None:
    assert lr_of(config(scaling=scaling), Clock(0, 0, 1000), decision(batch)) == pytest.approx(lr)


@pytest.mark.parametrize(("base_batch", "lr"), [(None, 0.1), (25, 0.4), (256, 0.0390625)])
def test_the_batch_that_the_base_rate_is_for(base_batch: int | None, lr: float) -> None:
    assert rate(base_batch=base_batch) == pytest.approx(lr)


@pytest.mark.parametrize(
    ("samples", "lr"),
    [
        (0, 0.1),  # at first lr.base, whatever the batch
        (500, 0.275),  # 0.1 + 0.7 × 0.25
        (1000, 0.45),
        (1500, 0.625),
        (2000, 0.8),
        (9999, 0.8),
    ],
)
def test_warmup_runs_in_a_line_from_the_base_rate_to_the_scaled_one(
    samples: int, lr: float
) -> None:
    warm = config(warmup={"duration": "2ep"})
    assert lr_of(warm, Clock(samples, 0, 1000), decision(800)) == pytest.approx(lr)


@pytest.mark.parametrize(
    ("updates", "lr"), [(0, 0.0), (5, 0.025), (10, 0.05), (20, 0.1), (30, 0.1)]
)
def test_warmup_in_updates_from_a_start_rate(updates: int, lr: float) -> None:
    assert rate(updates=updates, warmup={"duration": "20up", "start": 0.0}) == pytest.approx(lr)


@pytest.mark.parametrize(
    ("train", "samples", "updates", "power", "lr"),
    [
        ("10ep", 0, 0, 2, 0.1),
        ("10ep", 5000, 0, 2, 0.025),
        ("10ep", 9000, 0, 2, 0.001),
        ("10ep", 5000, 0, 1, 0.05),
        ("10ep", 7500, 0, 0.5, 0.05),
        ("10ep", 10000, 0, 2, 0.0),
        ("10ep", 10001, 0, 0.5, 0.0),
        ("200up", 0, 50, 2, 0.05625),
        ("4000sa", 3000, 0, 2, 0.00625),
    ],
)
def test_poly_decay_over_the_run(
    train: str, samples: int, updates: int, power: float, lr: float
) -> None:
    found = rate(samples, updates, train, decay={"kind": "poly", "power": power})
    assert found == pytest.approx(lr)


@pytest.mark.parametrize(
    ("every", "samples", "updates", "lr"),
    [
        ("3ep", 2999, 0, 0.1),
        ("3ep", 3000, 0, 0.025),
        ("3ep", 6000, 0, 0.00625),
        ("1500sa", 1499, 0, 0.1),
        ("1500sa", 1500, 0, 0.025),
        ("40up", 9999, 39, 0.1),
        ("40up", 0, 80, 0.00625),
    ],
)
def test_step_decay(every: str, samples: int, updates: int, lr: float) -> None:
    decay = {"kind": "step", "every": every, "factor": 0.25}
    assert rate(samples, updates, decay=decay) == pytest.approx(lr)


def test_step_decay_is_by_ten_unless_told() -> None:
    assert rate(1000, decay={"kind": "step", "every": "1ep"}) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("growths", "batch", "lr"), [(0, 100, 0.1), (1, 200, 0.15), (2, 400, 0.225), (3, 800, 0.3375)]
)
def test_on_growth_multiplies_each_time(growths: int, batch: int, lr: float) -> None:
    grown = decision(batch, growths)
    assert lr_of(config(on_growth=0.75), Clock(0, 0, 1000), grown) == pytest.approx(lr)


def test_adabatch_pairs_growth_with_decay_so_that_the_rate_stands_still() -> None:
    paired = config(on_growth=0.5)
    for growths in range(5):
        grown = decision(100 * 2**growths, growths)
        assert lr_of(paired, Clock(0, 0, 1000), grown) == pytest.approx(0.1)


@pytest.mark.parametrize(("asked", "lr"), [(400, 0.4), (500, 0.32), (800, 0.2), (1600, 0.1)])
def test_past_the_cap_the_rate_shrinks_by_max_over_asked(asked: int, lr: float) -> None:
    capped = decision(400, 1, asked)
    assert lr_of(config(), Clock(0, 0, 1000), capped) == pytest.approx(lr)


def test_everything_together() -> None:
    """0.1 · √4 · 0.75² · (1 − ½)² · 400/800, past the warmup."""
    every = config(
        scaling="sqrt",
        on_growth=0.75,
        warmup={"duration": "2ep"},
        decay={"kind": "poly", "power": 2},
    )
    assert lr_of(every, Clock(5000, 0, 1000), decision(400, 2, 800)) == pytest.approx(0.0140625)


def test_the_decay_runs_during_the_warmup_too() -> None:
    """(0.1 + 0.3 · ½) · (1 − 1/10)²."""
    both = config(warmup={"duration": "2ep"}, decay={"kind": "poly"})
    assert lr_of(both, Clock(1000, 0, 1000), decision(400)) == pytest.approx(0.2025)


def test_momentum_is_the_configured_one() -> None:
    assert rate_schedule(config()).at(Clock(0, 0, 1000), decision()).momentum == 0.9


@given(
    st.sampled_from(["linear", "sqrt", "none"]),
    st.sampled_from([{"kind": "none"}, {"kind": "poly"}, {"kind": "step", "every": "1ep"}]),
    st.integers(0, 11000),
    st.integers(1, 10**6),
)
def test_rates_are_finite_and_never_negative(
    scaling: str, decay: dict[str, Any], samples: int, batch: int
) -> None:
    made = config(scaling=scaling, decay=decay, warmup={"duration": "1ep"})
    lr = lr_of(made, Clock(samples, 0, 1000), decision(batch))
    assert isfinite(lr)
    assert lr >= 0


@given(st.integers(0, 3000), st.integers(0, 3000), st.floats(0, 1), st.floats(0, 1))
def test_a_warmup_is_monotone_and_stays_between_its_ends(
    first: int, second: int, start: float, target: float
) -> None:
    warmup = GradualWarmup(start, Duration.parse("2ep"))
    low, high = sorted((start, target))
    rates = [warmup(Clock(samples, 0, 1000), target) for samples in sorted((first, second))]
    assert all(low - 1e-12 <= lr <= high + 1e-12 for lr in rates)
    rises = [lr if target >= start else -lr for lr in rates]
    assert rises[0] <= rises[1] + 1e-12


def test_decays_start_at_1() -> None:
    start = Clock(0, 0, 1000)
    assert Poly(2.0, Duration.parse("3ep"))(start) == 1.0
    assert Step(0.1, Duration.parse("3ep"))(start) == 1.0


@pytest.mark.parametrize("growths", [4, 2000])
def test_a_rate_that_no_float_holds_is_refused(growths: int) -> None:
    with pytest.raises(
        ConfigError, match=r"past 3\.4e38 in stage \d+; lower lr.base .* lr.on_growth"
    ):
        lr_of(config(on_growth=1e20), Clock(0, 0, 1000), decision(100, growths))
