"""The numbers of the page, each with its unit and the field it comes from, and the answer in words.

Throughput is taken from the windows of metrics.jsonl. The first window of each attempt is warm-up
and is left out. Every other window counts, so the spread also holds the differences between stages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.jsonl import Record
from harness.lenient import number, pick
from harness.report.columns import Array
from harness.report.curves import Curve, curve, log_fit
from harness.report.fields import (
    clean,
    count,
    duration,
    general,
    instant,
    percent,
    plural,
    words,
)
from harness.report.runs import Evaluation, Run
from harness.schedule.clock import Clock, Limit, updates_until


@dataclass(frozen=True)
class Number:
    """A value of the summary; None where the records do not tell."""

    name: str
    value: float | None
    unit: str
    source: str


class Summary(dict[str, Number]):
    """The numbers of one run by name."""

    def of(self, name: str) -> float | None:
        return self[name].value


def summarise(run: Run) -> Summary:
    """Every number that the page states about a run."""
    parts = (
        *(_progress(run), _accuracy(run), _throughput(run), _ranks_and_time(run), _events(run)),
        *(_noise(run), _distance(run), _layers(run)),
    )
    return Summary((n.name, n) for part in parts for n in part)


def _progress(run: Run) -> Iterator[Number]:
    samples, updates = (run.columns.largest(name) for name in ("samples_seen", "update"))
    totals: Any = pick(run.records.plan, "totals")
    initial = number(run.config("batch", "initial"))
    planned = number(pick(totals, "samples"))
    if pick(run.records.plan, "fastest", "totals", "samples") not in (None, planned):
        planned = None  # a run of a number of updates whose batches are not known beforehand
    size = number(pick(totals, "dataset_size"))
    fixed = updates_at_batch(initial, samples, size, run.config("batch", "epoch_end"))
    share = updates / fixed if updates is not None and fixed else None
    metrics = "metrics.jsonl: "
    yield Number("samples_seen", samples, "samples", metrics + "largest samples_seen")
    yield Number("samples_planned", planned, "samples", "plan.json: totals.samples")
    yield Number("dataset_size", size, "samples", "plan.json: totals.dataset_size")
    yield Number("epochs", run.columns.last("epoch"), "epochs", metrics + "last epoch")
    yield Number("updates", updates, "updates", metrics + "largest update")
    yield Number("initial_batch", initial, "samples", "config.yaml: batch.initial")
    batch = run.columns.largest("global_batch")
    yield Number("largest_batch", batch, "samples", metrics + "largest global_batch")
    source = "samples_seen cut into updates of initial_batch, as batch.epoch_end says (config.yaml)"
    yield Number("updates_at_initial_batch", fixed, "updates", source)
    source = "updates / updates_at_initial_batch"
    yield Number("updates_share_of_initial_batch", share, "fraction", source)
    loss = run.columns.last("loss")
    yield Number(
        "final_training_loss", loss, "nats", metrics + "loss of the last line that has one"
    )


def updates_at_batch(
    batch: float | None, samples: float | None, size: float | None, epoch_end: Any
) -> int | None:
    """Updates of one global batch for so many samples; None if the records do not tell.

    The size of the data set matters unless updates run on over the end of an epoch.
    """
    short = epoch_end != "carry"
    if batch is None or samples is None or batch < 1 or samples < 0:
        return None
    if not short:
        return math.ceil(samples / batch)
    if size is None or size < 1:
        return None
    clock = Clock(samples=0, updates=0, dataset_size=int(size))
    return updates_until(clock, int(batch), Limit(samples=int(samples)), "short")


def _accuracy(run: Run) -> Iterator[Number]:
    known = [e for e in run.evaluations if e.accuracy is not None]
    final = known[-1] if known else Evaluation(None, None, None, None, None, None)
    best = max(known, key=lambda e: e.accuracy or 0.0) if known else final
    lines = len(run.evaluations) if run.records.events else None
    at = "events.jsonl: {} of the {} evaluation"
    yield Number("evaluations", lines, "evaluations", "events.jsonl: lines of kind evaluation")
    fields = [("accuracy", "fraction"), ("accuracy_top5", "fraction"), ("loss", "nats")]
    if any(evaluation.metric is not None for evaluation in known):
        fields.append(("metric", f"unit of {words(run.config('train', 'metric')) or 'the metric'}"))
    for key, which, evaluation in (("final", "last", final), ("best", "most accurate", best)):
        for field, unit in fields:
            value = getattr(evaluation, field)
            yield Number(f"{key}_test_{field}", value, unit, at.format(field, which))
        source = at.format("samples_seen", which)
        yield Number(f"{key}_test_samples_seen", evaluation.samples_seen, "samples", source)


def _throughput(run: Run) -> Iterator[Number]:
    rates = run.columns["images_per_sec"][run.timed]
    rule = "metrics.jsonl: {} of images_per_sec, first window of each attempt left out"
    for name, share, what in (
        ("median", 0.5, "median"),
        ("p10", 0.1, "10th percentile"),
        ("p90", 0.9, "90th percentile"),
    ):
        yield Number(
            f"images_per_sec_{name}", quantile_of(rates, share), "images/s", rule.format(what)
        )
    source = (
        "metrics.jsonl: sum of samples / sum of (samples / images_per_sec) over the same windows"
    )
    yield Number("images_per_sec_overall", _overall(run), "images/s", source)
    lines = run.columns.lines
    counted = len(rates) if lines else None
    warm_up = run.warm_up if lines else None
    source = "metrics.jsonl: lines counted for throughput"
    yield Number("windows_counted", counted, "windows", source)
    source = "metrics.jsonl: first line of each attempt"
    yield Number("windows_left_out", warm_up, "windows", source)


def quantile_of(values: Array, share: float) -> float | None:
    """The ``share`` quantile, linear between neighbours; None for no values."""
    return float(np.quantile(values, share)) if len(values) else None


def _overall(run: Run) -> float | None:
    """Total samples over total time; a window's time is its samples over its images/s."""
    samples = np.diff(run.columns["samples_seen"], prepend=0.0)
    counts = run.timed & (samples > 0)  # false where either end is not known
    seconds = float((samples[counts] / run.columns["images_per_sec"][counts]).sum())
    return float(samples[counts].sum()) / seconds if seconds else None


