"""The report: its numbers against independent ones, its page as a browser and a parser see it."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import subprocess
import sys
from datetime import datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import PHASES, SIZE, Simulation

from harness.errors import RunDirectoryError, UsageError
from harness.jsonl import encode
from harness.lenient import number
from harness.records import PHASES as ALL_PHASES
from harness.report import build_report
from harness.report.curves import extremes, log_fit, log_spaced, means, points, steps
from harness.report.fields import clean, duration, general, scrub
from harness.report.summary import quantile_of, updates_at_batch

FIGURES = (
    *("scaling", "time", "training"),  # the first: of runs that had two rank counts at equal cuts
    *("accuracy", "loss", "global-batch", "updates", "learning-rate", "images-per-second"),
)
MEASURED = ("goodput", "noise-scale", "distance-from-init")  # only of runs that have measured them
SVG_TEXT = re.compile(r"<text[^>]*>([^<]*)</text>")
HOSTILE = (
    "<script>alert(1)</script> \"quoted\" 'single' & $\\frac{x}{0}$ $ \n\r\t\x00\x1b[31m "
    "\u202egnp.exe \ud800 --> ]]> {{ 7*7 }} {% raw %} 訓練 =cmd|'/c calc'!A1"
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return Simulation().run().write(tmp_path / "runs" / "adabatch-digits")


# ---------------------------------------------------------------- readers


class Page(HTMLParser):
    """What a browser would load from a page, what it would show, and whether tags match."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.svgs: list[dict[str, str | None]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handle_startendtag(tag, attrs, count=False)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(
        self, tag: str, attrs: list[tuple[str, str | None]], count: bool = True
    ) -> None:
        if count:
            self.tags.append(tag)
        given = dict(attrs)
        assert not any(name.startswith("on") for name in given), f"handler on <{tag}>"
        self.references += [
            given[name] or "" for name in ("src", "href", "xlink:href", "data") if name in given
        ]
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "svg" and given.get("aria-hidden") != "true":
            self.svgs.append(given)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"stray </{tag}>"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read_page(index: Path) -> Page:
    """Parse a page and hold it to what every page must be."""
    html = index.read_text(encoding="utf-8")
    page = Page(html)
    assert {"script", "link", "iframe", "object", "embed", "img"}.isdisjoint(page.tags)
    beside = {path.name for path in index.parent.iterdir()}
    assert all(
        ref.startswith(("#", "data:text/csv")) or ref in beside for ref in page.references
    ), page.references
    assert not [name for name in page.ids if page.ids.count(name) > 1]
    fragments = {ref[1:] for ref in page.references if ref.startswith("#")}
    assert fragments <= set(page.ids)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    for svg in page.svgs:
        assert svg["role"] == "img"
        assert svg["aria-label"]
    for path in index.parent.glob("*.svg"):
        read_xml(path)
    return page


def read_xml(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_bytes())  # noqa: S314 - written by this test's run


