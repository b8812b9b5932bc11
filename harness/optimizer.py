"""The optimizer that a configuration names, and the rates that change as it trains."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.lamb import LAMB
from harness.lars import LARS, PRESETS
from harness.optimizer_table import OPTIMIZERS, SHARED
from harness.own import calling, check_options, find, keywords, written
from harness.own_names import is_own
from harness.schema import LARS_ONLY, Config
from harness.schema import Optimizer as Settings

# Where torch's fused kernels are used: on ResNet-50 and one CPU thread they are several times as
# fast as foreach and as a loop. All else is torch's own choice, a loop on a CPU, foreach on a GPU.
_FUSED = {
    "sgd": ("cpu", "cuda"),
    "adam": ("cpu", "cuda"),
    "adamw": ("cpu", "cuda"),
    "adagrad": ("cpu",),
}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """An optimizer over all of a model's parameters.

    Raises ConfigError for a pattern in ``optimizer.skip`` that matches no parameter, and for what
    this version of torch does not have or take.
    """
    settings = config.optimizer
    named = dict(model.named_parameters())
    skipped = _matched(settings.skip, model)
    if settings.name == "lars":
        return _lars(_groups(named.values(), skipped, {"adapt": False}), config)
    if settings.name == "lamb":
        return _lamb(_groups(named.values(), skipped, {"adapt": False}), config)
    if settings.decay_1d is False:
        skipped |= {parameter for parameter in named.values() if parameter.dim() <= 1}
    if is_own(settings.name):
        return _own(_groups(named.values(), skipped, {"weight_decay": 0.0}), config)
    return _of_torch(_groups(named.values(), skipped, {"weight_decay": 0.0}), config)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Rate and momentum of the next step, of all groups; momentum only where there is one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "momentum" in group:
            group["momentum"] = momentum


def take_step(optimizer: torch.optim.Optimizer, name: str) -> None:
    """A step of the optimizer that is called ``name``; ConfigError if the user's own cannot."""
    if is_own(name):
        with calling("optimizer.name", name, "its step()"):
            optimizer.step()
    else:
        optimizer.step()


def _lars(groups: list[dict[str, Any]], config: Config) -> LARS:
    settings = config.optimizer
    options = dict(PRESETS[settings.preset]) if settings.preset else {}
    for name in (*LARS_ONLY, "adapt_1d"):
        value = getattr(settings, name)
        if value is not None:
            options[name] = value
    try:
        return LARS(
            groups,
            lr=config.lr.base,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
            **options,
        )
    except ValueError as error:  # two options that exclude each other, one of them from a preset
        raise ConfigError(f"optimizer.name lars: {error}") from None


def _lamb(groups: list[dict[str, Any]], config: Config) -> LAMB:
    settings = config.optimizer
    return LAMB(
        groups,
        lr=config.lr.base,
        weight_decay=settings.weight_decay,
        adapt_1d=bool(settings.adapt_1d),
        **_options(settings),
    )


