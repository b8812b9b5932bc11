"""Models by name and a user's own: sizes, initial weights, global state, each way it can fail."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import ConfigError
from harness.model_table import ELSEWHERE, OWN, TORCHVISION, check_model, options_of
from harness.models import MODELS, build_model
from harness.torchvision_ops import import_tolerantly

Shape = tuple[int, int, int]
MNIST = (1, 28, 28)
CIFAR = (3, 32, 32)
IMAGENET = (3, 224, 224)
VECTOR = (1, 1, 4)

SMALL = [name for name in OWN if name.endswith("_cifar")]
SLOW = pytest.mark.slow
FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11", "vit_b_32",
    "wide_resnet50_2",
)  # fmt: skip
"""One of each of torchvision's."""
QUICK = {"alexnet", "mobilenet_v3_small", "resnet18", "squeezenet1_1", "vgg16_bn"}


def most_slow(names: Iterable[str]) -> list[object]:
    """The quick ones run always."""
    return [pytest.param(name, marks=() if name in QUICK else SLOW) for name in names]


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@cache
def torchvision_models() -> ModuleType:
    return import_tolerantly("torchvision.models")


@pytest.fixture
def shapes_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are built without values, in no time and no memory."""
    blocks = import_tolerantly("torchvision.models.regnet").BlockParams
    settings_of = blocks.from_init_params

    def with_values(**options: object) -> object:  # RegNet computes its widths with tensors
        with torch.device("cpu"):
            return settings_of(**options)

    monkeypatch.setattr(blocks, "from_init_params", with_values)
    with torch.device("meta"):
        yield


# ---- names --------------------------------------------------------------------------------------


def test_every_model_of_the_harness_is_in_the_table() -> None:
    assert set(OWN) == set(MODELS)
    assert not set(OWN) & set(TORCHVISION)


def test_the_table_has_the_classification_models_of_torchvision() -> None:
    models = torchvision_models()
    missing = set(models.list_models(module=models)) - set(TORCHVISION)
    assert not missing, f"add to harness.model_table.TORCHVISION: {sorted(missing)}"
    unknown = [name for name in TORCHVISION if not hasattr(models, name)]
    assert not unknown, f"torchvision has no {unknown}"
    assert len(set(TORCHVISION)) == len(TORCHVISION)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lenet-5", "lenet5"),
        ("ResNet50", "resnet50"),
        ("resnet_18", "resnet18"),
        ("vgg19_bn_cifr", "vgg19_bn_cifar"),
        ("alexnetbn", "alexnet_bn"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean [^)]*\b{hint}\b.*valid: lenet5, "):
        check_model(name)
    with pytest.raises(ConfigError, match=rf"{name}.*did you mean .*{hint}"):
        build_model(name, 10, MNIST, seed=0)


def test_a_name_like_no_other() -> None:
    with pytest.raises(ValueError, match="'zebra' is not known; valid: lenet5") as caught:
        check_model("zebra")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["a:b", "a.b:c.d", "my-file:net", *OWN, *TORCHVISION])
def test_names_that_can_be_meant(name: str) -> None:
    check_model(name)


@pytest.mark.parametrize("name", [":", "a:", ":b", ".a:b", "a..b:c", "a:b.", "a:b:c", "a: b"])
def test_a_callable_has_a_module_and_a_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"write package\.module:callable"):
        check_model(name)


def test_the_page_on_models_lists_the_own_ones() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    section = page.partition("## The harness's own")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(rows) == sorted(OWN)


# ---- sizes --------------------------------------------------------------------------------------


def basic_resnet(blocks: int) -> int:
    """He et al. 2016, section 4.2, with option A and 10 classes, layer by layer."""
    total = 3 * 3 * 3 * 16 + 2 * 16
    for before, width in ((16, 16), (16, 32), (32, 64)):
        total += 9 * before * width + (2 * blocks - 1) * 9 * width * width + 2 * blocks * 2 * width
    return total + 64 * 10 + 10


def vgg(convolutions: tuple[int, ...]) -> int:
    """Convolutions with bias, batch norm's scale and shift, one linear layer; 10 classes."""
    total, before = 0, 3
    for number, width in zip(convolutions, (64, 128, 256, 512, 512), strict=True):
        for _ in range(number):
            total += 9 * before * width + width + 2 * width
            before = width
    return total + 512 * 10 + 10


