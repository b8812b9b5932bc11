"""The reducer's laws over ranks: however a batch is cut, the gradient is that of one big batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import WITHOUT_EXPLANATION, ThreadCommunicator, run_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harness.buckets import fill_buckets
from harness.comm import SoloCommunicator
from harness.reducer import GradientReducer, Reduced

HIDDEN, CLASSES, WORDS = 12, 3, 5


@dataclass(frozen=True)
class Shape:
    """What is odd about a graph."""

    widths: tuple[int, ...] = (4,)
    repeats: int = 1
    """How often the shared layer is passed."""
    skip: bool = False
    tied: bool = False
    """The embedding is used a second time, densely."""
    rare: bool = False
    """A layer that only samples with a flag reach."""
    idle: bool = False
    """A layer that nothing reaches."""
    frozen: bool = False
    late: bool = False
    """A layer that is frozen when the reducer is there already."""
    empty: bool = False
    """A parameter without elements, which is left to autograd."""


shapes = st.builds(
    Shape,
    widths=st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
    repeats=st.integers(1, 3),
    **{name: st.booleans() for name in ("skip", "tied", "rare", "idle", "frozen", "late", "empty")},
)


class Odd(nn.Module):
    """A small smooth model of (images, words, flags)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.words = nn.Embedding(WORDS, HIDDEN, sparse=True)
        self.idle = nn.Linear(2, 2) if shape.idle else None
        self.rare = nn.Linear(HIDDEN, HIDDEN) if shape.rare else None
        self.frozen = nn.Linear(HIDDEN, HIDDEN).requires_grad_(not shape.frozen)
        self.late = nn.Linear(HIDDEN, HIDDEN)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.zeros(0, 3)) if shape.empty else None
        sizes = (HIDDEN, *shape.widths)
        self.chain = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.shared = nn.Linear(sizes[-1], sizes[-1])
        self.head = nn.Linear(sizes[-1], CLASSES)

    def forward(self, images: Tensor, words: Tensor, flags: Tensor) -> Tensor:
        h = self.conv(images).flatten(1) + self.words(words).sum(1)
        if self.empty is not None:
            h = h + self.empty.sum()
        h = torch.tanh(self.late(torch.tanh(self.frozen(h))) * self.scale)
        if self.rare is not None and bool(flags.any()):
            h = h + flags * self.rare(h)
        tied = h @ self.words.weight.T if self.shape.tied else None
        for layer in self.chain:
            before, h = h, torch.tanh(layer(h))
            if self.shape.skip and before.shape == h.shape:
                h = before + h
        for _ in range(self.shape.repeats):
            h = torch.tanh(self.shared(h))
        logits: Tensor = self.head(h)
        return logits if tied is None else logits + tied[:, :CLASSES]


def odd(shape: Shape, seed: int) -> Odd:
    torch.manual_seed(seed)
    return Odd(shape)


@dataclass
class Samples:
    images: Tensor
    words: Tensor
    flags: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, count: int, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        return cls(
            torch.randn(count, 2, 4, 4, generator=generator),
            torch.randint(0, WORDS, (count, 2), generator=generator),
            (torch.rand(count, 1, generator=generator) < 0.15).float(),
            torch.randint(0, CLASSES, (count,), generator=generator),
        )

    def split(self, sizes: Sequence[int]) -> list[Samples]:
        columns = (self.images, self.words, self.flags, self.labels)
        return [Samples(*part) for part in zip(*(c.split(sizes) for c in columns), strict=True)]

    def loss(self, model: nn.Module, of: int) -> Tensor:
        """The samples' part of the mean loss over ``of`` samples."""
        dtype = next(model.parameters()).dtype
        logits = model(self.images.to(dtype), self.words, self.flags.to(dtype))
        return functional.cross_entropy(logits, self.labels, reduction="sum") / of


@dataclass(frozen=True)
class Cut:
    """A batch as micro-batches, each of a number of samples, each some rank's."""

    ranks: int
    pieces: tuple[tuple[int, int], ...]
    """(samples, rank) of each micro-batch."""

    def of(self, parts: Sequence[Any], rank: int) -> list[Any]:
        return [part for part, (_, owner) in zip(parts, self.pieces, strict=True) if owner == rank]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    ranks = draw(st.integers(1, 4))
    piece = st.tuples(st.integers(1, 6), st.integers(0, ranks - 1))
    return Cut(ranks, tuple(draw(st.lists(piece, min_size=1, max_size=6))))


Gradients = dict[str, Tensor | None]


def gradients_of(model: nn.Module) -> Gradients:
    return {
        name: None if p.grad is None else p.grad.to_dense().clone()
        for name, p in model.named_parameters()
        if p.numel()
    }


