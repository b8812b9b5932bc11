"""Flat gradient buckets: which parameters lie where, and the views into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

PIECE = 1 << 20
"""Elements."""


@dataclass
class Bucket:
    """Some parameters whose gradients travel together, as one float32 tensor."""

    index: int
    names: list[str]
    parameters: list[nn.Parameter]
    flat: Tensor
    """Float32, one dimension; what comes back from the other ranks ends up here."""
    views: list[Tensor] = field(init=False)
    """The part of ``flat`` that belongs to each parameter, with the parameter's shape and strides,
    so that the optimizer meets gradients laid out as the weights are."""

    def __post_init__(self) -> None:
        self.views = self.split(self.flat)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a tensor as long as ``flat``, of any type, one for each parameter."""
        pieces = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return [_as(piece, like) for piece, like in zip(pieces, self.parameters, strict=True)]

    def take_gradients(self) -> tuple[list[Tensor], list[int]]:
        """The gradients that backward has left, and which of the parameters they belong to;
        ``.grad`` is None afterwards. A sparse one is returned dense."""
        gradients, places = [], []
        for place, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                gradient = parameter.grad
                gradients.append(gradient.to_dense() if gradient.is_sparse else gradient)
                places.append(place)
                parameter.grad = None
        return gradients, places


def fill_buckets(model: nn.Module, bucket_bytes: int) -> list[Bucket]:
    """Cut the trainable parameters, last first as backward meets them, into buckets. One that
    modules share is there once, one without elements is not there.

    Raises ValueError for a parameter that is not float32.
    """
    groups: list[list[tuple[str, nn.Parameter]]] = []
    room = 0
    device = None
    for name, parameter in reversed(list(model.named_parameters())):
        if not parameter.requires_grad or not parameter.numel():
            continue
        if parameter.dtype != torch.float32:
            raise ValueError(f"parameter {name} is {parameter.dtype}; only float32 is supported")
        size = parameter.numel() * 4
        if not groups or size > room or parameter.device != device:
            groups.append([])
            room, device = bucket_bytes, parameter.device
        groups[-1].append((name, parameter))
        room -= size
    return [_bucket(index, group) for index, group in enumerate(groups)]


def norm2(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all elements' squares, float64 without dimensions."""
    return torch.stack(torch._foreach_norm(pieces(tensors))).double().square().sum()


def pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, long ones cut, for norms in float32.

    Such a norm on a CPU comes out low, by 1e-5 for a million elements and by 1e-2 for a hundred
    million; one in float64 takes four times as long.
    """
    cut: list[Tensor] = []
    for tensor in tensors:
        cut += [tensor] if tensor.numel() <= PIECE else torch.split(tensor.reshape(-1), PIECE)
    return cut


def _bucket(index: int, group: Sequence[tuple[str, nn.Parameter]]) -> Bucket:
    parameters = [parameter for _, parameter in group]
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    return Bucket(index, [name for name, _ in group], parameters, flat)


def _as(piece: Tensor, like: Tensor) -> Tensor:
    """``piece`` with the shape of ``like``, and with its strides where those leave no holes, as
    those of a weight in channels_last do."""
    strides = like.stride()
    if like.is_contiguous() or torch.empty_like(like, device="meta").stride() != strides:
        return piece.view(like.shape)
    return piece.as_strided(like.shape, strides, piece.storage_offset())
