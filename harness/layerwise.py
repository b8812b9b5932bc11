"""What LARS and LAMB share: layers, their norms and trust ratios, and steps that may be left out.

One parameter tensor is one layer. Layers are taken in ``Bucket``s that agree in group, in whether
they are adapted, and in device and dtype, so that within a bucket all but norms and trust ratios is
a plain number.

A step is carried out in one of two ways. On the host, where all weights lie in CPU memory: trust
ratios are read back as numbers and go into torch's fused CPU kernels, one pass over a layer. On the
device otherwise: trust ratios stay tensors and nothing is read back, so the host never waits for a
layer or for the step. Norms that are not finite leave the step out as a whole, on the device
through the fused kernels' ``found_inf``. The way of the device is tested on CPU tensors for equal
results and for reading nothing back; it has not been run or measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from harness.buckets import PIECE, pieces


def dense(weight: Tensor) -> Tensor:
    """The tensor itself if its elements lie in memory without gaps, or else a copy that does.

    Fused kernels walk through memory and heed no strides.
    """
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


def laid_out_as(target: Tensor, tensor: Tensor) -> Tensor:
    """The tensor itself if it lies in memory as ``target`` does, or else a copy that does."""
    if tensor.stride() == target.stride():
        return tensor
    return torch.empty_like(target, memory_format=torch.preserve_format).copy_(tensor)


def layer_norms_of(tensors: list[Tensor]) -> Tensor:
    """L2 norms of n tensors of one device and dtype: (n,), float64."""
    if tensors[0].device.type != "cpu" or all(t.numel() <= PIECE for t in tensors):
        return torch.stack(torch._foreach_norm(tensors)).double()
    cut = [pieces([tensor]) for tensor in tensors]
    norms = torch.stack(torch._foreach_norm([piece for one in cut for piece in one])).double()
    owners = torch.repeat_interleave(torch.tensor([len(one) for one in cut]))
    return norms.new_zeros(len(tensors)).index_add_(0, owners, norms.square()).sqrt()


@dataclass
class Bucket:
    """n layers of a step that share all but their norms."""

    group: dict[str, Any]
    adapted: bool
    """False: no trust ratio and no weight decay."""
    weights: list[Tensor]
    targets: list[Tensor]
    """What the kernels change: the weights, or dense copies of those that have gaps."""
    grads: list[Tensor]
    """Laid out as ``targets``."""
    decay: float
    """Weight decay that is still to be added to ``grads``."""
    weight_norms: Tensor
    """(n,), float64, as the next two."""
    grad_norms: Tensor
    trust: Tensor
    """Trust ratios; 1 where a layer takes the rate as it is."""

    def finite(self) -> Tensor:
        """Whether all norms are, as a tensor of no dimensions."""
        return (torch.isfinite(self.weight_norms) & torch.isfinite(self.grad_norms)).all()

    def states(self, optimizer: Optimizer, key: str) -> list[Tensor]:
        """A tensor of each layer's state, zeros at first; laid out as ``targets``."""
        found = []
        for weight, target in zip(self.weights, self.targets, strict=True):
            state = optimizer.state[weight]
            if key not in state:
                state[key] = torch.zeros_like(target, memory_format=torch.preserve_format)
            state[key] = laid_out_as(target, state[key])
            found.append(state[key])
        return found

    def scaled_by(self, factor: float) -> list[Tensor]:
        """factor · trust of each layer, as tensors of no dimensions in the weights' dtype."""
        return list((self.trust * factor).to(self.targets[0].dtype).unbind())

    def write_back(self) -> None:
        """Carry what was done to copies over to the weights."""
        for weight, target in zip(self.weights, self.targets, strict=True):
            if target is not weight:
                weight.copy_(target)


def descend(
    weights: list[Tensor],
    directions: list[Tensor],
    velocities: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    nesterov: bool = False,
    left_out: Tensor | None = None,
) -> None:
    """One fused pass: v = m·v + scale·(d + βw); w −= lr·v, or with Nesterov lr·(d + βw + m·v).

    Without velocities w −= lr·(d + βw). Nesterov takes no other ``scale`` than 1. Nothing is done
    if ``left_out``, a float32 tensor of no dimensions, is 1.
    """
    torch._fused_sgd_(
        weights,
        directions,
        velocities,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=1.0 - scale,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
        found_inf=left_out,
    )