def _ranks_and_time(run: Run) -> Iterator[Number]:
    columns = run.columns
    source = "metrics.jsonl: {} ranks"
    yield Number("ranks_first", columns.first("ranks"), "ranks", source.format("first"))
    yield Number("ranks_last", columns.last("ranks"), "ranks", source.format("last"))
    yield Number("ranks_largest", columns.largest("ranks"), "ranks", source.format("largest"))
    wall = wall_seconds(run.records.events)
    source = "events.jsonl: time of the last line - time of the first"
    yield Number("wall_seconds", wall, "s", source)
    ends = [s for event in run.events("end") if (s := number(event.get("seconds"))) is not None]
    source = "events.jsonl: seconds of the end line"
    yield Number("seconds_of_last_attempt", ends[-1] if ends else None, "s", source)


def wall_seconds(events: list[Record]) -> float | None:
    """From the first to the last line of events.jsonl, waiting between attempts included."""
    stamps = [stamp for event in events if (stamp := instant(event.get("time"))) is not None]
    if len(stamps) < 2 or stamps[-1] < stamps[0]:
        return None
    return (stamps[-1] - stamps[0]).total_seconds()


def _pauses(events: list[Record]) -> list[float]:
    """Seconds from each end of the ranks that was recorded to their next beginning."""
    found, ended = [], None
    for event in events:
        if event.get("kind") in ("fault", "stop"):
            ended = ended or instant(event.get("time"))
        elif event.get("kind") in ("start", "resume"):
            begun, measured = instant(event.get("time")), number(event.get("seconds_since_end"))
            if ended is not None and measured is not None:
                found.append(measured)
            elif ended is not None and begun is not None and begun >= ended:
                found.append((begun - ended).total_seconds())
            ended = None
    return found


