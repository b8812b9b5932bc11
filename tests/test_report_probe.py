"""Probes in the report: what is shown of them, and what the scaling model takes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import Simulation, bench, probe, summary_of, text_of, write_bench, write_probe

from harness.report import build_report
from harness.report.network import network_of, unused
from harness.report.probes import Probe, load_probe
from harness.scaling.priors import UNKNOWN
from harness.scaling.steptime import Decomposition, Link, StepTime, Wire

WIRE = Wire(4e6, 4e6)


def loaded(path: Path, content: Any, verdict: bool = True) -> Probe:
    return load_probe(write_probe(path, content, verdict), 1)


# ---------------------------------------------------------------- what the model takes


@pytest.mark.parametrize("hosts", [(2,), (4,), (7,), (1, 1), (1, 1, 1, 1)])
def test_the_model_s_formula_gives_the_probe_s_own_times_back(
    hosts: tuple[int, ...], tmp_path: Path
) -> None:
    """With the link that the model takes, its ring of the probe's ranks takes what the probe did:
    the law that says which n is right."""
    content = probe(hosts, alpha=3e-3, beta=2e-9, noise=0.0)
    network = network_of([loaded(tmp_path / "p", content)], WIRE)
    assert comm_seconds(network, hosts) == pytest.approx(3e-3 + 2e-9 * 4e6, rel=1e-3)


def comm_seconds(network: Any, hosts: tuple[int, ...]) -> float:
    def link(known: Any) -> Link:
        return Link(known.latency or 0.0, known.seconds_per_byte or 0.0)

    model = StepTime(
        per_image=0.0, within=link(network.within), between=link(network.between), wire=WIRE
    )
    where = Decomposition.of([sum(hosts)], [len(hosts)], [64])
    return float(model.parts(where).communication[0])


@pytest.mark.parametrize("hosts", [(2, 2), (3, 3), (2, 2, 2, 2)])
def test_of_several_ranks_on_a_host_what_happens_inside_goes_off(
    hosts: tuple[int, ...], tmp_path: Path
) -> None:
    inside = loaded(tmp_path / "in", probe(hosts[:1], alpha=1e-4, beta=1e-10, noise=0.0))
    across = loaded(tmp_path / "out", probe(hosts, alpha=3e-3, beta=2e-9, noise=0.0))
    both = network_of([across, inside], WIRE)
    alone = network_of([across], WIRE)
    for network in (both, alone):
        assert comm_seconds(network, hosts) == pytest.approx(3e-3 + 2e-9 * 4e6, rel=1e-3)
    steps = 2 * (len(hosts) - 1)
    assert alone.within is UNKNOWN
    assert alone.between.latency == pytest.approx(3e-3 / steps, rel=1e-3)
    assert both.between.latency == pytest.approx((3e-3 - 1e-4) / steps, rel=1e-3)
    assert "of a host included" in alone.given[0].source
    assert "less what the rings of" in both.given[1].source


def test_one_host_tells_within_and_several_tell_between(tmp_path: Path) -> None:
    one, two = (
        loaded(tmp_path / name, probe(hosts)) for name, hosts in (("a", (2,)), ("b", (1, 1)))
    )
    assert [given.place for given in network_of([one], WIRE).given] == ["within"]
    assert [given.place for given in network_of([two], WIRE).given] == ["between"]
    assert [given.place for given in network_of([two, one], WIRE).given] == ["within", "between"]
    assert network_of([], WIRE).between is UNKNOWN


def test_of_several_the_largest_counts_and_the_others_say_why_not(tmp_path: Path) -> None:
    small, large = (load_probe(write_probe(tmp_path / str(n), probe((1,) * n)), n) for n in (2, 4))
    network = network_of([small, large], WIRE)
    assert network.given[0].probe == large.label
    assert unused(large, [network]) is None
    assert "another probe" in (unused(small, [network]) or "")
    assert "no series" in (unused(small, []) or "")
    solo = loaded(tmp_path / "solo", probe((1,)))
    assert network_of([solo], WIRE).given == ()
    assert "one rank" in (unused(solo, [network]) or "")


@given(st.floats(1e3, 1e9), st.floats(1e3, 1e9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_the_line_is_that_of_a_bucket_s_size(
    two_lines: Probe, gradient: float, bucket: float
) -> None:
    wire = Wire(gradient, bucket)
    (given,) = network_of([two_lines], wire).given
    message = gradient / wire.buckets
    small, large = two_lines.lines_of(two_lines.lines[0].operation)
    border = (small.largest * large.smallest) ** 0.5
    expected = small if message <= border else large
    assert given.link.seconds_per_byte == pytest.approx(expected.beta[0] / (2 * 1 / 2))


@pytest.fixture(scope="module")
def two_lines(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    content = probe((1, 1))

    def piece(smallest: int, largest: int, beta: float) -> dict[str, Any]:
        bounds = {"alpha_seconds": [1e-4] * 3, "beta_seconds_per_byte": [beta] * 3}
        return {"smallest_bytes": smallest, "largest_bytes": largest, **bounds}

    fits = {
        "horovod": {"misfit": 1.0, "pieces": [piece(4, 2**16, 5e-9), piece(2**18, 2**26, 1e-9)]}
    }
    content["verdict"] = {"fits": fits, "sentences": []}
    found = loaded(tmp_path_factory.mktemp("two") / "p", content, verdict=False)
    assert len(found.lines) == 2
    return found


def test_an_interval_that_reaches_zero_tells_nothing(tmp_path: Path) -> None:
    content = probe((1, 1), alpha=0.0, beta=2e-9, noise=0.0)
    network = network_of([loaded(tmp_path / "p", content)], WIRE)
    assert network.between.latency is None
    assert network.between.seconds_per_byte == pytest.approx(2e-9)
    assert "no α, as its interval reaches 0" in network.given[0].text


def test_a_rough_probe_is_given_with_a_wider_factor(tmp_path: Path) -> None:
    clear = network_of([loaded(tmp_path / "a", probe((1, 1), noise=0.0))], WIRE)
    rough = network_of([loaded(tmp_path / "b", probe((1, 1), noise=1.5, rounds=5))], WIRE)
    assert clear.between.factor == pytest.approx(1.5, rel=1e-3)
    assert rough.between.factor > 1.52


# ---------------------------------------------------------------- pages


LINK = Link(2e-3, 1e-8)
MACHINE = StepTime(per_image=4e-3, fixed=2e-3, between=LINK, wire=Wire(4e6))


def series(nodes: tuple[int, ...] = (1, 2, 3)) -> Any:
    """A bench of one rank on each of so many nodes of a machine that is as the model has it."""
    content = bench(ranks=nodes) | {"gradient_bytes": 4_000_000}
    for count, point in zip(nodes, content["points"], strict=True):
        seconds = float(MACHINE.seconds(Decomposition.of([count], [count], [32 * count]))[0])
        own = [one["images_per_sec"] / point["images_per_sec"] for one in point["repeats"]]
        rate = 32 * count / seconds
        point |= {"nodes": count, "images_per_sec": rate}
        point |= {"images_per_sec_low": 0.99 * rate, "images_per_sec_high": 1.01 * rate}
        for one, off in zip(point["repeats"], own, strict=True):
            one["images_per_sec"] = rate * off
    return content


def test_a_probe_is_shown_drawn_and_traced(tmp_path: Path) -> None:
    index = build_report([write_probe(tmp_path / "net", probe((2, 2)))])
    assert index == tmp_path / "net" / "report" / "index.html"
    text, summary = text_of(index), summary_of(index)
    assert "4 ranks on 2 hosts, n1 and n2, 2026-03-02 08:30 UTC" in text
    assert "fp16 pays for messages of" in text
    assert "A gradient of 97.5 MiB: comm.bucket_mb=" in text
    assert "torch Gloo is not measured: its ranks cannot find each other" in text
    (one,) = summary["probes"]
    assert one["hosts"] == [{"host": "n1", "ranks": 2}, {"host": "n2", "ranks": 2}]
    horovod = next(line for line in one["lines"] if line["operation"] == "horovod")
    assert horovod["source"] == "probe.json: verdict.fits.horovod.pieces[0]"
    value, low, high = horovod["beta_seconds_per_byte"]
    assert low <= value <= high
    assert value == pytest.approx(1e-9, rel=0.05)
    drawn = {path.name for path in index.parent.iterdir()}
    assert {"bus-bandwidth.svg", "bus-bandwidth.csv", "report.md"} <= drawn
    assert {"scaling.svg", "training.svg", "metrics.csv"}.isdisjoint(drawn)
    told = (index.parent / "report.md").read_text(encoding="utf-8")
    assert "## Network" in told
    assert "](bus-bandwidth.svg)" in told


def test_bus_bandwidth_follows_its_definition(tmp_path: Path) -> None:
    content = probe((3,))
    index = build_report([write_probe(tmp_path / "net", content)])
    with (index.parent / "bus-bandwidth.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["timings"])
    given = {(t["operation"], str(t["bytes"])): t["seconds"] for t in content["timings"]}
    for row in rows:
        seconds = given[row["operation"], row["bytes"]]
        factor = 1 if row["operation"] == "horovod_broadcast" else 4 / 3
        middle, fast, slow = (float(np.quantile(seconds, q)) for q in (0.5, 0.25, 0.75))
        for name, time in (("bus GB/s", middle), ("lowest", slow), ("highest", fast)):
            expected = int(row["bytes"]) / time * factor / 1e9
            assert float(row[name]) == pytest.approx(expected)


def test_a_probe_narrows_far_predictions_and_the_page_says_so(tmp_path: Path) -> None:
    """The same bench with and without a probe; any order, and below one directory."""
    home = tmp_path / "both"
    write_bench(home / "bench", series())
    write_probe(home / "net", probe((1, 1), alpha=2 * LINK.latency, beta=LINK.seconds_per_byte))
    with_probe = summary_of(build_report([home]))
    swapped = build_report([home / "net", home / "bench"], tmp_path / "swapped")
    assert summary_of(swapped)["scaling"] == with_probe["scaling"]
    without = summary_of(build_report([home / "bench"], tmp_path / "without"))
    (one,), (other,) = with_probe["scaling"], without["scaling"]
    assert other["network"] == []
    (given,) = one["network"]
    assert given["link"] == "between"
    assert given["latency_seconds"] == pytest.approx(LINK.latency, rel=0.05)
    assert given["seconds_per_byte"] == pytest.approx(LINK.seconds_per_byte, rel=0.05)
    assert "2(N − 1)/N with N = 2 hosts" in given["source"]
    assert given["source"].startswith(
        "probe.json: verdict.fits.horovod.pieces[0], alpha_seconds[0]"
    )

    def width(series: Any) -> float:
        return series["model"]["high"][-1] / series["model"]["low"][-1]

    assert width(one) < width(other)
    truth = 32 * 12 / float(MACHINE.seconds(Decomposition.of([12], [12], [32 * 12]))[0])
    assert one["model"]["ranks"][-1] == 12
    assert one["model"]["low"][-1] < truth < one["model"]["high"][-1]
    text = text_of(swapped)
    assert "The network between hosts is taken from probe 1 net." in text
    assert (
        "The network between hosts is given by probe 1 net (2 ranks on 2 hosts, n1 and n2)" in text
    )
    assert "The scaling model has its network from it" in text
    basis = {c["name"]: c["basis"] for c in one["model"]["coefficients"]}
    assert basis["between.seconds_per_byte"] in ("given", "partly", "measured")
    assert "assumed" not in basis["between.latency"]


def test_buckets_are_those_of_the_bench_s_configuration(tmp_path: Path) -> None:
    """α counts once for each bucket."""
    content = series() | {"gradient_bytes": 4 * 2**20}
    where = write_bench(tmp_path / "bench", content)
    net = write_probe(tmp_path / "net", probe((1, 1), alpha=6e-3))
    whole = summary_of(build_report([where, net]))["scaling"][0]["model"]["images_per_sec"]
    (where / "config.yaml").write_text("comm: {bucket_mb: 0.5, compression: fp16}\n")
    cut = summary_of(build_report([where, net]))["scaling"][0]["model"]["images_per_sec"]
    assert cut != whole


def test_hosts_of_runs_are_those_of_their_provenance(tmp_path: Path) -> None:
    for count in (1, 2, 4):
        run = Simulation(count, epochs=2).run(restart_at=None)
        for line in run.metrics:
            line |= {"ranks": count, "accumulation": 1, "micro_batch": 64 // count}
            line |= {"global_batch": 64, "images_per_sec": 1000.0 * count**0.9}
        where = run.write(tmp_path / "series" / f"nodes-{count}")
        hosts = [{"host": f"n{i}", "ranks": [i]} for i in range(count)]
        told = {"communication": {"ranks": count, "hosts": hosts}}
        (where / "provenance.json").write_text(json.dumps(told))
    write_probe(tmp_path / "series" / "net", probe((1, 1)))
    index = build_report([tmp_path / "series"])
    (one,) = summary_of(index)["scaling"]
    assert [point["nodes"] for point in one["points"]] == [1, 2, 4]
    assert [given["link"] for given in one["network"]] == ["between"]
    assert "3 runs and 1 probe" in text_of(index)


def test_a_submitted_probe_has_a_configuration_and_is_no_run(tmp_path: Path) -> None:
    where = write_probe(tmp_path / "net", probe())
    (where / "config.yaml").write_text("name: asked-for\n")
    summary = summary_of(build_report([where]))
    assert (summary["runs"], len(summary["probes"])) == ([], 1)
    (where / "metrics.jsonl").write_bytes(b'{"update": 1}\n')
    summary = summary_of(build_report([where]))
    assert (len(summary["runs"]), len(summary["probes"])) == (1, 1)


# ---------------------------------------------------------------- broken probes


def changed(**fields: Any) -> Any:
    return {**probe(), **fields}


BROKEN: dict[str, tuple[Any, str]] = {
    "empty": (b"", "probe.json cannot be read: JSONDecodeError; is it cut off?"),
    "cut off": (json.dumps(probe()).encode()[:900], "is it cut off?"),
    "binary": (b"\xff\xfe\x00", "probe.json cannot be read"),
    "deep": (b"[" * 100_000, "probe.json cannot be read"),
    "a list": ([1], "holds no probe: it is not a mapping"),
    "nothing in it": ({}, "probe.json has no timing that can be read"),
    "no ranks": (changed(ranks=None), "how many ranks there were is not recorded"),
    "no timings": (changed(timings=[]), "has no timing that can be read"),
    "some timings": (
        changed(timings=[{**probe()["timings"][0], "seconds": [1, -1]}, *probe()["timings"]]),
        "1 of 49 timings cannot be read and are left out; timings[0]: seconds must be a list",
    ),
    "twice": (changed(timings=[*probe()["timings"], probe()["timings"][0]]), "are there twice"),
    "huge": (
        changed(timings=[{"operation": "horovod", "bytes": 10**30, "seconds": [10**300] * 2}]),
        "1 of 1 timing cannot be read",
    ),
    "no hosts": (changed(provenance=None), "its hosts are not recorded"),
    "no verdict": (changed(), "has no verdict; what is said here was worked out again"),
    "broken verdict": (
        changed(verdict={"fits": {"horovod": {"pieces": [{}]}}, "sentences": []}),
        "has a verdict that is broken; what is said here",
    ),
    "hostile": (
        changed(left_out={"<script>alert(1)</script>": "\u202e<b>"}, verdict=None), "no verdict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_probe_gives_a_page_and_a_note(tmp_path: Path, harm: str, beside: bool) -> None:
    content, note = BROKEN[harm]
    (tmp_path / "net").mkdir()
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "net" / "probe.json").write_bytes(text)
    given = [tmp_path / "net"]
    given += [write_bench(tmp_path / "bench", series())] if beside else []
    index = build_report(given)
    assert note in text_of(index)
    assert "Missing or incomplete" in text_of(index)
    assert "<script" not in index.read_text(encoding="utf-8")


def test_without_a_verdict_the_same_is_said(tmp_path: Path) -> None:
    whole = loaded(tmp_path / "whole", probe((1, 1)))
    bare = loaded(tmp_path / "bare", probe((1, 1)), verdict=False)
    assert [line.alpha for line in bare.lines] == [line.alpha for line in whole.lines]
    assert bare.fitted == whole.fitted
    assert network_of([bare], WIRE).between == network_of([whole], WIRE).between
    assert "worked out from timings" in bare.lines[0].source


numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(
    numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)
timing = st.fixed_dictionaries(
    {
        "operation": st.sampled_from(["horovod", "horovod_fp16"]) | values,
        "bytes": st.integers(1, 2**30) | values,
        "seconds": st.lists(st.floats(1e-12, 1e9), min_size=2, max_size=4) | values,
    }
)
bounds = st.lists(st.floats(0, 1e100), min_size=3, max_size=3).map(sorted) | values
piece = st.fixed_dictionaries(
    {
        "smallest_bytes": st.integers(1, 100) | values,
        "largest_bytes": st.integers(100, 2**30) | values,
        "alpha_seconds": bounds,
        "beta_seconds_per_byte": bounds,
    }
)
verdicts = values | st.fixed_dictionaries(
    {
        "fits": values
        | st.fixed_dictionaries(
            {"horovod": st.fixed_dictionaries({"pieces": st.lists(piece, max_size=2)})}
        ),
        "sentences": st.lists(st.text(max_size=9), max_size=2) | values,
    }
)
hosts = st.lists(st.fixed_dictionaries({"host": values, "ranks": values}), max_size=3) | values


@given(
    ranks=st.integers(1, 4) | values,
    timings=st.lists(timing, max_size=6) | values,
    verdict=verdicts,
    hosts=hosts,
    left_out=values,
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_no_probe_whatever_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: Any, timings: Any, verdict: Any, hosts: Any, left_out: Any,
) -> None:  # fmt: skip
    home = tmp_path_factory.mktemp("any")
    content = {
        "ranks": ranks, "timings": timings, "verdict": verdict, "left_out": left_out,
        "provenance": {"communication": {"hosts": hosts}, "started": ranks, "launcher": left_out},
    }  # fmt: skip
    (home / "probe.json").write_text(json.dumps(content), encoding="utf-8")
    found = load_probe(home, 1)
    network_of([found], WIRE)
    index = build_report([home])
    assert summary_of(index)["probes"][0]["probe"] == 1
