"""Summing gradients over ranks while the backward pass still runs.

Gradients are gathered in flat float32 buckets, in the order in which backward produces them. During
the update's last micro-batch a bucket is handed to the communicator as soon as its last gradient is
in; earlier micro-batches send nothing. What comes back is in ``.grad`` as views into the buckets.
Loss, stop flag and norms travel in one small tensor beside them.

Between ``start`` and ``finish`` ``.grad`` is None, so that autograd hands over each gradient as it
made it: to zero the buckets and let it add into them would cost two more passes over memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.buckets import Bucket, fill_buckets, norm2
from harness.comm.base import Communicator, Handle
from harness.compression import EXACT_LIMIT, Codec, Compression, Half, build_codec
from harness.errors import HarnessError


@dataclass(frozen=True)
class Reduced:
    """What came back with an update's gradients; equal on all ranks."""

    extras: list[float]
    """The sums of what the ranks put in."""
    grad_norm: float
    """L2 norm of the whole reduced gradient."""
    problem: str | None
    """Why the update must be skipped; None if it need not."""
    bytes_sent: int
    """Payload that this rank handed to the communicator."""
    micro_norm2: float | None = None
    """Sum over the update's micro-batches, on all ranks, of the squared L2 norm of what each one
    adds to the gradient, if asked for."""

    @property
    def finite(self) -> bool:
        """Whether the update can be applied."""
        return self.problem is None


