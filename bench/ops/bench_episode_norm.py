"""Batch statistics of each task's split: `pytest bench/ops/bench_episode_norm.py`.

The peer is PyTorch's batch_norm, one group after the other, and what follows it. Every row is checked against
the peer in float64 before it is timed. `masked` counts all images, so that it computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.ops import ChannelNorm, Epilogue, episode_norm

# images a group, channels, pixels
SHAPE = (80, 64, 16)
EPILOGUE = Epilogue("after_residual", 0.1, pool=True)
Run = Callable[[Tensor, ChannelNorm, int], Tensor]


def problem(n_groups: int, dtype: torch.dtype) -> tuple[Tensor, ChannelNorm, int]:
    per_group, channels, pixels = SHAPE
    g = torch.Generator().manual_seed(n_groups)
    z = torch.randn(n_groups * per_group, channels, pixels, pixels, generator=g).to(dtype)
    weight, bias = (torch.randn(channels, generator=g).to(dtype) for _ in range(2))
    return z.contiguous(memory_format=torch.channels_last), ChannelNorm(None, None, weight, bias), n_groups


def group_by_group(z: Tensor, norm: ChannelNorm, n_groups: int) -> Tensor:
    y = torch.cat(
        [F.batch_norm(part, None, None, norm.weight, norm.bias, training=True) for part in z.chunk(n_groups)]
    )
    return F.max_pool2d(F.leaky_relu(y, 0.1), 2)


def ours(z: Tensor, norm: ChannelNorm, n_groups: int) -> Tensor:
    return episode_norm(z, norm, n_groups=n_groups, epilogue=EPILOGUE).output


def masked(z: Tensor, norm: ChannelNorm, n_groups: int) -> Tensor:
    mask = torch.ones(len(z), dtype=torch.bool)
    return episode_norm(z, norm, n_groups=n_groups, mask=mask, epilogue=EPILOGUE).output


WAYS: dict[str, Run] = {"peer_group_by_group": group_by_group, "episode_norm": ours, "masked": masked}
by_way = pytest.mark.parametrize("name", WAYS)
by_groups = pytest.mark.parametrize("n_groups", [1, 4])


def forward(way: Run, z: Tensor, norm: ChannelNorm, n_groups: int) -> list[Tensor]:
    with torch.no_grad():
        return [way(z, norm, n_groups)]


def with_gradient(way: Run, z: Tensor, norm: ChannelNorm, n_groups: int) -> list[Tensor]:
    z = z.detach().requires_grad_()
    y = way(z, norm, n_groups)
    return [y.detach(), *torch.autograd.grad(y, z, y.detach().sin())]


def check(run: Callable[..., list[Tensor]], name: str, n_groups: int, dtype: torch.dtype) -> None:
    """Against the peer in float64: the rounding of a sum over the values of a channel.

    Gradients are checked in float64 too: in float32 a few of a million values lie on the other side of a kink.
    """
    actual = run(WAYS[name], *problem(n_groups, dtype))
    exact = run(group_by_group, *problem(n_groups, torch.float64))
    bound = 4 * torch.finfo(dtype).eps * (SHAPE[0] * SHAPE[2] ** 2) ** 0.5
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).norm() <= bound * e.norm()


@by_groups
@by_way
def test_forward(benchmark: Any, name: str, n_groups: int) -> None:
    benchmark.group = f"forward, {n_groups} × {SHAPE}, float32, {torch.get_num_threads()} threads"
    check(forward, name, n_groups, torch.float32)
    args = (WAYS[name], *problem(n_groups, torch.float32))
    benchmark.pedantic(forward, args=args, rounds=7, warmup_rounds=1)


@by_groups
@by_way
def test_with_gradient(benchmark: Any, name: str, n_groups: int) -> None:
    benchmark.group = f"forward and gradient, {n_groups} × {SHAPE}, {torch.get_num_threads()} threads"
    check(with_gradient, name, n_groups, torch.float64)
    args = (WAYS[name], *problem(n_groups, torch.float32))
    benchmark.pedantic(with_gradient, args=args, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