def alexnet(widths: tuple[int, ...], halved: tuple[int, ...]) -> int:
    """Convolutions without bias, batch norm, three linear layers; 1000 classes."""
    kernels = (11, 5, 3, 3, 3)
    ins = (3, *widths[:-1])
    total = sum(
        k * k * (i // h) * w + 2 * w
        for k, i, w, h in zip(kernels, ins, widths, halved, strict=True)
    )
    return total + (256 * 36 + 1) * 4096 + 4097 * 4096 + 4097 * 1000


PUBLISHED: list[tuple[str, Shape, int, int]] = [
    # LeCun et al. 1998, with full connections between the second and third layer
    ("lenet5", MNIST, 10, 61_706),
    # He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85, 1.7 million
    ("resnet20", CIFAR, 10, 269_722),
    ("resnet32", CIFAR, 10, 464_154),
    ("resnet44", CIFAR, 10, 658_586),
    ("resnet56", CIFAR, 10, 853_018),
    ("resnet110", CIFAR, 10, 1_727_962),
    # the usual CIFAR forms
    ("resnet18", CIFAR, 10, 11_173_962),
    ("resnet34", CIFAR, 10, 21_282_122),
    ("resnet34_cifar", IMAGENET, 10, 21_282_122),
    ("resnet50", CIFAR, 10, 23_520_842),
    ("resnet101", CIFAR, 10, 42_512_970),
    ("resnet152", CIFAR, 10, 58_156_618),
    ("vgg11_bn", CIFAR, 10, vgg((1, 1, 2, 2, 2))),
    ("vgg13_bn", CIFAR, 10, vgg((2, 2, 2, 2, 2))),
    ("vgg16_bn", CIFAR, 10, 14_728_266),
    ("vgg16_bn", CIFAR, 10, vgg((2, 2, 3, 3, 3))),
    ("vgg19_bn", CIFAR, 10, 20_040_522),
    ("vgg19_bn_cifar", (3, 65, 33), 10, vgg((2, 2, 4, 4, 4))),
    # torchvision's has biases of 1,152 channels; batch norm has two numbers for each
    ("alexnet_bn", IMAGENET, 1000, 61_100_840 - 1152 + 2 * 1152),
    ("alexnet_bn", IMAGENET, 1000, alexnet((64, 192, 384, 256, 256), (1, 1, 1, 1, 1))),
    ("alexnet_bn_caffe", (3, 227, 227), 1000, alexnet((96, 256, 384, 384, 256), (1, 2, 1, 2, 2))),
    # BVLC's AlexNet is 60,965,224, with biases of 1,376 channels
    ("alexnet_bn_caffe", (3, 227, 227), 1000, 60_965_224 + 1376),
]


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize(("name", "shape", "classes", "size"), PUBLISHED)
def test_models_have_their_published_size(name: str, shape: Shape, classes: int, size: int) -> None:
    assert count(build_model(name, classes, shape, seed=0)) == size


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("n", [3, 5, 7, 9, 18])
def test_cifar_resnets_have_the_size_that_their_layers_add_up_to(n: int) -> None:
    assert count(build_model(f"resnet{6 * n + 2}", 10, CIFAR, seed=0)) == basic_resnet(n)


INCEPTION_AUX = 768 * 128 + 2 * 128 + 25 * 128 * 768 + 2 * 768 + 769 * 1000


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("name", most_slow(TORCHVISION))
def test_torchvisions_models_have_the_size_it_publishes(name: str) -> None:
    weights = torchvision_models().get_model_weights(name)
    shape = (3, 256, 256) if name.startswith("swin_v2") else IMAGENET
    published = {weight.meta["num_params"] for weight in weights}
    if name == "inception_v3":  # which is published with its auxiliary output
        published = {size - INCEPTION_AUX for size in published}
    assert count(build_model(name, 1000, shape, seed=0)) in published


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("name", most_slow(name.removesuffix("_cifar") for name in SMALL))
def test_small_images_get_the_form_for_small_images(name: str) -> None:
    def keys(name: str, *shape: int) -> list[tuple[str, torch.Size]]:
        model = build_model(name, 7, (3, shape[0], shape[1]), seed=0)
        return [(key, value.shape) for key, value in model.state_dict().items()]

    assert keys(name, 64, 64) == keys(name, 32, 40) == keys(f"{name}_cifar", 224, 224)
    assert keys(name, 65, 64) == keys(name, 64, 65) == keys(name, 224, 224) != keys(name, 64, 64)


def test_a_small_resnet_keeps_the_image_until_its_second_group() -> None:
    model = build_model("resnet18", 10, CIFAR, seed=0).eval()
    sides: list[int] = []
    for group in (model.layer1, model.layer2, model.layer3, model.layer4):
        group.register_forward_hook(lambda _m, _x, out: sides.append(out.shape[-1]))
    model(torch.zeros(1, *CIFAR))
    assert sides == [32, 16, 8, 4]


def test_batch_norm_stands_between_convolution_and_relu() -> None:
    with torch.device("meta"):
        models = [build_model(name, 10, IMAGENET, 0) for name in ("alexnet_bn", "alexnet_bn_caffe")]
    for model in models:
        kinds = "".join(type(layer).__name__[0] for layer in model.features)
        assert kinds == "CBRM" * 2 + "CBR" * 3 + "M"


@SLOW
def test_caffes_alexnet_begins_as_its_file_says() -> None:
    model = build_model("alexnet_bn_caffe", 10, (1, 67, 67), seed=0)
    spread = [layer.weight.std().item() for layer in model.features if hasattr(layer, "kernel_size")
              and hasattr(layer, "weight")]  # fmt: skip
    assert spread == pytest.approx([0.01] * 5, rel=0.05)
    linear = [layer for layer in model.classifier if isinstance(layer, nn.Linear)]
    assert [layer.weight.std().item() for layer in linear] == pytest.approx(
        [0.005, 0.005, 0.01], rel=0.05
    )
    assert [layer.bias.unique().tolist() for layer in linear] == [
        pytest.approx([0.1]), pytest.approx([0.1]), [0.0],
    ]  # fmt: skip


# ---- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [CIFAR, (1, 12, 12), (1, 13, 40), (2, 15, 12)])
def test_lenet5_fits_itself_to_the_images(shape: Shape) -> None:
    model = build_model("lenet5", 7, shape, seed=0)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("shape", [(1, 11, 28), (1, 28, 11), (0, 28, 28)])
def test_lenet5_refuses_images_it_would_use_up(shape: Shape) -> None:
    with pytest.raises(ConfigError, match="1 × 12 × 12"):
        build_model("lenet5", 10, shape, seed=0)


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", most_slow(FAMILIES))
def test_any_number_of_channels(name: str, channels: int) -> None:
    """Only the first convolution differs, and it is of the same kind."""

    def weights(channels: int) -> dict[str, torch.Size]:
        model = build_model(name, 5, (channels, 224, 224), seed=0)
        return {key: value.shape for key, value in model.state_dict().items()}

    rgb, other = weights(3), weights(channels)
    assert list(rgb) == list(other)
    differing = [key for key in rgb if rgb[key] != other[key]]
    assert len(differing) == 1
    before, after = rgb[differing[0]], other[differing[0]]
    assert (before[1], after[1]) == (3, channels)
    assert (before[0], *before[2:]) == (after[0], *after[2:])


def test_a_grey_stem_is_initialised_as_its_model_does_it() -> None:
    """ResNet draws with a spread of √(2 / (outputs · kernel²)), AlexNet with 1 / √(3 · inputs)."""
    stem = build_model("resnet18", 10, (1, 65, 65), seed=0).conv1
    assert stem.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    stem = build_model("squeezenet1_0", 10, (1, 65, 65), seed=0).features[0]
    bound = (6 / 49) ** 0.5  # kaiming_uniform_, fan-in of one channel
    assert 0.95 * bound < stem.weight.abs().max().item() <= bound


def test_later_models_are_built_as_ever() -> None:
    build_model("squeezenet1_1", 10, (1, 64, 64), seed=0)
    assert nn.Sequential(nn.Conv2d(3, 8, 1))[0].in_channels == 3


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvisions_models_run_on_grey_digits(name: str) -> None:
    model = build_model(name, 10, MNIST, seed=0)
    assert model(torch.rand(3, *MNIST)).shape == (3, 10)


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize(
    "name",
    most_slow(["alexnet", "convnext_tiny", "densenet121", "googlenet", "inception_v3",
               "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg16_bn"]),
)  # fmt: skip
def test_images_too_small_are_refused_with_the_size_that_torchvision_gives(name: str) -> None:
    (least,) = {w.meta["min_size"][0] for w in torchvision_models().get_model_weights(name)}
    build_model(name, 10, (3, least, least), seed=0)
    for height, width in ((least - 1, least + 9), (least + 9, least - 1)):
        message = (
            f"model.name {name} cannot take images of 3 × {height} × {width}: they are too small, "
            f"it needs at least {least} × {least}"
        )
        with pytest.raises(ConfigError, match=f"^{message}$"):
            build_model(name, 10, (3, height, width), seed=0)


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("alexnet", CIFAR, "cannot take images of 3 × 32 × 32: they are too small"),
        ("alexnet_bn", CIFAR, "too small, it needs at least 63 × 63"),
        ("alexnet_bn_caffe", CIFAR, "too small, it needs at least 39 × 39"),
        ("vgg16_bn", MNIST, "1 × 28 × 28: they are too small, it needs at least 32 × 32"),
        ("vit_b_32", CIFAR, ""),
        ("vit_b_32", (3, 224, 192), "needs square images, not 224 × 192"),
        ("vit_b_32", (3, 225, 225), "side is a multiple of 32, such as 224, not 225"),
        ("maxvit_t", (3, 100, 100), "cannot be built for images of 3 × 100 × 100: ValueError"),
    ],
)
def test_images_of_the_wrong_shape(name: str, shape: Shape, message: str) -> None:
    if not message:
        build_model(name, 10, shape, seed=0)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(name, 10, shape, seed=0)
    assert str(caught.value).startswith(f"model.name {name}")


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(["lenet5", "resnet20", "squeezenet1_1"]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70)),
    classes=st.integers(1, 5),
)
def test_a_model_takes_its_images_or_says_that_it_does_not(
    name: str, shape: Shape, classes: int
) -> None:
    try:
        model = build_model(name, classes, shape, seed=0)
    except ConfigError as error:
        assert f"{shape[0]} × {shape[1]} × {shape[2]}" in str(error)  # noqa: PT017
        assert min(shape[1:]) < 17
        return
    assert model.eval()(torch.zeros(2, *shape)).shape == (2, classes)


