"""``build_report``: directories of runs, benches and probes in, one self-contained page out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness.benchfile import holds_bench
from harness.errors import RunDirectoryError, UsageError
from harness.files import write_atomic
from harness.lenient import number, pick
from harness.probe_results import holds_probe
from harness.report import fields, sections, tables
from harness.report.benches import Bench, load_bench
from harness.report.goodput import Goodputs, Progress, goodputs_of, progress_of
from harness.report.layers import has_trust, layer_rows, spread_of_ratios
from harness.report.markdown import markdown
from harness.report.network import Network, network_of, unused
from harness.report.paper import PAPER_RULES, PaperRow, paper_rows, paper_source
from harness.report.probes import (
    LINE_COLUMNS,
    PROBE_RULES,
    Probe,
    headline,
    line_rows,
    load_probe,
    probe_json,
)
from harness.report.runs import Run, load_run
from harness.report.scaling import Series, series_of_runs
from harness.report.scaling_view import Modelled, model_of, wire_of
from harness.report.summary import Number, Summary, answer, compare, describe, summarise
from harness.report.timing import (
    Finding,
    Straggler,
    Timing,
    findings,
    phase_name,
    phases_of,
    straggler_of,
    timing_of_point,
    timing_of_run,
)
from harness.report.waiting import exchange_numbers, exchange_of
from harness.rundir import RunDirectory
from harness.scaling.steptime import Wire

if TYPE_CHECKING:
    from harness.report.svg import Figure

_HERE = Path(__file__).parent
TOLD = 3  # series in sentences; the tables have all
TABLE_ROWS = 400  # rows of a kind on the page, shared by all runs; the CSV files have all
STAGE_SOURCE = (
    "reached stages: events.jsonl (stage lines) and metrics.jsonl (lines of that stage); "
    "others, updates_planned and segment: plan.json (stages)"
)


@dataclass(frozen=True)
class Shown:
    """Rows of a table that has room for ``rows`` of ``total``."""

    rows: list[Any]
    total: int

    @property
    def left_out(self) -> int:
        return self.total - len(self.rows)


@dataclass(frozen=True)
class RunView:
    """What the template shows of one run."""

    run: Run
    numbers: Summary
    stages: list[tables.Stage]
    stage_rows: Shown
    event_rows: Shown
    fault_rows: Shown
    paper: str | None
    paper_rows: list[PaperRow]
    layer_rows: Shown
    config: Shown
    provenance: Shown
    timing: Timing | None
    straggler: Straggler | None
    findings: list[Finding]
    communication: list[Number]
    ranks: list[Number]


@dataclass(frozen=True)
class BenchView:
    """What the template shows of one bench."""

    bench: Bench
    numbers: list[Number]
    findings: list[Finding]
    machine: Shown


@dataclass(frozen=True)
class ProbeView:
    """What the template shows of one probe."""

    probe: Probe
    lines: list[tuple[str, ...]]
    unused: str | None
    """Why the scaling model did not take it; None if it did."""
    provenance: Shown


@dataclass(frozen=True)
class Scaling:
    """A series with what the model says of it, what probes told the model, and its goodput."""

    series: Series
    model: Modelled | str
    network: Network
    """Empty where there is no model."""
    goodput: Goodputs | None


@dataclass(frozen=True)
class Report:
    """All that the page is made of."""

    views: list[RunView]
    benches: list[BenchView]
    probes: list[ProbeView]
    scalings: list[Scaling]
    timings: list[Timing]
    progress: list[tuple[Run, Progress]]
    paragraphs: list[str]
    title: str

    @property
    def runs(self) -> list[Run]:
        return [view.run for view in self.views]

    @property
    def single(self) -> RunView | None:
        return self.views[0] if len(self.views) == 1 and not self.benches else None

    @property
    def trouble(self) -> list[tuple[str | None, list[str]]]:
        """What is missing or incomplete, and of what; None: of the only run there is."""
        found = [
            (
                None if self.single and not self.probes else f"Run {view.run.label}",
                view.run.problems,
            )
            for view in self.views
        ]
        found += [(fields.sentence(b.bench.label), b.bench.problems) for b in self.benches]
        found += [(fields.sentence(p.probe.label), p.probe.problems) for p in self.probes]
        return [(of, problems) for of, problems in found if problems]

    @property
    def causes(self) -> list[str]:
        """What holds training up, in sentences."""
        if self.single:
            return sections.time_sentence(self.single.timing, self.single.findings)
        told = [
            f"Run {view.run.label}: {finding.text}"
            for view in self.views
            for finding in view.findings
        ]
        told += [
            f"{fields.sentence(one.bench.label)}: {finding.text}"
            for one in self.benches
            for finding in one.findings
        ]
        return told


def build_report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of run, bench and probe directories and of directories that hold such, as a
    scaling series or a sweep, in any mix; returns the path of its index.html.

    Without ``out`` it goes to the report/ directory of the first. Whatever the records lack is said
    on the page. Raises RunDirectoryError for a directory that holds none of these, and UsageError
    where nothing can be written.
    """
    given = list({path.resolve(): path for path in map(Path, directories)}.values())
    if not given:
        raise RunDirectoryError("no run directory was given; name at least one (…/runs/NAME)")
    kinds = _sorted_out(given)
    runs = [load_run(path, position) for position, path in enumerate(kinds["run"], 1)]
    benches = [load_bench(path, position) for position, path in enumerate(kinds["bench"], 1)]
    probes = [load_probe(path, position) for position, path in enumerate(kinds["probe"], 1)]
    target = out if out is not None else RunDirectory(given[0]).report
    files = _contents(_report(runs, benches, probes))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if content is None:
                (target / name).unlink(missing_ok=True)
            else:
                write_atomic(target / name, content)
    except OSError as error:
        raise UsageError(f"the report cannot be written to {target}: {error}") from error
    return target / "index.html"


