"""What each rank executes: join the world, take the run directory, load, resume, train."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from harness import checkpoint, environment, own, pulse
from harness.attempts import Attempt, Draft, check_format
from harness.autotune import Tuned, slower_than_none, tune
from harness.benchstats import Enough
from harness.comm import Communicator, allreduce, broadcast_bytes, open_communicator
from harness.comm.base import allgather_bytes
from harness.comm.together import AllLeave, together
from harness.config import dump_config, load_config
from harness.criterion import Criterion
from harness.data.datasets import ImageData
from harness.data.shared import load_shared
from harness.elastic import LeftOut, Membership, Regroup
from harness.errors import (
    CheckpointError,
    ConfigError,
    HarnessError,
    PeerLost,
    RunDirectoryError,
    StoppedEarly,
)
from harness.evaluate import Evaluation
from harness.files import read_text, write_atomic
from harness.journal import Journal
from harness.jsonl import read_jsonl, write_json
from harness.last_words import leave_at_once, leave_last_words
from harness.memory import keep_freed_memory
from harness.models import configured_model
from harness.progress import Display, Relay, Silent, local_display
from harness.provenance import changed_files, collect
from harness.records import Position, furthest
from harness.resume import check_same_run, check_same_settings, keep_choices
from harness.rundir import RunDirectory
from harness.runlock import RunLock
from harness.schedule.plan import build_plan
from harness.schema import Config
from harness.speedfit import settled_growth
from harness.stop import StopRequest
from harness.syncbn import convert
from harness.tensorboard import Scalars, check_installed, open_scalars
from harness.tracing import next_timeline
from harness.trackers import check_trackers, open_trackers
from harness.trainer import Trainer
from harness.yamlfile import one_line


@dataclass
class _Resumed:
    """Where a run goes on from; a fresh run's is empty."""

    content: bytes = b""
    name: str = ""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    state: checkpoint.State | None = None
    draft: Draft | None = None
    """Rank 0's, of a run that goes on."""
    lines_missing: int = 0
    """Lines of metrics.jsonl that the checkpoint counts on and that are gone."""
    furthest: tuple[int, int] = (0, 0)
    """Updates and samples that the attempt before came to."""

    @property
    def position(self) -> Position:
        return Position(**self.state["records"]) if self.state else Position()


def train(
    config_path: Path,
    overrides: Sequence[str],
    run_dir: Path,
    resume: bool,
    stop: StopRequest | None = None,
) -> int:
    """Train as one rank of a run; returns the exit code. Errors end as one message.

    ``stop``: one that has listened to signals since this process began.
    """
    comm: Communicator | None = None
    try:
        config = load_config(config_path, overrides)
        own.look_in(config.code)
        _start_mps()
        words = environment.failure_dir()
        run = RunDirectory(run_dir, launch=None if words is None else words.parent)
        config = settled_growth(config, run if resume else None)
        seconds = environment.seconds_to_measure()
        enough = None if seconds is None else Enough(seconds)
        stop = stop or StopRequest()
        stop.look_at(run.stop_request, run.stop_relay, enough=enough)
        membership = Membership.of_this_process()
        finished = False
        while not finished:  # once, unless ranks come and go while the processes live
            try:
                if membership is not None:
                    membership.assemble()
                _set_threads(config)
                comm = open_communicator(config.comm, config.profile.timeline)
                _run(config, run, resume, comm, stop, membership)
                finished = True
            except (Regroup, PeerLost) as left:
                if membership is None:
                    raise
                reason, lost_one = str(left), isinstance(left, PeerLost)
            if membership is not None and not finished:
                if comm is not None:
                    comm.close()
                    comm = None
                gc.collect()  # the model and its hooks, which refer to each other
                membership.rejoin(reason, lost_one)
    except LeftOut as left_out:
        print(f"harness: {left_out}", file=sys.stderr)
        return 0
    except AllLeave as leave:
        if leave.mine is not None:
            leave_last_words(leave.mine, _rank(comm))
        code = _leave(leave.exit_code, comm)
    except StoppedEarly as stopped:
        if (comm is None or comm.rank == 0) and not environment.relays_progress():
            print(f"harness: {stopped}", file=sys.stderr)
        code = _leave(stopped.exit_code, comm)
    except SystemExit as left:  # of a part of the user's: with 0, the run would pass for done
        error = HarnessError(f"a part of the run called sys.exit({left.code!r}){own.at(left)}")
        code = leave_last_words(error, _rank(comm))
    except Exception as error:
        code = leave_last_words(error, _rank(comm))
    else:
        if comm is not None:
            with pulse.meeting():
                comm.close()
        return 0
    if comm is not None and comm.size > 1:
        leave_at_once(code)
    return code


