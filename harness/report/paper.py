"""What a recipe's source prints (``paper`` in config.yaml), beside what a run measured.

A metric is found by the rule of ``PAPER_RULES`` that has its name; where the records do not tell
it, the row says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.jsonl import Record
from harness.lenient import listed, number, pick
from harness.report.fields import MISSING, clean, general, percent, plural, words
from harness.report.runs import Run
from harness.report.summary import Summary, describe

Peers = Sequence[tuple[Run, Summary]]
"""All runs of the page with their numbers."""

PAPER_RULES = {
    "accuracy": "final_test_accuracy",
    "peak_accuracy": "best_test_accuracy",
    "epochs_to_target": "epoch of the first evaluation with an accuracy of target or more "
    "(events.jsonl; target: that of the recipe's entry); without an epoch, samples_seen / "
    "dataset_size",
    "error_difference": "mean of final_test_accuracy over the runs on this page whose name is the "
    "entry's against - final_test_accuracy, which is this run's test error - theirs",
    "accuracy_gain": "final_test_accuracy - its mean over the runs on this page whose name is the "
    "entry's against",
    "speedup": "images_per_sec_overall / its mean over the runs on this page whose name is the "
    "entry's against",
    "images_per_sec_N_gpus": "images_per_sec_median of a run that had N ranks, each with a GPU, "
    "from start to end",
}


@dataclass(frozen=True)
class PaperRow:
    """A result as the recipe's source prints it, beside this run's."""

    metric: str
    printed: str
    here: float | None
    rule: str
    """How ``here`` was found."""
    why_not: str | None
    """Why ``here`` is not known, to go on after "as"."""
    note: str | None

    @property
    def how(self) -> str:
        return self.rule if self.why_not is None else f"not known: {self.why_not}"


@dataclass(frozen=True)
class _Found:
    """A value and how it was found, or why there is none."""

    value: float | None
    text: str


def paper_source(run: Run) -> str | None:
    """Where the recipe of a run comes from, as a sentence or two."""
    parts = [words(run.config("paper", key)) for key in ("source", "place")]
    if not any(parts):
        return None
    note = words(run.config("paper", "note"))
    return "; ".join(part for part in parts if part) + "." + (f" {note}" if note else "")


def paper_rows(run: Run, numbers: Summary, peers: Peers) -> list[PaperRow]:
    """A row for each result that the recipe's source prints."""
    entries = listed(pick(run.records.config, "paper", "printed"))
    return [_row(run, numbers, entry, peers) for entry in entries if isinstance(entry, dict)]


def _row(run: Run, numbers: Summary, entry: Record, peers: Peers) -> PaperRow:
    metric = words(entry.get("metric")) or "unnamed"
    value, below = number(entry.get("value")), number(entry.get("below"))
    printed = general(value) if value is not None else f"below {general(below)}"
    if value is None and below is None:
        printed = MISSING
    find = _FIND.get(metric)
    if find is not None:
        found = find(run, numbers, entry, peers)
    elif match := re.fullmatch(r"images_per_sec_(\d{1,6})_gpus", metric):
        found = _on_gpus(run, numbers, int(match[1]))
    else:
        found = _Found(None, "no rule finds it in the records")
    known = found.value is not None
    return PaperRow(
        metric=metric,
        printed=printed,
        here=found.value,
        rule=found.text if known else PAPER_RULES.get(metric, "none"),
        why_not=None if known else found.text,
        note=words(entry.get("note")),
    )


def _accuracy(run: Run, numbers: Summary, entry: Record, peers: Peers) -> _Found:
    return _number(numbers, "final_test_accuracy")


def _peak_accuracy(run: Run, numbers: Summary, entry: Record, peers: Peers) -> _Found:
    return _number(numbers, "best_test_accuracy")


def _number(numbers: Summary, name: str) -> _Found:
    found = numbers[name]
    return _Found(found.value, name if found.value is not None else "no test accuracy is recorded")


