"""Optimizers by name: what each takes, what is skipped, rates, and states that go on bitwise."""

from __future__ import annotations

import inspect
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from harness.config import dump_config, load_config
from harness.errors import ConfigError
from harness.lamb import LAMB
from harness.lars import LARS, PRESETS
from harness.optimizer import build_optimizer, set_rates
from harness.optimizer_table import OPTIMIZERS, REFUSED, SHARED
from harness.schema import Config
from harness.schema import Optimizer as Settings

CHOSEN_BY_THE_HARNESS = {"foreach", "fused", "capturable", "differentiable", "maximize"}
NAMES = sorted(OPTIMIZERS)
OF_TORCH = [name for name in NAMES if OPTIMIZERS[name].torch_name]
MOMENTUM = [name for name in NAMES if OPTIMIZERS[name].momentum]

EXAMPLES: dict[str, dict[str, Any]] = {
    "sgd": {"dampening": 0.1},
    "lars": {},
    "lamb": {"betas": [0.8, 0.9], "eps": 1e-5, "bias_correction": False, "norm_bounds": [0, 10]},
    "adadelta": {"rho": 0.8, "eps": 1e-5},
    "adafactor": {"beta2_decay": -0.7, "eps": [None, 0.01], "d": 2.0},
    "adagrad": {"lr_decay": 0.01, "initial_accumulator_value": 0.1, "eps": 1e-8},
    "adam": {"betas": [0.8, 0.9], "eps": 1e-6, "amsgrad": True, "decoupled_weight_decay": True},
    "adamax": {"betas": [0.8, 0.9], "eps": 1e-6},
    "adamw": {"betas": [0.8, 0.9], "eps": 1e-6, "amsgrad": True},
    "asgd": {"lambd": 1e-3, "alpha": 0.8, "t0": 2},
    "nadam": {
        "betas": [0.8, 0.9],
        "eps": 1e-6,
        "momentum_decay": 0.01,
        "decoupled_weight_decay": True,
    },
    "radam": {"betas": [0.8, 0.9], "eps": 1e-6, "decoupled_weight_decay": True},
    "rmsprop": {"alpha": 0.9, "eps": 1e-6, "centered": True},
    "rprop": {"etas": [0.4, 1.3], "step_sizes": [1e-5, 10]},
}


class Net(nn.Module):
    """A convolution, batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.bn1(self.conv1(images)).relu().mean((2, 3)))
        return logits


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net()


def made(optimizer: dict[str, Any], **lr: Any) -> Config:
    return Config.model_validate(
        {
            "name": "one",
            "data": {"dataset": "digits"},
            "model": {"name": "lenet5"},
            "batch": {"initial": 8},
            "optimizer": optimizer,
            "lr": {"base": 0.01, **lr},
            "train": {"duration": "1ep"},
        }
    )


def refused(optimizer: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"optimizer") as caught:
        made(optimizer)
    return str(caught.value)


def train(model: Net, optimizer: torch.optim.Optimizer, steps: range, momentum: float) -> None:
    """A few steps on random images, with a rate and a momentum that change."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 2, 5, 5, generator=generator)
        labels = torch.randint(4, (6,), generator=generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        set_rates(optimizer, 0.01 * (1 + step), momentum * (1 - 0.1 * step))
        optimizer.step()


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------- the table


def test_every_optimizer_of_torch_is_offered_or_refused_with_a_reason() -> None:
    theirs = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and name != "Optimizer"
    }
    offered = {choice.torch_name for choice in OPTIMIZERS.values()} - {None}
    assert {name.lower() for name in theirs} == {str(name).lower() for name in offered} | set(
        REFUSED
    )
    assert offered <= theirs


@pytest.mark.parametrize("name", OF_TORCH)
def test_the_table_has_what_the_signature_has(name: str) -> None:
    choice = OPTIMIZERS[name]
    signature = inspect.signature(getattr(torch.optim, str(choice.torch_name)))
    names = set(signature.parameters) - {"params"} - CHOSEN_BY_THE_HARNESS
    assert names - set(SHARED) == set(choice.options)
    for shared in ("momentum", "nesterov", "weight_decay"):
        assert (shared in names) == getattr(choice, shared), shared


def test_the_table_has_what_lamb_has() -> None:
    names = set(inspect.signature(LAMB).parameters) - {"params", "lr", "weight_decay", "adapt_1d"}
    assert names == set(OPTIMIZERS["lamb"].options)


