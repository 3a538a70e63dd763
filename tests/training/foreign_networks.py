"""Networks of MTL's public programs in a small size, with the names that their files have, and what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESNET12, RESNET25 = (4, 5, 6, 7), (6, 7, 8)
N_WAY = 3


class MtlConv(nn.Conv2d):
    """A convolution with ``mtl_weight`` and, beside a bias only, ``mtl_bias``."""

    def __init__(self, *arguments: int, mtl: bool, **options: int) -> None:
        super().__init__(*arguments, **options)
        if mtl:
            self.mtl_weight = nn.Parameter(torch.ones(*self.weight.shape[:2], 1, 1))
            if self.bias is not None:
                self.mtl_bias = nn.Parameter(torch.zeros_like(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * getattr(self, "mtl_weight", 1)
        bias = None if self.bias is None else self.bias + getattr(self, "mtl_bias", 0)
        return F.conv2d(x, weight, bias, self.stride, self.padding)


def downsample(n_in: int, n_out: int, stride: int, mtl: bool) -> nn.Sequential:
    return nn.Sequential(
        MtlConv(n_in, n_out, 1, stride, bias=False, mtl=mtl),
        nn.BatchNorm2d(n_out),
    )


class Block25(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, mtl: bool) -> None:
        super().__init__()
        self.conv1 = MtlConv(n_in, n_out, 3, stride, 1, bias=False, mtl=mtl)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = MtlConv(n_out, n_out, 3, 1, 1, bias=False, mtl=mtl)
        self.bn2 = nn.BatchNorm2d(n_out)
        if stride != 1:
            self.downsample = downsample(n_in, n_out, stride, mtl)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.downsample(x) if hasattr(self, "downsample") else x
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + residual)


class ResNet25(nn.Module):
    def __init__(self, mtl: bool, widths: Sequence[int] = RESNET25) -> None:
        super().__init__()
        n_in = widths[0] // 2
        self.conv1, self.bn1 = MtlConv(3, n_in, 3, 1, 1, mtl=mtl), nn.BatchNorm2d(n_in)
        for i, width in enumerate(widths):
            blocks = [Block25(width if b else n_in, width, 1 if b else 2, mtl) for b in range(4)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            n_in = width

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))


class Block12(nn.Module):
    def __init__(self, n_in: int, n_out: int, mtl: bool) -> None:
        super().__init__()
        for j in range(3):
            conv = MtlConv(n_out if j else n_in, n_out, 3, 1, 1, bias=False, mtl=mtl)
            setattr(self, f"conv{j + 1}", conv)
            setattr(self, f"bn{j + 1}", nn.BatchNorm2d(n_out))
        self.downsample = downsample(n_in, n_out, 1, mtl)

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        out = self.bn3(self.conv3(F.leaky_relu(self.bn2(self.conv2(out)), 0.1)))
        return F.max_pool2d(F.leaky_relu(out + self.downsample(x), 0.1), 2)


class ResNet12(nn.Module):
    def __init__(self, mtl: bool, widths: Sequence[int] = RESNET12) -> None:
        super().__init__()
        for i, (n_in, n_out) in enumerate(zip((3, *widths[:-1]), widths, strict=True)):
            setattr(self, f"layer{i + 1}", nn.Sequential(Block12(n_in, n_out, mtl)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))


class Learner(nn.Module):
    """The authors' learner (``encoder``) or LibFewShot's (``emb_func``), with its head or its pre-training layers."""

    def __init__(self, encoder: nn.Module, name: str, width: int, *, pretraining: bool = False) -> None:
        super().__init__()
        setattr(self, name, encoder)
        self.base_learner = nn.Module()
        self.base_learner.fc1_w = nn.Parameter(torch.randn(N_WAY, width))
        self.base_learner.fc1_b = nn.Parameter(torch.randn(N_WAY))
        both = nn.ParameterList([self.base_learner.fc1_w, self.base_learner.fc1_b])
        self.base_learner.register_module("var" if pretraining else "vars", both)
        if pretraining:
            self.pre_fc = nn.Sequential(nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, 64))


def trained(network: nn.Module, seed: int = 0, *, moved: bool = True) -> nn.Module:
    """Random numbers everywhere, Φ (if any) only where `moved`; in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=g) if tensor.is_floating_point() else None
            if noise is None:
                tensor.fill_(77)  # num_batches_tracked
            elif "mtl_" in name:
                tensor.add_(0.3 * noise * moved)
            elif "running_var" in name:
                tensor.copy_(0.5 + noise.abs())
            elif tensor.dim() == 4:
                tensor.copy_(noise / (tensor[0].numel() ** 0.5))
            else:
                tensor.copy_(("bn" in name or "downsample" in name) * name.endswith("weight") + 0.3 * noise)
    return network.eval()


