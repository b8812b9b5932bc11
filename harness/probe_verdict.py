"""What a probe's figures mean for ``comm.compression`` and ``comm.bucket_mb``, in sentences.

The comparisons are made on the medians themselves, linear in bytes between two sizes, which is
exact where a time is α + β m; α and β describe, and are not needed for them.

A gradient of G bytes in k buckets takes k T(G/k) if nothing overlaps. With T(m) = α + β m that is
k α + β G: a single bucket would be best, and buckets of 20 α/β bytes cost 5 % more. But only what
is split can travel while backward goes on. So the smallest bucket is suggested that costs at most
5 % more than the best one.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.alphabeta import (
    LEAST_SIZES,
    Array,
    Fit,
    Interval,
    fit,
    interval,
    resampled_medians,
)
from harness.jsonl import write_json
from harness.probe_results import (
    HOROVOD,
    HOROVOD_FP16,
    OPERATIONS,
    Operation,
    Results,
    in_order,
    print_tables,
    read_results,
    shown_size,
    shown_time,
)

GRADIENTS_MB = (1.0, 10.0, 100.0)
"""MiB of float32 for which buckets are told: LeNet-5 and ResNet-20 have less than 1.1, ResNet-50
97.5."""
_BUCKETS_MB = tuple(2.0**k for k in range(-4, 13))
_DEFAULT_MB = 4.0
_ENOUGH = 1.05
"""How much more than the best bucket size the suggested one may cost."""
_MISFIT = 2.0
"""From which misfit on the lines are no good description."""


@dataclass(frozen=True)
class Curve:
    """An operation's time by size: what was measured, and resamples of it."""

    sizes: Array
    """Bytes, rising."""
    medians: Array
    """Seconds, (1 + resamples) × sizes; the measured ones first."""

    def seconds(self, size: float) -> Array:
        """Times of a message of ``size`` bytes, within the range of those measured."""
        right = int(np.clip(np.searchsorted(self.sizes, size), 1, len(self.sizes) - 1))
        low, high = self.sizes[right - 1], self.sizes[right]
        share = (size - low) / (high - low)
        return np.asarray(self.medians[:, right - 1] * (1 - share) + self.medians[:, right] * share)


def curve_of(results: Results, operation: Operation) -> Curve | None:
    """None if it was measured at fewer than two sizes."""
    rounds = results.rounds(operation)
    if len(rounds) < 2:
        return None
    return Curve(np.array(sorted(rounds), dtype=np.float64), resampled_medians(rounds))


@dataclass(frozen=True)
class Compression:
    """fp16 against float32."""

    ratios: dict[int, Interval]
    """Bytes of float32 -> time with fp16 over time without, at each size."""
    threshold: Interval
    """Bytes from which on fp16 takes less time, up to the largest size; inf: it does not there."""

    @property
    def largest(self) -> tuple[int, Interval]:
        return max(self.ratios.items(), key=lambda item: item[0])

    @property
    def pays(self) -> bool | None:
        """Whether it does at the largest size; None: the rounds do not tell."""
        ratio = self.largest[1]
        return True if ratio.high < 1 else False if ratio.low > 1 else None


def compare(none: Curve, fp16: Curve) -> Compression:
    """How the two differ at the sizes that both have. Raises ValueError for fewer than 2."""
    sizes = np.intersect1d(none.sizes, fp16.sizes)
    if len(sizes) < 2:
        raise ValueError("float32 and fp16 have fewer than 2 sizes in common")
    plain = none.medians[:, np.isin(none.sizes, sizes)]
    packed = fp16.medians[:, np.isin(fp16.sizes, sizes)]
    ratios = {int(s): interval(packed[:, i] / plain[:, i]) for i, s in enumerate(sizes)}
    return Compression(ratios, interval(_crossings(sizes, packed - plain)))


def _crossings(sizes: Array, differences: Array) -> Array:
    """Where each row's difference falls below 0 for good; inf if it does not, the smallest size if
    it is below 0 throughout."""
    found = np.full(len(differences), sizes[0])
    for row, difference in enumerate(differences):
        above = np.flatnonzero(difference >= 0)
        if not len(above):
            continue
        last = int(above[-1])
        if last == len(sizes) - 1:
            found[row] = math.inf
            continue
        low, high = difference[last], difference[last + 1]
        found[row] = sizes[last] + (sizes[last + 1] - sizes[last]) * low / (low - high)
    return found


@dataclass(frozen=True)
class Buckets:
    """What a gradient takes in buckets, without overlap."""

    gradient: float
    """Bytes of float32."""
    compression: str
    best: float
    """MiB; the bucket size with the least time."""
    enough: Interval
    """MiB; the smallest size that takes at most 5 % more."""
    seconds: Interval
    """With that one."""
    default_seconds: Interval
    """With 4 MiB."""
    draws: Array
    """Seconds with buckets of ``enough``: the estimate, then the resamples."""


