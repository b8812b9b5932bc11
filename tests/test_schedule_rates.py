"""Rates against values worked out by hand, and decays against torch's schedulers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import isfinite, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from harness.errors import ConfigError
from harness.schedule.clock import Clock
from harness.schedule.configured import rate_schedule
from harness.schedule.growth import BatchDecision
from harness.schedule.rates import (
    Cosine,
    DecayRule,
    Exponential,
    GradualWarmup,
    Multistep,
    Poly,
    Rates,
    RateSchedule,
    Step,
)
from harness.schema import Config
from harness.units import Duration

P = Duration.parse


def config(train: str = "10ep", optimizer: dict[str, Any] | None = None, **lr: Any) -> Config:
    return Config.model_validate(
        {
            "name": "x",
            "data": {"dataset": "digits"},
            "model": {"name": "lenet5"},
            "batch": {"initial": 100},
            "optimizer": optimizer or {},
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


# Following the batch


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
    ("scaling", "batch", "lr"),
    [("linear", 200, 0.2), ("linear", 400, 0.4), ("linear", 401, 0.4), ("linear", 10**6, 0.4),
     ("sqrt", 400, 0.2), ("sqrt", 1600, 0.2), ("none", 1600, 0.1)],
)  # fmt: skip
def test_the_rate_follows_the_batch_up_to_max_batch(scaling: str, batch: int, lr: float) -> None:
    made = config(scaling=scaling, max_batch=400)
    assert lr_of(made, Clock(0, 0, 1000), decision(batch)) == pytest.approx(lr)


@pytest.mark.parametrize(("batch", "lr"), [(100, 0.1), (300, 0.3), (301, 0.3), (10**6, 0.3)])
def test_the_scaled_rate_has_a_maximum(batch: int, lr: float) -> None:
    assert lr_of(config(max=0.3), Clock(0, 0, 1000), decision(batch)) == pytest.approx(lr)


def test_the_maximum_is_that_of_the_scaled_rate_which_then_decays() -> None:
    made = config(max=0.3, on_growth=0.5, decay={"kind": "poly", "power": 1})
    assert lr_of(made, Clock(5000, 0, 1000), decision(800)) == pytest.approx(0.15)
    # 0.1 · 8 · 0.5 · 0.5 stays below it.
    assert lr_of(made, Clock(0, 0, 1000), decision(800, 2)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("samples", "lr"), [(0, 0.1), (5000, 0.05), (7000, 0.03), (7001, 0.03), (9999, 0.03)]
)
def test_the_rate_never_falls_below_its_minimum(samples: int, lr: float) -> None:
    assert rate(samples, min=0.03, decay={"kind": "poly", "power": 1}) == pytest.approx(lr)


def test_the_minimum_holds_in_the_warmup_and_past_the_cap_too() -> None:
    made = config(min=0.03, warmup={"duration": "2ep", "start": 0.0})
    assert lr_of(made, Clock(0, 0, 1000), decision()) == 0.03
    assert lr_of(made, Clock(1000, 0, 1000), decision()) == pytest.approx(0.05)
    assert lr_of(made, Clock(2000, 0, 1000), decision(100, 0, 10**6)) == 0.03


# Warmup


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


def test_a_warmup_may_begin_above_the_scaled_rate() -> None:
    warmup = {"duration": "20up", "start": 0.5}
    found = [rate(updates=updates, warmup=warmup) for updates in (0, 10, 20)]
    assert found == pytest.approx([0.5, 0.3, 0.1])


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("factor", [1, 2, 20])
def test_warmup_per_epoch_of_large_batch_lenet(k: int, factor: int) -> None:
    """η = ((k + 1 − i) / k) η0 + ((i − 1) / k) (b / b0) η0 throughout epoch i of k."""
    made = config(warmup={"duration": f"{k}ep", "per": "epoch"})
    for i in range(1, k + 1):
        eta = ((k + 1 - i) / k) * 0.1 + ((i - 1) / k) * factor * 0.1
        for samples in (1000 * (i - 1), 1000 * i - 500, 1000 * i - 1):
            found = lr_of(made, Clock(samples, 0, 1000), decision(100 * factor))
            assert found == pytest.approx(eta, rel=1e-14)
    assert lr_of(made, Clock(1000 * k, 0, 1000), decision(100 * factor)) == 0.1 * factor


def test_warmup_per_epoch_follows_a_batch_that_grows_meanwhile() -> None:
    """Epoch 4 of 5 at four times the batch: (2 · 0.1 + 3 · 0.4) / 5."""
    made = config(warmup={"duration": "5ep", "per": "epoch"})
    assert lr_of(made, Clock(3200, 0, 1000), decision(400, 1)) == pytest.approx(0.28)


@pytest.mark.parametrize(("samples", "lr"), [(0, 0.02), (1999, 0.02), (2000, 0.8), (9999, 0.8)])
def test_a_constant_warmup_ends_at_once(samples: int, lr: float) -> None:
    made = config(warmup={"kind": "constant", "duration": "2ep", "start": 0.02})
    assert lr_of(made, Clock(samples, 0, 1000), decision(800)) == pytest.approx(lr)


def test_a_constant_warmup_is_at_the_base_rate_unless_told() -> None:
    made = config(warmup={"kind": "constant", "duration": "2ep"})
    assert lr_of(made, Clock(0, 0, 1000), decision(800)) == 0.1


@pytest.mark.parametrize(
    ("decayed", "samples", "lr"),
    [
        (True, 1000, 0.2025),  # (0.1 + 0.3 · ½) · (1 − 1/10)²
        (False, 1000, 0.25),
        (True, 2000, 0.256),  # 0.4 · 0.8²
        (False, 2000, 0.256),
        (True, 0, 0.1),
        (False, 0, 0.1),
    ],
)
def test_the_decay_runs_during_the_warmup_unless_told(
    decayed: bool, samples: int, lr: float
) -> None:
    made = config(warmup={"duration": "2ep", "decayed": decayed}, decay={"kind": "poly"})
    assert lr_of(made, Clock(samples, 0, 1000), decision(400)) == pytest.approx(lr)


def test_a_constant_warmup_is_decayed_too_unless_told() -> None:
    decay = {"kind": "step", "every": "1ep", "factor": 0.5}
    warmup = {"kind": "constant", "duration": "2ep"}
    assert rate(1000, warmup=warmup, decay=decay) == pytest.approx(0.05)
    assert rate(1000, warmup={**warmup, "decayed": False}, decay=decay) == 0.1
    assert rate(2000, warmup={**warmup, "decayed": False}, decay=decay) == pytest.approx(0.025)


@given(st.integers(0, 3000), st.integers(0, 3000), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_warmup_is_monotone_and_stays_between_its_ends(
    first: int, second: int, start: float, target: float, per_epoch: bool
) -> None:
    warmup = GradualWarmup(start, P("2ep"), per_epoch)
    low, high = sorted((start, target))
    rates = [warmup(Clock(samples, 0, 1000), target) for samples in sorted((first, second))]
    assert all(low - 1e-12 <= lr <= high + 1e-12 for lr in rates)
    rises = [lr if target >= start else -lr for lr in rates]
    assert rises[0] <= rises[1] + 1e-12


# Decays


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
    ("train", "samples", "updates", "lr"),
    [
        ("10ep", 0, 0, 0.1),
        ("10ep", 2500, 0, 0.0853553390593),  # 0.1 · (1 + √½) / 2
        ("10ep", 5000, 0, 0.05),
        ("10ep", 7500, 0, 0.0146446609407),
        ("10ep", 10000, 0, 0.0),
        ("10ep", 11000, 0, 0.0),
        ("300up", 0, 100, 0.075),  # (1 + cos 60°) / 2 = ¾
        ("3000sa", 2000, 0, 0.025),
    ],
)
def test_cosine_decay_over_the_run(train: str, samples: int, updates: int, lr: float) -> None:
    found = rate(samples, updates, train, decay={"kind": "cosine"})
    assert found == pytest.approx(lr, abs=1e-12)


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


@pytest.mark.parametrize(
    ("every", "samples", "updates", "lr"),
    [
        ("2ep", 0, 0, 0.1),
        ("2ep", 1000, 0, 0.05),
        ("2ep", 2000, 0, 0.025),
        ("2ep", 5000, 0, 0.003125),
        ("2000sa", 3000, 0, 0.0125),
        ("40up", 0, 20, 0.05),
    ],
)
def test_exponential_decay(every: str, samples: int, updates: int, lr: float) -> None:
    decay = {"kind": "exponential", "every": every, "factor": 0.25}
    assert rate(samples, updates, decay=decay) == pytest.approx(lr)


@pytest.mark.parametrize(
    ("at", "samples", "updates", "lr"),
    [
        (["3ep", "6ep", "8ep"], 2999, 0, 0.1),
        (["3ep", "6ep", "8ep"], 3000, 0, 0.01),
        (["3ep", "6ep", "8ep"], 7999, 0, 0.001),
        (["3ep", "6ep", "8ep"], 8000, 0, 0.0001),
        (["1sa"], 1, 0, 0.01),
        (["10up", "11up"], 9999, 10, 0.01),
        (["10up", "11up"], 0, 99, 0.001),
    ],
)
def test_multistep_decay(at: list[str], samples: int, updates: int, lr: float) -> None:
    found = rate(samples, updates, decay={"kind": "multistep", "at": at})
    assert found == pytest.approx(lr)


@pytest.mark.parametrize("kind", ["step", "exponential"])
def test_decays_are_by_ten_unless_told(kind: str) -> None:
    assert rate(1000, decay={"kind": kind, "every": "1ep"}) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("decay", "samples", "lr"),
    [
        # From epoch 2 on: halfway at epoch 6.
        ({"kind": "poly", "power": 1, "begin": "2ep"}, 2000, 0.1),
        ({"kind": "poly", "power": 1, "begin": "2ep"}, 6000, 0.05),
        ({"kind": "poly", "power": 2, "begin": "2000sa"}, 6000, 0.025),
        ({"kind": "poly", "power": 1, "begin": "2ep", "end": 0.02}, 6000, 0.06),
        ({"kind": "poly", "power": 1, "end": 0.02}, 5000, 0.06),
        ({"kind": "poly", "power": 1, "end": 0.02}, 10000, 0.02),
        ({"kind": "poly", "power": 1, "end": 0.02}, 12000, 0.02),
        ({"kind": "cosine", "begin": "2ep"}, 1999, 0.1),
        ({"kind": "cosine", "begin": "2ep"}, 6000, 0.05),
        ({"kind": "cosine", "begin": "2ep", "end": 0.02}, 6000, 0.06),
        ({"kind": "cosine", "end": 0.02}, 10000, 0.02),
        ({"kind": "step", "every": "3ep", "factor": 0.5, "begin": "2ep"}, 4999, 0.1),
        ({"kind": "step", "every": "3ep", "factor": 0.5, "begin": "2ep"}, 5000, 0.05),
        ({"kind": "step", "every": "3000sa", "factor": 0.5, "begin": "2ep"}, 8000, 0.025),
        ({"kind": "step", "every": "0.3ep", "factor": 0.5, "begin": "0.1ep"}, 1000, 0.0125),
        ({"kind": "exponential", "every": "2ep", "factor": 0.25, "begin": "1ep"}, 999, 0.1),
        ({"kind": "exponential", "every": "2ep", "factor": 0.25, "begin": "1ep"}, 2000, 0.05),
        ({"kind": "poly", "power": 1, "end": 0.2}, 5000, 0.15),  # it may rise
        ({"kind": "poly", "power": 1, "begin": "10ep"}, 5000, 0.1),
        ({"kind": "poly", "power": 1, "begin": "10000sa", "end": 0.01}, 0, 0.1),
        ({"kind": "cosine", "begin": "10ep"}, 9999, 0.1),
    ],
)
def test_decays_with_a_begin_and_an_end(decay: dict[str, Any], samples: int, lr: float) -> None:
    assert rate(samples, decay=decay) == pytest.approx(lr)


def test_a_begin_in_updates() -> None:
    for updates, lr in ((0, 0.1), (20, 0.1), (60, 0.05), (100, 0.0)):
        decay = {"kind": "poly", "power": 1, "begin": "20up"}
        assert rate(updates=updates, train="100up", decay=decay) == pytest.approx(lr)
        decay = {"kind": "exponential", "every": "40up", "factor": 0.5, "begin": "20up"}
        lr = 0.1 * 0.5 ** (max(0, updates - 20) / 40)
        assert rate(updates=updates, decay=decay) == pytest.approx(lr)


def by_torch(make: Callable[[Any], Any], steps: int, start: float = 0.1) -> list[float]:
    """The rates that one of torch's schedulers sets, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=start)
    scheduler = make(optimizer)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it steps without an update
        for _ in range(steps):
            rates.append(float(scheduler.get_last_lr()[0]))
            scheduler.step()
    return rates


