"""The same gradients on real ranks, however an update is cut, and whoever has a gradient at all."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from jobs import (
    Job,
    assert_same_run,
    events,
    harness,
    identical,
    last_state,
    metrics,
    run_arguments,
    weights,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("ranks_available")

MODELS = """
import os

import torch
from torch import nn


def normed(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 36, num_classes))


class rare(nn.Module):
    '''A layer that only the few images with much ink reach.'''

    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Linear(784, 16)
        self.rare = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)
        self.last = nn.Linear(16, num_classes)

    def forward(self, images):
        hidden = torch.tanh(self.first(images.flatten(1)))
        reach = images.mean(dim=(1, 2, 3)) > INK
        if self.training:
            with open(f"reached-{os.environ['OMPI_COMM_WORLD_RANK']}", "a") as file:
                file.write(f"{int(reach.any())}\\n")
        if reach.any():
            hidden = hidden + reach[:, None] * torch.tanh(self.rare(hidden))
        return self.last(hidden)


def drifting(num_classes):
    '''Rank 1 changes its own weights once, in the 12th forward pass.'''
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))
    passes = []

    def spoil(*_):
        passes.append(None)
        if len(passes) == 12 and os.environ["OMPI_COMM_WORLD_RANK"] == "1":
            with torch.no_grad():
                model[1].weight[3, 7] += 1e-3

    model.register_forward_hook(spoil)
    return model
"""

SGD = ("optimizer={name: sgd, momentum: 0.9, weight_decay: 1.0e-4}", "lr={base: 0.05}")
LARS = (
    "optimizer={name: lars, momentum: 0.9, weight_decay: 1.0e-4, trust_coefficient: 0.1}",
    "lr={base: 0.1}",
)
FIXED = ("batch.growth.policy=fixed", "lr.warmup=null", "lr.on_growth=1")
FLOAT = ("comm={compression: none, bucket_mb: 0.002}",)


def run(directory: Path, ranks: int, *overrides: str, resume: bool = False) -> Any:
    """A run of models that lie beside its directory."""
    (directory.parent / "mine.py").write_text(MODELS.replace("INK", "0.17"))
    arguments = run_arguments(directory, ranks, *overrides, resume=resume)
    return harness(*arguments, cwd=directory.parent)


def must_run(directory: Path, ranks: int, *overrides: str, resume: bool = False) -> None:
    done = run(directory, ranks, *overrides, resume=resume)
    assert done.returncode == 0, done.stdout + done.stderr


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative one of a parameter; running statistics are each rank's own."""
    names = [name for name in theirs if "running" not in name and "num_batches" not in name]
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in names)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD, LARS], ids=["sgd", "lars"])
def test_fifty_updates_with_batch_norm_are_the_same_however_they_are_cut(
    optimizer: tuple[str, ...], tmp_path: Path
) -> None:
    """4 micro-batches of 6 for 1, 2 and 4 ranks."""
    settings = (
        "model.name=mine:normed",
        "batch={initial: 24, max: 24, micro: 6}",
        "train={duration: 50up, log_every: 5}",
        *FIXED,
        *FLOAT,
        *optimizer,
    )
    for ranks in (1, 2, 4):
        must_run(tmp_path / str(ranks), ranks, *settings)
    for ranks in (2, 4):
        assert difference(weights(tmp_path / str(ranks)), weights(tmp_path / "1")) < 1e-5, ranks
    lines = {ranks: metrics(tmp_path / str(ranks)) for ranks in (1, 2, 4)}
    assert [lines[ranks][0]["accumulation"] for ranks in (1, 2, 4)] == [4, 2, 1]
    assert lines[1][-1]["loss"] < 0.9 * lines[1][0]["loss"], "it should have learnt something"
    for key in ("loss", "grad_norm", "noise_scale", "distance_from_init"):
        for ranks in (2, 4):
            for ours, theirs in zip(lines[ranks], lines[1], strict=True):
                assert ours[key] == theirs[key] or ours[key] == pytest.approx(
                    theirs[key], rel=1e-3
                ), (key, ranks)


@pytest.mark.slow
def test_error_feedback_goes_on_as_it_was_after_a_kill(tmp_path: Path) -> None:
    settings = (
        "comm={compression: fp16_feedback, bucket_mb: 0.05}",
        "batch={initial: 32, max: 128, micro: 8, growth: {policy: geometric, every: 1ep}}",
        "train={duration: 3ep, checkpoint_every: 7up, log_every: 1, layers_every: 5up}",
        "optimizer.clip_grad_norm=2",
    )
    must_run(tmp_path / "reference", 2, *settings)
    reference = last_state(tmp_path / "reference")
    owed = reference["rank_residuals"]
    assert owed.shape[0] == 2
    assert all(row.any() for row in owed)
    assert not identical(owed[0], owed[1])
    directory = tmp_path / "run"
    for update, victim in ((20, 1), (50, 0)):
        arguments = run_arguments(directory, 2, *settings, resume=update > 20)
        with Job(directory, *arguments, cwd=tmp_path) as job:
            job.wait_for_update(update)
            job.signal_rank(victim, signal.SIGKILL)
            assert job.finish()[0] == 1
    must_run(directory, 2, *settings, resume=True)
    assert_same_run(directory, tmp_path / "reference")
    assert identical(last_state(directory)["rank_residuals"], owed)
    layers = [(path / "layers.jsonl").read_text() for path in (directory, tmp_path / "reference")]
    assert layers[0] == layers[1]


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "fp16_feedback"])
def test_a_layer_that_is_reached_on_one_rank_only(codec: str, tmp_path: Path) -> None:
    """Neither hangs nor changes what is learnt; of fp16 up to its rounding."""
    settings = (
        "model.name=mine:rare",
        "data.augment=false",
        "batch={initial: 8, max: 8, micro: 4}",
        "train={duration: 120up}",
        f"comm={{compression: {codec}, bucket_mb: 0.0001}}",
        *FIXED,
        *SGD,
    )
    found = {}
    for ranks in (1, 2):
        directory = tmp_path / f"with-{ranks}" / "run"
        directory.parent.mkdir()
        must_run(directory, ranks, *settings)
        found[ranks] = weights(directory)
    reached = [(tmp_path / "with-2" / f"reached-{rank}").read_text().split() for rank in (0, 1)]
    pairs = list(zip(*reached, strict=True))
    assert {("0", "0"), ("0", "1"), ("1", "0")} <= set(pairs), "each of them alone, and none"
    assert difference(found[2], found[1]) < (1e-5 if codec == "none" else 1e-2)


@pytest.mark.slow
def test_a_model_that_changes_its_weights_on_one_rank_is_stopped(tmp_path: Path) -> None:
    settings = (
        "model.name=mine:drifting",
        "batch={initial: 8, max: 8, micro: 4}",
        "train={duration: 40up, checkpoint_every: 5up, eval_every: null}",
        *FIXED,
        *SGD,
    )
    done = run(tmp_path / "run", 2, *settings)
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "after update 15 the weights differ between ranks: first in 1.weight" in output
    assert "Traceback" not in output
    assert last_state(tmp_path / "run")["update"] == 10
    assert [event["update"] for event in events(tmp_path / "run", "checkpoint")] == [5, 10]
