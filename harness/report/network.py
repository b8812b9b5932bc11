"""The links that probes tell the scaling model.

A probe's α and β are of a whole allreduce of its n ranks. The model has the coefficients of a
link, from which it makes those of a ring with w members: 2(w − 1)·α and 2(w − 1)/w·β
(``harness.scaling.steptime``). What it is given must make the probe's own time come out of its
formula, so the probe's are divided by the factors that the formula would put on:

- on one host the ring has the probe's n ranks: that is the link ``within`` nodes;
- on N hosts with w ranks on each, the formula adds a ring of w ranks inside the hosts and one of N
  members, the hosts, between them. So N counts for ``between``, not n; with w above 1, what the
  rings inside take goes off first, as far as another probe tells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, hypot, log
from typing import Any, Literal

from harness.alphabeta import piece_at
from harness.probe_results import HOROVOD
from harness.report.fields import count, general, plural
from harness.report.probes import Bounds, Line, Probe, seconds_text
from harness.scaling.priors import UNKNOWN, KnownLink
from harness.scaling.steptime import Wire

Place = Literal["within", "between"]
_PLACES: dict[Place, str] = {"within": "inside a host", "between": "between hosts"}
_LEAST, _MOST = 1e-15, 1e3  # what a KnownLink may hold
_TWO_SIDED = 1.959964  # standard deviations from the middle to an end of a 95 % interval


@dataclass(frozen=True)
class Given:
    """A link as the model takes it, and where it comes from."""

    place: Place
    link: KnownLink
    probe: str
    text: str
    """For people."""
    source: str
    """File, fields and rule."""

    @property
    def brief(self) -> str:
        return f"The network {_PLACES[self.place]} is taken from {self.probe}."

    def as_dict(self) -> dict[str, Any]:
        return {
            "link": self.place,
            "latency_seconds": self.link.latency,
            "seconds_per_byte": self.link.seconds_per_byte,
            "factor": self.link.factor,
            "probe": self.probe,
            "source": self.source,
        }


@dataclass(frozen=True)
class Network:
    """What probes tell of both links."""

    given: tuple[Given, ...] = ()

    @property
    def within(self) -> KnownLink:
        return self._link("within")

    @property
    def between(self) -> KnownLink:
        return self._link("between")

    def _link(self, place: Place) -> KnownLink:
        return next((one.link for one in self.given if one.place == place), UNKNOWN)


def network_of(probes: Sequence[Probe], wire: Wire) -> Network:
    """What the probes tell a model of updates that send this. Of several on one host, the one with
    the most ranks counts, of several on more hosts the one with the most hosts; of equal ones the
    first."""
    message = max(1.0, wire.gradient_bytes / wire.buckets)
    inside = _chosen([one for one in probes if len(one.hosts) == 1])
    outside = _chosen([one for one in probes if len(one.hosts) > 1])
    within = None if inside is None else _within(*inside, message)
    between = None if outside is None else _between(*outside, message, within)
    return Network(tuple(one for one in (within, between) if one is not None))


def _chosen(probes: list[Probe]) -> tuple[Probe, int] | None:
    """The probe, and its ranks."""
    fitting = [
        (one, one.ranks)
        for one in probes
        if one.ranks is not None and one.ranks >= max(2, len(one.hosts)) and one.lines_of(HOROVOD)
    ]
    return max(fitting, key=lambda pair: (len(pair[0].hosts), pair[1]), default=None)


def _line(probe: Probe, message: float) -> Line:
    """Horovod's float32 allreduce at that size."""
    lines = probe.lines_of(HOROVOD)
    return lines[piece_at(lines, message)]


def _within(probe: Probe, ranks: int, message: float) -> Given | None:
    line = _line(probe, message)
    latency, per_byte = (2 * (ranks - 1), 2 * (ranks - 1) / ranks)
    rule = f"over 2(n − 1) and 2(n − 1)/n with n = {ranks} ranks"
    alpha, beta = _over(line.alpha, latency), _over(line.beta, per_byte)
    return _given("within", probe, line, alpha, beta, rule)


def _between(probe: Probe, ranks: int, message: float, within: Given | None) -> Given | None:
    line, hosts = _line(probe, message), len(probe.hosts)
    each = ranks / hosts
    alpha, beta = line.alpha, line.beta
    rule = f"over 2(N − 1) and 2(N − 1)/N with N = {hosts} hosts"
    if each > 1 and within is not None:
        link = within.link
        alpha = _less(alpha, 2 * (each - 1) * (link.latency or 0.0))
        beta = _less(beta, 2 * (each - 1) / each * (link.seconds_per_byte or 0.0))
        rule = f"less what the rings of {general(each)} ranks inside the hosts take, {rule}"
    elif each > 1:
        rule += f", what passes between the {general(each)} ranks of a host included"
    alpha, beta = _over(alpha, 2 * (hosts - 1)), _over(beta, 2 * (hosts - 1) / hosts)
    return _given("between", probe, line, alpha, beta, rule)


def _over(bounds: Bounds, divisor: float) -> Bounds:
    value, low, high = (bound / divisor for bound in bounds)
    return value, low, high


def _less(bounds: Bounds, taken: float) -> Bounds:
    value, low, high = (bound - taken for bound in bounds)
    return value, low, high


def _given(
    place: Place, probe: Probe, line: Line, alpha: Bounds, beta: Bounds, rule: str
) -> Given | None:
    """None if the probe tells neither coefficient: an interval that reaches 0 tells none."""
    told = [min(one) >= _LEAST and max(one) <= _MOST for one in (alpha, beta)]
    known = [one for one, can in zip((alpha, beta), told, strict=True) if can]
    if not known:
        return None
    # The interval is of the probe's rounds; that a run shares the network comes on top.
    widest = max(log(high / low) for _, low, high in known) / 2 / _TWO_SIDED
    factor = min(exp(hypot(log(UNKNOWN.factor), widest)), 1000.0)
    link = KnownLink(alpha[0] if told[0] else None, beta[0] if told[1] else None, factor)
    named = [
        f"α = {seconds_text(alpha[0])} a message" if told[0] else "no α, as its interval reaches 0",
        f"β = {general(1e9 * beta[0], 3)} s/GB on the wire ({general(1e-9 / beta[0], 3)} GB/s)"
        if told[1]
        else "no β, as its interval reaches 0",
    ]
    text = (
        f"The network {_PLACES[place]} is given by {probe.label} ({probe.where}): "
        f"{' and '.join(named)}, within a factor of {general(factor, 2)} (one standard deviation). "
        f"They are α and β of Horovod's float32 allreduce {rule}."
    )
    names = ("alpha_seconds[0]", "beta_seconds_per_byte[0]")
    fields = " and ".join(name for name, can in zip(names, told, strict=True) if can)
    return Given(place, link, probe.label, text, f"{line.source}, {fields}, {rule}")


def unused(probe: Probe, networks: Sequence[Network]) -> str | None:
    """Why no model took a probe, in words; None if one did."""
    if any(one.probe == probe.label for network in networks for one in network.given):
        return None
    if probe.ranks == 1:
        return "one rank tells nothing of a network"
    if not probe.lines_of(HOROVOD):
        return "it has no α and β of Horovod's allreduce"
    if not probe.hosts:
        return "its hosts are not recorded"
    if probe.ranks is None or probe.ranks < len(probe.hosts):
        return f"its ranks do not go with its {count(len(probe.hosts))} hosts"
    if not networks:
        return (
            f"no series of {plural(3, 'rank count')} or more is on this page, so there is no model"
        )
    return "another probe has more hosts or ranks, or its intervals reach 0"