# ---- initial weights and state ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["lenet5", "resnet20", "mobilenet_v3_small", "squeezenet1_1",
     pytest.param("resnet18_cifar", marks=SLOW), pytest.param("vgg11_bn_cifar", marks=SLOW),
     pytest.param("alexnet_bn", marks=SLOW), pytest.param("alexnet_bn_caffe", marks=SLOW)],
)  # fmt: skip
def test_weights_depend_on_the_seed_and_on_nothing_else(name: str) -> None:
    shape = (1, 64, 64)
    torch.manual_seed(1)
    first = parameters(build_model(name, 10, shape, seed=5))
    torch.manual_seed(2)
    assert torch.equal(first, parameters(build_model(name, 10, shape, seed=5)))
    assert not torch.equal(first, parameters(build_model(name, 10, shape, seed=6)))


@pytest.mark.parametrize("seed", [0, -1, 2**64])
@pytest.mark.parametrize("name", ["lenet5", "squeezenet1_1", "resnet20"])
def test_building_leaves_the_global_generator_alone(name: str, seed: int) -> None:
    before = torch.random.get_rng_state()
    build_model(name, 10, (1, 32, 32), seed)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_new_model_has_seen_nothing(name: str) -> None:
    model = build_model(name, 10, MNIST, seed=0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 0 and not norm.running_mean.any() for norm in norms)
    assert all(module.training for module in model.modules())
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# Batch norm takes the mean away, and with it the effect of a bias in front of it.
WITHOUT_EFFECT = re.compile(r"features\.\d+\.bias")


