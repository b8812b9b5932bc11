"""One thing that was looked at, and how all of them are told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any, Literal

Status = Literal["ok", "warning", "missing"]

FORMAT = 1
"""Of the JSON: keys are added to it, none is renamed or removed."""
_WIDTH = 80
_STATUS, _NAME = 9, 13


@dataclass(frozen=True)
class Finding:
    """``missing``: without it, or as it is, a run does not start."""

    name: str
    text: str
    """What was found."""
    status: Status = "ok"
    remedy: str = ""
    """What to do; a command that can be typed, where there is one."""
    group: str = "software"
    facts: dict[str, Any] = field(default_factory=dict)
    """For programs."""

    @property
    def key(self) -> str:
        return self.name.lower().replace(" ", "_")

    def as_dict(self) -> dict[str, Any]:
        told = {"status": self.status, "text": self.text, "remedy": self.remedy or None}
        return told | self.facts


def good(findings: Iterable[Finding]) -> bool:
    """Whether what a run needs is there."""
    return all(finding.status != "missing" for finding in findings)


def as_json(findings: Sequence[Finding], data: dict[str, Any]) -> str:
    """``{"format", "ok", "checks": {GROUP: {NAME: {"status", "text", "remedy", …}}}, "data"}``."""
    checks: dict[str, dict[str, Any]] = {}
    for finding in findings:
        checks.setdefault(finding.group, {})[finding.key] = finding.as_dict()
    told = {"format": FORMAT, "ok": good(findings), "checks": checks, "data": data}
    return json.dumps(told, indent=2, ensure_ascii=False)


def as_lines(findings: Sequence[Finding]) -> list[str]:
    """Lines of 80 columns, each group under its name."""
    lines: list[str] = []
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines += ["", group.capitalize()] if lines else [group.capitalize()]
        lines += _entry(finding)
    return lines


def verdict(findings: Sequence[Finding]) -> str:
    """What all of it comes to, in a sentence."""
    missing = [finding.name for finding in findings if finding.status == "missing"]
    warnings = [finding.name for finding in findings if finding.status == "warning"]
    worth = f"; worth a look: {', '.join(warnings)}" if warnings else ""
    if missing:
        return f"A run does not start here. To be put right: {', '.join(missing)}{worth}."
    return f"What a run needs is here{worth}."


def _entry(finding: Finding) -> list[str]:
    indent = 2 + _STATUS + _NAME
    head = f"  {finding.status:<{_STATUS}}{finding.name:<{_NAME - 1}} "
    if len(head) > indent:
        lines = [head.rstrip(), *wrapped(finding.text, indent)]
    else:
        first, *rest = wrapped(finding.text, indent) or [""]
        lines = [f"{head}{first.lstrip()}", *rest]
    return lines + wrapped(f"→ {finding.remedy}", indent, 2) * bool(finding.remedy)


def wrapped(text: str, indent: int, hanging: int = 0) -> list[str]:
    """Lines of 80 columns; words are never cut, so that commands can be copied."""
    return [
        line
        for part in text.splitlines()
        for line in wrap(
            part,
            _WIDTH,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hanging),
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
