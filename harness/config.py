"""The configuration of a run: its schema, and how a YAML file with overrides becomes one.

Every section is frozen, refuses unknown keys, and is strict about types: a count is a whole number,
not a fraction or a boolean; no number is infinite or NaN.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from harness.errors import ConfigError
from harness.units import Duration
from harness.yamlfile import (
    Document,
    Path_,
    dump_yaml,
    one_line,
    parse_yaml,
    read_yaml,
    shown,
)


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        validate_default=False,
    )


Count = Annotated[int, Field(ge=1, le=2**53)]
Length = Annotated[
    Duration,
    BeforeValidator(Duration.parse),
    PlainSerializer(str, return_type=str),
]
Rate = Annotated[float, Field(ge=0, le=1e30)]  # float32 holds it, with room to be scaled
Factor = Annotated[float, Field(gt=0, le=1e30)]


class Data(Section):
    dataset: str
    """digits, mnist."""
    root: str | None = None
    """Directory of the files; not needed for data that ships with a package."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Loading processes per rank, for data that is decoded from files."""
    augment: bool = True
    """Random variants of the training images."""


class Model(Section):
    name: str
    """lenet5, or your own as package.module:callable."""


class FixedGrowth(Section):
    policy: Literal["fixed"] = "fixed"


class GeometricGrowth(Section):
    """B0 · factor^⌊t / every⌋ (AdaBatch, Devarakonda et al. 2017)."""

    policy: Literal["geometric"]
    factor: Annotated[float, Field(ge=1)] = 2.0
    """What the global batch is multiplied with at each growth."""
    every: Length
    """Length of a stage."""


Growth = Annotated[FixedGrowth | GeometricGrowth, Field(discriminator="policy")]


class Batch(Section):
    initial: Count
    """Global batch at the start, in samples."""
    max: Count | None = None
    """Cap of the global batch; a policy that asks for more gets a smaller rate instead."""
    micro: Count | None = None
    """Samples of one backward pass on one rank; default: 32, or initial where that is less."""
    growth: Growth = FixedGrowth()
    epoch_end: Literal["short", "carry"] = "short"
    """Last update of an epoch: ``short`` takes what the epoch has left, ``carry`` is always full
    and runs on into the next epoch."""

    @property
    def micro_batch(self) -> int:
        return self.micro or min(32, self.initial)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro is not None and self.micro > self.initial:
            raise ValueError(
                f"batch.micro = {self.micro} is more than batch.initial = {self.initial}; "
                f"a micro-batch holds at most one global batch: 1 to {self.initial}"
            )
        if self.max is not None and self.max < self.initial:
            raise ValueError(f"batch.max = {self.max} is less than batch.initial = {self.initial}")
        return self


class Ranks(Section):
    start: Count = 1
    """Ranks of the first launch."""
    max: Count | None = None
    """Ranks that later launches may grow to; default: start."""
    prefer: Literal["ranks", "accumulation"] = "ranks"
    """What a growing batch is spread over first."""
    threads: Count | None = None
    """Threads of each rank; default: the host's cores divided by its ranks."""

    @property
    def ceiling(self) -> int:
        return self.max or self.start

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max is not None and self.max < self.start:
            raise ValueError(f"ranks.max = {self.max} is less than ranks.start = {self.start}")
        return self


class Optimizer(Section):
    name: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Rate = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs optimizer.momentum above 0")
        return self


class Warmup(Section):
    kind: Literal["gradual"] = "gradual"
    """gradual: in a straight line from the start rate to the scaled rate, update by update."""
    duration: Length
    start: Rate | None = None
    """Rate at the first update; default: lr.base."""


class NoDecay(Section):
    kind: Literal["none"] = "none"


class PolyDecay(Section):
    """(1 − t)^power over the run, t from 0 to 1."""

    kind: Literal["poly"]
    power: Factor = 2.0


class StepDecay(Section):
    """factor^⌊t / every⌋."""

    kind: Literal["step"]
    every: Length
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1


Decay = Annotated[NoDecay | PolyDecay | StepDecay, Field(discriminator="kind")]


class LearningRate(Section):
    base: Factor
    """Rate for a global batch of base_batch."""
    base_batch: Count | None = None
    """Default: batch.initial."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the rate follows the global batch."""
    warmup: Warmup | None = None
    decay: Decay = NoDecay()
    on_growth: Factor = 1.0
    """The rate is multiplied with this each time the global batch grows."""


