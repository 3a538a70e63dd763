"""One scale-and-shift convolution of a slim and of the full ResNet-12: `pytest bench/ops/bench_ss_conv.py`.

The peer is plain PyTorch: scale the weight, conv2d, batch_norm, leaky_relu, max_pool2d. Every row is checked
against it in float64 before it is timed. Forward and forward-with-gradients are separate rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.ops import ChannelNorm, ConvOperands, Epilogue, FrozenFilters, effective_weights, ss_conv

# images, channels, pixels: one task of 80 images in a slim network; a few in the full one
SIZES = {"slim": (80, 64, 16), "full": (8, 256, 21)}
EPILOGUE = Epilogue("after_residual", 0.1, pool=True)


def problem(size: str, granularity: str, dtype: torch.dtype) -> tuple[Tensor, ConvOperands]:
    n, channels, pixels = SIZES[size]
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    x = normal(n, channels, pixels, pixels).contiguous(memory_format=torch.channels_last)
    weight = normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
    scale = 1 + 0.1 * normal(channels, channels if granularity == "kernel" else 1, 1, 1)
    norm = ChannelNorm(normal(channels), normal(channels).square() + 0.5, normal(channels), normal(channels))
    filters = FrozenFilters(weight.contiguous(memory_format=torch.channels_last), normal(channels), padding=1)
    return x, ConvOperands(filters, scale, normal(channels), norm)


def plain(x: Tensor, conv: ConvOperands) -> Tensor:
    f, norm = conv.filters, conv.norm
    z = F.conv2d(x, f.weight * conv.scale, f.bias + conv.shift, padding=1)
    z = F.batch_norm(z, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)
    return F.max_pool2d(F.leaky_relu(z, 0.1), 2)


def refreshed(x: Tensor, conv: ConvOperands) -> Tensor:
    """With the meta-step's effective weights at hand, as support images are embedded in first order."""
    (effective,) = effective_weights([conv])
    return ss_conv(x, replace(conv, effective=effective), epilogue=EPILOGUE)


WAYS: dict[str, Callable[[Tensor, ConvOperands], Tensor]] = {
    "peer_plain": plain,
    "unfolded": lambda x, conv: ss_conv(x, conv, epilogue=EPILOGUE, fold=False),
    "folded": lambda x, conv: ss_conv(x, conv, epilogue=EPILOGUE),
    "refreshed": refreshed,
}
by_size = pytest.mark.parametrize("size", SIZES)
by_way = pytest.mark.parametrize("name", WAYS)
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])


def forward(way: Callable[..., Tensor], x: Tensor, conv: ConvOperands) -> list[Tensor]:
    with torch.no_grad():
        return [way(x, conv)]


def with_gradients(way: Callable[..., Tensor], x: Tensor, conv: ConvOperands) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, conv.scale, conv.shift)]
    y = way(leaves[0], replace(conv, scale=leaves[1], shift=leaves[2]))
    # A cotangent of both signs, cheap to make.
    return [y.detach(), *torch.autograd.grad(y, leaves, y.detach().sin())]


def check(
    run: Callable[..., list[Tensor]], name: str, size: str, granularity: str, dtype: torch.dtype
) -> None:
    """Against the peer in float64: the rounding of the longest sum.

    Gradients are checked in float64 too: in float32 a few of a million values lie on the other side of a kink.
    """
    n, channels, pixels = SIZES[size]
    actual = run(WAYS[name], *problem(size, granularity, dtype))
    exact = run(plain, *problem(size, granularity, torch.float64))
    bound = 4 * torch.finfo(dtype).eps * (n * pixels**2 + 9 * channels) ** 0.5
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).norm() <= bound * e.norm()


@by_size
@by_granularity
@by_way
def test_forward(benchmark: Any, name: str, granularity: str, size: str) -> None:
    benchmark.group = (
        f"forward, {size} {SIZES[size]}, {granularity}, float32, {torch.get_num_threads()} threads"
    )
    check(forward, name, size, granularity, torch.float32)
    args = (WAYS[name], *problem(size, granularity, torch.float32))
    benchmark.pedantic(forward, args=args, rounds=7, warmup_rounds=1)


@by_size
@by_granularity
@pytest.mark.parametrize("name", ["peer_plain", "unfolded", "folded"])
def test_with_gradients(benchmark: Any, name: str, granularity: str, size: str) -> None:
    benchmark.group = (
        f"forward and gradients, {size} {SIZES[size]}, {granularity}, {torch.get_num_threads()} threads"
    )
    check(with_gradients, name, size, granularity, torch.float64)
    args = (WAYS[name], *problem(size, granularity, torch.float32))
    benchmark.pedantic(with_gradients, args=args, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