def tensorflow_files(seed: int = 0, widths: Sequence[int] = RESNET12) -> dict[str, dict[str, np.ndarray]]:
    """``weights``, ``ss_weights`` and ``fc_weights`` of the TensorFlow program, float32, [k, k, I, O]."""
    random = np.random.default_rng(seed)

    def coarse(*shape: int) -> np.ndarray:
        """Multiples of 1/64: sums and differences of biases are exact."""
        return (random.integers(-64, 65, shape) / 64).astype(np.float32)

    weights, ss = {}, {}
    n_in = 3
    for i, width in enumerate(widths):
        for j in range(3):
            channels = n_in if j == 0 else width
            fan = (9 * channels) ** 0.5
            weights[f"block{i + 1}_conv{j + 1}"] = (random.normal(size=(3, 3, channels, width)) / fan).astype(
                "f4"
            )
            weights[f"block{i + 1}_bias{j + 1}"] = coarse(width)
            ss[f"block{i + 1}_conv{j + 1}"] = (1 + coarse(1, 1, channels, width) / 2).astype("f4")
            ss[f"block{i + 1}_bias{j + 1}"] = coarse(width)
        weights[f"block{i + 1}_conv_res"] = (random.normal(size=(1, 1, n_in, width)) / n_in**0.5).astype("f4")
        n_in = width
    weights |= {"w5": coarse(n_in, 64), "b5": coarse(64)}
    return {
        "weights": weights,
        "ss_weights": ss,
        "fc_weights": {"w5": coarse(n_in, N_WAY), "b5": coarse(N_WAY)},
    }


def tensorflow_features(files: dict[str, dict[str, np.ndarray]], images: Tensor, *, ss: bool) -> Tensor:
    """[N, H, W, 3] → [N, D] in float64 as that program computes it: batch statistics, no γ, β at 0."""

    def conv(x: Tensor, kernel: np.ndarray) -> Tensor:
        k, n, (height, width) = kernel.shape[0], len(x), x.shape[1:3]
        patches = F.unfold(x.permute(0, 3, 1, 2), k, padding=k // 2)  # [N, I·k·k, H·W]
        patches = patches.view(n, -1, k, k, height, width)
        return torch.einsum("nihwyx,hwio->nyxo", patches, torch.from_numpy(kernel).double())

    def normalised(x: Tensor) -> Tensor:
        mean, var = x.mean(dim=(0, 1, 2)), x.var(dim=(0, 1, 2), unbiased=False)
        x = (x - mean) / (var + 1e-3).sqrt()
        return torch.maximum(x, 0.1 * x)

    weights, ss_weights = files["weights"], files["ss_weights"]
    x = images.double()
    for i in range(1, 5):
        net = x
        for j in range(1, 4):
            kernel, bias = weights[f"block{i}_conv{j}"], weights[f"block{i}_bias{j}"]
            if ss:
                kernel = kernel.astype("f8") * ss_weights[f"block{i}_conv{j}"].astype("f8")
                bias = ss_weights[f"block{i}_bias{j}"]
            net = normalised(conv(net, kernel) + torch.from_numpy(bias).double())
        net = net + conv(x, weights[f"block{i}_conv_res"])
        n, height, width, channels = net.shape
        net = net[:, : height // 2 * 2, : width // 2 * 2]
        x = net.reshape(n, height // 2, 2, width // 2, 2, channels).amax(dim=(2, 4))
    return x.mean(dim=(1, 2))
