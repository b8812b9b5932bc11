"""The reducer on one rank: sums, compression, exactness, odd models. Ranks: tests/parallel."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.comm import SoloCommunicator
from harness.compression import Compression
from harness.errors import HarnessError
from harness.reducer import GradientReducer, Reduced


class Recorder(SoloCommunicator):
    """Notes the order in which tensors are handed over."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def allreduce_async(self, tensor: Tensor, name: str) -> None:
        self.names.append(name)


class Doubling(SoloCommunicator):
    """Behaves as two ranks with equal gradients would: every sum is twice what goes in."""

    size = 2

    def allreduce_async(self, tensor: Tensor, name: str) -> None:
        tensor.mul_(2)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def batch(samples: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, 6, generator=generator),
        torch.randint(0, 3, (samples,), generator=generator),
    )


def run_update(
    model: nn.Module,
    reducer: GradientReducer,
    cuts: list[int],
    extras: tuple[float, ...] = (),
    micro_norms: bool = False,
) -> Reduced:
    images, labels = batch(sum(cuts))
    reducer.start(len(cuts), micro_norms)
    for x, y in zip(images.split(cuts), labels.split(cuts), strict=True):
        loss = functional.cross_entropy(model(x), y, reduction="sum")
        reducer.backward(loss / len(labels))
    return reducer.finish(extras)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def reference(samples: int) -> list[Tensor]:
    """Gradient of the mean loss of the whole batch at once, in float64."""
    model = network().double()
    images, labels = batch(samples)
    functional.cross_entropy(model(images.double()), labels).backward()
    return gradients(model)


@pytest.mark.parametrize("cuts", [[40], [7, 7, 7, 7, 7, 5], [1] * 40, [39, 1]])
@pytest.mark.parametrize("summation", ["float", "exact"])
@pytest.mark.parametrize("bucket_bytes", [64, 4 << 20])
def test_micro_batches_add_up_to_the_mean_of_the_batch(
    cuts: list[int], summation: str, bucket_bytes: int
) -> None:
    model = network()
    reducer = GradientReducer(model, SoloCommunicator(), "none", bucket_bytes, summation)
    for _ in range(2):  # a second update starts from zero
        result = run_update(model, reducer, cuts)
    expected = reference(40)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-7)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert result.finite


def test_exact_summation_does_not_depend_on_the_order_of_micro_batches() -> None:
    images, labels = batch(30)
    pieces = list(zip(images.split(4), labels.split(4), strict=True))
    results = {}
    for summation in ("float", "exact"):
        for order in (1, -1):
            model = network()
            reducer = GradientReducer(model, SoloCommunicator(), "none", 4 << 20, summation)
            reducer.start(len(pieces))
            for x, y in pieces[::order]:
                loss = functional.cross_entropy(model(x), y, reduction="sum")
                reducer.backward(loss / 30)
            reducer.finish()
            results[summation, order] = torch.cat([g.flatten() for g in gradients(model)])
    assert torch.equal(results["exact", 1], results["exact", -1])
    # Float sums do depend on it, or this test could not fail.
    assert not torch.equal(results["float", 1], results["float", -1])


def test_buckets_go_out_during_the_last_backward_only_last_layer_first() -> None:
    model, comm = network(), Recorder()
    reducer = GradientReducer(model, comm, "none", bucket_bytes=1)
    images, labels = batch(8)
    reducer.start(2)
    reducer.backward(functional.cross_entropy(model(images), labels))
    assert comm.names == []
    reducer.backward(functional.cross_entropy(model(images), labels))
    assert comm.names == [f"bucket.{i}" for i in range(6)]
    reducer.finish([1.0])
    assert comm.names[6:] == ["extras"]


def test_a_rank_without_micro_batches_joins_every_collective_with_zeros() -> None:
    model, comm = network(), Recorder()
    reducer = GradientReducer(model, comm, "none", bucket_bytes=1)
    reducer.start(0)
    result = reducer.finish([5.0])
    assert sorted(comm.names) == sorted([*(f"bucket.{i}" for i in range(6)), "extras"])
    assert result.extras == [5.0]
    assert result.grad_norm == 0.0
    assert all(not g.any() for g in gradients(model))


@pytest.mark.parametrize("summation", ["float", "exact"])
def test_extras_are_summed_over_ranks(summation: str) -> None:
    model = network()
    reducer = GradientReducer(model, Doubling(), "none", 4 << 20, summation)
    result = run_update(model, reducer, [8], extras=(1.5, 0.0, 7.0))
    assert result.extras == [3.0, 0.0, 14.0]
    for ours, theirs in zip(gradients(model), reference(8), strict=True):
        assert torch.allclose(ours.double(), 2 * theirs, rtol=1e-5, atol=1e-7)


