"""What a study's YAML file holds: the grid of its runs, what is measured, which findings it tests.

Like a run's configuration it is frozen, and unknown keys are refused (harness/section.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from harness.section import Section
from harness.study.metrics import METRICS
from harness.yamlfile import shown

MOST_CELLS = 10_000
_KEY = re.compile(r"[a-z_]+(\.[A-Za-z_][A-Za-z0-9_]*)*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")
_OWN = ("seed", "name", "extends", "paper")
"""Keys that the study sets itself."""


def _settings(value: object) -> dict[str, Any]:
    """KEY: VALUE as they would be laid over a configuration."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping of configuration keys, not {shown(value)}")
    for key in value:
        _check_key(key)
    return value


def _check_key(key: object) -> None:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"{shown(key)} is no configuration key such as batch.initial")
    if key.partition(".")[0] in _OWN:
        raise ValueError(f"{key} is the study's own; its runs cannot set it")


def _axes(value: object) -> dict[str, list[Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping of a key to a list of values, not {shown(value)}")
    for key, values in value.items():
        _check_key(key)
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key}: must be a list of values, not {shown(values)}")
        if any(isinstance(one, dict | list) for one in values):
            raise ValueError(f"{key}: must be plain values; variants may have mappings and lists")
        _check_unique(key, values)
    return value


def _check_unique(what: str, values: Iterable[object]) -> None:
    seen: set[tuple[type, object]] = set()
    others: list[object] = []  # mappings and lists, of which there are few
    for value in values:
        plain = not isinstance(value, dict | list)
        if (type(value), value) in seen if plain else value in others:
            raise ValueError(f"{what}{': ' * bool(what)}{shown(value)} stands there twice")
        if plain:
            seen.add((type(value), value))
        else:
            others.append(value)


def _variants(value: object) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"must be a mapping of a variant's name to its keys, not {shown(value)}")
    for name, settings in value.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{shown(name)} is no name of up to 40 letters, digits and ._+-")
        try:
            _settings({} if settings is None else settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return {name: settings or {} for name, settings in value.items()}


def _metric(value: object) -> str:
    if not isinstance(value, str) or value not in METRICS:
        raise ValueError(f"must be one of {', '.join(METRICS)}, not {shown(value)}")
    return value


def _trials(value: object) -> list[Any] | dict[str, list[Any]]:
    groups: dict[Any, Any] = value if isinstance(value, dict) else {"": value}
    if not groups:
        raise ValueError("must be a list of two or more values, or such a list for each variant")
    for name, values in groups.items():
        if not isinstance(values, list) or len(values) < 2:
            few = isinstance(values, list) and values
            raise ValueError(
                f"must be a list of two or more values, or such a list for each variant, not "
                f"{'of one' if few else shown(values)}"
            )
        _check_unique(str(name), values)
    if len({len(values) for values in groups.values()}) > 1:
        told = ", ".join(f"{name} {len(values)}" for name, values in groups.items())
        raise ValueError(f"each variant must have the same number of trials, not {told}")
    if isinstance(value, dict):
        return {str(name): values for name, values in value.items()}
    return list(groups[""])


Settings = Annotated[dict[str, Any], PlainValidator(_settings)]
Axes = Annotated[dict[str, list[Any]], PlainValidator(_axes)]
Variants = Annotated[dict[str, dict[str, Any]], PlainValidator(_variants)]
Metric = Annotated[str, PlainValidator(_metric)]
Key = Annotated[str, Field(min_length=1, max_length=100)]
Text = Annotated[str, Field(min_length=1, max_length=5000)]
Finite = Annotated[float, Field(ge=-1e30, le=1e30)]
Share = Annotated[float, Field(ge=0, le=1e30)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=1000)]


class Target(Section):
    """What *to the target* means: the first evaluation that is as good."""

    of: Literal["accuracy", "test_loss"] = "accuracy"
    value: Finite


