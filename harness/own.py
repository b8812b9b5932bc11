"""A user's own parts of a run: found by ``package.module:callable``, called, and held to account.

What goes wrong in them ends as one message, a ConfigError, that names the key of the configuration,
the callable, and the line of the user's own file at which it went wrong.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.errors import ConfigError, HarnessError
from harness.torchvision_ops import import_tolerantly
from harness.yamlfile import one_line

_HERE = Path(__file__).resolve().parents[1]
_NOT_OWN = tuple(
    os.path.realpath(path)
    for path in {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *(str(_HERE / package) for package in ("harness", "launch")),
    }
)


def look_in(folder: str | None) -> None:
    """Have modules be found in a folder and in the current one, here and in what they import later.

    At the end of the path, so that a file there shadows no installed module.
    """
    for place in (folder, os.getcwd()):
        if place is not None and place not in sys.path:
            sys.path.append(place)


def find(key: str, name: str) -> Callable[..., Any]:
    """The callable that ``name`` stands for; ``key`` is where in the configuration it is named.

    Raises ConfigError if it is not there, is no callable, or its module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    look_in(None)  # a console script does not search the current directory
    try:
        module = import_tolerantly(module_name)
    except (Exception, SystemExit) as error:
        raise _import_failed(key, name, error) from error
    try:
        found: object = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        where = getattr(module, "__file__", None) or "built in"
        raise ConfigError(
            f"{key} {name}: module {module_name} ({where}) has no {attribute!r}"
        ) from None
    if not callable(found):
        raise ConfigError(f"{key} {name}: {attribute} is not callable, but {type(found).__name__}")
    return found


def _import_failed(key: str, name: str, error: BaseException) -> ConfigError:
    module_name = name.partition(":")[0]
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{module_name}.".startswith(f"{missing}."):
        places = ", ".join(place for place in sys.path if os.path.isdir(place) and _is_own(place))
        return ConfigError(
            f"{key} {name}: there is no module {missing}, neither installed nor in {places}"
        )
    return ConfigError(
        f"{key} {name}: importing {module_name} raised {type(error).__name__}: {error}{at(error)}"
    )


@contextmanager
def calling(key: str, name: str, doing: str) -> Iterator[None]:
    """Around a call of what is the user's: raises ConfigError for what it raises.

    Errors of the harness go through, and so does a lack of memory, which is not the user's. A
    sys.exit() in it is an error as any: the run is not done.
    """
    try:
        yield
    except (HarnessError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ConfigError(
            f"{key} {name}: {doing} raised {type(error).__name__}: {error}{at(error)}"
        ) from error


def keywords(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of the keyword arguments of a callable, and whether it takes any other."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return [], False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return named, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def check_options(
    key: str,
    name: str,
    function: Callable[..., Any],
    options: Iterable[str],
    given: Mapping[str, str],
) -> None:
    """Raise ConfigError for an option that the callable does not take, or that is ``given`` from
    elsewhere: argument -> where from. ``key``: that of the options."""
    named, any_keyword = keywords(function)
    for option in options:
        if option in given:
            raise ConfigError(f"{key}: {option} of {name} comes from {given[option]}")
        if option not in named and not any_keyword:
            valid = ", ".join(word for word in named if word not in given) or "none"
            raise ConfigError(
                f"{key}: {name} has no option {one_line(option, 40)}; valid are: {valid}"
            )


def written(arguments: Mapping[str, object]) -> str:
    """Keyword arguments as a call has them."""
    return ", ".join(f"{key}={value!r:.80}" for key, value in arguments.items())


def files(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The files that the run's own parts are made of: path -> SHA-256 and what is known of it.

    ``names``: key -> ``package.module:callable``, all of them imported. Beside their own files,
    those of all modules that have been imported from where the user's modules lie, as the helpers
    that they import do.
    """
    named = {name.partition(":")[0]: (key, name) for key, name in names.items()}
    found: dict[str, dict[str, str]] = {}
    for module_name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not (module_name in named or _is_own(path)):
            continue
        with suppress(OSError):
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            found[path] = {"sha256": digest}
            if module_name in named:
                key, name = named[module_name]
                found[path] |= {"key": key, "name": name}
    return found


def at(error: BaseException) -> str:
    """The user's own line that an error comes from, in words; empty if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.isabs(frame.filename) and _is_own(frame.filename):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _is_own(path: str) -> bool:
    """Whether a file is neither Python's, nor installed, nor the harness's."""
    real = os.path.realpath(path)
    return not real.startswith(tuple(f"{place}{os.sep}" for place in _NOT_OWN)) and (
        real not in _NOT_OWN and not real.endswith(".zip")
    )