def one_weight() -> tuple[nn.Linear, nn.Parameter]:
    model = nn.Linear(1, 1, bias=False)
    return model, model.weight


@pytest.mark.parametrize("gradient", [40000.0, 1e-7, 1e-12, 3e20, 1.0])
def test_fp16_carries_sums_that_its_own_range_does_not_hold(gradient: float) -> None:
    model, weight = one_weight()
    reducer = GradientReducer(model, Doubling(), "fp16")
    bytes_sent = []
    for _ in range(3):
        reducer.start(1)
        reducer.backward((weight * gradient).sum())
        result = reducer.finish()
        bytes_sent.append(result.bytes_sent)
        assert result.finite
        assert weight.grad is not None
        assert weight.grad.item() == pytest.approx(2 * gradient, rel=1e-3)
    # The first update goes in float32, for the scale is not known yet; then half the bytes.
    assert bytes_sent[0] - bytes_sent[1] == 2


def test_fp16_overflow_skips_the_update_and_lowers_the_scale() -> None:
    model, weight = one_weight()
    reducer = GradientReducer(model, Doubling(), "fp16")
    finite = []
    for gradient in (1e-4, 1e3, 1e3, 1e3, 1e3):
        reducer.start(1)
        reducer.backward((weight * gradient).sum())
        finite.append(reducer.finish().finite)
    assert finite[:2] == [True, False]
    assert finite[-1]
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(2e3, rel=1e-3)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("compression", "summation"), [("none", "float"), ("fp16", "float"), ("none", "exact")]
)
def test_a_gradient_that_is_not_finite_is_told(
    bad: float, compression: str, summation: str
) -> None:
    model, weight = one_weight()
    reducer = GradientReducer(model, SoloCommunicator(), compression, 4 << 20, summation)
    finite = []
    for gradient in (1.0, bad, 1.0):
        reducer.start(1)
        reducer.backward((weight * gradient).sum())
        finite.append(reducer.finish().finite)
    assert finite == [True, False, True]


def test_exact_summation_refuses_what_its_integers_cannot_hold() -> None:
    model, weight = one_weight()
    reducer = GradientReducer(model, SoloCommunicator(), "none", 4 << 20, "exact")
    for gradient, expected in ((3000.0, True), (5000.0, False)):
        reducer.start(2)
        for _ in range(2):
            reducer.backward((weight * gradient / 2).sum())
        assert reducer.finish().finite == expected


@pytest.mark.parametrize("summation", ["float", "exact"])
@pytest.mark.parametrize("bucket_bytes", [64, 1 << 20])
def test_norms_of_micro_batches(summation: Literal["float", "exact"], bucket_bytes: int) -> None:
    cuts = [3, 5, 1, 4]
    model = network()
    reducer = GradientReducer(model, SoloCommunicator(), "none", bucket_bytes, summation)
    images, labels = batch(sum(cuts))
    alone = 0.0
    for x, y in zip(images.split(cuts), labels.split(cuts), strict=True):
        single = network().double()
        functional.cross_entropy(single(x.double()), y, reduction="sum").div(13).backward()
        alone += sum(float(g.square().sum()) for g in gradients(single))
    for _ in range(2):  # a second update starts anew
        reduced = run_update(model, reducer, cuts, extras=(2.5,), micro_norms=True)
        assert reduced.micro_norm2 == pytest.approx(alone, rel=1e-5)
        assert reduced.extras == [2.5]
    wanted = math.sqrt(sum(float(g.square().sum()) for g in reference(13)))
    assert reduced.grad_norm == pytest.approx(wanted, rel=1e-5)


def test_norms_of_micro_batches_cost_nothing_unless_asked_for() -> None:
    model = network()
    reduced = run_update(model, GradientReducer(model, SoloCommunicator()), [3, 4])
    assert reduced.micro_norm2 is None


def test_the_scale_is_part_of_the_state() -> None:
    def trained(updates: int, state: dict[str, object] | None = None) -> tuple[Tensor, object]:
        model = network()
        reducer = GradientReducer(model, SoloCommunicator(), "fp16", bucket_bytes=64)
        if state is not None:
            reducer.load_state_dict(state)
        for _ in range(updates):
            run_update(model, reducer, [8])
        return torch.cat([g.flatten() for g in gradients(model)]), reducer.state_dict()

    _, state = trained(2)
    resumed, _ = trained(1, state)  # type: ignore[arg-type]
    undisturbed, _ = trained(3)
    fresh, _ = trained(1)
    assert torch.equal(resumed, undisturbed)
    assert not torch.equal(fresh, undisturbed)


