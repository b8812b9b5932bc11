"""The runs of a study: variants × grid × seeds, with what is tuned before.

A cell's directory is found by a digest of its whole configuration. So a study whose file has
changed runs what is new, and takes up again what is as it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.config import explain, load_config
from harness.data_sizes import train_size
from harness.errors import ConfigError
from harness.files import is_file
from harness.lenient import pick
from harness.rundir import RunDirectory
from harness.schema import Config
from harness.study.schema import MOST_CELLS, StudyFile
from harness.wording import plain_name
from harness.yamlfile import one_line, read_yaml, shown

Point = tuple[tuple[str, Any], ...]
"""A value for each key of the grid."""


@dataclass(frozen=True)
class Arm:
    """What is compared: a variant at a point of the grid."""

    variant: str
    point: Point = ()

    def __str__(self) -> str:
        return ", ".join([self.variant, *(f"{k.split('.')[-1]} {shown(v)}" for k, v in self.point)])


def trial_text(trial: Any) -> str:
    """What was tried, in words."""
    if not isinstance(trial, dict):
        return str(shown(trial))
    return ", ".join(f"{key.split('.')[-1]} {shown(value)}" for key, value in trial.items())


@dataclass(frozen=True)
class Cell:
    """One run."""

    arm: Arm
    seed: int
    config: Config
    trial: Any = None
    """The value of the key that is tuned, where it is."""
    tuning: bool = False
    """Whether it is there to choose that value, and for nothing else."""

    @cached_property
    def digest(self) -> str:
        """Of what is not as the schema has it by default, so that keys which later versions bring
        leave it as it is."""
        settings = self.config.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        parts = [self.arm.variant, *(str(value) for _, value in self.arm.point)]
        parts += [] if self.trial is None else [trial_text(self.trial)]
        words = "-".join([*("tune" for _ in range(self.tuning)), *parts, f"seed{self.seed}"])
        return f"{plain_name(words)[:80]}-{self.digest}"

    def directory(self, cells: Path) -> RunDirectory:
        """Where its run is, under whatever name, or is to be."""
        found = sorted(cells.glob(f"*-{self.digest}"))
        return RunDirectory(found[0] if found else cells / self.name)


@dataclass(frozen=True)
class Study:
    """A study's file, read; quick or in full."""

    path: Path
    file: StudyFile
    quick: bool = False
    _known: dict[str, Cell] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def variants(self) -> list[str]:
        return (self.quick and self.file.quick.variants) or list(self.file.variants)

    @property
    def seeds(self) -> list[int]:
        return (self.quick and self.file.quick.seeds) or self.file.seeds

    @property
    def grid(self) -> dict[str, list[Any]]:
        return (self.quick and self.file.quick.grid) or self.file.grid

    @property
    def points(self) -> list[Point]:
        axes = [[(key, value) for value in values] for key, values in self.grid.items()]
        return [tuple(point) for point in itertools.product(*axes)]

    @property
    def target(self) -> Any:
        return (self.quick and self.file.quick.target) or self.file.target

    @property
    def arms(self) -> list[Arm]:
        return [Arm(name, point) for name in self.variants for point in self.points]

    def trials(self, variant: str) -> list[Any]:
        """The values that are tried for a variant; none if it is not tuned."""
        found = [] if self.file.tune is None else self.file.tune.trials(variant)
        return found[: self.file.quick.trials] if self.quick else found

    def tuned_at(self, arm: Arm) -> Arm:
        """The arm whose trials choose for this one."""
        tune = self.file.tune
        if tune is None or tune.at is None:
            return arm
        points = [point for point in self.points if dict(point) == tune.at]
        return Arm(arm.variant, points[0] if points else self.points[0])

    def _settings(self) -> dict[str, Any]:
        quick = self.file.quick.set if self.quick else {}
        return {**self.file.set, **quick}

    def cell(self, arm: Arm, seed: int, trial: Any = None, tuning: bool = False) -> Cell:
        """Raises ConfigError if no such run can be had."""
        key = repr((arm, seed, trial, tuning))
        if key not in self._known:
            self._known[key] = self._cell(arm, seed, trial, tuning)
        return self._known[key]

    def _cell(self, arm: Arm, seed: int, trial: Any, tuning: bool) -> Cell:
        settings = {**self._settings(), **self.file.variants[arm.variant], **dict(arm.point)}
        if trial is not None and self.file.tune is not None:
            settings |= self.file.tune.settings(trial)
        return Cell(arm, seed, self._config(arm, settings, seed), trial, tuning)

    def _config(self, arm: Arm, settings: Mapping[str, Any], seed: int) -> Config:
        path = self.path.parent / self.file.base
        own = {**settings, "seed": seed, "name": self.name, "train.tensorboard": False}
        words = [f"{key}={json.dumps(value)}" for key, value in own.items()]
        try:
            config = load_config(path, words)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {arm}: {error}") from None
        if alone(config):
            # A process without a launcher: the same numbers, and no MPI to start.
            comm = config.comm.model_copy(update={"backend": "solo"})
            config = config.model_copy(update={"comm": comm})
        return config

    def trial_cells(self) -> list[Cell]:
        """The runs that choose the values."""
        if self.file.tune is None:
            return []
        arms = dict.fromkeys(self.tuned_at(arm) for arm in self.arms)
        return unique(
            self.cell(arm, seed, value, tuning=True)
            for arm in arms
            for value in self.trials(arm.variant)
            for seed in self.file.tune.seeds
        )

    def final_cells(self, chosen: Mapping[Arm, Any]) -> list[Cell]:
        """The runs that are compared; ``chosen``: a value for each arm that is tuned. An arm whose
        value is not known yet has none."""
        return unique(
            self.cell(arm, seed, chosen.get(self.tuned_at(arm)))
            for arm in self.arms
            for seed in self.seeds
            if not self.trials(arm.variant) or self.tuned_at(arm) in chosen
        )

    @property
    def size(self) -> tuple[int, int]:
        """(trials, runs that are compared), counted without making any: a grid may be too large
        for that."""
        points = math.prod(len(values) for values in self.grid.values())
        trials, tune = 0, self.file.tune
        if tune is not None:
            tried = sum(len(self.trials(variant)) for variant in dict.fromkeys(self.variants))
            trials = tried * (points if tune.at is None else 1) * len(tune.seeds)
        return trials, len(self.variants) * points * len(self.seeds)


