"""The configuration: what is valid, what is refused and in which words, extends, overrides."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import RECIPES

from harness.config import dump_config, load_config
from harness.dataset_table import DATASETS
from harness.errors import ConfigError
from harness.model_table import OWN, TORCHVISION
from harness.schema import Batch, Config, LearningRate, check_shares
from harness.units import Duration

MINIMAL = """\
name: small
data: {dataset: digits}
model: {name: lenet5}
batch: {initial: 64}
lr: {base: 0.1}
train: {duration: 2ep}
"""

FULL: dict[str, Any] = {
    "name": "full",
    "seed": 7,
    "paper": {
        "source": "An author 2017",
        "place": "Table 3, row 2",
        "printed": [
            {
                "metric": "accuracy",
                "value": 0.98,
                "below": None,
                "note": None,
                "target": 0.9,
                "against": "another",
            }
        ],
        "note": "a note",
    },
    "data": {
        "dataset": "mnist",
        "root": "/data",
        "workers": 2,
        "prefetch": 8,
        "augment": True,
        "cutout": 4,
        "image_size": None,
        "size": None,
        "sizes": None,
        "options": {},
        "classes": None,
        "channels": None,
        "on_corrupt": "skip",
        "share": False,
    },
    "model": {"name": "package.module:callable", "options": {}, "zero_gamma": True},
    "batch": {
        "initial": 64,
        "max": 1024,
        "micro": 16,
        "growth": {"policy": "geometric", "factor": 1.5, "every": "5ep"},
        "multiple_of": 32,
        "shrink": True,
        "epoch_end": "carry",
    },
    "ranks": {
        "start": 2,
        "max": 4,
        "prefer": "accumulation",
        "per_node": 4,
        "threads": 3,
        "pin": True,
        "restart_seconds": 2.5,
    },
    "optimizer": {
        "name": "lars",
        "momentum": 0.8,
        "weight_decay": 1e-05,
        "nesterov": True,
        "options": {},
        "skip": ["*.bias", "bn*"],
        "decay_1d": None,
        "clip_grad_norm": 1.5,
        "preset": "larc",
        "trust_coefficient": 0.02,
        "eps": 1.0e-8,
        "denominator": "gradient",
        "lr_in_momentum": False,
        "clip": True,
        "decay_at_zero_norm": False,
        "adapt_1d": False,
        "momentum_scaling": "smith_le",
        "max_momentum": 0.99,
    },
    "lr": {
        "base": 0.1,
        "base_batch": 32,
        "scaling": "sqrt",
        "max_batch": 512,
        "min": 0.001,
        "max": 1.5,
        "warmup": {
            "kind": "gradual",
            "duration": "2ep",
            "start": 0.0,
            "per": "epoch",
            "decayed": False,
        },
        "decay": {"kind": "step", "every": "10000sa", "factor": 0.5, "begin": "500sa"},
        "on_growth": 0.75,
    },
    "comm": {
        "backend": "horovod",
        "controller": "gloo",
        "compression": "fp16",
        "summation": "float",
        "bucket_mb": 0.5,
        "autotune": True,
        "cycle_ms": 0.5,
        "fusion_mb": 2.0,
        "yield_when_idle": False,
    },
    "train": {
        "duration": "2.5ep",
        "eval_every": None,
        "checkpoint_every": "0.00001ep",
        "keep_checkpoints": 5,
        "log_every": 1,
        "precision": "bf16",
        "label_smoothing": 0.0,
        "channels_last": True,
        "compile": True,
        "sync_batch_norm": False,
        "layers_every": "2ep",
        "tensorboard": True,
        "loss": "package.module:loss",
        "loss_reduction": "none",
        "loss_options": {},
        "metric": "package.module:Metric",
        "metric_options": {},
        "trackers": ["tensorboard", "mlflow", "package.module:Tracker"],
    },
    "profile": {
        "enabled": False,
        "trace": {"updates": [100, 103], "ranks": [0, 3]},
        "timeline": True,
    },
    "code": "/home/me/code",
    "launch": {
        "launcher": "mpirun",
        "mpi": "openmpi5",
        "srun_mpi": "pmix_v4",
        "interfaces": ["eth0", "ib0"],
        "bind": "core",
        "ranks_per_gpu": 2,
        "mps": True,
        "environment": {"NCCL_DEBUG": "INFO", "EMPTY": ""},
        "python": "/opt/venv/bin/python",
        "max_restarts": 0,
        "restart_pause": 0.5,
        "host_failures": 3,
        "hang_seconds": 90.5,
        "connect_timeout": 2.5,
        "elastic": False,
    },
    "slurm": {
        "account": "an account",
        "partition": "gpu",
        "qos": "high",
        "constraint": "[rack1|rack2]",
        "reservation": "week",
        "time": "1-02:30:00",
        "gpus_per_node": "a100:4",
        "cpus_per_rank": 8,
        "memory": "64G",
        "exclusive": True,
        "mail_user": "me@example.org",
        "mail_type": ["END", "FAIL"],
        "signal": "USR1",
        "warning": 300,
        "requeue": False,
        "max_requeues": 3,
        "modules": ["cuda/12.4", "openmpi"],
        "setup": "/home/me/setup.sh",
        "container": {
            "runtime": "apptainer",
            "image": "/images/train.sif",
            "python": "python3.11",
            "mounts": ["/scratch:/scratch"],
            "options": ["--nv"],
        },
        "options": {"exclude": "node7", "spread-job": None},
    },
}
GROWTHS: list[dict[str, Any]] = [
    {"policy": "fixed"},
    {
        "policy": "list",
        "stages": [{"start": "1ep", "batch": 128}, {"start": "2.5ep", "batch": 256}],
    },
    {"policy": "geometric", "factor": 1.5, "every": "5ep"},
    {"policy": "linear", "rate": 0.5, "every": "2up"},
    {
        "policy": "loss",
        "dwell": "2ep",
        "wait": "300up",
        "optimum": "estimate",
        "loss": "sample",
        "sample": 500,
        "memory": "0.2ep",
        "limit": 3.5,
    },
    {
        "policy": "rolling",
        "dwell": "50000sa",
        "wait": None,
        "memory": "500up",
        "loss_weight": 0.02,
        "limit": None,
    },
    {
        "policy": "noise",
        "dwell": "2ep",
        "wait": "300up",
        "ratio": 0.5,
        "hysteresis": 0.125,
        "limit": None,
        "memory": "0.2ep",
    },
    {
        "policy": "goodput",
        "dwell": "2ep",
        "wait": "300up",
        "throughput": ["runs/bench", "runs/probe"],
        "model": {
            "per_image": 1e-3,
            "fixed": 2e-3,
            "jitter": 0.02,
            "gamma": 2.0,
            "within_latency": 1e-5,
            "within_seconds_per_byte": 1e-11,
            "between_latency": 1e-4,
            "between_seconds_per_byte": 1e-9,
            "gradient_bytes": 1e6,
            "buckets": 3,
            "topology": "ring",
            "ranks_per_node": 4,
            "measured_ranks": 8,
            "misfit": 0.01,
        },
        "ranks": [2, 4],
        "objective": "rank_hours",
        "efficiency": 0.25,
        "hysteresis": 0.125,
        "limit": None,
        "memory": "0.2ep",
    },
    {
        "policy": "plateau",
        "dwell": "2ep",
        "wait": "300up",
        "factor": 1.5,
        "patience": 2,
        "threshold": 0.0,
    },
]
DECAYS: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "poly", "begin": "0.5ep", "power": 0.5, "end": 0.001},
    {"kind": "cosine", "begin": None, "end": 0.001},
    {"kind": "step", "begin": "500sa", "every": "10000sa", "factor": 0.5},
    {"kind": "exponential", "begin": "100up", "every": "200up", "factor": 0.5},
    {"kind": "multistep", "at": ["1ep", "2.5ep"], "factor": 0.5},
]
VARIANTS = [("batch", "growth", growth) for growth in GROWTHS] + [
    ("lr", "decay", decay) for decay in DECAYS
]
POLICY_NAMES = "fixed, list, geometric, linear, loss, rolling, noise, goodput, plateau"
MEASURED = ("loss", "rolling", "noise", "goodput", "plateau")
DECAY_NAMES = "none, poly, cosine, step, exponential, multistep"
GEOMETRIC = ["batch.growth={policy: geometric, every: 5ep}"]
POLY = ["lr.decay={kind: poly}"]


def load(text: str, *overrides: str, folder: Path, name: str = "c.yaml") -> Config:
    (folder / name).write_text(text, encoding="utf-8")
    return load_config(folder / name, overrides)


@pytest.fixture
def messages(tmp_path: Path) -> Any:
    """Loads what must be refused, and gives the messages with the folder's name cut off."""

    def refused(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides, folder=tmp_path)
        lines = str(caught.value).replace(f"{tmp_path}/", "").split("\n")
        assert all(line.isprintable() and len(line) < 400 for line in lines)
        return lines

    return refused


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, entry in value.items():
        yield from leaves(entry, (*path, key))