def true_gradients(model: nn.Module, parts: Sequence[Samples], of: int) -> Gradients:
    """In float64, of the parts taken together."""
    exact = copy.deepcopy(model).double()
    for part in parts:
        part.loss(exact, of).backward()
    return gradients_of(exact)


@dataclass
class Seen:
    """One rank's last update."""

    gradients: Gradients
    reduced: Reduced
    calls: list[str]
    early: list[str]
    """The calls before the last micro-batch."""
    exponents: list[int | None]
    """Those with which the update went out."""


def reduce_on(
    comm: ThreadCommunicator,
    model: nn.Module,
    parts: Sequence[Samples],
    of: int,
    codec: str,
    bucket_bytes: int,
    prepare: Callable[[nn.Module], object] = lambda model: None,
) -> Seen:
    """Updates with always the same samples until they have gone out in fp16 and been finite."""
    compression: Any = "none" if codec == "exact" else codec
    summation: Literal["float", "exact"] = "exact" if codec == "exact" else "float"
    reducer = GradientReducer(model, comm, compression, bucket_bytes, summation)
    prepare(model)
    for update in range(6):
        exponents = reducer.state_dict()["exponents"]
        before = len(comm.calls)
        early: list[str] = []
        reducer.start(len(parts), micro_norms=True)
        for part in parts:
            early = comm.calls[before:]
            reducer.backward(part.loss(model, of))
        reduced = reducer.finish([float(comm.rank + 1), 0.5])
        if reduced.finite and update:
            break
    reducer.close()
    return Seen(gradients_of(model), reduced, comm.calls[before:], early, exponents)


def freeze_late(model: nn.Module) -> None:
    assert isinstance(model, Odd)
    if model.shape.late:
        model.late.requires_grad_(False)


@settings(max_examples=30, phases=WITHOUT_EXPLANATION)
@pytest.mark.parametrize("codec", ["none", "exact", "fp16", "fp16_feedback"])
@given(
    shape=shapes,
    cut=cuts(),
    seed=st.integers(0, 2**20),
    bucket_bytes=st.sampled_from([1, 100, 700, 1 << 20]),
)
def test_the_gradient_is_that_of_one_big_batch(
    codec: str, shape: Shape, cut: Cut, seed: int, bucket_bytes: int
) -> None:
    model = odd(shape, seed)
    total = sum(size for size, _ in cut.pieces)
    samples = Samples.draw(total, seed)
    parts = samples.split([size for size, _ in cut.pieces])
    models = [copy.deepcopy(model) for _ in range(cut.ranks)]
    seen = run_ranks(
        cut.ranks,
        lambda comm: reduce_on(
            comm,
            models[comm.rank],
            cut.of(parts, comm.rank),
            total,
            codec,
            bucket_bytes,
            freeze_late,
        ),
    )
    buckets = fill_buckets(model, bucket_bytes)
    freeze_late(model)
    big = true_gradients(model, [samples], total)
    by_rank = [true_gradients(model, cut.of(parts, rank), total) for rank in range(cut.ranks)]
    norm = math.sqrt(sum(float(g.square().sum()) for g in big.values() if g is not None))

    assert seen[0].reduced.finite
    scales = scale_of(buckets, seen[0].exponents)
    for name, expected in big.items():
        ours = seen[0].gradients[name]
        assert (ours is None) == (expected is None), name
        if ours is None or expected is None:
            continue
        allowed = torch.full_like(expected, 1e-6 * norm + 1e-9)
        if scales.get(name) is not None:
            # Each rank's cast and each addition rounds by a part of 2^11, or by half the smallest
            # subnormal; error feedback adds what the last update has left.
            magnitude = sum(g[name].abs() for g in by_rank if g[name] is not None)
            rounding = cut.ranks * (2.0**-11 * magnitude + 2.0**-25 / scales[name])
            allowed += 1.01 * rounding * (2 if codec == "fp16_feedback" else 1)
        assert ((ours.double() - expected).abs() <= allowed).all(), name

    names = [f"bucket.{index}" for index in range(len(buckets))]
    found = [g.double() for g in seen[0].gradients.values() if g is not None]
    squares = [piece_norm2(model, part, total) for part in parts]
    for rank, one in enumerate(seen):
        for name, gradient in one.gradients.items():
            first = seen[0].gradients[name]
            assert (gradient is None) == (first is None)
            assert gradient is None or torch.equal(gradient, first), "bitwise equal on all ranks"
        assert one.reduced.extras == [sum(range(1, cut.ranks + 1)), 0.5 * cut.ranks]
        assert one.reduced.grad_norm == pytest.approx(
            math.sqrt(sum(float(g.square().sum()) for g in found)), rel=1e-6
        )
        assert one.reduced.micro_norm2 == pytest.approx(sum(squares), rel=1e-5)
        assert one.calls == [*names, "extras"], rank
        assert one.early == [], "nothing may be sent before the last micro-batch"