_WHOLE = re.compile(r"dataset-size(?:/([1-9][0-9]{0,5}))?")
"""A number of training samples, or a share of it, where a number stands."""


def _names_size(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_names_size, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and _WHOLE.fullmatch(value) is not None


def _with_size(value: Any, size: int) -> Any:
    if isinstance(value, dict):
        return {key: _with_size(one, size) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_size(one, size) for one in value]
    found = _WHOLE.fullmatch(value) if isinstance(value, str) else None
    # Rounded up: a batch of half the samples is two updates an epoch, not two and one of a sample.
    return value if found is None else -(-size // int(found[1] or 1))


def _size(path: Path, data: dict[str, Any], quick: bool) -> int:
    """Training samples of the data set that all runs have; raises ConfigError or DataError."""
    layers = [data.get("set")]
    layers += [pick(data, "quick", "set")] if quick else []
    base = data.get("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the name of a YAML file, not {shown(base)}")
    own = {key: v for one in layers if isinstance(one, dict) for key, v in one.items()}
    words = [f"{k}={json.dumps(v)}" for k, v in own.items() if str(k).split(".")[0] == "data"]
    return train_size(load_config(path.parent / base, words).data)


def alone(config: Config) -> bool:
    """Whether a run is one process from start to end, which needs no launcher."""
    launch = config.launch
    return (
        config.ranks.ceiling == 1
        and not launch.elastic
        and launch.launcher in (None, "local")
        and launch.python is None
    )


def unique(cells: Iterator[Cell] | Sequence[Cell]) -> list[Cell]:
    """Each run once: two arms may have the same."""
    return list({cell.digest: cell for cell in reversed(list(cells))}.values())[::-1]


def load_study(path: Path, quick: bool = False) -> Study:
    """Read a study's file, and see that all its runs can be had.

    Raises ConfigError with every problem found, each with its place.
    """
    document = read_yaml(path)
    if isinstance(document.data, dict) and _names_size(document.data):
        document.data = _with_size(document.data, _size(path, document.data, quick))
    if not isinstance(document.data, dict):
        found = "the file is empty" if document.data is None else f"found {shown(document.data)}"
        raise ConfigError(f"{path}: a study is a mapping of keys, but {found}")
    try:
        file = StudyFile.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(explain(error, document, path, StudyFile)) from None
    study = Study(path, file, quick)
    base = path.parent / file.base
    if not is_file(base):
        raise ConfigError(f"{path}: base: no such file: {one_line(str(base), 300)}")
    trials, finals = study.size
    if trials + finals > MOST_CELLS:
        raise ConfigError(f"{path}: {trials + finals:,} runs are more than {MOST_CELLS:,}")
    study.trial_cells()
    first = {study.tuned_at(arm): (study.trials(arm.variant) or [None])[0] for arm in study.arms}
    study.final_cells(first)
    return study