def at(config: Config, path: tuple[str, ...]) -> Any:
    value: Any = config.model_dump(mode="json")
    for key in path:
        value = value[key]
    return value


def varied(section: str, key: str, value: Any) -> dict[str, Any]:
    """The full example with another growth or decay."""
    return {**FULL, section: {**FULL[section], key: value}}


def as_override(path: Sequence[str], value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return f"{'.'.join(path)}={text.removesuffix('...' + chr(10)).strip()}"


VARIED = pytest.mark.parametrize(
    ("section", "key", "value"),
    VARIANTS,
    ids=[next(iter(value.values())) for _, _, value in VARIANTS],
)


def test_a_minimal_file_gets_the_defaults(tmp_path: Path) -> None:
    config = load(MINIMAL, folder=tmp_path)
    assert config.seed == 0
    assert config.data.augment
    assert config.batch.max is None
    assert config.batch.micro_batch == 32
    assert config.batch.growth.policy == "fixed"
    assert config.ranks.start == config.ranks.ceiling == 1
    assert config.optimizer.momentum == 0.9
    assert config.lr.scaling == "linear"
    assert config.lr.decay.kind == "none"
    assert config.comm.backend == "horovod"
    assert config.train.eval_every == Duration.parse("1ep")
    assert config.train.log_every == 10


def test_the_micro_batch_is_at_most_the_batch(tmp_path: Path) -> None:
    assert load(MINIMAL, "batch.initial=20", folder=tmp_path).batch.micro_batch == 20
    assert load(MINIMAL, "batch.micro=7", folder=tmp_path).batch.micro_batch == 7


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_the_configurations_that_come_along_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.name


@pytest.mark.parametrize("key", ["name", "data", "model", "batch", "lr", "train"])
def test_a_needed_section_that_is_missing(messages: Any, key: str) -> None:
    text = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(key))
    assert messages(text) == [f"c.yaml: {key}: missing, but needed"]


@pytest.mark.parametrize(
    ("line", "key"),
    [(2, "data.dataset"), (3, "model.name"), (4, "batch.initial"), (5, "lr.base"),
     (6, "train.duration")],
)  # fmt: skip
def test_a_needed_key_that_is_missing(messages: Any, line: int, key: str) -> None:
    text = MINIMAL.replace(MINIMAL.splitlines()[line - 1], f"{key.split('.')[0]}: {{}}")
    assert messages(text) == [f"c.yaml:{line}: {key}: missing, but needed"]


@pytest.mark.parametrize(("path", "value"), list(leaves(FULL)), ids=lambda v: str(v)[:40])
def test_every_leaf_can_be_overridden(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    full = yaml.safe_dump({**FULL, "name": "other", "seed": 0})
    changed = load(full, as_override(path, value), folder=tmp_path)
    assert at(changed, path) == value


@VARIED
def test_every_leaf_of_every_policy_and_decay_can_be_overridden(
    tmp_path: Path, section: str, key: str, value: dict[str, Any]
) -> None:
    text = yaml.safe_dump(varied(section, key, value))
    for path, leaf in leaves(value, (section, key)):
        assert at(load(text, as_override(path, leaf), folder=tmp_path), path) == leaf


def test_the_full_example_names_every_key(tmp_path: Path) -> None:
    """... and arrives as it is: what is not named would stand in the dump as its default."""
    config = load(yaml.safe_dump(FULL), folder=tmp_path)
    assert config.model_dump(mode="json") == FULL


@VARIED
def test_every_policy_and_decay_arrives_as_it_is(
    tmp_path: Path, section: str, key: str, value: dict[str, Any]
) -> None:
    full = varied(section, key, value)
    config = load(yaml.safe_dump(full), folder=tmp_path)
    assert config.model_dump(mode="json") == full
    assert load(dump_config(config), folder=tmp_path) == config


def test_the_examples_have_every_policy_and_decay() -> None:
    for examples, tag, field in (
        (GROWTHS, "policy", Batch.model_fields["growth"]),
        (DECAYS, "kind", LearningRate.model_fields["decay"]),
    ):
        named = [
            get_args(model.model_fields[tag].annotation) for model in get_args(field.annotation)
        ]
        assert [(example[tag],) for example in examples] == named


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
PERIODS = st.one_of(
    st.integers(1, 10**9).map(lambda n: f"{n}sa"),
    st.integers(1, 10**9).map(lambda n: f"{n}up"),
    st.decimals("0.000001", 1000, places=6).map(lambda n: f"{n:f}ep"),
)
POSITIVE = st.floats(1e-300, 1e30)


LIMITS = st.none() | st.floats(1.001, 1e30)


def section(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Each key present or not."""
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def raw_growths(draw: st.DrawFn, initial: int, most: int, shrink: bool) -> dict[str, Any]:
    """Any policy; for the batches of a list, ``most`` is the cap."""
    policy = draw(st.sampled_from(POLICY_NAMES.split(", ")))
    growth: dict[str, Any] = {"policy": policy}
    if policy == "list":
        unit = draw(st.sampled_from(["up", "sa", "ep"]))
        starts = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=4)))
        batches = [draw(st.integers(1 if shrink else initial, most)) for _ in starts]
        batches = batches if shrink else sorted(batches)
        growth["stages"] = [
            {"start": f"{start}{unit}", "batch": batch}
            for start, batch in zip(starts, batches, strict=True)
        ]
        return growth
    settings = {
        "fixed": section(),
        "geometric": section(factor=st.floats(1, 100)),
        "linear": section(every=PERIODS),
        "loss": section(
            optimum=st.floats(-1e3, 1e3) | st.integers(-9, 9) | st.just("estimate"),
            loss=st.sampled_from(["running", "sample", "full"]),
            sample=st.integers(1, 10**6),
            memory=PERIODS,
            limit=LIMITS,
        ),
        "rolling": section(memory=PERIODS, loss_weight=st.floats(0, 1e30), limit=LIMITS),
        "noise": section(
            ratio=POSITIVE, hysteresis=st.floats(0, 1e6), limit=LIMITS, memory=PERIODS
        ),
        "goodput": section(
            objective=st.sampled_from(["time", "rank_hours"]),
            efficiency=st.floats(1e-9, 1),
            ranks=st.none() | st.sets(st.integers(1, 10**6), min_size=1, max_size=4).map(sorted),
            hysteresis=st.floats(0, 1e6),
            limit=LIMITS,
            memory=PERIODS,
        ),
        "plateau": section(
            factor=st.floats(1.001, 1e30),
            patience=st.integers(1, 2**53),
            threshold=st.floats(0, 0.999),
        ),
    }[policy]
    growth |= draw(settings)
    if policy == "geometric":
        growth["every"] = draw(PERIODS)
    if policy == "linear":
        growth["rate"] = draw(POSITIVE)
    if policy == "goodput":
        growth["throughput"] = draw(st.lists(WORDS, min_size=1, max_size=2))
    if policy in MEASURED:
        growth |= draw(section(dwell=PERIODS, wait=st.none() | PERIODS | st.just("0up")))
    return growth


@st.composite
def raw_rates(draw: st.DrawFn, duration: str) -> dict[str, Any]:
    """The lr section of a run of a length."""
    unit = duration[-2:]
    least = draw(st.none() | st.floats(0, 10))
    every = draw(PERIODS)
    # What compares with the one or the other, and lies within the run.
    begins = (
        [duration, "0up", "1up"]
        if unit == "up"
        else [duration, "0ep", f"1{'sa' if unit == 'ep' else 'ep'}"]
    )
    from_every = ["0up", "1up"] if every.endswith("up") else ["0sa", "0.000001ep"]
    factor = section(factor=st.floats(1e-300, 1))
    decays = {
        "none": section(),
        "poly": section(power=POSITIVE, end=st.floats(0, 1e30), begin=st.sampled_from(begins)),
        "cosine": section(end=st.floats(0, 1e30), begin=st.none() | st.sampled_from(begins)),
        "step": section(factor=st.floats(1e-300, 1), begin=st.sampled_from(from_every)),
        "exponential": section(factor=st.floats(1e-300, 1), begin=st.sampled_from(from_every)),
        "multistep": factor,
    }
    kind = draw(st.sampled_from(list(decays)))
    decay = {"kind": kind, **draw(decays[kind])}
    if kind in ("step", "exponential"):
        decay["every"] = every
    if kind == "multistep":
        starts = draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=4))
        decay["at"] = [f"{start}{every[-2:]}" for start in sorted(starts)]
    warmups = st.fixed_dictionaries(
        {"duration": st.sampled_from([duration, "7sa" if unit == "up" else "7up"])},
        optional={
            "kind": st.sampled_from(["gradual", "constant"]),
            "start": st.none() | st.floats(0, 1e30),
            "decayed": st.booleans(),
        },
    )
    per_epoch = st.just({"per": "epoch", "duration": "1ep"}) if unit != "ep" else st.nothing()
    limits = {} if least is None else {"min": least, "max": draw(st.floats(max(least, 0.1), 1e30))}
    return {
        "base": draw(POSITIVE | st.integers(1, 1000)),
        "decay": decay,
        **limits,
        **draw(
            section(
                base_batch=st.integers(1, 10**9),
                scaling=st.sampled_from(["linear", "sqrt", "none"]),
                max_batch=st.none() | st.integers(1, 10**9),
                on_growth=POSITIVE | st.lists(POSITIVE | st.integers(1, 9), min_size=1, max_size=4),
                warmup=st.none() | warmups | per_epoch,
            )
        ),
    }


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Valid configurations as plain data, each key present or not."""
    multiple = draw(st.sampled_from([1, 1, 7, 32]))
    initial, room, shrink = (
        multiple * draw(st.integers(2, 10**5)),
        draw(st.integers(0, 10**6)),
        draw(st.booleans()),
    )
    most = initial + room * multiple
    growth = draw(raw_growths(initial, most, shrink))
    duration = draw(PERIODS)
    batch = {
        "initial": initial,
        "micro": draw(st.integers(1, initial - 1)),
        "growth": growth,
        "multiple_of": multiple,
        "shrink": shrink,
        **draw(section(epoch_end=st.sampled_from(["short", "carry"]))),
    }
    if growth["policy"] in MEASURED or draw(st.booleans()):
        batch["max"] = most
    train = section(
        eval_every=st.none() | PERIODS,
        checkpoint_every=st.none() | PERIODS,
        keep_checkpoints=st.integers(2, 2**40),
        log_every=st.integers(1, 2**53),
    )
    optimizer = section(
        momentum=st.floats(0.001, 0.999),
        nesterov=st.booleans(),
        max_momentum=st.floats(0.999, 0.999999),
        momentum_scaling=st.sampled_from(["none", "smith_le"]),
    )
    lars = st.fixed_dictionaries(
        {"name": st.just("lars")}, optional={"trust_coefficient": st.none() | POSITIVE}
    )
    printed = st.fixed_dictionaries(
        {"metric": WORDS},
        optional={
            "value": st.floats(-1e9, 1e9),
            "below": st.none(),
            "note": WORDS,
            "target": st.none() | st.floats(0.1, 1),
            "against": st.none() | WORDS,
        },
    )
    paper = st.fixed_dictionaries(
        {"source": WORDS, "place": WORDS}, optional={"printed": st.lists(printed, max_size=2)}
    )
    return {
        "name": draw(WORDS),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "paper": draw(st.none() | paper),
        "data": {
            "dataset": draw(st.sampled_from([n for n, d in DATASETS.items() if d.files])),
            **draw(
                section(
                    root=st.none() | WORDS,
                    augment=st.just(True),
                    cutout=st.none() | st.integers(1, 99),
                    on_corrupt=st.sampled_from(["stop", "skip"]),
                )
            ),
        },
        "model": {"name": draw(st.sampled_from([*OWN, *TORCHVISION, "a.b:c"]))},
        "code": "/srv/models",  # which loading would write out, from the file's place
        "batch": batch,
        "optimizer": draw(optimizer) | draw(lars | st.just({})),
        "lr": draw(raw_rates(duration)),
        "comm": draw(section(compression=st.sampled_from(["none", "fp16"]))),
        "train": {"duration": duration, **draw(train)},
    }


@settings(max_examples=200)
@given(raw_configs())
def test_dumping_and_loading_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any]
) -> None:
    config = Config.model_validate(raw)
    text = dump_config(config)
    assert load(text, folder=tmp_path_factory.getbasetemp(), name="dumped.yaml") == config
    # ... and readers of YAML 1.1 find the same in the run directory.
    assert yaml.safe_load(text) == config.model_dump(mode="json")


