"""What is installed, as a CycloneDX 1.5 bill of materials (https://cyclonedx.org).

    python -m launch.bootstrap.sbom > docs/sbom.cdx.json

Every distribution of this interpreter's environment with its version, its licence as it states it,
and which of the others it needs. Nothing in the output depends on the clock or on where the
environment lies, so equal environments give equal bytes. What was compiled into a wheel (such as
Gloo into Horovod's, or a BLAS into numpy's) is that wheel's own to tell.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from typing import Any

_ROOT = "scaling-harness"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CLASSIFIER = "License :: OSI Approved :: "


def bill(installed: Iterable[Distribution]) -> dict[str, Any]:
    """The bill of materials of these distributions, as plain data."""
    found = {normal(one.name): one for one in installed if one.name}
    others = sorted(found.keys() - {_ROOT})
    root = found.get(_ROOT)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": _ROOT,
                "name": _ROOT,
                "version": root.version if root else "",
            }
        },
        "components": [_component(found[name]) for name in others],
        "dependencies": [
            {"ref": name if name == _ROOT else _url(one), "dependsOn": sorted(_needs(one, found))}
            for name, one in sorted(found.items())
        ],
    }


def normal(name: str) -> str:
    """A distribution's name as the index compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _component(one: Distribution) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": _url(one),
        "name": one.name,
        "version": one.version,
        "purl": _url(one),
    }
    licence = _licence(one)
    if licence:
        component["licenses"] = [{"license": {"name": licence}}]
    return component


def _url(one: Distribution) -> str:
    """Its package URL; a local part of the version (+cpu) is written as such URLs have it."""
    return f"pkg:pypi/{normal(one.name)}@{one.version.replace('+', '%2B')}"


def _licence(one: Distribution) -> str | None:
    """As the distribution states it, if it does so in a line."""
    stated = one.metadata.get_all("License-Expression") or []
    if stated:
        return str(stated[0])
    classified = [
        text.removeprefix(_CLASSIFIER)
        for text in one.metadata.get_all("Classifier") or ()
        if text.startswith(_CLASSIFIER)
    ]
    if classified:
        return " / ".join(classified)
    text = "".join(map(str, one.metadata.get_all("License") or ())).strip()
    return text if text and "\n" not in text else None


def _needs(one: Distribution, found: dict[str, Distribution]) -> Iterator[str]:
    """References to what it needs, of that what is installed; extras do not count."""
    for requirement in dict.fromkeys(one.requires or ()):
        text, _, marker = requirement.partition(";")
        name = _NAME.match(text)
        if name and "extra" not in marker and normal(name[0]) in found:
            yield _url(found[normal(name[0])])


def main() -> None:
    """Print the bill of this interpreter's environment."""
    json.dump(bill(distributions()), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