class GradientReducer:
    """Sums a model's gradients over ranks, overlapped with backward. One per model.

    Use per update: ``start(n)``, then ``backward(loss)`` for each of this rank's n micro-batches
    (n may be 0, and differ between ranks and updates), then ``finish(extras)``; the gradients are
    then in ``.grad``. The loss of a micro-batch must be its samples' summed loss divided by the
    number of samples of the *whole* update, so that the sum over micro-batches and ranks is the
    mean. A loss scale, which keeps small gradients alive in fp16, is applied and taken off in here:
    nothing behind ``backward`` knows of it.

    A parameter that has no gradient on some ranks gets the sum of the others'; one that has none on
    any rank gets None, as without this class. Sparse gradients are made dense. Parameters that do
    not require a gradient when the reducer is made are left alone; one frozen later gets None.

    All ranks must begin with the same weights; that is not seen to here. Where several reducers are
    under way at once, each needs a ``name`` of its own, the same on all ranks.

    Raises ValueError for parameters that are not float32, settings that are not known, or
    compression with exact summation.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        compression: Compression = "none",
        bucket_bytes: int = 4 << 20,
        summation: Literal["float", "exact"] = "float",
        name: str = "",
    ) -> None:
        self._comm = comm
        self._name = f"{name}." if name else ""
        self._frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        buckets = fill_buckets(model, bucket_bytes)
        self._lanes = [
            _Lane(bucket, build_codec(bucket, compression, summation)) for bucket in buckets
        ]
        self._presence = _Presence(sum(len(bucket.parameters) for bucket in buckets), comm.size)
        self._of: dict[nn.Parameter, tuple[_Lane, int]] = {}
        self._next = 0
        """Index of the next bucket to send."""
        self._remaining = 0
        self._held = False
        """Whether the codecs hold gradients of this update's earlier micro-batches."""
        self._armed = False
        self._started = False
        self._loss_scale = 1.0
        self._micro_norms2: list[Tensor] | None = None
        self._hooks = []
        for lane in self._lanes:
            for place, parameter in enumerate(lane.bucket.parameters):
                self._of[parameter] = lane, place
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        self._gradient_ready
                    )
                )

    def start(self, micro_batches: int, micro_norms: bool = False, loss_scale: float = 1.0) -> None:
        """Begin an update to which this rank contributes ``micro_batches`` backward passes.

        ``micro_norms``: measure ``Reduced.micro_norm2``, from which the gradient noise scale
        follows; costs a pass over the gradient for each micro-batch. ``loss_scale``: what losses
        are multiplied by before backward, and each micro-batch's gradients divided by after it;
        another one than 1 costs a pass as well. Both the same on all ranks.

        An update that was begun before and not finished is given up, which all ranks must do alike.

        Raises ValueError for a loss scale that is not a power of two, which would cost precision.
        """
        self._give_up()
        self._started = True
        if not 0 < loss_scale < math.inf or math.frexp(loss_scale)[0] != 0.5:
            raise ValueError(f"a loss scale must be a power of two, not {loss_scale}")
        self._loss_scale = loss_scale
        self._remaining = micro_batches
        self._next = 0
        self._held = False
        self._micro_norms2 = [] if micro_norms else None
        for lane in self._lanes:
            lane.start()

    def backward(self, loss: Tensor | None) -> None:
        """Add the gradients of one micro-batch; the update's last one starts the communication.

        None stands for a micro-batch without any sample left in it, which adds nothing.
        """
        if self._remaining <= 0:
            raise RuntimeError("more backward passes than start() was told of")
        self._remaining -= 1
        if loss is None:
            return
        self._armed = self._remaining == 0
        try:
            scaled = loss if self._loss_scale == 1.0 else loss * self._loss_scale
            scaled.backward()  # type: ignore[no-untyped-call]
        finally:
            self._armed = False
        if self._remaining:
            for lane in self._lanes:
                gradients, places = self._take(lane)
                lane.codec.hold(gradients, places, self._held)
            self._held = True

    def finish(self, extras: Sequence[float] = ()) -> Reduced:
        """Wait for the sums; the reduced gradients are then in ``.grad``.

        Raises HarnessError if a parameter that was frozen when the reducer was made is so no more.
        """
        if not self._started:
            raise RuntimeError("finish() without start()")
        self._check_frozen()
        if self._remaining:
            raise RuntimeError(f"{self._remaining} backward passes short of what start() was told")
        for lane in self._lanes[self._next :]:
            self._send(lane)
        own = [*extras, _largest([lane.codec.bound for lane in self._lanes])]
        if self._micro_norms2 is not None:
            own.append(float(torch.stack(self._micro_norms2).sum()) if self._micro_norms2 else 0.0)
        flags = self._presence.pack([flag for lane in self._lanes for flag in lane.present])
        small = torch.tensor([*own, *flags], dtype=torch.float64)
        handle = self._comm.allreduce_async(small, f"{self._name}extras")
        sent = small.nbytes
        norms2 = []
        for lane in self._lanes:
            self._comm.wait(lane.handle)
            sent += lane.codec.unpack()
            norms2.append(norm2([lane.bucket.flat]))
        self._comm.wait(handle)
        summed = small.tolist()
        self._give_gradients(self._presence.unpack(summed[len(own) :]))
        by_bucket = torch.stack(norms2).tolist() if norms2 else []
        norm = math.sqrt(sum(by_bucket))
        problem = _problem(norm, bound=summed[len(extras)])
        for lane, value in zip(self._lanes, by_bucket, strict=True):
            lane.codec.learn(math.sqrt(value), problem is None, self._loss_scale != 1.0)
        micro_norm2 = None if self._micro_norms2 is None else summed[len(extras) + 1]
        self._started = False
        return Reduced(summed[: len(extras)], norm, problem, sent, micro_norm2)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the reduced gradients, as clipping does."""
        if factor != 1.0 and self._lanes:
            torch._foreach_mul_([lane.bucket.flat for lane in self._lanes], factor)

    def state_dict(self) -> dict[str, Any]:
        """What the next update's arithmetic depends on; the same on all ranks."""
        return {"exponents": [getattr(lane.codec, "exponent", None) for lane in self._lanes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; with another bucket size the exponents start anew."""
        exponents = state["exponents"]
        if len(exponents) != len(self._lanes):
            exponents = [None] * len(self._lanes)
        for lane, exponent in zip(self._lanes, exponents, strict=True):
            if isinstance(lane.codec, Half):
                lane.codec.exponent = exponent

    @property
    def residuals(self) -> list[Tensor]:
        """What error feedback owes, one tensor a bucket, in place and different on each rank; empty
        without it."""
        codecs = [lane.codec for lane in self._lanes]
        return [c.residual for c in codecs if isinstance(c, Half) and c.residual is not None]

    def close(self) -> None:
        """Take the hooks off the model, so that another reducer can take its place."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _check_frozen(self) -> None:
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise HarnessError(
                    f"the model's parameter {name} was frozen when training began and is so no "
                    "more; its gradient would not be summed over ranks. Let it require a gradient "
                    "from the beginning, or leave it frozen"
                )

    def _give_up(self) -> None:
        """Wait for what an unfinished update has under way."""
        if not self._started:
            return
        for lane in self._lanes[: self._next]:
            self._comm.wait(lane.handle)
            lane.codec.give_up()

    def _gradient_ready(self, parameter: nn.Parameter) -> None:
        if not self._armed:
            return
        lane, place = self._of[parameter]
        if lane.bucket.index < self._next:
            raise RuntimeError(
                f"{lane.bucket.names[place]} got another gradient after its bucket was sent: one "
                "backward pass runs inside another (reentrant checkpointing); use "
                "torch.utils.checkpoint with use_reentrant=False"
            )
        lane.waiting.discard(place)
        # In order, so that all ranks do the same in whatever order their gradients come.
        while self._next < len(self._lanes) and not self._lanes[self._next].waiting:
            self._send(self._lanes[self._next])

    def _send(self, lane: _Lane) -> None:
        self._next = lane.bucket.index + 1
        gradients, places = self._take(lane)
        tensor = lane.codec.pack(gradients, places, self._held)
        name = f"{self._name}bucket.{lane.bucket.index}"
        lane.handle = self._comm.allreduce_async(tensor, name)

    def _take(self, lane: _Lane) -> tuple[list[Tensor], list[int]]:
        """A micro-batch's gradients and their places, without loss scale, noted and measured."""
        gradients, places = lane.bucket.take_gradients()
        if self._loss_scale != 1.0 and gradients:
            # Not in place: their memory may be each other's, or still in use in other layers.
            gradients = list(torch._foreach_mul(gradients, 1.0 / self._loss_scale))
        for place in places:
            lane.present[place] = True
        if self._micro_norms2 is not None and gradients:
            self._micro_norms2.append(norm2(gradients))
        return gradients, places

    def _give_gradients(self, present: Sequence[bool]) -> None:
        flags = iter(present)
        for lane in self._lanes:
            for parameter, view in zip(lane.bucket.parameters, lane.bucket.views, strict=True):
                parameter.grad = view if next(flags) else None


def _largest(bounds: Sequence[float]) -> float:
    """NaN if there is one, which ``max`` may overlook."""
    return math.nan if any(map(math.isnan, bounds)) else max(bounds, default=0.0)


def _problem(norm: float, bound: float) -> str | None:
    """Why an update must be skipped, from the gradient's norm and the bound of exact sums."""
    if not (math.isfinite(norm) and math.isfinite(bound)):
        return "a gradient is inf or NaN"
    if bound >= EXACT_LIMIT:
        return (
            f"gradients may add up to {bound:.0f}, and comm.summation = exact holds sums below "
            f"{EXACT_LIMIT:.0f} only (comm.summation = float has no such limit)"
        )
    return None


class _Lane:
    """A bucket and what goes on with it in the course of an update."""

    def __init__(self, bucket: Bucket, codec: Codec) -> None:
        self.bucket, self.codec = bucket, codec
        self.handle: Handle = None
        self.waiting: set[int] = set()
        """Places of the parameters whose gradient of the last micro-batch is not in yet."""
        self.present: list[bool] = []
        """By place: whether any micro-batch of this rank had a gradient."""

    def start(self) -> None:
        for parameter in self.bucket.parameters:
            parameter.grad = None
        count = len(self.bucket.parameters)
        self.waiting = set(range(count))
        self.present = [False] * count
        self.codec.start()


class _Presence:
    """Which parameters have a gradient on any rank, as a few float64 that are summed over ranks.

    Each holds as many digits to the base ranks + 1 as fit into its 53 bits: the sum of a
    parameter's digit over ranks is the number of ranks that have its gradient, and never carries.
    """

    def __init__(self, parameters: int, ranks: int) -> None:
        self._parameters, self._ranks = parameters, ranks
        self._digits = max(1, int(53 / math.log2(ranks + 1)))
        self._all = self._encode([True] * parameters)

    def pack(self, present: Sequence[bool]) -> list[float]:
        return self._all if all(present) else self._encode(present)

    def unpack(self, summed: Sequence[float]) -> list[bool]:
        if list(summed) == [value * self._ranks for value in self._all]:
            return [True] * self._parameters
        present = []
        for value in summed:
            rest = int(value)
            for _ in range(self._digits):
                rest, digit = divmod(rest, self._ranks + 1)
                present.append(digit > 0)
        return present[: self._parameters]

    def _encode(self, present: Sequence[bool]) -> list[float]:
        return [
            float(
                sum(
                    (self._ranks + 1) ** power
                    for power, flag in enumerate(present[begin : begin + self._digits])
                    if flag
                )
            )
            for begin in range(0, self._parameters, self._digits)
        ]
