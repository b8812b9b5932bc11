"""Trains runs of one process one after another, so that they share what a start takes.

    python -m harness.cells < REQUESTS

Each line of standard input is JSON, {"config": PATH, "run_dir": PATH}; each line of standard output
says how that run has ended, {"run_dir", "code", "said"}. What training prints goes to the run's
launch.log. A run that was begun goes on from its newest checkpoint. SIGTERM stops the current one
with a checkpoint, and ends this process.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from pathlib import Path

from harness.errors import StoppedEarly
from harness.rundir import RunDirectory
from harness.stop import StopRequest
from harness.worker import train


def main() -> int:
    """Returns 75 if it was stopped, else 0."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints shall be no answer
    stop = StopRequest()
    stop.listen()
    for line in sys.stdin:
        if stop.asked():
            return StoppedEarly.exit_code
        request = json.loads(line)
        code, said = _train(Path(request["config"]), Path(request["run_dir"]), stop)
        answer = {"run_dir": request["run_dir"], "code": code, "said": said}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # who asked was killed; the run's directory has all that counts
            os.dup2(os.open(os.devnull, os.O_WRONLY), answers.fileno())
            return code
        gc.collect()
        if code == StoppedEarly.exit_code:
            return code
    return 0


def _train(config: Path, run_dir: Path, stop: StopRequest) -> tuple[int, str]:
    """(exit code, the last words)."""
    run = RunDirectory(run_dir)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = train(config, (), run_dir, run.newest().config.exists(), stop)
    text = printed.getvalue()
    with contextlib.suppress(OSError), run.launch_log.open("a", encoding="utf-8") as log:
        log.write(text)
    words = [line for line in text.splitlines() if line.startswith("harness: ")]
    return code, (words[-1].removeprefix("harness: ") if words and code else "")


if __name__ == "__main__":
    sys.exit(main())