@pytest.mark.parametrize(
    "name", ["1e3", "no", "12", "null", "a: b", "~", "1_0", "=", "é", "a\nb", "\x85"]
)
def test_names_that_look_like_something_else_survive(tmp_path: Path, name: str) -> None:
    config = load(MINIMAL, f"name={json.dumps(name)}", folder=tmp_path)
    assert config.name == name
    assert load(dump_config(config), folder=tmp_path).name == name


def test_a_configuration_is_frozen(tmp_path: Path) -> None:
    config = load(MINIMAL, folder=tmp_path)
    with pytest.raises(ValidationError):
        config.seed = 5
    with pytest.raises(ValidationError):
        config.batch.initial = 5


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "hint", "valid"),
        [
            ("sead=1", "did you mean 'seed'? ", "name, seed, paper, data, model, batch, ranks"),
            ("data.rot=x", "did you mean 'root'? ", "dataset, root, workers, prefetch, augment"),
            ("model.nam=x", "did you mean 'name'? ", "name"),
            (
                "batch.intial=1",
                "did you mean 'initial'? ",
                "initial, max, micro, growth, multiple_of, shrink, epoch_end",
            ),
            ("batch.growth={policy: fixed, every: 1ep}", "", "policy"),
            (
                "batch.growth={policy: list, stages: [{start: 1ep, batch: 99, bach: 1}]}",
                "did you mean 'batch'? ",
                "start, batch",
            ),
            ("paper={source: a, place: b, printed: [{metric: c, x: 1}]}", "", "metric, value, bel"),
            ("ranks.strat=1", "did you mean 'start'? ", "start, max, prefer, per_node, threads"),
            ("optimizer.momentun=1", "did you mean 'momentum'? ", "name, momentum, weight_decay"),
            ("lr.bse=1", "did you mean 'base'? ", "base, base_batch, scaling, max_batch, min, max"),
            ("lr.decay={kind: none, power: 2}", "", "kind"),
            ("comm.backnd=x", "did you mean 'backend'? ", "backend, controller, compression"),
            ("train.epochs=3", "", "duration, eval_every, checkpoint_every, keep_checkpoints"),
        ],
    )
    def test_are_answered_with_the_valid_ones(
        self, messages: Any, override: str, hint: str, valid: str
    ) -> None:
        (message,) = messages(MINIMAL, override)
        assert f": unknown key; {hint}valid here: {valid}" in message
        assert message.startswith(f"override '{override}': ")

    @VARIED
    def test_of_any_policy_or_decay_are_answered_with_its_own(
        self, messages: Any, section: str, key: str, value: dict[str, Any]
    ) -> None:
        text = yaml.safe_dump(varied(section, key, value))
        for name in value:
            (message,) = messages(text, f"{section}.{key}.{name}x=1")
            before, found = message.split("valid here: ")
            assert f": {section}.{key}.{name}x: unknown key; did you mean '{name}'? " in before
            assert set(found.split(", ")) == set(value)

    def test_in_unions_name_the_section_of_the_tag(self, messages: Any) -> None:
        text = MINIMAL.replace(
            "{initial: 64}", "{initial: 64, growth: {policy: geometric,\n x: 1}}"
        )
        assert messages(text) == [
            "c.yaml:4: batch.growth.every: missing, but needed",
            "c.yaml:5: batch.growth.x: unknown key; valid here: policy, factor, every",
        ]

    def test_that_are_called_like_a_tag_keep_their_name(self, messages: Any) -> None:
        growth = "{policy: geometric, every: 1ep, geometric: 1, fixed: 2}"
        first, second = messages(MINIMAL, f"batch.growth={growth}")
        assert "batch.growth.geometric: unknown key" in first
        assert "batch.growth.fixed: unknown key" in second

    def test_stand_on_their_own_line(self, messages: Any) -> None:
        (message,) = messages(MINIMAL + "bach: {initial: 3}\n")
        assert message.startswith("c.yaml:7: bach: unknown key; did you mean 'batch'? valid here: ")
        assert message.endswith(", extends")

    def test_are_escaped(self, messages: Any) -> None:
        (message,) = messages(MINIMAL + '"a\\nb\\e[31m": 1\n')
        assert message.startswith(r"c.yaml:7: a\nb\x1b[31m: unknown key")


