"""`harness init`: four answers and some measurements make a configuration with comments.

What is asked: which data, which model, how many ranks, how long. What is measured: the micro-batch
that fits and how many images a second a rank computes with it, by `harness.trial` in a process of
its own, where torch is installed.
"""

from __future__ import annotations

import math
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from harness import environment
from harness.config import load_config
from harness.data_sizes import train_size
from harness.dataset_table import DATASETS
from harness.doctor.datasets import data_sets
from harness.doctor.looks import Look, look_at
from harness.doctor.machine import nvidia_models
from harness.errors import ConfigError, UsageError
from harness.files import write_atomic
from harness.json_schema import FILE_NAME, as_text, header
from harness.model_table import check_model
from harness.schema import Data
from harness.units import Duration
from harness.wording import counted, plain_name
from harness.yamlfile import dump_line, one_line

_PATIENCE = 600.0
_GOOD_ENOUGH = 0.95
"""Of the best throughput: the smallest micro-batch that has it leaves most freedom."""
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_SPAN = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) *(s|min|h)")


@dataclass(frozen=True)
class InitRequest:
    """What ``harness init`` was asked for."""

    out: Path | None = None
    """The file to write; None: NAME.yaml here."""
    data: str | None = None
    """A data set's name, or the directory of its files."""
    root: Path | None = None
    """The directory, where ``data`` is a name."""
    model: str | None = None
    ranks: int | None = None
    duration: str | None = None
    """``10ep``, or a span of time such as ``2h``."""
    yes: bool = False
    """Defaults for what was not given."""
    force: bool = False
    measure: bool = True
    seconds: float = 10.0
    """About how long to measure."""


@dataclass(frozen=True)
class Recipe:
    """Where to begin with data of some kind: what its literature begins with."""

    model: str
    batch: int
    rate: float
    decay: float
    epochs: int


_SMALL = Recipe("lenet5", 64, 0.01, 5e-4, 20)
_CIFAR = Recipe("resnet20", 128, 0.1, 1e-4, 60)
_LARGE = Recipe("resnet50", 256, 0.1, 1e-4, 90)
_RECIPES = {
    **dict.fromkeys(("digits", "digits-enlarged", "mnist", "fashion-mnist"), _SMALL),
    **dict.fromkeys(("cifar10", "cifar100"), _CIFAR),
}


@dataclass(frozen=True)
class Answers:
    """All that a configuration is made from, checked."""

    data: Data
    model: str
    ranks: int
    length: str
    """As ``InitRequest.duration``."""

    @property
    def name(self) -> str:
        return plain_name(f"{self.data.dataset}-{self.model}")

    @property
    def recipe(self) -> Recipe:
        return _RECIPES.get(self.data.dataset, _LARGE)


