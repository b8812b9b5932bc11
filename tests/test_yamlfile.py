"""Reading YAML as plain data: what resolves to what, what is refused, and how it is said."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.yamlfile import dump_yaml, one_line, parse_yaml, read_yaml, shown

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    | st.sampled_from(
        [
            "1e3",
            "1_0",
            "no",
            "on",
            "0o7",
            "1:30",
            "null",
            "~",
            "",
            "=",
            "<<",
            "2020-01-01",
            ".5",
            "\x85",
            "a\u2028",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "c.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("12", 12),
        ("-12", -12),
        ("012", 12),
        ("1_000", 1000),
        ("5.", 5.0),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("!!int '12'", 12),
        ("!!float 1", 1.0),
        ("[1, a, null]", [1, "a", None]),
        ("{a: 1, b: {c: 2}}", {"a": 1, "b": {"c": 2}}),
        ("1: a\ntrue: b\nnull: c", {"1": "a", "true": "b", "null": "c"}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("\ufeffa: 1", {"a": 1}),
    ],
)
def test_scalars_resolve_by_the_core_schema(text: str, value: object) -> None:
    data = parse_yaml(text, "c.yaml").data
    assert data == value
    assert type(data) is type(value)


@pytest.mark.parametrize(("text", "value"), [(".inf", math.inf), ("-.INF", -math.inf)])
def test_infinities_resolve(text: str, value: float) -> None:
    assert parse_yaml(text, "c.yaml").data == value


def test_nan_resolves() -> None:
    assert math.isnan(parse_yaml(".NaN", "c.yaml").data)


def test_places_are_lines() -> None:
    document = parse_yaml("a: 1\nb:\n  c: {d: 2}\n  e:\n    - 5\n    - 6\n", "c.yaml")
    assert document.places[("a",)] == "c.yaml:1"
    assert document.places[("b",)] == "c.yaml:2"
    assert document.places[("b", "c", "d")] == "c.yaml:3"
    assert document.places[("b", "e", 1)] == "c.yaml:6"


def test_text_that_is_no_file_has_no_lines() -> None:
    assert parse_yaml("{a: 1}", "the option", lines=False).places[("a",)] == "the option"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "c.yaml:3: the key 'a' stands here twice"),
        ("a: {b: 1,\n b: 1}\n", "c.yaml:2: the key 'b' stands here twice"),
        ("1: a\n'1': b\n", "c.yaml:2: the key '1' stands here twice"),
        ("a: 1\n? [x]\n: 2\n", "c.yaml:2: a key must be a plain word"),
        ("a: 1\n? {x: 1}\n: 2\n", "c.yaml:2: a key must be a plain word"),
        ("a: !!int x\n", "c.yaml:1: 'x' cannot be read as a whole number"),
        ("a: !!int ''\n", "c.yaml:1: '' cannot be read as a whole number"),
        ("a: !!float x\n", "c.yaml:1: 'x' cannot be read as a number"),
        ("a: !!bool maybe\n", "c.yaml:1: 'maybe' cannot be read as true or false"),
        ("a: [1\nb: 2\n", "c.yaml:2: not valid YAML: "),
        ("a: 'x\n", "not valid YAML: "),
        ("a: *x\n", "c.yaml:1: not valid YAML: found undefined alias 'x'"),
        ("a: 1\n--- b: 2\n", "not valid YAML: "),
        ("a: 1\n---\nb: 2\n", "not valid YAML: "),
        ("a: 1\n\tb: 2\n", "c.yaml:2: not valid YAML: "),
        ("a: 1\nb: \0\n", "c.yaml:2: not valid YAML: the character U+0000 is refused"),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML: "),
        ('a: "\\U00110000"\n', "not valid YAML: "),
        ("&a [1, *a]\n", "c.yaml:1: aliases expand"),
        ("a: &a\n  b: *a\n", "c.yaml:1: aliases expand"),
    ],
)
def test_refuses_with_the_place(text: str, message: str) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system",
        "!!python/object/new:builtins.eval",
        "!!python/name:os.system",
        "!!python/tuple",
        "!!set",
        "!!omap",
        "!!pairs",
        "!!binary",
        "!!timestamp",
        "!mine",
        "!<x%0Ay>",
    ],
)
@pytest.mark.parametrize("body", ["x", "[x]", "{x: 1}"])
def test_tags_that_build_objects_are_refused(tag: str, body: str) -> None:
    assert refusal(f"a: 1\nb: {tag} {body}\n").startswith("c.yaml:2: ")


def test_an_alias_bomb_is_refused_at_once() -> None:
    layers = [f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]" for below, name in pairs()]
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(layers)
    assert "aliases expand to more than a configuration can hold" in refusal(bomb)


def pairs() -> list[tuple[str, str]]:
    return list(zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize("depth", [52, 60, 350, 400, 5000])
@pytest.mark.parametrize(
    "nest",
    [
        lambda depth: "[" * depth + "]" * depth,
        lambda depth: "{a: " * depth + "1" + "}" * depth,
        lambda depth: "- " * depth + "1",
        lambda depth: "[" * depth,
    ],
)
def test_deep_nesting_is_refused(nest: Callable[[int], str], depth: int) -> None:
    assert "nested more than 50 deep" in (message := refusal(nest(depth))) or "not valid" in message


def test_fifty_levels_are_read() -> None:
    data = parse_yaml("[" * 50 + "]" * 50, "c.yaml").data
    for _ in range(49):
        (data,) = data
    assert data == []


def test_a_number_with_more_digits_than_python_reads_is_refused() -> None:
    assert "cannot be read as a whole number" in refusal("a: " + "9" * 5000)


@given(plain)
def test_what_is_dumped_reads_back_the_same(data: Any) -> None:
    text = dump_yaml(data)
    assert parse_yaml(text, "c.yaml").data == data


@given(plain)
def test_what_is_dumped_is_the_same_to_other_readers(data: Any) -> None:
    assert yaml.safe_load(dump_yaml(data)) == data


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_random_bytes_are_data_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(content)
    survives(path)


@settings(max_examples=200)
@given(st.text("abn019 :-,[]{}&*!?|>'\"%@#\n\t~.+e_<=\\ux\ufeff\x00\x85é", max_size=60))
def test_random_yaml_is_data_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_text(text, encoding="utf-8")
    survives(path)


def survives(path: Path) -> None:
    message = path.name
    try:
        assert_plain(read_yaml(path).data)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert path.name in message


def assert_plain(data: object) -> None:
    if isinstance(data, dict):
        assert all(type(key) is str for key in data)
        for value in data.values():
            assert_plain(value)
    elif isinstance(data, list):
        for value in data:
            assert_plain(value)
    else:
        assert data is None or type(data) in (str, int, float, bool)


def unreadable(path: Path, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    unreadable(tmp_path / "missing.yaml", "no such file")
    unreadable(tmp_path, "cannot be read: Is a directory")
    unreadable(tmp_path / ("x" * 300), "cannot be read: File name too long")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    unreadable(tmp_path / "latin.yaml", "not UTF-8")
    (tmp_path / "big.yaml").write_bytes(b"#" * (2**18 + 1))
    unreadable(tmp_path / "big.yaml", "larger than 262144 bytes")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero")
def test_an_endless_file_is_refused() -> None:
    unreadable(Path("/dev/zero"), "larger than")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (5, "5"),
        (1.5, "1.5"),
        ("x", "'x'"),
        ("a\nb\x1b", r"'a\nb\x1b'"),
        ({"a": 1}, "a mapping"),
        ([1, 2], "a list"),
    ],
)
def test_values_in_messages(value: object, text: str) -> None:
    assert shown(value) == text


@given(st.text())
def test_one_line_is_one_printable_line(text: str) -> None:
    assert one_line(text).isprintable()
    if text.isprintable() and len(text) <= 80:
        assert one_line(text) == text


def test_a_pipe_that_nobody_writes_into_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    unreadable(tmp_path / "pipe", "it is a pipe")
