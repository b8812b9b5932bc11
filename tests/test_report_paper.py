"""Values that a recipe's source prints, beside those that are worked out from the records."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import SIZE, Simulation
from support import RECIPES

from harness.config import load_config
from harness.report import build_report


def written(path: Path, run: Simulation, *printed: dict[str, Any], **changes: Any) -> Path:
    where = run.write(path)
    paper = {"source": "Some One 2020", "place": "Table 2", "printed": [*printed]}
    config = {**run.config(), "paper": paper, **changes}
    (where / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return where


def rows_of(*runs: Path, out: Path) -> list[dict[str, Any]]:
    """Those of the first run."""
    index = build_report(runs, out)
    rows: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())["runs"][0]["paper"]
    page = index.read_text(encoding="utf-8")
    told = (out / "report.md").read_text(encoding="utf-8")
    for row in rows:
        assert (row["here"] is None) == (row["why_not"] is not None)
        assert (row["why_not"] or row["rule"]) in page
        assert "## In the paper" in told
    return rows


def accuracies(run: Simulation) -> list[tuple[float, float]]:
    """(epoch, accuracy) of each evaluation."""
    told = [event for event in run.events if event["kind"] == "evaluation"]
    return [(event["epoch"], event["accuracy"]) for event in told]


@given(st.floats(0.05, 1.0))
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_epochs_to_a_target_are_those_of_the_first_evaluation_that_has_it(
    tmp_path_factory: pytest.TempPathFactory, target: float
) -> None:
    home = tmp_path_factory.mktemp("target")
    run = Simulation(epochs=6).run(restart_at=None)
    entry = {"metric": "epochs_to_target", "value": 42.0, "target": target}
    (row,) = rows_of(written(home / "run", run, entry), out=home / "out")
    reached = [epoch for epoch, accuracy in accuracies(run) if accuracy >= target]
    assert row["here"] == (reached[0] if reached else None)
    if not reached:
        assert "no evaluation reached the target" in row["why_not"]


def test_a_higher_target_is_never_reached_earlier(tmp_path: Path) -> None:
    run = Simulation(epochs=6).run(restart_at=None)
    targets = [0.1, 0.3, 0.5, 0.7, 0.9]
    entries = [{"metric": "epochs_to_target", "target": target} for target in targets]
    rows = rows_of(written(tmp_path / "run", run, *entries), out=tmp_path / "out")
    epochs = [row["here"] for row in rows if row["here"] is not None]
    assert len(epochs) > 2
    assert all(before <= after for before, after in pairwise(epochs))


def test_without_an_epoch_samples_tell_it(tmp_path: Path) -> None:
    run = Simulation(epochs=6).run(restart_at=None)
    for event in run.events:
        event.pop("epoch", None)
    entry = {"metric": "epochs_to_target", "target": 0.5}
    (row,) = rows_of(written(tmp_path / "run", run, entry), out=tmp_path / "out")
    told = [e for e in run.events if e["kind"] == "evaluation" and e["accuracy"] >= 0.5]
    assert row["here"] == pytest.approx(told[0]["samples_seen"] / SIZE)


def test_a_difference_is_against_the_named_runs_of_the_page(tmp_path: Path) -> None:
    mine = Simulation(1, epochs=6).run(restart_at=None)
    peers = [Simulation(seed, 64, 1, 6, name="fixed").run(restart_at=None) for seed in (2, 3)]
    entries = [
        {"metric": "error_difference", "below": 0.02, "against": "fixed"},
        {"metric": "accuracy_gain", "value": 0.1, "against": "fixed"},
        {"metric": "speedup", "value": 2, "against": "fixed"},
    ]
    where = written(tmp_path / "mine", mine, *entries)
    others = [written(tmp_path / f"peer-{i}", peer) for i, peer in enumerate(peers)]
    difference, gain, speedup = rows_of(where, *others, out=tmp_path / "out")
    theirs = sum(accuracies(peer)[-1][1] for peer in peers) / 2
    assert difference["here"] == pytest.approx((1 - accuracies(mine)[-1][1]) - (1 - theirs))
    assert gain["here"] == pytest.approx(-difference["here"])
    assert "the mean of runs 2, 3 (fixed)" in difference["rule"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    overall = [
        next(n["value"] for n in run["numbers"] if n["name"] == "images_per_sec_overall")
        for run in summary["runs"]
    ]
    assert speedup["here"] == pytest.approx(overall[0] / (sum(overall[1:]) / 2))
    assert "error_difference" in summary["paper_rules"]


def test_a_dash_has_its_reason(tmp_path: Path) -> None:
    run = Simulation(epochs=3).run(restart_at=None)
    other = Simulation(2, epochs=3, name="other task").run(restart_at=None)
    blind = Simulation(3, epochs=3, name="blind").run(restart_at=None)
    blind.events = [event for event in blind.events if event["kind"] != "evaluation"]
    cases = [
        ({"metric": "epochs_to_target"}, "does not say which accuracy is the target"),
        ({"metric": "epochs_to_target", "target": 1.0}, "no evaluation reached the target of 100"),
        ({"metric": "error_difference"}, "does not name the run"),
        ({"metric": "error_difference", "against": "x"}, "no run of the name x is on this page"),
        ({"metric": "error_difference", "against": "other task"}, "is of another task"),
        ({"metric": "error_difference", "against": "blind"}, "has no test accuracy"),
        ({"metric": "error_difference", "against": run.name}, "no run of the name"),
        ({"metric": "images_per_sec_8_gpus"}, "did not have 8 ranks from start to end"),
        ({"metric": "images_per_sec_1_gpus"}, "no GPU is recorded"),
        ({"metric": "curve"}, "no rule finds it"),
    ]
    where = written(tmp_path / "run", run, *(entry for entry, _ in cases))
    others = [
        written(tmp_path / "other", other, model={"name": "resnet20"}),
        written(tmp_path / "blind", blind),
    ]
    rows = rows_of(where, *others, out=tmp_path / "out")
    for row, (_, why) in zip(rows, cases, strict=True):
        assert why in row["why_not"]


def test_a_run_without_evaluations_has_no_epoch(tmp_path: Path) -> None:
    run = Simulation(epochs=3).run(restart_at=None)
    run.events = [event for event in run.events if event["kind"] != "evaluation"]
    entries = [{"metric": "epochs_to_target", "target": 0.5}, {"metric": "accuracy"}]
    for row in rows_of(written(tmp_path / "run", run, *entries), out=tmp_path / "out"):
        assert row["why_not"] == "no test accuracy is recorded"


WHOLE = [path for path in RECIPES if path.name[0] != "_"]


def test_recipes_name_targets_and_runs_that_there_are() -> None:
    loaded = [load_config(path) for path in WHOLE]
    names = {config.name: config for config in loaded}
    told = 0
    for config in loaded:
        for entry in config.paper.printed if config.paper else ():
            if entry.metric == "epochs_to_target":
                assert entry.target is not None
            if entry.metric == "error_difference":
                assert entry.against is not None
            if entry.against is not None:
                told += 1
                other = names[entry.against]
                assert (other.model, other.data) == (config.model, config.data)
                assert other.batch.growth.policy == "fixed"
    assert told
