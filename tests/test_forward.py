"""From a micro-batch to its loss: what the configuration may change, and what it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from harness.data.datasets import CPU, Batch
from harness.errors import ConfigError, HarnessError
from harness.forward import ForwardPass
from harness.schema import Config


def config(**train: Any) -> Config:
    return Config.model_validate(
        {
            "name": "one",
            "data": {"dataset": "digits"},
            "model": {"name": "lenet5"},
            "batch": {"initial": 6},
            "lr": {"base": 0.01},
            "train": {"duration": "1ep", **train},
        }
    )


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return Batch(images, torch.randint(0, 5, (size,), generator=generator))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_loss_is_summed_and_smoothed(smoothing: float) -> None:
    content = batch()
    found = ForwardPass(net(), config(label_smoothing=smoothing), 5, CPU).loss(content)
    logits = net()(content.images)
    target = torch.full((6, 5), smoothing / 5)
    target[torch.arange(6), content.labels] += 1 - smoothing
    torch.testing.assert_close(found, -(target * logits.log_softmax(1)).sum())
    assert smoothing or torch.equal(found, cross_entropy(logits, content.labels, reduction="sum"))


@pytest.mark.parametrize(
    ("train", "tolerance"),
    [({"channels_last": True}, 1e-5), ({"precision": "bf16"}, 3e-2), ({"precision": "fp16"}, 3e-3)],
    ids=str,
)
def test_other_ways_to_compute_are_near(train: dict[str, Any], tolerance: float) -> None:
    plain = ForwardPass(net(), config(), 5, CPU).loss(batch())
    model = net()
    if "channels_last" in train:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = ForwardPass(model, config(**train), 5, CPU).loss(batch())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=0)
    found.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_batch_norm_of_one_value_is_a_message() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 5))
    forward = ForwardPass(model, config(), 5, CPU)
    forward.loss(batch(2))
    with pytest.raises(
        HarnessError, match=r"batch norm cannot train on a micro-batch of 1 .*micro"
    ):
        forward.loss(batch(1))


def test_an_error_of_the_model_stays_what_it_is() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("my own")

    with pytest.raises(ValueError, match="my own"):
        ForwardPass(Odd(), config(), 5, CPU).loss(batch())


def test_what_are_no_logits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"returns \(6, 5\) for a micro-batch of 6"):
        ForwardPass(net(), config(), 7, CPU).loss(batch())


def test_compiling_needs_a_compiler(monkeypatch: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler on PATH"):
        ForwardPass(net(), config(compile=True), 5, CPU)
