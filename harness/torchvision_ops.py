"""Importing torchvision where its compiled operators do not load.

The wheel on PyPI is built for CUDA. Beside a CPU build of torch its operators stay unregistered,
and ``import torchvision`` then fails on their names; no classification model needs them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_tolerantly(name: str) -> ModuleType:
    """``import_module``; if torchvision lacks its operators, their names are declared first."""
    try:
        return import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", _BOXES)
    for half_loaded in [key for key in sys.modules if key.partition(".")[0] == "torchvision"]:
        del sys.modules[half_loaded]
    sys.modules.pop(name, None)
    return import_module(name)