def read_summary(index: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((index.parent / "summary.json").read_text())
    return summary


def numbers_of(index: Path, run: int = 0) -> dict[str, float | None]:
    return {n["name"]: n["value"] for n in read_summary(index)["runs"][run]["numbers"]}


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


# ---------------------------------------------------------------- numbers


def count_updates(batch: int, samples: int, size: int) -> int:
    """One update after the other; the last of an epoch takes what the epoch has left."""
    seen = updates = 0
    while seen < samples:
        seen += min(batch, size - seen % size) if batch <= size else batch
        updates += 1
    return updates


@given(st.integers(1, 300), st.integers(0, 2000), st.integers(1, 400))
def test_updates_at_a_batch_are_those_of_a_loop(batch: int, samples: int, size: int) -> None:
    assert updates_at_batch(batch, samples, size, "short") == count_updates(batch, samples, size)
    assert updates_at_batch(batch, samples, size, "carry") == -(-samples // batch)
    assert updates_at_batch(batch, samples, None, "short") is None


@pytest.mark.smoke
def test_every_number_equals_an_independent_computation(tmp_path: Path) -> None:
    run = Simulation().run()
    index = build_report([run.write(tmp_path / "run")])
    evaluations = [e for e in run.events if e["kind"] == "evaluation"]
    best = max(evaluations, key=lambda e: e["accuracy"])
    resumed_at = next(e["update"] for e in run.events if e["kind"] == "resume")
    warm = {run.metrics[0]["update"], resumed_at + run.every}
    timed = [m for m in run.metrics if m["update"] not in warm]
    sizes = [run.every * m["global_batch"] for m in timed]
    rates = np.array([m["images_per_sec"] for m in timed])
    moments = [datetime.fromisoformat(e["time"]) for e in run.events]
    ends = [e["kind"] in ("fault", "resume") for e in run.events]
    died, back = (moment for moment, end in zip(moments, ends, strict=True) if end)
    pause = (back - died).total_seconds()
    assert pause >= 12
    expected = {
        "samples_seen": run.samples,
        "samples_planned": SIZE * 30,
        "dataset_size": SIZE,
        "epochs": run.samples / SIZE,
        "updates": run.update,
        "initial_batch": 64,
        "largest_batch": 1024,
        "updates_at_initial_batch": count_updates(64, run.samples, SIZE),
        "updates_share_of_initial_batch": run.update / count_updates(64, run.samples, SIZE),
        "final_training_loss": run.metrics[-1]["loss"],
        "evaluations": len(evaluations),
        "final_test_accuracy": evaluations[-1]["accuracy"],
        "final_test_accuracy_top5": evaluations[-1]["accuracy_top5"],
        "final_test_loss": evaluations[-1]["loss"],
        "final_test_samples_seen": evaluations[-1]["samples_seen"],
        "best_test_accuracy": best["accuracy"],
        "best_test_accuracy_top5": best["accuracy_top5"],
        "best_test_loss": best["loss"],
        "best_test_samples_seen": best["samples_seen"],
        "images_per_sec_median": float(np.median(rates)),
        "images_per_sec_p10": float(np.percentile(rates, 10)),
        "images_per_sec_p90": float(np.percentile(rates, 90)),
        "images_per_sec_overall": sum(sizes) / sum(np.array(sizes) / rates),
        "windows_counted": len(timed),
        "windows_left_out": 2,
        "ranks_first": 1,
        "ranks_last": 2,
        "ranks_largest": 2,
        "wall_seconds": (moments[-1] - moments[0]).total_seconds(),
        "seconds_of_last_attempt": 21.5,
        "attempts": 2,
        "restarts": 1,
        "continuations": 0,
        "updates_repeated": 7,
        "samples_repeated": 448,
        "seconds_to_resume": pause,
        "seconds_to_resume_largest": pause,
        "stages_begun": 6,
        "updates_skipped": 1,
        "images_left_out": 1,
        "test_images_left_out": 1,
        "checkpoints_written": sum(e["kind"] == "checkpoint" for e in run.events),
        "checkpoints_rejected": 1,
    }
    sums = {p: sum(m["seconds"][p] for m in timed) / (run.every * len(timed)) for p in PHASES}
    sent = float(sum(m["comm_bytes"] for m in run.metrics))
    expected |= {f"seconds_per_update_{phase}": seconds for phase, seconds in sums.items()}
    expected |= {"seconds_per_update": sum(sums.values())}
    expected |= {f"share_{phase}": s / sum(sums.values()) for phase, s in sums.items()}
    expected |= {"comm_bytes": sent, "comm_bytes_per_update": sent / run.update}
    found = numbers_of(index)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(n["unit"] and n["source"] for n in read_summary(index)["runs"][0]["numbers"])


def test_a_metric_of_the_user_is_told(tmp_path: Path) -> None:
    run = Simulation().run()
    for at, event in enumerate(one for one in run.events if one["kind"] == "evaluation"):
        event["metric"] = 0.5 + at / 100
    index = build_report([run.write(tmp_path / "run")])
    numbers = numbers_of(index)
    values = [one["metric"] for one in run.events if one["kind"] == "evaluation"]
    assert numbers["final_test_metric"] == values[-1]
    assert numbers["best_test_metric"] in values
    assert f"train.metric in the end {values[-1]:.3g}" in index.read_text(encoding="utf-8")


def test_the_stage_table_says_what_was_measured(tmp_path: Path) -> None:
    run = Simulation().run()
    index = build_report([run.write(tmp_path / "run")])
    stages = read_summary(index)["runs"][0]["stages"]
    assert [s["stage"] for s in stages] == list(range(6))
    for stage in stages:
        windows = [m for m in run.metrics if m["stage"] == stage["stage"]]
        assert stage["global_batch"] == run.batch(stage["stage"])
        assert stage["ranks"] * stage["accumulation"] * stage["micro_batch"] == run.batch(
            stage["stage"]
        )
        assert stage["updates_done"] == len(windows) * run.every
        assert (stage["lr_first"], stage["lr_last"]) == (windows[0]["lr"], windows[-1]["lr"])
    assert sum(s["updates_done"] for s in stages) == run.update
    for before, after in pairwise(stages):
        assert before["end_epoch"] == after["start_epoch"]


def test_stages_that_were_not_reached_are_shown_as_planned(tmp_path: Path) -> None:
    run = Simulation(epochs=12).run(finish=False)
    run.epochs = 30
    page = read_page(build_report([run.write(tmp_path / "run")]))
    assert page.text.count("not reached") == 3
    assert "the run has no end line at" in page.text


def test_the_answer_stands_first_and_in_sentences(run_dir: Path) -> None:
    index = build_report([run_dir])
    assert index == run_dir / "report" / "index.html"
    page, numbers = read_page(index), numbers_of(index)
    answer = page.text[: page.text.index("Curves over samples seen")]
    for part in (
        "lenet5 on digits",
        f"test accuracy of {100 * (numbers['final_test_accuracy'] or 0):.2f}",
        f"It took {numbers['updates']:,.0f} updates",
        f"would have needed {numbers['updates_at_initial_batch']:,.0f}",
        "10th to 90th percentile",
        "left out as warm-up",
        "on 1 to 2 ranks, with 1 restart; the ranks trained again after",
        "7 updates had to be repeated",
        "1 training image and 1 test image could not be read and were left out.",
    ):
        assert part in answer
    assert "Failed: rank 1 on n2 was killed by signal 9 (SIGKILL)" in page.text
    assert page.tags.index("p") < page.tags.index("svg")
    assert len(page.svgs) == len(FIGURES)
    for fault in ("digest does not match", "gradient overflow in fp16", "geometric: ×2 every 5ep"):
        assert fault in page.text
    assert "EPYC 9354" in page.text


def test_a_requested_stop_is_no_restart(tmp_path: Path) -> None:
    run = Simulation(epochs=4)
    run.tell("start", attempt=1, ranks=1, samples_seen=0)
    run.tell("stop", reason="2 ranks wanted", samples_seen=0)
    run.run(restart_at=None)
    run.tell("start", attempt=3, ranks=1, samples_seen=0)
    numbers = numbers_of(build_report([run.write(tmp_path / "run")]))
    assert (numbers["attempts"], numbers["restarts"], numbers["continuations"]) == (3, 0, 2)


def test_wall_time_is_unknown_when_the_clock_went_back(tmp_path: Path) -> None:
    run = Simulation(epochs=2).run(restart_at=None)
    run.events[-1]["time"] = "2020-01-01T00:00:00"
    index = build_report([run.write(tmp_path / "run")])
    assert numbers_of(index)["wall_seconds"] is None
    assert "the wall time is not known" in read_page(index).text


# ---------------------------------------------------------------- files


def test_csv_files_hold_the_records_exactly(tmp_path: Path) -> None:
    run = Simulation().run()
    run.metrics[3]["loss"] = None
    index = build_report([run.write(tmp_path / "run")])
    rows = read_csv(index.parent / "metrics.csv")
    assert len(rows) == len(run.metrics)
    for row, record in zip(rows, run.metrics, strict=True):
        seconds = record.pop("seconds")
        flat = {**record, **{f"seconds_{phase}": seconds.get(phase) for phase in ALL_PHASES}}
        assert row.pop("run") == "1"
        assert {k: float(v) if v else None for k, v in row.items()} == flat
    evaluations = read_csv(index.parent / "evaluations.csv")
    expected = [e for e in run.events if e["kind"] == "evaluation"]
    assert [float(row["accuracy"]) for row in evaluations] == [e["accuracy"] for e in expected]
    stages = read_csv(index.parent / "stages.csv")
    summary = read_summary(index)["runs"][0]["stages"]
    assert [float(row["lr_last"]) for row in stages] == [s["lr_last"] for s in summary]
    assert [row["reason"] for row in stages] == [s["reason"] for s in summary]


@pytest.mark.smoke
def test_two_builds_give_equal_bytes(run_dir: Path, tmp_path: Path) -> None:
    first, second = (build_report([run_dir], tmp_path / name).parent for name in "ab")
    names = {path.name for path in first.iterdir()}
    assert names == {
        *(f"{figure}.{kind}" for figure in FIGURES for kind in ("svg", "csv")),
        *(
            "report.md",
            "index.html",
            "summary.json",
            "metrics.csv",
            "evaluations.csv",
            "stages.csv",
        ),
    }
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_user_settings_of_matplotlib_change_nothing(run_dir: Path, tmp_path: Path) -> None:
    import matplotlib as mpl

    plain = build_report([run_dir], tmp_path / "a").read_bytes()
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert build_report([run_dir], tmp_path / "b").read_bytes() == plain
        assert mpl.rcParams["font.size"] == 30


def test_figures_hold_text_theme_and_no_clock(run_dir: Path) -> None:
    index = build_report([run_dir])
    html = index.read_text(encoding="utf-8")
    drawn = html[html.index("<figure") : html.rindex("</figure>")]
    assert "var(--ink)" in drawn
    assert "var(--series-0)" in drawn
    assert "Samples seen</text>" in drawn
    for figure in FIGURES:
        svg = (index.parent / f"{figure}.svg").read_text(encoding="utf-8")
        assert "var(" not in svg
        assert "#0a0b" not in svg + drawn
        assert "#010203" not in svg + drawn
        assert "<metadata" not in svg + drawn
        assert "matplotlib.org" not in svg


def test_a_figure_of_an_earlier_build_does_not_stay(run_dir: Path) -> None:
    index = build_report([run_dir])
    assert (index.parent / "accuracy.svg").exists()
    (run_dir / "events.jsonl").unlink()
    build_report([run_dir])
    assert not (index.parent / "accuracy.svg").exists()
    assert (index.parent / "loss.svg").exists()


def test_importing_the_report_loads_nothing_heavy() -> None:
    code = (
        "import sys, harness.report; "
        "print(sorted({'matplotlib', 'jinja2', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- hostile and broken input


def test_hostile_text_neither_breaks_nor_injects(tmp_path: Path) -> None:
    dirs = []
    for place in range(2):
        run = Simulation(place, epochs=12, name=HOSTILE, reason=HOSTILE).run()
        run.tell(HOSTILE, note=HOSTILE, **{HOSTILE: [HOSTILE]})
        run.tell("stop", reason="</td></table></svg><svg onload=alert(1)>")
        path = run.write(tmp_path / f"run {place} <b>&amp;$x$")
        (path / "provenance.json").write_text(json.dumps({HOSTILE: {"host": HOSTILE}}))
        dirs.append(path)
    for chosen in (dirs[:1], dirs):
        index = build_report(chosen, tmp_path / f"out{len(chosen)}")
        page = read_page(index)
        assert "<script>alert(1)</script>" in page.text
        assert "{{ 7*7 }}" in page.text
        assert "\u202e" not in page.text
        assert "</td></table></svg>" in page.text
        reasons = [row["reason"] for row in read_csv(index.parent / "stages.csv")]
        assert not any(reason.startswith("=") for reason in reasons)
    title = "".join(read_xml(index.parent / "loss.svg").itertext())
    assert "<script>" in title


def test_a_formula_in_a_csv_is_text(tmp_path: Path) -> None:
    run = Simulation(epochs=6, reason="=1+1").run(restart_at=None)
    index = build_report([run.write(tmp_path / "run")])
    assert {row["reason"] for row in read_csv(index.parent / "stages.csv")} == {
        "initial batch",
        "'=1+1",
    }


def truncate_line(run: Path) -> str:
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content[:-40])
    return "lines are broken and left out"


def only_config(run: Path) -> str:
    for name in ("plan.json", "provenance.json", "metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
    return "no training window has been recorded yet"


def only_metrics(run: Path) -> str:
    for name in ("plan.json", "provenance.json", "config.yaml", "events.jsonl"):
        (run / name).unlink()
    return "no evaluation has been recorded yet"


def null_everything(run: Path) -> str:
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        nulled = [{k: v if k == "kind" else None for k, v in line.items()} for line in lines]
        (run / name).write_bytes(b"".join(map(encode, nulled)))
    return "loss is null or not a number in every line"


def some_nulls(run: Path) -> str:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:5]:
        line["images_per_sec"] = None
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode, lines)))
    return f"images_per_sec is null or not a number in 5 of {len(lines)} lines"


