"""Noise scale, distance from the initial weights, norms per layer: by hand, and laws."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from harness.gradstats import DistanceFromInit, clip_factor, layer_statistics
from harness.models import build_model
from harness.schedule.clock import Clock
from harness.schedule.growth import Observation
from harness.schedule.measured import Noise
from harness.schedule.noise import NoiseScale
from harness.units import Duration

P = Duration.parse

# The noise scale


def norms_of(trace: float, norm2: float, sizes: Sequence[int]) -> tuple[int, int, float, float]:
    """What an update of micro-batches of these sizes measures where tr(Σ) and ‖G‖² are just so:
    a sum over m samples has the squared norm m²‖G‖² + m tr(Σ)."""
    samples = sum(sizes)
    parts = sum(m * m * norm2 + m * trace for m in sizes) / samples**2
    return samples, sum(m * m for m in sizes), parts, norm2 + trace / samples


updates = st.lists(
    st.tuples(
        st.floats(0.1, 1e3),
        st.floats(0.1, 1e3),
        st.lists(st.integers(1, 40), min_size=2, max_size=5),
    ),
    min_size=1,
    max_size=12,
)


def observe_all(scale: NoiseScale, seen: Sequence[Any], start: Clock) -> Clock:
    for trace, norm2, sizes in seen:
        start = Clock(start.samples + sum(sizes), start.updates + 1, start.dataset_size)
        scale.observe(start, *norms_of(trace, norm2, sizes))
    return start


START = Clock(0, 0, 300)


def test_two_samples_by_hand() -> None:
    """g = (3, 0) and (1, 2): the half-sums have ‖·‖² of 9/4 and 5/4, the mean (2, 1) has 5.
    ‖G‖² = g1 · g2 = 3 and tr Σ = ‖g1 − g2‖² / 2 = 4."""
    scale = NoiseScale()
    assert scale.scale is None
    assert scale.observe(START, 2, 2, 9 / 4 + 5 / 4, 5.0) == pytest.approx((4.0, 3.0))
    assert scale.scale == pytest.approx(4 / 3)


@given(updates, st.sampled_from(["90sa", "0.5ep", "2ep"]))
def test_it_is_the_quotient_of_two_weighted_means(seen: Any, memory: str) -> None:
    """An update's weight falls by e for each memory's worth of samples after it."""
    scale = NoiseScale(P(memory))
    observe_all(scale, seen, START)
    span = P(memory).boundary(1, START.dataset_size)
    samples = [sum(sizes) for _, _, sizes in seen]
    after = [sum(samples[i + 1 :]) for i in range(len(seen))]
    weights = [
        math.exp(-late / span) * (1 - math.exp(-n / span))
        for n, late in zip(samples, after, strict=True)
    ]
    trace = sum(w * t for w, (t, _, _) in zip(weights, seen, strict=True))
    norm2 = sum(w * g for w, (_, g, _) in zip(weights, seen, strict=True))
    assert scale.scale == pytest.approx(trace / norm2, rel=1e-6)


@given(updates)
def test_it_is_what_the_noise_policy_goes_by(seen: Any) -> None:
    scale, policy, clock = NoiseScale(P("1ep")), Noise(64, memory=P("1ep")), START
    for trace, norm2, sizes in seen:
        clock = Clock(clock.samples + sum(sizes), clock.updates + 1, clock.dataset_size)
        terms = scale.observe(clock, *norms_of(trace, norm2, sizes))
        policy.observe(clock, Observation(sum(sizes), 1.0, 1.0, terms))
        assert scale.scale == policy.scale


@given(st.floats(0.1, 1e3), st.floats(0.1, 1e3), st.integers(2, 30))
def test_how_samples_are_cut_into_updates_does_not_matter(
    trace: float, norm2: float, pieces: int
) -> None:
    """A steady scale that changes is followed as fast by few large updates as by many small."""
    found = []
    for cut in (1, pieces):
        scale = NoiseScale(P("500sa"))
        first = [(1.0, 1.0, [7, 3])] * 10
        clock = observe_all(scale, first, START)
        observe_all(scale, [(trace, norm2, [2 * pieces // cut, pieces // cut])] * cut, clock)
        found.append(scale.scale)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@given(updates, updates)
def test_a_restored_estimate_goes_on_to_the_last_bit(before: Any, after: Any) -> None:
    straight, first, second = NoiseScale(), NoiseScale(), NoiseScale()
    observe_all(straight, [*before, *after], START)
    clock = observe_all(first, before, START)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    observe_all(second, after, clock)
    assert second.scale == straight.scale


@pytest.mark.parametrize(
    "useless",
    [
        (8, 64, 3.0, 3.0),  # one micro-batch
        (8, 32, math.nan, 3.0),
        (8, 32, 3.0, math.inf),
    ],
)
def test_an_update_that_tells_nothing_changes_nothing(
    useless: tuple[int, int, float, float],
) -> None:
    scale = NoiseScale()
    assert scale.observe(START, *useless) is None
    assert scale.scale is None
    clock = observe_all(scale, [(6.0, 2.0, [4, 4])], START)
    before = scale.state_dict()
    assert scale.observe(clock, *useless) is None
    assert scale.state_dict() == before
    assert scale.scale == pytest.approx(3.0)


@pytest.mark.parametrize(("trace", "norm2"), [(-1.0, 2.0), (0.0, 2.0), (2.0, 0.0), (2.0, -1.0)])
def test_there_is_no_scale_while_an_estimate_is_not_positive(trace: float, norm2: float) -> None:
    scale = NoiseScale(P("10sa"))
    observe_all(scale, [(trace, norm2, [4, 4])], START)
    assert scale.scale is None
    observe_all(scale, [(6.0, 2.0, [400, 400])], START)
    assert scale.scale == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (8, 8, 3), (1, 1)])
def test_it_finds_the_scale_of_gaussian_gradients(sizes: Sequence[int]) -> None:
    rng, mean, deviation = np.random.default_rng(5), np.array([0.5, -1.0, 0.25]), 0.8
    scale, clock, edges = NoiseScale(P("20000sa")), START, np.cumsum([0, *sizes])
    for _ in range(3000):
        gradients = mean + deviation * rng.standard_normal((sum(sizes), 3))
        parts = [gradients[a:b].sum(0) / sum(sizes) for a, b in itertools.pairwise(edges)]
        clock = Clock(clock.samples + sum(sizes), clock.updates + 1, clock.dataset_size)
        squares = sum(size * size for size in sizes)
        part_norm2 = float(sum((part**2).sum() for part in parts))
        scale.observe(clock, sum(sizes), squares, part_norm2, float((sum(parts) ** 2).sum()))
    assert scale.scale == pytest.approx(3 * deviation**2 / (mean**2).sum(), rel=0.1)


# The distance from the initial weights


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4))


def move(model: nn.Module, by: float, seed: int = 1) -> float:
    """Change every weight; returns the L2 norm of the change, in float64."""
    generator = torch.Generator().manual_seed(seed)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return math.sqrt(
        sum(
            float((p.detach().double() - b.double()).square().sum())
            for p, b in zip(model.parameters(), before, strict=True)
        )
    )


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_the_distance_is_the_norm_of_the_change(by: float, seed: int) -> None:
    model = net()
    initial = DistanceFromInit(model)
    assert initial.distance(model) == 0.0
    assert initial.distance(model) != (moved := move(model, by, seed))
    assert initial.distance(model) == pytest.approx(moved, rel=1e-5)


def test_a_resumed_run_has_the_distance_of_one_that_was_not_killed() -> None:
    """As at a resume: the model is built from the seed, and only then the checkpoint is loaded."""
    model = build_model("lenet5", 10, (1, 28, 28), seed=3)
    initial = DistanceFromInit(model)
    move(model, 0.1)
    saved = {"model": model.state_dict(), "distance": json.loads(json.dumps(initial.state_dict()))}
    fresh = build_model("lenet5", 10, (1, 28, 28), seed=3)
    resumed = DistanceFromInit(fresh)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["distance"])
    assert resumed.distance(fresh) == initial.distance(model)
    assert initial.distance(model) is not None


def test_a_run_that_began_from_other_weights_has_no_distance() -> None:
    model, other = net(0), net(1)
    wrong = DistanceFromInit(other)
    wrong.load_state_dict(DistanceFromInit(model).state_dict())
    assert wrong.distance(model) is None
    third = DistanceFromInit(model)  # it stays unknown, whatever is saved from here on
    third.load_state_dict(wrong.state_dict())
    assert third.distance(model) is None


def test_what_is_not_trained_is_not_counted() -> None:
    model = net()
    model[0].requires_grad_(False)
    initial = DistanceFromInit(model)
    with torch.no_grad():
        model[0].weight += 1.0
    assert initial.distance(model) == 0.0


def test_norms_of_large_layers_are_exact() -> None:
    """Summed up in float32, 2^24 squares of 0.1 are off in the third digit."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2**24))
    initial = DistanceFromInit(model)
    with torch.no_grad():
        model.weight.fill_(0.1)
    model.weight.grad = model.weight.detach()
    exact = 4096 * float(torch.tensor(0.1))
    assert initial.distance(model) == pytest.approx(exact, rel=1e-9)
    [layer] = layer_statistics(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (layer["weight_norm"], layer["grad_norm"]) == pytest.approx((exact, exact), rel=1e-9)


# Layers


def two_layers() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(1, 1, bias=False)})
    for parameter, weight, grad in (
        (model["a"].weight, [[3.0, 4.0]], [[0.0, 0.5]]),
        (model["a"].bias, [0.0], [2.0]),
        (model["b"].weight, [[-7.0]], [[0.0]]),
    ):
        parameter.data = torch.tensor(weight)
        parameter.grad = torch.tensor(grad)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def entry(name: str, shape: list[int], *values: float | None) -> dict[str, Any]:
    keys = ("weight_norm", "grad_norm", "ratio", "trust_ratio")
    return {"layer": name, "shape": shape, **dict(zip(keys, values, strict=True))}


