"""LARS against an independent float64 reference, layer by layer, for every option."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.lars import LARS

SHAPES = ((7, 5), (4, 3, 3, 3), (6,), (2, 2), (5,))
ZERO = 3  # index of a layer whose weights begin at zero


def weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    made[ZERO].zero_()
    return [nn.Parameter(w.to(dtype)) for w in made]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    if step == 2:
        made[1].zero_()
    return made


def reference(steps: int, rates: list[float], **options: Any) -> list[Tensor]:
    """The definition, written down plainly, in float64."""
    at = {
        "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.001, "eps": 0.0,
        "nesterov": False, "lr_in_momentum": True, "clip": False, "adapt_1d": False,
    } | options  # fmt: skip
    ws = [w.detach().clone() for w in weights()]
    vs = [torch.zeros_like(w) for w in ws]
    for step in range(steps):
        gamma = rates[step]
        for w, v, g in zip(ws, vs, gradients(step), strict=True):
            adapted = w.dim() > 1 or at["adapt_1d"]
            beta = at["weight_decay"] if adapted else 0.0
            trust = torch.ones((), dtype=torch.float64)
            if adapted and w.norm() > 0 and g.norm() > 0:
                trust = (
                    at["trust_coefficient"] * w.norm() / (g.norm() + beta * w.norm() + at["eps"])
                )
                if at["clip"]:
                    trust = trust.clamp(max=gamma) / gamma
            direction = trust * (g + beta * w)
            if at["lr_in_momentum"]:
                v.copy_(at["momentum"] * v + gamma * direction)
                w -= at["momentum"] * v + gamma * direction if at["nesterov"] else v
            else:
                v.copy_(at["momentum"] * v + direction)
                w -= gamma * (at["momentum"] * v + direction if at["nesterov"] else v)
    return ws


def run(steps: int, rates: list[float], dtype: torch.dtype, **options: Any) -> list[nn.Parameter]:
    ws = weights(dtype)
    optimizer = LARS(ws, lr=rates[0], **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        for w, g in zip(ws, gradients(step), strict=True):
            w.grad = g.to(dtype)
        optimizer.step()
    return ws


RATES = [1.0, 2.0, 5.0, 5.0, 0.5, 1e-3]
FLAGS = ("nesterov", "lr_in_momentum", "clip", "adapt_1d")


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize(("weight_decay", "eps"), [(0.0, 0.0), (0.05, 1e-3)])
def test_every_option_against_the_definition(
    flags: tuple[bool, ...], weight_decay: float, eps: float
) -> None:
    options = dict(zip(FLAGS, flags, strict=True)) | {"weight_decay": weight_decay, "eps": eps}
    wanted = reference(len(RATES), RATES, **options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for ours, theirs in zip(run(len(RATES), RATES, dtype, **options), wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_rate_inside_and_outside_agree_while_the_rate_is_constant_and_part_when_it_changes() -> (
    None
):
    def apart(rates: list[float]) -> float:
        one = run(6, rates, torch.float64, lr_in_momentum=True)
        other = run(6, rates, torch.float64, lr_in_momentum=False)
        return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))

    assert apart([2.0] * 6) < 1e-12
    assert apart(RATES) > 1e-3


def test_one_dimensional_layers_are_plain_sgd() -> None:
    ours = run(6, RATES, torch.float64, weight_decay=0.1)
    plain = weights()
    sgd = torch.optim.SGD([plain[2], plain[4]], lr=1.0, momentum=0.0)
    velocity = [torch.zeros_like(plain[2]), torch.zeros_like(plain[4])]
    for step in range(6):
        for v, place in zip(velocity, (2, 4), strict=True):
            v.mul_(0.9).add_(gradients(step)[place], alpha=RATES[step])
            plain[place].grad = v.clone()
        sgd.step()
    for place in (2, 4):
        torch.testing.assert_close(ours[place], plain[place], rtol=1e-12, atol=1e-12)


def test_groups_take_layers_in_and_out_by_name() -> None:
    w = [nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.full((4,), 3.0))]
    optimizer = LARS([{"params": w[:1], "adapt": False}, {"params": w[1:], "adapt": True}], lr=1.0)
    for p in w:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    assert torch.equal(w[0].detach(), torch.full((2, 2), 2.5))
    torch.testing.assert_close(w[1].detach(), torch.full((4,), 3 - 0.001 * 6 / 1 * 0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_what_is_not_finite_leaves_the_step_out(bad: float, where: str) -> None:
    ws = weights(torch.float32)
    optimizer = LARS(ws, lr=1.0, weight_decay=0.1)
    for w, g in zip(ws, gradients(0), strict=True):
        w.grad = g.float()
    with torch.no_grad():
        target = ws[1].grad if where == "gradient" else ws[1]
        assert target is not None
        target.view(-1)[0] = bad  # the square of 1e30 is past float32
    before = [w.detach().clone() for w in ws]
    optimizer.step()
    for w, old in zip(ws, before, strict=True):
        assert torch.equal(w.detach().nan_to_num(7), old.nan_to_num(7))
    assert not optimizer.state


def test_state_goes_on_in_another_optimizer() -> None:
    whole = run(6, RATES, torch.float32, weight_decay=0.05)
    ws = weights(torch.float32)
    optimizer = LARS(ws, lr=1.0, weight_decay=0.05)
    for step in range(6):
        if step == 3:
            state = optimizer.state_dict()
            optimizer = LARS(ws, lr=123.0)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = RATES[step]
        for w, g in zip(ws, gradients(step), strict=True):
            w.grad = g.float()
        optimizer.step()
    for a, b in zip(ws, whole, strict=True):
        assert torch.equal(a, b)


def test_closure_and_layers_without_gradient() -> None:
    w, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w, idle], lr=1.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert torch.equal(idle.detach(), torch.ones(2, 2))
    assert not torch.equal(w.detach(), torch.ones(2, 2))
    assert LARS([idle], lr=1.0).step() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0 must be"),
        ({"lr": math.nan}, "lr = nan must be"),
        ({"lr": 1.0, "momentum": 1.0}, "less than 1"),
        ({"lr": 1.0, "trust_coefficient": 0.0}, "more than 0"),
        ({"lr": 1.0, "nesterov": True, "momentum": 0.0}, "nesterov needs"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(weights(), **options)
