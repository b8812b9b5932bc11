"""Models by name, and a user's own as ``package.module:callable``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from harness.errors import ConfigError
from harness.model_table import check_model
from harness.models.alexnet_bn import alexnet_bn, alexnet_bn_caffe
from harness.models.check import check_fits, check_trainable
from harness.models.custom import own_model
from harness.models.from_torchvision import torchvision_model
from harness.models.lenet5 import LeNet5
from harness.models.resnet_cifar import CifarResNet
from harness.models.small_images import SIDE, VGG_CONVOLUTIONS, small_resnet, small_vgg
from harness.models.zero_gamma import zero_gamma as begin_as_identity
from harness.schema import Config

Shape = tuple[int, int, int]


def _cifar_resnet(depth: int, num_classes: int, shape: Shape) -> nn.Module:
    return CifarResNet(depth, num_classes, channels=shape[0])


MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    **{f"resnet{depth}": partial(_cifar_resnet, depth) for depth in (20, 32, 44, 56, 110)},
    **{
        f"resnet{depth}_cifar": partial(small_resnet, f"resnet{depth}")
        for depth in (18, 34, 50, 101, 152)
    },
    **{f"{name}_cifar": partial(small_vgg, name) for name in VGG_CONVOLUTIONS},
    "alexnet_bn": alexnet_bn,
    "alexnet_bn_caffe": alexnet_bn_caffe,
}
"""The harness's own: name -> factory of (number of classes, (C, H, W), **options)."""


def configured_model(config: Config, num_classes: int, shape: Shape) -> nn.Module:
    """The model that a configuration names; see `build_model`."""
    settings = config.model
    return build_model(
        settings.name, num_classes, shape, config.seed, settings.options, settings.zero_gamma
    )


def build_model(
    name: str,
    num_classes: int,
    shape: Shape,
    seed: int,
    options: Mapping[str, object] | None = None,
    zero_gamma: bool = False,
) -> nn.Module:
    """A model with the initial weights of ``seed``, on the CPU: the same on every rank.

    Args:
        name: one of harness.model_table, or ``package.module:callable``, importable also from the
            current directory. ``resnet18`` and the like, and ``vgg16_bn``, are ``resnet18_cifar``
            and ``vgg16_bn_cifar`` for images without a side of more than 64.
        num_classes: at least 1.
        shape: (C, H, W) of one image.
        seed: of torch's CPU generator while the model is built; its state before is restored.
        options: keyword arguments of the model's constructor.
        zero_gamma: residual blocks begin as the identity.

    Raises:
        ConfigError: no such model or option, or it cannot be built for these images.
    """
    options = options or {}
    if num_classes < 1:
        raise ConfigError(f"a model needs at least 1 class, not {num_classes}")
    try:
        check_model(name, options)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the GPUs' generators and leave them so.
        torch.default_generator.manual_seed(seed % 2**63)
        if ":" in name:
            model = own_model(name, num_classes, shape, options)
        else:
            model = _known(name, num_classes, shape, options)
        check_trainable(name, model)
        check_fits(name, model, shape, num_classes, known=":" not in name)
    if zero_gamma:
        begin_as_identity(name, model)
    return model


def _known(name: str, num_classes: int, shape: Shape, options: Mapping[str, object]) -> nn.Module:
    small = f"{name}_cifar"
    if small in MODELS and max(shape[1:]) <= SIDE:
        factory = MODELS[small]
    else:
        factory = MODELS.get(name) or partial(torchvision_model, name)
    try:
        return factory(num_classes, shape, **options)
    except ConfigError:
        raise
    except Exception as error:
        channels, height, width = shape
        written = "".join(f", {key}={value!r}" for key, value in options.items())
        raise ConfigError(
            f"model.name {name} cannot be built for images of {channels} × {height} × {width}"
            f"{written}: {type(error).__name__}: {error}"
        ) from error
