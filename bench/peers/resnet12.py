"""ResNet-12 in its common form, in plain PyTorch: layers in the order shortcut, first, second, third of each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
# A convolution's weight and bias, whatever follows it folded in.
Folded = tuple[Tensor, Tensor]


def resnet12(x: Tensor, layers: Sequence[Layer], slope: float = 0.1) -> Tensor:
    """[N, 3, H, W] → [N, D]; a layer is a convolution with its norm."""
    for i in range(0, len(layers), 4):
        shortcut, first, second, third = layers[i : i + 4]
        y = F.leaky_relu(first(x), slope)
        y = F.leaky_relu(second(y), slope)
        x = F.max_pool2d(F.leaky_relu(third(y) + shortcut(x), slope), 2)
    return x.mean(dim=(2, 3))


def folded_resnet12(x: Tensor, operands: Sequence[Folded]) -> Tensor:
    """The network whose norms are in its weights."""
    return resnet12(x, [_folded(*pair) for pair in operands])


def _folded(weight: Tensor, bias: Tensor) -> Layer:
    return lambda x: F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


class TrainableResNet12(nn.Module):
    """The network of pre-training, norms with batch statistics, and its classifier: images → logits."""

    def __init__(self, widths: Sequence[int], n_classes: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for n_in, n_out in zip([3, *widths], widths, strict=False):
            for width, k in ((n_in, 1), (n_in, 3), (n_out, 3), (n_out, 3)):
                conv = nn.Conv2d(width, n_out, k, padding=k // 2)
                self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(n_out, eps=eps)))
        self.head = nn.Linear(widths[-1], n_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(resnet12(images, list(self.layers)))