def test_the_schema_has_the_names_of_the_table() -> None:
    for name in OPTIMIZERS:
        assert Settings(name=name).name == name
    with pytest.raises(ValidationError, match=r"must be 'sgd', 'lars', .*your own as"):
        Settings(name="nosuch")


@pytest.mark.parametrize("name", OF_TORCH)
def test_the_defaults_of_torch_are_valid(name: str) -> None:
    signature = inspect.signature(getattr(torch.optim, str(OPTIMIZERS[name].torch_name)))
    for option, kind in OPTIMIZERS[name].options.items():
        assert kind.holds(signature.parameters[option].default), option


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", REFUSED)
def test_refused_names_say_why(name: str) -> None:
    assert f"optimizer.name = {name} cannot train here: it " in refused({"name": name})


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (
            {"name": "adamw", "options": {"beta": 0.9}},
            "optimizer.options: adamw has no option beta; valid are: betas, eps, amsgrad",
        ),
        ({"name": "lars", "options": {"eps": 1}}, "lars has no option eps; valid are: none"),
        ({"options": {"eps": 1e-8}}, "sgd has no option eps; valid are: dampening"),
        (
            {"name": "adamw", "options": {"weight_decay": 0.1}},
            "optimizer.options: weight_decay is a key of its own, optimizer.weight_decay",
        ),
        (
            {"name": "adamw", "options": {"betas": [0.9, 1.0]}},
            "optimizer.options: betas must be a list of two numbers of at least 0 and less than 1",
        ),
        ({"name": "adamw", "options": {"betas": 0.9}}, "must be a list of two numbers"),
        ({"name": "adamw", "options": {"eps": -1e-8}}, "eps must be a number of at least 0, not"),
        ({"name": "adamw", "options": {"eps": True}}, "eps must be a number of at least 0, not"),
        ({"name": "adamw", "options": {"eps": math.nan}}, "eps must be a number of at least 0"),
        ({"name": "adamw", "options": {"eps": 10**400}}, "eps must be a number of at least 0"),
        ({"name": "adamw", "options": {"amsgrad": 1}}, "amsgrad must be true or false, not 1"),
        ({"name": "lamb", "options": {"norm_bounds": [2, 1]}}, "norm_bounds must be null or a"),
        ({"name": "lamb", "options": {"eps": 0}}, "eps must be a number of at least 1e-30"),
        ({"name": "rprop", "options": {"etas": [1.2, 0.5]}}, "etas must be a list of a number"),
        (
            {"name": "adam", "momentum": 0.95},
            "optimizer.momentum = 0.95: adam has no momentum; its decay rates are "
            "optimizer.options.betas",
        ),
        ({"name": "adagrad", "momentum": 0.5}, "optimizer.momentum = 0.5: adagrad has no momentum"),
        (
            {"name": "adam", "momentum_scaling": "smith_le"},
            "optimizer.momentum_scaling = smith_le needs an optimizer with a momentum: sgd, lars, "
            "rmsprop; adam has none",
        ),
        ({"name": "lamb", "momentum_scaling": "smith_le"}, "lamb has none"),
        (
            {"name": "rmsprop", "nesterov": True},
            "optimizer.nesterov belongs to optimizer.name = sgd, lars, not rmsprop",
        ),
        ({"nesterov": True, "options": {"dampening": 0.5}}, "needs optimizer.options.dampening"),
        ({"name": "rprop", "weight_decay": 0.1}, "optimizer.weight_decay: rprop has no weight"),
        ({"name": "rprop", "skip": ["*"]}, "optimizer.skip: rprop has no weight decay"),
        ({"name": "adam", "eps": 1e-6}, "not adam; adam has optimizer.options.eps"),
        ({"preset": "larc"}, "optimizer.preset belongs to optimizer.name = lars, not sgd"),
        ({"name": "lamb", "clip": True}, "optimizer.clip belongs to optimizer.name = lars"),
        ({"adapt_1d": True}, "optimizer.adapt_1d belongs to optimizer.name = lars or lamb"),
        ({"name": "lars", "decay_1d": False}, "decay_1d does not belong to optimizer.name = lars"),
    ],
)
def test_refused_when_the_configuration_is_read(optimizer: dict[str, Any], said: str) -> None:
    assert said in refused(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_no_default_stands_in_the_way(name: str) -> None:
    settings = made({"name": name}).optimizer
    assert settings.momentum == (0.9 if name in MOMENTUM else 0.0)
    assert made({"name": name, "momentum": 0.9}).optimizer == settings
    assert made({"name": name, "momentum": 0}).optimizer.momentum == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_configuration_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = made({"name": name, "options": EXAMPLES[name]})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("options: [[betas]]", "optimizer.options: must be a mapping of options, not a list"),
        ("options: {eps: x}", "optimizer.options: eps must be a number"),
        ("skip: '*.bias'", "optimizer.skip: must be a list"),
        ("skip: ['']", "optimizer.skip.0: must be text of at least 1 character"),
        ("clip_grad_norm: 0", "optimizer.clip_grad_norm: must be more than 0"),
    ],
)
def test_the_files_line_is_named(text: str, said: str, tmp_path: Path) -> None:
    base = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
    path = tmp_path / "c.yaml"
    path.write_text(f"extends: {base}\noptimizer:\n  name: adam\n  {text}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"c.yaml:4: {said}" in str(caught.value)


# ------------------------------------------------------------------------------ what is built


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("with_options", [False, True])
def test_the_named_optimizer_with_its_options(name: str, with_options: bool) -> None:
    choice = OPTIMIZERS[name]
    raw: dict[str, Any] = {"name": name}
    if with_options:
        raw["options"] = EXAMPLES[name]
        assert set(EXAMPLES[name]) == set(choice.options), "an example of each option"
    if choice.weight_decay:
        raw["weight_decay"] = 0.02
    optimizer = build_optimizer(net(), made(raw))
    assert type(optimizer) is getattr(torch.optim, str(choice.torch_name))
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.01
    assert group.get("weight_decay", 0.02) == 0.02
    assert group.get("momentum") == (0.9 if choice.momentum else None)
    signature = inspect.signature(type(optimizer))
    given = raw.get("options", {})
    for option in choice.options:
        wanted = given.get(option, signature.parameters[option].default)
        assert group[option] == (tuple(wanted) if isinstance(wanted, list) else wanted), option


def test_lars_with_a_preset_and_a_key_of_its_own() -> None:
    raw = {"name": "lars", "preset": "larc", "trust_coefficient": 0.01, "weight_decay": 0.1}
    optimizer = build_optimizer(net(), made(raw))
    assert isinstance(optimizer, LARS)
    wanted = {**PRESETS["larc"], "trust_coefficient": 0.01, "weight_decay": 0.1, "lr": 0.01}
    assert optimizer.param_groups[0].items() >= wanted.items()


def test_options_of_lars_that_exclude_each_other() -> None:
    raw = {"name": "lars", "preset": "larc", "denominator": "decayed"}
    with pytest.raises(ValidationError, match=r"which optimizer\.preset = larc sets to false"):
        made(raw)
    with pytest.raises(ValidationError, match="which here sets to false"):
        made({"name": "lars", "denominator": "decayed", "decay_at_zero_norm": False})
    build_optimizer(net(), made(raw | {"decay_at_zero_norm": True}))
    with pytest.raises(ValueError, match="decay_at_zero_norm"):
        LARS(net().parameters(), 0.1, denominator="decayed", decay_at_zero_norm=False)


def test_lamb_with_its_options() -> None:
    raw = {"name": "lamb", "options": EXAMPLES["lamb"], "adapt_1d": True, "weight_decay": 0.1}
    optimizer = build_optimizer(net(), made(raw))
    assert isinstance(optimizer, LAMB)
    assert (
        optimizer.param_groups[0].items()
        >= {
            "betas": (0.8, 0.9),
            "eps": 1e-5,
            "bias_correction": False,
            "norm_bounds": (0, 10),
            "adapt_1d": True,
            "weight_decay": 0.1,
        }.items()
    )


def test_fused_kernels_are_not_given_what_they_would_misread() -> None:
    """They heed no strides; with a gradient laid out otherwise they would mix elements up."""
    assert build_optimizer(net(), made({})).param_groups[0]["fused"]
    laid_out_otherwise = net().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(laid_out_otherwise, made({"momentum": 0}))
    assert not optimizer.param_groups[0]["fused"]
    weight = laid_out_otherwise.conv1.weight
    weight.grad = torch.randn(weight.shape)
    wanted = weight.detach() - 0.01 * weight.grad
    optimizer.step()
    torch.testing.assert_close(weight.detach(), wanted)


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "sgd"])
def test_fused_steps_are_those_of_the_plain_loop(name: str) -> None:
    ours, theirs = net(), net()
    options = {key: value for key, value in EXAMPLES[name].items() if key != "dampening"}
    optimizer = build_optimizer(ours, made({"name": name, "weight_decay": 0.1, "options": options}))
    assert optimizer.param_groups[0]["fused"]
    group = dict(optimizer.param_groups[0], fused=None, foreach=False)
    known = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in group.items() if key in known and key != "params"}
    plain = type(optimizer)(theirs.parameters(), **options)
    train(ours, optimizer, range(4), 0.9)
    train(theirs, plain, range(4), 0.9)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not equal(ours, net())


