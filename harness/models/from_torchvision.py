"""torchvision's classification models, from random weights, for any number of channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from harness.errors import ConfigError
from harness.torchvision_ops import import_tolerantly

_RGB = 3


def torchvision_model(
    name: str, num_classes: int, shape: tuple[int, int, int], **options: object
) -> nn.Module:
    """The model of that name in ``torchvision.models`` for images of ``shape`` (C, H, W).

    Without auxiliary outputs, since the loss takes logits only, and with position embeddings and
    windows for H × W where the architecture has them.

    Raises:
        ConfigError: torchvision is missing, or older than the model, or the model is for square
            images only and these are not.
    """
    try:
        models = import_tolerantly("torchvision.models")
    except ImportError as error:
        raise ConfigError(f"model.name {name} needs torchvision: {error}") from error
    factory = getattr(models, name, None)
    if factory is None:
        version = import_tolerantly("torchvision").__version__
        raise ConfigError(f"model.name {name} is not in the installed torchvision {version}")
    channels, height, width = shape
    if name in ("googlenet", "inception_v3"):
        # init_weights: not saying so makes torchvision warn that its default will change.
        options = {"aux_logits": False, "init_weights": True} | options
    elif name.startswith("vit_"):
        if height != width:
            raise ConfigError(f"model.name {name} needs square images, not {height} × {width}")
        patch = int(name.rsplit("_", 1)[1])
        if height % patch:
            near = max(patch, round(height / patch) * patch)
            raise ConfigError(
                f"model.name {name} needs images whose side is a multiple of {patch}, such as "
                f"{near}, not {height}"
            )
        options["image_size"] = height
    elif name.startswith("maxvit_"):
        options["input_size"] = (height, width)
    with _stem_of(channels):
        model: nn.Module = factory(weights=None, num_classes=num_classes, **options)
    return model


@contextmanager
def _stem_of(channels: int) -> Iterator[None]:
    """Within it, the first convolution of three channels gets ``channels`` instead.

    The exchange happens as the layer finds its place in the model, so the architecture's own rule
    of initialisation, which follows, sees the new one.
    """
    if channels == _RGB:
        yield
        return
    done = False

    def exchange(_parent: nn.Module, _name: str, layer: nn.Module | None) -> nn.Module | None:
        nonlocal done
        if done or not isinstance(layer, nn.Conv2d) or layer.in_channels != _RGB:
            return None
        done = True
        return nn.Conv2d(
            channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            bias=layer.bias is not None,
        )

    handle = register_module_module_registration_hook(exchange)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
