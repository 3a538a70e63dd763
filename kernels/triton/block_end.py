"""The end of a residual block in one launch: third convolution, 1×1 shortcut, activation, 2×2 pooling and its codes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contracts import Epilogue
from . import ss_conv
from .encoder_layers import DTYPES, encoder_layers
from .launch import Launch, observed
from .ss_conv_epilogue import padded
from .ss_conv_product import product


def forward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    block_input: Tensor,
    shortcut_weight: Tensor,
    shortcut_shift: Tensor,
    *,
    epilogue: Epilogue,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = pool(act(conv(x, W) + t + r)), r = conv(x', W') + t' computed in the same sum.

    With the activation before the addition, one launch does without what the way back needs: the sign of what was
    activated. With `save` r is then computed and kept by a launch of its own.

    Args:
        x: [N, I, H, W], input of the block's last convolution.
        weight, shift: its packed weight [O, 3, 3, I'], padding 1, and fp32 [O].
        block_input: x' [N, J, H, W].
        shortcut_weight, shortcut_shift: packed, [O, 1, 1, J'], and fp32 [O].
        epilogue: what follows.
        save: keep what the way back needs.

    Returns:
        (y [N, O, H'', W''], codes as `ss_conv.forward` returns them, r [N, O, H, W] or None where it was not kept).
    """
    if save and epilogue.activation == "before_residual":
        residual, _ = ss_conv.forward(
            block_input, shortcut_weight, shortcut_shift, epilogue=Epilogue(), padding=0, save=False
        )
        output, codes = ss_conv.forward(
            x, weight, shift, residual=residual, epilogue=epilogue, padding=1, save=True
        )
        return output, codes, residual
    output, codes = product(
        x,
        weight,
        shift,
        padding=1,
        epilogue=epilogue,
        save=save,
        other=block_input,
        other_weight=shortcut_weight,
        other_shift=shortcut_shift,
    )
    return output, codes, None


def shipped() -> Iterator[tuple[str, Launch]]:
    """The end of every block of the shipped encoders, in both forms, with and without what the way back needs."""
    n_block = 3
    for layer in encoder_layers():
        if layer.n_taps == 1:
            n_block = layer.n_in  # the block's input, of the end that comes next
        if not layer.last:
            continue
        for name, dtype in DTYPES.items():
            weight = torch.empty(layer.n_out, 3, 3, layer.n_in, dtype=dtype, device="meta")
            shift = torch.empty(layer.n_out, device="meta")
            x, block_input = layer.images(layer.n_in, dtype), layer.images(n_block, dtype)
            shortcut_weight = weight.new_empty(layer.n_out, 1, 1, padded(n_block))
            for form in ("after_residual", "before_residual"):
                for use, save in (("training", True), ("evaluation", False)):
                    with observed() as launches:
                        forward(
                            x,
                            weight,
                            shift,
                            block_input,
                            shortcut_weight,
                            shift,
                            epilogue=Epilogue(form, 0.1, pool=True),
                            save=save,
                        )
                    for part, launch in zip(
                        ("end", "shortcut")[: len(launches)], reversed(launches), strict=True
                    ):
                        yield f"{part}/{n_block}-{layer.name} {form} {use} {name}", launch
