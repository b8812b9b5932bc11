"""The trainer in one process, its ranks as threads where it takes several: exact coverage, exact
resume at any update, the same weights on any number of ranks, records, divergence."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threads import ThreadCommunicator, run_ranks
from torch import Tensor, nn

from harness.checkpoint import load_state, newest_valid
from harness.comm import SoloCommunicator
from harness.comm.base import Communicator
from harness.config import load_config
from harness.consistency import Divergence
from harness.data.augment import Affine
from harness.data.datasets import Deferred, ImageData, ImageSplit, Pending
from harness.data.sampler import GlobalBatchSampler
from harness.errors import HarnessError, StoppedEarly
from harness.journal import Journal
from harness.lars import LARS
from harness.progress import Silent
from harness.records import Position, rewind
from harness.rundir import RunDirectory
from harness.schedule.plan import build_plan
from harness.schema import Config, Optimizer
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

    def request(self, samples: Any, epochs: Any, *rest: Any) -> Pending:
        self.asked.extend(zip(epochs.tolist(), samples.tolist(), strict=True))
        return super().request(samples, epochs, *rest)


def data(seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (SIZE, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (SIZE,), generator=generator)
    Spy.asked = []
    split = Spy(images, labels, (0.5,), (0.3,), Affine())
    test = ImageSplit(images[:11], labels[:11], (0.5,), (0.3,))
    return ImageData("tiny", split, test, 4, (1, 8, 8))


def model(seed: int = 0, dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(),
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
    cfg: Config,
    directory: Path,
    stop: StopRequest | None = None,
    resume: bool = False,
    watch: Callable[[Trainer], object] = lambda trainer: None,
) -> tuple[Trainer, ImageData]:
    """``watch``: called with the trainer before it runs."""
    state, position = prepare(directory, resume)
    content, comm = data(), SoloCommunicator()
    trainer = build(cfg, directory, content, model(), comm, stop, state, position)
    torch.manual_seed(np.random.default_rng().integers(2**31))  # a resumed process has another
    watch(trainer)
    run(trainer)
    return trainer, content


def go_on_ranks(
    cfg: Config,
    directory: Path,
    ranks: int,
    stop: int | None = None,
    resume: bool = False,
    watch: Callable[[Trainer], object] = lambda trainer: None,
    net: Callable[[], nn.Module] = lambda: model(dropout=0.0),
) -> list[Trainer | HarnessError]:
    """All ranks' trainers, or how their runs have ended. Without dropout, as the threads share
    torch's generator."""
    state, position = prepare(directory, resume)
    models = [net() for _ in range(ranks)]
    content = data()

    def act(comm: ThreadCommunicator) -> Trainer | HarnessError:
        request = None if stop is None else StopAfter(stop)
        net = models[comm.rank]
        mine = copy.deepcopy(state)  # an optimizer takes over the tensors that it is given
        trainer = build(cfg, directory, content, net, comm, request, mine, position)
        watch(trainer)
        try:
            run(trainer)
        except HarnessError as error:
            return error
        return trainer

    return run_ranks(ranks, act)


def prepare(directory: Path, resume: bool) -> tuple[dict[str, Any] | None, Position]:
    """The newest checkpoint, and the records cut to what it knows of."""
    directory.mkdir(exist_ok=True)
    run = RunDirectory(directory)
    state, position = None, Position()
    if resume:
        found = newest_valid(run.checkpoints, lambda *_: None)
        if found is not None:
            state = load_state(found.content, "x")
            position = Position(**state["records"])
    rewind(run, position)
    return state, position


def build(
    cfg: Config,
    directory: Path,
    content: ImageData,
    net: nn.Module,
    comm: Communicator,
    stop: StopRequest | None,
    state: dict[str, Any] | None,
    position: Position,
) -> Trainer:
    keep = cfg.train.keep_checkpoints
    journal = Journal(RunDirectory(directory), comm.rank == 0, keep, position)
    trainer = Trainer(cfg, content, net, comm, journal, Silent(), stop or StopRequest())
    if state is not None:
        trainer.load_state_dict(state)
    return trainer


def run(trainer: Trainer) -> None:
    try:
        trainer.run()
    finally:
        trainer._journal.close()