N = 24
TORCH: dict[str, tuple[dict[str, Any], Callable[[Any, int], Any]]] = {
    "poly 1": (
        {"kind": "poly", "power": 1},
        lambda o, total: lr_scheduler.PolynomialLR(o, total, power=1),
    ),
    "poly 2": (
        {"kind": "poly"},
        lambda o, total: lr_scheduler.PolynomialLR(o, total, power=2),
    ),
    "poly 0.5": (
        {"kind": "poly", "power": 0.5},
        lambda o, total: lr_scheduler.PolynomialLR(o, total, power=0.5),
    ),
    "cosine": (
        {"kind": "cosine"},
        lambda o, total: lr_scheduler.CosineAnnealingLR(o, total),
    ),
    "cosine to an end": (
        {"kind": "cosine", "end": 0.03},
        lambda o, total: lr_scheduler.CosineAnnealingLR(o, total, eta_min=0.03),
    ),
    "step": (
        {"kind": "step", "every": "5{unit}", "factor": 0.3},
        lambda o, total: lr_scheduler.StepLR(o, 5, gamma=0.3),
    ),
    "exponential": (
        {"kind": "exponential", "every": "1{unit}", "factor": 0.8},
        lambda o, total: lr_scheduler.ExponentialLR(o, gamma=0.8),
    ),
    "multistep": (
        {"kind": "multistep", "at": ["3{unit}", "4{unit}", "17{unit}"], "factor": 0.2},
        lambda o, total: lr_scheduler.MultiStepLR(o, [3, 4, 17], gamma=0.2),
    ),
}