def test_dampening_is_left_to_the_plain_loop() -> None:
    """The fused kernel's first step from momentum 0 would be dampened, torch's own is not."""
    optimizer = build_optimizer(net(), made({"name": "sgd", "options": {"dampening": 0.1}}))
    assert not optimizer.param_groups[0]["fused"]


# ----------------------------------------------------------------------------------- skip lists


def groups_by_name(model: Net, raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    optimizer = build_optimizer(model, made(raw))
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = {
        names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]
    }
    assert set(placed) == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    return placed


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize(
    ("keys", "undecayed"),
    [
        ({}, set()),
        ({"skip": ["*.bias"]}, {"bn1.bias", "fc.bias"}),
        ({"skip": ["bn*", "fc.bias"]}, {"bn1.weight", "bn1.bias", "fc.bias"}),
        ({"decay_1d": False}, {"bn1.weight", "bn1.bias", "fc.bias"}),
        ({"decay_1d": True, "skip": ["conv?.*"]}, {"conv1.weight"}),
        ({"skip": ["*"]}, {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"}),
    ],
)
def test_what_is_skipped_is_not_decayed(name: str, keys: Any, undecayed: set[str]) -> None:
    placed = groups_by_name(net(), {"name": name, "weight_decay": 0.1, **keys})
    for parameter, group in placed.items():
        assert group["weight_decay"] == (0.0 if parameter in undecayed else 0.1), parameter


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_what_is_skipped_is_neither_adapted_nor_decayed(name: str) -> None:
    raw = {"name": name, "weight_decay": 0.5, "skip": ["fc*"], "adapt_1d": True}
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # no norm of zero
            parameter.grad = torch.ones_like(parameter)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = build_optimizer(model, made(raw))
    optimizer.step()
    assert isinstance(optimizer, LARS | LAMB)
    trusts = {parameter: trust for parameter, _, _, trust in optimizer.layer_norms()}
    for key, parameter in model.named_parameters():
        assert (trusts[parameter] == 1.0) == key.startswith("fc"), key
        if key.startswith("fc"):
            torch.testing.assert_close(parameter.detach(), before[key] - 0.01)


def test_a_pattern_that_matches_nothing_names_what_is_close() -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(net(), made({"skip": ["*.bias", "*.bais"]}))
    message = str(caught.value)
    assert message.startswith("optimizer.skip: '*.bais' matches no parameter of the model; close")
    assert "fc.bias" in message


def test_a_shared_parameter_is_skipped_under_any_of_its_names() -> None:
    model = net()
    model.second = model.fc
    optimizer = build_optimizer(model, made({"weight_decay": 0.1, "skip": ["second.*"]}))
    (group,) = [group for group in optimizer.param_groups if group["weight_decay"] == 0.0]
    assert {id(parameter) for parameter in group["params"]} == {
        id(model.fc.weight),
        id(model.fc.bias),
    }


# ------------------------------------------------------------------------------ rates and states


@pytest.mark.parametrize("name", NAMES)
def test_rates_reach_every_group_and_add_no_momentum(name: str) -> None:
    raw = {"name": name} | ({} if name == "rprop" else {"skip": ["bn1.*"]})
    optimizer = build_optimizer(net(), made(raw))
    keys = [set(group) for group in optimizer.param_groups]
    set_rates(optimizer, 0.25, 0.75)
    assert [set(group) for group in optimizer.param_groups] == keys
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25
        assert group.get("momentum") == (0.75 if name in MOMENTUM else None)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_bitwise(name: str) -> None:
    raw: dict[str, Any] = {"name": name, "options": EXAMPLES[name]}
    if name != "rprop":
        raw |= {"weight_decay": 0.01, "skip": ["*.bias"]}
    config, whole, model = made(raw), net(), net()
    momentum = config.optimizer.momentum
    train(whole, build_optimizer(whole, config), range(6), momentum)

    optimizer = build_optimizer(model, config)
    train(model, optimizer, range(3), momentum)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net()
    optimizer = build_optimizer(again, config)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, range(3, 6), momentum)
    assert equal(again, whole)
    # ... which says something only where the state matters
    forgetful = net()
    forgetful.load_state_dict(saved["model"])
    train(forgetful, build_optimizer(forgetful, config), range(3, 6), momentum)
    assert not equal(forgetful, whole)
