"""Models by name, and a user's own as ``package.module:callable``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import nn

from harness.errors import ConfigError
from harness.models.lenet5 import LeNet5
from harness.models.torchvision_ops import import_tolerantly

Shape = tuple[int, int, int]

MODELS: dict[str, Callable[[int, Shape], nn.Module]] = {
    "lenet5": LeNet5,
}
"""name -> factory of (number of classes, (C, H, W))."""


def build_model(name: str, num_classes: int, shape: Shape, seed: int) -> nn.Module:
    """A model with the initial weights of ``seed``, on the CPU: the same on every rank.

    Args:
        name: one of MODELS, or ``package.module:callable``, importable also from the current
            directory; called with ``num_classes=`` if its signature takes that.
        num_classes: at least 1.
        shape: (C, H, W) of one image.
        seed: of torch's CPU generator while the model is built; its state before is restored.

    Raises:
        ConfigError: no such model, or it cannot be built for these images.
    """
    if num_classes < 1:
        raise ConfigError(f"a model needs at least 1 class, not {num_classes}")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the GPUs' generators and leave them so.
        torch.default_generator.manual_seed(seed % 2**63)
        if ":" in name:
            model = _build_custom(name, num_classes)
        else:
            model = _known(name)(num_classes, shape)
    _check_trainable(name, model)
    return model


def _check_trainable(name: str, model: nn.Module) -> None:
    trainable = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError(f"model.name {name}: it has no trainable parameters")
    for key, parameter in trainable:
        if isinstance(parameter, nn.UninitializedParameter):
            raise ConfigError(f"model.name {name}: {key} is lazy; give it its size")
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"model.name {name}: parameter {key} is {parameter.dtype}; "
                "only torch.float32 is supported"
            )


def _known(name: str) -> Callable[[int, Shape], nn.Module]:
    if name in MODELS:
        return MODELS[name]
    close = get_close_matches(name, MODELS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(
        f"model.name {name!r} is not known{hint}; valid: {', '.join(sorted(MODELS))}, or your own "
        "as package.module:callable"
    )


def _build_custom(name: str, num_classes: int) -> nn.Module:
    factory = _import(name)
    options = {"num_classes": num_classes} if _takes(factory, "num_classes") else {}
    try:
        model = factory(**options)
    except Exception as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ConfigError(
            f"model.name {name}: calling it with ({given}) raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.name {name}: must return a torch.nn.Module, but returned "
            f"{type(model).__name__}: {model!r:.80}"
        )
    return model


def _import(name: str) -> Callable[..., object]:
    """The callable that ``package.module:callable`` names."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ConfigError(f"model.name {name!r}: write package.module:callable")
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


def _takes(factory: Callable[..., object], keyword: str) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return False
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        or (parameter.name == keyword and parameter.kind in named)
        for parameter in parameters
    )