def in_unit(decay: dict[str, Any], unit: str) -> dict[str, Any]:
    def put(value: Any) -> Any:
        if isinstance(value, list):
            return [put(entry) for entry in value]
        return value.format(unit=unit) if isinstance(value, str) else value

    return {key: put(value) for key, value in decay.items()}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("unit", ["up", "ep", "sa"])
@pytest.mark.parametrize("begin", [0, 7])
def test_decays_are_those_of_torch(name: str, unit: str, begin: int) -> None:
    """A step of torch's is an update, an epoch or a sample here; with a begin, they start there."""
    raw, make = TORCH[name]
    decay = in_unit(raw, unit)
    if begin and name == "multistep":
        return
    if begin:
        decay["begin"] = f"{begin}{unit}"
    scale = 1000 if unit == "ep" else 1
    found = [
        rate(0 if unit == "up" else scale * t, t if unit == "up" else 0, f"{N}{unit}", decay=decay)
        for t in range(N + 1)
    ]
    expected = by_torch(lambda optimizer: make(optimizer, N - begin), N + 1 - begin)
    assert found == pytest.approx([0.1] * begin + expected, rel=1e-9, abs=1e-12)


@given(
    st.sampled_from(["poly", "cosine", "step", "exponential", "multistep"]),
    st.integers(0, 5000),
    st.integers(0, 12000),
    st.integers(0, 12000),
    st.floats(0.01, 1),
)
def test_decays_begin_at_1_and_never_rise(
    kind: str, begin: int, first: int, second: int, factor: float
) -> None:
    begins, every, total = P(f"{begin}sa"), P("777sa"), P("10ep")
    rules: dict[str, DecayRule] = {
        "poly": Poly(factor * 3, total, begins),
        "cosine": Cosine(total, begins),
        "step": Step(factor, every, begins),
        "exponential": Exponential(factor, every, begins),
        "multistep": Multistep(factor, (P("2ep"), P("5ep"))),
    }
    rule = rules[kind]
    early, late = (rule(Clock(samples, 0, 1000)) for samples in sorted((first, second)))
    assert 1 >= early >= late >= 0
    assert rule(Clock(min(begin, 1999), 0, 1000)) == 1.0


