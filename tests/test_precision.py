"""Loss scaling leaves no trace; autocast trains; other layouts and compiled models do as well."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import require
from threads import WITHOUT_EXPLANATION, ThreadCommunicator, run_ranks
from torch import Tensor, nn
from torch.nn import functional

from harness.comm import SoloCommunicator
from harness.optimizer import build_optimizer
from harness.precision import Precision
from harness.reducer import GradientReducer, Reduced
from harness.schema import Config
from harness.syncbn import convert

CPU = torch.device("cpu")
CODECS = ("none", "fp16", "fp16_feedback", "exact")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


_NETWORK = _network()


def network() -> nn.Module:
    """A small convolutional one, always with the same weights."""
    return copy.deepcopy(_NETWORK)  # threads would share a random generator


def samples(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and labels that can be told from them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 6, 6, generator=generator)
    means = images.mean((2, 3))
    return images, (means @ torch.tensor([[9.0, -9.0, 0.0], [0.0, 9.0, -9.0]])).argmax(1)


def reducer_for(model: nn.Module, comm: Any, codec: str, bucket_bytes: int = 300) -> Any:
    compression: Any = "none" if codec == "exact" else codec
    summation: Literal["float", "exact"] = "exact" if codec == "exact" else "float"
    return GradientReducer(model, comm, compression, bucket_bytes, summation)


def update(
    model: nn.Module,
    reducer: GradientReducer,
    parts: Sequence[tuple[Tensor, Tensor]],
    size: int,
    loss_scale: float = 1.0,
    precision: Precision | None = None,
    factors: Sequence[float] = (),
) -> Reduced:
    """The gradient of this rank's micro-batches of an update of ``size`` samples, the loss of each
    times a factor."""
    reducer.start(len(parts), micro_norms=True, loss_scale=loss_scale)
    for (images, labels), factor in zip_longest(parts, factors, fillvalue=1.0):
        if precision is None:
            logits = model(images)
        else:
            with precision.autocast():
                logits = model(images)
        loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
        reducer.backward(loss * (factor / size))
    return reducer.finish()


# Loss scale: no trace is left


@settings(max_examples=8, phases=WITHOUT_EXPLANATION)
@pytest.mark.parametrize("codec", CODECS)
@given(
    exponents=st.lists(st.integers(-3, 20), min_size=3, max_size=5),
    pieces=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    ranks=st.integers(1, 3),
)
def test_scaled_losses_give_the_same_bits(
    codec: str, exponents: list[int], pieces: list[int], ranks: int
) -> None:
    """Whatever the scale of each update: weights, norms, and what codecs remember. ``pieces`` gives
    each micro-batch's rank; some ranks may have none."""

    def act(comm: ThreadCommunicator, scaled: bool) -> list[Tensor]:
        model = network()
        reducer = reducer_for(model, comm, codec)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        seen: list[float | None] = []
        for number, exponent in enumerate(exponents):
            parts = [samples(3, 10 * number + i) for i, r in enumerate(pieces) if r == comm.rank]
            scale = 2.0**exponent if scaled else 1.0
            reduced = update(model, reducer, parts, 3 * len(pieces), scale)
            seen += [reduced.grad_norm, reduced.micro_norm2, float(reduced.finite)]
            seen += [e or 0.0 for e in reducer.state_dict()["exponents"]]
            optimizer.step()
        return [*model.state_dict().values(), *reducer.residuals, torch.tensor(seen)]

    pieces = [piece % ranks for piece in pieces]
    with_scale = run_ranks(ranks, lambda comm: act(comm, True))
    without = run_ranks(ranks, lambda comm: act(comm, False))
    for ours, theirs in zip(with_scale, without, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scale", [3.0, 0.0, -2.0, math.inf, math.nan, 1.5 * 2**16])
def test_a_scale_that_would_round_is_refused(scale: float) -> None:
    reducer = GradientReducer(network(), SoloCommunicator())
    with pytest.raises(ValueError, match="power of two"):
        reducer.start(1, loss_scale=scale)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("where", ["first", "last", "only"])
def test_an_overflow_is_seen_by_all_ranks_and_leaves_nothing_behind(codec: str, where: str) -> None:
    """Rank 1 alone overflows, twelve times in a row, as when a scale is looked for; the next update
    is as good as if it had been the first."""
    good = samples(4)
    micro_batches = 1 if where == "only" else 2
    # With the loss scale of 2^60 the one factor leads beyond float32, the other does not.
    factors = {"only": [1e25], "first": [1e25, 1.0], "last": [1.0, 1e25]}[where]

    def act(comm: ThreadCommunicator) -> None:
        model = network().eval()
        reducer = reducer_for(model, comm, codec)
        for _ in range(3):
            before = update(model, reducer, [good] * micro_batches, 8, 2.0**10)
            assert before.finite
        for _ in range(12):
            mine = factors if comm.rank == 1 else []
            parts = [good] * micro_batches
            assert not update(model, reducer, parts, 8, 2.0**60, factors=mine).finite
            assert not any(owed.any() for owed in reducer.residuals)
        for _ in range(2):
            reduced = update(model, reducer, [good] * micro_batches, 8, 2.0**10)
            assert reduced.finite
            assert reduced.grad_norm == pytest.approx(before.grad_norm, rel=1e-3)
            assert reduced.micro_norm2 == pytest.approx(before.micro_norm2, rel=1e-3)
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss = functional.cross_entropy(model(good[0]), good[1], reduction="sum") / 8
        (2 * micro_batches * loss).backward()
        for ours, parameter in zip(grads, model.parameters(), strict=True):
            assert (ours - parameter.grad).norm() <= 2e-3 * parameter.grad.norm() + 1e-6

    run_ranks(2, act)


# Loss scale: how it moves


def test_the_scale_moves_as_torch_moves_its_own() -> None:
    """torch.amp.GradScaler over some eight thousand updates with overflows here and there."""
    script = [False] * 3 + [True] * 1999 + [False] + [True] * 4001 + [False] * 2 + [True] * 2000
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))  # it makes its state when it is first used
    ours, precision = [], Precision("fp16", CPU)
    for number, finite in enumerate(script):
        assert precision.scale == scaler.get_scale(), f"before update {number}"
        weight.grad = torch.tensor([1.0 if finite else math.inf])
        scaler.step(optimizer)
        scaler.update()
        lowered = precision.adapt(finite)
        assert lowered == (not finite)
        ours.append(precision.scale)
    assert {2.0**13, 2.0**12, 2.0**14, 2.0**13} <= set(ours)


