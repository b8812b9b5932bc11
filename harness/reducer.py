"""Summing gradients over ranks while the backward pass still runs.

Gradients live in flat float32 buckets, in the order in which backward produces them; every
parameter's ``.grad`` is a view into one. During the update's last micro-batch a bucket is handed to
the communicator as soon as its last gradient is in; earlier micro-batches send nothing. Loss and
stop flag travel in one small tensor beside the buckets.

``summation="exact"`` makes the result independent of how an update is cut into ranks and
micro-batches, to the last bit: each micro-batch's gradient is rounded to a fixed-point integer, and
integers add up to the same sum in any order. Float sums do not, and training amplifies the last bit
of a difference until, some hundred updates later, two runs have nothing in common.

With fp16, a bucket is multiplied by a power of two before the cast. Its exponent comes from the
largest magnitude of the last *reduced* bucket, which is the same on all ranks, so ranks agree on it
without another message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from harness.comm.base import Communicator, Handle

# The largest magnitude of a bucket is brought to 2^8: a factor of 255 below fp16's largest number,
# for sums of ranks that cancel and for gradients that grow from one update to the next, and 2^22
# above its smallest normal number.
_TARGET_EXPONENT = 8
_BACK_OFF = 8
_EXPONENT_RANGE = 100

# Exact summation: one unit is 2^-50. A gradient of 1e-8 keeps seven digits, and an element's sum
# may reach 2^12 before a 64-bit integer could overflow.
_UNIT_EXPONENT = 50
_EXACT_LIMIT = 2.0**12


@dataclass
class _Bucket:
    index: int
    flat: torch.Tensor
    views: list[tuple[nn.Parameter, torch.Tensor]]
    waiting: int = 0
    handle: Handle = None
    sent: bool = False
    exponent: int | None = None
    """fp16 only: the bucket travels as bucket × 2^exponent; None: not known yet, send float32."""
    wire: torch.Tensor | None = None
    compressed: bool = False
    total: torch.Tensor | None = None
    """Exact summation only: int64, in units of 2^-50."""
    before: torch.Tensor | None = None
    """What ``flat`` held before this micro-batch, where the norms of micro-batches are wanted and
    ``flat`` holds their sum."""


@dataclass(frozen=True)
class Reduced:
    """What came back with an update's gradients; equal on all ranks."""

    extras: list[float]
    """The sums of what the ranks put in."""
    grad_norm: float
    """L2 norm of the whole reduced gradient."""
    finite: bool
    """False: some gradient is inf or NaN; the update must be skipped."""
    bytes_sent: int
    """Payload that this rank handed to the communicator."""
    micro_norm2: float | None = None
    """Sum over the update's micro-batches, on all ranks, of the squared L2 norm of what each one
    adds to the gradient, if asked for."""