class TestValues:
    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("batch.initial=1.5", "batch.initial: must be a whole number, not 1.5"),
            ("batch.initial=64.0", "batch.initial: must be a whole number, not 64.0"),
            ("batch.initial=1e3", "batch.initial: must be a whole number, not 1000.0"),
            ("batch.initial=true", "batch.initial: must be a whole number, not true"),
            ("batch.initial='64'", "batch.initial: must be a whole number, not '64'"),
            ("batch.initial=", "batch.initial: must be a whole number, not null"),
            ("batch.initial=[64]", "batch.initial: must be a whole number, not a list"),
            ("batch.initial=-64", "batch.initial: must be at least 1, not -64"),
            ("batch.initial=0", "batch.initial: must be at least 1, not 0"),
            (
                "batch.initial=9007199254740993",
                "batch.initial: must be at most 9007199254740992, not 9007199254740993",
            ),
            ("ranks.start=2.5", "ranks.start: must be a whole number, not 2.5"),
            ("train.log_every=false", "train.log_every: must be a whole number, not false"),
            ("train.keep_checkpoints=1", "train.keep_checkpoints: must be at least 2, not 1"),
            ("seed=-1", "seed: must be at least 0, not -1"),
            ("seed=9223372036854775808", "seed: must be less than 9223372036854775808, not"),
            ("data.workers=1025", "data.workers: must be at most 1024, not 1025"),
            ("lr.base=true", "lr.base: must be a number, not true"),
            ("lr.base=fast", "lr.base: must be a number, not 'fast'"),
            ("lr.base=0", "lr.base: must be more than 0, not 0"),
            ("lr.base=.nan", "lr.base: must be a finite number, not nan"),
            ("lr.base=-.inf", "lr.base: must be a finite number, not -inf"),
            ("lr.base=1e999", "lr.base: must be a finite number, not inf"),
            ("optimizer.momentum=1", "optimizer.momentum: must be less than 1, not 1"),
            ("optimizer.weight_decay=.inf", "optimizer.weight_decay: must be a finite number"),
            ("optimizer.name=adan", "optimizer.name: must be 'sgd', 'lars', 'lamb', 'adadelta',"),
            ("lr.scaling=cubic", "lr.scaling: must be 'linear', 'sqrt' or 'none', not 'cubic'"),
            ("data.augment=1", "data.augment: must be true or false, not 1"),
            ("data.augment=yes", "data.augment: must be true or false, not 'yes'"),
            ("name=5", "name: must be text, not 5; put it in quotes"),
            ("name=", "name: must be text, not null"),
            ("name=''", "name: must be text of at least 1 character, not ''"),
            ("name=" + "x" * 201, "name: must be text of at most 200 characters, not 'xxx"),
            ("optimizer=", "optimizer: must be a mapping of keys, not null"),
            ("optimizer=sgd", "optimizer: must be a mapping of keys, not 'sgd'"),
            ("batch=[1, 2]", "batch: must be a mapping of keys, not a list"),
            ("batch.growth=geometric", "batch.growth: must be a mapping of keys, not 'geometric'"),
            (
                "batch.growth={every: 5ep}",
                f"batch.growth.policy: missing, but needed; valid are {POLICY_NAMES}",
            ),
            (
                "batch.growth.policy=quadratic",
                f"batch.growth.policy: must be one of {POLICY_NAMES}, not 'quadratic'",
            ),
            (
                "batch.growth.policy=[x]",
                f"batch.growth.policy: must be one of {POLICY_NAMES}, not a list",
            ),
            (
                "batch.growth.policy=",
                f"batch.growth.policy: must be one of {POLICY_NAMES}, not null",
            ),
            ("batch.growth.policy=linear", "batch.growth.rate: missing, but needed"),
            ("batch.growth.policy=list", "batch.growth.stages: missing, but needed"),
            (
                "lr.decay.kind=square",
                f"lr.decay.kind: must be one of {DECAY_NAMES}, not 'square'",
            ),
            ("lr.decay.kind=multistep", "lr.decay.at: missing, but needed"),
            ("lr.decay.kind=exponential", "lr.decay.every: missing, but needed"),
            ("lr.warmup={kind: none, duration: 1ep}", "lr.warmup.kind: must be 'gradual' or 'cons"),
            ("lr.warmup={kind: constant}", "lr.warmup.duration: missing, but needed"),
            ("lr.warmup={duration: 1ep, per: batch}", "lr.warmup.per: must be 'update' or 'epoch'"),
            ("lr.warmup={duration: 1ep, start: -1}", "lr.warmup.start: must be at least 0, not -1"),
            ("lr.max=0", "lr.max: must be more than 0, not 0"),
            ("lr.max_batch=0", "lr.max_batch: must be at least 1, not 0"),
            ("lr.min=-1", "lr.min: must be at least 0, not -1"),
            ("batch.multiple_of=0", "batch.multiple_of: must be at least 1, not 0"),
            ("batch.shrink=1", "batch.shrink: must be true or false, not 1"),
            ("ranks.per_node=0", "ranks.per_node: must be at least 1, not 0"),
            ("optimizer.max_momentum=1", "optimizer.max_momentum: must be less than 1, not 1"),
            ("optimizer.momentum=1.5", "optimizer.momentum: must be less than 1, not 1.5"),
            ("optimizer.momentum=-0.1", "optimizer.momentum: must be at least 0, not -0.1"),
            ("optimizer.trust_coefficient=0", "optimizer.trust_coefficient: must be more than 0"),
            (
                "optimizer.momentum_scaling=smith",
                "optimizer.momentum_scaling: must be 'none' or 'smith_le', not 'smith'",
            ),
            ("paper={source: a}", "paper.place: missing, but needed"),
            ("paper={source: '', place: b}", "paper.source: must be text of at least 1 character"),
            (
                "paper={source: a, place: b, printed: [{value: 1}]}",
                "paper.printed.0.metric: missing, but needed",
            ),
            (
                "batch.growth={policy: list, stages: [{start: 1ep}]}",
                "batch.growth.stages.0.batch: missing, but needed",
            ),
            (
                "batch.growth={policy: list, stages: [{start: 1, batch: 99}]}",
                "batch.growth.stages.0.start: 1 is not a duration; write a number and its unit",
            ),
            (
                "batch.growth={policy: list, stages: [{start: 1ep, batch: 0}]}",
                "batch.growth.stages.0.batch: must be at least 1, not 0",
            ),
            (
                "batch.growth={policy: list, stages: [128]}",
                "batch.growth.stages.0: must be a mapping of keys, not 128",
            ),
            ("lr.decay={kind: multistep, at: [5]}", "lr.decay.at.0: 5 is not a duration; write a"),
            (
                "lr.decay={kind: step, every: 1ep, factor: 1.5}",
                "lr.decay.factor: must be at most 1, not 1.5",
            ),
            (
                "lr.decay={kind: exponential, every: 1ep, factor: 0}",
                "lr.decay.factor: must be more than 0, not 0",
            ),
            ("lr.decay={kind: poly, power: 0}", "lr.decay.power: must be more than 0, not 0"),
            ("lr.decay={kind: cosine, end: -1}", "lr.decay.end: must be at least 0, not -1"),
            (
                "batch.growth={policy: geometric, every: 5ep, factor: 0.5}",
                "batch.growth.factor: must be at least 1, not 0.5",
            ),
            (
                "train.duration=5",
                "train.duration: 5 is not a duration; write a number and its unit",
            ),
            ("train.duration='a = 5'", "train.duration: 'a = 5' is not a duration; write"),
            ("train.duration=-5ep", "train.duration: '-5ep' is not a duration; write"),
            ("train.duration=1.5up", "train.duration: '1.5up': only epochs may be fractional"),
            ("train.duration=", "train.duration: None is not a duration; write"),
            ("train.duration=true", "train.duration: True is not a duration; write"),
        ],
    )
    def test_that_are_not_valid(self, messages: Any, override: str, said: str) -> None:
        (message,) = messages(MINIMAL, override)
        assert re.match(rf"override ['\"].*['\"…]: {re.escape(said)}", message)

    @pytest.mark.parametrize(
        ("growth", "said"),
        [
            ("linear, rate: 0", "rate: must be more than 0, not 0"),
            ("loss, loss: median", "loss: must be 'running', 'sample' or 'full', not 'median'"),
            ("loss, sample: 0", "sample: must be at least 1, not 0"),
            ("loss, limit: 1", "limit: must be more than 1, not 1"),
            ("rolling, loss_weight: -1", "loss_weight: must be at least 0, not -1"),
            ("rolling, limit: 0.5", "limit: must be more than 1, not 0.5"),
            ("noise, ratio: 0", "ratio: must be more than 0, not 0"),
            ("noise, hysteresis: -1", "hysteresis: must be at least 0, not -1"),
            ("noise, limit: 1", "limit: must be more than 1, not 1"),
            ("plateau, factor: 1", "factor: must be more than 1, not 1"),
            ("plateau, patience: 0", "patience: must be at least 1, not 0"),
            ("plateau, threshold: 1", "threshold: must be less than 1, not 1"),
            ("plateau, dwell: 1.5up", "dwell: '1.5up': only epochs may be fractional"),
            ("plateau, wait: -1ep", "wait: '-1ep' is not a duration; write a number"),
            ("list, stages: [128]", "stages.0: must be a mapping of keys, not 128"),
            ("list, stages: [{start: 1ep}]", "stages.0.batch: missing, but needed"),
            ("list, stages: [{batch: 1}]", "stages.0.start: missing, but needed"),
            ("list, stages: [{start: 1, batch: 9}]", "stages.0.start: 1 is not a duration; write"),
            ("list, stages: [{start: 1ep, batch: 0}]", "stages.0.batch: must be at least 1, not 0"),
        ],
    )
    def test_of_growth_that_are_not_valid(self, messages: Any, growth: str, said: str) -> None:
        override = f"batch.growth={{policy: {growth}}}"
        assert messages(MINIMAL, override)[0].startswith(
            f"override '{override}': batch.growth.{said}"
        )

    @pytest.mark.parametrize(
        ("value", "shown"),
        [("0", "0"), ("-1", "-1"), ("1e31", "1e+31"), ("true", "true"), ("", "null"),
         (".nan", "nan"), ("x", "'x'"), ("[1, 0]", "0"), ("[]", "an empty list"),
         ("[[1]]", "a list"), ("[.inf]", "inf"), ("[true]", "true"), ("{a: 1}", "a mapping")],
    )  # fmt: skip
    def test_that_are_no_factors_of_growths(self, messages: Any, value: str, shown: str) -> None:
        assert messages(MINIMAL, f"lr.on_growth={value}") == [
            f"override 'lr.on_growth={value}': lr.on_growth: must be a number more than 0 and at "
            f"most 1e30, or a list of such numbers, not {shown}"
        ]

    @pytest.mark.parametrize(
        ("value", "shown"),
        [("x", "'x'"), ("true", "true"), (".nan", "nan"), ("null", "null"), ("-.inf", "-inf"),
         ("[1]", "a list"), ("1e31", "1e+31"), ("Estimate", "'Estimate'")],
    )  # fmt: skip
    def test_that_are_no_optimum(self, messages: Any, value: str, shown: str) -> None:
        override = f"batch.growth={{policy: loss, optimum: {value}}}"
        assert messages(MINIMAL, override) == [
            f"override '{override}': batch.growth.optimum: must be a number or estimate, not "
            f"{shown}"
        ]

    @pytest.mark.parametrize("value", [0, -3, 2.5, 1e-300, "estimate"])
    def test_that_are_an_optimum(self, tmp_path: Path, value: Any) -> None:
        growth = f"{{policy: loss, optimum: {value}}}"
        config = load(MINIMAL, f"batch.growth={growth}", "batch.max=64", folder=tmp_path)
        assert config.batch.growth.model_dump()["optimum"] == value

    def test_stand_on_their_own_line_of_the_file(self, messages: Any) -> None:
        text = MINIMAL.replace("batch: {initial: 64}", "batch:\n  initial: 64\n  max: many")
        assert messages(text) == ["c.yaml:6: batch.max: must be a whole number, not 'many'"]

    def test_are_all_told_at_once(self, messages: Any) -> None:
        text = MINIMAL.replace("64", "0").replace("0.1", "x").replace("2ep", "2")
        assert [message.split(" ")[:2] for message in messages(text)] == [
            ["c.yaml:4:", "batch.initial:"],
            ["c.yaml:5:", "lr.base:"],
            ["c.yaml:6:", "train.duration:"],
        ]

    @pytest.mark.parametrize("path", [".".join(path) for path, _ in leaves(FULL)])
    @pytest.mark.parametrize(
        "value", [".nan", ".inf", "-.inf", "9" * 400, "9" * 4999, "[[]]", "{a: 1}", "!!set {a}"]
    )
    def test_no_leaf_takes_what_is_no_value(self, messages: Any, path: str, value: str) -> None:
        lines = messages(yaml.safe_dump(FULL), f"{path}={value}")
        assert all(line.startswith("override '") for line in lines)

    @pytest.mark.parametrize(
        "path", [".".join(path) for path, value in leaves(FULL) if type(value) is int]
    )
    @pytest.mark.parametrize("value", ["true", "false", "2.5", "2.0", "-1", "'2'", "2ep"])
    def test_counts_are_whole_numbers(self, messages: Any, path: str, value: str) -> None:
        (line,) = messages(yaml.safe_dump(FULL), f"{path}={value}")
        assert f": {path}: must be a" in line