def _run(
    config: Config,
    run: RunDirectory,
    resume: bool,
    comm: Communicator,
    stop: StopRequest,
    membership: Membership | None,
) -> Evaluation:
    stop.listen()  # again: what was loaded since may have handlers of its own
    if membership is not None:
        resume = membership.settle(comm, run, resume)
    lock = RunLock(run)
    with ExitStack() as held:
        held.callback(lock.release)
        together(comm, lambda: _take(config, run, lock, resume) if comm.rank == 0 else None)
        try:
            pulse.at("loading the data")
            data = load_shared(config.data, comm)
            held.callback(data.train.close)
            held.callback(data.test.close)
            keep_freed_memory()  # only now: what loading has used for a moment goes back
            pulse.at("building the model")
            model = together(comm, lambda: _model(config, data, comm))
            _check_same_code(config, comm)
        except AllLeave:
            if comm.rank == 0 and not resume:
                lock.discard()  # no run has begun
            raise
        pulse.at("reading what the run goes on from")
        resumed = _resume(config, run, comm, model, held) if resume else _Resumed()
        journal = Journal(run, comm.rank == 0, config.train.keep_checkpoints, resumed.position)
        held.callback(journal.close)
        display = _display(comm)
        held.callback(display.close)
        if config.profile.timeline:
            _start_timeline(run, comm, display)
        pulse.at("preparing the training")
        tuned = together(comm, lambda: _tune(config, model, data, comm, resumed))
        trainer = Trainer(
            config,
            data,
            model,
            comm,
            journal,
            display,
            stop,
            environment.growth_limit(),
            environment.seconds_since_launch(),
            tuned,
            membership,
        )
        if resumed.state is not None:
            together(comm, lambda: _restore(trainer, resumed))
        # Only now is it certain that the run goes on from there.
        attempt = together(
            comm,
            lambda: (
                _begin(config, run, resumed, resume, journal, held, display)
                if comm.rank == 0
                else None
            ),
        )
        if comm.rank == 0 and environment.failure_dir() is None and membership is None:
            stop.clear()  # else who has started the ranks has done so before
        if attempt is not None:
            if membership is not None and membership.lost_at is not None:
                said = {"reason": membership.reason, "rank": None, "host": None}
                journal.event("fault", trainer.clock.updates, time=membership.lost_at, **said)
            with attempt.writing():
                _introduce(config, attempt.run, comm, trainer, journal, resumed, display)
            if tuned is not None:
                journal.event("autotune", trainer.clock.updates, **tuned.as_dict())
            if membership is not None and membership.reason is not None:
                journal.event("regroup", trainer.clock.updates, reason=membership.reason)
                display.say(f"harness: {membership.reason}: going on with {comm.size} ranks")
        if tuned is None:
            _check_compression(config, model, comm, trainer.clock.updates, journal, display)
        return trainer.run()