def wrong_types(run: Path) -> str:
    bad = {
        "update": "x",
        "samples_seen": True,
        "loss": [1],
        "stage": {},
        "lr": 10**400,
        "ranks": "",
    }
    worse: dict[str, Any] = {"kind": ["stage"], "time": 5, "stage": "one", "accuracy": "high"}
    lines = [encode(bad), encode(worse), encode({}), b'{"loss": NaN, "seconds": 7}\n', b"[1]\n"]
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).write_bytes(b"".join(lines))
    (run / "plan.json").write_text('{"stages": [1, {"stage": null}, {}], "totals": []}')
    (run / "config.yaml").write_text("batch: 7\ndata: [1]\nname: {a: 1}\n&a x: [*a, .inf]\n")
    return "samples_seen is null or not a number in every line"


def empty_files(run: Path) -> str:
    for name in ("config.yaml", "plan.json", "provenance.json", "metrics.jsonl", "events.jsonl"):
        (run / name).write_bytes(b"")
    return "plan.json cannot be read"


def binary_files(run: Path) -> str:
    for name in ("config.yaml", "plan.json", "provenance.json", "metrics.jsonl", "events.jsonl"):
        (run / name).write_bytes(bytes(range(256)) * 3)
    return "config.yaml cannot be read"


def yaml_loop(run: Path) -> str:
    (run / "config.yaml").write_text("name: loop\nme: &a\n  again: *a\n  list: [*a, {x: *a}]\n")
    return "config.yaml cannot be read"


