"""The fault matrix: every row on real processes, and what came of it as a table."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Any

from faults import network, numerics, processes, storage
from faults.row import Row
from faults.scene import Finding, Scene, Unexpected, undisturbed
from harness.jsonl import read_object, write_json

ROWS = tuple(row for module in (processes, network, storage, numerics) for row in module.rows())
FILE = "matrix.json"


def chosen(names: Sequence[str], quick: bool) -> list[Row]:
    """Rows by name or group of names (``kill`` for all that begin so); all of them by default.

    Raises ValueError for a name that there is not.
    """
    known = [row.name for row in ROWS]
    for name in names:
        if not any(_fits(row, name) for row in ROWS):
            close = get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"there is no row {name}{hint}; valid: {', '.join(known)}")
    rows = [row for row in ROWS if not names or any(_fits(row, name) for name in names)]
    return [row for row in rows if row.quick or not quick]


def _fits(row: Row, name: str) -> bool:
    return row.name == name or row.name.startswith(f"{name}-")


def run(rows: Sequence[Row], out: Path, repeats: int, seed: int, anew: bool) -> list[Finding]:
    """Try the rows that are not in ``out`` yet (``anew``: all); findings are kept as they come."""
    out.mkdir(parents=True, exist_ok=True)
    reference = _reference(out)
    findings = load(out)
    for repeat in range(repeats):
        for row in rows:
            key = (row.name, repeat, seed)
            if not anew and key in {(f.row, f.repeat, f.seed) for f in findings}:
                continue
            found = _try(row, repeat, seed, out, reference)
            findings = [f for f in findings if (f.row, f.repeat) != key[:2]] + [found]
            write_json(out / FILE, {"findings": [f.as_dict() for f in findings]})
            print(_line(found), flush=True)
    return findings


def _reference(out: Path) -> Path:
    """The run that nobody disturbs, in one process."""
    return undisturbed(out / "undisturbed")


def _try(row: Row, repeat: int, seed: int, out: Path, reference: Path) -> Finding:
    found = Finding(row.name, repeat, seed, time=datetime.now(UTC).isoformat(timespec="seconds"))
    found.skipped = row.missing()
    if found.skipped is not None:
        return found
    begun = time.monotonic()
    folder = out / "scenes" / f"{row.name}-{repeat}"
    scene = Scene(folder, reference, found, Random(f"{seed} {row.name} {repeat}"))
    try:
        row.stage(scene)
    except Unexpected as error:
        found.broken.append(str(error))
    except Exception as error:  # one row's failure is no reason to try no others
        found.broken.append(f"{type(error).__name__}: {error}")
        traceback.print_exc()
    found.seconds = time.monotonic() - begun
    if found.broken:
        (folder / "output").write_text(scene.output, encoding="utf-8")
    else:
        shutil.rmtree(folder)
    return found


def load(out: Path) -> list[Finding]:
    """What has been found so far."""
    kept = read_object(out / FILE) or {"findings": []}
    return [Finding(**entry) for entry in kept["findings"]]


def _line(found: Finding) -> str:
    if found.skipped is not None:
        return f"{found.row:22} not tried: {found.skipped}"
    verdict = "BROKEN" if found.broken else "kept"
    known = "" if found.known_after is None else f"known after {found.known_after:.1f} s"
    words = f"{found.row:22} {verdict:6} {found.seconds:5.1f} s  {known}"
    return "\n".join([words, *(f"    {promise}" for promise in found.broken)])


def table(findings: Sequence[Finding]) -> str:
    """Markdown: a table for each group of rows, in their order, repeats put together."""
    parts = []
    for group in dict.fromkeys(row.group for row in ROWS):
        lines = [
            f"### {group}\n",
            "| fault | what the harness said | known after, s | updates repeated | exit code "
            "| same weights | records |",
            "|---|---|---|---|---|---|---|",
        ]
        names = [row.name for row in ROWS if row.group == group]
        for name in names:
            same = [found for found in findings if found.row == name]
            if same:
                lines.append(_cells(same))
        if len(lines) > 3:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cells(found: Sequence[Finding]) -> str:
    first = found[0]
    name = f"`{first.row}`"
    if first.skipped is not None:
        return f"| {name} | not tried: {first.skipped} |  |  |  |  |  |"
    times = f", {len(found)} times" if len(found) > 1 else ""
    known = [one.known_after for one in found if one.known_after is not None]
    by = "" if first.known_by in ("fault", "stop", "skipped_update") else first.known_by
    shown_known = _range(known, 1) + (f" ({by})" if known and by else by if not known else "")
    repeated = [one.repeated for one in found if one.repeated is not None]
    codes = {", then ".join(map(str, one.exit_codes)) for one in found}
    cells = [
        f"{name}: {_plain(first.what)}{times}",
        _plain(_short(first.said)),
        shown_known,
        _range(repeated, 0),
        " or ".join(sorted(codes)),
        _together([one.same_weights for one in found], "by design not"),
        _together([one.complete for one in found], ""),
    ]
    broken = [promise for one in found for promise in one.broken]
    if broken:
        cells[1] += f" **Broken: {_plain(_short('; '.join(broken)))}**"
    return f"| {' | '.join(cells)} |"


def _range(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _together(answers: Sequence[bool | None], unasked: str) -> str:
    if all(answer is None for answer in answers):
        return unasked
    return "yes" if all(answer for answer in answers if answer is not None) else "**no**"


def _short(text: str, most: int = 170) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _plain(text: str) -> str:
    """Text that stands in one cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """How many were tried, and how many kept what is promised."""
    tried = [found for found in findings if found.skipped is None]
    return {
        "rows": len({found.row for found in tried}),
        "tried": len(tried),
        "kept": sum(not found.broken for found in tried),
        "not_tried": sorted({found.row for found in findings if found.skipped is not None}),
        "date": max((found.time for found in findings), default="")[:10],
    }
