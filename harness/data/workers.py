"""Loading processes: started without a fork of this one, and gone when it is, however it ends.

MPI forbids a fork after its start, so that each worker is a new Python (fork and exec in one, by
``subprocess``) that imports Pillow and numpy only; it calls no MPI, and what the launcher put into
its environment means nothing to it. Unlike ``multiprocessing`` this imports no main module again,
needs neither helper process nor thread, and leaves no name behind:

- pixels and descriptions of jobs lie in one anonymous file in memory (a memfd), which the workers
  inherit; what is in flight needs no room in /dev/shm;
- one socket pair, which they inherit too, carries short messages: each is taken by whichever
  worker is free, and each answer comes back the same way. When this process is gone, also by
  SIGKILL, its end closes, and workers leave at the next image.

Linux only, as the rest of what runs on compute nodes.
"""

from __future__ import annotations

import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from harness.data.decode import U8, Job, decode
from harness.errors import DataError

_MESSAGE = struct.Struct("<5Q")  # number of the ticket, its slot's offset and size, first, last
_HEADER = struct.Struct(
    "<QQQ40x"
)  # of a slot: 1 while it is wanted, number of images, bytes of the job
_WRONG = 256  # bytes for what is wrong with an image: length, then UTF-8
_GRAIN = 1 << 16  # slots begin and end at multiples of it
_SLICE = 8  # images of a message at most
_POLL = 250  # milliseconds without an answer after which to see whether all workers are alive
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class _Slot(NamedTuple):
    """A stretch of the shared memory: a header, what is wrong, the pixels, and the job."""

    size: int
    offset: int


@dataclass(eq=False)
class Ticket:
    """A job that has been handed in."""

    number: int
    job: Job
    slot: _Slot
    left: int
    """Images without an answer yet."""
    dropped: bool = False


class Workers:
    """Loading processes; they start at the first job. Can be pickled, without them.

    Calls from several threads wait for each other.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: _Pool | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Workers], tuple[int]]:
        return Workers, (self.count,)

    @property
    def pids(self) -> list[int]:
        """Of the processes that have been started."""
        return [process.pid for process in self._pool.processes] if self._pool else []

    def submit(self, job: Job) -> Ticket:
        """Hand in a job; returns at once. Raises DataError if processes cannot be started."""
        with self._lock:
            if self._pool is None:
                self._pool = _Pool(self.count)
            return self._pool.submit(job)

    def wait(self, ticket: Ticket) -> tuple[U8, list[str]]:
        """Pixels (m, 3, side, side), valid until `release`, and what is wrong with each image, ""
        if nothing. Raises DataError if a process has died, or if `close` came first."""
        with self._lock:
            if self._pool is None or not self._pool.holds(ticket):
                raise DataError("the loading processes have been closed")
            self._pool.finish(ticket)
            return self._pool.result(ticket)

    def release(self, ticket: Ticket) -> None:
        """Pixels, or images that are not decoded yet, are not needed any more."""
        with self._lock:
            if self._pool is not None and self._pool.holds(ticket):
                self._pool.release(ticket)

    def close(self) -> None:
        """End the processes at once; another job starts new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None


