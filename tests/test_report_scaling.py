"""Benches, series, causes and columns of the report, against known truths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import PHASES, Simulation, bench, summary_of, text_of, write_bench

from harness.errors import RunDirectoryError
from harness.jsonl import encode, parse_line
from harness.lenient import number
from harness.report import build_report, columns
from harness.report.columns import read_columns
from harness.report.goodput import goodputs_of, statistical_efficiency
from harness.report.runs import load_run
from harness.report.scaling import Point, series_of
from harness.report.sections import scaling_sentences
from harness.report.timing import timing_of_run
from harness.report.waiting import exchange_of


def point(ranks: int, rate: float, half: float | None = None, batch: int = 32) -> Point:
    return Point(
        ranks=ranks, nodes=1, micro_batch=batch, accumulation=1, global_batch=batch * ranks,
        images_per_sec=rate, low=None if half is None else rate - half,
        high=None if half is None else rate + half, confidence=0.95, repeats=(rate,),
        seconds={}, mfu=None, source="here",
    )  # fmt: skip


# ---------------------------------------------------------------- columns

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
groups = st.dictionaries(st.sampled_from(["data", "forward", "phase"]), scalars) | scalars
lines = st.lists(
    st.dictionaries(st.sampled_from(["update", "loss", "lr"]), scalars)
    | st.fixed_dictionaries({"update": scalars, "seconds": groups}),
    max_size=12,
)


@given(lines, st.integers(1, 5))
def test_columns_hold_what_each_line_says(
    tmp_path_factory: pytest.TempPathFactory, given: list[dict[str, Any]], parts: int
) -> None:
    path = tmp_path_factory.mktemp("columns") / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in given) + b'{"upd')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "LINES", 1)
        patch.setattr(columns, "_parts", lambda size: parts)
        patch.setattr(columns, "_start", _InProcess)
        patch.setattr(columns, "_collect", lambda helper: helper.columns)
        found = read_columns(path)
    assert (found.lines, found.broken) == (len(given), 1)
    for name in ("update", "loss", "lr"):
        expected = [number(line.get(name)) for line in given]
        assert [found.at(name, i) for i in range(len(given))] == expected
    for name in ("data", "forward"):
        inner = [line.get("seconds") for line in given]
        values = [number(entry.get(name)) if isinstance(entry, dict) else None for entry in inner]
        assert [found.at(f"seconds.{name}", i) for i in range(len(given))] == values


ODD = (
    b'{"update": 1, "loss": 2.5}\n',
    b'{"update": NaN, "loss": -Infinity}\n',
    b'{"update": ' + b"9" * 30 + b"}\n",
    b'{"update": ' + b"9" * 400 + b', "loss": 1}\n',
    b'{"update": ' + b"9" * 5000 + b"}\n",  # json refuses so many digits
    b'{"update": 1e400, "loss": true}\n',
    b'{"update": 2, "text": "\\ud800"}\n',
    b'{"update": 3, "text": "\xff"}\n',
    b'{"update": 4, "text": "\xed\xa0\x80"}\n',
    b'{"update": 5}\r\n',
    b'{"update": 6},{"update": 7}\n',
    b'{"update":\n8}\n',
    b"\n",
    b"[1]\n",
    b'{"update": 9, "upd\n',
)


@given(st.lists(st.sampled_from(ODD), max_size=8), st.booleans())
def test_a_line_is_what_json_takes_it_for(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cut: bool
) -> None:
    """Whatever orjson refuses or reads otherwise."""
    path = tmp_path_factory.mktemp("odd") / "metrics.jsonl"
    text = b"".join(lines) + (b'{"update": 10' if cut else b"")
    path.write_bytes(text)
    each = [line + b"\n" for line in text.split(b"\n")[:-1]] + [b"{"] * cut
    records = [record for line in each if (record := parse_line(line)) is not None]
    found = read_columns(path)
    assert (found.lines, found.broken) == (len(records), len(each) - len(records))
    for name in ("update", "loss"):
        told = [number(record.get(name)) for record in records]
        expected = [None if value is None else float(value) for value in told]
        assert [found.at(name, i) for i in range(len(records))] == expected


class _InProcess:
    """A part that is read here."""

    stdout = None

    def __init__(self, path: Path, begin: int, end: int) -> None:
        self.columns = columns._read(path, begin, end)

    def kill(self) -> None: ...
    def wait(self) -> None: ...


def test_other_processes_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    run = Simulation(epochs=4).run()
    for place, line in enumerate(run.metrics):
        line["rank_seconds"] = {"slowest_host": f"n{place % 7}", "slowest_rank": place % 7}
    path.write_bytes(b"".join(map(encode, run.metrics)))
    alone = read_columns(path)
    monkeypatch.setattr(columns, "_parts", lambda size: 3)
    shared = read_columns(path)
    assert shared.lines == alone.lines == len(run.metrics)
    assert shared.values.keys() == alone.values.keys()
    host = "rank_seconds.slowest_host"
    for name in alone.values.keys() - {host}:
        np.testing.assert_array_equal(shared[name], alone[name])
    for one in (alone, shared):
        assert [one.texts[int(v)] for v in one[host]] == [f"n{i % 7}" for i in range(one.lines)]


def test_a_helper_that_fails_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(encode({"update": i}) for i in range(50)))
    monkeypatch.setattr(columns, "_parts", lambda size: 2)
    monkeypatch.setattr(columns.sys, "executable", "/bin/false")
    assert read_columns(path)["update"].tolist() == list(range(50))


# ---------------------------------------------------------------- series


@given(st.dictionaries(st.integers(1, 512), st.floats(1, 1e6), min_size=2, max_size=8))
def test_speedup_and_efficiency_follow_their_definition(rates: dict[int, float]) -> None:
    (one,) = series_of("x", "t", [point(n, rate) for n, rate in rates.items()], "weak")
    first = min(rates)
    assert [s.point.ranks for s in one.scaled()] == sorted(rates)
    for scaled in one.scaled():
        n = scaled.point.ranks
        assert scaled.speedup == pytest.approx(rates[n] / rates[first])
        assert scaled.efficiency == pytest.approx(rates[n] / n / (rates[first] / first))
        assert scaled.efficiency_low is None


def test_ideal_scaling_has_no_knee_and_a_plateau_has_one() -> None:
    (ideal,) = series_of("x", "t", [point(n, 100.0 * n) for n in (1, 2, 4, 8)], "weak")
    assert ideal.knee() is None
    rates = {1: 100.0, 2: 190.0, 4: 300.0, 8: 320.0}
    (flat,) = series_of("x", "t", [point(n, rate) for n, rate in rates.items()], "weak")
    assert flat.knee() == 4


@pytest.mark.parametrize(
    ("rates", "half", "knee", "told"),
    [
        ({1: 100.0, 2: 190.0, 4: 300.0, 8: 320.0}, 5.0, 4, True),
        ({1: 100.0, 2: 190.0, 4: 300.0, 8: 320.0}, 20.0, 4, False),  # 300 − 190 may be under 100
        ({1: 100.0, 2: 110.0}, 20.0, 1, True),  # 10 of at least 50, ± 28
        ({1: 100.0, 2: 110.0}, 40.0, 1, False),
        ({1: 100.0, 2: 200.0, 4: 390.0}, 10.0, None, True),
        ({1: 100.0, 2: 200.0, 4: 310.0}, 10.0, None, False),
        ({1: 100.0, 2: 110.0, 4: 111.0}, None, 1, True),  # no intervals
    ],
)
def test_a_knee_within_the_scatter_is_not_told(
    rates: dict[int, float], half: float | None, knee: int | None, told: bool
) -> None:
    points = [point(n, rate, half) if half else point(n, rate) for n, rate in rates.items()]
    (one,) = series_of("x", "t", points, "weak")
    assert (one.knee(), one.knee_is_told()) == (knee, told)
    sentence = scaling_sentences(one, "", None)[1]
    assert ("differ too much to tell" in sentence) == (not told)


def test_the_interval_of_an_efficiency_is_that_of_a_quotient() -> None:
    """Against a simulation of the quotient of two independent means."""
    (one,) = series_of("x", "t", [point(1, 100.0, 2.0), point(4, 360.0, 9.0)], "weak")
    low, high = one.scaled()[1].efficiency_low, one.scaled()[1].efficiency_high
    draw = np.random.default_rng(0)
    ratios = draw.normal(360, 9 / 1.96, 200_000) / draw.normal(100, 2 / 1.96, 200_000) / 4
    expected = np.quantile(ratios, [0.025, 0.975])
    assert [low, high] == pytest.approx(expected.tolist(), rel=2e-3)


def test_a_grid_has_weak_and_strong_series() -> None:
    grid = [point(n, 90.0 * n, batch=b) for n in (1, 2) for b in (32, 64)]
    found = series_of("x", "t", grid, "grid")
    assert [(s.mode, s.fixed) for s in found] == [
        ("weak", "32 per rank"), ("weak", "64 per rank"), ("strong", "batch 64"),
    ]  # fmt: skip


@given(st.floats(1, 1e5), st.floats(1, 1e5))
def test_the_worth_of_a_sample_is_half_at_the_noise_scale_and_falls(b: float, n: float) -> None:
    assert statistical_efficiency(n, n) == 0.5
    assert 0 < statistical_efficiency(b, n) < 1
    assert statistical_efficiency(2 * b, n) < statistical_efficiency(b, n)


def test_goodput_has_its_knee_before_throughput_has() -> None:
    (ideal,) = series_of("x", "t", [point(n, 100.0 * n) for n in (1, 2, 4, 8, 16)], "weak")
    found = goodputs_of(ideal, noise=128.0)
    assert found is not None
    assert ideal.knee() is None
    assert found.knee == 2
    assert found.goodput == pytest.approx([100 * n / (1 + 32 * n / 128) for n in (1, 2, 4, 8, 16)])


# ---------------------------------------------------------------- pages


def test_a_bench_is_answered_drawn_and_traced(tmp_path: Path) -> None:
    content = bench()
    index = build_report([write_bench(tmp_path / "b", content)])
    assert index == tmp_path / "b" / "report" / "index.html"
    text, summary = text_of(index), summary_of(index)
    rates = [p["images_per_sec"] for p in content["points"]]
    assert f"8 ranks train {rates[-1] / rates[0]:.3g} times as fast as 1 rank" in text
    assert "Exposed communication takes" in text
    assert "Model not fitted" not in text
    (one,) = summary["scaling"]
    assert one["model"]["ranks"] == [1, 2, 4, 8, 16, 32]
    assert one["model"]["measured_up_to"] == 8
    assert "This is a prediction, not a measurement" in text
    assert [p["images_per_sec"] for p in one["points"]] == rates
    assert [p["source"] for p in one["points"]] == [f"bench.json: points[{i}]" for i in range(4)]
    assert one["points"][3]["efficiency"] == pytest.approx(rates[3] / rates[0] / 8)
    assert {"scaling.svg", "time.svg", "scaling.csv", "time.csv", "report.md"} <= {
        path.name for path in index.parent.iterdir()
    }


def test_runs_at_several_rank_counts_make_a_series(tmp_path: Path) -> None:
    for count in (1, 2, 4):
        for repeat in range(2):
            run = Simulation(10 * count + repeat, epochs=2).run(restart_at=None)
            for line in run.metrics:
                line |= {"ranks": count, "accumulation": 1, "micro_batch": 64 // count}
                line |= {"global_batch": 64, "images_per_sec": (1000.0 + repeat) * count**0.9}
            run.write(tmp_path / "series" / f"nodes-{count}-{repeat}")
    index = build_report([tmp_path / "series"])
    assert index == tmp_path / "series" / "report" / "index.html"
    (one,) = summary_of(index)["scaling"]
    assert one["mode"] == "strong"
    assert [p["ranks"] for p in one["points"]] == [1, 2, 4]
    assert [len(p["repeats"]) for p in one["points"]] == [2, 2, 2]
    last = one["points"][2]
    assert last["images_per_sec"] == pytest.approx(1000.5 * 4**0.9)
    # Student's interval of two values with one degree of freedom: 12.706 × s / √2.
    assert last["high"] - last["images_per_sec"] == pytest.approx(12.7062 * 0.5 * 4**0.9, rel=1e-4)
    assert last["efficiency"] == pytest.approx(4**-0.1)
    assert "6 runs compared" in text_of(index)


def test_a_noise_scale_of_another_task_is_not_used(tmp_path: Path) -> None:
    run = Simulation(epochs=2, measured=True).run(restart_at=None).write(tmp_path / "run")
    other = write_bench(tmp_path / "other", bench() | {"model": "resnet50"})
    same = write_bench(tmp_path / "same", bench())
    assert summary_of(build_report([other, run]))["scaling"][0]["goodput"] is None
    assert summary_of(build_report([same, run]))["scaling"][0]["goodput"]["noise_scale"] > 0


def planted(**seconds: float) -> Simulation:
    run = Simulation(epochs=4).run(restart_at=None)
    usual = {"data": 0.01, "forward": 0.3, "backward": 0.6, "comm_exposed": 0.03}
    for line in run.metrics:
        line["seconds"] = {**usual, "optimizer": 0.02, "other": 0.01, **seconds}
    return run


CAUSES = {
    "data": "Waiting for data takes",
    "comm_exposed": "Exposed communication takes",
    "optimizer": "Optimizer step takes",
}


@pytest.mark.parametrize("phase", [None, *CAUSES])
def test_a_planted_cause_is_named_and_no_other(tmp_path: Path, phase: str | None) -> None:
    run = planted(**({phase: 1.2} if phase else {}))
    causes = summary_of(build_report([run.write(tmp_path / "run")]))["causes"]
    for name, sentence in CAUSES.items():
        assert any(sentence in cause for cause in causes) == (name == phase)
    if phase:
        assert "more than anything else" in causes[0]


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_rank_is_named_and_a_usual_spread_is_not(tmp_path: Path, slow: bool) -> None:
    run = planted()
    for place, line in enumerate(run.metrics):
        rank = 3 if slow or place % 4 == 3 else place % 4
        line["rank_seconds"] = {
            "busy_max": 1.6 if slow else 1.02, "busy_median": 1.0, "slowest_rank": rank,
            "slowest_host": f"Node-{rank}", "phase": "forward",
        }  # fmt: skip
    index = build_report([run.write(tmp_path / "run")])
    named = [c for c in summary_of(index)["causes"] if "is slower than the others" in c]
    assert len(named) == slow
    if slow:
        assert named[0].startswith("Rank 3 on Node-3 is slower")
        assert "busy 1.6 times as long" in named[0]
        assert "most of it in forward" in named[0]


def test_a_rank_that_lot_would_name_is_not(tmp_path: Path) -> None:
    """Of two ranks one is always the slowest in half of the comparisons, and by a fifth or more on
    a machine that has other things to do."""
    run = planted()
    for place, line in enumerate(run.metrics):
        line["ranks"] = 2
        line["rank_seconds"] = {
            "busy_max": 1.3, "busy_median": 1.0, "slowest_rank": int(place % 5 < 2),
            "slowest_host": "n1", "phase": "forward", "ratio": 1.5,
        }  # fmt: skip
    assert findings_of(build_report([run.write(tmp_path / "run")])) == {}


def test_a_rank_with_more_to_do_is_not_slow(tmp_path: Path) -> None:
    run = planted()
    for line in run.metrics:
        line["rank_seconds"] = {
            "busy_max": 2.0, "busy_median": 1.5, "slowest_rank": 0, "slowest_host": "n1",
            "phase": "forward", "ratio": 1.0,
        }  # fmt: skip
    assert findings_of(build_report([run.write(tmp_path / "run")])) == {}


def findings_of(index: Path) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in summary_of(index)["runs"][0]["findings"]}


def exchanging(busy: list[float], sums: float, hosts: int = 2, **more: Any) -> Simulation:
    """A run of ranks that are busy for so long in each update, and then sum for so long."""
    run = Simulation(epochs=4).run(restart_at=None)
    middle = float(np.median(busy))
    for line in run.metrics:
        # Rank 0's, of `every` updates.
        seconds = {"forward": busy[0] / 3, "backward": busy[0] * 2 / 3}
        seconds["comm_exposed"] = max(busy) - busy[0] + sums
        line["seconds"] = {phase: seconds.get(phase, 0.0) * run.every for phase in PHASES}
        line |= {"ranks": len(busy), "accumulation": 1, "micro_batch": 32, "global_batch": 64}
        line["rank_seconds"] = {
            "busy_max": 10 * max(busy), "busy_median": 10 * middle,
            "slowest_rank": busy.index(max(busy)), "slowest_host": "n2", "phase": "forward",
            "ratio": max(busy) / min(busy), "updates": 10, "wait_least": sums, **more,
        }  # fmt: skip
    run.hosts = hosts
    return run


def test_a_slow_link_is_told_from_a_slow_rank(tmp_path: Path) -> None:
    run = exchanging([0.02, 0.02], sums=0.08)
    for place, line in enumerate(run.metrics):
        line["counters"] = {"cpu_percent": 97.0} if place % 3 == 0 else None
    index = build_report([run.write(tmp_path / "run")])
    found = findings_of(index)
    assert found.keys() == {"link"}
    text = found["link"]["text"]
    assert text.startswith("Exposed communication takes 80.00\xa0% of each update, more than any")
    assert "The sums over ranks take it, not a slow rank: 80 ms of each update" in text
    assert "training would be 5 times as fast at most" in text
    numbers = {one["name"]: one["value"] for one in summary_of(index)["runs"][0]["numbers"]}
    assert numbers["share_sums"] == pytest.approx(0.8)
    assert numbers["share_waiting_for_ranks"] == pytest.approx(0, abs=1e-9)
    # Of two ranks, each sends and receives the gradients once.
    assert numbers["bus_bytes_per_update"] == pytest.approx(246_824)
    assert numbers["bus_bandwidth_high"] == pytest.approx(246_824 * 8 / 0.08)
    assert numbers["bus_bandwidth_low"] == pytest.approx(246_824 * 8 / (0.08 + 0.02 * 2 / 3))
    assert "246.8 kB per update go at 21.16 Mbit/s to 24.68 Mbit/s between hosts" in text
    assert "The processors of rank 0's host were 97 % busy" in text


def test_ranks_of_one_host_have_no_link(tmp_path: Path) -> None:
    run = exchanging([0.02, 0.02], sums=0.08, hosts=1)
    found = findings_of(build_report([run.write(tmp_path / "run")]))
    assert found.keys() == {"sums"}
    assert "between ranks of one host" in found["sums"]["text"]
    assert "link" not in found["sums"]["text"]


@pytest.mark.parametrize("slow", [0, 1, 3])
def test_waiting_for_a_slow_rank_is_not_put_down_to_the_link(tmp_path: Path, slow: int) -> None:
    busy = [0.02] * 4
    busy[slow] = 0.2
    index = build_report([exchanging(busy, sums=0.01).write(tmp_path / "run")])
    found = findings_of(index)
    assert found.keys() == {"straggler"}
    assert "the median rank spends 85.71" in found["straggler"]["text"]
    assert "comm.compression" not in " ".join(summary_of(index)["causes"])


def test_a_slow_rank_and_a_slow_link_are_both_named(tmp_path: Path) -> None:
    run = exchanging([0.02, 0.1, 0.02], sums=0.08)
    found = findings_of(build_report([run.write(tmp_path / "run")]))
    assert list(found) == ["straggler", "link"]
    assert "not a slow rank" not in found["link"]["text"]


def test_ranks_that_hold_each_other_up_by_turns_are_no_slow_link(tmp_path: Path) -> None:
    """As where they share cores: each waits for the other, over ten updates they are alike."""
    run = exchanging([0.05, 0.05], sums=0.005)
    for line in run.metrics:
        line["seconds"]["comm_exposed"] += 0.045 * run.every
    found = findings_of(build_report([run.write(tmp_path / "run")]))
    assert found.keys() == {"uneven"}
    assert found["uneven"]["text"].startswith("Waiting for ranks that come later takes 45.00\xa0%")
    assert "Cores that ranks share" in found["uneven"]["text"]
    assert found["uneven"]["share"] == pytest.approx(0.45)


def test_few_comparisons_tell_no_slow_rank_from_chance(tmp_path: Path) -> None:
    run = exchanging([0.02, 0.1], sums=0.001)
    for line in run.metrics[4:]:
        del line["rank_seconds"]
    found = findings_of(build_report([run.write(tmp_path / "run")]))
    assert found.keys() == {"uneven"}
    assert "So may rank 1 on n2: 4 comparisons are too few" in found["uneven"]["text"]


def test_micro_batches_that_do_not_divide_evenly_are_named(tmp_path: Path) -> None:
    run = exchanging([0.1, 0.05], sums=0.001, ratio=0.95)
    for line in run.metrics:
        line["global_batch"] = 96
    found = findings_of(build_report([run.write(tmp_path / "run")]))
    assert found.keys() == {"uneven"}
    assert "3 micro-batches do not divide evenly among 2 ranks" in found["uneven"]["text"]


@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=6), st.floats(0, 1.0), st.booleans())
def test_parts_of_an_update_are_never_more_than_it(
    tmp_path_factory: pytest.TempPathFactory, busy: list[float], sums: float, least: bool
) -> None:
    run = exchanging(busy, sums=sums, **({} if least else {"wait_least": 9.0}))
    loaded = load_run(run.write(tmp_path_factory.mktemp("runs") / "run"), 1)
    timing = timing_of_run(loaded)
    assert timing is not None
    exchange = exchange_of(loaded, timing.seconds)
    if exchange is None:
        assert timing.share("comm_exposed") == 0
        return
    assert 0 <= exchange.waiting_share <= 1
    assert 0 <= exchange.sums_share <= timing.share("comm_exposed")
    for low, high in filter(None, [exchange.bandwidth]):
        assert 0 < low <= high


def test_a_straggler_event_is_enough(tmp_path: Path) -> None:
    run = planted()
    run.tell("straggler", rank=2, host="n5", phase="backward", ratio=1.4, updates=30)
    causes = summary_of(build_report([run.write(tmp_path / "run")]))["causes"]
    assert causes[0].startswith("Rank 2 on n5 is slower than the others")


def test_a_fault_has_its_time_to_training_and_its_cost(tmp_path: Path) -> None:
    summary = summary_of(build_report([Simulation().run().write(tmp_path / "run")]))
    (fault,) = summary["runs"][0]["faults"]
    assert (fault["rank"], fault["host"], fault["updates_repeated"]) == (1, "n2", 7)
    assert fault["seconds_to_training"] == pytest.approx(12)


# ---------------------------------------------------------------- broken benches


def without(content: Any, *keys: str) -> Any:
    return {key: value for key, value in content.items() if key not in keys}


BROKEN: dict[str, tuple[Any, str]] = {
    "partial": (bench() | {"status": "partial"}, "the bench is not complete"),
    "no points": (bench() | {"points": []}, "no point with a throughput"),
    "one rank count": (bench(ranks=(2,)), "measured one number of ranks"),
    "no repeats": (bench(repeats=1), "without repeats, so without interval"),
    "nulls": (
        bench() | {"points": [dict.fromkeys(bench()["points"][0]), *bench()["points"][1:]]},
        "1 point without ranks and throughput",
    ),
    "other types": (without(bench(), "mode", "format") | {"points": [1, "x", None]}, "format"),
    "hostile": (bench() | {"name": "<script>alert(1)</script>"}, "script"),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_bench_gives_a_page_and_a_note(tmp_path: Path, harm: str) -> None:
    content, note = BROKEN[harm]
    index = build_report([write_bench(tmp_path / "b", content)])
    assert note in text_of(index)
    assert "<script" not in index.read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"points": [', b"\xff\xfe"])
def test_what_is_no_bench_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bench.json").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"bench\.json"):
        build_report([tmp_path])


def test_markdown_says_the_same_and_escapes(tmp_path: Path) -> None:
    run = Simulation(epochs=3, name="a|b *c* <d>").run(restart_at=None)
    index = build_report([run.write(tmp_path / "run")])
    told = (index.parent / "report.md").read_text(encoding="utf-8")
    assert "a\\|b \\*c\\* \\<d\\>" in told
    assert "test accuracy of" in told
    assert "](training.svg)" in told
    assert PHASES[0] in (index.parent / "time.csv").read_text(encoding="utf-8")


def test_a_bench_with_values_that_cannot_be_makes_a_page(tmp_path: Path) -> None:
    content = bench()
    content["points"][1]["repeats"][0]["images_per_sec"] = 0
    content["points"][2]["images_per_sec_low"] = 2 * content["points"][2]["images_per_sec"]
    content["points"][3]["images_per_sec_high"] = 1.0
    index = build_report([write_bench(tmp_path / "bench", content)])
    assert "scaling" in text_of(index)


def test_one_rank_is_not_told_of_a_faster_link(tmp_path: Path) -> None:
    content = bench(ranks=(1,))
    content["points"][0]["seconds"] = {"forward": 0.05, "backward": 0.05, "comm_exposed": 0.05}
    text = text_of(build_report([write_bench(tmp_path / "bench", content)]))
    assert "With one rank nothing travels" in text
    assert "faster link" not in text
