"""Which optimizers a configuration can name and what each one takes, without importing torch.

The names are torch.optim's classes in lower case, and ``lars`` and ``lamb``. Rate, momentum, weight
decay and Nesterov momentum are keys that all share; ``options`` are the rest, under torch's names
and with torch's defaults. Left out are ``maximize``, which would climb the loss, and how torch
carries a step out (foreach, fused, capturable, differentiable), which the harness chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.own_names import check_own, is_own
from harness.yamlfile import one_line, shown


@dataclass(frozen=True)
class Kind:
    """What the value of an option must be."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Choice:
    """One optimizer."""

    torch_name: str | None
    """Class in torch.optim; None: the harness's own."""
    options: Mapping[str, Kind] = field(default_factory=dict)
    momentum: bool = False
    nesterov: bool = False
    weight_decay: bool = True


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _pair(value: Any, first: Callable[[Any], bool], second: Callable[[Any], bool]) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and first(value[0])
        and (second(value[1]))
    )


_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_FRACTION = Kind("a number of at least 0 and less than 1", _fraction)
_AT_LEAST_0 = Kind("a number of at least 0", lambda value: _number(value) and value >= 0)
_AT_LEAST_1 = Kind("a number of at least 1", lambda value: _number(value) and value >= 1)
_SHARE = Kind("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
_MORE_THAN_0 = Kind("a number more than 0", _positive)
_AT_MOST_0 = Kind("a number of at most 0", lambda value: _number(value) and value <= 0)
_GUARD = Kind("a number of at least 1e-30", lambda value: _number(value) and value >= 1e-30)
_BETAS = Kind(
    "a list of two numbers of at least 0 and less than 1",
    lambda value: _pair(value, _fraction, _fraction),
)
_BOUNDS = Kind(
    "null or a list of two numbers, 0 ≤ first < second",
    lambda value: value is None or (_pair(value, _number, _number) and 0 <= value[0] < value[1]),
)
_ETAS = Kind(
    "a list of a number between 0 and 1 and one more than 1",
    lambda value: _pair(value, lambda x: _positive(x) and x < 1, lambda x: _number(x) and x > 1),
)
_STEP_SIZES = Kind(
    "a list of two numbers, 0 < first < second",
    lambda value: _pair(value, _positive, _positive) and value[0] < value[1],
)
_ADAFACTOR_EPS = Kind(
    "a list of null or a number more than 0, and a number more than 0",
    lambda value: _pair(value, lambda x: x is None or _positive(x), _positive),
)

_ADAM = {"betas": _BETAS, "eps": _AT_LEAST_0}
_DECOUPLED = {"decoupled_weight_decay": _FLAG}

OPTIMIZERS: Mapping[str, Choice] = {
    "sgd": Choice("SGD", {"dampening": _FRACTION}, momentum=True, nesterov=True),
    "lars": Choice(None, momentum=True, nesterov=True),
    "lamb": Choice(
        None,
        {"betas": _BETAS, "eps": _GUARD, "bias_correction": _FLAG, "norm_bounds": _BOUNDS},
    ),
    "adadelta": Choice("Adadelta", {"rho": _FRACTION, "eps": _AT_LEAST_0}),
    "adafactor": Choice(
        "Adafactor", {"beta2_decay": _AT_MOST_0, "eps": _ADAFACTOR_EPS, "d": _AT_LEAST_1}
    ),
    "adagrad": Choice(
        "Adagrad",
        {"lr_decay": _AT_LEAST_0, "initial_accumulator_value": _AT_LEAST_0, "eps": _AT_LEAST_0},
    ),
    "adam": Choice("Adam", _ADAM | {"amsgrad": _FLAG} | _DECOUPLED),
    "adamax": Choice("Adamax", _ADAM),
    "adamw": Choice("AdamW", _ADAM | {"amsgrad": _FLAG}),
    "asgd": Choice("ASGD", {"lambd": _SHARE, "alpha": _SHARE, "t0": _AT_LEAST_0}),
    "nadam": Choice("NAdam", _ADAM | {"momentum_decay": _AT_LEAST_0} | _DECOUPLED),
    "radam": Choice("RAdam", _ADAM | _DECOUPLED),
    "rmsprop": Choice(
        "RMSprop",
        {"alpha": _FRACTION, "eps": _AT_LEAST_0, "centered": _FLAG},
        momentum=True,
    ),
    "rprop": Choice("Rprop", {"etas": _ETAS, "step_sizes": _STEP_SIZES}, weight_decay=False),
}

REFUSED: Mapping[str, str] = {
    "lbfgs": "it evaluates the loss several times in one update, over a batch that is gone by then",
    "muon": "it takes matrices only, not the convolutions, biases and scales of an image model",
    "sparseadam": "it takes sparse gradients only, and those of an image model are dense",
}
"""torch.optim's optimizers that cannot train here, and why."""

SHARED = {
    "lr": "lr.base",
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "nesterov": "optimizer.nesterov",
}
"""What is no option, because it is a key of its own."""


OWN = Choice(None, momentum=True, nesterov=True)
"""A user's own, package.module:callable: what it takes is known where it is built."""


def choice_of(name: str) -> Choice:
    """What is known of an optimizer."""
    return OWN if is_own(name) else OPTIMIZERS[name]


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown name, and for what `check_options` does."""
    if is_own(name):
        check_own("optimizer.name", name)
        for option in options:
            _check_not_shared(option)
    elif name not in OPTIMIZERS:
        valid = ", ".join(repr(known) for known in OPTIMIZERS)
        raise ValueError(
            f"optimizer.name: must be {valid}, or your own as package.module:callable, not "
            f"{shown(name)}"
        )
    else:
        check_options(name, options)


def _check_not_shared(option: str) -> None:
    if option in SHARED:
        raise ValueError(f"optimizer.options: {option} is a key of its own, {SHARED[option]}")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the optimizer does not have, or a value out of range."""
    kinds = OPTIMIZERS[name].options
    for option, value in options.items():
        _check_not_shared(option)
        if option not in kinds:
            valid = ", ".join(kinds) or "none"
            shown_name = one_line(option, 40)
            raise ValueError(
                f"optimizer.options: {name} has no option {shown_name}; valid are: {valid}"
            )
        if not kinds[option].holds(value):
            raise ValueError(
                f"optimizer.options: {option} must be {kinds[option].words}, not {_shown(value)}"
            )


def _shown(value: Any) -> str:
    """A short list with its values, anything else as in other messages."""
    if isinstance(value, list) and 0 < len(value) <= 4:
        return f"[{', '.join(shown(item) for item in value)}]"
    return shown(value)