@pytest.mark.parametrize(
    ("name", "options"),
    [("lenet5", {}), ("resnet20", {}), pytest.param("resnet18", {}, marks=SLOW),
     pytest.param("vgg11_bn", {}, marks=SLOW),
     pytest.param("alexnet_bn", {"dropout": 0.0}, marks=SLOW),
     pytest.param("alexnet_bn_caffe", {"dropout": 0.0}, marks=SLOW)],
)  # fmt: skip
def test_the_own_models_learn(name: str, options: dict[str, object]) -> None:
    side = {"v": 32, "a": 67}.get(name[0], 16)
    model = build_model(name, 3, (1, side, side), 0, options)
    images = torch.randn(6, 1, side, side, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4 if "alexnet" in name else 3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or WITHOUT_EFFECT.fullmatch(key), key


# ---- options ------------------------------------------------------------------------------------


OTHER_VALUES = {
    "float": 0.5,
    "int": 16,
    "bool": True,
    "Optional[int]": 16,
    "Optional[bool]": True,
    "Optional[list[bool]]": [False, False, True],
    "Optional[list[list[int]]]": [[1, 16, 1, 1]],
}
"""Type of an argument that a configuration can set -> a value that differs from the default."""


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("name", most_slow([*FAMILIES, "resnet18", "resnet101", "vgg16_bn"]))
def test_the_options_are_those_that_torchvision_takes(name: str) -> None:
    factory = getattr(torchvision_models(), name)
    network = typing.get_type_hints(factory)["return"]
    quiet = {"init_weights": True} if "init_weights" in options_of(name) else {}
    takes = set()
    for key, argument in inspect.signature(network.__init__).parameters.items():
        kind = inspect.formatannotation(argument.annotation).replace("typing.", "")
        if key in ELSEWHERE or kind not in OTHER_VALUES:
            continue
        try:
            factory(weights=None, **quiet | {key: OTHER_VALUES[kind]})
        except (TypeError, ValueError, NotImplementedError):
            continue
        takes.add(key)
    if name.startswith("mobilenet_v3"):  # of which a helper of its factory takes three
        takes |= {"width_mult", "reduced_tail", "dilated"}
    assert set(options_of(name)) == takes


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize(
    ("name", "options", "reached"),
    [
        ("alexnet", {"dropout": 0.25}, "p=0.25"),
        ("alexnet_bn", {"dropout": 0.25}, "p=0.25"),
        ("alexnet_bn_caffe", {"dropout": 0.25}, "p=0.25"),
        ("vgg16_bn_cifar", {"dropout": 0.25}, "p=0.25"),
        ("resnet50_cifar", {"width_per_group": 128}, "Conv2d(64, 128, kernel_size=(1, 1)"),
        ("resnet50", {"groups": 32, "width_per_group": 4}, "groups=32"),
        ("mobilenet_v3_small", {"width_mult": 0.5}, "Conv2d(1, 8, "),
        ("googlenet", {"dropout": 0.25}, "p=0.25"),
        ("vit_b_32", {"attention_dropout": 0.25, "representation_size": 99}, "out_features=99"),
    ],
)
def test_options_reach_the_constructor(name: str, options: dict[str, object], reached: str) -> None:
    shape = (1, 224, 224)
    assert reached in str(build_model(name, 10, shape, 0, options))
    assert reached not in str(build_model(name, 10, shape, 0))


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("lenet5", "width", "; valid are: batch_norm$"),
        ("resnet20", "groups", "; valid are: none$"),
        ("resnet50", "depth", "; valid are: groups, width_per_group, replace_stride_with_dilation"),
        ("resnet50_cifar", "depth", "; valid are: groups, width_per_group, "),
        ("alexnet_bn", "num_classes", r" \(it comes from the data\); valid are: dropout$"),
        ("resnet18", "zero_init_residual", r" \(that is model\.zero_gamma\)"),
        ("inception_v3", "aux_logits", r" \(auxiliary outputs have no part"),
        ("mobilenet_v3_small", "wdth_mult", "; valid are: dropout, width_mult,"),
    ],
)
def test_an_option_that_a_model_does_not_have(name: str, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^model.options: {name} has no option {option}{message}"):
        check_model(name, {option: 1})
    with pytest.raises(ConfigError, match=message):
        build_model(name, 10, IMAGENET, 0, {option: 1})


def test_an_options_value_that_the_constructor_refuses() -> None:
    message = r"alexnet cannot be built for images of 3 × 224 × 224, dropout=1\.5: ValueError: "
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_model("alexnet", 10, IMAGENET, 0, {"dropout": 1.5})


def test_the_options_of_the_own_models_are_their_keywords() -> None:
    for name, factory in MODELS.items():
        keywords = [
            key
            for key, parameter in inspect.signature(factory).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        if "resnet" not in name:  # those hand them on to torchvision's
            assert list(options_of(name)) == keywords


# ---- zero γ -------------------------------------------------------------------------------------

RESIDUAL = ("_Block", "BasicBlock", "Bottleneck", "ResBottleneckBlock", "InvertedResidual",
            "_InvertedResidual", "MBConv", "FusedMBConv")  # fmt: skip


def kept(model: nn.Module, shape: Shape) -> list[bool]:
    """For each residual block without layers in its shortcut: does it hand on what it gets?"""
    found: list[bool] = []

    def look(block: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        if out.shape == inputs[0].shape:
            found.append(any(torch.equal(out, x) for x in (inputs[0], inputs[0].relu())))

    for module in model.modules():
        if type(module).__name__ in RESIDUAL:
            module.register_forward_hook(look)
    model.eval()(torch.rand(2, *shape))
    return found


@pytest.mark.parametrize(
    ("name", "blocks"),  # those whose shortcut changes nothing
    [("resnet20", 7), ("resnet18", 5), ("mobilenet_v3_small", 6), ("regnet_x_400mf", 18),
     *(pytest.param(*case, marks=SLOW)
       for case in (("resnet50_cifar", 12), ("regnet_y_400mf", 12), ("mobilenet_v2", 10),
                    ("efficientnet_b0", 9), ("efficientnet_v2_s", 35), ("mnasnet0_5", 10)))],
)  # fmt: skip
def test_zero_gamma_makes_every_residual_block_the_identity(name: str, blocks: int) -> None:
    assert kept(build_model(name, 10, CIFAR, 0, zero_gamma=True), CIFAR) == [True] * blocks
    assert not any(kept(build_model(name, 10, CIFAR, 0), CIFAR))


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 9), ("resnet56", 27)])
def test_zero_gamma_changes_one_scale_of_each_block(name: str, blocks: int) -> None:
    """Those with layers in the shortcut too; nothing else differs from the model without it."""
    plain = build_model(name, 10, CIFAR, 3).state_dict()
    zeroed = build_model(name, 10, CIFAR, 3, zero_gamma=True).state_dict()
    differing = [key for key in plain if not torch.equal(plain[key], zeroed[key])]
    assert len(differing) == blocks
    assert all(key.endswith("bn2.weight") and not zeroed[key].any() for key in differing)


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("name", ["lenet5", "alexnet_bn", "vgg16_bn", "shufflenet_v2_x0_5"])
def test_zero_gamma_of_a_model_without_residual_blocks(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.zero_gamma: {name} has no .*valid for resnet"):
        build_model(name, 10, (3, 64, 64), 0, zero_gamma=True)


# ---- a user's own -------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn

def linear(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(4, num_classes))

def fixed():
    return linear(7)

def open_ended(**options):
    assert "shape" not in options
    return linear(options["num_classes"])

def positional(num_classes=7, /):
    return linear(num_classes)

def with_shape(num_classes, shape):
    assert shape == (1, 1, 4)
    return linear(num_classes)

def with_options(num_classes, shape, width, *, depth=1):
    hidden = [nn.Linear(width, width) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(4, width), *hidden, nn.Linear(width, num_classes))

def anything(num_classes, **options):
    return nn.Sequential(nn.Flatten(), nn.Dropout(options["p"]), nn.Linear(4, num_classes))

class Forward(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.linear = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.linear(x.flatten(1))

class Looks(Forward):
    def forward(self, x):
        return super().forward(x if (x >= 0).all() else -x)

class LooksWide(Looks):
    def forward(self, x):
        return super().forward(torch.cat([x, x], 3) if (x >= 0).all() else x)

class Counts(Forward):
    def forward(self, x):
        return super().forward(x * float(x.numpy().size > 0))

class Constant(Forward):
    scale = torch.full((4,), 2.0)
    def forward(self, x):
        return super().forward(x * self.scale)

class NeedsGpu(Forward):
    def forward(self, x):
        if not x.is_cuda:
            raise RuntimeError("expected a CUDA tensor")

class Asserts(Forward):
    def forward(self, x):
        assert x.is_cuda

class Wide(Forward):
    def forward(self, x):
        return super().forward(torch.cat([x, x], 3))

class Pair(Forward):
    def forward(self, x):
        return super().forward(x), x

class Squeezed(Forward):
    def forward(self, x):
        return super().forward(x)[:, 0]

class Frozen(Forward):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.norm.eval()

    def forward(self, x):
        return self.linear(self.norm(x.flatten(1)))

class Residual(nn.Module):
    last_norm = "branch.1"
    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), norm(4))
    def forward(self, x):
        return x + self.branch(x)

