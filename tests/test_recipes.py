"""The recipes in configs/ against the papers' tables, which tests/golden/ holds as printed or, for
schedules, as worked out from the papers' formulas with exact arithmetic."""

from __future__ import annotations

import csv
from functools import cache
from itertools import pairwise
from math import ceil
from pathlib import Path

import pytest
from support import ROOT

from harness.cli import main
from harness.config import load_config
from harness.data_sizes import train_size
from harness.schedule.clock import Clock
from harness.schedule.configured import rate_schedule, stage_scheduler
from harness.schedule.plan import Plan, build_plan
from harness.schema import Config, Printed

CONFIGS = ROOT / "configs"
FAMILIES = ("adabatch", "adadamp", "lars", "lenet", "mlperf", "whole-dataset")
RECIPES = sorted(
    path
    for family in FAMILIES
    for path in (CONFIGS / family).glob("*.yaml")
    if not path.name.startswith("_")
)
SIZES = [64, 128, 256, 512, 1024, 2048, 4096, 8192]


def golden(name: str) -> list[dict[str, str]]:
    with (Path(__file__).parent / "golden" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def recipe(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml")


def plan(name: str) -> Plan:
    config = recipe(name)
    return build_plan(config, train_size(config.data))


def rate(config: Config, epoch: float) -> float:
    """The rate of the update that starts at an epoch."""
    size = train_size(config.data)
    clock = Clock(ceil(epoch * size), 0, size)
    return rate_schedule(config).at(clock, stage_scheduler(config.batch).decide(clock)).lr


def printed(config: Config, metric: str) -> Printed:
    assert config.paper is not None
    (one,) = [entry for entry in config.paper.printed if entry.metric == metric]
    return one


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_names_itself_and_its_source_and_can_be_planned(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(path)
    assert config.name == f"{path.parent.name}-{path.stem}"
    assert config.paper is not None
    assert config.paper.printed or config.paper.note, "a result, or a word on why there is none"
    assert path.read_text("utf-8").startswith("# ")
    assert main(["plan", str(path)]) == 0
    assert "Recipe: " in capsys.readouterr().out


def test_every_row_has_its_recipe_and_every_recipe_its_row() -> None:
    lars = {f"lars/{lars_name(row)}" for row in golden("lars-tables.csv")}
    adabatch = {f"adabatch/{row['recipe']}" for row in golden("adabatch-stages.csv")}
    adabatch |= {f"adabatch/cifar100-{net}-fixed-128" for net in ("vgg19_bn", "resnet20")}
    adabatch |= {f"adabatch/imagenet-resnet50-fixed-{batch}" for batch in (256, 4096, 16384)}
    lenet = {f"lenet/fig{figure}-batch{batch}" for figure in range(1, 6) for batch in SIZES}
    lenet |= {
        f"lenet/fig6-batch{which}" for which in ("2048", "4096-rate", "8192-rate", "8192-momentum")
    }
    mlperf = {f"mlperf/resnet50-batch{row['batch']}" for row in golden("mlperf.csv")}
    mlperf.add("mlperf/resnet50-batch65536-fast")
    adadamp = {
        f"adadamp/cifar10-resnet34-{policy}"
        for policy in ("sgd", "adadamp", "padadamp", "geodamp", "radadamp")
    }
    whole = {
        f"whole-dataset/{run}" for run in ("imagenet-resnet50", "mnist-lenet5", "digits-lenet5")
    }
    assert len(lars) == 36
    assert {f"{path.parent.name}/{path.stem}" for path in RECIPES} == (
        lars | adabatch | lenet | mlperf | adadamp | whole
    )


# ---------------------------------------------------------------- LARS


def lars_name(row: dict[str, str]) -> str:
    name = f"table{row['table']}-batch{row['batch']}"
    if row["table"] in "23":
        name += f"-lr{float(row['rate']):.2f}"
    if (row["table"], row["batch"], row["rate"]) == ("2", "4096", "0.01"):
        name += "-warmup" if row["warmup_epochs"] else "-no-warmup"
    return name


@pytest.mark.parametrize("row", golden("lars-tables.csv"), ids=lars_name)
def test_lars_tables(row: dict[str, str]) -> None:
    config = recipe(f"lars/{lars_name(row)}")
    assert config.data.dataset == "imagenet"
    assert not config.data.augment
    assert config.batch.initial == int(row["batch"])
    assert config.optimizer.name == row["rule"]
    assert str(config.train.duration) == f"{row['epochs']}ep"
    assert config.lr.decay.model_dump()["power"] == float(row["power"])
    metric = "peak_accuracy" if row["table"] in "17" else "accuracy"
    assert printed(config, metric).value == float(row["accuracy"])
    assert config.paper is not None
    assert config.paper.place == f"Table {row['table']}, row {row['row']}"
    if row["rate"]:
        assert config.lr.base == float(row["rate"])
    if row["momentum"]:
        assert config.optimizer.momentum == float(row["momentum"])
        assert config.optimizer.weight_decay == float(row["weight_decay"])
    warmup = config.lr.warmup
    if row["table"] != "1":  # which tells of its warmup in the text only
        assert (warmup is not None) == bool(row["warmup_epochs"])
    if warmup is not None and row["warmup_epochs"]:
        assert str(warmup.duration) == f"{row['warmup_epochs']}ep"
        assert warmup.start == float(row["warmup_lr"] or 0)


@pytest.mark.parametrize(
    "row", golden("lars-poly.csv"), ids=lambda row: f"{row['batch']}@{row['epoch']}"
)
def test_poly_rates_of_lars_table_1(row: dict[str, str]) -> None:
    config = recipe(f"lars/table1-batch{row['batch']}")
    assert f"{rate(config, int(row['epoch'])):.12g}" == row["rate"]


def test_the_warmups_of_lars_are_straight_lines_to_the_base_rate() -> None:
    table1, table2 = recipe("lars/table1-batch8192"), recipe("lars/table2-batch8192-lr0.03")
    assert [rate(table1, epoch) for epoch in (0, 1, 2.5)] == pytest.approx([0.2, 1.44, 3.3])
    assert [rate(table2, epoch) for epoch in (0, 3)] == pytest.approx([0.001, 0.0155])


# ---------------------------------------------------------------- AdaBatch


@pytest.mark.parametrize(
    "row", golden("adabatch-stages.csv"), ids=lambda row: f"{row['recipe']}-{row['stage']}"
)
def test_adabatch_stages(row: dict[str, str]) -> None:
    stage = plan(f"adabatch/{row['recipe']}").stages[int(row["stage"])]
    assert (stage.start_epoch, stage.end_epoch) == (
        float(row["start_epoch"]),
        float(row["end_epoch"]),
    )
    assert (stage.global_batch, stage.updates) == (int(row["batch"]), int(row["updates"]))
    assert f"{stage.lr_end:.12g}" == row["rate"]
    first = stage.lr_start if stage.lr_after_warmup is None else stage.lr_after_warmup
    assert f"{first:.12g}" == row["rate"]


@pytest.mark.parametrize("start", [4096, 16384])
@pytest.mark.parametrize(("growth", "factor"), [(2, 0.2), (4, 0.4), (8, 0.8)])
def test_adabatch_pairs_growth_with_decay_by_one_key(
    start: int, growth: int, factor: float
) -> None:
    overrides = [f"batch.growth.factor={growth}", "batch.max=null"]
    path = CONFIGS / "adabatch" / f"imagenet-resnet50-adaptive-{start}-x2.yaml"
    stages = build_plan(load_config(path, overrides), 1_281_167).stages
    rates = [stage.lr_end for stage in stages]
    assert [later / earlier for earlier, later in pairwise(rates)] == (
        pytest.approx([factor, factor])
    )


def test_adabatch_fixed_runs_decay_in_steps() -> None:
    cifar = recipe("adabatch/cifar100-resnet20-fixed-128")
    rates = [rate(cifar, epoch) for epoch in (0, 19.9, 20, 40, 60, 80, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.025, 0.00625, 0.0015625, 0.000390625, 0.000390625])
    large = recipe("adabatch/imagenet-resnet50-fixed-16384")
    assert [rate(large, epoch) for epoch in (0, 2.5, 5, 30, 60)] == pytest.approx(
        [0.1, 3.25, 6.4, 0.64, 0.064]
    )
    assert printed(recipe("adabatch/cifar100-vgg19_bn-adaptive-1024"), "speedup").value == 3.54
    assert printed(recipe("adabatch/cifar100-resnet20-adaptive-1024"), "speedup").value == 6.25
    assert (
        max(s.global_batch for s in plan("adabatch/imagenet-resnet50-adaptive-8192-x8").stages)
        == 524288
    )


# ---------------------------------------------------------------- LeNet-5


@pytest.mark.parametrize("row", golden("lenet-rates.csv"), ids=lambda row: row["batch"])
def test_lenet_scaling_rules(row: dict[str, str]) -> None:
    for figure, rule in ((1, "none"), (2, "sqrt"), (3, "linear"), (5, "none")):
        name = f"lenet/fig{figure}-batch{row['batch']}"
        (stage,) = plan(name).stages
        assert stage.global_batch == int(row["batch"])
        assert stage.updates == int(row["updates"])
        assert stage.lr_start == stage.lr_end
        assert f"{stage.lr_start:.12g}" == f"{float(row[rule]):.12g}"
        assert stage.momentum == (0.9 if figure == 5 else 0.0)


@pytest.mark.parametrize("row", golden("lenet-warmup.csv"), ids=lambda row: row["batch"])
def test_lenet_warmup_goes_an_epoch_at_a_time(row: dict[str, str]) -> None:
    config = recipe(f"lenet/fig4-batch{row['batch']}")
    for epoch in range(1, 13):
        for place in (epoch - 1, epoch - 0.5, epoch - 0.001):
            assert f"{rate(config, place):.12g}" == row[f"epoch{epoch}"]


def test_lenet_rate_first_then_momentum() -> None:
    """√2 to the rate at 4,096, √2 to 1 / (1 − m) at 8,192: m = 1 − 0.1 / √2."""
    effective = []
    for name, lr, momentum in (
        ("2048", "0.01", "0.9"),
        ("4096-rate", "0.0141421356237", "0.9"),
        ("8192-momentum", "0.0141421356237", "0.929289321881"),
        ("8192-rate", "0.02", "0.9"),
    ):
        (stage,) = plan(f"lenet/fig6-batch{name}").stages
        assert f"{stage.lr_start:.12g}" == lr
        assert f"{stage.momentum:.12g}" == momentum
        effective.append(stage.effective_lr_start)
    assert effective == pytest.approx([0.1, 0.1 * 2**0.5, 0.2, 0.2])


# ---------------------------------------------------------------- MLPerf, AdaDamp, whole data sets


@pytest.mark.parametrize("row", golden("mlperf.csv"), ids=lambda row: row["batch"])
def test_mlperf_reference_points(row: dict[str, str]) -> None:
    config = recipe(f"mlperf/resnet50-batch{row['batch']}")
    optimizer = config.optimizer
    assert optimizer.name == "lars"
    assert (optimizer.momentum, optimizer.weight_decay) == (
        float(row["momentum"]),
        float(row["weight_decay"]),
    )
    assert printed(config, "epochs_to_target").value == float(row["mean_epochs"])
    (stage,) = plan(f"mlperf/resnet50-batch{row['batch']}").stages
    warmup = int(row["warmup_epochs"]) * ceil(1_281_167 / int(row["batch"]))
    steps = int(row["decay_steps"])
    assert stage.updates == warmup + steps
    assert stage.end_sample == stage.updates * int(row["batch"])
    base = float(row["rate"])
    schedule, decision = rate_schedule(config), stage_scheduler(config.batch).decide(Clock(0, 0, 1))
    for update, wanted in (
        (0, 0.0),
        (warmup // 2, base * (warmup // 2) / warmup),
        (warmup, base),
        (warmup + steps // 2, 1e-4 + (base - 1e-4) * (1 - (steps // 2) / steps) ** 2),
        (warmup + steps, 1e-4),
    ):
        assert schedule.at(Clock(0, update, 1), decision).lr == pytest.approx(wanted, rel=1e-12)


def test_adadamp_recipes_differ_in_growth_alone() -> None:
    kinds = {}
    for policy in ("sgd", "adadamp", "padadamp", "geodamp", "radadamp"):
        config = recipe(f"adadamp/cifar10-resnet34-{policy}")
        kinds[policy] = config.batch.growth.policy
        alike = config.model_copy(update={"name": "", "batch": None, "paper": None})
        assert alike == recipe("adadamp/cifar10-resnet34-sgd").model_copy(
            update={"name": "", "batch": None, "paper": None}
        )
    assert kinds == {
        "sgd": "fixed",
        "adadamp": "loss",
        "padadamp": "linear",
        "geodamp": "geometric",
        "radadamp": "rolling",
    }


@pytest.mark.parametrize("name", ["imagenet-resnet50", "mnist-lenet5", "digits-lenet5"])
def test_the_whole_data_set_is_one_batch(name: str) -> None:
    result = plan(f"whole-dataset/{name}")
    (stage,) = result.stages
    assert stage.global_batch == result.dataset_size
    assert stage.updates == round(stage.end_epoch)
