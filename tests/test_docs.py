"""What the documents show runs: Python blocks are executed, YAML blocks load."""

from __future__ import annotations

import ast
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

from harness.cli import main
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
    entries = list(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    found = {path.relative_to(DOCS).as_posix() for one in entries for path in DOCS.glob(one)}
    return [entry for entry in entries if "*" not in entry] + sorted(found - {*entries})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_page_is_listed_once(page: Path) -> None:
    assert navigation().count(page.relative_to(DOCS).as_posix()) == 1


@pytest.mark.parametrize("folder", ["harness", "launch"])
def test_the_tree_of_the_architecture_names_every_module(folder: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {path.stem for path in (ROOT / folder).glob("*.py") if path.stem[0] != "_"}
    names |= {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert names
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


def test_the_readme_can_be_read_at_once() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


# MkDocs without a network: what would connect to anything is refused.
OFFLINE = """
import socket, sys
def refuse(*_):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", *sys.argv[1:]])  # with --quiet it would count no warnings
"""


def build_site(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OFFLINE, *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_broken_link_and_an_unlisted_page_fail_the_site(tmp_path: Path) -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    text = re.sub(r"^nav:\n(  .*\n)+", "nav: [index.md]\n", text, flags=re.MULTILINE)
    text = text.replace("docs/hooks.py", str(DOCS / "hooks.py")).replace("[.]", f"[{ROOT}]")
    (tmp_path / "mkdocs.yml").write_text(text)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[nowhere](nowhere.md)\n")
    (tmp_path / "docs" / "more.md").write_text("# More\n")
    done = build_site("--config-file", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert "contains a link 'nowhere.md'" in done.stderr
    assert re.search(r'not included in the "nav"(.*\n)*.*more\.md', done.stderr)


@pytest.mark.slow
def test_the_site_builds_without_network_and_needs_none(tmp_path: Path) -> None:
    done = build_site("--site-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
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


# Troubleshooting: what is quoted is what the code says

TROUBLE = (DOCS / "troubleshooting.md").read_text("utf-8")
FOREIGN = "No network interfaces were found"  # Open MPI's own words


def literals() -> set[str]:
    """The texts in the sources, with what they fill in cut out."""
    found = set()
    for folder in ("harness", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.update(part for part in node.value.split("\n") if len(part) >= 4)
    return found


def quoted() -> list[str]:
    """Messages in blocks, without the commands before them, and sentences in quotes."""
    blocks = re.findall(r"^```\n(.*?)^```", TROUBLE, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line[:2] != "$ "]
    told = [line for line in lines if line.startswith(("harness: ", "Set-up failed: "))]
    return told + re.findall(r"^> (.*)$", TROUBLE, re.MULTILINE)


def covered(message: str, texts: set[str]) -> float:
    """Share of a message's characters that stand in the sources."""
    known = [False] * len(message)
    for text in texts:
        for found in re.finditer(re.escape(text), message):
            known[found.start() : found.end()] = [True] * (found.end() - found.start())
    return sum(known) / len(message)


def test_what_is_quoted_of_messages_stands_in_the_code() -> None:
    texts = literals()
    messages = [re.sub(r"^(harness|Set-up failed): ", "", one) for one in quoted()]
    assert len(messages) > 20
    assert FOREIGN in TROUBLE
    assert [one for one in messages if covered(one, texts) < 0.5] == []
    assert covered("rank 1 was eaten by a whale, and all others went home early", texts) < 0.4


@pytest.mark.parametrize(
    ("command", "message"), re.findall(r"^\$ (harness plan .*)\n(harness: .*)$", TROUBLE, re.M)
)
def test_what_a_plan_is_quoted_to_say_is_said(
    command: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(command.split()[1:]) == 2
    assert capsys.readouterr().err == f"{message}\n"
