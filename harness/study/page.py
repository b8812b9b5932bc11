"""A finished study as data and text: CSV with a row for each run, Markdown with the findings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.files import read_text, write_atomic
from harness.report.csvtext import to_csv
from harness.report.fields import duration
from harness.report.markdown import table, text_of
from harness.study.cells import Arm, Cell, Study, trial_text
from harness.study.figure import draw
from harness.study.metrics import METRICS
from harness.study.runs import Measured
from harness.study.verdicts import Found, Judge, show, spread
from harness.wording import counted
from harness.yamlfile import shown


class Results:
    """The runs of a study, as far as they are over."""

    def __init__(self, study: Study, chosen: Mapping[Arm, Any]) -> None:
        self.study = study
        self.chosen = chosen
        self.runs: dict[tuple[Arm, int], Measured] = {}
        self.trials: list[tuple[Cell, Measured]] = []
        self.machine = ""

    def judge(self) -> Judge:
        return Judge(self.study, self.runs)

    @property
    def complete(self) -> bool:
        return len(self.runs) == len(self.study.arms) * len(self.study.seeds)


def write(results: Results, directory: Path) -> list[Path]:
    """NAME.csv, NAME.svg and NAME.md; those that were written."""
    name = results.study.name
    figure = draw(results.study, results.runs)
    files = {f"{name}.csv": _csv(results), f"{name}.svg": figure}
    files[f"{name}.md"] = markdown(results).encode()
    written = []
    for file, content in files.items():
        if content is not None:
            write_atomic(directory / file, content)
            written.append(directory / file)
    return written


INDEX = "index.md"
_TITLE = re.compile(r"# (.+)")
_VERDICT = re.compile(
    r"\*\*[0-9]+\. .*: (?:(holds|does not hold|undecided|measured)|(in part): [^:]*)\.\*\*"
)


def write_index(directory: Path) -> None:
    """index.md: each page in a directory, and what its claims came to, if it has such."""
    rows = []
    for page in sorted(directory.glob("*.md")):
        lines = read_text(page).splitlines()
        title = _TITLE.fullmatch(lines[0]) if lines else None
        found = [one for line in lines if (one := _VERDICT.fullmatch(line))]
        verdicts = [one[1] or one[2] for one in found]
        if title is None or page.name == INDEX:
            continue
        kinds = ("holds", "in part", "does not hold", "undecided")
        counts = [str(verdicts.count(kind) or "–") for kind in kinds]
        rows.append(f"| [{page.stem}]({page.name}) | {title[1]} | {' | '.join(counts)} |")
    head = "| Study | About | Holds | In part | Does not hold | Undecided |"
    text = "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *rows])
    intro = (
        "Claims, and what came of them here. The pages with claims are written by `harness study`, "
        "each by the command that it names."
    )
    content = f"# Studies\n\n{intro}\n\n{text}\n"
    write_atomic(directory / INDEX, content.encode())


def _csv(results: Results) -> bytes:
    study = results.study
    keys = list(study.grid)
    header = ("purpose", "variant", *keys, "seed", "value", "state", *METRICS)

    def row(purpose: str, arm: Arm, seed: int, value: Any, run: Measured) -> tuple[Any, ...]:
        point = [_plain(v) for _, v in arm.point]
        told = [run.metrics.get(name) for name in METRICS]
        return (purpose, arm.variant, *point, seed, _plain(value), run.state, *told)

    rows = [row("trial", c.arm, c.seed, c.trial, run) for c, run in results.trials]
    rows += [
        row("compared", arm, seed, results.chosen.get(study.tuned_at(arm)), run)
        for (arm, seed), run in results.runs.items()
    ]
    return to_csv(header, rows)


def _plain(value: Any) -> Any:
    return value if type(value) in (int, float, str, type(None)) else shown(value)


def markdown(results: Results) -> str:
    """The page: question, findings with their intervals, figure, table, how it was made."""
    study, found = results.study, results.judge().all()
    parts = [f"# {text_of(study.file.title)}", _wrapped(study.file.question)]
    if study.file.paper:
        parts.append(_wrapped(f"Source: {study.file.paper}."))
    if not results.complete:
        wanted = len(study.arms) * len(study.seeds)
        parts.append(f"**Incomplete**: {len(results.runs)} of {wanted} runs are over.")
    parts += ["## Findings", *_findings(found, study)]
    if study.file.discussion and not study.quick:  # it speaks of the whole study
        parts += ["## Discussion", *map(_wrapped, study.file.discussion.strip().split("\n\n"))]
    parts += ["## Figure", f"![{text_of(study.file.title)}]({study.name}.svg)"]
    parts += ["## Table", _table(results), *_remarks(results)]
    parts += ["## How it was made", *_made(results)]
    return "\n\n".join(parts) + "\n"


def _wrapped(text: str) -> str:
    words = " ".join(text.split())
    # A link's address has hyphens and may not be broken at one.
    return textwrap.fill(words, 110, break_long_words=False, break_on_hyphens=False)


def _findings(found: Sequence[Found], study: Study) -> Iterator[str]:
    yield _wrapped(
        f"± and [ ] are {study.file.confidence:.0%} intervals over "
        f"{counted(len(study.seeds), 'seed')} (Student's t; differences and ratios are paired by "
        "seed). A claim holds if the whole interval lies where it says, does not hold if none of "
        "it does, and is undecided otherwise."
    )
    rows = [
        (str(number), one.finding.says, one.finding.source or "–", one.verdict)
        for number, one in enumerate(found, start=1)
    ]
    yield table(("No", "Claim", "Where", "Here"), rows)
    for number, one in enumerate(found, start=1):
        lines = [f"**{number}. {text_of(one.rule)}: {one.verdict}.**", ""]
        for line in one.lines:
            place = f"{line.what}: " if line.what else ""
            verdict = f" – {line.verdict}" if line.verdict and len(one.lines) > 1 else ""
            lines.append(f"- {text_of(place + line.text + verdict)}")
        yield "\n".join(lines)


def _table(results: Results) -> str:
    study, judge = results.study, results.judge()
    tuned = study.file.tune
    header = ["Variant", *(key for key in study.grid), "Runs"]
    header += [tuned.key] if tuned else []
    header += [_heading(name) for name in study.file.table]
    rows = []
    for arm in study.arms:
        over = [run for (a, _), run in results.runs.items() if a == arm]
        diverged = sum(run.state == "diverged" for run in over)
        runs = f"{len(over)}" + (f", {diverged} diverged" if diverged else "")
        row = [arm.variant, *(shown(value) for _, value in arm.point), runs]
        if tuned:
            value = results.chosen.get(study.tuned_at(arm))
            row.append("–" if value is None else trial_text(value))
        row += [_cell(judge, arm, name, len(over)) for name in study.file.table]
        rows.append(row)
    return table(header, rows)


def _cell(judge: Judge, arm: Arm, name: str, runs: int) -> str:
    """A metric of an arm, mean and interval, or how many of its runs."""
    values = judge.values(arm, name)
    if METRICS[name].yes_or_no:
        return f"{sum(values.values()):.0f} of {runs}"
    mean = judge.mean(arm, name)
    if mean is None:
        return "–"
    told = spread(name, mean) if mean.known else show(name, mean.value)
    return told + (f" ({len(values)} of {runs})" if len(values) < runs else "")


def _heading(name: str) -> str:
    title = METRICS[name].title
    return title[:1].upper() + title[1:]


def _remarks(results: Results) -> Iterator[str]:
    if any(run.state == "diverged" for run in results.runs.values()):
        yield (
            "A run that has diverged ends there; its accuracy and loss are those of its last "
            "evaluation."
        )
    if edges := edge_values(results):
        yield "At the edge of what was tried, so a better value may lie beyond: " + "; ".join(
            text_of(edge) for edge in edges
        )
    layers = _layers(results)
    if layers:
        yield layers


def edge_values(results: Results) -> list[str]:
    """Arms whose best value is the first or last of those that were tried."""
    found: list[str] = []
    tune = results.study.file.tune
    if tune is None:
        return found
    for arm, value in results.chosen.items():
        tried = [tune.settings(one) for one in results.study.trials(arm.variant)]
        ends = []
        for key, best in tune.settings(value).items():
            values = [one[key] for one in tried if key in one]
            numbers = all(isinstance(one, int | float) for one in values)
            first, last = (min(values), max(values)) if numbers else (values[0], values[-1])
            ends += [best] * (best in (first, last))
        if ends:
            found.append(f"{arm} ({', '.join(map(str, map(shown, ends)))})")
    return found


def _layers(results: Results) -> str:
    """The norms of the first arm whose runs have looked at their layers, mean over seeds: Table 4
    of You, Gitman and Ginsburg (2017)."""
    for arm in results.study.arms:
        runs = [run for (a, _), run in results.runs.items() if a == arm and run.layers]
        if not runs:
            continue
        rows = []
        for index, (name, _, _) in enumerate(runs[0].layers):
            pairs = [run.layers[index][1:] for run in runs if len(run.layers) > index]
            known = [(w, g) for w, g in pairs if w is not None and g]
            if known:
                w, g = (sum(one) / len(known) for one in zip(*known, strict=True))
                ratio = sum(a / b for a, b in known) / len(known)
                rows.append((name, f"{w:.3g}", f"{g:.3g}", f"{ratio:.3g}"))
        head = ("Parameter", "‖w‖", "‖∇w‖", "‖w‖/‖∇w‖")
        return f"Layers of {text_of(str(arm))} at the first update:\n\n{table(head, rows)}"
    return ""


def _made(results: Results) -> Iterator[str]:
    study = results.study
    runs = [*results.runs.values(), *(run for _, run in results.trials)]
    seconds = sum(run.metrics.get("seconds") or 0.0 for run in runs)
    options = "--quick" if study.quick else "--results docs/studies"
    yield f"```\nharness study {_relative(study.path)} {options}\n```"
    text = (
        f"{counted(len(results.runs), 'run')} and {counted(len(results.trials), 'trial')}, "
        f"{duration(seconds)} of training in all"
    )
    yield _wrapped(text + (f", on {results.machine}." if results.machine else "."))
    yield f"All runs: [{study.name}.csv]({study.name}.csv)."


def _relative(path: Path) -> str:
    parts = path.resolve().parts
    if "configs" in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index("configs") :])
    return path.name