def scale_of(buckets: Sequence[Any], exponents: Sequence[int | None]) -> dict[str, Any]:
    """What each parameter's gradient was multiplied by; None if it went as it is."""
    return {
        name: None if exponent is None else 2.0**exponent
        for bucket, exponent in zip(buckets, exponents, strict=True)
        for name in bucket.names
    }


def piece_norm2(model: nn.Module, part: Samples, of: int) -> float:
    gradients = true_gradients(model, [part], of)
    return sum(float(g.square().sum()) for g in gradients.values() if g is not None)


@settings(max_examples=15, phases=WITHOUT_EXPLANATION)
@given(shape=shapes, cut=cuts(), seed=st.integers(0, 2**20))
def test_exact_sums_are_the_same_bits_however_the_batch_is_dealt(
    shape: Shape, cut: Cut, seed: int
) -> None:
    """The micro-batches stay; which rank has them, in which order, and in which buckets does not
    matter."""
    model = odd(shape, seed)
    total = sum(size for size, _ in cut.pieces)
    parts = Samples.draw(total, seed).split([size for size, _ in cut.pieces])
    results = []
    for dealt, order, bucket_bytes in (
        (cut, 1, 100),
        (Cut(1, tuple((size, 0) for size, _ in cut.pieces)), -1, 1 << 20),
    ):
        models = [copy.deepcopy(model) for _ in range(dealt.ranks)]

        def act(
            comm: ThreadCommunicator,
            models: list[Any] = models,
            dealt: Cut = dealt,
            order: int = order,
            bucket_bytes: int = bucket_bytes,
        ) -> Gradients:
            mine = dealt.of(parts, comm.rank)[::order]
            return reduce_on(comm, models[comm.rank], mine, total, "exact", bucket_bytes).gradients

        results.append(run_ranks(dealt.ranks, act)[0])
    for name, gradient in results[0].items():
        other = results[1][name]
        assert (gradient is None) == (other is None)
        assert gradient is None or torch.equal(gradient, other), name


def test_a_gradient_on_some_ranks_only_is_their_sum_and_one_on_none_is_none() -> None:
    """Rank 1 of 3 alone has the flag; the flag's layer is in a bucket of its own or with others."""
    for bucket_bytes in (1, 1 << 20):
        model = odd(Shape(rare=True, idle=True), 0)
        parts = Samples.draw(9, 0).split([3, 3, 3])
        for rank, part in enumerate(parts):
            part.flags.fill_(float(rank == 1))
        models = [copy.deepcopy(model) for _ in range(3)]
        seen = run_ranks(
            3,
            lambda comm, models=models, parts=parts, size=bucket_bytes: reduce_on(
                comm, models[comm.rank], [parts[comm.rank]], 9, "none", size
            ),
        )
        alone = true_gradients(model, [parts[1]], 9)["rare.weight"]
        assert alone is not None
        for one in seen:
            ours = one.gradients["rare.weight"]
            assert ours is not None
            assert torch.allclose(ours.double(), alone, rtol=1e-5, atol=1e-8)
            assert one.gradients["idle.weight"] is None


def test_presence_is_of_the_whole_update_and_is_forgotten_by_the_next() -> None:
    """Used in an earlier micro-batch only it has a gradient; in an update that does not use it, it
    has none, whatever the last one left in its bucket."""
    model = odd(Shape(rare=True), 0)
    reducer = GradientReducer(model, SoloCommunicator())
    first, second = Samples.draw(6, 0).split([3, 3])
    first.flags.fill_(1.0)
    second.flags.fill_(0.0)
    for parts, used in (([first, second], True), ([second, second], False), ([second], False)):
        reducer.start(len(parts))
        for part in parts:
            reducer.backward(part.loss(model, 6))
        reduced = reducer.finish()
        assert model.rare is not None
        assert (model.rare.weight.grad is not None) == used
        expected = true_gradients(model, parts, 6)
        for name, gradient in gradients_of(model).items():
            wanted = expected[name]
            assert (gradient is None) == (wanted is None), name
            assert gradient is None or torch.allclose(
                gradient.double(), wanted, rtol=1e-4, atol=1e-6
            )
        squares = sum(float(g.square().sum()) for g in expected.values() if g is not None)
        assert reduced.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_presence_of_many_parameters(ranks: int) -> None:
    """More than one number has room for, and each with its own ranks."""
    count = 150

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(count))

    def users(index: int) -> list[int]:
        return [rank for rank in range(ranks) if (index * 7 + rank * 3) % 5 < 2 and index % 4]

    models = [Many() for _ in range(ranks)]

    def act(comm: ThreadCommunicator) -> list[float | None]:
        model = models[comm.rank]
        reducer = GradientReducer(model, comm, bucket_bytes=40)
        used = [w for i, w in enumerate(model.weights) if comm.rank in users(i)]
        reducer.start(1 if used else 0)
        if used:
            reducer.backward(torch.cat(list(used)).sum() * (comm.rank + 1))
        reducer.finish()
        return [None if w.grad is None else float(w.grad) for w in model.weights]

    wanted = [sum(r + 1 for r in users(i)) if users(i) else None for i in range(count)]
    assert run_ranks(ranks, act) == [wanted] * ranks


