"""fp16 with and without error feedback: its range, its precision, and what comes after overflow."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import WITHOUT_EXPLANATION, ThreadCommunicator, run_ranks
from torch import Tensor, nn

from harness.buffers import gather_residuals, restore_residuals
from harness.comm import SoloCommunicator
from harness.comm.base import Communicator
from harness.compression import Compression
from harness.reducer import GradientReducer, Reduced

HALF = ("fp16", "fp16_feedback")


class Weights(nn.Module):
    """Parameters whose gradients a test sets at will."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)


class Harness:
    """A model of such parameters, each in a bucket of its own, and its reducer."""

    def __init__(self, compression: Compression, comm: Communicator, *sizes: int) -> None:
        self.model = Weights(*sizes)
        self.reducer = GradientReducer(self.model, comm, compression, bucket_bytes=1)

    def reduce(self, *gradients: Tensor | Sequence[Tensor] | float) -> tuple[Reduced, list[Tensor]]:
        """One update; of a sequence each is a micro-batch's. Returns the reduced gradients."""
        parts = [
            list(g) if isinstance(g, list | tuple) else [torch.as_tensor(g)] for g in gradients
        ]
        micro_batches = len(parts[0])
        self.reducer.start(micro_batches)
        for micro in range(micro_batches):
            loss = torch.zeros(())
            for parameter, pieces in zip(self.model.parts, parts, strict=True):
                loss = loss + (parameter * pieces[micro]).sum()
            self.reducer.backward(loss)
        reduced = self.reducer.finish()
        return reduced, [p.grad.clone() for p in self.model.parts]