def test_layers_by_hand() -> None:
    model = two_layers()
    assert layer_statistics(model, sgd(model)) == [
        entry("a.weight", [1, 2], 5.0, 0.5, 10.0, None),
        entry("a.bias", [1], 0.0, 2.0, 0.0, None),
        entry("b.weight", [1, 1], 7.0, 0.0, None, None),
    ]


def test_what_is_not_known_is_none() -> None:
    model = two_layers()
    model["a"].weight.grad = None
    model["a"].bias.requires_grad_(False)
    model["b"].weight.data.fill_(math.inf)
    model["b"].weight.grad = torch.tensor([[math.nan]])
    layers = layer_statistics(model, sgd(model))
    assert layers == [
        entry("a.weight", [1, 2], 5.0, None, None, None),
        entry("b.weight", [1, 1], None, None, None, None),
    ]
    json.dumps(layers, allow_nan=False)


def test_a_quotient_that_overflows_is_none() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False)}).double()
    model["a"].weight.data.fill_(1e10)
    model["a"].weight.grad = torch.full((1, 1), 1e-300, dtype=torch.float64)
    assert layer_statistics(model, sgd(model)) == [
        entry("a.weight", [1, 1], 1e10, 1e-300, None, None)
    ]


class Adaptive(torch.optim.SGD):
    """Tells of its last step, in an order of its own and not of every parameter."""

    def layer_norms(self) -> list[tuple[nn.Parameter, float, float, float]]:
        parameters = self.param_groups[0]["params"]
        return [(parameters[2], 8.0, 0.25, math.nan), (parameters[0], 6.0, 1.5, 0.004)]


