"""The JSON Schema for editors: what it takes and refuses, beside the loader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from support import ROOT

from harness.config import load_config
from harness.errors import ConfigError
from harness.json_schema import documentation, header, json_schema, keys
from harness.schema import Batch, Config, GeometricGrowth, LossGrowth
from harness.yamlfile import read_yaml

RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
DEMO = ROOT / "configs" / "adabatch-digits.yaml"
VALIDATOR = Draft7Validator(json_schema())


def problems(data: Any) -> list[str]:
    return [
        f"{list(error.absolute_path)}: {error.message}" for error in VALIDATOR.iter_errors(data)
    ]


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_recipe_is_valid(path: Path) -> None:
    data = read_yaml(path).data
    if path.name.startswith("_"):  # a part of others
        data |= {"extends": "other.yaml"}
    if "study" in data or "grid" in data or "runs" in data:
        pytest.skip("a study, and no configuration")
    assert problems(data) == []


def demo(**changed: Any) -> dict[str, Any]:
    data: dict[str, Any] = read_yaml(DEMO).data
    return data | changed


REFUSED: dict[str, dict[str, Any]] = {
    "an unknown key": {"speed": 1},
    "an unknown key of a section": {"lr": {"base": 0.1, "bass": 1}},
    "an unknown key of a policy": {
        "batch": {"initial": 64, "growth": {"policy": "geometric", "every": "5ep", "rate": 1}}
    },
    "an unknown policy": {"batch": {"initial": 64, "growth": {"policy": "guess"}}},
    "a policy without its name": {"batch": {"initial": 64, "growth": {"every": "5ep"}}},
    "a policy without what it needs": {"batch": {"initial": 64, "growth": {"policy": "linear"}}},
    "a length without a unit": {"train": {"duration": 30}},
    "a length with another unit": {"train": {"duration": "30h"}},
    "half an update": {"train": {"duration": "30.5up"}},
    "a fraction of samples": {"batch": {"initial": 64.5}},
    "a count of none": {"batch": {"initial": 0}},
    "a flag for a count": {"batch": {"initial": True}},
    "text for a number": {"lr": {"base": "fast"}},
    "a negative rate": {"lr": {"base": -0.1}},
    "a data set that is none": {"data": {"dataset": "digit"}},
    "a model that is none": {"model": {"name": "lenet-5"}},
    "a section that lacks its key": {"data": {"augment": True}},
    "a section that is a list": {"batch": [64]},
    "a section that is nothing": {"train": None},
    "a name that is a number": {"name": 5},
    "an optimizer that is none": {"optimizer": {"name": "sdg"}},
    "a warmup without its length": {"lr": {"base": 0.1, "warmup": {"start": 0.1}}},
    "a stage without its batch": {
        "batch": {"initial": 64, "growth": {"policy": "list", "stages": [{"start": "1ep"}]}}
    },
    "no factors": {"lr": {"base": 0.1, "on_growth": []}},
    "a trace of one update": {"profile": {"trace": {"updates": [3]}}},
    "a variable of the harness": {"launch": {"environment": {"HARNESS_X": "1"}}},
    "a list for a time": {"slurm": {"time": [1]}},
    "an option with dashes": {"slurm": {"options": {"--exclude": "n1"}}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_refuses_the_loader_refuses(what: str, tmp_path: Path) -> None:
    data = demo(**REFUSED[what])
    assert problems(data)
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(path)


ACCEPTED: dict[str, dict[str, Any]] = {
    "lengths": {"train": {"duration": " 2.50 ep", "eval_every": "7.0up", "checkpoint_every": None}},
    "a time in minutes": {"slurm": {"time": 30, "gpus_per_node": "a100:4"}},
    "factors": {"lr": {"base": 1, "on_growth": [0.5, 1]}},
    "an optimum": {
        "batch": {
            "initial": 64, "max": 128,
            "growth": {"policy": "loss", "optimum": "estimate", "limit": 2},
        }
    },
    "a model of one's own": {"model": {"name": "my_models:Net"}},
    "options": {"slurm": {"options": {"exclude": "n1", "hold": True, "nice": 3}}},
    "variables": {"launch": {"environment": {"NCCL_DEBUG": "INFO", "X": 1}}},
    "a trace": {"profile": {"trace": {"updates": [3, 4], "ranks": [0]}}},
}  # fmt: skip


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_the_loader_takes_it_takes(what: str, tmp_path: Path) -> None:
    data = demo(**ACCEPTED[what])
    path = tmp_path / "good.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")
    load_config(path)
    assert problems(data) == []


def test_a_file_that_extends_another_needs_nothing_of_its_own() -> None:
    assert problems({"extends": str(DEMO)}) == []
    assert problems({"extends": [str(DEMO)], "batch": {"growth": {"factor": 3}}}) == []
    assert problems({"extends": str(DEMO), "batch": {"growth": {"factory": 3}}})
    assert problems({"name": "a"})


def test_every_section_s_keys_have_their_line() -> None:
    told = json_schema()["definitions"]["Batch"]["properties"]
    assert told["micro"]["description"].startswith("Samples of one backward pass")
    for model in (Config, Batch, GeometricGrowth, LossGrowth):
        assert documentation(model).keys() <= model.model_fields.keys()
    assert "dwell" in documentation(LossGrowth)  # of what it is made from


def test_the_keys_of_overrides() -> None:
    known = keys()
    assert {"batch.initial", "batch.growth.every", "lr.warmup.start", "slurm.container.image"} <= (
        known.keys()
    )
    assert len(known["batch.growth.policy"]) > 5  # a field of each kind
    assert not any(".stages." in key for key in known)


def test_the_command_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "schema.json"
    words = [sys.executable, "-m", "harness", "schema"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    done = subprocess.run(
        [*words, "-o", str(out)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(printed.stdout) == json.loads(out.read_text("utf-8")) == json_schema()
    assert header(out) in done.stdout
