"""ResNet-12 in both forms, ResNet-25 and Conv-4 written in torch.nn alone, and the way their weights are read off ours."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_fast.nn import ChannelNorm2d, Conv4, Encoder, ResNet12, ResNet25, ScaleShiftConv2d


class Layer(nn.Module):
    """Convolution and norm."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        k: int,
        *,
        stride: int = 1,
        bias: bool = True,
        eps: float | None = 1e-5,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, k, stride, padding=k // 2, bias=bias)
        self.norm = nn.Identity() if eps is None else nn.BatchNorm2d(n_out, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if conv.kernel_size == (1, 1) and conv.in_channels < 8 and torch.is_grad_enabled():
            # PyTorch's own with a stride crashes in backward on some CPUs, and another form has other bits.
            height, width = conv.stride
            last = x.is_contiguous(memory_format=torch.channels_last)
            picked = x[:, :, ::height, ::width].contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            )
            return self.norm(F.conv2d(picked, conv.weight, conv.bias))
        return self.norm(conv(x))


class CommonBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.shortcut = Layer(n_in, n_out, 1)
        self.first, self.second = Layer(n_in, n_out, 3), Layer(n_out, n_out, 3)
        self.third = Layer(n_out, n_out, 3)
        self.act, self.pool = nn.LeakyReLU(0.1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.third(self.act(self.second(self.act(self.first(x)))))
        return self.pool(self.act(out + self.shortcut(x)))


class TensorFlowBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.shortcut = Layer(n_in, n_out, 1, bias=False, eps=None)
        self.first, self.second = Layer(n_in, n_out, 3, eps=1e-3), Layer(n_out, n_out, 3, eps=1e-3)
        self.third = Layer(n_out, n_out, 3, eps=1e-3)
        self.act, self.pool = nn.LeakyReLU(0.1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.third(self.act(self.second(self.act(self.first(x))))))
        return self.pool(out + self.shortcut(x))


class StridedBlock(nn.Module):
    """The basic block of ResNet-25."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        changes = stride != 1 or n_in != n_out
        self.shortcut = Layer(n_in, n_out, 1, stride=stride, bias=False) if changes else nn.Identity()
        self.first = Layer(n_in, n_out, 3, stride=stride, bias=False)
        self.second = Layer(n_out, n_out, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def plain_network(encoder: Encoder) -> nn.Sequential:
    """The same network in torch.nn with `encoder`'s weights, Φ multiplied and added, in the same mode."""
    if isinstance(encoder, ResNet12):
        block = CommonBlock if encoder.epilogue.activation == "after_residual" else TensorFlowBlock
        outputs = [layer.shortcut.weight.shape[0] for layer in encoder.layers]
        blocks = [block(n_in, n_out) for n_in, n_out in zip([3, *outputs], outputs, strict=False)]
        network = nn.Sequential(*blocks, GlobalMean())
        pairs = [
            (ours, theirs)
            for layer, plain in zip(encoder.layers, blocks, strict=True)
            for ours, theirs in zip(
                [layer.shortcut, *layer.convs],
                [plain.shortcut, plain.first, plain.second, plain.third],
                strict=True,
            )
        ]
    elif isinstance(encoder, ResNet25):
        stem = Layer(3, encoder.stem.weight.shape[0], 3)
        strided, pairs, n_in = [], [(encoder.stem, stem)], encoder.stem.weight.shape[0]
        for ours in (block for stage in encoder.stages for block in stage):
            first, second = ours.convs
            n_out = second.weight.shape[0]
            theirs = StridedBlock(n_in, n_out, first.stride)
            pairs += [(first, theirs.first), (second, theirs.second)]
            if ours.shortcut is not None:
                pairs.append((ours.shortcut, theirs.shortcut))
            strided.append(theirs)
            n_in = n_out
        network = nn.Sequential(stem, nn.ReLU(), *strided, GlobalMean())
    else:
        assert isinstance(encoder, Conv4)
        widths = [3, *(layer.weight.shape[0] for layer in encoder.layers)]
        plain_layers = [Layer(n_in, n_out, 3) for n_in, n_out in itertools.pairwise(widths)]
        pooled = [nn.Sequential(layer, nn.ReLU(), nn.MaxPool2d(2)) for layer in plain_layers]
        network = nn.Sequential(*pooled, nn.Flatten())
        pairs = list(zip(encoder.layers, plain_layers, strict=True))
    weight = pairs[0][0].weight
    network.to(weight.dtype)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        network.to(memory_format=torch.channels_last)
    for ours, theirs in pairs:
        _copy(ours, theirs)
    return network.train(encoder.training)


@torch.no_grad()
def _copy(ours: ScaleShiftConv2d, theirs: Layer) -> None:
    scale = 1 if ours.scale is None else ours.scale
    shift = 0 if ours.shift is None else ours.shift
    theirs.conv.weight.copy_(ours.weight * scale)
    if ours.bias is None and ours.shift is not None:
        theirs.conv.bias = nn.Parameter(ours.shift.detach().clone())
    elif ours.bias is not None:
        theirs.conv.bias.copy_(ours.bias + shift)
    if ours.norm is not None:
        copy_norm(ours.norm, theirs.norm)


@torch.no_grad()
def copy_norm(ours: ChannelNorm2d, theirs: nn.BatchNorm2d) -> None:
    theirs.running_mean.copy_(ours.running_mean)
    theirs.running_var.copy_(ours.running_var)
    theirs.weight.copy_(torch.ones_like(theirs.weight) if ours.weight is None else ours.weight)
    theirs.bias.copy_(torch.zeros_like(theirs.bias) if ours.bias is None else ours.bias)


def plain_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def randomise(encoder: Encoder, seed: int = 0, *, scale_shift: bool = False) -> Encoder:
    """Random biases, affines and running statistics (and Φ), as after training; the encoder itself."""
    g = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor | None, mean: float, std: float) -> None:
        if tensor is not None:
            tensor.copy_(mean + std * torch.randn(tensor.shape, generator=g, dtype=tensor.dtype))

    for conv in encoder.convs():
        fill(conv.bias, 0, 0.3)
        if conv.norm is not None:
            fill(conv.norm.weight, 1, 0.2)
            fill(conv.norm.bias, 0, 0.3)
            fill(conv.norm.running_mean, 0, 0.3)
            fill(conv.norm.running_var, 1, 0.2)
            conv.norm.running_var.abs_().add_(0.1)
        if scale_shift:
            fill(conv.scale, 1, 0.3)
            fill(conv.shift, 0, 0.3)
    return encoder