def stages(*places: str | int) -> str:
    """The override that lists stages: a start, its batch, the next start …"""
    pairs = zip(places[::2], places[1::2], strict=True)
    listed = ", ".join(f"{{start: {start}, batch: {batch}}}" for start, batch in pairs)
    return f"batch.growth={{policy: list, stages: [{listed}]}}"


class TestAcrossKeys:
    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["batch.micro=65"], "batch.micro = 65 is more than batch.initial = 64; a micro-batch"),
            (["batch.max=63"], "batch.max = 63 is less than batch.initial = 64"),
            (["ranks.start=2", "ranks.max=1"], "ranks.max = 1 is less than ranks.start = 2"),
            (
                ["optimizer.momentum=0", "optimizer.nesterov=true"],
                "optimizer.nesterov needs optimizer.momentum above 0",
            ),
            (
                ["comm.summation=exact", "comm.compression=fp16"],
                "comm.summation = exact cannot be compressed; use comm.compression=none",
            ),
            (["comm.compression=bf16"], "comm.compression = bf16: Horovod 0.28.1 cannot carry"),
            (["train.duration=0ep"], "train.duration must be more than 0"),
            (["train.eval_every=0ep"], "train.eval_every must be more than 0"),
            (["train.checkpoint_every=0sa"], "train.checkpoint_every must be more than 0"),
            (
                ["batch.growth={policy: geometric, every: 0ep}"],
                "batch.growth.every must be more than 0",
            ),
            (["lr.decay={kind: step, every: 0up}"], "lr.decay.every must be more than 0"),
            (
                ["lr.decay={kind: exponential, every: 0ep}"],
                "lr.decay.every must be more than 0",
            ),
            (["lr.decay={kind: multistep, at: [0ep]}"], "lr.decay.at.0 must be more than 0"),
            (
                ["batch.growth={policy: linear, rate: 1, every: 0up}"],
                "batch.growth.every must be more than 0",
            ),
            (
                ["batch.max=64", "batch.growth={policy: loss, memory: 0up}"],
                "batch.growth.memory must be more than 0",
            ),
            (
                ["batch.max=64", "batch.growth={policy: plateau, dwell: 0ep}"],
                "batch.growth.dwell must be more than 0",
            ),
            (
                ["batch.growth={policy: list, stages: [{start: 0ep, batch: 64}]}"],
                "batch.growth.stages.0.start must be more than 0",
            ),
            (
                [stages("5ep", 128, "5ep", 256)],
                "batch.growth.stages.1.start = 5ep is the same as 5ep, which stands above it; list",
            ),
            (
                [stages("5ep", 128, "3.5ep", 256)],
                "batch.growth.stages.1.start = 3.5ep is before 5ep, which stands above it; list "
                "them in ascending order",
            ),
            (
                [stages("1ep", 128, "2ep", 256, "1.5ep", 512)],
                "batch.growth.stages.2.start = 1.5ep is before 2ep, which stands above it",
            ),
            (
                [stages("5ep", 128, "900up", 256)],
                "batch.growth.stages.1.start = 900up has another unit than 5ep before it; write",
            ),
            (
                [stages("5ep", 128, "90000sa", 256)],
                "batch.growth.stages.1.start = 90000sa has another unit than 5ep before it; write",
            ),
            (
                ["batch.max=200", stages("1ep", 128, "2ep", 256)],
                "batch.growth.stages.1.batch = 256 is more than batch.max = 200",
            ),
            (
                [stages("1ep", 32)],
                "batch.growth.stages.0.batch = 32 is less than the 64 before it; set batch.shrink: "
                "true if the batch is to become smaller",
            ),
            (
                [stages("1ep", 128, "2ep", 127)],
                "batch.growth.stages.1.batch = 127 is less than the 128 before it; set batch.shrin",
            ),
            (
                ["lr.decay={kind: multistep, at: [1ep, 1ep]}"],
                "lr.decay.at.1 = 1ep is the same as 1ep, which stands above it; list them",
            ),
            (
                ["lr.decay={kind: multistep, at: [2ep, 1ep]}"],
                "lr.decay.at.1 = 1ep is before 2ep, which stands above it; list them",
            ),
            (
                ["lr.decay={kind: multistep, at: [1ep, 90up]}"],
                "lr.decay.at.1 = 90up has another unit than 1ep before it; write all in one unit",
            ),
            (
                ["lr.decay={kind: poly, begin: 9up}"],
                "lr.decay.begin = 9up cannot be set against train.duration = 2ep: give both in "
                "updates, or neither",
            ),
            (
                ["train.duration=99up", "lr.decay={kind: cosine, begin: 1ep}"],
                "lr.decay.begin = 1ep cannot be set against train.duration = 99up: give both in up",
            ),
            (
                ["lr.decay={kind: step, every: 1ep, begin: 9up}"],
                "lr.decay.begin = 9up cannot be set against lr.decay.every = 1ep: give both",
            ),
            (
                ["lr.decay={kind: exponential, every: 9up, begin: 100sa}"],
                "lr.decay.begin = 100sa cannot be set against lr.decay.every = 9up: give both",
            ),
            (
                ["lr.decay={kind: poly, begin: 2.5ep}"],
                "lr.decay.begin = 2.5ep is longer than train.duration = 2ep",
            ),
            (
                ["lr.warmup={duration: 0.5ep, per: epoch}"],
                "lr.warmup.per = epoch needs a whole number of epochs, not 0.5ep",
            ),
            (
                ["lr.warmup={duration: 90up, per: epoch}"],
                "lr.warmup.per = epoch needs a whole number of epochs, not 90up",
            ),
            (
                ["lr.warmup={duration: 1ep, per: epoch, kind: constant}"],
                "lr.warmup.per = epoch has no meaning with kind = constant",
            ),
            (["lr.min=0.5", "lr.max=0.25"], "lr.max = 0.25 is less than lr.min = 0.5"),
            *(
                (
                    [f"batch.growth={{policy: {policy}}}"],
                    f"batch.max is needed with batch.growth.policy = {policy}: what is measured "
                    "may ask for any batch",
                )
                for policy in MEASURED
                if policy != "goodput"  # which needs more
            ),
            (
                ["batch.growth={policy: goodput}"],
                "batch.growth.throughput is needed with batch.growth.policy = goodput: name "
                "directories of harness bench, harness run or harness probe, or give "
                "batch.growth.model",
            ),
            (
                ["batch.growth={policy: goodput, throughput: [a], ranks: [2, 1]}"],
                "batch.growth.ranks = [2, 1]: must be different numbers in ascending order",
            ),
            (
                ["batch.growth={policy: goodput, throughput: [a]}"],
                "batch.max is needed with batch.growth.policy = goodput: what is measured may ask "
                "for any batch",
            ),
            (
                ["batch.growth={policy: noise}", "batch.max=256", "batch.micro=64"],
                "batch.micro = 64 makes one micro-batch of batch.initial = 64; to measure the "
                "noise scale two or more are needed: micro at most 63",
            ),
            (
                ["batch.growth={policy: noise}", "batch.max=256", "batch.initial=20"],
                "batch.micro = 20 makes one micro-batch of batch.initial = 20; to measure the",
            ),
            (
                ["batch.initial=100", "batch.multiple_of=32"],
                "batch.initial = 100 is not a multiple of batch.multiple_of = 32; 96 is",
            ),
            (
                ["batch.initial=20", "batch.multiple_of=32"],
                "batch.initial = 20 is not a multiple of batch.multiple_of = 32; 32 is",
            ),
            (
                ["batch.max=100", "batch.multiple_of=32"],
                "batch.max = 100 is not a multiple of batch.multiple_of = 32; 96 is",
            ),
            (
                ["optimizer.trust_coefficient=0.02"],
                "optimizer.trust_coefficient belongs to optimizer.name = lars, not sgd",
            ),
            (
                ["optimizer.clip=false"],
                "optimizer.clip belongs to optimizer.name = lars, not sgd",
            ),
            (
                ["optimizer.momentum_scaling=smith_le", "optimizer.max_momentum=0.5"],
                "optimizer.max_momentum = 0.5 is less than optimizer.momentum = 0.9",
            ),
            (["lr.warmup.duration=0ep"], "lr.warmup.duration must be more than 0"),
            (
                ["lr.warmup.duration=3ep"],
                "lr.warmup.duration = 3ep is longer than train.duration = 2ep",
            ),
            (
                ["comm.backend=solo", "ranks.max=3"],
                "comm.backend = solo is one process, but ranks asks for 3; use comm.backend",
            ),
        ],
    )
    def test_refused(self, messages: Any, overrides: list[str], said: str) -> None:
        (message,) = messages(MINIMAL, *overrides)
        assert re.match(rf"override ['\"].*['\"…]: {re.escape(said)}", message)

    def test_idle_ranks_are_refused(self, messages: Any) -> None:
        assert messages(MINIMAL, "ranks.start=3") == [
            "c.yaml:4: batch.initial = 64 in micro-batches of 32 makes 2 for 3 ranks: some would "
            "idle; use batch.micro ≤ 21, fewer ranks, or a larger batch"
        ]
        assert messages(MINIMAL, "ranks.start=65") == [
            "c.yaml:4: batch.initial = 64 is less than one sample for each of 65 ranks; "
            "use fewer ranks or a larger batch"
        ]

    def test_have_the_line_of_the_key_they_name(self, messages: Any) -> None:
        text = MINIMAL.replace("batch: {initial: 64}", "batch:\n  initial: 64\n  micro: 65")
        assert messages(text)[0].startswith("c.yaml:6: batch.micro = 65")
        text = MINIMAL.replace("lr: {base: 0.1}", "lr:\n  base: 0.1\n  warmup:\n    duration: 9ep")
        assert messages(text)[0].startswith("c.yaml:8: lr.warmup.duration = 9ep")
        text = MINIMAL + "ranks: {start: 2}\ncomm:\n  backend: solo\n"
        assert messages(text)[0].startswith("c.yaml:9: comm.backend = solo")

    @pytest.mark.parametrize(
        ("section", "added", "line", "said"),
        [
            ("batch", "max: 100|growth:|  policy: list|  stages:|    - {start: 1ep, batch: 90}|"
             "    - start: 2ep|      batch: 101", 12, "batch.growth.stages.1.batch = 101 is more"),
            ("batch", "growth:|  policy: list|  stages:|    - start: 1ep|      batch: 63", 10,
             "batch.growth.stages.0.batch = 63 is less"),
            ("batch", "growth:|  policy: list|  stages:|    - {start: 2ep, batch: 90}|"
             "    - {start: 1ep, batch: 99}", 10, "batch.growth.stages.1.start = 1ep is before"),
            ("batch", "growth:|  policy: list|  stages:|    - {start: 2ep, batch: 90}|"
             "    - {start: 9up, batch: 99}", 10, "batch.growth.stages.1.start = 9up has another"),
            ("batch", "multiple_of: 48", 5, "batch.initial = 64 is not a multiple of"),
            ("batch", "multiple_of: 64|max: 100", 7, "batch.max = 100 is not a multiple of"),
            ("batch", "growth:|  policy: plateau", 4, "batch.max is needed with"),
            ("batch", "max: 65|growth:|  policy: plateau|  dwell: 0ep", 9,
             "batch.growth.dwell must be more than 0"),
            ("batch", "growth:|  policy: linear|  rate: 1|  step: 1", 9,
             "batch.growth.step: unknown key"),
            ("batch", "max: 65|micro: 64|growth: {policy: noise}", 7, "batch.micro = 64 makes"),
            ("lr", "decay:|  kind: poly|  begin: 9up", 9, "lr.decay.begin = 9up cannot be set"),
            ("lr", "decay:|  kind: poly|  begin: 9ep", 9, "lr.decay.begin = 9ep is longer than"),
            ("lr", "decay:|  kind: multistep|  at: [2ep,|    1ep]", 10, "lr.decay.at.1 = 1ep is"),
            ("lr", "warmup:|  duration: 1.5ep|  per: epoch", 9, "lr.warmup.per = epoch needs a"),
            ("lr", "on_growth: [1,|  0]", 7, "lr.on_growth: must be a number more than 0"),
            ("lr", "min: 3|max: 2", 8, "lr.max = 2 is less than lr.min"),
        ],
    )  # fmt: skip
    def test_have_the_line_in_whatever_section(
        self, messages: Any, section: str, added: str, line: int, said: str
    ) -> None:
        """``added``: lines of the section, with | between them."""
        before = {"batch": "batch: {initial: 64}", "lr": "lr: {base: 0.1}"}[section]
        after = before.replace(": {", ":\n  ").replace("}", f"\n  {added}").replace("|", "\n  ")
        (message,) = messages(MINIMAL.replace(before, after))
        assert message.startswith(f"c.yaml:{line}: {said}")

    def test_what_is_next_to_a_limit_is_accepted(self, tmp_path: Path) -> None:
        for overrides in (
            ["batch.max=256", stages("1ep", 64, "2ep", 256)],
            ["batch.shrink=true", stages("1ep", 128, "2ep", 1)],
            ["batch.multiple_of=64", "batch.max=128", stages("1ep", 65)],
            ["batch.max=64", "batch.growth={policy: noise}", "batch.micro=63"],
            ["batch.max=64", "batch.growth={policy: plateau, wait: 0up}"],
            ["lr.decay={kind: poly, begin: 2ep}"],
            ["lr.decay={kind: step, every: 9up, begin: 9up}"],
            ["lr.warmup={duration: 2ep, per: epoch}"],
            ["lr.min=0.5", "lr.max=0.5"],
            ["optimizer={name: lars, trust_coefficient: 0.001}"],
            ["optimizer={momentum: 0, momentum_scaling: smith_le, max_momentum: 0}"],
            ["optimizer={momentum: 0.95, max_momentum: 0.9}"],
        ):
            assert load(MINIMAL, *overrides, folder=tmp_path)

    @given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 40))
    def test_shares_are_refused_exactly_where_a_rank_would_idle(
        self, initial: int, micro: int, ranks: int
    ) -> None:
        micro = min(initial, micro)
        raw = {**yaml.safe_load(MINIMAL), "batch": {"initial": initial, "micro": micro}}
        config = Config.model_validate(raw)
        if len(range(0, initial, micro)) >= ranks:
            check_shares(config, ranks)
            return
        with pytest.raises(ValueError, match=r"would idle|less than one sample") as caught:
            check_shares(config, ranks)
        advice = re.search(r"batch\.micro ≤ (\d+)", str(caught.value))
        if advice:  # what the message recommends is accepted
            raw["batch"]["micro"] = int(advice[1])
            check_shares(Config.model_validate(raw), ranks)