class Tune(Section):
    """A key that is chosen before anything is compared, with as many trials for each."""

    key: Key
    values: Annotated[list[Any] | dict[str, list[Any]], PlainValidator(_trials)]
    """A list for all variants, or a list for each of some: the others are not tuned. A value that
    is a mapping with the key in it sets all its keys, so that two can be tuned together."""
    by: Metric = "accuracy"
    seeds: Seeds = [100]
    """Others than the study's, so that what is chosen is not flattered by chance."""
    at: Settings | None = None
    """A point of the grid at which it is chosen for all points; null: at each point by itself."""

    def trials(self, variant: str) -> list[Any]:
        """What is tried for a variant. A null is a value as any other; alone, it would stand for
        no trial at all."""
        values = self.values
        found = values.get(variant, []) if isinstance(values, dict) else values
        return [{self.key: None} if value is None else value for value in found]

    def settings(self, trial: Any) -> dict[str, Any]:
        """What a trial sets: the key or, if it is a mapping with the key in it, all of that."""
        whole = isinstance(trial, dict) and self.key in trial
        return dict(trial) if whole else {self.key: trial}


class Panel(Section):
    kind: Literal["points", "lines", "curves"]
    """points: a value for each variant, with its interval; lines: over a key of the grid; curves:
    over training, the mean over seeds."""
    y: Key
    """A metric; of curves: accuracy, test_loss, loss, distance, noise_scale, batch."""
    x: Key | None = None
    """lines: a key of the grid, default the first; curves: epoch (default), updates, samples."""
    log: bool = False
    """A logarithmic axis of y; curves: of x."""
    variants: Annotated[list[Key], Field(min_length=1)] | None = None
    at: Settings | None = None
    """curves: a point of the grid; default: the first one."""


CURVES = ("accuracy", "test_loss", "loss", "distance", "noise_scale", "batch")
CURVES_OVER = ("epoch", "updates", "samples")


class _Finding(Section):
    says: Text
    """What the paper finds, in a sentence."""
    source: Annotated[str, Field(max_length=200)] = ""
    """Figure, table or section."""


class Difference(_Finding):
    """a − b of a metric, paired by seed, at each point of the grid."""

    kind: Literal["difference"]
    of: Metric
    a: Key
    b: Key
    expect: Literal["within", "not_worse", "less", "more"]
    by: Share = 0.0
    """within: of zero; not_worse: by at most so much; less, more: by at least so much."""
    at: list[Settings] | None = None
    """Points of the grid; default: all."""


class Ratio(_Finding):
    """a / b of a positive metric, paired by seed, at each point of the grid."""

    kind: Literal["ratio"]
    of: Metric
    a: Key
    b: Key
    expect: Literal["within", "at_most", "at_least"]
    by: Annotated[float, Field(gt=0, le=1e30)] = 1.0
    """within: this factor, above 1, up and down."""
    at: list[Settings] | None = None


class Level(_Finding):
    """A metric of one variant against a number."""

    kind: Literal["level"]
    of: Metric
    a: Key
    expect: Literal["within", "at_most", "at_least"]
    value: Finite
    by: Share = 0.0
    """within: of ``value``."""
    at: list[Settings] | None = None


class Limit(_Finding):
    """How far along a key of the grid a variant goes until a metric is worse than at the first
    point of the reference by more than ``by``; whether ``a`` goes further than ``b``."""

    kind: Literal["limit"]
    of: Metric
    a: Key
    b: Key
    by: Share
    along: Key | None = None
    """Default: the grid's first key."""
    reference: Key | None = None
    """A variant; default: each its own."""
    expect: Literal["further", "as_far"] = "further"


class Trend(_Finding):
    """A metric at the last point of the grid minus that at the first one, of one variant."""

    kind: Literal["trend"]
    of: Metric
    a: Key
    expect: Literal["within", "less", "more"]
    by: Share = 0.0


class Chain(_Finding):
    """What each variant of a list differs by from the one before it."""

    kind: Literal["chain"]
    of: Metric
    variants: Annotated[list[Key], Field(min_length=2)]


