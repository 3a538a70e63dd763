"""A layer with a weight of each task's own, first and second order: `pytest bench/ops/bench_task_conv.py`.

The peer is plain PyTorch, a task at a time. `torch` is the definition, `task_conv` what runs by default (the native
backend where it is built). Every row is checked against the peer in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import behind_kinks, convolution_bound, mismatch
from mtl_fast.ops import ChannelNorm, ConvOperands, Epilogue, FrozenFilters, task_conv

# tasks, images a task, channels, pixels
SHAPES = {"support of 1 shot": (4, 5, 32, 42), "15 queries": (4, 75, 32, 16)}
EPILOGUE = Epilogue("after_residual", 0.0, pool=True)
Run = Callable[[Tensor, ConvOperands], Tensor]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ConvOperands]:
    n_tasks, n, channels, pixels = shape
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n_tasks * n, channels, pixels, pixels, generator=g)
    weight = torch.randn(n_tasks, channels, channels, 3, 3, generator=g) / (9 * channels) ** 0.5
    gamma, beta = (torch.randn(n_tasks, channels, generator=g) for _ in range(2))
    x = x.contiguous(memory_format=torch.channels_last)
    x, weight, gamma, beta = (t.to(dtype).requires_grad_() for t in (x, weight, gamma, beta))
    norm = ChannelNorm(None, None, gamma, beta)
    return x, ConvOperands(FrozenFilters(weight, padding=1), norm=norm)


def one_by_one(x: Tensor, conv: ConvOperands) -> Tensor:
    assert conv.norm is not None
    assert conv.norm.weight is not None
    assert conv.norm.bias is not None
    n_tasks, outputs = len(conv.filters.weight), []
    for t, part in enumerate(x.chunk(n_tasks)):
        z = F.conv2d(part, conv.filters.weight[t], padding=1)
        z = F.batch_norm(z, None, None, conv.norm.weight[t], conv.norm.bias[t], training=True)
        outputs.append(F.max_pool2d(F.relu(z), 2))
    return torch.cat(outputs)


def ours(x: Tensor, conv: ConvOperands, backend: str = "auto") -> Tensor:
    return task_conv(x, conv, n_groups=len(conv.filters.weight), epilogue=EPILOGUE, backend=backend).output


WAYS: dict[str, Run] = {
    "peer_one_by_one": one_by_one,
    "torch": partial(ours, backend="torch"),
    "task_conv": ours,
}
by_way = pytest.mark.parametrize("name", WAYS)
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def first_order(way: Run, x: Tensor, conv: ConvOperands) -> dict[str, Tensor]:
    """Output and gradients."""
    y = way(x, conv)
    grads = torch.autograd.grad(y, _leaves(x, conv), y.detach().sin())
    return {"y": y.detach()} | dict(zip(("x", "weight", "gamma", "beta"), grads, strict=True))


def second_order(way: Run, x: Tensor, conv: ConvOperands) -> dict[str, Tensor]:
    """The gradient of the gradient's product with a fixed vector."""
    y = way(x, conv)
    grads = torch.autograd.grad(y, _leaves(x, conv), y.detach().sin(), create_graph=True)
    products = torch.autograd.grad(grads, _leaves(x, conv)[:3], [g.detach().cos() for g in grads])
    return dict(zip(("x", "weight", "gamma"), products, strict=True))


def _leaves(x: Tensor, conv: ConvOperands) -> list[Tensor]:
    assert conv.norm is not None
    leaves = [x, conv.filters.weight, conv.norm.weight, conv.norm.bias]
    return [leaf for leaf in leaves if leaf is not None]


def check(run: Callable[..., dict[str, Tensor]], name: str, shape: tuple[int, int, int, int]) -> None:
    """Against the peer in float64; behind a rectifier and a pooling, each passed twice in second order."""
    exact = run(one_by_one, *problem(shape, torch.float64))
    bound = convolution_bound(9 * shape[2], 3)
    expected = {key: behind_kinks(value, bound, 4) for key, value in exact.items()}
    assert not mismatch(run(WAYS[name], *problem(shape, torch.float32)), expected)


@by_shape
@by_way
def test_first_order(benchmark: Any, name: str, shape: tuple[int, int, int, int]) -> None:
    benchmark.group = f"first order, {shape}, float32, {torch.get_num_threads()} threads"
    check(first_order, name, shape)
    args = (WAYS[name], *problem(shape, torch.float32))
    benchmark.pedantic(first_order, args=args, rounds=5, warmup_rounds=1)


@by_shape
@by_way
def test_second_order(benchmark: Any, name: str, shape: tuple[int, int, int, int]) -> None:
    benchmark.group = f"second order, {shape}, float32, {torch.get_num_threads()} threads"
    check(second_order, name, shape)
    args = (WAYS[name], *problem(shape, torch.float32))
    benchmark.pedantic(second_order, args=args, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