class _Pool:
    """Running processes and what is in flight. Raises DataError if one cannot be started."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._arena = _anonymous_file()
        self._memory: mmap.mmap | None = None
        self._free: list[_Slot] = []
        self._tickets: dict[int, Ticket] = {}
        self._numbers = 0
        self._backlog: deque[tuple[Ticket, int, int]] = deque()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._channel, select.POLLIN)
        self.processes: list[subprocess.Popen[bytes]] = []
        # Called at the end of the interpreter too.
        ours = (os.getpid(), self.processes, self._arena, self._channel)
        self.close = weakref.finalize(self, _end, *ours)
        try:
            with theirs:
                for _ in range(count):
                    self.processes.append(_start(self._arena, theirs.fileno()))
        except OSError as error:
            self.close()
            raise DataError(
                f"data.workers = {count}: only {len(self.processes)} loading processes can be "
                f"started ({error.strerror or error})"
            ) from error

    def holds(self, ticket: Ticket) -> bool:
        return self._tickets.get(ticket.number) is ticket

    def submit(self, job: Job) -> Ticket:
        self._collect()
        text = pickle.dumps(job, pickle.HIGHEST_PROTOCOL)
        count = len(job.places)
        slot = self._slot(_pixels_at(count) + count * 3 * job.side**2 + len(text))
        memory = self._mapped()
        _HEADER.pack_into(memory, slot.offset, 1, count, len(text))
        memory[slot.offset + slot.size - len(text) : slot.offset + slot.size] = text
        ticket = Ticket(self._numbers, job, slot, count)
        self._numbers += 1
        self._tickets[ticket.number] = ticket
        step = max(1, min(_SLICE, -(-count // self._count)))  # all share the next micro-batch
        for first in range(0, count, step):
            self._backlog.append((ticket, first, min(first + step, count)))
        self._flush()
        return ticket

    def finish(self, ticket: Ticket) -> None:
        # Each time, as the others may go on for long without one that has died.
        self._check_alive()
        while True:
            progress = self._collect()
            self._flush()
            if not ticket.left:
                return
            if not progress:
                ready = self._poll.poll(_POLL)
                if not ready or ready[0][1] & (select.POLLHUP | select.POLLERR):
                    self._check_alive()

    def result(self, ticket: Ticket) -> tuple[U8, list[str]]:
        memory, slot, job = self._mapped(), ticket.slot, ticket.job
        return _pixels(memory, slot, job.side), _read_wrong(memory, slot)

    def release(self, ticket: Ticket) -> None:
        self._mapped()[ticket.slot.offset] = 0
        ticket.dropped = True
        self._settle(ticket)
        self._flush()

    def _settle(self, ticket: Ticket) -> None:
        """Free the slot of a ticket once nobody will touch it any more."""
        if ticket.dropped and not ticket.left:
            del self._tickets[ticket.number]
            insort(self._free, ticket.slot)

    def _slot(self, need: int) -> _Slot:
        """The smallest free slot of ``need`` bytes, or a new one."""
        at = bisect_left(self._free, (need, 0))
        if at < len(self._free):
            return self._free.pop(at)
        offset, size = os.fstat(self._arena).st_size, -(-need // _GRAIN) * _GRAIN
        os.truncate(self._arena, offset + size)
        self._memory = None
        return _Slot(size, offset)

    def _mapped(self) -> mmap.mmap:
        """All of the shared memory; arrays in an older and shorter map stay valid."""
        if self._memory is None:
            self._memory = mmap.mmap(self._arena, 0)
        return self._memory

    def _flush(self) -> None:
        """Send messages while there is room for them."""
        while self._backlog:
            ticket, first, last = self._backlog[0]
            if ticket.dropped:
                self._answered(ticket, last - first)
            else:
                slot = ticket.slot
                message = _MESSAGE.pack(ticket.number, slot.offset, slot.size, first, last)
                try:
                    self._channel.send(message)
                except OSError:  # no room, or nobody there: `finish` finds out
                    return
            self._backlog.popleft()

    def _collect(self) -> bool:
        """Take the answers that are there; returns whether there was any."""
        progress = False
        while True:
            try:
                answer = self._channel.recv(_MESSAGE.size)
            except OSError:
                return progress
            if not answer:
                return progress
            number, _, _, first, last = _MESSAGE.unpack(answer)
            self._answered(self._tickets[number], last - first)
            progress = True

    def _answered(self, ticket: Ticket, images: int) -> None:
        ticket.left -= images
        self._settle(ticket)

    def _check_alive(self) -> None:
        for process in self.processes:
            code = process.poll()
            if code == -signal.SIGKILL:
                raise DataError(
                    f"loading process {process.pid} was killed by SIGKILL, as the system does when "
                    "memory runs out; fewer data.workers, a smaller data.prefetch or a smaller "
                    "batch.micro need less of it"
                )
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                raise DataError(f"loading process {process.pid} {how}; its standard error says why")


def _anonymous_file() -> int:
    """A file that has no name and goes with its last user; in memory if the system can."""
    try:
        return os.memfd_create("harness-images")
    except OSError:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


def _start(arena: int, channel: int) -> subprocess.Popen[bytes]:
    """A worker. It keeps what is blocked here: only its rank answers to signals, of which Ctrl-C
    goes to all processes of a terminal."""
    code = f"from harness.data.workers import serve; serve({arena}, {channel})"
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(arena, channel),
            env=os.environ | _ONE_THREAD | {"PYTHONPATH": paths},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(
    owner: int, processes: list[subprocess.Popen[bytes]], arena: int, channel: socket.socket
) -> None:
    if os.getpid() != owner:  # a fork that comes to its end
        return
    for process in processes:
        process.kill()  # they hold nothing that could be lost
    for process in processes:
        process.wait()
    channel.close()
    os.close(arena)


# ---- in the worker ------------------------------------------------------------------------------


def serve(arena: int, channel: int) -> None:
    """Decode what comes in until the other end is gone."""
    line = socket.socket(fileno=channel)
    poll = select.poll()
    poll.register(line, 0)  # which reports that the other end is closed, and nothing else
    memory: mmap.mmap | None = None
    with suppress(ConnectionError):
        while not poll.poll(0) and (message := line.recv(_MESSAGE.size)):
            _, offset, size, first, last = _MESSAGE.unpack(message)
            if memory is None or offset + size > len(memory):
                memory = mmap.mmap(arena, 0)
            _work(memory, _Slot(size, offset), first, last, poll)
            line.send(message)


def _work(memory: mmap.mmap, slot: _Slot, first: int, last: int, poll: select.poll) -> None:
    wanted, _, length = _HEADER.unpack_from(memory, slot.offset)
    if not wanted:
        return
    end = slot.offset + slot.size
    job: Job = pickle.loads(memory[end - length : end])  # noqa: S301 - written by our own rank

    def go_on() -> bool:
        if poll.poll(0):
            os._exit(0)
        return bool(memory[slot.offset])

    pixels = _pixels(memory, slot, job.side)[first:last]
    wrong = decode(job.part(first, last), pixels, go_on)
    _write_wrong(memory, slot, first, wrong)


# ---- what a slot holds --------------------------------------------------------------------------


def _pixels_at(count: int) -> int:
    return _HEADER.size + count * _WRONG


def _pixels(memory: mmap.mmap, slot: _Slot, side: int) -> U8:
    _, count, _ = _HEADER.unpack_from(memory, slot.offset)
    at = slot.offset + _pixels_at(count)
    return np.frombuffer(memory, np.uint8, count * 3 * side * side, at).reshape(-1, 3, side, side)


def _write_wrong(memory: mmap.mmap, slot: _Slot, first: int, wrong: list[str]) -> None:
    for i, text in enumerate(wrong, start=first):
        at = slot.offset + _HEADER.size + i * _WRONG
        data = text.encode(errors="replace")[: _WRONG - 1]
        memory[at : at + 1 + len(data)] = bytes([len(data)]) + data


def _read_wrong(memory: mmap.mmap, slot: _Slot) -> list[str]:
    _, count, _ = _HEADER.unpack_from(memory, slot.offset)
    texts = []
    for i in range(count):
        at = slot.offset + _HEADER.size + i * _WRONG
        texts.append(memory[at + 1 : at + 1 + memory[at]].decode(errors="replace"))
    return texts
