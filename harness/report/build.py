"""``build_report``: run directories in, a folder with one self-contained page and its data out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import RunDirectoryError, UsageError
from harness.records import RunDirectory, write_atomic
from harness.report import fields, tables
from harness.report.layers import has_trust, layer_rows, spread_of_ratios
from harness.report.runs import Run, load_run
from harness.report.summary import Summary, answer, compare, describe, summarise

if TYPE_CHECKING:
    from harness.report.svg import Figure

_HERE = Path(__file__).parent
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
    paper: str | None
    paper_rows: list[tables.PaperRow]
    layer_rows: Shown
    config: Shown
    provenance: Shown


def build_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one or several runs; returns the path of its index.html.

    Without ``out`` it goes to the report/ directory of the first run. Whatever the records lack is
    said on the page. Raises RunDirectoryError for a directory that holds no run, and UsageError
    where nothing can be written.
    """
    paths = list({path.resolve(): path for path in map(Path, run_dirs)}.values())
    if not paths:
        raise RunDirectoryError("no run directory was given; name at least one (…/runs/NAME)")
    runs = [load_run(path, position) for position, path in enumerate(paths, 1)]
    target = out if out is not None else RunDirectory(paths[0]).report
    files = _contents([_view(run, len(runs)) for run in runs])
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


def _view(run: Run, runs: int) -> RunView:
    room = max(TABLE_ROWS // runs, 20)
    stages = tables.stage_rows(run)
    numbers = summarise(run)
    return RunView(
        run=run,
        numbers=numbers,
        stages=stages,
        stage_rows=_shorten(stages, room),
        event_rows=_shorten(tables.event_rows(run), room),
        paper=tables.paper_source(run),
        paper_rows=tables.paper_rows(run, numbers)[:room],
        layer_rows=_shorten(layer_rows(run.layers), room),
        config=_flat(run.records.config, room),
        provenance=_flat(run.records.provenance, room),
    )


def _shorten(rows: list[Any], room: int) -> Shown:
    """The first and the last rows, as many as there is room for."""
    if len(rows) <= room:
        return Shown(rows, len(rows))
    return Shown([*rows[: room // 2], *rows[-(room // 2) :]], len(rows))


def _flat(value: Any, room: int) -> Shown:
    rows = tables.flatten(value or {}, 10 * room + 1)
    return Shown(rows[:room], len(rows)) if value else Shown([], 0)


def _contents(views: list[RunView]) -> dict[str, bytes | None]:
    """Every file of the report by name; None for a figure that there is no data for.

    The page comes last, so that it never speaks of files that are not there yet.
    """
    from harness.report import svg
    from harness.report.figures import draw_curves

    runs = [view.run for view in views]
    with svg.settings():
        figures = draw_curves(runs, [view.numbers for view in views])
    files: dict[str, bytes | None] = {f"{figure.key}.svg": figure.file for figure in figures}
    files["metrics.csv"] = tables.metrics_csv(runs)
    files["evaluations.csv"] = tables.evaluations_csv(runs)
    files["stages.csv"] = tables.stages_csv((view.run, view.stages) for view in views)
    files["layers.csv"] = tables.layers_csv(runs)
    files["summary.json"] = _summary_json(views)
    files["index.html"] = _page(views, figures)
    return files


def _summary_json(views: list[RunView]) -> bytes:
    runs = [
        {
            "run": view.run.number,
            "name": view.run.name,
            "directory": fields.scrub(view.run.directory),
            "status": view.run.status,
            "problems": [fields.clean(problem) for problem in view.run.problems],
            "numbers": [asdict(number) for number in view.numbers.values()],
            "stages": [asdict(stage) for stage in view.stages],
            **_layers_json(view.run),
        }
        for view in views
    ]
    summary = {"format": 1, "stages_source": STAGE_SOURCE, "runs": runs}
    return (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode()


def _layers_json(run: Run) -> dict[str, Any]:
    """The first and the last line of layers.jsonl, of a run that has them."""
    return {"layers": [asdict(snapshot) for snapshot in run.layers.ends]} if run.layers.ends else {}


def _page(views: list[RunView], figures: list[Figure]) -> bytes:
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
    single = views[0] if len(views) == 1 else None
    runs = [view.run for view in views]
    text = environment.get_template("index.html.j2").render(
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - our file
        drawings={f.key: Markup(f.inline) for f in figures if f.inline},  # noqa: S704 - escaped
        figures=figures,
        views=views,
        single=single,
        title=single.run.name if single else f"{len(views)} runs compared",
        subject=fields.clean("; ".join(sorted({describe(run) for run in runs}))),
        sentences=answer(single.run, single.numbers)
        if single
        else compare(runs, [view.numbers for view in views]),
        describe=describe,
        swatch=swatch,
        tasks=len({describe(run) for run in runs}),
        metrics_step=max(map(tables.metrics_step, runs)),
        layers_step=max(tables.layers_step(run.layers) for run in runs),
        has_trust=has_trust,
        spread_of_ratios=spread_of_ratios,
    )
    return text.encode()