def comparable(directory: Path) -> list[dict[str, Any]]:
    drop = {"time", "seconds", "images_per_sec", "rank_seconds", "memory_peak_bytes", "counters"}
    return [
        {key: value for key, value in line.items() if key not in drop}
        for name in ("metrics.jsonl", "events.jsonl", "layers.jsonl")
        for line in read(directory / name)
        if line.get("kind") not in ("stop", "checkpoint", "straggler")
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def same(a: Any, b: Any) -> bool:
    """Equality to the last bit of nested states."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def same_weights(a: Trainer, b: Trainer) -> bool:
    """And all else that the rest of the run would depend on."""
    ours, theirs = a.state_dict(), b.state_dict()
    keys = ("update", "model", "reducer", "growth", "noise", "evaluation")
    return (
        all(same(ours[key], theirs[key]) for key in keys)
        and same(ours["optimizer"]["state"], theirs["optimizer"]["state"])
        and same(a._step.reducer.residuals, b._step.reducer.residuals)
    )


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


GROWING = ("ranks={start: 1, max: 4}",)


def weigh(cost: str | None, start_seconds: float | None, tmp_path: Path) -> list[Any]:
    """How two ranks fare whose supervisor could start four, where a start takes so long."""

    def supervised(trainer: Trainer) -> None:
        trainer._grow, trainer._start_seconds = 4, start_seconds

    settings = GROWING if cost is None else (*GROWING, f"ranks.restart_seconds={cost}")
    cfg = config(tmp_path, *settings)
    return list(go_on_ranks(cfg, tmp_path / "run", 2, watch=supervised))


@pytest.mark.parametrize(("cost", "start"), [("0", 1e6), (None, None), (None, 0.0), ("1e-9", 1e6)])
def test_ranks_grow_where_that_saves_more_than_a_start_takes(
    cost: str | None, start: float | None, tmp_path: Path
) -> None:
    ends = weigh(cost, start, tmp_path)
    assert [type(end) for end in ends] == [StoppedEarly] * 2
    stop = read(tmp_path / "run" / "events.jsonl")[-1]
    assert (stop["kind"], stop["ranks_wanted"]) == ("stop", 3)


@pytest.mark.parametrize(("cost", "start"), [("1e6", 0.0), (None, 1e6)])
def test_a_segment_shorter_than_its_start_is_made_up_for_by_accumulation(
    cost: str | None, start: float, tmp_path: Path
) -> None:
    ends = weigh(cost, start, tmp_path)
    assert all(isinstance(end, Trainer) for end in ends)
    events = read(tmp_path / "run" / "events.jsonl")
    merged = [event for event in events if event["kind"] == "merged_segment"]
    assert [(event["ranks"], event["ranks_wanted"]) for event in merged] == [(2, 3)]
    assert all(event["restart_seconds"] == 1e6 for event in merged)
    plan = build_plan(config(tmp_path, *GROWING), SIZE)
    stages = [event["global_batch"] for event in events if event["kind"] == "stage"]
    assert stages == [row.global_batch for row in plan.stages]


def test_nobody_asks_for_more_ranks_than_can_be_had(tmp_path: Path) -> None:
    def supervised(trainer: Trainer) -> None:
        trainer._grow = 2

    cfg = config(tmp_path, *GROWING, "ranks.restart_seconds=0")
    ends = go_on_ranks(cfg, tmp_path / "run", 2, watch=supervised)
    assert all(isinstance(end, Trainer) for end in ends)


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


class Broken(ImageSplit):
    """Some samples cannot be read."""

    broken = frozenset({1, 4, 8, 10, 29})

    def request(self, samples: Any, epochs: Any, seed: int, *rest: Any) -> Pending:
        good = np.array([sample not in self.broken for sample in samples.tolist()], dtype=bool)
        why = tuple(f"sample {sample}: broken" for sample in samples[~good].tolist())
        pending = super().request(samples[good], epochs[good], seed, *rest)
        return Deferred(lambda: replace(pending.take(), corrupt=why))


def broken_data() -> ImageData:
    whole = data()
    assert isinstance(whole.train, ImageSplit)
    split = Broken(whole.train.images, whole.train.labels, (0.5,), (0.3,), Affine())
    test = Broken(whole.train.images[:11], whole.train.labels[:11], (0.5,), (0.3,))
    return replace(whole, train=split, test=test)


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


PLAIN = ("batch={initial: 6, micro: 2}", "comm.compression=none", "train.duration=4ep")


def test_what_cannot_be_read_is_left_out_of_the_mean_and_recorded(tmp_path: Path) -> None:
    rate = ("lr.base=0.1", "lr.warmup=null", "lr.decay={kind: none}")
    cfg = config(tmp_path, *PLAIN, *rate, "train.duration=1up", "data.augment=false")
    cfg = cfg.model_copy(update={"optimizer": Optimizer()})
    content, net = broken_data(), plain_model()
    (micro,) = GlobalBatchSampler(SIZE, cfg.seed, 6).micro_batches(0, 6)
    assert 0 < len(Broken.broken & set(micro.samples.tolist())) < 6
    kept = np.array([sample for sample in micro.samples if sample not in Broken.broken])
    images, labels = content.train.batch(kept)  # type: ignore[attr-defined]
    expected = copy.deepcopy(net)
    loss = torch.nn.functional.cross_entropy(expected(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = torch.cat([p.grad.flatten() for p in expected.parameters() if p.grad is not None])
    torch.optim.SGD(expected.parameters(), lr=0.1).step()

    run(build(cfg, tmp_path, content, net, SoloCommunicator(), None, None, Position()))
    for found, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
    line = read(tmp_path / "metrics.jsonl")[-1]
    assert line["loss"] == pytest.approx(float(loss.detach()))
    assert line["grad_norm"] == pytest.approx(float(gradients.norm()))
    events = read(tmp_path / "events.jsonl")
    corrupt = [event for event in events if event["kind"] == "corrupt_image"]
    told = [event["reason"] for event in corrupt if event["split"] == "train"]
    assert [event["reason"] for event in corrupt if event["split"] == "test"] == [
        f"sample {sample}: broken" for sample in (10, 1, 4, 8)
    ]
    assert told == sorted(f"sample {s}: broken" for s in set(micro.samples) & Broken.broken)
    evaluation = next(event for event in events if event["kind"] == "evaluation")
    assert evaluation["corrupt"] == 4
    with torch.no_grad():
        good = np.array([sample for sample in range(11) if sample not in Broken.broken])
        images, labels = content.train.batch(good)  # type: ignore[attr-defined]
        right = float((net(images).argmax(1) == labels).float().mean())
    assert evaluation["accuracy"] == pytest.approx(right)
    assert events[-1]["corrupt"] == len(told)


def test_left_out_samples_are_the_same_on_any_ranks_and_after_a_stop(tmp_path: Path) -> None:
    cfg = config(tmp_path, *PLAIN, "comm.summation=exact", "batch.micro=1")
    runs = []
    for ranks, stop in ((1, None), (3, None), (2, 5)):
        directory = tmp_path / f"{ranks}"
        nets = [plain_model() for _ in range(ranks)]
        for resume in (False, True)[: 1 if stop is None else 2]:
            state, position = prepare(directory, resume)

            def act(comm: ThreadCommunicator) -> None:
                request = None if stop is None or resume else StopAfter(stop)  # noqa: B023
                mine = copy.deepcopy(state)  # noqa: B023
                net = nets[comm.rank]  # noqa: B023
                content = broken_data()
                trainer = build(cfg, directory, content, net, comm, request, mine, position)  # noqa: B023
                with suppress(StoppedEarly):
                    run(trainer)

            run_ranks(ranks, act)
        told = [e for e in comparable(directory) if e.get("kind") == "corrupt_image"]
        weights = torch.cat([p.detach().flatten() for p in nets[0].parameters()])
        runs.append((told, weights))
    assert [event["split"] for event in runs[0][0]].count("train") == 5
    assert [event["split"] for event in runs[0][0]].count("test") == 4
    for told, weights in runs[1:]:
        assert told == runs[0][0]
        assert torch.equal(weights, runs[0][1])


def test_a_micro_batch_of_which_nothing_is_left(tmp_path: Path) -> None:
    cfg = config(tmp_path, *PLAIN, "batch.initial=1", "batch.micro=1", "train.duration=1ep")
    net = plain_model()
    run(build(cfg, tmp_path, broken_data(), net, SoloCommunicator(), None, None, Position()))
    assert read(tmp_path / "events.jsonl")[-1]["corrupt"] == 5
    assert all(bool(p.isfinite().all()) for p in net.parameters())


OPTIONS = {
    "lars": (
        "optimizer={name: lars, weight_decay: 0.001, trust_coefficient: 0.01, momentum: 0.9, "
        "clip_grad_norm: 1.0}",
        "lr.base=2",
    ),
    "adamw": (
        "optimizer={name: adamw, nesterov: false, options: {betas: [0.8, 0.95], eps: 1.0e-6}}",
        "lr.base=0.003",
    ),
    "lamb": ("optimizer={name: lamb, nesterov: false}", "lr.base=0.01"),
    "feedback": ("comm.compression=fp16_feedback", "optimizer.clip_grad_norm=0.5"),
    "exact": ("comm={compression: none, summation: exact}",),
    "fp16": ("train.precision=fp16", "train.label_smoothing=0.1"),
    "bf16": ("train.precision=bf16", "comm.compression=none"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_any_optimizer_and_codec_goes_on_as_it_was(case: str, tmp_path: Path) -> None:
    """Stopped, and killed long after the checkpoint: what was recorded since is redone, once."""
    overrides = ("train.duration=3ep", "train.layers_every=3up", *OPTIONS[case])
    cfg = config(tmp_path, *overrides)
    undisturbed, _ = go(cfg, tmp_path / "whole")
    if case == "lars":
        assert isinstance(undisturbed._step.optimizer, LARS)
    if case == "feedback":
        assert any(residual.any() for residual in undisturbed._step.reducer.residuals)
    whole = comparable(tmp_path / "whole")
    last = undisturbed.clock.updates
    layers = [line["update"] for line in read(tmp_path / "whole" / "layers.jsonl")]
    assert layers == [1, *range(3, last + 1, 3)]
    for update in (1, 8, 15, last - 1):
        directory = tmp_path / f"stopped-{update}"
        with pytest.raises(StoppedEarly, match=f"after update {update}:"):
            go(cfg, directory, StopAfter(update))
        resumed, _ = go(cfg, directory, resume=True)
        assert same_weights(resumed, undisturbed), update
        assert comparable(directory) == whole, update
    for kept in (10, 20):  # the second time from a checkpoint of the run that went on
        for path in (directory / "checkpoints").iterdir():
            if int(re.findall(r"\d+", path.name)[0]) > kept:
                path.unlink()
        for name in ("metrics", "layers"):
            with (directory / f"{name}.jsonl").open("ab") as lines:
                lines.write(b'{"update": 1234, "half a line')
        resumed, _ = go(cfg, directory, resume=True)
        assert same_weights(resumed, undisturbed)
        assert comparable(directory) == whole


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
    with pytest.raises(HarnessError, match=r"inf or NaN\. If the run has diverged, lower lr\.base"):
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


# What is measured


def test_the_noise_scale_is_null_until_there_is_something_to_compare(tmp_path: Path) -> None:
    """Updates of one micro-batch tell nothing; after the growth they have two."""
    batch = "{initial: 6, max: 12, micro: 6, growth: {policy: geometric, every: 2ep}}"
    cfg = config(tmp_path, f"batch={batch}", "train={duration: 6ep, log_every: 1}")
    go(cfg, tmp_path / "run")
    lines = read(tmp_path / "run" / "metrics.jsonl")
    scales = {
        batch: [line["noise_scale"] for line in lines if line["global_batch"] == batch]
        for batch in (6, 12)
    }
    assert set(scales[6]) == {None}
    known = [scale for scale in scales[12] if scale is not None]
    assert known, "and for these labels, which are noise, no more than now and then"
    assert all(scale > 0 for scale in known)


def test_the_distance_from_the_initial_weights(tmp_path: Path) -> None:
    cfg = config(tmp_path, "train={duration: 1ep, log_every: 1, checkpoint_every: 5up}")
    initial = [p.detach().clone() for p in model().parameters()]
    trainer, _ = go(cfg, tmp_path / "run")
    distances = [line["distance_from_init"] for line in read(tmp_path / "run" / "metrics.jsonl")]
    pairs = zip(trainer._model.parameters(), initial, strict=True)
    moved = sum(float((p - q).detach().double().square().sum()) for p, q in pairs)
    assert distances[0] > 0
    assert distances[-1] == pytest.approx(moved**0.5, rel=1e-6)


def test_the_distance_is_null_if_the_run_began_from_other_weights(tmp_path: Path) -> None:
    cfg = config(tmp_path, "train={duration: 1ep, log_every: 1}")

    def forget(trainer: Trainer) -> None:
        trainer._initial.load_state_dict({"initial": 12345})

    go(cfg, tmp_path / "run", watch=forget)
    lines = read(tmp_path / "run" / "metrics.jsonl")
    assert {line["distance_from_init"] for line in lines} == {None}


def test_clipping_bounds_the_gradient_that_is_applied_and_records_the_one_that_was(
    tmp_path: Path,
) -> None:
    applied: list[float] = []
    before: list[Tensor] = []

    def watch(trainer: Trainer) -> None:
        def note(*_: object) -> None:
            grads = [p.grad.flatten() for p in trainer._model.parameters() if p.grad is not None]
            applied.append(float(torch.cat(grads).double().norm()))
            before.append(torch.cat(grads))

        trainer._step.optimizer.register_step_pre_hook(note)

    cfg = config(tmp_path, "optimizer.clip_grad_norm=3.4", "train={duration: 2ep, log_every: 1}")
    go(cfg, tmp_path / "run", watch=watch)
    norms = [line["grad_norm"] for line in read(tmp_path / "run" / "metrics.jsonl")]
    assert applied == pytest.approx([min(norm, 3.4) for norm in norms], rel=1e-5)
    assert min(norms) < 3.4 < max(norms), "a test of clipping needs both"
    limited, first = before[0] * (norms[0] / applied[0]), len(before)
    go(config(tmp_path, "train={duration: 1up}"), tmp_path / "free", watch=watch)
    assert torch.allclose(before[first], limited, rtol=1e-4)


# Ranks


NORMED = (
    "train={duration: 50up, checkpoint_every: null, log_every: 10}",
    "comm={compression: none, bucket_mb: 0.001}",
)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_fifty_updates_are_the_same_on_any_number_of_ranks(optimizer: str, tmp_path: Path) -> None:
    """With batch norm, whose statistics are those of micro-batches; 5 samples in micro-batches of 3
    make two unequal ones, and leave two of four ranks without any."""
    lars = "optimizer={name: lars, trust_coefficient: 0.1}", "lr.base=0.1"
    more = lars if optimizer == "lars" else ()
    cfg = config(tmp_path, *NORMED, *more)
    states = {}
    for ranks in (1, 2, 4):
        trainers = go_on_ranks(cfg, tmp_path / str(ranks), ranks)
        assert all(isinstance(trainer, Trainer) for trainer in trainers)
        models = [t._model.state_dict() for t in trainers if isinstance(t, Trainer)]
        weights = [
            {k: v for k, v in m.items() if not k.startswith(("1.running", "1.num"))} for m in models
        ]
        assert all(same(other, weights[0]) for other in weights), "bitwise on all ranks"
        states[ranks] = weights[0]
    assert (states[1]["5.weight"] - model().state_dict()["5.weight"]).norm() > 0.1, "it must learn"
    for name, alone in states[1].items():
        for ranks in (2, 4):
            assert (states[ranks][name] - alone).norm() < 1e-5 * alone.norm(), (name, ranks)
    lines = [read(tmp_path / str(ranks) / "metrics.jsonl") for ranks in (1, 2, 4)]
    for key in ("loss", "grad_norm", "noise_scale", "distance_from_init"):
        values = [[line[key] for line in run] for run in lines]
        assert any(values[0]), key
        for other in values[1:]:
            for ours, theirs in zip(other, values[0], strict=True):
                assert ours == theirs or ours == pytest.approx(theirs, rel=1e-3), key


class Rare(nn.Module):
    """A layer that only some images reach, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 4)
        self.rare, self.never = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reached: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(images.flatten(1)))
        reach = images[:, 0, 3, 3] > 1.5  # one image in a dozen
        if self.training:
            self.reached.append(bool(reach.any()))
        if reach.any():
            hidden = hidden + reach[:, None] * torch.tanh(self.rare(hidden))
        logits: Tensor = self.last(hidden)
        return logits


