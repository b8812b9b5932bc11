"""Whether a model that was built can be trained on the images there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.errors import ConfigError

Shape = tuple[int, int, int]
_LARGEST_SIDE = 512
"""No model of the harness or of torchvision that takes images of any size needs larger ones."""


def check_trainable(name: str, model: nn.Module) -> None:
    """Raise ConfigError without trainable parameters, or with one that is not float32."""
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


def check_fits(name: str, model: nn.Module, shape: Shape, num_classes: int, known: bool) -> None:
    """Raise ConfigError unless images of ``shape`` (C, H, W) become logits of ``num_classes``.

    The forward pass, in evaluation mode, computes shapes only (device meta). A model that is not
    ``known`` may depend on values: where that fails, two images of zeros go through it on the CPU,
    and only what torch then says of shapes (RuntimeError) counts; such a model may need a GPU.
    """
    try:
        logits = _logits(model, shape, "meta")
    except Exception as error:
        if known:
            raise ConfigError(_misfit(name, model, shape, error)) from error
        try:
            logits = _logits(model, shape, "cpu")
        except RuntimeError as real:
            if _of_shapes(real):
                raise ConfigError(_misfit(name, model, shape, real)) from real
            return
        except Exception:
            return
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"model.name {name} returns {type(logits).__name__}, not a tensor of logits (images, "
            f"{num_classes})"
        )
    if logits.shape != (2, num_classes):
        raise ConfigError(
            f"model.name {name} returns {tuple(logits.shape)} for 2 images; logits of (2, "
            f"{num_classes}) are needed"
        )


def _logits(model: nn.Module, shape: Shape, device: str) -> object:
    """What the model, in evaluation mode, makes of two images; the model stays as it is."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            images = torch.zeros((2, *shape), device=device)
            if device == "cpu":
                return model(images)
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            shapes = {key: tensor.detach().to(device) for key, tensor in tensors.items()}
            return torch.func.functional_call(model, shapes, (images,))
    finally:
        for module, mode in modes:
            module.training = mode


def _of_shapes(error: RuntimeError) -> bool:
    words = ("shape", "size", "dimension", "channel", "expected")
    return any(word in str(error).lower() for word in words) and "cuda" not in str(error).lower()


def _misfit(name: str, model: nn.Module, shape: Shape, error: Exception) -> str:
    least = _least_side(model, shape[0])
    if least is not None and min(shape[1:]) < least:
        why = f"they are too small, it needs at least {least} × {least}"
    else:
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    channels, height, width = shape
    return f"model.name {name} cannot take images of {channels} × {height} × {width}: {why}"


def _least_side(model: nn.Module, channels: int) -> int | None:
    """Side of the smallest square images that the model takes; None if it takes none."""
    low, high = 0, _LARGEST_SIDE
    if not _takes(model, (channels, high, high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _takes(model, (channels, middle, middle)) else (middle, high)
    return high


def _takes(model: nn.Module, shape: Shape) -> bool:
    try:
        _logits(model, shape, "meta")
    except Exception:
        return False
    return True
