"""LARS against an independent float64 reference, layer by layer, for every option, as carried out
on the host and as on a device (forced, on CPU tensors)."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from harness.lars import LARS, PRESETS
from harness.layerwise import layer_norms_of
from harness.schema import LARS_ONLY
from harness.schema import Optimizer as Settings

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
        "denominator": "sum", "decay_at_zero_norm": True,
    } | options  # fmt: skip
    ws = [w.detach().clone() for w in weights()]
    vs = [torch.zeros_like(w) for w in ws]
    for step in range(steps):
        gamma = rates[step]
        for w, v, g in zip(ws, vs, gradients(step), strict=True):
            adapted = w.dim() > 1 or at["adapt_1d"]
            beta = at["weight_decay"] if adapted else 0.0
            trust = torch.ones((), dtype=torch.float64)
            below = {
                "sum": g.norm() + beta * w.norm(),
                "gradient": g.norm(),
                "decayed": (g + beta * w).norm(),
            }[at["denominator"]]
            if not at["decay_at_zero_norm"] and (w.norm() == 0 or g.norm() == 0):
                beta = 0.0
            zero = g.norm() if at["denominator"] != "decayed" else below
            if adapted and w.norm() > 0 and zero > 0:
                trust = at["trust_coefficient"] * w.norm() / (below + at["eps"])
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


def run(
    steps: int, rates: list[float], dtype: torch.dtype, on_device: bool = False, **options: Any
) -> list[nn.Parameter]:
    ws = weights(dtype)
    optimizer = LARS(ws, lr=rates[0], **options)
    optimizer._on_device = on_device
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        for w, g in zip(ws, gradients(step), strict=True):
            w.grad = g.to(dtype)
        optimizer.step()
    return ws


RATES = [1.0, 2.0, 5.0, 5.0, 0.5, 1e-3]
FLAGS = ("nesterov", "lr_in_momentum", "clip", "adapt_1d")


ON_BOTH = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


def check_against_the_definition(on_device: bool, **options: Any) -> None:
    wanted = reference(len(RATES), RATES, **options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = run(len(RATES), RATES, dtype, on_device, **options)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@ON_BOTH
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize(("weight_decay", "eps"), [(0.0, 0.0), (0.05, 1e-3)])
def test_every_option_against_the_definition(
    on_device: bool, flags: tuple[bool, ...], weight_decay: float, eps: float
) -> None:
    options = dict(zip(FLAGS, flags, strict=True)) | {"weight_decay": weight_decay, "eps": eps}
    check_against_the_definition(on_device, **options)


@ON_BOTH
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    "definition",
    [
        {"denominator": "gradient"},
        {"denominator": "decayed"},
        {"decay_at_zero_norm": False},
        {"decay_at_zero_norm": False, "denominator": "gradient", "eps": 1e-3},
        *PRESETS.values(),
    ],
    ids=str,
)
def test_every_definition_of_the_ratio(
    on_device: bool, nesterov: bool, clip: bool, definition: dict[str, Any]
) -> None:
    options = {**definition, "clip": clip, "nesterov": nesterov, "weight_decay": 0.05}
    check_against_the_definition(on_device, **options)


def test_the_definitions_differ() -> None:
    """... in what the test above compares, so that each one can fail."""
    shared = {"weight_decay": 0.05, "adapt_1d": True}
    ends = [
        torch.cat([w.flatten() for w in reference(len(RATES), RATES, **shared, **one)])
        for one in (
            {},
            {"denominator": "gradient"},
            {"denominator": "decayed"},
            {"decay_at_zero_norm": False},
            {"lr_in_momentum": False},
            {"clip": True},
            {"nesterov": True},
            {"eps": 1e-3},
        )
    ]
    for one, other in itertools.combinations(ends, 2):
        assert float((one - other).abs().max()) > 1e-5


def test_presets_set_what_the_configuration_can_name() -> None:
    names = get_args(get_args(Settings.model_fields["preset"].annotation)[0])
    assert set(names) == set(PRESETS)
    for preset in PRESETS.values():
        assert set(preset) == {*LARS_ONLY, "adapt_1d"}
        assert LARS(weights(), lr=1.0, **preset).defaults.items() >= preset.items()


def test_larc_is_sgd_on_gradients_that_were_scaled_before() -> None:
    """As apex writes it: SGD without decay, each layer's gradient scaled beforehand."""
    decay, ws = 0.05, weights()
    sgd = torch.optim.SGD(ws, lr=1.0, momentum=0.9)
    for step, rate in enumerate(RATES):
        sgd.param_groups[0]["lr"] = rate
        for w, g in zip(ws, gradients(step), strict=True):
            wn, gn = float(w.detach().norm()), float(g.norm())
            w.grad = g.clone()
            if wn != 0 and gn != 0:
                w.grad += decay * w.detach()
                w.grad *= min(0.02 * wn / (gn + decay * wn + 1e-8) / rate, 1)
        sgd.step()
    ours = run(len(RATES), RATES, torch.float64, weight_decay=decay, **PRESETS["larc"])
    for one, other in zip(ours, ws, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("lr", [0.0, 1e-30, 1e-12, 1e-9])
def test_the_smallest_rates_keep_their_digits(lr: float, nesterov: bool) -> None:
    """... which the fused kernel, that takes 1 − rate, would round off."""
    w = nn.Parameter(torch.zeros(3))
    optimizer = LARS([w], lr=lr, nesterov=nesterov)
    w.grad = torch.full((3,), 1e6)
    optimizer.step()
    moved = -1e6 * lr * (1.9 if nesterov else 1.0)
    torch.testing.assert_close(w.detach(), torch.full((3,), moved), rtol=1e-6, atol=0.0)


def test_groups_take_layers_in_and_out_by_name() -> None:
    w = [nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.full((4,), 3.0))]
    optimizer = LARS([{"params": w[:1], "adapt": False}, {"params": w[1:], "adapt": True}], lr=1.0)
    for p in w:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    assert torch.equal(w[0].detach(), torch.full((2, 2), 2.5))
    torch.testing.assert_close(w[1].detach(), torch.full((4,), 3 - 0.001 * 6 / 1 * 0.5))