def draw(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


# Range


@pytest.mark.parametrize("compression", HALF)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("size", [40000.0, 65504.0, 1e-7, 1e-8, 1e-20, 1e15])
def test_the_mean_over_ranks_of_any_size_survives(
    size: float, ranks: int, compression: Compression
) -> None:
    """40,000 on each of two ranks sums up to more than fp16 holds; 1e-8 is less than it holds."""

    def act(comm: ThreadCommunicator) -> list[float]:
        means = []
        tested = Harness(compression, comm, 3)
        for _ in range(3):
            reduced, (sums,) = tested.reduce(size * torch.tensor([1.0, -0.5, 0.25]))
            assert reduced.finite
            means.append(sums / ranks)
        return torch.stack(means).tolist()

    for rank in run_ranks(ranks, act):
        for mean in rank:
            assert mean == pytest.approx([size, -0.5 * size, 0.25 * size], rel=1e-3)


@pytest.mark.parametrize("compression", HALF)
def test_a_small_bucket_survives_beside_an_ordinary_one(compression: Compression) -> None:
    def act(comm: ThreadCommunicator) -> None:
        tested = Harness(compression, comm, 50, 50)
        small, ordinary = 1e-7 * draw(50, comm.rank).sign(), draw(50, 5 + comm.rank)
        wanted = sum(1e-7 * draw(50, rank).sign().double() for rank in range(2))
        for _ in range(4):
            reduced, (ours, _) = tested.reduce(small, ordinary)
        assert reduced.finite
        assert ((ours - wanted).abs() <= 1e-3 * 1e-7).all()

    run_ranks(2, act)


@pytest.mark.parametrize("compression", HALF)
def test_elements_that_differ_by_a_million_share_a_bucket(compression: Compression) -> None:
    tested = Harness(compression, SoloCommunicator(), 2)
    for _ in range(3):
        _, (gradient,) = tested.reduce(torch.tensor([1.0, 1e-6]))
    assert gradient.tolist() == pytest.approx([1.0, 1e-6], rel=1e-3)


@pytest.mark.parametrize("factor", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
def test_a_gradient_that_shrinks_at_once_is_back_after_two_updates(factor: float) -> None:
    """What vanishes in fp16 with the old scale must not be lost for ever."""
    tested = Harness("fp16", SoloCommunicator(), 40)
    gradient = draw(40, 0)
    for _ in range(2):
        tested.reduce(gradient)
    for _ in range(3):
        reduced, (ours,) = tested.reduce(gradient * factor)
        assert reduced.finite
    assert (ours - gradient * factor).norm() < 2.0**-10 * (gradient * factor).norm()


def test_a_bucket_without_a_gradient_for_a_while() -> None:
    """A zero tells nothing of what will come, be it large or small."""
    for after in (1e-9, 1.0, 1e9):
        tested = Harness("fp16", SoloCommunicator(), 2, 2)
        for _ in range(20):
            tested.reduce(torch.zeros(2), torch.ones(2))
        for _ in range(3):
            reduced, (ours, _) = tested.reduce(torch.tensor([after, -after]), torch.ones(2))
            assert reduced.finite
            assert ours.tolist() == pytest.approx([after, -after], rel=1e-3)


# Overflow


@pytest.mark.parametrize("compression", HALF)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_on_one_rank_is_an_update_that_all_skip(
    bad: float, compression: Compression
) -> None:
    def act(comm: ThreadCommunicator) -> None:
        tested = Harness(compression, comm, 8, 8)
        other, gradient = draw(8, 10 + comm.rank), draw(8, comm.rank)
        for _ in range(2):
            assert tested.reduce(other, gradient)[0].finite
        before = tested.reducer.state_dict()["exponents"]
        spoilt = gradient.clone()
        if comm.rank == 1:
            spoilt[3] = bad
        assert not tested.reduce(8 * other, spoilt)[0].finite
        after = tested.reducer.state_dict()["exponents"]
        assert after[0] < before[0]  # the bucket of the last parameter is the first
        assert after[1] == before[1], "the other bucket has nothing to do with it"
        reduced, (_, ours) = tested.reduce(other, gradient)
        wanted = draw(8, 0) + draw(8, 1)
        assert reduced.finite
        assert (ours - wanted).norm() < 2.0**-9 * wanted.norm()

    run_ranks(2, act)


@pytest.mark.parametrize("compression", HALF)
@pytest.mark.parametrize(("growth", "skipped"), [(63.0, 0), (1e4, 1), (1e6, 2)])
def test_a_sudden_growth(growth: float, skipped: int, compression: Compression) -> None:
    """Of a bucket's only element, which is the worst case, and by as much as is said of it."""
    for start in (1.0, 1.9999, 3e-5):
        tested = Harness(compression, SoloCommunicator(), 1)
        for _ in range(2):
            assert tested.reduce(start)[0].finite
        found = []
        for _ in range(5):
            reduced, (ours,) = tested.reduce(start * growth)
            found.append(reduced.finite)
        assert found == [False] * skipped + [True] * (5 - skipped)
        assert float(ours) == pytest.approx(start * growth, rel=1e-3)


def test_a_sum_that_is_too_large_though_no_rank_is() -> None:
    def act(comm: ThreadCommunicator) -> list[bool]:
        tested = Harness("fp16", comm, 1)
        return [tested.reduce(size)[0].finite for size in (1.0, 1.0, 60.0, 60.0, 60.0)]

    # Three ranks of 1.0 have a norm of 3, which goes to 768; 60 each is 15360 and 46080 for all.
    assert run_ranks(3, act) == [[True] * 5] * 3

    def cancelling(comm: ThreadCommunicator) -> list[bool]:
        sign = 1.0 if comm.rank else -1.0
        tested = Harness("fp16", comm, 1)
        return [tested.reduce(sign * size + 1e-3)[0].finite for size in (0.0, 0.0, 30.0, 30.0)]

    assert run_ranks(2, cancelling) == [[True, True, False, True]] * 2


# Bytes and state


@pytest.mark.parametrize("compression", HALF)
def test_half_the_bytes(compression: Compression) -> None:
    sent = {}
    for kind in ("none", compression):

        def act(comm: ThreadCommunicator, kind: Any = kind) -> list[int]:
            tested = Harness(kind, comm, 1000, 200)
            sums = []
            for _ in range(3):
                before = len(comm.calls)
                reduced, _ = tested.reduce(draw(1000, 0), draw(200, 1))
                sums.append(reduced.bytes_sent)
                assert reduced.bytes_sent == sum(comm.sent[n].nbytes for n in comm.calls[before:])
            return sums

        sent[kind] = run_ranks(2, act)[0]
    assert sent["none"][0] == sent[compression][0], "the first update goes in float32"
    for update in (1, 2):
        assert sent["none"][update] - sent[compression][update] == 1200 * 2


gradient_lists = st.lists(
    st.tuples(st.floats(1e-9, 1e9), st.integers(0, 1000)), min_size=1, max_size=6
)


@settings(max_examples=25, phases=WITHOUT_EXPLANATION)
@pytest.mark.parametrize("compression", HALF)
@given(before=gradient_lists, after=gradient_lists)
def test_what_is_saved_is_all_that_the_next_update_depends_on(
    compression: Compression, before: list[tuple[float, int]], after: list[tuple[float, int]]
) -> None:
    def updates(tested: Harness, seen: list[tuple[float, int]], rank: int) -> list[list[Tensor]]:
        found = []
        for scale, seed in seen:
            parts = [scale * draw(7, seed + rank), draw(3, seed + 9 + rank)]
            reduced, gradients = tested.reduce(*parts)
            found.append([*gradients, torch.tensor(reduced.grad_norm)])
        return found

    def act(comm: ThreadCommunicator) -> None:
        tested = Harness(compression, comm, 7, 3)
        updates(tested, before, comm.rank)
        state = copy.deepcopy(tested.reducer.state_dict())
        table = gather_residuals(tested.reducer.residuals, comm)
        going_on = updates(tested, after, comm.rank)
        resumed = Harness(compression, comm, 7, 3)
        resumed.reducer.load_state_dict(state)
        assert resumed.reducer.state_dict() == state
        restore_residuals(resumed.reducer.residuals, table, comm)
        for ours, theirs in zip(updates(resumed, after, comm.rank), going_on, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())

    run_ranks(2, act)


# Error feedback


def test_with_feedback_the_sum_over_updates_is_right_to_one_rounding_where_without_it_drifts() -> (
    None
):
    """A constant gradient is the worst case for plain fp16, which errs the same way each time."""
    gradient = draw(200, 0)
    drift = {}
    for compression in HALF:
        tested = Harness(compression, SoloCommunicator(), 200)
        total = torch.zeros(200, dtype=torch.float64)
        for _ in range(400):
            total += tested.reduce(gradient)[1][0]
        drift[compression] = float((total - 400 * gradient.double()).abs().max())
    # The largest element's rounding, of a part of 2^11, and float32's own over 400 updates.
    rounding = 2.0**-11 * 4
    assert drift["fp16_feedback"] < rounding * 1.1
    assert drift["fp16"] > 20 * rounding


@settings(max_examples=40, phases=WITHOUT_EXPLANATION)
@given(
    seed=st.integers(0, 10**6),
    steps=st.lists(
        st.tuples(st.sampled_from([0.1, 1.0, 10.0, 1e-4, 1e-12]), st.integers(0, 7)),
        min_size=2,
        max_size=12,
    ),
    ranks=st.integers(1, 3),
    bucket_bytes=st.sampled_from([1, 1 << 20]),
)
def test_what_was_sent_and_what_is_owed_add_up_to_the_truth(
    seed: int, steps: list[tuple[float, int]], ranks: int, bucket_bytes: int
) -> None:
    """For each rank and parameter, whatever the gradients, and whether there are any: nothing is
    lost and nothing sent twice. On one rank that holds for what ends up in .grad."""

    def act(comm: ThreadCommunicator) -> None:
        model = Weights(30, 5, 2)
        reducer = GradientReducer(model, comm, "fp16_feedback", bucket_bytes)
        width = sum(p.numel() for p in model.parts)
        truth, sent, returned = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
        for update, (scale, used) in enumerate(steps):
            exponents = reducer.state_dict()["exponents"]
            gradients = [
                scale * draw(len(p), seed + 100 * update + 10 * comm.rank + i)
                for i, p in enumerate(model.parts)
            ]
            mine = [i for i in range(3) if used >> i & 1 and (seed + i + comm.rank) % 3]
            reducer.start(1 if mine else 0)
            if mine:
                reducer.backward(
                    torch.stack([(model.parts[i] * gradients[i]).sum() for i in mine]).sum()
                )
            if not reducer.finish().finite:  # growth past fp16: all that was owed is forgotten
                assert not any(residual.any() for residual in reducer.residuals)
                for total in (truth, sent, returned):
                    total.zero_()
                continue
            zeros = [torch.zeros(len(p)) for p in model.parts]
            truth += backwards([g if i in mine else zeros[i] for i, g in enumerate(gradients)])
            wires = [
                comm.sent[f"bucket.{k}"].double() * 2.0 ** -(exponent or 0)
                for k, exponent in enumerate(exponents)
            ]
            sent += torch.cat(wires)
            returned += backwards(
                [z if p.grad is None else p.grad for p, z in zip(model.parts, zeros, strict=True)]
            )
        owed = torch.cat(reducer.residuals)
        allowed = 1e-6 * sum(scale for scale, _ in steps)
        assert (truth - sent - owed).abs().max() < allowed
        if ranks == 1:
            assert (truth - returned - owed).abs().max() < allowed
        assert owed.abs().max() < 2.0**-10 * 5 * max(scale for scale, _ in steps)

    run_ranks(ranks, act)


def backwards(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor, in the order in which buckets hold parameters."""
    return torch.cat(list(reversed(tensors))).double()


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_what_is_owed_to_a_parameter_that_is_not_reached_waits(bucket_bytes: int) -> None:
    """Sent in an update in which nobody has its gradient it would be thrown away."""
    model = Weights(20, 20)
    reducer = GradientReducer(model, SoloCommunicator(), "fp16_feedback", bucket_bytes)
    first, second = model.parts
    gradient = draw(20, 0)
    for used in ((first, second), (first, second), (second,), (second,)):
        reducer.start(1)
        reducer.backward(sum((weight * gradient).sum() for weight in used))
        reducer.finish()
        owed = torch.cat(reducer.residuals)[20:].clone()  # the last parameter comes first
        if used[0] is first:
            assert first.grad is not None
            before = owed
        else:
            assert first.grad is None
            assert before.any()
            assert torch.equal(owed, before)


@pytest.mark.parametrize("ranks", [2, 4])
def test_on_several_ranks_feedback_makes_up_for_the_casts(ranks: int) -> None:
    """Not for what the sum over ranks is rounded to, in fp16 as it travels: no rank knows that. A
    constant gradient, the worst case, still drifts, by less."""
    truth = sum(draw(300, rank).double() for rank in range(ranks)) * 200
    drift = {}
    for compression in HALF:

        def act(comm: ThreadCommunicator, compression: Any = compression) -> Tensor:
            tested = Harness(compression, comm, 300)
            total = torch.zeros(300, dtype=torch.float64)
            for _ in range(200):
                total += tested.reduce(draw(300, comm.rank))[1][0]
            return total

        totals = run_ranks(ranks, act)
        assert all(torch.equal(total, totals[0]) for total in totals)
        drift[compression] = float((totals[0] - truth).norm() / truth.norm())
    assert drift["fp16"] < 2.0**-11
    assert drift["fp16_feedback"] < 0.75 * drift["fp16"]


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_what_is_owed_survives_another_number_of_ranks(after: int) -> None:
    def owe(comm: ThreadCommunicator) -> Tensor | None:
        tested = Harness("fp16_feedback", comm, 40, 9)
        for update in range(4):
            tested.reduce(draw(40, update + comm.rank), draw(9, 50 + update + comm.rank))
        return gather_residuals(tested.reducer.residuals, comm)

    tables = run_ranks(3, owe)
    table = tables[0]
    assert table is not None
    assert all(t is not None and torch.equal(t, table) for t in tables)
    assert table.shape == (3, 49)
    assert (table.abs().sum(dim=1) > 0).all(), "a test of debts needs some on each rank"

    def take(comm: ThreadCommunicator) -> Tensor:
        # Another bucket size, too.
        reducer = GradientReducer(Weights(40, 9), comm, "fp16_feedback")
        restore_residuals(reducer.residuals, table, comm)
        return torch.cat(reducer.residuals)

    rows = run_ranks(after, take)
    if after == 3:
        assert torch.equal(torch.stack(rows), table), "to the last bit"
    owed = table.double().sum(0)
    assert torch.allclose(torch.stack(rows).double().sum(0), owed, rtol=1e-5, atol=1e-10)


def test_feedback_starts_anew_after_a_gradient_that_is_not_finite() -> None:
    def act(comm: ThreadCommunicator) -> None:
        tested = Harness("fp16_feedback", comm, 8, 8)
        parts = draw(8, comm.rank), draw(8, 5 + comm.rank)
        for _ in range(3):
            tested.reduce(*parts)
        assert all(residual.any() for residual in tested.reducer.residuals)
        spoilt = parts[0].clone()
        spoilt[comm.rank] = math.inf if comm.rank else 1e30
        assert not tested.reduce(spoilt, parts[1])[0].finite
        assert not any(residual.any() for residual in tested.reducer.residuals)
        for _ in range(3):
            reduced, gradients = tested.reduce(*parts)
            assert reduced.finite
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)

    run_ranks(2, act)


def test_float32_after_another_bucket_size_pays_all_debts_at_once() -> None:
    def act(comm: ThreadCommunicator) -> None:
        tested = Harness("fp16_feedback", comm, 20, 6)
        for _ in range(3):
            tested.reduce(draw(20, comm.rank), draw(6, 9 + comm.rank))
        table = gather_residuals(tested.reducer.residuals, comm)
        assert table is not None
        model = Weights(20, 6)
        reducer = GradientReducer(model, comm, "fp16_feedback")
        reducer.load_state_dict(tested.reducer.state_dict())
        restore_residuals(reducer.residuals, table, comm)
        reducer.start(1)
        reducer.backward(model.parts[0].sum() * 0 + model.parts[1].sum() * 0)
        reducer.finish()
        got = backwards([p.grad for p in model.parts])
        assert torch.allclose(got, table.double().sum(0), rtol=1e-6, atol=1e-12)
        assert not any(residual.any() for residual in reducer.residuals)

    run_ranks(2, act)
