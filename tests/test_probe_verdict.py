"""What is made of a probe: compression, bucket sizes, sentences, and files that are broken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.errors import UsageError
from harness.probe_results import HOROVOD, HOROVOD_FP16, Operation, Results, Timing, read_results
from harness.probe_verdict import (
    Curve,
    Verdict,
    choose_buckets,
    compare,
    conclude,
    curve_of,
    judge,
)

SIZES = [4**k for k in range(1, 14)]
NETWORK = (1e-4, 1e-9)
"""α and β of float32."""


def results(
    none: tuple[float, float] = NETWORK,
    fp16: tuple[float, float] | None = (2e-4, 0.6e-9),
    *,
    noise: float = 0.1,
    rounds: int = 40,
    ranks: int = 2,
    seed: int = 0,
) -> Results:
    rng = np.random.default_rng(seed)
    timings = []
    for operation, line in ((HOROVOD, none), (HOROVOD_FP16, fp16)):
        for size in SIZES if line is not None else ():
            assert line is not None
            seconds = (line[0] + line[1] * size) * np.exp(noise * rng.standard_normal(rounds))
            timings.append(Timing(operation, size, ranks, tuple(seconds.tolist())))
    return Results(Path("probe.json"), {}, ranks, 1, tuple(timings), {})


def curve(alpha: float, beta: float) -> Curve:
    sizes = np.array(SIZES, dtype=np.float64)
    return Curve(sizes, np.tile(alpha + beta * sizes, (3, 1)))


def of(found: Results, operation: Operation) -> Curve:
    one = curve_of(found, operation)
    assert one is not None
    return one


# Compression


def test_fp16_pays_from_where_the_lines_cross() -> None:
    verdict = judge(results(noise=0.0))
    assert verdict.compression is not None
    assert verdict.compression.pays
    assert verdict.compression.threshold.value == pytest.approx(1e-4 / 0.4e-9)  # 244 KiB
    assert "fp16 pays for messages of 244 KiB and more" in " ".join(verdict.sentences())


def test_the_threshold_s_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    runs, covered = 100, 0
    for seed in range(runs):
        found = results(seed=seed)
        threshold = compare(of(found, HOROVOD), of(found, HOROVOD_FP16)).threshold
        covered += threshold.low <= 1e-4 / 0.4e-9 <= threshold.high
    assert covered >= 0.87 * runs


@pytest.mark.parametrize(
    ("fp16", "pays", "said"),
    [
        ((2e-4, 1.8e-9), False, "fp16 does not pay here: at 64 MiB it takes 1.8"),
        ((0.5e-4, 0.5e-9), True, "fp16 pays at every size measured: at 64 MiB it takes 0.50"),
        ((1e-4, 1e-9), None, "Whether fp16 pays for large messages is not clear here"),
    ],
)
def test_the_verdict_on_compression(
    fp16: tuple[float, float], pays: bool | None, said: str
) -> None:
    noise = 0.1 if pays is None else 0.0
    verdict = judge(results(fp16=fp16, noise=noise, seed=1))
    assert verdict.compression is not None
    assert verdict.compression.pays is pays
    assert said in " ".join(verdict.sentences())
    assert all(
        one.buckets.compression == ("fp16" if pays else "none") or one.gradient < 2**21
        for one in verdict.advice
    )


def test_fp16_may_pay_for_middling_sizes_only() -> None:
    slow, fast = results(noise=0.0), results(fp16=(1e-4, 2e-9), noise=0.0)
    mixed = [
        (fast if one.bytes == 4**13 else slow).timings[place]
        for place, one in enumerate(slow.timings)
    ]
    verdict = judge(Results(Path(), {}, 2, 1, tuple(mixed), {}))
    said = " ".join(verdict.sentences())
    assert "does not pay for the largest messages" in said
    assert "it does at 256 KiB, 1 MiB, 4 MiB, 16 MiB" in said
    assert verdict.compression is not None
    assert verdict.compression.threshold.value == math.inf
    assert verdict.as_dict()["fp16"]["from_bytes"] == [None, None, None]


# Buckets


@given(
    alpha=st.floats(1e-6, 1e-2),
    beta=st.floats(1e-11, 1e-7),
    gradient=st.floats(2**10, 2**32),
)
@settings(deadline=None)
def test_the_smallest_bucket_is_taken_that_costs_little(
    alpha: float, beta: float, gradient: float
) -> None:
    one = choose_buckets(gradient, curve(alpha, beta), "none")
    size = one.enough.value * 2**20

    def total(bucket: float) -> float:
        count = math.ceil(gradient / min(bucket, SIZES[-1]))
        return count * alpha + beta * max(gradient, 4 * count)

    least = total(SIZES[-1])  # as few as can be: with a line nothing is better
    assert one.seconds.value == pytest.approx(total(size))
    assert one.seconds.value <= 1.05 * least * (1 + 1e-9)
    assert one.best >= one.enough.value
    if one.enough.value > 1 / 16:
        assert total(size / 2) > 1.05 * least * (1 - 1e-9)


def test_a_line_s_bucket_is_about_20_alpha_over_beta() -> None:
    one = choose_buckets(2**30, curve(1e-4, 1e-9), "none")  # 20 α/β is 1.9 MiB
    assert one.enough.value == 2


def test_buckets_larger_than_a_cache_are_not_the_best() -> None:
    sizes = np.array(SIZES, dtype=np.float64)
    times = 1e-5 + np.where(sizes > 2**24, 3e-9, 1e-9) * sizes
    one = choose_buckets(2**28, Curve(sizes, np.tile(times, (3, 1))), "none")
    assert one.best == 16
    assert one.enough.value < 16


def test_a_small_gradient_is_one_bucket() -> None:
    one = choose_buckets(200_000, curve(1e-2, 1e-9), "none")
    assert one.enough.value == 0.25
    assert one.seconds.value == pytest.approx(1e-2 + 2e-4)


def test_what_is_not_clear_is_not_advised() -> None:
    for advice in judge(results(fp16=NETWORK, noise=0.3, rounds=10)).advice:
        assert advice.buckets.compression == "none" or advice.sure


# What there is


def test_one_rank_has_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judge(results(ranks=1))
    assert list(verdict.sentences()) == [
        "One rank has nobody to talk to: no verdict on the network."
    ]
    assert verdict.as_dict()["fp16"] is None


def test_without_fp16_buckets_are_still_told() -> None:
    verdict = judge(results(fp16=None))
    assert verdict.compression is None
    assert len(verdict.advice) == 3
    assert "no word on compression" in list(verdict.sentences())[-1]


def test_without_horovod_lines_are_all() -> None:
    found = [one for one in results().timings if one.operation == HOROVOD_FP16]
    verdict = judge(Results(Path(), {}, 2, None, tuple(found), {}))
    assert list(verdict.fits) == ["horovod_fp16"]
    assert verdict.advice == ()
    assert "no word on compression or buckets" in list(verdict.sentences())[-1]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([HOROVOD, HOROVOD_FP16]),
            st.integers(1, 2**28),
            st.lists(st.floats(1e-7, 1e2), min_size=2, max_size=6),
        ),
        min_size=1,
        max_size=16,
        unique_by=lambda one: one[:2],
    ),
    st.floats(1e-3, 1e4),
)
@settings(deadline=None, max_examples=40)
def test_every_probe_has_a_verdict_that_can_be_written(
    measured: list[tuple[Operation, int, list[float]]], gradient: float
) -> None:
    timings = tuple(Timing(op, size, 3, tuple(seconds)) for op, size, seconds in measured)
    verdict: Verdict = judge(Results(Path(), {}, 3, 2, timings, {}), [gradient])
    text = json.dumps(verdict.as_dict(), allow_nan=False)
    assert "nan" not in " ".join(verdict.sentences())
    assert len(text) > 10


# Files

GOOD: dict[str, Any] = {
    "ranks": 2,
    "left_out": {"torch Gloo": "no way"},
    "provenance": {"communication": {"hosts": [{}, {}]}},
    "timings": [
        {"operation": "horovod", "bytes": 4**k, "seconds": [1.0, 2.0, 3.0]} for k in range(1, 8)
    ],
}


def written(path: Path, content: Any) -> Path:
    path.joinpath("probe.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    return path


def test_a_probe_is_read_from_its_directory_or_file(tmp_path: Path) -> None:
    found = read_results(written(tmp_path, GOOD))
    assert (found.ranks, found.hosts, found.title) == (2, 2, "2 ranks on 2 hosts")
    assert found == read_results(tmp_path / "probe.json")
    assert found.rounds(HOROVOD)[4] == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("", "is not JSON"),
        (json.dumps(GOOD)[:100], "is not JSON; is it cut off"),
        ("[" * 100_000, "is not JSON"),
        ([], "an object is wanted"),
        ({}, "ranks must be a count, not None"),
        ({"ranks": True}, "ranks must be a count"),
        ({"ranks": 2}, "timings must be a list"),
        ({**GOOD, "timings": []}, "timings must be a list that is not empty"),
        ({**GOOD, "timings": [7]}, r"timings\[0\]: operation None is none of mpi_alone"),
        ({"bytes": 0}, "bytes must be a count, not 0"),
        ({"bytes": None}, "bytes must be a count"),
        ({"operation": "x"}, "operation 'x' is none of"),
        ({"seconds": [1.0]}, "seconds must be a list of 2 times or more"),
        ({"seconds": [1.0, None]}, "each above 0"),
        ({"seconds": [1.0, 0]}, "each above 0"),
        ({"seconds": [1.0, math.inf]}, "each above 0"),
        ({"bytes": 16}, "has one size of messages twice"),
    ],
)
def test_a_broken_probe_is_told_in_one_message(
    change: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(change, dict) and change and not change.keys() & {"ranks", "timings"}:
        change = {**GOOD, "timings": [{**GOOD["timings"][0], **change}, *GOOD["timings"][1:]]}
    written(tmp_path, change)
    with pytest.raises(UsageError, match=said):
        read_results(tmp_path)
    assert main(["probe", "--read", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("harness: ")
    assert told.out == ""


def test_what_was_written_is_printed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, GOOD)
    conclude(tmp_path, [8.0])
    first = capsys.readouterr().out
    assert main(["probe", "--read", str(tmp_path), "--gradient-mb", "8"]) == 0
    again = capsys.readouterr().out
    assert again.endswith(first)
    assert "torch Gloo is not measured: no way" in again
    assert "bus bandwidth" in again
