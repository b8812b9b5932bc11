"""What a study finds, as plain values and in sentences."""

from __future__ import annotations

import json
import re
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.scaling.answer import Topic, answer, duration, number, percent
from harness.scaling.goodput import (
    MeasuredNoise,
    NoiseAt,
    goodputs,
    recommended_growth,
    speeds_of,
)
from harness.scaling.interval import Interval
from harness.scaling.points import Mode, Point
from harness.scaling.priors import KnownLink
from harness.scaling.steptime import Decomposition, Link, StepTime, Wire
from harness.scaling.study import Study, study
from harness.schedule.choices import choices

WIRE = Wire(40e6, 4e6)
TRUTH = StepTime(2e-3, 2e-3, 0.02, 2.0, Link(5e-6, 1e-11), Link(1e-4, 1e-9), WIRE)


def measured(counts: tuple[int, ...], mode: Mode = "weak", repeats: int = 4) -> list[Point]:
    rng = np.random.default_rng(1)
    points = []
    for n in counts:
        images = 32.0 * n if mode == "weak" else 96.0
        true = float(TRUTH.seconds(Decomposition.of(n, n, images))[0])
        drawn = true * np.exp(0.02 * rng.standard_normal(repeats))
        points.append(Point(n, n, images, tuple(map(float, drawn))))
    return points


def studied(counts: tuple[int, ...] = (1, 2, 3, 4), **changed: Any) -> Study:
    mode, repeats = changed.pop("mode", "weak"), changed.pop("repeats", 4)
    return study(
        measured(counts, mode, repeats),
        WIRE,
        mode=mode,
        **{"most_nodes": 64, "ensemble": 60} | changed,
    )


def texts(found: Study, *others: Any) -> dict[Topic, str]:
    joined: dict[Topic, str] = {}
    for one in answer(found, *others):
        joined[one.topic] = f"{joined.get(one.topic, '')} {one.text}".strip()
    return joined


def test_the_whole_answer() -> None:
    found = studied(targets=(8, 64))
    assert found.fit is not None
    speeds, asked = speeds_of(found.fit), choices([1, 2, 4, 16], 32, ranks_per_node=1)
    worth = goodputs(asked, speeds, MeasuredNoise(2000, 1500, 3000), 32, reference_samples=1e7)
    noise = [NoiseAt(0, MeasuredNoise(50)), NoiseAt(2e6, MeasuredNoise(8000))]
    text = texts(found, worth, recommended_growth(noise, 1e7, asked, speeds, 32))
    assert list(text) == [
        *("measured", "time", "prediction", "knee", "goodput", "growth"),
        *("serial", "check", "caution"),
    ]
    assert "With 4 ranks on 4 nodes" in text["measured"]
    assert "95 % intervals" in text["measured"]
    assert "2 times the most ranks that were measured (4)" in text["prediction"]
    assert "16 times the most ranks that were measured (4)" in text["prediction"]
    assert "This is a prediction for 4.0 times" in text["goodput"]
    assert "Gustafson" in text["serial"]
    assert "without the measurement on 4 ranks" in text["check"]
    assert "1, 2, 3, 4 ranks" in text["caution"]
    assert "a probe of the network would narrow it" in text["caution"]
    assert all(one.endswith(".") and ".." not in one for one in text.values())


def test_every_number_that_was_found_has_its_interval() -> None:
    found = studied(targets=(8,))
    text = texts(found)
    span = r"[\d.,]+ (?:% )?\([\d.,]+ to (?:more than )?[\d.,]+(?: %)?\)"
    for topic, count in {"measured": 3, "time": 3, "prediction": 2, "knee": 1, "serial": 1}.items():
        assert len(re.findall(span, text[topic])) == count, text[topic]  # type: ignore[index]


def test_strong_scaling_speaks_of_amdahl() -> None:
    text = texts(studied(mode="strong"))
    assert "Amdahl's law" in text["serial"]
    assert "would limit the speed-up to" in text["serial"]


def test_a_probe_is_named() -> None:
    text = texts(studied(between=KnownLink(1e-4, 1e-9, 1.1)))
    assert "on a probe of the network (the latency between nodes" in text["caution"]
    assert "would narrow it" not in text["caution"]


