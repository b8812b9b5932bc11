"""LARS: layer-wise adaptive rates, as an ordinary ``torch.optim`` optimizer.

    λ = η‖w‖ / (‖g‖ + β‖w‖ + ε)          trust ratio; 1 where ‖w‖ or ‖g‖ is 0
    v = m·v + γλ(g + βw);  w −= v          γ inside the momentum (paper, MLPerf, Caffe, optax)
    v = m·v + λ(g + βw);   w −= γv         ``lr_in_momentum=False`` (apex LARC, torchlars, timm)

with γ the rate, m the momentum, β the weight decay and η the trust coefficient (You, Gitman and
Ginsburg 2017, arXiv 1708.03888, section 3.2.3; where its step (1) prints β‖∇w‖, β‖w‖ is read, as in
the authors' later definition and in the MLPerf rules). The two forms agree while γ is constant.
Nesterov: w −= m·v + γλ(g + βw) with the new v (MLPerf), or γ times that without γ in v.

Norms that are not finite never reach the weights: such a step is left out as a whole. How a step is
carried out, on a CPU and on a GPU, is said in ``harness.layerwise``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from harness.layerwise import (
    Bucket,
    LayerwiseOptimizer,
    all_finite,
    any_not_finite,
    descend,
)

# The fused kernel takes a factor as 1 − factor, which costs digits below this.
_LEAST_FUSED = 1e-8

_DENOMINATORS = ("sum", "gradient", "decayed")

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "trust_coefficient": 0.001,
        "eps": 0.0,
        "denominator": "sum",
        "lr_in_momentum": True,
        "clip": False,
        "decay_at_zero_norm": True,
        "adapt_1d": True,
    },
    "mlperf": {
        "trust_coefficient": 0.001,
        "eps": 0.0,
        "denominator": "sum",
        "lr_in_momentum": True,
        "clip": False,
        "decay_at_zero_norm": True,
        "adapt_1d": False,
    },
    "larc": {
        "trust_coefficient": 0.02,
        "eps": 1e-8,
        "denominator": "sum",
        "lr_in_momentum": False,
        "clip": True,
        "decay_at_zero_norm": False,
        "adapt_1d": True,
    },
}
"""Options of LARS as its definitions have them: the paper, which leaves no layer out; MLPerf's
ResNet-50 reference; NVIDIA apex's LARC around SGD. ``LARS(params, lr, **PRESETS["larc"])``."""


