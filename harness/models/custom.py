"""A user's own models, as ``package.module:callable``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping

from torch import nn

from harness.errors import ConfigError
from harness.models.torchvision_ops import import_tolerantly
from harness.yamlfile import one_line

FROM_DATA = ("num_classes", "shape")
"""Keyword arguments that the harness gives."""


def own_model(
    name: str, num_classes: int, shape: tuple[int, int, int], options: Mapping[str, object]
) -> nn.Module:
    """What the callable returns for ``options``, and for ``num_classes=`` and ``shape=`` if its
    signature has them; the former also if it takes any keyword.

    Raises:
        ConfigError: it is not there, does not take an option, raises, or returns no Module.
    """
    factory = _import(name)
    given = _from_data(factory, num_classes, shape)
    _check_options(name, factory, options)
    arguments = {**given, **options}
    try:
        model = factory(**arguments)
    except Exception as error:
        written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ConfigError(
            f"model.name {name}: calling it with ({written}) raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.name {name}: must return a torch.nn.Module, but returned "
            f"{type(model).__name__}: {model!r:.80}"
        )
    return model


def _from_data(
    factory: Callable[..., object], num_classes: int, shape: tuple[int, int, int]
) -> dict[str, object]:
    named, any_keyword = _keywords(factory)
    given: dict[str, object] = {}
    if "num_classes" in named or any_keyword:
        given["num_classes"] = num_classes
    if "shape" in named:
        given["shape"] = shape
    return given


def _check_options(
    name: str, factory: Callable[..., object], options: Mapping[str, object]
) -> None:
    named, any_keyword = _keywords(factory)
    for option in options:
        if option in FROM_DATA:
            raise ConfigError(f"model.options: {option} of {name} comes from the data")
        if option not in named and not any_keyword:
            valid = ", ".join(key for key in named if key not in FROM_DATA) or "none"
            raise ConfigError(
                f"model.options: {name} has no option {one_line(option, 40)}; valid are: {valid}"
            )


def _keywords(factory: Callable[..., object]) -> tuple[list[str], bool]:
    """Names of the keyword arguments of a callable, and whether it takes any other."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return [], False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return named, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _import(name: str) -> Callable[..., object]:
    """The callable that ``package.module:callable`` names."""
    module_name, _, attribute = name.partition(":")
    # A console script does not search the current directory. At the end, so that a file there
    # shadows no installed module; for good, because the model may import more when it runs.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_tolerantly(module_name)
    except Exception as error:
        raise _import_failed(name, module_name, error) from error
    try:
        found: object = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        where = getattr(module, "__file__", None) or "built in"
        raise ConfigError(
            f"model.name {name}: module {module_name} ({where}) has no {attribute!r}"
        ) from None
    if not callable(found):
        raise ConfigError(
            f"model.name {name}: {attribute} is not callable, but {type(found).__name__}"
        )
    return found


def _import_failed(name: str, module_name: str, error: Exception) -> ConfigError:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{module_name}.".startswith(f"{missing}."):
        return ConfigError(
            f"model.name {name}: there is no module {missing}, neither installed nor in "
            f"{os.getcwd()}"
        )
    return ConfigError(
        f"model.name {name}: importing {module_name} raised {type(error).__name__}: {error}"
    )
