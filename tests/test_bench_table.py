"""A bench's tables: throughput, speed-up, efficiency, and batch × ranks."""

from __future__ import annotations

import io

import pytest
from benches import bench, point
from rich.console import Console

from harness.benchfile import Bench, Failure
from harness.benchtable import print_bench, scaling_series


def shown(found: Bench) -> str:
    stream = io.StringIO()
    print_bench(found, Console(file=stream, width=200))
    return stream.getvalue()


def row(text: str, *beginning: str) -> list[str]:
    """Cells of the first line that begins with these."""
    for line in text.splitlines():
        cells = line.split()
        if cells[: len(beginning)] == list(beginning):
            return cells
    raise AssertionError(f"no line begins with {beginning}:\n{text}")


def test_speed_up_and_efficiency_are_over_the_fewest_ranks() -> None:
    text = shown(bench(point(4, 3000.0), point(1, 1000.0), point(2, 1900.0)))
    assert row(text, "1")[-6:] == ["1.00", "100%", "32.0", "17%", "20.0%", "1"]
    assert row(text, "2")[-6:-4] == ["1.90", "95%"]
    assert row(text, "4")[-6:-4] == ["3.00", "75%"]


def test_a_series_need_not_begin_with_one_rank() -> None:
    text = shown(bench(point(4, 3000.0), point(8, 4500.0)))
    assert row(text, "8")[-6:-4] == ["1.50", "75%"]


def test_repeats_give_an_interval() -> None:
    text = shown(bench(point(1, 990.0, 1010.0), point(2, 2000.0)))
    assert "1,000 ± 127" in text  # 12.7 × the standard error of 10
    assert "95% interval of the mean over repeats (Student's t)" in text
    assert "±" not in " ".join(row(text, "2"))


def test_a_grid_is_shown_as_the_lars_paper_does() -> None:
    """You, Gitman and Ginsburg 2017, Tables 8 and 9: 3 × from the batch on 8 GPUs."""
    grid = bench(
        point(4, 6627.0, micro=128, batch=512),
        point(8, 5771.0, micro=64, batch=512),
        point(4, 6585.0, micro=1024, batch=4096),
        point(8, 15379.0, micro=512, batch=4096),
        mode="grid",
        settings={"scaling": "strong"},
    )
    text = shown(grid)
    over_batch = text[text.index("speed-up over a batch of 512") :]
    over_ranks = text[text.index("speed-up over 4 ranks") :]
    assert row(over_batch, "4,096") == ["4,096", "0.99", "2.66"]
    assert row(over_ranks, "512") == ["512", "1.00", "0.87"]
    assert row(over_ranks, "4,096") == ["4,096", "1.00", "2.34"]
    assert "8 ranks" in text


def test_a_weak_series_has_no_grid() -> None:
    assert "speed-up over" not in shown(bench(point(1, 1000.0), point(2, 1900.0)))


def test_series_are_those_that_were_asked_for() -> None:
    shared, other, small = point(2, 5.0, micro=8), point(1, 3.0, micro=8), point(1, 2.0, micro=4)
    listed = {"series": [[other.name, shared.name], [small.name, shared.name, "r0009-gone"]]}
    found = scaling_series(bench(shared, other, small, mode="grid", settings=listed))
    assert found == [[other, shared], [small, shared]]


def test_without_them_points_of_one_kind_make_a_series() -> None:
    points = (point(1, 5.0), point(2, 9.0), point(2, 8.0, micro=8), point(1, 4.0, micro=8))
    found = scaling_series(bench(*points, mode="grid"))
    assert [[p.name for p in series] for series in found] == [
        ["r0001-a0001-m0008", "r0002-a0001-m0008"],
        ["r0001-a0001-m0032", "r0002-a0001-m0032"],
    ]


def test_what_is_missing_is_told() -> None:
    partial = bench(
        point(1, 1000.0),
        flops_per_image=None,
        status="partial",
        order=(("r0001-a0001-m0032", 0), ("r0002-a0001-m0032", 0)),
        failures=(Failure("r0002-a0001-m0032", 0, "rank 1 was killed"),),
    )
    text = shown(partial)
    assert "partial: 1 of 2 repeats are not measured" in text
    assert "r0002-a0001-m0032, repeat 0 failed: rank 1 was killed" in text
    assert "FLOP" not in text


def test_nothing_at_all_can_be_shown() -> None:
    assert "partial: 0 of 0" in shown(bench(status="partial"))


@pytest.mark.parametrize(("flops", "text"), [(2.0e6, "2 MFLOP"), (24.6e9, "24.6 GFLOP")])
def test_flops_have_a_unit(flops: float, text: str) -> None:
    assert f"{text} an image" in shown(bench(point(1, 9.0), flops_per_image=flops))
