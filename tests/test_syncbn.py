"""Batch norm over ranks equals batch norm over one big batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import WITHOUT_EXPLANATION, ThreadCommunicator, run_ranks
from torch import Tensor, nn

from harness.comm import SoloCommunicator
from harness.errors import ConfigError, HarnessError
from harness.reducer import GradientReducer
from harness.syncbn import SyncBatchNorm2d, convert

KINDS = {
    (): nn.BatchNorm1d,
    (3,): nn.BatchNorm1d,
    (3, 2): nn.BatchNorm2d,
    (2, 1, 2): nn.BatchNorm3d,
}
"""By the shape of one channel of one sample."""


@dataclass
class Passed:
    """What one pass through a layer or a model leaves."""

    output: Tensor
    grad_input: Tensor
    grads: list[Tensor]
    state: dict[str, Tensor]


def run(model: nn.Module, batch: Tensor, upstream: Tensor) -> Passed:
    given = batch.clone().requires_grad_()
    output = model(given)
    (output * upstream).sum().backward()
    assert given.grad is not None
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return Passed(output.detach(), given.grad, grads, state)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """Up to a part of the largest element."""
    return bool(((ours - theirs).abs() <= tolerance * (1 + theirs.abs().max())).all())


layers = st.fixed_dictionaries(
    {
        "affine": st.booleans(),
        "track_running_stats": st.booleans(),
        "momentum": st.sampled_from([0.1, 0.7, None]),
        "eps": st.sampled_from([1e-5, 1e-2]),
    }
)


@settings(max_examples=60, phases=WITHOUT_EXPLANATION)
@given(
    inner=st.sampled_from(list(KINDS)),
    channels=st.integers(1, 4),
    options=layers,
    passes=st.lists(
        st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(lambda n: sum(n) > 1),
        min_size=1,
        max_size=3,
    ),
    ranks=st.integers(1, 3),
    offset=st.sampled_from([0.0, 3.0, 100.0]),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_many_ranks_are_one_big_batch(
    inner: tuple[int, ...],
    channels: int,
    options: dict[str, Any],
    passes: list[list[int]],
    ranks: int,
    offset: float,
    last: bool,
    seed: int,
) -> None:
    """Outputs, gradients and running statistics, of unequal and of empty batches; channels_last."""
    plain = KINDS[inner](channels, **options)
    if options["affine"]:
        with torch.no_grad():
            plain.weight.copy_(draw(channels, seed=seed))
            plain.bias.copy_(draw(channels, seed=seed + 1))
    layer = copy.deepcopy(plain)
    counts = [[*sizes[: ranks - 1], sum(sizes[ranks - 1 :])] for sizes in passes]
    batches = [
        (3 + i) * draw(sum(sizes), channels, *inner, seed=seed + i) + offset
        for i, sizes in enumerate(counts)
    ]
    ups = [draw(*batch.shape, seed=seed + 9) for batch in batches]
    wanted = []
    for batch, up in zip(batches, ups, strict=True):
        plain.zero_grad()
        wanted.append(run(plain, batch, up))

    def act(comm: ThreadCommunicator) -> list[Passed]:
        mine = convert(copy.deepcopy(layer), comm)
        found = []
        for sizes, batch, up in zip(counts, batches, ups, strict=True):
            mine.zero_grad()
            share = batch.split(sizes)[comm.rank]
            if last and len(inner) == 2:
                share = share.to(memory_format=torch.channels_last)
            found.append(run(mine, share, up.split(sizes)[comm.rank]))
        assert len(comm.calls) == 2 * len(passes)
        return found

    found = run_ranks(ranks, act)
    # The values are known to a part of 2^24 of their offset only.
    tolerance = 1e-5 * (1 + offset)
    for i, whole in enumerate(wanted):
        ours = [rank[i] for rank in found]
        assert close(torch.cat([one.output for one in ours]), whole.output, tolerance)
        assert close(torch.cat([one.grad_input for one in ours]), whole.grad_input, tolerance)
        for place, grad in enumerate(whole.grads):
            assert close(sum(one.grads[place] for one in ours), grad, tolerance)
        for one in ours:
            assert one.state.keys() == whole.state.keys()
            for name, value in whole.state.items():
                assert torch.equal(one.state[name], ours[0].state[name]), "bitwise on all ranks"
                assert one.state[name].dtype == value.dtype
                assert close(one.state[name], value), name


def _network() -> nn.Module:
    torch.manual_seed(3)
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        shared,
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        shared,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.BatchNorm1d(6, eps=0.1),  # of two samples it is ill-conditioned with a small one
        nn.Linear(6, 3),
    )


_NETWORK = _network()


def network() -> nn.Module:
    """Two batch norms in a row of layers, one of them used twice; always with the same weights."""
    return copy.deepcopy(_NETWORK)  # threads would share a random generator


@settings(max_examples=20, phases=WITHOUT_EXPLANATION)
@given(
    rounds=st.lists(
        st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(lambda n: sum(n) > 1),
        min_size=1,
        max_size=3,
    ),
    bucket_bytes=st.sampled_from([1, 200, 1 << 20]),
    summation=st.sampled_from(["float", "exact"]),
    loss_scale=st.sampled_from([1.0, 1024.0]),
)
def test_gradients_of_a_model_whose_buckets_are_under_way(
    rounds: list[list[int]], bucket_bytes: int, summation: Any, loss_scale: float
) -> None:
    """Each round is a micro-batch on every rank, some empty: the gradient is that of one rank with
    the ranks' micro-batches as one. Buckets and batch norms talk in turn, alike on all ranks."""
    total = sum(map(sum, rounds))
    batches = [draw(sum(sizes), 2, 4, 4, seed=i) for i, sizes in enumerate(rounds)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum() / total

    plain = network().double()
    for batch in batches:
        loss(plain, batch.double()).backward()

    def act(comm: ThreadCommunicator) -> tuple[list[Tensor], dict[str, Tensor], list[str]]:
        model = convert(network(), comm)
        reducer = GradientReducer(model, comm, "none", bucket_bytes, summation)
        reducer.start(len(rounds), loss_scale=loss_scale)
        for sizes, batch in zip(rounds, batches, strict=True):
            reducer.backward(loss(model, batch.split(sizes)[comm.rank]))
        assert reducer.finish().finite
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return grads, model.state_dict(), comm.calls

    for grads, state, calls in run_ranks(3, act):
        for ours, parameter in zip(grads, plain.parameters(), strict=True):
            assert parameter.grad is not None
            assert close(ours, parameter.grad, 1e-4)
        for name, value in plain.state_dict().items():
            assert close(state[name], value), name
        if bucket_bytes == 1:
            first = calls.index("bucket.0")
            assert any("batch_norm" in name for name in calls[first:]), "between the buckets"


def test_everything_that_hangs_on_a_layer_stays() -> None:
    model = network()
    before = list(model.state_dict(keep_vars=True).items())
    heard = []
    model[1].register_forward_hook(lambda module, *_: heard.append(module))
    converted = convert(model, SoloCommunicator())
    assert converted is model
    after = list(model.state_dict(keep_vars=True).items())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert model[1] is model[4], "still one layer"
    assert isinstance(model[1], SyncBatchNorm2d)
    assert isinstance(model[1], nn.BatchNorm2d), "for whoever looks for batch norms"
    model(draw(3, 2, 4, 4, seed=0))
    assert heard == [model[1]] * 2
    assert convert(copy.deepcopy(network()[1]), SoloCommunicator()).weight.shape == (4,)
    for layer in (nn.LayerNorm(3), nn.InstanceNorm2d(3, affine=True)):
        assert convert(layer, SoloCommunicator()) is layer


def test_names_tell_the_layers_apart_and_a_copy_talks_too() -> None:
    def act(comm: ThreadCommunicator) -> list[str]:
        model = copy.deepcopy(convert(network(), comm))
        model(draw(2, 2, 4, 4, seed=comm.rank)).sum().backward()
        return comm.calls

    first, last = "batch_norm.1.", "batch_norm.9."
    assert run_ranks(2, act)[0] == [
        *[name + "forward" for name in (first, first, last)],
        *[name + "backward" for name in (last, first, first)],
    ]


def test_evaluation_is_that_of_batch_norm_and_silent() -> None:
    plain = network()
    for seed in range(3):
        plain(draw(5, 2, 4, 4, seed=seed))

    def act(comm: ThreadCommunicator) -> Tensor:
        model = convert(copy.deepcopy(plain), comm).eval()
        # Shards are unequal: the ranks pass different numbers of batches.
        for _ in range(comm.rank + 1):
            found = model(draw(4, 2, 4, 4, seed=9))
        assert comm.calls == []
        return found

    wanted = plain.eval()(draw(4, 2, 4, 4, seed=9))
    assert all(torch.equal(found, wanted) for found in run_ranks(2, act))


@pytest.mark.parametrize("owner", [0, 1])
def test_one_value_for_a_channel_is_an_error_on_all_ranks(owner: int) -> None:
    heard = {}

    def act(comm: ThreadCommunicator) -> None:
        layer = convert(nn.Sequential(nn.BatchNorm1d(3)), comm)
        try:
            layer(torch.ones(int(comm.rank == owner), 3))
        except HarnessError as error:
            heard[comm.rank] = str(error)

    run_ranks(2, act)
    assert sorted(heard) == [0, 1]
    assert all("batch norm 0 gets one value for each channel" in words for words in heard.values())
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm1d(3)(torch.ones(1, 3))


def test_two_ranks_with_one_value_each_have_a_variance() -> None:
    def act(comm: ThreadCommunicator) -> list[float]:
        layer = convert(nn.BatchNorm1d(1, eps=0), comm)
        return layer(torch.tensor([[float(comm.rank)]])).flatten().tolist()

    assert run_ranks(2, act) == [[-1.0], [1.0]]


def test_no_samples_on_any_rank_change_nothing() -> None:
    def act(comm: ThreadCommunicator) -> None:
        model = convert(network(), comm)
        before = copy.deepcopy(model.state_dict())
        output = model(torch.zeros(0, 2, 4, 4))
        output.sum().backward()
        assert output.shape == (0, 3)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(not p.grad.any() for p in model.parameters())

    run_ranks(2, act)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_under_autocast(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """As near to float64 as batch norm itself, on one rank and on three; and of the same types."""
    batch = draw(6, 2, 4, 4, seed=1).to(memory_format=layout)

    def one(model: nn.Module, share: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", dtype):
            output = model(share)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        return output.detach(), [p.grad for p in model.parameters()]

    exact = network().double()
    exact(batch.double()).square().sum().backward()
    plain = network().to(memory_format=layout)
    output, grads = one(plain, batch)
    wanted = [p.grad for p in exact.parameters()]
    largest = max(float(grad.norm()) for grad in wanted)

    def act(comm: ThreadCommunicator) -> tuple[Tensor, list[Tensor]]:
        model = convert(network().to(memory_format=layout), comm)
        return one(model, batch.split([3, 1, 2])[comm.rank])

    found = run_ranks(3, act)
    assert close(torch.cat([one[0] for one in found]), output, 0.05)
    for place, grad in enumerate(wanted):
        ours = sum(one[1][place].double() for one in found)
        allowed = 2 * float((grads[place] - grad).norm()) + 1e-3 * largest
        assert float((ours - grad).norm()) <= allowed


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_statistics_of_values_far_from_zero(offset: float) -> None:
    """No worse than float32 leaves the values: ranks are not merged by a small difference of large
    sums."""
    values = draw(600, 2, 3, seed=0) + offset
    variance, mean = torch.var_mean(values.double(), (0, 2))

    def act(comm: ThreadCommunicator) -> None:
        layer = convert(nn.BatchNorm1d(2, momentum=1.0), comm)
        layer(values.split([100, 450, 50])[comm.rank])
        assert layer.running_mean.tolist() == pytest.approx(mean.tolist(), rel=1e-6)
        assert layer.running_var.tolist() == pytest.approx(variance.tolist(), rel=1e-5)

    run_ranks(3, act)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_value_on_one_rank_skips_the_update_on_all(bad: float) -> None:
    def act(comm: ThreadCommunicator) -> bool:
        model = convert(network(), comm)
        reducer = GradientReducer(model, comm, bucket_bytes=1)
        batch = draw(2, 2, 4, 4, seed=0)
        if comm.rank == 1:
            batch[0, 0, 0, 0] = bad
        reducer.start(1)
        reducer.backward(model(batch).sum())
        return reducer.finish().finite

    assert run_ranks(2, act) == [False, False]


class Own(nn.BatchNorm2d):
    """A batch norm with a forward pass that is not the usual one."""

    def forward(self, batch: Tensor) -> Tensor:
        return 2 * super().forward(batch)


@pytest.mark.parametrize("make", [lambda: Own(3), lambda: nn.LazyBatchNorm2d()])
def test_another_kind_of_batch_norm_is_refused_by_name(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), make())
    with pytest.raises(ConfigError, match=r"sync_batch_norm: 1 is a .*; only nn.BatchNorm1d, nn"):
        convert(model, SoloCommunicator())