@ON_BOTH
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("layer", [1, 2], ids=["adapted", "skipped"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_what_is_not_finite_leaves_the_step_out(
    on_device: bool, nesterov: bool, layer: int, bad: float, where: str
) -> None:
    ws = weights(torch.float32)
    optimizer = LARS(ws, lr=1.0, weight_decay=0.1, nesterov=nesterov)
    optimizer._on_device = on_device
    for step in range(2):
        for w, g in zip(ws, gradients(step), strict=True):
            w.grad = g.float()
        if step == 0:
            optimizer.step()
    with torch.no_grad():
        target = ws[layer].grad if where == "gradient" else ws[layer]
        assert target is not None
        target.view(-1)[0] = bad  # the square of 1e30 is past float32
    before = [w.detach().clone() for w in ws]
    momentum = [optimizer.state[w]["momentum_buffer"].clone() for w in ws]
    optimizer.step()
    for w, old, buffer in zip(ws, before, momentum, strict=True):
        assert torch.equal(w.detach().nan_to_num(7), old.nan_to_num(7))
        assert torch.equal(optimizer.state[w]["momentum_buffer"], buffer)
    norms = optimizer.layer_norms()
    assert len(norms) == len(ws)
    assert all(math.isnan(trust) for _, _, _, trust in norms)


@contextmanager
def nothing_read_back() -> Iterator[None]:
    """Every way from a tensor to a number on the host raises."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the host waits for the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero"):
            patch.setattr(Tensor, name, refuse)
        for name in ("bool", "float", "int", "index"):
            patch.setattr(Tensor, f"__{name}__", refuse)
        yield


@pytest.mark.parametrize("definition", [{}, {"nesterov": True}, PRESETS["larc"]], ids=str)
def test_the_way_of_the_device_reads_nothing_back(definition: dict[str, Any]) -> None:
    ws = weights(torch.float32)
    optimizer = LARS(ws, lr=1.0, weight_decay=0.1, **definition)
    for step, on_device in enumerate((False, True, True, True)):
        optimizer._on_device = on_device
        for w, g in zip(ws, gradients(step), strict=True):
            w.grad = g.float()
        with nothing_read_back():
            if on_device:
                optimizer.step()
                continue
            with pytest.raises(AssertionError, match="waits"):  # it would be noticed
                optimizer.step()


@ON_BOTH
def test_norms_of_the_layers(on_device: bool) -> None:
    ws = weights()
    optimizer = LARS([{"params": ws[:1], "clip": True}, {"params": ws[1:]}], lr=0.001, eps=1.0)
    optimizer._on_device = on_device
    assert optimizer.layer_norms() == []
    for w, g in zip(ws[:4], gradients(0), strict=False):
        w.grad = g
    before = [w.detach().clone() for w in ws]
    optimizer.step()
    norms = optimizer.layer_norms()
    assert [parameter for parameter, *_ in norms] == ws[:4]
    for place, (_, weight_norm, grad_norm, trust) in enumerate(norms):
        grad = gradients(0)[place]
        assert weight_norm == pytest.approx(float(before[place].norm()))
        assert grad_norm == pytest.approx(float(grad.norm()))
        ratio = 0.001 * weight_norm / (grad_norm + 1.0)
        wanted = {0: min(ratio / 0.001, 1.0), 1: ratio, 2: 1.0, 3: 1.0}
        assert trust == pytest.approx(wanted[place])
        moved = before[place] - ws[place].detach()
        torch.testing.assert_close(moved, 0.001 * wanted[place] * grad)


@ON_BOTH
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "with gaps", "other gradient"])
def test_layers_that_lie_otherwise_in_memory(on_device: bool, layout: str) -> None:
    plain, other = weights(torch.float32), weights(torch.float32)
    if layout == "channels_last":
        other[1] = nn.Parameter(other[1].detach().contiguous(memory_format=torch.channels_last))
    elif layout == "transposed":
        other[1] = nn.Parameter(other[1].detach().transpose(0, 1).contiguous().transpose(0, 1))
    elif layout == "with gaps":
        room = torch.empty(4, 5, 3, 3)
        room[:, :3] = other[1].detach()
        other[1] = nn.Parameter(room[:, :3])
    one, two = (LARS(ws, lr=1.0, weight_decay=0.05) for ws in (plain, other))
    two._on_device = on_device
    for step in range(4):
        for ws in (plain, other):
            for w, g in zip(ws, gradients(step), strict=True):
                w.grad = g.float()
        if layout == "other gradient":
            assert other[1].grad is not None
            other[1].grad = other[1].grad.contiguous(memory_format=torch.channels_last)
        one.step()
        two.step()
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@ON_BOTH
def test_layers_of_several_dtypes(on_device: bool) -> None:
    ws = [nn.Parameter(w.to(t)) for w in weights() for t in (torch.float32, torch.float64)]
    optimizer = LARS(ws, lr=1.0, weight_decay=0.05)
    optimizer._on_device = on_device
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        for i, w in enumerate(ws):
            w.grad = gradients(step)[i // 2].to(w.dtype)
        optimizer.step()
    for i, wanted in enumerate(reference(len(RATES), RATES, weight_decay=0.05)):
        torch.testing.assert_close(ws[2 * i].double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ws[2 * i + 1], wanted, rtol=1e-12, atol=1e-12)


@ON_BOTH
def test_state_goes_on_in_another_optimizer(on_device: bool) -> None:
    whole = run(6, RATES, torch.float32, on_device, weight_decay=0.05)
    ws = weights(torch.float32)
    optimizer = LARS(ws, lr=1.0, weight_decay=0.05)
    optimizer._on_device = on_device
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = LARS(ws, lr=123.0)
            optimizer._on_device = on_device
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        optimizer.param_groups[0]["lr"] = RATES[step]
        for w, g in zip(ws, gradients(step), strict=True):
            w.grad = g.float()
        optimizer.step()
    for a, b in zip(ws, whole, strict=True):
        assert torch.equal(a, b)


def test_a_state_from_before_an_option_gets_its_default() -> None:
    ws = weights()
    state = LARS(ws, lr=1.0).state_dict()
    del state["param_groups"][0]["denominator"]
    optimizer = LARS(ws, lr=1.0, denominator="gradient")
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["denominator"] == "gradient"


def test_a_copy_steps_on_its_own() -> None:
    ws = weights()
    optimizer = copy.deepcopy(LARS(ws, lr=1.0))
    (group,) = optimizer.param_groups
    for w, g in zip(group["params"], gradients(0), strict=True):
        w.grad = g
    optimizer.step()
    assert len(optimizer.layer_norms()) == len(SHAPES)
    assert all(torch.equal(w, old) for w, old in zip(ws, weights(), strict=True))


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="LARS does not take sparse gradients"):
        LARS(table.parameters(), lr=1.0).step()


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
        ({"lr": 1.0, "eps": -1e-8}, "eps = -1e-08 must be"),
        ({"lr": 1.0, "denominator": "weight"}, "must be one of sum, gradient, decayed"),
        ({"lr": 1.0, "denominator": "decayed", "decay_at_zero_norm": False}, "does not measure"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(weights(), **options)
    with pytest.raises(ValueError, match=message):
        LARS([{"params": weights(), **options}], lr=1.0)


def test_norms_of_long_layers_are_not_low() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(5), torch.randn(3000, 3000), torch.randn(40)]
    found = layer_norms_of(tensors)
    for norm, tensor in zip(found, tensors, strict=True):
        assert float(norm) == pytest.approx(float(tensor.double().norm()), rel=2e-5)