def _epochs_to_target(run: Run, numbers: Summary, entry: Record, peers: Peers) -> _Found:
    target = number(entry.get("target"))
    if target is None:
        return _Found(None, "the recipe does not say which accuracy is the target")
    known = [one for one in run.evaluations if one.accuracy is not None]
    if not known:
        return _Found(None, "no test accuracy is recorded")
    first = next((one for one in known if (one.accuracy or 0.0) >= target), None)
    if first is None:
        best = numbers.of("best_test_accuracy")
        state = "reached the target of" if run.status == "finished" else "has reached the target of"
        return _Found(None, f"no evaluation {state} {percent(target)}; the best is {percent(best)}")
    size = numbers.of("dataset_size")
    epoch = first.epoch
    if epoch is None and first.samples_seen is not None and size:
        epoch = first.samples_seen / size
    if epoch is None:
        return _Found(None, "the evaluation that reached the target has no epoch")
    return _Found(
        epoch,
        f"the first of {plural(len(known), 'evaluation')} with {percent(target)} or more: "
        f"{percent(first.accuracy)}",
    )


def _error_difference(run: Run, numbers: Summary, entry: Record, peers: Peers) -> _Found:
    return _beside(run, numbers, entry, peers, "final_test_accuracy", "test accuracy",
                   lambda own, theirs: theirs - own,
                   "the test error of this run - the mean of {}")  # fmt: skip


def _accuracy_gain(run: Run, numbers: Summary, entry: Record, peers: Peers) -> _Found:
    return _beside(run, numbers, entry, peers, "final_test_accuracy", "test accuracy",
                   lambda own, theirs: own - theirs,
                   "the final test accuracy of this run - the mean of {}")  # fmt: skip


def _speedup(run: Run, numbers: Summary, entry: Record, peers: Peers) -> _Found:
    return _beside(run, numbers, entry, peers, "images_per_sec_overall", "throughput",
                   lambda own, theirs: own / theirs if theirs else None,
                   "images/s of the whole run over the mean of {}")  # fmt: skip


def _beside(
    run: Run, numbers: Summary, entry: Record, peers: Peers, name: str, what: str,
    together: Callable[[float, float], float | None], rule: str,
) -> _Found:  # fmt: skip
    """A number of this run together with its mean over the runs of the recipe that it is held
    against."""
    against = words(entry.get("against"))
    own = numbers.of(name)
    if against is None:
        return _Found(None, "the recipe does not name the run that it is held against")
    if own is None:
        return _Found(None, f"no {what} is recorded")
    others = [(one, told) for one, told in peers if one is not run and one.name == against]
    if not others:
        return _Found(None, f"no run of the name {clean(against, 80)} is on this page")
    alike = [(one, told.of(name)) for one, told in others if describe(one) == describe(run)]
    if not alike:
        return _Found(None, f"the run {clean(against, 80)} on this page is of another task")
    known = [(one, value) for one, value in alike if value is not None]
    if not known:
        return _Found(None, f"the run {clean(against, 80)} on this page has no {what}")
    value = together(own, fmean(value for _, value in known))
    runs = ", ".join(str(one.number) for one, _ in known[:20])
    who = f"run{'s' * (len(known) > 1)} {runs} ({clean(against, 80)})"
    unfinished = [one for one in (run, *(one for one, _ in known)) if one.status != "finished"]
    doubt = "; not all of them are finished" if unfinished else ""
    if value is None:
        return _Found(None, f"{who} has a throughput of 0")
    return _Found(value, rule.format(who) + doubt)


def _on_gpus(run: Run, numbers: Summary, gpus: int) -> _Found:
    ranks = {numbers.of("ranks_first"), numbers.of("ranks_last"), numbers.of("ranks_largest")}
    devices = pick(run.records.provenance, "hardware", "gpus")
    if ranks != {gpus}:
        return _Found(None, f"this run did not have {plural(gpus, 'rank')} from start to end")
    if not isinstance(devices, list) or not devices:
        return _Found(None, "no GPU is recorded")
    found = numbers.of("images_per_sec_median")
    return _Found(found, "no throughput is recorded" if found is None else "images_per_sec_median")


_FIND: dict[str, Callable[[Run, Summary, Record, Peers], _Found]] = {
    "accuracy": _accuracy,
    "peak_accuracy": _peak_accuracy,
    "epochs_to_target": _epochs_to_target,
    "error_difference": _error_difference,
    "accuracy_gain": _accuracy_gain,
    "speedup": _speedup,
}