@pytest.mark.parametrize(
    ("counts", "repeats", "topics", "gap"),
    [
        ((4,), 4, ["measured", "caution"], "one number of ranks was measured"),
        ((4,), 1, ["measured", "caution"], "no point was repeated"),
        ((1, 2), 4, ["measured", "time", "knee", "serial", "caution"], "two numbers of ranks"),
        ((1, 2, 4), 1, ["measured", "time", "knee", "serial", "check", "caution"], "no point was"),
    ],
)
def test_too_little_to_go_on_is_said(
    counts: tuple[int, ...], repeats: int, topics: list[str], gap: str
) -> None:
    found = studied(counts, repeats=repeats)
    text = texts(found)
    assert list(text) == topics
    assert f"Note: {gap}" in text["caution"]
    json.dumps(found.as_dict(), allow_nan=False)


def test_plain_values() -> None:
    plain = studied(targets=(8,)).as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["speedups"][1]["efficiency"].keys() == {"value", "low", "high"}
    assert plain["predictions"][0]["beyond"] == 2
    assert {one["name"] for one in plain["model"]["coefficients"]} >= {"gamma", "jitter"}
    assert plain["left_out"][0]["point"]["ranks"] == 4


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(3512.4, 3470.2, 3555.9), "3,512 (3,470 to 3,556)"),
        (Interval(3512.4, 2000, 5000), "3,500 (2,000 to 5,000)"),
        (Interval(0.0123456), "0.0123"),
        (Interval(2.0, 2.0, 2.0), "2.000 (2.000 to 2.000)"),
        (Interval(0.0), "0"),
        (Interval(1e20), "1.00e+20"),
        (Interval(5.0, 3.0, inf), "5.000 (3.000 to no end)"),
    ],
)
def test_numbers(interval: Interval, text: str) -> None:
    assert number(interval) == text


def test_shares_and_times() -> None:
    assert percent(Interval(0.873, 0.85, 0.89)) == "87 % (85 to 89 %)"
    assert percent(Interval(0.0123)) == "1.2 %"
    assert duration(Interval(30)) == "30.0 seconds"
    assert duration(Interval(90, 60, 120)) == "1.50 (1.00 to 2.00) minutes"
    assert duration(Interval(7200)) == "2.00 hours"
    assert duration(Interval(7 * 86400)) == "7.00 days"


@given(st.floats(), st.floats(), st.floats())
def test_any_number_can_be_told(value: float, low: float, high: float) -> None:
    for interval in (Interval(value), Interval(value, low, high)):
        assert number(interval)
        assert percent(interval)
        assert duration(interval)


@given(
    st.dictionaries(
        st.integers(1, 10**6),
        st.lists(st.floats(1e-9, 1e9) | st.sampled_from([0.0, -1.0, nan, inf]), max_size=3),
        max_size=4,
    ),
    st.sampled_from(["weak", "strong"]),
    st.floats(0, 1e18),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_series_ends_in_sentences_or_in_one_message(
    seconds: dict[int, list[float]], mode: Mode, size: float
) -> None:
    try:
        points = [
            Point(n, 1, 32.0 * n if mode == "weak" else 96.0, tuple(values))
            for n, values in seconds.items()
        ]
        found = study(points, Wire(size), mode=mode, targets=(7,), most_nodes=8, ensemble=40)
    except UsageError:
        return
    assert all(sentence.text.endswith(".") for sentence in answer(found))
    json.dumps(found.as_dict(), allow_nan=False)


def test_no_number_of_nodes_is_named_where_none_can_be_told() -> None:
    cannot = "These measurements cannot tell how many nodes are worth buying: "
    one_node = [Point(n, 1, 32 * n, (0.1 + 0.001 * n, 0.101 + 0.001 * n)) for n in (1, 2, 4)]
    found = study(one_node, Wire(1e6), mode="weak")
    assert f"{cannot}nothing was measured between nodes" in texts(found)["knee"]
    probed = study(one_node, Wire(1e6), mode="weak", between=KnownLink(1e-5, 1e-9))
    assert cannot not in texts(probed)["knee"]
    assert "their network is taken from a probe" in texts(probed)["knee"]
    assert f"{cannot}without repeats" in texts(studied((1, 2, 4), repeats=1))["knee"]
    assert "images per second alone, it pays to go up to" in texts(studied())["knee"]


def test_a_check_that_failed_comes_before_what_it_casts_doubt_on() -> None:
    rates = {1: 0.1, 2: 0.1001, 4: 0.1002, 8: 0.2}  # a cliff that nothing announces
    points = [Point(n, n, 32 * n, (t, 1.001 * t, 0.999 * t)) for n, t in rates.items()]
    found = study(points, Wire(1e6), mode="weak", targets=(16,))
    topics = list(texts(found))
    assert topics.index("check") < topics.index("prediction")
