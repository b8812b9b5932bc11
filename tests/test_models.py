"""Models by name and a user's own: initial weights, global state, and each way it can fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.errors import ConfigError
from harness.models import MODELS, build_model

MNIST = (1, 28, 28)


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_lenet5_is_the_published_size() -> None:
    model = build_model("lenet5", 10, MNIST, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 61_706
    assert model(torch.zeros(3, *MNIST)).shape == (3, 10)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 12, 12), (1, 13, 40), (2, 15, 12)])
def test_lenet5_fits_itself_to_the_images(shape: tuple[int, int, int]) -> None:
    model = build_model("lenet5", 7, shape, seed=0)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("shape", [(1, 11, 28), (1, 28, 11), (0, 28, 28)])
def test_lenet5_refuses_images_it_would_use_up(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="1 × 12 × 12"):
        build_model("lenet5", 10, shape, seed=0)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_depend_on_the_seed_and_on_nothing_else(name: str) -> None:
    torch.manual_seed(1)
    first = parameters(build_model(name, 10, MNIST, seed=5))
    torch.manual_seed(2)
    assert torch.equal(first, parameters(build_model(name, 10, MNIST, seed=5)))
    assert not torch.equal(first, parameters(build_model(name, 10, MNIST, seed=6)))


@pytest.mark.parametrize("seed", [0, -1, 2**64])
def test_building_leaves_the_global_generator_alone(seed: int) -> None:
    before = torch.random.get_rng_state()
    build_model("lenet5", 10, MNIST, seed)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_name_is_answered_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean lenet5\?.*valid: .*lenet5"):
        build_model("lenet-5", 10, MNIST, seed=0)
    with pytest.raises(ConfigError) as caught:
        build_model("zebra", 10, MNIST, seed=0)
    assert "did you mean" not in str(caught.value)


def test_no_classes() -> None:
    with pytest.raises(ConfigError, match="at least 1 class"):
        build_model("lenet5", 0, MNIST, seed=0)


# ---- a user's own -------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

class Net(nn.Linear):
    def __init__(self, num_classes):
        super().__init__(4, num_classes)

def fixed():
    return nn.Linear(4, 3)

def open_ended(**options):
    return nn.Linear(4, options["num_classes"])

def positional(num_classes=5, /):
    return nn.Linear(4, num_classes)

def fails(num_classes):
    raise RuntimeError("no weights for that")

def gives_class(num_classes):
    return Net

class Space:
    net = Net

number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory only; the path and the modules are put back after."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = tmp_path / "ownpackage"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(OWN)
    (package / "broken.py").write_text("def net(:\n")
    (package / "needy.py").write_text("import not_installed_anywhere\n")
    (package / "dies.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield "ownpackage.nets"
    for name in [name for name in sys.modules if name.startswith("ownpackage")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("attribute", "classes"),
    [("Net", 7), ("fixed", 3), ("open_ended", 7), ("positional", 5), ("Space.net", 7)],
)
def test_own_model_is_called_as_its_signature_allows(
    own_module: str, attribute: str, classes: int
) -> None:
    model = build_model(f"{own_module}:{attribute}", 7, MNIST, seed=0)
    assert model(torch.zeros(2, 4)).shape == (2, classes)


def test_own_model_is_seeded_too(own_module: str) -> None:
    before = torch.random.get_rng_state()
    models = [build_model(f"{own_module}:Net", 7, MNIST, seed) for seed in (3, 3, 4)]
    first, again, other = map(parameters, models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_installed_callable_is_found() -> None:
    """Also where torchvision's compiled operators do not load, as beside a CPU build of torch."""
    model = build_model("torchvision.models:squeezenet1_0", 7, MNIST, seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ownpackage.nets:", "write package.module:callable"),
        (":Net", "write package.module:callable"),
        (".nets:Net", "write package.module:callable"),
        ("nowhere.nets:Net", "no module nowhere,"),
        ("ownpackage.nothing:Net", r"no module ownpackage\.nothing,"),
        ("ownpackage.nets:Nett", r"nets\.py\) has no 'Nett'"),
        ("ownpackage.nets:number", "number is not callable, but int"),
        ("ownpackage.nets:fails", "RuntimeError: no weights for that"),
        ("ownpackage.nets:gives_class", "must return a torch.nn.Module, but returned type"),
        ("ownpackage.broken:net", "importing ownpackage.broken raised SyntaxError"),
        ("ownpackage.needy:net", "raised ModuleNotFoundError: .*not_installed_anywhere"),
        ("ownpackage.dies:net", "raised ZeroDivisionError"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_own_model_that_fails_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(name, 7, MNIST, seed=0)
    assert name in str(caught.value)


def test_a_failed_build_puts_the_generator_back(own_module: str) -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(ConfigError):
        build_model(f"{own_module}:fails", 7, MNIST, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_own_model_that_refuses_its_arguments_names_them() -> None:
    with pytest.raises(ConfigError, match=r"calling it with \(num_classes=7\) raised TypeError"):
        build_model("harness.models.lenet5:LeNet5", 7, MNIST, seed=0)