def test_an_adaptive_optimizer_has_the_say_on_its_parameters() -> None:
    model = two_layers()
    assert layer_statistics(model, Adaptive(model.parameters(), lr=0.1)) == [
        entry("a.weight", [1, 2], 6.0, 1.5, 4.0, 0.004),
        entry("a.bias", [1], 0.0, 2.0, 0.0, None),
        entry("b.weight", [1, 1], 8.0, 0.25, 32.0, None),
    ]


class TellsOfAll(torch.optim.SGD):
    def layer_norms(self) -> list[tuple[nn.Parameter, float, float, float]]:
        return [(p, 1.0, 2.0, 3.0) for p in self.param_groups[0]["params"]]


def test_an_adaptive_optimizer_may_tell_of_every_parameter() -> None:
    model = two_layers()
    layers = layer_statistics(model, TellsOfAll(model.parameters(), lr=0.1))
    assert {(layer["weight_norm"], layer["ratio"], layer["trust_ratio"]) for layer in layers} == {
        (1.0, 0.5, 3.0)
    }


def test_layers_stand_in_the_model_s_order_and_are_only_read() -> None:
    model = build_model("lenet5", 10, (1, 28, 28), seed=0)
    model(torch.randn(4, 1, 28, 28)).sum().backward()
    before = [
        (p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None
    ]
    layers = layer_statistics(model, sgd(model))
    assert [layer["layer"] for layer in layers] == [name for name, _ in model.named_parameters()]
    for layer, (weight, grad), parameter in zip(layers, before, model.parameters(), strict=True):
        assert layer["shape"] == list(parameter.shape)
        assert layer["weight_norm"] == pytest.approx(float(weight.double().norm()))
        assert layer["grad_norm"] == pytest.approx(float(grad.double().norm()))
        assert layer["ratio"] == pytest.approx(layer["weight_norm"] / layer["grad_norm"])
        assert torch.equal(parameter, weight)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


# Clipping


@given(st.floats(0, 1e30), st.floats(1e-30, 1e30))
def test_a_clipped_norm_is_within_the_limit_and_a_smaller_one_untouched(
    norm: float, limit: float
) -> None:
    factor = clip_factor(norm, limit)
    assert factor * norm == pytest.approx(min(norm, limit))
    assert (factor == 1.0) == (norm <= limit)


@pytest.mark.parametrize(
    ("norm", "limit"), [(math.nan, 1.0), (math.inf, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, math.nan)]
)
def test_what_cannot_be_clipped_is_refused(norm: float, limit: float) -> None:
    with pytest.raises(ValueError, match="cannot be clipped"):
        clip_factor(norm, limit)