def test_decays_start_at_1() -> None:
    start = Clock(0, 0, 1000)
    assert Poly(2.0, P("3ep"))(start) == 1.0
    assert Step(0.1, P("3ep"))(start) == 1.0
    assert Cosine(P("3ep"))(start) == 1.0
    assert Exponential(0.1, P("3ep"))(start) == 1.0
    assert Multistep(0.1, (P("3ep"),))(start) == 1.0


# Growth


@pytest.mark.parametrize(
    ("growths", "batch", "lr"), [(0, 100, 0.1), (1, 200, 0.15), (2, 400, 0.225), (3, 800, 0.3375)]
)
def test_on_growth_multiplies_each_time(growths: int, batch: int, lr: float) -> None:
    grown = decision(batch, growths)
    assert lr_of(config(on_growth=0.75), Clock(0, 0, 1000), grown) == pytest.approx(lr)


@pytest.mark.parametrize(
    ("growths", "product"),
    [(-2, 1.0), (0, 1.0), (1, 0.5), (2, 0.1), (3, 0.3), (4, 0.9), (5, 2.7)],
)
def test_on_growth_may_have_a_factor_for_each(growths: int, product: float) -> None:
    """0.5, then 0.2, then 3 for all that follow."""
    made = config(scaling="none", on_growth=[0.5, 0.2, 3])
    found = lr_of(made, Clock(0, 0, 1000), decision(800, growths))
    assert found == pytest.approx(0.1 * product)