def choose_buckets(gradient: float, curve: Curve, compression: str) -> Buckets:
    """The bucket size for a gradient of so many bytes, among powers of two of a MiB that are not
    longer than the messages that were measured."""
    smallest, largest = float(curve.sizes[0]), float(curve.sizes[-1])
    limit = min(gradient, largest)
    sizes = [mb for mb in _BUCKETS_MB if smallest <= mb * 2**20 < limit]
    # What holds the whole gradient, or the most that was measured.
    sizes.append(next((mb for mb in _BUCKETS_MB if mb * 2**20 >= limit), _BUCKETS_MB[-1]))
    totals = np.stack([_total(gradient, mb * 2**20, curve) for mb in sizes])
    enough = np.argmax(totals <= _ENOUGH * totals.min(axis=0), axis=0)
    draws = totals[enough[0]]
    return Buckets(
        gradient,
        compression,
        sizes[int(np.argmin(totals[:, 0]))],
        interval(np.array(sizes)[enough]),
        interval(draws),
        interval(_total(gradient, _DEFAULT_MB * 2**20, curve)),
        draws,
    )


def _total(gradient: float, bucket: float, curve: Curve) -> Array:
    """k T(G/k) for the fewest equal buckets that are not larger than ``bucket`` bytes, nor than the
    largest message; a message shorter than the shortest takes as long as that."""
    smallest, largest = float(curve.sizes[0]), float(curve.sizes[-1])
    count = math.ceil(gradient / min(bucket, largest))
    return count * curve.seconds(max(gradient / count, smallest))


# All of it


@dataclass(frozen=True)
class Advice:
    """The settings for a gradient, and how sure they are."""

    gradient: float
    buckets: Buckets
    """With the compression that is suggested."""
    plain: Buckets
    fp16: Buckets | None
    sure: bool
    """Whether the interval of fp16's time over float32's leaves 1 out; if it does not, none is
    suggested."""


@dataclass(frozen=True)
class Verdict:
    """What a probe comes to."""

    fits: dict[str, Fit]
    """By the operation's name."""
    compression: Compression | None
    advice: tuple[Advice, ...]
    missing: str | None = None
    """Why there is no word on compression or buckets."""

    def as_dict(self) -> dict[str, Any]:
        """The form of probe.json: [estimate, low, high] at 95 %; null for "never"."""
        compression = self.compression
        return {
            "confidence": 0.95,
            "fits": {name: _fit_fields(one) for name, one in self.fits.items()},
            "fp16": compression
            and {
                "pays": compression.pays,
                "from_bytes": _bounds(compression.threshold),
                "ratios": {str(s): _bounds(one) for s, one in compression.ratios.items()},
            },
            "advice": [
                {
                    "gradient_mb": one.gradient / 2**20,
                    "comm.bucket_mb": one.buckets.enough.value,
                    "comm.compression": one.buckets.compression,
                    "sure": one.sure,
                    "bucket_mb": _bounds(one.buckets.enough),
                    "best_bucket_mb": one.buckets.best,
                    "seconds": _bounds(one.buckets.seconds),
                    "seconds_with_4_mb": _bounds(one.buckets.default_seconds),
                }
                for one in self.advice
            ],
            "sentences": list(self.sentences()),
        }

    def sentences(self) -> Iterator[str]:
        """What it comes to, for people."""
        for operation in OPERATIONS:
            if operation.name in self.fits:
                yield _about_fit(operation.label, self.fits[operation.name])
        if self.compression is not None:
            yield _about_compression(self.compression)
        yield from map(_about_advice, self.advice)
        if self.missing is not None:
            yield self.missing


def judge(results: Results, gradients_mb: Sequence[float] = GRADIENTS_MB) -> Verdict:
    """Work out the verdict; ``gradients_mb``: MiB of float32 gradients to advise on."""
    if results.ranks == 1:
        return Verdict({}, None, (), "One rank has nobody to talk to: no verdict on the network.")
    fits = {
        operation.name: fit(rounds)
        for operation in OPERATIONS
        if len(rounds := results.rounds(operation)) >= LEAST_SIZES
    }
    plain, fp16 = curve_of(results, HOROVOD), curve_of(results, HOROVOD_FP16)
    if plain is None:
        why = "Horovod was measured at fewer than 2 sizes: no word on compression or buckets."
        return Verdict(fits, None, (), why)
    compression = None
    missing = "Horovod fp16 was not measured at these sizes: no word on compression."
    if fp16 is not None and len(np.intersect1d(plain.sizes, fp16.sizes)) > 1:
        compression, missing = compare(plain, fp16), ""
    advice = tuple(
        _advise(mb * 2**20, plain, fp16 if compression is not None else None) for mb in gradients_mb
    )
    return Verdict(fits, compression, advice, missing or None)


