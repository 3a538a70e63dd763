"""A network as users write them: groups, dilation, padding modes, a layer used twice, a tied weight, dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class UserNetwork(nn.Module):
    """[N, 3, H, W] → [N, 10], for H, W ≥ 8; `feature_dim` is 10."""

    feature_dim = 10

    def __init__(self, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=False, padding_mode="reflect")
        self.norm = norm(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.twice = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.alias = self.twice[0]
        self.tied = nn.Conv2d(8, 8, 3, padding="same")
        self.tied.weight = self.alias.weight
        self.listed = [self.tied]  # a reference that is no submodule
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.last = nn.Conv2d(6, 10, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.twice(self.twice(self.grouped(x)))
        for layer in self.listed:
            x = layer(x)
        return self.dropout(self.last(torch.relu(self.up(x))).mean(dim=(2, 3)))


def user_network(dtype: torch.dtype = torch.float64, norm: Norm = nn.BatchNorm2d) -> UserNetwork:
    """One with trained statistics, in training mode."""
    torch.manual_seed(0)
    network = UserNetwork(norm).to(dtype)
    for _ in range(3):
        network(2 * user_images(16, dtype=dtype) + 1)
    return network


def user_images(n: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    images = torch.randn(n, 3, 12, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return images.to(dtype, memory_format=torch.channels_last)