class Comm(Section):
    backend: Literal["horovod", "solo"] = "horovod"
    """solo: a single process without Horovod."""
    controller: Literal["mpi", "gloo"] = "mpi"
    """What carries Horovod's collectives between CPUs."""
    compression: Literal["none", "fp16"] = "none"
    summation: Literal["float", "exact"] = "float"
    """exact: the same weights to the last bit on any number of ranks, for twice the bytes."""
    bucket_mb: Annotated[float, Field(gt=0, le=4096)] = 4.0
    """Size of a gradient bucket in MiB of float32."""

    @model_validator(mode="before")
    @classmethod
    def _no_bf16(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("compression") == "bf16":
            raise ValueError(
                "comm.compression = bf16: Horovod 0.28.1 cannot carry bfloat16 tensors; "
                "valid are none and fp16"
            )
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.summation == "exact" and self.compression != "none":
            raise ValueError(
                f"comm.summation = exact cannot be compressed; use comm.compression=none instead "
                f"of {self.compression}"
            )
        return self


class Train(Section):
    duration: Length
    """Length of the run."""
    eval_every: Length | None = Duration.parse("1ep")
    """Time between evaluations on the test set; null: only at the end."""
    checkpoint_every: Length | None = Duration.parse("1ep")
    """Time between checkpoints; null: only at the end and on a stop request."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=2**53)] = 3
    """How many of the newest checkpoints stay on disk; at least 2, so one may be broken."""
    log_every: Count = 10
    """Updates in one line of metrics.jsonl."""
    precision: Literal["fp32"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("duration", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not value:
                raise ValueError(f"train.{name} must be more than 0")
        return self


class Config(Section):
    """One training run. ``harness plan CONFIG`` shows what it comes to."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    model: Model
    batch: Batch
    ranks: Ranks = Ranks()
    optimizer: Optimizer = Optimizer()
    lr: LearningRate
    comm: Comm = Comm()
    train: Train

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_shares(self, self.ranks.start)
        growth, warmup, decay = self.batch.growth, self.lr.warmup, self.lr.decay
        for key, length in (
            ("batch.growth.every", getattr(growth, "every", None)),
            ("lr.decay.every", getattr(decay, "every", None)),
            ("lr.warmup.duration", warmup and warmup.duration),
        ):
            if length is not None and not length:
                raise ValueError(f"{key} must be more than 0")
        total = self.train.duration
        if warmup and warmup.duration.unit == total.unit and warmup.duration.value > total.value:
            raise ValueError(
                f"lr.warmup.duration = {warmup.duration} is longer than train.duration = {total}"
            )
        if self.comm.backend == "solo" and self.ranks.ceiling > 1:
            raise ValueError(
                f"comm.backend = solo is one process, but ranks asks for {self.ranks.ceiling}; "
                "use comm.backend=horovod"
            )
        return self


def check_shares(config: Config, ranks: int) -> None:
    """Raise ValueError if some rank would never get a micro-batch of the initial global batch."""
    pieces = -(-config.batch.initial // config.batch.micro_batch)
    if pieces < ranks:
        raise ValueError(
            f"batch.initial = {config.batch.initial} in micro-batches of "
            f"{config.batch.micro_batch} makes {pieces} for {ranks} ranks: some would idle; "
            f"use batch.micro ≤ {config.batch.initial // ranks}, fewer ranks, or a larger batch"
            if config.batch.initial >= ranks
            else f"batch.initial = {config.batch.initial} is less than one sample for each of "
            f"{ranks} ranks; use fewer ranks or a larger batch"
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, what it ``extends``, and ``KEY=VALUE`` overrides.

    Raises ConfigError with every problem found, each on a line of its own with its place.
    """
    document = _read_extended(path, ())
    # Together, so that their order does not matter: growth.every may stand before growth.policy.
    overriding = Document({})
    for override in overrides:
        _merge(overriding, _parse_override(override))
    _merge(document, overriding)
    try:
        return Config.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(_explain(error, document, path)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def _read_extended(path: Path, chain: tuple[Path, ...]) -> Document:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{one_line(str(path))}: cannot be read: {error}") from None
    if resolved in chain:
        cycle = " → ".join(p.name for p in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: extends goes in a circle: {cycle}")
    if len(chain) > _MAX_CHAIN:
        raise ConfigError(f"{path}: extends is more than {_MAX_CHAIN} files deep")
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        found = "the file is empty" if document.data is None else f"found {shown(document.data)}"
        raise ConfigError(f"{path}: a configuration is a mapping of keys, but {found}")
    bases = document.data.pop("extends", None)
    if bases is None:
        return document
    place = document.places[("extends",)]
    names = bases if isinstance(bases, list) else [bases]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{place}: extends: must be the name of a YAML file or a list of names, "
            f"not {shown(bases)}"
        )
    merged = Document({})
    for name in names:
        base = path.parent / name
        if not os.path.exists(base):  # Path.exists raises for names that no file can have
            raise ConfigError(f"{place}: extends: no such file: {one_line(str(base), 300)}")
        _merge(merged, _read_extended(base, (*chain, resolved)))
    _merge(merged, document)
    return merged


_MAX_CHAIN = 20


def _parse_override(text: str) -> Document:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(part.isidentifier() for part in parts):
        raise ConfigError(
            f"{shown(text)} is not an override; write KEY=VALUE such as batch.initial=128"
        )
    if parts[0] == "extends":
        raise ConfigError(f"{shown(text)}: extends can stand in a file only, not in an override")
    place = f"override {shown(text)}"
    document = parse_yaml(value, place, lines=False)
    data = document.data
    for part in reversed(parts):
        data = {part: data}
    places: dict[Path_, str] = {tuple(parts[:i]): place for i in range(1, len(parts) + 1)}
    places |= {(*parts, *inner): place for inner in document.places}
    return Document(data, places)


# A mapping that names another kind than the one below it replaces it: keys of a geometric growth
# mean nothing to a fixed one.
_KINDS = ("policy", "kind")


def _merge(base: Document, over: Document) -> None:
    """Lay ``over`` on ``base``: mappings merge key by key, everything else is replaced."""
    replaced: set[Path_] = set()
    base.data = _merged(base.data, over.data, (), replaced)
    stale = [
        place
        for place in base.places
        if any(place[:end] in replaced for end in range(len(place) + 1))
    ]
    for place in stale:
        del base.places[place]
    base.places |= over.places


def _merged(base: Any, over: Any, path: Path_, replaced: set[Path_]) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)) or any(
        key in base and key in over and base[key] != over[key] for key in _KINDS
    ):
        replaced.add(path)
        return over
    return base | {
        key: _merged(base[key], value, (*path, key), replaced) if key in base else value
        for key, value in over.items()
    }


def _explain(error: ValidationError, document: Document, path: Path) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        loc, sections = _locate(problem["loc"])
        sentence = _sentence(problem, loc, sections)
        named = _NAMED_KEY.match(sentence)
        key = tuple(named[0].split(".")) if named else loc
        place = _nearest(document, key if key[: len(loc)] == loc else loc)
        lines.append(f"{place or path}: {sentence}")
    return "\n".join(dict.fromkeys(lines))


_NAMED_KEY = re.compile(r"[a-z_]+(\.[a-z_]+)+(?=[ :])")


def _locate(loc: tuple[int | str, ...]) -> tuple[Path_, list[type[BaseModel]]]:
    """Pydantic's location as the file has it, without the tags of unions, and the sections that may
    stand there: none for a plain value, several for a union whose tag is not known."""
    path: list[int | str] = []
    models: list[type[BaseModel]] = [Config]
    for part in loc:
        tagged = [model for model in models if len(models) > 1 and part in _own_tags(model)]
        if tagged:
            models = tagged
            continue
        path.append(part)
        fields = [model.model_fields.get(str(part)) for model in models]
        models = [model for field in fields if field for model in _sections(field.annotation)]
    return tuple(path), models


def _nearest(document: Document, loc: Path_) -> str | None:
    for end in range(len(loc), 0, -1):
        if loc[:end] in document.places:
            return document.places[loc[:end]]
    return None


# What pydantic calls a problem → what the value must be.
_RULES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text without lone surrogates",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}


def _sentence(problem: Any, loc: Path_, sections: list[type[BaseModel]]) -> str:
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    key = one_line(".".join(map(str, loc)))
    if kind == "extra_forbidden":
        valid = _valid_keys(_locate(problem["loc"][:-1])[1])
        near = difflib.get_close_matches(str(loc[-1]), valid, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{key}: unknown key; {hint}valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"{key}: missing, but needed"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag, valid_tags = context["discriminator"].strip("'"), _valid_tags(sections)
        if kind == "union_tag_not_found" and tag not in value:
            return f"{key}.{tag}: missing, but needed; valid are {valid_tags}"
        return f"{key}.{tag}: must be one of {valid_tags}, not {shown(value[tag])}"
    if kind == "value_error":
        message = str(context["error"])
        return message if _NAMED_KEY.match(message) else f"{key}: {message}"
    if kind in _RULES:
        quote = kind == "string_type" and isinstance(value, bool | int | float)
        hint = "; put it in quotes" if quote else ""
        limits = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
        return f"{key}: must be {_RULES[kind].format(**limits)}, not {shown(value)}{hint}"
    message = one_line(problem["msg"])
    return f"{key}: {shown(value)} is not valid: {message[0].lower()}{message[1:]}"


def _valid_keys(sections: list[type[BaseModel]]) -> list[str]:
    names = [name for section in sections[:1] for name in section.model_fields]
    return [*names, "extends"] if sections == [Config] else names


def _valid_tags(sections: list[type[BaseModel]]) -> str:
    return ", ".join(str(tag) for section in sections for tag in _own_tags(section))


def _own_tags(model: type[BaseModel]) -> tuple[Any, ...]:
    return tuple(
        tag
        for kind in _KINDS
        if kind in model.model_fields
        for tag in get_args(model.model_fields[kind].annotation)
    )


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for arg in get_args(annotation) for model in _sections(arg)]