def _model(config: Config, data: ImageData, comm: Communicator) -> nn.Module:
    """The model on its device, as it is to be computed."""
    model = configured_model(config, data.num_classes, data.shape)
    model.to(comm.device)
    Criterion(config.train).try_on(data.num_classes, comm.device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # With one rank too: what many ranks are compared with runs the same code.
    return convert(model, comm) if config.train.sync_batch_norm else model


def _check_same_code(config: Config, comm: Communicator) -> None:
    """Raise AllLeave if ranks have different files of the user's own parts. Collective."""
    parts = config.own_parts()
    if not parts or comm.size == 1:
        return
    mine = {Path(path).name: found["sha256"] for path, found in own.files(parts).items()}
    told = allgather_bytes(comm, json.dumps(mine, sort_keys=True).encode(), "code")

    def compare() -> None:
        first = json.loads(told[0])
        differ = [name for name in mine.keys() & first if mine[name] != first[name]]
        if differ:
            raise ConfigError(
                f"{', '.join(sorted(differ))}: rank {comm.rank} on {environment.host()} has "
                "another one than rank 0; give every host the same copy"
            )

    together(comm, compare)


def _take(config: Config, run: RunDirectory, lock: RunLock, resume: bool) -> None:
    """Rank 0: check, create and lock the run directory; it holds no run yet."""
    run.check_usable(resume)
    check_installed(config.train.wants_tensorboard)
    check_trackers(config)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(patience=10.0 if resume else 0.0)
    except OSError as error:
        raise RunDirectoryError(f"{run.path}: cannot be used: {error.strerror or error}") from None
    if resume:
        check_format(run)
        check_same_run(config, run)


def _begin(
    config: Config,
    run: RunDirectory,
    resumed: _Resumed,
    resume: bool,
    journal: Journal,
    held: ExitStack,
    display: Display,
) -> Attempt:
    """Rank 0: take over what the checkpoint knows of, be the newest attempt from here on, and open
    its journal."""
    draft = resumed.draft
    if draft is None:
        draft = Draft(run, fresh=not resume, before=environment.attempts_before())
        held.callback(draft.discard)
    resumed.furthest = furthest(run)
    resumed.lines_missing = draft.take_records(resumed.position)
    with draft.making():
        if resume:
            keep_choices(config, draft.run)
        else:
            write_atomic(draft.run.config, dump_config(config).encode())
    attempt = draft.commit()
    trackers = open_trackers(config, attempt.run, display.say)
    journal.open(attempt, _scalars(config, attempt, resumed), trackers)
    return attempt


def _scalars(config: Config, attempt: Attempt, resumed: _Resumed) -> Scalars | None:
    seen = resumed.state["samples_seen"] if resumed.state else 0
    with attempt.writing():
        scalars = open_scalars(config.train.wants_tensorboard, attempt.run, seen)
        attempt.publish()
        return scalars


def _resume(
    config: Config, run: RunDirectory, comm: Communicator, model: nn.Module, held: ExitStack
) -> _Resumed:
    """The newest valid checkpoint, read by rank 0 and given to all, so that all have the same."""
    resumed = together(
        comm, lambda: _find(config, run, model, held) if comm.rank == 0 else _Resumed()
    )
    resumed.content = broadcast_bytes(comm, resumed.content if comm.rank == 0 else None, "resume")
    if resumed.content:
        name = resumed.name or "checkpoint"
        # Rank 0 has it from where it looked whether the checkpoint fits.
        resumed.state = together(
            comm, lambda: resumed.state or checkpoint.load_state(resumed.content, name)
        )
        resumed.content = b""  # not held in memory for the length of the run
    return resumed


def _find(config: Config, run: RunDirectory, model: nn.Module, held: ExitStack) -> _Resumed:
    """Rank 0: what the next attempt is to begin from, in a folder of its own already."""

    draft = Draft(run, before=environment.attempts_before())
    held.callback(draft.discard)
    resumed = _Resumed(draft=draft)

    def check(content: bytes, name: str) -> None:
        state = checkpoint.load_state(content, name)
        with _fitting(name):
            check_same_settings(state.get("settings"), config, name)
            checkpoint.check_fits(state, model, name)
        resumed.state = state

    with draft.making():
        found = checkpoint.newest_valid(
            draft.run.checkpoints,
            lambda path, why: resumed.rejected.append((path.name, why)),
            check,
            run.path / "checkpoints",
        )
        if found is not None:
            checkpoint.set_aside(draft.run.checkpoints, found.update)
            resumed.content, resumed.name = found.content, found.path.name
    return resumed


def _restore(trainer: Trainer, resumed: _Resumed) -> None:
    assert resumed.state is not None  # noqa: S101 - for the type checker
    with _fitting(resumed.name or "checkpoint"):
        trainer.load_state_dict(resumed.state)


@contextmanager
def _fitting(name: str) -> Iterator[None]:
    """Around what takes a checkpoint's values for what they should be: raises CheckpointError for
    whatever comes of keys and types that are not as they were saved."""
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{name}: it is not of this configuration and version "
            f"({type(error).__name__}: {one_line(str(error), 300)}); resume with what it was made "
            "with, or start anew in another --run-dir"
        ) from None


def _start_timeline(run: RunDirectory, comm: Communicator, display: Display) -> None:
    """Horovod's timeline of this start of the ranks, which rank 0 writes."""
    if not comm.kind.startswith("horovod"):
        display.say("harness: profile.timeline: a single process has no Horovod to tell of")
        return
    from harness.comm.horovod import start_timeline

    start_timeline(
        together(comm, lambda: next_timeline(run.traces) if comm.rank == 0 else run.traces)
    )


def _tune(
    config: Config, model: nn.Module, data: ImageData, comm: Communicator, resumed: _Resumed
) -> Tuned | None:
    """What comm.autotune chooses. A run that goes on with as many ranks keeps what it had: another
    choice would round otherwise."""
    if not config.comm.autotune or comm.size == 1:
        return None
    before = resumed.state["tuned"] if resumed.state else None
    if before is not None and before["ranks"] == comm.size:
        return Tuned.from_dict(before)
    return tune(config.comm, model, data.shape, config.batch.micro_batch, comm)