def _advise(gradient: float, plain: Curve, fp16: Curve | None) -> Advice:
    none = choose_buckets(gradient, plain, "none")
    if fp16 is None:
        return Advice(gradient, none, none, None, sure=False)
    half = choose_buckets(gradient, fp16, "fp16")
    ratio = interval(half.draws / none.draws)
    better = half if ratio.high < 1 else none
    return Advice(gradient, better, none, half, sure=ratio.high < 1 or ratio.low > 1)


# Words


def _about_fit(label: str, fitted: Fit) -> str:
    lines = []
    for piece in fitted.pieces:
        alpha, beta = piece.alpha, piece.beta
        where = ""
        if len(fitted.pieces) > 1:
            where = f" for {shown_size(piece.smallest)} to {shown_size(piece.largest)}"
        lines.append(
            f"α = {_time(alpha.value)} ({_time(alpha.low)} to {_time(alpha.high)}), "
            f"β = {_per_gb(beta)}{where}"
        )
    doubt = ""
    if fitted.misfit > _MISFIT:
        doubt = (
            f"; rough, as the medians are {fitted.misfit:.1f} times as far off as they should be"
        )
    return f"{label}: {'; '.join(lines)}{doubt}."


def _about_compression(found: Compression) -> str:
    size, ratio = found.largest
    at = f"at {shown_size(size)} it takes {_times(ratio)} of float32's time"
    if found.pays:
        start = found.threshold
        if start.high <= min(found.ratios):
            return f"fp16 pays at every size measured: {at}."
        return (
            f"fp16 pays for messages of {_size(start.value)} and more (95 %: {_size(start.low)} to "
            f"{_size(start.high)}): {at}."
        )
    if found.pays is None:
        return (
            f"Whether fp16 pays for large messages is not clear here: {at}. Measure longer "
            "(--seconds), or while the machines have nothing else to do."
        )
    clear = [s for s, one in found.ratios.items() if one.high < 1 and s >= 2**16]
    if clear:
        shown = ", ".join(map(shown_size, clear))
        return f"fp16 does not pay for the largest messages: {at}; it does at {shown}."
    return f"fp16 does not pay here: {at}."


def _about_advice(advice: Advice) -> str:
    buckets = advice.buckets
    span = buckets.enough
    sure = "" if span.low == span.high else f" (95 %: {span.low:g} to {span.high:g})"
    words = (
        f"A gradient of {advice.gradient / 2**20:g} MiB: comm.bucket_mb={span.value:g}{sure}, "
        f"comm.compression={buckets.compression}"
    )
    if not advice.sure and advice.fp16 is not None:
        words += " (fp16 is not clearly different)"
    words += f"; {_time(buckets.seconds.value)} an update if nothing overlaps"
    if buckets.best != span.value:
        words += f" (the best are buckets of {buckets.best:g} MiB)"
    if buckets.default_seconds.value > buckets.seconds.value * _ENOUGH:
        words += f", with 4 MiB {_time(buckets.default_seconds.value)}"
    return words + "."


def print_results(path: Path, gradients_mb: Sequence[float]) -> None:
    """Print the tables of a probe that was written, and the verdict on it. Raises UsageError."""
    results = read_results(path)
    print_tables(results.title, in_order(results.timings), results.left_out)
    print_verdict(judge(results, gradients_mb or GRADIENTS_MB))


def conclude(path: Path, gradients_mb: Sequence[float]) -> None:
    """Add the verdict to a probe's files, and print it. Raises UsageError if it is broken."""
    results = read_results(path)
    verdict = judge(results, gradients_mb or GRADIENTS_MB)
    write_json(results.path, {**results.content, "verdict": verdict.as_dict()})
    print_verdict(verdict)


def print_verdict(verdict: Verdict) -> None:
    """Print the sentences."""
    print("verdict (ranges are 95 % intervals; a message of m bytes takes α + β m):")
    for sentence in verdict.sentences():
        print(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  "))


def _fit_fields(fitted: Fit) -> dict[str, Any]:
    return {
        "misfit": fitted.misfit,
        "pieces": [
            {
                "smallest_bytes": piece.smallest,
                "largest_bytes": piece.largest,
                "alpha_seconds": _bounds(piece.alpha),
                "beta_seconds_per_byte": _bounds(piece.beta),
            }
            for piece in fitted.pieces
        ],
    }


def _bounds(value: Interval) -> list[float | None]:
    return [one if math.isfinite(one) else None for one in value.as_list()]


def _time(seconds: float) -> str:
    return "0 s" if seconds == 0 else shown_time([seconds])


def _per_gb(beta: Interval) -> str:
    value, low, high = (one * 1e9 for one in beta.as_list())
    speed = f", which is {1 / value:.3g} GB/s" if value > 0 else ""
    return f"{value:.3g} s/GB ({low:.3g} to {high:.3g}){speed}"


def _times(ratio: Interval) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _size(size: float) -> str:
    if not math.isfinite(size):
        return "never"
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.3g} B"
