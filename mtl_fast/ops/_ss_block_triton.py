"""The Triton backend of `ss_block`: a residual block with stored norms as one operator, forward and backward.

`mtl_fast::triton_ss_block` runs two convolutions and the block's end, with R the gradient of the shortcut's images:

    h₁ = act(conv₁(x))    h₂ = act(conv₂(h₁))    y = pool(act(conv₃(h₂) + shortcut(x)))
    dL/dx = conv_transpose(G₁, W₁) + conv_transpose(R, W_shortcut)        one launch, R's product as more of the sum

where the layers' route is our kernel; a layer that takes cuDNN runs as a product and one pass of its own.

Other blocks (of another number of convolutions, without a shortcut, with batch statistics) run layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.contracts import BlockOutput, ConvOperands, Epilogue
from ..kernels.reference import ss_block as reference
from ..kernels.reference.ss_conv import apply_epilogue
from . import _ss_conv_triton
from ._double_backward import alone, gradients
from ._library import LIBRARY
from ._ss_layers_triton import (
    LAYER,
    N_LAYER,
    Layer,
    channels_last,
    differentiable,
    empty_images,
    flat,
    layers,
    output_size,
    shaped,
    unflat,
    unwound,
)
from ._ss_products_triton import block_end, forward, input_gradient

NAMES = ("first_", "second_", "third_", "shortcut_")
_LAYERS = ", ".join(LAYER.format(name) for name in NAMES)
LIBRARY.define(
    f"triton_ss_block(Tensor x, {_LAYERS}, int activation, float slope, bool pool, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "triton_ss_block_backward(Tensor grad, Tensor x, Tensor output, Tensor first_output, Tensor second_output, "
    "Tensor first_codes, Tensor second_codes, Tensor third_codes, Tensor residual, "
    f"{_LAYERS}, int activation, float slope, bool pool, bool needs_x, bool[] needs_scale, bool needs_shortcut) "
    "-> Tensor[]"
)
N_LAYERS = len(NAMES) * N_LAYER


def fused(convs: Sequence[ConvOperands], shortcut: ConvOperands | None, n_groups: int) -> bool:
    """Whether a block is of the form that one operator runs."""
    if shortcut is None or len(convs) != 3 or n_groups:
        return False
    geometry = [(conv.filters.weight.shape[-1], conv.filters.padding) for conv in (*convs, shortcut)]
    return all(found in ((3, 1), (3, (1, 1))) for found in geometry[:3]) and geometry[3] in (
        (1, 0),
        (1, (0, 0)),
    )


def ss_block(
    x: Tensor,
    convs: Sequence[ConvOperands],
    shortcut: ConvOperands | None,
    *,
    epilogue: Epilogue,
    n_groups: int,
    mask: Tensor | None,
    fold: bool,
    **options: Any,
) -> BlockOutput:
    """[N, I, H, W] → [N, O, H', W']; see `mtl_fast.ops.ss_block`; `options` are those of the reference."""
    if shortcut is None or not fused(convs, shortcut, n_groups):
        return reference.ss_block(
            x,
            convs,
            shortcut,
            epilogue=epilogue,
            n_groups=n_groups,
            mask=mask,
            fold=fold,
            convolve=_ss_conv_triton.ss_conv,
            **options,
        )
    made = layers([*convs, shortcut], x)
    given = [x, *(t for layer in made for t in (layer.scale, layer.shift))]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    arguments = [value for layer in made for value in layer]
    output, *_ = torch.ops.mtl_fast.triton_ss_block(x, *arguments, *flat(epilogue), save)
    return BlockOutput(output, ())


def _split(arguments: Sequence[Any]) -> tuple[list[Layer], Sequence[Any]]:
    """(the four layers, what follows them)."""
    parts = [Layer(*arguments[i : i + N_LAYER]) for i in range(0, N_LAYERS, N_LAYER)]
    return parts, arguments[N_LAYERS:]


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    (first, second, third, shortcut), (*after, save) = _split(arguments)
    epilogue = unflat(*after)
    inner = replace(epilogue, pool=False)
    x = channels_last(x)
    hidden, kept = x, []
    for layer in (first, second):
        hidden, codes = forward(hidden, layer, epilogue=inner, save=save)
        kept.append((hidden, codes))
    output, codes, residual = block_end(hidden, third, x, shortcut, epilogue=epilogue, save=save)
    nothing, uncoded = x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    if not save:
        return output, nothing, nothing.clone(), uncoded, uncoded.clone(), uncoded.clone(), nothing.clone()
    all_codes = [kept[0][1], kept[1][1], codes]
    return (
        output,
        kept[0][0],
        kept[1][0],
        *(x.new_empty(0, dtype=torch.uint8) if c is None else c for c in all_codes),
        nothing if residual is None else residual,
    )


def _gradients(
    grad: Tensor,
    x: Tensor,
    output: Tensor,
    first_output: Tensor,
    second_output: Tensor,
    first_codes: Tensor,
    second_codes: Tensor,
    third_codes: Tensor,
    residual: Tensor,
    *arguments: Any,
) -> list[Tensor]:
    """dL/dx, and for each layer dL/dΦ_S1 and dL/dΦ_S2; empty where not needed."""
    (first, second, third, shortcut), (*after, needs_x, needs_scale, needs_shortcut) = _split(arguments)
    epilogue = unflat(*after)
    inner = replace(epilogue, pool=False)
    x = channels_last(x)
    # What `filter` subtracts, and what its shortcut's gradient is made of.
    read = [needs_scale[i] and layer.by_filter for i, layer in ((2, third), (3, shortcut))]
    added: Tensor | None = residual if residual.numel() else None
    if any(read) and added is None:
        added, _ = forward(x, shortcut, epilogue=Epilogue(), save=False)
    steps = (
        (third, second_output, output, third_codes, epilogue, added),
        (second, first_output, second_output, second_codes, inner, None),
        (first, x, first_output, first_codes, inner, None),
    )
    skipped = images = channels_last(grad)
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for i, (layer, layer_input, layer_output, codes, follows, layer_residual) in enumerate(steps):
        images, residual_grad, *of_layer = unwound(
            images,
            codes,
            layer_input,
            layer,
            epilogue=follows,
            needs_scale=needs_scale[2 - i],
            output=layer_output,
            residual=layer_residual,
        )
        found.insert(0, (of_layer[0], of_layer[1]))
        if i == 0:
            skipped = residual_grad
        if i < 2:
            images = input_gradient(images, layer)
    of_shortcut: tuple[Tensor | None, Tensor | None] = (None, None)
    if needs_shortcut:
        *_, scale_grad, shift_grad = unwound(
            skipped,
            third_codes,
            x,
            shortcut,
            epilogue=Epilogue(),
            needs_scale=needs_scale[3],
            output=skipped if added is None else added,
            residual=None,
        )
        of_shortcut = (scale_grad, shift_grad)
    x_grad: Tensor | None = None
    if needs_x:
        x_grad = input_gradient(images, first, shortcut_grad=skipped, shortcut=shortcut)
    found.append(of_shortcut)
    every: list[Tensor | None] = [x_grad]
    for layer, of_phi in zip((first, second, third, shortcut), found, strict=True):
        every += [shaped(of_phi[0], layer), of_phi[1]]
    return [x.new_empty(0) if t is None else t for t in every]


for _device in ("CUDA", "CPU"):
    LIBRARY.impl("triton_ss_block", _forward, _device)
    LIBRARY.impl("triton_ss_block_backward", _gradients, _device)


@torch.library.register_fake("mtl_fast::triton_ss_block")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    (first, second, third, _), (activation, _, pool, save) = _split(arguments)
    size = output_size(x, first)
    widths = [layer.folded.shape[0] for layer in (first, second, third)]
    pooled = [length // (2 if pool else 1) for length in size]
    output = empty_images(x, x.shape[0], widths[2], *pooled)
    if not save:
        shapes = [x.new_empty(0, dtype=t) for t in (x.dtype,) * 2 + (torch.uint8,) * 3 + (x.dtype,)]
        return (output, *shapes)
    hidden = [empty_images(x, x.shape[0], width, *size) for width in widths[:2]]
    codes = [
        t.to(torch.uint8) if activation or (pool and t is output) else x.new_empty(0, dtype=torch.uint8)
        for t in (*hidden, output)
    ]
    kept = activation == 1
    residual = empty_images(x, x.shape[0], widths[2], *size) if kept else x.new_empty(0)
    return (output, *hidden, *codes, residual)


@torch.library.register_fake("mtl_fast::triton_ss_block_backward")
def _(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    parts, (*_, needs_x, needs_scale, needs_shortcut) = _split(arguments[7:])
    made = [empty_images(x, *x.shape) if needs_x else x.new_empty(0)]
    for i, layer in enumerate(parts):
        scale = layer.scale if needs_scale[i] else None
        made.append(x.new_empty(0) if scale is None else x.new_empty(scale.shape, dtype=layer.dtype))
        summed = i < 3 or needs_shortcut
        made.append(x.new_empty(layer.folded.shape[0], dtype=layer.dtype) if summed else x.new_empty(0))
    return made


_SCALES, _SHIFTS = (
    [1 + i * N_LAYER + Layer._fields.index(name) for i in range(len(NAMES))] for name in ("scale", "shift")
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *rest = inputs
    parts, (*epilogue, _) = _split(rest)
    ctx.save_for_backward(x, *output, *(t for layer in parts for t in layer.tensors))
    ctx.numbers = [layer.numbers for layer in parts]
    ctx.epilogue = epilogue
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, output, *saved = alone(*ctx.saved_tensors) if torch.is_grad_enabled() else ctx.saved_tensors
    kept, tensors = saved[:6], saved[6:]
    each = len(tensors) // len(NAMES)
    parts = [
        Layer.with_tensors(tensors[i * each : (i + 1) * each], *numbers)
        for i, numbers in enumerate(ctx.numbers)
    ]
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        wanted: dict[int, Tensor | None] = {0: x}
        wanted |= {i: layer.scale for i, layer in zip(_SCALES, parts, strict=True)}
        wanted |= {i: layer.shift for i, layer in zip(_SHIFTS, parts, strict=True)}
        y = _differentiable(x, parts, unflat(*ctx.epilogue))
        return gradients([y], [grad], wanted, needs)
    needs_scale = [needs[i] for i in _SCALES]
    found = torch.ops.mtl_fast.triton_ss_block_backward(
        grad,
        x,
        output,
        *kept,
        *(value for layer in parts for value in layer),
        *ctx.epilogue,
        needs[0],
        needs_scale,
        needs_scale[3] or needs[_SHIFTS[3]],
    )
    grads: list[Tensor | None] = [None] * len(needs)
    positions = [0, *(i for pair in zip(_SCALES, _SHIFTS, strict=True) for i in pair)]
    for i, value in zip(positions, found, strict=True):
        grads[i] = value if needs[i] else None
    return tuple(grads)


def _differentiable(x: Tensor, parts: Sequence[Layer], epilogue: Epilogue) -> Tensor:
    """The block as PyTorch expressions."""
    first, second, third, shortcut = parts
    inner = replace(epilogue, pool=False)
    hidden = apply_epilogue(differentiable(x, first), inner, None)
    hidden = apply_epilogue(differentiable(hidden, second), inner, None)
    return apply_epilogue(differentiable(hidden, third), epilogue, differentiable(x, shortcut))


torch.library.register_autograd("mtl_fast::triton_ss_block", _backward, setup_context=_context)