def test_unused_frozen_and_shared_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.frozen(self.shared(x)))

    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(5, 4)
    model(x).sum().backward()
    expected = [model.shared.weight.grad.clone(), model.shared.bias.grad.clone()]  # type: ignore[union-attr]
    model.zero_grad()
    reducer = GradientReducer(model, SoloCommunicator(), bucket_bytes=1)
    for _ in range(2):
        reducer.start(1)
        reducer.backward(model(x).sum())
        reducer.finish()
        assert torch.allclose(model.shared.weight.grad, expected[0])  # type: ignore[arg-type]
        assert torch.allclose(model.shared.bias.grad, expected[1])  # type: ignore[arg-type]
        assert model.unused.weight.grad is None
        assert model.frozen.weight.grad is None


@pytest.mark.parametrize("summation", ["float", "exact"])
def test_zero_grad_set_to_none_does_not_lose_the_gradients(summation: str) -> None:
    model = network()
    reducer = GradientReducer(model, SoloCommunicator(), "none", 4 << 20, summation)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        run_update(model, reducer, [5, 3])
        for ours, theirs in zip(gradients(model), reference(8), strict=True):
            assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-7)


def test_micro_batches_are_counted() -> None:
    model = network()
    reducer = GradientReducer(model, SoloCommunicator())
    reducer.start(2)
    loss = functional.cross_entropy(model(batch(4)[0]), batch(4)[1])
    reducer.backward(loss)
    with pytest.raises(RuntimeError, match="1 backward passes short"):
        reducer.finish()
    reducer.backward(functional.cross_entropy(model(batch(4)[0]), batch(4)[1]))
    with pytest.raises(RuntimeError, match="more backward passes"):
        reducer.backward(loss)


def test_a_second_reducer_may_follow_the_first_on_the_same_model() -> None:
    model = network()
    first = GradientReducer(model, SoloCommunicator())
    run_update(model, first, [8])
    first.close()
    second = GradientReducer(model, SoloCommunicator())
    run_update(model, second, [8])
    for ours, theirs in zip(gradients(model), reference(8), strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-7)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float64|is torch\.float64"):
        GradientReducer(network().double(), SoloCommunicator())
    with pytest.raises(ValueError, match="cannot be compressed"):
        GradientReducer(network(), SoloCommunicator(), "fp16", 4 << 20, "exact")


# ---- gradients that share memory ----------------------------------------------------------------


class Sum(nn.Module):
    """Adds up two parameters: autograd gives both the same memory as their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a.view(-1) + self.b.view(-1)) * x[:, :6]


class Correction(nn.Module):
    """Of w, a view of the gradient that is still on its way back to u and v."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.u, self.v = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 4))
        self.w = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.u @ self.v + self.w.view(6, 4))


