"""LARS: layer-wise adaptive rates, as an ordinary ``torch.optim`` optimizer.

    λ = η‖w‖ / (‖g‖ + β‖w‖ + ε)          trust ratio; 1 where ‖w‖ or ‖g‖ is 0
    v = m·v + γλ(g + βw);  w −= v          γ inside the momentum (paper, MLPerf, Caffe, optax)
    v = m·v + λ(g + βw);   w −= γv         ``lr_in_momentum=False`` (apex LARC, torchlars, timm)

with γ the rate, m the momentum, β the weight decay and η the trust coefficient (You, Gitman and
Ginsburg 2017, arXiv 1708.03888, section 3.2.3; where its step (1) prints β‖∇w‖, β‖w‖ is read, as in
the authors' later definition and in the MLPerf rules). The two forms agree while γ is constant.

A step takes all norms in one go and reads them back once, however many layers there are: its one
synchronisation with a GPU. Norms that are not finite never reach the weights: such a step is left
out as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

# The fused kernel takes a factor as 1 − factor, which costs digits below this.
_LEAST_FUSED = 1e-8


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling; one parameter tensor is one layer.

    Tensors of one dimension (biases, batch norm's scale and shift) take the rate as it is, without
    trust ratio and weight decay, unless ``adapt_1d``. Any option can be set per parameter group;
    ``adapt: False`` in a group leaves its tensors out whatever their dimension, ``True`` takes them
    in.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        clip: bool = False,
        adapt_1d: bool = False,
    ) -> None:
        """``clip``: a layer's rate is min(λ, γ) instead of γλ, as in apex's LARC and NVIDIA Caffe.

        Raises ValueError for a value out of its range.
        """
        for name, value, low in (
            ("lr", lr, 0.0),
            ("weight_decay", weight_decay, 0.0),
            ("eps", eps, 0.0),
        ):
            if not low <= value < math.inf:
                raise ValueError(f"{name} = {value} must be a number of at least {low:g}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum} must be at least 0 and less than 1")
        if not 0 < trust_coefficient < math.inf:
            raise ValueError(f"trust_coefficient = {trust_coefficient} must be more than 0")
        if nesterov and momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "lr_in_momentum": lr_in_momentum,
            "clip": clip,
            "adapt_1d": adapt_1d,
            "adapt": None,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. Left out as a whole if a norm of a weight or of a gradient is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = [
            _Layer(group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if layers and _measure(layers):
            for layer in layers:
                layer.update(self.state[layer.weight])
        return loss


class _Layer:
    """One parameter tensor within a step."""

    def __init__(self, group: dict[str, Any], weight: Tensor) -> None:
        if weight.grad is None or weight.grad.is_sparse:
            raise ValueError("LARS does not take sparse gradients")
        self.group, self.weight, self.grad = group, weight, weight.grad
        adapt = group["adapt"]
        self.adapted = (weight.dim() > 1 or group["adapt_1d"]) if adapt is None else bool(adapt)
        self.trust = 1.0

    def set_trust(self, weight_norm: float, grad_norm: float) -> None:
        """The trust ratio λ from the two norms."""
        group = self.group
        if not self.adapted or weight_norm == 0 or grad_norm == 0:
            return
        below = grad_norm + group["weight_decay"] * weight_norm + group["eps"]
        self.trust = group["trust_coefficient"] * weight_norm / below
        if group["clip"]:
            # min(λ, γ) / γ, as a factor of γ
            self.trust = min(self.trust / group["lr"], 1.0) if group["lr"] > 0 else 1.0

    def update(self, state: dict[str, Any]) -> None:
        """v = m·v + scale·(g + βw); w −= rate·v, with Nesterov rate·(m·v + scale·(g + βw))."""
        group = self.group
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                self.weight, memory_format=torch.preserve_format
            )
        velocity, momentum = state["momentum_buffer"], group["momentum"]
        decay = group["weight_decay"] if self.adapted else 0.0
        scale, rate = (
            (group["lr"] * self.trust, 1.0)
            if group["lr_in_momentum"]
            else (self.trust, group["lr"])
        )
        if _fusible(self.weight) and not group["nesterov"] and scale >= _LEAST_FUSED:
            # One pass over memory. The kernel's v = m·v + (1 − dampening)·(g + βw).
            torch._fused_sgd_(
                [self.weight],
                [self.grad],
                [velocity],
                weight_decay=decay,
                momentum=momentum,
                lr=rate,
                dampening=1.0 - scale,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
            return
        velocity.mul_(momentum).add_(self.grad, alpha=scale)
        if decay:
            velocity.add_(self.weight, alpha=scale * decay)
        if not group["nesterov"]:
            self.weight.sub_(velocity, alpha=rate)
            return
        step = torch.add(self.grad, self.weight, alpha=decay) if decay else self.grad
        self.weight.sub_(velocity, alpha=rate * momentum).sub_(step, alpha=rate * scale)


def _fusible(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and weight.is_contiguous()
        and hasattr(torch, "_fused_sgd_")
    )


def _measure(layers: list[_Layer]) -> bool:
    """Give each layer its trust ratio; False if a norm is not finite."""
    weights = torch._foreach_norm([layer.weight for layer in layers])
    grads = torch._foreach_norm([layer.grad for layer in layers])
    device = weights[0].device
    norms = torch.stack([norm.to(device, torch.float64) for norm in (*weights, *grads)]).tolist()
    if not all(map(math.isfinite, norms)):
        return False
    for layer, weight_norm, grad_norm in zip(
        layers, norms[: len(layers)], norms[len(layers) :], strict=True
    ):
        layer.set_trust(weight_norm, grad_norm)
    return True
