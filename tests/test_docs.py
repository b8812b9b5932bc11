"""What the documents show runs: Python blocks are executed, YAML blocks load."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from support import ROOT

from harness.config import load_config
from harness.schema import Config

DEMO = ROOT / "configs" / "adabatch-digits.yaml"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Written elsewhere; the site takes them in (docs/hooks.py).
BORROWED = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.relative_to(DOCS).as_posix(), block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    ]


def test_there_is_something_to_check() -> None:
    assert blocks("python")
    assert blocks("yaml")


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_runs(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "init_process_group" in code:  # torchrun's part of it, for one process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in world.items():
            monkeypatch.setenv(name, str(value))
    script = tmp_path / Path(page).with_suffix(".py").name
    script.write_text(code, encoding="utf-8")
    assert runpy.run_path(str(script))


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_loads(page: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / Path(page).name
    path.write_text(f"extends: {DEMO}\n{text}", encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize(
    "page", [*PAGES, *BORROWED], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page: Path) -> None:
    made = {DOCS / "reference" / "configuration.md", DOCS / "reference" / "commands.md"}
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        path = Path(os.path.normpath(page.parent / target))
        assert path.exists() or path in made, target


def listed(entry: object) -> Iterator[str]:
    """The pages in the navigation of mkdocs.yml."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict | list):
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from listed(inner)


def navigation() -> list[str]:
    return list(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_page_is_listed_once(page: Path) -> None:
    assert navigation().count(page.relative_to(DOCS).as_posix()) == 1


def test_the_readme_can_be_read_at_once() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


# MkDocs without a network: what would connect to anything is refused.
OFFLINE = """
import socket, sys
def refuse(*_):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--quiet", "--strict", "--site-dir", sys.argv[1]])
"""


@pytest.mark.slow
def test_the_site_builds_without_network_and_needs_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {path.relative_to(tmp_path): path.read_text("utf-8") for path in html(tmp_path)}
    assert len(pages) > len(PAGES)
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text)
        assert [tag for tag in loaded if re.search(r"(src|href)=\W?(https?:)?//", tag)] == [], name
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\W?(https?:)?//|@import", sheet.read_text("utf-8")), sheet
    keys = pages[Path("reference/configuration.html")]
    assert [key for key in leaves(Config, "") if f"<code>{key}</code>" not in keys] == []


def html(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Every key of a configuration, as the reference has it."""
    for name, field in model.model_fields.items():
        inner = list(sections(field.annotation))
        yield f"{prefix}{name}"
        listed = "[]" if get_origin(field.annotation) is list else ""
        for section in inner:
            yield from leaves(section, f"{prefix}{name}{listed}.")


def sections(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def documented(heading: str) -> dict[str, set[str]]:
    """The names in the first column of a table in the page on files, with those of its row."""
    text = (DOCS / "reference" / "files.md").read_text("utf-8").partition(f"## {heading}\n")[2]
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|(.*)$", text.partition("\n## ")[0], re.MULTILINE)
    return {
        name: set(re.findall("`([^`]+)`", rest))
        for first, rest in rows
        for name in re.findall("`([^`]+)`", first)
    }


@pytest.mark.slow
def test_the_page_on_files_has_the_fields_that_are_written(tmp_path: Path) -> None:
    settings = ["ranks.start=1", "ranks.max=1", "train.duration=3ep"]
    command = [sys.executable, "-m", "harness", "train", str(DEMO), *settings]
    subprocess.run([*command, "--run-dir", str(tmp_path / "r")], check=True, capture_output=True)
    lines = (tmp_path / "r" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert set(json.loads(lines[0])) == set(documented("metrics.jsonl"))
    kinds = documented("events.jsonl")
    events = (tmp_path / "r" / "events.jsonl").read_text("utf-8").splitlines()
    for event in map(json.loads, events):
        assert kinds[event["kind"]] <= set(event), event["kind"]
    assert {json.loads(line)["kind"] for line in events} >= {"start", "evaluation", "end"}
