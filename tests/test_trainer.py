"""The trainer in one process: exact coverage, exact resume at any update, records, divergence."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.checkpoint import load_state, newest_valid
from harness.comm import SoloCommunicator
from harness.config import check_trainable, load_config
from harness.data.augment import Affine
from harness.data.datasets import ImageData, ImageSplit
from harness.errors import HarnessError, StoppedEarly, UsageError
from harness.journal import Journal
from harness.lars import LARS
from harness.progress import Silent
from harness.records import Position, RunDirectory, rewind
from harness.schedule.plan import build_plan
from harness.schema import Config
from harness.stop import StopRequest
from harness.trainer import Trainer

SIZE = 53  # prime, so that nothing divides

YAML = """
name: tiny
data: {dataset: digits}
model: {name: lenet5}
batch: {initial: 5, max: 20, micro: 3, growth: {policy: geometric, every: 2ep}}
lr: {base: 0.05, warmup: {kind: gradual, duration: 1ep, start: 0.01}, decay: {kind: poly}}
optimizer: {momentum: 0.9, weight_decay: 0.001, nesterov: true}
comm: {compression: fp16, bucket_mb: 0.001}
train: {duration: 6ep, eval_every: 1ep, checkpoint_every: 1up, log_every: 4, keep_checkpoints: 1000}
"""


class Spy(ImageSplit):
    """Notes which samples of which epoch are asked for."""

    asked: list[tuple[int, int]] = []  # noqa: RUF012 - the tests empty it

    def batch(self, samples: Any, epochs: Any = None, *rest: Any) -> tuple[Tensor, Tensor]:
        if epochs is not None:
            self.asked.extend(zip(epochs.tolist(), samples.tolist(), strict=True))
        return super().batch(samples, epochs, *rest)


def data(seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (SIZE, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (SIZE,), generator=generator)
    Spy.asked = []
    split = Spy(images, labels, (0.5,), (0.3,))
    test = ImageSplit(images[:11], labels[:11], (0.5,), (0.3,))
    return ImageData("tiny", split, test, 4, (1, 8, 8), Affine())


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(108, 4),
    )  # fmt: skip


def config(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "tiny.yaml"
    path.write_text(YAML)
    return load_config(path, overrides)


class StopAfter(StopRequest):
    """Asks to stop at a given update."""

    def __init__(self, update: int) -> None:
        super().__init__()
        self._left = update

    def asked(self) -> bool:
        self._left -= 1
        return self._left <= 0


def go(
    cfg: Config, directory: Path, stop: StopRequest | None = None, resume: bool = False
) -> tuple[Trainer, ImageData]:
    directory.mkdir(exist_ok=True)
    run = RunDirectory(directory)
    state, position = None, Position()
    if resume:
        found = newest_valid(run.checkpoints, lambda *_: None)
        if found is not None:
            state = load_state(found.content, "x")
            position = Position(**state["records"])
    rewind(run, position)
    journal = Journal(run, True, cfg.train.keep_checkpoints, position)
    content = data()
    trainer = Trainer(
        cfg, content, model(), SoloCommunicator(), journal, Silent(), stop or StopRequest()
    )
    if state is not None:
        trainer.load_state_dict(state)
    torch.manual_seed(np.random.default_rng().integers(2**31))  # a resumed process has another
    try:
        trainer.run()
    finally:
        journal.close()
    return trainer, content


def comparable(directory: Path) -> list[dict[str, Any]]:
    drop = {"time", "seconds", "images_per_sec"}
    return [
        {key: value for key, value in json.loads(line).items() if key not in drop}
        for name in ("metrics.jsonl", "events.jsonl")
        for line in (directory / name).read_text().splitlines()
        if '"kind":"stop"' not in line and '"kind":"checkpoint"' not in line
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_weights(a: Trainer, b: Trainer) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours["update"] == theirs["update"]
    momenta = [
        entry["momentum_buffer"]
        for trainer in (ours, theirs)
        for entry in trainer["optimizer"]["state"].values()
    ]
    half = len(momenta) // 2
    return all(
        torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"]
    ) and all(map(torch.equal, momenta[:half], momenta[half:]))


def test_each_epoch_visits_each_sample_exactly_once(tmp_path: Path) -> None:
    _, content = go(config(tmp_path), tmp_path / "run")
    counts = Counter(content.train.asked)  # type: ignore[attr-defined]
    assert counts == Counter((epoch, sample) for epoch in range(6) for sample in range(SIZE))


@pytest.mark.parametrize("epoch_end", ["short", "carry"])
@pytest.mark.parametrize("batch", [1, 7, 53, 60, 160])
def test_coverage_also_with_batches_past_the_data_set(
    batch: int, epoch_end: str, tmp_path: Path
) -> None:
    cfg = config(
        tmp_path,
        f"batch={{initial: {batch}, max: {batch}, micro: 1, epoch_end: {epoch_end}}}",
        "batch.growth.policy=fixed",
        "train={duration: 3ep, checkpoint_every: null}",
    )
    trainer, content = go(cfg, tmp_path / "run")
    counts = Counter(content.train.asked)  # type: ignore[attr-defined]
    assert counts == Counter((epoch, sample) for epoch in range(3) for sample in range(SIZE))
    plan = build_plan(cfg, SIZE).as_dict()
    assert plan["totals"]["updates"] == trainer.clock.updates


def test_the_run_does_what_the_plan_says(tmp_path: Path) -> None:
    cfg = config(tmp_path, "train.log_every=1")
    go(cfg, tmp_path / "run")
    lines = read(tmp_path / "run" / "metrics.jsonl")
    stages = build_plan(cfg, SIZE, ranks=1).stages
    assert [len([x for x in lines if x["stage"] == s.stage]) for s in stages] == [
        s.updates for s in stages
    ]
    for stage in stages:
        mine = [line for line in lines if line["stage"] == stage.stage]
        assert {line["global_batch"] for line in mine} == {stage.global_batch}
        assert (mine[0]["lr"], mine[-1]["lr"]) == (stage.lr_start, stage.lr_end)
        assert mine[-1]["samples_seen"] == stage.end_sample
        assert {line["accumulation"] for line in mine} == {stage.accumulation}


def test_stopped_at_any_update_and_resumed_it_is_the_same_run(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    undisturbed, _ = go(cfg, tmp_path / "whole")
    last = undisturbed.clock.updates
    for update in range(1, last, 3):
        directory = tmp_path / f"stopped-{update}"
        with pytest.raises(StoppedEarly, match=f"after update {update}:"):
            go(cfg, directory, StopAfter(update))
        resumed, _ = go(cfg, directory, resume=True)
        assert same_weights(resumed, undisturbed), update
        assert comparable(directory) == comparable(tmp_path / "whole"), update


MEASURED = {
    "loss": "{policy: loss, optimum: estimate, memory: 20sa, dwell: 30sa}",
    "sampled loss": "{policy: loss, loss: sample, sample: 20, dwell: 4up, limit: 1.5}",
    "full loss": "{policy: loss, loss: full, dwell: 1ep, wait: 2ep}",
    "rolling": "{policy: rolling, memory: 10up, wait: 3up, dwell: 2up}",
    "noise": "{policy: noise, memory: 8up, dwell: 3up, ratio: 4}",
    "plateau": "{policy: plateau, patience: 1, dwell: 40sa}",
}


@pytest.mark.parametrize("policy", MEASURED)
def test_growth_by_measurement_goes_on_as_it_was_from_any_update(
    policy: str, tmp_path: Path
) -> None:
    shrink = "true" if policy in ("noise", "full loss") else "false"
    batch = f"{{initial: 6, max: 24, micro: 3, shrink: {shrink}, growth: {MEASURED[policy]}}}"
    cfg = config(tmp_path, f"batch={batch}", "train.duration=4ep", "lr.scaling=none")
    undisturbed, _ = go(cfg, tmp_path / "whole")
    decisions = [e for e in read(tmp_path / "whole" / "events.jsonl") if e["kind"] == "decision"]
    assert len({e["global_batch"] for e in decisions}) > 1, "a test of growth needs some"
    assert all(e["reason"].startswith(policy.split()[-1]) for e in decisions)
    for update in range(1, undisturbed.clock.updates, 5):
        directory = tmp_path / f"stopped-{update}"
        with pytest.raises(StoppedEarly, match=f"after update {update}:"):
            go(cfg, directory, StopAfter(update))
        resumed, _ = go(cfg, directory, resume=True)
        assert same_weights(resumed, undisturbed), update
        assert comparable(directory) == comparable(tmp_path / "whole"), update


def test_growth_by_measurement_stays_within_the_bounds_of_the_plan(tmp_path: Path) -> None:
    growth = "{policy: noise, memory: 8up, dwell: 20sa, ratio: 100, limit: 1.5}"
    batch = f"{{initial: 6, max: 48, micro: 3, multiple_of: 3, growth: {growth}}}"
    cfg = config(tmp_path, f"batch={batch}", "train={duration: 4ep, log_every: 1}")
    trainer, _ = go(cfg, tmp_path / "run")
    plan = build_plan(cfg, SIZE)
    assert plan.fastest is not None
    fewest, most = (sum(s.updates for s in p.stages) for p in (plan.fastest, plan))
    assert fewest <= trainer.clock.updates <= most
    for line in read(tmp_path / "run" / "metrics.jsonl"):
        before = line["samples_seen"] - 1
        bound = next(s for s in plan.fastest.stages if before < s.end_sample)
        assert 6 <= line["global_batch"] <= bound.global_batch
        assert line["global_batch"] % 3 == 0


@pytest.mark.parametrize(
    "setting", ["data.dataset=fashion-mnist", "data.dataset=cifar10", "data.dataset=imagenet"]
)
def test_what_can_only_be_planned_is_refused_before_it_starts(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can be planned, but this version cannot train"):
        check_trainable(config(tmp_path, setting))


def test_lars_goes_on_as_it_was_from_any_update(tmp_path: Path) -> None:
    optimizer = "{name: lars, weight_decay: 0.001, trust_coefficient: 0.01, momentum: 0.9}"
    cfg = config(tmp_path, f"optimizer={optimizer}", "lr.base=2", "train.duration=3ep")
    undisturbed, _ = go(cfg, tmp_path / "whole")
    assert isinstance(undisturbed._optimizer, LARS)
    for update in range(1, undisturbed.clock.updates, 9):
        directory = tmp_path / f"stopped-{update}"
        with pytest.raises(StoppedEarly, match=f"after update {update}:"):
            go(cfg, directory, StopAfter(update))
        resumed, _ = go(cfg, directory, resume=True)
        assert same_weights(resumed, undisturbed), update


@pytest.mark.slow
def test_killed_after_any_checkpoint_it_is_the_same_run_record_for_record(tmp_path: Path) -> None:
    """Go back to each checkpoint of a finished run: whatever was recorded since is redone once."""
    cfg = config(tmp_path)
    undisturbed, _ = go(cfg, tmp_path / "whole")
    whole = comparable(tmp_path / "whole")
    directory = tmp_path / "again"
    go(cfg, directory)
    for path in sorted((directory / "checkpoints").glob("*.pt"), reverse=True)[1::2]:
        for newer in (directory / "checkpoints").glob("*.pt"):
            if newer.name > path.name:
                newer.unlink()
        with (directory / "metrics.jsonl").open("ab") as metrics:
            metrics.write(b'{"update": 1234, "half a line')
        resumed, _ = go(cfg, directory, resume=True)
        assert same_weights(resumed, undisturbed), path.name
        assert comparable(directory) == whole, path.name


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    cfg = config(tmp_path, "train.checkpoint_every=null")
    undisturbed, _ = go(cfg, tmp_path / "whole")
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("metrics.jsonl", "events.jsonl"):
        whole = (tmp_path / "whole" / name).read_bytes()
        (directory / name).write_bytes(whole[: len(whole) // 2])
    resumed, _ = go(cfg, directory, resume=True)
    assert same_weights(resumed, undisturbed)
    assert comparable(directory) == comparable(tmp_path / "whole")


def test_divergence_ends_the_run_with_advice(tmp_path: Path) -> None:
    cfg = config(tmp_path, "lr={base: 1e30}", "train.checkpoint_every=null")
    with pytest.raises(HarnessError, match=r"has diverged; lower lr\.base"):
        go(cfg, tmp_path / "run")
    events = read(tmp_path / "run" / "events.jsonl")
    assert len([e for e in events if e["kind"] == "skipped_update"]) == 10
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_of_other_data_is_refused(tmp_path: Path) -> None:
    trainer, _ = go(config(tmp_path), tmp_path / "run")
    state = trainer.state_dict()
    with pytest.raises(HarnessError, match="made on 54 training samples"):
        trainer.load_state_dict(state | {"dataset_size": 54})


def test_state_is_read_by_weights_only_loading(tmp_path: Path) -> None:
    trainer, _ = go(config(tmp_path), tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    state = torch.load(newest, weights_only=True)
    assert state["update"] == trainer.clock.updates
    assert {"model", "optimizer"} <= state.keys()


def test_augmentation_can_be_switched_off(tmp_path: Path) -> None:
    losses = {}
    for augment in ("true", "false"):
        cfg = config(tmp_path, f"data.augment={augment}", "train.duration=1ep")
        trainer, _ = go(cfg, tmp_path / augment)
        losses[augment] = replace(trainer._evaluate())
    assert losses["true"] != losses["false"]
