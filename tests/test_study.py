"""Studies: their cells, what runs tell, the laws of verdicts, resuming, one of them end to end."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakeslurm import fake_slurm
from fuzzing import command, fuzz, hostile
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, STUDIES

from harness.config import load_config
from harness.errors import ConfigError
from harness.rundir import RunDirectory
from harness.scaling.interval import Interval
from harness.study.cells import Arm, Cell, Study, load_study
from harness.study.figure import mean_curve
from harness.study.page import Results, edge_values
from harness.study.runs import Measured, box_cox, measure, power_law, state
from harness.study.schema import StudyFile, Target
from harness.study.verdicts import Judge, critical_batch, judge, summed
from harness.yamlfile import dump_yaml
from launch.study import Runner, chosen_values, collect

BASE = ROOT / "configs" / "studies" / "_base.yaml"
NUMBERS = st.floats(-1e6, 1e6)


def study_of(folder: Path, fast: bool = False, **changes: Any) -> Study:
    """A small study, with some keys of its own."""
    data: dict[str, Any] = {
        "name": "small",
        "title": "A small study",
        "question": "Does it run?",
        "base": str(BASE),
        "set": {"train.duration": "1ep", "batch.initial": 256, "batch.micro": 64},
        "variants": {"plain": {}, "momentum": {"optimizer.momentum": 0.9}},
        "seeds": [0, 1],
        "table": ["accuracy", "updates"],
        "figure": [{"kind": "points", "y": "accuracy"}],
        "findings": [{"kind": "best", "of": "accuracy", "says": "Momentum helps"}],
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(dump_yaml({k: v for k, v in data.items() if v is not None}), encoding="utf-8")
    return load_study(path, fast)


def finished(run: RunDirectory, accuracy: float, updates: int = 100, kind: str = "end") -> None:
    """Records of a run that is over."""
    run.path.mkdir(parents=True, exist_ok=True)
    windows = [
        {
            "update": n,
            "samples_seen": 10 * n,
            "epoch": n / 10,
            "loss": 1 / n,
            "noise_scale": 20.0 + n,
            "distance_from_init": math.log(n + 1),
            "global_batch": 10,
            "images_per_sec": 100.0,
        }
        for n in range(1, updates + 1)
    ]
    events = [
        {
            "kind": "evaluation",
            "update": n,
            "samples_seen": 10 * n,
            "epoch": n / 10,
            "accuracy": accuracy * n / updates,
            "loss": 2.0 - n / updates,
        }
        for n in range(10, updates + 1, 10)
    ]
    last = {"kind": kind, "update": updates, "samples_seen": 10 * updates, "seconds": 2.0}
    for path, lines in ((run.metrics, windows), (run.events, [*events, last])):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# The grid


class TestCells:
    def test_are_variants_times_grid_times_seeds(self, tmp_path: Path) -> None:
        study = study_of(tmp_path, grid={"batch.initial": [64, 128], "lr.base": [0.1, 0.2, 0.3]})
        cells = study.final_cells({})
        assert len(cells) == study.size[1] == 2 * 6 * 2
        asked = {(c.arm.variant, *(v for _, v in c.arm.point), c.seed) for c in cells}
        axes = (["plain", "momentum"], [64, 128], [0.1, 0.2, 0.3], [0, 1])
        assert asked == set(itertools.product(*axes))
        for cell in cells:
            batch, rate = (value for _, value in cell.arm.point)
            assert (cell.config.batch.initial, cell.config.lr.base) == (batch, rate)
            assert cell.config.seed == cell.seed
            assert cell.config.optimizer.momentum == 0.9 * (cell.arm.variant == "momentum")

    def test_with_the_same_configuration_are_one_run(self, tmp_path: Path) -> None:
        study = study_of(tmp_path, variants={"a": {}, "b": {"lr.base": 0.1}, "c": {"lr.base": 1.0}})
        assert study.size == (0, 6)
        assert [cell.arm.variant for cell in study.final_cells({})] == ["a", "a", "c", "c"]

    def test_have_a_directory_of_their_own_that_a_new_name_does_not_change(
        self, tmp_path: Path
    ) -> None:
        before = study_of(tmp_path).final_cells({})[0]
        (tmp_path / before.name).mkdir()
        renamed = study_of(tmp_path, variants={"renamed": {}}).final_cells({})[0]
        assert renamed.name != before.name
        assert renamed.directory(tmp_path).path == before.directory(tmp_path).path
        changed = study_of(tmp_path, set={"train.duration": "2ep"}).final_cells({})[0]
        assert changed.directory(tmp_path).path != before.directory(tmp_path).path

    def test_keep_their_directory_when_the_schema_gets_a_key(self, tmp_path: Path) -> None:
        """What a key's default says, said or not, is the same run."""
        (first, *_) = study_of(tmp_path).final_cells({})
        spelt = {"train.duration": "1ep", "batch.initial": 256, "batch.micro": 64}
        (same, *_) = study_of(tmp_path, set={**spelt, "optimizer.nesterov": False}).final_cells({})
        assert same.digest == first.digest

    def test_the_data_set_may_stand_for_its_size(self, tmp_path: Path) -> None:
        axes = {"batch.initial": ["dataset-size/4", "dataset-size"]}
        study = study_of(tmp_path, grid=axes, set={"train.duration": "1ep"})
        assert study.grid == {"batch.initial": [360, 1437]}
        other = {"data": {"dataset": "mnist", "root": "."}}
        assert study_of(tmp_path, grid=axes, set=other).grid == {"batch.initial": [15000, 60000]}

    def test_quick_takes_the_place_of_what_it_names(self, tmp_path: Path) -> None:
        quick = {"seeds": [5], "variants": ["momentum"], "set": {"train.duration": "3up"}}
        study = load_study(write(tmp_path, quick=quick), quick=True)
        (cell,) = study.final_cells({})
        assert (cell.seed, cell.arm.variant) == (5, "momentum")
        assert str(cell.config.train.duration) == "3up"
        assert cell.config.batch.initial == 256  # of the study's own settings

    def test_that_are_tuned_wait_for_their_trials(self, tmp_path: Path) -> None:
        tune = {"key": "lr.base", "values": [0.1, 0.2, 0.4], "seeds": [100]}
        study = study_of(tmp_path, tune=tune)
        assert study.size == (6, 4)
        trials = study.trial_cells()
        assert len(trials) == 6
        assert study.final_cells(chosen_values(study, tmp_path)) == []
        for cell in trials[:3]:  # those of the first variant; the middle one is best
            finished(cell.directory(tmp_path), 0.9 if cell.trial == 0.2 else 0.5)
        chosen = chosen_values(study, tmp_path)
        assert chosen == {Arm("plain"): 0.2}
        finals = study.final_cells(chosen)
        assert [cell.arm.variant for cell in finals] == ["plain", "plain"]
        assert all(cell.config.lr.base == 0.2 for cell in finals)

    def test_two_keys_are_tuned_together(self, tmp_path: Path) -> None:
        pairs = [(0.1, 0.8), (0.2, 0.8), (0.1, 0.95), (0.4, 0.9)]
        values = [{"lr.base": rate, "optimizer.momentum": m} for rate, m in pairs]
        tune = {"key": "lr.base", "values": values, "seeds": [100]}
        study = study_of(tmp_path, tune=tune, variants={"plain": {}})
        trials = study.trial_cells()
        found = [(one.config.lr.base, one.config.optimizer.momentum) for one in trials]
        assert found == pairs
        assert len({one.name for one in trials}) == 4
        for cell in trials:
            finished(cell.directory(tmp_path), 0.9 if cell.trial == values[1] else 0.5)
        chosen = chosen_values(study, tmp_path)
        assert chosen == {Arm("plain"): values[1]}
        for cell in study.final_cells(chosen):
            assert (cell.config.lr.base, cell.config.optimizer.momentum) == pairs[1]
        results = Results(study, chosen)
        assert edge_values(results) == ["plain (0.8)"]  # the momentum; the rate lies between

    def test_null_is_tried_as_any_value(self, tmp_path: Path) -> None:
        tune = {"key": "batch.max", "values": [None, 512], "seeds": [100]}
        base = {"train.duration": "1ep", "batch.initial": 256, "batch.micro": 64, "batch.max": 256}
        study = study_of(tmp_path, tune=tune, variants={"plain": {}}, set=base)
        trials = study.trial_cells()
        assert [one.config.batch.max for one in trials] == [None, 512]
        for cell in trials:
            finished(cell.directory(tmp_path), 0.9 if cell.config.batch.max is None else 0.5)
        finals = study.final_cells(chosen_values(study, tmp_path))
        assert [one.config.batch.max for one in finals] == [None, None]

    @pytest.mark.parametrize(
        ("variants", "values", "message"),
        [
            ({"a": {"optimizer.momentum": 0.5}}, [{"lr.base": 1, "optimizer.momentum": 0.8}] * 2,
             "stands there twice"),
            ({"a": {"optimizer.momentum": 0.5}},
             [{"lr.base": 1, "optimizer.momentum": 0.8}, {"lr.base": 2, "optimizer.momentum": 0.8}],
             "variants.a: optimizer.momentum is what is tuned"),
            ({"a": {}}, [{"lr.base": 1, "Momentum!": 0.8}, 2], "is no configuration key"),
            ({"a": {}}, [{"lr.base": 1, "seed": 3}, 2], "seed is the study's own"),
        ],
    )  # fmt: skip
    def test_keys_of_a_trial_are_checked_as_any(
        self, variants: dict[str, Any], values: list[Any], message: str, tmp_path: Path
    ) -> None:
        tune = {"key": "lr.base", "values": values, "seeds": [100]}
        with pytest.raises(ConfigError, match=re.escape(message)):
            study_of(tmp_path, tune=tune, variants=variants)

    def test_a_trial_that_has_diverged_is_never_chosen(self, tmp_path: Path) -> None:
        tune = {"key": "lr.base", "values": [0.1, 0.2], "seeds": [100]}
        study = study_of(tmp_path, tune=tune, variants={"plain": {}})
        first, second = study.trial_cells()
        finished(first.directory(tmp_path), 0.1)
        finished(second.directory(tmp_path), 0.9, kind="diverged")
        assert chosen_values(study, tmp_path) == {Arm("plain"): 0.1}

    def test_tuned_at_one_point_take_its_value_to_all(self, tmp_path: Path) -> None:
        tune = {
            "key": "lr.base",
            "values": [0.1, 0.2],
            "seeds": [100],
            "at": {"batch.initial": 64},
        }
        study = study_of(tmp_path, tune=tune, grid={"batch.initial": [64, 128]})
        assert study.size == (4, 8)
        assert {dict(cell.arm.point)["batch.initial"] for cell in study.trial_cells()} == {64}
        at_first = {Arm(v, (("batch.initial", 64),)): 0.2 for v in ("plain", "momentum")}
        assert len(study.final_cells(at_first)) == 8


