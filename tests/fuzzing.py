"""What the fuzz tests share: how long they run, the command as a user calls it, damage to files.

In `make test` each has a fixed, small number of examples, the same every time. `make fuzz` has
HARNESS_FUZZ times as many, and others each time.
"""

from __future__ import annotations

import io
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from harness.cli import main

F = TypeVar("F", bound=Callable[..., Any])
LONG = int(os.environ.get("HARNESS_FUZZ") or 0)
ROOM = 1 << 31
"""Bytes that a command may take beyond what the tests have taken before it: much more than any of
them needs, and less than what damaged files claim."""


def fuzz(examples: int) -> Callable[[F], F]:
    """Run a test with so many examples, times HARNESS_FUZZ."""
    chosen: Callable[[F], F] = settings(
        max_examples=examples * (LONG or 1),
        derandomize=not LONG,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if LONG else [])],
        report_multiple_bugs=False,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return chosen


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def command(*words: object) -> Said:
    """`harness WORDS`, in this process. What leaves it as an exception is what a user would see as
    a traceback, and fails the test. So does more memory than ``ROOM``."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err), limited(ROOM):
        try:
            code = main([str(word) for word in words])
        except SystemExit as left:  # argparse's
            code = int(left.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    said = Said(code, *texts)
    assert said.code in (0, 1, 2, 75), said
    assert "Traceback" not in said.out + said.err, said
    assert said.code in (0, 75) or said.err.strip(), "it failed without a word"
    return said


def check_message(error: Exception, *words: str) -> None:
    """It is for people: printable lines, with what it is about."""
    assert all(line.isprintable() for line in str(error).splitlines()), repr(error)
    assert all(word in str(error) for word in words), repr(error)


@contextmanager
def limited(room: int) -> Iterator[None]:
    """Memory of this process may grow by so many bytes only."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# What is done behind the tests' back


class Watch:
    """What Python's audit hooks tell while it is on: what was started, written and removed."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[tuple[str, tuple[Any, ...]]] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event in _EVENTS or (event == "open" and _writes(arguments))):
            self.seen.append((event, arguments))

    @contextmanager
    def watching(self) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
        self.seen, self.on = [], True
        try:
            yield self.seen
        finally:
            self.on = False


_EVENTS = frozenset(
    {
        *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn"),
        *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"),
        *("os.chmod", "shutil.rmtree", "socket.connect", "socket.bind", "pickle.find_class"),
        "ctypes.dlopen",
    }
)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    written = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
    return written and arguments[0] not in (os.devnull, b"/dev/null")


WATCH = Watch()


def tree(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a directory: mode, time of change, contents of regular files."""
    found = {}
    for one in sorted(path.rglob("*")):
        status = one.lstat()
        regular = one.is_file() and not one.is_symlink()
        content = one.read_bytes() if regular else b""
        found[str(one.relative_to(path))] = status.st_mode, status.st_mtime_ns, content
    return found


# Damage

SNIPPETS = (
    *(b"\0", b"\xff\xfe", b"\r\n", b"\x1b[2J", b"\xe2\x80\xae", b"\xed\xa0\x80", b"\t", b"\n\n"),
    *(b": ", b"- ", b"[", b"{", b"]", b"}", b'"', b"'", b"|", b">", b"#", b"%", b"@", b"`", b"\\"),
    *(b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system [touch pwned]\n", b"!!set {a}"),
    *(b"9" * 5000, b"-1", b"0x7fffffff", b"1e400", b".inf", b"NaN", b"null", b"true", b"1_000"),
    *(b"{" * 2000, b"[" * 2000, b"- " * 2000, b"a" * 70_000, b"(" * 500, b"$(touch pwned)"),
    *(b"`touch pwned`", b"; touch pwned\n", b"../../../etc/passwd", b"/dev/zero", b"%n%s%x"),
    *(b"<script>alert(1)</script>", b"=cmd|' /C calc'!A0", b"2\xc2\xb2", b"\xd9\xa1\xd9\xa2"),
)
places = st.floats(0, 1, exclude_max=True)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, most: int = 4) -> bytes:
    """The content with some of its bytes changed, left out, doubled or put elsewhere."""
    for _ in range(draw(st.integers(1, most))):
        at = int(draw(places) * (len(content) + 1))
        length = draw(st.integers(0, 40) | st.integers(0, len(content)))
        part = content[at : at + length]
        how = draw(st.sampled_from(["cut", "put", "flip", "double", "move", "end", "snippet"]))
        if how == "cut":
            content = content[:at] + content[at + length :]
        elif how == "put":
            content = content[:at] + draw(st.binary(max_size=12)) + content[at:]
        elif how == "flip" and part:
            bit = bytes([part[0] ^ (1 << draw(st.integers(0, 7)))])
            content = content[:at] + bit + content[at + 1 :]
        elif how == "double":
            content = content[:at] + part + content[at:]
        elif how == "move":
            to = int(draw(places) * len(content))
            rest = content[:at] + content[at + length :]
            content = rest[:to] + part + rest[to:]
        elif how == "end":
            content = content[:at]
        else:
            content = content[:at] + draw(st.sampled_from(SNIPPETS)) + content[at + length % 8 :]
    return content


HOSTILE_TEXTS = (
    *("", " ", "\0", "\n", "a\nb", "\x1b[31m", "\u202e", "\ud800", "é", "²", "١٢", "a" * 5000),
    *("<script>alert(1)</script>", "</td></svg>", "{{ 7*7 }}", "[x](javascript:y)", "| a | b |"),
    *("=1+1", "+1", "-1", "@x", "'; DROP", '"', "\\", "$(touch pwned)", "`touch pwned`", "; ls"),
    *("../..", "/etc/passwd", "/dev/zero", "-rf", "--help", "%s%n", "NaN", "Infinity", "null"),
)
HOSTILE_NUMBERS = (
    *(0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**18, -(10**18), 10**400, -(10**400), True, False),
    *(0.5, -0.0, 5e-324, 1e-300, 1e100, 1e300, -1e300, float("inf"), float("-inf"), float("nan")),
)
hostile: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.sampled_from(HOSTILE_NUMBERS) | st.sampled_from(HOSTILE_TEXTS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(HOSTILE_TEXTS) | st.just("kind"), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def replaced(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A copy of plain data in which some values, anywhere, are others, gone, or have company."""
    for _ in range(draw(st.integers(1, most))):
        value = _replaced(draw, value)
    return value


def _replaced(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(hostile)
    inside: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(inside))
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    how = draw(st.integers(0, 9))
    if how == 0:
        del changed[key]
    elif how == 1 and isinstance(changed, dict):
        changed[draw(st.sampled_from(HOSTILE_TEXTS))] = draw(hostile)
    elif how == 1:
        changed.append(changed[key])
    else:
        changed[key] = _replaced(draw, value[key])
    return changed


def words_of(texts: Sequence[str]) -> st.SearchStrategy[str]:
    """Texts made of these pieces and of others."""
    return st.lists(st.sampled_from(texts) | st.text(max_size=4), max_size=8).map("".join)