steps = st.lists(
    st.one_of(st.just(1), st.just(-1), st.integers(1990, 2010), st.integers(-30, -1)), max_size=12
)
"""Numbers of finite updates in a row, or (negative) of others."""


def follow(precision: Precision, plan: Sequence[int]) -> list[tuple[float, bool]]:
    return [
        (precision.scale, precision.adapt(count > 0)) for count in plan for _ in range(abs(count))
    ]


@settings(max_examples=30)
@given(before=steps, after=steps)
def test_a_scale_that_is_saved_goes_on(before: list[int], after: list[int]) -> None:
    precision, resumed = Precision("fp16", CPU), Precision("fp16", CPU)
    moves = follow(precision, before)
    resumed.load_state_dict(copy.deepcopy(precision.state_dict()))
    assert follow(resumed, after) == follow(precision, after)
    for scale, lowered in moves:
        assert 1 <= scale <= 2.0**24
        assert math.frexp(scale)[0] == 0.5
        assert not (lowered and scale == 1.0), "at its smallest, an overflow is nothing ordinary"


def test_without_end_the_scale_stays_in_range() -> None:
    precision = Precision("fp16", CPU)
    follow(precision, [2000 * 12])
    assert precision.scale == 2.0**24
    assert follow(precision, [-30])[-1] == (1.0, False)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_only_fp16_scales(name: Any) -> None:
    precision = Precision(name, CPU)
    assert follow(precision, [-3, 2, 2500]) == [(1.0, False)] * 2505
    assert precision.loss_scale(4096, 32) == 1.0


@given(size=st.integers(1, 10**7), micro=st.integers(1, 4096))
def test_the_scale_makes_up_for_the_size_of_the_batch(size: int, micro: int) -> None:
    """A micro-batch's loss, over the whole batch's size, times the scale is about its mean times
    2^16."""
    scale = Precision("fp16", CPU).loss_scale(size, micro)
    assert math.frexp(scale)[0] == 0.5
    of_the_mean = scale * min(size, micro) / size
    assert 2**-0.5 <= of_the_mean / 2**16 <= 2**0.5


