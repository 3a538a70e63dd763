"""`ss_block`: one residual block of scale-and-shift convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..kernels.contracts import BlockOutput, ConvOperands, Epilogue
from ..kernels.reference import episode_norm as reference_norm
from ..kernels.reference import ss_block as reference
from . import _check, _episode_norm_native, _ss_block_triton, _ss_conv_native, _ss_layers_triton
from .backend import choose, register
from .episode_norm import episode_norm
from .task_conv import task_conv


def _native_runs(
    convs: Sequence[ConvOperands] = (),
    shortcut: ConvOperands | None = None,
    x: Tensor | None = None,
    epilogue: Epilogue | None = None,
    n_groups: int = 0,
    fold: bool = True,
    **_: Any,
) -> tuple[bool, str]:
    layers = [*convs] if shortcut is None else [*convs, shortcut]
    epilogue = epilogue or Epilogue()
    if n_groups:
        # Batch statistics follow the convolutions as an operation of their own.
        for norm in (conv.norm for conv in layers if conv.norm is not None):
            can, reason = _episode_norm_native.runs(x, norm, epilogue, None)
            if not can:
                return False, reason
        layers = [conv.without_norm() for conv in layers]
    return _ss_conv_native.runs(layers, x, epilogue, None, fold)


def _triton_runs(
    convs: Sequence[ConvOperands] = (),
    shortcut: ConvOperands | None = None,
    x: Tensor | None = None,
    epilogue: Epilogue | None = None,
    n_groups: int = 0,
    fold: bool = True,
    **_: Any,
) -> tuple[bool, str]:
    layers = [*convs] if shortcut is None else [*convs, shortcut]
    if n_groups:
        layers = [conv.without_norm() for conv in layers]
    return _ss_layers_triton.runs(layers, x, epilogue or Epilogue(), None, fold)


def _explained(
    convs: Sequence[ConvOperands] = (),
    shortcut: ConvOperands | None = None,
    x: Tensor | None = None,
    **_: Any,
) -> str:
    return _ss_layers_triton.explained([*convs] if shortcut is None else [*convs, shortcut], x)


register("ss_block", "native", _native_runs)
register("ss_block", "triton", _triton_runs, _explained)


def ss_block(
    x: Tensor,
    convs: Sequence[ConvOperands],
    shortcut: ConvOperands | None,
    *,
    epilogue: Epilogue,
    n_groups: int = 0,
    mask: Tensor | None = None,
    fold: bool = True,
    gather: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> BlockOutput:
    """A residual block: convolution → norm → activation, …, the last one with the residual and the pooling.

    Every convolution but the last is followed by its norm and the activation; the last by the whole
    `epilogue` with the shortcut as its residual. The common form of ResNet-12 is
    ``activation="after_residual"``, the TensorFlow form of MTL ``"before_residual"``.

    Args:
        x: [N, I, H, W] floating.
        convs: the block's convolutions, in order (three in ResNet-12); where each task has weights of its own,
            every layer is a `task_conv`.
        shortcut: the 1×1 convolution (with its norm, if any) on the residual path; None is the identity.
        epilogue: activation and pooling of the block's end.
        n_groups: 0 uses the norms' stored statistics; g ≥ 1 those of g groups of images (`episode_norm`).
        mask: bool [N], images that count, as in `episode_norm`; only with n_groups ≥ 1.
        fold: as in `ss_conv`; stored statistics only.
        gather: as in `episode_norm`, for images that several processes share.
        backend: ``auto`` or a backend's name.

    Returns:
        (output [N, O, H', W'], statistics): a (mean, var, count) triple as `episode_norm` returns it for each
        normalised convolution, the shortcut's first; empty with stored statistics.

    Raises:
        ValueError: shapes that do not fit, both named; an unknown activation.
        TypeError: a mask that is not bool.
    """
    _check.images_4d("x", x)
    if not convs:
        raise ValueError("convs: a block needs at least one convolution")
    if convs[0].filters.by_task:
        _check.by_task_alone(mask, gather)
        layer = partial(task_conv, backend=backend)
        return reference.ss_block(
            x,
            convs,
            shortcut,
            epilogue=epilogue,
            n_groups=n_groups,
            mask=None,
            fold=fold,
            layer_by_task=layer,
        )
    named = [(f"convs[{i}]", conv) for i, conv in enumerate(convs)]
    if shortcut is not None:
        named.append(("shortcut", shortcut))
    for name, conv in named:
        _check.operands(name, conv)
        if n_groups == 0:
            _check.stored_norm(name, conv)
    shape: tuple[int, ...] = tuple(x.shape)
    for name, conv in named[: len(convs)]:
        _check.channels(name, shape, conv)
        shape = _check.output_shape(shape, conv.filters)
    residual_shape: tuple[int, ...] = tuple(x.shape)
    if shortcut is not None:
        _check.channels("shortcut", x.shape, shortcut)
        residual_shape = _check.output_shape(x.shape, shortcut.filters)
    if residual_shape != shape:
        raise ValueError(
            f"shortcut: its images {residual_shape} are not of the shape of the last convolution's, {shape}"
        )
    _check.epilogue(epilogue, shape)
    if n_groups:
        _check.groups(x.shape[0], n_groups, mask)
    elif mask is not None:
        raise ValueError("mask: only batch statistics take one; give n_groups ≥ 1")
    _check.gather(gather, n_groups, mask)
    choice = choose(
        "ss_block",
        backend,
        x=x,
        convs=convs,
        shortcut=shortcut,
        epilogue=epilogue,
        n_groups=n_groups,
        fold=fold,
    )
    options: dict[str, Any] = {}
    if choice.backend == "native":
        options = {"convolve": _ss_conv_native.ss_conv, "normalise": _episode_norm_native.episode_norm}
    if gather is not None:
        options["normalise"] = partial(reference_norm.episode_norm, gather=gather)
    run = reference.ss_block
    if choice.backend == "triton":
        run = _ss_block_triton.ss_block
        # Batch statistics follow the convolutions as an operation of their own, on whichever backend has it.
        options.setdefault("normalise", episode_norm)
    return run(x, convs, shortcut, epilogue=epilogue, n_groups=n_groups, mask=mask, fold=fold, **options)
