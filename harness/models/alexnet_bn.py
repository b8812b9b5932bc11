"""AlexNet with batch norm (You, Gitman and Ginsburg 2017, section 3.2.2).

Batch norm stands between each convolution and its ReLU, in place of local response normalisation,
and takes the place of the convolution's bias; dropout stays. The paper gives no more than a link to
NVIDIA's fork of Caffe (models/alexnet_bn/train_val.prototxt), which is ``alexnet_bn_caffe`` here.
``alexnet_bn`` makes the same change to torchvision's AlexNet (Krizhevsky 2014: one tower, narrower
convolutions), so that it compares with ``alexnet``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

Shape = tuple[int, int, int]
_HIDDEN = 4096
_GRID = 6
"""Rows and columns that the linear layers see."""


def alexnet_bn(num_classes: int, shape: Shape, *, dropout: float = 0.5) -> nn.Module:
    """torchvision's AlexNet with batch norm, for images of ``shape`` (C, H, W), usually 224 × 224.

    61,101,992 parameters for 3 channels and 1000 classes. Dropout where torchvision's has it: in
    front of the two hidden layers.
    """
    widths = (64, 192, 384, 256, 256)
    classifier = nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(widths[-1] * _GRID**2, _HIDDEN),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(_HIDDEN, _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, num_classes),
    )
    features = _features(shape[0], widths, groups=(1, 1, 1, 1, 1), caffe=False)
    return _network(features, classifier)


def alexnet_bn_caffe(num_classes: int, shape: Shape, *, dropout: float = 0.5) -> nn.Module:
    """The network behind the paper's tables, for images of ``shape`` (C, H, W), there 227 × 227.

    Widths and the two halves of convolutions 2, 4 and 5 are those of Krizhevsky et al. 2012;
    initial weights and the ε of batch norm those of the prototxt; dropout follows both hidden
    layers. 60,966,600 parameters for 3 channels and 1000 classes; the prototxt's has 256 more, a
    bias that the fifth batch norm cancels.
    """
    widths = (96, 256, 384, 384, 256)
    classifier = nn.Sequential(
        nn.Linear(widths[-1] * _GRID**2, _HIDDEN),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(_HIDDEN, _HIDDEN),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(_HIDDEN, num_classes),
    )
    features = _features(shape[0], widths, groups=(1, 2, 1, 2, 2), caffe=True)
    model = _network(features, classifier)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Linear):
            last = module is classifier[-1]
            nn.init.normal_(module.weight, std=0.01 if last else 0.005)
            nn.init.constant_(module.bias, 0.0 if last else 0.1)
    return model


def _features(
    channels: int, widths: Sequence[int], groups: Sequence[int], caffe: bool
) -> nn.Sequential:
    kernels, strides = (11, 5, 3, 3, 3), (4, 1, 1, 1, 1)
    paddings = (0 if caffe else 2, 2, 1, 1, 1)
    layers: list[nn.Module] = []
    before = channels
    for index, width in enumerate(widths):
        convolution = nn.Conv2d(
            before,
            width,
            kernels[index],
            strides[index],
            paddings[index],
            groups=groups[index],
            bias=False,
        )
        layers += [convolution, nn.BatchNorm2d(width, eps=1e-4 if caffe else 1e-5), nn.ReLU()]
        if index in (0, 1, 4):
            # Caffe rounds the size of what it pools up; with 227 × 227 nothing is to be rounded.
            layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=caffe))
        before = width
    return nn.Sequential(*layers)


def _network(features: nn.Sequential, classifier: nn.Sequential) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d(_GRID),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
