"""ResNet and VGG in the form usual for CIFAR's 32 × 32 images.

ResNet: torchvision's network with a stem of 3 × 3 and stride 1 instead of 7 × 7 and stride 2, and
without max-pooling, so that its four groups see 32 × 32, 16 × 16, 8 × 8 and 4 × 4. VGG:
torchvision's convolutions with batch norm, the mean over what is left of the image, and one linear
layer instead of three.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from harness.torchvision_ops import import_tolerantly

SIDE = 64
"""Images without a longer side are small."""

VGG_CONVOLUTIONS = {
    "vgg11_bn": (1, 1, 2, 2, 2),
    "vgg13_bn": (2, 2, 2, 2, 2),
    "vgg16_bn": (2, 2, 3, 3, 3),
    "vgg19_bn": (2, 2, 4, 4, 4),
}
"""In front of each of the five max-poolings (Simonyan and Zisserman 2015, table 1: A, B, D, E)."""
VGG_WIDTHS = (64, 128, 256, 512, 512)

Shape = tuple[int, int, int]


def small_resnet(name: str, num_classes: int, shape: Shape, **options: object) -> nn.Module:
    """ResNet-18, 34, 50, 101 or 152 (He et al. 2016) for small images of ``shape`` (C, H, W)."""
    factory = getattr(import_tolerantly("torchvision.models"), name)
    model: nn.Module = factory(weights=None, num_classes=num_classes, **options)
    stem = nn.Conv2d(shape[0], 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as the others
    model.conv1, model.maxpool = stem, nn.Identity()
    return model


def small_vgg(
    name: str,
    num_classes: int,
    shape: Shape,
    *,
    dropout: float = 0.0,
    init_weights: bool = True,
) -> nn.Module:
    """VGG with batch norm for small images of ``shape`` (C, H, W), which it halves five times.

    Args:
        name: of VGG_CONVOLUTIONS.
        dropout: in front of the linear layer.
        init_weights: as torchvision's VGG, not as torch's layers by themselves.
    """
    features: list[nn.Module] = []
    before = shape[0]
    for count, width in zip(VGG_CONVOLUTIONS[name], VGG_WIDTHS, strict=True):
        for _ in range(count):
            features += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        features.append(nn.MaxPool2d(2))
    parts = {
        "features": nn.Sequential(*features),
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "dropout": nn.Dropout(dropout),
        "classifier": nn.Linear(before, num_classes),
    }
    model = nn.Sequential(OrderedDict(parts))
    if init_weights:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