@given(st.floats(0.1, 2), st.integers(-3, 12), st.integers(1, 4))
def test_a_list_of_one_factor_is_that_factor(factor: float, growths: int, count: int) -> None:
    grown = decision(200, growths)
    alone = lr_of(config(on_growth=factor), Clock(0, 0, 1000), grown)
    listed = lr_of(config(on_growth=[factor] * count), Clock(0, 0, 1000), grown)
    assert listed == pytest.approx(alone)


def test_adabatch_pairs_growth_with_decay_so_that_the_rate_stands_still() -> None:
    paired = config(on_growth=0.5)
    for growths in range(5):
        grown = decision(100 * 2**growths, growths)
        assert lr_of(paired, Clock(0, 0, 1000), grown) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("beta", "on_growth", "factor"),
    [(2, 0.1, 0.2), (4, 0.1, 0.4), (8, 0.1, 0.8), (2, 0.375, 0.75), (2, 0.25, 0.5)],
)
def test_adabatch_s_pairs_of_growth_and_decay(beta: int, on_growth: float, factor: float) -> None:
    """Batch × β with rate × factor: β · on_growth, at each of three growths."""
    paired = config(on_growth=on_growth)
    for growths in range(4):
        found = lr_of(paired, Clock(0, 0, 1000), decision(100 * beta**growths, growths))
        assert found == pytest.approx(0.1 * factor**growths)


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