class Best(_Finding):
    """Which variant is the best at each point of the grid, and which cannot be told from it."""

    kind: Literal["best"]
    of: Metric
    among: Annotated[list[Key], Field(min_length=2)] | None = None
    expect: Key | None = None
    """Which one it is said to be."""


class Critical(_Finding):
    """Updates to the target S(B) = S_min (1 + B_crit / B) fitted over the grid's batches for each
    seed, and B_crit against the measured noise scale (McCandlish et al. 2018, equation 2.11)."""

    kind: Literal["critical"]
    a: Key
    noise: Metric = "noise_to_target"
    within: Annotated[float, Field(gt=1, le=1e30)]
    """The factor that they may differ by, up and down."""


Finding = Annotated[
    Difference | Ratio | Level | Limit | Trend | Chain | Best | Critical,
    Field(discriminator="kind"),
]


class Quick(Section):
    """What a study does with less: each key that is given takes the place of the study's."""

    set: Settings = {}
    """Laid over the study's, key by key."""
    seeds: Seeds | None = None
    grid: Axes | None = None
    trials: Annotated[int, Field(ge=2, le=1000)] | None = None
    """The first so many values of what is tuned."""
    target: Target | None = None
    variants: Annotated[list[Key], Field(min_length=1)] | None = None
    """Those that run."""


