"""A reader of the few pickles that CIFAR comes in, which cannot run code.

`pickle` builds what a file says by calling what the file names. Here nothing is called: an
interpreter of our own, with the opcodes that lists, dictionaries, numbers, strings and numpy's
arrays of bytes need, takes the few known names as symbols and refuses everything else. Strings of
any length stay in the file until they are wanted, so memory follows the number of opcodes, which
is limited, and never what the file claims.
"""

from __future__ import annotations

import codecs
import os
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from harness.data_sizes import FRESH_COPY
from harness.errors import DataError

_MOST_STEPS = 1_000_000  # CIFAR-100's training file written anew by Python 3 takes about 600,000
_SHORT = 256  # bytes; file names are shorter
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Span:
    """A long string, left in the file."""

    offset: int
    length: int
    """In bytes of the file."""
    utf8: bool = False
    """It is text."""
    latin1: bool = False
    """Its bytes were turned into text for the file, character by byte; with ``utf8``."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the file wants imported; it is only ever compared."""

    name: str


@dataclass(slots=True)
class Bytes:
    """A numpy array of unsigned bytes; without a shape until its state has been read."""

    shape: tuple[int, ...] | None = None
    column_major: bool = False
    data: Span | bytes = b""


@dataclass(slots=True)
class _ByteType:
    """numpy's dtype('u1')."""