# Momentum


def smith_le(**settings: Any) -> dict[str, Any]:
    return {"momentum_scaling": "smith_le", **settings}


def rates_at(made: Config, batch: int, growths: int = 0) -> Rates:
    return rate_schedule(made).at(Clock(0, 0, 1000), decision(batch, growths))


def test_momentum_is_the_configured_one() -> None:
    assert rates_at(config(), 100).momentum == 0.9
    assert rates_at(config(max_batch=100), 10**6).momentum == 0.9
    assert rates_at(config(optimizer={"momentum": 0.0}), 100).momentum == 0.0


@pytest.mark.parametrize(
    ("batch", "lr", "whole"),
    [
        (2048, 0.01, 10.0),
        (1024, 0.01 * sqrt(0.5), 10.0),
        (4096, 0.01 * sqrt(2), 10.0),
        (8192, 0.01 * sqrt(2), 10.0 * sqrt(2)),
        (16384, 0.01 * sqrt(2), 20.0),
        (32768, 0.01 * sqrt(2), 20.0 * sqrt(2)),
    ],
)
def test_the_rate_follows_first_and_then_the_momentum(batch: int, lr: float, whole: float) -> None:
    """Square-root scaling of 0.01 at 2,048 and m = 0.9, in the rate up to 4,096, then in
    1 / (1 − m)."""
    made = config(base=0.01, base_batch=2048, scaling="sqrt", max_batch=4096, optimizer=smith_le())
    found = rates_at(made, batch)
    assert found.lr == pytest.approx(lr)
    assert 1 / (1 - found.momentum) == pytest.approx(whole)
    assert found.effective == pytest.approx(0.1 * sqrt(batch / 2048))


def test_the_momentum_takes_what_the_largest_rate_leaves() -> None:
    """0.1 · 8 wanted, 0.2 allowed: 1 / (1 − m) is 4 times 10, so m = 0.975."""
    found = rates_at(config(max=0.2, optimizer=smith_le()), 800)
    assert (found.lr, found.momentum) == pytest.approx((0.2, 0.975))


def test_the_momentum_has_a_maximum() -> None:
    """8 · 10 would be m = 0.9875."""
    found = rates_at(config(max=0.1, optimizer=smith_le(max_momentum=0.95)), 800)
    assert (found.lr, found.momentum) == (0.1, 0.95)


def test_factors_of_growths_go_to_the_momentum_too() -> None:
    """0.1 · 8 · 0.5 wanted, 0.2 allowed: 1 / (1 − m) = 20. Without the limit the rate has it."""
    found = rates_at(config(max=0.2, on_growth=0.5, optimizer=smith_le()), 800, 1)
    assert (found.lr, found.momentum) == pytest.approx((0.2, 0.95))
    found = rates_at(config(on_growth=0.5, optimizer=smith_le()), 800, 1)
    assert (found.lr, found.momentum) == pytest.approx((0.4, 0.9))


def test_the_momentum_heeds_neither_decay_nor_warmup() -> None:
    made = config(max=0.2, optimizer=smith_le(), decay={"kind": "poly"}, warmup={"duration": "2ep"})
    schedule = rate_schedule(made)
    for samples in (0, 1000, 5000, 9999):
        found = schedule.at(Clock(samples, 0, 1000), decision(800))
        assert found.momentum == pytest.approx(0.975)


LIMITS = st.fixed_dictionaries(
    {}, optional={"max": st.floats(1e-3, 10), "max_batch": st.integers(1, 10**6)}
)