def _events(run: Run) -> Iterator[Number]:
    attempts = run.attempts
    rule = "events.jsonl: start and resume lines"
    total = attempts.total if attempts else None
    restarts = attempts.restarts if attempts else None
    continued = attempts.continuations if attempts else None
    yield Number("attempts", total, "attempts", rule)
    yield Number("restarts", restarts, "restarts", rule + " that do not follow a stop line")
    yield Number("continuations", continued, "continuations", rule + " that follow a stop line")
    for name, what in (("updates_repeated", "updates"), ("samples_repeated", "samples")):
        again = [number(event.get(name)) for event in run.events("resume")]
        repeated = sum(known for known in again if known is not None) if total else None
        yield Number(name, repeated, what, f"events.jsonl: sum of {name} of the resume lines")
    pauses = _pauses(run.records.events)
    middle = statistics.median(pauses) if pauses else None
    source = "events.jsonl: {} from a fault or stop line to the next resume line"
    yield Number("seconds_to_resume", middle, "s", source.format("median time"))
    yield Number(
        "seconds_to_resume_largest", max(pauses, default=None), "s", source.format("longest time")
    )
    for name, kind, unit in (
        ("stages_begun", "stage", "stages"),
        ("updates_skipped", "skipped_update", "updates"),
        ("checkpoints_written", "checkpoint", "checkpoints"),
        ("checkpoints_rejected", "checkpoint_rejected", "checkpoints"),
    ):
        lines = len(run.events(kind)) if run.records.events else None
        yield Number(name, lines, unit, f"events.jsonl: lines of kind {kind}")
    for name, split in (("images_left_out", "train"), ("test_images_left_out", "test")):
        told = [event for event in run.events("corrupt_image") if event.get("split") == split]
        count = len(told) if run.records.events else None
        source = f"events.jsonl: lines of kind corrupt_image with split {split}"
        yield Number(name, count, "images", source)


def positive(x: Array, y: Array) -> Curve:
    """The points that a logarithmic axis can hold, x ascending: both coordinates above zero."""
    full = curve(x, y)
    kept = full.at((full.x > 0) & (full.y > 0))
    if (kept.x[1:] > kept.x[:-1]).all():  # as nearly all runs are; sorting a million takes a while
        return replace(kept, source_points=len(kept))
    order = np.lexsort((kept.y, kept.x))
    return Curve(kept.x[order], kept.y[order], source_points=len(order))


def noise_scales(run: Run) -> Curve:
    """The gradient noise scale over epochs, where it was measured."""
    return positive(run.columns["epoch"], run.columns["noise_scale"])


def distances(run: Run) -> Curve:
    """‖w − w0‖ over updates, where it was measured."""
    return positive(run.columns["update"], run.columns["distance_from_init"])


def _noise(run: Run) -> Iterator[Number]:
    """The gradient noise scale; nothing for a run that has not measured it."""
    scales = noise_scales(run).y
    if len(scales):
        metrics = "metrics.jsonl: {} noise_scale above 0"
        yield Number("noise_scale_first", float(scales[0]), "samples", metrics.format("first"))
        yield Number("noise_scale_last", float(scales[-1]), "samples", metrics.format("last"))
        source = "metrics.jsonl: lines with a noise_scale above 0"
        yield Number("noise_scale_windows", len(scales), "windows", source)


