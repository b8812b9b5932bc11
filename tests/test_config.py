"""The configuration: what is valid, what is refused and in which words, extends, overrides."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from support import ROOT

from harness.config import Config, check_shares, dump_config, load_config
from harness.errors import ConfigError
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
    "data": {"dataset": "mnist", "root": "/data", "workers": 2, "augment": False},
    "model": {"name": "package.module:callable"},
    "batch": {
        "initial": 64,
        "max": 1024,
        "micro": 16,
        "growth": {"policy": "geometric", "factor": 1.5, "every": "5ep"},
        "epoch_end": "carry",
    },
    "ranks": {"start": 2, "max": 4, "prefer": "accumulation", "threads": 3},
    "optimizer": {"name": "sgd", "momentum": 0.8, "weight_decay": 1e-05, "nesterov": True},
    "lr": {
        "base": 0.1,
        "base_batch": 32,
        "scaling": "sqrt",
        "warmup": {"kind": "gradual", "duration": "200up", "start": 0.0},
        "decay": {"kind": "step", "every": "10000sa", "factor": 0.5},
        "on_growth": 0.75,
    },
    "comm": {
        "backend": "horovod",
        "controller": "gloo",
        "compression": "fp16",
        "summation": "float",
        "bucket_mb": 0.5,
    },
    "train": {
        "duration": "2.5ep",
        "eval_every": None,
        "checkpoint_every": "0.00001ep",
        "keep_checkpoints": 5,
        "log_every": 1,
        "precision": "fp32",
    },
}
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
    value: Any = config
    for key in path:
        value = getattr(value, key)
    return value


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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
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
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    changed = load(full, f"{'.'.join(path)}={text}", folder=tmp_path)
    expected = Duration.parse(value) if path[-1] in ("every", "duration") else value
    found = at(changed, path)
    assert (str(found) if isinstance(found, Duration) else found) == (
        str(expected) if isinstance(expected, Duration) else expected
    )


def test_the_full_example_names_every_key() -> None:
    def keys(model: type[BaseModel], data: dict[str, Any], path: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            if name not in data:
                yield f"{path}{name}"
            section = field.annotation
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from keys(section, data[name], f"{path}{name}.")

    assert list(keys(Config, FULL, "")) == []


def test_the_full_example_arrives_as_it_is(tmp_path: Path) -> None:
    config = load(yaml.safe_dump(FULL), folder=tmp_path)
    assert config.model_dump(mode="json") == FULL


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
PERIODS = st.one_of(
    st.integers(1, 10**9).map(lambda n: f"{n}sa"),
    st.integers(1, 10**9).map(lambda n: f"{n}up"),
    st.decimals("0.000001", 1000, places=6).map(lambda n: f"{n:f}ep"),
)
POSITIVE = st.floats(1e-300, 1e30)


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Valid configurations as plain data, each key present or not."""

    def section(**fields: st.SearchStrategy[Any]) -> dict[str, Any]:
        return draw(st.fixed_dictionaries({}, optional=fields))

    initial = draw(st.integers(1, 10**6))
    micro = draw(st.integers(1, initial))
    batch = section(
        max=st.integers(initial, 2**53),
        epoch_end=st.sampled_from(["short", "carry"]),
        growth=st.one_of(
            st.just({"policy": "fixed"}),
            st.fixed_dictionaries(
                {"policy": st.just("geometric"), "every": PERIODS},
                optional={"factor": st.floats(1, 100)},
            ),
        ),
    )
    lr = section(
        base_batch=st.integers(1, 10**9),
        scaling=st.sampled_from(["linear", "sqrt", "none"]),
        on_growth=POSITIVE,
        decay=st.one_of(
            st.just({"kind": "none"}),
            st.fixed_dictionaries({"kind": st.just("poly")}, optional={"power": POSITIVE}),
            st.fixed_dictionaries({"kind": st.just("step"), "every": PERIODS}),
        ),
    )
    train = section(
        eval_every=st.none() | PERIODS,
        checkpoint_every=st.none() | PERIODS,
        keep_checkpoints=st.integers(2, 2**40),
        log_every=st.integers(1, 2**53),
    )
    return {
        "name": draw(WORDS),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "data": {"dataset": draw(WORDS), **section(root=st.none() | WORDS, augment=st.booleans())},
        "model": {"name": draw(WORDS)},
        "batch": {"initial": initial, "micro": micro, **batch},
        "optimizer": section(momentum=st.floats(0.001, 0.999), nesterov=st.booleans()),
        "lr": {"base": draw(POSITIVE | st.integers(1, 1000)), **lr},
        "comm": section(compression=st.sampled_from(["none", "fp16"])),
        "train": {"duration": draw(PERIODS), **train},
    }


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
            ("sead=1", "did you mean 'seed'? ", "name, seed, data, model, batch, ranks"),
            ("data.rot=x", "did you mean 'root'? ", "dataset, root, workers, augment"),
            ("model.nam=x", "did you mean 'name'? ", "name"),
            (
                "batch.intial=1",
                "did you mean 'initial'? ",
                "initial, max, micro, growth, epoch_end",
            ),
            ("batch.growth={policy: fixed, every: 1ep}", "", "policy"),
            ("ranks.strat=1", "did you mean 'start'? ", "start, max, prefer, threads"),
            ("optimizer.momentun=1", "did you mean 'momentum'? ", "name, momentum, weight_decay"),
            ("lr.bse=1", "did you mean 'base'? ", "base, base_batch, scaling, warmup, decay"),
            ("lr.decay={kind: none, power: 2}", "", "kind"),
            ("lr.decay={kind: poly, pwer: 2}", "did you mean 'power'? ", "kind, power"),
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
            ("optimizer.name=adam", "optimizer.name: must be 'sgd', not 'adam'"),
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
                "batch.growth.policy: missing, but needed; valid are fixed, geometric",
            ),
            (
                "batch.growth.policy=linear",
                "batch.growth.policy: must be one of fixed, geometric, not 'linear'",
            ),
            (
                "batch.growth.policy=[x]",
                "batch.growth.policy: must be one of fixed, geometric, not",
            ),
            ("batch.growth.policy=", "batch.growth.policy: must be one of fixed, geometric, not"),
            (
                "lr.decay.kind=cosine",
                "lr.decay.kind: must be one of none, poly, step, not 'cosine'",
            ),
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
        assert decay.model_dump() == {"kind": "poly", "power": 2.0}

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
        assert line.startswith("child.yaml:4: lr.decay.every: unknown key; valid here: kind, power")

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
    text = yaml.safe_dump(FULL) if data.draw(st.booleans()) else MINIMAL
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
    path = data.draw(st.sampled_from([path for path, _ in leaves(FULL)]))
    key = ".".join(path[: data.draw(st.integers(1, len(path)))])
    value = yaml.safe_dump(data.draw(NOISE), default_flow_style=True).removesuffix("...\n")
    try:
        load(yaml.safe_dump(FULL), f"{key}={value}", folder=folder, name="noise.yaml")
    except ConfigError as error:
        message = str(error)
    else:
        message = "a valid configuration"
    assert all(line.isprintable() for line in message.split("\n"))


def test_no_message_is_in_the_words_of_the_library_that_checks(tmp_path: Path) -> None:
    said = []
    for path, _ in leaves(FULL):
        for value in ("[]", "{}", "-1", "x y z", ".nan", "true", "", "1e40", "''", '"\\ud800"'):
            try:
                load(yaml.safe_dump(FULL), f"{'.'.join(path)}={value}", folder=tmp_path)
            except ConfigError as error:
                said += str(error).split("\n")
    assert len(said) > 200
    assert not [line for line in said if "nput should" in line or "is not valid:" in line]


def test_the_kinds_of_unions_have_distinct_tags() -> None:
    for section, field in (("batch", "growth"), ("lr", "decay")):
        model = Config.model_fields[section].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        members = get_args(model.model_fields[field].annotation)
        tags = [next(iter(member.model_fields.values())).annotation for member in members]
        assert len({get_args(tag) for tag in tags}) == len(members)