class Positions(nn.Module):
    """As a vision transformer adds them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.where, self.what = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = self.where.unsqueeze(0) + self.what.unsqueeze(0)
        return self.head(torch.tanh(x + both))  # type: ignore[no-any-return]


@pytest.mark.parametrize("loss_scale", [1.0, 256.0])
@pytest.mark.parametrize("bucket_bytes", [1, 4 << 20])
@pytest.mark.parametrize("compression", ["none", "fp16", "fp16_feedback"])
@pytest.mark.parametrize("kind", [Sum, Correction, Positions])
def test_gradients_that_share_memory(
    kind: type[nn.Module], compression: Compression, bucket_bytes: int, loss_scale: float
) -> None:
    """From the second update on fp16 scales what it sends."""
    model, plain = kind(), kind()
    reducer = GradientReducer(model, SoloCommunicator(), compression, bucket_bytes)
    images, _ = batch(3)
    plain(images).square().sum().backward()
    for _ in range(3):
        reducer.start(2, loss_scale=loss_scale)
        for part in images.split([1, 2]):
            reducer.backward(model(part).square().sum())
        reducer.finish()
        for found, wanted in zip(gradients(model), gradients(plain), strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
        reducer.start(1, loss_scale=loss_scale)
        reducer.backward(model(images).square().sum())
        reducer.finish()
        for found, wanted in zip(gradients(model), gradients(plain), strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


# ---- misuse, and what changes on the way --------------------------------------------------------


class Waiting(SoloCommunicator):
    """Counts what is under way."""

    def __init__(self) -> None:
        self.under_way: set[str] = set()

    def allreduce_async(self, tensor: Tensor, name: str) -> str:
        assert name not in self.under_way, "Horovod refuses a second one of the same name"
        self.under_way.add(name)
        return name

    def wait(self, handle: str) -> None:
        self.under_way.remove(handle)


@pytest.mark.parametrize("compression", ["none", "fp16", "fp16_feedback"])
def test_an_update_that_is_given_up_leaves_nothing_behind(compression: Compression) -> None:
    comm, model = Waiting(), network()
    reducer = GradientReducer(model, comm, compression, bucket_bytes=1)
    reference = run_update(model, reducer, [3, 2]).grad_norm
    wanted = gradients(model)
    images, _ = batch(5)
    reducer.start(1)
    reducer.backward(1000 * model(images).square().sum())
    assert comm.under_way
    tolerance = 1e-6 if compression == "none" else 2e-2
    again = run_update(model, reducer, [3, 2])
    assert again.grad_norm == pytest.approx(reference, rel=tolerance)
    if compression == "none":
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))
    assert not comm.under_way


def test_two_reducers_under_way_have_names_of_their_own() -> None:
    comm, models = Waiting(), (network(0), network(1))
    reducers = [GradientReducer(m, comm, name=f"m{i}") for i, m in enumerate(models)]
    images, _ = batch(4)
    for reducer, model in zip(reducers, models, strict=True):
        reducer.start(1)
        reducer.backward(model(images).square().sum())
    for reducer in reducers:
        assert reducer.finish().finite


def test_finish_without_start_is_an_error() -> None:
    reducer = GradientReducer(network(), SoloCommunicator())
    with pytest.raises(RuntimeError, match=r"finish\(\) without start\(\)"):
        reducer.finish()
    run_update(network(), GradientReducer(network(), SoloCommunicator()), [])
    reducer.start(0)
    reducer.finish()
    with pytest.raises(RuntimeError, match=r"finish\(\) without start\(\)"):
        reducer.finish()


def test_a_parameter_that_is_unfrozen_later_is_an_error() -> None:
    model = network()
    model[0].requires_grad_(False)
    reducer = GradientReducer(model, SoloCommunicator())
    run_update(model, reducer, [2, 2])
    model[0].weight.requires_grad_(True)
    with pytest.raises(HarnessError, match=r"0\.weight was frozen when training began"):
        run_update(model, reducer, [4])


def test_a_parameter_that_is_frozen_later_has_no_gradient() -> None:
    model = network()
    reducer = GradientReducer(model, SoloCommunicator())
    run_update(model, reducer, [4])
    model[0].requires_grad_(False)
    run_update(model, reducer, [2, 2])
    assert [p.grad is None for p in model.parameters()] == [True, True, *4 * [False]]


@pytest.mark.parametrize("bucket_bytes", [1, 4 << 20])
def test_the_limit_of_exact_sums_does_not_depend_on_the_buckets(bucket_bytes: int) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    reducer = GradientReducer(model, SoloCommunicator(), "none", bucket_bytes, "exact")
    for size, problem in ((4000.0, None), (4100.0, "gradients may add up to 4100")):
        reducer.start(1)
        reducer.backward(sum((size * p).sum() for p in model.parameters()))  # type: ignore[arg-type]
        found = reducer.finish().problem
        assert found is None if problem is None else problem in str(found)
    reducer.start(1)
    reducer.backward(sum((math.nan * p).sum() for p in model[:3].parameters()))  # type: ignore[arg-type]
    assert reducer.finish().problem == "a gradient is inf or NaN"


@pytest.mark.parametrize(
    "setting",
    [{"compression": "bf16"}, {"compression": "FP16"}, {"summation": "exakt"}],
    ids=str,
)
def test_settings_that_are_not_known_are_refused(setting: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        GradientReducer(network(), SoloCommunicator(), **setting)  # type: ignore[arg-type]


def test_a_model_without_trainable_parameters_can_be_scaled() -> None:
    model = network().requires_grad_(False)
    reducer = GradientReducer(model, SoloCommunicator())
    reducer.start(0)
    assert reducer.finish().grad_norm == 0
    reducer.scale_gradients(0.5)


def test_a_micro_batch_without_samples_adds_nothing() -> None:
    wanted = reference(5)
    for order in ((None, 5), (5, None), (2, None, 3)):
        model = network()
        reducer = GradientReducer(model, SoloCommunicator(), bucket_bytes=64)
        images, labels = batch(5)
        reducer.start(len(order))
        at = 0
        for count in order:
            if count is None:
                reducer.backward(None)
                continue
            part = slice(at, at + count)
            at += count
            loss = functional.cross_entropy(model(images[part]), labels[part], reduction="sum")
            reducer.backward(loss / 5)
        assert reducer.finish().finite
        for found, right in zip(gradients(model), wanted, strict=True):
            torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