def _distance(run: Run) -> Iterator[Number]:
    """‖w − w0‖ and its growth with log t; nothing for a run that has not measured it.

    Hoffer, Hubara and Soudry 2017, section 3, find a + b · ln t ("ultra-slow diffusion").
    """
    shape = distances(run)
    if not len(shape):
        return
    source = "metrics.jsonl: last distance_from_init"
    yield Number("distance_from_init_last", float(shape.y[-1]), "L2 norm", source)
    fit = log_fit(shape)
    rule = "metrics.jsonl: least squares of distance_from_init over ln(update), every line alike: "
    for name, unit, what in (
        ("intercept", "L2 norm", "a of a + b · ln(update)"),
        ("slope", "L2 norm per e-fold of updates", "b of a + b · ln(update)"),
        ("r2", "fraction", "R²"),
    ):
        value = getattr(fit, name) if fit else None
        yield Number(f"distance_log_{name}", value, unit, rule + what)


def _layers(run: Run) -> Iterator[Number]:
    if run.layers.lines:
        yield Number("layer_lines", run.layers.lines, "updates", "layers.jsonl: lines")


def answer(run: Run, numbers: Summary) -> list[str]:
    """The result of one run, in sentences; what is not known is said to be so."""
    return [
        _result_sentence(run, numbers),
        _updates_sentence(numbers),
        _throughput_sentence(numbers),
        _time_sentence(run, numbers),
        *_left_out_sentence(numbers),
    ]


def _left_out_sentence(numbers: Summary) -> Iterator[str]:
    """Only where something was left out."""
    told = [
        plural(count, f"{which} image")
        for name, which in (("images_left_out", "training"), ("test_images_left_out", "test"))
        if (count := numbers.of(name))
    ]
    if told:
        yield f"{' and '.join(told)} could not be read and were left out."


def describe(run: Run) -> str:
    """The task of a run: ``lenet5 on digits``."""
    model, dataset = run.config("model", "name"), run.config("data", "dataset")
    return f"{_known(model, 'an unknown model')} on {_known(dataset, 'an unknown dataset')}"


def _known(value: Any, otherwise: str) -> str:
    return clean(value, 60) if isinstance(value, str) and value.strip() else otherwise


def _result_sentence(run: Run, numbers: Summary) -> str:
    state = {
        "finished": "The run finished",
        "stopped": "The run was stopped on request",
        "unfinished": "The run has not finished",
    }.get(run.status, "How far the run went is not recorded")
    seen, epochs = numbers.of("samples_seen"), numbers.of("epochs")
    if seen is not None:
        state += " and stands at" if run.status == "unfinished" else " after"
        state += f" {count(seen)} samples"
        state += f" ({general(epochs)} epochs)" if epochs is not None else ""
    final, best = numbers.of("final_test_accuracy"), numbers.of("best_test_accuracy")
    if final is None:
        return f"{state}; no test accuracy has been recorded."
    final_at = numbers.of("final_test_samples_seen")
    late = f", last measured at {count(final_at)} samples" if final_at != seen and final_at else ""
    at = numbers.of("best_test_samples_seen")
    if best == final:
        return f"{state} with a test accuracy of {percent(final)}{late}, its best."
    where = f" at {count(at)} samples" if at is not None else ""
    state += f" with a test accuracy of {percent(final)}{late}"
    return f"{state}; its best was {percent(best)}{where}."


def _updates_sentence(numbers: Summary) -> str:
    done, fixed = numbers.of("updates"), numbers.of("updates_at_initial_batch")
    initial, top = numbers.of("initial_batch"), numbers.of("largest_batch")
    if done is None:
        return "The number of updates is not recorded."
    if not fixed or initial is None:
        unknown = "how many the initial batch would have needed is not known"
        return f"It took {plural(done, 'update')}; {unknown}."
    ratio = done / fixed
    change = f"{abs(1 - ratio):.0%} {'fewer' if ratio < 1 else 'more'}"
    compared = "as many" if done == fixed else change.replace("%", "\N{NO-BREAK SPACE}%")
    grown = f", and the global batch reached {count(top)}" if top and top > initial else ""
    return (
        f"It took {plural(done, 'update')}, where a global batch of {count(initial)} throughout "
        f"would have needed {count(fixed)} for the same samples: {compared}{grown}."
    )


