"""A user's own data set, loss, metric and optimizer: what they may be, each way one can fail."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT
from torch import Tensor, nn
from torch.nn import functional

from harness import own
from harness.cli import main
from harness.config import dump_config, load_config
from harness.criterion import Criterion
from harness.data.datasets import CPU
from harness.data.own import load
from harness.data_sizes import train_size
from harness.errors import ConfigError, DataError, HarnessError
from harness.optimizer import build_optimizer, check_state, set_rates, take_step
from harness.provenance import changed_files
from harness.schema import Config, Data, Train
from harness.units import Duration

EXAMPLE = ROOT / "examples" / "own" / "own.yaml"
DEMO = ROOT / "configs" / "adabatch-digits.yaml"
SHORT = (
    *("train.duration=3up", "train.eval_every=null", "train.checkpoint_every=null"),
    *("train.tensorboard=false", "ranks.threads=1", "profile.enabled=false", "lr.warmup=null"),
)
THREE = {"train": 3, "test": 3}
MINE = '''
import random

import numpy as np
import torch
from PIL import Image
from torch.nn import functional


class Noise:
    """Images that all three global generators have a part in."""
    classes = ["a", "b", "c"]

    def __init__(self, train, size=6):
        self.size = size if train else 4
        self.offset = float(torch.rand(()))

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = torch.rand(2, 4, 5) + self.offset + random.random() + float(np.random.rand())
        return image, index % 3


class Kinds:
    """Whatever the test has put here."""
    image, label, classes = None, 0, ["a", "b"]

    def __init__(self, split):
        assert split in ("train", "test")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return type(self).image, type(self).label


class Uneven(Kinds):
    def __getitem__(self, index):
        return torch.zeros(1, 2, 2 + index), 0


class Labelled(Kinds):
    def __getitem__(self, index):
        return torch.zeros(1, 2, 2), index


class Falls(Kinds):
    def __getitem__(self, index):
        raise RuntimeError("no such picture")


class Triple(Kinds):
    def __getitem__(self, index):
        return torch.zeros(1, 2, 2), 0, 0


class NoClasses(Kinds):
    classes = None


def neither():
    return Noise(True)


def rooted(train, root):
    return Noise(train)


def iterates(train):
    return iter([1])


def explodes(train):
    raise OSError("disk on fire")


def mean_loss(logits, targets):
    return functional.cross_entropy(logits, targets)


def each_loss(logits, targets, weight=1.0):
    return weight * functional.cross_entropy(logits, targets, reduction="none")


def float_loss(logits, targets):
    return 1.5


def detached(logits, targets):
    return functional.cross_entropy(logits.detach(), targets)


class Leaver(torch.nn.Linear):
    def __init__(self):
        super().__init__(784, 10)

    def forward(self, images):
        if len(images) > 2:
            raise SystemExit(0)
        return super().forward(images.flatten(1))


def leaves(logits, targets):
    raise SystemExit(0)


def narrow(logits):
    return logits.sum()


def wrong(logits, targets):
    return logits @ targets


def right(logits, targets):
    return logits.argmax(dim=1) == targets


def hinge(logits, targets, margin=1.0):
    raise ValueError("never asked")


class Plain(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad)
                p.sub_(group["lr"] * v)


class Rateless(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {})


def forgetful(params, lr):
    return torch.optim.SGD(params[0]["params"][:1], lr)


def no_rate(params):
    return None


def no_optimizer(params, lr):
    return params


class Stumbles(Plain):
    def step(self, closure=None):
        raise RuntimeError("closure needed")
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "ownmine.py").write_text(MINE, encoding="utf-8")
    (folder / "ownquits.py").write_text("import sys\nsys.exit(0)\n", encoding="utf-8")
    (folder / "ownbroken.py").write_text("import os\nraise KeyError('x')\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    own.look_in(str(folder))
    yield folder
    for name in ("ownmine", "ownbroken", "ownquits", "ownhelper"):
        sys.modules.pop(name, None)


def line_of(text: str) -> int:
    return MINE.split("\n").index(text) + 1


# ---- data ---------------------------------------------------------------------------------------


def own_data(name: str, train: int = 6, test: int = 4, **more: Any) -> Data:
    return Data.model_validate(
        {"dataset": f"ownmine:{name}", "sizes": {"train": train, "test": test}} | more
    )


@pytest.mark.usefixtures("mine")
def test_a_sample_is_a_function_of_seed_epoch_and_number() -> None:
    torch.manual_seed(1)
    data = load(own_data("Noise"))
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    states = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)

    def images(samples: list[int], epochs: list[int], seed: int = 0) -> Tensor:
        asked = np.array(samples), np.array(epochs)
        return data.train.request(*asked, seed, True, CPU).take().images

    together = images([0, 3, 5, 3], [0, 0, 2, 1])
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == states
    alone = [images([sample], [epoch]) for sample, epoch in ((0, 0), (3, 0), (5, 2), (3, 1))]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[1], together[3])  # another epoch
    assert not torch.equal(together[0], images([0], [0], seed=1)[0])
    torch.manual_seed(2)
    again = load(own_data("Noise"))  # drawn when it is made, on a rank in another state
    assert again.train.items.offset == data.train.items.offset  # type: ignore[attr-defined]
    assert (data.num_classes, data.shape, len(data.train), len(data.test)) == (3, (2, 4, 5), 6, 4)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.full((2, 3), 255, np.uint8), torch.ones(1, 2, 3)),
        (np.full((2, 3, 4), 51, np.uint8), torch.full((4, 2, 3), 0.2)),
        (np.full((2, 3, 1), -1.5), torch.full((1, 2, 3), -1.5)),
        (torch.full((3, 2, 2), 51, dtype=torch.uint8), torch.full((3, 2, 2), 0.2)),
        (torch.full((1, 2, 2), 3.0, dtype=torch.float64), torch.full((1, 2, 2), 3.0)),
        (Image.new("L", (3, 2), 51), torch.full((1, 2, 3), 0.2)),
        (
            Image.new("RGB", (3, 2), (0, 255, 0)),
            torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 2, 3),
        ),
        (Image.new("P", (3, 2), 0), torch.zeros(3, 2, 3)),
    ],
)
@pytest.mark.usefixtures("mine")
def test_images_come_in_many_kinds(image: Any, expected: Tensor) -> None:
    kinds = own.find("data.dataset", "ownmine:Kinds")
    kinds.image, kinds.label = image, np.int64(1)  # type: ignore[attr-defined]
    data = load(own_data("Kinds", 3, 3))
    batch = data.test.request(np.arange(2), np.zeros(2, np.int64), 0, False, CPU).take()
    assert torch.equal(batch.images[1], expected)
    assert batch.images.dtype == torch.float32
    assert batch.labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (torch.zeros(2, 2), 0, r"must have shape \(C, H, W\).*not \(2, 2\)"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), 0, "must be uint8 or of floats, not int64"),
        (np.zeros((2, 2), np.bool_), 0, "must be uint8 or of floats, not bool"),
        ("picture.png", 0, "must be a tensor, PIL image or array, not str 'picture.png'"),
        (torch.zeros(1, 2, 2), "cat", "label must be a whole number, not str 'cat'"),
        (torch.zeros(1, 2, 2), 1.0, r"label must be a whole number, not float 1\.0"),
        (torch.zeros(1, 2, 2), True, "label must be a whole number, not bool"),
        (torch.zeros(1, 2, 2), torch.zeros(2), "label must be a whole number, not Tensor float32"),
        (torch.zeros(1, 2, 2), 2, "has the label 2; 2 classes have labels 0 to 1"),
        (torch.zeros(1, 2, 2), -1, "has the label -1"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_a_sample_that_is_none_is_named(image: Any, label: Any, message: str) -> None:
    kinds = own.find("data.dataset", "ownmine:Kinds")
    kinds.image, kinds.label = image, label  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=rf"ownmine:Kinds: sample 0 of its train split.*{message}"
    ):
        load(own_data("Kinds", 3, 3))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("neither", {}, r'must take train=True and train=False, or split="train".*takes \(nothing'),
        ("rooted", {}, "it takes root=; set data.root"),
        ("Noise", {"root": "/data"}, "does not take root="),
        ("Noise", {"options": {"width": 3}}, r"ownmine:Noise has no option width; valid are: size"),
        ("Noise", {"options": {"train": True}}, "train of ownmine:Noise comes from the harness"),
        ("iterates", {}, "must return a map-style data set.*list_iterator"),
        ("explodes", {}, r"raised OSError: disk on fire \(.*ownmine\.py, line \d+\)"),
        (
            "Falls",
            {"sizes": THREE},
            r"sample 0 of its train split raised RuntimeError: no such picture \(.*ownmine",
        ),
        ("Triple", {"sizes": THREE}, "must be .*, but is tuple of 3"),
        ("NoClasses", {"sizes": THREE}, "set data.classes to the number of classes"),
        ("nothing", {}, "has no 'nothing'"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_a_data_set_that_cannot_be_taken_is_refused(
    name: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(own_data(name, **more))


@pytest.mark.usefixtures("mine")
def test_the_line_named_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(own_data("explodes"))
    line = line_of('    raise OSError("disk on fire")')
    assert str(caught.value).endswith(f"({tmp_path / 'mine' / 'ownmine.py'}, line {line})")


@pytest.mark.usefixtures("mine")
def test_sizes_that_are_not_the_data_sets_are_answered_with_the_right_ones() -> None:
    with pytest.raises(DataError, match=r"data\.sizes\.train = 7, but .* set data\.sizes\.train=6"):
        load(own_data("Noise", train=7))
    with pytest.raises(DataError, match=r"set data\.sizes\.test=4"):
        load(own_data("Noise", test=5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Uneven", r"sample 2 .*has shape \(1, 2, 4\), and the first one \(1, 2, 2\)"),
        ("Labelled", "sample 2 .*has the label 2"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_a_later_sample_that_does_not_fit_is_named(name: str, message: str) -> None:
    data = load(own_data(name, 3, 3))
    asked = data.train.request(np.array([0, 2]), np.zeros(2, np.int64), 0, True, CPU)
    with pytest.raises(ConfigError, match=message):
        asked.take()


def test_a_plan_takes_the_sizes_that_are_written_down() -> None:
    assert train_size(own_data("imported_nowhere", train=12)) == 12
    assert main(["plan", str(EXAMPLE)]) == 0
    assert "parts" not in sys.modules


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.sizes=null",), "data.sizes is needed for data.dataset = parts:Digits"),
        (("data.sizes={train: 0}",), "data.sizes.train: must be at least 1"),
        (("data.cutout=2",), "data.cutout = 2 has no meaning"),
        (("data.workers=2",), "data.workers = 2 has no meaning"),
        (('data.dataset="parts:"',), "data.dataset 'parts:': write package.module:callable"),
        (("data.dataset=digits", "data.options={}"), "data.sizes = .* has no meaning .*your own"),
        (("data.dataset=digits", "data.sizes=null"), "data.options has no meaning for .* digits"),
        (("train.loss=mse",), "train.loss = mse is not known; valid: cross_entropy, or your own"),
        (("train.loss=a:b", "train.loss_reduction=null"), "train.loss_reduction is needed"),
        (("train.loss=cross_entropy",), "train.loss_reduction belongs to a loss of your own"),
        (("train.label_smoothing=0.1",), "train.label_smoothing = 0.1 belongs to"),
        (("train.metric=accuracy",), "train.metric 'accuracy': write package.module:callable"),
        (("train.metric=null", "train.metric_options={a: 1}"), "train.metric_options belongs"),
        (("optimizer.options={lr: 1}",), "lr is a key of its own"),
        (("optimizer.trust_coefficient=1.0",), "belongs to optimizer.name = lars"),
    ],
)
def test_settings_that_contradict_each_other(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(EXAMPLE, overrides)


def test_a_copy_of_the_configuration_finds_the_code(tmp_path: Path) -> None:
    config = load_config(EXAMPLE)
    assert config.code == str(EXAMPLE.parent)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config
    assert load_config(EXAMPLE, ["code=../.."]).code == str(EXAMPLE.parent / "../..")
    assert load_config(DEMO).code is None


# ---- loss and metric ----------------------------------------------------------------------------


def criterion(**settings: Any) -> Criterion:
    return Criterion(Train(duration=Duration.parse("1up"), **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "ownmine:mean_loss", "loss_reduction": "mean"},
        {"loss": "ownmine:each_loss", "loss_reduction": "none"},
        {"loss": "torch.nn:CrossEntropyLoss", "loss_reduction": "mean"},
        {
            "loss": "torch.nn.functional:cross_entropy",
            "loss_reduction": "sum",
            "loss_options": {"reduction": "sum"},
        },
    ],
)
@pytest.mark.usefixtures("mine")
def test_every_reduction_becomes_a_sum_over_samples(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 4, generator=generator, requires_grad=True)
    labels = torch.arange(7) % 4
    chosen, builtin = criterion(**settings), criterion()
    (ours,) = torch.autograd.grad(chosen.loss(logits, labels), logits)
    (theirs,) = torch.autograd.grad(builtin.loss(logits, labels), logits)
    torch.testing.assert_close(ours, theirs)
    losses = [float(one.losses(logits.detach(), labels)) for one in (chosen, builtin)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    empty = chosen.loss(logits[:0], labels[:0])
    assert float(empty.detach()) == 0.0
    assert empty.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ownmine:float_loss"}, "must return one number.*as a tensor, not float"),
        ({"loss": "ownmine:each_loss"}, r"shape \(\) for these samples, not \(2,\)"),
        ({"loss": "ownmine:mean_loss", "loss_reduction": "none"}, r"shape \(2,\) .*not \(\)"),
        ({"loss": "ownmine:detached"}, "does not depend on the logits"),
        ({"loss": "ownmine:narrow"}, r"calling it raised TypeError: narrow\(\) takes 1"),
        ({"loss": "ownmine:wrong"}, r"raised RuntimeError: .*\(.*ownmine\.py, line \d+\)"),
        (
            {"loss": "ownmine:hinge", "loss_options": {"gap": 1}},
            "no option gap; valid are: .*margin",
        ),
        ({"loss": "ownmine:gone"}, "has no 'gone'"),
        (
            {"loss": "ownbroken:x"},
            r"importing ownbroken raised KeyError: 'x' \(.*broken\.py, line 2\)",
        ),
        (
            {"loss": "ownquits:x"},
            r"importing ownquits raised SystemExit: 0 \(.*quits\.py, line 2\)",
        ),
        ({"loss": "ownmine:leaves"}, r"calling it raised SystemExit: 0 \(.*ownmine\.py, line"),
        (
            {"loss": "ownnowhere:x"},
            "there is no module ownnowhere, neither installed nor in .*mine",
        ),
        ({"metric": "ownmine:mean_loss"}, r"a value for each sample: shape \(2,\).*not \(\)"),
        ({"metric": "ownmine:float_loss"}, "must return a value for each sample.*not float"),
        ({"metric": "torch:pi"}, "pi is not callable, but float"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_a_loss_or_metric_that_is_none_is_refused(settings: dict[str, Any], message: str) -> None:
    if "loss" in settings:
        settings = {"loss_reduction": "mean", **settings}
    with pytest.raises(ConfigError, match=message):
        criterion(**settings).try_on(3, CPU)


@pytest.mark.usefixtures("mine")
def test_a_metric_is_summed_over_samples_and_counts_booleans() -> None:
    logits = torch.eye(3)[[0, 1, 2, 2]]
    labels = torch.tensor([0, 1, 2, 0])
    assert float(criterion(metric="ownmine:right").metrics(logits, labels)) == 3.0
    assert float(criterion().metrics(logits, labels)) == 0.0


# ---- optimizer ----------------------------------------------------------------------------------


def with_optimizer(**settings: Any) -> Config:
    return Config.model_validate(
        {
            "name": "t",
            "data": {"dataset": "digits"},
            "model": {"name": "lenet5"},
            "batch": {"initial": 32},
            "lr": {"base": 0.1},
            "train": {"duration": Duration.parse("1ep")},
            "optimizer": settings,
        }
    )


def two_steps(settings: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = build_optimizer(model, with_optimizer(**settings))
    images = torch.randn(8, 5)
    for lr in (0.1, 0.05):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), torch.arange(8) % 3).backward()  # type: ignore[no-untyped-call]
        set_rates(optimizer, lr, 0.8)
        take_step(optimizer, settings["name"])
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        ({"name": "ownmine:Plain"}, {"name": "sgd"}),
        (
            {"name": "torch.optim:SGD", "weight_decay": 0.1, "nesterov": True, "decay_1d": False},
            {"name": "sgd", "weight_decay": 0.1, "nesterov": True, "decay_1d": False},
        ),
        (
            {"name": "torch.optim:Adam", "options": {"betas": [0.8, 0.9]}},
            {"name": "adam", "options": {"betas": [0.8, 0.9]}},
        ),
        ({"name": "harness.lars:LARS", "nesterov": True}, {"name": "lars", "nesterov": True}),
    ],
)
@pytest.mark.usefixtures("mine")
def test_an_own_optimizer_follows_the_schedule_like_the_builtin_one(
    ours: dict[str, Any], builtin: dict[str, Any]
) -> None:
    for one, other in zip(two_steps(ours), two_steps(builtin), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ownmine:Rateless"}, "its groups have no `lr`"),
        ({"name": "ownmine:forgetful"}, "must hold the parameters that it is given, all of them"),
        ({"name": "ownmine:no_rate"}, "it must take lr="),
        ({"name": "ownmine:no_optimizer"}, r"must return a torch\.optim\.Optimizer.*list"),
        ({"name": "ownmine:Plain", "weight_decay": 0.1}, "weight_decay = 0.1: .* does not take it"),
        ({"name": "ownmine:Plain", "options": {"k": 1}}, "no option k; valid are: params"),
        ({"name": "ownmine:Stumbles"}, r"its step\(\) raised RuntimeError: closure.*ownmine\.py"),
        ({"name": "torch.optim:SGD", "options": {"dampening": "a"}}, "SGD.* raised"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_an_optimizer_that_cannot_train_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        two_steps(settings)


def test_a_state_that_no_checkpoint_can_hold_is_refused_when_it_is_saved() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_state(optimizer, "a:b")
    optimizer.state[model.weight]["seen"] = np.zeros(2)
    with pytest.raises(ConfigError, match=r"optimizer\.name a:b: its state has a ndarray"):
        check_state(optimizer, "a:b")
    check_state(optimizer, "sgd")


# ---- a whole run --------------------------------------------------------------------------------


def run(config: Path, directory: Path, *overrides: str) -> dict[str, Any]:
    assert main(["train", str(config), *SHORT, *overrides, "--run-dir", str(directory)]) == 0
    newest = max((directory / "checkpoints").glob("*.pt"))
    state: dict[str, Any] = torch.load(newest, weights_only=True)
    return state


def test_the_builtin_loss_under_its_own_name_gives_the_same_weights_to_the_bit(
    tmp_path: Path,
) -> None:
    named = (
        *("train.loss=torch.nn.functional:cross_entropy", "train.loss_reduction=sum"),
        "train.loss_options={reduction: sum}",
    )
    builtin, ours = run(DEMO, tmp_path / "a"), run(DEMO, tmp_path / "b", *named)
    for key, tensor in builtin["model"].items():
        assert torch.equal(tensor, ours["model"][key]), key
    assert builtin["evaluation"]["loss"] == pytest.approx(ours["evaluation"]["loss"])


def test_a_changed_file_is_named_when_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "ownhelper.py").write_text("WIDTH = 8\n", encoding="utf-8")
    (tmp_path / "ownmodel.py").write_text(
        "from torch import nn\nimport ownhelper\n\n\ndef net(num_classes):\n"
        "    hidden = nn.Linear(784, ownhelper.WIDTH)\n"
        "    return nn.Sequential(nn.Flatten(), hidden, nn.Linear(8, num_classes))\n",
        encoding="utf-8",
    )
    config = tmp_path / "run.yaml"
    config.write_text(f"extends: {DEMO}\nmodel: {{name: 'ownmodel:net'}}\n", encoding="utf-8")
    directory = tmp_path / "run"
    try:
        run(config, directory)
        again = ["train", str(directory / "config.yaml"), "--run-dir", str(directory), "--resume"]
        assert main(again) == 0
        assert "has changed" not in capsys.readouterr().out
        (tmp_path / "ownhelper.py").write_text("WIDTH = 8  # more\n", encoding="utf-8")
        assert main(again) == 0
    finally:
        for name in ("ownmodel", "ownhelper"):
            sys.modules.pop(name, None)
    told = [line for line in capsys.readouterr().out.splitlines() if "has changed" in line]
    assert len(told) == 1
    assert str(tmp_path / "ownhelper.py") in told[0]
    assert "own_model" not in told[0]


def test_only_files_that_both_attempts_know_can_have_changed() -> None:
    first = {"own": {"/a.py": {"sha256": "1"}, "/b.py": {"sha256": "2"}}}
    now = {"own": {"/a.py": {"sha256": "9"}, "/c.py": {"sha256": "3"}}}
    assert changed_files(first, now) == ["/a.py"]
    assert changed_files({**first, "attempts": [now]}, now) == []
    assert changed_files({}, now) == changed_files(first, {}) == []
    assert changed_files({"own": 3}, now) == []


def test_a_loss_that_fails_leaves_no_run_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mine: Path
) -> None:
    directory = tmp_path / "run"
    settings = (f"code={mine}", "train.loss=ownmine:float_loss", "train.loss_reduction=mean")
    assert main(["train", str(DEMO), *settings, "--run-dir", str(directory)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "train.loss ownmine:float_loss: must return one number" in said
    assert not directory.exists()


def test_errors_of_the_harness_and_lack_of_memory_are_no_fault_of_the_user() -> None:
    for error in (HarnessError("x"), MemoryError(), torch.OutOfMemoryError("cuda")):
        with pytest.raises(type(error)), own.calling("model.name", "a:b", "calling it"):
            raise error


@pytest.mark.slow
@pytest.mark.usefixtures("mine")
def test_a_model_that_calls_exit_as_it_trains_has_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model.name=ownmine:Leaver", "model.options={}", "comm.backend=solo", "ranks.start=1"]
    config = str(ROOT / "configs" / "adabatch-digits.yaml")
    assert main(["train", config, *words, "--run-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "a part of the run called sys.exit(0)" in said
    assert "ownmine.py, line " in said
    assert "Traceback" not in said
