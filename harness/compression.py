"""How a bucket is summed up and travels: float32, fp16 with or without error feedback, integers.

With fp16 a bucket is multiplied by a power of two before the cast. Its exponent comes from the norm
of the last *reduced* bucket, which is the same on all ranks, so that ranks agree on it without
another message.

Integers make the sum independent of how an update is cut into ranks and micro-batches, to the last
bit: each micro-batch's gradient is rounded to a fixed-point integer, and integers add up to the
same sum in any order. Float sums do not, and training amplifies the last bit of a difference until,
some hundred updates later, two runs have nothing in common.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from harness.buckets import Bucket

Compression = Literal["none", "fp16", "fp16_feedback"]

# The norm of a bucket is brought to 2^10. No element is larger, so each may grow by a factor of 63
# from one update to the next (or be the small sum of large numbers) before fp16 overflows; in a
# bucket of 2^20 elements the average one is then 1, 2^14 above fp16's smallest normal number.
_TARGET_EXPONENT = 10
_BACK_OFF = 8
_EXPONENT_RANGE = 100

# Exact summation: one unit is 2^-50. A gradient of 1e-8 keeps seven digits, and an element's sum
# may reach 2^12 before a 64-bit integer could overflow.
_UNIT_EXPONENT = 50
EXACT_LIMIT = 2.0**12


class Codec:
    """One bucket's way to the wire and back; this one is float32, summed in place.

    A rank's micro-batches but the last are held, the last is packed with what is held.
    """

    bound = 0.0
    """Exact summation: no element's sum over this rank's micro-batches is larger."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    def start(self) -> None:
        """Forget what the last update has left."""

    def hold(self, gradients: list[Tensor], places: list[int], held: bool) -> None:
        """Add a micro-batch's gradients, of the parameters at ``places``, to what is ``held``."""
        views = self.bucket.views
        if held:
            if gradients:
                torch._foreach_add_([views[place] for place in places], gradients)
            return
        if len(places) < len(views):
            self.bucket.flat.zero_()
        if gradients:
            torch._foreach_copy_([views[place] for place in places], gradients)

    def pack(self, gradients: list[Tensor], places: list[int], held: bool) -> Tensor:
        """What to sum over ranks. The gradients are not altered."""
        self.hold(gradients, places, held)
        return self.bucket.flat

    def unpack(self) -> int:
        """Bring the sum into ``bucket.flat``; returns the bytes that this rank has handed over."""
        return self.bucket.flat.nbytes

    def give_up(self) -> None:
        """What was packed last is thrown away."""

    def learn(self, norm: float, finite: bool, loss_scaled: bool = False) -> None:
        """Take notice of the reduced bucket's norm, of whether the update was finite, and of
        whether it may be the scaling of the loss that it was not."""


def build_codec(
    bucket: Bucket, compression: Compression, summation: Literal["float", "exact"]
) -> Codec:
    """Raises ValueError for names that are not known, and for compression with exact summation."""
    if compression not in get_args(Compression):
        known = ", ".join(get_args(Compression))
        raise ValueError(f"compression must be one of {known}, not {compression!r}")
    if summation not in ("float", "exact"):
        raise ValueError(f"summation must be float or exact, not {summation!r}")
    if summation == "exact":
        if compression != "none":
            raise ValueError("exact summation cannot be compressed")
        return Exact(bucket)
    if compression == "none":
        return Codec(bucket)
    return Half(bucket, feedback=compression == "fp16_feedback")