def _of_torch(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    settings, choice = config.optimizer, OPTIMIZERS[config.optimizer.name]
    made = getattr(torch.optim, str(choice.torch_name), None)
    if made is None:
        raise ConfigError(
            f"optimizer.name {settings.name}: torch {torch.__version__} does not have it yet"
        )
    options = _options(settings)
    for name in ("momentum", "nesterov", "weight_decay"):
        if getattr(choice, name):
            options[name] = getattr(settings, name)
    if _fusible(settings.name, groups) and not options.get("dampening"):
        options["fused"] = True
    missing = [name for name in options if name not in signature(made).parameters]
    if missing:
        raise ConfigError(
            f"optimizer.options: {settings.name} of torch {torch.__version__} does not have "
            f"{', '.join(missing)} yet"
        )
    try:
        optimizer: torch.optim.Optimizer = made(groups, lr=config.lr.base, **options)
    except ValueError as error:
        raise ConfigError(f"optimizer.name {settings.name}: {error}") from None
    if settings.name == "sgd" and options.get("fused"):
        optimizer.register_step_pre_hook(_fill_momenta)
    return optimizer


def _own(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """The user's: it gets groups of parameters, ``lr``, what it takes of momentum, weight_decay and
    nesterov, and optimizer.options."""
    settings, key = config.optimizer, "optimizer.name"
    function = find(key, settings.name)
    named, any_keyword = keywords(function)
    arguments: dict[str, Any] = {"lr": config.lr.base}
    for name in ("momentum", "weight_decay", "nesterov"):
        value, default = getattr(settings, name), type(settings).model_fields[name].default
        if name in named:
            arguments[name] = value
        elif value != default:
            raise ConfigError(f"optimizer.{name} = {value}: {settings.name} does not take it")
    if "lr" not in named and not any_keyword:
        raise ConfigError(f"{key} {settings.name}: it must take lr=; lr.base is its first value")
    check_options("optimizer.options", settings.name, function, settings.options, SHARED)
    arguments |= _options(settings)
    with calling(key, settings.name, f"calling it with (groups, {written(arguments)})"):
        optimizer = function(groups, **arguments)
    return _checked(settings.name, optimizer, groups)


def _checked(name: str, optimizer: object, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """What the user's callable returned, if it can train these parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer.name {name}: must return a torch.optim.Optimizer, but returned "
            f"{type(optimizer).__name__}"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for group in groups for p in group["params"]}:
        raise ConfigError(
            f"optimizer.name {name}: it must hold the parameters that it is given, all of them"
        )
    if not all("lr" in group for group in optimizer.param_groups):
        raise ConfigError(
            f"optimizer.name {name}: its groups have no `lr`, which the schedule sets at each "
            "update; hand it to torch.optim.Optimizer as one of the defaults"
        )
    return optimizer


def _fill_momenta(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give a parameter whose first gradient comes late the momentum 0 that it has.

    torch's fused kernel for SGD takes all momenta of a group or none. Its own first step sets the
    momentum to the gradient, as a step from momentum 0 does without dampening.
    """
    for group in optimizer.param_groups:
        met = [parameter for parameter in group["params"] if parameter.grad is not None]
        held = sum("momentum_buffer" in optimizer.state.get(p, {}) for p in met)
        if group["momentum"] and 0 < held < len(met):
            for parameter in met:
                momentum = torch.zeros_like(parameter)
                optimizer.state[parameter].setdefault("momentum_buffer", momentum)


def _options(settings: Settings) -> dict[str, Any]:
    """``optimizer.options`` with the tuples that torch has for pairs."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.options.items()
    }


def _fusible(name: str, groups: list[dict[str, Any]]) -> bool:
    """Whether torch's fused kernel for this optimizer can take these parameters.

    The kernels walk through memory and heed no strides, so only what is contiguous is safe:
    gradients from the reducer's flat buffers always are.
    """
    return all(
        parameter.device.type in _FUSED.get(name, ()) and parameter.is_contiguous()
        for group in groups
        for parameter in group["params"]
    )


def _groups(
    parameters: Iterable[Tensor], skipped: set[Tensor], of_skipped: dict[str, Any]
) -> list[dict[str, Any]]:
    """Parameters as one group or, with what is skipped apart, two; never an empty one."""
    kept: list[Tensor] = []
    apart: list[Tensor] = []
    for parameter in parameters:
        (apart if parameter in skipped else kept).append(parameter)
    groups = [{"params": kept}, {"params": apart, **of_skipped}]
    return [group for group in groups if group["params"]]


def _matched(patterns: list[str], model: nn.Module) -> set[Tensor]:
    """The parameters that have a name, of several if they are shared, that a pattern matches."""
    named = list(model.named_parameters(remove_duplicate=False))
    matched: set[Tensor] = set()
    for pattern in patterns:
        found = {parameter for name, parameter in named if fnmatchcase(name, pattern)}
        if not found:
            close = ", ".join(_closest(pattern, [name for name, _ in named]))
            raise ConfigError(
                f"optimizer.skip: {pattern!r} matches no parameter of the model; close are: {close}"
            )
        matched |= found
    return matched


def _closest(pattern: str, names: list[str]) -> list[str]:
    """The three names nearest to a pattern, whole or in one of their parts."""
    core = pattern.strip("*?.")

    def likeness(name: str) -> float:
        return max(SequenceMatcher(None, core, part).ratio() for part in (name, *name.split(".")))

    return sorted(names, key=likeness, reverse=True)[:3]