_RECONSTRUCT = (
    Global("numpy.core.multiarray._reconstruct"),
    Global("numpy._core.multiarray._reconstruct"),  # since numpy 2
)
_ARRAY, _DTYPE = Global("numpy.ndarray"), Global("numpy.dtype")
_ENCODE = Global("_codecs.encode")  # how Python 3 writes bytes in protocol 2 …
_BYTES = Global("__builtin__.bytes")  # … and no bytes
_KNOWN = (*_RECONSTRUCT, _ARRAY, _DTYPE, _ENCODE, _BYTES)
_CALLS = ("PERSID", "BINPERSID", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
_NAMES = {entry.code.encode("latin-1"): entry.name for entry in pickletools.opcodes}
_BYTE_STATE = (3, "|", None, None, None, -1, -1, 0)  # version, order, …, size, alignment, flags


def read_pickle(stream: BufferedReader, path: Path) -> object:
    """What the pickle in the stream holds: dict, list, tuple, int, bool, None, str, bytes, and here
    `Span` for long strings and `Bytes` for arrays.

    Raises DataError, with ``path``, for a file that is cut off or damaged, or asks for anything
    else; OSError as the stream does.
    """
    try:
        return _Machine(stream, path).run()
    except _Corrupt as error:
        raise DataError(f"{path}: {error}; {FRESH_COPY}") from None


def copy_span(stream: BufferedReader, path: Path, data: Span | bytes, into: memoryview) -> None:
    """Fill the writable bytes ``into`` with exactly those of ``data``; raises DataError."""
    if isinstance(data, bytes):
        found = len(data)
        if found == len(into):
            into[:] = data
    elif data.utf8:
        found = _copy_latin1(stream, path, data, into)
    else:
        found = data.length
        if found == len(into):
            stream.seek(data.offset)
            found = stream.readinto(into)
    if found != len(into):
        raise DataError(
            f"{path}: an array of {len(into)} bytes expected, {found} found; {FRESH_COPY}"
        )


def _copy_latin1(stream: BufferedReader, path: Path, data: Span, into: memoryview) -> int:
    """Decode piece by piece: a whole array as text would take several times its memory."""
    stream.seek(data.offset)
    decoder = codecs.getincrementaldecoder("utf-8")()
    left, done = data.length, 0
    while left:
        chunk = stream.read(min(_CHUNK, left))
        left = left - len(chunk) if chunk else 0
        try:
            piece = decoder.decode(chunk, final=not left).encode("latin-1")
        except UnicodeError:
            raise DataError(f"{path}: an array that is not bytes; {FRESH_COPY}") from None
        into[done : done + len(piece)] = piece[: len(into) - done]
        done += len(piece)
        if done > len(into):
            break
    return done


class _Corrupt(Exception):  # noqa: N818 - becomes a DataError with the file's name
    pass


class _Machine:
    """One reading of one pickle."""

    def __init__(self, stream: BufferedReader, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.size = os.fstat(stream.fileno()).st_size
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        """Stacks below each mark."""
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        read, operations = self.stream.read, _OPERATIONS
        for _ in range(_MOST_STEPS):
            code = read(1)
            if code == b".":
                return self.pop()
            operation = operations.get(code)
            if operation is None:
                raise self.unknown(code)
            operation(self)
        raise _Corrupt(f"more than {_MOST_STEPS:,} steps in a pickle")

    def unknown(self, code: bytes) -> Exception:
        at = self.stream.tell() - 1
        if not code:
            return _Corrupt("the file is empty" if at < 0 else "truncated: its pickle has no end")
        known = _NAMES.get(code)
        if known is None or (at == 0 and code != b"\x80"):
            return _Corrupt(f"not a pickle as CIFAR's: byte 0x{code.hex()} at {at}")
        if known in _CALLS:
            return self.refusal(f"the opcode {known}")
        return _Corrupt(f"the opcode {known} at {at}, which CIFAR's pickles do without")

    def refusal(self, what: str) -> DataError:
        return DataError(
            f"{self.path}: its pickle asks for {what}, which CIFAR's files have no use for; a "
            "pickle that would run code is refused"
        )

    # Bytes of the file

    def take(self, count: int) -> bytes:
        found = self.stream.read(count)
        if len(found) < count:
            raise _Corrupt("truncated: its pickle has no end")
        return found

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def string(self, length: int, utf8: bool) -> str | bytes | Span:
        if length > _SHORT:
            offset = self.stream.tell()
            if length > self.size - offset:
                raise _Corrupt(
                    f"truncated: a string of {length} bytes begins at {offset}, and the file has "
                    f"{self.size}"
                )
            self.stream.seek(length, os.SEEK_CUR)
            return Span(offset, length, utf8)
        found = self.take(length)
        if not utf8:
            return found
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError:
            raise _Corrupt("text that is not UTF-8 in its pickle") from None

    def line(self) -> str:
        found = self.stream.readline(_SHORT)
        if not found.endswith(b"\n"):
            raise _Corrupt("a name in its pickle that does not end")
        return found[:-1].decode("utf-8", "backslashreplace")

    # The stack

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if not self.stack:
            raise _Corrupt("damaged: its pickle takes more than it has")
        return self.stack.pop()

    def pop_marked(self) -> list[object]:
        if not self.marked:
            raise _Corrupt("damaged: its pickle takes more than it has")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def push_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def put(self, key: int) -> None:
        self.memo[key] = self.pop()
        self.stack.append(self.memo[key])

    def get(self, key: int) -> None:
        if key not in self.memo:
            raise _Corrupt("damaged: its pickle refers to what is not there")
        self.stack.append(self.memo[key])

    def append(self, items: list[object]) -> None:
        target = self.pop()
        if not isinstance(target, list):
            raise _Corrupt("damaged: its pickle appends to what is no list")
        target.extend(items)
        self.stack.append(target)

    def set_items(self, items: list[object]) -> None:
        target = self.pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise _Corrupt("damaged: its pickle sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | bytes):
                raise _Corrupt("a dictionary in its pickle with keys that are not names")
            target[key] = value
        self.stack.append(target)

    def pop_pair(self) -> list[object]:
        value, key = self.pop(), self.pop()
        return [key, value]

    # Names, and what would be calls

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Corrupt("damaged: a name in its pickle is not text")
        found = Global(f"{module}.{name}")
        if found not in _KNOWN:
            raise self.refusal(found.name)
        self.stack.append(found)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def instance(self) -> None:
        raise self.refusal(f"{self.line()}.{self.line()}")

    def reduce(self) -> None:
        """What a call of a known name with known arguments would give."""
        arguments, function = self.pop(), self.pop()
        given = arguments if isinstance(arguments, tuple) else ()
        if function in _RECONSTRUCT and _same(given, (_ARRAY, (0,), "b")):
            self.stack.append(Bytes())
        elif function == _DTYPE and _same(given, ("u1", False, True)):
            self.stack.append(_ByteType())
        elif function == _DTYPE and given and isinstance(given[0], str | bytes):
            kind = _text(given[0])
            raise _Corrupt(f"an array of type {kind}, but CIFAR's are unsigned bytes (u1)")
        elif function == _BYTES and arguments == ():
            self.stack.append(b"")
        elif function == _ENCODE and len(given) == 2 and _same(given[1:], ("latin1",)):
            self.stack.append(self.encoded(given[0]))
        else:
            name = function.name if isinstance(function, Global) else "what is no function"
            raise self.refusal(f"a call of {name} with other arguments than an array of bytes has")

    def encoded(self, text: object) -> bytes | Span:
        if isinstance(text, Span) and text.utf8 and not text.latin1:
            return Span(text.offset, text.length, utf8=True, latin1=True)
        if isinstance(text, str):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                pass
        raise _Corrupt("damaged: text in its pickle that does not stand for bytes")

    def build(self) -> None:
        """Give what was made its state."""
        state, target = self.pop(), self.pop()
        given = state if isinstance(state, tuple) else ()
        if isinstance(target, _ByteType):
            if not _same(given, _BYTE_STATE):
                raise _Corrupt("an array type in its pickle that is not plain unsigned bytes")
        elif isinstance(target, Bytes) and target.shape is None and len(given) == 5:
            version, shape, kind, column_major, data = given
            if (
                version != 1
                or not isinstance(shape, tuple)
                or not all(type(length) is int and length >= 0 for length in shape)
                or not isinstance(kind, _ByteType)
                or column_major not in (False, True)
                or not (isinstance(data, bytes) or _is_bytes(data))
            ):
                raise _Corrupt("an array in its pickle that is not plain unsigned bytes")
            target.shape, target.column_major, target.data = shape, bool(column_major), data
        else:
            raise self.refusal("the state of an object that is no array")
        self.stack.append(target)


def _is_bytes(data: object) -> bool:
    return isinstance(data, Span) and data.utf8 == data.latin1


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _same(found: tuple[object, ...], expected: tuple[object, ...]) -> bool:
    """Whether a tuple holds these values; bytes (Python 2's str) count as text, 0, 1 as flags."""
    return len(found) == len(expected) and all(
        (_text(one) if isinstance(one, bytes) else one) == other
        for one, other in zip(found, expected, strict=True)
    )


Operation = Callable[[_Machine], object]


def _constant(value: object) -> Operation:
    return lambda machine: machine.push(value)


def _number(count: int, signed: bool = False) -> Operation:
    return lambda machine: machine.push(machine.number(count, signed))


def _long(machine: _Machine) -> None:
    length = machine.number(1)
    if length > 8:
        raise _Corrupt(f"a number of {length} bytes in its pickle")
    machine.push(machine.number(length, signed=True))


def _string(count: int, utf8: bool = False) -> Operation:
    return lambda machine: machine.push(machine.string(machine.number(count), utf8))


def _protocol(machine: _Machine) -> None:
    version = machine.number(1)
    if version == 5:
        raise _Corrupt("a pickle of protocol 5, in which numpy's arrays differ; save it with 4")
    if not 2 <= version <= 4:
        raise _Corrupt(f"not a pickle of protocol 2 to 4, but {version}")


# As in pickletools.opcodes. The strings of Python 2 are bytes; protocols above 2 are what current
# versions of Python write when a file is loaded and saved again.
_OPERATIONS: dict[bytes, Operation] = {
    b"\x80": _protocol,  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"J": _number(4, signed=True),  # BININT
    b"K": _number(1),  # BININT1
    b"M": _number(2),  # BININT2
    b"\x8a": _long,  # LONG1
    b"U": _string(1),  # SHORT_BINSTRING
    b"T": _string(4),  # BINSTRING
    b"C": _string(1),  # SHORT_BINBYTES
    b"B": _string(4),  # BINBYTES
    b"\x8e": _string(8),  # BINBYTES8
    b"\x8c": _string(1, utf8=True),  # SHORT_BINUNICODE
    b"X": _string(4, utf8=True),  # BINUNICODE
    b"\x8d": _string(8, utf8=True),  # BINUNICODE8
    b"]": lambda m: m.push([]),  # EMPTY_LIST
    b"}": lambda m: m.push({}),  # EMPTY_DICT
    b")": _constant(()),  # EMPTY_TUPLE
    b"(": _Machine.mark,
    b"t": lambda m: m.push(tuple(m.pop_marked())),  # TUPLE
    b"\x85": lambda m: m.push_tuple(1),  # TUPLE1
    b"\x86": lambda m: m.push_tuple(2),  # TUPLE2
    b"\x87": lambda m: m.push_tuple(3),  # TUPLE3
    b"a": lambda m: m.append([m.pop()]),  # APPEND
    b"e": lambda m: m.append(m.pop_marked()),  # APPENDS
    b"s": lambda m: m.set_items(m.pop_pair()),  # SETITEM
    b"u": lambda m: m.set_items(m.pop_marked()),  # SETITEMS
    b"q": lambda m: m.put(m.number(1)),  # BINPUT
    b"r": lambda m: m.put(m.number(4)),  # LONG_BINPUT
    b"\x94": lambda m: m.put(len(m.memo)),  # MEMOIZE
    b"h": lambda m: m.get(m.number(1)),  # BINGET
    b"j": lambda m: m.get(m.number(4)),  # LONG_BINGET
    b"c": lambda m: m.push_global(m.line(), m.line()),  # GLOBAL
    b"\x93": _Machine.stack_global,
    b"i": _Machine.instance,  # INST
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