class TestOverrides:
    @pytest.mark.parametrize("text", ["x", "=1", "a..b=1", "a.b.=1", ".a=1", "a b=1", "a-b=1", ""])
    def test_of_another_form_are_refused(self, messages: Any, text: str) -> None:
        assert messages(MINIMAL, text) == [
            f"'{text}' is not an override; write KEY=VALUE such as batch.initial=128"
        ]

    def test_are_told_by_their_text(self, messages: Any) -> None:
        (message,) = messages(MINIMAL, "batch={")
        assert message.startswith("override 'batch={': not valid YAML: ")
        assert messages(MINIMAL, "batch={a: 1, a: 2}") == [
            "override 'batch={a: 1, a: 2}': the key 'a' stands here twice"
        ]

    def test_extends_is_none(self, messages: Any) -> None:
        (message,) = messages(MINIMAL, "extends=base.yaml")
        assert "extends can stand in a file only" in message

    def test_the_last_one_wins(self, tmp_path: Path) -> None:
        assert load(MINIMAL, "seed=1", "seed=2", folder=tmp_path).seed == 2

    def test_a_section_keeps_what_is_not_named(self, tmp_path: Path) -> None:
        config = load(yaml.safe_dump(FULL), "batch={max: 2048}", folder=tmp_path)
        assert (config.batch.max, config.batch.initial) == (2048, 64)

    def test_their_order_does_not_matter(self, tmp_path: Path) -> None:
        overrides = [
            "batch.growth.policy=geometric",
            "batch.growth.every=3ep",
            "batch.growth.factor=4",
        ]
        fixed = MINIMAL.replace("{initial: 64}", "{initial: 64, growth: {policy: fixed}}")
        wanted = load(fixed, *overrides, folder=tmp_path).batch.growth
        for seed in range(6):
            random.Random(seed).shuffle(overrides)
            assert load(fixed, *overrides, folder=tmp_path).batch.growth == wanted

    def test_another_policy_drops_the_keys_of_the_first(self, tmp_path: Path) -> None:
        full = yaml.safe_dump(FULL)
        assert (
            load(full, "batch.growth.policy=fixed", folder=tmp_path).batch.growth.policy == "fixed"
        )
        decay = load(full, "lr.decay.kind=poly", folder=tmp_path).lr.decay
        assert decay.model_dump() == {"kind": "poly", "power": 2.0, "begin": None, "end": 0.0}

    @VARIED
    def test_any_policy_replaces_any_other_as_a_whole(
        self, tmp_path: Path, section: str, key: str, value: dict[str, Any]
    ) -> None:
        text = yaml.safe_dump(varied(section, key, value))
        for _, _, other in (v for v in VARIANTS if v[:2] == (section, key) and v[2] != value):
            overrides = [as_override((section, key, name), leaf) for name, leaf in other.items()]
            random.Random(str(value)).shuffle(overrides)
            assert at(load(text, *overrides, folder=tmp_path), (section, key)) == other

    def test_a_list_is_replaced_as_a_whole(self, tmp_path: Path) -> None:
        text = yaml.safe_dump(varied("batch", "growth", GROWTHS[1]))
        config = load(text, "batch.growth.stages=[{start: 9up, batch: 99}]", folder=tmp_path)
        assert at(config, ("batch", "growth", "stages")) == [{"start": "9up", "batch": 99}]
        text = yaml.safe_dump({**FULL, "lr": {**FULL["lr"], "on_growth": [0.5, 0.25]}})
        assert load(text, "lr.on_growth=[2]", folder=tmp_path).lr.on_growth == [2.0]
        assert load(text, "lr.on_growth=2", folder=tmp_path).lr.on_growth == 2.0

    def test_the_same_policy_keeps_them(self, tmp_path: Path) -> None:
        growth = load(yaml.safe_dump(FULL), "batch.growth.policy=geometric", folder=tmp_path)
        assert str(growth.batch.growth.every) == "5ep"  # type: ignore[union-attr]

    def test_a_kind_that_is_added_keeps_the_rest(self, tmp_path: Path) -> None:
        text = MINIMAL.replace("{base: 0.1}", "{base: 0.1, warmup: {duration: 1ep}}")
        warmup = load(text, "lr.warmup.kind=gradual", folder=tmp_path).lr.warmup
        assert warmup is not None
        assert str(warmup.duration) == "1ep"

    def test_a_missing_key_of_a_replaced_section_has_the_new_place(self, messages: Any) -> None:
        full = yaml.safe_dump({**FULL, "batch": {"initial": 64, "growth": {"policy": "fixed"}}})
        (message,) = messages(full, "batch.growth.policy=geometric")
        assert message == (
            "override 'batch.growth.policy=geometric': batch.growth.every: missing, but needed"
        )