def unfinished(run: Path) -> str:
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:-1]))
    return "the run has no end line"


def overflowing_values(run: Path) -> str:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:4]:
        line |= {"global_batch": -5, "loss": 1e99, "images_per_sec": 1e-300, "lr": -1e99}
    lines[5] |= {"loss": 1e308, "global_batch": 0, "images_per_sec": 0}
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode, lines)))
    return f"loss is null or not a number in 1 of {len(lines)} lines"


@pytest.mark.parametrize(
    "harm",
    [
        truncate_line, only_config, only_metrics, null_everything, some_nulls, wrong_types,
        empty_files, binary_files, yaml_loop, unfinished, overflowing_values,
    ],
)  # fmt: skip
def test_broken_records_give_a_page_and_a_note(run_dir: Path, tmp_path: Path, harm: Any) -> None:
    note = harm(run_dir)
    index = build_report([run_dir])
    assert note in read_page(index).text
    assert "null" not in (index.parent / "metrics.csv").read_text()
    healthy = Simulation(1, epochs=4).run().write(tmp_path / "healthy")
    both = read_page(build_report([run_dir, healthy], tmp_path / "both"))
    assert note in both.text


def test_what_is_unknown_is_null_and_never_zero(run_dir: Path) -> None:
    only_config(run_dir)
    numbers = numbers_of(build_report([run_dir]))
    assert {name for name, value in numbers.items() if value is not None} == {"initial_batch"}


def test_a_run_without_evaluations_says_so(tmp_path: Path) -> None:
    run = Simulation(epochs=3).run(restart_at=None)
    run.events = [e for e in run.events if e["kind"] != "evaluation"]
    page = read_page(build_report([run.write(tmp_path / "run")]))
    assert "no test accuracy has been recorded" in page.text
    assert "No evaluation has been recorded." in page.text
    assert len(page.svgs) == len(FIGURES) - 2  # neither accuracy nor two rank counts


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["stage", "evaluation", "start", "resume", "stop", "end", "skipped_update"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = (
    *("update", "samples_seen", "epoch", "stage", "ranks", "global_batch", "lr", "loss"),
    *("images_per_sec", "seconds", "kind", "time", "reason", "accuracy", "attempt", "file"),
    *("noise_scale", "distance_from_init"),
)
records = st.lists(st.dictionaries(st.sampled_from(FIELDS), json_values), max_size=6)
plausible = st.none() | st.integers(-5, 10**9) | st.floats(allow_nan=False) | st.just(5e-324)
measured_lines = st.lists(
    st.fixed_dictionaries(
        dict.fromkeys(("update", "epoch", "noise_scale", "distance_from_init"), plausible)
    ),
    max_size=6,
)
layer_entries = st.fixed_dictionaries(
    {"layer": st.text(max_size=5) | json_values},
    optional=dict.fromkeys(("weight_norm", "grad_norm", "trust_ratio"), plausible | json_values),
)
layer_lines = st.lists(
    st.fixed_dictionaries(
        {"layers": st.lists(layer_entries | json_values, max_size=4) | json_values},
        optional=dict.fromkeys(("update", "samples_seen", "epoch"), json_values),
    )
    | st.dictionaries(st.sampled_from(["layers", "update"]), json_values),
    max_size=4,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    metrics=records | measured_lines,
    events=records,
    plan=json_values,
    config=json_values,
    layers=layer_lines,
)
def test_no_record_whatever_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory,
    metrics: Any,
    events: Any,
    plan: Any,
    config: Any,
    layers: Any,
) -> None:
    run = tmp_path_factory.mktemp("any")
    (run / "layers.jsonl").write_bytes(b"".join(map(encode, layers)))
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode, metrics)))
    (run / "events.jsonl").write_bytes(b"".join(map(encode, events)))
    (run / "plan.json").write_text(json.dumps({"stages": plan, "totals": plan}))
    paper = {"source": config, "place": plan, "printed": metrics}
    (run / "config.yaml").write_text(json.dumps({"name": config, "batch": config, "paper": paper}))
    read_page(build_report([run]))


