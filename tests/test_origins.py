"""`harness config`: every value with where it comes from, and a configuration again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from harness.config import load_config, resolve
from harness.origins import Origin, as_json, as_yaml, origins

RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("_"))
DEMO = ROOT / "configs" / "adabatch-digits.yaml"


def values(path: Path, *overrides: str) -> dict[str, Origin]:
    return {one.name: one for one in origins(resolve(path, overrides))}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def above(tmp_path: Path) -> Path:
    write(tmp_path, "base.yaml", f"extends: {DEMO}\nseed: 3\nlr:\n  base: 0.5\n  min: 0.001\n")
    return write(tmp_path, "above.yaml", "extends: base.yaml\nlr:\n  base: 0.25\n")


def test_files_overrides_defaults_and_what_follows_from_others(above: Path) -> None:
    found = values(above, "batch.max=2048", "batch.micro=null")
    told = {name: (one.value, one.source, one.told) for name, one in found.items()}
    base = above.with_name("base.yaml")
    assert told["lr.base"] == (0.25, "file", f"{above}:3")
    assert told["lr.min"] == (0.001, "file", f"{base}:5")
    assert told["seed"] == (3, "file", f"{base}:2")
    assert told["data.dataset"][1:] == ("file", f"{DEMO}:8")
    assert told["batch.max"] == (2048, "override", "override 'batch.max=2048'")
    assert told["train.precision"] == ("fp32", "default", "default")
    assert told["batch.micro"][:2] == (32, "derived")
    assert told["ranks.max"] == (2, "derived", "derived: ranks.start")


def test_what_a_section_s_rules_have_made_of_a_default(tmp_path: Path) -> None:
    found = values(DEMO, "optimizer.name=adam", "optimizer.weight_decay=0")
    assert found["optimizer.momentum"].value == 0.0
    assert values(DEMO)["optimizer.momentum"].source == "file"
    text = DEMO.read_text("utf-8").replace("{name: sgd, momentum: 0.9", "{name: adam")
    found = values(write(tmp_path, "adam.yaml", text))
    assert (found["optimizer.momentum"].value, found["optimizer.momentum"].source) == (
        0.0, "derived",
    )  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_a_configuration_again(path: Path, tmp_path: Path) -> None:
    found = origins(resolve(path))
    again = load_config(write(tmp_path, "again.yaml", as_yaml(found)))
    # What was derived is written out; nothing else differs.
    derived = [f"{one.name}={json.dumps(one.value)}" for one in found if one.source == "derived"]
    assert again == load_config(path, derived)
    assert {one.name: one.value for one in origins(resolve(path))} == {
        one.name: one.value for one in origins(resolve(tmp_path / "again.yaml"))
    }


def test_texts_of_any_kind_stay_what_they_are(tmp_path: Path) -> None:
    overrides = (
        'name="a: b # c\\n\\u2028 \\"yes\\""',
        "launch.environment={A: 'x, y', B: \"'[\", C: 'null'}",
        "slurm.modules=['1', 'a]b', \"c'd\"]",
        f"launch.python='{'long word ' * 30}'",
    )
    text = as_yaml(origins(resolve(DEMO, overrides)))
    assert all(line.isprintable() for line in text.splitlines())
    again = load_config(write(tmp_path, "again.yaml", text))
    once = load_config(DEMO, overrides)
    assert (again.name, again.launch, again.slurm) == (once.name, once.launch, once.slurm)


def test_the_command_prints_either_form() -> None:
    words = [sys.executable, "-m", "harness", "config", str(DEMO), "lr.base=0.5"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout == as_yaml(origins(resolve(DEMO, ["lr.base=0.5"]))) + "\n"
    assert "# override 'lr.base=0.5'" in shown.stdout
    plain = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert plain.stdout == as_json(origins(resolve(DEMO, ["lr.base=0.5"]))) + "\n"
    assert json.loads(plain.stdout)["lr.base"] == {
        "value": 0.5, "source": "override", "told": "override 'lr.base=0.5'",
    }  # fmt: skip


def test_a_mistake_is_told_as_by_the_other_commands() -> None:
    words = [sys.executable, "-m", "harness", "config", str(DEMO), "lr.bass=0.5"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("harness: override 'lr.bass=0.5': lr.bass: unknown key")
