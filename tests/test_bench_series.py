"""Which points a bench has, how they are set, in which order they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import RECIPES, ROOT

from harness.benchseries import Shape, Wanted, overrides, series, shuffled
from harness.config import load_config
from harness.errors import ConfigError
from harness.schedule.plan import decompose
from harness.schema import Config

CONFIG = ROOT / "configs" / "adabatch-digits.yaml"
"""64 = 2 × 1 × 32."""
COUNTS = st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True).map(tuple)


def config(*settings: str) -> Config:
    return load_config(CONFIG, settings)


def shapes(wanted: Wanted, *settings: str) -> list[str]:
    return [str(shape) for shape in series(config(*settings), wanted).shapes]


def test_weak_scaling_keeps_what_a_rank_of_the_configuration_has() -> None:
    assert shapes(Wanted((1, 2, 4))) == ["32 = 1 × 1 × 32", "64 = 2 × 1 × 32", "128 = 4 × 1 × 32"]
    found = shapes(Wanted((1, 4)), "batch.micro=8", "ranks.start=2")
    assert found == ["32 = 1 × 4 × 8", "128 = 4 × 4 × 8"]


def test_strong_scaling_keeps_the_global_batch() -> None:
    found = shapes(Wanted((1, 2, 3, 4), "strong"))
    assert found == ["64 = 1 × 2 × 32", "64 = 2 × 1 × 32", "64 = 3 × 1 × 22", "64 = 4 × 1 × 16"]


def test_batches_make_a_grid_as_the_lars_paper_has_it() -> None:
    """Tables 8 and 10: batches of 512 and 4,096, each in one piece a GPU, on 4 and 8."""
    found = series(config(), Wanted((4, 8), None, (), (1,), (512, 4096)))
    assert (found.mode, found.scaling) == ("grid", "strong")
    assert [str(shape) for group in found.groups for shape in group] == [
        *("512 = 4 × 1 × 128", "512 = 8 × 1 × 64"),
        *("4,096 = 4 × 1 × 1024", "4,096 = 8 × 1 × 512"),
    ]


@given(COUNTS, COUNTS, COUNTS)
def test_weak_series_have_as_many_images_per_rank(
    ranks: tuple[int, ...], micros: tuple[int, ...], accumulations: tuple[int, ...]
) -> None:
    found = series(config(), Wanted(ranks, "weak", micros, accumulations))
    assert len(found.groups) == len(micros) * len(accumulations)
    assert found.mode == ("weak" if len(found.groups) == 1 else "grid")
    for group in found.groups:
        assert {one.ranks for one in group} == set(ranks)
        assert len({one.global_batch / one.ranks for one in group}) == 1


@given(COUNTS, st.lists(st.integers(64, 5000), min_size=1, max_size=3).map(tuple), COUNTS)
def test_strong_points_can_be_cut(
    ranks: tuple[int, ...], batches: tuple[int, ...], micros: tuple[int, ...]
) -> None:
    found = series(config(), Wanted(ranks, "strong", micros, (), batches))
    assert len({shape.name for shape in found.shapes}) == len(found.shapes)
    for shape in found.shapes:
        pieces = decompose(shape.global_batch, shape.micro_batch, shape.ranks)
        assert pieces.accumulation == shape.accumulation
        assert shape.ranks * shape.micro_batch * shape.accumulation >= shape.global_batch
        assert shape.micro_batch <= max(micros)
        assert shape.global_batch in batches


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted((1,), "weak", (), (), (64,)), "--batches are global batches"),
        (Wanted((1,), "strong", (8,), (2,)), "one follows from the other"),
        (Wanted((128,), "strong"), "64 is less than one image for each of 128 ranks"),
        (Wanted((4,), "strong", (), (32,)), "cannot be cut into 4 ranks × 32"),
    ],
)
def test_what_cannot_be_cut_is_refused(wanted: Wanted, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        series(config(), wanted)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_measured(path: Path) -> None:
    found = series(load_config(path), Wanted((1, 2)))
    for shape in found.shapes:
        laid: Any = load_config(path, overrides(shape, 3))
        assert (laid.batch.initial, laid.batch.micro_batch) == (
            shape.global_batch,
            shape.micro_batch,
        )
        assert laid.batch.growth.policy == "fixed"
        assert (laid.ranks.start, laid.ranks.ceiling, laid.ranks.threads) == (shape.ranks,) * 2 + (
            3,
        )
        assert (laid.train.log_every, laid.train.eval_every, laid.train.checkpoint_every) == (
            1,
            None,
            None,
        )


def test_a_growth_with_limits_can_be_measured() -> None:
    shape = Shape(2, 64, 32, 1)
    settings = ("batch.growth={policy: noise}", "batch.multiple_of=64", "lr.max=0.1", "lr.min=0.01")
    laid = load_config(CONFIG, (*settings, *overrides(shape, 1)))
    assert laid.batch.growth.policy == "fixed"
    assert laid.lr.min == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9)), unique=True), st.integers())
def test_the_order_follows_from_the_seed_alone(pairs: list[tuple[str, int]], seed: int) -> None:
    once = shuffled(pairs, seed)
    assert sorted(once) == sorted(pairs)
    assert shuffled(list(reversed(pairs)), seed) == once


def test_seeds_differ() -> None:
    pairs = [("a", number) for number in range(20)]
    assert len({shuffled(pairs, seed) for seed in range(5)}) == 5
    assert shuffled(pairs, 0) != tuple(pairs)
