"""LAMB: Adam's direction, with a rate of its own for each layer.

    m = β1·m + (1 − β1)·g,  v = β2·v + (1 − β2)·g²
    m̂ = m / (1 − β1^t),     v̂ = v / (1 − β2^t)      without ``bias_correction`` m and v themselves
    r = m̂ / (√v̂ + ε) + βw
    w −= γ · φ(‖w‖) / ‖r‖ · r                          ratio 1 where φ(‖w‖) or ‖r‖ is 0

with γ the rate, β the weight decay and φ the identity, or ‖w‖ kept within ``norm_bounds`` (You et
al. 2019, arXiv 1904.00962, Algorithm 2).

Norms that are not finite never reach the weights: such a step is left out as a whole. How a step is
carried out, on a CPU and on a GPU, is said in ``harness.layerwise``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.layerwise import (
    Bucket,
    LayerwiseOptimizer,
    all_finite,
    any_not_finite,
    descend,
    layer_norms_of,
)


class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments; one parameter tensor is one layer.

    Tensors of one dimension (biases, batch norm's scale and shift) take Adam's step at the rate as
    it is, without trust ratio and weight decay, unless ``adapt_1d``. Any option can be set per
    parameter group; ``adapt: False`` in a group leaves its tensors out whatever their dimension,
    ``True`` takes them in.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        norm_bounds: tuple[float, float] | None = None,
        adapt_1d: bool = False,
    ) -> None:
        """``norm_bounds``: least and largest φ(‖w‖). Raises ValueError for a value out of its
        range; ``eps`` must be above 0, where 0 / 0 might arise."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "norm_bounds": norm_bounds,
            "adapt_1d": adapt_1d,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} = {group[name]} must be a number of at least 0")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas = {group['betas']} must be at least 0 and less than 1")
        if not 1e-30 <= group["eps"] < math.inf:
            raise ValueError(f"eps = {group['eps']} must be a number of at least 1e-30")
        bounds = group["norm_bounds"]
        if bounds is not None and not 0 <= bounds[0] < bounds[1] < math.inf:
            raise ValueError(f"norm_bounds = {bounds} must be 0 ≤ first < second")

    def _trust(self, group: dict[str, Any], weight_norms: Tensor, grad_norms: Tensor) -> Tensor:
        return torch.ones_like(weight_norms)  # ‖r‖ is known only after the moments

    def _step_on_host(self, buckets: list[Bucket]) -> None:
        if not all_finite(buckets):
            return
        for bucket in buckets:
            moments = self._moments(bucket)
            if bucket.adapted:
                # One room for the directions of all layers, so that memory is asked for once.
                room = bucket.targets[0].new_empty(max(t.numel() for t in bucket.targets))
                trust = [self._move(bucket, moments, i, room) for i in range(len(bucket.weights))]
                bucket.trust = torch.tensor(trust, dtype=torch.float64)
            else:
                moments.move(bucket.targets, lr=bucket.group["lr"])
            bucket.write_back()

    def _move(self, bucket: Bucket, moments: _Moments, i: int, room: Tensor) -> float:
        """A step of one layer, while r is still in the cache; returns its trust ratio."""
        group, target = bucket.group, bucket.targets[i]
        r = room.as_strided(target.size(), target.stride()).zero_()
        moments.move([r], lr=-1.0, only=slice(i, i + 1))
        if bucket.decay:
            r.add_(target, alpha=bucket.decay)
        r_norm = layer_norms_of([r])
        trust = float(_ratio(group, bucket.weight_norms[i : i + 1], r_norm))
        if torch.isfinite(r_norm):
            target.sub_(r, alpha=group["lr"] * trust)
        return trust

    def _step_on_device(self, buckets: list[Bucket]) -> None:
        left_out_on = any_not_finite(buckets)
        for bucket in buckets:
            group, left_out = bucket.group, left_out_on[bucket.weight_norms.device]
            moments = self._moments(bucket, left_out)
            if bucket.adapted:
                rs = [
                    torch.zeros_like(target, memory_format=torch.preserve_format)
                    for target in bucket.targets
                ]
                moments.move(rs, lr=-1.0)
                if bucket.decay:
                    torch._foreach_add_(rs, bucket.targets, alpha=bucket.decay)
                r_norms = layer_norms_of(rs)
                bucket.trust = _ratio(group, bucket.weight_norms, r_norms)
                torch._foreach_mul_(rs, bucket.scaled_by(group["lr"]))
                overflow = (~torch.isfinite(r_norms).all()).float()
                descend(bucket.targets, rs, [], lr=1.0, left_out=torch.maximum(left_out, overflow))
            else:
                moments.move(bucket.targets, lr=group["lr"])
            bucket.write_back()

    def _moments(self, bucket: Bucket, left_out: Tensor | None = None) -> _Moments:
        """The bucket's moments, with the number of this step."""
        steps = []
        for weight in bucket.weights:
            state, device = self.state[weight], weight.device
            # Where the weight lies, as the fused kernels want it; a checkpoint is read on the CPU.
            found = state.get("step")
            state["step"] = torch.zeros((), device=device) if found is None else found.to(device)
            steps.append(state["step"])
        if left_out is None:
            torch._foreach_add_(steps, 1.0)
        else:
            torch._foreach_add_(steps, 1.0 - left_out)
        return _Moments(
            bucket,
            bucket.states(self, "exp_avg"),
            bucket.states(self, "exp_avg_sq"),
            # 1 − β^t is 1 at t = ∞.
            steps
            if bucket.group["bias_correction"]
            else [torch.full_like(step, math.inf) for step in steps],
            left_out,
        )


@dataclass
class _Moments:
    """A bucket's first and second moments within a step."""

    bucket: Bucket
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]
    left_out: Tensor | None

    def move(self, targets: list[Tensor], *, lr: float, only: slice = slice(None)) -> None:
        """Update the moments, and in the same pass targets −= lr · m̂ / (√v̂ + ε).

        Args:
            targets: those of the layers in ``only``; zeros with lr = −1 become m̂ / (√v̂ + ε).
        """
        group = self.bucket.group
        torch._fused_adam_(
            targets,
            self.bucket.grads[only],
            self.first[only],
            self.second[only],
            [],
            self.steps[only],
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=self.left_out,
        )


def _ratio(group: dict[str, Any], weight_norms: Tensor, r_norms: Tensor) -> Tensor:
    """φ(‖w‖) / ‖r‖: (n,)."""
    bounds = group["norm_bounds"]
    phi = weight_norms if bounds is None else weight_norms.clamp(*bounds)
    return (phi / r_norms).masked_fill((phi == 0) | (r_norms == 0), 1.0)
