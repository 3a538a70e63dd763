"""Checks at the door of the operations: each error names the argument and the shapes."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ..kernels.contracts import Activation, ConvOperands, Epilogue, FrozenFilters, granularity


def images_4d(name: str, x: Tensor) -> None:
    """`x` is a floating [N, C, H, W]."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{name}: expected floating images [N, C, H, W], got {x.dtype} {tuple(x.shape)}")


def operands(name: str, conv: ConvOperands) -> None:
    """Weight, bias, scale, shift and norm of one convolution fit each other."""
    weight = conv.filters.weight
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"{name}.filters.weight: expected [O, I/groups, k, k], got {tuple(weight.shape)}")
    n_out = weight.shape[0]
    if conv.scale is not None:
        try:
            granularity(conv.scale, weight)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    vectors = {"filters.bias": conv.filters.bias, "shift": conv.shift}
    if conv.norm is not None:
        vectors |= {f"norm.{key}": getattr(conv.norm, key) for key in ("mean", "var", "weight", "bias")}
    if conv.effective is not None:
        vectors |= {"effective.shift": conv.effective.shift}
        if conv.effective.weight.shape != weight.shape:
            raise ValueError(
                f"{name}.effective.weight: shape {tuple(conv.effective.weight.shape)} is not the frozen "
                f"weight's {tuple(weight.shape)}"
            )
    for key, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (n_out,):
            raise ValueError(
                f"{name}.{key}: shape {tuple(vector.shape)} does not fit weight {tuple(weight.shape)}; "
                f"expected ({n_out},)"
            )


def task_operands(name: str, conv: ConvOperands, x: tuple[int, ...], n_groups: int) -> None:
    """Weights of each task's own fit each other, images of shape `x` and the kind of statistics."""
    weight, norm = conv.filters.weight, conv.norm
    if weight.dim() != 5 or 0 in weight.shape:
        raise ValueError(f"{name}.filters.weight: expected [T, O, I/groups, k, k], got {tuple(weight.shape)}")
    if conv.scale is not None or conv.shift is not None:
        raise ValueError(f"{name}: a weight of each task's own takes no scale and shift")
    n_tasks, n_out = weight.shape[:2]
    if n_groups not in (0, n_tasks):
        raise ValueError(
            f"n_groups: {n_groups} with the weights of {n_tasks} tasks; give 0 (stored statistics) or {n_tasks}"
        )
    groups(x[0], n_tasks, None)
    channels(name, x, conv)
    vectors: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "filters.bias": (conv.filters.bias, (n_tasks, n_out))
    }
    if norm is not None:
        vectors |= {f"norm.{key}": (getattr(norm, key), (n_tasks, n_out)) for key in ("weight", "bias")}
        vectors |= {f"norm.{key}": (getattr(norm, key), (n_out,)) for key in ("mean", "var")}
    for key, (vector, shape) in vectors.items():
        if vector is not None and tuple(vector.shape) != shape:
            raise ValueError(
                f"{name}.{key}: shape {tuple(vector.shape)} does not fit weight {tuple(weight.shape)}; "
                f"expected {shape}"
            )
    if n_groups == 0:
        stored_norm(name, conv)


def by_task_alone(mask: Tensor | None, gather: object) -> None:
    """What layers with weights of each task's own do not have."""
    for name, given in (("mask", mask), ("gather", gather)):
        if given is not None:
            raise ValueError(f"{name}: weights of each task's own take none")


def channels(name: str, x: tuple[int, ...], conv: ConvOperands) -> None:
    """Images of shape `x` have the convolution's input channels."""
    expected = conv.filters.weight.shape[-3] * conv.filters.groups
    if x[1] != expected:
        raise ValueError(
            f"{name}: images {tuple(x)} have {x[1]} channels, weight "
            f"{tuple(conv.filters.weight.shape)} with groups={conv.filters.groups} takes {expected}"
        )


def output_shape(x: tuple[int, ...], filters: FrozenFilters) -> tuple[int, int, int, int]:
    """Shape of conv2d's output for images of shape `x`."""
    stride, padding, dilation = (
        (value, value) if isinstance(value, int) else value
        for value in (filters.stride, filters.padding, filters.dilation)
    )
    n_out, _, *taps = filters.weight.shape[-4:]
    height, width = (
        (x[2 + i] + 2 * padding[i] - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    if height < 1 or width < 1:
        raise ValueError(
            f"x: images {tuple(x)} are smaller than the taps of weight {tuple(filters.weight.shape)}"
        )
    return x[0], n_out, height, width


def epilogue(after: Epilogue, shape: tuple[int, ...], residual: Tensor | None = None) -> None:
    """What follows fits convolved images of this shape."""
    if after.activation not in get_args(Activation):
        raise ValueError(
            f"epilogue.activation: {after.activation!r} is not one of {', '.join(get_args(Activation))}"
        )
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual: shape {tuple(residual.shape)} is not that of the images, {shape}")
    if after.pool and min(shape[2:]) < 2:
        raise ValueError(f"epilogue.pool: a 2×2 window does not fit images {shape}")


def stored_norm(name: str, conv: ConvOperands) -> None:
    """A norm used with stored statistics has them."""
    if conv.norm is not None and (conv.norm.mean is None or conv.norm.var is None):
        raise ValueError(f"{name}.norm: stored statistics are asked for, but mean or var is None")


def groups(n_images: int, n_groups: int, mask: Tensor | None) -> None:
    """Images divide into groups of one size; a mask has one entry an image."""
    if n_groups < 1 or n_images < n_groups or n_images % n_groups:
        raise ValueError(f"n_groups: {n_images} images do not divide into {n_groups} groups of one size")
    if mask is None:
        return
    if tuple(mask.shape) != (n_images,):
        raise ValueError(f"mask: shape {tuple(mask.shape)}, expected one entry an image, ({n_images},)")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")


def gather(given: object, n_groups: int, mask: Tensor | None) -> None:
    """Statistics over several processes are those of one group, without a mask."""
    if given is not None and (n_groups != 1 or mask is not None):
        raise ValueError(
            f"gather: takes one group and no mask, got {n_groups} groups, mask {mask is not None}"
        )
