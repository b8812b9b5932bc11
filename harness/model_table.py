"""Which models a configuration can name and which options each takes, without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from harness.own_names import check_own, is_own
from harness.yamlfile import one_line

OWN = (
    "lenet5",
    *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110)),
    *(f"resnet{depth}_cifar" for depth in (18, 34, 50, 101, 152)),
    *(f"vgg{depth}_bn_cifar" for depth in (11, 13, 16, 19)),
    "alexnet_bn",
    "alexnet_bn_caffe",
)
"""The harness's own; what each is stands in docs/models.md."""

TORCHVISION = (
    "alexnet",
    *(f"convnext_{size}" for size in ("base", "large", "small", "tiny")),
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"efficientnet_{size}" for size in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")),
    *(f"efficientnet_v2_{size}" for size in "lms"),
    "googlenet",
    "inception_v3",
    "maxvit_t",
    *(f"mnasnet{width}" for width in ("0_5", "0_75", "1_0", "1_3")),
    *(f"mobilenet_{size}" for size in ("v2", "v3_large", "v3_small")),
    *(f"regnet_x_{flops}f" for flops in ("16g", "1_6g", "32g", "3_2g", "400m", "800m", "8g")),
    *(f"regnet_y_{flops}f" for flops in ("16g", "1_6g", "32g", "3_2g", "400m", "800m", "8g")),
    "regnet_y_128gf",
    *(f"resnet{depth}" for depth in (101, 152, 18, 34, 50)),
    *(f"resnext{size}" for size in ("101_32x8d", "101_64x4d", "50_32x4d")),
    *(f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")),
    *(f"squeezenet1_{version}" for version in "01"),
    *(f"swin_{size}" for size in "bst"),
    *(f"swin_v2_{size}" for size in "bst"),
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
    *(f"vit_{size}" for size in ("b_16", "b_32", "h_14", "l_16", "l_32")),
    *(f"wide_resnet{size}" for size in ("101_2", "50_2")),
)
"""Every classification model of torchvision 0.28."""

_BOTTLENECKS = ("groups", "width_per_group", "replace_stride_with_dilation")

_FAMILIES: dict[str, tuple[str, ...]] = {
    "lenet5": ("batch_norm",),
    "alexnet": ("dropout",),
    "convnext": ("stochastic_depth_prob", "layer_scale"),
    "densenet": ("bn_size", "drop_rate", "memory_efficient"),
    "efficientnet": ("dropout", "stochastic_depth_prob"),
    "googlenet": ("dropout", "transform_input", "init_weights"),
    "inception_v3": ("dropout", "transform_input", "init_weights"),
    "maxvit": (
        "squeeze_ratio", "expansion_ratio", "mlp_ratio", "mlp_dropout", "attention_dropout",
    ),
    "mnasnet": ("dropout",),
    "mobilenet_v2": ("dropout", "width_mult", "round_nearest", "inverted_residual_setting"),
    "mobilenet_v3": ("dropout", "width_mult", "reduced_tail", "dilated"),
    "regnet": ("stem_width",),
    "resnet": (),
    "resnet50": _BOTTLENECKS,
    "resnet101": _BOTTLENECKS,
    "resnet152": _BOTTLENECKS,
    "resnext": ("replace_stride_with_dilation",),
    "shufflenet": (),
    "squeezenet": ("dropout",),
    "swin": ("dropout", "attention_dropout", "mlp_ratio"),
    "vgg": ("dropout", "init_weights"),
    "vit": ("dropout", "attention_dropout", "representation_size"),
    "wide_resnet": ("groups", "replace_stride_with_dilation"),
}  # fmt: skip
"""Beginning of a name (the longest one counts) -> keyword arguments of the constructor that a plain
value can set, and that neither the model's name nor the data fixes."""

ELSEWHERE = {
    "num_classes": "it comes from the data",
    "shape": "it comes from the data",
    "image_size": "it comes from the data",
    "input_size": "it comes from the data",
    "zero_init_residual": "that is model.zero_gamma",
    "aux_logits": "auxiliary outputs have no part in the loss here",
    "dropout_aux": "auxiliary outputs have no part in the loss here",
    "weights": "models start from random weights",
    "progress": "nothing is downloaded",
}
"""Arguments that are never options of a known model, and why."""


def options_of(name: str) -> tuple[str, ...]:
    """The options of one of OWN or TORCHVISION."""
    return _FAMILIES[max((key for key in _FAMILIES if name.startswith(key)), key=len)]


def check_model(name: str, options: Iterable[str] = ()) -> None:
    """Raise ValueError for a name that is none, or for an option that a known model does not have.

    ``package.module:callable`` is not looked up here, but where the model is built.
    """
    if is_own(name):
        check_own("model.name", name)
    elif name not in OWN and name not in TORCHVISION:
        close = get_close_matches(name.lower(), (*OWN, *TORCHVISION), n=3, cutoff=0.75)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ValueError(
            f"model.name {one_line(repr(name))} is not known{hint}; valid: {', '.join(OWN)}, "
            "any classification model of torchvision by its name there, or your own as "
            "package.module:callable"
        )
    else:
        for option in options:
            _check_option(name, option)


def _check_option(name: str, option: str) -> None:
    valid = options_of(name)
    if option not in valid:
        why = f" ({ELSEWHERE[option]})" if option in ELSEWHERE else ""
        raise ValueError(
            f"model.options: {name} has no option {one_line(option, 40)}{why}; valid are: "
            f"{', '.join(valid) or 'none'}"
        )
