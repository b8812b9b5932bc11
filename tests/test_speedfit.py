"""From bench, run and probe directories to the model of speed that a run keeps."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from benches import bench, point
from support import ROOT

from harness.benchfile import write_bench
from harness.cli import main
from harness.config import dump_config, load_config
from harness.errors import ConfigError, DataError
from harness.resume import check_same_run, settled
from harness.rundir import RunDirectory
from harness.schedule.choices import UpdateTime
from harness.schema import Config, GoodputGrowth, SpeedModel
from harness.speedfit import settled_growth, told_otherwise

DEMO = ROOT / "configs" / "adabatch-digits.yaml"
TRUTH = UpdateTime(per_image=1e-3, fixed=4e-3, within_latency=5e-4)


def measured(
    folder: Path,
    ranks: tuple[int, ...] = (1, 2, 4),
    micro: int = 32,
    truth: UpdateTime = TRUTH,
    nodes: int = 1,
) -> Path:
    """A bench of a machine whose updates take what ``truth`` says."""
    folder.mkdir(parents=True)
    points = [
        point(
            count,
            *(truth.images_per_sec(count, steps, micro) * off for off in (1.001, 0.999, 1.0)),
            micro=micro,
            accumulation=steps,
            nodes=min(nodes, count),
        )
        for count in ranks
        for steps in (1, 4)
    ]
    write_bench(folder, bench(*points))
    return folder


def config(*paths: Path, **growth: Any) -> Config:
    named = {"policy": "goodput", "throughput": [str(path) for path in paths], **growth}
    overrides = (f"batch.growth={json.dumps(named)}", "ranks={start: 1, max: 4, threads: 1}")
    return load_config(DEMO, overrides)


def growth_of(made: Config) -> tuple[GoodputGrowth, SpeedModel]:
    growth = made.batch.growth
    assert isinstance(growth, GoodputGrowth)
    assert growth.model is not None
    return growth, growth.model


def test_a_bench_tells_the_time_of_what_it_measured_and_of_what_lies_between(
    tmp_path: Path,
) -> None:
    growth, model = growth_of(settled_growth(config(measured(tmp_path / "bench"))))
    assert growth.ranks == [1, 2, 3, 4]
    assert model.measured_ranks == 4
    assert model.misfit is not None
    assert model.misfit < 0.05
    found = UpdateTime(**model.model_dump(exclude={"measured_ranks", "misfit"}))
    for ranks, steps in ((1, 1), (2, 4), (3, 2), (4, 8)):
        assert found.seconds(ranks, steps, 32) == pytest.approx(
            TRUTH.seconds(ranks, steps, 32), rel=0.1
        )


def test_ranks_lie_on_nodes_as_they_did_when_they_were_measured(tmp_path: Path) -> None:
    """Else two hosts with a rank each are taken for one, and their link costs nothing."""
    _, alone = growth_of(settled_growth(config(measured(tmp_path / "one"))))
    assert alone.ranks_per_node is None
    link = UpdateTime(per_image=1e-3, fixed=4e-3, between_latency=2e-2, ranks_per_node=1)
    two = measured(tmp_path / "two", (1, 2), truth=link, nodes=2)
    asked = config(two)
    _, apart = growth_of(settled_growth(asked))
    assert apart.ranks_per_node == 1
    found = UpdateTime(**apart.model_dump(exclude={"measured_ranks", "misfit"}))
    assert found.seconds(2, 1, 32) == pytest.approx(link.seconds(2, 1, 32), rel=0.1)
    ranks = asked.ranks.model_copy(update={"per_node": 2})
    _, told = growth_of(settled_growth(asked.model_copy(update={"ranks": ranks})))
    assert told.ranks_per_node == 2


def test_what_is_settled_stays_as_it_is_and_loads_again(tmp_path: Path) -> None:
    made = settled_growth(config(measured(tmp_path / "bench")))
    shutil.rmtree(tmp_path / "bench")
    assert settled_growth(made) == made
    (tmp_path / "c.yaml").write_text(dump_config(made), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == made


def test_other_growth_is_left_alone() -> None:
    made = load_config(DEMO)
    assert settled_growth(made) is made
    assert told_otherwise(made) == []


def test_a_run_that_goes_on_has_the_model_that_it_began_with(tmp_path: Path) -> None:
    asked = config(measured(tmp_path / "bench"))
    begun = settled_growth(asked)
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(dump_config(begun), encoding="utf-8")
    shutil.rmtree(tmp_path / "bench")
    with pytest.raises(DataError, match="bench"):
        settled_growth(asked)
    again = settled_growth(asked, run)
    assert settled(again) == settled(begun)
    check_same_run(again, run)
    moved = config(tmp_path / "elsewhere")
    check_same_run(settled_growth(moved, run), run)  # where the files lie decides nothing


def test_one_number_of_ranks_is_enough_for_one(tmp_path: Path) -> None:
    made = config(measured(tmp_path / "bench", (1,)))
    with pytest.raises(ConfigError, match="only 1 rank was measured, and the choice is of up to 4"):
        settled_growth(made)
    alone = load_config(DEMO, [f"batch.growth={json.dumps(made.batch.growth.model_dump(mode='json'))}", "ranks.start=1"])  # fmt: skip # noqa: E501
    _, model = growth_of(settled_growth(alone))
    assert model.per_image == pytest.approx(1e-3, rel=0.02)
    assert model.fixed == pytest.approx(4e-3, rel=0.1)


def test_another_micro_batch_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settled_growth(config(measured(tmp_path / "bench", micro=16)))
    assert "nothing was measured with batch.micro = 32 (measured: 16)" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_a_file_that_is_broken_is_one_message(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.json").write_text(content, encoding="utf-8")
    growth = json.dumps({"policy": "goodput", "throughput": [str(tmp_path)]})
    assert main(["plan", str(DEMO), f"batch.growth={growth}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness: ")
    assert "bench.json" in line


def test_a_run_s_metrics_serve_too(tmp_path: Path) -> None:
    lines = []
    update = samples = 0
    for ranks in (1, 2):
        for _ in range(6):
            update, samples = update + 10, samples + 10 * 64
            lines.append({
                "update": update, "samples_seen": samples, "ranks": ranks,
                "accumulation": 2 // ranks, "micro_batch": 32, "global_batch": 64,
                "images_per_sec": TRUTH.images_per_sec(ranks, 2 // ranks, 32), "comm_bytes": 10_000,
            })  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    _, model = growth_of(settled_growth(config(tmp_path)))
    assert model.gradient_bytes == 1000
    assert model.measured_ranks == 2


def test_the_plan_says_what_would_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    growth = json.dumps({
        "policy": "goodput", "throughput": [str(measured(tmp_path / "bench", (1, 2)))]
    })  # fmt: skip
    words = ["plan", str(DEMO), f"batch.growth={growth}", "ranks={start: 1, max: 8}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "(policy goodput): between 690 updates, where the batch never grows, and " in said
    assert re.search(
        r"the choice would be, by the noise scale in samples: \d+ = \d × \d × 32", said
    )
    assert "Speed is measured on up to 2 ranks; what it says of up to 8 is the model's word" in said
    assert "times as fast on 2 ranks as on 1: ranks.start=2." in said
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert max(stage["global_batch"] for stage in plan["fastest"]["stages"]) == 1024
    assert all(stage["idle"] == 0 for stage in plan["fastest"]["stages"])


def test_another_model_s_times_are_told(tmp_path: Path) -> None:
    folder = measured(tmp_path / "bench")
    shutil.copy(DEMO, folder / "config.yaml")
    made = config(folder)
    assert told_otherwise(made) == []
    other = made.model_copy(update={"model": made.model.model_copy(update={"name": "resnet20"})})
    (told,) = told_otherwise(other)
    assert "was measured with model.name lenet5 (this plan: resnet20)" in told


@pytest.mark.parametrize("name", ["a\0b", "x" * 500, "/".join(["y" * 200] * 30)])
def test_a_directory_whose_name_none_can_have_is_not_there(name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read: (No such file|File name too long)"):
        settled_growth(config(Path(name)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("ranks: [7]", "The batch stays: the smallest larger choice, 224, is more than"),
        ("ranks: [7], limit: 4", None),
        ("ranks: [64]", "No larger batch can be chosen"),  # 2,048, past batch.max
        ("ranks: [1, 2]", None),
    ],
)
def test_a_choice_that_can_never_be_taken_is_told(
    settings: str, told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    growth = f"{{policy: goodput, {settings}, model: {{per_image: 1.0e-4, fixed: 2.0e-3}}}}"
    words = ["plan", str(DEMO), f"batch.growth={growth}", "ranks={start: 1, max: 4}"]
    assert main([*words, "lr.on_growth=1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert ("The batch stays" in text or "No larger batch" in text) == (told is not None)
    assert told is None or told in text