class TestExtends:
    def write(self, folder: Path, **files: str) -> Path:
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        return folder / f"{next(iter(files))}.yaml"

    def fails(self, folder: Path, **files: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(self.write(folder, **files))
        return str(caught.value).replace(f"{folder}/", "")

    def test_lays_a_file_on_its_base(self, tmp_path: Path) -> None:
        child = "extends: base.yaml\nname: child\nbatch: {micro: 8}\n"
        config = load_config(self.write(tmp_path, child=child, base=MINIMAL))
        assert (config.name, config.batch.initial, config.batch.micro) == ("child", 64, 8)

    def test_lays_files_in_the_order_of_the_list(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path,
            child="extends: [base.yaml, a.yaml, b.yaml]\n",
            base=MINIMAL,
            a="seed: 1\nname: a\n",
            b="seed: 2\n",
        )
        assert (load_config(path).seed, load_config(path).name) == (2, "a")

    def test_is_relative_to_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "base.yaml").write_text(MINIMAL)
        (tmp_path / "deep" / "c.yaml").write_text("extends: ../base.yaml\n")
        assert load_config(tmp_path / "deep" / "c.yaml").name == "small"

    def test_a_common_base_of_two_is_no_circle(self, tmp_path: Path) -> None:
        files = {"a": "extends: base.yaml\n", "b": "extends: base.yaml\n", "base": MINIMAL}
        path = self.write(tmp_path, child="extends: [a.yaml, b.yaml]\n", **files)
        assert load_config(path).name == "small"

    @pytest.mark.parametrize(
        ("over", "growth"),
        [
            ("{policy: fixed}", {"policy": "fixed"}),
            ("{every: 2ep}", {"policy": "geometric", "factor": 3.0, "every": "2ep"}),
            (
                "{policy: geometric, every: 2ep}",
                {"policy": "geometric", "factor": 3.0, "every": "2ep"},
            ),
        ],
    )
    def test_merges_a_policy_by_its_name(
        self, tmp_path: Path, over: str, growth: dict[str, Any]
    ) -> None:
        base = MINIMAL.replace("64}", "64, growth: {policy: geometric, factor: 3, every: 1ep}}")
        child = f"extends: base.yaml\nbatch: {{growth: {over}}}\n"
        config = load_config(self.write(tmp_path, child=child, base=base))
        assert config.batch.growth.model_dump(mode="json") == growth

    def test_problems_have_the_place_of_the_file_they_stand_in(self, tmp_path: Path) -> None:
        base = MINIMAL.replace("64", "many")
        message = self.fails(tmp_path, child="extends: base.yaml\nseed: x\n", base=base)
        assert message == (
            "child.yaml:2: seed: must be a whole number, not 'x'\n"
            "base.yaml:4: batch.initial: must be a whole number, not 'many'"
        )

    def test_problems_of_a_replaced_section_have_its_place(self, tmp_path: Path) -> None:
        base = MINIMAL.replace(
            "lr: {base: 0.1}", "lr:\n  base: 0.1\n  decay: {kind: step, every: 1ep}"
        )
        child = "extends: base.yaml\n\n\nlr: {decay: {kind: poly, every: 1ep}}\n"
        (line,) = self.fails(tmp_path, child=child, base=base).split("\n")
        assert line.startswith("child.yaml:4: lr.decay.every: unknown key; valid here: ")

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (
                {"a": "extends: a.yaml\n"},
                "a.yaml: extends goes in a circle: a.yaml → a.yaml",
            ),
            (
                {"a": "extends: b.yaml\n", "b": "extends: c.yaml\n", "c": "extends: b.yaml\n"},
                "b.yaml: extends goes in a circle: b.yaml → c.yaml → b.yaml",
            ),
            ({"a": "seed: 1\nextends: gone.yaml\n"}, "a.yaml:2: extends: no such file: gone.yaml"),
            ({"a": 'extends: "x\\0y"\n'}, "a.yaml:1: extends: no such file: x\\x00y"),
            ({"a": f"extends: {'x' * 300}\n"}, "a.yaml:1: extends: no such file: xxx"),
            ({"a": "extends: 5\n"}, "a.yaml:1: extends: must be the name of a YAML file or a list"),
            (
                {"a": "extends: []\n"},
                "a.yaml:1: extends: must be the name of a YAML file or a list",
            ),
            ({"a": "extends: [b, 1]\n"}, "a.yaml:1: extends: must be the name of a YAML file or"),
            ({"a": "extends: {b: c}\n"}, "a.yaml:1: extends: must be the name of a YAML file or"),
            (
                {"a": "extends: b.yaml\n", "b": "- 1\n"},
                "b.yaml: a configuration is a mapping of keys, but found a list",
            ),
        ],
    )
    def test_refuses(self, tmp_path: Path, files: dict[str, str], message: str) -> None:
        assert self.fails(tmp_path, **files).startswith(message)

    def test_a_directory_is_no_base(self, tmp_path: Path) -> None:
        assert "cannot be read: Is a directory" in self.fails(tmp_path, a="extends: .\n")

    def test_a_loop_of_links_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "loop.yaml").symlink_to("loop.yaml")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path / "loop.yaml")

    def test_a_long_chain_is_refused(self, tmp_path: Path) -> None:
        files = {f"f{i}": f"extends: f{i + 1}.yaml\n" for i in range(500)}
        assert "more than 20 files deep" in self.fails(tmp_path, **files)


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "the file is empty"), ("# nothing\n", "the file is empty"), ("- 1\n", "found a list"),
     ("5\n", "found 5"), ("words\n", "found 'words'")],
)  # fmt: skip
def test_a_file_that_is_no_mapping(messages: Any, text: str, found: str) -> None:
    assert messages(text) == [f"c.yaml: a configuration is a mapping of keys, but {found}"]


