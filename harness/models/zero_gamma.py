"""Residual blocks that begin as the identity (Goyal et al. 2017, section 5.1).

The scale γ of the last batch norm of each residual branch starts at 0, so that a block first hands
on what it gets, and only its shortcut passes the gradient to the layers before it.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import ConfigError

LAST_NORM = "last_norm"
"""Class attribute of a block that has a residual branch: the name of the branch's last norm."""

_TORCHVISION = {
    "resnet.BasicBlock": ("bn2", None),
    "resnet.Bottleneck": ("bn3", None),
    "regnet.ResBottleneckBlock": ("f", None),
    "mobilenetv2.InvertedResidual": ("conv", "use_res_connect"),
    "mobilenetv3.InvertedResidual": ("block", "use_res_connect"),
    "efficientnet.MBConv": ("block", "use_res_connect"),
    "efficientnet.FusedMBConv": ("block", "use_res_connect"),
    "mnasnet._InvertedResidual": ("layers", "apply_residual"),
}
"""Class in torchvision.models -> its residual branch, and the flag of blocks that have one."""


def zero_gamma(name: str, model: nn.Module) -> int:
    """Set γ of the last norm of every residual branch to 0; how many there are.

    Raises:
        ConfigError: the model ``name`` has no residual blocks that are known, or a norm no γ.
    """
    norms = [norm for block in model.modules() for norm in _last_norm(name, block)]
    if not norms:
        raise ConfigError(
            f"model.zero_gamma: {name} has no residual block that ends in a batch norm; valid for "
            "resnet*, resnext*, wide_resnet*, regnet_*, efficientnet_*, mobilenet_*, mnasnet* and "
            "models of your own with torchvision's blocks or blocks whose class says "
            f'{LAST_NORM} = "bn2", the name of the branch\'s last norm'
        )
    for norm in norms:
        nn.init.zeros_(norm)
    return len(norms)


def _last_norm(name: str, block: nn.Module) -> list[nn.Parameter]:
    """The γ to set in this one module: one, or none."""
    own = getattr(type(block), LAST_NORM, None)
    if own is not None:
        norm = block.get_submodule(own) if hasattr(block, str(own).partition(".")[0]) else None
    else:
        norm = _of_torchvision(block)
        if norm is None:
            return []
    scale = getattr(norm, "weight", None)
    if not isinstance(scale, nn.Parameter):
        raise ConfigError(
            f"model.zero_gamma: {name} has a {type(block).__name__} whose last norm "
            f"{own or type(norm).__name__} has no weight"
        )
    return [scale]


def _of_torchvision(block: nn.Module) -> nn.Module | None:
    for cls in type(block).__mro__:
        package, _, module = cls.__module__.rpartition(".")
        known = _TORCHVISION.get(f"{module}.{cls.__qualname__}")
        if known and package == "torchvision.models":
            branch, flag = known
            if flag and not getattr(block, flag):
                return None
            layers = block.get_submodule(branch).modules()
            return [layer for layer in layers if isinstance(layer, _BatchNorm)][-1]
    return None