def write(folder: Path, **changes: Any) -> Path:
    study_of(folder, **changes)
    return folder / "small.yaml"


# What records tell


def test_a_run_is_measured_by_its_records(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert state(run) == "missing"
    assert measure(run, None).metrics == {}
    finished(run, 0.8)
    found = measure(run, Target(of="accuracy", value=0.4), 0.25)
    assert found.state == "done"
    told = {k: v for k, v in found.metrics.items() if v is not None}
    assert told["accuracy"] == told["best_accuracy"] == 0.8
    assert told["error"] == pytest.approx(0.2)
    assert (told["updates"], told["samples"], told["seconds"]) == (100, 1000, 2.0)
    assert (told["updates_to_target"], told["samples_to_target"]) == (50, 500)
    assert told["noise_to_target"] == np.median(20.0 + np.arange(1, 51))
    assert told["images_per_sec"] == 500.0
    assert told["tuned"] == 0.25
    assert told["diverged"] == 0.0
    # The mean loss of updates 91 to 100.
    assert told["train_loss"] == pytest.approx(np.mean(1 / np.arange(91, 101)))


def test_a_run_that_has_diverged_says_so_and_has_no_length(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    finished(run, 0.1, kind="diverged")
    found = measure(run, Target(value=0.5))
    assert found.state == "diverged"
    assert (found.metrics["diverged"], found.metrics["accuracy"]) == (1.0, 0.1)
    assert found.metrics["updates"] is None
    assert (found.metrics["reached"], found.metrics["updates_to_target"]) == (0.0, None)


@pytest.mark.parametrize("q", [-0.5, 0.0, 0.3, 0.5, 1.0])
def test_the_exponent_of_a_distance_is_found(q: float) -> None:
    t = np.geomspace(10, 10_000, 50)
    d = 3.0 + 0.7 * (np.log(t) if q == 0 else (t**q - 1) / q)
    exponent, misfit = box_cox(t, d)
    assert exponent == pytest.approx(q, abs=1e-3)
    assert (misfit < 1e-9) == (q == 0)


@given(st.floats(0.05, 1.5), st.floats(0.01, 100))
def test_a_power_law_is_found(power: float, factor: float) -> None:
    t = np.geomspace(10, 10_000, 50)
    found, misfit = power_law(t, factor * t**power)
    assert found == pytest.approx(power)
    assert misfit < 1e-9


@given(st.floats(4, 4000), st.floats(5, 5000))
def test_the_critical_batch_is_found(critical: float, smallest: float) -> None:
    curve = {b: smallest * (1 + critical / b) for b in (16.0, 64.0, 256.0, 1024.0)}
    found = critical_batch(curve)
    assert found is not None
    assert found == pytest.approx((critical, smallest), rel=1e-6)


def test_no_critical_batch_where_nothing_bends() -> None:
    assert critical_batch({16.0: 100.0, 32.0: 50.0}) is None
    assert critical_batch({16.0: 100.0, 32.0: 110.0, 64.0: 130.0}) is None  # updates rise


def test_a_mean_curve_covers_what_all_have() -> None:
    a = (np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    b = (np.array([2.0, 3.0, 4.0]), np.array([4.0, 5.0, 6.0]))
    mean = mean_curve([a, b])
    assert mean is not None
    x, y = mean
    assert (x[0], x[-1]) == (2.0, 3.0)
    assert y == pytest.approx(x + 1.0)
    assert mean_curve([]) is None
    assert mean_curve([a, (b[0] + 5, b[1])]) is None


# Verdicts


@given(NUMBERS, st.floats(0, 1e6), NUMBERS, st.floats(0, 1e6))
def test_a_verdict_is_about_the_whole_interval(
    low: float, width: float, floor: float, room: float
) -> None:
    high, ceiling = low + width, floor + room
    verdict = judge(Interval((low + high) / 2, low, high), floor, ceiling)
    inside = [floor <= x <= ceiling for x in np.linspace(low, high, 9)]
    if verdict == "holds":
        assert all(inside)
    elif verdict == "does not hold":
        assert not any(inside)
    else:
        assert not (floor <= low and high <= ceiling)


@given(NUMBERS, st.floats(0, 1e6), st.floats(0, 1e6), NUMBERS)
def test_a_narrower_interval_never_turns_a_verdict_round(
    middle: float, half: float, less: float, floor: float
) -> None:
    narrow = min(half, less)
    wide = judge(Interval(middle, middle - half, middle + half), floor, math.inf)
    close = judge(Interval(middle, middle - narrow, middle + narrow), floor, math.inf)
    assert wide in ("undecided", close)


def test_one_seed_decides_nothing() -> None:
    assert judge(Interval(5.0), -math.inf, math.inf) == "undecided"
    assert judge(None, -math.inf, math.inf) == "undecided"


def test_points_are_summed_up() -> None:
    assert summed([]) == "undecided"
    assert summed(["holds", "holds"]) == "holds"
    assert summed(["holds", "undecided", "holds"]) == "in part: holds at 2, undecided at 1 of 3"


def judged(folder: Path, a: list[float | None], b: list[float | None], **finding: Any) -> str:
    study = study_of(
        folder,
        seeds=list(range(len(a))),
        findings=[{"says": "so", "of": "accuracy", "a": "plain", "b": "momentum", **finding}],
    )
    runs = {
        (Arm(name), seed): Measured("done", {"accuracy": value})
        for name, values in (("plain", a), ("momentum", b))
        for seed, value in enumerate(values)
    }
    (found,) = Judge(study, runs).all()
    return found.verdict


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Seeds that scatter far more than the difference do not hide it."""
    b: list[float | None] = [0.1, 0.5, 0.9, 0.3]
    a: list[float | None] = [0.11, 0.512, 0.911, 0.309]
    case: dict[str, Any] = {"kind": "difference", "expect": "more"}
    assert judged(tmp_path, a, b, **case) == "holds"
    assert judged(tmp_path, b, a, **case) == "does not hold"
    assert judged(tmp_path, a, b, **case, by=0.0105) == "undecided"
    assert judged(tmp_path, a, b, kind="difference", expect="within", by=0.02) == "holds"
    assert judged(tmp_path, b, a, kind="difference", expect="not_worse", by=0.02) == "holds"
    assert judged(tmp_path, b, a, kind="difference", expect="not_worse", by=0.001) == (
        "does not hold"
    )
    assert judged(tmp_path, [a[0], *[None] * 3], b, **case) == "undecided"


def test_what_is_equal_is_neither_less_nor_more(tmp_path: Path) -> None:
    same: list[float | None] = [0.5, 0.6]
    for expect in ("less", "more"):
        assert judged(tmp_path, same, same, kind="difference", expect=expect) == "does not hold"
    assert judged(tmp_path, same, same, kind="difference", expect="within") == "holds"


def test_ratios_are_of_geometric_means(tmp_path: Path) -> None:
    b: list[float | None] = [0.1, 0.2, 0.4]
    a = [None if v is None else 2 * v for v in b]
    assert judged(tmp_path, a, b, kind="ratio", expect="at_least", by=1.99) == "holds"
    assert judged(tmp_path, a, b, kind="ratio", expect="at_most", by=1.99) == "does not hold"
    assert judged(tmp_path, a, b, kind="ratio", expect="within", by=2.01) == "holds"


def test_a_limit_is_where_a_variant_first_fails(tmp_path: Path) -> None:
    finding = {
        "kind": "limit",
        "of": "accuracy",
        "a": "momentum",
        "b": "plain",
        "by": 0.02,
        "says": "further",
    }
    study = study_of(tmp_path, grid={"batch.initial": [64, 128, 256]}, findings=[finding])
    accuracies = {"plain": [0.9, 0.5, 0.9], "momentum": [0.9, 0.89, 0.2]}
    runs = {
        (Arm(name, point), seed): Measured("done", {"accuracy": value})
        for name, values in accuracies.items()
        for point, value in zip(study.points, values, strict=True)
        for seed in study.seeds
    }
    (found,) = Judge(study, runs).all()
    assert found.verdict == "holds"
    assert found.lines[0].interval == Interval(1.0, 1.0, 1.0)
    assert "momentum to 128; plain to 64" in found.lines[0].text


# Bad files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds: must be a list of 1 or more"),
        ({"seeds": [1, 1]}, "seeds: 1 stands there twice"),
        ({"seedz": [1]}, "seedz: unknown key"),
        ({"title": None}, "title: missing, but needed"),
        ({"base": "nowhere.yaml"}, "base: no such file"),
        ({"variants": {}}, "variants: must be a mapping"),
        ({"variants": {"a b": {}}}, "is no name"),
        ({"variants": {"plain": {"seed": 3}}}, "seed is the study's own"),
        ({"set": {"lr.bse": 1}}, "lr.bse: unknown key; did you mean 'base'"),
        ({"set": {"batch.initial": 0}}, "batch.initial: must be at least 1"),
        ({"table": ["acuracy"]}, "must be one of accuracy"),
        ({"table": ["updates_to_target"]}, "target: missing, but needed"),
        ({"figure": [{"kind": "lines", "y": "accuracy"}]}, "must be a key of the grid"),
        ({"findings": [{"kind": "guess", "says": "x"}]}, "findings.0.kind: must be one of"),
        ({"grid": {"batch.initial": 64}}, "batch.initial: must be a list of values"),
        ({"grid": {"batch.growth": [{"policy": "fixed"}]}}, "batch.growth: must be plain values"),
        ({"quick": {"grid": {"lr.base": [1]}}}, "quick.grid: must have the keys of the grid"),
        (
            {"tune": {"key": "lr.base", "values": {"plain": [1, 2, 3], "momentum": [1, 2]}}},
            "the same number of trials",
        ),
        (
            {"tune": {"key": "lr.base", "values": [0.1, 0.2], "seeds": [0]}},
            "tune.seeds: the seeds of tune must be others",
        ),
        ({"tune": {"key": "lr.base", "values": {}}}, "tune.values: must be a list of two or more"),
        ({"tune": {"key": "lr.base", "values": [1]}}, "for each variant, not of one"),
        ({"tune": {"key": "lr base", "values": [1, 2]}}, "tune.key: 'lr base' is no configuration"),
        (
            {"tune": {"key": "lr.base", "values": [0.1, 0.2], "seeds": [5, 5]}},
            "tune.seeds: 5 stands there twice",
        ),
        (
            {"tune": {"key": "lr.base", "values": [0.1, 0.2]}, "quick": {"seeds": [100]}},
            "quick.seeds: the seeds of tune must be others",
        ),
        ({"tune": {"key": "lr.base", "values": [1, 2], "by": ["error"]}}, "must be one of"),
        ({"table": [["accuracy"]]}, "must be one of accuracy"),
        ({"table": [{"accuracy": 1}]}, "must be one of accuracy"),
        ({"base": "a" * 900}, "base: no such file"),
        ({"grid": {"lr.base": list(range(1, 6000))}}, "runs are more than 10,000"),
        (
            {"grid": {key: list(range(1, 9000)) for key in ("lr.base", "lr.min", "lr.max")}},
            "2,915,028,107,996 runs are more than 10,000",
        ),
    ],
)
def test_a_bad_file_is_answered_in_one_message(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        study_of(tmp_path, **changes)
    assert message in str(caught.value)
    assert "small.yaml" in str(caught.value)


def test_findings_name_variants_that_there_are(tmp_path: Path) -> None:
    finding = {"kind": "level", "of": "accuracy", "a": "plane", "expect": "at_most", "value": 1}
    with pytest.raises(ConfigError, match="there is no variant 'plane'; there are plain, momentum"):
        study_of(tmp_path, findings=[{**finding, "says": "x"}])


_RAW = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(StudyFile.model_fields, hostile),
)


@fuzz(40)
@given(changes=_RAW)
def test_any_values_end_in_a_plan_or_in_one_message(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("study")
    path = write(folder)
    whole = {**json.loads(json.dumps(load_raw(path))), **changes}
    try:
        path.write_text(dump_yaml(whole), encoding="utf-8")
    except (ValueError, UnicodeError, OverflowError):
        return
    said = command("study", path, "--dry-run")
    assert said.code in (0, 2), said
    if said.code == 2:
        assert said.err.startswith("harness: ")
        assert all(line.isprintable() for line in said.err.splitlines()), said.err


def load_raw(path: Path) -> Any:
    from harness.yamlfile import read_yaml

    return read_yaml(path).data


# Those that come along


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_come_along_can_run(path: Path) -> None:
    full, quick = load_study(path), load_study(path, quick=True)
    assert full.name == path.stem
    trials, finals = quick.size
    assert 0 < trials + finals <= 24
    assert sum(full.size) > sum(quick.size)
    assert len(full.seeds) >= 3  # else no interval is worth its name


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_another_data_set_is_one_line(path: Path, tmp_path: Path) -> None:
    text = path.read_text("utf-8").replace("base: ", f"base: {path.parent}/", 1)
    lines = [line for line in text.splitlines() if "dataset: digits" in line]
    assert len(lines) == 1
    changed = "  data: {dataset: mnist, root: ., augment: false}"
    (tmp_path / path.name).write_text(text.replace(lines[0], changed), encoding="utf-8")
    study = load_study(tmp_path / path.name)
    assert {cell.config.data.dataset for cell in study.trial_cells()} <= {"mnist"}


# Running


@pytest.mark.slow
def test_a_study_runs_is_killed_and_goes_on(tmp_path: Path) -> None:
    """Killed in the middle, what was done is not done again, and the results are as if nothing had
    happened."""
    path = write(
        tmp_path,
        set={"train.duration": "4ep", "train.checkpoint_every": "1ep", "batch.initial": 64},
    )
    words = [sys.executable, "-m", "harness", "study", str(path), "--jobs", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [*words, "-o", str(killed)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[1/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    first = {p.parent.name: p.stat().st_mtime_ns for p in killed.glob("cells/*/metrics.jsonl")}
    again = subprocess.run(
        [*words, "-o", str(killed)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "3 to do" in again.stdout
    done = next(iter(first))
    assert (killed / "cells" / done / "metrics.jsonl").stat().st_mtime_ns == first[done]
    once = subprocess.run(
        [*words, "-o", str(whole)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert once.returncode == 0, once.stderr
    assert trajectory(killed) == trajectory(whole)
    page = (whole / "small.md").read_text("utf-8")
    assert "Momentum helps" in page
    assert (whole / "small.svg").read_text("utf-8").startswith("<?xml")
    # Nothing is left to do, and nothing is done.
    third = subprocess.run(
        [*words, "-o", str(whole)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert third.returncode == 0
    assert "to do" not in third.stdout


def trajectory(directory: Path) -> list[tuple[str, ...]]:
    with (directory / "small.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    timed = ("seconds", "images_per_sec")
    return [tuple(value for key, value in row.items() if key not in timed) for row in rows]


@pytest.mark.slow
def test_a_stop_keeps_what_was_done(tmp_path: Path) -> None:
    path = write(tmp_path, set={"train.duration": "300ep"}, seeds=[0])
    words = [sys.executable, "-m", "harness", "study", str(path), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/cells/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, (out, err)
    assert list(tmp_path.glob("out/cells/*/checkpoints/update-*.pt"))


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        set={"train.duration": "40up", "lr.base": 1e20},
        variants={"plain": {}},
        seeds=[0],
        findings=[
            {
                "kind": "level",
                "of": "diverged",
                "a": "plain",
                "expect": "at_least",
                "value": 1,
                "says": "It diverges",
            }
        ],
    )
    (cell,) = study.final_cells({})
    (tmp_path / "out" / "cells").mkdir(parents=True)
    runner = Runner(tmp_path / "out", 1)
    runner.run([cell])
    assert runner.failed == {}
    assert state(cell.directory(runner.cells)) == "diverged"
    assert runner.left([cell]) == []


@pytest.mark.slow
def test_the_fewest_runs_of_a_quick_study_end_to_end(tmp_path: Path) -> None:
    path = ROOT / "configs" / "studies" / "adabatch.yaml"
    results = tmp_path / "results"
    results.mkdir()
    words = ["study", str(path), "--quick", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words, "--results", str(results)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    page = (results / "adabatch.md").read_text("utf-8")
    index = (results / "index.md").read_text("utf-8").splitlines()[-1]
    verdicts = collect(load_study(path, True), tmp_path / "out" / "cells").judge().all()
    told = [int(cell) if cell.strip().isdigit() else 0 for cell in index.split("|")[3:7]]
    assert sum(told) == len(verdicts)
    assert "## Findings" in page
    assert "harness study configs/studies/adabatch.yaml --quick\n" in page
    assert "## Discussion" not in page  # which speaks of the whole study
    assert "ratio 1 [1, 1]" not in page  # the batch has grown
    with (results / "adabatch.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["state"] for row in rows} == {"done"}
    assert len(rows) == sum(load_study(path, quick=True).size)
    before = {p.name: p.read_bytes() for p in results.iterdir()}
    gathered = command(*words, "--gather", "--results", results)
    assert gathered.code == 0, gathered.err
    assert {p.name: p.read_bytes() for p in results.iterdir()} == before


def test_a_worker_whose_study_was_killed_ends_without_a_word(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "harness.cells"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.close()
    request = {"config": str(tmp_path / "none.yaml"), "run_dir": str(tmp_path / "run")}
    child.stdin.write(json.dumps(request) + "\n")
    child.stdin.flush()
    code = child.wait(120)
    assert child.stderr is not None
    assert child.stderr.read() == ""
    assert code == 2
    child.stdin.close()
    child.stderr.close()


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    for words, message in (
        (["--jobs", "0"], "--jobs 0: at least 1"),
        (["--gather"], "holds no cells"),
        (["--gather", "--submit"], "cannot be had together"),
        (["--results", str(tmp_path / "none")], "no such directory"),
    ):
        said = command("study", path, "-o", tmp_path / "out", *words)
        assert said.code == 2
        assert message in said.err
    assert not (tmp_path / "out").exists()


def test_on_slurm_trials_come_before_what_they_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = fake_slurm(tmp_path, monkeypatch)
    tune = {"key": "lr.base", "values": [0.1, 0.2], "seeds": [100]}
    path, out = write(tmp_path, tune=tune), tmp_path / "out"
    words = ("study", path, "-o", out, "--submit", "--sbatch=--time=30")
    said = command(*words)
    assert said.code == 0, said.err
    assert "4 more come once these have ended" in said.out
    script = (out / "cells" / "slurm" / "sweep.sbatch").read_text("utf-8")
    assert "#SBATCH --array=0-3" in script
    assert "#SBATCH --time=30" in script
    study = load_study(path)
    for cell in study.trial_cells():
        run = cell.directory(out / "cells")
        assert run.path.name in script
        config = load_config(run.path / "slurm" / "config.yaml")
        assert config.lr.base == cell.trial
        finished(run, 0.9 if cell.trial == 0.2 else 0.5)
    for job in ("101", "102"):
        slurm.job(job, "COMPLETED")
    said = command(*words)
    assert said.code == 0, said.err
    assert "more come" not in said.out
    script = (out / "cells" / "slurm" / "sweep.sbatch").read_text("utf-8")
    finals = study.final_cells(chosen_values(study, out / "cells"))
    assert len(finals) == 4
    assert all(cell.name in script and cell.config.lr.base == 0.2 for cell in finals)


def test_a_dry_run_lists_the_cells_and_makes_nothing(tmp_path: Path) -> None:
    said = command("study", write(tmp_path), "-o", tmp_path / "out", "--dry-run")
    assert said.code == 0, said.err
    assert said.out.count("6 updates, 1,437 samples; missing") == 4
    assert "4 runs and 0 trials" in said.out
    assert not (tmp_path / "out").exists()


def test_a_cell_says_which_it_is(tmp_path: Path) -> None:
    cell: Cell = study_of(tmp_path, grid={"batch.initial": [64]}).final_cells({})[0]
    assert cell.name.startswith("plain-64-seed0-")
    assert str(cell.arm) == "plain, initial 64"