FRAGMENTS = ["[", "{", "&a ", "*a", "!!python/name:os.system ", ".nan", "-1", "1e400", "\x00", "\t",
             ": ", "- ", "'", "2.5", "true", "5ep", "kind: poly", "extends: c.yaml\n", "\n", "é",
             "<<: ", "? ", "null", "9" * 30]  # fmt: skip


@settings(max_examples=200)
@given(st.data())
def test_mutated_files_load_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    full = varied(*data.draw(st.sampled_from(VARIANTS)))
    text = yaml.safe_dump(full) if data.draw(st.booleans()) else MINIMAL
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 10))
        text = text[:start] + data.draw(st.sampled_from(FRAGMENTS)) + text[end:]
    try:
        config = load(text, folder=tmp_path_factory.getbasetemp(), name="mutated.yaml")
    except ConfigError as error:
        lines = str(error).split("\n")
    else:
        lines = ["a valid configuration"]
        assert (
            load(dump_config(config), folder=tmp_path_factory.getbasetemp(), name="again.yaml")
            == config
        )
    assert all(line.isprintable() for line in lines)


NOISE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.data())
def test_any_value_anywhere_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    full = varied(*data.draw(st.sampled_from(VARIANTS)))
    path = data.draw(st.sampled_from([path for path, _ in leaves(full)]))
    key = ".".join(path[: data.draw(st.integers(1, len(path)))])
    value = yaml.safe_dump(data.draw(NOISE), default_flow_style=True).removesuffix("...\n")
    try:
        load(yaml.safe_dump(full), f"{key}={value}", folder=folder, name="noise.yaml")
    except ConfigError as error:
        message = str(error)
    else:
        message = "a valid configuration"
    assert all(line.isprintable() for line in message.split("\n"))


def test_no_message_is_in_the_words_of_the_library_that_checks(tmp_path: Path) -> None:
    paths = [".".join(path) for path, _ in leaves(FULL)]
    cases = [(FULL, [path]) for path in paths if path.endswith((".policy", ".kind"))]
    cases.append((FULL, [path for path in paths if [path] not in [keys for _, keys in cases]]))
    for section, key, value in VARIANTS:
        keys = [f"{section}.{key}.{name}" for name in value if name not in ("policy", "kind")]
        cases.append((varied(section, key, value), keys))
    said = []
    for raw, keys in cases:
        text = yaml.safe_dump(raw)
        for bad in ("[]", "[[]]", "{}", "-1", "x y z", ".nan", "true", "", "1e40", '"\\ud800"'):
            try:
                load(text, *(f"{key}={bad}" for key in keys), folder=tmp_path)
            except ConfigError as error:
                said += str(error).split("\n")
    assert len(said) > 500
    foreign = ("nput should", "is not valid:", "after validation")
    assert not [line for line in said if any(words in line for words in foreign)]


def test_the_kinds_of_unions_have_distinct_tags() -> None:
    for field, tag in (
        (Batch.model_fields["growth"], "policy"),
        (LearningRate.model_fields["decay"], "kind"),
    ):
        members = get_args(field.annotation)
        tags = [get_args(member.model_fields[tag].annotation) for member in members]
        assert all(len(names) == 1 for names in tags)
        assert len(set(tags)) == len(members)