def init(request: InitRequest, ask: TextIO | None) -> int:
    """Ask, measure, write, and print what to do next; returns the exit code.

    ``ask``: where answers come from; None: there is nobody to ask. Raises UsageError, ConfigError,
    DataError for answers that are none, and if the file is there already.
    """
    if not 0 < request.seconds <= 3600:
        raise UsageError(f"--seconds {request.seconds:g}: must be more than 0 and at most 3600")
    if request.out is not None:
        _check_new(request.out, request.force)
    answers = _answers(request, ask)
    out = request.out or Path(f"{answers.name}.yaml")
    _check_new(out, request.force)
    samples = train_size(answers.data)
    measured = _measured(answers, request.seconds) if request.measure else Look()
    text = configuration(answers, measured, samples)
    _check(text, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    schema = out.parent / FILE_NAME
    if not schema.exists():
        write_atomic(schema, as_text().encode())
    _check_new(out, request.force)
    write_atomic(out, text.encode())
    print(_next(out, answers))
    return 0


def _check_new(out: Path, force: bool) -> None:
    if os.path.lexists(out) and not force:
        raise UsageError(f"{out} is there already; choose another name, or --force to replace it")


# The questions


def _answers(request: InitRequest, ask: TextIO | None) -> Answers:
    given = {
        "--data": request.data,
        "--model": request.model,
        "--ranks": request.ranks,
        "--duration": request.duration,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and not request.yes and ask is None:
        raise UsageError(
            f"nobody is here to be asked: give {', '.join(missing)}, or --yes for the defaults"
        )
    asked = None if request.yes else ask
    names = ", ".join(DATASETS)
    data = _asked(
        f"Data: the directory of your files, or one of {names}",
        request.data,
        "digits",
        asked,
        lambda text: _data(text, request.root),
    )
    recipe = _RECIPES.get(data.dataset, _LARGE)
    model = _asked(
        "Model: one of docs/models.md, of torchvision's, or package.module:callable",
        request.model,
        recipe.model,
        asked,
        _model,
    )
    ranks = _asked(
        f"Ranks: processes that train together (this machine: {_machine()})",
        None if request.ranks is None else str(request.ranks),
        str(default_ranks()),
        asked,
        _ranks,
    )
    length = _asked(
        "How long: epochs such as 20ep, or a time such as 30min or 2h",
        request.duration,
        f"{recipe.epochs}ep",
        asked,
        _length,
    )
    return Answers(data, model, ranks, length)


def _asked(
    question: str,
    given: str | None,
    default: str,
    ask: TextIO | None,
    read: Callable[[str], Any],
) -> Any:
    """The answer that was given, else that of whoever can be asked, again until it is one."""
    if given is not None or ask is None:
        return read(default if given is None else given)
    while True:
        print(f"{question} [{default}]: ", end="", flush=True)
        line = ask.readline()
        if not line:
            raise UsageError("the questions were not answered; nothing was written")
        try:
            return read(line.strip() or default)
        except (UsageError, ValueError) as error:
            print(one_line(str(error), 400))


def _data(text: str, root: Path | None) -> Data:
    if text in DATASETS:
        if DATASETS[text].files and root is None:
            raise UsageError(
                f"{text} needs its files: give their directory, or --data {text} --root DIR; "
                f"expected there: {DATASETS[text].files}"
            )
        return _checked(text, root)
    if not os.path.isdir(text):
        raise UsageError(
            f"{one_line(text)} is neither a directory nor a data set; valid: {', '.join(DATASETS)}"
        )
    place = Path(text)
    found = [one.name for one in data_sets(place, True) if one.text.startswith("found in")]
    if "imagenet" in found:
        found.remove("folder")
    if len(found) != 1:
        told = f"{' and '.join(found)} may be in it" if found else "no data set is found in it"
        raise UsageError(
            f"{one_line(text, 300)}: {told}; say which: --data NAME --root {one_line(text, 300)} "
            "(`harness doctor --data DIR` lists all)"
        )
    return _checked(found[0], place)


def _checked(name: str, root: Path | None) -> Data:
    try:
        return Data(dataset=name, root=None if root is None else str(root.absolute()))
    except ValueError as error:
        raise UsageError(_plain(error)) from None


def _plain(error: ValueError) -> str:
    """Without what pydantic adds."""
    lines = [line.strip() for line in str(error).splitlines() if "Value error, " in line]
    told = lines[0].removeprefix("Value error, ") if lines else str(error)
    return told.partition(" [type=")[0]


def _model(text: str) -> str:
    try:
        check_model(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return text


def _ranks(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise UsageError(f"{one_line(text)} is no number of ranks; write one from 1 on")
    return int(text)


def _length(text: str) -> str:
    span = _SPAN.fullmatch(text)
    if span is not None and float(span[1]) > 0:
        return text
    try:
        if Duration.parse(text):
            return text
    except ValueError:
        pass
    raise UsageError(
        f"{one_line(text)} is no length; write epochs (20ep), updates (5000up), or a time (30min)"
    )


def default_ranks() -> int:
    """A rank for each GPU; without any, two where there are two cores: enough to see it work."""
    return len(list(nvidia_models())) or min(2, environment.usable_cores())


def _machine() -> str:
    gpus = len(list(nvidia_models()))
    cores = counted(environment.usable_cores(), "core")
    return f"{cores}, {counted(gpus, 'GPU')}" if gpus else f"{cores}, no GPU"


# What is measured


def _measured(answers: Answers, seconds: float) -> Look:
    if find_spec("torch") is None:
        return Look(failure="torch is not installed here")
    print(f"Measuring {answers.model} on this machine, about {seconds:g} s …", flush=True)
    with tempfile.TemporaryDirectory(prefix="harness-init-") as folder:
        path = Path(folder) / "trial.yaml"
        path.write_text(configuration(answers, Look(), 1000), encoding="utf-8")
        words = [sys.executable, "-m", "harness.trial", str(path)]
        words += ["--seconds", f"{seconds:g}", "--ranks", str(min(answers.ranks, default_ranks()))]
        return look_at(words, _PATIENCE, os.environ)


def best_point(measured: Look, at_most: int) -> dict[str, Any] | None:
    """The smallest micro-batch that is nearly as fast as the best, of those up to ``at_most``."""
    known: list[dict[str, Any]] = measured.facts.get("points", [])
    points = [one for one in known if one["micro"] <= at_most]
    if not points:
        return None
    enough = _GOOD_ENOUGH * max(one["images_per_sec"] for one in points)
    return next(one for one in points if one["images_per_sec"] >= enough)


# The file


@dataclass(frozen=True)
class _Sizes:
    initial: int
    micro: int
    most: int


def _sizes(answers: Answers, measured: Look, samples: int) -> _Sizes:
    """The literature's batch where it can be shared out, and the fastest micro-batch in it."""
    initial = max(answers.recipe.batch, answers.ranks)
    share = max(1, initial // answers.ranks)
    point = best_point(measured, share)
    micro = point["micro"] if point else min(32, share)
    most = initial
    while most < 8 * initial and 2 * most * 10 <= samples:
        most *= 2
    return _Sizes(initial, micro, most)


def configuration(answers: Answers, measured: Look, samples: int) -> str:
    """The YAML text; ``samples``: of the training set."""
    recipe, sizes = answers.recipe, _sizes(answers, measured, samples)
    point = next((p for p in measured.facts.get("points", ()) if p["micro"] == sizes.micro), None)
    duration, why = _duration(answers, point, samples)
    data = answers.data
    lines = [
        header(Path(FILE_NAME)),
        f"# Made by `harness init` for {answers.model} on {data.dataset}: a run to begin with.",
        *_comments(measured, sizes),
        f"name: {dump_line(answers.name)}",
        "seed: 0  # the same seed, data and ranks give the same run to the last bit",
        "data:",
        f"  dataset: {data.dataset}  # {DATASETS[data.dataset].title}",
        *([f"  root: {dump_line(data.root)}"] if data.root else []),
        *_workers(data),
        "model:",
        f"  name: {dump_line(answers.model)}",
        "batch:",
        f"  initial: {sizes.initial}  # global: all ranks together, whatever their number",
        f"  micro: {sizes.micro}  # of one backward pass; the rest is accumulated",
        *_growth(sizes, duration),
        "ranks:",
        f"  start: {answers.ranks}",
        "optimizer:",
        "  name: sgd  # or lars, lamb, adamw …: docs/optimizers.md",
        "  momentum: 0.9",
        f"  weight_decay: {dump_line(recipe.decay)}",
        "lr:",
        f"  base: {recipe.rate}  # for base_batch; it follows the batch in proportion",
        f"  base_batch: {recipe.batch}",
        *_warmup(duration),
        "  decay: {kind: cosine}  # to 0 at the end; or poly, step, multistep: docs/schedules.md",
        "comm:",
        "  compression: none  # fp16 halves the bytes; `harness probe` says whether that pays here",
        "train:",
        f"  duration: {duration}{f'  # {why}' if why else ''}",
        "  eval_every: 1ep",
        "  checkpoint_every: 1ep  # a run that was killed goes on from the last: --resume",
    ]
    return "\n".join(lines) + "\n"


def _comments(measured: Look, sizes: _Sizes) -> list[str]:
    points = measured.facts.get("points", ())
    if not points:
        why = one_line(measured.failure or "nothing was measured", 300)
        return [f"# batch.micro is a guess ({why}); where torch is, `harness init` measures it."]
    where = f"{socket.gethostname()}, {measured.facts['device']}"
    threads = counted(measured.facts["threads"], "thread")
    lines = [f"# Measured on {where}, one rank, {threads}, forward and backward alone:"]
    lines += [
        f"#   micro {one['micro']:>5}: {one['images_per_sec']:>10,.0f} images/s"
        + ("  ← taken" if one["micro"] == sizes.micro else "")
        for one in points
    ]
    if measured.facts["stopped"] == "memory":
        lines.append("#   larger ones do not fit into the memory of a rank")
    return lines


def _workers(data: Data) -> list[str]:
    if DATASETS[data.dataset].kind != "decoded":
        return []
    return [f"  workers: {min(4, environment.usable_cores())}  # decoding processes of each rank"]


def _growth(sizes: _Sizes, duration: Duration) -> list[str]:
    """Stages of equal length, one for each doubling and the first."""
    every = Duration(duration.value / (sizes.most // sizes.initial).bit_length(), duration.unit)
    if sizes.most == sizes.initial or every.value < 1:
        return []
    return [
        f"  max: {sizes.most}",
        "  # AdaBatch: the batch doubles in stages; docs/schedules.md has the other policies.",
        f"  growth: {{policy: geometric, factor: 2, every: {_rounded(every, math.ceil)}}}",
    ]


def _warmup(duration: Duration) -> list[str]:
    tenth = Duration(duration.value / 10, duration.unit)
    if tenth.value < 1:
        return []
    return [f"  warmup: {{kind: gradual, duration: {_rounded(tenth)}, start: 0.001}}"]


def _rounded(length: Duration, way: Callable[[Fraction], int] = math.floor) -> Duration:
    """To whole units."""
    return replace(length, value=Fraction(max(1, way(length.value))))


def _duration(answers: Answers, point: dict[str, Any] | None, samples: int) -> tuple[Duration, str]:
    """The run's length, and where it comes from if it was given as a time."""
    span = _SPAN.fullmatch(answers.length)
    if span is None:
        return Duration.parse(answers.length), ""
    if point is None:
        epochs = answers.recipe.epochs
        return Duration.parse(f"{epochs}ep"), f"{answers.length} was wanted; nothing was measured"
    seconds = float(span[1]) * _SECONDS[span[2]]
    speed = point["images_per_sec"] * answers.ranks
    epochs = max(1, math.floor(seconds * speed / samples))
    return Duration.parse(f"{epochs}ep"), (
        f"{answers.length} at {speed:,.0f} images/s, were {counted(answers.ranks, 'rank')} as fast "
        "as one each"
    )


def _check(text: str, out: Path) -> None:
    """Raise ConfigError if it were no configuration after all, as of answers that do not go
    together."""
    with tempfile.TemporaryDirectory(prefix="harness-init-") as folder:
        path = Path(folder) / out.name
        path.write_text(text, encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            told = str(error).replace(str(path), out.name)
            raise ConfigError(f"these answers do not go together: {told}") from None


def _next(out: Path, answers: Answers) -> str:
    hosts = "" if answers.ranks <= environment.usable_cores() else " --hosts a:2,b:2"
    rows = {
        f"harness plan {out}": "what it comes to, stage by stage",
        f"harness doctor --ranks {answers.ranks}{hosts}": "whether the ranks meet",
        f"harness run {out} --ranks {answers.ranks}{hosts}": "train, with a report at the end",
        f"harness config {out}": "every key, also those with defaults",
    }
    width = max(map(len, rows))
    told = [f"  {command:<{width}}  # {what}" for command, what in rows.items()]
    return "\n".join([f"{out} is written. Next:", *told])


def terminal() -> TextIO | None:
    """Standard input, if a person may be there."""
    with suppress(ValueError, AttributeError):
        if sys.stdin.isatty():
            return sys.stdin
    return None