class StudyFile(Section):
    """A study: its runs are variants × grid × seeds."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    title: Annotated[str, Field(min_length=1, max_length=200)]
    question: Text
    paper: Annotated[str, Field(max_length=500)] = ""
    base: Annotated[str, Field(min_length=1, max_length=1000)]
    """The configuration that all runs build on: a YAML file, from this file's folder."""
    set: Settings = {}
    """Laid over it in all runs: KEY: VALUE."""
    variants: Variants
    """Name: what it lays over that."""
    grid: Axes = {}
    """KEY: values; several make their product."""
    seeds: Seeds
    tune: Tune | None = None
    target: Target | None = None
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] = 0.95
    table: Annotated[list[Metric], Field(min_length=1)]
    """Metrics in the table, in order."""
    figure: Annotated[list[Panel], Field(min_length=1, max_length=6)]
    findings: Annotated[list[Finding], Field(min_length=1)]
    discussion: str = ""
    """Why it may be so, by hand; everything else is derived from the runs."""
    quick: Quick = Quick()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_unique("seeds", self.seeds)
        _check_unique("table", self.table)
        self._check_overlaps()
        self._check_tune()
        for index, panel in enumerate(self.figure):
            self._check_panel(f"figure.{index}", panel)
        for index, finding in enumerate(self.findings):
            self._check_finding(f"findings.{index}", finding)
        self._check_quick()
        self._check_target()
        return self

    def _check_overlaps(self) -> None:
        for name, settings in self.variants.items():
            trials = [] if self.tune is None else self.tune.trials(name)
            tuned = {key for one in trials for key in self.tune.settings(one)} if self.tune else ()
            for key in settings:
                if key in self.grid:
                    raise ValueError(f"variants.{name}: {key} is a key of the grid as well")
                if key in tuned:
                    raise ValueError(f"variants.{name}: {key} is what is tuned")
            for key in tuned:
                if key in self.grid:
                    raise ValueError(f"tune: {key} is a key of the grid as well")

    def _check_tune(self) -> None:
        tune = self.tune
        if tune is None:
            return
        _check_unique("tune.seeds", tune.seeds)
        self._check_tune_key("tune.key", tune.key)
        lists = tune.values.values() if isinstance(tune.values, dict) else [tune.values]
        for trial in (one for values in lists for one in values):
            for key in tune.settings(trial):
                self._check_tune_key("tune.values", key)
        if isinstance(tune.values, dict):
            for name in tune.values:
                self._check_variant("tune.values", name)
        for place, seeds in (("tune.seeds", self.seeds), ("quick.seeds", self.quick.seeds or [])):
            if set(tune.seeds) & set(seeds):
                raise ValueError(
                    f"{place}: the seeds of tune must be others than those of the study, or what "
                    "is chosen is flattered"
                )
        if tune.at is not None:
            self._check_point("tune.at", tune.at, self.grid)

    @staticmethod
    def _check_tune_key(place: str, key: object) -> None:
        try:
            _check_key(key)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None

    def _check_panel(self, place: str, panel: Panel) -> None:
        if panel.kind == "curves":
            if panel.y not in CURVES:
                raise ValueError(f"{place}.y: must be one of {', '.join(CURVES)}")
            if (panel.x or "epoch") not in CURVES_OVER:
                raise ValueError(f"{place}.x: must be one of {', '.join(CURVES_OVER)}")
            if panel.at is not None:
                self._check_point(f"{place}.at", panel.at, self.grid)
        else:
            if panel.y not in METRICS:
                raise ValueError(f"{place}.y: must be one of {', '.join(METRICS)}")
            if panel.kind == "lines" and (panel.x or next(iter(self.grid), "")) not in self.grid:
                raise ValueError(f"{place}.x: must be a key of the grid")
        for name in panel.variants or ():
            self._check_variant(f"{place}.variants", name)

    def _check_finding(self, place: str, finding: Finding) -> None:
        names: list[str | None] = [getattr(finding, key, None) for key in ("a", "b", "reference")]
        if isinstance(finding, Chain):
            names += finding.variants
        if isinstance(finding, Best):
            names += [*(finding.among or ()), finding.expect]
        for name in names:
            if name is not None:
                self._check_variant(place, name)
        for point in getattr(finding, "at", None) or ():
            self._check_point(f"{place}.at", point, self.grid)
        if isinstance(finding, Limit | Trend | Critical) and not self.grid:
            raise ValueError(f"{place}: a finding of kind {finding.kind} needs a grid")
        if isinstance(finding, Limit) and (finding.along or next(iter(self.grid))) not in self.grid:
            raise ValueError(f"{place}.along: must be a key of the grid")
        if isinstance(finding, Critical) and "batch.initial" not in self.grid:
            raise ValueError(f"{place}: a finding of kind critical needs batch.initial in the grid")
        if isinstance(finding, Ratio) and finding.expect == "within" and finding.by < 1:
            raise ValueError(f"{place}.by: a factor up and down is at least 1, not {finding.by:g}")

    def _check_target(self) -> None:
        named = [*self.table, *(panel.y for panel in self.figure)]
        named += [str(getattr(one, key, "")) for one in self.findings for key in ("of", "noise")]
        needing = [name for name in named if name in METRICS and METRICS[name].needs_target]
        if any(isinstance(one, Critical) for one in self.findings):
            needing.append("updates_to_target")
        if needing and self.target is None:
            raise ValueError(f"target: missing, but needed for {needing[0]}")

    def _check_quick(self) -> None:
        quick = self.quick
        for name in quick.variants or ():
            self._check_variant("quick.variants", name)
        if quick.grid is not None and quick.grid.keys() != self.grid.keys():
            raise ValueError("quick.grid: must have the keys of the grid")
        if quick.seeds is not None:
            _check_unique("quick.seeds", quick.seeds)

    def _check_variant(self, place: str, name: str) -> None:
        if name not in self.variants:
            valid = ", ".join(self.variants)
            raise ValueError(f"{place}: there is no variant {shown(name)}; there are {valid}")

    def _check_point(self, place: str, point: dict[str, Any], grid: dict[str, list[Any]]) -> None:
        if not grid:
            raise ValueError(f"{place}: there is no grid")
        for key, value in point.items():
            if key not in grid or value not in grid[key]:
                raise ValueError(f"{place}: {key} = {shown(value)} is no point of the grid")
        if point.keys() != grid.keys():
            raise ValueError(f"{place}: must name a value of each key of the grid")
