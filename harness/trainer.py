"""The training loop, and only the loop: every piece of it lives in a module of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from harness import pulse
from harness.autotune import Tuned
from harness.buffers import (
    averaged_buffers,
    gather_buffers,
    gather_residuals,
    restore_buffers,
    restore_residuals,
)
from harness.comm.base import Communicator
from harness.consistency import Diverged, check_equal, check_finite
from harness.data.datasets import ImageData, Split
from harness.data.sampler import permute
from harness.elastic import Membership, Regroup
from harness.errors import HarnessError, StoppedEarly
from harness.evaluate import Evaluation, evaluate
from harness.gradient_step import Gradient, GradientStep
from harness.gradstats import DistanceFromInit, layer_statistics
from harness.journal import Journal
from harness.keyed import fold_key
from harness.profiler import Profiler
from harness.progress import Display, Pace, Status
from harness.resume import settled
from harness.schedule.clock import Clock, step, update_size
from harness.schedule.configured import rate_schedule, stage_scheduler
from harness.schedule.goodput import Goodput
from harness.schedule.growth import BatchDecision, Observation
from harness.schedule.noise import NoiseScale
from harness.schedule.plan import Decomposition, decompose, ranks_for, run_end, samples_until_growth
from harness.schedule.rates import Rates
from harness.schema import Config
from harness.stop import StopRequest
from harness.units import Duration
from harness.window import Window

_MAX_SKIPPED = 10
_LOSS_SAMPLE = 0x6C6F7373  # keeps the keys of loss samples apart from all others


class Trainer:
    """Runs one configuration from where the clock stands to its end; the same on every rank.

    Everything that the trajectory depends on is in ``state_dict``, or follows from the
    configuration and from integers that all ranks share.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        model: nn.Module,
        comm: Communicator,
        journal: Journal,
        display: Display,
        stop: StopRequest,
        grow: int = 0,
        start_seconds: float | None = None,
        tuned: Tuned | None = None,
        membership: Membership | None = None,
    ) -> None:
        """``grow``: stop with a checkpoint where the plan wants more ranks than there are, if it is
        worth what a start takes (``start_seconds``; None: not known, so it is), up to this many;
        ``tuned``: what stands in place of the configuration's settings of the same names;
        ``membership``: where ranks can come and go without an end of the processes."""
        self._membership = membership
        self._config, self._data, self._model, self._comm = config, data, model, comm
        self._settings = settled(config)
        self._journal, self._display, self._stop = journal, display, stop
        self._grow, self._start_seconds = grow, start_seconds
        size = len(data.train)
        self.clock = Clock(0, 0, size)
        self._end = run_end(config, size)
        self._scheduler = stage_scheduler(config.batch, self._agree)
        self._rates = rate_schedule(config)
        self._profiler = Profiler(config.profile, comm, journal.run.traces)
        self._tuned = tuned
        self._step = GradientStep(config, data, model, comm, self._profiler, tuned)
        self._noise = NoiseScale()
        self._initial = DistanceFromInit(model)
        self._window = Window()
        self._pace = Pace()
        self._stage = -1
        self._skipped_in_a_row = 0
        self._train_seconds = 0.0
        self._left_out = 0
        """Training samples that could not be read, each time it was tried."""
        self._corrupt: set[tuple[str, str]] = set()
        """Split and name of each, and of test samples; told once in events.jsonl."""
        self._evaluation: Evaluation | None = None
        self._evaluated_at = self._saved_at = -1
        self._shown: tuple[BatchDecision, Decomposition, float] | None = None

    def run(self) -> Evaluation:
        """Train to the end and return the last evaluation.

        Raises StoppedEarly after a checkpoint on request, HarnessError if the run diverges.
        """
        self._model.train()
        self._profiler.clock.restart()
        pulse.at("computing")
        pulse.trains(True)
        try:
            while not self._end.reached(self.clock):
                due = self._scheduler.due(self.clock)
                decision = self._decide(due)
                pieces = decompose(decision.batch, self._config.batch.micro_batch, self._comm.size)
                if decision.stage != self._stage:
                    self._enter_stage(decision, pieces)
                elif due and decision.ranks is not None:
                    self._grow_to(decision.ranks, decision)
                self._update(decision, pieces)
            return self._finish()
        finally:
            pulse.trains(False)
            self._profiler.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        self._window.spend(self._profiler.take())
        return {
            "settings": self._settings,
            "model": self._model.state_dict(),
            **self._step.state_dict(),
            "tuned": None if self._tuned is None else self._tuned.as_dict(),
            "growth": self._scheduler.state_dict(),
            "noise": self._noise.state_dict(),
            "initial_weights": self._initial.state_dict(),
            "samples_seen": self.clock.samples,
            "update": self.clock.updates,
            "dataset_size": self.clock.dataset_size,
            "stage": self._stage,
            "skipped_in_a_row": self._skipped_in_a_row,
            "train_seconds": self._train_seconds,
            "left_out": self._left_out,
            "corrupt": [list(pair) for pair in sorted(self._corrupt)],
            "evaluated_at": self._evaluated_at,
            "evaluation": None if self._evaluation is None else asdict(self._evaluation),
            "window": self._window.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, on any number of ranks; bitwise on the same number."""
        _check_kinds(state)
        if state["dataset_size"] != self.clock.dataset_size:
            raise HarnessError(
                f"the run was made on {state['dataset_size']} training samples, but data.dataset "
                f"now holds {self.clock.dataset_size}; give it the same data"
            )
        self._model.load_state_dict(state["model"])
        restore_buffers(self._model, state.get("rank_buffers"), self._comm)
        self._step.load_state_dict(state)
        restore_residuals(self._step.reducer.residuals, state.get("rank_residuals"), self._comm)
        self._scheduler.load_state_dict(state["growth"])
        self._noise.load_state_dict(state["noise"])
        self._initial.load_state_dict(state["initial_weights"])
        self.clock = Clock(state["samples_seen"], state["update"], self.clock.dataset_size)
        self._stage = state["stage"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._train_seconds = state["train_seconds"]
        self._left_out = state["left_out"]
        self._corrupt = {(split, name) for split, name in state["corrupt"]}
        self._evaluated_at, self._saved_at = state["evaluated_at"], state["update"]
        if state["evaluation"] is not None:
            evaluation = dict(state["evaluation"])
            self._evaluation = Evaluation(**{**evaluation, "corrupt": tuple(evaluation["corrupt"])})
        self._window = Window.from_state(state["window"])

    def _decide(self, due: bool) -> BatchDecision:
        """The global batch of the next update, after measuring what the decision needs."""
        wanted = self._scheduler.wanted(self.clock)
        loss = None if wanted is None else self._training_loss(wanted.samples)
        decision = self._scheduler.decide(self.clock, loss)
        if due:
            self._journal.event(
                "decision",
                self.clock.updates,
                samples_seen=self.clock.samples,
                epoch=self.clock.epoch,
                global_batch=decision.batch,
                asked=decision.asked,
                ranks_wanted=decision.ranks,
                training_loss=loss,
                reason=decision.reason,
            )
        return decision

    def _agree(self, asked: int) -> int:
        """Rank 0's decision, on every rank: the last bit of a sum may differ between machines."""
        decided = torch.tensor([asked], dtype=torch.int64)
        self._comm.broadcast(decided, "growth")
        return int(decided)

    def _training_loss(self, count: int | None) -> float:
        """Mean loss over ``count`` training samples, drawn anew each time (None: over all), as
        evaluation sees them: without augmentation or dropout."""
        size = len(self._data.train)
        samples = None
        if count is not None and count < size:
            key = fold_key(self._config.seed, _LOSS_SAMPLE, self.clock.samples)
            samples = permute(np.arange(count, dtype=np.uint64), size, key).astype(np.int64)
        with (
            self._profiler.outside(),
            averaged_buffers(self._model, gather_buffers(self._model, self._comm)),
        ):
            return self._measure(self._data.train, samples).loss

    def _measure(self, split: Split, samples: npt.NDArray[np.int64] | None = None) -> Evaluation:
        shape, autocast = self._data.shape, self._step.precision.autocast
        criterion = self._step.criterion
        return evaluate(self._model, split, self._comm, samples, shape, autocast, criterion)

    def _enter_stage(self, decision: BatchDecision, pieces: Decomposition) -> None:
        self._flush_window()  # a line holds updates of one stage only
        wanted = decision.ranks
        if wanted is None:
            wanted = ranks_for(decision.batch, self._config.batch, self._config.ranks)
        self._grow_to(wanted, decision)
        self._stage = decision.stage
        self._journal.event(
            "stage",
            self.clock.updates,
            stage=decision.stage,
            samples_seen=self.clock.samples,
            epoch=self.clock.epoch,
            global_batch=decision.batch,
            ranks=pieces.ranks,
            accumulation=pieces.accumulation,
            micro_batch=pieces.micro_batch,
            lr=self._rates.at(self.clock, decision).lr,
            reason=decision.reason,
        )

    def _grow_to(self, wanted: int, decision: BatchDecision) -> None:
        """Stop with a checkpoint if so many ranks are more than there are, can be had, and pay."""
        wanted = min(wanted, self._grow)
        if wanted > self._comm.size and self.clock.updates and self._growth_pays(decision, wanted):
            self._stop_with_checkpoint(f"stage {decision.stage} wants {wanted} ranks", wanted)

    def _growth_pays(self, decision: BatchDecision, wanted: int) -> bool:
        """Whether so many ranks save more time, until the schedule wants still more of them, than a
        start takes. If not, accumulation makes up for them: the updates are the same."""
        settled, pace = self._config.ranks.restart_seconds, self._pace.images_per_sec
        cost = self._start_seconds if settled is None else settled
        if cost is None or settled == 0 or not pace:
            return True
        samples = samples_until_growth(self._config, self.clock, wanted)
        saved = samples / pace * self._share_saved(decision, wanted)
        if self._agree(int(saved >= cost)):  # each rank has a clock of its own
            return True
        self._journal.event(
            "merged_segment",
            self.clock.updates,
            stage=decision.stage,
            ranks=self._comm.size,
            ranks_wanted=wanted,
            seconds_saved=saved,
            restart_seconds=cost,
            reason=f"{wanted} ranks would save {saved:.1f} s of stage {decision.stage}, and "
            f"starting them takes {cost:.1f} s",
        )
        return False

    def _share_saved(self, decision: BatchDecision, wanted: int) -> float:
        """Of the time, by so many ranks: as the policy's model has it, else in proportion."""
        policy, size = self._scheduler.measured, self._comm.size
        if isinstance(policy, Goodput):
            now, then = (policy.options.option(n, decision.batch) for n in (size, wanted))
            return 1 - now.images_per_sec / then.images_per_sec
        return 1 - size / wanted

    def _update(self, decision: BatchDecision, pieces: Decomposition) -> None:
        epoch_end = self._config.batch.epoch_end
        size = update_size(self.clock, decision.batch, epoch_end, self._end)
        rates = self._rates.at(self.clock, decision)
        self._profiler.begin(self.clock.updates + 1)
        gradient = self._step.gradient(
            self.clock.samples, size, self._following(decision.batch), self._wants_to_leave
        )
        before, self.clock = self.clock, step(self.clock, size)
        self._left_out += len(gradient.corrupt)
        self._note_corrupt("train", gradient.corrupt)
        self._observe(gradient)
        self._apply(gradient, rates)
        self._profiler.clock.mark("optimizer")
        if self._profiler.end(self.clock.updates):
            self._journal.event("trace", self.clock.updates, samples_seen=self.clock.samples)
        self._account(gradient, decision, pieces, rates)
        news = self._milestones(before)
        self._show(decision, pieces, gradient.loss, news)
        if gradient.stop_asked and not self._end.reached(self.clock):
            self._leave()

    def _following(self, batch: int) -> Iterator[tuple[int, int]]:
        """(samples seen, size) of all updates after this one if the batch stays."""
        clock, epoch_end = self.clock, self._config.batch.epoch_end
        while True:
            clock = step(clock, update_size(clock, batch, epoch_end, self._end))
            if self._end.reached(clock):
                return
            yield clock.samples, update_size(clock, batch, epoch_end, self._end)

    def _note_corrupt(self, split: str, reasons: Sequence[str]) -> None:
        for reason in reasons:
            if (split, reason) not in self._corrupt:
                self._corrupt.add((split, reason))
                self._journal.event(
                    "corrupt_image",
                    self.clock.updates,
                    samples_seen=self.clock.samples,
                    split=split,
                    reason=reason,
                )

    def _observe(self, gradient: Gradient) -> None:
        """Take notice of what this update has measured, and tell the growth policy."""
        noise, size, reduced = None, gradient.size, gradient.reduced
        if reduced.micro_norm2 is not None:
            micro = self._config.batch.micro_batch
            squares = size // micro * micro**2 + (size % micro) ** 2
            noise = self._noise.observe(
                self.clock, size, squares, reduced.micro_norm2, reduced.grad_norm**2
            )
        seen = Observation(size, gradient.loss, reduced.grad_norm, noise)
        self._scheduler.observe(self.clock, seen)

    def _apply(self, gradient: Gradient, rates: Rates) -> None:
        skipped = self._step.apply(gradient, rates)
        if skipped is None:
            self._skipped_in_a_row = 0
            return
        reason, normal = skipped
        self._skipped_in_a_row += not normal
        self._journal.event(
            "skipped_update",
            self.clock.updates,
            samples_seen=self.clock.samples,
            reason=reason,
        )
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            self._note_divergence(f"{_MAX_SKIPPED} updates in a row were skipped: {reason}")
            raise HarnessError(
                f"{_MAX_SKIPPED} updates in a row were skipped, up to update {self.clock.updates}: "
                f"{reason}. If the run has diverged, lower lr.base or warm up for longer"
            )

    def _note_divergence(self, reason: str) -> None:
        """For who looks at many runs, of which some were to find out just that."""
        self._journal.event(
            "diverged", self.clock.updates, samples_seen=self.clock.samples, reason=reason
        )

    def _account(
        self,
        gradient: Gradient,
        decision: BatchDecision,
        pieces: Decomposition,
        rates: Rates,
    ) -> None:
        size, reduced = gradient.size, gradient.reduced
        spent = self._profiler.clock.lap()
        self._train_seconds += spent
        self._pace.add(size, spent)
        latest = {
            "update": self.clock.updates,
            "samples_seen": self.clock.samples,
            "epoch": self.clock.epoch,
            "stage": decision.stage,
            "ranks": pieces.ranks,
            "accumulation": pieces.accumulation,
            "micro_batch": pieces.micro_batch,
            "global_batch": decision.batch,
            "lr": rates.lr,
            "momentum": rates.momentum,
            "grad_norm": reduced.grad_norm,
            "noise_scale": self._noise.scale,
        }
        self._window.add(size, gradient.kept, gradient.loss_sum, reduced.bytes_sent, latest)
        if self._window.updates >= self._config.train.log_every:
            self._flush_window()

    def _flush_window(self) -> None:
        if not self._window.updates:
            return
        self._window.spend(self._profiler.take())
        facts = self._profiler.facts()
        # A look at all weights, which a run that is measured does without.
        looks = self._comm.rank == 0 and not self._stop.measured
        distance = self._initial.distance(self._model) if looks else None
        self._journal.metrics(
            {**self._window.line(), "distance_from_init": distance, **facts.fields}
        )
        if facts.straggler is not None:
            self._journal.event("straggler", self.clock.updates, **facts.straggler)
        self._window = Window()

    def _log_layers(self) -> None:
        if self._comm.rank == 0:
            self._journal.layers(
                {
                    "update": self.clock.updates,
                    "samples_seen": self.clock.samples,
                    "epoch": self.clock.epoch,
                    "layers": layer_statistics(self._model, self._step.optimizer),
                }
            )

    def _milestones(self, before: Clock) -> bool:
        """Evaluate and save where the clock has passed their times; whether it evaluated."""
        train = self._config.train
        if train.layers_every and (self._passed(train.layers_every, before) or not before.updates):
            with self._profiler.outside():
                self._log_layers()
        evaluates = self._passed(train.eval_every, before)
        if evaluates:
            self._flush_window()  # so that curves have a point for each evaluation
            self._evaluate()
        if self._passed(train.checkpoint_every, before):
            self._save()
        return evaluates

    def _passed(self, period: Duration | None, before: Clock) -> bool:
        return period is not None and self.clock.passed(period) > before.passed(period)

    def _evaluate(self) -> Evaluation:
        if self._evaluation is not None and self._evaluated_at == self.clock.updates:
            return self._evaluation
        with (
            self._profiler.outside(),
            averaged_buffers(self._model, gather_buffers(self._model, self._comm)),
        ):
            self._evaluation = self._measure(self._data.test)
        pulse.at("computing")
        self._evaluated_at = self.clock.updates
        self._journal.event(
            "evaluation",
            self.clock.updates,
            samples_seen=self.clock.samples,
            epoch=self.clock.epoch,
            loss=self._evaluation.loss,
            accuracy=self._evaluation.accuracy,
            accuracy_top5=self._evaluation.accuracy_top5,
            corrupt=len(self._evaluation.corrupt),
            **_metric(self._evaluation),
        )
        self._note_corrupt("test", self._evaluation.corrupt)
        return self._evaluation

    def _save(self) -> None:
        if self._saved_at == self.clock.updates:
            return
        with self._profiler.outside():
            self._write_checkpoint()
        self._saved_at = self.clock.updates

    def _write_checkpoint(self) -> None:
        check_equal(self._model, self._step.optimizer, self._comm, self.clock.updates)
        try:
            check_finite(self._model, self._step.optimizer, self.clock.updates)
        except Diverged as error:
            self._note_divergence(str(error))
            raise
        table = gather_buffers(self._model, self._comm)
        residuals = gather_residuals(self._step.reducer.residuals, self._comm)
        with averaged_buffers(self._model, table):
            state = {**self.state_dict(), "rank_buffers": table, "rank_residuals": residuals}
            self._journal.save(self.clock.updates, self.clock.samples, state)

    def _wants_to_leave(self) -> bool:
        """Whether this rank has a reason to end its work after this update."""
        return self._stop.asked() or (self._membership is not None and self._membership.changed)

    def _leave(self) -> None:
        """Stop, or, if that is why some rank wanted to leave, go on in another world."""
        members = self._membership
        if members is not None and members.leaves(self._comm, self._stop.asked()):
            self._save()
            raise Regroup("the hosts have changed")
        self._stop_with_checkpoint("asked to stop")

    def _grow_in_place(self, members: Membership, reason: str, wanted: int) -> None:
        """Leave for a world of more ranks; if there are none to be had, accumulation goes on making
        up for them."""
        refusal = members.grow(self._comm, wanted)
        if refusal is None:
            self._save()
            raise Regroup(reason)
        self._journal.event(
            "not_grown",
            self.clock.updates,
            samples_seen=self.clock.samples,
            ranks=self._comm.size,
            ranks_wanted=wanted,
            reason=f"{reason}, but {refusal}",
        )

    def _stop_with_checkpoint(self, reason: str, ranks_wanted: int | None = None) -> None:
        if self._membership is not None and ranks_wanted is not None:
            self._grow_in_place(self._membership, reason, ranks_wanted)
            return
        self._save()
        self._journal.event(
            "stop",
            self.clock.updates,
            samples_seen=self.clock.samples,
            reason=reason,
            ranks_wanted=ranks_wanted,
        )
        raise StoppedEarly(f"stopped after update {self.clock.updates}: {reason}")

    def _finish(self) -> Evaluation:
        self._flush_window()
        news = self._evaluated_at != self.clock.updates
        result = self._evaluate()
        if news and self._shown is not None:
            self._show(*self._shown, news=True)
        self._save()
        self._journal.event(
            "end",
            self.clock.updates,
            samples_seen=self.clock.samples,
            seconds=self._train_seconds,
            loss=result.loss,
            accuracy=result.accuracy,
            accuracy_top5=result.accuracy_top5,
            corrupt=self._left_out,
            **_metric(result),
        )
        return result

    def _show(
        self, decision: BatchDecision, pieces: Decomposition, loss: float, news: bool
    ) -> None:
        self._shown = (decision, pieces, loss)
        total = self._config.train.duration
        fraction = min(1.0, self.clock.fraction(total))
        self._display.show(
            Status(
                fraction=fraction,
                epoch=self.clock.epoch,
                epochs=self.clock.epoch / fraction,
                stage=decision.stage,
                global_batch=decision.batch,
                ranks=pieces.ranks,
                accumulation=pieces.accumulation,
                micro_batch=pieces.micro_batch,
                loss=loss,
                images_per_sec=self._pace.images_per_sec,
                eta_seconds=self._train_seconds * (1 - fraction) / fraction,
                accuracy=self._evaluation.accuracy if news and self._evaluation else None,
                news=news,
            )
        )


def _metric(evaluation: Evaluation) -> dict[str, float]:
    """As a record has it: the user's own metric, if there is one."""
    return {} if evaluation.metric is None else {"metric": evaluation.metric}


_NUMBERS = (
    *("samples_seen", "update", "dataset_size", "stage", "skipped_in_a_row", "train_seconds"),
    *("left_out", "evaluated_at"),
)


def _check_kinds(state: dict[str, Any]) -> None:
    """Raise TypeError for a state whose numbers are none: some are only met much later."""
    window = Window.from_state(state["window"])
    numbers = [state[name] for name in _NUMBERS]
    numbers += [window.updates, window.samples, window.kept, window.loss_sum, window.bytes_sent]
    numbers += window.seconds.values()
    evaluation = state["evaluation"]
    if evaluation is not None:
        numbers += [
            value
            for name, value in evaluation.items()
            if name != "corrupt" and (name, value) != ("metric", None)
        ]
    if not all(type(value) in (int, float) for value in numbers):
        raise TypeError("a number in it is none")
    if not isinstance(window.latest, dict):
        raise TypeError("its last line is no mapping")