def test_small_gradients_survive_in_fp16() -> None:
    """Those of one micro-batch in a batch of a quarter of a million samples."""
    images, labels = samples(8)

    def gradient(name: Any, scaled: bool) -> Tensor:
        model = network()
        precision = Precision(name, CPU)
        reducer = GradientReducer(model, SoloCommunicator())
        size = 1 << 18
        scale = precision.loss_scale(size, 8) if scaled else 1.0
        for _ in range(20):
            if update(model, reducer, [(images, labels)], size, scale, precision).finite:
                break
            scale /= 2
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    true = gradient("fp32", False)
    assert (gradient("fp16", True) - true).norm() < 0.02 * true.norm()
    assert (gradient("fp16", False) - true).norm() > 0.1 * true.norm(), "or the scale is no use"


# Autocast


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("codec", ["none", "fp16_feedback"])
def test_training_in_half_precision(name: Any, codec: str) -> None:
    model, precision = network(), Precision(name, CPU)
    reducer = reducer_for(model, SoloCommunicator(), codec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kinds = set()
    model[0].register_forward_hook(lambda _, given, output: kinds.add(output.dtype))
    images, labels = samples(32)
    parts = list(zip(images.split(8), labels.split(8), strict=True))
    losses = []
    for _ in range(40):
        reduced = update(model, reducer, parts, 32, precision.loss_scale(32, 8), precision)
        lowered = precision.adapt(reduced.finite)
        assert reduced.finite or lowered
        if reduced.finite:
            optimizer.step()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        with torch.no_grad():
            losses.append(float(functional.cross_entropy(model(images), labels)))
    assert (torch.bfloat16 if name == "bf16" else torch.float16) in kinds
    assert losses[-1] < 0.3 * losses[0]


def test_fp32_is_untouched() -> None:
    model = network()
    images, _ = samples(3)
    with Precision("fp32", CPU).autocast():
        inside = model(images)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(model(images), inside)


# Layouts and compiled models


def trained(
    model: nn.Module,
    optimizer: dict[str, Any],
    codec: str,
    accumulation: int,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """The weights after six updates of twelve samples."""
    settings = {
        "name": "one",
        "data": {"dataset": "digits"},
        "model": {"name": "lenet5"},
        "batch": {"initial": 12},
        "optimizer": optimizer,
        "lr": {"base": 0.05},
        "train": {"duration": "1ep"},
    }
    model = model.to(memory_format=layout)
    reducer = reducer_for(model, SoloCommunicator(), codec)
    stepper = build_optimizer(model, Config.model_validate(settings))
    for number in range(6):
        images, labels = samples(12, number)
        images = images.to(memory_format=layout)
        size = 12 // accumulation
        update(model, reducer, list(zip(images.split(size), labels.split(size), strict=True)), 12)
        assert model[3].weight.is_contiguous(memory_format=layout)
        assert model[3].weight.grad.stride() == model[3].weight.stride()
        stepper.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-3},
        {"name": "lars", "momentum": 0.9, "weight_decay": 1e-3, "trust_coefficient": 0.1},
        {"name": "lamb"},
        {"name": "adam"},
    ],
    ids=lambda settings: settings["name"],
)
@pytest.mark.parametrize("codec", ["none", "fp16", "exact"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_channels_last_learns_the_same(
    optimizer: dict[str, Any], codec: str, accumulation: int
) -> None:
    """Gradients travel and weights step in the order in which they lie in memory."""
    plain = trained(network(), optimizer, codec, accumulation)
    ours = trained(network(), optimizer, codec, accumulation, torch.channels_last)
    start = list(network().parameters())
    for last, first, begin in zip(ours, plain, start, strict=True):
        # A value between two of fp16's may be rounded to the other one.
        allowed = 1e-3 if codec == "fp16" else 1e-5
        assert (last - first).norm() < allowed * (first - begin).norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("normalisation", ["each by itself", "over ranks"])
def test_a_compiled_model_learns_the_same(
    normalisation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for full micro-batches of 32; a short one, of 29, takes the model as it is. The
    reducer's hooks see the gradients of both."""
    require(shutil.which("g++"), "there is no C++ compiler (g++)")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = network()
        if normalisation == "over ranks":
            model = convert(model, SoloCommunicator())
        full = torch.compile(model, dynamic=False) if compiles else model
        reducer = GradientReducer(model, SoloCommunicator(), bucket_bytes=300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for number in range(3):
            images, labels = samples(93, number)
            reducer.start(3)
            for x, y in zip(images.split(32), labels.split(32), strict=True):
                logits = (full if len(x) == 32 else model)(x)
                reducer.backward(functional.cross_entropy(logits, y, reduction="sum") / 93)
            assert reducer.finish().finite
            optimizer.step()
        found.append(model.state_dict())
    counted = torch._dynamo.utils.counters["frames"]
    assert counted["ok"] == counted["total"] >= 1, "it was not compiled"
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
