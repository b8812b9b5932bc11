"""What the documents show runs: Python blocks are executed, YAML blocks load."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from support import ROOT

from harness.config import load_config

DEMO = ROOT / "configs" / "adabatch-digits.yaml"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    ]


def test_there_is_something_to_check() -> None:
    assert blocks("python")
    assert blocks("yaml")


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_runs(page: str, code: str, tmp_path: Path) -> None:
    script = tmp_path / page.replace(".md", ".py")
    script.write_text(code, encoding="utf-8")
    assert runpy.run_path(str(script))


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_loads(page: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / page
    path.write_text(f"extends: {DEMO}\n{text}", encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_the_page_on_schedules_names_every_policy_and_decay() -> None:
    from harness.schema import Batch, LearningRate

    text = (ROOT / "docs" / "schedules.md").read_text("utf-8")
    schema = [Batch.model_json_schema(), LearningRate.model_json_schema()]
    kinds = {
        field.get("const")
        for one in schema
        for section in one["$defs"].values()
        for name, field in section["properties"].items()
        if name in ("policy", "kind")
    } - {None, "none"}
    assert len(kinds) > 10
    assert [kind for kind in kinds if not re.search(rf"`{kind}`|kind: {kind}", text)] == []
