"""Configurations, whatever is in them, end in a plan or in one message; nothing else happens."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from fuzzing import HOSTILE_TEXTS, SNIPPETS, WATCH, command, damaged, fuzz, hostile
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from support import RECIPES, ROOT

from harness.dataset_table import DATASETS
from harness.schema import Config
from harness.units import Duration

DEMO = ROOT / "configs" / "adabatch-digits.yaml"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of configs/, to write into."""
    folder: Path = tmp_path_factory.mktemp("fuzz") / "configs"
    shutil.copytree(ROOT / "configs", folder)
    return folder


def planned(*words: object) -> None:
    """`harness plan` has a table or a message of printable lines, and does nothing else."""
    with WATCH.watching() as done:
        said = command("plan", *words)
    assert done == []
    assert said.code in (0, 2), said
    if said.code == 2:
        assert said.out == ""
        assert all(line.isprintable() for line in said.err.splitlines()), said.err


# From the schema


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, annotation, limits) of every field, of every member of a union too."""
    for name, field in model.model_fields.items():
        here = (*path, name)
        yield ".".join(here), field.annotation, field.metadata
        for section in sections(field.annotation):
            yield from leaves(section, here)


def sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is list:
        return []
    return [found for one in get_args(annotation) for found in sections(one)]


def values_of(annotation: Any, limits: Any = ()) -> st.SearchStrategy[Any]:
    """Values that a field of the schema might have; most of them valid."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(arguments[0], arguments[1:])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(one, limits) for one in arguments])
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.sampled_from(["A", "time", "betas", "x-y"]), hostile, max_size=2)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return section(annotation)
    if annotation is Duration:
        counts = st.integers(0, 40) | st.sampled_from([10**3, 10**9, 10**18 - 1])
        return st.builds("{}{}".format, counts, st.sampled_from(["ep", "up", "sa", "", ".5ep"]))
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return integers(limits)
    if annotation is float:
        return floats(limits)
    if annotation is str:
        return st.sampled_from(["a", "1:00:00", "eth0", *DATASETS, *HOSTILE_TEXTS])
    return st.none() if annotation is type(None) else hostile


def bounds(limits: Any, least: float, most: float) -> tuple[float, float]:
    for limit in (inner for one in limits for inner in getattr(one, "metadata", [one])):
        if isinstance(limit, Ge | Gt):
            least = max(least, getattr(limit, "ge", None) or getattr(limit, "gt", least))
        elif isinstance(limit, Le | Lt):
            most = min(most, getattr(limit, "le", None) or getattr(limit, "lt", most))
    return least, most


def integers(limits: Any) -> st.SearchStrategy[int]:
    least, most = (int(bound) for bound in bounds(limits, -(2**70), 2**70))
    low = max(least, -3)
    return st.integers(low, min(low + 300, most)) | st.sampled_from([least - 1, least, most])


def floats(limits: Any) -> st.SearchStrategy[float]:
    least, most = bounds(limits, -1e40, 1e40)
    near = st.floats(max(least, 0.0), min(most, 20.0))
    return near | st.sampled_from([least, most, 5e-324, 1e-30, 0.1])


def section(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """A mapping of some of a section's keys."""
    needed = {n: values_of(f.annotation, f.metadata) for n, f in model.model_fields.items()
              if f.is_required()}  # fmt: skip
    others = {n: values_of(f.annotation, f.metadata) for n, f in model.model_fields.items()
              if not f.is_required()}  # fmt: skip
    return st.fixed_dictionaries(needed, optional=others)


FIELDS = [(key, values_of(kind, limits)) for key, kind, limits in leaves(Config)]


def test_every_field_is_among_those_that_are_fuzzed() -> None:
    keys = {key for key, _ in FIELDS}
    assert {"batch.growth.factor", "lr.warmup.duration", "slurm.container.image"} <= keys
    assert {"train.duration", "launch.environment", "profile.trace.updates"} <= keys
    assert len(keys) > 150


def as_override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


@fuzz(37)
@given(st.lists(st.sampled_from(FIELDS).flatmap(lambda f: st.tuples(st.just(f[0]), f[1])),
                min_size=1, max_size=5))  # fmt: skip
def test_any_values_of_any_keys(settings: list[tuple[str, Any]]) -> None:
    planned(DEMO, *(as_override(key, value) for key, value in settings))


@fuzz(15)
@given(section(Config))
def test_whole_configurations_from_the_schema(configs: Path, raw: dict[str, Any]) -> None:
    path = configs / "made-up.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    planned(path)


# From files


@fuzz(37)
@given(st.data())
def test_damaged_files(configs: Path, data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(RECIPES))
    path = configs / source.relative_to(ROOT / "configs").with_name("damaged.yaml")
    path.write_bytes(data.draw(damaged(source.read_bytes())))
    planned(path)


@fuzz(10)
@given(st.lists(st.sampled_from(SNIPPETS), max_size=6).map(b"".join) | st.binary(max_size=200))
def test_any_bytes(configs: Path, content: bytes) -> None:
    path = configs / "any.yaml"
    path.write_bytes(content)
    planned(path)
    planned(DEMO, "batch.initial=" + content.decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghijklmnopqrstu", "bcdefghijklmnopqrstuv")),  # noqa: B905, E501
        "a: &a {x: 1}\n" + "".join(f"{c}: &{c} {{<<: [*{p}, *{p}, *{p}]}}\n" for p, c in zip("abcdefghijklmnopqrstu", "bcdefghijklmnopqrstuv")),  # noqa: B905, E501
        "a: &a\n  b: *a\n",
        "[" * 100_000,
        "{" * 100_000,
        "- " * 50_000,
        "a: " + "9" * 100_000,
        "a: " + "1_" * 50_000 + "1",
        "? " * 20_000,
        "a: |" + "9" * 1000,
        "%YAML 99.9\n---\na: 1",
        "a: !!python/object/apply:os.system [touch pwned]",
        "a: !!binary " + "A" * 100_000,
        "&" + "a" * 100_000 + " b: 1",
        "a: 0" + ":59" * 5000,
        "a: 2001-01-01T00:00:00Z",
        "extends: [any.yaml, any.yaml]",
        "extends: /dev/zero",
        "extends: /proc/self/mem",
        "extends: ../../../../../../../../etc/shadow",
    ],
    ids=range(20),
)  # fmt: skip
def test_bombs(configs: Path, text: str) -> None:
    path = configs / "any.yaml"
    path.write_text(text, encoding="utf-8")
    planned(path)


def test_planning_imports_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what trains, or measures, executes what model.name names."""
    (tmp_path / "booby.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    planned(DEMO, "model.name=booby:Net", "launch.python=./booby.py", "slurm.setup=booby.py")
    assert "booby" not in sys.modules
