"""What a rank that fails leaves for the process that has launched it, which tells the user."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from typing import NoReturn

import torch

from harness import environment
from harness.comm.together import exit_code_of
from harness.errors import HarnessError, PeerLost, RankFailure
from harness.jsonl import write_json


def leave_last_words(error: Exception, rank: int) -> int:
    """Say what went wrong, to the launching process if there is one, else here; the exit code."""
    # An OSError's own text says what is wrong and where (disk full, no permission).
    known = isinstance(error, HarnessError | OSError)
    code = exit_code_of(error)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    if lacks_memory(error):
        message = (
            f"out of memory ({_first_line(message)}); a smaller batch.micro, fewer data.workers or "
            "fewer ranks on a host need less"
        )
    where = environment.failure_dir()
    if where is None:
        print(f"harness: {message}", file=sys.stderr)
        if not known:
            traceback.print_exception(error, file=sys.stderr)
        return code
    words = {
        "rank": rank,
        "host": environment.host(),
        "exit_code": code,
        "message": message,
        "consequence": isinstance(error, PeerLost),
        # A machine's failure may be gone the next time; what follows from the run itself is not.
        "final": isinstance(error, HarnessError) and not isinstance(error, RankFailure),
        "traceback": None if known else "".join(traceback.format_exception(error)),
    }
    try:
        write_json(where / f"rank-{rank:05d}.json", words)
    except (OSError, MemoryError):  # the disk that is full is this one too
        print(f"harness: rank {rank} on {environment.host()}: {message}", file=sys.stderr)
    return code


def lacks_memory(error: Exception) -> bool:
    """Whether it says that memory has run out: the host's, that which this process may have, or
    the GPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocator for the CPU raises nothing more precise.
    words = r"can't allocate memory|not enough memory|bad_alloc|Cannot allocate memory"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def leave_at_once(code: int) -> NoReturn:
    """End this process. The other ranks may wait in a collective, and an orderly shutdown would
    wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