class LayerwiseOptimizer(Optimizer):
    """An optimizer that gives each layer a rate of its own.

    Groups need ``adapt_1d`` and ``adapt``. Tensors of one dimension (biases, batch norm's scale and
    shift) are left out unless ``adapt_1d``; ``adapt`` False leaves a group's tensors out whatever
    their dimension, True takes them in, None is by dimension.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]
    ) -> None:
        self._on_device: bool | None = None  # None: where the weights lie decides
        self._norms: list[tuple[list[Tensor], Tensor]] = []
        super().__init__(params, defaults | {"adapt": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_on_device", None)
        self._norms = []
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)  # a state from before there was this option

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. Left out as a whole if a norm of a weight or of a gradient is not finite.

        Raises ValueError for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = list(self._buckets())
        if buckets:
            on_device = self._on_device
            if on_device is None:
                on_device = any(bucket.weights[0].device.type != "cpu" for bucket in buckets)
            (self._step_on_device if on_device else self._step_on_host)(buckets)
            self._norms = [
                (b.weights, torch.stack([b.weight_norms, b.grad_norms, b.trust])) for b in buckets
            ]
        return loss

    def layer_norms(self) -> list[tuple[Tensor, float, float, float]]:
        """Of each layer in the last step: the parameter, ‖w‖ before the step, ‖g‖, trust ratio.

        In the order of the parameter groups; empty before the first step. The trust ratio is the
        layer's rate as a multiple of γ, NaN if the step was left out. On a GPU this call waits for
        the numbers; the step did not.
        """
        rows: dict[Tensor, tuple[float, float, float]] = {}
        for weights, values in self._norms:
            rows |= zip(weights, zip(*values.tolist(), strict=True), strict=True)
        if not all(math.isfinite(norm) for row in rows.values() for norm in row[:2]):
            rows = {weight: (*row[:2], math.nan) for weight, row in rows.items()}
        return [
            (weight, *rows[weight])
            for group in self.param_groups
            for weight in group["params"]
            if weight in rows
        ]

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a value out of its range."""
        raise NotImplementedError

    def _step_on_host(self, buckets: list[Bucket]) -> None:
        raise NotImplementedError

    def _step_on_device(self, buckets: list[Bucket]) -> None:
        raise NotImplementedError

    def _trust(self, group: dict[str, Any], weight_norms: Tensor, grad_norms: Tensor) -> Tensor:
        """The adapted layers' trust ratios, as far as these two norms tell: (n,)."""
        raise NotImplementedError

    def _direction(
        self, group: dict[str, Any], targets: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], float]:
        """What stands for the adapted layers' gradients, and the decay still to be added to it."""
        return grads, group["weight_decay"]

    def _buckets(self) -> Iterator[Bucket]:
        for group in self.param_groups:
            alike: dict[tuple[bool, torch.device, torch.dtype], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.grad.is_sparse:
                    raise ValueError(f"{type(self).__name__} does not take sparse gradients")
                adapt = group["adapt"]
                if adapt is None:
                    adapt = weight.dim() > 1 or group["adapt_1d"]
                alike.setdefault((bool(adapt), weight.device, weight.dtype), []).append(weight)
            for (adapted, _, _), weights in alike.items():
                yield self._measured(group, adapted, weights)

    def _measured(self, group: dict[str, Any], adapted: bool, weights: list[Tensor]) -> Bucket:
        targets = [dense(weight) for weight in weights]
        grads = [
            laid_out_as(target, weight.grad)
            for target, weight in zip(targets, weights, strict=True)
            if weight.grad is not None
        ]
        decay = 0.0
        if adapted:
            grads, decay = self._direction(group, targets, grads)
        pairs = [tensor for pair in zip(targets, grads, strict=True) for tensor in pair]
        weight_norms, grad_norms = layer_norms_of(pairs).view(-1, 2).unbind(1)
        trust = (
            self._trust(group, weight_norms, grad_norms)
            if adapted
            else torch.ones_like(weight_norms)
        )
        return Bucket(
            group, adapted, weights, targets, grads, decay, weight_norms, grad_norms, trust
        )


def all_finite(buckets: list[Bucket]) -> bool:
    """Whether every norm is; waits for the device."""
    return all(bool(bucket.finite()) for bucket in buckets)


def any_not_finite(buckets: list[Bucket]) -> dict[torch.device, Tensor]:
    """1 if some norm is not finite, or else 0, for ``descend``, on each device of the buckets."""
    home = buckets[0].weight_norms.device
    finite = torch.stack([bucket.finite().to(home) for bucket in buckets]).all()
    left_out = (~finite).float()
    return {device: left_out.to(device) for device in {b.weight_norms.device for b in buckets}}
