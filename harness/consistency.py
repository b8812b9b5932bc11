"""Do all ranks hold the same weights? They must, to the last bit, at every point of a run.

Each layer is reduced to a 64-bit number and the numbers are compared. A layer's number is
Σ bitsᵢ · Mⁱ mod 2⁶⁴ over its elements in order, with the bits of a float32 as an integer. M is odd,
so that a change of one element always shows; M ≡ 5 (mod 8), so that two unequal elements that have
changed places always show too (their difference has at most 31 factors of two, and M^k − 1 has
2 + those of k), in layers of less than 2³⁰ elements. Any other difference goes unseen with a chance
of about 2⁻⁶⁴.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.comm.base import Communicator, allreduce
from harness.errors import HarnessError

_MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator; 5 mod 8
_CHUNK = 1 << 16  # elements; their products, 8 bytes each, stay in the cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 8
"""Ranks that a message names; of more it gives the number."""


class Divergence(HarnessError):  # noqa: N818 - an event of the job, named as the field names it
    """The ranks' weights or optimizer states are no longer equal."""


class Diverged(HarnessError):  # noqa: N818 - an event of the job, named as the field names it
    """The weights are no longer numbers."""


def digest(model: nn.Module) -> Tensor:
    """One number per parameter, int64 (parameters), in the model's order, on the first parameter's
    device. Buffers are left out: batch norm's statistics are each rank's own."""
    return digest_of(parameter.detach() for parameter in model.parameters())


def digest_of(tensors: Iterable[Tensor]) -> Tensor:
    """One number per tensor, int64 (tensors), from its elements' bits and their order."""
    numbers: list[Tensor] = []
    weights: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        if tensor.device not in weights:
            weights[tensor.device] = _powers(_MULTIPLIER, _CHUNK).to(tensor.device)
        numbers.append(_digest(tensor, weights[tensor.device]))
    if not numbers:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def check_equal(
    model: nn.Module, optimizer: Optimizer | None, comm: Communicator, update: int
) -> None:
    """Compare the weights of all ranks, and the optimizer's state if one is given. Collective.

    Raises Divergence, the same on every rank, if they differ. ``update``: the last one that they
    have all made, for the message.
    """
    names, numbers = _numbers(model, optimizer)
    table = torch.zeros(comm.size, len(names), dtype=torch.int64)
    table[comm.rank] = numbers
    allreduce(comm, table, "consistency")
    differing = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
    if differing:
        first = differing[0]
        ranks = _name_ranks(table[:, first].tolist())
        more = f" ({len(differing)} of {len(names)} tensors differ)" if len(differing) > 1 else ""
        raise Divergence(
            f"after update {update} the weights differ between ranks: first in {names[first]}, "
            f"where {ranks}{more}. Go on from the last checkpoint with --resume. If it happens "
            "again, look for faulty memory and for another processor or build of torch on the "
            "hosts of these ranks (provenance.json), and in a model or optimizer of your own for "
            "anything that changes weights on one rank only"
        )


def check_finite(model: nn.Module, optimizer: Optimizer, update: int) -> None:
    """Raise Diverged if a trained weight or its optimizer's state is inf or NaN: from a checkpoint
    with that no run could go on. The same on all ranks, as their weights are."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    named = [(name, [parameter.detach()]) for name, parameter in trained]
    named += [
        (f"the optimizer's state of {name}", list(optimizer.state.get(parameter, {}).values()))
        for name, parameter in trained
    ]
    for name, values in named:
        tensors = (value for value in values if isinstance(value, Tensor))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise Diverged(
                f"after update {update} there is an inf or NaN in {name}, so no checkpoint was "
                "written of it; the newest one is from before. The run has diverged: go on from "
                "there with a lower lr.base, or warm up for longer"
            )


def _numbers(model: nn.Module, optimizer: Optimizer | None) -> tuple[list[str], Tensor]:
    """Names and digests, as many on every rank whatever the optimizer holds there."""
    named = list(model.named_parameters())
    names, numbers = [name for name, _ in named], digest(model).cpu()
    if optimizer is None:
        return names, numbers
    states = []
    for _, parameter in named:
        held = optimizer.state.get(parameter, {})
        tensors = [held[key] for key in sorted(held) if isinstance(held[key], Tensor)]
        # A number of the numbers, so that each parameter has one: 0 for a state of no tensors.
        states.append(_digest(digest_of(tensors), _powers(_MULTIPLIER, _CHUNK)).cpu())
    return (
        [*names, *(f"the optimizer's state of {name}" for name in names)],
        torch.cat([numbers, torch.stack(states)]),
    )


def _digest(tensor: Tensor, weights: Tensor) -> Tensor:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = plain.detach().contiguous().reshape(-1).view(_INTEGERS[plain.element_size()])
    chunks = torch.split(bits, len(weights))
    sums = torch.stack([(chunk.long() * weights[: len(chunk)]).sum() for chunk in chunks])
    shift = pow(_MULTIPLIER, len(weights), 1 << 64)
    return sums.mul_(_powers(shift, len(sums)).to(sums.device)).sum()


def _powers(base: int, count: int) -> Tensor:
    """base⁰, base¹, … mod 2⁶⁴ as int64 (count,), which wraps around."""
    signed = base - (1 << 64) if base >= 1 << 63 else base
    factors = torch.full((count,), signed, dtype=torch.int64)
    factors[:1] = 1
    return factors.cumprod(0)


def _name_ranks(numbers: Sequence[int]) -> str:
    """Which ranks stand against which: the most frequent number is taken to be the right one, the
    lowest rank's among several."""
    usual, count = Counter(numbers).most_common(1)[0]  # of equal counts, the first to be met
    if len(numbers) == 2:
        return "the two ranks differ"
    if count == 1:
        return f"all {len(numbers)} ranks differ from each other"
    others = [rank for rank, number in enumerate(numbers) if number != usual]
    shown = [str(rank) for rank in others[:_NAMED]]
    if len(others) > _NAMED:
        who = f"{len(others)} ranks ({', '.join(shown)}, …) differ"
    elif len(others) == 1:
        who = f"rank {shown[0]} differs"
    else:
        who = f"ranks {', '.join(shown[:-1])} and {shown[-1]} differ"
    return f"{who} from the other {count}"
