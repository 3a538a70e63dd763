"""Networks and images for the rows of whole networks, and how the peers get theirs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import Preprocess
from mtl_fast.nn import ResNet12
from mtl_fast.ops import ConvOperands, FrozenFilters, ss_conv
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE

from .peers.meta_step import FrozenLayer

FULL, SLIM = (64, 128, 256, 512), (8, 16, 24, 32)
N_CONVS_DEEP = 12  # convolutions one after the other, and as many rectifiers; 4 poolings
N_KINKS_DEEP = N_CONVS_DEEP + 4
PREPROCESS = Preprocess((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


def random_store(pixels: int, n_classes: int = 8, per_class: int = 40) -> ImageStore:
    """Noise about a colour for each image, which lies about that of its class; hard enough to have a loss."""
    g = torch.Generator().manual_seed(pixels)
    labels = torch.arange(n_classes).repeat_interleave(per_class)

    def uniform(reach: int, *shape: int) -> Tensor:
        return torch.randint(-reach, reach + 1, shape, generator=g)

    colours = 128 + uniform(25, n_classes, 1, 1, 3)[labels] + uniform(40, len(labels), 1, 1, 3)
    images = colours + uniform(60, len(labels), pixels, pixels, 3)
    names = tuple(str(label) for label in range(n_classes))
    return ImageStore(images.to(torch.uint8), labels, names)


def images(n: int, pixels: int) -> Tensor:
    """Normalised images [n, 3, pixels, pixels], channels-last."""
    store = random_store(pixels)
    return PREPROCESS(store, torch.arange(n) % store.n_images)


def new_resnet12(widths: tuple[int, ...]) -> ResNet12:
    torch.manual_seed(0)
    return ResNet12(widths, dropout=0.0).to(memory_format=torch.channels_last)


@torch.no_grad()
def trained_resnet12(widths: tuple[int, ...], pixels: int) -> ResNet12:
    """In evaluation mode, with statistics of real activations and Φ (`kernel`) a little off the identity."""
    encoder = new_resnet12(widths)
    for norm in encoder.norms():
        norm.momentum = 1.0
    encoder.train()(images(40, pixels))
    # Features of norm about 3, as training leaves them: with those of a new network, ten times as long, the inner
    # loop leaps about, and float32 and float64 end in different places.
    last = encoder.layers[-1]
    for conv in (last.shortcut, last.convs[-1]):
        conv.norm.weight.mul_(0.1)
    encoder.enable_scale_shift("kernel")
    for parameter in encoder.scale_shift_parameters():
        parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return encoder.eval()


def layers_of(encoder: ResNet12, dtype: torch.dtype = torch.float32) -> list[FrozenLayer]:
    """Copies of the encoder's tensors, NCHW, as the peers take them."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.contiguous_format).to(dtype)

    return [
        FrozenLayer(
            weight=copy(conv.weight),
            bias=copy(conv.bias),
            mean=copy(conv.norm.running_mean),
            var=copy(conv.norm.running_var),
            gamma=copy(conv.norm.weight),
            beta=copy(conv.norm.bias),
            eps=conv.norm.eps,
            scale=None if conv.scale is None else copy(conv.scale),
            shift=None if conv.shift is None else copy(conv.shift),
        )
        for conv in encoder.convs()
    ]


def direct_flops(widths: tuple[int, ...], pixels: int) -> float:
    """Of one image's forward pass, additions counted too."""
    total = 0
    for n_in, n_out in zip((3, *widths), widths, strict=False):
        total += 2 * pixels**2 * (n_in * n_out + 9 * n_out * (n_in + 2 * n_out))
        pixels //= 2
    return total


def native_backend() -> tuple[str, str]:
    """("native", "") where convolutions have it, else ("auto", why not)."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return "auto", f"{ENVIRONMENT_VARIABLE}={chosen}"
    x = torch.zeros(1, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    try:
        ss_conv(x, ConvOperands(FrozenFilters(weight, padding=1)), backend="native")
    except (RuntimeError, ValueError) as error:
        # Only the choice of backend names what was asked for; anything else is a fault.
        if "'native'" not in str(error):
            raise
        return "auto", str(error)
    return "native", ""