@given(
    st.sampled_from([1.0, 0.5, 0.0]),
    st.integers(1, 10**5),
    st.integers(1, 10**6),
    st.floats(0, 0.99),
    st.floats(1e-3, 10) | st.none(),
    st.integers(1, 10**6) | st.none(),
)
def test_rate_and_momentum_together_follow_the_rule_through_the_limits(
    power: float,
    base_batch: int,
    batch: int,
    momentum: float,
    most: float | None,
    max_batch: int | None,
) -> None:
    schedule = RateSchedule(
        0.1, base_batch, power, momentum, max_batch, most=most, scale_momentum=True
    )
    found = schedule.at(Clock(0, 0, 1000), decision(batch))
    rule = 0.1 * (batch / base_batch) ** power
    assert found.momentum <= 0.9999
    assert found.momentum >= momentum
    assert most is None or found.lr <= most
    if found.momentum < 0.9999:
        assert found.effective == pytest.approx(rule / (1 - momentum))
    else:
        assert found.effective <= rule / (1 - momentum) * (1 + 1e-9)
    if (most is None or rule <= most) and (max_batch is None or batch <= max_batch):
        assert found.lr == pytest.approx(rule)
        assert found.momentum == momentum


@given(
    st.sampled_from(["linear", "sqrt", "none"]),
    st.integers(1, 10**7),
    st.integers(1, 10**7),
    st.floats(0, 0.999),
    LIMITS,
)
def test_the_momentum_never_falls_as_the_batch_grows(
    scaling: str, first: int, second: int, momentum: float, limits: dict[str, Any]
) -> None:
    optimizer = smith_le(momentum=momentum, max_momentum=0.999)
    made = config(scaling=scaling, optimizer=optimizer, **limits)
    small, large = (rates_at(made, batch) for batch in sorted((first, second)))
    assert momentum <= small.momentum <= large.momentum <= 0.999
    assert small.lr <= large.lr


# Every rate is a number


@given(
    st.sampled_from(["linear", "sqrt", "none"]),
    st.sampled_from(
        [
            {"kind": "none"},
            {"kind": "poly"},
            {"kind": "poly", "begin": "10ep", "end": 0.1},
            {"kind": "cosine", "begin": "3ep"},
            {"kind": "step", "every": "1ep"},
            {"kind": "exponential", "every": "1sa", "factor": 1e-300},
            {"kind": "multistep", "at": ["1ep", "2ep"]},
        ]
    ),
    st.sampled_from([{"kind": "gradual"}, {"kind": "constant"}, {"per": "epoch"}]),
    st.integers(0, 11000),
    st.integers(1, 10**6),
    st.booleans(),
)
def test_rates_are_finite_and_never_negative(
    scaling: str,
    decay: dict[str, Any],
    warmup: dict[str, Any],
    samples: int,
    batch: int,
    decayed: bool,
) -> None:
    warmup = {**warmup, "duration": "1ep", "decayed": decayed}
    made = config(scaling=scaling, decay=decay, warmup=warmup, max=50.0, optimizer=smith_le())
    found = rate_schedule(made).at(Clock(samples, 0, 1000), decision(batch))
    assert isfinite(found.lr)
    assert found.lr >= 0
    assert 0 <= found.momentum < 1


@pytest.mark.parametrize("growths", [4, 2000])
@pytest.mark.parametrize("factors", [1e20, [1e20], [1.0, 1e20]])
def test_a_rate_that_no_float_holds_is_refused(growths: int, factors: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"past 3\.4e38 in stage \d+; lower lr.base .* lr.on_growth"
    ):
        lr_of(config(on_growth=factors), Clock(0, 0, 1000), decision(100, growths))


@pytest.mark.parametrize("factors", [[1e-30] * 30, [1e30, 1e30, 1e-30, 1e-30], 1e-30])
def test_factors_that_are_next_to_nothing_leave_a_rate(factors: Sequence[float] | float) -> None:
    made = config(on_growth=factors, optimizer=smith_le(), max=1.0)
    found = rates_at(made, 100, 30)
    assert 0 <= found.lr <= 1.0
    assert 0.9 <= found.momentum <= 0.9999
