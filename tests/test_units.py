"""Durations: reading and writing them, and where their multiples lie."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.units import Duration, Unit

decimals = st.decimals(0, 10**6, allow_nan=False, allow_infinity=False, places=6)
durations = st.one_of(
    st.builds(Duration, decimals.map(Fraction), st.just("ep")),
    st.builds(Duration, st.integers(0, 10**15).map(Fraction), st.sampled_from(["up", "sa"])),
)
periods = durations.filter(bool)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5ep", Fraction(5), "ep"),
        (" 5 ep ", Fraction(5), "ep"),
        ("2.5ep", Fraction(5, 2), "ep"),
        ("0.1ep", Fraction(1, 10), "ep"),
        ("200up", Fraction(200), "up"),
        ("200.0up", Fraction(200), "up"),
        ("50000sa", Fraction(50000), "sa"),
    ],
)
def test_reads(text: str, value: Fraction, unit: Unit) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize(
    "text",
    [
        5, 5.0, True, None, [], {}, "", "5", "ep", "5 epochs", "-5ep", "+5ep", "1e3up", ".5ep",
        "5.ep", "5EP", "5ep 3up", "nanep", "infep", "٣ep", "5\nep", "9" * 5000 + "ep", 10**4000,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_refuses_with_the_valid_forms_on_one_short_line(text: object) -> None:
    with pytest.raises(
        ValueError, match=r"is not a duration; write .* 5ep .* 200up .* 50000sa"
    ) as e:
        Duration.parse(text)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 200


@pytest.mark.parametrize("text", ["1.5up", "0.1sa"])
def test_only_epochs_may_be_fractional(text: str) -> None:
    with pytest.raises(ValueError, match="only epochs may be fractional"):
        Duration.parse(text)


def test_a_duration_parses_to_itself() -> None:
    duration = Duration(Fraction(5), "ep")
    assert Duration.parse(duration) is duration


@given(durations)
def test_writing_and_reading_is_the_identity(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration


@given(
    st.from_regex(r"\A[0-9]{1,18}(\.[0-9]{1,18})?ep\Z", fullmatch=True).filter(str.isascii),
)
def test_every_digit_survives(text: str) -> None:
    assert Duration.parse(str(Duration.parse(text))) == Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "written"), [("0.00001ep", "0.00001ep"), ("2.50ep", "2.5ep"), ("100ep", "100ep")]
)
def test_is_written_without_exponent_or_needless_digits(text: str, written: str) -> None:
    assert str(Duration.parse(text)) == written


def test_zero_is_false() -> None:
    assert not Duration.parse("0.0ep")
    assert Duration.parse("0.001ep")


@pytest.mark.parametrize(
    ("text", "index", "place"),
    [
        ("1ep", 3, 4311),
        ("0.5ep", 1, 719),  # 718.5: the first whole sample at or after it
        ("0.5ep", 2, 1437),
        ("0.1ep", 10, 1437),  # ten tenths are one, unlike in floats
        ("100sa", 7, 700),
        ("9up", 7, 63),
    ],
)
def test_multiples(text: str, index: int, place: int) -> None:
    assert Duration.parse(text).boundary(index, 1437) == place


@given(periods, st.integers(1, 10**6), st.integers(1, 10**9))
def test_a_multiple_has_passed_from_its_boundary_on(
    period: Duration, index: int, size: int
) -> None:
    def passed(place: int) -> int:
        return period.passed(place, place, size)  # only the one of its unit counts

    place = period.boundary(index, size)
    assert passed(place) >= index
    assert passed(place - 1) < index


@given(decimals.filter(bool).map(Fraction), st.integers(0, 10**12), st.integers(1, 10**9))
def test_passed_epochs_are_exact(epochs: Fraction, samples: int, size: int) -> None:
    passed = Duration(epochs, "ep").passed(samples, 0, size)
    assert passed * epochs <= Fraction(samples, size) < (passed + 1) * epochs


@given(periods, st.integers(0, 1000), st.integers(1, 10**9))
def test_boundaries_are_whole_and_never_early(period: Duration, index: int, size: int) -> None:
    exact = index * period.value * (size if period.unit == "ep" else 1)
    assert period.boundary(index, size) == ceil(exact)