def _check_compression(
    config: Config,
    model: nn.Module,
    comm: Communicator,
    update: int,
    journal: Journal,
    display: Display,
) -> None:
    """Say so if compression costs more time than it saves."""
    ratio = slower_than_none(config.comm, model, comm)
    if ratio is None:
        return
    told = (
        f"comm.compression = {config.comm.compression} takes {ratio:.1f} times as long as none "
        f"over {comm.kind} here; try comm.compression=none, or comm.autotune=true"
    )
    journal.event("warning", update, reason=told)
    display.say(f"harness: warning: {told}")


def _introduce(
    config: Config,
    run: RunDirectory,
    comm: Communicator,
    trainer: Trainer,
    journal: Journal,
    resumed: _Resumed,
    display: Display,
) -> None:
    """Rank 0: write down who runs, on what, and from where."""
    attempts = sum(1 for r in read_jsonl(run.events) if r and r.get("kind") in ("start", "resume"))
    provenance = collect(comm, config.own_parts())
    changed: list[str] = []
    if run.provenance.exists():
        with suppress(
            OSError, ValueError, AttributeError, TypeError, RecursionError
        ):  # written anew
            first = json.loads(read_text(run.provenance))
            changed = changed_files(first, provenance)
            provenance = {**first, "attempts": [*first.get("attempts", []), provenance]}
    write_json(run.provenance, provenance)
    if not run.plan.exists():
        plan = build_plan(config, trainer.clock.dataset_size)
        write_json(run.plan, plan.as_dict())
    journal.event(
        "resume" if attempts else "start",
        trainer.clock.updates,
        attempt=attempts + 1,
        ranks=comm.size,
        communication=comm.kind,
        samples_seen=trainer.clock.samples,
        checkpoint=resumed.name or None,
        metrics_lines_missing=resumed.lines_missing,
        start_seconds=environment.seconds_since_launch(),
        seconds_since_end=environment.seconds_since_end(),
        updates_repeated=max(0, resumed.furthest[0] - trainer.clock.updates),
        samples_repeated=max(0, resumed.furthest[1] - trainer.clock.samples),
    )
    for path in changed:
        told = (
            f"{path} has changed since the run's last attempt; what follows may not be what the "
            "run would have come to"
        )
        journal.event("warning", trainer.clock.updates, reason=told)
        display.say(f"harness: warning: {told}")
    for name, why in resumed.rejected:
        journal.event("checkpoint_rejected", trainer.clock.updates, file=name, reason=why)
        display.say(
            f"harness: warning: checkpoint {name} is passed over: {why}; going on from "
            f"{resumed.name or 'the start'}"
        )


def _set_threads(config: Config) -> None:
    """Give a rank its share of the host's cores: MPI and Horovod would leave it all of them."""
    ranks = environment.launched_local_size()
    if config.ranks.pin:
        _pin(environment.launched_local_rank(), ranks)
        share = environment.usable_cores()
    else:
        cores = environment.usable_cores()
        # Where srun binds each rank, its own cores are all that it sees.
        share = min(cores, environment.promised_cores() or max(1, cores // ranks))
    torch.set_num_threads(config.ranks.threads or share)


def _start_mps() -> None:
    """Start CUDA's MPS on this host if it is asked for and there: the ranks that share a GPU then
    compute at once, instead of by turns. It stays for later launches, as its documentation has it.

    Joining the other ranks comes after it, and the first use of a GPU after that.
    """
    daemon = shutil.which("nvidia-cuda-mps-control")
    if environment.wants_mps() and environment.launched_local_rank() == 0 and daemon:
        subprocess.run([daemon, "-d"], check=False, timeout=60, capture_output=True)


def _pin(local_rank: int, ranks: int) -> None:
    """Bind this process to an equal share of the host's cores, side by side.

    Cores that a launcher has taken away stay so: if it has bound ranks one by one, each keeps what
    it has. With fewer cores than ranks there is nothing to share out.
    """
    cores = sorted(os.sched_getaffinity(0))
    if ranks <= len(cores) == os.cpu_count():
        bounds = [len(cores) * i // ranks for i in (local_rank, local_rank + 1)]
        os.sched_setaffinity(0, cores[slice(*bounds)])


def _display(comm: Communicator) -> Display:
    if comm.rank != 0:
        return Silent()
    return Relay() if environment.relays_progress() else local_display()


def _leave(code: int, comm: Communicator | None) -> int:
    """Wait until every rank is about to leave: a launcher ends the others when the first one does,
    and rank 0 may still be writing."""
    if comm is not None:
        allreduce(comm, torch.zeros(1), "leave")
    return code


def _rank(comm: Communicator | None) -> int:
    """Also of a process that has not joined the others."""
    return environment.launched_rank() if comm is None else comm.rank