def _throughput_sentence(numbers: Summary) -> str:
    median, windows = numbers.of("images_per_sec_median"), numbers.of("windows_counted")
    if median is None:
        return "No throughput can be given: no window after the warm-up has one."
    low, high = numbers.of("images_per_sec_p10"), numbers.of("images_per_sec_p90")
    spread = f"10th to 90th percentile {general(low)} to {general(high)}"
    mixed = numbers.of("ranks_first") != numbers.of("ranks_largest")
    return (
        f"The median throughput was {general(median)} images/s ({spread}) over "
        f"{plural(windows, 'logging window')}, the first of each attempt left out as warm-up"
        + (
            "; this takes all rank counts together, the stage table has them apart."
            if mixed
            else "."
        )
    )


def _time_sentence(run: Run, numbers: Summary) -> str:
    wall = numbers.of("wall_seconds")
    first, top = numbers.of("ranks_first"), numbers.of("ranks_largest")
    if first is None:
        ranks = "an unknown number of ranks"
    else:
        ranks = plural(top, "rank") if first == top else f"{count(first)} to {plural(top, 'rank')}"
    if wall is None:
        return f"It ran on {ranks}, {_restarts(numbers)}; the wall time is not known."
    upto = "end" if run.status == "finished" else "last event"
    time = f"From the first start to the {upto} took {duration(wall)}"
    return f"{time} on {ranks}, {_restarts(numbers)}."


def _restarts(numbers: Summary) -> str:
    restarts, continued = numbers.of("restarts"), numbers.of("continuations")
    if restarts is None:
        return "and whether it was restarted is not known"
    text = "without a restart" if not restarts else f"with {plural(restarts, 'restart')}"
    if continued:
        text += f" and with {plural(continued, 'planned continuation')}"
    pause, repeated = numbers.of("seconds_to_resume"), numbers.of("updates_repeated")
    if pause is not None:
        text += f"; the ranks trained again after {duration(pause)}"
    if repeated:
        text += f"; {plural(repeated, 'update')} had to be repeated"
    return text


def compare(runs: list[Run], summaries: list[Summary]) -> list[str]:
    """What several runs say side by side, and whether they may be compared at all."""
    sentences = [f"{len(runs)} runs are compared."]
    for name, what, best, show in (
        ("final_test_accuracy", "The highest final test accuracy is", max, percent),
        ("updates", "The fewest updates are", min, count),
        ("images_per_sec_median", "The highest median images/s is", max, general),
        ("wall_seconds", "The shortest wall time is", min, duration),
    ):
        values = [v for s in summaries if (v := s.of(name)) is not None]
        if values:
            top = best(values)
            holders = [r for r, s in zip(runs, summaries, strict=True) if s.of(name) == top]
            who = ", ".join(f"run {r.number} ({r.name})" for r in holders[:3])
            more = f" and {len(holders) - 3} more" if len(holders) > 3 else ""
            known = "" if len(values) == len(runs) else f" (known for {len(values)} of {len(runs)})"
            sentences.append(f"{what} {show(top)}, of {who}{more}{known}.")
    return [*sentences, *_differences(runs, summaries)]


def _differences(runs: list[Run], summaries: list[Summary]) -> Iterator[str]:
    tasks = {describe(run) for run in runs}
    if len(tasks) > 1:
        yield "The runs are of different tasks, so their accuracies do not compare directly."
    if len({summary.of("samples_seen") for summary in summaries}) > 1:
        yield "The runs saw different numbers of samples: read the curves at equal samples seen."
    unfinished = [str(run.number) for run in runs if run.status != "finished"]
    if unfinished:
        yield f"Not finished: run {', '.join(unfinished)}."
