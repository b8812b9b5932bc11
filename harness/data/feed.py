"""Bringing samples to where they are needed, asked for ahead of time where that helps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from harness import pulse
from harness.data.datasets import Batch, Pending, Split
from harness.data.sampler import GlobalBatchSampler, MicroBatch
from harness.phases import HostClock, copies_marked

I64 = npt.NDArray[np.int64]


class Feed:
    """One rank's micro-batches of training.

    What comes after the present update is a guess: its samples are known if the global batch stays
    as it is. Where a guess proves wrong, what was asked for is let go and asked for anew; what is
    handed out never depends on the guess.
    """

    def __init__(
        self,
        split: Split,
        sampler: GlobalBatchSampler,
        ranks: int,
        rank: int,
        augment: bool,
        device: torch.device,
    ) -> None:
        self._split, self._sampler, self._ranks, self._rank = split, sampler, ranks, rank
        self._augment, self._device = augment, device
        self._asked: deque[tuple[MicroBatch, Pending]] = deque()

    def update(
        self,
        seen: int,
        size: int,
        following: Iterable[tuple[int, int]] = (),
        clock: HostClock | None = None,
    ) -> Iterator[tuple[MicroBatch, Batch]]:
        """The micro-batches of the update of ``size`` samples after ``seen``, in order.

        ``following``: the same of the updates after it, as far as can be guessed; read only as far
        as needed. ``clock``: marks what a copy to a GPU takes.
        """
        count = self._sampler.count(size, self._ranks, self._rank)
        stream = self._stream(seen, size, following)
        self._keep_what_fits(stream)
        for _ in range(count):
            pulse.at("waiting for data")
            self._ask(stream, 1)
            micro, pending = self._asked.popleft()
            self._ask(stream, self._split.ahead)
            with copies_marked(clock):
                batch = pending.take()
            pulse.at("computing")
            yield micro, batch

    def close(self) -> None:
        """Let go of what has been asked for."""
        for _, pending in self._asked:
            pending.cancel()
        self._asked.clear()

    def _stream(
        self, seen: int, size: int, following: Iterable[tuple[int, int]]
    ) -> Iterator[MicroBatch]:
        yield from self._sampler.micro_batches(seen, size, self._ranks, self._rank)
        for seen, size in following:
            yield from self._sampler.micro_batches(seen, size, self._ranks, self._rank)

    def _keep_what_fits(self, stream: Iterator[MicroBatch]) -> None:
        """Take from the stream what is asked for already, and let the rest go."""
        fitting: deque[tuple[MicroBatch, Pending]] = deque()
        while self._asked:
            micro = next(stream, None)
            asked, pending = self._asked[0]
            if micro is None or (asked.start, len(asked)) != (micro.start, len(micro)):
                self.close()
                if micro is not None:
                    fitting.append((micro, self._request(micro)))
                break
            fitting.append((asked, pending))
            self._asked.popleft()
        self._asked = fitting

    def _ask(self, stream: Iterator[MicroBatch], count: int) -> None:
        """Ask until ``count`` are under way."""
        while len(self._asked) < count:
            micro = next(stream, None)
            if micro is None:
                return
            self._asked.append((micro, self._request(micro)))

    def _request(self, micro: MicroBatch) -> Pending:
        return self._split.request(
            micro.samples, micro.epochs, self._sampler.seed, self._augment, self._device
        )


def batches(split: Split, samples: I64, size: int, device: torch.device) -> Iterator[Batch]:
    """The samples (m,) as evaluation sees them, in order, ``size`` at a time."""
    asked: deque[Pending] = deque()
    try:
        for start in range(0, len(samples), size):
            some = samples[start : start + size]
            asked.append(split.request(some, np.zeros_like(some), 0, False, device))
            if len(asked) > split.ahead:
                yield _taken(asked)
        while asked:
            yield _taken(asked)
    finally:
        for pending in asked:
            pending.cancel()


def _taken(asked: deque[Pending]) -> Batch:
    pulse.at("waiting for data to evaluate on")
    batch = asked.popleft().take()
    pulse.at("evaluating")
    return batch
