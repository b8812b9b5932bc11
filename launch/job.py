"""What a batch script calls once its run has stopped before its end.

The run goes on in the next job of its chain, in a job of another size that is submitted here, or in
this one, queued again; or it stays stopped, because that was asked for.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config import load_config
from harness.environment import JOB_NUMBER
from harness.errors import HarnessError, LaunchError, StoppedEarly
from harness.launch_schema import Slurm
from harness.resume import ranks_wanted
from harness.rundir import RunDirectory
from harness.wording import counted
from launch.jobs import (
    State,
    ask,
    job_states,
    list_lock,
    read_list,
    restart_count,
    write_list,
)
from launch.submit import submit_successor

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE = 60  # seconds until Slurm ends a job that it queues again


@dataclass(frozen=True)
class Ending:
    """A job at its end, before the run's."""

    run_dir: Path
    base: Path
    """The directory whose slurm/jobs.json names the job."""
    number: str
    restarts: int
    """How often the job had been queued again when it started."""

    @property
    def was_warned(self) -> bool:
        """Whether Slurm, and not a user, has made the run stop.

        Preemption may reach the ranks alone, by SIGTERM, and leave no mark. A user's request does
        not: it is the file ``stop``.
        """
        marked = (self.run_dir / "slurm" / f"warned-{self.number}").exists()
        return marked or not RunDirectory(self.run_dir).stop_request.exists()

    def note(self, outcome: str, reason: str, ranks: int | None = None) -> None:
        """Say it, and add it to the list of jobs."""
        print(f"harness: {reason}", flush=True)
        more = {} if ranks is None else {"ranks_wanted": ranks}
        with list_lock(self.base):
            jobs = read_list(self.base)
            jobs.note(self.number, self.restarts, outcome, reason, **more)
            write_list(self.base, jobs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Decide how the run goes on; returns the exit code of the job."""
    parser = argparse.ArgumentParser(prog="python -m launch.job", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--base", type=Path, help="directory of the series that the run is part of")
    options = parser.parse_args(arguments)
    number = os.environ.get("SLURM_JOB_ID", "")
    if not JOB_NUMBER.fullmatch(number):
        print("harness: SLURM_JOB_ID is not set; a batch script calls this", file=sys.stderr)
        return 2
    # They are for the run, which has ended; and this must come to its end.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    ending = Ending(
        options.run_dir,
        options.base or options.run_dir,
        number,
        restart_count(os.environ.get("SLURM_RESTART_COUNT", "")),
    )
    try:
        return _go_on(ending)
    except (HarnessError, OSError) as error:
        print(f"harness: {error}; {_by_hand(ending)}", file=sys.stderr)
        return StoppedEarly.exit_code


def _go_on(ending: Ending) -> int:
    slurm = load_config(ending.run_dir / "slurm" / "config.yaml").slurm
    with list_lock(ending.base):  # its jobs may still be being submitted
        mine = read_list(ending.base).find(ending.number)
    run = RunDirectory(ending.run_dir)
    wanted = ranks_wanted(run)
    if mine is not None and mine.kind == "job" and wanted > mine.ranks:
        return _hand_on(ending, wanted)
    if _is_replaced(ending):
        ending.note("left to Slurm", "stopped: this job has been started again elsewhere")
        return StoppedEarly.exit_code
    if not ending.was_warned:
        ending.note("stopped", f"stopped as asked; {_by_hand(ending)}")
        return StoppedEarly.exit_code
    if not slurm.requeue:
        ending.note("stopped", f"warned by Slurm, slurm.requeue is off; {_by_hand(ending)}")
        return StoppedEarly.exit_code
    return _queue_again(ending, slurm)


def _hand_on(ending: Ending, wanted: int) -> int:
    """Leave the run to a job that has the ranks it wants."""
    after = read_list(ending.base).successor(ending.number)
    if after is not None and _is_to_come(after.id):
        reason = f"wants {wanted} ranks, which job {after.id} is for"
    else:
        after = submit_successor(ending.run_dir, ending.number, wanted)
        nodes = counted(after.nodes, "node")
        reason = f"wants {wanted} ranks; submitted job {after.id} with {nodes} for them"
    ending.note("handed on", reason, wanted)
    return 0


def _is_to_come(number: str) -> bool:
    """Whether a job has not ended yet, as far as can be told."""
    try:
        return any(not state.over for state in job_states([number])[number])
    except LaunchError:
        return True  # two jobs for one run would be worse than none


def _queue_again(ending: Ending, slurm: Slurm) -> int:
    """Have Slurm queue this very job again, unless it does so already or has it cancelled."""
    if ending.restarts >= slurm.max_requeues:
        ending.note(
            "stopped",
            f"warned by Slurm after {ending.restarts} requeues, which slurm.max_requeues allows; "
            f"{_by_hand(ending)}",
        )
        return StoppedEarly.exit_code
    now = _own_state(ending)
    if now.state != "RUNNING" or now.restarts != ending.restarts:
        # Preempted, cancelled, or started elsewhere while this node was out of reach: to queue it
        # again would undo a cancellation, or end the new attempt.
        ending.note("left to Slurm", f"warned; to Slurm this job is {now.state} by now")
        return StoppedEarly.exit_code
    ending.note("queued again", "warned by Slurm before the run's end; queueing this job again")
    ask(["scontrol", "requeue", ending.number])
    signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, _PATIENCE)
    return StoppedEarly.exit_code


def _is_replaced(ending: Ending) -> bool:
    """Whether this is an attempt that Slurm has lost sight of, as far as can be told."""
    try:
        return _own_state(ending).restarts != ending.restarts
    except LaunchError:
        return False


def _own_state(ending: Ending) -> State:
    states = job_states([ending.number])[ending.number]
    if not states:
        raise LaunchError(f"Slurm does not know job {ending.number} any more")
    return states[0]


def _by_hand(ending: Ending) -> str:
    config = ending.run_dir / "slurm" / "config.yaml"
    words = ["harness", "submit", str(config), "--run-dir", str(ending.run_dir), "--resume"]
    return f"go on with: {shlex.join(words)}"


if __name__ == "__main__":
    sys.exit(main())
