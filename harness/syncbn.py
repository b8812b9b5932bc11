"""Batch norm over the micro-batches of all ranks (Ioffe and Szegedy 2015, of a larger batch).

Small micro-batches give noisy statistics. Here those of all ranks that are in the model at the same
time count as one: two small sums over ranks for each layer, one in forward and one in backward.

Every rank passes the model equally often, and reaches the same layers; one that has no samples left
passes an empty batch. Counts are summed with the rest, so that batches of unequal size, empty ones
too, weigh as they should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from harness.comm.base import Communicator, allreduce
from harness.errors import ConfigError, HarnessError


def convert(model: nn.Module, comm: Communicator) -> nn.Module:
    """The model, changed in place, with every nn.BatchNorm1d, 2d and 3d synchronised: a collective
    in each forward pass of one in training mode, another in its backward pass.

    Parameters, buffers, hooks and the names in ``state_dict`` stay as they are; evaluation mode is
    that of nn.BatchNorm, without communication. A deep copy talks through the same communicator.
    torch.compile leaves the layers to eager mode.

    Raises ConfigError for another kind of batch norm, whose forward pass may be its own.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            made[module] = _synchronised(module, name, comm)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return made.get(model, model)


class _Ranks:
    """The ranks, as one layer talks to them."""

    def __init__(self, comm: Communicator, layer: str) -> None:
        self._comm = comm
        self.layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ranks:
        return self  # a communicator cannot be copied

    def sum(self, tensor: Tensor, direction: str) -> Tensor:
        return allreduce(self._comm, tensor, f"batch_norm.{self.layer}.{direction}")


class _Synchronised(_BatchNorm):
    """In training mode the statistics are those of all ranks together."""

    ranks: _Ranks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, batch: Tensor) -> Tensor:
        if not self.training:
            return super().forward(batch)
        self._check_input_dim(batch)  # type: ignore[no-untyped-call]
        total, mean, variance = _statistics(batch.detach(), self.ranks)
        # With more values than one on any rank nothing can be amiss, and nobody waits for a device
        # to tell.
        if batch.numel() <= batch.shape[1]:
            if total == 1:
                raise HarnessError(
                    f"batch norm {self.ranks.layer or '(the model)'} gets one value for each "
                    f"channel from all ranks together, which has no variance (here a batch of "
                    f"shape {tuple(batch.shape)}); use a larger batch"
                )
            if total == 0:
                return functional.batch_norm(batch, None, None, self.weight, self.bias, True)
        self._follow(total, mean, variance)
        result: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            batch, self.weight, self.bias, total, mean, variance, self.eps, self.ranks
        )
        return result

    @torch.no_grad()
    def _follow(self, total: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Let the running statistics follow, as nn.BatchNorm does."""
        if not self.track_running_stats or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        factor = self.momentum
        if factor is None:
            factor = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (total / (total - 1))
        for running, latest in ((self.running_mean, mean), (self.running_var, unbiased)):
            if running is not None:
                running.mul_(1 - factor).add_(latest, alpha=factor)


class SyncBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    pass


class SyncBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    pass


class SyncBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    pass


_KINDS: dict[type[nn.Module], type[_Synchronised]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def _synchronised(module: nn.Module, name: str, comm: Communicator) -> nn.Module:
    kind = _KINDS.get(type(module))
    if kind is None:
        found = f"{type(module).__module__}.{type(module).__qualname__}"
        raise ConfigError(
            f"train.sync_batch_norm: {name or 'the model'} is a {found}, which may compute "
            f"something else; only {', '.join(f'nn.{known.__name__}' for known in _KINDS)} can be "
            "synchronised"
        )
    synchronised = kind.__new__(kind)
    # All that the layer holds and that hangs on it, the very same objects.
    synchronised.__dict__ = module.__dict__
    synchronised.ranks = _Ranks(comm, name)
    return synchronised


def _statistics(batch: Tensor, ranks: _Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values of a channel on all ranks, their mean and variance (channels), float64.

    A rank finds its own mean and variance as nn.BatchNorm does. As sums of the values and of their
    squares in float64 these add up to the variance with an error of 2^-52 · (mean² / variance),
    below what float32 leaves of the values themselves.
    """
    channels = batch.shape[1]
    own = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=batch.device)
    count = batch.numel() // channels
    if count:
        mean, variance = torch.batch_norm_update_stats(_wide(batch), None, None, 0.0)
        mean = mean.double()
        own[0] = count
        own[1:] = torch.cat([mean, mean.square() + variance.double()]) * count
    summed = ranks.sum(own, "forward")
    total = summed[0]
    mean, mean_square = (summed[1:] / total).chunk(2)
    return total, mean, (mean_square - mean.square()).clamp_(min=0)


class _Normalise(torch.autograd.Function):
    """(batch - mean) / √(variance + eps) · weight + bias, mean and variance being those of all
    ranks' batches, which each value has its share in."""

    @staticmethod
    def forward(
        ctx: Any,
        batch: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        total: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        ranks: _Ranks,
    ) -> Tensor:
        ctx.save_for_backward(batch, weight, total, mean, variance)
        ctx.eps, ctx.ranks = eps, ranks
        kind = _wide(batch).dtype
        return functional.batch_norm(
            batch, mean.to(kind), variance.to(kind), weight, bias, training=False, eps=eps
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        batch, weight, total, mean, variance = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wide, grad = _wide(batch), _wide(grad)
        kind = wide.dtype
        # Of this rank's values alone: sums of grad · normalised value, and of grad.
        grad_weight = grad_bias = torch.zeros_like(mean, dtype=kind)
        if batch.numel():  # of an empty batch the operator makes the process die
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, wide, weight, mean.to(kind), variance.to(kind), None, None, False, ctx.eps,
                [False, True, True],
            )  # fmt: skip
        grad_batch = None
        if needs[0]:
            own = torch.cat([grad_weight, grad_bias]).double()
            along, level = (ctx.ranks.sum(own, "backward") / total).chunk(2)
            scale = torch.rsqrt(variance + ctx.eps)
            if weight is not None:
                scale = scale * weight
            # scale · (grad - level - along · normalised value); the last two are a batch norm.
            grad_batch = functional.batch_norm(
                wide, mean.to(kind), variance.to(kind), (-along * scale).to(kind),
                (-level * scale).to(kind), training=False, eps=ctx.eps,
            )  # fmt: skip
            per_channel = scale.to(kind).view(1, -1, *[1] * (batch.dim() - 2))
            grad_batch = grad_batch.addcmul_(grad, per_channel).to(batch.dtype)
        return (
            grad_batch,
            grad_weight if needs[1] else None,
            grad_bias if needs[2] else None,
            *[None] * 5,
        )


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