def test_buckets_go_out_while_backward_still_runs() -> None:
    """When the gradient gets to the first layer, the last one's bucket has long been sent."""
    torch.manual_seed(0)
    models = [nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))) for _ in range(2)]

    def act(comm: ThreadCommunicator) -> list[list[str]]:
        model = models[comm.rank]
        reducer = GradientReducer(model, comm, bucket_bytes=8 * 9 * 4)
        before: list[list[str]] = []
        for layer in model:
            layer.register_full_backward_pre_hook(
                lambda *_: before.append([n for n in comm.calls if n.startswith("bucket")])
            )
        reducer.start(2)
        for _ in range(2):
            reducer.backward(model(torch.ones(3, 8, requires_grad=True)).sum())
        reducer.finish()
        return before

    for before in run_ranks(2, act):
        sent = [[f"bucket.{i}" for i in range(count)] for count in range(5)]
        assert before == [[]] * 5 + sent


def test_gradients_lie_in_memory_as_their_parameters_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, (1, 3)), nn.Conv2d(4, 2, 1), nn.Flatten()
    ).to(memory_format=torch.channels_last)
    transposed = nn.Linear(2 * 6 * 4, 3)
    transposed.weight = nn.Parameter(torch.randn(48, 3).T)
    model.append(transposed)
    x = torch.randn(4, 3, 8, 8)
    exact = copy.deepcopy(model).double()
    exact(x.double()).square().sum().backward()
    reducer = GradientReducer(model, SoloCommunicator(), bucket_bytes=1 << 20)
    for _ in range(2):
        reducer.start(1)
        reducer.backward(model(x).square().sum())
        reducer.finish()
    strided = 0
    for (name, parameter), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        gradient = parameter.grad
        assert gradient is not None
        assert wanted.grad is not None
        assert torch.allclose(gradient.double(), wanted.grad, rtol=1e-4, atol=1e-4), name
        assert significant_strides(gradient) == significant_strides(parameter), name
        strided += not parameter.is_contiguous()
    assert strided == 3, "a test of strides needs some"


def significant_strides(tensor: Tensor) -> list[int]:
    """A dimension of one element may have any stride."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


@pytest.mark.parametrize("missing", [0, 1])
def test_an_update_without_any_micro_batch_on_a_rank_is_the_others(missing: int) -> None:
    model = odd(Shape(), 3)
    part = Samples.draw(4, 3)
    models = [copy.deepcopy(model) for _ in range(2)]

    def act(comm: ThreadCommunicator) -> Seen:
        mine = [] if comm.rank == missing else [part]
        return reduce_on(comm, models[comm.rank], mine, 4, "none", 100)

    expected = true_gradients(model, [part], 4)
    for one in run_ranks(2, act):
        for name, gradient in one.gradients.items():
            wanted = expected[name]
            assert gradient is not None
            assert wanted is not None
            assert torch.allclose(gradient.double(), wanted, rtol=1e-4, atol=1e-7)


# Checkpointing of activations


class Checkpointed(nn.Module):
    """A shared block used twice; with reentrant checkpoints its gradient comes in two goes."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(4, 4)
        self.shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.middle = nn.Linear(4, 4)

    def block(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.shared(x)
        result: Tensor = checkpoint(self.shared, x, use_reentrant=self.reentrant)
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.middle(self.block(self.first(x))))


def checkpointed(reentrant: bool | None) -> Checkpointed:
    torch.manual_seed(1)
    return Checkpointed(reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_checkpointing_is_right_or_says_what_to_do(
    reentrant: bool, bucket_bytes: int, micro_batches: int
) -> None:
    """Never a gradient that misses a part: where a bucket has left too early, that is an error."""
    x = torch.randn(micro_batches, 5, 4, generator=torch.Generator().manual_seed(0))
    plain = checkpointed(None)
    for piece in x:
        plain(piece).square().sum().backward()
    model = checkpointed(reentrant)
    reducer = GradientReducer(model, SoloCommunicator(), bucket_bytes=bucket_bytes)
    failed = None
    for _ in range(2):
        reducer.start(micro_batches)
        try:
            for piece in x:
                reducer.backward(model(piece).square().sum())
        except RuntimeError as error:
            failed = str(error)
            break
        reducer.finish()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    if failed is not None:
        assert reentrant
        assert "use torch.utils.checkpoint with use_reentrant=False" in failed
    elif reentrant:
        assert bucket_bytes == 1 << 20, "of several buckets one leaves too early"
