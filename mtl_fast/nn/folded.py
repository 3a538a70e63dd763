"""An encoder as an ordinary network of torch.nn: Φ and the stored norms folded into its convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.contracts import Epilogue
from ..ops.effective_weights import effective_weights
from .conv4 import Conv4
from .encoder import Encoder
from .resnet12 import ResNet12
from .resnet25 import ResNet25
from .scale_shift import ScaleShiftConv2d


class Standardise(nn.Module):
    """(images − mean)/std per channel, of 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class FoldedBlock(nn.Module):
    """A residual block of plain convolutions; see `Epilogue` for its order."""

    def __init__(self, convs: Sequence[nn.Conv2d], shortcut: nn.Module, epilogue: Epilogue) -> None:
        super().__init__()
        *inner, last = convs
        self.inner = nn.Sequential(*(layer for conv in inner for layer in (conv, _activation(epilogue))))
        self.last, self.shortcut = last, shortcut
        before = epilogue.activation == "before_residual"
        self.before = _activation(epilogue) if before else nn.Identity()
        self.after = nn.Identity() if before else _activation(epilogue)
        self.pool = nn.MaxPool2d(2) if epilogue.pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.after(self.before(self.last(self.inner(x))) + self.shortcut(x)))
        return out


class GlobalMean(nn.Module):
    """[N, D, H, W] → [N, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def folded(encoder: Encoder, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """The encoder with its stored statistics, from pixels to features, made of torch.nn alone.

    Every convolution is an `nn.Conv2d` with weight (γ/σ)·Φ_S1·W and bias (b + Φ_S2 − mean)·γ/σ + β: the same values
    as the encoder's to rounding, and no norm any more.

    Args:
        encoder: a ResNet-12, ResNet-25 or Conv-4; it stays as it is.
        mean, std: per channel, of 255: how images enter it.

    Returns:
        Images [N, 3, H, W] of 0…255, RGB → [N, feature_dim]; of the encoder's dtype and device, in evaluation mode.

    Raises:
        TypeError: another encoder.
    """
    layers: list[nn.Module]
    if isinstance(encoder, Conv4):
        layers = [
            layer
            for conv in encoder.convs()
            for layer in (_folded_conv(conv), _activation(encoder.epilogue), nn.MaxPool2d(2))
        ]
    elif isinstance(encoder, ResNet12):
        layers = [_folded_block(block, encoder.epilogue) for block in encoder.layers]
    elif isinstance(encoder, ResNet25):
        layers = [_folded_conv(encoder.stem), _activation(encoder.epilogue)]
        layers += [
            _folded_block(block, encoder.epilogue) for stage in encoder.stages for block in stage.children()
        ]
    else:
        raise TypeError(f"encoder: {type(encoder).__name__} has no folded form")
    layers.append(nn.Flatten() if isinstance(encoder, Conv4) else GlobalMean())
    weight = encoder.convs()[0].weight
    network = nn.Sequential(Standardise(mean, std), *layers)
    return network.to(weight.device, weight.dtype).requires_grad_(False).eval()


def _activation(epilogue: Epilogue) -> nn.Module:
    return nn.LeakyReLU(epilogue.slope) if epilogue.slope else nn.ReLU()


def _folded_block(block: nn.Module, epilogue: Epilogue) -> FoldedBlock:
    """Of a module with `convs` and `shortcut`."""
    shortcut = block.shortcut
    return FoldedBlock(
        [_folded_conv(conv) for conv in block.convs],  # type: ignore[union-attr] # a ModuleList
        _folded_conv(shortcut) if isinstance(shortcut, ScaleShiftConv2d) else nn.Identity(),
        epilogue,
    )


def _folded_conv(conv: ScaleShiftConv2d) -> nn.Conv2d:
    (effective,) = effective_weights([conv.operands()])
    n_out, n_in, k, _ = conv.weight.shape
    with torch.device("meta"):
        made = nn.Conv2d(n_in * conv.groups, n_out, k, conv.stride, conv.padding, conv.dilation, conv.groups)
    # In the usual order of memory, which every reader of an export takes.
    made.weight = nn.Parameter(effective.weight.clone(memory_format=torch.contiguous_format))
    made.bias = nn.Parameter(effective.shift.clone())
    return made
