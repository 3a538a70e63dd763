"""One residual block on a task of 80 images, in three ways of normalising: `pytest bench/ops/bench_ss_block.py`.

The peer is the block in plain PyTorch. Every row is checked against it in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import Expected, behind_kinks, convolution_bound, mismatch
from mtl_fast.ops import ChannelNorm, ConvOperands, Epilogue, FrozenFilters, ss_block

# images, channels in and out, pixels
SHAPE = (80, 32, 64, 16)
EPILOGUE = Epilogue("after_residual", 0.1, pool=True)
Block = tuple[Tensor, list[ConvOperands]]


def problem(dtype: torch.dtype) -> Block:
    """Images, and the shortcut's operands before those of the three convolutions."""
    n, n_in, n_out, pixels = SHAPE
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    def conv(n_in: int, k: int) -> ConvOperands:
        weight = (normal(n_out, n_in, k, k) / (n_in * k * k) ** 0.5).contiguous(
            memory_format=torch.channels_last
        )
        norm = ChannelNorm(normal(n_out), normal(n_out).square() + 0.5, normal(n_out), normal(n_out))
        filters = FrozenFilters(weight, normal(n_out), padding=k // 2)
        return ConvOperands(filters, 1 + 0.1 * normal(n_out, n_in, 1, 1), normal(n_out), norm)

    x = normal(n, n_in, pixels, pixels).contiguous(memory_format=torch.channels_last)
    return x, [conv(n_in, 1), conv(n_in, 3), conv(n_out, 3), conv(n_out, 3)]


def plain(x: Tensor, operands: Sequence[ConvOperands], n_groups: int) -> Tensor:
    def layer(x: Tensor, conv: ConvOperands) -> Tensor:
        f, norm = conv.filters, conv.norm
        z = F.conv2d(x, f.weight * conv.scale, f.bias + conv.shift, padding=f.padding)
        affine = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
        if n_groups == 0:
            return F.batch_norm(z, norm.mean, norm.var, **affine)
        parts = z.chunk(n_groups)
        return torch.cat([F.batch_norm(part, None, None, training=True, **affine) for part in parts])

    shortcut, first, second, third = operands
    y = F.leaky_relu(layer(F.leaky_relu(layer(x, first), 0.1), second), 0.1)
    return F.max_pool2d(F.leaky_relu(layer(y, third) + layer(x, shortcut), 0.1), 2)


def block(fold: bool) -> Callable[..., Tensor]:
    def run(x: Tensor, operands: Sequence[ConvOperands], n_groups: int) -> Tensor:
        shortcut, *convs = operands
        return ss_block(x, convs, shortcut, epilogue=EPILOGUE, n_groups=n_groups, fold=fold).output

    return run


WAYS = {"peer_plain": plain, "unfolded": block(False), "folded": block(True)}
# With batch statistics nothing folds.
ROWS = [(name, 0) for name in WAYS] + [(name, n) for n in (1, 2) for name in ("peer_plain", "unfolded")]
NORMS = {0: "stored statistics", 1: "statistics of 1 group", 2: "statistics of 2 groups"}
by_row = pytest.mark.parametrize(("name", "n_groups"), ROWS)


def forward(
    way: Callable[..., Tensor], x: Tensor, operands: list[ConvOperands], n_groups: int
) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"y": way(x, operands, n_groups)}


def with_gradients(
    way: Callable[..., Tensor], x: Tensor, operands: list[ConvOperands], n_groups: int
) -> dict[str, Tensor]:
    scales = [conv.scale.detach().requires_grad_() for conv in operands]
    operands = [replace(conv, scale=scale) for conv, scale in zip(operands, scales, strict=True)]
    x = x.detach().requires_grad_()
    y = way(x, operands, n_groups)
    gradients = torch.autograd.grad(y, [x, *scales], y.detach().sin())
    names = ["x", *(f"scale of {layer}" for layer in ("shortcut", "first", "second", "third"))]
    return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def check(run: Callable[..., dict[str, Tensor]], name: str, n_groups: int) -> None:
    """What is timed, against the peer in float64: three layers, three rectifiers and a pooling deep."""
    n, _, n_out, pixels = SHAPE
    exact = run(plain, *problem(torch.float64), n_groups)
    bound = convolution_bound(n * pixels**2 + 9 * n_out, n_layers=3)
    expected = {k: Expected(v, bound) if k == "y" else behind_kinks(v, bound, 4) for k, v in exact.items()}
    assert not mismatch(run(WAYS[name], *problem(torch.float32), n_groups), expected)


@by_row
def test_forward(benchmark: Any, name: str, n_groups: int) -> None:
    benchmark.group = f"forward, {SHAPE}, {NORMS[n_groups]}, {torch.get_num_threads()} threads"
    check(forward, name, n_groups)
    args = (WAYS[name], *problem(torch.float32), n_groups)
    benchmark.pedantic(forward, args=args, rounds=7, warmup_rounds=1)


@by_row
def test_with_gradients(benchmark: Any, name: str, n_groups: int) -> None:
    benchmark.group = f"forward and gradients, {SHAPE}, {NORMS[n_groups]}, {torch.get_num_threads()} threads"
    check(with_gradients, name, n_groups)
    args = (WAYS[name], *problem(torch.float32), n_groups)
    benchmark.pedantic(with_gradients, args=args, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