class Half(Codec):
    """fp16 times 2^exponent. The first update goes as float32, because no norm is known yet."""

    def __init__(self, bucket: Bucket, feedback: bool) -> None:
        super().__init__(bucket)
        self._wire = torch.zeros_like(bucket.flat, dtype=torch.float16)
        self._wire_views = bucket.split(self._wire)
        self._sent: int | None = None
        """Exponent of what is on the wire; None: float32 is."""
        self.exponent: int | None = None
        self.residual = torch.zeros_like(bucket.flat) if feedback else None
        """What this rank's casts have rounded off so far, to be sent with the next update."""
        self._touched: set[int] = set()
        """Places of the parameters that have a gradient in this update."""

    def start(self) -> None:
        self._touched.clear()

    def hold(self, gradients: list[Tensor], places: list[int], held: bool) -> None:
        super().hold(gradients, places, held)
        self._touched.update(places)

    def pack(self, gradients: list[Tensor], places: list[int], held: bool) -> Tensor:
        self._sent = self.exponent
        scale = 2.0 ** (self.exponent or 0)
        whole = not held and len(places) == len(self._wire_views)
        if whole and self.exponent is not None and self.residual is None:
            # Not in place: autograd may hand over one piece of memory as the gradients of several
            # parameters, and go on with it in other layers.
            torch._foreach_copy_(self._wire_views, torch._foreach_mul(gradients, scale))
            return self._wire
        self.hold(gradients, places, held)
        flat = wire = self.bucket.flat
        if self.residual is not None:
            self._add_owed(self.residual)
        if self.exponent is not None:
            wire = self._wire.copy_(flat.mul_(scale))
        if self.residual is not None:
            # Exact: the difference between a float32 and its neighbour in fp16 is a float32.
            self.residual.sub_(flat if wire is flat else flat.copy_(wire).mul_(1.0 / scale))
        return wire

    def _add_owed(self, residual: Tensor) -> None:
        """Leave in ``residual`` all that has to be sent some time, in ``flat`` what is to go now.

        What is owed to a parameter without a gradient stays owed: if it has none on any rank, what
        is sent would be thrown away.
        """
        self.bucket.flat.copy_(residual.add_(self.bucket.flat))
        for place, view in enumerate(self.bucket.views):
            if place not in self._touched:
                view.zero_()

    def unpack(self) -> int:
        if self._sent is None:
            return self.bucket.flat.nbytes
        self.bucket.flat.copy_(self._wire).mul_(2.0**-self._sent)
        return self._wire.nbytes

    def give_up(self) -> None:
        if self.residual is not None:
            self.residual.zero_()  # of what it holds some has been sent, and lost

    def learn(self, norm: float, finite: bool, loss_scaled: bool = False) -> None:
        if not finite and self.residual is not None:
            self.residual.zero_()  # an inf in it would come back for ever
        if not math.isfinite(norm) and loss_scaled:
            # Which of the two has overflowed is not known. Were it lowered each time that a loss
            # scale is found to be too large, nothing would be left of the gradients after some.
            self.exponent = None
        elif not math.isfinite(norm):
            if self.exponent is not None:
                self.exponent = max(self.exponent - _BACK_OFF, -_EXPONENT_RANGE)
        elif finite and norm > 0:
            exponent = _TARGET_EXPONENT - math.frexp(norm)[1]
            self.exponent = max(-_EXPONENT_RANGE, min(exponent, _EXPONENT_RANGE))
        elif finite:
            self.exponent = None  # tells nothing of what comes, or all of it has vanished in fp16


class Exact(Codec):
    """64-bit integers in units of 2^-50."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self._total = torch.zeros_like(bucket.flat, dtype=torch.int64)

    def start(self) -> None:
        self.bound = 0.0
        self._total.zero_()

    def hold(self, gradients: list[Tensor], places: list[int], held: bool) -> None:
        flat = self.bucket.flat
        super().hold(gradients, places, held=False)
        # Sums of the largest magnitudes bound every element's sum, over ranks too.
        low, high = flat.aminmax()
        self.bound += float(torch.maximum(-low, high))
        self._total += flat.mul_(2.0**_UNIT_EXPONENT).round_().to(torch.int64)

    def pack(self, gradients: list[Tensor], places: list[int], held: bool) -> Tensor:
        self.hold(gradients, places, held)
        return self._total

    def unpack(self) -> int:
        self.bucket.flat.copy_(self._total).mul_(2.0**-_UNIT_EXPONENT)
        return self._total.nbytes