class GradientReducer:
    """Sums a model's gradients over ranks, overlapped with backward. One per model.

    Use per update: ``start(n)``, then ``backward(loss)`` for each of this rank's n micro-batches
    (n may be 0 and differ between ranks), then ``finish(extras)``; the gradients are then in
    ``.grad``. The loss of a micro-batch must be its samples' summed loss divided by the number of
    samples of the *whole* update, so that the sum over micro-batches and ranks is the mean.

    Raises ValueError for parameters that are not float32, or compression with exact summation.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        compression: Literal["none", "fp16"] = "none",
        bucket_bytes: int = 4 << 20,
        summation: Literal["float", "exact"] = "float",
        micro_norms: bool = False,
    ) -> None:
        """``micro_norms``: measure ``Reduced.micro_norm2``, from which the gradient noise scale
        follows; costs two passes over the gradient for each micro-batch."""
        if compression != "none" and summation == "exact":
            raise ValueError("exact summation cannot be compressed")
        self._comm = comm
        self._bound = 0.0
        self._micro_norm2 = torch.zeros((), dtype=torch.float64) if micro_norms else None
        self._fp16 = compression == "fp16"
        self._buckets = _fill_buckets(model, bucket_bytes)
        self._of: dict[nn.Parameter, _Bucket] = {}
        self._remaining = 0
        self._armed = False
        self._hooks = []
        for bucket in self._buckets:
            if self._fp16:
                bucket.wire = torch.empty_like(bucket.flat, dtype=torch.float16)
            if summation == "exact":
                bucket.total = torch.empty_like(bucket.flat, dtype=torch.int64)
            elif micro_norms:
                bucket.before = torch.empty_like(bucket.flat)
            for parameter, view in bucket.views:
                parameter.grad = view
                self._of[parameter] = bucket
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        self._gradient_ready
                    )
                )

    def start(self, micro_batches: int) -> None:
        """Begin an update to which this rank contributes ``micro_batches`` backward passes."""
        self._remaining = micro_batches
        self._armed = False
        self._bound = 0.0
        if self._micro_norm2 is not None:
            self._micro_norm2.zero_()
        for bucket in self._buckets:
            bucket.flat.zero_()
            if bucket.before is not None:
                bucket.before.zero_()
            if bucket.total is not None:
                bucket.total.zero_()
            bucket.waiting = len(bucket.views)
            bucket.sent = False

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch; the update's last one starts the communication."""
        if self._remaining <= 0:
            raise RuntimeError("more backward passes than start() was told of")
        self._remaining -= 1
        self._armed = self._remaining == 0
        loss.backward()  # type: ignore[no-untyped-call]
        self._armed = False
        if self._remaining:
            for bucket in self._buckets:
                self._fold(bucket)

    def finish(self, extras: Sequence[float] = ()) -> Reduced:
        """Wait for the sums; the reduced gradients are then in ``.grad``."""
        if self._remaining:
            raise RuntimeError(f"{self._remaining} backward passes short of what start() was told")
        for bucket in self._buckets:
            if not bucket.sent:
                self._send(bucket)
        measured = [] if self._micro_norm2 is None else [float(self._micro_norm2)]
        small = torch.tensor([*extras, self._bound, *measured], dtype=torch.float64)
        handle = self._comm.allreduce_async(small, "extras")
        sent = small.nbytes
        norms = []
        for bucket in self._buckets:
            sent += self._receive(bucket)
            norms.append(torch.linalg.vector_norm(bucket.flat))
            if self._fp16:
                norms.append(torch.linalg.vector_norm(bucket.flat, math.inf))
        self._comm.wait(handle)
        *sums, bound = small[: len(extras) + 1].tolist()
        values = torch.stack(norms).tolist()
        norm = math.sqrt(sum(v * v for v in values[:: 2 if self._fp16 else 1]))
        finite = math.isfinite(norm) and bound < _EXACT_LIMIT  # false for a NaN too
        if self._fp16:
            self._agree_exponents(values[1::2], finite)
        return Reduced(sums, norm, finite, sent, float(small[-1]) if measured else None)

    def state_dict(self) -> dict[str, Any]:
        """What the next update's arithmetic depends on."""
        return {"exponents": [bucket.exponent for bucket in self._buckets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; with another bucket size the exponents start anew."""
        exponents = state["exponents"]
        if len(exponents) != len(self._buckets):
            exponents = [None] * len(self._buckets)
        for bucket, exponent in zip(self._buckets, exponents, strict=True):
            bucket.exponent = exponent

    def close(self) -> None:
        """Take the hooks off the model, so that another reducer can take its place."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _gradient_ready(self, parameter: nn.Parameter) -> None:
        if not self._armed:
            return
        bucket = self._of[parameter]
        bucket.waiting -= 1
        if bucket.waiting == 0:
            self._send(bucket)

    def _fold(self, bucket: _Bucket) -> None:
        """Exact summation: move what the bucket holds into its integer total."""
        self._collect_strays(bucket)
        self._measure(bucket)
        if bucket.total is None:
            return
        # Sums of the largest magnitudes bound every element's sum, over ranks too.
        self._bound += float(torch.linalg.vector_norm(bucket.flat, math.inf))
        bucket.total += bucket.flat.mul_(2.0**_UNIT_EXPONENT).round_().to(torch.int64)
        bucket.flat.zero_()

    def _measure(self, bucket: _Bucket) -> None:
        """Count this micro-batch's part in the sum of squared norms, if it is wanted."""
        if self._micro_norm2 is None:
            return
        part = bucket.flat
        if bucket.before is not None:
            part = bucket.flat - bucket.before
            bucket.before.copy_(bucket.flat)
        self._micro_norm2 += torch.linalg.vector_norm(part).double().square()

    @staticmethod
    def _collect_strays(bucket: _Bucket) -> None:
        """Take gradients back that someone moved out by ``zero_grad(set_to_none=True)``."""
        for parameter, view in bucket.views:
            if parameter.grad is not view:
                if parameter.grad is not None:
                    view.copy_(parameter.grad)
                parameter.grad = view

    def _send(self, bucket: _Bucket) -> None:
        self._fold(bucket)
        bucket.sent = True
        tensor = bucket.flat if bucket.total is None else bucket.total
        bucket.compressed = bucket.wire is not None and bucket.exponent is not None
        if bucket.wire is not None and bucket.exponent is not None:
            tensor = bucket.wire
            torch.mul(bucket.flat, 2.0**bucket.exponent, out=tensor)
        bucket.handle = self._comm.allreduce_async(tensor, f"bucket.{bucket.index}")

    def _receive(self, bucket: _Bucket) -> int:
        self._comm.wait(bucket.handle)
        bucket.handle = None
        if bucket.total is not None:
            bucket.flat.copy_(bucket.total).mul_(2.0**-_UNIT_EXPONENT)
            return bucket.total.nbytes
        if not bucket.compressed or bucket.wire is None or bucket.exponent is None:
            return bucket.flat.nbytes
        bucket.flat.copy_(bucket.wire).mul_(2.0**-bucket.exponent)
        return bucket.wire.nbytes

    def _agree_exponents(self, largest: Sequence[float], finite: bool) -> None:
        for bucket, magnitude in zip(self._buckets, largest, strict=True):
            if not math.isfinite(magnitude):
                if bucket.exponent is not None:
                    bucket.exponent = max(bucket.exponent - _BACK_OFF, -_EXPONENT_RANGE)
            elif finite and magnitude > 0:
                exponent = _TARGET_EXPONENT - math.frexp(magnitude)[1]
                bucket.exponent = max(-_EXPONENT_RANGE, min(exponent, _EXPONENT_RANGE))


def _fill_buckets(model: nn.Module, bucket_bytes: int) -> list[_Bucket]:
    """Cut the trainable parameters, last first as backward meets them, into flat buckets."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for name, parameter in reversed(list(model.named_parameters())):
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise ValueError(f"parameter {name} is {parameter.dtype}; only float32 is supported")
        size = parameter.numel() * 4
        if not groups or size > room:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(parameter)
        room -= size
    return [_bucket(index, group) for index, group in enumerate(groups)]


def _bucket(index: int, parameters: list[nn.Parameter]) -> _Bucket:
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    views = []
    offset = 0
    for parameter in parameters:
        views.append((parameter, flat[offset : offset + parameter.numel()].view_as(parameter)))
        offset += parameter.numel()
    return _Bucket(index, flat, views)