def test_what_the_paper_prints_stands_beside_what_was_measured(tmp_path: Path) -> None:
    run = Simulation().run().write(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["paper"] = {
        "source": "Some, One <2020>",
        "place": "Table 2, row 3",
        "note": "On other data.",
        "printed": [
            {"metric": "accuracy", "value": 0.73},
            {"metric": "error_difference", "below": 0.02, "note": "against fixed 128"},
            {"metric": "curve"},
        ],
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    index = build_report([run])
    text = read_page(index).text
    assert "Some, One <2020>; Table 2, row 3. On other data." in text
    accuracy = numbers_of(index)["final_test_accuracy"]
    assert accuracy is not None
    section = text.split("In the paper")[2].split("Curves over samples seen")[0].split()
    at = section.index("accuracy")
    assert section[at : at + 3] == ["accuracy", "0.73", general(accuracy)]
    assert "error_difference below 0.02 – against fixed 128 curve – –" in " ".join(section)


def test_growth_by_measurement_shows_decisions_and_no_planned_stages(tmp_path: Path) -> None:
    simulation = Simulation(epochs=10).run(restart_at=None)
    run = simulation.write(tmp_path / "run")
    plan = simulation.plan()
    plan["stages"] = plan["stages"][:1]
    (run / "plan.json").write_text(json.dumps({**plan, "fastest": simulation.plan()}))
    with (run / "events.jsonl").open("ab") as events:
        events.write(
            encode({"kind": "decision", "update": 3, "global_batch": 1128, "reason": "loss: why"})
        )
    text = read_page(build_report([run])).text
    assert "Growth decision, global batch 1,128: loss: why" in text
    rows = read_csv(run / "report" / "stages.csv")
    assert {row["updates_planned"] for row in rows} == {""}


def test_what_is_no_run_is_refused(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run directory was given"):
        build_report([])
    with pytest.raises(RunDirectoryError, match="is not a directory"):
        build_report([tmp_path / "nothing"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot be written to"):
        build_report([run_dir], tmp_path / "file")


# ---------------------------------------------------------------- several runs


def test_several_runs_share_the_figures_and_have_a_row_each(tmp_path: Path) -> None:
    growing = Simulation(0, name="growing").run()
    fixed = Simulation(1, factor=1, name="fixed").run(restart_at=None)
    dirs = [growing.write(tmp_path / "a"), fixed.write(tmp_path / "b")]
    index = build_report([*dirs, dirs[0]], tmp_path / "both")
    page = read_page(index)
    assert "2 runs are compared." in page.text
    assert f"The fewest updates are {growing.update:,}, of run 1 (growing)." in page.text
    assert len(page.svgs) == len(FIGURES)
    labels = [str(svg["aria-label"]) for svg in page.svgs]
    assert [label for label in labels if "1 growing" not in label] == labels[:1]
    assert "Throughput and efficiency against ranks" in labels[0]
    assert [r["name"] for r in read_summary(index)["runs"]] == ["growing", "fixed"]
    for place, path in enumerate(dirs):
        alone = numbers_of(build_report([path], tmp_path / f"alone{place}"))
        assert numbers_of(index, place) == alone
    runs = {row["run"] for row in read_csv(index.parent / "metrics.csv")}
    assert runs == {"1", "2"}


def test_runs_of_different_tasks_are_not_compared_silently(tmp_path: Path) -> None:
    dirs = [Simulation(i, epochs=2 + i).run(None).write(tmp_path / str(i)) for i in range(2)]
    config = Simulation().config() | {"data": {"dataset": "mnist"}}
    (dirs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    text = read_page(build_report(dirs, tmp_path / "out")).text
    assert "of different tasks" in text
    assert "different numbers of samples" in text


def test_many_runs_stay_small(tmp_path: Path) -> None:
    dirs = [Simulation(i, epochs=10, every=1).run().write(tmp_path / str(i)) for i in range(20)]
    index = build_report(dirs, tmp_path / "out")
    page = read_page(index)
    assert index.stat().st_size < 5e6
    assert page.text.count("Lines as in the table of runs.") == len(FIGURES) - 2


# ---------------------------------------------------------------- gradients and weights


@pytest.fixture
def measured(tmp_path: Path) -> Simulation:
    return Simulation(measured=True, epochs=12).run()


def test_a_run_without_measurements_has_no_such_section(run_dir: Path) -> None:
    index = build_report([run_dir])
    page = read_page(index)
    assert "Gradients and weights" not in page.text
    assert not {"layers.csv", *(f"{name}.svg" for name in MEASURED)} & {
        path.name for path in index.parent.iterdir()
    }
    assert "layers" not in read_summary(index)["runs"][0]
    assert not [n for n in numbers_of(index) if n.startswith(("noise", "distance", "layer"))]


def test_measurements_have_a_section_and_what_is_gone_leaves_no_file(
    measured: Simulation, tmp_path: Path
) -> None:
    run = measured.write(tmp_path / "run")
    index = build_report([run])
    page = read_page(index)
    assert len(page.svgs) == len(FIGURES) + len(MEASURED)
    assert "Gradients and weights" in page.text
    beside = {path.name for path in index.parent.iterdir()}
    assert {"layers.csv", *(f"{name}.svg" for name in MEASURED)} <= beside
    for line in measured.metrics:
        line["noise_scale"] = line["distance_from_init"] = None
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode, measured.metrics)))
    (run / "layers.jsonl").unlink()
    build_report([run])
    gone = beside - {path.name for path in index.parent.iterdir()}
    figures = {f"{name}.{kind}" for name in MEASURED for kind in ("svg", "csv")}
    assert gone == {"layers.csv", *figures}
    assert "Gradients and weights" not in read_page(index).text


def test_the_distance_is_fitted_as_numpy_does_it(measured: Simulation, tmp_path: Path) -> None:
    measured.metrics[3]["distance_from_init"] = None
    measured.metrics[4]["distance_from_init"] = 0.0  # a logarithm has no place for it
    index = build_report([measured.write(tmp_path / "run")])
    numbers = numbers_of(index)
    known = [
        (math.log(m["update"]), m["distance_from_init"])
        for m in measured.metrics
        if m["distance_from_init"]
    ]
    x, y = np.array(known).T
    slope, intercept = np.polyfit(x, y, 1)
    r2 = 1 - ((y - intercept - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert numbers["distance_log_slope"] == pytest.approx(slope)
    assert numbers["distance_log_intercept"] == pytest.approx(intercept)
    assert numbers["distance_log_r2"] == pytest.approx(r2)
    assert 0.9 < r2 < 1
    assert numbers["distance_from_init_last"] == y[-1]
    text = read_page(index).text
    assert f"{general(intercept)} + {general(slope)} ln t, R² = {r2:.4f}" in text
    svg = (index.parent / "distance-from-init.svg").read_text(encoding="utf-8")
    assert f"R² {r2:.4f}</text>" in svg
    assert "Updates (log₁₀ scale)</text>" in svg


def test_a_falling_distance_and_one_that_cannot_be_fitted(tmp_path: Path) -> None:
    run = Simulation(measured=True, epochs=3).run(restart_at=None)
    for line in run.metrics:
        line["distance_from_init"] = 9 - math.log(line["update"])
    index = build_report([run.write(tmp_path / "falling")])
    assert "9 − 1 ln t, R² = 1.0000" in read_page(index).text
    for line in run.metrics[2:]:
        line["distance_from_init"] = None
    index = build_report([run.write(tmp_path / "two points")])
    assert numbers_of(index)["distance_log_r2"] is None
    page = read_page(index)
    assert "R² =" not in page.text
    assert len(page.svgs) == len(FIGURES) + len(MEASURED) - 1  # one rank count


def test_a_fitted_distance_is_not_drawn_below_zero(tmp_path: Path) -> None:
    """Growth that begins late puts the line below zero at first."""
    run = Simulation(measured=True, epochs=6).run(restart_at=None)
    for line in run.metrics:
        line["distance_from_init"] = 1e-3 * line["update"] ** 2
    index = build_report([run.write(tmp_path / "run")])
    intercept = numbers_of(index)["distance_log_intercept"]
    assert intercept is not None
    assert intercept < 0
    text = read_page(index).text
    assert f"−{general(-intercept)} + " in text
    svg = (index.parent / "distance-from-init.svg").read_text(encoding="utf-8")
    assert not [word for word in SVG_TEXT.findall(svg) if word.startswith(("-", "−"))]


def test_the_noise_scale_stands_beside_the_batch(measured: Simulation, tmp_path: Path) -> None:
    measured.metrics[0]["noise_scale"] = -4.0  # an estimate may be: there is no scale then
    measured.metrics[-1]["noise_scale"] = None
    index = build_report([measured.write(tmp_path / "run")])
    known = [m["noise_scale"] for m in measured.metrics[1:-1]]
    numbers = numbers_of(index)
    assert numbers["noise_scale_first"] == known[0]
    assert numbers["noise_scale_last"] == known[-1]
    assert numbers["noise_scale_windows"] == len(known)
    svg = (index.parent / "noise-scale.svg").read_text(encoding="utf-8")
    for text in ("Epochs", "Samples (log₂ scale)", "noise scale", "global batch"):
        assert f"{text}</text>" in svg


def test_layers_are_recorded_exactly_and_shown_at_both_ends(
    measured: Simulation, tmp_path: Path
) -> None:
    measured.layers[0]["layers"][1] |= {"grad_norm": 0.0}
    measured.layers[0]["layers"][2] |= {"weight_norm": None}
    index = build_report([measured.write(tmp_path / "run")])
    rows = iter(read_csv(index.parent / "layers.csv"))
    for line in measured.layers:
        for layer in line["layers"]:
            row = next(rows)
            assert (row["run"], row["layer"]) == ("1", layer["layer"])
            for key in ("update", "samples_seen", "epoch"):
                assert float(row[key]) == line[key]
            weight, grad = layer["weight_norm"], layer["grad_norm"]
            ratio = weight / grad if weight is not None and grad else None
            for key, value in {**layer, "ratio": ratio}.items():
                if key != "layer":
                    assert (float(row[key]) if row[key] else None) == value
    assert next(rows, None) is None
    first, last = read_summary(index)["runs"][0]["layers"]
    assert (first["update"], last["update"]) == tuple(measured.layers[i]["update"] for i in (0, -1))
    assert [layer["ratio"] for layer in first["layers"][1:3]] == [None, None]
    text = read_page(index).text
    assert f"the first and the last of {len(measured.layers)} logged updates" in text
    for shown in (first, last):
        ratios = {layer["layer"]: layer["ratio"] for layer in shown["layers"] if layer["ratio"]}
        low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        assert (
            f"At update {shown['update']}, ‖w‖/‖∇w‖ lies between {general(ratios[low])} ({low}) "
            f"and {general(ratios[high])} ({high}), a factor of"
        ) in text
    row = last["layers"][0]
    numbers = (row["weight_norm"], row["grad_norm"], row["ratio"], row["trust_ratio"])
    assert " ".join(map(general, numbers)) in text


def test_without_trust_ratios_there_is_no_column_for_them(
    measured: Simulation, tmp_path: Path
) -> None:
    for line in measured.layers:
        for layer in line["layers"]:
            layer["trust_ratio"] = None
    text = read_page(build_report([measured.write(tmp_path / "run")])).text
    assert "‖w‖/‖∇w‖" in text
    assert "rust ratio" not in text


def test_hundreds_of_layers_are_folded_and_cut(measured: Simulation, tmp_path: Path) -> None:
    for line in measured.layers:
        line["layers"] = [measured.layer(f"block{i}.weight") for i in range(700)]
    index = build_report([measured.write(tmp_path / "run")])
    page = read_page(index)
    assert "300 of 700 layers are left out here; layers.csv has all." in page.text
    assert "700 layers" in page.text
    assert page.tags.count("details") == 4  # three of the provenance
    assert len(read_csv(index.parent / "layers.csv")) == 700 * len(measured.layers)


def test_of_many_logged_updates_a_part_is_read(measured: Simulation, tmp_path: Path) -> None:
    line = measured.layers[0]
    measured.layers = [line | {"update": i} for i in range(1000)]
    index = build_report([measured.write(tmp_path / "run")])
    updates = {int(row["update"]) for row in read_csv(index.parent / "layers.csv")}
    assert len(updates) == 400
    assert {0, 999} <= updates
    assert "(about one in 3 lines of layers.jsonl)" in read_page(index).text
    assert numbers_of(index)["layer_lines"] == 1000


def test_broken_layer_lines_are_said_and_a_single_one_is_enough(
    measured: Simulation, tmp_path: Path
) -> None:
    measured.layers = measured.layers[:1]
    run = measured.write(tmp_path / "run")
    with (run / "layers.jsonl").open("ab") as file:
        file.write(b'{broken\n{"layers": 5}\n{"upd')
    text = read_page(build_report([run])).text
    assert "layers.jsonl: 1 of 3 lines are broken and left out" in text
    assert text.count(f"Update {measured.layers[0]['update']} ‖w‖") == 1


def test_runs_with_and_without_measurements_share_a_page(tmp_path: Path) -> None:
    dirs = [
        Simulation(i, epochs=4, measured=i != 1, name=f"r{i}").run().write(tmp_path / str(i))
        for i in range(3)
    ]
    index = build_report(dirs, tmp_path / "out")
    page = read_page(index)
    assert len(page.svgs) == len(FIGURES) + len(MEASURED) - 1  # one rank count
    assert {row["run"] for row in read_csv(index.parent / "layers.csv")} == {"1", "3"}
    fits = [numbers_of(index, run).get("distance_log_r2") for run in range(3)]
    assert fits[1] is None
    assert "run 1: " in page.text
    assert "run 2: " not in page.text.partition("Gradients and weights")[2]
    svg = (index.parent / "distance-from-init.svg").read_text(encoding="utf-8")
    assert "1 r0</text>" in svg
    assert "2 r1</text>" not in svg


def test_a_hostile_layer_name_neither_breaks_nor_injects(
    measured: Simulation, tmp_path: Path
) -> None:
    for line in measured.layers:
        line["layers"][0]["layer"] = HOSTILE
        line["layers"][1]["layer"] = "=cmd|'/c calc'!A1"
    run = measured.write(tmp_path / "run")
    index = build_report([run])
    assert "<script>alert(1)</script>" in read_page(index).text
    assert "<script" not in index.read_text(encoding="utf-8").replace("&lt;script", "")
    names = {row["layer"] for row in read_csv(index.parent / "layers.csv")}
    assert "'=cmd|'/c calc'!A1" in names


# ---------------------------------------------------------------- large runs


@pytest.mark.slow
def test_a_large_run_gives_a_small_page_that_says_how(tmp_path: Path) -> None:
    run = Simulation(epochs=2).run(restart_at=None)
    path = run.write(tmp_path / "big")
    noise = random.Random(0)
    with (path / "metrics.jsonl").open("wb") as file:
        for i in range(110_000):
            line = run.metrics[i % len(run.metrics)] | {
                "update": i + 1,
                "samples_seen": 64 * (i + 1),
                "loss": noise.random(),
                "images_per_sec": noise.uniform(900, 1100),
                "lr": noise.random(),
                "stage": i // 50,
                "global_batch": 64 + i // 50,
            }
            file.write(encode(line))
    index = build_report([path])
    page = read_page(index)
    assert index.stat().st_size < 5e6
    assert "Drawn as the mean of 2,000 equal groups of the 110,000 windows" in page.text
    assert "1,800 of 2,200 stages are left out here; stages.csv has all." in page.text
    assert "one in 6, metrics.jsonl has all" in page.text
    assert len(read_csv(index.parent / "stages.csv")) == 2200
    assert numbers_of(index)["windows_counted"] == 109_999


# ---------------------------------------------------------------- parts, by their laws

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)


@given(values, st.integers(4, 60))
def test_extremes_keep_the_ends_the_lowest_and_the_highest(y: list[float], limit: int) -> None:
    full = points([float(i) for i in range(len(y))], y)
    thin = extremes(full, limit)
    assert len(thin.x) <= max(limit, 2)
    assert (thin.y[0], thin.y[-1]) == (y[0], y[-1])
    assert (min(thin.y), max(thin.y)) == (min(y), max(y))
    assert thin.x.tolist() == sorted(thin.x)
    assert all(y[int(x)] == v for x, v in zip(thin.x, thin.y, strict=True))


@given(values, st.integers(1, 60))
def test_means_stay_in_their_band_and_the_band_spans_all(y: list[float], limit: int) -> None:
    full = points([float(i) for i in range(len(y))], y)
    thin = means(full, limit)
    assert len(thin.x) <= limit or thin is full
    if thin.low is not None and thin.high is not None:
        assert (min(thin.low), max(thin.high)) == (min(y), max(y))
        for low, mean, high in zip(thin.low, thin.y, thin.high, strict=True):
            assert low - 1e-6 <= mean <= high + 1e-6


@given(st.lists(st.integers(0, 2), max_size=60))
def test_a_staircase_loses_no_step(heights: list[int]) -> None:
    stairs = steps([float(i) for i in range(len(heights))], [float(h) for h in heights])
    kept = dict(zip(stairs.x, stairs.y, strict=True))
    height = None
    for x, y in enumerate(heights):
        height = kept.get(float(x), height)
        assert height == y


@given(values, st.floats(0, 1))
def test_quantile_agrees_with_numpy(sample: list[float], share: float) -> None:
    expected = float(np.quantile(np.array(sample), share))
    assert quantile_of(np.array(sample), share) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(st.text())
def test_cleaned_text_fits_xml_and_utf8(text: str) -> None:
    ElementTree.fromstring(f"<a>{escape(scrub(text))}</a>".encode())  # noqa: S314
    assert len(clean(text, 20)) <= 20
    assert "\n" not in clean(text)


@given(st.floats(1e-12, 1e12), st.sampled_from([1, -1]))
def test_a_shown_number_is_the_number_to_four_digits(size: float, sign: int) -> None:
    shown = float(general(sign * size).replace(",", ""))
    assert shown == pytest.approx(sign * size, rel=6e-4)


def test_what_is_no_number_is_none() -> None:
    nothing: list[Any] = [None, True, "1", [], math.nan, math.inf, 10**400, -1e101]
    assert [number(value) for value in nothing] == [None] * len(nothing)
    assert [number(v) for v in (0, -2, 1.5)] == [0, -2, 1.5]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"), (0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (83, "1 min 23 s"),
        (3599.7, "1 h 0 min"), (7380, "2 h 3 min"), (90000, "1 d 1 h"),
    ],
)  # fmt: skip
def test_durations_read_naturally(seconds: float | None, text: str) -> None:
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


ascending = st.lists(st.integers(1, 10**7), min_size=1, max_size=300).map(sorted)


@given(ascending, st.integers(2, 50))
def test_log_spaced_points_keep_the_ends_and_their_order(x: list[int], limit: int) -> None:
    full = points(list(map(float, x)), [float(i) for i in range(len(x))])
    found = log_spaced(full, limit)
    assert len(found.x) <= max(limit, 1)
    places = [int(y) for y in found.y]
    assert places == sorted(set(places))
    assert [full.x[i] for i in places] == found.x.tolist()
    assert (found.x[0], found.x[-1]) == (full.x[0], full.x[-1])


def test_log_spaced_points_are_as_dense_early_as_late() -> None:
    full = points([float(i) for i in range(1, 100_001)], [0.0] * 100_000)
    found = log_spaced(full, 500)
    assert len(found.x) > 350
    gaps = [math.log(b / a) for a, b in pairwise(found.x) if a > 100]
    assert max(gaps) < 3 * min(g for g in gaps[:-1])


@given(
    st.floats(-1e3, 1e3),
    st.floats(-1e3, 1e3).filter(lambda b: abs(b) > 1e-3),
    st.lists(st.integers(1, 10**6), min_size=3, unique=True),
)
def test_a_fit_finds_the_line_that_the_points_lie_on(a: float, b: float, x: list[int]) -> None:
    fit = log_fit(points(list(map(float, x)), [a + b * math.log(t) for t in x]))
    assert fit is not None
    assert fit.slope == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert fit.intercept == pytest.approx(a, rel=1e-4, abs=1e-3)
    assert fit.r2 == pytest.approx(1.0, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(-1e3, 1e3)), min_size=3))
def test_the_share_that_a_fit_explains_lies_between_none_and_all(
    pairs: list[tuple[int, float]],
) -> None:
    fit = log_fit(points([float(x) for x, _ in pairs], [y for _, y in pairs]))
    if fit is None:
        values = [y for _, y in pairs]  # of which some are equal but for what a mean rounds away
        assert len({x for x, _ in pairs}) < 3 or np.std(values) <= 1e-12 * max(map(abs, values))
    else:
        assert 0 <= fit.r2 <= 1


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]),
                 ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])]
)  # fmt: skip
def test_there_is_no_fit_where_the_points_do_not_tell_one(x: list[float], y: list[float]) -> None:
    assert log_fit(points(x, y)) is None
