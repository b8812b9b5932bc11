"""Equal weights on all ranks: what shows in the digest, and what the message says of it."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.comm import SoloCommunicator
from harness.consistency import (
    _CHUNK,
    Diverged,
    Divergence,
    check_equal,
    check_finite,
    digest,
    digest_of,
)
from harness.errors import HarnessError
from harness.models import build_model

MULTIPLIER = 6364136223846793005


def by_hand(tensor: Tensor) -> int:
    """Σ bitsᵢ · Mⁱ mod 2⁶⁴ in Python's integers, as a signed 64-bit number."""
    bits = tensor.detach().numpy().reshape(-1).view(np.int32)
    total, power = 0, 1
    for element in bits.tolist():
        total, power = total + element * power, power * MULTIPLIER % 2**64
    return (total + 2**63) % 2**64 - 2**63


def values(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def digest_one(tensor: Tensor) -> int:
    return int(digest_of([tensor]))


@pytest.mark.parametrize("count", [0, 1, 2, 1000, _CHUNK - 1, _CHUNK, _CHUNK + 1, 3 * _CHUNK + 7])
def test_the_digest_is_the_sum_that_it_says(count: int) -> None:
    tensor = values(count)
    assert digest_one(tensor) == by_hand(tensor)


places = st.integers(0, 2 * _CHUNK + 99)
LARGE = values(2 * _CHUNK + 100)
LARGE_DIGEST = digest_one(LARGE)


@given(places, st.integers(0, 31))
def test_any_bit_of_any_element_shows(place: int, bit: int) -> None:
    changed = LARGE.clone()
    changed.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(2**31)
    assert digest_one(changed) != LARGE_DIGEST


@given(places, places, st.sampled_from(["values", "signs", "zeros", "bits"]))
def test_two_elements_that_have_changed_places_show(a: int, b: int, kind: str) -> None:
    """The difference of x and −x is one high bit only; M^|a − b| − 1 may be even many times."""
    if a == b:
        return
    before = LARGE.clone()
    pair = {
        "values": torch.tensor([1.5, -2.25]),
        "signs": torch.tensor([0.7, -0.7]),
        "zeros": torch.tensor([0.0, -0.0]),
        "bits": torch.tensor([0, -(2**31) + 1], dtype=torch.int32).view(torch.float32),
    }[kind]
    before[[a, b]] = pair
    after = before.clone()
    after[[a, b]] = pair.flip(0)
    assert digest_one(before) != digest_one(after)


@pytest.mark.parametrize("distance", [2**k for k in range(17)])
def test_powers_of_two_are_the_hardest_distances(distance: int) -> None:
    before = torch.zeros(2**16 + 1)
    before[0], before[distance] = 1.0, -1.0
    after = before.clone()
    after[0], after[distance] = -1.0, 1.0
    assert digest_one(before) != digest_one(after)


@given(st.integers(1, 300), st.integers(0, 2**31))
def test_an_equal_copy_has_an_equal_digest(count: int, seed: int) -> None:
    tensor = values(count, seed)
    assert digest_one(tensor) == digest_one(tensor.clone())
    assert digest_one(tensor) == digest_one(tensor.reshape(1, -1))


def test_the_layout_in_memory_does_not_matter() -> None:
    image = values(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    assert digest_one(image) == digest_one(image.to(memory_format=torch.channels_last))
    assert digest_one(image[:, 1]) == by_hand(image[:, 1].contiguous())


def test_not_a_number_is_compared_by_its_bits() -> None:
    first, second = (torch.tensor([bits], dtype=torch.int32) for bits in (0x7FC00000, 0x7FC00001))
    assert digest_one(first.view(torch.float32)) == digest_one(first.view(torch.float32).clone())
    assert digest_one(first.view(torch.float32)) != digest_one(second.view(torch.float32))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_frozen_parameters_may_be_of_any_type(dtype: torch.dtype) -> None:
    tensor = (values(50) * 10).to(dtype)
    other = tensor.clone()
    other[17] = ~other[17] if dtype is torch.bool else other[17] + 1
    assert digest_one(tensor) == digest_one(tensor.clone()) != digest_one(other)


def test_a_model_has_a_number_per_parameter_and_none_for_buffers() -> None:
    model = net()
    before = digest(model)
    assert before.dtype == torch.int64
    assert before.tolist() == [by_hand(p) for p in model.parameters()]
    model[1].running_mean += 1.0
    assert torch.equal(digest(model), before)
    with torch.no_grad():
        model[3].bias[2] += 1e-3
    assert (digest(model) != before).nonzero().flatten().tolist() == [5]
    assert len(digest(nn.ReLU())) == 0


# Comparing ranks


class Threads:
    """Ranks in threads of one process; each ``allreduce`` is a meeting of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors: dict[int, Tensor] = {}

    def run(self, action: Callable[[Any], None]) -> list[str | None]:
        """What each rank raises, as text."""
        said: list[str | None] = [None] * self.size

        def work(rank: int) -> None:
            try:
                action(Rank(self, rank))
            except Divergence as error:
                said[rank] = str(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.barrier.broken
        return said


class Rank:
    kind = "threads"
    local_size = 1

    def __init__(self, world: Threads, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size

    def allreduce_async(self, tensor: Tensor, name: str) -> None:
        self.world.tensors[self.rank] = tensor.clone()
        self.world.barrier.wait()
        tensor.copy_(torch.stack([*self.world.tensors.values()]).sum(0))
        self.world.barrier.wait()

    def wait(self, handle: None) -> None:
        return


NET = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4))


def net() -> nn.Module:
    return copy.deepcopy(NET)


def compare(size: int, harm: Callable[[int, nn.Module], None]) -> str | None:
    """Harm the ranks' copies of a model; returns what all ranks say, which must be the same."""

    def work(comm: Any) -> None:
        model = net()
        with torch.no_grad():
            harm(comm.rank, model)
        check_equal(model, None, comm, 120)

    said = Threads(size).run(work)
    assert len(set(said)) == 1
    return said[0]


def nudge(*ranks: int, layer: int = 3, own: bool = False) -> Callable[[int, nn.Module], None]:
    def harm(rank: int, model: nn.Module) -> None:
        if rank in ranks:
            bits = model[layer].weight.view(-1).view(torch.int32)
            bits[-1] += 1 + own * ranks.index(rank)

    return harm


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_equal_weights_pass(size: int) -> None:
    assert compare(size, lambda rank, model: None) is None


def test_batch_norm_statistics_may_differ() -> None:
    assert compare(3, lambda rank, model: model[1].running_mean.fill_(rank)) is None  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("size", "ranks", "own", "text"),
    [
        (8, (2, 5), False, "ranks 2 and 5 differ from the other 6"),
        (4, (0,), False, "rank 0 differs from the other 3"),
        (2, (1,), False, "the two ranks differ"),
        (4, (2, 3), False, "ranks 2 and 3 differ from the other 2"),
        (5, (1, 2, 4), True, "ranks 1, 2 and 4 differ from the other 2"),
        (3, (0, 1, 2), True, "all 3 ranks differ from each other"),
        (40, tuple(range(25, 35)), False,
         "10 ranks (25, 26, 27, 28, 29, 30, 31, 32, …) differ from the other 30"),
    ],
)  # fmt: skip
def test_the_ranks_that_differ_are_named(
    size: int, ranks: tuple[int, ...], own: bool, text: str
) -> None:
    said = compare(size, nudge(*ranks, own=own))
    assert said is not None
    assert said.startswith(
        f"after update 120 the weights differ between ranks: first in 3.weight, where {text}. "
        "Go on from the last checkpoint with --resume."
    )


def test_the_first_layer_in_the_model_s_order_is_named() -> None:
    def harm(rank: int, model: nn.Module) -> None:
        nudge(2)(rank, model)
        nudge(1, layer=0)(rank, model)

    said = compare(4, harm)
    assert said is not None
    assert (
        "first in 0.weight, where rank 1 differs from the other 3 (2 of 6 tensors differ)" in said
    )


@given(st.integers(2, 6), st.data())
def test_one_bit_on_one_rank_is_found_and_named(size: int, data: st.DataObject) -> None:
    victim = data.draw(st.integers(0, size - 1))
    place = data.draw(st.integers(0, 431))
    bit = data.draw(st.integers(0, 30))

    def harm(rank: int, model: nn.Module) -> None:
        if rank == victim:
            model[3].weight.view(-1).view(torch.int32)[place] ^= 1 << bit  # type: ignore[union-attr, operator]

    said = compare(size, harm)
    assert said is not None
    assert re.search(rf"rank {victim} differs|the two ranks differ", said)


def optimizer_of(model: nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return optimizer


def compare_states(
    harm: Callable[[int, nn.Module, torch.optim.Optimizer], None], given_too: bool = True
) -> str | None:
    def work(comm: Any) -> None:
        model = net()
        optimizer = optimizer_of(model)
        harm(comm.rank, model, optimizer)
        check_equal(model, optimizer if given_too else None, comm, 7)

    said = Threads(3).run(work)
    assert len(set(said)) == 1
    return said[0]


def test_the_optimizer_s_state_is_compared_if_it_is_given() -> None:
    def harm(rank: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if rank == 1:
            optimizer.state[model[3].weight]["momentum_buffer"][0, 0] += 0.5

    said = compare_states(harm)
    assert said is not None
    assert (
        "first in the optimizer's state of 3.weight, where rank 1 differs from the other 2" in said
    )
    assert compare_states(harm, given_too=False) is None
    assert compare_states(lambda rank, model, optimizer: None) is None


def test_a_state_that_one_rank_lacks_neither_hangs_nor_passes() -> None:
    def harm(rank: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if rank == 2:
            optimizer.state.clear()

    said = compare_states(harm)
    assert said is not None
    assert "the optimizer's state of 0.weight, where rank 2 differs" in said


def test_states_in_another_order_are_equal() -> None:
    def work(comm: Any) -> None:
        model = net()
        optimizer = torch.optim.Adam(model.parameters())
        for parameter in model.parameters():
            held = {"exp_avg": torch.ones_like(parameter), "step": torch.tensor(3.0), "note": "x"}
            order = list(held) if comm.rank else list(reversed(held))
            optimizer.state[parameter] = {key: held[key] for key in order}
        check_equal(model, optimizer, comm, 3)

    assert Threads(2).run(work) == [None, None]


def test_it_is_an_error_that_users_see_as_one_message() -> None:
    assert issubclass(Divergence, HarnessError)
    assert Divergence.exit_code == 1
    model = build_model("lenet5", 10, (1, 28, 28), seed=0)
    check_equal(model, optimizer_of(model), SoloCommunicator(), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_inf_or_nan_is_found_in_weights_and_in_what_the_optimizer_holds(value: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    check_finite(model, optimizer, 7)
    name, weight = list(model.named_parameters())[1]
    optimizer.state[weight]["momentum_buffer"][0] = value
    with pytest.raises(Diverged, match=f"update 7 there is an inf or NaN in the .* of {name}"):
        check_finite(model, optimizer, 7)
    optimizer.state.clear()
    with torch.no_grad():
        weight[0] = value
    with pytest.raises(Diverged, match=f"NaN in {name}, so no checkpoint was written"):
        check_finite(model, optimizer, 7)
    weight.requires_grad_(False)  # what is not trained may be what its maker likes
    check_finite(model, optimizer, 7)
