"""What differs between ranks is gathered, averaged, given back and dealt out anew."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import WITHOUT_EXPLANATION, ThreadCommunicator, run_ranks
from torch import Tensor, nn

from harness.buffers import (
    BuffersBefore,
    averaged_buffers,
    gather_buffers,
    gather_residuals,
    restore_buffers,
    restore_residuals,
)
from harness.comm import SoloCommunicator


def drifted(rank: int) -> nn.Module:
    """A model whose statistics are this rank's own: floats, a count, and one that is shared."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    model.register_buffer("scalar", torch.tensor(0.25 + rank))
    model.register_buffer("flag", torch.tensor([rank % 2 == 0, True]))
    model.register_buffer("large", torch.tensor([2**62 + 12345 + rank, -(2**63) + rank, -1]))
    model.register_buffer("complex", torch.tensor([[1 + 2j, 3.5 - 1j * rank]]))
    generator = torch.Generator().manual_seed(rank)
    for layer in (model[0], model[2]):
        layer.running_mean = torch.randn(layer.num_features, generator=generator)
        layer.running_var = torch.rand(layer.num_features, generator=generator)
        layer.num_batches_tracked.fill_(2**40 + rank)
    return model


def values(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_mean_over_ranks_inside_and_each_ranks_own_afterwards(ranks: int) -> None:
    models = [drifted(rank) for rank in range(ranks)]
    own = [values(model) for model in models]

    def act(comm: ThreadCommunicator) -> list[Tensor]:
        model = models[comm.rank]
        with averaged_buffers(model, gather_buffers(model, comm)):
            inside = values(model)
        assert equal(values(model), own[comm.rank])
        return inside

    for inside in run_ranks(ranks, act):
        for index, buffer in enumerate(inside):
            each = [buffers[index] for buffers in own]
            if buffer.is_floating_point() or buffer.is_complex():
                mean = torch.stack(each).to(torch.complex128).mean(dim=0)
                assert torch.allclose(buffer.to(torch.complex128), mean, rtol=1e-6)
            else:
                assert torch.equal(buffer, each[0]), "rank 0's"


def test_own_statistics_come_back_also_after_an_error() -> None:
    model = drifted(1)
    table = run_ranks(2, lambda comm: gather_buffers(drifted(comm.rank), comm))[0]
    before = values(model)

    def fail() -> None:
        with averaged_buffers(model, table):
            assert not equal(values(model), before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert equal(values(model), before)


def test_a_saved_table_gives_each_rank_its_own_to_the_last_bit() -> None:
    def act(comm: ThreadCommunicator) -> None:
        model = drifted(comm.rank)
        table = gather_buffers(model, comm)
        other = drifted(99)
        restore_buffers(other, table, comm)
        assert equal(values(other), values(model))

    run_ranks(3, act)


def test_a_table_of_other_ranks_is_left_alone() -> None:
    table = run_ranks(2, lambda comm: gather_buffers(drifted(comm.rank), comm))[0]
    model = drifted(5)
    before = values(model)
    restore_buffers(model, table, SoloCommunicator())
    restore_buffers(model, None, SoloCommunicator())
    assert equal(values(model), before)


def test_a_model_without_buffers_sends_nothing() -> None:
    def act(comm: ThreadCommunicator) -> list[str]:
        model = nn.Linear(2, 2)
        assert gather_buffers(model, comm) is None
        assert gather_residuals([], comm) is None
        with averaged_buffers(model, None):
            pass
        restore_residuals([], None, comm)
        return comm.calls

    assert run_ranks(2, act) == [[], []]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(phases=WITHOUT_EXPLANATION)
@given(sizes, sizes, st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_what_is_owed_is_kept_whatever_the_ranks_and_the_buckets(
    before: list[int], after: list[int], old: int, new: int, seed: int
) -> None:
    after = [*after, sum(before) - sum(after)] if sum(after) < sum(before) else before
    generator = torch.Generator().manual_seed(seed)
    owed = [[torch.randn(n, generator=generator) for n in before] for _ in range(old)]
    tables = run_ranks(old, lambda comm: gather_residuals(owed[comm.rank], comm))
    rows = torch.stack([torch.cat(residuals) for residuals in owed])
    assert all(table is not None and torch.equal(table, rows) for table in tables)

    def take(comm: ThreadCommunicator) -> Tensor:
        mine = [torch.full((n,), 7.0) for n in after]
        restore_residuals(mine, copy.deepcopy(tables[0]), comm)
        return torch.cat(mine)

    dealt = torch.stack(run_ranks(new, take))
    if new == old:
        assert torch.equal(dealt, rows)
    assert torch.allclose(dealt.double().sum(0), rows.double().sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_a_bad_update_has_spoilt_come_back(bad: float) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    # As an attention's mask, which is no number from the beginning, and not for that spoilt.
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    before = BuffersBefore(model)
    images = torch.randn(2, 3, 4, 4)
    model(images)
    before.keep()
    sound = values(model)
    model(images)
    assert not before.restore_if_poisoned()
    assert not all(torch.equal(a, b) for a, b in zip(values(model), sound, strict=True))
    before.keep()
    sound = values(model)
    images[0, 0, 0, 0] = bad
    model(images)
    assert before.restore_if_poisoned()
    assert all(torch.equal(a, b) for a, b in zip(values(model), sound, strict=True))


def test_a_model_without_buffers_has_nothing_to_spoil() -> None:
    before = BuffersBefore(nn.Linear(2, 2))
    before.keep()
    assert not before.restore_if_poisoned()
