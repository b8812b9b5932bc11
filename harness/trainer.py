"""The training loop, and only the loop: every piece of it lives in a module of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from harness.autotune import Tuned
from harness.buffers import (
    averaged_buffers,
    gather_buffers,
    gather_residuals,
    restore_buffers,
    restore_residuals,
)
from harness.comm.base import Communicator, allgather_bytes
from harness.consistency import check_equal
from harness.data.datasets import Batch, ImageData, Split
from harness.data.feed import Feed
from harness.data.sampler import GlobalBatchSampler, permute
from harness.errors import HarnessError, StoppedEarly
from harness.evaluate import Evaluation, evaluate
from harness.forward import ForwardPass
from harness.gradstats import DistanceFromInit, clip_factor, layer_statistics
from harness.journal import Journal
from harness.keyed import fold_key
from harness.optimizer import build_optimizer, set_rates
from harness.profiler import PhaseClock
from harness.progress import Display, Pace, Status
from harness.reducer import GradientReducer, Reduced
from harness.schedule.clock import Clock, step, update_size
from harness.schedule.configured import rate_schedule, stage_scheduler
from harness.schedule.growth import BatchDecision, Observation
from harness.schedule.noise import NoiseScale
from harness.schedule.plan import Decomposition, decompose, ranks_for, run_end
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
        grow: bool = False,
        tuned: Tuned | None = None,
    ) -> None:
        """``grow``: stop with a checkpoint where the plan wants more ranks than there are;
        ``tuned``: what stands in place of the configuration's settings of the same names."""
        self._config, self._data, self._model, self._comm = config, data, model, comm
        self._journal, self._display, self._stop, self._grow = journal, display, stop, grow
        size = len(data.train)
        self.clock = Clock(0, 0, size)
        self._end = run_end(config, size)
        self._scheduler = stage_scheduler(config.batch, self._agree)
        self._rates = rate_schedule(config)
        self._sampler = GlobalBatchSampler(size, config.seed, config.batch.micro_batch)
        self._feed = Feed(
            data.train, self._sampler, comm.size, comm.rank, config.data.augment, comm.device
        )
        self._tuned = tuned
        settings = config.comm if tuned is None else tuned.applied(config.comm)
        self._reducer = GradientReducer(
            model,
            comm,
            settings.compression,
            int(settings.bucket_mb * 2**20),
            settings.summation,
        )
        self._optimizer = build_optimizer(model, config)
        self._forward = ForwardPass(model, config, data.num_classes, comm.device)
        self._precision = self._forward.precision
        self._noise = NoiseScale()
        self._initial = DistanceFromInit(model)
        self._phases = PhaseClock()
        self._window = Window()
        self._pace = Pace()
        nothing = torch.empty(0, *data.shape, device=comm.device)
        self._nothing = Batch(nothing, nothing.new_empty(0, dtype=torch.int64))
        self._stage = -1
        self._skipped_in_a_row = 0
        self._train_seconds = 0.0
        self._corrupt = 0
        """Training samples that could not be read, each time it was tried."""
        self._evaluation: Evaluation | None = None
        self._evaluated_at = self._saved_at = -1
        self._shown: tuple[BatchDecision, Decomposition, float] | None = None

    def run(self) -> Evaluation:
        """Train to the end and return the last evaluation.

        Raises StoppedEarly after a checkpoint on request, HarnessError if the run diverges.
        """
        self._model.train()
        while not self._end.reached(self.clock):
            decision = self._decide()
            pieces = decompose(decision.batch, self._config.batch.micro_batch, self._comm.size)
            if decision.stage != self._stage:
                self._enter_stage(decision, pieces)
            self._update(decision, pieces)
        return self._finish()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "reducer": self._reducer.state_dict(),
            "tuned": None if self._tuned is None else self._tuned.as_dict(),
            "growth": self._scheduler.state_dict(),
            "precision": self._precision.state_dict(),
            "noise": self._noise.state_dict(),
            "initial_weights": self._initial.state_dict(),
            "samples_seen": self.clock.samples,
            "update": self.clock.updates,
            "dataset_size": self.clock.dataset_size,
            "stage": self._stage,
            "skipped_in_a_row": self._skipped_in_a_row,
            "train_seconds": self._train_seconds,
            "corrupt": self._corrupt,
            "evaluated_at": self._evaluated_at,
            "evaluation": None if self._evaluation is None else asdict(self._evaluation),
            "window": self._window.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, on any number of ranks; bitwise on the same number."""
        if state["dataset_size"] != self.clock.dataset_size:
            raise HarnessError(
                f"the run was made on {state['dataset_size']} training samples, but data.dataset "
                f"now holds {self.clock.dataset_size}; give it the same data"
            )
        self._model.load_state_dict(state["model"])
        restore_buffers(self._model, state.get("rank_buffers"), self._comm)
        self._optimizer.load_state_dict(state["optimizer"])
        self._reducer.load_state_dict(state["reducer"])
        restore_residuals(self._reducer.residuals, state.get("rank_residuals"), self._comm)
        self._scheduler.load_state_dict(state["growth"])
        self._precision.load_state_dict(state["precision"])
        self._noise.load_state_dict(state["noise"])
        self._initial.load_state_dict(state["initial_weights"])
        self.clock = Clock(state["samples_seen"], state["update"], self.clock.dataset_size)
        self._stage = state["stage"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._train_seconds = state["train_seconds"]
        self._corrupt = state["corrupt"]
        self._evaluated_at, self._saved_at = state["evaluated_at"], state["update"]
        if state["evaluation"] is not None:
            self._evaluation = Evaluation(**state["evaluation"])
        self._window = Window.from_state(state["window"])

    def _decide(self) -> BatchDecision:
        """The global batch of the next update, after measuring what the decision needs."""
        due, wanted = self._scheduler.due(self.clock), self._scheduler.wanted(self.clock)
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
        with averaged_buffers(self._model, gather_buffers(self._model, self._comm)):
            return self._measure(self._data.train, samples).loss

    def _measure(self, split: Split, samples: npt.NDArray[np.int64] | None = None) -> Evaluation:
        shape, autocast = self._data.shape, self._precision.autocast
        return evaluate(self._model, split, self._comm, samples, shape, autocast)

    def _enter_stage(self, decision: BatchDecision, pieces: Decomposition) -> None:
        self._flush_window()  # a line holds updates of one stage only
        wanted = ranks_for(decision.batch, self._config.batch, self._config.ranks)
        if self._grow and wanted > self._comm.size and self.clock.updates:
            self._stop_with_checkpoint(f"stage {decision.stage} wants {wanted} ranks", wanted)
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

    def _update(self, decision: BatchDecision, pieces: Decomposition) -> None:
        epoch_end = self._config.batch.epoch_end
        size = update_size(self.clock, decision.batch, epoch_end, self._end)
        rates = self._rates.at(self.clock, decision)
        self._phases.restart()
        loss_sum, corrupt = self._accumulate(size, decision.batch)
        asked_to_stop = float(self._stop.asked())
        self._phases.mark("other")
        reduced = self._reducer.finish([loss_sum, asked_to_stop, float(len(corrupt))])
        self._phases.mark("comm_exposed")
        before, self.clock = self.clock, step(self.clock, size)
        kept = size - int(reduced.extras[2])
        if kept < size:
            reduced = self._without_corrupt(size, kept, corrupt, reduced)
        self._observe(size, kept, reduced)
        self._apply(rates, reduced)
        self._phases.mark("optimizer")
        self._account(size, kept, decision, pieces, rates, reduced)
        news = self._milestones(before)
        self._show(decision, pieces, reduced.extras[0] / max(kept, 1), news)
        if reduced.extras[1] > 0 and not self._end.reached(self.clock):
            self._stop_with_checkpoint("asked to stop")

    def _without_corrupt(
        self, size: int, kept: int, corrupt: list[str], reduced: Reduced
    ) -> Reduced:
        """The mean over the samples that could be read, and a record of the others. Collective."""
        told = allgather_bytes(self._comm, json.dumps(corrupt).encode(), "corrupt")
        for reason in sorted(reason for content in told for reason in json.loads(content)):
            self._journal.event(
                "corrupt_image",
                self.clock.updates,
                samples_seen=self.clock.samples,
                reason=reason,
            )
        self._corrupt += size - kept
        factor = size / max(kept, 1)
        self._reducer.scale_gradients(factor)
        norm2 = reduced.micro_norm2
        return replace(
            reduced,
            grad_norm=reduced.grad_norm * factor,
            micro_norm2=None if norm2 is None else norm2 * factor**2,
        )

    def _observe(self, size: int, kept: int, reduced: Reduced) -> None:
        """Take notice of what this update has measured, and tell the growth policy."""
        noise = None
        if reduced.micro_norm2 is not None:
            micro = self._config.batch.micro_batch
            squares = size // micro * micro**2 + (size % micro) ** 2
            noise = self._noise.observe(
                self.clock, size, squares, reduced.micro_norm2, reduced.grad_norm**2
            )
        loss = reduced.extras[0] / max(kept, 1)
        self._scheduler.observe(self.clock, Observation(size, loss, reduced.grad_norm, noise))

    def _accumulate(self, size: int, batch_size: int) -> tuple[float, list[str]]:
        """Forward and backward over this rank's micro-batches; returns their summed loss, and what
        could not be read."""
        # The norms of micro-batches tell the noise scale, if there is more than one to compare.
        # With synchronised batch norm a micro-batch's gradient depends on the others'.
        ranks, rank, sync = self._comm.size, self._comm.rank, self._config.train.sync_batch_norm
        norms = size > self._config.batch.micro_batch and not sync
        count = self._sampler.count(size, ranks, rank)
        # Synchronised layers are collectives: all ranks pass the model equally often.
        passes = self._sampler.count(size, ranks, 0) if sync else count
        scale = self._precision.loss_scale(size, self._config.batch.micro_batch)
        self._reducer.start(passes, micro_norms=norms, loss_scale=scale)
        total = torch.zeros((), dtype=torch.float64, device=self._comm.device)
        corrupt: list[str] = []
        for micro, batch in self._feed.update(self._spans(batch_size)):
            corrupt += batch.corrupt
            self._phases.mark("data")
            if not len(batch.labels) and not sync:
                self._reducer.backward(None)
                continue
            # Dropout and the like draw from a stream that belongs to the micro-batch, so they
            # depend neither on the ranks nor on what this process ran before.
            self._seed(fold_key(self._config.seed, micro.start) >> 1)
            total += self._pass(batch, size)
        for _ in range(passes - count):
            self._pass(self._nothing, size)
        return float(total), corrupt

    def _pass(self, batch: Batch, size: int) -> torch.Tensor:
        """Forward and backward; returns the summed loss."""
        loss = self._forward.loss(batch)
        self._phases.mark("forward")
        # Summed loss over the samples of the whole update: ranks and micro-batches of unequal size
        # then add up to the exact mean.
        self._reducer.backward(loss / size)
        self._phases.mark("backward")
        return loss.detach()

    def _spans(self, batch: int) -> Iterator[tuple[int, int]]:
        """(samples seen, size) of this update and of all that follow if the batch stays."""
        clock = self.clock
        while not self._end.reached(clock):
            size = update_size(clock, batch, self._config.batch.epoch_end, self._end)
            yield clock.samples, size
            clock = step(clock, size)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._comm.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _apply(self, rates: Rates, reduced: Reduced) -> None:
        before = self._precision.scale
        lowered = self._precision.adapt(reduced.finite)
        if not reduced.finite:
            self._skip(reduced, f"fp16's loss scale was {before:g}" if lowered else None)
            return
        self._skipped_in_a_row = 0
        set_rates(self._optimizer, rates.lr, rates.momentum)
        limit = self._config.optimizer.clip_grad_norm
        if limit is not None:
            self._reducer.scale_gradients(clip_factor(reduced.grad_norm, limit))
        self._optimizer.step()

    def _skip(self, reduced: Reduced, excuse: str | None) -> None:
        """``excuse``: what makes this a part of normal operation, and no sign of divergence."""
        self._skipped_in_a_row += excuse is None
        self._journal.event(
            "skipped_update",
            self.clock.updates,
            samples_seen=self.clock.samples,
            reason=f"{reduced.problem}{f'; {excuse}' if excuse else ''}",
        )
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            raise HarnessError(
                f"{_MAX_SKIPPED} updates in a row were skipped, up to update {self.clock.updates}: "
                f"{reduced.problem}. If the run has diverged, lower lr.base or warm up for longer"
            )

    def _account(
        self,
        size: int,
        kept: int,
        decision: BatchDecision,
        pieces: Decomposition,
        rates: Rates,
        reduced: Reduced,
    ) -> None:
        seconds = self._phases.take()
        spent = sum(seconds.values())
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
        self._window.add(size, kept, reduced.extras[0], reduced.bytes_sent, seconds, latest)
        if self._window.updates >= self._config.train.log_every:
            self._flush_window()

    def _flush_window(self) -> None:
        if self._window.updates:
            distance = self._initial.distance(self._model) if self._comm.rank == 0 else None
            self._journal.metrics({**self._window.line(), "distance_from_init": distance})
            self._window = Window()

    def _log_layers(self) -> None:
        if self._comm.rank == 0:
            self._journal.layers(
                {
                    "update": self.clock.updates,
                    "samples_seen": self.clock.samples,
                    "epoch": self.clock.epoch,
                    "layers": layer_statistics(self._model, self._optimizer),
                }
            )

    def _milestones(self, before: Clock) -> bool:
        """Evaluate and save where the clock has passed their times; whether it evaluated."""
        train = self._config.train
        if train.layers_every and (self._passed(train.layers_every, before) or not before.updates):
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
        with averaged_buffers(self._model, gather_buffers(self._model, self._comm)):
            self._evaluation = self._measure(self._data.test)
        self._evaluated_at = self.clock.updates
        self._journal.event(
            "evaluation",
            self.clock.updates,
            samples_seen=self.clock.samples,
            epoch=self.clock.epoch,
            loss=self._evaluation.loss,
            accuracy=self._evaluation.accuracy,
            accuracy_top5=self._evaluation.accuracy_top5,
            corrupt=self._evaluation.corrupt,
        )
        return self._evaluation

    def _save(self) -> None:
        if self._saved_at == self.clock.updates:
            return
        check_equal(self._model, self._optimizer, self._comm, self.clock.updates)
        table = gather_buffers(self._model, self._comm)
        residuals = gather_residuals(self._reducer.residuals, self._comm)
        with averaged_buffers(self._model, table):
            state = {**self.state_dict(), "rank_buffers": table, "rank_residuals": residuals}
            self._journal.save(self.clock.updates, self.clock.samples, state)
        self._saved_at = self.clock.updates

    def _stop_with_checkpoint(self, reason: str, ranks_wanted: int | None = None) -> None:
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
            corrupt=self._corrupt,
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
