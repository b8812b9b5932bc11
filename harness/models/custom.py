"""A user's own models, as ``package.module:callable``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from harness.errors import ConfigError
from harness.own import calling, check_options, find, keywords, written

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
    factory = find("model.name", name)
    given = _from_data(factory, num_classes, shape)
    check_options("model.options", name, factory, options, dict.fromkeys(FROM_DATA, "the data"))
    arguments = {**given, **options}
    with calling("model.name", name, f"calling it with ({written(arguments)})"):
        model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.name {name}: must return a torch.nn.Module, but returned "
            f"{type(model).__name__}: {model!r:.80}"
        )
    return model


def _from_data(
    factory: Callable[..., object], num_classes: int, shape: tuple[int, int, int]
) -> dict[str, object]:
    named, any_keyword = keywords(factory)
    given: dict[str, object] = {}
    if "num_classes" in named or any_keyword:
        given["num_classes"] = num_classes
    if "shape" in named:
        given["shape"] = shape
    return given