Kind = Literal["run", "bench", "probe"]


def _sorted_out(given: list[Path]) -> dict[Kind, list[Path]]:
    """The directories of each kind; one that is of none stands for those in it."""
    found: dict[Kind, dict[Path, Path]] = {"run": {}, "bench": {}, "probe": {}}
    for path in given:
        inside = [path] if _kinds(path) else _children(path)
        for one in inside or [path]:
            for kind in _kinds(one) or ("run",):  # what holds nothing is refused by load_run
                found[kind].setdefault(one.resolve(), one)
    return {kind: list(paths.values()) for kind, paths in found.items()}


def _kinds(path: Path) -> tuple[Kind, ...]:
    """What a directory holds. A bench has config.yaml too, and so may have a probe that was
    submitted: that alone makes no run of either."""
    run = RunDirectory(path)
    found: list[Kind] = []
    if holds_bench(path):
        found.append("bench")
    elif run.metrics.exists() or run.events.exists() or run.checkpoints.exists():
        found.append("run")
    if holds_probe(path):
        found.append("probe")
    return tuple(found) or (("run",) if run.holds_run else ())


def _children(path: Path) -> list[Path]:
    """Runs, benches and probes right below a directory, in the order of their names, numbers as
    numbers."""
    try:
        found = [child for child in path.iterdir() if child.is_dir() and _kinds(child)]
    except OSError:
        return []
    return sorted(found, key=lambda child: (len(child.name), child.name))


def _report(runs: list[Run], benches: list[Bench], probes: list[Probe]) -> Report:
    views = _views(runs)
    bench_views = [_bench_view(bench) for bench in benches]
    scalings = _scalings(runs, views, benches, probes)
    networks = [one.network for one in scalings if isinstance(one.model, Modelled)]
    probe_views = [
        ProbeView(
            one, line_rows(one), unused(one, networks), _flat(one.get("provenance"), TABLE_ROWS)
        )
        for one in probes
    ]
    progress = [(run, found) for run in runs if (found := progress_of(run)) is not None]
    return Report(
        views=views,
        benches=bench_views,
        probes=probe_views,
        scalings=scalings,
        timings=_timings(views, benches, scalings),
        progress=progress,
        paragraphs=_paragraphs(views, benches, probes, scalings),
        title=_title(runs, benches, probes),
    )


