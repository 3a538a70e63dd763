"""`ss_conv` on a GPU: forward and input gradient, one launch each, from the weights that `effective_weights` packs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contracts import Epilogue
from . import ss_conv_first_layer
from .encoder_layers import DTYPES, encoder_layers
from .launch import Launch, observed
from .ss_conv_epilogue import padded
from .ss_conv_product import product


def forward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    *,
    residual: Tensor | None = None,
    epilogue: Epilogue,
    padding: int,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """y = pool(act(conv(x, W) + t + residual)), order and place of the activation as `epilogue` says.

    Args:
        x: [N, I, H, W] float32, float16 or bfloat16, channels-last preferred.
        weight: [O, k, k, I'] as `effective_weights.refresh` packs it, k 3 or 1, of x's dtype.
        shift: t, fp32 [O], or None.
        residual: [N, O, H', W'] of x's dtype, or None.
        epilogue: what follows.
        padding: on all sides, 0 … k − 1.
        save: return the codes that the way back reads.

    Returns:
        (y [N, O, H'', W''] channels-last; uint8 codes of that shape, `mtl_fast.ops._epilogue_codes`, or None
        where they are not asked for or there is neither activation nor pooling).
    """
    run = ss_conv_first_layer.forward if ss_conv_first_layer.fits(weight) else product
    return run(x, weight, shift, residual=residual, epilogue=epilogue, padding=padding, save=save)


def input_gradient(
    grad: Tensor,
    rotated: Tensor,
    *,
    padding: int,
    other_grad: Tensor | None = None,
    other_rotated: Tensor | None = None,
) -> Tensor:
    """dL/dx = conv_transpose(dL/dz, W), plus that of a 1×1 convolution of the same images: a block's shortcut.

    Args:
        grad: dL/dz [N, O, H', W'].
        rotated: [I, k, k, O] as `effective_weights.refresh` packs it.
        padding: of the forward convolution.
        other_grad, other_rotated: [N, O', H, W] and [I, 1, 1, O'].

    Returns:
        [N, I, H, W] channels-last, of grad's dtype.
    """
    back = rotated.shape[1] - 1 - padding
    gradient, _ = product(
        grad, rotated, None, padding=back, epilogue=Epilogue(), other=other_grad, other_weight=other_rotated
    )
    return gradient


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every 3×3 convolution of the shipped encoders but a block's last, with and without codes; all gradients."""
    epilogue = Epilogue("after_residual", 0.1)
    for layer in encoder_layers():
        if layer.n_taps == 1:
            continue  # the shortcut is a part of the block's end, its gradient of that of the first convolution
        for name, dtype in DTYPES.items():
            x, grad = layer.images(layer.n_in, dtype), layer.images(layer.n_out, dtype)
            weight = torch.empty(layer.n_out, 3, 3, padded(layer.n_in), dtype=dtype, device="meta")
            shift = torch.empty(layer.n_out, device="meta")
            for use, save in (("training", True), ("evaluation", False)):
                if not layer.last:
                    with observed() as launches:
                        forward(x, weight, shift, epilogue=epilogue, padding=1, save=save)
                    yield f"forward/{layer.name} {use} {name}", launches[0]
            if layer.n_in == 3:
                continue  # nobody asks for the gradient of images
            rotated = weight.new_empty(layer.n_in, 3, 3, layer.n_out)
            first = layer.n_in != layer.n_out  # of its block
            shortcut = (grad, rotated[:, :1, :1]) if first else (None, None)
            with observed() as launches:
                input_gradient(grad, rotated, padding=1, other_grad=shortcut[0], other_rotated=shortcut[1])
            yield f"input gradient/{layer.name}{' and shortcut' if first else ''} {name}", launches[0]
