"""The updates of a run for a loop of one's own: those of the plan, and the same after any break."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from harness.config import load_config
from harness.schedule.growth import Fixed, Geometric
from harness.schedule.plan import build_plan
from harness.schedule.rates import RateSchedule
from harness.schedule.updates import Update, Updates
from harness.units import Duration

DEMO = ROOT / "configs" / "adabatch-digits.yaml"
RATES = RateSchedule(base=0.1, base_batch=8, power=1.0, momentum=0.9)
lengths = st.builds(
    lambda n, unit: Duration.parse(f"{n}{unit}"), st.integers(1, 5), st.sampled_from(["ep", "up"])
)


def updates(size: int, initial: int, every: Duration, duration: Duration) -> Updates:
    return Updates(size, Geometric(initial, 2, every), RATES, duration, max_batch=64 * initial)


@given(st.integers(1, 60), st.integers(1, 20), lengths, lengths, st.data())
def test_no_sample_is_left_out_and_a_break_changes_nothing(
    size: int, initial: int, every: Duration, duration: Duration, data: st.DataObject
) -> None:
    made = updates(size, initial, every, duration)
    found: list[Update] = []
    states: list[dict[str, Any]] = []
    for update in made:
        found.append(update)
        states.append(made.state_dict())
    assert [update.number for update in found] == list(range(1, len(found) + 1))
    seen = 0
    for update in found:
        assert update.seen == seen
        assert update.size > 0
        seen += update.size
    if duration.unit == "ep":
        assert seen == duration.value * size
    else:
        assert len(found) == duration.value
    at = data.draw(st.integers(0, len(found) - 1))
    again = updates(size, initial, every, duration)
    again.load_state_dict(states[at])
    assert list(again) == found[at + 1 :]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["batch.growth={policy: linear, rate: 3.5, every: 10up}", "batch.multiple_of=8"],
        ["batch.epoch_end=carry", "train.duration=333up"],
        ["batch.growth={policy: fixed}", "lr.decay={kind: cosine}"],
    ],
)
def test_they_are_those_of_the_plan(overrides: list[str]) -> None:
    config = load_config(DEMO, overrides)
    plan = build_plan(config, 1437).as_dict()
    found = list(Updates.of(config, 1437))
    assert len(found) == plan["totals"]["updates"]
    assert sum(update.size for update in found) == plan["totals"]["samples"]
    for stage in plan["stages"]:
        inside = [update for update in found if update.stage == stage["stage"]]
        assert len(inside) == stage["updates"]
        assert max(update.size for update in inside) <= stage["global_batch"]
        assert inside[0].lr == pytest.approx(stage["lr_start"])


def test_a_policy_that_measures_is_told() -> None:
    growth = "batch.growth={policy: rolling, dwell: 5up, wait: 5up, memory: 5up, loss_weight: 0}"
    config = load_config(DEMO, [growth, "batch.max=1024", "train.duration=40up", "lr.warmup=null"])
    made = Updates.of(config, 1437)
    sizes = []
    for update in made:
        sizes.append(update.size)
        made.observe(loss=1.0, grad_norm=1.0 / update.number)
    assert sizes[0] == 64
    assert max(sizes) > 64


def test_what_cannot_be_done_is_refused() -> None:
    growth = "batch.growth={policy: loss, loss: full, dwell: 5up}"
    config = load_config(DEMO, [growth, "batch.max=1024"])
    with pytest.raises(ValueError, match="use loss: running"):
        list(Updates.of(config, 1437))
    with pytest.raises(ValueError, match="at least 1 sample"):
        Updates(0, Fixed(8), RATES, "1ep")
    with pytest.raises(ValueError, match="is not a duration"):
        Updates(9, Fixed(8), RATES, "1 epoch")
    with pytest.raises(ValueError, match="the state is of 9 samples, not 8"):
        Updates(8, Fixed(8), RATES, "1ep").load_state_dict(
            Updates(9, Fixed(8), RATES, "1ep").state_dict()
        )
