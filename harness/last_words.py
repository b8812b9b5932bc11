"""What a rank that fails leaves for the process that has launched it, which tells the user."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from harness import environment
from harness.comm.together import exit_code_of
from harness.errors import HarnessError, PeerLost, RankFailure
from harness.records import write_json


def leave_last_words(error: Exception, rank: int) -> int:
    """Say what went wrong, to the launching process if there is one, else here; the exit code."""
    # An OSError's own text says what is wrong and where (disk full, no permission).
    known = isinstance(error, HarnessError | OSError)
    code = exit_code_of(error)
    message = str(error) if known else f"{type(error).__name__}: {error}"
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
    except OSError:  # the disk that is full is this one too
        print(f"harness: rank {rank} on {environment.host()}: {message}", file=sys.stderr)
    return code


def leave_at_once(code: int) -> NoReturn:
    """End this process. The other ranks may wait in a collective, and an orderly shutdown would
    wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
