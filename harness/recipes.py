"""The recipes that come with the harness: configs/ of a checkout, harness/configs of a wheel."""

from __future__ import annotations

import re
import shutil
from itertools import takewhile
from pathlib import Path

from harness.errors import UsageError
from harness.yamlfile import one_line, read_yaml

_PACKAGE = Path(__file__).resolve().parent
_SUFFIX = ".yaml"


def folder() -> Path:
    """Where the recipes lie."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def recipes() -> dict[str, Path]:
    """Every recipe by its name, such as ``adabatch/cifar10-vgg19-adaptive``; what recipes only
    build on (``_base.yaml``) is none."""
    root = folder()
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob(f"*{_SUFFIX}"))
        if not path.name.startswith("_")
    }


def find(name: str) -> Path:
    """The file of a recipe. Raises UsageError, with what is like it, if there is none."""
    known = recipes()
    asked = name.removeprefix("configs/").removesuffix(_SUFFIX)
    if asked in known:
        return known[asked]
    like = [one for one in known if asked and asked.lower() in one.lower()][:8]
    hint = f"like it: {', '.join(like)}" if like else "`harness recipes` lists them"
    raise UsageError(f"no recipe is called {one_line(name)}; {hint}")


def title(path: Path) -> str:
    """The first sentence of the comment that it begins with, in one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(_is_comment, lines))
    return one_line(re.split(r"\.(?: |$)", comment)[0], 100)


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def listing() -> str:
    """All recipes with their titles, a line each."""
    known = recipes()
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:<{width}}  {title(path)}".rstrip() for name, path in known.items())


def copy(name: str | None, target: Path) -> list[Path]:
    """Copy a recipe with all that it extends, or every file, into a folder laid out as ours.

    Raises UsageError, before anything is written, if a file is there already.
    """
    root = folder()
    sources = _with_bases(find(name)) if name else sorted(root.rglob(f"*{_SUFFIX}"))
    pairs = [(path, target / path.relative_to(root)) for path in sources]
    if there := [new for _, new in pairs if new.exists()]:
        raise UsageError(f"{there[0]} is there already; nothing was copied")
    for path, new in pairs:
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, new)
    return [new for _, new in pairs]


def _with_bases(path: Path) -> list[Path]:
    """A recipe and the files that it extends, and those that they extend."""
    data = read_yaml(path).data
    bases = data.get("extends") or [] if isinstance(data, dict) else []
    names = bases if isinstance(bases, list) else [bases]
    found = {path: None}
    for name in names:
        found |= dict.fromkeys(_with_bases((path.parent / name).resolve()))
    return list(found)
