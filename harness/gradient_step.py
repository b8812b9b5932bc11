"""One update's gradient, and what the optimizer makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from harness.autotune import Tuned
from harness.buffers import BuffersBefore
from harness.comm.base import Communicator
from harness.data.datasets import Batch, ImageData
from harness.data.feed import Feed
from harness.data.sampler import GlobalBatchSampler
from harness.evaluate import gather_texts
from harness.forward import ForwardPass
from harness.gradstats import clip_factor
from harness.keyed import fold_key
from harness.optimizer import build_optimizer, set_rates, take_step
from harness.profiler import Profiler
from harness.reducer import GradientReducer, Reduced
from harness.schedule.rates import Rates
from harness.schema import Config


@dataclass(frozen=True)
class Gradient:
    """An update's gradient, which lies in ``.grad``; the same on all ranks."""

    reduced: Reduced
    size: int
    """Samples of the update."""
    corrupt: tuple[str, ...]
    """Those of them that could not be read, on any rank, each with its name and why."""
    stop_asked: bool
    """Some rank was asked to stop."""

    @property
    def kept(self) -> int:
        """Samples that the gradient is the mean over."""
        return self.size - len(self.corrupt)

    @property
    def loss_sum(self) -> float:
        """Over these."""
        return self.reduced.extras[0]

    @property
    def loss(self) -> float:
        """Their mean; 0 if there are none."""
        return self.loss_sum / max(self.kept, 1)


class GradientStep:
    """The model's gradients by micro-batches, summed over ranks, and their application."""

    def __init__(
        self,
        config: Config,
        data: ImageData,
        model: nn.Module,
        comm: Communicator,
        profiler: Profiler,
        tuned: Tuned | None = None,
    ) -> None:
        """``profiler``: told where the time goes; ``tuned``: see `Trainer`."""
        self._config, self._comm, self._profiler = config, comm, profiler
        self._phases = profiler.clock
        self._micro, self._sync = config.batch.micro_batch, config.train.sync_batch_norm
        self._sampler = GlobalBatchSampler(len(data.train), config.seed, self._micro)
        self._feed = Feed(
            data.train, self._sampler, comm.size, comm.rank, config.data.augment, comm.device
        )
        self._forward = ForwardPass(model, config, data.num_classes, comm.device)
        self.precision = self._forward.precision
        self.criterion = self._forward.criterion
        settings = config.comm if tuned is None else tuned.applied(config.comm)
        self.reducer = GradientReducer(
            model,
            comm,
            settings.compression,
            int(settings.bucket_mb * 2**20),
            settings.summation,
        )
        self.optimizer = build_optimizer(model, config)
        self._before = BuffersBefore(model)
        nothing = torch.empty(0, *data.shape, device=comm.device)
        self._nothing = Batch(nothing, nothing.new_empty(0, dtype=torch.int64))

    def state_dict(self) -> dict[str, Any]:
        """What the next update depends on; each rank's own residuals are left out."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "reducer": self.reducer.state_dict(),
            "precision": self.precision.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a dictionary that has what `state_dict` has returned, among other things."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.reducer.load_state_dict(state["reducer"])
        self.precision.load_state_dict(state["precision"])

    def gradient(
        self,
        seen: int,
        size: int,
        following: Iterable[tuple[int, int]],
        stop_asked: Callable[[], bool],
    ) -> Gradient:
        """The mean gradient over the ``size`` samples of the stream after ``seen``. Collective.

        ``following``: see `Feed.update`; ``stop_asked``: called when this rank's part is done.
        """
        self._before.keep()
        loss_sum, corrupt = self._accumulate(seen, size, following)
        extras = [loss_sum, float(stop_asked()), float(len(corrupt))]
        self._phases.mark("other")
        reduced = self.reducer.finish(extras)
        self._phases.mark("comm_exposed")
        left_out: tuple[str, ...] = ()
        if reduced.extras[2]:
            left_out = gather_texts(self._comm, corrupt)
            reduced = self._over_the_others(size, size - len(left_out), reduced)
        return Gradient(reduced, size, left_out, reduced.extras[1] > 0)

    def apply(self, gradient: Gradient, rates: Rates) -> tuple[str, bool] | None:
        """Let the optimizer make its step; None, or why there is none and whether that is a part of
        normal operation."""
        reduced, scale = gradient.reduced, self.precision.scale
        lowered = self.precision.adapt(reduced.finite)
        if reduced.problem is not None:
            self._before.restore_if_poisoned()
            excuse = f"; fp16's loss scale was {scale:g}" if lowered else ""
            return f"{reduced.problem}{excuse}", lowered
        set_rates(self.optimizer, rates.lr, rates.momentum)
        limit = self._config.optimizer.clip_grad_norm
        if limit is not None:
            self.reducer.scale_gradients(clip_factor(reduced.grad_norm, limit))
        take_step(self.optimizer, self._config.optimizer.name)
        return None

    def _accumulate(
        self, seen: int, size: int, following: Iterable[tuple[int, int]]
    ) -> tuple[float, list[str]]:
        """Forward and backward over this rank's micro-batches; returns their summed loss, and what
        could not be read."""
        ranks, rank = self._comm.size, self._comm.rank
        count = self._sampler.count(size, ranks, rank)
        # Synchronised layers are collectives: all ranks pass the model equally often.
        passes = self._sampler.count(size, ranks, 0) if self._sync else count
        # The norms of micro-batches tell the noise scale, if there is more than one to compare.
        # With synchronised batch norm a micro-batch's gradient depends on the others'.
        norms = size > self._micro and not self._sync
        scale = self.precision.loss_scale(size, self._micro)
        self.reducer.start(passes, micro_norms=norms, loss_scale=scale)
        total = torch.zeros((), dtype=torch.float64, device=self._comm.device)
        corrupt: list[str] = []
        for micro, batch in self._feed.update(seen, size, following, self._phases):
            corrupt += batch.corrupt
            self._phases.mark("data")
            self._profiler.worked(len(batch.labels))
            if not len(batch.labels) and not self._sync:
                self.reducer.backward(None)
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
        self.reducer.backward(loss / size)
        self._phases.mark("backward")
        return loss.detach()

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._comm.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _over_the_others(self, size: int, kept: int, reduced: Reduced) -> Reduced:
        """The mean over ``kept`` samples, of what is the sum over these divided by ``size``."""
        factor = size / max(kept, 1)
        self.reducer.scale_gradients(factor)
        norm2 = reduced.micro_norm2
        return replace(
            reduced,
            grad_norm=reduced.grad_norm * factor,
            micro_norm2=None if norm2 is None else norm2 * factor**2,
        )