def residual(num_classes):
    return nn.Sequential(nn.Flatten(), Residual(), nn.Linear(4, num_classes))

def scaleless(num_classes):
    norm = lambda width: nn.BatchNorm1d(width, affine=False)
    return nn.Sequential(nn.Flatten(), Residual(norm), nn.Linear(4, num_classes))

class Misnamed(Residual):
    last_norm = "bn7"

def misnamed(num_classes):
    return nn.Sequential(nn.Flatten(), Misnamed(), nn.Linear(4, num_classes))

def of_torchvision(num_classes):
    from torchvision.models.resnet import BasicBlock
    last = nn.Linear(16, num_classes)
    return nn.Sequential(nn.Conv2d(1, 4, 1), BasicBlock(4, 4), nn.Flatten(), last)

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
    (package / "nets.py").write_text(SOURCE)
    (package / "broken.py").write_text("def net(:\n")
    (package / "needy.py").write_text("import not_installed_anywhere\n")
    (package / "dies.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield "ownpackage.nets"
    for name in [name for name in sys.modules if name.startswith("ownpackage")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "attribute", ["Net", "fixed", "open_ended", "positional", "with_shape", "Space.net"]
)
def test_own_model_is_called_as_its_signature_allows(own_module: str, attribute: str) -> None:
    model = build_model(f"{own_module}:{attribute}", 7, VECTOR, seed=0)
    assert model(torch.zeros(2, *VECTOR)).shape == (2, 7)


def test_own_model_gets_its_options(own_module: str) -> None:
    name = f"{own_module}:with_options"
    assert len(build_model(name, 7, VECTOR, 0, {"width": 5})) == 4
    model = build_model(name, 7, VECTOR, 0, {"width": 5, "depth": 3})
    assert [layer.out_features for layer in model[1:]] == [5, 5, 5, 5, 7]
    assert build_model(f"{own_module}:anything", 7, VECTOR, 0, {"p": 0.125})[1].p == 0.125


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("with_options", {"width": 5, "hight": 2}, "no option hight; valid are: width, depth"),
        ("Net", {"width": 5}, "Net has no option width; valid are: none"),
        ("Net", {"num_classes": 5}, "num_classes of .*Net comes from the data"),
        ("anything", {"shape": 1}, "shape of .*anything comes from the data"),
        ("with_options", {}, "raised TypeError: .*'width'"),
        ("with_options", {"width": "wide"}, "width='wide'.* raised TypeError"),
    ],
)
def test_own_model_that_gets_wrong_options(
    own_module: str, attribute: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(f"{own_module}:{attribute}", 7, VECTOR, 0, options)


@pytest.mark.parametrize(
    "attribute", ["Forward", "Looks", "Counts", "Constant", "NeedsGpu", "Asserts", "Frozen"]
)
def test_own_model_whose_shapes_cannot_be_followed_is_taken(
    own_module: str, attribute: str
) -> None:
    model = build_model(f"{own_module}:{attribute}", 7, VECTOR, seed=0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert model.training
    assert not any(norm.training for norm in norms)
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("Wide", r"cannot take images of 1 × 1 × 4: RuntimeError: .*shape"),
        ("LooksWide", r"cannot take images of 1 × 1 × 4: RuntimeError: mat1 and mat2 shapes"),
        ("Pair", r"returns tuple, not a tensor of logits \(images, 7\)"),
        ("Squeezed", r"returns \(2,\) for 2 images; logits of \(2, 7\) are needed"),
    ],
)
def test_own_model_that_does_not_fit_the_data(
    own_module: str, attribute: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^model.name {own_module}:{attribute} {message}"):
        build_model(f"{own_module}:{attribute}", 7, VECTOR, seed=0)


def test_own_model_of_another_number_of_classes(own_module: str) -> None:
    with pytest.raises(ConfigError, match=r"returns \(2, 7\) for 2 images; logits of \(2, 10\)"):
        build_model(f"{own_module}:fixed", 10, VECTOR, seed=0)


@pytest.mark.parametrize(
    ("attribute", "shape", "norm"),
    [("residual", VECTOR, "1.branch.1.weight"), ("of_torchvision", VECTOR, "1.bn2.weight")],
)
def test_own_residual_blocks_begin_as_the_identity(
    own_module: str, attribute: str, shape: Shape, norm: str
) -> None:
    model = build_model(f"{own_module}:{attribute}", 7, shape, 0, zero_gamma=True)
    zeros = [key for key, p in model.named_parameters() if "weight" in key and not p.any()]
    assert zeros == [norm]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("Net", 'no residual block .*last_norm = "bn2"'),
        ("scaleless", r"Residual .*last norm branch\.1 has no weight"),
        ("misnamed", "Misnamed .*last norm bn7 has no weight"),
    ],
)
def test_own_blocks_that_cannot_begin_as_the_identity(
    own_module: str, attribute: str, message: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"^model.zero_gamma: {own_module}:{attribute} has.*{message}"
    ):
        build_model(f"{own_module}:{attribute}", 7, VECTOR, 0, zero_gamma=True)


def test_own_model_is_seeded_too(own_module: str) -> None:
    before = torch.random.get_rng_state()
    models = [build_model(f"{own_module}:Net", 7, VECTOR, seed) for seed in (3, 3, 4)]
    first, again, other = map(parameters, models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_installed_callable_is_found() -> None:
    """Also where torchvision's compiled operators do not load, as beside a CPU build of torch."""
    model = build_model("torchvision.models:squeezenet1_0", 7, CIFAR, seed=0)
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
    message = r"calling it with \(num_classes=7\) raised TypeError"
    with pytest.raises(ConfigError, match=message):
        build_model("harness.models.resnet_cifar:CifarResNet", 7, MNIST, seed=0)


def test_no_classes() -> None:
    with pytest.raises(ConfigError, match="at least 1 class"):
        build_model("lenet5", 0, MNIST, seed=0)