class LARS(LayerwiseOptimizer):
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
        *,
        denominator: Literal["sum", "gradient", "decayed"] = "sum",
        decay_at_zero_norm: bool = True,
    ) -> None:
        """
        Args:
            clip: a layer's rate is min(λ, γ) instead of γλ, as in apex's LARC and NVIDIA Caffe; γ
                where a norm is 0, as in LARC.
            denominator: what λ divides by, beside ε: ``sum`` ‖g‖ + β‖w‖, ``gradient`` ‖g‖ (NVIDIA
                Caffe), ``decayed`` ‖g + βw‖ (optax), which then stands for ‖g‖ everywhere.
            decay_at_zero_norm: False: where a norm is 0 the gradient of an adapted layer is taken
                as it is, without decay, as in LARC; it shows where ‖g‖ is 0 and ‖w‖ is not.

        Raises ValueError for a value out of its range.
        """
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
            "denominator": denominator,
            "decay_at_zero_norm": decay_at_zero_norm,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eps"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} = {group[name]} must be a number of at least 0")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum = {group['momentum']} must be at least 0 and less than 1")
        if not 0 < group["trust_coefficient"] < math.inf:
            raise ValueError(
                f"trust_coefficient = {group['trust_coefficient']} must be more than 0"
            )
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if group["denominator"] not in _DENOMINATORS:
            raise ValueError(
                f"denominator = {group['denominator']!r} must be one of {', '.join(_DENOMINATORS)}"
            )
        if group["denominator"] == "decayed" and not group["decay_at_zero_norm"]:
            raise ValueError(
                "decay_at_zero_norm = False asks for ‖g‖, which denominator = 'decayed' does not "
                "measure"
            )

    def _direction(
        self, group: dict[str, Any], targets: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], float]:
        decay = group["weight_decay"]
        if group["denominator"] != "decayed" or not decay:
            return grads, decay
        return list(torch._foreach_add(grads, targets, alpha=decay)), 0.0

    def _trust(self, group: dict[str, Any], weight_norms: Tensor, grad_norms: Tensor) -> Tensor:
        below = grad_norms + group["eps"]
        if group["denominator"] == "sum":
            below = below + group["weight_decay"] * weight_norms
        trust: Tensor = group["trust_coefficient"] * weight_norms / below
        if group["clip"]:
            # min(λ, γ) / γ, as a factor of γ
            trust = (trust / group["lr"]).clamp(max=1.0) if group["lr"] else torch.ones_like(trust)
        return trust.masked_fill((weight_norms == 0) | (grad_norms == 0), 1.0)

    def _step_on_host(self, buckets: list[Bucket]) -> None:
        if not all_finite(buckets):
            return
        for bucket in buckets:
            velocities = bucket.states(self, "momentum_buffer")
            if not bucket.adapted:
                self._move(bucket, bucket.targets, bucket.grads, velocities, 1.0, 0.0)
            else:
                layers = zip(
                    bucket.targets, bucket.grads, velocities, bucket.trust.tolist(),
                    self._decays(bucket), strict=True,
                )  # fmt: skip
                # Backwards: the layers whose norms were taken last are still in the cache.
                for target, grad, velocity, trust, decay in reversed(list(layers)):
                    self._move(bucket, [target], [grad], [velocity], trust, decay)
            bucket.write_back()

    def _move(
        self,
        bucket: Bucket,
        weights: list[Tensor],
        grads: list[Tensor],
        velocities: list[Tensor],
        trust: float,
        decay: float,
    ) -> None:
        """A step of layers with one trust ratio and one weight decay."""
        group = bucket.group
        scale, rate = self._factors(group)
        scale *= trust
        if scale < _LEAST_FUSED:
            if decay:
                grads = list(torch._foreach_add(grads, weights, alpha=decay))
            grads, decay, scale = list(torch._foreach_mul(grads, scale)), 0.0, 1.0
        nesterov = group["nesterov"]
        descend(
            weights,
            grads,
            velocities,
            lr=0.0 if nesterov else rate,
            momentum=group["momentum"],
            weight_decay=decay,
            scale=scale,
        )
        if nesterov:
            # So far v alone. Now what went into it, then v: three passes, but nothing to allocate.
            descend(weights, grads, [], lr=rate * scale, weight_decay=decay)
            torch._foreach_sub_(weights, velocities, alpha=rate * group["momentum"])

    def _step_on_device(self, buckets: list[Bucket]) -> None:
        left_out = any_not_finite(buckets)
        for bucket in buckets:
            group, directions = bucket.group, bucket.grads
            scale, rate = self._factors(group)
            if bucket.decay and group["decay_at_zero_norm"]:
                directions = list(
                    torch._foreach_add(directions, bucket.targets, alpha=bucket.decay)
                )
            elif bucket.decay:
                decays = list(_decays_with_gradient(bucket).to(directions[0].dtype).unbind())
                directions = list(
                    torch._foreach_add(directions, torch._foreach_mul(bucket.targets, decays))
                )
            directions = list(
                torch._foreach_mul(directions, bucket.scaled_by(scale))
                if bucket.adapted
                else torch._foreach_mul(directions, scale)
            )
            descend(
                bucket.targets,
                directions,
                bucket.states(self, "momentum_buffer"),
                lr=rate,
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                left_out=left_out[bucket.weight_norms.device],
            )
            bucket.write_back()

    def _factors(self, group: dict[str, Any]) -> tuple[float, float]:
        """What γ multiplies: the gradient on its way into v, and v on its way to w."""
        return (group["lr"], 1.0) if group["lr_in_momentum"] else (1.0, group["lr"])

    def _decays(self, bucket: Bucket) -> list[float]:
        if bucket.group["decay_at_zero_norm"]:
            return [bucket.decay] * len(bucket.weights)
        decays: list[float] = _decays_with_gradient(bucket).tolist()
        return decays


def _decays_with_gradient(bucket: Bucket) -> Tensor:
    """Weight decay of layers that have a gradient, 0 for the others: (n,), float64."""
    return (bucket.grad_norms != 0).double() * bucket.decay