def rare() -> nn.Module:
    torch.manual_seed(0)
    return Rare()


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_a_layer_that_is_reached_now_and_then(optimizer: str, tmp_path: Path) -> None:
    chosen = () if optimizer == "sgd" else OPTIONS[optimizer]
    cfg = config(tmp_path, *NORMED, *chosen, "data.augment=false", "lr.base=0.03")
    found = {}
    for ranks in (1, 2):
        ends = go_on_ranks(cfg, tmp_path / str(ranks), ranks, net=rare)
        models: list[Any] = [end._model for end in ends if isinstance(end, Trainer)]
        assert len(models) == ranks
        assert not any(m.reached[0] for m in models), "neither in the first update"
        assert all(any(m.reached) for m in models), "nor never"
        found[ranks] = models[0].state_dict()
        assert all(same(m.state_dict(), found[ranks]) for m in models)
    for name, alone in found[1].items():
        assert (found[2][name] - alone).norm() <= 1e-5 * alone.norm(), name
    assert same(found[2]["never.weight"], rare().state_dict()["never.weight"])
    assert not same(found[2]["rare.weight"], rare().state_dict()["rare.weight"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_error_feedback_go_on_as_they_were(ranks: int, tmp_path: Path) -> None:
    cfg = config(tmp_path, "comm.compression=fp16_feedback", "train.duration=3ep")
    undisturbed = go_on_ranks(cfg, tmp_path / "whole", ranks)
    owed = [t._step.reducer.residuals for t in undisturbed if isinstance(t, Trainer)]
    assert not any(same(a, b) for a, b in pairwise(owed)), "each rank's own"
    for update in (1, 9, 20):
        directory = tmp_path / f"stopped-{update}"
        ends = go_on_ranks(cfg, directory, ranks, stop=update)
        assert all(isinstance(end, StoppedEarly) for end in ends)
        resumed = go_on_ranks(cfg, directory, ranks, resume=True)
        for ours, theirs in zip(resumed, undisturbed, strict=True):
            assert isinstance(ours, Trainer)
            assert isinstance(theirs, Trainer)
            assert same_weights(ours, theirs), update
        assert comparable(directory) == comparable(tmp_path / "whole")


def test_error_feedback_goes_on_with_other_ranks(tmp_path: Path) -> None:
    cfg = config(tmp_path, "comm.compression=fp16_feedback", "train.duration=2ep")
    directory = tmp_path / "run"
    go_on_ranks(cfg, directory, 3, stop=7)
    newest = max((directory / "checkpoints").glob("*.pt"))
    table = torch.load(newest, weights_only=True)["rank_residuals"]
    found: list[Tensor] = []

    def watch(trainer: Trainer) -> None:
        found.append(torch.cat(trainer._step.reducer.residuals).double())

    ends = go_on_ranks(cfg, directory, 2, resume=True, watch=watch)
    assert all(isinstance(end, Trainer) for end in ends)
    assert len(table) == 3
    assert table.any()
    assert torch.allclose(found[0] + found[1], table.double().sum(0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("what", ["weights", "momentum"])
def test_ranks_that_have_come_apart_stop_before_they_save(what: str, tmp_path: Path) -> None:
    """A bit of one rank's weights, or of its optimizer's state, after update 7."""

    def watch(trainer: Trainer) -> None:
        if trainer._comm.rank != 2:
            return

        def spoil(optimizer: torch.optim.Optimizer, *_: object) -> None:
            if trainer.clock.updates == 7:
                weight = trainer._model[5].weight  # type: ignore[index]
                held = optimizer.state[weight]["momentum_buffer"] if what == "momentum" else weight
                held.data.view(torch.int32)[1, 2] ^= 1 << 20

        trainer._step.optimizer.register_step_post_hook(spoil)

    cfg = config(tmp_path, "train={duration: 2ep, checkpoint_every: 5up, eval_every: null}")
    ends = go_on_ranks(cfg, tmp_path / "run", 3, watch=watch)
    assert all(isinstance(end, Divergence) for end in ends), ends
    assert len(set(map(str, ends))) == 1
    assert "after update 10 the weights differ between ranks" in str(ends[0])
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pt")]
    assert saved == ["update-00000005.pt"]
