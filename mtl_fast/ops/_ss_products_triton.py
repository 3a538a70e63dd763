"""A layer's products in the Triton operators, by the layer's route: our kernel, or cuDNN's convolution and one pass.

On the route `cudnn` PyTorch's convolution multiplies the images by W_eff, the norm folded in, and one launch does what
follows. The gradient of the images is that convolution with the rotated weight, which the refresh has written anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.contracts import Epilogue
from ._ss_layers_triton import Layer, channels_last


def _convolved(x: Tensor, packed: Tensor, padding: int) -> Tensor:
    """conv(x, W) of a packed weight [O, k, k, I'], whose permutation is a channels-last weight as it lies."""
    weight = packed[..., : x.shape[1]].permute(0, 3, 1, 2)
    return torch.ops.aten.convolution(x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1)


def forward(
    x: Tensor, layer: Layer, *, residual: Tensor | None = None, epilogue: Epilogue, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(y [N, O, H'', W''], its codes or None) of images [N, I, H, W], both channels-last."""
    from ..kernels.triton import epilogue as pass_kernel
    from ..kernels.triton import ss_conv

    if layer.cudnn:
        z = _convolved(x, layer.weight, layer.padding)
        return pass_kernel.finished(z, layer.folded, residual=residual, epilogue=epilogue, save=save)
    return ss_conv.forward(
        x,
        layer.weight,
        layer.folded,
        residual=residual,
        epilogue=epilogue,
        padding=layer.padding,
        save=save,
    )


def block_end(
    x: Tensor, third: Layer, block_input: Tensor, shortcut: Layer, *, epilogue: Epilogue, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, codes or None, the shortcut's images where the way back reads them, or None) of a block's last convolution.

    Where that runs in our kernel the shortcut is a part of its sum, whatever the shortcut's own route.
    """
    from ..kernels.triton import block_end as kernels

    if not third.cudnn:
        return kernels.forward(
            x,
            third.weight,
            third.folded,
            block_input,
            shortcut.weight,
            shortcut.folded,
            epilogue=epilogue,
            save=save,
        )
    residual, _ = forward(block_input, shortcut, epilogue=Epilogue(), save=False)
    output, codes = forward(x, third, residual=residual, epilogue=epilogue, save=save)
    kept = save and epilogue.activation == "before_residual"
    return output, codes, residual if kept else None


def input_gradient(
    grad: Tensor, layer: Layer, *, shortcut_grad: Tensor | None = None, shortcut: Layer | None = None
) -> Tensor:
    """dL/dx [N, I, H, W] from G = dL/dz, plus that of a shortcut of the same images: in our kernel one sum."""
    from ..kernels.triton import ss_conv

    if not layer.cudnn:
        return ss_conv.input_gradient(
            grad,
            layer.rotated,
            padding=layer.padding,
            other_grad=shortcut_grad,
            other_rotated=None if shortcut is None else shortcut.rotated,
        )
    found = channels_last(_convolved(grad, layer.rotated, layer.rotated.shape[1] - 1 - layer.padding))
    if shortcut is not None and shortcut_grad is not None:
        found += input_gradient(shortcut_grad, shortcut)
    return found