def _scalings(
    runs: list[Run], views: list[RunView], benches: list[Bench], probes: list[Probe]
) -> list[Scaling]:
    """Each series with its model, which is told what the probes say of the network."""
    found = []
    of_runs = _wire_of_runs(views)
    for one, wire in [
        *((one, _wire_of_bench(bench)) for bench in benches for one in bench.series),
        *((one, of_runs) for one in series_of_runs(runs)),
    ]:
        network = Network() if isinstance(wire, str) else network_of(probes, wire)
        model = model_of(one, wire, network)
        told = network if isinstance(model, Modelled) else Network()
        found.append(Scaling(one, model, told, _goodputs(one, runs)))
    return found


def _wire_of_bench(bench: Bench) -> Wire | str:
    return wire_of(number(bench.get("gradient_bytes")), pick(bench.config, "comm"))


def _wire_of_runs(views: list[RunView]) -> Wire | str:
    """Of the first run that tells."""
    for view in views:
        for told in view.communication:
            if told.name == "comm_bytes_per_update" and told.value is not None:
                return wire_of(told.value, view.run.config("comm"))
    return wire_of(None, None)


def _goodputs(one: Series, runs: list[Run]) -> Goodputs | None:
    """At the noise scale late in training: the median of the last tenth of what the runs of the
    same task measured."""
    last = [
        known[-max(len(known) // 10, 1) :]
        for run in runs
        if describe(run) == one.task and len(known := run.columns.known("noise_scale"))
    ]
    together = np.concatenate(last) if last else np.zeros(0)
    together = together[together > 0]
    return goodputs_of(one, float(np.median(together))) if len(together) else None


def _timings(views: list[RunView], benches: list[Bench], scalings: list[Scaling]) -> list[Timing]:
    """A bar for each point of a bench; for each rank count of runs that make a series; else one
    for each run."""
    several = len(benches) > 1
    found = [
        timing_of_point(_point_label(bench, point, several), point)
        for bench in benches
        for point in bench.points
    ]
    of_runs = [one.series for one in scalings if not one.series.label.startswith("bench ")]
    if of_runs and len(views) == 1:
        found += [
            timing_of_point(f"{fields.plural(point.ranks, 'rank')}", point)
            for point in of_runs[0].points
        ]
    else:
        found += [view.timing for view in views]
    return [timing for timing in found if timing is not None]


def _point_label(bench: Bench, point: Any, several: bool) -> str:
    lead = f"{bench.number}: " if several else ""
    same = sum(one.ranks == point.ranks for one in bench.points) > 1
    batch = f", {fields.count(point.global_batch)}" if same else ""
    return f"{lead}{fields.plural(point.ranks, 'rank')}{batch}"


def _paragraphs(
    views: list[RunView], benches: list[Bench], probes: list[Probe], scalings: list[Scaling]
) -> list[str]:
    """The answer: a paragraph for each series, one for benches without any, one for the runs, one
    for each probe."""
    found = []
    for one in scalings[:TOLD]:
        lead = f"{fields.sentence(one.series.label)}. " if len(scalings) > 1 else ""
        found.append(
            lead
            + " ".join(
                [
                    *sections.scaling_sentences(one.series, one.model, one.goodput),
                    *(given.brief for given in one.network.given),
                ]
            )
        )
    if len(scalings) > TOLD:
        found.append(f"{fields.count(len(scalings) - TOLD)} more series are in the table.")
    for bench in benches:
        if not bench.series and bench.points:
            best = max(bench.points, key=lambda point: point.images_per_sec)
            found.append(
                f"{fields.sentence(bench.label)} measured one number of ranks; its best was "
                f"{fields.general(best.images_per_sec)} images/s on "
                f"{fields.plural(best.ranks, 'rank')}."
            )
    if len(views) == 1:
        found.append(" ".join(answer(views[0].run, views[0].numbers)))
    elif views:
        found.append(" ".join(compare([v.run for v in views], [v.numbers for v in views])))
    found += map(headline, probes[:TOLD])
    if len(probes) > TOLD:
        found.append(f"{fields.count(len(probes) - TOLD)} more probes are under Network.")
    return found


def _title(runs: list[Run], benches: list[Bench], probes: list[Probe]) -> str:
    if len(runs) + len(benches) == 1 and not probes:
        return (runs or benches)[0].name
    if len(probes) == 1 and not runs and not benches:
        return probes[0].name
    kinds = (("bench", "benches", benches), ("run", "runs", runs), ("probe", "probes", probes))
    parts = [fields.plural(len(found), kind, many) for kind, many, found in kinds if found]
    if len(parts) == 1:
        return f"{parts[0]} compared"
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _views(runs: list[Run]) -> list[RunView]:
    summaries = [summarise(run) for run in runs]
    room = max(TABLE_ROWS // max(len(runs), 1), 20)
    peers = list(zip(runs, summaries, strict=True))
    return [_view(run, numbers, peers, room) for run, numbers in peers]


def _view(run: Run, numbers: Summary, peers: list[tuple[Run, Summary]], room: int) -> RunView:
    stages = tables.stage_rows(run)
    timing, straggler = timing_of_run(run), straggler_of(run)
    exchange = exchange_of(run, timing.seconds) if timing else None
    communication = [
        *sections.communication_numbers(run, numbers),
        *exchange_numbers(exchange),
    ]
    ranks = list(sections.rank_numbers(run, straggler))
    for more in (*sections.time_numbers(timing), *communication, *ranks):
        numbers[more.name] = more
    return RunView(
        run=run,
        numbers=numbers,
        stages=stages,
        stage_rows=_shorten(stages, room),
        event_rows=_shorten(tables.event_rows(run), room),
        fault_rows=_shorten(sections.faults_of(run), room),
        paper=paper_source(run),
        paper_rows=paper_rows(run, numbers, peers)[:room],
        layer_rows=_shorten(layer_rows(run.layers), room),
        config=_flat(run.records.config, room),
        provenance=_flat(run.records.provenance, room),
        timing=timing,
        straggler=straggler,
        findings=findings(timing, straggler, exchange),
        communication=communication,
        ranks=ranks,
    )


def _bench_view(bench: Bench) -> BenchView:
    """Causes are those of the point with the most ranks."""
    last = max(bench.points, key=lambda point: point.ranks, default=None)
    timing = timing_of_point(fields.plural(last.ranks, "rank"), last) if last else None
    return BenchView(
        bench=bench,
        numbers=sections.bench_numbers(bench),
        findings=findings(timing, None, None),
        machine=_flat(bench.get("machine"), TABLE_ROWS),
    )


def _shorten(rows: list[Any], room: int) -> Shown:
    """The first and the last rows, as many as there is room for."""
    if len(rows) <= room:
        return Shown(rows, len(rows))
    return Shown([*rows[: room // 2], *rows[-(room // 2) :]], len(rows))


def _flat(value: Any, room: int) -> Shown:
    rows = tables.flatten(value or {}, 10 * room + 1)
    return Shown(rows[:room], len(rows)) if value else Shown([], 0)


def _contents(report: Report) -> dict[str, bytes | None]:
    """Every file of the report by name; None for a figure that there is no data for.

    The page comes last, so that it never speaks of files that are not there yet.
    """
    from harness.report import svg
    from harness.report.bandwidth import SECTION, bus_bandwidth
    from harness.report.figures import OPENING, draw_curves
    from harness.report.opening import draw_opening

    views, runs = report.views, report.runs
    with svg.settings():
        opening = draw_opening(
            [(one.series, one.model) for one in report.scalings],
            report.timings,
            [one.goodput for one in report.scalings if one.goodput is not None],
            report.progress,
            runs,
        )
        curves = draw_curves(runs, [view.numbers for view in views], bool(report.scalings))
        trained = bool(runs or report.benches)
        network = bus_bandwidth(
            [one.probe for one in report.probes], SECTION if trained else OPENING
        )
    first = [f for f in curves if f.section == OPENING]
    figures = [*first, *opening, *(f for f in curves if f.section != OPENING), network]
    files: dict[str, bytes | None] = {f"{figure.key}.svg": figure.file for figure in figures}
    files |= {f"{figure.key}.csv": figure.data for figure in figures}
    files["metrics.csv"] = tables.metrics_csv(runs) if runs else None
    files["evaluations.csv"] = tables.evaluations_csv(runs) if runs else None
    stages = ((view.run, view.stages) for view in views)
    files["stages.csv"] = tables.stages_csv(stages) if runs else None
    files["layers.csv"] = tables.layers_csv(runs)
    files["summary.json"] = _summary_json(report)
    if not trained:  # of a probe alone there is nothing else to draw
        figures = [network]
    files["report.md"] = markdown(report, figures)
    files["index.html"] = _page(report, figures)
    return files


def _summary_json(report: Report) -> bytes:
    runs = [
        {
            "run": view.run.number,
            "name": view.run.name,
            "directory": fields.scrub(view.run.directory),
            "status": view.run.status,
            "problems": [fields.clean(problem) for problem in view.run.problems],
            "numbers": [asdict(number) for number in view.numbers.values()],
            "findings": [asdict(finding) for finding in view.findings],
            "faults": [asdict(fault) for fault in sections.faults_of(view.run)],
            "stages": [asdict(stage) for stage in view.stages],
            "paper": [asdict(row) for row in view.paper_rows],
            **_layers_json(view.run),
        }
        for view in report.views
    ]
    benches = [
        {
            "bench": one.bench.number,
            "name": one.bench.name,
            "directory": fields.scrub(one.bench.directory),
            "mode": one.bench.mode,
            "problems": one.bench.problems,
            "numbers": [asdict(number) for number in one.numbers],
            "findings": [asdict(finding) for finding in one.findings],
            "points": [asdict(point) for point in one.bench.points],
        }
        for one in report.benches
    ]
    summary = {
        "format": 1,
        "stages_source": STAGE_SOURCE,
        "answer": report.paragraphs,
        "causes": report.causes,
        "runs": runs,
        "benches": benches,
        "probes": [
            {**probe_json(one.probe), "not_taken_by_the_model": one.unused} for one in report.probes
        ],
        "probe_rules": PROBE_RULES,
        "scaling": [
            {
                **sections.scaling_json(one.series, one.model, one.goodput),
                "network": [given.as_dict() for given in one.network.given],
            }
            for one in report.scalings
        ],
        "scaling_rules": sections.SCALING_RULES,
        "paper_rules": PAPER_RULES,
    }
    return (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode()


def _layers_json(run: Run) -> dict[str, Any]:
    """The first and the last line of layers.jsonl, of a run that has them."""
    return {"layers": [asdict(snapshot) for snapshot in run.layers.ends]} if run.layers.ends else {}


def _page(report: Report, figures: list[Figure]) -> bytes:
    import jinja2
    from markupsafe import Markup

    from harness.report.figures import swatch

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: fields.scrub(value) if type(value) is str else value,
    )
    names = ("count", "general", "percent", "duration", "plural")
    environment.filters |= {name: getattr(fields, name) for name in names}
    environment.filters |= {
        "sentence": fields.sentence,
        "unit_text": fields.unit_text,
        "phase_name": phase_name,
    }
    runs = report.runs
    tasks = {describe(run) for run in runs} | {one.bench.task for one in report.benches}
    text = environment.get_template("index.html.j2").render(
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - our file
        drawings={f.key: Markup(f.inline) for f in figures if f.inline},  # noqa: S704 - escaped
        figures=figures,
        report=report,
        views=report.views,
        single=report.single,
        title=report.title,
        subject=fields.clean("; ".join(sorted(tasks))),
        describe=describe,
        swatch=swatch,
        phases=phases_of(report.timings),
        tasks=len({describe(run) for run in runs}),
        metrics_step=max(map(tables.metrics_step, runs), default=1),
        layers_step=max((tables.layers_step(run.layers) for run in runs), default=1),
        has_trust=has_trust,
        line_columns=LINE_COLUMNS,
        spread_of_ratios=spread_of_ratios,
    )
    return text.encode()
