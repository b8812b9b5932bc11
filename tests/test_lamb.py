"""LAMB against an independent float64 reference, as carried out on the host and as on a device
(forced, on CPU tensors)."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from test_lars import ON_BOTH, RATES, SHAPES, ZERO, gradients, nothing_read_back, weights
from torch import Tensor, nn

from harness.lamb import LAMB


def reference(rates: list[float], skipped: tuple[int, ...] = (), **options: Any) -> list[Tensor]:
    """Algorithm 2 of the paper, written down plainly, in float64."""
    at = {
        "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "bias_correction": True,
        "norm_bounds": None, "adapt_1d": False,
    } | options  # fmt: skip
    beta1, beta2 = at["betas"]
    ws = [w.detach().clone() for w in weights()]
    ms, vs = ([torch.zeros_like(w) for w in ws] for _ in range(2))
    for step, gamma in enumerate(rates):
        for place, (w, m, v, g) in enumerate(zip(ws, ms, vs, gradients(step), strict=True)):
            adapted = (w.dim() > 1 or at["adapt_1d"]) and place not in skipped
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g**2)
            t = step + 1 if at["bias_correction"] else math.inf
            r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + at["eps"])
            ratio = 1.0
            if adapted:
                r = r + at["weight_decay"] * w
                phi = float(w.norm())
                if at["norm_bounds"] is not None:
                    low, high = at["norm_bounds"]
                    phi = min(max(phi, low), high)
                if phi > 0 and float(r.norm()) > 0:
                    ratio = phi / float(r.norm())
            w -= gamma * ratio * r
    return ws


def train(optimizer: LAMB, ws: list[nn.Parameter], rates: list[float], start: int = 0) -> None:
    for step, rate in enumerate(rates, start=start):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for w, g in zip(ws, gradients(step), strict=True):
            w.grad = g.to(w.dtype)
        optimizer.step()


def close(ours: list[nn.Parameter], wanted: list[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.05},
    {"weight_decay": 0.05, "adapt_1d": True},
    {"weight_decay": 0.05, "bias_correction": False},
    {"weight_decay": 0.05, "norm_bounds": (0.0, 4.0)},
    {"norm_bounds": (3.0, 1e9)},
    {"betas": (0.0, 0.5), "eps": 1e-2},
]


@ON_BOTH
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_against_the_algorithm(on_device: bool, options: dict[str, Any]) -> None:
    wanted = reference([rate / 10 for rate in RATES], **options)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        ws = weights(dtype)
        optimizer = LAMB(ws, lr=1.0, **options)
        optimizer._on_device = on_device
        train(optimizer, ws, [rate / 10 for rate in RATES])
        close(ws, wanted, tolerance)


def test_the_options_differ() -> None:
    """... in what the test above compares, so that each one can fail."""
    ends = [torch.cat([w.flatten() for w in reference(RATES, **one)]) for one in OPTIONS]
    for one, other in itertools.combinations(ends, 2):
        assert float((one - other).abs().max()) > 1e-4


@ON_BOTH
def test_groups_leave_layers_out_by_name(on_device: bool) -> None:
    ws = weights()
    kept = [w for place, w in enumerate(ws) if place != 1]
    optimizer = LAMB(
        [{"params": kept}, {"params": [ws[1]], "adapt": False}], lr=1.0, weight_decay=0.05
    )
    optimizer._on_device = on_device
    train(optimizer, ws, RATES)
    close(ws, reference(RATES, skipped=(1,), weight_decay=0.05), 1e-11)


@ON_BOTH
def test_layers_left_out_are_adam(on_device: bool) -> None:
    ours, theirs = weights(), weights()
    optimizer = LAMB([{"params": ours, "adapt": False}], lr=1.0, weight_decay=0.05)
    optimizer._on_device = on_device
    train(optimizer, ours, RATES)
    adam = torch.optim.Adam(theirs, lr=1.0, eps=1e-6)
    for step, rate in enumerate(RATES):
        adam.param_groups[0]["lr"] = rate
        for w, g in zip(theirs, gradients(step), strict=True):
            w.grad = g
        adam.step()
    close(ours, [w.detach() for w in theirs], 1e-11)


@ON_BOTH
def test_the_gradients_scale_cancels_where_eps_is_small(on_device: bool) -> None:
    ends = []
    for factor in (1.0, 1000.0):
        ws = weights()
        optimizer = LAMB(ws, lr=0.1, eps=1e-20)
        optimizer._on_device = on_device
        for step in range(4):
            for w, g in zip(ws, gradients(step), strict=True):
                w.grad = factor * g
            optimizer.step()
        ends.append([w.detach() for w in ws])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@ON_BOTH
def test_norms_of_the_layers(on_device: bool) -> None:
    ws = weights()
    optimizer = LAMB(ws, lr=0.5)
    optimizer._on_device = on_device
    before = weights()
    train(optimizer, ws, [0.5])
    norms = optimizer.layer_norms()
    assert [parameter for parameter, *_ in norms] == ws
    for place, (w, weight_norm, grad_norm, trust) in enumerate(norms):
        assert weight_norm == pytest.approx(float(before[place].detach().norm()))
        assert grad_norm == pytest.approx(float(gradients(0)[place].norm()))
        moved = float((before[place] - w).detach().norm())
        if len(SHAPES[place]) == 1 or place == ZERO:
            assert trust == 1.0
        else:  # φ is the identity: the layer moves by γ‖w‖, whatever the gradient
            assert moved == pytest.approx(0.5 * weight_norm)
            assert trust == pytest.approx(weight_norm / math.sqrt(w.numel()), rel=1e-3)


@ON_BOTH
@pytest.mark.parametrize("layer", [1, 2], ids=["adapted", "skipped"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_what_is_not_finite_leaves_the_step_out(
    on_device: bool, layer: int, bad: float, where: str
) -> None:
    ws = weights(torch.float32)
    optimizer = LAMB(ws, lr=1.0, weight_decay=0.1)
    optimizer._on_device = on_device
    train(optimizer, ws, RATES[:2])
    with torch.no_grad():
        target = ws[layer].grad if where == "gradient" else ws[layer]
        assert target is not None
        target.view(-1)[0] = bad
    before = [w.detach().clone() for w in ws]
    state = [{key: value.clone() for key, value in optimizer.state[w].items()} for w in ws]
    optimizer.step()
    for w, old, moments in zip(ws, before, state, strict=True):
        assert torch.equal(w.detach().nan_to_num(7), old.nan_to_num(7))
        assert all(torch.equal(optimizer.state[w][key], moments[key]) for key in moments)


@ON_BOTH
def test_a_direction_that_overflows_does_not_reach_the_weights(on_device: bool) -> None:
    ws = weights(torch.float32)
    optimizer = LAMB(ws, lr=1.0, weight_decay=1e38)
    optimizer._on_device = on_device
    with torch.no_grad():
        ws[0].mul_(100)
    before = ws[0].detach().clone()
    train(optimizer, ws, [1.0])
    assert torch.equal(ws[0], before)
    assert all(bool(torch.isfinite(w).all()) for w in ws)


def test_the_way_of_the_device_reads_nothing_back() -> None:
    ws = weights(torch.float32)
    optimizer = LAMB(ws, lr=1.0, weight_decay=0.1, norm_bounds=(0.0, 10.0))
    for on_device in (False, True, True):
        optimizer._on_device = on_device
        with nothing_read_back():
            if on_device:
                train(optimizer, ws, [1.0])
                continue
            with pytest.raises(AssertionError, match="waits"):  # it would be noticed
                train(optimizer, ws, [1.0])


@ON_BOTH
def test_state_goes_on_in_another_optimizer(on_device: bool) -> None:
    whole, ws = weights(torch.float32), weights(torch.float32)
    for parts, parameters in (([RATES], whole), ([RATES[:3], RATES[3:]], ws)):
        optimizer = LAMB(parameters, lr=1.0, weight_decay=0.05)
        optimizer._on_device = on_device
        train(optimizer, parameters, parts[0])
        for rest in parts[1:]:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = LAMB(parameters, lr=123.0)
            optimizer._on_device = on_device
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            train(optimizer, parameters, rest, start=3)
    assert all(torch.equal(a, b) for a, b in zip(ws, whole, strict=True))


@ON_BOTH
@pytest.mark.parametrize("layout", ["channels_last", "with gaps"])
def test_layers_that_lie_otherwise_in_memory(on_device: bool, layout: str) -> None:
    plain, other = weights(torch.float32), weights(torch.float32)
    if layout == "channels_last":
        other[1] = nn.Parameter(other[1].detach().contiguous(memory_format=torch.channels_last))
    else:
        room = torch.empty(4, 5, 3, 3)
        room[:, :3] = other[1].detach()
        other[1] = nn.Parameter(room[:, :3])
    for ws in (plain, other):
        optimizer = LAMB(ws, lr=1.0, weight_decay=0.05)
        optimizer._on_device = on_device
        train(optimizer, ws, RATES[:4])
    close(other, [w.detach().double() for w in plain], 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.inf}, "lr = inf must be"),
        ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay = -1.0 must be"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, "less than 1"),
        ({"lr": 1.0, "eps": 0.0}, "eps = 0.0 must be"),
        ({"lr": 1.0, "norm_bounds": (2.0, 1.0)}, "first < second"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAMB(weights(), **options)
