"""Norms of weights and gradients: per layer, over all of them, and how far the weights have come.

Norms add up in float64. In float32 the norm of a layer of 50 million elements comes out some
percent off on a CPU. All numbers of a call leave the device in one go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.consistency import digest_of


class DistanceFromInit:
    """‖w − w0‖ over all trainable parameters, w0 being the weights at construction.

    To be made of a freshly built model, before a checkpoint is loaded into it: w0 follows from the
    seed, so a checkpoint holds only its digest. Keeps w0 as one float32 tensor on the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = list(trainable)
        """Of those that were trainable then: what is frozen later stays in the distance."""
        self._initial = torch.cat([p.detach().reshape(-1) for p in trainable.values()]).cpu()
        self._known = True

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float | None:
        """The distance now; None if w0 is not known. One pass over the weights, one transfer."""
        if not self._known:
            return None
        parameters = dict(model.named_parameters())
        weights = [parameters[name].detach().reshape(-1) for name in self._names]
        sizes = [len(weight) for weight in weights]
        if weights[0].device.type != "cpu":
            weights = list(torch.split(torch.cat(weights).cpu(), sizes))
        moved = torch._foreach_sub(weights, torch.split(self._initial, sizes))
        return float(torch.linalg.vector_norm(_l2(moved)))

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self._digest() if self._known else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From here on distances are None if the run began from other weights than this w0: a
        model that has been changed since, or another version of torch's generator."""
        self._known = state["initial"] == self._digest()

    def _digest(self) -> int:
        return int(digest_of([self._initial]))


@torch.no_grad()
def layer_statistics(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """A record for each trainable parameter tensor, in the model's order.

    Keys: layer, its name; shape, a list of sizes; weight_norm, grad_norm, L2 norms; ratio, their
    quotient ‖w‖ / ‖∇w‖; trust_ratio. What is not known, not finite or would divide by zero is None.

    To be called after the optimizer's step. An optimizer with a method ``layer_norms()`` that
    returns (parameter, weight norm, gradient norm, trust ratio) of its last step (LARS, LAMB) has
    the say on its parameters; elsewhere norms are those of the moment and there is no trust ratio.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    last = getattr(optimizer, "layer_norms", None)
    given = {id(parameter): norms for parameter, *norms in last()} if last is not None else {}
    rest = [parameter for _, parameter in named if id(parameter) not in given]
    measured = {id(p): [*norms, None] for p, norms in zip(rest, _norms(rest), strict=True)}
    return [
        {
            "layer": name,
            "shape": list(parameter.shape),
            **_record(*(given | measured)[id(parameter)]),
        }
        for name, parameter in named
    ]


def clip_factor(norm: float, limit: float) -> float:
    """What a gradient of L2 norm ``norm`` is multiplied by so that its norm is at most ``limit``
    (Pascanu et al. 2013, algorithm 1); 1.0 if it is so already.

    Raises ValueError for a norm that is negative or not finite, or a limit that is not positive.
    """
    if not (0 <= norm < math.inf and limit > 0):
        raise ValueError(f"a norm of {norm} cannot be clipped to {limit}")
    return 1.0 if norm <= limit else limit / norm


def _norms(parameters: Sequence[nn.Parameter]) -> list[tuple[float, float | None]]:
    """‖w‖ and ‖∇w‖ of each parameter, None for one without a gradient."""
    if not parameters:
        return []
    grads = [p.grad for p in parameters if p.grad is not None]
    values = _l2([*parameters, *grads]).tolist()
    found = iter(values[len(parameters) :])
    return [
        (norm, None if parameter.grad is None else next(found))
        for norm, parameter in zip(values, parameters, strict=False)
    ]


def _l2(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' L2 norms, float64 (tensors), on the first one's device."""
    norms = torch._foreach_norm(list(tensors), 2, torch.float64)
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def _record(
    weight_norm: float | None, grad_norm: float | None, trust_ratio: float | None
) -> dict[str, float | None]:
    weight, grad, trust = map(_finite, (weight_norm, grad_norm, trust_ratio))
    ratio = weight / grad if weight is not None and grad else None
    return {
        "weight_norm": weight,
        "grad_norm": grad,
        "ratio": _finite(ratio),  # a denormal gradient may still overflow it
        "trust_ratio": trust,
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
