"""From the runs' numbers to findings: an interval over seeds, and whether a claim's region has it.

A claim says that a true value lies in a region, such as *the difference is within ±1 %*. It *holds*
if the interval lies inside, *does not hold* if the interval lies outside, and is *undecided* if the
interval has a part in each, or if there is none, as with one seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from harness.report.fields import general
from harness.scaling.interval import Interval
from harness.student import mean_interval
from harness.study.cells import Arm, Point, Study
from harness.study.metrics import METRICS
from harness.study.runs import Measured
from harness.study.schema import (
    Best,
    Chain,
    Critical,
    Difference,
    Finding,
    Level,
    Limit,
    Ratio,
    Trend,
)
from harness.yamlfile import shown

Verdict = Literal["holds", "does not hold", "undecided"]
Runs = Mapping[tuple[Arm, int], Measured]
"""Those that are over."""


@dataclass(frozen=True)
class Line:
    """One comparison."""

    what: str
    interval: Interval | None
    text: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Found:
    """A finding: its comparisons, and what they come to."""

    finding: Finding
    rule: str
    """What had to be the case, in words."""
    lines: list[Line] = field(default_factory=list)
    verdict: str = "undecided"


def judge(interval: Interval | None, low: float, high: float) -> Verdict:
    """Whether the true value lies in [low, high]."""
    if interval is None or interval.low is None or interval.high is None:
        return "undecided"
    if low <= interval.low and interval.high <= high:
        return "holds"
    if interval.high < low or interval.low > high:
        return "does not hold"
    return "undecided"


def summed(verdicts: Sequence[Verdict]) -> str:
    """What several points come to."""
    kinds = set(verdicts)
    if not kinds:
        return "undecided"
    if len(kinds) == 1:
        return verdicts[0]
    counted = [(kind, verdicts.count(kind)) for kind in ("holds", "does not hold", "undecided")]
    told = ", ".join(f"{kind} at {n}" for kind, n in counted if n)
    return f"in part: {told} of {len(verdicts)}"


class Judge:
    """Derives the findings of a study from its runs."""

    def __init__(self, study: Study, runs: Runs) -> None:
        self._study, self._runs = study, runs
        self._confidence = study.file.confidence

    def values(self, arm: Arm, metric: str) -> dict[int, float]:
        """By seed."""
        found = {}
        for seed in self._study.seeds:
            run = self._runs.get((arm, seed))
            value = None if run is None else run.metrics.get(metric)
            if value is not None:
                found[seed] = value
        return found

    def mean(self, arm: Arm, metric: str) -> Interval | None:
        values = list(self.values(arm, metric).values())
        return Interval(*mean_interval(values, self._confidence)) if values else None

    def difference(self, a: Arm, b: Arm, metric: str) -> tuple[Interval | None, int]:
        """(a − b paired by seed, number of pairs)."""
        first, second = self.values(a, metric), self.values(b, metric)
        pairs = [first[seed] - second[seed] for seed in first if seed in second]
        if not pairs:
            return None, 0
        return Interval(*mean_interval(pairs, self._confidence)), len(pairs)

    def ratio(self, a: Arm, b: Arm, metric: str) -> tuple[Interval | None, int]:
        """(a / b, geometric mean over pairs of a seed, number of pairs)."""
        first, second = self.values(a, metric), self.values(b, metric)
        logs = [
            math.log(first[seed] / second[seed])
            for seed in first
            if seed in second and first[seed] > 0 and second[seed] > 0
        ]
        if not logs:
            return None, 0
        found = Interval(*mean_interval(logs, self._confidence))
        return found.mapped(lambda value: math.exp(min(value, 700.0))), len(logs)

    def find(self, finding: Finding) -> Found:
        """What the runs say of it."""
        how: dict[type, Callable[[Any], Found]] = {
            Difference: self._difference,
            Ratio: self._ratio,
            Level: self._level,
            Limit: self._limit,
            Trend: self._trend,
            Chain: self._chain,
            Best: self._best,
            Critical: self._critical,
        }
        return how[type(finding)](finding)

    def all(self) -> list[Found]:
        return [self.find(finding) for finding in self._study.file.findings if self._has(finding)]

    def _has(self, finding: Finding) -> bool:
        """Whether the variants that it is about run at all, which a quick study may leave out."""
        named = {getattr(finding, key, None) for key in ("a", "b", "reference", "expect")}
        known = set(self._study.file.variants)
        return all(name in self._study.variants for name in named & known)

    def _points(self, finding: Difference | Ratio | Level) -> list[Point]:
        if finding.at is None:
            return self._study.points
        return [p for p in self._study.points if dict(p) in finding.at]

    def _difference(self, finding: Difference) -> Found:
        kind = METRICS[finding.of]
        expect = finding.expect
        if expect == "not_worse":
            low, high = (
                (-math.inf, finding.by) if kind.better != "more" else (-finding.by, math.inf)
            )
        else:
            low, high = _region(expect, finding.by)
        margin = show(finding.of, finding.by, difference=True)
        words = {
            "within": f"within ±{margin} of each other",
            "not_worse": f"at most {margin} worse",
            "less": f"less by {margin} or more" if finding.by else "less",
            "more": f"more by {margin} or more" if finding.by else "more",
        }
        rule = f"{kind.title} of {finding.a} against {finding.b}: {words[finding.expect]}"
        lines = []
        for point in self._points(finding):
            a, b = Arm(finding.a, point), Arm(finding.b, point)
            interval, pairs = self.difference(a, b, finding.of)
            lines.append(self._line(finding.of, a, b, interval, pairs, (low, high)))
        return _found(finding, rule, lines)

    def _line(
        self,
        metric: str,
        a: Arm,
        b: Arm,
        interval: Interval | None,
        pairs: int,
        region: tuple[float, float] | None,
    ) -> Line:
        what = _place(a)
        if interval is None:
            return Line(what, None, self._why_none(metric, a, b), region and "undecided")
        text = f"{a.variant} − {b.variant} = {spread(metric, interval, difference=True)}"
        text += self._fewer(pairs)
        return Line(what, interval, text, judge(interval, *region) if region else None)

    def _why_none(self, metric: str, *arms: Arm) -> str:
        without = [arm.variant for arm in arms if not self.values(arm, metric)]
        return (
            f"no run of {' or '.join(dict.fromkeys(without)) or 'both'} has {METRICS[metric].title}"
        )

    def _fewer(self, pairs: int) -> str:
        seeds = len(self._study.seeds)
        return "" if pairs == seeds else f" ({pairs} of {seeds} seeds)"

    def _ratio(self, finding: Ratio) -> Found:
        by = finding.by
        low, high = {
            "within": (1 / by, by),
            "at_most": (0.0, by),
            "at_least": (by, math.inf),
        }[finding.expect]
        words = {
            "within": f"within a factor of {general(by)}",
            "at_most": f"at most {general(by)}",
            "at_least": f"at least {general(by)}",
        }[finding.expect]
        title = METRICS[finding.of].title
        rule = f"{title}, {finding.a} over {finding.b}: {words}"
        lines = []
        for point in self._points(finding):
            a, b = Arm(finding.a, point), Arm(finding.b, point)
            interval, pairs = self.ratio(a, b, finding.of)
            if interval is None:
                lines.append(Line(_place(a), None, self._why_none(finding.of, a, b), "undecided"))
                continue
            text = f"{a.variant} / {b.variant} = {plain(interval)}{self._fewer(pairs)}"
            lines.append(Line(_place(a), interval, text, judge(interval, low, high)))
        return _found(finding, rule, lines)

    def _level(self, finding: Level) -> Found:
        value = finding.value
        low, high = {
            "within": (value - finding.by, value + finding.by),
            "at_most": (-math.inf, value),
            "at_least": (value, math.inf),
        }[finding.expect]
        told = show(finding.of, value)
        words = {
            "within": f"{told} ± {show(finding.of, finding.by, difference=True)}",
            "at_most": f"at most {told}",
            "at_least": f"at least {told}",
        }[finding.expect]
        rule = f"{METRICS[finding.of].title} of {finding.a}: {words}"
        lines = []
        for point in self._points(finding):
            arm = Arm(finding.a, point)
            interval = self.mean(arm, finding.of)
            if interval is None:
                lines.append(Line(_place(arm), None, self._why_none(finding.of, arm), "undecided"))
                continue
            text = f"{arm.variant}: {spread(finding.of, interval)}"
            text += self._fewer(len(self.values(arm, finding.of)))
            lines.append(Line(_place(arm), interval, text, judge(interval, low, high)))
        return _found(finding, rule, lines)

    def _trend(self, finding: Trend) -> Found:
        region = _region(finding.expect, finding.by)
        first, last = self._study.points[0], self._study.points[-1]
        margin = show(finding.of, finding.by, difference=True)
        words = {
            "within": f"changes by at most {margin}",
            "less": "falls" + f" by {margin} or more" * (finding.by > 0),
            "more": "rises" + f" by {margin} or more" * (finding.by > 0),
        }[finding.expect]
        rule = f"{METRICS[finding.of].title} of {finding.a} along the grid: {words}"
        a, b = Arm(finding.a, last), Arm(finding.a, first)
        interval, pairs = self.difference(a, b, finding.of)
        if interval is None:
            line = Line("", None, self._why_none(finding.of, a, b), "undecided")
        else:
            text = f"{a} − {b} = {spread(finding.of, interval, difference=True)}"
            line = Line("", interval, text + self._fewer(pairs), judge(interval, *region))
        return _found(finding, rule, [line])

    def _limit(self, finding: Limit) -> Found:
        """Each seed has its own limit, so that its interval is over seeds like all others."""
        along = finding.along or next(iter(self._study.grid))
        steps = list(self._study.grid[along])
        title, margin = METRICS[finding.of].title, show(finding.of, finding.by, difference=True)
        short = along.split(".")[-1]
        words = "further than" if finding.expect == "further" else "as far as"
        rule = (
            f"{short} up to which {title} stays within {margin} of that at {shown(steps[0])}: "
            f"{finding.a} goes {words} {finding.b}"
        )
        lines = []
        others = [dict(p) for p in self._study.points if dict(p)[along] == steps[0]]
        for rest in others:
            reach = {
                name: self._reach(name, finding, along, steps, rest)
                for name in (finding.a, finding.b)
            }
            shared = [s for s in reach[finding.a] if s in reach[finding.b]]
            gaps = [float(reach[finding.a][s] - reach[finding.b][s]) for s in shared]
            where = ", ".join(
                f"{k.split('.')[-1]} {shown(v)}" for k, v in rest.items() if k != along
            )
            if not gaps:
                lines.append(Line(where, None, "no seed has both", "undecided"))
                continue
            interval = Interval(*mean_interval(gaps, self._confidence))
            region = (1e-9, math.inf) if finding.expect == "further" else (0.0, math.inf)
            told = "; ".join(
                f"{name} to {_reached(reach[name].values(), steps)}"
                for name in (finding.a, finding.b)
            )
            text = f"{told}; {plain(interval)} steps of the grid further"
            lines.append(Line(where, interval, text, judge(interval, *region)))
        return _found(finding, rule, lines)

    def _reach(
        self, name: str, finding: Limit, along: str, steps: list[Any], rest: dict[str, Any]
    ) -> dict[int, int]:
        """The index of the last value before the first that fails, by seed; −1: the first one."""

        def at(variant: str, step: Any) -> dict[int, float]:
            point = tuple((k, step if k == along else rest[k]) for k in self._study.grid)
            return self.values(Arm(variant, point), finding.of)

        reference = at(finding.reference or name, steps[0])
        sign = -1.0 if METRICS[finding.of].better == "more" else 1.0
        found = {}
        tables = [at(name, step) for step in steps]
        # The mean of the seeds at the first point: one lucky seed there makes no limit.
        base = sum(reference.values()) / len(reference) if reference else math.nan
        for seed in reference:
            reached = -1
            for index, values in enumerate(tables):
                if seed not in values or not sign * (values[seed] - base) <= finding.by:
                    break
                reached = index
            found[seed] = reached
        return found

    def _chain(self, finding: Chain) -> Found:
        rule = f"{METRICS[finding.of].title}: what each step changes"
        lines = []
        names = [name for name in finding.variants if name in self._study.variants]
        better = METRICS[finding.of].better
        for point in self._study.points:
            for before, after in itertools.pairwise(names):
                a, b = Arm(after, point), Arm(before, point)
                interval, pairs = self.difference(a, b, finding.of)
                line = self._line(finding.of, a, b, interval, pairs, None)
                effect = _effect(interval, better)
                lines.append(Line(line.what, interval, f"{line.text}: {effect}"))
        return Found(finding, rule, lines, "measured")

    def _best(self, finding: Best) -> Found:
        title = METRICS[finding.of].title
        names = [n for n in finding.among or self._study.variants if n in self._study.variants]
        expected = f"; said to be {finding.expect}" if finding.expect else ""
        rule = f"the best {title} at each point{expected}"
        sign = 1.0 if METRICS[finding.of].better == "more" else -1.0
        lines = []
        for point in self._study.points:
            means = {n: self.mean(Arm(n, point), finding.of) for n in names}
            known = {n: one.value for n, one in means.items() if one is not None}
            if not known:
                lines.append(Line(_place(Arm("", point)), None, f"no run has {title}", "undecided"))
                continue
            best = max(known, key=lambda n: sign * known[n])
            ties = [n for n in known if n != best and self._ties(best, n, point, finding.of)]
            told = means[best]
            text = f"{best}, {spread(finding.of, told) if told else ''}"
            text += f"; not told apart from it: {', '.join(ties)}" if ties else ""
            verdict: Verdict | None = None
            if finding.expect is not None:
                first = "holds" if not ties else "undecided"
                other = "undecided" if finding.expect in ties else "does not hold"
                verdict = first if finding.expect == best else other  # type: ignore[assignment]
            lines.append(Line(_place(Arm("", point)), told, text, verdict))
        if finding.expect is None:
            return Found(finding, rule, lines, "measured")
        return _found(finding, rule, lines)

    def _ties(self, best: str, other: str, point: Point, metric: str) -> bool:
        interval, _ = self.difference(Arm(best, point), Arm(other, point), metric)
        return interval is None or interval.covers(0.0) is not False

    def _critical(self, finding: Critical) -> Found:
        rule = (
            "the critical batch, from updates to the target over batches, and the measured noise "
            f"scale: within a factor of {general(finding.within)}"
        )
        lines, ratios, fitted = [], [], []
        for seed in self._study.seeds:
            curve = self._to_target(finding.a, seed)
            found = critical_batch(curve)
            noise = self._noise_of(finding, seed)
            if found is not None:
                fitted.append(found[0])
            if found is not None and noise:
                ratios.append(math.log(found[0] / noise))
        if fitted:
            logs = Interval(*mean_interval([math.log(v) for v in fitted], self._confidence))
            text = f"critical batch {plain(logs.mapped(_exp))}{self._fewer(len(fitted))}"
            lines.append(Line("", logs.mapped(_exp), text))
        if not ratios:
            text = "no seed has both: updates to the target at three batches, and a noise scale"
            return _found(finding, rule, [*lines, Line("", None, text, "undecided")])
        interval = Interval(*mean_interval(ratios, self._confidence)).mapped(_exp)
        text = f"critical batch / noise scale = {plain(interval)}{self._fewer(len(ratios))}"
        verdict = judge(interval, 1 / finding.within, finding.within)
        return _found(finding, rule, [*lines, Line("", interval, text, verdict)])

    def _to_target(self, variant: str, seed: int) -> dict[float, float]:
        found = {}
        for point in self._study.points:
            value = self.values(Arm(variant, point), "updates_to_target").get(seed)
            batch = dict(point).get("batch.initial")
            if value is not None and isinstance(batch, int | float):
                found[float(batch)] = value
        return found

    def _noise_of(self, finding: Critical, seed: int) -> float | None:
        """The median over the batches at which it was measured."""
        values = [
            self.values(Arm(finding.a, p), finding.noise).get(seed) for p in self._study.points
        ]
        known = [value for value in values if value is not None and value > 0]
        return float(np.median(known)) if known else None


def critical_batch(curve: Mapping[float, float]) -> tuple[float, float] | None:
    """(B_crit, S_min) of S = S_min + (S_min B_crit) / B, least squares of relative errors.

    None of fewer than three batches, or if the line has no positive terms: then the largest batch
    is still far below the critical one, or the smallest far above it.
    """
    if len(curve) < 3:
        return None
    batches = np.array(sorted(curve))
    updates = np.array([curve[b] for b in sorted(curve)])
    matrix = np.stack([np.ones_like(batches), 1 / batches], axis=1) / updates[:, None]
    (smallest, examples), *_ = np.linalg.lstsq(matrix, np.ones_like(batches), rcond=None)
    if smallest <= 0 or examples <= 0:
        return None
    return float(examples / smallest), float(smallest)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _region(expect: str, by: float) -> tuple[float, float]:
    least = by or math.nextafter(0.0, 1.0)  # what is equal is neither less nor more
    return {"within": (-by, by), "less": (-math.inf, -least), "more": (least, math.inf)}[expect]


def _found(finding: Finding, rule: str, lines: list[Line]) -> Found:
    verdicts = [line.verdict for line in lines if line.verdict is not None]
    return Found(finding, rule, lines, summed(verdicts))


def _place(arm: Arm) -> str:
    return ", ".join(f"{key.split('.')[-1]} {shown(value)}" for key, value in arm.point)


def _reached(indices: Any, steps: list[Any]) -> str:
    names = [shown(steps[i]) if i >= 0 else "none" for i in sorted(indices)]
    return " / ".join(dict.fromkeys(names))


def _effect(interval: Interval | None, better: str) -> str:
    if interval is None or interval.low is None or interval.high is None:
        return "undecided"
    if interval.low <= 0 <= interval.high:
        return "no difference told"
    rises = interval.value > 0
    if better == "neither":
        return "rises" if rises else "falls"
    return "better" if rises == (better == "more") else "worse"


# In words


def show(metric: str, value: float, difference: bool = False) -> str:
    """A value of a metric as people read it: shares in percent, differences of them in points."""
    if METRICS[metric].unit == "share":
        return f"{100 * value:.2f}{' points' if difference else ' %'}"
    if METRICS[metric].unit == "count" and abs(value) >= 100:
        return f"{value:,.0f}"
    return general(value, 3) + (" s" if METRICS[metric].unit == "s" else "")


def spread(metric: str, interval: Interval, difference: bool = False) -> str:
    """A mean with half the width of its interval, which is symmetric."""
    text = show(metric, interval.value, difference)
    if interval.low is None or interval.high is None:
        return f"{text} (one seed: no interval)"
    half = show(metric, (interval.high - interval.low) / 2, difference)
    number, space, unit = text.partition(" ")
    return f"{number} ± {half.partition(' ')[0]}{space}{unit}"


def plain(interval: Interval) -> str:
    """A value with the ends of an interval that need not be symmetric."""
    if interval.low is None or interval.high is None:
        return f"{general(interval.value, 3)} (one seed: no interval)"
    low, high = general(interval.low, 3), general(interval.high, 3)
    return f"{general(interval.value, 3)} [{low}, {high}]"
